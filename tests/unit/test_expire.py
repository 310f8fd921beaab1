"""Expiry destroys all it should, and nothing it must not."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from histories import DAY, LOCAL, POLICY, RECEIVED, SOURCE, TAG, local, partial, shorts, source

from zfs_replicate import Dataset, Expiry, Partial, Selection, Snapshot, expire, holds_to_read, may_expire

GUIDS = (30, 10, 20, 40)  # by position; neither they nor the txgs of one side tell the order of the other
FOREIGN = 77
SOURCE_TXGS, LOCAL_TXGS = (1, 50, 99, 100), (61, 62, 63, 64)
TEN_DAYS = replace(POLICY, keep_days=10)

# With ten days to keep and these times, cutoffs fall one second before, on, and one second after a creation.
CREATIONS = (20 * DAY, 10 * DAY, 10 * DAY + 1, 10 * DAY - 1, 0)
NOWS = (50 * DAY, 20 * DAY, 20 * DAY + 1, 5 * DAY)


def sources(rng: random.Random) -> Iterator[Dataset]:
    """Each position: absent, a bookmark, a snapshot held by us, by others or none, by nobody knows whom."""
    for choice in itertools.product(range(5), repeat=3):
        points = []
        for position, kind in enumerate(choice):
            tags: tuple[frozenset[str] | None, ...] = (
                frozenset(),
                frozenset(rng.choice(([], [RECEIVED, "nightly"]))),
                frozenset([TAG, "nightly"]),
                None,
            )
            name = f"{SOURCE}{'#' if kind == 1 else '@'}s{position}"
            if kind:
                points.append(Snapshot(name, GUIDS[position], SOURCE_TXGS[position], rng.randrange(3), tags[kind - 1]))
        rng.shuffle(points)
        snapshots = tuple(point for point in points if not point.is_bookmark)
        yield Dataset(SOURCE, "filesystem", snapshots, tuple(point for point in points if point.is_bookmark))


def locals_(rng: random.Random) -> Iterator[Dataset]:
    """Each position: absent, or here unheld, held, or held by nobody knows whom; and a foreign one, often."""
    for choice in itertools.product(range(4), repeat=3):
        snapshots = []
        for position, kind in enumerate(choice):
            tags: tuple[frozenset[str] | None, ...] = (
                frozenset(),
                frozenset([rng.choice((RECEIVED, TAG, "nightly"))]),
                None,
            )
            if kind:
                name, made = f"{LOCAL}@l{2 - position}", rng.choice(CREATIONS)
                snapshots.append(Snapshot(name, GUIDS[position], LOCAL_TXGS[position], made, tags[kind - 1]))
        if rng.randrange(2):
            snapshots.append(Snapshot(f"{LOCAL}@s0", FOREIGN, rng.choice((60, 70)), rng.choice(CREATIONS)))
        rng.shuffle(snapshots)
        yield Dataset(LOCAL, "filesystem", tuple(snapshots), held_before=rng.randrange(8) > 0)


def check(there: Dataset, mine: Dataset, now: int) -> None:
    expiry = expire(there, mine, TEN_DAYS, now)
    ours = {snapshot.guid: snapshot for snapshot in mine.snapshots}
    twins = {snapshot.guid: snapshot for snapshot in there.snapshots}
    known = twins.keys() | {bookmark.guid for bookmark in there.bookmarks}
    common = [guid for guid in GUIDS if guid in ours.keys() & known]
    if not common:
        assert expiry == Expiry(), "nothing in common: nothing is destroyed"
        return
    newest = common[-1]
    pinned: set[int | None] = set()
    if mine.partial:
        pinned = {mine.partial.from_guid} if mine.partial.from_guid else set(ours)
    ten_days_ago = min(now, ours[newest].creation) - 10 * DAY
    due = {s for s in mine.snapshots if s.creation < ten_days_ago}
    may_go = {
        snapshot
        for snapshot in due
        if mine.held_before
        and mine.snapshots[-1].guid == newest
        and snapshot.guid != newest
        and snapshot.guid not in pinned
        and snapshot.tags == frozenset()
        and known_to_be_let_go(twins.get(snapshot.guid))
    }
    assert set(expiry.destroy) == may_go
    assert {snapshot for snapshot, _ in expiry.kept} == due - may_go
    assert len(expiry.destroy) + len(expiry.kept) == len(due)


def known_to_be_let_go(twin: Snapshot | None) -> bool:
    return twin is None or (twin.tags is not None and TAG not in twin.tags)


def test_expire_takes_exactly_what_may_go_in_every_small_state() -> None:
    rng = random.Random(11)
    here = list(locals_(rng))
    destroyed = kept = 0
    for there, mine, repeat in itertools.product(sources(rng), here, range(3)):
        waiting: Partial | None = None
        if repeat == 2 and mine.snapshots:
            waiting = partial(1, rng.choice([*(s.guid for s in mine.snapshots), None]))
        state = replace(mine, partial=waiting)
        now = rng.choice(NOWS)
        try:
            check(there, state, now)
        except AssertionError as error:
            raise AssertionError(f"there {there}\nhere {state}\nnow {now}: {error}") from error
        expiry = expire(there, state, TEN_DAYS, now)
        destroyed += len(expiry.destroy)
        kept += len(expiry.kept)
    assert destroyed > 400  # the cases are worth something
    assert kept > 1000


# Cases in words. The history is the same on both sides, one snapshot every ten days; 30 days are kept.

THERE = "@a,1,0 @b,2,10 @c,3,20 @d,4,30 @e,5,40"
SOON = 41 * DAY


def expired(there: str, mine: Dataset, now: int = SOON) -> str:
    return shorts(expire(source(there), mine, POLICY, now).destroy)


def test_expire_takes_what_is_older_than_keep_days() -> None:
    assert expired(THERE, local(THERE)) == "@a"  # @b is 30 days older than @e to the second


@pytest.mark.parametrize(("seconds", "expected"), [(0, "@a @c"), (-1, "@a @b @c")], ids=["on-the-border", "past-it"])
def test_expire_decides_by_one_second(seconds: int, expected: str) -> None:
    mine = local("@a,1,0 @b,2,10 @c,3,1 @e,5,40")
    aged = [replace(s, creation=s.creation + seconds) if s.guid == 2 else s for s in mine.snapshots]
    assert expired(THERE, replace(mine, snapshots=tuple(aged))) == expected


def test_expire_counts_back_from_the_newest_common_snapshot() -> None:
    """A source that stopped making snapshots years ago must not empty the backup."""
    assert expired(THERE, local(THERE), now=4000 * DAY) == "@a"


def test_expire_counts_back_from_now_if_snapshots_are_of_the_future() -> None:
    """A source whose clock runs ahead must not empty it either."""
    mine = local("@a,1,0 @b,2,10 @c,3,20 @d,4,30 @e,5,4000")
    assert expired(THERE, mine, now=41 * DAY) == "@a @b"


@pytest.mark.parametrize("now", [0, 5 * DAY, 30 * DAY])
def test_expire_takes_nothing_if_the_clock_here_runs_behind(now: int) -> None:
    assert expired(THERE, local(THERE), now) == ""


@pytest.mark.parametrize("days", [1, 30, 100_000])
def test_expire_takes_nothing_without_a_source(days: int) -> None:
    policy = replace(POLICY, keep_days=days)
    assert expire(None, local(THERE), policy, SOON) == Expiry()
    assert expire(source(""), local(THERE), policy, SOON) == Expiry()
    assert expire(source("@x,99,40"), local(THERE), policy, SOON) == Expiry()


def test_expire_takes_nothing_without_keep_days() -> None:
    assert expire(source(THERE), local(THERE), replace(POLICY, keep_days=None), SOON) == Expiry()


def test_expire_takes_also_what_the_source_no_longer_has() -> None:
    assert expired("@e,5,40", local("@mine,9,1 " + THERE)) == "@mine @a"


def test_expire_counts_from_a_bookmark_as_from_a_snapshot() -> None:
    assert expired("#a,1,0 #e,5,40", local(THERE)) == "@a"


@pytest.mark.parametrize(
    ("there", "mine", "why"),
    [
        pytest.param("@a,1 @e,5", local("@a,1,0!nightly!offsite @e,5,40"), "held by nightly, offsite", id="held-here"),
        pytest.param("@a,1 @e,5", local("@a,1,0? @e,5,40"), "its holds could not be read", id="unknown-here"),
        pytest.param(
            "@a,1!offsite @e,5", local("@a,1,0 @e,5,40"), "twin at the source is held by offsite", id="held-there"
        ),
        pytest.param("@a,1? @e,5", local("@a,1,0 @e,5,40"), "twin at the source could not be read", id="unknown-there"),
        pytest.param("@a,1 @e,5", local("@a,1,0 @e,5,40", partial(6, 1)), "base of an interrupted", id="base"),
        pytest.param("@a,1 @e,5", local("@a,1,0 @e,5,40", partial(None)), "base of an interrupted", id="maybe-base"),
        pytest.param("@a,1 @e,5", local("@e,5,0 @a,1,40"), "", id="newest-is-not-due"),
        pytest.param("@a,1 @e,5", local("@a,1,0 @e,5,40 @m,8,41"), "newer than the newest common one, @e", id="ahead"),
        pytest.param(
            "@a,1 @e,5", replace(local("@a,1,0 @e,5,40"), held_before=False), "held nothing here when", id="first-run"
        ),
        pytest.param(
            "@a,1 @e,5", local("@a,1,0 @e,5,40!years:received"), "another line holds it: years", id="another-line"
        ),
    ],
)
def test_expire_says_why_it_keeps_what_is_too_old(there: str, mine: Dataset, why: str) -> None:
    expiry = expire(source(there), mine, POLICY, SOON)
    assert expiry.destroy == ()
    assert [snapshot.guid for snapshot, _ in expiry.kept] == ([1] if why else [])
    assert all(why in said for _, said in expiry.kept)


@pytest.mark.parametrize(
    ("keep", "expected"), [(0, "@a @b @c @d"), (1, "@a @b @c @d"), (3, "@a @b"), (4, "@a"), (5, ""), (99, "")]
)
def test_expire_never_takes_the_newest_few(keep: int, expected: str) -> None:
    policy = replace(POLICY, keep_days=1, keep_min=keep)
    assert shorts(expire(source(THERE), local(THERE), policy, SOON).destroy) == expected


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(snapshots=("[a-c]",)), "@a"),
        (Selection(snapshots=("a", "d", "e")), "@a"),
        (Selection(snapshots=("d", "e")), ""),
        (Selection(exclude_snapshots=("b", "c*")), "@a"),
        (Selection(snapshots=("x*",)), ""),
    ],
)
def test_expire_takes_and_counts_only_what_is_selected(selection: Selection, expected: str) -> None:
    policy = replace(POLICY, keep_days=1, keep_min=2, selection=selection)
    assert shorts(expire(source(THERE), local(THERE), policy, SOON).destroy) == expected


def test_expire_keeps_the_newest_common_snapshot_under_any_policy() -> None:
    expiry = expire(source(THERE), local(THERE), replace(POLICY, keep_days=-10_000), now=9999 * DAY)
    assert shorts(expiry.destroy) == "@a @b @c @d"
    assert [why for _, why in expiry.kept] == ["the newest common snapshot"]


def test_expire_ignores_foreign_tags_on_the_twin() -> None:
    assert expired(THERE.replace("@a,1,0", "@a,1,0!other!offsite:received"), local(THERE)) == "@a"


def test_holds_to_read_are_those_of_twins_that_nothing_else_keeps() -> None:
    here = local(f"@a,1 @b,2!keep @c,3 @d,4!{RECEIVED}")
    there = source("@a,1 @b,2 @c,3 @d,4")
    unknown = replace(there, snapshots=tuple(replace(it, tags=None) for it in there.snapshots))
    policy, now = replace(POLICY, keep_days=0), 99 * DAY
    assert [twin.short for twin in holds_to_read(unknown, here, policy, now)] == ["@a", "@c", "@d"]
    assert [twin.short for twin in holds_to_read(unknown, here, POLICY, now)] == ["@d"]
    assert may_expire(unknown, here, POLICY, now) == set()
    assert may_expire(None, here, policy, now) == set()
