"""Lines that are run where they were not meant to be, chains of hosts, and what our own runs leave behind: on simulated
machines. Whatever it is, nothing that was not received from there by us is held, set or destroyed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from histories import LOCAL, RECEIVED, SOURCE, TAG
from jobs import Job, break_link, new_job, once, refusing, taken_over, told
from simulated import Machine, Near, World, days

from zfs_replicate import ASIDE, MADE_WAY, TAKEN_OVER, Dataset, Failure, Policy, Report, Run, main, with_clones


def chain(names: str = "abc") -> dict[str, Machine]:
    world = World()
    return {name: Machine(world, name.upper(), name) for name in names}


def pull(there: Machine, here: Machine) -> Job:
    return Job(there, here, f"{there.label.lower()}/vm", f"{here.label.lower()}/vm")


def copied(there: Machine, here: Machine) -> None:
    """By another tool: the snapshots, and nothing else."""
    source, name = there.datasets[f"{there.label.lower()}/vm"], f"{here.label.lower()}/vm"
    Job(there, here, f"{there.label.lower()}/vm", name).replicate(every=True)
    for point in (*source.snapshots.values(), *here.datasets[name].snapshots.values()):
        point.tags.clear()
    here.datasets[name].values, here.datasets[name].has_received = {}, False


def aged(machine: Machine) -> None:
    machine.create("a/vm")
    for day in range(6):
        machine.snapshot(f"a/vm@d{day}")
        machine.world.now += days(10)


@pytest.fixture
def job() -> Job:
    return new_job()


def test_wrong_host_of_a_chain_holds_and_destroys_nothing() -> None:
    hosts = chain()
    aged(hosts["a"])
    pull(hosts["a"], hosts["b"]).replicate(every=True)
    pull(hosts["b"], hosts["c"]).replicate(every=True)
    before = told(hosts["a"], "a/vm")
    wrong = pull(hosts["b"], hosts["a"])
    for _ in range(3):
        assert "b/vm is the mirror of a/vm" in wrong.replicate(status=1, keep=30)
        assert wrong.done() == []
    assert told(hosts["a"], "a/vm") == before


def test_hold_of_another_host_makes_nothing_here_ours() -> None:
    hosts = chain()
    aged(hosts["a"])
    copied(hosts["a"], hosts["b"])
    pull(hosts["b"], hosts["c"]).replicate(every=True)
    wrong = pull(hosts["b"], hosts["a"])
    for _ in range(3):
        wrong.replicate(keep=30)
        assert wrong.done() == []


def test_dataset_in_use_is_neither_made_inert_nor_expired() -> None:
    hosts = chain("ab")
    aged(hosts["a"])
    copied(hosts["a"], hosts["b"])
    here = hosts["b"].datasets["b/vm"]
    here.mounted = True
    hosts["b"].write("b/vm")
    hosts["a"].snapshot("a/vm@new")
    line = pull(hosts["a"], hosts["b"])
    for _ in range(3):
        assert "b/vm was changed since" in line.replicate(status=1, keep=30)
        assert line.done() == []
    assert (here.mounted, here.values) == (True, {})


def test_inert_mirror_that_got_nothing_is_not_taken_for_ours(job: Job) -> None:
    taken_over(job)
    job.source.world.now += days(99)
    job.snapshot("b")
    for _ in range(2):
        job.replicate(status=1, keep=1, at=refusing("^zfs send .*@b"))
    store = job.backup.datasets[f"{LOCAL}/www"]
    assert store.values[TAKEN_OVER] == str(store.newest and store.newest.guid)
    assert job.there("/www") == "a b", "what did not come is not held"
    job.source.destroy(f"{SOURCE}/www", ["b"])
    job.replicate(keep=1)
    assert job.here("/www") == "a"


def test_inert_mirror_is_made_also_after_a_rollback(job: Job) -> None:
    taken_over(job)
    for key in ("", "/www"):
        job.backup.snapshot(f"{LOCAL}{key}@mine")
    job.snapshot("b")
    job.replicate(status=1)
    job.replicate(rollback=True)
    store = job.backup.datasets[f"{LOCAL}/www"]
    assert job.here("/www") == f"a b!{RECEIVED}"
    assert not store.mounted
    assert {key: store.values[key] for key in ("readonly", "canmount", "sharenfs", "compression")} == {
        "readonly": "on", "canmount": "noauto", "sharenfs": "off", "compression": "zstd"
    }  # fmt: skip


def test_dead_run_goes_on_though_another_host_pulled_from_it() -> None:
    hosts = chain("abcd")
    aged(hosts["a"])
    pull(hosts["a"], hosts["b"]).replicate()
    pull(hosts["b"], hosts["c"]).replicate(status=1, at=once("before", break_link, f"hold {RECEIVED}"))
    pull(hosts["c"], hosts["d"]).replicate()
    pull(hosts["b"], hosts["c"]).replicate()
    assert told(hosts["c"], "c/vm") == f"d5!{TAG}!{RECEIVED}"


def test_clone_of_what_the_source_set_aside_comes_in_full(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all is listed in full."""
    aside = f"/www{ASIDE}2024-01-01-000000"
    job.source.create(SOURCE + aside)
    job.snapshot("a")

    def as_clone(tree: dict[str, Dataset]) -> dict[str, Dataset]:
        if aside in tree:
            tree = {**tree, "/disk": replace(tree["/disk"], origin=f"{SOURCE}{aside}@a")}
        return with_clones(tree)

    monkeypatch.setattr("zfs_replicate.with_clones", as_clone)
    policy = Policy(SOURCE, LOCAL, TAG)
    run = Run(policy, Near(job.wire, job.source), Near(job.wire, job.backup), job.wire.carry, Report())
    run.begin(0)
    run.execute(job.source.world.now)
    assert job.here("/disk") == f"a!{RECEIVED}"
    assert not any(ASIDE in name for name in job.backup.datasets)


