"""A source that lies, to the real main(): whatever it says and sends, what is here stays.

    python3 tests/tools/hostile.py --cases 5000              counts what was found wrong, by kind
    ... --seed 1234                                          one case, told command by command
    ... --commit 0e93162                                     the program of a commit, with its simulated machines
    ... --program FILE                                       another program

A case is a world (a source, a backup host with a mirror and its neighbours), some runs whose source lies in its worlds
(names, guids, histories), its answers (single words, rows, statuses) and its streams, and then runs whose source is
honest again. All that a case does follows from its seed. What is wrong is told as `KIND: what`:

    exception   something else than an exit status came out of main()
    outside     a command that changes something names what is not in the local tree, or something changed there
    belt        the last check of all had to keep a command from what is not in the local tree
    kept apart  what was set aside, or carries another line's `*:received`, was touched
    gone        something of the tree is gone that no honest source could have let go
    expiry, rename, rollback, receive, hold, place    such a command, where it has no business
    source      something at the source changes but our holds (and bookmark)
    looking     a looking mode changed something
    believed    a run went on with a listing that zfs cannot have printed for this tree
    half a listing  something went, or was released, by a listing that zfs had ended badly
    check       --check says that all is well where that cannot be known
    output      what is printed is not printable, or too much
    work        more commands than any honest run needs
    after       the source is honest again, and the mirror does not come to be in step
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import inspect
import io
import os
import pickle
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import paths
from simulated import Machine, Point, Refused, Segment, Store, World, days
from test_state_machine import Hop, foreign, guids

import zfs_replicate as program

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from zfs_replicate import Command

SOURCE = "backuppool/virt/machines"
LOCAL = "offsite/virt/machines"
TAG = "offsite"
RECEIVED = f"{TAG}:received"
ASIDE = ".quarantine-"
MADE_WAY = getattr(program, "MADE_WAY", getattr(program, "PLACEHOLDER", ".made-way"))


def named(*names: str) -> Any:
    """What the program has under one of these names: an earlier one called it otherwise."""
    return next(getattr(program, name) for name in names if hasattr(program, name))


KEYS = ("", "/www", "/www/logs", "/disk", "/empty/full")
FEW = ("", "/www")

MOST_COMMANDS = 2000
MOST_OUTPUT = 64 * 1024
LONGEST_WORD = 128 * 1024
"""What Linux takes."""


# ---------------------------------------------------------------------------------------------------------------------
# The world
# ---------------------------------------------------------------------------------------------------------------------


class Host(Machine):
    """A simulated machine that answers --doctor and --status as well, and whose listings may show more."""

    extras: tuple[str, ...] = ()
    """Datasets beside a tree that are listed with it."""
    origins: dict[str, str] = {}  # noqa: RUF012 -- replaced, never changed
    marks: dict[str, str] = {}  # noqa: RUF012 -- as this
    """What streams said of `zfs_replicate:failing`: a property that is there, but was not set here."""

    def below(self, root: str) -> list[str]:
        own = super().below(root)
        return own + [name for name in self.extras if name in self.datasets and name not in own]

    def rows(self, name: str, *, points: bool) -> Iterator[tuple[str | int, ...]]:
        for row in super().rows(name, points=points):
            yield (*row[:8], self.origins[name], *row[9:]) if row[0] in self.origins else row

    def ask(self, *commands: Command) -> Any:
        (command,) = commands
        if command[0] == "date":
            return program.Answer(0, f"{self.world.now}\n", "")
        return super().ask(command)

    def zfs_version(self, words: list[str]) -> Any:
        return program.Answer(0, "zfs-2.3.9-1\nzfs-kmod-2.3.9-1\n", "")

    def zfs_allow(self, words: list[str]) -> Any:
        return program.Answer(0, "", "")

    def zpool_get(self, words: list[str]) -> Any:
        answer = super().zpool_get(words)
        return replace(answer, stdout=f"{answer.stdout}health\tONLINE\ncapacity\t13\n")

    def zfs_list(self, words: list[str]) -> Any:
        columns = words[words.index("-o") + 1]
        if columns == f"name,{program.FAILING}":  # as it was asked for once
            answer = super().zfs_list(words)
            rows = [line.split("\t", 1) for line in answer.stdout.split("\n")[:-1]]
            lines = (f"{name}\t{self.marks.get(name, mark) if mark == '-' else mark}\n" for name, mark in rows)
            return replace(answer, stdout="".join(lines))
        if columns.startswith("used,available"):
            self.store(words[-1])
            return program.Answer(0, "1000\t1000000\n", "")
        if columns.startswith("name,type,readonly"):
            state = "\t-" * (columns.count(",") - 2)
            names = Machine.below(self, words[-1])
            return program.Answer(0, "".join(f"{it}\t{self.datasets[it].kind}\ton{state}\n" for it in names), "")
        return super().zfs_list(words)


@dataclass
class Site:
    """A source and a backup host."""

    world: World
    source: Host
    target: Host


def copy_store(target: Host, old: str, new: str, tag: str) -> None:
    """Another mirror of the same: the same guids, held by another line on its newest snapshot."""
    store: Store = pickle.loads(pickle.dumps(target.datasets[old]))
    for point in store.snapshots.values():
        point.tags = set()
    if store.newest:
        store.newest.tags = {tag}
    target.add(new, store, parents=True)


def snapshot_all(site: Site, name: str) -> None:
    for dataset, store in site.source.datasets.items():
        if in_tree(dataset, SOURCE) and store.files:
            site.source.snapshot(f"{dataset}@{name}")
    site.world.now += days(1)


def first_site(keys: Sequence[str] = KEYS) -> Site:
    """Nothing is mirrored yet; others have something on the backup host."""
    world = World()
    site = Site(world, Host(world, "localhost", "backuppool", 5000), Host(world, "this host", "offsite", 10))
    site.source.create("backuppool/virt", files=False)
    for key in keys:
        site.source.create(SOURCE + key, "volume" if key == "/disk" else "filesystem")
    if "/empty/full" in keys:
        site.source.datasets[f"{SOURCE}/empty"].files = False
    site.source.create("backuppool/virt/machines-yearly")
    site.source.snapshot("backuppool/virt/machines-yearly@theirs")
    for day in range(2):
        snapshot_all(site, f"d{day}")
    for name in ("offsite/home", "offsite/virt/machines0"):
        site.target.create(name)
        site.target.snapshot(f"{name}@h0")
    return site


def mirrored_site(keys: Sequence[str] = KEYS) -> Site:
    """Mirrored for some days, a month ago. There are neighbours: another mirror of the same source, under a name that
    begins as ours; below ours one that was set aside, one that is gone at the source, and one of another line."""
    site = first_site(keys)
    Case(site, random.Random(0)).calm("-I", "-k", "60")
    snapshot_all(site, "e")
    Case(site, random.Random(0)).calm("-I", "-k", "60")
    target = site.target
    for key in FEW:
        copy_store(target, LOCAL + key, f"{LOCAL}-yearly{key}", "years:received")
    copy_store(target, LOCAL + keys[-1], f"{LOCAL}/archive", "years:received")
    copy_store(target, f"{LOCAL}/www", f"{LOCAL}/www{ASIDE}2023-11-14-221320", RECEIVED)
    target.create(f"{LOCAL}/gone")
    for day in range(2):
        target.snapshot(f"{LOCAL}/gone@g{day}")
    target.hold(RECEIVED, f"{LOCAL}/gone@g1")
    site.world.now += days(40)
    return site


def grown_site(keys: Sequence[str] = KEYS) -> Site:
    """There is more to pull by now, and something to expire."""
    site = mirrored_site(keys)
    for key in keys:
        for name in ("x", "y") if key != "/www/logs" else ():
            site.source.snapshot(f"{SOURCE}{key}@{name}")
    site.source.create(f"{SOURCE}/new")
    site.source.snapshot(f"{SOURCE}/new@x")
    return site


def interrupted_site(keys: Sequence[str] = KEYS) -> Site:
    """Two receives were interrupted: a first one, and an increment."""
    site = grown_site(keys)
    for key, old, new in (("/www", "e", "x"), ("/new", "", "x")):
        base = site.source.datasets[SOURCE + key].snapshots[old].guid if old else None
        point = site.source.datasets[SOURCE + key].snapshots[new]
        segment = Segment("filesystem", f"{SOURCE}{key}@{new}", point.guid, point.creation, base)
        store = site.target.datasets.setdefault(LOCAL + key, Store(unborn=not old))
        store.partial = segment
        store.pinned = store.newest.guid if store.newest else None
        point.tags.add(TAG)
    return site


def other_line_site(keys: Sequence[str] = KEYS) -> Site:
    """Another line keeps something of ours for years, by its own hold on it."""
    site = grown_site(keys)
    site.target.hold("years:received", f"{LOCAL}/www/logs@d1" if "/www/logs" in keys else f"{LOCAL}/www@d1")
    return site


WORLDS = (first_site, mirrored_site, grown_site, grown_site, interrupted_site, other_line_site)


@functools.cache
def packed(begin: Callable[[Sequence[str]], Site], keys: Sequence[str]) -> bytes:
    return pickle.dumps(begin(keys))


def fresh(begin: Callable[[Sequence[str]], Site], keys: Sequence[str] = KEYS) -> Site:
    """A world of its own, without its story being told once more."""
    site: Site = pickle.loads(packed(begin, keys))
    return site


# ---------------------------------------------------------------------------------------------------------------------
# Lies
# ---------------------------------------------------------------------------------------------------------------------

NEIGHBOURS = ("-yearly", "-yearly/www", "0", "-gone", ".old", f"/www{ASIDE}2023-11-14-221320", "/archive", "/gone")
"""What follows the name of a root, and is there or might be."""

ODD_NAMES = (
    "", "/", "//x", "/x/", "/../home", "/.", "/..", "/%recv", "/x%y", "/a/b", "/www/x/y/z", "/x\0y", "/x\ty", "/x\ny", "/x\ry",
    "/x\x1b]0;owned\x07\x1b[2J", "/\udcff", "/x\u202ey", "/ ", "/-x", "/$(id)", "/'x", '/"x', "/x,y", "/x!y", "/x\\y",
    "/" + "x" * 300, "/x" * 60, "/x" * 400, f"/x{ASIDE}2030-01-01-000000", "@d0", "/www@d0", "/www#d0",
)  # fmt: skip
"""What zfs never lists, or seldom, below a root."""

ODD_SHORTS = (
    "@", "#", "@a@b", "@a#b", "#a@b", "@a%b", "@a,b", "@a b", "@a ", "@a\0", "@a\ty", "@a\ny", "@\udcff", "@\x1b[2J",
    "@" + "x" * 300, "@..", "@a/b", "", "@-", "@\u202e",
)  # fmt: skip

ODD_NUMBERS = (
    "", "-", "-1", "+1", "abc", "1.5", "0", "00", "1e9", " 1", "1 ", "\u0661", "0x10", str(2**63), str(2**64 - 1), str(2**64),
    "9" * 30, "9" * 400, "9" * 5000, "\udcff", "1\0", "none", "1_000", "2" + "0" * 11,
)  # fmt: skip

ODD_WORDS = (
    "", "-", "off", "on", "filesystem", "volume", "snapshot", "bookmark", "none", "\x1b[2J", "\udcff", "a\u202eb", "x" * 4000,
)  # fmt: skip

TAGS = (
    TAG,
    RECEIVED,
    "other",
    "a\tb",
    f"t\tdate\n{LOCAL}/www@d1\t{RECEIVED}",
    "\x1b[2J",
    "",
    "x" * 300,
    ".send-1",
    "\udcff",
)

COMPLAINTS = (
    "cannot receive incremental stream: destination has been modified since most recent snapshot",
    "permission denied",
    "cannot hold: permission denied",
    "cannot send 'x': permission denied",
    "cannot receive new stream: permission denied",
    "cannot receive new stream: out of space",
    "quota exceeded",
    "I/O error",
    "I/O is currently suspended",
    "cannot unmount '/x': pool or dataset is busy",
    "cannot unmount '\x1b[2J$(id)': pool or dataset is busy",
    "\x1b]0;owned\x07\x1b[2J\x1b[1;1H\r",
    "a\u202eb\u2028c\x85d\x9be\0f",
    "no\nzfs_replicate: all is well\n\n\nroot: password:",
    "\udcff\udcfe",
    "unsupported feature, feature flags = ffffffffffffffffffffffffff",
    "pool must be upgraded to receive this stream.",
    "dataset key must be loaded",
    "kernel modules must be upgraded",
    "cannot receive readonly property on x: \x1b[2J",
    "cannot receive readonly property on offsite: out of space",
    "resume token is corrupt",
    "toguid = 0x1\n\tfromguid = 0x2\n\ttoname = x@y\nbytes = 0xfffffffffffffffffffff",
    f"cannot open '{SOURCE}': dataset does not exist",
    f"'{LOCAL}': dataset does not exist",
    f"cannot open '{LOCAL}/www': dataset does not exist",
    "tag already exists on this dataset",
    "no such tag on this dataset",
    "command not found",
    "x" * 20_000,
    "y\n" * 5_000,
    "",
)  # fmt: skip

STATUSES = (1, 1, 1, 2, 126, 127, 255, -1, -9, 3, 0)


class Liar:
    """Decides, by a random number generator alone, what a source says that is not so. `worlds`, `answers` and `streams`
    are how often it does so in each of these."""

    def __init__(self, rng: random.Random, answers: float = 0.1, streams: float = 0.1) -> None:
        self.rng = rng
        self.answers = answers
        self.streams = streams
        self.before = ""  # an answer to something else

    # its world

    def alter(self, site: Site, target: Host) -> None:
        """One change of what the source says it has."""
        source, rng = site.source, self.rng
        kinds = (
            self.add_dataset, self.add_dataset, self.add_dataset, self.add_point, self.add_point, self.steal_guid, self.steal_guid,
            self.move, self.move, self.swap, self.drop_points, self.drop_dataset, self.turn_kind, self.turn_clock,
            self.turn_order, self.tag, self.link, self.go_on, self.go_on, self.disguise,
        )  # fmt: skip
        with contextlib.suppress(Refused):
            rng.choice(kinds)(source, target)

    def pick(self, host: Host) -> Store:
        return host.datasets[self.rng.choice(list(host.datasets))]

    def guid(self, host: Host, target: Host) -> int:
        """One that somebody has already, or a new one."""
        store = self.pick(self.rng.choice((host, target, target)))
        points = list(store.snapshots.values())
        return self.rng.choice(points).guid if points and self.rng.random() < 0.9 else host.world.guid()

    def name(self) -> str:
        rng, draw = self.rng, self.rng.random()
        if draw < 0.4:
            return SOURCE + rng.choice(NEIGHBOURS)
        if draw < 0.55:
            return SOURCE + rng.choice(ODD_NAMES)
        if draw < 0.62:
            return rng.choice(
                (
                    "",
                    SOURCE[:-1],
                    "backuppool",
                    "backuppool/virt",
                    "otherpool/x",
                    LOCAL,
                    f"{LOCAL}/www",
                    "offsite/home",
                    "x",
                )
            )
        parents = rng.choice(("", "", "/www", "/new", "/www/logs", "/x", f"/www{ASIDE}2023-11-14-221320"))
        return f"{SOURCE}{parents}/{rng.choice(('new', 'logs', 'www', 'gone', 'archive', 'a'))}"

    def short(self) -> str:
        rng = self.rng
        return (
            rng.choice(ODD_SHORTS)[1:] if rng.random() < 0.15 else rng.choice(("d0", "d1", "e", "x", "z", "g1", "h0"))
        )

    def add_dataset(self, source: Host, target: Host) -> None:
        """With snapshots whose guids are known here; perhaps all those of one dataset here."""
        name = self.name()
        store = Store(self.rng.choice(("filesystem", "filesystem", "volume")))
        if self.rng.random() < 0.5:
            there = self.pick(target)
            for short, point in there.snapshots.items():
                if self.rng.random() < 0.7:
                    store.snapshots[short] = Point(point.guid, source.next_txg(), point.creation, point.guid)
        else:
            for _ in range(self.rng.randrange(3)):
                store.snapshots[self.short()] = Point(self.guid(source, target), source.next_txg(), source.world.now)
        if self.rng.random() < 0.5:
            store.snapshots["z"] = Point(source.world.guid(), source.next_txg(), source.world.now)
        source.datasets[name] = store
        source.extras = (*source.extras, name)

    def add_point(self, source: Host, target: Host) -> None:
        store = self.pick(source)
        point = Point(self.guid(source, target), source.next_txg(), source.world.now)
        if self.rng.random() < 0.2:
            store.bookmarks[self.short()] = point
        else:
            store.snapshots[self.short()] = point

    def steal_guid(self, source: Host, target: Host) -> None:
        """A snapshot is said to be one that is here of something else."""
        points = list(self.pick(source).snapshots.values())
        if points:
            self.rng.choice(points).guid = self.guid(source, target)

    def move(self, source: Host, target: Host) -> None:
        """An ordinary rename; perhaps one that nobody can make."""
        own = [name for name in Machine.below(source, SOURCE) if name != SOURCE]
        new = self.name()
        if own and new not in source.datasets:
            old = self.rng.choice(own)
            with_children = self.rng.random() < 0.7
            for name in Machine.below(source, old) if with_children else [old]:
                source.datasets[new + name[len(old) :]] = source.datasets.pop(name)
            source.extras = (*source.extras, new)

    def swap(self, source: Host, target: Host) -> None:
        one, other = (self.rng.choice(Machine.below(source, SOURCE) or [SOURCE]) for _ in range(2))
        source.datasets[one], source.datasets[other] = source.store(other), source.store(one)

    def drop_points(self, source: Host, target: Host) -> None:
        """All but the oldest, perhaps, and a new one."""
        store = self.pick(source)
        kept = dict(list(store.snapshots.items())[: self.rng.randrange(3)])
        store.snapshots = kept
        if self.rng.random() < 0.6:
            store.snapshots["z"] = Point(source.world.guid(), source.next_txg(), source.world.now)

    def drop_dataset(self, source: Host, target: Host) -> None:
        del source.datasets[self.rng.choice(list(source.datasets))]

    def turn_kind(self, source: Host, target: Host) -> None:
        store = self.pick(source)
        store.kind = "filesystem" if store.kind == "volume" else "volume"

    def turn_clock(self, source: Host, target: Host) -> None:
        for point in self.pick(source).snapshots.values():
            point.creation = self.rng.choice((0, 1, -5, source.world.now + days(40_000), 2**33, 2**63, 2**70))

    def turn_order(self, source: Host, target: Host) -> None:
        for point in self.pick(source).snapshots.values():
            point.createtxg = self.rng.choice((0, 1, 5, 10**6, 2**64 - 1, 2**70, -3))

    def tag(self, source: Host, target: Host) -> None:
        for point in self.pick(source).snapshots.values():
            if self.rng.random() < 0.5:
                point.tags = {self.rng.choice(TAGS) for _ in range(self.rng.randrange(3))}

    def link(self, source: Host, target: Host) -> None:
        """It is a clone: of another, of itself, in a circle, of something outside, in a long chain."""
        names = list(source.datasets)
        draw = self.rng.random()
        if draw < 0.02:
            chain = [f"{SOURCE}/c{number}" for number in range(12)]
            for name in chain:
                source.datasets[name] = Store(snapshots={"o": Point(source.world.guid(), source.next_txg(), 1)})
            source.origins = {**source.origins, **{new: f"{old}@o" for old, new in zip(chain, chain[1:])}}
            return
        for _ in range(1 if draw < 0.5 else 3):
            one, other = self.rng.choice(names), self.rng.choice(names)
            shorts = list(source.datasets[other].snapshots) or ["none"]
            origin = self.rng.choice(
                (f"{other}@{self.rng.choice(shorts)}", f"{one}@d0", "x@y", "@", "\x1b", other, "-")
            )
            source.origins = {**source.origins, one: origin}

    def go_on(self, source: Host, target: Host) -> None:
        """New snapshots, as an honest source makes them."""
        source.world.now += days(self.rng.choice((1, 40)))
        for name in Machine.below(source, SOURCE):
            source.snapshot(f"{name}@n{source.world.made}")

    def disguise(self, source: Host, target: Host) -> None:
        """What is here of one dataset is said to be another: a dataset's place is taken by what somebody else has."""
        name = self.rng.choice(Machine.below(source, SOURCE) or [SOURCE])
        self.add_dataset(source, target)
        source.datasets[name] = source.datasets[source.extras[-1]]

    # its answers

    def answer(self, command: Command, truth: Any) -> Any:
        """What it says to a command."""
        said = truth
        while self.rng.random() < self.answers:
            said = self.bend(command, said)
        if truth.stdout:
            self.before = truth.stdout
        return said

    def bend(self, command: Command, it: Any) -> Any:
        rng, draw = self.rng, self.rng.random()
        if draw < 0.08:
            return replace(it, status=rng.choice(STATUSES))
        if draw < 0.2:
            return replace(it, stderr=it.stderr + rng.choice(COMPLAINTS), status=rng.choice((0, 1, 1, 255)))
        if draw < 0.24:
            return replace(it, stdout="", status=rng.choice((0, 0, 1)))
        if draw < 0.28:
            return replace(it, stdout=self.before)
        if draw < 0.31:
            return replace(it, stdout=it.stdout[: rng.randrange(len(it.stdout) + 1)])
        if draw < 0.34:
            place = rng.randrange(len(it.stdout) + 1)
            noise = rng.choice(("\0", "\t", "\n", "\udcff", "\x1b[2J", "0", "@", "#", "/", "-", "\r\n", " "))
            return replace(it, stdout=it.stdout[:place] + noise + it.stdout[place:])
        if "holds" in command and draw < 0.7:
            return self.bend_holds(command, it)
        return self.bend_rows(it)

    def bend_holds(self, command: Command, it: Any) -> Any:
        """Rows of names that were or were not asked for, with tags of all sorts."""
        rng = self.rng
        names = [word for word in command if "@" in word] + [f"{LOCAL}/www@d1", f"{SOURCE}/www@e", "x@y", "", "nothing"]
        rows = "".join(
            f"{rng.choice(names)}\t{rng.choice(TAGS)}\t{rng.choice(('date', '', chr(27), '0'))}\n"
            for _ in range(rng.randrange(4))
        )
        return replace(it, stdout=rng.choice((rows, it.stdout + rows, rows + it.stdout)))

    def bend_rows(self, it: Any) -> Any:
        rng = self.rng
        rows = it.stdout.split("\n")[:-1]
        if not rows:
            return replace(it, stdout=rng.choice(("\n", "x\n", f"{SOURCE}\n", "0\n", rng.choice(ODD_NUMBERS) + "\n")))
        place = rng.randrange(len(rows))
        draw = rng.random()
        if draw < 0.1:
            del rows[place]
        elif draw < 0.16:
            rows.insert(rng.randrange(len(rows) + 1), rows[place])
        elif draw < 0.2:
            rng.shuffle(rows)
        elif draw < 0.23:
            rows = rows * 2
        else:
            for _ in range(1 if draw < 0.8 else 4):
                self.bend_row(rows, rng.randrange(len(rows)))
        return replace(it, stdout="".join(f"{row}\n" for row in rows))

    def bend_row(self, rows: list[str], place: int) -> None:
        """One word of a row; sometimes of a row that is added."""
        rng = self.rng
        row = rows[place].split("\t")
        column = rng.randrange(len(row)) if rng.random() < 0.6 else 0
        if column == 0 and "/" in row[0]:
            dataset, mark, short = [*re.split("([@#])", row[0], maxsplit=1), "", ""][:3]
            row[0] = self.name() + mark + short if rng.random() < 0.6 else dataset + rng.choice(ODD_SHORTS)
        elif rng.random() < 0.1:
            row = rng.choice((row[:-1], [*row, "x"], row[1:], ["", *row]))
        elif row[column].isdecimal():
            row[column] = rng.choice(ODD_NUMBERS)
        else:
            row[column] = rng.choice(ODD_WORDS + ODD_NUMBERS)
        if rng.random() < 0.3:
            rows.append("\t".join(row))
        else:
            rows[place] = "\t".join(row)

    # its streams

    def stream(self, segments: list[Segment], source: Host) -> tuple[str, list[Segment]]:
        """What it sends in the place of what was asked for, and how that goes on: `well`, `cut`, `ends badly`, `package`,
        `nothing`."""
        rng = self.rng
        if rng.random() >= self.streams or not segments:
            return "well", segments
        draw = rng.random()
        if draw < 0.2:
            return "cut", segments
        if draw < 0.3:
            return "ends badly", segments
        if draw < 0.4:
            return "package", segments
        if draw < 0.5:
            return "nothing", []
        first = segments[0]
        other = rng.choice(list(source.datasets.values()))
        points = list(other.snapshots.items()) or [("z", Point(source.world.guid(), 1, 1))]
        short, point = rng.choice(points)
        new = rng.choice(
            (
                replace(first, guid=source.world.guid()),
                replace(first, guid=point.guid),
                replace(first, name=f"{SOURCE}/www@{short}", guid=point.guid),
                replace(first, creation=2**33),
                replace(first, base=None),
                replace(first, base=point.guid),
                replace(first, kind="volume" if first.kind == "filesystem" else "filesystem"),
                replace(first, name=f"{SOURCE}-yearly/www@x"),
                replace(first, name=f"{SOURCE}/www@x\n\tfromguid = 0x1\n\tbytes = 0x{'f' * 30}"),
            )
        )
        return rng.choice(("well", "well", "cut")), [new, *segments[1:]]

    def baggage(self) -> tuple[str, str]:
        """A tag that comes with a stream as a hold, and a mark as a property."""
        mark = f"0 {LOCAL}", "9" * 20 + f" {LOCAL}", "a\tb\nc", f"{2**40} {LOCAL}", "\x1b"
        if self.rng.random() >= self.streams:
            return "", ""
        return self.rng.choice(("", self.rng.choice(TAGS))), self.rng.choice(("", *mark))

    def words(self) -> str:
        """What ssh, and zfs send behind it, say."""
        return self.rng.choice(COMPLAINTS)


