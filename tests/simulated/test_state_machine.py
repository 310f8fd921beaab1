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

`tests/run --full`, or ZFS_REPLICATE_EXAMPLES=5000, looks longer, and then at random; without it every run of the tests
does the same.
"""

from __future__ import annotations

import collections
import copy
import fnmatch
import functools
import os
import pickle
import re
from dataclasses import dataclass, field
from typing import Callable

import pytest
from histories import RECEIVED, TAG
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from simulated import Machine, Near, Refused, Store, Wire, World, days

from zfs_replicate import (
    ASIDE,
    LIST_EXISTING,
    MADE_WAY,
    Answer,
    Command,
    Failure,
    LinkLost,
    Policy,
    Report,
    Run,
    Selection,
)

COUNTS: collections.Counter[str] = collections.Counter()
ROOTS = ("backuppool/virt/machines", "offsite/virt/machines", "vault/mirror")
EXAMPLES = os.environ.get("ZFS_REPLICATE_EXAMPLES")
THOROUGH = EXAMPLES is not None


OUR_MARK = re.compile(rf"{TAG}-[0-9]+")
"""The bookmarks that are ours to make and to destroy, with --bookmark."""


class Crash(BaseException):
    """The program dies on the spot: nothing of it may catch this."""


class Quiet(Report):
    """Keeps what would be printed."""

    def failure(self, subject: str, failure: Failure) -> None:
        self.failures.append(f"{subject}: {failure}")

    def notice(self, kind: str, dataset: str, line: str) -> None:
        COUNTS["ways out"] += 1


FAULTS = ("crash", "fail", "lost", "source down", "backup down")


@dataclass(frozen=True)
class Fault:
    """What happens to a run at its moment number `number`; of a machine that is down, from then on."""

    kind: str
    number: int

    @property
    def lasts(self) -> bool:
        return self.kind.endswith("down")

    def fits(self, moment: str, *, at_source: bool) -> bool:
        """A crash before a command is one after the last; only the way to the source can be lost."""
        if self.kind == "crash":
            return moment != "before"
        if self.kind == "backup down":
            return not at_source
        return self.kind == "fail" or self.kind == "neighbour" or at_source

    def strike(self, command: Command) -> Answer:
        COUNTS[f"faults: {self.kind}"] += 1
        if self.kind == "crash":
            raise Crash
        if self.kind in ("lost", "source down"):
            raise LinkLost("the link broke")
        # Asked for several datasets, zfs lists those that it can open.
        several = command[:7] == LIST_EXISTING
        return Answer(1, f"{command[7]}\n" if several and self.lasts else "", "I/O error\n")


@dataclass(frozen=True)
class Options:
    keep_days: int | None = None
    intermediates: bool = False
    bookmark: bool = False
    way: str = ""
    only: str = "*"

    def policy(self, hop: Hop) -> Policy:
        return Policy(
            hop.source_root,
            hop.target_root,
            TAG,
            self.keep_days,
            self.intermediates,
            bookmark=self.bookmark,
            rollback=self.way == "rollback",
            quarantine=self.way == "quarantine",
            selection=Selection(snapshots=(self.only,)),
        )


def guids(store: Store, tag: str = "") -> set[int]:
    """Of its snapshots, or of those that carry a tag."""
    return {point.guid for point in store.snapshots.values() if not tag or tag in point.tags}


def newest_held_here(store: Store) -> int | None:
    """The guid of the newest of its snapshots that our line holds."""
    held = [point for point in store.snapshots.values() if RECEIVED in point.tags]
    return max(held, key=lambda point: point.createtxg).guid if held else None


@dataclass
class Hop:
    """One job: a tree and its mirror. `mirrored`: the keys that had a common snapshot held on both sides once.
    `after_rename`: those whose datasets got their names only when they had mirrors. `estranged`: guids that somebody made
    here, or took away at the source against all holds."""

    source: Machine
    target: Machine
    source_root: str
    target_root: str
    estranged: set[int]
    mirrored: set[str] = field(default_factory=set)
    after_rename: set[str] = field(default_factory=set)

    def branches(self) -> list[str]:
        return [name[len(self.source_root) :] for name in self.source.below(self.source_root)]

    def theirs(self, key: str) -> Store:
        return self.source.datasets.get(self.source_root + key, Store())

    def ours(self, key: str) -> Store:
        return self.target.datasets.get(self.target_root + key, Store())

    def common(self, key: str, *, bookmarks: bool) -> int | None:
        """The guid of the newest point of the source that is here too."""
        store, here = self.theirs(key), {point.guid for point in self.ours(key).snapshots.values()}
        points = [*store.snapshots.values(), *(store.bookmarks.values() if bookmarks else ())]
        known = [point for point in points if point.guid in here]
        return max(known, key=lambda point: point.createtxg).guid if known else None

    def held(self, key: str) -> tuple[set[int], set[int]]:
        """Guids that carry our tags, there and here."""
        return guids(self.theirs(key), TAG), guids(self.ours(key), RECEIVED)

    def mirror(self, key: str) -> Store | None:
        """What is here of a dataset, be it under the name that it had at the source before; None if that is not clear."""
        if self.target_root + key in self.target.datasets or key not in self.after_rename:
            return self.ours(key)
        old_keys = [name[len(self.target_root) :] for name in self.target.below(self.target_root)]
        found = [
            self.ours(old)
            for old in old_keys
            if old
            and ASIDE not in old
            and self.common(old, bookmarks=True) is None
            and not f"{key}/".startswith(f"{old}/")
        ]
        theirs = self.theirs(key)
        owners = [guids(self.theirs(branch)) for branch in self.branches()]
        found = [
            store
            for store in found
            if store.kind == theirs.kind
            and (held := newest_held_here(store)) in guids(theirs)
            and sum(held in owned for owned in owners) == 1
        ]
        return found[0] if len(found) == 1 else None

    def is_protected(self, key: str) -> bool:
        return bool(guids(self.theirs(key), TAG) & guids(self.mirror(key) or Store(), RECEIVED))

    def note_mirrored(self) -> None:
        self.mirrored |= {key for key in self.branches() if self.is_protected(key)}

    # what is in the way of an honest run

    def obstructed(self, key: str) -> bool:
        """Whether somebody has made it impossible to bring this dataset up to date without losing something here."""
        source, local = self.theirs(key), self.ours(key)
        if self.target_root + key not in self.target.datasets:
            return self.came_from_elsewhere(key)
        if source.kind != local.kind:
            return True
        if not local.snapshots or not source.snapshots:
            return bool(source.snapshots) and local.files and not local.unborn
        points = {**source.bookmarks, **source.snapshots}.values()
        base = local.newest
        taken = {name for name, point in local.snapshots.items() if (source.snapshots.get(name) or point) is not point}
        clash = any(source.snapshots[name].guid != local.snapshots[name].guid for name in taken)
        awaited = source.point(local.partial.guid) if local.partial else None
        waits = awaited is not None and awaited[0] in local.snapshots
        common_base = base is not None and base.guid in {point.guid for point in points}
        foreign_base = not common_base and (base is None or base.guid in self.estranged)
        return clash or waits or foreign_base or local.changed_since(base.guid if base else None)

    def came_from_elsewhere(self, key: str) -> bool:
        """Whether there is something of this dataset here under another name, and perhaps something in its way."""
        there = {point.guid for point in self.theirs(key).snapshots.values()}
        stores = (self.target.datasets[name] for name in self.target.below(self.target_root))
        return any(there & {point.guid for point in store.snapshots.values()} for store in stores)

    def check_success(self, options: Options) -> None:
        """I6, and the holds as they must be after a successful run."""
        for key in self.branches():
            if ASIDE in key or MADE_WAY in key:
                continue  # the source, a mirror itself, has set it aside: it is not mirrored
            source, local = self.theirs(key), self.ours(key)
            common, holdable = self.common(key, bookmarks=True), self.common(key, bookmarks=False)
            points = [*source.bookmarks.values(), *source.snapshots.values()]
            since = max((point.createtxg for point in points if point.guid == common), default=0)
            lacking = [name for name, point in source.snapshots.items() if point.createtxg > since]
            assert not fnmatch.filter(lacking, options.only), f"exit 0, but {key!r} lacks {lacking}"
            assert not source.snapshots or local.partial is None, f"exit 0, but {key!r} has a partial receive"
            if local.snapshots and common is None:
                continue  # nothing to pull and nothing in common: left alone
            held_there, held_here = self.held(key)
            lost = local.since(common) if common is not None else set()  # of the source's: it may be the last copy
            assert held_there == {holdable} - {None}, f"holds at the source of {key!r} after success"
            assert held_here - lost == {common} - {None}, f"holds of {key!r} after success"
            marks = {mark for mark in self.theirs(key).bookmarks if OUR_MARK.fullmatch(mark)}
            if options.bookmark and holdable is not None and common == holdable:
                assert marks == {f"{TAG}-{common}"}, f"bookmarks of {key!r} after success"

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
    """All points of a tree, and of what was renamed aside from it, with the tags that are not ours; a dataset's kind
    as one of them."""
    found = {}
    for name in sorted(name for name in machine.datasets if name.startswith(root)):
        store = machine.datasets[name]
        found[name] = {short: (p.guid, frozenset(p.tags - {tag})) for short, p in store.snapshots.items()}
        marks = {mark: p for mark, p in store.bookmarks.items() if not OUR_MARK.fullmatch(mark)}
        found[name].update({f"#{mark}": (p.guid, frozenset()) for mark, p in marks.items()})
        found[name][f" {store.kind}"] = (0, frozenset())
    return found


class Watch:
    """Looks at both sides at every moment of a run."""

    def __init__(
        self, site: Site, hop: Hop, options: Options, fault: Fault | None, neighbour: Callable[[], None] | None
    ) -> None:
        self.site = site
        self.hop = hop
        self.options = options
        self.fault = fault
        self.neighbour = neighbour
        self.moments = 0
        self.struck: Command | None = None
        self.expired: set[tuple[str, str]] = set()
        names = hop.target.below(hop.target_root)
        self.held_before = {name for name in names if newest_held_here(hop.target.datasets[name]) is not None}
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

    def at(self, machine: Machine, command: Command, moment: str) -> Answer | None:
        COUNTS["moments"] += 1
        if moment == "before" and command[1] in ("rollback", "rename"):
            self.allow_hint(machine, command)
        if moment == "after" and command[1] == "rename" and command[2] not in machine.datasets:  # it was not refused
            self.follow(command[2], command[3])
        if moment != "before" and command[1] not in ("list", "holds", "userspace", "sync", "get"):
            self.check()
        if moment == "before" and command[1] == "destroy":
            self.check_destroy(machine, command)
        if moment == "half-way":
            self.check_sent(command)
        if self.fault is None or not self.fault.fits(moment, at_source=machine is self.hop.source):
            return None
        self.moments += 1
        if self.moments != self.fault.number and not (self.fault.lasts and self.struck):
            return None
        self.struck = self.struck or command
        if self.neighbour:
            self.neighbour()
            self.take()
            return None
        return self.fault.strike(command)

    def allow_hint(self, machine: Machine, command: Command) -> None:
        """Ways out are taken on request only, here only, and cost nothing that anybody holds. A dataset that was
        renamed at the source is followed unasked."""
        assert machine is self.hop.target, f"I4: at the source: {command}"
        if command[1] == "rename" and self.is_renamed(*command[2:]):
            return
        assert self.options.way == {"rollback": "rollback", "rename": "quarantine"}[command[1]], command
        if command[1] == "rename":
            return
        name, _, to = command[3].partition("@")
        store = machine.datasets[name]
        held = {p.guid for p in self.hop.theirs(name[len(self.hop.target_root) :]).snapshots.values() if TAG in p.tags}
        for short in store.later(store.snapshots[to].guid):
            assert not store.snapshots[short].tags, f"{name}@{short} is held, and rolled back"
            assert store.snapshots[short].guid not in held, f"I2: {name}@{short} goes, but its twin is held"
            self.expired.add((name, short))
        self.expired |= {(name, f"#{mark}") for mark in store.bookmarks}

    def is_renamed(self, name: str, new: str) -> bool:
        """Whether the source has under the new name what is here, and nothing of it under the old one. What is gone
        from here has moved already, and whoever asked did not get the answer. Or whether a placeholder makes way, or
        what was below it comes back."""
        if name not in self.hop.target.datasets:
            return True
        if new == name + MADE_WAY or name.replace(MADE_WAY, "") == new:
            away = name.partition(MADE_WAY)[0] + MADE_WAY * (MADE_WAY in name)
            # Somebody may make a snapshot of it at the very moment; nothing is lost by that.
            return self.neighbour is not None or not self.hop.target.datasets[away].snapshots
        old_key, key = (it[len(self.hop.target_root) :] for it in (name, new))
        here = {point.guid for point in self.hop.target.datasets[name].snapshots.values()}
        there = {point.guid for point in self.hop.theirs(key).snapshots.values()}
        return bool(here & there) and not self.hop.common(old_key, bookmarks=True)

    def follow(self, name: str, aside: str) -> None:
        """What was known of a dataset holds for it under its new name, and its mirror begins anew."""

        def moved(old: str) -> str:
            return aside + old[len(name) :] if f"{old}/".startswith(f"{name}/") else old

        self.here = {moved(old): points for old, points in self.here.items()}
        held_before = {moved(old) for old in self.held_before}
        # What was set aside left its name to a fresh copy, which nobody has held yet.
        self.held_before = held_before | (set() if ASIDE in aside else self.held_before)
        self.unborn = {moved(old) for old in self.unborn}
        self.doomed = {(moved(old), short) for old, short in self.doomed}
        self.site.begin_anew(name)
        if ASIDE not in aside:
            return
        # What arrived in this run, by the side of a parent that was found to be in the way, was looked at then.
        here = foreign(self.hop.target, self.hop.target_root, RECEIVED)
        for new in self.hop.target.below(aside):
            self.here[new] = {**here[new], **self.here.get(new, {})}
        left = [self.hop.target.datasets[old] for old in self.hop.target.below(aside)]
        self.site.estranged |= {point.guid for store in left for point in store.snapshots.values()}

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
            rest = before.keys() & here[name].keys() - {short for owner, short in self.expired if owner == name}
            stayed = {short: here[name][short] for short in rest}
            assert stayed.items() <= before.items(), f"I4: changed here: {name}"
        self.check_new(here)

    def check_new(self, here: dict[str, dict[str, tuple[int, frozenset[str]]]]) -> None:
        for name, after in here.items():
            key = name[len(self.hop.target_root) :]
            known = {point.guid for point in self.hop.theirs(key).snapshots.values()}
            known |= {guid for guid, _ in self.there.get(self.hop.source_root + key, {}).values()}  # or was there
            for short in after.keys() - self.here.get(name, {}).keys():
                guid, _ = after[short]
                assert guid == 0 or guid in known, f"I4: {name}@{short} came from nowhere"

    def check_sent(self, command: Command) -> None:
        """Design 4.3: what is under way is held."""
        last = self.hop.source.send(command)[-1]
        found = self.hop.source.store(last.name.partition("@")[0]).point(last.guid)
        assert found, f"{last.name} is sent, but gone"
        assert TAG in found[1].tags, f"{last.name} is sent, but not held"

    def check_destroy(self, machine: Machine, command: Command) -> None:
        name, _, mark = command[2].partition("#")
        if mark:
            assert machine is self.hop.source, command
            assert self.options.bookmark, command
            assert OUR_MARK.fullmatch(mark), command
            newest = self.hop.common(name[len(self.hop.source_root) :], bookmarks=True)
            assert f"{TAG}-{newest}" in machine.store(name).bookmarks, (
                "an older bookmark goes before the new one is there"
            )
            return
        assert machine is self.hop.target, f"I4: destroys at the source: {command}"
        name, _, shorts = command[2].partition("@")
        self.check_is_mirror(name)
        twins = {p.guid: p for p in self.hop.theirs(name[len(self.hop.target_root) :]).snapshots.values()}
        for short in shorts.split(","):
            point = self.hop.target.datasets[name].snapshots.get(short)
            twin = twins.get(point.guid) if point else None
            assert not twin or TAG not in twin.tags, f"I2: {name}@{short} goes, but its twin is held"
            self.expired.add((name, short))

    def check_is_mirror(self, name: str) -> None:
        """I8: expiry touches only what ends in the newest common snapshot, and was held by us when the run began."""
        store, key = self.hop.target.datasets[name], name[len(self.hop.target_root) :]
        assert name in self.held_before, f"I8: expires in {name}, which was none of ours"
        newest = store.newest
        assert newest, name
        if self.neighbour is None:
            assert newest.guid == self.hop.common(key, bookmarks=True), f"I8: expires in {name}, which is ahead"
        assert ASIDE not in name, f"I8: expires in {name}, which was set aside"


@dataclass
class Outcome:
    status: int
    failures: list[str]
    writes: list[tuple[str, ...]]
    moments: int
    struck: Command | None
    held_before: set[str]


class Site:
    """The machines in a chain, and the jobs between them."""

    def __init__(self, machines: int = 2) -> None:
        self.world = World()
        self.machines = [
            Machine(self.world, label, root.partition("/")[0], txg)
            for label, root, txg in zip(("source", "backup", "third"), ROOTS, (5000, 10, 900))
        ][:machines]
        self.estranged: set[int] = set()
        pairs = zip(self.machines, self.machines[1:], ROOTS, ROOTS[1:])
        self.hops = [Hop(*pair, self.estranged) for pair in pairs]
        self.machines[0].create(ROOTS[0])

    def begin_anew(self, name: str) -> None:
        """A dataset and its children are not where they were: to the runs they belong to they are new."""
        for hop in self.hops:
            for key in list(hop.mirrored):
                if f"{hop.target_root}{key}/".startswith(f"{name}/") or f"{hop.source_root}{key}/".startswith(
                    f"{name}/"
                ):
                    hop.mirrored.discard(key)

    def snapshot(self, machine: Machine, name: str) -> None:
        """Somebody makes a snapshot; of a mirror it will never be one of its source."""
        machine.snapshot(name)
        dataset, _, short = name.partition("@")
        if machine is not self.machines[0]:
            self.estranged.add(machine.datasets[dataset].snapshots[short].guid)

    def check_protection(self) -> None:
        """I1. Where the source knows the newest common point by a bookmark alone, there is nothing to be held."""
        for hop in self.hops:
            hop.mirrored -= {key for key in hop.mirrored if hop.mirror(key) is None}
            for key in hop.mirrored:
                if not hop.is_protected(key):
                    bookmark = hop.common(key, bookmarks=True) != hop.common(key, bookmarks=False)
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
        watch = Watch(self, hop, options, fault, neighbour)
        wire.at = watch.at
        policy = options.policy(hop)
        run = Run(policy, Near(wire, hop.source), Near(wire, hop.target), wire.carry, report)
        try:
            run.begin(self.world.now)
            run.execute(self.world.now)
            if run.lost:
                report.failure(*run.lost)
            status = 1 if report.failures else 0
        except Failure as failure:
            report.failures.append(str(failure))
            status = 3
        except Crash:
            status = -1
        watch.check()
        hop.note_mirrored()
        self.check_protection()
        return Outcome(status, report.failures, wire.writes(), watch.moments, watch.struck, watch.held_before)

    def honest(self, hop: Hop, options: Options) -> Outcome:
        """An undisturbed run, and what must be true after it."""
        obstructed = [key for key in hop.branches() if hop.obstructed(key)]
        outcome = self.watched(hop, options)
        if hop.source_root not in hop.source.datasets:  # the middle of a chain that was never pulled
            assert outcome.status == 3
            return outcome
        assert outcome.status in (0, 1)
        assert outcome.status == 0 or obstructed, f"failed for no reason: {outcome.failures}"
        for key in obstructed:
            if not hop.ours(key).point(getattr(hop.theirs(key).newest, "guid", None)):
                COUNTS["blocked"] += 1
        if outcome.status == 0:
            hop.check_success(options)
        again = self.watched(hop, options)
        assert again.failures == outcome.failures or outcome.status, f"I5: {again.failures}"
        new = {name for name in hop.target.below(hop.target_root) if name not in outcome.held_before}
        late = [words for words in again.writes if words[1] == "destroy" and words[2].partition("@")[0] in new]
        assert again.writes == late or outcome.status, f"I5: {again.writes}"
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
    run.begin(site.world.now)
    run.execute(site.world.now)
    assert [key for key in hop.branches() if hop.ours(key).partial] == ["", "/a", "/disk"]
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


@functools.cache
def ending(story: str, options: Options) -> tuple[bytes, dict[str, object]]:
    """The site as a story begins, packed, and where an undisturbed run brings it."""
    begin, number = STORIES[story]
    site = begin()
    return pickle.dumps(site), site.calm_end(number, options)


def told(story: str, options: Options) -> tuple[Site, dict[str, object]]:
    packed, calm_end = ending(story, options)
    site: Site = pickle.loads(packed)
    return site, calm_end


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("options", [Options(30), Options(30, intermediates=True)], ids=["newest", "intermediates"])
@pytest.mark.parametrize("story", STORIES)
def test_fault_at_every_moment(story: str, options: Options, kind: str) -> None:
    """The main ones at every second moment and the rest at every seventh, unless asked to look longer."""
    number = STORIES[story][1]
    main = story in ("next", "interrupted") and kind in ("crash", "fail") and not options.intermediates
    for place in range(1, 1000, 1 if THOROUGH else 2 if main else 7):
        site, calm_end = told(story, options)
        if not site.disturbed(site.hops[number], options, Fault(kind, place), calm_end):
            assert place > 7, "nothing happened in this story"
            return
    raise AssertionError("never done")


# ---------------------------------------------------------------------------------------------------------------------
# Any events in any order
# ---------------------------------------------------------------------------------------------------------------------

KEYS = ("", "/a", "/a/b", "/disk", "/empty", "/empty/full", "/moved")
keys = st.sampled_from(KEYS)
places = st.integers(0, 5)
option_sets = st.builds(
    Options,
    st.sampled_from([None, 1, 30]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["", "", "rollback", "quarantine"]),
    st.sampled_from(["*", "*", "[!p-r]*"]),
)


class Life(RuleBasedStateMachine):
    """Years in the life of a mirror. Each rule is something that somebody does; the runs are rules too."""

    @initialize(beginning=st.sampled_from([first_pull, next_pull, lambda: next_pull(3), pull_along, interrupted_pull]))
    def begin(self, beginning: Callable[[], Site]) -> None:
        self.site = beginning()

    def hop(self, end: bool) -> Hop:
        return self.site.hops[-1 if end else 0]

    def pick(self, machine: Machine, root: str, key: str, place: int, *, held: bool = False) -> tuple[str, str] | None:
        """A snapshot of a dataset, counted from its newest; only free ones, or only held ones."""
        store = machine.datasets.get(root + key, Store())
        names = sorted(store.snapshots, key=lambda name: -store.snapshots[name].createtxg)
        names = [name for name in names if bool(store.snapshots[name].tags) == held]
        return (root + key, names[place]) if place < len(names) else None

    # what others do at the first source

    @rule(key=keys, name=st.sampled_from("pqrstu"))
    def snapshot(self, key: str, name: str) -> None:
        COUNTS["steps"] += 1
        try:
            self.site.machines[0].snapshot(f"{ROOTS[0]}{key}@{name}")
        except Refused:
            return

    @rule()
    def snapshot_all(self) -> None:
        COUNTS["steps"] += 1
        for name in self.site.machines[0].below(ROOTS[0]):
            self.site.machines[0].snapshot(f"{name}@all{self.site.world.made}")

    @rule(machine=places, key=keys, place=places, many=st.booleans())
    def destroy_free_snapshots(self, machine: int, key: str, place: int, many: bool) -> None:
        """As expiry does, on any machine."""
        COUNTS["steps"] += 1
        number = machine % len(self.site.machines)
        for _ in range(6 if many else 1):
            found = self.pick(self.site.machines[number], ROOTS[number], key, place)
            if found:
                try:
                    self.site.machines[number].destroy(found[0], [found[1]])
                except Refused:  # the base of a partial receive
                    return

    @rule(machine=places, key=keys, place=places, held=st.booleans(), name=st.sampled_from("pqr"))
    def rename_snapshot(self, machine: int, key: str, place: int, held: bool, name: str) -> None:
        COUNTS["steps"] += 1
        number = machine % len(self.site.machines)
        found = self.pick(self.site.machines[number], ROOTS[number], key, place, held=held)
        if found:
            try:
                self.site.machines[number].rename("@".join(found), name)
            except Refused:
                return

    @rule(machine=places, key=keys, place=places, held=st.booleans(), release=st.booleans())
    def hold_by_others(self, machine: int, key: str, place: int, held: bool, release: bool) -> None:
        COUNTS["steps"] += 1
        number = machine % len(self.site.machines)
        host = self.site.machines[number]
        found = self.pick(host, ROOTS[number], key, place, held=held or release)
        if found:
            try:
                (host.release if release else host.hold)("other", "@".join(found))
            except Refused:
                return

    @rule(machine=places, key=keys, place=places)
    def destroy_deferred(self, machine: int, key: str, place: int) -> None:
        """`destroy -d` of what is held: the last release destroys it."""
        COUNTS["steps"] += 1
        number = machine % len(self.site.machines)
        found = self.pick(self.site.machines[number], ROOTS[number], key, place, held=True)
        if found:
            self.site.machines[number].doom("@".join(found))

    @rule(key=keys, place=places, held=st.booleans())
    def bookmark(self, key: str, place: int, held: bool) -> None:
        COUNTS["steps"] += 1
        found = self.pick(self.site.machines[0], ROOTS[0], key, place, held=held)
        if found:
            try:
                self.site.machines[0].bookmark("@".join(found), f"m{self.site.world.made}")
            except Refused:
                return

    @rule(key=keys, volume=st.booleans())
    def create(self, key: str, volume: bool) -> None:
        COUNTS["steps"] += 1
        try:
            self.site.machines[0].create(ROOTS[0] + key, "volume" if volume else "filesystem")
        except Refused:
            return

    @rule(key=keys)
    def destroy_child(self, key: str) -> None:
        """The administrator does away with a dataset, our holds and all."""
        COUNTS["steps"] += 1
        host, name = self.site.machines[0], ROOTS[0] + key
        if not key or host.below(name) != [name]:
            return
        for point in host.datasets[name].snapshots.values():
            self.site.estranged.add(point.guid)
            point.tags.clear()
        host.destroy_dataset(name)
        self.site.hops[0].mirrored.discard(key)

    @rule(key=keys, new=keys)
    def rename_dataset(self, key: str, new: str) -> None:
        """With its children; a mirror follows if nothing is lost by it."""
        COUNTS["steps"] += 1
        if not key or not new:
            return
        try:
            self.site.machines[0].rename_dataset(ROOTS[0] + key, ROOTS[0] + new)
        except Refused:
            return
        self.site.begin_anew(ROOTS[0] + key)
        hop = self.site.hops[0]
        hop.after_rename |= {it for it in hop.branches() if f"{it}/".startswith(f"{new}/")}
        hop.note_mirrored()

    # what others do here

    @rule(end=st.booleans(), key=keys, name=st.sampled_from("pxy"))
    def foreign_snapshot(self, end: bool, key: str, name: str) -> None:
        COUNTS["steps"] += 1
        hop = self.hop(end)
        try:
            self.site.snapshot(hop.target, f"{hop.target_root}{key}@{name}")
        except Refused:
            return

    @rule(end=st.booleans(), key=keys)
    def write_to_the_mirror(self, end: bool, key: str) -> None:
        COUNTS["steps"] += 1
        hop = self.hop(end)
        name = hop.target_root + key
        if name in hop.target.datasets and not hop.target.datasets[name].unborn:
            hop.target.datasets[name].readonly = False
            hop.target.write(name)

    @rule(end=st.booleans())
    def clear_away(self, end: bool) -> None:
        """The administrator destroys the local snapshots that are in the way, as the hint says."""
        COUNTS["steps"] += 1
        hop = self.hop(end)
        for key in hop.branches():
            known = {point.guid for point in hop.theirs(key).snapshots.values()}
            local = hop.ours(key)
            for name, point in list(local.snapshots.items()):
                if point.guid not in known and not point.tags and local.pinned != point.guid:
                    del local.snapshots[name]

    @rule(end=st.booleans(), key=keys, all_of_it=st.booleans())
    def break_base(self, end: bool, key: str, all_of_it: bool) -> None:
        """The administrator releases our hold at the source and destroys the snapshot, whatever it is good for."""
        COUNTS["steps"] += 1
        hop = self.hop(end)
        store = hop.theirs(key)
        for name, point in list(store.snapshots.items()):
            if (all_of_it or TAG in point.tags) and not point.tags - {TAG} and store.pinned != point.guid:
                del store.snapshots[name]
                self.site.estranged.add(point.guid)
                for other in self.site.hops:
                    other.mirrored.discard(key)

    @rule(days_=st.sampled_from([0.01, 1, 1, 29, 40, -3, -100]))
    def time_passes(self, days_: float) -> None:
        COUNTS["steps"] += 1
        self.site.world.now += days(days_)

    # runs

    @rule(end=st.booleans(), options=option_sets)
    def run(self, end: bool, options: Options) -> None:
        COUNTS["steps"] += 1
        self.site.honest(self.hop(end), options)

    @rule(
        end=st.booleans(),
        options=option_sets,
        kind=st.sampled_from(FAULTS),
        number=st.integers(1, 40),
    )
    def run_disturbed(self, end: bool, options: Options, kind: str, number: int) -> None:
        COUNTS["steps"] += 1
        calm_end = self.site.calm_end(-1 if end else 0, options)
        self.site.disturbed(self.hop(end), options, Fault(kind, number), calm_end)

    @rule(
        end=st.booleans(),
        options=option_sets,
        kind=st.sampled_from(FAULTS),
        number=st.integers(1, 40),
    )
    def run_disturbed_and_leave_it(self, end: bool, options: Options, kind: str, number: int) -> None:
        COUNTS["steps"] += 1
        self.site.watched(self.hop(end), options, Fault(kind, number))

    @rule(
        end=st.booleans(),
        options=option_sets,
        number=st.integers(1, 40),
        key=keys,
        place=places,
        deed=st.sampled_from(["snapshot", "destroy", "rename", "foreign"]),
    )
    def run_beside_others(self, end: bool, options: Options, number: int, key: str, place: int, deed: str) -> None:
        """Somebody does something between two commands."""
        COUNTS["steps"] += 1
        hop = self.hop(end)

        def dispatch() -> None:
            root, host = hop.source_root, hop.source
            found = self.pick(host, root, key, place)
            try:
                if deed == "foreign":
                    self.site.snapshot(hop.target, f"{hop.target_root}{key}@during{self.site.world.made}")
                elif deed == "snapshot":
                    self.site.snapshot(host, f"{root}{key}@during{self.site.world.made}")
                elif found and deed == "destroy":
                    host.destroy(found[0], [found[1]])
                elif found:
                    host.rename("@".join(found), f"other{self.site.world.made}")
            except Refused:
                return

        self.site.watched(hop, options, Fault("neighbour", number), dispatch)


def test_life_of_random_events() -> None:
    """Tells how much has happened, with `pytest -rP`."""
    # The profile of conftest.py says the rest.
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=int(EXAMPLES or 25),
            stateful_step_count=50 if THOROUGH else 25,
            derandomize=not THOROUGH,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(", ".join(f"{count} {what}" for what, count in sorted(COUNTS.items())))
    assert COUNTS["steps"] > 300
    assert COUNTS["runs"] > 200
