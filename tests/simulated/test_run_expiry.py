"""Expiry in whole runs: here and nowhere else, and never what is needed or unknown."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from histories import LOCAL, RECEIVED, SOURCE, TAG
from jobs import EACH, Job, break_link, once, refusing
from simulated import Machine, days

from zfs_replicate import Answer

if TYPE_CHECKING:
    from zfs_replicate import Command


def test_expiry_destroys_here_and_nowhere_else(aged: Job) -> None:
    aged.replicate(keep=15)
    for key in EACH:
        assert aged.here(key) == f"d e!{RECEIVED}"
        assert aged.there(key) == f"a b c d e!{TAG}"
    assert len(aged.done("destroy")) == 4, "one command for each dataset"


def test_expiry_needs_keep_days(aged: Job) -> None:
    aged.replicate()
    assert aged.here() == f"a b c d e!{RECEIVED}"


def test_expiry_takes_the_old_base_in_the_run_that_releases_it(aged: Job) -> None:
    aged.replicate(keep=1)
    assert aged.here() == f"e!{RECEIVED}"


def test_expiry_leaves_the_mirror_of_a_source_that_stopped(aged: Job) -> None:
    aged.replicate()
    aged.source.world.now += days(1000)
    aged.replicate(keep=15)
    assert aged.here() == f"d e!{RECEIVED}"


def test_expiry_leaves_what_others_hold_here(aged: Job) -> None:
    aged.backup.hold("keep", f"{LOCAL}@b")
    aged.replicate(keep=1)
    assert aged.here() == f"b!keep e!{RECEIVED}"


def test_expiry_goes_on_after_one_that_cannot_be_destroyed(aged: Job) -> None:
    said = aged.replicate(status=1, keep=1, at=refusing(f"^zfs destroy {LOCAL}@(.*,)?b"))
    assert f"{LOCAL}@b: zfs destroy failed on backup: permission denied" in said
    assert aged.here() == f"b e!{RECEIVED}"


@pytest.mark.parametrize("said", ["dataset is busy", "snapshot has dependent clones"])
def test_expiry_keeps_what_is_busy_and_tells_if_it_stays_so(aged: Job, said: str) -> None:
    """Somebody has a shell in it, or a clone of it elsewhere. The others go."""

    def busy(_: Machine, command: Command, moment: str) -> Answer | None:
        is_hit = moment == "before" and re.match(f"zfs destroy {LOCAL}@(.*,)?c", " ".join(command))
        return Answer(1, "", f"cannot destroy '{LOCAL}@c': {said}\n") if is_hit else None

    aged.replicate(keep=15, at=busy)
    assert aged.here() == f"c d e!{RECEIVED}"
    aged.source.world.now += days(50)
    aged.snapshot("late")
    told = aged.replicate(status=1, keep=15, at=busy)
    assert said in told
    assert "it was due more than 7 days ago" in told


@pytest.mark.parametrize("machine", ["source", "backup"])
def test_expiry_leaves_what_is_held_if_holds_cannot_be_read(aged: Job, machine: str) -> None:
    aged.source.hold(TAG, f"{SOURCE}@b")
    aged.backup.hold("keep", f"{LOCAL}@a")
    said = aged.replicate(status=1, keep=1, at=refusing("^zfs holds", machine))
    assert f"holds on {machine}" in said
    if machine == "source":
        assert aged.here() == f"a!keep b d e!{RECEIVED}", "that e is held there we know: we did it"
        assert aged.there() == f"a b!{TAG} c d!{TAG} e!{TAG}"
    else:
        assert aged.here() == f"a!keep b c d!{RECEIVED} e!{RECEIVED}", "what we hold here is not known"
    assert not [line for line in aged.done("release") if line.startswith(machine)]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_expiry_leaves_twins_that_cannot_be_released(aged: Job, moment: str) -> None:
    aged.source.hold(TAG, f"{SOURCE}@b")
    silent = moment == "after"
    aged.replicate(status=0 if silent else 1, keep=1, at=refusing("^zfs release", "source", moment))
    if silent:  # released, whatever the status says
        assert aged.here() == f"e!{RECEIVED}"
    else:
        assert aged.there() == f"a b!{TAG} c d!{TAG} e!{TAG}"
        assert aged.here() == f"b d!{RECEIVED} e!{RECEIVED}", "ours here goes after that there"


def test_expiry_looks_again_at_what_is_due_after_another_change(mirrored: Job) -> None:
    """Hours may go by while that one comes."""
    mirrored.snapshot("b", "/disk")
    mirrored.replicate()
    mirrored.source.world.now += days(50)
    mirrored.snapshot("c", "/disk", "/www")
    mirrored.replicate()
    mirrored.snapshot("d", "/www")
    held = once("after", lambda: mirrored.backup.hold("keep", f"{LOCAL}/disk@b"), "^zfs send")
    assert mirrored.replicate(keep=1, at=held) == ""
    assert mirrored.here("/disk") == f"b!keep c!{RECEIVED}"


def test_expiry_destroys_nothing_once_the_source_is_silent(aged: Job) -> None:
    def lost(where: Machine, command: Command, moment: str) -> Answer | None:
        if where is aged.source and len(aged.done("recv")) == 4:
            break_link()
        return None

    assert "the link broke" in aged.replicate(status=1, keep=1, at=lost)
    assert aged.here() == f"a b c d!{RECEIVED} e!{RECEIVED}"
    aged.replicate(keep=1)
    assert aged.here() == f"e!{RECEIVED}"


def test_expiry_takes_nothing_of_a_new_dataset_under_an_old_name(aged: Job) -> None:
    """/www is called /web by now, and there is another /www: that one was not held when the run began (I8)."""
    aged.replicate()
    aged.source.rename_dataset(f"{SOURCE}/www", f"{SOURCE}/web")
    aged.source.create(f"{SOURCE}/www")
    for name in ("old", "older", "new"):
        aged.source.snapshot(f"{SOURCE}/www@{name}")
        aged.source.world.now += days(9)
    aged.replicate(keep=1, every=True)
    assert aged.here("/web").startswith("e")
    assert aged.here("/www") == f"old older new!{RECEIVED}"
    aged.replicate(keep=1, every=True)
    assert aged.here("/www") == f"new!{RECEIVED}"