def test_placeholder_made_way_at_the_source_is_not_mirrored() -> None:
    """The next host pulls while the children are away."""
    hosts = chain()
    hosts["a"].create("a/vm/new/www")
    hosts["a"].snapshot("a/vm/new/www@a")
    first, second = pull(hosts["a"], hosts["b"]), pull(hosts["b"], hosts["c"])
    first.replicate()
    second.replicate()
    hosts["a"].snapshot("a/vm/new@b")
    first.replicate(at=once("half-way", second.replicate))
    assert told(hosts["c"], "c/vm/new/www") == f"a!{RECEIVED}"
    for _ in range(2):
        second.replicate()
    assert (told(hosts["c"], "c/vm/new"), told(hosts["c"], "c/vm/new/www")) == (f"b!{RECEIVED}", f"a!{RECEIVED}")
    assert second.done() == []


def test_placeholder_from_earlier_is_no_stranger(job: Job) -> None:
    job.snapshot("a", "/www/logs")
    job.replicate()
    job.snapshot("b", "/www")
    job.replicate()
    assert f"{LOCAL}/www{MADE_WAY}" in job.backup.datasets
    job.snapshot("c", "")
    job.replicate()
    assert (job.here(), job.here("/www/logs")) == (f"c!{RECEIVED}", f"a!{RECEIVED}")


def test_placeholder_that_cannot_make_way_twice_says_what_to_do(job: Job) -> None:
    job.snapshot("a", "/www/logs")
    job.replicate()
    job.backup.create(f"{LOCAL}/www{MADE_WAY}")
    job.snapshot("b", "/www")
    assert f"zfs destroy '{LOCAL}/www{MADE_WAY}'" in job.replicate(status=1)


def test_pool_root_cannot_make_way() -> None:
    hosts = chain("ab")
    hosts["a"].create("a/vm/www")
    hosts["a"].snapshot("a/vm/www@a")
    line = Job(hosts["a"], hosts["b"], "a/vm", "b")
    line.replicate()
    hosts["a"].snapshot("a/vm@b")
    assert "b is the root of a pool, with a mirror below it" in line.replicate(status=1)
    assert line.done() == []


def test_children_return_without_a_look_for_each() -> None:
    hosts = chain("ab")
    for number in range(40):
        hosts["a"].create(f"a/vm/c{number}")
        hosts["a"].snapshot(f"a/vm/c{number}@a")
    line = pull(hosts["a"], hosts["b"])
    line.replicate()
    hosts["a"].snapshot("a/vm@b")
    line.replicate()
    assert len(line.done("rename")) == 41
    assert sum(command[:2] == ("B", "list") for command in line.wire.done) < 30


def test_mirror_that_another_line_may_hold_is_left_alone(job: Job) -> None:
    taken_over(job)
    job.backup.hold("years:received", f"{LOCAL}@a")
    job.snapshot("b")
    assert "holds on backup" in job.replicate(status=1, at=refusing("^zfs holds", "backup"))
    assert job.here() == "a!years:received"


def test_second_attempt_expires_nothing_that_the_first_took_over(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are one run, and the first of a line destroys nothing."""
    taken_over(job)
    job.source.world.now += days(99)
    job.snapshot("b")
    seen: list[set[str] | None] = []

    class Link:
        """Broken at the first attempt."""

        lost = failing = None
        held_before: set[str] | None = None

        @property
        def lister(self) -> Any:
            return self

        trees = lister

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exc: object) -> None:
            pass

        def begin(self, now: int) -> None:
            seen.append(self.held_before)
            self.held_before = {"/first"} if self.held_before is None else self.held_before

        def execute(self, now: int) -> None:
            self.lost = (LOCAL, Failure("the link broke")) if len(seen) == 1 else None

    monkeypatch.setattr("zfs_replicate.open_run", lambda *_: Link())
    monkeypatch.setattr("zfs_replicate.time.sleep", lambda _: None)
    assert main(["-h", "localhost", "-r", SOURCE, "-l", LOCAL, "-t", TAG, "--retries", "1"]) == 0
    assert seen == [None, {"/first"}]