# ---------------------------------------------------------------------------------------------------------------------
# One case, and what must be true of it
# ---------------------------------------------------------------------------------------------------------------------


def in_tree(name: str, root: str = LOCAL) -> bool:
    return name == root or name.startswith(f"{root}/")


def dataset_of(name: str) -> str:
    return name.partition("@")[0].partition("#")[0]


def set_aside(name: str) -> bool:
    return in_tree(name) and ASIDE in name[len(LOCAL) :]


def of_others(store: Store) -> bool:
    """Whether another line holds something of it."""
    tags = {tag for point in store.snapshots.values() for tag in point.tags}
    return any(re.fullmatch("[a-z]+:received", tag) for tag in tags - {RECEIVED})


def held(store: Store) -> bool:
    return any(RECEIVED in point.tags for point in store.snapshots.values())


def picture(store: Store) -> tuple[object, ...]:
    points = {short: (it.guid, it.creation, frozenset(it.tags), it.doomed) for short, it in store.snapshots.items()}
    return (
        store.kind, store.files, store.readonly, store.mark, store.content, store.partial, points, frozenset(store.bookmarks),
    )  # fmt: skip


LOOKS = {
    "zfs": ("list", "holds", "get", "userspace", "allow", "version"),
    "zpool": ("get", "list", "status", "sync"),
    "date": ("+%s",),
}
"""Commands that change nothing, with `zfs send -n`."""


