"""Names that move at the source while something else is wrong, or that have to wait: no mirror is lost by that, nothing
is pulled twice, and what has given its name away still expires."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from histories import LOCAL, RECEIVED, SOURCE, TAG
from jobs import Disturbance, Job, new_job, refusing
from simulated import Machine, Near, Wire, days
from test_listing import half_listed
from test_names_move import move, of, swap

from zfs_replicate import (
    ASIDE,
    BETWEEN_NAMES,
    Answer,
    Command,
    Dataset,
    Policy,
    Receive,
    Report,
    Run,
    Selection,
    Snapshot,
    TreePlan,
    Trees,
    print_plan,
)

DENIED = Answer(1, "", "cannot rename: permission denied")


def test_quarantine_spares_a_mirror_whose_rename_is_refused() -> None:
    """/r0 is called /r1 at the source, and a new dataset has its name."""
    job = of("/r0")
    move(job, "/r0", "/r1")
    job.source.create(f"{SOURCE}/r0")
    job.snapshot("b")
    job.replicate(status=1, quarantine=True, at=refusing("^zfs rename .*/r0 .*/r1$"))
    assert not [name for name in job.backup.datasets if ASIDE in name]
    job.replicate(quarantine=True)
    assert job.here("/r1") == f"a b!{RECEIVED}"


def copied_by_another_tool(job: Job) -> None:
    for machine in (job.source, job.backup):
        for store in machine.datasets.values():
            for point in store.snapshots.values():
                point.tags.clear()
    for store in job.backup.datasets.values():
        store.values, store.has_received = {}, False


def test_snapshots_of_a_dataset_in_use_are_not_renamed() -> None:
    """Another tool's copy, in use by now: a run that is refused has changed nothing in it."""
    job = of()
    copied_by_another_tool(job)
    job.backup.datasets[LOCAL].mounted = True
    job.backup.write(LOCAL)
    job.source.rename(f"{SOURCE}@a", "old")
    job.source.snapshot(f"{SOURCE}@a")
    assert f"{LOCAL} was changed since" in job.replicate(status=1)
    assert job.done() == []
    assert job.here() == "a"


def test_snapshots_whose_names_come_again_each_week_expire() -> None:
    """Without --snapshots they do: see test_names_of_snapshots_that_roll_are_followed_every_day."""
    job = new_job()
    for day in range(28):
        name = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[day % 7] + "-daily"
        if name in job.source.datasets[SOURCE].snapshots:
            job.source.destroy(SOURCE, [name])
        job.snapshot(name, "")
        job.source.world.now += days(1)
        job.replicate(keep=10, selection=Selection(snapshots=("*-daily",)))
    assert len(job.here().split()) <= 11, "@Mon-daily.dropped-GUID is no *-daily any more, and stays for ever"


def test_snapshots_that_get_a_name_that_is_not_selected_expire() -> None:
    """Only @today is mirrored. It is @yesterday by tomorrow, here as well."""
    job = new_job()
    for day in range(28):
        if day:
            job.source.rename(f"{SOURCE}@today", f"was-today-{day}")
        job.snapshot("today", "")
        job.source.world.now += days(1)
        job.replicate(keep=10, selection=Selection(snapshots=("today",)))
    assert len(job.here().split()) <= 11


def looking(job: Job, at: Disturbance, keep: int | None = None) -> Run:
    job.wire = Wire(job.source, job.backup, at)
    policy = Policy(SOURCE, LOCAL, TAG, keep)
    wire = job.wire
    run = Run(policy, Near(wire, job.source), Near(wire, job.backup), wire.carry, Report())
    run.begin(job.source.world.now)
    return run


@pytest.mark.parametrize("host", ["source", "backup"])
def test_dry_run_of_half_a_listing_tells_of_no_expiry_that_a_run_leaves_out(aged: Job, host: str) -> None:
    run = looking(aged, half_listed(host), 1)
    print_plan(run, aged.source.world.now)
    expires = [event for event in run.report.events if event["event"] == "expire"]
    aged.replicate(status=1, keep=1, at=half_listed(host))
    assert not aged.done("destroy")
    assert not expires


