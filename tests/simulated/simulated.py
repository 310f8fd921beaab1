"""A small ZFS machine in memory: it answers the commands that the program runs, and no others.

What it says and refuses is what real ZFS says and refuses: test_conformance.py asks both the same. What it leaves
out: data (a number stands for it), properties, encryption, sends that share one pipe, how far a token has come, and
that a stream under way keeps others from what it writes.

    world = World()
    source, backup = Machine(world, "source", "backuppool"), Machine(world, "this host", "offsite")
    source.create("backuppool/virt"); source.snapshot("backuppool/virt@one")
    wire = Wire(source, backup)
    Run(policy, Near(wire, source), Near(wire, backup), wire.carry, report)

Every moment at which the program could die, or somebody else could act, passes through `Wire.at`.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Callable

from zfs_replicate import (
    DATASET_KINDS,
    DAY,
    FAILING,
    FAST_COLUMNS,
    LEFT_OUT,
    LIST_COLUMNS,
    LIST_KINDS,
    OVERRIDES,
    POINT_KINDS,
    STREAM_FLAGS,
    TAKEN_OVER,
    Account,
    Answer,
    BatchResult,
    Failure,
    ReceivedStream,
    StreamFailed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zfs_replicate import Command, StreamBatch

GUID_STEP = 0x9E3779B97F4A7C15
"""Odd, so that all multiples of it differ: guids that neither run with time nor fit in 63 bits."""


SEGMENT_BYTES = 2**20
USED, WRITTEN = 2**12, 2**16
"""Sizes are made up."""


class Refused(Exception):
    """zfs says no: its message, as the program or an administrator gets to read it, and its exit status."""

    def __init__(self, said: str, status: int = 1) -> None:
        super().__init__(said)
        self.status = status


@dataclass
class World:
    """What all machines share: one clock, and guids that never come twice."""

    now: int = 1_700_000_000
    made: int = 0

    def guid(self) -> int:
        self.made += 1
        return self.made * GUID_STEP % 2**64


@dataclass
class Point:
    """A snapshot or a bookmark. `doomed`: marked by `destroy -d`, it goes when nothing needs it any more."""

    guid: int
    createtxg: int
    creation: int
    content: int = 0
    tags: set[str] = field(default_factory=set)
    held: dict[str, int] = field(default_factory=dict)  # since when, by tag; what was there before the story is of old
    doomed: bool = False


@dataclass(frozen=True)
class Segment:
    """One stream of a pipe: a snapshot in full, or from a base. `resumed`: the rest of one."""

    kind: str
    name: str
    guid: int
    creation: int
    base: int | None
    resumed: bool = False

    @property
    def token(self) -> str:
        return f"1-{self.guid:x}-{self.base or 0:x}-{self.name.encode().hex()}"


@dataclass
class Store:
    """A filesystem or volume. `files`: holds files of its own. `content` differs after every write.

    `partial`: an interrupted receive waits, on top of the snapshot with the guid `pinned` (None: on nothing).
    """

    kind: str = "filesystem"
    snapshots: dict[str, Point] = field(default_factory=dict)
    bookmarks: dict[str, Point] = field(default_factory=dict)
    files: bool = False
    values: dict[str, str] = field(default_factory=dict)  # the properties that are set here
    has_received: bool = False  # whether properties came with a stream
    mounted: bool = False
    content: int = 0
    partial: Segment | None = None
    pinned: int | None = None
    unborn: bool = False  # a first receive has not come to its end: the dataset is its partial state

    @property
    def readonly(self) -> bool:
        return self.values.get("readonly") == "on"

    @readonly.setter
    def readonly(self, value: bool) -> None:
        self.values["readonly"] = "on" if value else "off"

    @property
    def mark(self) -> str:
        return self.values.get(FAILING, "")

    @mark.setter
    def mark(self, value: str) -> None:
        self.values[FAILING] = value

    @property
    def newest(self) -> Point | None:
        return max(self.snapshots.values(), key=lambda point: point.createtxg, default=None)

    def point(self, guid: int | None) -> tuple[str, Point] | None:
        """The snapshot with this guid, and its short name."""
        return next(((name, point) for name, point in self.snapshots.items() if point.guid == guid), None)

    def since(self, guid: int) -> set[int]:
        """The guids of what is newer than that snapshot."""
        found = self.point(guid)
        return {it.guid for it in self.snapshots.values() if found and it.createtxg > found[1].createtxg}

    def changed_since(self, guid: int | None) -> bool:
        found = self.point(guid)
        return not found or found[1].content != self.content

    def later(self, guid: int | None) -> list[str]:
        """The snapshots that came after this one, oldest first; all of them if there is none such."""
        found = self.point(guid)
        later = [it for it in self.snapshots.items() if not found or it[1].createtxg > found[1].createtxg]
        return [name for name, _ in sorted(later, key=lambda it: it[1].createtxg)]

    def settle_partial(self) -> None:
        """The partial receive is over, one way or the other."""
        self.partial = self.pinned = None
        self.reap()

    def reap(self) -> None:
        """Destroy what is marked for it, and needed no more."""
        for name, point in list(self.snapshots.items()):
            if point.doomed and not point.tags and point.guid != self.pinned:
                del self.snapshots[name]


def split(name: str) -> tuple[str, str]:
    dataset, _, short = name.partition("@")
    assert dataset, name
    assert short, f"not a snapshot: {name!r}"
    return dataset, short


class Machine:
    """A host with one pool. `ask` is for the program; what is named in words is for the others."""

    def __init__(self, world: World, label: str, pool: str, txg: int = 100) -> None:
        self.world = world
        self.label = label
        self.account: Account | None = None
        self.txg = txg
        self.datasets = {pool: Store()}

    # what others do

    def create(self, name: str, kind: str = "filesystem", *, files: bool = True) -> None:
        """A dataset, and its parents as `create -p` does."""
        self.add(name, Store(kind, files=files), parents=True)

    def write(self, name: str) -> None:
        """Change what is in a dataset."""
        store = self.store(name)
        if store.readonly:
            raise Refused(f"cannot write to '{name}': Read-only file system")
        store.files = True
        store.content = self.world.guid()

    def destroy_dataset(self, name: str) -> None:
        """With all its snapshots, as `destroy -r` does; but not with its children."""
        store = self.store(name)
        if any(point.tags for point in store.snapshots.values()):
            raise Refused(f"cannot destroy '{name}': dataset is busy")
        if self.below(name) != [name]:
            raise Refused(f"cannot destroy '{name}': filesystem has children")
        del self.datasets[name]

    def snapshot(self, name: str) -> int:
        dataset, short = split(name)
        if dataset not in self.datasets:
            raise Refused(f"cannot open '{dataset}': dataset does not exist", 2)
        store = self.datasets[dataset]
        if short in store.snapshots:
            raise Refused(f"cannot create snapshot '{name}': dataset already exists")
        if store.unborn:
            raise Refused(f"cannot create snapshot '{name}': dataset is busy")
        guid = self.world.guid()
        store.snapshots[short] = Point(guid, self.next_txg(), self.world.now, store.content)
        return guid

    def bookmark(self, name: str, mark: str) -> None:
        dataset, _ = split(name)
        point = self.find(name, f"cannot open '{name}'", 2)
        if mark in self.store(dataset).bookmarks:
            raise Refused(f"cannot create bookmark '{dataset}#{mark}': bookmark exists")
        self.store(dataset).bookmarks[mark] = replace(point, tags=set(), held={}, doomed=False)

    def rename(self, name: str, new: str) -> None:
        """Rename a snapshot: holds go with it."""
        dataset, short = split(name)
        self.find(name, f"cannot open '{name}'")
        snapshots = self.store(dataset).snapshots
        if new in snapshots:
            raise Refused(f"cannot rename '{name}': dataset already exists")
        snapshots[new] = snapshots.pop(short)

    def hold(self, tag: str, name: str) -> None:
        point = self.find(name, f"cannot hold snapshot '{name}'")
        if tag in point.tags:
            raise Refused(f"cannot hold snapshot '{name}': tag already exists on this dataset")
        point.tags.add(tag)
        point.held[tag] = self.world.now

    def release(self, tag: str, name: str) -> None:
        point = self.find(name, f"cannot release hold from snapshot '{name}'")
        if tag not in point.tags:
            raise Refused(f"cannot release hold from snapshot '{name}': no such tag on this dataset")
        point.tags.remove(tag)
        self.store(split(name)[0]).reap()

    def doom(self, name: str) -> None:
        """As `destroy -d` does: at once if nothing needs it, else when the last hold, or the partial receive, goes."""
        dataset, short = split(name)
        if short not in self.store(dataset).snapshots:
            self.destroy(dataset, [short])
        self.store(dataset).snapshots[short].doomed = True
        self.store(dataset).reap()

    def destroy(self, dataset: str, shorts: list[str]) -> None:
        """All or nothing; those that are gone do not count, unless all are."""
        store = self.store(dataset)
        there = [short for short in shorts if short in store.snapshots]
        if not there:
            raise Refused("could not find any snapshots to destroy; check snapshot names.")
        for short in there:
            if store.snapshots[short].guid == store.pinned:
                raise Refused(f"cannot destroy '{dataset}@{short}': snapshot has dependent clones")
            if store.snapshots[short].tags:
                raise Refused(f"cannot destroy snapshot {dataset}@{short}: dataset is busy")
        for short in there:
            del store.snapshots[short]

    def rollback(self, name: str) -> None:
        """As `rollback -r` does: where a newer snapshot is held, the other newer ones are gone before it says so."""
        store = self.store(split(name)[0])
        point = self.find(name, f"cannot open '{name}'")
        later = store.later(point.guid)
        if any(store.snapshots[short].guid == store.pinned for short in later):
            raise Refused(f"cannot rollback to '{name}': clones of previous snapshots exist")
        for mark in [mark for mark, it in store.bookmarks.items() if it.createtxg > point.createtxg]:
            del store.bookmarks[mark]
        held = [short for short in later if store.snapshots[short].tags]
        for short in set(later) - set(held):
            del store.snapshots[short]
        if held:
            raise Refused(f"cannot destroy '{split(name)[0]}@{held[0]}': dataset is busy")
        store.content = point.content

    def rename_dataset(self, name: str, new: str) -> None:
        """Its children, snapshots and what waits in it move along."""
        store = self.store(name)
        if new.startswith(name + "/"):
            raise Refused(f"cannot rename to '{new}': New dataset name cannot be a descendant of current dataset name")
        if new in self.datasets:
            raise Refused(f"cannot rename '{name}': dataset already exists")
        self.add(new, store)
        for old in self.below(name):
            self.datasets[new + old[len(name) :]] = self.datasets.pop(old)

    # the parts of it

    def next_txg(self) -> int:
        self.txg += 7
        return self.txg

    def store(self, name: str) -> Store:
        if name not in self.datasets:
            raise Refused(f"cannot open '{name}': dataset does not exist")
        return self.datasets[name]

    def find(self, name: str, prefix: str, status: int = 1) -> Point:
        dataset, short = split(name)
        if dataset not in self.datasets or short not in self.datasets[dataset].snapshots:
            raise Refused(f"{prefix}: dataset does not exist", status)
        return self.datasets[dataset].snapshots[short]

    def below(self, root: str) -> list[str]:
        return sorted(name for name in self.datasets if name == root or name.startswith(root + "/"))

    def add(self, name: str, store: Store, *, parents: bool = False) -> None:
        parent = name.rpartition("/")[0]
        if name in self.datasets:
            raise Refused(f"cannot create '{name}': dataset already exists")
        if parent not in self.datasets:
            if not parents or not parent:
                raise Refused(f"cannot create '{name}': parent does not exist")
            self.add(parent, Store(), parents=True)
        if self.datasets[parent].kind != "filesystem":
            raise Refused(f"cannot create '{name}': parent is not a filesystem")
        self.datasets[name] = store

    # what the program asks

    def ask(self, *commands: Command) -> Answer:
        """The answer of zfs. A command that the program has no business to run is an AssertionError."""
        (command,) = commands
        action: Callable[[list[str]], Answer] | None = getattr(self, f"{command[0]}_{command[1]}", None)
        assert action, f"not a command of the program: {command}"
        try:
            return action(list(command[2:]))
        except Refused as refused:
            return Answer(refused.status, "", f"{refused}\n")

    def has(self, program: str) -> bool:
        return True

    def stream_command(self, *commands: Command, then: Command = ()) -> Command:
        return commands[0]

    def connected(self) -> bool:
        return True

    def close(self) -> None:
        pass

    def each(self, names: list[str], action: Callable[[str], None]) -> Answer:
        """Each by itself; one failure does not stop the others, but shows in the exit status."""
        assert names
        errors = []
        for name in names:
            try:
                action(name)
            except Refused as refused:
                errors.append(f"{refused}\n")
        return Answer(int(bool(errors)), "", "".join(errors))

    def zfs_list(self, words: list[str]) -> Answer:
        if words[:3] == ["-H", "-o", "name,mounted"]:
            states = [f"{name}\t{'yes' if self.store(name).mounted else 'no'}\n" for name in words[3:]]
            return Answer(0, "".join(states), "")
        if words[0] == "-H":
            assert words[:5] == ["-H", "-o", "name", "-t", DATASET_KINDS], words
            lines: list[str] = []

            def show_name(name: str) -> None:
                self.store(name)
                lines.append(f"{name}\n")

            return replace(self.each(words[5:], show_name), stdout="".join(lines))
        if words[:5] == ["-Hp", "-r", "-t", "snapshot", "-o"]:
            assert words[5] == "name,used,written", words
            self.store(words[6])
            rows = [
                row for name in self.below(words[6]) for row in self.rows(name, points=True) if row[1] == "snapshot"
            ]
            return Answer(0, "".join(f"{row[0]}\t{USED}\t{WRITTEN}\n" for row in rows), "")
        assert words.pop(0) == "-Hp", words
        depth = words.pop(0) if words[0] != "-t" else ""
        assert depth in ("-r", "") or (depth == "-d" and words.pop(0) == "1"), words
        kinds, columns, roots = words[1], words[3], words[4:]
        assert (words[0], words[2]) == ("-t", "-o"), words
        assert columns == ",".join(FAST_COLUMNS if kinds == POINT_KINDS else LIST_COLUMNS), words
        if not depth:
            assert kinds == LIST_KINDS, words
            return self.list_exactly(roots)
        shown: dict[str, bool] = {}  # whether with its points

        def show(root: str) -> None:
            self.store(root)
            for name in self.below(root):
                if depth == "-r" or "/" not in name[len(root) + 1 :]:
                    shown[name] = shown.get(name, False) or depth == "-r" or name == root

        answer = self.each(roots, show)
        listed = [
            row for name, points in shown.items() for row in self.rows(name, points=points) if str(row[1]) in kinds
        ]
        if kinds == POINT_KINDS:
            listed = [(row[0], *row[2:4]) for row in listed]
        return replace(answer, stdout="".join("\t".join(map(str, row)) + "\n" for row in listed))

    def list_exactly(self, names: list[str]) -> Answer:
        lines: list[str] = []

        def show(name: str) -> None:
            dataset = name.partition("@")[0]
            rows = self.rows(dataset, points=True) if dataset in self.datasets else ()
            found = ["\t".join(map(str, row)) + "\n" for row in rows if row[0] == name]
            if not found:
                raise Refused(f"cannot open '{name}': dataset does not exist")
            lines.extend(found)

        return replace(self.each(names, show), stdout="".join(lines))

    def rows(self, name: str, *, points: bool) -> Iterator[tuple[str | int, ...]]:
        """A dataset and its points, as LIST_COLUMNS has them; in no order that anybody should rely on."""
        store = self.datasets[name]
        token = store.partial.token if store.partial else "-"
        yield name, store.kind, 1, 1, 1, "-", token, "off", "-", "-", "lz4"
        for kind, mark, found in (("snapshot", "@", store.snapshots), ("bookmark", "#", store.bookmarks)):
            for short, point in sorted(found.items(), key=lambda item: item[1].guid) if points else ():
                userrefs = len(point.tags) if mark == "@" else "-"
                yield name + mark + short, kind, point.guid, point.createtxg, point.creation, userrefs, *"-----"

    def zfs_holds(self, words: list[str]) -> Answer:
        assert words.pop(0) == "-H", words
        lines: list[str] = []

        def show(name: str) -> None:
            point = self.find(name, f"cannot open '{name}'")
            for tag in sorted(point.tags):
                date = time.strftime("%a %b %e %H:%M %Y", time.localtime(point.held.get(tag, 0)))
                lines.append(f"{name}\t{tag}\t{date}\n")

        return replace(self.each(words, show), stdout="".join(lines))

    def zfs_hold(self, words: list[str]) -> Answer:
        tag = words.pop(0)
        assert not tag.startswith(("-", ".")), tag
        return self.each(words, lambda name: self.hold(tag, name))

    def zfs_release(self, words: list[str]) -> Answer:
        tag = words.pop(0)
        assert not tag.startswith(("-", ".")), tag
        return self.each(words, lambda name: self.release(tag, name))

    def zfs_destroy(self, words: list[str]) -> Answer:
        (name,) = words
        assert re.fullmatch("[^-@%#,][^@%#,]*(@[^@%#]+|#[^@%#,]+)", name), f"this destroys more than points: {name}"
        dataset, mark, shorts = re.split("([@#])", name)
        if mark == "@":
            self.destroy(dataset, shorts.split(","))
        elif self.datasets.get(dataset, Store()).bookmarks.pop(shorts, None) is None:
            raise Refused(f"bookmark '{name}' does not exist.")
        return Answer(0, "", "")

    def zfs_rollback(self, words: list[str]) -> Answer:
        assert words.pop(0) == "-r", words
        (name,) = words
        self.rollback(name)
        return Answer(0, "", "")

    def zfs_rename(self, words: list[str]) -> Answer:
        name, new = words
        if "@" in name:
            assert split(name)[0] == split(new)[0] and not re.search("[%#,]", name + new), words
            self.rename(name, split(new)[1])
            return Answer(0, "", "")
        assert not re.search("[-@%#,]", name[:1] + new[:1]) and not re.search("[@%#,]", name + new), words
        self.rename_dataset(name, new)
        return Answer(0, "", "")

    def zfs_bookmark(self, words: list[str]) -> Answer:
        name, mark = words
        dataset, _, short = mark.partition("#")
        assert (dataset, bool(short)) == (split(name)[0], True), words
        self.bookmark(name, short)
        return Answer(0, "", "")

    def zfs_set(self, words: list[str]) -> Answer:
        *values, name = words
        assert values, words
        known = (*OVERRIDES, *(word for word in values if re.fullmatch(f"{TAKEN_OVER}=[0-9]+", word)))
        assert all(value in known or value.startswith(f"{FAILING}=") for value in values), words
        self.store(name).values.update(value.partition("=")[::2] for value in values)
        return Answer(0, "", "")

    def zfs_unmount(self, words: list[str]) -> Answer:
        (name,) = words
        if not self.store(name).mounted:
            raise Refused(f"cannot unmount '{name}': not currently mounted")
        self.store(name).mounted = False
        return Answer(0, "", "")

    def zfs_inherit(self, words: list[str]) -> Answer:
        """A mark is not handed down here: nothing of the program asks for it below."""
        prop, name = words
        assert prop in (FAILING, TAKEN_OVER, "mountpoint"), words
        self.store(name).values.pop(prop, None)
        return Answer(0, "", "")

    def zfs_get(self, words: list[str]) -> Answer:
        """A mark, where it was set. What is set here, or came with a stream, and the values of that. Or what tells pools
        apart: a machine has one."""
        if words[:3] == ["-H", "-s", "local"]:
            assert words[3:-1] == ["-o", "value", FAILING], words
            mark = self.store(words[-1]).mark
            return Answer(0, f"{mark}\n" if mark else "", "")
        if words[:6] == ["-H", "-s", "received", "-o", "name", "mountpoint"]:
            assert all(map(self.store, words[6:])), words
            return Answer(0, "", "")
        if words[0] == "-H":
            assert words[:6] == ["-H", "-s", "local,received", "-o", "name,property,source", "all"], words
            return Answer(0, "".join(map(self.sources, words[6:])), "")
        assert words[:3] == ["-Hp", "-o", "value"], words
        store = self.store(words[4])
        written = str(4096 * store.changed_since(store.newest.guid if store.newest else None))
        found = {**store.values, "guid": str(id(self)), "written": written}
        return Answer(0, f"{found[words[3]]}\n", "")

    def sources(self, name: str) -> str:
        store = self.store(name)
        received = ["compression"] * (store.has_received and "compression" not in store.values)
        rows = [(key, "local") for key in store.values] + [(key, "received") for key in received]
        return "".join(f"{name}\t{key}\t{source}\n" for key, source in rows)

    def zfs_create(self, words: list[str]) -> Answer:
        assert words[:3] == ["-u", "-o", "canmount=off"], words
        (name,) = words[3:]
        self.add(name, Store())
        return Answer(0, "", "")

    def zpool_get(self, words: list[str]) -> Answer:
        """A pool that knows the features which the flags of a stream need, and passes over others."""
        assert words[:3] == ["-Hp", "-o", "property,value"], words
        names, pool = words[3:]
        assert pool in self.datasets
        values = {f"feature@{feature}": "enabled" for needs in STREAM_FLAGS.values() for feature in needs}
        values |= {"health": "ONLINE", "capacity": "7"}
        return Answer(0, "".join(f"{name}\t{values[name]}\n" for name in names.split(",") if name in values), "")

    def zpool_sync(self, words: list[str]) -> Answer:
        (pool,) = words
        assert pool in self.datasets
        return Answer(0, "", "")

    def zfs_userspace(self, words: list[str]) -> Answer:
        assert words[:3] == ["-Hp", "-o", "objused"], words
        (name,) = words[3:]
        store = self.store(name)
        if store.kind == "volume":
            raise Refused(f"cannot open '{name}': operation not applicable to datasets of this type")
        if store.unborn:
            raise Refused(f"cannot get used/quota for {name}: dataset is busy", 255)
        return Answer(0, "250\n3\n" if store.files else "1\n", "")

    def zfs_recv(self, words: list[str]) -> Answer:
        assert words.pop(0) == "-A", words
        (name,) = words
        if name not in self.datasets:
            raise Refused(f"cannot open '{name}': dataset does not exist\nusage: ...", 2)
        store = self.datasets[name]
        if not store.partial:
            raise Refused(f"'{name}' does not have any resumable receive state to abort")
        if store.unborn and self.below(name) != [name]:
            raise Refused(f"cannot destroy '{name}': dataset already exists")
        if store.unborn:
            del self.datasets[name]
        store.settle_partial()
        return Answer(0, "", "")

    def zfs_send(self, words: list[str]) -> Answer:
        """What a token says; it decodes anywhere, also where the snapshot is not, but then the exit status tells. Or what
        a stream would be; its size is made up."""
        if words[0] == "-nP" and words[1] != "-t":
            rows = [self.foretold(segment) for segment in self.send(("zfs", "send", *words[1:]))]
            return Answer(0, f"{''.join(rows)}size\t{len(rows) * SEGMENT_BYTES}\n", "")
        parsable = words[0] == "-nP"
        assert words[:-1] in (["-nP", "-t"], ["-nvt"]), words
        token = words[-1]
        segment = self.decoded(token)
        base = f"\tfromguid = {segment.base:#x}\n" if segment.base else ""
        said = (
            f"resume token contents:\nnvlist version: 0\n{base}\tobject = 0x2\n\toffset = 0x0\n\tbytes = 0x1000\n"
            f"\ttoguid = {segment.guid:#x}\n\ttoname = {segment.name}\n"
        )
        try:
            name = self.rest(segment).name
            size = f"full\t{name}\t{SEGMENT_BYTES}\nsize\t{SEGMENT_BYTES}\n"
            return Answer(0, said + (size if parsable else f"full send of {name} estimated size is 1.00M\n"), "")
        except Refused as refused:
            return Answer(refused.status, said, f"{refused}\n")

    def foretold(self, segment: Segment) -> str:
        if segment.base is None:
            return f"full\t{segment.name}\t{SEGMENT_BYTES}\n"
        return f"incremental\t?\t{segment.name}\t{SEGMENT_BYTES}\n"

    # streams

    def decoded(self, token: str) -> Segment:
        try:
            _, guid, base, name = token.split("-")
            return Segment("", bytes.fromhex(name).decode(), int(guid, 16), 0, int(base, 16) or None, resumed=True)
        except ValueError:
            raise Refused("cannot resume send: resume token is corrupt (invalid format)", 255) from None

    def send(self, command: Command) -> list[Segment]:
        """The streams that a sending command writes, one after another."""
        words = list(command)
        assert [words.pop(0), words.pop(0)] == ["zfs", "send"], command
        if words[0] == "-t":
            assert len(words) == 2, command
            return [self.rest(self.decoded(words[1]))]
        assert [words.pop(0) for _ in range(3)] == ["-L", "-c", "-p"], command
        flag, base_name = (words.pop(0), words.pop(0)) if len(words) > 1 else ("", "")
        (name,) = words
        assert flag in ("", "-i"), command
        last = self.find(name, f"cannot open '{name}'")
        dataset, _ = split(name)
        store = self.datasets[dataset]
        if not flag:
            return [Segment(store.kind, name, last.guid, last.creation, None)]
        base = self.base(base_name, dataset)
        if base.createtxg >= last.createtxg:
            raise Refused(f"warning: cannot send '{name}': not an earlier snapshot from the same fs")
        return [Segment(store.kind, name, last.guid, last.creation, base.guid)]

    def base(self, name: str, dataset: str) -> Point:
        own, mark, short = re.split("([@#])", name)
        assert own == dataset, name
        if mark == "@":
            return self.find(name, f"cannot open '{name}'")
        if short not in self.datasets[dataset].bookmarks:
            raise Refused(f"warning: cannot send '{dataset}': incremental source ({name}) does not exist")
        return self.datasets[dataset].bookmarks[short]

    def rest(self, waiting: Segment) -> Segment:
        """The rest of an interrupted stream: both ends are looked up by guid in all of the pool, whatever they and
        their dataset are called by now."""
        own = split(waiting.name)[0]
        places = [name for name in sorted(self.datasets, key=lambda name: name != own) if self.owns(name, waiting.guid)]
        if not places:
            raise Refused(f"cannot resume send: '{waiting.name}' used in the initial send no longer exists", 255)
        store = self.datasets[places[0]]
        short, point = store.point(waiting.guid)  # type: ignore[misc]  # it has
        bases = {it.guid for it in (*store.snapshots.values(), *store.bookmarks.values())}
        if waiting.base and waiting.base not in bases:
            raise Refused(f"cannot resume send: incremental source {waiting.base:#x} no longer exists", 255)
        return replace(waiting, kind=store.kind, name=f"{places[0]}@{short}", creation=point.creation)

    def owns(self, name: str, guid: int) -> bool:
        return self.datasets[name].point(guid) is not None

    def receive(self, command: Command, segment: Segment) -> Iterator[None]:
        """Receive one stream. It stops once, half-way: left alone there, it leaves its partial state behind."""
        taken = receiving(command, segment.kind)
        name, short, force = taken.name, taken.short, taken.force
        store = self.datasets.get(name)
        if not self.allow_hint(name, short, store, segment, force=force):
            return
        if store is None:
            store = Store(segment.kind, unborn=True)
            self.add(name, store)
        if not segment.resumed:
            store.partial = segment
            store.pinned = store.newest.guid if store.newest else None
            self.take_properties(store, taken)
        yield
        if self.datasets.get(name) is not store and not store.unborn:
            raise Refused(f"cannot open '{name}': dataset does not exist\ncannot receive: dataset does not exist")
        if not store.unborn:
            self.permit_end(name, short, store, segment, force=force)
        store.kind = segment.kind
        store.content = segment.guid
        store.snapshots[short] = Point(segment.guid, self.next_txg(), segment.creation, segment.guid)
        store.settle_partial()
        store.unborn = False
        store.files = True

    @staticmethod
    def take_properties(store: Store, taken: Receiving) -> None:
        """What is set here is lost when properties come with a stream for the first time, unless it is said again."""
        if not store.has_received:
            store.values.clear()
        store.has_received = True
        store.values.update(taken.values)

    def allow_hint(self, name: str, short: str, store: Store | None, segment: Segment, *, force: bool) -> bool:
        """Refuse what zfs refuses at the head of a stream. False: it is here already, and is left out."""
        cannot = f"cannot receive {'resume' if segment.resumed else 'incremental' if segment.base else 'new'} stream:"
        if store is None:
            parent = name.rpartition("/")[0]
            if segment.base or segment.resumed:
                raise Refused(f"{cannot} destination '{name}' does not exist")
            self.store(parent)
            if self.datasets[parent].kind != "filesystem":
                raise Refused(f"{cannot} parent '{parent}' is not a filesystem")
        elif segment.resumed:
            if not store.partial or store.partial.guid != segment.guid:
                raise Refused(f"{cannot} kernel modules must be upgraded to receive this stream.")
        elif segment.base is None and not force:
            raise Refused(f"{cannot} destination '{name}' exists\nmust specify -F to overwrite it")
        elif segment.base is None and store.snapshots:
            raise Refused(f"{cannot} destination has snapshots (eg. {name}@)\nmust destroy them to overwrite it")
        elif store.partial:
            raise Refused(f'{cannot} destination {name} contains partially-complete state from "zfs receive -s".')
        elif short in store.snapshots:
            if not store.point(segment.guid):
                raise Refused(f"cannot restore to {name}@{short}: destination already exists")
            return False
        elif segment.base is not None and not store.point(segment.base):
            raise Refused(f"{cannot} most recent snapshot of {name} does not match incremental source")
        elif segment.base is not None and store.changed_since(segment.base):
            raise Refused(f"{cannot} destination {name} has been modified since most recent snapshot")
        assert not store or store.unborn or not force or not store.files, f"-F overwrites what is in {name}"
        return True

    def permit_end(self, name: str, short: str, store: Store, segment: Segment, *, force: bool) -> None:
        """Refuse what zfs refuses at the end of a stream into a dataset that was there before: then all of it waits.

        With -F whatever came meanwhile, snapshots included, is overwritten.
        """
        later = store.later(store.pinned)
        if force:
            if any(store.snapshots[it].tags for it in later):
                what = (
                    'contains partially-complete state from "zfs receive -s".' if segment.resumed else "dataset is busy"
                )
                raise Refused(f"cannot receive: destination {name} {what}")
            for it in later:
                del store.snapshots[it]
        elif later:
            raise Refused("cannot receive: kernel modules must be upgraded to receive this stream.")
        elif store.changed_since(store.pinned):
            raise Refused(f"cannot receive: destination {name} has been modified since most recent snapshot")
        if short in store.snapshots:
            raise Refused(f"cannot restore to {name}@{short}: destination already exists")


@dataclass(frozen=True)
class Receiving:
    """What a receiving command says: where the stream goes, as which snapshot, with -F or not, what is set with it."""

    name: str
    short: str
    force: bool
    values: dict[str, str]


def receiving(command: Command, kind: str) -> Receiving:
    """Read a receiving command, whose options must suit the kind of dataset."""
    words = list(command)
    assert [words.pop(0) for _ in range(5)] == ["zfs", "recv", "-s", "-u", "-h"], command
    force = words[0] == "-F"
    options = words[force:-1]
    of_filesystems = {"canmount", "quota", "refquota", "filesystem_limit", "setuid", "devices", "zoned", "sharenfs"}
    legal = {*LEFT_OUT, *(override.split("=")[0] for override in OVERRIDES)}
    if kind == "volume":
        legal -= {*of_filesystems, "sharesmb", "mountpoint"}
    assert len(options) % 2 == 0, command
    values = {}
    for flag, value in zip(options[::2], options[1::2]):
        key, _, said = value.partition("=")
        if flag == "-o":
            values[key] = said
        assert flag in ("-o", "-x"), command
        known = key in legal or (flag, value) == ("-x", "encryption") or flag == "-o"
        assert known, f"a {kind} has no such property: {command}"
    assert words[-1][0] != "-", command
    name, short = split(words[-1])
    return Receiving(name, short, force, values)


@dataclass
class Near:
    """A machine as the program reaches it: each command passes two moments, one before and one after it."""

    wire: Wire
    machine: Machine
    label: str = ""
    account: Account | None = None

    def __post_init__(self) -> None:
        self.label = self.machine.label

    def ask(self, *commands: Command) -> Answer:
        """A signal of failure ends what was to be done in turn."""
        done = Answer(0, "", "")
        for command in commands:
            answer = self.ask_one(command)
            done = Answer(answer.status, done.stdout + answer.stdout, done.stderr + answer.stderr)
            if done.status:
                break
        return done

    def ask_one(self, command: Command) -> Answer:
        answer = self.wire.at(self.machine, command, "before")
        if answer is None:
            answer = self.machine.ask(command)
            self.wire.done.append((self.label, *command[1:]))
            answer = self.wire.at(self.machine, command, "after") or answer
        return answer

    def has(self, program: str) -> bool:
        return True

    def stream_command(self, *commands: Command, then: Command = ()) -> Command:
        return self.machine.stream_command(*commands, then=then)

    def connected(self) -> bool:
        return True

    def close(self) -> None:
        self.machine.close()


def undisturbed(machine: Machine, command: Command, moment: str) -> Answer | None:
    return None


@dataclass
class Wire:
    """The ways from the program to the machines, and of the streams between them.

    `at` is called before and after every command and in the middle of every stream. What it raises happens to the
    program there; an Answer takes the place of the real one.
    """

    source: Machine
    target: Machine
    at: Callable[[Machine, Command, str], Answer | None] = undisturbed
    done: list[tuple[str, ...]] = field(default_factory=list)
    batches: list[list[str]] = field(default_factory=list)
    """Each with the datasets it brought."""

    def carry(self, batch: StreamBatch) -> BatchResult:
        self.batches.append([receiving[-1].partition("@")[0] for _, receiving in batch.streams])
        assert not batch.compressible, "all is compressed here"
        arrived: list[ReceivedStream] = []
        try:
            for sending, receiving in batch.streams:
                self.carry_one(sending, receiving)
                arrived.append(ReceivedStream(0, 0))
        except Failure as failure:
            return BatchResult(tuple(arrived), failure)
        return BatchResult(tuple(arrived))

    def carry_one(self, sending: Command, receiving: Command) -> None:
        target = receiving[-1].partition("@")[0]
        assert "-F" not in receiving or self.target.below(target) == [target], f"-F over what is below {target}"
        self.disturbed(sending, "before")
        try:
            segments = self.source.send(sending)
        except Refused as refused:
            raise StreamFailed(f"the stream failed: zfs: {refused}", sender_said=str(refused)) from None
        try:
            for segment in segments:
                for _ in self.target.receive(receiving, segment):
                    self.disturbed(sending, "half-way")
                self.done.append((self.target.label, "recv", segment.name, target))
        except Refused as refused:
            raise StreamFailed(f"the stream failed: zfs: {refused}", receiver_said=str(refused)) from None
        self.disturbed(sending, "after")

    def disturbed(self, sending: Command, moment: str) -> None:
        """An answer in place of the stream is what the sender says."""
        answer = self.at(self.source, sending, moment)
        if answer:
            raise StreamFailed(f"the stream failed: {answer.stderr}", sender_said=answer.stderr)

    def writes(self) -> list[tuple[str, ...]]:
        """The commands so far that change something, each after the label of its machine."""
        harmless = ("list", "holds", "send", "userspace", "sync", "get")
        return [command for command in self.done if command[1] not in harmless]


def days(count: float) -> int:
    return int(count * DAY)