def looks(command: Command) -> bool:
    return command[1] in LOOKS.get(command[0], ()) or (command[:2] == ("zfs", "send") and "n" in command[2].strip("-t"))


@dataclass
class Told:
    """How a run ended, and what it printed."""

    status: int
    out: str
    err: str


@dataclass
class Case:
    """Runs of main() on a site; `wrong` gathers what must not be."""

    site: Site
    rng: random.Random
    liar: Liar | None = None
    loud: bool = False
    wrong: list[str] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)
    runs: int = 0
    outside_commands: int = 0

    def __post_init__(self) -> None:
        self.target = self.site.target
        self.source = self.site.source
        self.outside = self.beside()
        self.commands = 0
        self.options: argparse.Namespace = argparse.Namespace()
        self.lines: list[str] = []

    def accuse(self, kind: str, what: str) -> None:
        line = f"{kind}: {what[:300]!a}"
        if line not in self.wrong:
            self.wrong.append(line)
        if self.loud:
            print(f"!!! {line}", file=sys.__stdout__)

    def beside(self) -> dict[str, tuple[object, ...]]:
        """What is outside the tree here."""
        own = (f"{LOCAL}/", LOCAL + MADE_WAY, LOCAL + ASIDE)
        return {name: picture(it) for name, it in self.target.datasets.items() if not f"{name}/".startswith(own)}

    # a run

    def calm(self, *words: str) -> Told:
        """A run of an honest source, in the building of a world."""
        told = self.run(words)
        assert told.status == 0, (told, self.wrong)
        return told

    def run(self, words: Iterable[str]) -> Told:
        """The real main(), and what is wrong about it."""
        argv = ["-h", "localhost", "-r", SOURCE, "-l", LOCAL, "-t", TAG, *words]
        self.runs += 1
        self.commands = 0
        self.claims: dict[str, set[int]] = collections.defaultdict(
            set
        )  # guids, by the dataset that they are said to be of
        self.claimed: dict[str, set[str]] = collections.defaultdict(set)  # kinds, and names with their guids
        self.half_listed = False  # the last listing of all of the source ended badly
        self.incredible = ""  # what is wrong with the last listing of all of the source
        inside = {name: store for name, store in self.target.datasets.items() if in_tree(name)}
        self.was_held = {id(store) for store in inside.values() if held(store)}
        before = {id(store): (name, store, dict(store.snapshots)) for name, store in inside.items()}
        self.let_go: set[int] = set()
        self.given_up: set[int] = set()
        self.lines = []
        there = foreign(self.source, SOURCE, TAG)
        told = self.call(argv)
        self.check_output(told)
        self.check_outside()
        self.check_inside(before)
        if not self.liar and foreign(self.source, SOURCE, TAG) != there:
            self.accuse("source", "something changed there")
        if self.commands > MOST_COMMANDS:
            self.accuse("work", f"{self.commands} commands")
        if "this is a fault of the program" in told.out + told.err:
            self.accuse("belt", told.err)
        if told.status == 0 and self.options.check:
            newest = [store.newest for store in inside.values() if store.newest and RECEIVED in store.newest.tags]
            if any(it.creation > self.site.world.now + days(1) for it in newest):
                self.accuse("check", "OK, by a snapshot of the future")
        return told

    def call(self, argv: list[str]) -> Told:
        out = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict", newline="")
        err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", newline="")
        if self.loud:
            print(f"--- {argv} {'lies' if self.liar else 'honest'}", file=sys.__stdout__)
        status = -1
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), staged(self):
            try:
                status = program.main(argv)
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else -1
                if status != 2:
                    self.accuse("exception", f"SystemExit({end.code!r})")
            except Exception as error:  # noqa: BLE001 -- that is what we are looking for
                self.note_exception(error)
        texts = []
        for stream in (out, err):
            stream.flush()
            texts.append(stream.buffer.getvalue().decode())
        if self.loud:
            print(f"--- {status}\n{texts[0]!a}\n{texts[1]!a}", file=sys.__stdout__)
        if status not in (0, 1, 2, 3, -1):
            self.accuse("exception", f"exit status {status}")
        return Told(status, *texts)

    def note_exception(self, error: Exception) -> None:
        frames = [it for it in traceback.extract_tb(error.__traceback__) if it.filename == program.__file__]
        where = f"{frames[-1].name}" if frames else "?"
        code = f"{frames[-1].line}" if frames else ""
        self.raised.append(f"{type(error).__name__} in {where}: {code[:100]}")
        self.accuse("exception", f"{type(error).__name__} in {where}: {error}")
        if self.loud:
            traceback.print_exception(error, file=sys.__stdout__)

    # commands at either side

    def ask(self, host: Any, commands: Sequence[Command]) -> Any:
        """What a host of the program answers to commands in turn."""
        is_source = host.label != "this host"
        done = program.Answer(0, "", "")
        bare = [command[2:] if command[:2] == ("sudo", "-n") else command for command in commands]
        for command in bare:
            host.note(f"{host.label}: {' '.join(command)}")
            answer = self.ask_source(host, command) if is_source else self.ask_target(command)
            done = program.Answer(answer.status, done.stdout + answer.stdout, done.stderr + answer.stderr)
            if done.status:
                break
        if not is_source:
            return done
        if self.liar:
            truth, done = done, self.liar.answer(bare[0], done)
            if done != truth:
                self.tell("it says", bare[0], done)
        done = heard(done, " ".join(bare[0][:2]), host.label)
        self.note_claims(bare[0], done)
        return done

    def started(self, command: Command, *, by_ssh: bool = False) -> Any:
        """What the system says to a command that cannot even be started; None if it can."""
        self.commands += 1
        if self.commands > 4 * MOST_COMMANDS:
            raise KeyboardInterrupt  # enough is known
        if any("\0" in word for word in command):
            raise ValueError("embedded null byte")
        if by_ssh:
            " ".join(command).encode()
        if max(map(len, command)) >= LONGEST_WORD:
            return program.Answer(126, "", f"{command[0]}: Argument list too long")
        return None

    def tell(self, where: str, command: Command, answer: Any) -> None:
        if self.loud:
            said = repr(answer.stdout + answer.stderr)
            print(
                f"    {where} {command} -> {answer.status} {said if len(said) < 3000 else said[:3000] + '...'}",
                file=sys.__stdout__,
            )

    def ask_source(self, host: Any, command: Command) -> Any:
        refused = self.started(command, by_ssh=host.label != "localhost")
        if refused:
            return refused
        if not looks(command):
            self.check_source(command)
        try:
            answer = self.source.ask(command)
        except (AssertionError, ValueError, LookupError) as error:  # names that zfs would refuse
            answer = program.Answer(1, "", f"cannot open: invalid character ({error})"[:500])
        self.tell("source", command, answer)
        return answer

    def ask_target(self, command: Command) -> Any:
        refused = self.started(command)
        if refused:
            return refused
        changes = not looks(command)
        if changes:
            self.check_target(command)
        try:
            answer = self.target.ask(command)
        except (AssertionError, ValueError, LookupError) as error:
            if changes:
                self.accuse("place", f"no command of the program: {command}: {error}")
            answer = program.Answer(2, "", "cannot open: invalid character")
        self.tell("target", command, answer)
        if changes:
            self.check_protection(command)
        return answer

    def note_claims(self, command: Command, answer: Any) -> None:
        """What the source says of names and guids, true or not."""
        if command[1] != "list":
            return
        for line in answer.stdout.split("\n"):
            row = line.split("\t")
            guid = row[1] if len(row) == 3 else row[2] if len(row) > 4 else ""
            if guid.isdecimal() and len(guid) < 30:
                dataset, mark, short = row[0].partition("@")
                self.claims[dataset_of(dataset)].add(int(guid))
                self.claimed[dataset_of(dataset)].add(f"{short} {int(guid)}" if mark else row[1])
        is_whole = {"-Hp", "-r"} <= {*command} and "filesystem" in command[4] and "createtxg" in command[6]
        if is_whole:
            self.half_listed = answer.status != 0
        if is_whole and answer.status == 0:
            self.incredible = never_printed(answer.stdout)

    # what may be done

    def key(self, name: str) -> str:
        return dataset_of(name)[len(LOCAL) :]

    def check_source(self, command: Command) -> None:
        verb, words = command[1], command[2:]
        if not self.may_change():
            self.accuse("looking", f"{command}")
        fine = command[0] == "zfs" and (
            (verb in ("hold", "release") and words[0] == TAG)
            or (verb == "bookmark" and self.options.bookmark and re.search(rf"#{TAG}-[0-9]+$", words[1]))
            or (verb == "destroy" and len(words) == 1 and re.search(rf"^[^@]+#{TAG}-[0-9]+$", words[0]))
        )
        if not fine:
            self.accuse("source", f"{command}")
        if self.half_listed and verb in ("release", "destroy"):
            self.accuse("half a listing", verb)

    def may_change(self) -> bool:
        it = self.options
        return not (it.dry_run or it.status or it.check or it.doctor)

    def check_target(self, command: Command) -> None:
        """Each changing command, before it is run."""
        if not self.may_change():
            self.accuse("looking", f"{command}")
        if command[0] != "zfs":
            self.accuse("place", f"{command}")
            return
        verb, words = command[1], list(command[2:])
        if self.incredible and not any(program.FAILING in word for word in words):
            self.accuse("believed", self.incredible)
        if self.half_listed and (verb in ("destroy", "rename", "rollback", "release") or "-A" in words):
            self.accuse("half a listing", verb)
        named = self.named(verb, words)
        if not named:
            self.accuse("place", f"no such command: {command}")
        for name in named:
            away = verb != "recv" and in_tree(dataset_of(name), LOCAL + MADE_WAY)
            away |= verb == "rename" and name == named[1] and named[0] == LOCAL and name.startswith(LOCAL + ASIDE)
            if (
                not in_tree(dataset_of(name))
                and not away
                and not (verb == "create" and f"{LOCAL}/".startswith(f"{name}/"))
            ):
                self.outside_commands += 1
                self.accuse("outside", f"{verb} {name}")
        if any(not in_tree(re.split(f"{ASIDE}|{MADE_WAY}", dataset_of(name))[0]) for name in named):
            return
        if not self.options.retire:
            for name in named:
                store = self.target.datasets.get(dataset_of(name))
                is_mark = any(program.FAILING in word for word in words)
                taken_over = verb not in ("hold", "release") and not is_mark and store is not None and of_others(store)
                its_own_aside = verb == "rename" and name == named[1] and self.options.quarantine
                if (set_aside(dataset_of(name)) and not its_own_aside) or taken_over:
                    self.accuse("kept apart", f"{verb} {name}")
        getattr(self, f"check_{verb}", lambda words: None)(words)

    def named(self, verb: str, words: list[str]) -> list[str]:
        """The names that a changing command changes."""
        if verb in ("hold", "release"):
            return words[1:]
        if verb == "rename":
            return words
        if verb in ("destroy", "rollback", "create", "set", "inherit", "recv", "unmount"):
            return words[-1:]
        return []

    def check_hold(self, words: list[str]) -> None:
        if words[0] != RECEIVED:
            self.accuse("hold", f"{words}")
        known = set().union(*self.claims.values())
        for name in words[1:]:
            dataset, _, short = name.partition("@")
            point = self.target.datasets.get(dataset, Store()).snapshots.get(short)
            if point and point.guid not in known:
                self.accuse("hold", f"nothing in common with the source: {name}")

    def check_release(self, words: list[str]) -> None:
        if words[0] != RECEIVED:
            self.accuse("hold", f"release {words}")

    def check_destroy(self, words: list[str]) -> None:
        """I8, and the age that was asked for."""
        dataset, mark, shorts = words[0].partition("@")
        store = self.target.datasets.get(dataset)
        if not mark or re.search("[%#@]", shorts) or len(words) != 1:
            self.accuse("expiry", f"destroys more than snapshots: {words}")
        if store is None:
            return
        newest = store.newest
        if self.options.keep_days is None:
            self.accuse("expiry", f"without -k: {words}")
        if id(store) not in self.was_held:
            self.accuse("expiry", f"not held by us when the run began: {words}")
        elif newest and RECEIVED not in newest.tags and not self.is_noisy():
            self.accuse("expiry", f"does not end in the newest common one: {words}")
        elif newest and newest.guid not in self.claims.get(SOURCE + self.key(dataset), ()):
            self.accuse("expiry", f"ends in what the source does not have: {words}")
        twins = self.source.datasets.get(SOURCE + self.key(dataset), Store()).snapshots.values()
        held_there = {point.guid for point in twins if TAG in point.tags}
        left = len(store.snapshots)
        for short in shorts.split(","):
            point = store.snapshots.get(short)
            if point is None:
                continue
            left -= 1
            limit = min(self.site.world.now, newest.creation if newest else 0) - days(self.options.keep_days or 0)
            if point.creation >= limit:
                self.accuse("expiry", f"too young: {dataset}@{short}")
            if not self.liar and point.guid in held_there:
                self.accuse("expiry", f"I2: the twin is held: {dataset}@{short}")
            if not point.tags:
                self.let_go.add(point.guid)
        if left < self.options.keep_min:
            self.accuse("expiry", f"--keep-min: {words}")

    def check_rename(self, words: list[str]) -> None:
        name, new = words
        if "@" in name:  # of a snapshot: nothing is lost by that, and it takes no other's name
            if name.partition("@")[0] != new.partition("@")[0]:
                self.accuse("rename", f"{words}")
            return
        store = self.target.datasets.get(name)
        if store is None:
            return
        for inner in Machine.below(self.target, name):
            if inner != name and of_others(self.target.datasets[inner]):
                self.accuse("kept apart", f"rename of {name} takes {inner} along")
        if ASIDE in new[len(name) :] and new.startswith(name):
            if not self.options.quarantine:
                self.accuse("rename", f"without --quarantine: {words}")
            if not self.is_in_its_way(name, store):
                self.accuse("rename", f"nothing was in its way: {words}")
            return
        if new == name + getattr(program, "BETWEEN_NAMES", "/"):  # for a while: where it goes from there is seen next
            return
        if new == name + MADE_WAY:
            if store.snapshots or store.files:
                self.accuse("rename", f"what makes way has data: {words}")
            return
        if new == name.replace(MADE_WAY, "", 1):  # it comes back
            return
        ours = [point for point in store.snapshots.values() if RECEIVED in point.tags]
        if not ours:
            self.accuse("rename", f"of what we do not hold: {words}")
            return
        last = max(ours, key=lambda point: point.createtxg)
        if last.guid not in self.claims.get(SOURCE + self.key(new), ()):
            self.accuse("rename", f"what we hold is no snapshot of that: {words}")
        # What is said in a listing that was not believed is among the claims too.
        said = set() if self.is_noisy() else self.claims.get(SOURCE + self.key(name), set())
        if {point.guid for point in store.snapshots.values()} & said:
            self.accuse("rename", f"it is still at the source: {words}")

    def is_noisy(self) -> bool:
        """Whether listings within one run may contradict each other."""
        return bool(self.liar and (self.liar.answers or self.source.origins))

    def is_in_its_way(self, name: str, store: Store) -> bool:
        """Whether anything here, or said by listings, is a reason for a way out."""
        newest = store.newest
        if self.is_noisy() or not newest or store.changed_since(newest.guid) or store.partial:
            return True
        dataset = SOURCE + self.key(name)
        taken = {
            short for short, point in store.snapshots.items() if f"{short} {point.guid}" not in self.claimed[dataset]
        }
        said = {it.partition(" ")[0] for it in self.claimed[dataset] if " " in it}
        other_kind = store.kind not in self.claimed[dataset]
        return newest.guid not in self.claims.get(dataset, ()) or other_kind or bool(taken & said)

    def check_rollback(self, words: list[str]) -> None:
        dataset, _, short = words[-1].partition("@")
        if not self.options.rollback:
            self.accuse("rollback", f"without --rollback: {words}")
        store = self.target.datasets.get(dataset, Store())
        if short in store.snapshots:
            to = store.snapshots[short]
            if to.guid not in self.claims.get(SOURCE + self.key(dataset), ()):
                self.accuse("rollback", f"to what is not at the source: {words}")
            # A stream from an older base lets zfs say that the mirror was modified: to roll back then loses nothing.
            lied_to = self.liar is not None and self.liar.streams > 0
            if not store.later(to.guid) and not store.changed_since(to.guid) and not lied_to:
                self.accuse("rollback", f"nothing was in its way: {words}")
            self.let_go |= {store.snapshots[it].guid for it in store.later(to.guid)}

    def check_create(self, words: list[str]) -> None:
        if words[:-1] != ["-u", "-o", "canmount=off"]:
            self.accuse("place", f"create {words}")

    def check_set(self, words: list[str]) -> None:
        """Of ours is set what makes a mirror inert, or that runs fail."""
        name = words[-1]
        store = self.target.datasets.get(name, Store())
        for word in words[:-1]:
            if word.startswith(f"{program.FAILING}="):
                if name != LOCAL:
                    self.accuse("place", f"set {words}")
            elif word not in (*program.OVERRIDES, "readonly=on"):
                self.accuse("place", f"set {words}")
            else:
                self.check_ours("set", name, store)

    def check_inherit(self, words: list[str]) -> None:
        if words[0] == program.FAILING and words[-1] == LOCAL:
            return
        if words[0] != "mountpoint":
            self.accuse("place", f"inherit {words}")
        self.check_ours("inherit", words[-1], self.target.datasets.get(words[-1], Store()))

    def check_unmount(self, words: list[str]) -> None:
        self.check_ours("unmount", words[-1], self.target.datasets.get(words[-1], Store()))

    def check_ours(self, verb: str, name: str, store: Store) -> None:
        """It is about to be received into: it is empty, or a mirror of what the source has by that name."""
        common = {point.guid for point in store.snapshots.values()} & self.claims.get(SOURCE + self.key(name), set())
        if not common and (store.snapshots or store.files):
            self.accuse("place", f"{verb} {name}, which is no mirror")
        self.check_below(verb, name)

    def check_below(self, verb: str, name: str) -> None:
        """Nothing is done to what has others' data below it."""
        for inner in Machine.below(self.target, name):
            store = self.target.datasets[inner]
            strange = store.snapshots and SOURCE + self.key(inner) not in self.claims and not held(store)
            if inner != name and strange and not set_aside(inner):
                self.accuse("place", f"{verb} {name}, and {inner} below it is neither ours nor at the source")

    def check_recv(self, words: list[str]) -> None:
        dataset, mark, _ = words[-1].partition("@")
        store = self.target.datasets.get(dataset)
        if words[0] == "-A":
            if store and store.unborn:
                self.given_up.add(id(store))
            return
        flags = [word for word in words[:-1] if word[0] == "-" and len(word) == 2]
        if not mark:
            self.accuse("receive", "the snapshot is not named")
        if "-h" not in flags:
            self.accuse("receive", "holds come along")
        if "-s" not in flags or "-u" not in flags:
            self.accuse("receive", f"not resumable, or mounted: {words}")
        if "-F" in flags and store:
            if store.snapshots or store.files:
                self.accuse("receive", f"-F onto data: {words[-1]}")
            if Machine.below(self.target, dataset) != [dataset]:
                self.accuse("receive", "-F above children")
        if not in_tree(SOURCE + self.key(dataset), SOURCE) or SOURCE + self.key(dataset) not in self.claims:
            self.accuse("receive", f"not at the source: {dataset}")

    # what must be so after each command, and after each run

    def check_protection(self, command: Command) -> None:
        """What was held here when the run began is held, at every instant."""
        if command[1] not in ("release", "destroy", "rollback", "rename") or self.options.retire:
            return
        for store in self.target.datasets.values():
            if id(store) in self.was_held and not held(store):
                self.accuse("hold", f"nothing of it is held any more, by {command[1]}")

    def check_outside(self) -> None:
        now = self.beside()
        if now != self.outside:
            new = now.keys() - self.outside.keys()
            if new - set(named("with_ancestors", "lineage")(LOCAL)) or any(
                now.get(it) != then for it, then in self.outside.items()
            ):
                names = [it for it in now.keys() | self.outside.keys() if now.get(it) != self.outside.get(it)]
                self.accuse("outside", f"changed: {sorted(names)}")
            self.outside = now

    def check_inside(self, before: dict[int, tuple[str, Store, dict[str, Point]]]) -> None:
        now = {id(store): name for name, store in self.target.datasets.items()}
        for number, (name, store, points) in before.items():
            if number not in now and number not in self.given_up:
                self.accuse("gone", f"the dataset {name}")
            there = {point.guid for point in store.snapshots.values()}
            for short, point in points.items():
                if point.guid not in there and point.guid not in self.let_go:
                    self.accuse("gone", f"{name}@{short}")

    def check_output(self, told: Told) -> None:
        for text in (told.out, told.err):
            plain = text.replace("\r\x1b[K", "")  # the meter's own
            if not plain.replace("\n", "").isprintable():
                found = sorted({char for char in plain if not char.isprintable() and char != "\n"})
                self.accuse("output", f"not printable: {found!a}")
            if len(text) > MOST_OUTPUT:
                self.accuse("output", "too much")

    # streams

    def pull(self, source: Any, target: Any, batches: Any) -> Any:
        """A batch; an earlier program had several, each with what carries it, and wants a list."""
        results = []
        for batch in [it[0] for it in batches] if isinstance(batches, (list, tuple)) else [batches]:
            arrived: list[Any] = []
            failure = None
            for sending, receiving in batch.streams:
                said, ended = self.carry(source, target, sending, receiving)
                if said is not None:
                    arrived.append(named("ReceivedStream", "Arrival")(1000, 1.0, said))
                try:
                    blame(ended)
                except program.StreamFailed as error:
                    failure = named("with_hint", "explained")(error, source, sending, target, receiving)
                    break
            results.append(named("BatchResult", "Passage")(tuple(arrived), failure))
        return results if isinstance(batches, (list, tuple)) else results[0]

    def carry(self, source: Any, target: Any, sending: Command, receiving: Command) -> tuple[str | None, list[Any]]:
        """What the receiver said if the stream arrived, and how the processes ended."""
        for command, host in ((for_stream(source, sending), source), (for_stream(target, receiving), target)):
            if self.started(command, by_ssh=host.label not in ("localhost", "this host")):
                raise program.StreamFailed(f"cannot start {command[0]}: Argument list too long")
        self.check_target(receiving)
        sender = "zfs" if source.label == "localhost" else "ssh"
        sent: list[Segment] = []
        ends: tuple[int, str] = (0, "")
        try:
            sent = self.source.send(sending)
        except Refused as refused:
            ends = (refused.status, str(refused))
        except (AssertionError, ValueError, KeyError) as error:
            ends = (1, f"cannot send: invalid name ({error})")
        going = "well"
        if self.liar:
            going, sent = self.liar.stream(sent, self.source)
            if going != "well" or ends[0]:
                ends = (self.rng.choice((1, 1, 255)), self.liar.words())
        said, complaint = "", ""
        if not sent:
            complaint = "cannot receive: failed to read from stream"
        try:
            for segment in sent:
                self.receive(receiving, segment, going)
        except Refused as refused:
            complaint = str(refused)
        except AssertionError as error:
            complaint = f"cannot receive: {error}"
            if not self.liar:  # who may send a volume as a filesystem
                self.accuse("receive", f"zfs was not asked as it should be: {error}")
        self.tell("stream", (*sending, "|", *receiving), program.Answer(int(bool(complaint)), str(sent), complaint))
        stages = [(sender, ends[0], last_words(ends[1])), ("mbuffer", 0, "")]
        if complaint:
            return None, [*stages, ("zfs", 1, complaint)]
        return said, stages

    def receive(self, receiving: Command, segment: Segment, going: str) -> None:
        dataset, named, _ = receiving[-1].partition("@")
        if going == "package":
            if named:
                raise Refused("cannot receive: cannot specify snapshot name for multi-snapshot stream")
            self.accuse("receive", "a recursive package is taken")
            raise Refused("cannot receive: I/O error")
        if not named and not re.fullmatch("[A-Za-z0-9_.: -]+", segment.name.partition("@")[2]):
            raise Refused("cannot receive: invalid name")
        before = {id(it) for it in self.target.datasets.get(dataset, Store()).snapshots.values()}
        segment = replace(segment, creation=segment.creation % 2**64)  # the head of a stream has so many bits for it
        for _ in self.target.receive(receiving, segment):
            if going == "cut":
                raise Refused("cannot receive: failed to read from stream")
        tag, mark = self.liar.baggage() if self.liar else ("", "")
        store = self.target.datasets.get(dataset)
        if store is None:
            return
        for point in store.snapshots.values():
            if id(point) not in before and tag and "-h" not in receiving:
                point.tags.add(tag)
        if mark and program.FAILING not in receiving:
            self.target.marks = {**self.target.marks, dataset: mark}

    # before and after

    def lie(self) -> None:
        """A run of a source that lies."""
        self.run(drawn(self.rng))

    def heal(self, truth: Host) -> None:
        """The source is honest again: plain runs bring in step what nothing stands in the way of."""
        self.liar = None
        self.source = self.site.source = truth
        truth.world.now = self.target.world.now
        hop = Hop(truth, self.target, SOURCE, LOCAL, set())
        clear = [key for key in hop.branches() if not self.hindered(hop, key)]
        self.run(())
        told = self.run(())
        if told.status not in (0, 1):
            self.accuse("after", f"exit {told.status}: {told.err}")
        for key in clear:
            newest = hop.theirs(key).newest
            if newest and not hop.ours(key).point(newest.guid):
                self.accuse("after", f"{key!r} is not in step: {told.err}")
        for key in hop.branches() if told.status == 0 else ():
            there, here = hop.held(key)
            common_of = getattr(hop, "common" if hasattr(hop, "common") else "mutual")
            common, holdable = common_of(key, bookmarks=True), common_of(key, bookmarks=False)
            # What was common once, and is newer here, may be the last copy: it stays held.
            mirror = hop.ours(key)
            newer = mirror.since(common) if common is not None and hasattr(mirror, "since") else set()
            if not mirror.values and not here:
                continue  # nothing shows that it is ours: it is taken over when there is something to pull
            if common is not None and (here - newer != {common} or not {holdable} - {None} <= there):
                self.accuse("after", f"holds of {key!r}")

    def hindered(self, hop: Hop, key: str) -> bool:
        """Whether something here or above it stands in the way, or another line keeps it."""
        local = hop.ours(key)
        if of_others(local) or local.partial is not None:
            return True
        for it in [key[: found.start()] for found in re.finditer("/", key)] + [key]:
            hop.estranged = guids(hop.ours(it)) - guids(hop.theirs(it))
            if hop.obstructed(it):
                return True
        return False


