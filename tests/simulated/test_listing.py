"""What a run asks its two machines for, and how often."""

from __future__ import annotations

import re
from typing import Any

import pytest
from histories import LOCAL, RECEIVED, SOURCE, TAG
from jobs import EACH, Disturbance, Job, in_full, once, refusing, whole_lists
from simulated import Machine, Near

from zfs_replicate import LIST_EXISTING, Answer, Command, Dataset, Failure, Policy, Report, Run, Step, plan_dataset


def test_listing_of_the_source_is_in_outline(aged: Job) -> None:
    aged.replicate(keep=1)
    assert aged.here() == f"e!{RECEIVED}"
    assert in_full(aged) == 0
    aged.replicate(keep=1)
    assert [words[0] for where, *words in aged.wire.done if where == "source"] == ["list", "list", "holds"]


def test_listing_after_a_small_change_is_not_of_the_whole_tree(mirrored: Job) -> None:
    mirrored.snapshot("b", "/www")
    mirrored.replicate(keep=1)
    assert whole_lists(mirrored) == ["source", "backup"]
    assert (mirrored.here("/www"), mirrored.there("/www")) == (f"a b!{RECEIVED}", f"a b!{TAG}")
    mirrored.snapshot("c")
    mirrored.replicate()
    assert whole_lists(mirrored) == ["source", "backup", "source", "backup"], "where most have changed all is listed"


