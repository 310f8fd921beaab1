"""Jobs: a tree on one simulated machine and its mirror on another, and what may disturb a run of them.

The fixtures are those of all tests, for conftest.py names this file.
"""

from __future__ import annotations

import re
from typing import Callable

import pytest
from histories import LOCAL, SOURCE, TAG
from simulated import Machine, Near, Wire, World, days

from zfs_replicate import Answer, Command, Failure, LinkLost, Policy, Report, Run, Selection

Disturbance = Callable[[Machine, Command, str], "Answer | None"]
EVERYTHING = Selection()
EMPTY = Answer(1, "", "permission denied")


class Job:
    """A tree on one machine and its mirror on another; `replicate` is the crontab line."""

    def __init__(self, source: Machine, backup: Machine, tree: str = SOURCE, mirror: str = LOCAL) -> None:
        self.source = source
        self.backup = backup
        self.tree = tree
        self.mirror = mirror
        self.notices: list[str] = []  # what the last run told though nothing failed
        self.wire = Wire(source, backup)

    def replicate(
        self,
        status: int = 0,
        keep: int | None = None,
        every: bool = False,
        at: Disturbance | None = None,
        *,
        rollback: bool = False,
        quarantine: bool = False,
        selection: Selection = EVERYTHING,
    ) -> str:
        """One run, which must exit with `status`. Returns what it told the user."""
        self.wire = Wire(self.source, self.backup)
        if at:
            self.wire.at = at
        report = Report()
        policy = Policy(
            self.tree, self.mirror, TAG, keep, every, rollback=rollback, quarantine=quarantine, selection=selection
        )
        run = Run(policy, Near(self.wire, self.source), Near(self.wire, self.backup), self.wire.carry, report)
        try:
            run.begin(self.source.world.now)
            run.execute(self.source.world.now)
            if run.lost:
                report.failure(*run.lost)
            ended = 1 if report.failures else 0
        except Failure as failure:
            report.failures.append(str(failure))
            ended = 3
        self.notices = [it["event"] for it in report.events if it["event"] in ("hold lost", "others hold")]
        said = "\n".join(report.failures)
        assert ended == status, said
        return said

    def snapshot(self, name: str, *keys: str) -> None:
        """Snapshot some datasets of the tree, then let an hour pass."""
        for key in keys or [name[len(self.tree) :] for name in self.source.below(self.tree)]:
            self.source.snapshot(f"{self.tree}{key}@{name}")
        self.source.world.now += days(1 / 24)

    def here(self, key: str = "") -> str:
        """The mirror's snapshots with their tags, oldest first: `a b!offsite:received`."""
        return told(self.backup, self.mirror + key)

    def there(self, key: str = "") -> str:
        return told(self.source, self.tree + key)

    def done(self, *kinds: str) -> list[str]:
        """The writing commands of the last run, in order, as one line each."""
        return [" ".join(words) for words in self.wire.writes() if not kinds or words[1] in kinds]


def told(machine: Machine, dataset: str) -> str:
    if dataset not in machine.datasets:
        return "absent"
    snapshots = machine.datasets[dataset].snapshots
    names = sorted(snapshots, key=lambda name: snapshots[name].createtxg)
    return " ".join("!".join([name, *sorted(snapshots[name].tags)]) for name in names)


def refusing(pattern: str, machine: str = "", moment: str = "before") -> Disturbance:
    """Every command that looks like this fails and does nothing; `after`: it was done all the same."""

    def at(where: Machine, command: Command, when: str) -> Answer | None:
        hit = when == moment and machine in where.label and re.search(pattern, " ".join(command))
        return EMPTY if hit else None

    return at


def once(when: str, deed: Callable[[], object], pattern: str = "") -> Disturbance:
    """Somebody does something at the first such moment."""
    deeds = [deed]

    def at(where: Machine, command: Command, moment: str) -> Answer | None:
        if deeds and moment == when and re.search(pattern, " ".join(command)):
            deeds.pop()()
        return None

    return at


def break_link() -> None:
    raise LinkLost("the link broke")


@pytest.fixture
def job() -> Job:
    return new_job()


def new_job() -> Job:
    """A tree of a root, a filesystem with a child, and a volume, on `source`; an empty pool on `backup`."""
    world = World()
    source = Machine(world, "source", "backuppool", txg=9000)
    for key, kind in (("/www/logs", "filesystem"), ("/disk", "volume")):
        source.create(SOURCE + key, kind)
    return Job(source, Machine(world, "backup", "offsite"))


@pytest.fixture
def mirrored(job: Job) -> Job:
    """The same, in step at @a."""
    job.snapshot("a")
    job.replicate()
    return job


EACH = ("", "/www", "/www/logs", "/disk")


@pytest.fixture
def aged(mirrored: Job) -> Job:
    """@b to @d came at 10 days from each other, and @e is still to be pulled."""
    for name in "bcde":
        mirrored.source.world.now += days(10)
        if name == "e":
            mirrored.replicate()
        mirrored.snapshot(name)
        if name != "e":
            mirrored.replicate()
    return mirrored


def in_full(job: Job) -> int:
    """How often the last run listed the source in full, with what zfs is slow to tell of each snapshot."""
    lists = [words for where, *words in job.wire.done if where == "source" and words[0] == "list"]
    return sum("userrefs" in words[-2] and "snapshot" in words[-4] for words in lists)


def whole_lists(job: Job) -> list[str]:
    """Where the last run listed a whole tree, in turn."""
    return [where for where, *words in job.wire.done if words[:3] == ["list", "-Hp", "-r"] and "snapshot" in words[4]]


def half_way(pattern: str = "", deed: Callable[[], object] | None = None) -> Disturbance:
    """The first such stream breaks off half-way."""
    deeds = [deed]

    def at(where: Machine, command: Command, moment: str) -> Answer | None:
        if deeds and moment == "half-way" and re.search(pattern, " ".join(command)):
            dispatch = deeds.pop()
            return Answer(1, "", "out of space") if dispatch is None else dispatch()  # type: ignore[return-value]
        return None

    return at


def taken_over(job: Job) -> None:
    """@a is here as another tool brought it: without properties, mounted, and with what an administrator set."""
    job.snapshot("a")
    job.replicate()
    for name in job.backup.below(LOCAL):
        store = job.backup.datasets[name]
        store.values, store.has_received, store.mounted = {"compression": "zstd", "refreservation": "0"}, False, True
        for point in store.snapshots.values():
            point.tags.clear()
    for name in job.source.below(SOURCE):
        for point in job.source.datasets[name].snapshots.values():
            point.tags.clear()
