"""Whatever happens, in whatever order: the invariants of a run hold at every moment.

Simulated machines (two, or three in a chain), other people at work on them, a clock that jumps, and runs that crash,
fail or lose the link at any moment. In this file a moment is: before and after each command, and half-way in each
stream. At each of them is checked what must hold always:

    I1  what was mirrored once has a common snapshot, held on the source and here
    I2  no snapshot is destroyed here while its twin at the source carries our tag
    I4  nothing at the source changes but our holds; here, snapshots are appended and expired, and nothing else

and after each run:

    I3  after a fault, plain runs come to the very end that the undisturbed run comes to
    I5  a run after a successful run writes nothing, says nothing and exits 0
    I6  a run that exits 0 has brought the newest snapshot of every dataset, and moved all holds

ZFS_REPLICATE_EXAMPLES=5000 looks longer, and then at random; without it every run of the tests does the same.
"""

from __future__ import annotations

import collections
import copy
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Callable

import pytest
from histories import RECEIVED, TAG
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from simulated import Machine, Near, Point, Refused, Store, Wire, World, days

from zfs_replicate import Answer, Command, Failure, LinkLost, Policy, Report, Run

if TYPE_CHECKING:
    from collections.abc import Iterator

COUNTS: collections.Counter[str] = collections.Counter()
ROOTS = ("backuppool/virt/machines", "offsite/virt/machines", "vault/mirror")
KEYS = ("", "/a", "/a/b", "/disk")


class Crash(BaseException):
    """The program dies on the spot: nothing of it may catch this."""


class Quiet(Report):
    """Keeps what would be printed."""

    def failure(self, subject: str, failure: Failure) -> None:
        self.failures.append(f"{subject}: {failure}")


@dataclass(frozen=True)
class Fault:
    """What happens to a run at its moment number `number`."""

    kind: str
    number: int

    def fits(self, moment: str, *, at_source: bool) -> bool:
        """A crash before a command is one after the last; only the way to the source can be lost."""
        return moment != "before" if self.kind == "crash" else self.kind != "lost" or at_source

    def strike(self) -> Answer:
        COUNTS[f"faults: {self.kind}"] += 1
        if self.kind == "crash":
            raise Crash
        if self.kind == "lost":
            raise LinkLost("the link broke")
        return Answer(1, "", "out of luck")


@dataclass(frozen=True)
class Options:
    keep_days: int | None = None
    intermediates: bool = False


@dataclass
class Hop:
    """One job: a tree and its mirror. `mirrored`: the keys that had a common snapshot held on both sides once."""

    source: Machine
    target: Machine
    source_root: str
    target_root: str
    mirrored: set[str] = field(default_factory=set)

    def keys(self) -> list[str]:
        return [name[len(self.source_root) :] for name in self.source.below(self.source_root)]

    def theirs(self, key: str) -> Store:
        return self.source.datasets.get(self.source_root + key, Store())

    def ours(self, key: str) -> Store:
        return self.target.datasets.get(self.target_root + key, Store())

    def mutual(self, key: str, *, bookmarks: bool) -> int | None:
        """The guid of the newest point of the source that is here too."""
        store, here = self.theirs(key), {point.guid for point in self.ours(key).snapshots.values()}
        points = [*store.snapshots.values(), *(store.bookmarks.values() if bookmarks else ())]
        known = [point for point in points if point.guid in here]
        return max(known, key=lambda point: point.createtxg).guid if known else None

    def held(self, key: str) -> tuple[set[int], set[int]]:
        """Guids that carry our tags, there and here."""
        there = {point.guid for point in self.theirs(key).snapshots.values() if TAG in point.tags}
        return there, {point.guid for point in self.ours(key).snapshots.values() if RECEIVED in point.tags}

    def is_protected(self, key: str) -> bool:
        there, here = self.held(key)
        return bool(there & here)

    def note_mirrored(self) -> None:
        self.mirrored |= {key for key in self.keys() if self.is_protected(key)}

    # what is in the way of an honest run

    def obstructed(self, key: str) -> bool:
        """Whether somebody has made it impossible to bring this dataset up to date without losing something here."""
        source, local = self.theirs(key), self.ours(key)
        if self.target_root + key not in self.target.datasets:
            return False
        if source.kind != local.kind:
            return True
        if not local.snapshots or not source.snapshots:
            return False
        points = {**source.bookmarks, **source.snapshots}.values()
        base = local.newest
        taken = {name for name, point in local.snapshots.items() if (source.snapshots.get(name) or point) is not point}
        clash = any(source.snapshots[name].guid != local.snapshots[name].guid for name in taken)
        waits = local.partial is not None and local.partial.name.partition("@")[2] in local.snapshots
        return clash or waits or base is None or base.guid not in {point.guid for point in points}

    def check_success(self) -> None:
        """I6, and the holds as they must be after a successful run."""
        for key in self.keys():
            newest, local = self.theirs(key).newest, self.ours(key)
            common, holdable = self.mutual(key, bookmarks=True), self.mutual(key, bookmarks=False)
            if newest:
                ahead = common is not None and common != holdable
                assert ahead or local.point(newest.guid), f"exit 0, but {key!r} lacks the newest snapshot"
                assert local.partial is None, f"exit 0, but {key!r} has a partial receive"
            if local.snapshots and common is None:
                continue  # nothing to pull and nothing in common: left alone
            assert self.held(key) == ({holdable} - {None}, {common} - {None}), f"holds of {key!r} after success"

    def end_state(self) -> dict[str, object]:
        """What two runs must agree in; txgs may differ."""
        found: dict[str, object] = {}
        for machine, root in ((self.source, self.source_root), (self.target, self.target_root)):
            for name in machine.below(root):
                store = machine.datasets[name]
                points = sorted((n, p.guid, p.creation, sorted(p.tags)) for n, p in store.snapshots.items())
                found[name] = (store.kind, points, store.partial)
        return found


