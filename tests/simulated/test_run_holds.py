"""Holds in whole runs: placed before anything is sent, moved on both sides, and released."""

from __future__ import annotations

from typing import TYPE_CHECKING

from histories import LOCAL, RECEIVED, SOURCE, TAG
from jobs import EACH, Job, in_full, once, refusing, whole_lists
from simulated import Machine, days

from zfs_replicate import Answer, Command

if TYPE_CHECKING:
    import pytest


def test_holds_are_placed_before_the_first_byte_in_one_command(mirrored: Job) -> None:
    mirrored.snapshot("b")
    mirrored.replicate()
    kinds = [words[:2] for words in mirrored.wire.writes()]
    assert kinds[:5] == [("source", "hold"), *[("backup", "recv")] * 4]
    assert len(mirrored.wire.writes()[0]) == 3 + 4


def test_holds_are_placed_on_both_sides_before_one_is_released(mirrored: Job) -> None:
    mirrored.snapshot("b")
    mirrored.replicate()
    kinds = [f"{where} {what}" for where, what, *_ in mirrored.wire.writes() if what in ("hold", "release")]
    assert kinds == ["source hold", "backup hold", "source release", "backup release"]


def test_release_may_destroy_what_was_marked_for_it(mirrored: Job) -> None:
    mirrored.source.doom(f"{SOURCE}@a")
    mirrored.snapshot("b")
    mirrored.replicate()
    assert mirrored.there() == f"b!{TAG}"
    assert mirrored.here() == f"a b!{RECEIVED}"


def test_holds_of_others_and_other_tags_of_the_same_stem_stay(mirrored: Job) -> None:
    for tag in ("monthly", f"{TAG}2", f"{TAG}:sent", RECEIVED):
        mirrored.source.hold(tag, f"{SOURCE}@a")
    mirrored.backup.hold(TAG, f"{LOCAL}@a")
    mirrored.snapshot("b")
    mirrored.replicate()
    assert mirrored.there() == f"a!monthly!{TAG}2!{RECEIVED}!{TAG}:sent b!{TAG}"
    assert mirrored.here() == f"a!{TAG} b!{RECEIVED}"


def test_holds_refused_keep_a_stream_from_being_sent(mirrored: Job) -> None:
    mirrored.snapshot("b")
    said = mirrored.replicate(status=1, at=refusing("^zfs hold ", "source"))
    assert "cannot hold" in said
    for key in EACH:
        assert mirrored.here(key) == f"a!{RECEIVED}"
        assert mirrored.there(key) == f"a!{TAG} b"


def test_holds_refused_leave_no_placeholder_behind(job: Job) -> None:
    job.snapshot("a", "/www")
    before = sorted(job.backup.datasets)
    assert "cannot hold" in job.replicate(status=1, at=refusing("^zfs hold ", "source"))
    assert sorted(job.backup.datasets) == before


def test_holds_refused_with_one_message_are_told_once(mirrored: Job) -> None:
    for number in range(300):
        mirrored.source.snapshot(f"{SOURCE}@n{number}")

    def refused(where: Machine, command: Command, moment: str) -> Answer | None:
        is_hold = where is mirrored.source and command[1] == "hold" and moment == "before"
        return Answer(1, "", "no\n" + "x" * 20_000) if is_hold else None

    said = mirrored.replicate(status=1, every=True, at=refused)
    assert f"cannot hold {SOURCE}@n0, {SOURCE}@n1, {SOURCE}@n2 and 297 more: no\n" in said
    assert len(said) < 5000


def test_hold_refused_stops_only_its_own_dataset(mirrored: Job) -> None:
    """It vanished after the listing: the status of the command says nothing of the others."""
    mirrored.snapshot("b")
    vanish = once("before", lambda: mirrored.source.destroy(f"{SOURCE}/www", ["b"]), "^zfs hold ")
    mirrored.replicate(status=1, at=vanish)
    assert mirrored.here("/www") == f"a!{RECEIVED}"
    assert mirrored.there("/www") == f"a!{TAG}"
    for key in ("", "/www/logs", "/disk"):
        assert mirrored.here(key) == f"a b!{RECEIVED}"


def test_hold_that_reports_failure_but_was_placed_counts(mirrored: Job) -> None:
    mirrored.snapshot("b")
    mirrored.replicate(at=refusing("^zfs hold ", moment="after"))
    assert (mirrored.here(), mirrored.there()) == (f"a b!{RECEIVED}", f"a b!{TAG}")


