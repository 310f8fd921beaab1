"""--dry-run says what a run then does, and a run notes for --json what a dry run says."""

from __future__ import annotations

import io
from typing import Any

from histories import LOCAL, RECEIVED, SOURCE, TAG
from jobs import Job, refusing
from simulated import SEGMENT_BYTES, Machine, Near, World, days

from zfs_replicate import Policy, Report, Run, format_bytes, print_plan


def events_of(job: Job, **options: Any) -> list[tuple[str, str]]:
    """What a run notes for --json: what happened, and to what."""
    report, wire = Report(), job.wire
    policy = Policy(SOURCE, LOCAL, TAG, **options)
    run = Run(policy, Near(wire, job.source), Near(wire, job.backup), wire.carry, report)
    run.begin(job.source.world.now)
    run.execute(job.source.world.now)
    assert not report.failures
    return [(event["event"], event["dataset"] + event.get("snapshot", "")) for event in report.events]


def test_events_of_a_run_are_those_of_a_dry_run(job: Job) -> None:
    job.snapshot("a", "/www/logs")
    assert events_of(job) == [
        ("no snapshot to pull", LOCAL),
        ("no snapshot to pull", f"{LOCAL}/disk"),
        ("no snapshot to pull", f"{LOCAL}/www"),
        ("hold", f"{SOURCE}/www/logs@a"),
        ("create", "offsite/virt"),
        ("create", LOCAL),
        ("create", f"{LOCAL}/www"),
        ("pull", f"{LOCAL}/www/logs@a"),
        ("hold", f"{LOCAL}/www/logs@a"),
    ]
    job.snapshot("b", "/www/logs")
    assert [it for it in events_of(job) if it[0] in ("hold", "release", "pull")] == [
        ("hold", f"{SOURCE}/www/logs@b"),
        ("pull", f"{LOCAL}/www/logs@b"),
        ("hold", f"{LOCAL}/www/logs@b"),
        ("release", f"{SOURCE}/www/logs@a"),
        ("release", f"{LOCAL}/www/logs@a"),
    ]


def test_events_tell_a_receive_that_is_given_up(job: Job) -> None:
    job.snapshot("a")
    job.replicate()
    job.snapshot("b")
    job.replicate(status=1, at=refusing("machines/www@b", moment="half-way"))
    job.source.release(TAG, f"{SOURCE}/www@b")
    job.source.destroy(f"{SOURCE}/www", ["b"])
    assert ("abandon", f"{LOCAL}/www") in events_of(job)


SIZE = format_bytes(SEGMENT_BYTES)


def run_dry_run(job: Job, policy: Policy, status: int = 0) -> list[str]:
    """What --dry-run says; nothing may be written, and the machines must be as they were."""
    out = io.StringIO()
    report = Report(steps=out)
    wire = job.wire
    wire.done.clear()
    run = Run(policy, Near(wire, job.source), Near(wire, job.backup), wire.carry, report)
    run.begin(job.source.world.now)
    print_plan(run, job.source.world.now)
    assert not wire.writes()
    assert bool(report.failures) == bool(status), report.failures
    return out.getvalue().splitlines()


def foretold(job: Job, **options: object) -> list[str]:
    """What is said beforehand must be done thereafter: the same snapshots come, expire, and are held."""
    policy = Policy(SOURCE, LOCAL, TAG, **options)  # type: ignore[arg-type]
    lines = run_dry_run(job, policy)
    report = Report()
    run = Run(policy, Near(job.wire, job.source), Near(job.wire, job.backup), job.wire.carry, report)
    run.begin(job.source.world.now)
    run.execute(job.source.world.now)
    assert not report.failures
    return lines


def guid(machine: Machine, name: str) -> int:
    dataset, _, short = name.partition("@")
    return machine.datasets[dataset].snapshots[short].guid


