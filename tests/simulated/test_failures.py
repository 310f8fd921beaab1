"""Runs in which something fails: one dataset, one command, a machine, the link."""

from __future__ import annotations

import pytest
from histories import LOCAL, RECEIVED, SOURCE, TAG
from jobs import EACH, EMPTY, EVERYTHING, Job, break_link, half_way, once, refusing, told
from simulated import Machine, Refused, Wire, days

from zfs_replicate import Answer, Command, Selection, Stuck


def test_failure_of_one_dataset_does_not_stop_the_others(mirrored: Job) -> None:
    mirrored.snapshot("b")
    assert "permission denied" in mirrored.replicate(status=1, at=refusing("machines/www@b", moment="half-way"))
    assert mirrored.here("/www") == f"a!{RECEIVED}"
    assert mirrored.there("/www") == f"a!{TAG} b!{TAG}", "its partial receive still needs @b"
    for key in ("", "/www/logs", "/disk"):
        assert mirrored.here(key) == f"a b!{RECEIVED}"


def test_lost_link_stops_all_datasets(mirrored: Job) -> None:
    mirrored.snapshot("b")
    assert "the link broke" in mirrored.replicate(status=1, at=half_way("machines@b", break_link))
    assert [mirrored.here(key) for key in EACH] == [f"a!{RECEIVED}"] * 4


def test_target_renamed_in_mid_run_is_found_by_the_next(mirrored: Job) -> None:
    mirrored.snapshot("b", "")
    rename = once("before", lambda: mirrored.source.rename(f"{SOURCE}@b", "weekly"), "^zfs send")
    mirrored.replicate(status=1, at=rename)
    assert (mirrored.here(), mirrored.there()) == (f"a!{RECEIVED}", f"a!{TAG} weekly")
    mirrored.replicate()
    assert (mirrored.here(), mirrored.there()) == (f"a weekly!{RECEIVED}", f"a weekly!{TAG}")


def test_target_is_safe_from_its_owner_once_it_is_held(mirrored: Job) -> None:
    mirrored.snapshot("b", "")

    def destroy() -> None:
        with pytest.raises(Refused, match="busy"):
            mirrored.source.destroy(SOURCE, ["b"])

    mirrored.replicate(at=once("before", destroy, "^zfs send"))
    assert mirrored.here() == f"a b!{RECEIVED}"


