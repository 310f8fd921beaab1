"""A notation for datasets and their histories, shared by the tests.

A history is a line of words, oldest first. A word is `@name,guid` for a snapshot or `#name,guid` for a bookmark;
`,day` may follow for its creation (else it is the place in the line), then `!tag` for each hold, or `?` for holds
that could not be read:

    source("@a,1 #a,1 @b,2,30!offsite!other @c,3?")

A guid that comes again, as a bookmark of a snapshot does, stands at the same place in time. The two sides count
their txgs, as two pools do, independently of each other.
"""

from __future__ import annotations

import re

from zfs_replicate import Dataset, Partial, Policy, Snapshot

DAY = 86400

SOURCE = "backuppool/virt/machines"
LOCAL = "offsite/virt/machines"
TAG = "offsite"
RECEIVED = "offsite:received"

POLICY = Policy(SOURCE, LOCAL, TAG, keep_days=30)
EVERY = Policy(SOURCE, LOCAL, TAG, keep_days=30, intermediates=True)

WORD = re.compile(r"(?P<short>[@#][^,]+),(?P<guid>\d+)(,(?P<day>\d+))?(?P<unknown>\?)?(?P<tags>(![^!]+)*)")


def points(dataset: str, history: str, first_txg: int = 1000) -> tuple[Snapshot, ...]:
    """The snapshots and bookmarks that `history` writes down, in its order."""
    txgs: dict[int, int] = {}
    found = []
    for place, word in enumerate(history.split()):
        part = WORD.fullmatch(word)
        assert part, f"not a word of a history: {word!r}"
        guid = int(part["guid"])
        txg = txgs.setdefault(guid, first_txg + 10 * place)
        day = place if part["day"] is None else int(part["day"])
        tags = None if part["unknown"] else frozenset(part["tags"].split("!")[1:])
        found.append(Snapshot(dataset + part["short"], guid, txg, day * DAY, tags))
    return tuple(found)


def source(history: str, name: str = SOURCE, kind: str = "filesystem") -> Dataset:
    """A dataset of the source."""
    all_points = points(name, history)
    snapshots = tuple(point for point in all_points if not point.is_bookmark)
    return Dataset(name, kind, snapshots, tuple(point for point in all_points if point.is_bookmark))


def local(
    history: str, partial: Partial | None = None, name: str = LOCAL, kind: str = "filesystem", empty: bool = False
) -> Dataset:
    """A dataset here, in which we held a snapshot when the run began."""
    snapshots = points(name, history, first_txg=7)
    return Dataset(name, kind, snapshots, partial=partial, empty=empty, held_before=True)


def partial(to_guid: int | None, from_guid: int | None = None) -> Partial:
    """An interrupted receive; without `from_guid` a first one, without either one whose token is beyond decoding."""
    return Partial("1-c0ffee-d8-789c", to_guid, from_guid, corrupt=to_guid is None)


def shorts(snapshots: tuple[Snapshot, ...]) -> str:
    """The short names in order, `@a @b`, to compare at a glance."""
    return " ".join(snapshot.short for snapshot in snapshots)