def blame(ended: Sequence[Any]) -> None:
    """As the program does it; it once did not tell sender and receiver apart."""
    blame = named("raise_for_status", "blame")
    if len(inspect.signature(blame).parameters) == 1:
        blame(ended)
    else:
        blame(ended[:2], ended[2:])


def heard(answer: Any, doing: str, label: str) -> Any:
    """An answer as the hosts of the program take it in, with its bounds."""
    if not hasattr(program, "Output"):
        return answer
    output, complaints = program.Output(doing, label), program.Tail(program.COMPLAINT_BYTES)
    output.add(answer.stdout.encode(errors="surrogateescape"))
    complaints.add(answer.stderr.encode(errors="surrogateescape"))
    return program.Answer.of(answer.status, output.kept, complaints.last())


def last_words(text: str) -> str:
    return "\n".join(text.encode(errors="surrogateescape").decode(errors="replace").strip().splitlines()[-5:])


def never_printed(listing: str) -> str:
    """What of a listing zfs cannot have printed for this tree; "" if it can."""
    rows = [line.split("\t") for line in listing.split("\n")[:-1]]
    names = {row[0] for row in rows}
    if SOURCE not in names:
        return "the root is not there"
    if len(names) != len(rows):
        return "a row comes twice"
    for row in rows:
        name = dataset_of(row[0])
        if not in_tree(name, SOURCE):
            return f"not of this tree: {row[0]!r}"
        if len(row[0]) > 255 or not re.fullmatch(
            "[A-Za-z0-9_.: -]+(/[A-Za-z0-9_.: -]+)*([@#][A-Za-z0-9_.: -]+)?", row[0]
        ):
            return f"no name: {row[0]!r}"
        if name not in names or (name != SOURCE and name.rpartition("/")[0] not in names):
            return f"without its parent: {row[0]!r}"
        guid = row[1] if len(row) == 3 else row[2] if len(row) > 4 else ""
        if not re.fullmatch("[0-9]{1,20}", guid) or int(guid) >= 2**64:
            return f"no guid: {guid!r}"
    return ""