def test_stream_that_says_it_arrived_is_not_believed(mirrored: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    mirrored.snapshot("b", "")
    monkeypatch.setattr(Wire, "carry_one", lambda self, sending, receiving: None)
    assert "does not end in @b" in mirrored.replicate(status=1)
    assert (mirrored.here(), mirrored.there()) == (f"a!{RECEIVED}", f"a!{TAG} b")


@pytest.mark.parametrize(
    ("tree", "mirror"), [(SOURCE, SOURCE), (SOURCE, f"{SOURCE}/copy"), (SOURCE, "backuppool"), ("backuppool", SOURCE)]
)
def test_same_host_as_source_destroys_nothing(job: Job, tree: str, mirror: str) -> None:
    """Under any name: an alias, or the same crontab on both of two hosts."""
    for name in "abc":
        job.snapshot(name)
    job.source.world.now += days(90)
    before = {name: told(job.source, name) for name in job.source.datasets}
    said = Job(job.source, job.source, tree, mirror).replicate(status=3, keep=1)
    assert "is this host, and" in said
    assert {name: told(job.source, name) for name in job.source.datasets} == before


def test_same_host_is_not_told_by_names_of_pools(job: Job) -> None:
    job.snapshot("a")
    there = Machine(job.source.world, "backup", "backuppool")
    Job(job.source, there, SOURCE, SOURCE).replicate()
    assert told(there, SOURCE) == f"a!{RECEIVED}"


def test_rollback_gives_up_a_receive_that_hangs_on_what_goes(mirrored: Job) -> None:
    mirrored.snapshot("b", "")
    mirrored.replicate()
    mirrored.snapshot("c", "")
    mirrored.replicate(status=1, at=half_way())
    mirrored.source.release(TAG, f"{SOURCE}@b")
    mirrored.source.destroy(SOURCE, ["b"])
    assert "newer than the newest common one" in mirrored.replicate(status=1)
    mirrored.replicate(rollback=True)
    assert (mirrored.here(), mirrored.there()) == (f"a c!{RECEIVED}", f"a c!{TAG}")


def test_stuck_machine_is_not_asked_for_every_dataset(mirrored: Job) -> None:
    mirrored.snapshot("b")
    asked: list[Command] = []

    def hint_if_suspended(where: Machine, command: Command, moment: str) -> Answer | None:
        if moment == "before" and where is mirrored.backup and f"{LOCAL}@b" in command:
            asked.append(command)
            raise Stuck("zfs list on backup has not ended after 1h")
        return None

    said = mirrored.replicate(status=1, at=hint_if_suspended)
    assert said == f"zfs_replicate: {LOCAL}: zfs list on backup has not ended after 1h"
    assert len(asked) == 1
    mirrored.replicate()


def test_quarantine_pulls_children_afresh_with_their_parent(mirrored: Job) -> None:
    mirrored.source.release(TAG, f"{SOURCE}@a")
    mirrored.source.destroy(SOURCE, ["a"])
    mirrored.snapshot("b", "")
    mirrored.replicate(quarantine=True)
    assert mirrored.here() == f"b!{RECEIVED}"
    assert mirrored.here("/www/logs") == mirrored.here("/disk") == f"a!{RECEIVED}"


@pytest.mark.parametrize("selection", [EVERYTHING, Selection(recursive=False), Selection(exclude=("www",))])
def test_quarantine_leaves_what_has_the_mirror_of_another_line_below(mirrored: Job, selection: Selection) -> None:
    """Be it selected or not: that line would find its mirror gone."""
    mirrored.backup.hold("years:received", f"{LOCAL}/www@a")
    mirrored.source.release(TAG, f"{SOURCE}@a")
    mirrored.source.destroy(SOURCE, ["a"])
    mirrored.snapshot("b", "")
    said = mirrored.replicate(status=1, quarantine=True, selection=selection)
    assert f"{LOCAL} is not renamed" in said
    assert not mirrored.done("rename")


@pytest.mark.parametrize("way", ["rollback", "quarantine"])
def test_source_is_not_believed_about_this_host(mirrored: Job, way: str) -> None:
    """That the mirror has been modified zfs recv alone can say: nothing is rolled back or set aside for it."""
    said = f"cannot receive: destination {LOCAL} has been modified; pool must be upgraded; out of space"
    mirrored.snapshot("b")

    def lying(where: Machine, command: Command, moment: str) -> Answer | None:
        return Answer(1, "", said) if command[1] == "send" and moment == "before" else None

    found = mirrored.replicate(status=1, at=lying, rollback=way == "rollback", quarantine=way != "rollback")
    assert found.count(said) == len(EACH)
    assert "lacks" not in found
    assert not mirrored.done("rollback", "rename", "recv", "destroy")
    mirrored.replicate()
    assert mirrored.here() == f"a b!{RECEIVED}"


def test_newer_local_snapshots_block_and_are_kept(mirrored: Job) -> None:
    mirrored.backup.snapshot(f"{LOCAL}@mine")
    mirrored.snapshot("b")
    mirrored.source.world.now += days(90)
    assert "1 local snapshot newer" in mirrored.replicate(status=1, keep=1)
    assert (mirrored.here(), mirrored.there()) == (f"a!{RECEIVED} mine", f"a!{TAG} b")
    assert mirrored.here("/www") == f"a b!{RECEIVED}"


def test_children_of_what_could_not_be_created_are_skipped_and_named(job: Job) -> None:
    job.snapshot("a")
    said = job.replicate(status=1, at=refusing("^zfs send .*machines/www@a"))
    assert f"{LOCAL}/www/logs: skipped" in said
    assert [job.here(key) for key in EACH] == [f"a!{RECEIVED}", "absent", "absent", f"a!{RECEIVED}"]
    assert job.there("/www") == "a", "no hold is left for what was not pulled"
    job.replicate()
    assert [job.here(key) for key in EACH] == [f"a!{RECEIVED}"] * 4


def test_placeholder_refused_is_tried_once_and_told_for_each_child(job: Job) -> None:
    for number in range(20):
        job.source.create(f"{SOURCE}/www/logs/{number}")
    job.snapshot("a", "/www", *(f"/www/logs/{number}" for number in range(20)))
    refused: list[Command] = []

    def refuse(where: Machine, command: Command, moment: str) -> Answer | None:
        if moment == "before" and command[:2] + command[-1:] == ("zfs", "create", f"{LOCAL}/www/logs"):
            refused.append(command)
            return EMPTY
        return None

    said = job.replicate(status=1, at=refuse)
    assert len(refused) == 1
    assert said.count("permission denied") == 20
    assert job.here("/www") == f"a!{RECEIVED}"
    job.replicate()
    assert job.here("/www/logs/19") == f"a!{RECEIVED}"


def test_source_tree_that_is_not_there_ends_the_run(job: Job) -> None:
    job.source.datasets.clear()
    assert "does not exist" in job.replicate(status=3)
    assert job.done() == []


def test_pool_that_is_not_imported_costs_no_hold(mirrored: Job) -> None:
    before = mirrored.there()
    mirrored.backup.datasets.clear()
    assert "cannot list offsite" in mirrored.replicate(status=3)
    assert (mirrored.there(), mirrored.done()) == (before, [])


def test_mirror_that_cannot_be_listed_costs_no_hold(mirrored: Job) -> None:
    """zfs lists what it can of several names, and exits 1: what is missing then need not be absent."""
    mirrored.snapshot("b")

    def unreadable(where: Machine, command: Command, moment: str) -> Answer | None:
        if moment == "before" and where is mirrored.backup and LOCAL in command and "filesystem,volume" in command:
            return Answer(1, "offsite\noffsite/virt\n", f"cannot open '{LOCAL}': I/O error\n")
        return None

    assert f"cannot list {LOCAL} on backup: cannot open" in mirrored.replicate(status=3, at=unreadable)
    assert [mirrored.there(key) for key in EACH] == [f"a!{TAG} b"] * 4


def test_empty_target_keeps_what_is_written_before_its_turn(job: Job) -> None:
    job.snapshot("a")
    job.backup.create(LOCAL, files=False)

    def written(where: Machine, command: Command, moment: str) -> Answer | None:
        if moment == "before" and command[1] == "hold" and where is job.source:
            job.backup.write(LOCAL)
        return None

    assert "would overwrite" in job.replicate(status=1, at=written)
    assert job.here() == ""
    assert job.backup.datasets[LOCAL].files


@pytest.mark.parametrize("quarantine", [False, True])
def test_empty_or_not_unknown_leaves_the_place_as_it_is(job: Job, quarantine: bool) -> None:
    """Not known is neither empty, to be received over, nor data, to be set aside."""
    job.snapshot("a", "/www/logs")
    job.replicate()
    job.snapshot("b", "/www")
    job.backup.datasets[f"{LOCAL}/www"].files = True
    said = job.replicate(status=1, quarantine=quarantine, at=refusing("^zfs userspace .*www$"))
    assert f"it is not known whether {LOCAL}/www is empty" in said
    assert "permission denied" in said
    assert job.done("rename", "recv") == []
    assert job.backup.datasets[f"{LOCAL}/www"].files


def holds_refused(where: Machine, command: Command, _: str) -> Answer | None:
    """As a pool that was imported read-only does."""
    is_change = command[1] in ("hold", "release") and where.label == "source"
    return Answer(1, "", "cannot hold: pool is read-only\n") if is_change else None


def test_read_only_source_is_pulled_without_holds(aged: Job) -> None:
    aged.snapshot("f")
    before = aged.here().split()[:-1]
    said = aged.replicate(status=1, keep=1, every=True, at=holds_refused)
    assert said.count("the source's pool is read-only") == 1
    assert len(said.split("\n")) == 2, "one line, and the way out"
    assert aged.here().split()[-1] == "f"
    assert [it.partition("!")[0] for it in before] == [
        it.partition("!")[0] for it in aged.here().split()[: len(before)]
    ]
    assert aged.there().endswith(" f")
    assert "pool is read-only" in aged.replicate(status=1, keep=1, at=holds_refused), "with nothing to pull as well"
    aged.replicate(keep=1)
    assert aged.notices == [], "nobody has released anything"
    assert (aged.here(), aged.there().split()[-1]) == (f"e f!{RECEIVED}", f"f!{TAG}"), "and what is due goes"


def test_read_only_source_is_mirrored_for_the_first_time(job: Job) -> None:
    job.snapshot("a")
    assert "the source's pool is read-only" in job.replicate(status=1, at=holds_refused)
    assert [job.here(key) for key in EACH] == ["a"] * 4
    job.replicate()
    assert [(job.here(key), job.there(key)) for key in EACH] == [(f"a!{RECEIVED}", f"a!{TAG}")] * 4


GREETING = 'Please login as the user "debian" rather than the user "root".\n\n'


@pytest.mark.parametrize("status", [0, 1, 142])
def test_login_that_only_talks_is_quoted_with_what_may_do_so(mirrored: Job, status: int) -> None:
    """A forced command of cloud images, or nologin."""
    mirrored.snapshot("b")

    def talk(where: Machine, command: Command, moment: str) -> Answer | None:
        return Answer(status, GREETING, "") if moment == "before" and where.label == "source" else None

    said = mirrored.replicate(status=3, at=talk)
    assert "Please login as the user" in said
    assert "~/.bashrc" in said and "authorized_keys" in said
    assert mirrored.done() == []


def test_login_that_prints_before_each_answer_is_told_with_the_files_to_mend(mirrored: Job) -> None:
    mirrored.snapshot("b")

    def greet(where: Machine, command: Command, moment: str) -> Answer | None:
        if moment != "before" or where.label != "source":
            return None
        answer = where.ask(command)
        return Answer(answer.status, f"Welcome to source\n{answer.stdout}", answer.stderr)

    said = mirrored.replicate(status=3, at=greet)
    assert "Welcome to source" in said
    assert "~/.bashrc" in said
    assert mirrored.done() == []