def foreign(machine: Machine, root: str, tag: str) -> dict[str, dict[str, tuple[int, frozenset[str]]]]:
    """All points of a tree with the tags that are not ours; a dataset's kind as one of them."""
    found = {}
    for name in machine.below(root):
        store = machine.datasets[name]
        found[name] = {short: (p.guid, frozenset(p.tags - {tag})) for short, p in store.snapshots.items()}
        found[name].update({f"#{mark}": (p.guid, frozenset()) for mark, p in store.bookmarks.items()})
        found[name][f" {store.kind}"] = (0, frozenset())
    return found


class Watch:
    """Looks at both sides at every moment of a run."""

    def __init__(self, site: Site, hop: Hop, fault: Fault | None, neighbour: Callable[[], None] | None) -> None:
        self.site = site
        self.hop = hop
        self.fault = fault
        self.neighbour = neighbour
        self.moments = 0
        self.struck: Command | None = None
        self.take()

    def take(self) -> None:
        """How things were before the program did anything."""
        self.there = foreign(self.hop.source, self.hop.source_root, TAG)
        self.here = foreign(self.hop.target, self.hop.target_root, RECEIVED)
        self.unborn = {name for name in self.here if self.hop.target.datasets[name].unborn}
        self.doomed = {
            (name, short)
            for machine in (self.hop.source, self.hop.target)
            for name, store in machine.datasets.items()
            for short, point in store.snapshots.items()
            if point.doomed
        }
        self.expired: set[tuple[str, str]] = set()

    def at(self, machine: Machine, command: Command, moment: str) -> Answer | None:
        COUNTS["moments"] += 1
        if moment != "before" and command[1] not in ("list", "holds", "userspace"):
            self.check()
        if moment == "before" and command[1] == "destroy":
            self.check_destroy(machine, command)
        if self.fault is None or not self.fault.fits(moment, at_source=machine is self.hop.source):
            return None
        self.moments += 1
        if self.moments != self.fault.number:
            return None
        self.struck = command
        if self.neighbour:
            self.neighbour()
            self.take()
            return None
        return self.fault.strike()

    def check(self) -> None:
        self.site.check_protection()
        there = foreign(self.hop.source, self.hop.source_root, TAG)
        assert there.keys() == self.there.keys(), "I4: a dataset came or went at the source"
        for name, before in self.there.items():
            gone = {(name, short) for short in before.keys() - there[name].keys()}
            assert gone <= self.doomed, f"I4: destroyed at the source: {gone}"
            assert there[name].items() <= before.items(), f"I4: changed at the source: {name}"
        here = foreign(self.hop.target, self.hop.target_root, RECEIVED)
        for name, before in self.here.items():
            if name not in here:
                assert name in self.unborn, f"I4: {name} was destroyed here"
                continue
            gone = {(name, short) for short in before.keys() - here[name].keys()}
            assert gone <= self.doomed | self.expired, f"I4: destroyed here: {gone}"
            stayed = {short: here[name][short] for short in before.keys() & here[name].keys()}
            assert stayed.items() <= before.items(), f"I4: changed here: {name}"
        self.check_new(here)

    def check_new(self, here: dict[str, dict[str, tuple[int, frozenset[str]]]]) -> None:
        for name, after in here.items():
            key = name[len(self.hop.target_root) :]
            known = {point.guid for point in self.hop.theirs(key).snapshots.values()}
            for short in after.keys() - self.here.get(name, {}).keys():
                guid, _ = after[short]
                assert guid == 0 or guid in known, f"I4: {name}@{short} came from nowhere"

    def check_destroy(self, machine: Machine, command: Command) -> None:
        assert machine is self.hop.target, f"I4: destroys at the source: {command}"
        name, _, shorts = command[2].partition("@")
        twins = {p.guid: p for p in self.hop.theirs(name[len(self.hop.target_root) :]).snapshots.values()}
        for short in shorts.split(","):
            point = self.hop.target.datasets[name].snapshots.get(short)
            twin = twins.get(point.guid) if point else None
            assert not twin or TAG not in twin.tags, f"I2: {name}@{short} goes, but its twin is held"
            self.expired.add((name, short))


