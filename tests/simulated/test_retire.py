"""--retire: the end of a mirror."""

from __future__ import annotations

import io

from histories import LOCAL, RECEIVED, SOURCE, TAG
from jobs import EACH, Job, refusing
from simulated import Near

from zfs_replicate import Policy, Report, retire


def retired(job: Job) -> list[str]:
    report = Report(steps=io.StringIO())
    job.wire.done.clear()
    retire(Near(job.wire, job.source), Near(job.wire, job.backup), Policy(SOURCE, LOCAL, TAG), report)
    assert not report.failures
    assert {command[1] for command in job.wire.writes()} <= {"release", "destroy", "inherit"}
    assert isinstance(report.steps, io.StringIO)
    return report.steps.getvalue().splitlines()


def test_retire_takes_our_holds_and_bookmarks_and_nothing_else(mirrored: Job) -> None:
    point = mirrored.source.datasets[SOURCE].snapshots["a"]
    mark = Policy(SOURCE, LOCAL, TAG).mark(point.guid)[1:]
    mirrored.source.bookmark(f"{SOURCE}@a", mark)
    mirrored.source.bookmark(f"{SOURCE}@a", "mine")
    mirrored.source.hold("other", f"{SOURCE}@a")
    mirrored.backup.hold(TAG, f"{LOCAL}@a")  # of the next host of a chain
    said = retired(mirrored)
    assert len(said) == 2 * len(EACH) + 1
    assert f"{SOURCE}@a: released {TAG}" in said
    assert f"{LOCAL}/www@a: released {RECEIVED}" in said
    assert f"{SOURCE}#{mark}: destroyed" in said
    assert mirrored.there() == "a!other"
    assert mirrored.here() == f"a!{TAG}"
    assert list(mirrored.source.datasets[SOURCE].bookmarks) == ["mine"]
    assert retired(mirrored) == []


def test_retire_works_without_the_local_side(mirrored: Job) -> None:
    for name in mirrored.backup.below(LOCAL):
        del mirrored.backup.datasets[name]
    assert retired(mirrored)[-1] == f"{LOCAL}: not there (any more)"
    assert mirrored.there() == "a"


def test_retire_fails_if_a_hold_stays(mirrored: Job) -> None:
    mirrored.wire.at = refusing("^zfs release", "source")
    report = Report()
    retire(
        Near(mirrored.wire, mirrored.source), Near(mirrored.wire, mirrored.backup), Policy(SOURCE, LOCAL, TAG), report
    )
    (failure,) = report.failures
    assert failure.startswith(f"zfs_replicate: {SOURCE}: {SOURCE}@a, {SOURCE}/")
    assert f"@a and 1 more: still held by {TAG}: permission denied" in failure
    assert mirrored.here() == "a"