def test_holds_refused_here_keep_the_old_ones_on_both_sides(mirrored: Job) -> None:
    mirrored.snapshot("b")
    said = mirrored.replicate(status=1, keep=1, at=refusing("^zfs hold ", "backup"))
    assert f"not held: {LOCAL}@b" in said
    assert (mirrored.here(), mirrored.there()) == (f"a!{RECEIVED} b", f"a!{TAG} b!{TAG}")
    mirrored.replicate()
    assert (mirrored.here(), mirrored.there()) == (f"a b!{RECEIVED}", f"a b!{TAG}")


def test_holds_that_somebody_removed_are_placed_again(mirrored: Job) -> None:
    mirrored.source.release(TAG, f"{SOURCE}@a")
    mirrored.backup.release(RECEIVED, f"{LOCAL}/www@a")
    mirrored.replicate()
    assert (mirrored.there(), mirrored.here("/www")) == (f"a!{TAG}", f"a!{RECEIVED}")


def test_rename_at_the_source_meanwhile_keeps_the_hold(mirrored: Job) -> None:
    mirrored.snapshot("b", "/disk")
    after_rename = once(
        "after", lambda: mirrored.source.rename_dataset(f"{SOURCE}/disk", f"{SOURCE}/volume"), "^zfs send"
    )
    mirrored.replicate(at=after_rename)
    assert whole_lists(mirrored)[2:] == ["source", "backup"], "where one is gone all is listed"
    assert (mirrored.here("/disk"), mirrored.there("/volume")) == (f"a b!{RECEIVED}", f"a b!{TAG}")
    mirrored.replicate()
    assert (mirrored.here("/volume"), mirrored.there("/volume")) == (f"a b!{RECEIVED}", f"a b!{TAG}")


def test_rename_that_cannot_be_followed_releases_nothing(mirrored: Job) -> None:
    mirrored.source.rename_dataset(f"{SOURCE}/www", f"{SOURCE}/web")
    mirrored.snapshot("b")
    said = mirrored.replicate(status=1, at=refusing("^zfs rename ", "backup"))
    assert f"{LOCAL}/web: zfs rename failed on backup: permission denied" in said
    assert (mirrored.here("/www"), mirrored.there("/web")) == (f"a!{RECEIVED}", f"a!{TAG} b")
    assert (mirrored.here("/www/logs"), mirrored.there("/web/logs")) == (f"a!{RECEIVED}", f"a!{TAG} b")
    mirrored.replicate()
    assert (mirrored.here("/web"), mirrored.there("/web")) == (f"a b!{RECEIVED}", f"a b!{TAG}")


def test_hold_of_ours_that_somebody_placed_is_released(aged: Job) -> None:
    """It is asked for with the others, for there is room in that request."""
    aged.replicate()
    before = len(aged.done("holds"))
    aged.source.hold(TAG, f"{SOURCE}@a")
    aged.source.hold(TAG, f"{SOURCE}/www@b")
    aged.replicate()
    assert (aged.there(), aged.there("/www")) == (f"a b c d e!{TAG}", f"a b c d e!{TAG}")
    aged.replicate()
    assert len(aged.done("holds")) == before
    assert in_full(aged) == 0


def test_hold_of_ours_in_a_long_history_is_found_within_some_days(aged: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zfs_replicate.BATCH_BYTES", 500)
    for number in range(40):
        aged.source.snapshot(f"{SOURCE}/www@more{number:02}")
    aged.replicate()
    aged.source.hold(TAG, f"{SOURCE}/www@more07")
    days_needed = 0
    while TAG in aged.source.datasets[f"{SOURCE}/www"].snapshots["more07"].tags:
        aged.replicate()
        aged.source.world.now += days(1)
        days_needed += 1
        assert days_needed < 30, "it is never found"
    assert days_needed > 1


def test_hold_of_ours_is_released_before_its_twin_expires(aged: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zfs_replicate.also_to_read", lambda *_: [])
    aged.replicate()
    aged.source.hold(TAG, f"{SOURCE}@a")
    aged.replicate()
    assert aged.there() == f"a!{TAG} b c d e!{TAG}", "it was not its turn"
    aged.replicate(keep=1)
    assert (aged.there(), aged.here()) == (f"a b c d e!{TAG}", f"e!{RECEIVED}")
    assert in_full(aged) == 0