def test_plan_of_one_dataset_is_not_made_again_for_another(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    children = [f"/child{number}" for number in range(30)]
    for key in children:
        job.source.create(SOURCE + key)
    job.snapshot("a")
    job.replicate()
    for key in children:
        job.backup.snapshot(f"{LOCAL}{key}@mine")
    job.snapshot("b")
    planned: list[str] = []

    def counted(source: Dataset, *known: Any) -> tuple[Step, ...]:
        planned.append(source.name)
        return plan_dataset(source, *known)

    monkeypatch.setattr("zfs_replicate.plan_dataset", counted)
    job.replicate(rollback=True)
    assert job.here("/child7") == f"a b!{RECEIVED}"
    assert max(map(planned.count, planned)) < 10


def test_listing_is_in_full_if_one_goes_before_its_holds_are_read(mirrored: Job) -> None:
    mirrored.snapshot("b")
    mirrored.snapshot("c")
    gone = once("before", lambda: mirrored.source.destroy(f"{SOURCE}/www", ["b"]), "^zfs holds .*machines/www@b")
    mirrored.replicate(at=gone)
    assert in_full(mirrored) == 1
    assert (mirrored.here("/www"), mirrored.there("/www")) == (f"a c!{RECEIVED}", f"a c!{TAG}")


def test_listing_is_in_full_if_many_holds_are_to_be_read(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zfs_replicate.BATCH_BYTES", 200)
    for name in "abcdef":
        job.snapshot(name)
    job.source.hold(TAG, f"{SOURCE}@b")
    job.replicate()
    assert in_full(job) > 0
    assert (job.here(), job.there()) == (f"f!{RECEIVED}", f"a b c d e f!{TAG}")
    job.replicate()
    assert in_full(job) == 0


def test_batch_has_all_streams_parents_first(job: Job) -> None:
    root, disk, www, logs = (f"{LOCAL}{key}" for key in ("", "/disk", "/www", "/www/logs"))
    job.snapshot("a")
    job.replicate()
    assert job.wire.batches == [[root, disk, www, logs]]


def test_batch_ends_with_a_failure_and_the_rest_is_the_next(mirrored: Job) -> None:
    mirrored.snapshot("b")
    said = mirrored.replicate(status=1, at=refusing("^zfs send .*/disk@b", "source"))
    assert said.startswith(f"zfs_replicate: {LOCAL}/disk: the stream failed: ")
    assert mirrored.wire.batches == [
        [LOCAL, f"{LOCAL}/disk", f"{LOCAL}/www", f"{LOCAL}/www/logs"],
        [f"{LOCAL}/www", f"{LOCAL}/www/logs"],
    ]
    assert mirrored.here("/www/logs") == f"a b!{RECEIVED}"
    assert mirrored.here("/disk") == f"a!{RECEIVED}"


@pytest.mark.parametrize("every", [False, True])
def test_listing_of_long_histories_is_done_twice(mirrored: Job, every: bool) -> None:
    mirrored.snapshot("b")
    mirrored.snapshot("c")
    listed: list[tuple[str, ...]] = []

    def note(where: Machine, command: Command, moment: str) -> Answer | None:
        if moment == "before" and where is mirrored.backup and command[:3] == ("zfs", "list", "-Hp"):
            listed.append(command)
        return None

    mirrored.replicate(every=every, at=note)
    assert mirrored.here("/www") == f"a {'b ' * every}c!{RECEIVED}"
    before, proof, after = listed
    assert before == after
    assert before[-1] == LOCAL
    assert {name for name in proof if "@" in name} == {f"{LOCAL}{key}@c" for key in EACH}


def test_listing_again_takes_only_what_is_said_absent_for_absent(mirrored: Job) -> None:
    said = f"cannot open '{LOCAL}': I/O error\ncannot open '{LOCAL}/no': dataset does not exist\n"
    wire = mirrored.wire
    run = Run(
        Policy(SOURCE, LOCAL, TAG), Near(wire, mirrored.source), Near(wire, mirrored.backup), wire.carry, Report()
    )
    run.begin(0, in_full=True)
    wire.at = lambda _, words, moment: Answer(1, "", said) if (moment, words[:7]) == ("before", LIST_EXISTING) else None
    with pytest.raises(Failure, match="I/O error"):
        run.lister.list_some_again(run.trees, ["", "/no"])


def test_listing_again_knows_what_is_held(mirrored: Job) -> None:
    """A stream failed here: then its mirror is still known for ours, whatever the source says that it is by now."""
    wire = mirrored.wire
    run = Run(
        Policy(SOURCE, LOCAL, TAG), Near(wire, mirrored.source), Near(wire, mirrored.backup), wire.carry, Report()
    )
    run.begin(mirrored.source.world.now)
    before = [(it.name, it.tags) for local in run.trees.target.values() for it in local.snapshots]
    trees = run.lister.list_some_again(run.trees, [*run.trees.target])
    assert [(it.name, it.tags) for local in trees.target.values() for it in local.snapshots] == before
    assert {tags for _, tags in before} == {frozenset([RECEIVED])}
    mirrored.backup.hold("somebody", f"{LOCAL}/www@a")
    trees = run.lister.list_some_again(run.trees, ["/www"])
    assert [it.tags for it in trees.target["/www"].snapshots] == [frozenset([RECEIVED, "somebody"])]


DAMAGED = "cannot iterate filesystems: I/O error\n"


def half_listed(host: str, key: str = "/www") -> Disturbance:
    """As zfs lists a tree in which a dataset is damaged: without that, and it fails."""

    def at(where: Machine, command: Command, moment: str) -> Answer | None:
        if moment != "before" or where.label != host or command[1] != "list" or "-r" not in command:
            return None
        lines = where.ask(command).stdout.splitlines(keepends=True)
        return Answer(1, "".join(line for line in lines if not re.match(f".*{key}[/@\t]", line)), DAMAGED)

    return at


@pytest.mark.parametrize("host", ["source", "backup"])
@pytest.mark.parametrize("override", ["", "rollback", "quarantine"])
def test_half_a_listing_pulls_what_is_listed_and_takes_nothing_for_gone(aged: Job, host: str, override: str) -> None:
    before = (aged.here("/www"), aged.there("/www"), aged.here("/www/logs"), aged.there("/www/logs"))
    aged.snapshot("f")
    aged.source.rename_dataset(f"{SOURCE}/disk", f"{SOURCE}/disc")
    aged.backup.snapshot(f"{LOCAL}@mine")
    here = aged.here().split()
    rollback, quarantine = override == "rollback", override == "quarantine"
    said = aged.replicate(status=1, keep=1, at=half_listed(host), rollback=rollback, quarantine=quarantine)
    assert "cannot iterate filesystems: I/O error" in said
    assert "1 local snapshot newer" in said
    assert aged.here().split() == here, "neither expired nor rolled back nor set aside"
    assert f"{LOCAL}/disk" in aged.backup.datasets
    assert f"{LOCAL}/disc" not in aged.backup.datasets, "neither renamed nor pulled anew"
    for now, then in zip(
        (aged.here("/www"), aged.there("/www"), aged.here("/www/logs"), aged.there("/www/logs")), before
    ):
        assert now.split()[: len(then.split())] == then.split()
    aged.backup.destroy(LOCAL, ["mine"])
    aged.replicate(keep=1)
    assert [aged.here(key).split()[-1] for key in ("/www", "/disc")] == [f"f!{RECEIVED}"] * 2
    assert f"{LOCAL}/disk" not in aged.backup.datasets


def test_half_a_listing_without_the_root_is_none(mirrored: Job) -> None:
    def at(where: Machine, command: Command, moment: str) -> Answer | None:
        is_listing = moment == "before" and where.label == "source" and command[1] == "list"
        return Answer(1, "", DAMAGED) if is_listing else None

    assert "cannot iterate filesystems" in mirrored.replicate(status=3, at=at)