@pytest.mark.parametrize("host", ["source", "backup"])
def test_half_a_listing_renames_nothing_back_either(host: str) -> None:
    """A run was killed while /www made way. /disk is damaged."""
    job = new_job()
    job.snapshot("a", "/www/logs")
    job.replicate()
    job.snapshot("b", "", "/www")
    job.replicate(status=1, at=refusing("^zfs send .*/www@b"))
    job.replicate(status=1, at=half_listed(host, "/disk"))
    assert job.done("rename") == []


def test_chain_end_with_quarantine_spares_what_is_between_names_in_the_middle() -> None:
    """The host in the middle was killed between two renames."""
    job = of("/a", "/b")
    third = Machine(job.source.world, "third", "vault")
    onward = Job(job.backup, third, LOCAL, "vault/mirror")
    onward.replicate()
    swap(job, "/a", "/b")
    job.snapshot("b")
    job.replicate(status=1, at=refusing(f"^zfs rename .*{BETWEEN_NAMES} "))
    assert f"{LOCAL}/b{BETWEEN_NAMES}" in job.backup.datasets
    with contextlib.suppress(AssertionError):  # whatever its exit status
        onward.replicate(status=1, quarantine=True)
    assert not [name for name in third.datasets if ASIDE in name]


def unreadable_holds(where: Machine, command: Command, moment: str) -> Answer | None:
    return DENIED if moment == "before" and where.label == "backup" and command[1] == "holds" else None


def test_renamed_dataset_is_not_pulled_anew_while_holds_here_cannot_be_read() -> None:
    """Tags that could not be read are not absent: what is called /n there may be /m here."""
    job = of("/m")
    move(job, "/m", "/n")
    job.snapshot("b")
    job.replicate(status=1, at=unreadable_holds)
    assert job.done("recv") == [] or f"{LOCAL}/n" not in job.backup.datasets
    job.replicate()
    assert job.here("/n") == f"a b!{RECEIVED}"


def test_a_circle_that_cannot_be_completed_is_not_begun() -> None:
    """Of what is called /b by now there are two mirrors here, /a and /x: what the test above leaves, or two lines that
    became one."""
    job = of("/a", "/b")
    first = job.backup.datasets[f"{LOCAL}/a"].snapshots["a"]
    job.snapshot("b")
    job.replicate()
    job.backup.create(f"{LOCAL}/x")
    job.backup.datasets[f"{LOCAL}/x"].snapshots["a"] = replace(first, tags={RECEIVED})
    swap(job, "/a", "/b")
    job.snapshot("c")
    here = {name[len(LOCAL) :]: job.here(name[len(LOCAL) :]) for name in job.backup.below(LOCAL + "/")}
    job.replicate(status=1)
    assert f"{LOCAL}/b{BETWEEN_NAMES}" not in job.backup.datasets, "in limbo, and no run looks for it"
    assert not job.done("rename"), here


def test_dataset_that_leaves_its_name_to_its_new_parent_is_followed() -> None:
    """zfs rename m x; zfs create m; zfs rename x m/old: its mirror is known, and is not pulled a second time."""
    job = of("/m")
    move(job, "/m", "/x")
    job.source.create(f"{SOURCE}/m")
    move(job, "/x", "/m/old")
    job.snapshot("b")
    with contextlib.suppress(AssertionError):
        job.replicate(status=1)
    assert not [line for line in job.done("recv") if "/m/old@b" in line and job.here("/m/old").startswith("b")]


def test_clone_is_not_pulled_in_full_while_its_origin_is_not_listed() -> None:
    """/base is damaged, or only its neighbour is: what seems to be gone may only be missing in the listing."""
    root = Dataset("s", "filesystem", (Snapshot("s@a", 1, 10, 0),))
    clone = Dataset("s/clone", "filesystem", (Snapshot("s/clone@b", 3, 30, 0),), origin="s/base@a")
    local = Dataset("t", "filesystem", (Snapshot("t@a", 1, 5, 0),), held_before=True)
    base = Dataset("t/base", "filesystem", (Snapshot("t/base@a", 2, 6, 0),), held_before=True)
    trees = Trees({"": root, "/clone": clone}, {"": local, "/base": base}, ("t",), source_whole=False)
    plan = TreePlan(trees, Policy("s", "t", "tag"))
    assert not [entry for key, entry in plan.entries if key == "/clone" and isinstance(entry, Receive)]
