"""What a run pulls: first, next, intermediates, children, placeholders, chains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from histories import LOCAL, RECEIVED, SOURCE, TAG
from jobs import EACH, Job
from simulated import Machine, days

if TYPE_CHECKING:
    import pytest


def test_pull_first_brings_the_newest_of_each_dataset(job: Job) -> None:
    job.snapshot("a")
    job.snapshot("b")
    assert job.replicate() == ""
    for key in EACH:
        assert job.here(key) == f"b!{RECEIVED}"
        assert job.there(key) == f"a b!{TAG}"
    assert job.backup.datasets[f"{LOCAL}/disk"].kind == "volume"


def test_pull_first_of_every_snapshot(job: Job) -> None:
    for name in "abc":
        job.snapshot(name)
    job.replicate(every=True)
    for key in EACH:
        assert job.here(key) == f"a b c!{RECEIVED}"
        assert job.there(key) == f"a b c!{TAG}"


def test_pull_next_goes_straight_to_the_newest(mirrored: Job) -> None:
    for name in "bc":
        mirrored.snapshot(name)
    mirrored.replicate()
    for key in EACH:
        assert mirrored.here(key) == f"a c!{RECEIVED}"
        assert mirrored.there(key) == f"a b c!{TAG}"


def test_pull_next_with_intermediates_brings_all(mirrored: Job) -> None:
    for name in "bcd":
        mirrored.snapshot(name)
    mirrored.replicate(every=True)
    for key in EACH:
        assert mirrored.here(key) == f"a b c d!{RECEIVED}"
        assert mirrored.there(key) == f"a b c d!{TAG}"


def test_pull_of_nothing_new_changes_and_says_nothing(mirrored: Job, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    mirrored.replicate(keep=1, every=True)
    assert mirrored.done() == []
    assert capsys.readouterr() == ("", "")


def test_pull_brings_a_new_child(mirrored: Job) -> None:
    mirrored.source.create(f"{SOURCE}/new/deep")
    mirrored.snapshot("b")
    mirrored.replicate()
    for key in (*EACH, "/new", "/new/deep"):
        assert mirrored.here(key).endswith(f"b!{RECEIVED}")


def test_placeholder_stands_for_a_parent_without_a_snapshot(job: Job) -> None:
    job.snapshot("a", "/www/logs")
    job.replicate()
    assert [job.here(key) for key in ("", "/www", "/www/logs")] == ["", "", f"a!{RECEIVED}"]
    job.snapshot("b", "", "/www")
    job.replicate()
    assert [job.here(key) for key in ("", "/www", "/www/logs")] == [f"b!{RECEIVED}", f"b!{RECEIVED}", f"a!{RECEIVED}"]


def test_pull_keeps_a_child_that_is_gone_at_the_source(mirrored: Job) -> None:
    mirrored.source.release(TAG, f"{SOURCE}/www/logs@a")
    mirrored.source.destroy_dataset(f"{SOURCE}/www/logs")
    mirrored.source.world.now += days(100)
    mirrored.snapshot("b")
    mirrored.replicate(keep=1)
    assert mirrored.here("/www/logs") == f"a!{RECEIVED}"
    assert mirrored.here("/www") == f"b!{RECEIVED}"


def test_pull_is_blocked_for_a_child_made_anew_under_its_old_name(mirrored: Job) -> None:
    mirrored.source.release(TAG, f"{SOURCE}/www/logs@a")
    mirrored.source.destroy_dataset(f"{SOURCE}/www/logs")
    mirrored.source.create(f"{SOURCE}/www/logs")
    mirrored.snapshot("a2")
    assert "the common base of" in mirrored.replicate(status=1, keep=1)
    assert mirrored.here("/www/logs") == f"a!{RECEIVED}"
    assert mirrored.here("/www") == f"a a2!{RECEIVED}"


def test_match_ignores_names(mirrored: Job) -> None:
    """The base was renamed at the source, and another snapshot has its name now."""
    mirrored.source.rename(f"{SOURCE}@a", "old")
    mirrored.snapshot("a", "")
    mirrored.snapshot("b", "")
    mirrored.replicate()
    assert mirrored.here() == f"a b!{RECEIVED}"
    assert mirrored.there() == f"old a b!{TAG}"


def test_order_ignores_guids_and_times(mirrored: Job) -> None:
    """The clock at the source was set back by a month between two snapshots."""
    mirrored.source.world.now -= days(31)
    mirrored.snapshot("b")
    mirrored.replicate()
    mirrored.snapshot("c")
    mirrored.replicate()
    assert mirrored.here() == f"a b c!{RECEIVED}"
    assert mirrored.there() == f"a b c!{TAG}"


def test_pull_goes_on_from_a_bookmark(mirrored: Job) -> None:
    mirrored.source.bookmark(f"{SOURCE}@a", "mark")
    mirrored.source.release(TAG, f"{SOURCE}@a")
    mirrored.source.destroy(SOURCE, ["a"])
    mirrored.snapshot("b")
    mirrored.snapshot("c")
    mirrored.replicate(every=True)
    assert mirrored.here() == f"a b c!{RECEIVED}"


def test_chain_of_three_hosts_with_one_tag(mirrored: Job) -> None:
    third = Machine(mirrored.source.world, "third", "vault")
    onward = Job(mirrored.backup, third, LOCAL, "vault/mirror")
    onward.replicate()
    assert mirrored.here() == f"a!{TAG}!{RECEIVED}"
    mirrored.snapshot("b")
    mirrored.source.world.now += days(50)
    mirrored.snapshot("c")
    mirrored.replicate(keep=1)
    assert mirrored.here() == f"a!{TAG} c!{RECEIVED}", "the end of the chain still needs @a"
    onward.replicate(keep=1)
    assert (mirrored.here(), onward.here()) == (f"a c!{TAG}!{RECEIVED}", f"c!{RECEIVED}")
    mirrored.replicate(keep=1)
    assert mirrored.here() == f"c!{TAG}!{RECEIVED}"