def test_dry_run_of_a_first_pull(job: Job) -> None:
    job.snapshot("a")
    lines = foretold(job)
    a = {key: guid(job.source, f"{SOURCE}{key}@a") for key in ("", "/disk", "/www", "/www/logs")}
    assert lines == [
        "offsite/virt: create, as a parent that never mounts",
        *(f"{LOCAL}{key}: pull full @a: {SIZE} (guid {a[key]})" for key in a),
        *(f"{name}@a: hold {tag}" for key in a for name, tag in ((SOURCE + key, TAG), (LOCAL + key, RECEIVED))),
    ]


def test_dry_run_of_an_increment_moves_holds_and_expires(job: Job) -> None:
    job.snapshot("old")
    job.replicate()
    job.source.world.now += days(50)
    job.snapshot("b", "")
    job.replicate()
    job.source.world.now += days(50)
    job.backup.hold("keep", f"{LOCAL}@old")
    job.snapshot("c", "")
    b, c = (guid(job.source, f"{SOURCE}@{name}") for name in "bc")
    assert foretold(job, keep_days=30) == [
        f"{LOCAL}: pull @b -> @c: {SIZE} (guid {c}, onto that of guid {b})",
        *(f"{LOCAL}{key}: in step" for key in ("/disk", "/www", "/www/logs")),
        f"{SOURCE}@c: hold {TAG}",
        f"{LOCAL}@c: hold {RECEIVED}",
        f"{SOURCE}@b: release {TAG}",
        f"{LOCAL}@b: release {RECEIVED}",
        f"{LOCAL}@old: older than --keep-days, but kept: held by keep",
        f"{LOCAL}@b: expires",
    ]
    assert job.here() == f"old!keep c!{RECEIVED}"
    assert job.there() == f"old b c!{TAG}"


def test_dry_run_tells_what_is_blocked_as_a_run_does(job: Job) -> None:
    job.snapshot("a")
    job.replicate()
    job.backup.snapshot(f"{LOCAL}@mine")
    job.snapshot("b")
    lines = run_dry_run(job, Policy(SOURCE, LOCAL, TAG), status=1)
    assert not any(line.startswith(f"{LOCAL}: ") for line in lines)
    assert any(line.startswith(f"{LOCAL}/www: pull @a -> @b") for line in lines)


def test_dry_run_tells_what_rollback_and_quarantine_would_do(job: Job) -> None:
    job.snapshot("a")
    job.replicate()
    job.backup.snapshot(f"{LOCAL}/www@mine")
    job.snapshot("b")
    lines = run_dry_run(job, Policy(SOURCE, LOCAL, TAG, rollback=True))
    assert f"{LOCAL}/www: rolling back to @a, which destroys @mine" in lines
    assert any(line.startswith(f"{LOCAL}/www: pull @a -> @b") for line in lines)
    lines = run_dry_run(job, Policy(SOURCE, LOCAL, TAG, quarantine=True))
    assert any(line.startswith(f"{LOCAL}/www: rename to {LOCAL}/www.quarantine-") for line in lines)
    assert any(line.startswith(f"{LOCAL}/www/logs: pull full @b") for line in lines)


def test_dry_run_of_a_rename_and_a_rest(job: Job) -> None:
    job.snapshot("a")
    job.replicate()
    job.source.rename_dataset(f"{SOURCE}/www", f"{SOURCE}/web")
    assert foretold(job)[1:4] == [
        f"{LOCAL}/disk: in step",
        f"{LOCAL}/www: rename to {LOCAL}/web, as at the source",
        f"{LOCAL}/web: in step",
    ]
    assert job.here("/web/logs") == f"a!{RECEIVED}"


def test_dry_run_of_a_chain_of_placeholders(job: Job) -> None:
    world = World()
    source = Machine(world, "source", "backuppool", txg=9000)
    source.create(f"{SOURCE}/deep/deeper")
    other = type(job)(source, Machine(world, "backup", "offsite"))
    other.snapshot("a", "/deep/deeper")
    lines = foretold(other)
    assert [line.partition(":")[0] for line in lines if ": create" in line] == [
        "offsite/virt",
        LOCAL,
        f"{LOCAL}/deep",
    ]
    assert other.here("/deep/deeper") == f"a!{RECEIVED}"