@dataclass
class Outcome:
    status: int
    failures: list[str]
    writes: list[tuple[str, ...]]
    moments: int
    struck: Command | None


class Site:
    """The machines in a chain, and the jobs between them."""

    def __init__(self, machines: int = 2) -> None:
        self.world = World()
        self.machines = [
            Machine(self.world, label, root.partition("/")[0], txg)
            for label, root, txg in zip(("source", "backup", "third"), ROOTS, (5000, 10, 900))
        ][:machines]
        self.hops = [Hop(*pair) for pair in zip(self.machines, self.machines[1:], ROOTS, ROOTS[1:])]
        self.machines[0].create(ROOTS[0])

    def check_protection(self) -> None:
        """I1. Where the source knows the newest common point by a bookmark alone, there is nothing to be held."""
        for hop in self.hops:
            for key in hop.mirrored:
                if not hop.is_protected(key):
                    bookmark = hop.mutual(key, bookmarks=True) != hop.mutual(key, bookmarks=False)
                    assert bookmark, f"I1: nothing held in common: {hop.source_root}{key}"

    def watched(
        self,
        hop: Hop,
        options: Options,
        fault: Fault | None = None,
        neighbour: Callable[[], None] | None = None,
    ) -> Outcome:
        """One run as main() does it, with all invariants of its moments."""
        COUNTS["runs"] += 1
        wire, report = Wire(hop.source, hop.target), Quiet()
        watch = Watch(self, hop, fault, neighbour)
        wire.at = watch.at
        policy = Policy(hop.source_root, hop.target_root, TAG, options.keep_days, options.intermediates)
        run = Run(policy, Near(wire, hop.source), Near(wire, hop.target), wire.carry, report)
        try:
            run.survey()
            run.execute(self.world.now)
            status = 1 if report.failures else 0
        except Failure as failure:
            report.failures.append(str(failure))
            status = 3
        except Crash:
            status = -1
        watch.check()
        hop.note_mirrored()
        self.check_protection()
        return Outcome(status, report.failures, wire.writes(), watch.moments, watch.struck)

    def honest(self, hop: Hop, options: Options) -> Outcome:
        """An undisturbed run, and what must be true after it."""
        obstructed = [key for key in hop.keys() if hop.obstructed(key)]
        outcome = self.watched(hop, options)
        assert outcome.status in (0, 1)
        assert outcome.status == 0 or obstructed, f"failed for no reason: {outcome.failures}"
        for key in obstructed:
            if not hop.ours(key).point(getattr(hop.theirs(key).newest, "guid", None)):
                COUNTS["blocked"] += 1
        if outcome.status == 0:
            hop.check_success()
        again = self.watched(hop, options)
        assert again.failures == outcome.failures or outcome.status, f"I5: {again.failures}"
        assert not again.writes or outcome.status, f"I5: {again.writes}"
        return outcome

    def calm_end(self, number: int, options: Options) -> dict[str, object]:
        """Where an undisturbed run ends."""
        calm = copy.deepcopy(self)
        calm.honest(calm.hops[number], options)
        return calm.hops[number].end_state()

    def disturbed(self, hop: Hop, options: Options, fault: Fault, calm_end: dict[str, object]) -> bool:
        """A run with a fault, then plain ones: they come to the end of an undisturbed run (I3). Whether it struck."""
        outcome = self.watched(hop, options, fault)
        if outcome.struck is None:
            return False
        assert outcome.status != 0 or fault.kind == "fail", "a fault went unnoticed"
        self.watched(hop, options)
        if hop.end_state() != calm_end:
            self.honest(hop, options)
        if outcome.struck[:3] != ("zfs", "send", "-nvt"):  # then what waited is given up, for it looks spoilt
            assert hop.end_state() == calm_end, "I3"
        return True


