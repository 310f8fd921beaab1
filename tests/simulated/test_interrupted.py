"""Receives that were interrupted: resumed, given up, and what they keep from expiry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from histories import LOCAL, RECEIVED, SOURCE, TAG
from jobs import Job, break_link, half_way, refusing
from simulated import Machine, Refused

from zfs_replicate import Answer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zfs_replicate import Command


@pytest.mark.parametrize("first", [True, False], ids=["first", "increment"])
def test_interrupted_receive_goes_on_and_then_to_what_is_newer(job: Job, first: bool) -> None:
    job.snapshot("a")
    if not first:
        job.replicate()
        job.snapshot("b")
    job.replicate(status=1, at=half_way("machines@", break_link))
    assert job.backup.datasets[LOCAL].partial
    job.snapshot("c")
    job.replicate()
    assert job.here() == (f"a c!{RECEIVED}" if first else f"a b c!{RECEIVED}")
    assert job.there() == (f"a c!{TAG}" if first else f"a b c!{TAG}")


def test_interrupted_receive_is_followed_by_what_is_held_first(mirrored: Job) -> None:
    mirrored.snapshot("b", "")
    mirrored.replicate(status=1, at=half_way())
    mirrored.snapshot("c", "")
    mirrored.replicate()
    assert [line.split()[1] for line in mirrored.done()][:3] == ["hold", "recv", "recv"]


@pytest.mark.parametrize("first", [True, False], ids=["first", "increment"])
def test_interrupted_receive_with_a_stale_token_is_given_up(job: Job, first: bool) -> None:
    job.snapshot("a")
    if not first:
        job.replicate()
    job.snapshot("b", "")
    job.replicate(status=1, at=half_way("machines@", break_link))
    job.source.release(TAG, f"{SOURCE}@b")
    job.source.destroy(SOURCE, ["b"])
    job.snapshot("c", "")
    job.replicate()
    assert job.here() == (f"c!{RECEIVED}" if first else f"a c!{RECEIVED}")
    assert job.there() == f"a c!{TAG}"


def test_interrupted_receive_keeps_its_base_from_expiry(aged: Job) -> None:
    aged.replicate(status=1, keep=1, at=refusing("machines@e", moment="half-way"))
    assert aged.here().endswith(f"d!{RECEIVED}")
    aged.replicate(keep=1)
    assert aged.here() == f"e!{RECEIVED}"


def test_interrupted_intermediates_keep_their_base(mirrored: Job) -> None:
    """What has come along of an interrupted -I is held at the source as well: nothing else may be left of it there."""
    for name in "bcd":
        mirrored.snapshot(name, "")
    moments: list[str] = []

    def gone_at_the_second_stream(where: Machine, command: Command, moment: str) -> Answer | None:
        moments.append(moment)
        if moments.count("half-way") >= 2 and where is mirrored.source:
            break_link()
        return None

    mirrored.replicate(status=1, every=True, at=gone_at_the_second_stream)
    assert mirrored.here() == f"a!{RECEIVED} b!{RECEIVED}"
    for name in [name for name in ("b", "c") if not mirrored.source.find(f"{SOURCE}@{name}", "").tags]:
        mirrored.source.destroy(SOURCE, [name])
    mirrored.replicate(every=True)
    assert (mirrored.here(), mirrored.there()) == (f"a b c d!{RECEIVED}", f"a b c d!{TAG}")


def test_children_do_not_go_into_a_parent_that_is_half_received(job: Job) -> None:
    """When its rest cannot come any more it must be given up, and a dataset with children cannot be destroyed."""
    job.snapshot("a")
    job.replicate(status=1, at=refusing("machines/www@a", moment="half-way"))
    job.source.release(TAG, f"{SOURCE}/www@a")
    job.source.destroy(f"{SOURCE}/www", ["a"])
    job.snapshot("b", "/www")
    job.replicate()
    assert job.here("/www") == f"b!{RECEIVED}"
    assert job.here("/www/logs") == f"a!{RECEIVED}"


def test_empty_target_is_read_only_during_its_first_receive(job: Job) -> None:
    """-F would overwrite it without a word."""
    job.snapshot("a")
    job.backup.create(LOCAL, files=False)
    refused: list[str] = []

    def write() -> None:
        try:
            job.backup.write(LOCAL)
        except Refused as error:
            refused.append(str(error))

    job.replicate(at=half_way(deed=write))
    assert refused == [f"cannot write to '{LOCAL}': Read-only file system"]
    assert job.here() == f"a!{RECEIVED}"


NEVER = Answer(255, "", "cannot resume send: 'pond/m@a' used in the initial send no longer exists")


@pytest.mark.parametrize("first", [True, False], ids=["first", "increment"])
def test_token_that_the_sender_never_accepts_is_given_up_once(job: Job, first: bool) -> None:
    """As after `zpool import OLD NEW`: both guids are there, but not below the name that the token has."""
    job.snapshot("a")
    if not first:
        job.replicate()
        job.snapshot("b")
    job.replicate(status=1, at=half_way("machines@", break_link))
    job.replicate(at=lambda _, words, __: NEVER if words[:3] == ("zfs", "send", "-t") else None)
    assert [" -A " in line for line in job.done("recv")] == [True, *[False] * 4]
    assert job.here() == (f"a!{RECEIVED}" if first else f"a b!{RECEIVED}")
    assert job.there() == (f"a!{TAG}" if first else f"a b!{TAG}")


@pytest.mark.parametrize("said", ["permission denied", "dataset key must be loaded", "I/O is currently suspended"])
def test_token_that_the_sender_refuses_for_now_is_kept(mirrored: Job, said: str) -> None:
    mirrored.snapshot("b", "")
    mirrored.replicate(status=1, at=half_way())
    waiting = mirrored.backup.datasets[LOCAL].partial
    assert waiting
    refused = Answer(1, "", f"cannot resume send: {said}")
    mirrored.replicate(status=1, at=lambda _, words, __: refused if words[:3] == ("zfs", "send", "-t") else None)
    assert mirrored.backup.datasets[LOCAL].partial == waiting


def test_token_of_nothing_that_could_be_aborted_is_ignored(mirrored: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools that an old ZFS wrote show such tokens for ever (https://github.com/openzfs/zfs/issues/10439)."""
    mirrored.snapshot("b", "")
    mirrored.replicate(status=1, at=half_way())
    store = mirrored.backup.datasets[LOCAL]
    assert store.partial
    token, store.partial = store.partial.token, None
    mirrored.source.release(TAG, f"{SOURCE}@b")
    mirrored.source.destroy(SOURCE, ["b"])
    mirrored.snapshot("c", "")
    rows = Machine.rows

    def rows_with_token(machine: Machine, name: str, *, points: bool) -> Iterator[tuple[str | int, ...]]:
        for row in rows(machine, name, points=points):
            yield (*row[:6], token, *row[7:]) if row[0] == LOCAL and machine is mirrored.backup else row

    monkeypatch.setattr(Machine, "rows", rows_with_token)
    for _ in range(2):
        mirrored.replicate()
        assert (mirrored.here(), mirrored.there()) == (f"a c!{RECEIVED}", f"a c!{TAG}")