def drawn(rng: random.Random) -> list[str]:
    """Options of a line."""
    words: list[str] = []

    def maybe(chance: float, *some: str) -> None:
        if rng.random() < chance:
            words.extend(some)

    maybe(0.7, "-k", rng.choice(("1", "30", "30", "3")))
    maybe(0.3, "-I")
    maybe(0.15, "--bookmark")
    maybe(0.4, rng.choice(("--rollback", "--quarantine")))
    maybe(0.1, "--keep-min", "3")
    maybe(0.2, "-j", "3")
    maybe(0.06, "--snapshots", "[d-e]*")
    maybe(0.06, "--exclude", "www*")
    maybe(0.04, "--no-recursive")
    maybe(0.2, rng.choice(("-v", "-vv")))
    maybe(0.1, "--json")
    maybe(0.04, "--syslog")
    maybe(0.05, "--progress")
    maybe(0.03, "--decrypt")
    maybe(0.05, "--retries", "2")
    maybe(0.05, "--sudo", rng.choice(("both", "local", "remote")))
    maybe(0.1, "-h", "source.example")
    maybe(0.25, rng.choice(("--dry-run", "--status", "--check", "--doctor", "--retire", "--dry-run")))
    return words


def case_of(seed: int, *, loud: bool = False) -> Case:
    """All that happens in one case."""
    rng = random.Random(seed)
    site = fresh(rng.choice(WORLDS), rng.choice((KEYS, FEW, FEW, FEW, FEW, FEW)))
    truth: Host = pickle.loads(pickle.dumps(site.source))
    liar = Liar(rng, rng.choice((0, 0, 0.03, 0.15, 0.4)), rng.choice((0, 0.1, 0.5)))
    case = Case(site, rng, liar, loud=loud)
    try:
        for _ in range(rng.choice((1, 1, 1, 2))):
            for _ in range(rng.choice((0, 1, 1, 2, 3))):
                liar.alter(site, case.target)
            case.lie()
        if rng.random() < 0.08:
            case.heal(truth)
    except KeyboardInterrupt:
        if case.commands <= MOST_COMMANDS:
            raise
        case.accuse("work", f"{case.commands} commands, and no end")
    return case


