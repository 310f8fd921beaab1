"""What the program refuses: each reason brought about, with the way out. `tests/tools/messages.py` prints them."""

from __future__ import annotations

import ast
import fcntl
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from histories import LOCAL, POLICY, RECEIVED, SOURCE, TAG, local, source
from simulated import Machine, Near, Wire, World

import zfs_replicate
from zfs_replicate import (
    NAME_LIMIT,
    PULLED_UNHELD,
    Account,
    Blocked,
    Command,
    Dataset,
    Failure,
    LinkLost,
    LocalHost,
    LockFile,
    Partial,
    Policy,
    Quarantine,
    Report,
    Rollback,
    Run,
    StreamBatch,
    judge_holder,
    listed_in_part,
    plan_dataset,
    pull,
    stalled,
    take_alone,
    taken_above,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = "a" * (NAME_LIMIT - len(LOCAL))


def blocked(origin: Dataset, here: Dataset | None, policy: Policy = POLICY, local_name: str = LOCAL) -> Blocked:
    with pytest.raises(Blocked) as caught:
        plan_dataset(origin, here, policy, local_name)
    return caught.value


def encrypted(dataset: Dataset, ivset: int) -> Dataset:
    """With snapshots as a raw stream makes them if it finds that number at the other side."""
    return replace(
        dataset, encrypted=True, snapshots=tuple(replace(it, ivset=ivset + it.guid) for it in dataset.snapshots)
    )


def promoted() -> Dataset:
    """A dataset whose clone was promoted, and has its snapshots now."""
    old, new = source("@a,1 @b,2").snapshots
    handed = replace(old, name="backuppool/clone@a")
    return Dataset(SOURCE, "filesystem", (new,), origin=handed.name, inherited=(handed,))


DIVERGED = {
    "newer local snapshots": blocked(source("@a,1 @b,2"), local("@a,1 @x,8 @y,9")),
    "newer local snapshots that others need": blocked(source("@a,1 @b,2"), local("@a,1 @x,8 @y,9!keep")),
    "local changes": blocked(source("@a,1 @b,2"), Dataset(LOCAL, "filesystem", local("@a,1").snapshots, changed=True)),
    "common base gone": blocked(source("@b,2 @c,3"), local(f"@a,1!{RECEIVED}")),
    "wrong tree": blocked(source("@b,2"), local("@x,8")),
    "target not empty": blocked(source("@a,1"), local("")),
    "target may not be empty": blocked(source("@a,1"), replace(local(""), empty=None)),
    "others below": blocked(
        source("@a,1"), replace(local(""), empty=True, parent=True, strangers=("offsite/home", "offsite/srv"))
    ),
    "a pool's root that should make way": blocked(
        source("@a,1"), replace(local(""), name="offsite", empty=True, parent=True)
    ),
    "the other way round": blocked(source(f"@a,1!{RECEIVED}"), replace(local(f"@a,1!{TAG}"), held_before=False)),
    "another line": blocked(source("@a,1 @b,2"), local("@a,1!years:received")),
    "volume and filesystem": blocked(source("@a,1", kind="volume"), local("@a,1")),
    "name too long": blocked(source(f"@a,1 @{LONG},2"), local("@a,1")),
    "raw after plain": blocked(encrypted(source("@a,1 @b,2"), 100), local("@a,1")),
    "plain after raw": blocked(
        encrypted(source("@a,1 @b,2"), 100), encrypted(local("@a,1"), 100), replace(POLICY, decrypt=True)
    ),
    "encrypted, and already here": blocked(encrypted(source("@a,1"), 100), replace(local(""), empty=True)),
    "promoted away": blocked(promoted(), local("@a,1")),
    "token not decoded": blocked(source("@a,1"), local("", Partial("1-x", None, None))),
    "nested too deep": blocked(source("@a,1"), None, local_name=LOCAL + "/x" * 48),
}


# Refusals of a run, each brought about on simulated machines or by the function that says it.


class Quiet(Report):
    """Keeps the failures."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Failure] = []

    def failure(self, subject: str, failure: Failure) -> None:
        self.found.append(failure)


def said_by_run(prepare: str) -> Failure:
    """The first failure of a first pull."""
    world = World()
    origin, backup = Machine(world, "source", "backuppool"), Machine(world, "this host", "offsite")
    origin.create("backuppool/www/logs")
    for name in ("backuppool", "backuppool/www", "backuppool/www/logs"):
        origin.snapshot(f"{name}@a")
    wire = Wire(origin, backup)
    if prepare == "hold":
        wire.at = lambda where, command, moment: refusing(command, "hold", moment)
    else:
        wire.at = lambda where, command, moment: refusing(command, "backuppool/www@a", moment, prepare)
    report = Quiet()
    there = Near(wire, origin, account=Account("puller", "source", "backuppool"))
    run = Run(Policy("backuppool", "offsite/m", TAG), there, Near(wire, backup), wire.carry, report)
    run.begin(world.now)
    run.execute(world.now)
    return report.found[-1 if prepare != "hold" else 0]


def refusing(command: Command, word: str, moment: str, when: str = "before") -> zfs_replicate.Answer | None:
    hit = moment == when and word in command and command[1] != "holds"
    return zfs_replicate.Answer(1, "", "permission denied\n") if hit else None


class Unplugged(LocalHost):
    """A host whose connection is gone after the stream has failed."""

    def connected(self) -> bool:
        return False


def broken_link() -> Failure:
    batch = StreamBatch(((("sh", "-c", "echo 'Connection reset' >&2; exit 255"), ("cat",)),))
    result = pull(Unplugged("HOST"), LocalHost(), batch, PLAIN)
    assert isinstance(result.failure, LinkLost)
    return result.failure


PLAIN = zfs_replicate.Transport()


def flooded() -> Failure:
    output = zfs_replicate.Output("zfs list", "HOST")
    with pytest.raises(Failure) as caught:
        output.add(bytes(zfs_replicate.OUTPUT_BYTES + 1))
    return caught.value


JOB = f"-h HOST -r {SOURCE} -l {LOCAL} -t offsite"
OTHER_JOB = JOB.replace("HOST", "OTHER")


def held_lock(scratch: Path, how: str) -> Failure:
    """What is said of a lock that somebody else has."""
    path = str(scratch / "zfs_replicate-TREE.lock")
    job = JOB if how in ("stuck", "orphan") else OTHER_JOB
    Path(path).write_text(f"4711 1700000000 {job}\n", encoding="ascii")
    os.utime(path, (1700003600, 1700003600))
    os.chmod(path, 0o600)
    zone = os.environ.get("TZ")
    os.environ["TZ"] = "UTC"
    time.tzset()
    real, zfs_replicate.is_alive = zfs_replicate.is_alive, lambda pid: how != "orphan"
    file = LockFile(path)
    try:
        with pytest.raises(Failure) as caught:
            if how == "above":
                raise taken_above(file.holder(), "offsite/virt", LOCAL, path)
            if how == "below":
                with open(path, encoding="ascii") as sharer:
                    fcntl.flock(sharer, fcntl.LOCK_SH)
                    take_alone(file, LOCAL)
            judge_holder(file, LOCAL, JOB, 3600)
    finally:
        file.close()
        zfs_replicate.is_alive = real
        os.environ.pop("TZ") if zone is None else os.environ.update(TZ=zone)
        time.tzset()
    return Failure(caught.value.what, caught.value.hint.replace(str(scratch), "/run"))


def refusals(scratch: Path) -> Iterator[tuple[str, str]]:
    """What is said, and the way out, of every reason."""
    for failure in (Failure(*PULLED_UNHELD), listed_in_part(Failure("zfs list failed on HOST: I/O error"))):
        yield failure.what, failure.hint
    for plan in DIVERGED.values():
        yield plan.what.replace(LONG, "LONG").replace("/x" * 48, "/DEEP"), plan.hint
    for failure in (
        said_by_run("hold"),
        said_by_run("before"),
        said_by_run("half-way"),
        broken_link(),
        stalled(3600, 1_234_567_890, ("ssh", "mbuffer", "zfs")),
        stalled(3600, 1_234_567_890, ("ssh", "mbuffer", "zfs"), 4_711),
        flooded(),
        *(held_lock(scratch, how) for how in ("stuck", "orphan", "other", "above", "below")),
    ):
        yield failure.what, failure.hint


def test_refusals_are_all_in_the_table_here() -> None:
    """As many advices as there are places in the planner that refuse."""
    tree = ast.parse(Path(zfs_replicate.__file__).read_text(encoding="utf-8"))
    places = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Blocked"
    ]
    assert len({plan.hint.split(";")[0].split(":")[0] for plan in DIVERGED.values()}) == len(places)


@pytest.mark.parametrize("reason", DIVERGED)
def test_refusal_says_what_why_and_the_way_out_with_the_option_last(reason: str) -> None:
    plan = DIVERGED[reason]
    assert LOCAL in plan.what or reason == "a pool's root that should make way"
    assert "--rollback" not in plan.what
    assert plan.hint.count("--rollback") == sum(isinstance(way, Rollback) for way in plan.ways)
    assert plan.hint.endswith("--quarantine") == any(isinstance(way, Quarantine) for way in plan.ways)


WITHOUT_SIDES = ("name too long", "nested too deep", "token not decoded", "others below", "another line")


@pytest.mark.parametrize(
    "reason",
    [reason for reason in DIVERGED if reason not in WITHOUT_SIDES],
)
def test_refusal_names_the_newest_snapshots_of_both_sides(reason: str) -> None:
    assert "(newest snapshot here: " in DIVERGED[reason].what
    assert ", at the source: @" in DIVERGED[reason].what


def test_refusal_to_move_holds_names_the_rights_and_nothing_else() -> None:
    world = World()
    origin, backup = Machine(world, "source", "backuppool"), Machine(world, "this host", "offsite")
    origin.snapshot("backuppool@a")
    wire, report = Wire(origin, backup), Quiet()
    there = Near(wire, origin, account=Account("puller", "source", "backuppool"))
    here = Near(wire, backup, account=Account("keeper", "this host", "offsite/m"))
    run = Run(Policy("backuppool", "offsite/m", TAG), there, here, wire.carry, report)
    run.begin(world.now)
    run.execute(world.now)
    origin.snapshot("backuppool@b")
    for refuses, what, hint in (
        (origin, "backuppool@a, offsite/m@a", "as root on source: zfs allow puller release backuppool"),
        (backup, "offsite/m@a", "as root on this host: zfs allow keeper release offsite/m"),
    ):
        report.found.clear()
        wire.at = lambda where, *doing, refuses=refuses: (
            refusing(doing[0], "release", doing[1]) if where is refuses else None
        )
        run.begin(world.now)
        run.execute(world.now)
        assert [(failure.what, failure.hint) for failure in report.found] == [
            (f"still held: {what}", f"the next run tries again; {hint}")
        ]


def test_rollback_is_not_offered_for_what_others_hold() -> None:
    plan = DIVERGED["newer local snapshots that others need"]
    assert "not to be rolled back: @y (held by keep)" in plan.hint
    assert plan.ways == (Quarantine(),)


def test_rollback_is_offered_despite_our_own_hold() -> None:
    """The source was rolled back to before what we had pulled."""
    plan = blocked(source("@a,1 @b,2"), local(f"@a,1 @x,8!{RECEIVED}"))
    assert [type(way) for way in plan.ways] == [Rollback, Quarantine]


def test_rollback_is_not_offered_for_a_twin_held_at_the_source() -> None:
    """It is older there than the common one, and newer here: somebody has sent it back."""
    plan = blocked(source(f"@x,8!{TAG} @a,1 @b,2"), local("@a,1 @x,8"))
    assert plan.ways == (Quarantine(),)