# ---------------------------------------------------------------------------------------------------------------------
# Every fault at every moment of the main stories
# ---------------------------------------------------------------------------------------------------------------------


def first_pull(machines: int = 2) -> Site:
    """A tree with a volume, a grandchild, and a dataset without snapshots above one that has some."""
    site = Site(machines)
    source = site.machines[0]
    for key, kind in (("/a", "filesystem"), ("/a/b", "filesystem"), ("/disk", "volume"), ("/empty/full", "filesystem")):
        source.create(ROOTS[0] + key, kind)
    for day in range(3):
        for key in ("", "/a", "/a/b", "/disk", "/empty/full"):
            source.snapshot(f"{ROOTS[0]}{key}@d{day}")
        site.world.now += days(1)
    return site


def next_pull(machines: int = 2) -> Site:
    """Mirrored three times, a month ago; since then there is more, one new child, one with its base a bookmark."""
    site = first_pull(machines)
    source = site.machines[0]
    for round_ in range(2):
        for hop in site.hops:
            assert site.honest(hop, Options(intermediates=True)).status == 0
        for key in ("", "/a", "/disk", "/empty/full"):
            source.snapshot(f"{ROOTS[0]}{key}@r{round_}")
        site.world.now += days(1)
    for hop in site.hops:
        assert site.honest(hop, Options(intermediates=True)).status == 0
    source.bookmark(f"{ROOTS[0]}/disk@r1", "mark")
    source.create(f"{ROOTS[0]}/new")
    site.world.now += days(40)
    for name in ("x", "y"):
        for key in ("", "/a", "/disk", "/new", "/empty"):
            source.snapshot(f"{ROOTS[0]}{key}@{name}")
    source.release(TAG, f"{ROOTS[0]}/disk@r1")
    source.destroy(f"{ROOTS[0]}/disk", ["r1"])
    site.hops[0].mirrored.discard("/disk")
    return site


def interrupted_pull() -> Site:
    """One receive was interrupted and can go on, though newer snapshots are there by now; one cannot."""
    site = next_pull()
    hop, source = site.hops[0], site.machines[0]
    stops = iter(range(3))

    def at(machine: Machine, command: Command, moment: str) -> Answer | None:
        if moment == "half-way" and next(stops, 3) < 3:
            return Answer(1, "", "out of space")
        return None

    wire = Wire(hop.source, hop.target, at)
    policy = Policy(hop.source_root, hop.target_root, TAG)
    run = Run(policy, Near(wire, hop.source), Near(wire, hop.target), wire.carry, Quiet())
    run.survey()
    run.execute(site.world.now)
    assert [key for key in hop.keys() if hop.ours(key).partial] == ["", "/a", "/disk"]
    for key in ("", "/a", "/disk"):
        source.snapshot(f"{ROOTS[0]}{key}@z")
    source.release(TAG, f"{ROOTS[0]}/a@y")
    source.destroy(f"{ROOTS[0]}/a", ["y"])
    hop.note_mirrored()
    return site


def pull_along() -> Site:
    """The middle of a chain has pulled what is new; the end of it has not."""
    site = next_pull(3)
    assert site.honest(site.hops[0], Options()).status == 0
    return site


STORIES: dict[str, tuple[Callable[[], Site], int]] = {
    "first": (first_pull, 0),
    "next": (next_pull, 0),
    "interrupted": (interrupted_pull, 0),
    "along a chain": (pull_along, 1),
}


@pytest.mark.parametrize("kind", ["crash", "fail", "lost"])
@pytest.mark.parametrize("options", [Options(30), Options(30, intermediates=True)], ids=["newest", "intermediates"])
@pytest.mark.parametrize("story", STORIES)
def test_a_fault_at_every_moment(story: str, options: Options, kind: str) -> None:
    begin, number = STORIES[story]
    beginning = begin()
    calm_end = beginning.calm_end(number, options)
    for place in range(1, 1000):
        site = copy.deepcopy(beginning)
        if not site.disturbed(site.hops[number], options, Fault(kind, place), calm_end):
            assert place > 10, "nothing happened in this story"
            return
    raise AssertionError("never done")
