"""--status and the mark of failing runs, and that a mode that looks changes nothing."""

from __future__ import annotations

import pytest
from histories import LOCAL, RECEIVED, SOURCE, TAG
from jobs import EACH, Job
from simulated import USED, WRITTEN, Machine, Near, days

from zfs_replicate import (
    CREATE_PARENT,
    LIST_EXISTING,
    Answer,
    Command,
    Doctor,
    MirrorStatus,
    Policy,
    ReadOnly,
    Report,
    Run,
    all_statuses,
    clear_failing,
    hold,
    local_statuses,
    mark_failing,
    release,
    rename,
    set_failing,
)

CHANGING = {
    "hold": hold(TAG, [f"{SOURCE}@a"]),
    "release": release(TAG, [f"{SOURCE}@a"]),
    "rename": rename(LOCAL, f"{LOCAL}.x"),
    "set": set_failing(LOCAL, 5),
    "inherit": clear_failing(LOCAL),
    "create": (*CREATE_PARENT, LOCAL),
    "abort": ("zfs", "recv", "-A", LOCAL),
    "unknown": ("zfs", "promote", LOCAL),
}


@pytest.mark.parametrize("verb", CHANGING)
def test_read_only_host_refuses_what_changes_anything(mirrored: Job, verb: str) -> None:
    """I9."""
    host = ReadOnly(mirrored.backup)
    with pytest.raises(AssertionError, match="only looks"):
        host.ask((*LIST_EXISTING, LOCAL), CHANGING[verb])
    with pytest.raises(AssertionError, match="only looks"):
        host.stream_command(("zfs", "send", f"{SOURCE}@a"))
    assert host.ask((*LIST_EXISTING, LOCAL)).stdout == f"{LOCAL}\n"


def looked_at(job: Job) -> list[MirrorStatus]:
    run = Run(
        Policy(SOURCE, LOCAL, TAG), Near(job.wire, job.source), Near(job.wire, job.backup), job.wire.carry, Report()
    )
    run.begin(0, in_full=True)
    return list(all_statuses(run))


def test_status_tells_where_each_dataset_stands(mirrored: Job) -> None:
    mirrored.snapshot("b", "")
    mirrored.snapshot("c", "", "/disk")
    mirrored.source.create(f"{SOURCE}/new")
    mirrored.source.release(TAG, f"{SOURCE}/disk@a")
    mirrored.source.release(TAG, f"{SOURCE}/www/logs@a")
    mirrored.source.destroy_dataset(f"{SOURCE}/www/logs")
    found = {it.name[len(LOCAL) :]: it for it in looked_at(mirrored)}
    assert list(found) == ["", "/disk", "/new", "/www", "/www/logs"]
    told = {
        key: (it.common and it.common.short, it.source, it.held_here, it.held_there, it.behind, it.lacking)
        for key, it in found.items()
    }
    assert told == {
        "": ("@a", SOURCE, True, True, 2, 2 * WRITTEN),
        "/disk": ("@a", f"{SOURCE}/disk", True, False, 1, WRITTEN),
        "/new": (None, f"{SOURCE}/new", False, False, 0, 0),
        "/www": ("@a", f"{SOURCE}/www", True, True, 0, 0),
        "/www/logs": ("@a", "", True, None, None, None),
    }
    assert [found[key].pinned for key in ("", "/new", "/www/logs")] == [USED, 0, None]
    here = list(local_statuses(mirrored.backup, Policy(SOURCE, LOCAL, TAG)))
    assert [(it.name[len(LOCAL) :], it.common and it.common.short) for it in here] == [
        (key, "@a") for key in ("", "/disk", "/www", "/www/logs")
    ]


def test_status_knows_by_our_own_clock_when_a_snapshot_came(mirrored: Job) -> None:
    world = mirrored.source.world
    came, policy = world.now, Policy(SOURCE, LOCAL, TAG)
    world.now += days(36500)
    mirrored.snapshot("b")
    world.now = came + 3600
    mirrored.replicate()
    (root, *_) = here = list(local_statuses(mirrored.backup, policy))
    assert root.common
    assert root.common.creation == came + days(36500)
    assert all(it.received is not None and 0 <= came + 3600 - it.received < 60 for it in here)
    run = Run(policy, mirrored.source, mirrored.backup, mirrored.wire.carry, Report())
    run.begin(0, in_full=True)
    assert {finding.what.partition(" ")[0] for finding in Doctor(run).dates()} == {f"{LOCAL}{key}@b" for key in EACH}


@pytest.mark.parametrize(
    "date", ["", "-", "yesterday", "1700000000", "Thu Nov 16 10:00 99999", "Thu Nov 31 10:00 2023"]
)
def test_status_leaves_open_when_a_snapshot_came_without_a_date(mirrored: Job, date: str) -> None:
    def dated(where: Machine, command: Command, moment: str) -> Answer | None:
        is_asked = command[1] == "holds" and len(command) == 3 + len(EACH) and moment == "before"
        return Answer(0, "".join(f"{name}\t{RECEIVED}\t{date}\n" for name in command[3:]), "") if is_asked else None

    mirrored.wire.at = dated
    here = list(local_statuses(Near(mirrored.wire, mirrored.backup), Policy(SOURCE, LOCAL, TAG)))
    assert [it.received for it in here] == [None] * len(EACH)


def test_failing_mark_is_at_the_local_root_and_there_alone(mirrored: Job) -> None:
    assert mark_failing(mirrored.backup, LOCAL, 5) == 5
    assert mark_failing(mirrored.backup, LOCAL, 9) == 5
    assert mirrored.backup.datasets[LOCAL].mark == f"5 {LOCAL}"
    run = Run(Policy(SOURCE, LOCAL, TAG), mirrored.source, mirrored.backup, mirrored.wire.carry, Report())
    assert not run.trees.failing
    run.begin(0, in_full=True)
    assert run.trees.failing
    mirrored.backup.datasets[LOCAL].mark = "5 offsite/virt"  # the root had another name then
    assert mark_failing(mirrored.backup, LOCAL, 9) == 9
    assert mark_failing(mirrored.backup, "offsite/none", 9) == 9


@pytest.mark.parametrize("mark", [f"0 {LOCAL}", f"99999999999 {LOCAL}", "a\tb", "a\nb", "-", f"{'9' * 20} {LOCAL}"])
def test_failing_mark_that_says_nothing_is_set_anew(mirrored: Job, mark: str) -> None:
    mirrored.backup.datasets[LOCAL].mark = mark
    assert mark_failing(mirrored.backup, LOCAL, 9) == 9
    assert mirrored.backup.datasets[LOCAL].mark == f"9 {LOCAL}"
    mirrored.backup.datasets[LOCAL].mark = mark
    run = Run(Policy(SOURCE, LOCAL, TAG), mirrored.source, mirrored.backup, mirrored.wire.carry, Report())
    run.begin(0, in_full=True)
    assert run.trees.failing