# ---------------------------------------------------------------------------------------------------------------------
# The program on the stage
# ---------------------------------------------------------------------------------------------------------------------

NOW: list[Case] = []
"""The case at work is the last one."""


def own_user() -> str:
    return "root"


def for_stream(host: Any, command: Command) -> Command:
    """What runs a command there as an end of a stream."""
    found: Command = getattr(host, "stream_command" if hasattr(host, "stream_command") else "piped")(command)
    return found


class Here(program.LocalHost):
    """This host, and the source where -h is localhost."""

    def ask(self, *commands: Command) -> Any:
        return NOW[-1].ask(self, commands)


class There(program.SshHost):
    def ask(self, *commands: Command) -> Any:
        return NOW[-1].ask(self, commands)

    def connected(self) -> bool:
        return True

    def has(self, it: str) -> bool:
        return True

    def stream_command(self, *commands: Command, then: Command = ()) -> Command:
        return commands[0]

    piped = stream_command

    def close(self) -> None:
        pass


def resolved(destination: str, *words: object) -> Any:
    return program.Connection(destination, (), {"user": ("root",), "hostname": (destination,), "port": ("22",)})


@contextlib.contextmanager
def unlocked(*words: object, **more: object) -> Iterator[Any]:
    yield types.SimpleNamespace(moved=lambda: None, filenos=(), file=types.SimpleNamespace(fileno=lambda: 0))


def pulled(source: Any, target: Any, batches: Any, *more: object) -> Any:
    return NOW[-1].pull(source, target, batches)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    NOW[-1].options = OWN_PARSE(argv)
    return NOW[-1].options


def logged(level: object, text: str) -> None:
    """As syslog(3) takes it."""
    if "\0" in text:
        raise ValueError("embedded null character")
    text.encode()


OWN_PARSE = program.parse
CLOCK = types.SimpleNamespace(**vars(time))
CLOCK.time = lambda: NOW[-1].site.world.now
CLOCK.sleep = lambda seconds: None
LOG = types.SimpleNamespace(openlog=lambda *it: None, syslog=logged, LOG_PID=0, LOG_DAEMON=0, LOG_ERR=0, LOG_INFO=0)

STAND_INS: dict[str, Any] = {
    "LocalHost": Here,
    "SshHost": There,
    "pull": pulled,
    "lock": unlocked,
    "parse": parsed,
    "parser": functools.cache(program.parser),
    "installed": lambda name: True,
    "own_name": own_user,
    "last_activity": lambda *words: None,
    "last_moved": lambda *words: None,
    "time": CLOCK,
    "syslog": LOG,
}
"""What of the program touches the world, by its name there. All else of it runs as it is."""


@contextlib.contextmanager
def staged(case: Case) -> Iterator[None]:
    """The program with the world of a case."""
    own = {name: getattr(program, name) for name in STAND_INS if hasattr(program, name)}
    resolve = program.Connection.resolve
    NOW.append(case)
    vars(program).update({name: STAND_INS[name] for name in own})
    program.Connection.resolve = staticmethod(resolved)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        NOW.pop()
        vars(program).update(own)
        program.Connection.resolve = resolve  # type: ignore[method-assign]


# ---------------------------------------------------------------------------------------------------------------------
# By hand
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """What has happened in many cases."""

    cases: int = 0
    runs: int = 0
    outside: int = 0
    raised: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: collections.Counter[str] = field(default_factory=collections.Counter)
    seeds: dict[str, int] = field(default_factory=dict)

    def add(self, seed: int, case: Case) -> None:
        self.cases += 1
        self.runs += case.runs
        self.outside += case.outside_commands
        self.raised.update(set(case.raised))
        for line in {generally(line) for line in case.wrong}:
            self.wrong[line] += 1
            self.seeds.setdefault(line, seed)
        for line in case.raised:
            self.seeds.setdefault(line, seed)

    def complaint(self) -> str:
        """What is wrong, with how to see it; "" if nothing is."""
        lines = [
            f"{what} ({count} times): python3 tests/tools/hostile.py --seed {self.seeds[what]}"
            for what, count in self.wrong.items()
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        head = f"{self.cases} cases, {self.runs} runs: {len(self.raised)} distinct exceptions, {self.outside} commands outside the tree"
        lines = [f"{count:7} {what}   (seed {self.seeds[what]})" for what, count in self.raised.most_common()]
        lines += [f"{count:7} {what}   (seed {self.seeds[what]})" for what, count in self.wrong.most_common()]
        return "\n".join([head, *lines])


def generally(line: str) -> str:
    """What is wrong, without the names."""
    kind, _, what = line.partition(": ")
    what = what.strip("'\"")
    if kind in ("outside", "kept apart", "believed"):
        return f"{kind}: {' '.join(what.split(' ')[:2] if kind == 'believed' else what.split(' ')[:1])}"
    return f"{kind}: {re.split('[:(]', what)[0][:80]}"


def search(seeds: Iterable[int], until: float = float("inf")) -> Sums:
    """Until all seeds were tried, or the time has come."""
    sums = Sums()
    for seed in seeds:
        if time.monotonic() >= until:
            break
        sums.add(seed, case_of(seed))
    return sums


def elsewhere(options: argparse.Namespace, argv: list[str]) -> int:
    """The same with another program: of a commit, with the tests as they were then."""
    with tempfile.TemporaryDirectory() as directory:
        if options.commit:
            archive = subprocess.run(
                ["git", "-C", paths.ROOT, "archive", options.commit], check=True, stdout=subprocess.PIPE
            )
            subprocess.run(["tar", "-x", "-C", directory], input=archive.stdout, check=True)
        else:
            for name in ("tests", "setup.cfg"):
                Path(directory, name).symlink_to(paths.ROOT / name)
            Path(directory, "zfs_replicate.py").write_bytes(Path(options.program).read_bytes())
        script = Path(directory, "tests", "tools", "hostile.py")
        if options.commit:
            script.parent.mkdir(exist_ok=True)  # the folders were not always there
            for file in (Path(__file__), Path(paths.__file__)):
                (script.parent / file.name).write_bytes(file.read_bytes())
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run([sys.executable, str(script), *argv], env=environment).returncode


def main(argv: list[str]) -> int:
    it = argparse.ArgumentParser()
    it.add_argument("--cases", type=int, default=1000)
    it.add_argument("--first", type=int, default=0)
    it.add_argument("--minutes", type=float, default=1e9)
    it.add_argument("--seed", type=int)
    it.add_argument("--commit")
    it.add_argument("--program")
    options = it.parse_args(argv)
    if options.commit or options.program:
        rest = ["--cases", str(options.cases), "--first", str(options.first), "--minutes", str(options.minutes)]
        return elsewhere(options, rest + (["--seed", str(options.seed)] if options.seed is not None else []))
    if options.seed is not None:
        case = case_of(options.seed, loud=True)
        print("\n".join(case.wrong) or "nothing wrong")
        return int(bool(case.wrong))
    began = time.monotonic()
    sums = search(range(options.first, options.first + options.cases), began + 60 * options.minutes)
    print(sums)
    print(f"{sums.cases / (time.monotonic() - began):.0f} cases a second")
    return int(bool(sums.wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
