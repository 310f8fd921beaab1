"""Stories of one job, told on simulated machines: what is where in the end, and what came before what."""

from __future__ import annotations

import io
import re
from typing import Any, Callable

import pytest
from histories import LOCAL, RECEIVED, SOURCE, TAG
from simulated import SEGMENT_BYTES, USED, WRITTEN, Machine, Near, Refused, Wire, World, days

from zfs_replicate import (
    ASIDE,
    TAKEN_OVER,
    Answer,
    Command,
    Dataset,
    Doctor,
    Failure,
    FencedHost,
    LinkLost,
    MirrorStatus,
    Plan,
    Policy,
    ReadOnly,
    Report,
    Run,
    Selection,
    Stuck,
    all_statuses,
    clear_failing,
    create_parent,
    format_bytes,
    hold,
    list_existing,
    local_statuses,
    mark_failing,
    plan_dataset,
    print_plan,
    release,
    rename,
    retire,
    set_failing,
)

Disturbance = Callable[[Machine, Command, str], "Answer | None"]
EVERYTHING = Selection()
EMPTY = Answer(1, "", "permission denied")


class Job:
    """A tree on one machine and its mirror on another; `replicate` is the crontab line."""

    def __init__(self, source: Machine, backup: Machine, tree: str = SOURCE, mirror: str = LOCAL) -> None:
        self.source = source
        self.backup = backup
        self.tree = tree
        self.mirror = mirror
        self.said: list[str] = []
        self.wire = Wire(source, backup)

    def replicate(
        self,
        status: int = 0,
        keep: int | None = None,
        every: bool = False,
        at: Disturbance | None = None,
        *,
        rollback: bool = False,
        quarantine: bool = False,
        selection: Selection = EVERYTHING,
    ) -> str:
        """One run, which must exit with `status`. Returns what it told the user."""
        self.wire = Wire(self.source, self.backup)
        if at:
            self.wire.at = at
        report = Report()
        policy = Policy(
            self.tree, self.mirror, TAG, keep, every, rollback=rollback, quarantine=quarantine, selection=selection
        )
        run = Run(policy, Near(self.wire, self.source), Near(self.wire, self.backup), self.wire.carry, report)
        try:
            run.begin(self.source.world.now)
            run.execute(self.source.world.now)
            if run.lost:
                report.failure(*run.lost)
            ended = 1 if report.failures else 0
        except Failure as failure:
            report.failures.append(str(failure))
            ended = 3
        said = "\n".join(report.failures)
        assert ended == status, said
        return said

    def snapshot(self, name: str, *keys: str) -> None:
        """Snapshot some datasets of the tree, then let an hour pass."""
        for key in keys or [name[len(self.tree) :] for name in self.source.below(self.tree)]:
            self.source.snapshot(f"{self.tree}{key}@{name}")
        self.source.world.now += days(1 / 24)

    def here(self, key: str = "") -> str:
        """The mirror's snapshots with their tags, oldest first: `a b!offsite:received`."""
        return told(self.backup, self.mirror + key)

    def there(self, key: str = "") -> str:
        return told(self.source, self.tree + key)

    def done(self, *kinds: str) -> list[str]:
        """The writing commands of the last run, in order, as one line each."""
        return [" ".join(words) for words in self.wire.writes() if not kinds or words[1] in kinds]


def told(machine: Machine, dataset: str) -> str:
    if dataset not in machine.datasets:
        return "absent"
    snapshots = machine.datasets[dataset].snapshots
    names = sorted(snapshots, key=lambda name: snapshots[name].createtxg)
    return " ".join("!".join([name, *sorted(snapshots[name].tags)]) for name in names)


def refusing(pattern: str, machine: str = "", moment: str = "before") -> Disturbance:
    """Every command that looks like this fails and does nothing; `after`: it was done all the same."""

    def at(where: Machine, command: Command, when: str) -> Answer | None:
        hit = when == moment and machine in where.label and re.search(pattern, " ".join(command))
        return EMPTY if hit else None

    return at


def once(when: str, deed: Callable[[], object], pattern: str = "") -> Disturbance:
    """Somebody does something at the first such moment."""
    deeds = [deed]

    def at(where: Machine, command: Command, moment: str) -> Answer | None:
        if deeds and moment == when and re.search(pattern, " ".join(command)):
            deeds.pop()()
        return None

    return at


def break_link() -> None:
    raise LinkLost("the link broke")


@pytest.fixture
def job() -> Job:
    return new_job()


def new_job() -> Job:
    """A tree of a root, a filesystem with a child, and a volume, on `source`; an empty pool on `backup`."""
    world = World()
    source = Machine(world, "source", "backuppool", txg=9000)
    for key, kind in (("/www/logs", "filesystem"), ("/disk", "volume")):
        source.create(SOURCE + key, kind)
    return Job(source, Machine(world, "backup", "offsite"))


@pytest.fixture
def mirrored(job: Job) -> Job:
    """The same, in step at @a."""
    job.snapshot("a")
    job.replicate()
    return job


EACH = ("", "/www", "/www/logs", "/disk")


# --- Pulling ----------------------------------------------------------------------------------------------------------


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


# --- Holds ------------------------------------------------------------------------------------------------------------


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


# --- Expiry -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def aged(mirrored: Job) -> Job:
    """@b to @d came at 10 days from each other, and @e is still to be pulled."""
    for name in "bcde":
        mirrored.source.world.now += days(10)
        if name == "e":
            mirrored.replicate()
        mirrored.snapshot(name)
        if name != "e":
            mirrored.replicate()
    return mirrored


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
    """Somebody held it after the listing."""
    hold = once("before", lambda: aged.backup.hold("quick", f"{LOCAL}@b"), "^zfs destroy offsite/virt/machines@")
    said = aged.replicate(status=1, keep=1, at=hold)
    assert f"{LOCAL}@b: zfs destroy failed on backup: cannot destroy snapshot {LOCAL}@b: dataset is busy" in said
    assert aged.here() == f"b!quick e!{RECEIVED}"


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


def in_full(job: Job) -> int:
    """How often the last run listed the source in full, with what zfs is slow to tell of each snapshot."""
    lists = [words for where, *words in job.wire.done if where == "source" and words[0] == "list"]
    return sum("userrefs" in words[-2] and "snapshot" in words[-4] for words in lists)


def test_listing_of_the_source_is_in_outline(aged: Job) -> None:
    aged.replicate(keep=1)
    assert aged.here() == f"e!{RECEIVED}"
    assert in_full(aged) == 0
    aged.replicate(keep=1)
    assert [words[0] for where, *words in aged.wire.done if where == "source"] == ["list", "list", "holds"]


def whole_lists(job: Job) -> list[str]:
    """Where the last run listed a whole tree, in turn."""
    return [where for where, *words in job.wire.done if words[:3] == ["list", "-Hp", "-r"] and "snapshot" in words[4]]


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

    def counted(source: Dataset, *known: Any) -> Plan:
        planned.append(source.name)
        return plan_dataset(source, *known)

    monkeypatch.setattr("zfs_replicate.plan_dataset", counted)
    job.replicate(rollback=True)
    assert job.here("/child7") == f"a b!{RECEIVED}"
    assert max(map(planned.count, planned)) < 10


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


def test_expiry_destroys_nothing_once_the_source_is_silent(aged: Job) -> None:
    def lost(where: Machine, command: Command, moment: str) -> Answer | None:
        if where is aged.source and len(aged.done("recv")) == 4:
            break_link()
        return None

    assert "the link broke" in aged.replicate(status=1, keep=1, at=lost)
    assert aged.here() == f"a b c d!{RECEIVED} e!{RECEIVED}"
    aged.replicate(keep=1)
    assert aged.here() == f"e!{RECEIVED}"


# --- What goes wrong --------------------------------------------------------------------------------------------------


def half_way(pattern: str = "", deed: Callable[[], object] | None = None) -> Disturbance:
    """The first such stream breaks off half-way."""
    deeds = [deed]

    def at(where: Machine, command: Command, moment: str) -> Answer | None:
        if deeds and moment == "half-way" and re.search(pattern, " ".join(command)):
            dispatch = deeds.pop()
            return Answer(1, "", "out of space") if dispatch is None else dispatch()  # type: ignore[return-value]
        return None

    return at


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


def test_selection_leaves_the_rest_as_it_is_on_both_sides(mirrored: Job) -> None:
    mirrored.source.world.now += days(90)
    mirrored.snapshot("b")
    mirrored.replicate(keep=1, selection=Selection(exclude=("www",)))
    assert mirrored.here() == f"b!{RECEIVED}"
    for key in ("/www", "/www/logs"):
        assert (mirrored.here(key), mirrored.there(key)) == (f"a!{RECEIVED}", f"a!{TAG} b")
    mirrored.snapshot("c")
    mirrored.replicate(selection=Selection(recursive=False))
    assert (mirrored.here(), mirrored.here("/disk")) == (f"b c!{RECEIVED}", f"b!{RECEIVED}")
    assert not [words for words in mirrored.done() if "www" in words or "disk" in words]


def test_selection_of_snapshots_comes_and_expires(mirrored: Job) -> None:
    for name in ("d1", "h1", "d2", "d3", "h2"):
        mirrored.snapshot(name, "")
    mirrored.replicate(every=True, selection=Selection(snapshots=("d*",)))
    assert (mirrored.here(), mirrored.there()) == (f"a d1 d2 d3!{RECEIVED}", f"a d1 h1 d2 d3!{TAG} h2")
    mirrored.source.world.now += days(90)
    mirrored.snapshot("d4", "")
    mirrored.replicate(keep=1, selection=Selection(snapshots=("d*",), exclude_snapshots=("*2",)))
    assert mirrored.here() == f"a d2 d4!{RECEIVED}"


def test_placeholder_stands_for_a_parent_without_selected_snapshot(job: Job) -> None:
    job.snapshot("h", "")
    job.snapshot("d", "/www")
    job.replicate(selection=Selection(snapshots=("d",)))
    assert (job.here(), job.here("/www")) == ("", f"d!{RECEIVED}")
    assert job.there() == "h"


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


def test_listing_again_takes_only_what_is_said_absent_for_absent(mirrored: Job) -> None:
    said = f"cannot open '{LOCAL}': I/O error\ncannot open '{LOCAL}/no': dataset does not exist\n"
    wire = mirrored.wire
    run = Run(
        Policy(SOURCE, LOCAL, TAG), Near(wire, mirrored.source), Near(wire, mirrored.backup), wire.carry, Report()
    )
    run.begin(0, in_full=True)
    wire.at = lambda where, command, moment: Answer(1, "", said) if moment == "before" and "-d" in command else None
    with pytest.raises(Failure, match="I/O error"):
        run.lister.list_some_again(run.trees, ["", "/no"])


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


CHANGING = {
    "hold": hold(TAG, [f"{SOURCE}@a"]),
    "release": release(TAG, [f"{SOURCE}@a"]),
    "rename": rename(LOCAL, f"{LOCAL}.x"),
    "set": set_failing(LOCAL, 5),
    "inherit": clear_failing(LOCAL),
    "create": create_parent(LOCAL),
    "abort": ("zfs", "recv", "-A", LOCAL),
    "unknown": ("zfs", "promote", LOCAL),
}


@pytest.mark.parametrize("verb", CHANGING)
def test_read_only_host_refuses_what_changes_anything(mirrored: Job, verb: str) -> None:
    """I9."""
    host = ReadOnly(mirrored.backup)
    with pytest.raises(AssertionError, match="only looks"):
        host.ask(list_existing([LOCAL]), CHANGING[verb])
    with pytest.raises(AssertionError, match="only looks"):
        host.stream_command(("zfs", "send", f"{SOURCE}@a"))
    assert host.ask(list_existing([LOCAL])).stdout == f"{LOCAL}\n"


# --- Told beforehand ----------------------------------------------------------------------------------------------------


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


# --- Looking on, and the end --------------------------------------------------------------------------------------------


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


# --- Whose it is --------------------------------------------------------------------------------------------------------


def taken_over(job: Job) -> None:
    """@a is here as another tool brought it: without properties, mounted, and with what an administrator set."""
    job.snapshot("a")
    job.replicate()
    for name in job.backup.below(LOCAL):
        store = job.backup.datasets[name]
        store.values, store.has_received, store.mounted = {"compression": "zstd", "refreservation": "0"}, False, True
        for point in store.snapshots.values():
            point.tags.clear()
    for name in job.source.below(SOURCE):
        for point in job.source.datasets[name].snapshots.values():
            point.tags.clear()


def test_take_over_touches_nothing_while_there_is_nothing_to_pull(job: Job) -> None:
    """It may as well be the original, and this the wrong host."""
    taken_over(job)
    job.source.world.now += days(99)
    for _ in range(3):
        assert job.replicate(keep=1) == ""
        assert job.done() == []
    assert (job.here(), job.there()) == ("a", "a")


def test_take_over_makes_inert_before_anything_is_pulled(job: Job) -> None:
    taken_over(job)
    job.snapshot("b")
    job.replicate(keep=1)
    first = {verb: [words[1] for words in job.wire.writes()].index(verb) for verb in ("set", "unmount", "recv", "hold")}
    assert max(first["set"], first["unmount"]) < first["recv"]
    for key in EACH:
        store = job.backup.datasets[LOCAL + key]
        assert (store.mounted, store.values["readonly"], store.values["volmode"]) == (False, "on", "none")
        assert (store.values["compression"], store.values["refreservation"]) == ("zstd", "none"), (
            "what was set here stays"
        )
        assert job.here(key) == f"a b!{RECEIVED}", "the first run of a line destroys nothing"
    job.replicate(keep=1)
    assert job.done("set", "unmount", "recv") == []


def test_take_over_pulls_nothing_into_what_cannot_be_made_inert(job: Job) -> None:
    taken_over(job)
    job.snapshot("b")
    for _ in range(2):
        said = job.replicate(status=1, at=refusing(f"^zfs unmount {LOCAL}/www$"))
        assert f"{LOCAL}/www: zfs unmount failed on backup" in said
        assert (job.here("/www"), job.there("/www")) == ("a", "a b")
    assert job.here("/disk") == f"a b!{RECEIVED}"


def test_parent_that_is_late_takes_its_place_above_its_children(job: Job) -> None:
    """And what else is below it stays: a dataset that is gone at the source, and one that was set aside."""
    job.source.create(f"{SOURCE}/www/gone")
    job.snapshot("a", "/www/logs", "/www/gone")
    job.replicate()
    job.source.release(TAG, f"{SOURCE}/www/gone@a")
    job.source.destroy_dataset(f"{SOURCE}/www/gone")
    job.backup.create(f"{LOCAL}/www/logs{ASIDE}x", files=False)
    job.snapshot("b", "", "/www")
    job.replicate()
    assert [job.here(key) for key in ("", "/www", "/www/logs", "/www/gone", f"/www/logs{ASIDE}x")] == [
        f"b!{RECEIVED}", f"b!{RECEIVED}", f"a!{RECEIVED}", f"a!{RECEIVED}", "",
    ]  # fmt: skip
    assert job.there("/www/logs") == f"a!{TAG}"
    received = [words[3] for words in job.wire.writes() if words[1] == "recv"]
    assert received == [LOCAL, f"{LOCAL}/www"], "the children are not pulled again"
    job.replicate()
    assert job.done() == []


def test_parent_that_is_late_keeps_the_holds_of_its_children(job: Job) -> None:
    job.snapshot("a", "/www/logs")
    job.replicate()
    job.snapshot("b", "", "/www", "/www/logs")
    said = job.replicate(status=1, at=refusing("^zfs send .*machines@b"))
    assert f"{LOCAL}/www/logs: skipped: its parent" in said
    assert TAG in job.there("/www/logs").split()[0]
    job.replicate()
    assert [job.here(key) for key in ("", "/www", "/www/logs")] == [f"b!{RECEIVED}", f"b!{RECEIVED}", f"a b!{RECEIVED}"]


def test_strangers_below_a_place_keep_it_from_becoming_a_mirror(job: Job) -> None:
    job.backup.create("offsite/home")
    job.mirror = "offsite"
    job.backup.datasets["offsite"].files = False
    job.snapshot("a")
    said = job.replicate(status=1)
    assert "offsite has datasets below it that are neither ours nor the source's: offsite/home" in said
    assert job.done("set", "recv", "create") == []
    assert job.backup.datasets["offsite"].values == {}
    assert job.there("/www") == "a", "nothing is received below it either"


def test_children_do_not_go_below_what_never_was_a_mirror(mirrored: Job) -> None:
    mirrored.backup.create(f"{LOCAL}/new")
    mirrored.backup.snapshot(f"{LOCAL}/new@theirs")
    mirrored.source.create(f"{SOURCE}/new/deep")
    mirrored.snapshot("b")
    said = mirrored.replicate(status=1)
    assert f"{LOCAL}/new is no mirror of {SOURCE}/new" in said
    assert f"{LOCAL}/new/deep: skipped" in said
    assert f"{LOCAL}/new/deep" not in mirrored.backup.datasets
    assert mirrored.here("/disk") == f"a b!{RECEIVED}"


def test_mirror_of_another_line_is_left_alone(mirrored: Job) -> None:
    mirrored.backup.hold("years:received", f"{LOCAL}/www@a")
    mirrored.snapshot("b")
    mirrored.source.world.now += days(99)
    said = mirrored.replicate(status=1, keep=1, quarantine=True)
    assert f"{LOCAL}/www is the mirror of another line, of the tag years" in said
    assert mirrored.here("/www") == f"a!{RECEIVED}!years:received"
    assert mirrored.here("/www/logs") == f"a b!{RECEIVED}", "what is a mirror already goes on"


def test_hold_that_somebody_released_at_the_source_is_told(mirrored: Job, capsys: pytest.CaptureFixture[str]) -> None:
    mirrored.source.release(TAG, f"{SOURCE}/www@a")
    mirrored.replicate()
    assert f"{SOURCE}/www@a is not held by {TAG} any more, and is needed" in capsys.readouterr().err
    mirrored.replicate()
    assert capsys.readouterr().err == ""


def test_hold_of_our_tag_from_before_any_mirror_is_told(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.snapshot("old")
    job.source.hold(TAG, f"{SOURCE}/www@old")
    job.snapshot("a")
    job.replicate()
    said = capsys.readouterr().err
    assert f"{SOURCE}/www@old held by {TAG}, and there is no mirror of it here" in said
    assert said.count("there is no mirror of it here") == 1
    assert job.there("/www") == f"old a!{TAG}"


def test_hold_of_ours_from_a_killed_run_is_not_told(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.snapshot("a")
    job.replicate(status=1, at=refusing("^zfs send "))
    capsys.readouterr()
    job.replicate()
    assert capsys.readouterr().err == ""


def test_rollback_tells_what_the_source_once_had(mirrored: Job, capsys: pytest.CaptureFixture[str]) -> None:
    mirrored.snapshot("b")
    mirrored.replicate()
    mirrored.source.release(TAG, f"{SOURCE}@b")
    mirrored.source.destroy(SOURCE, ["b"])
    mirrored.source.hold(TAG, f"{SOURCE}@a")
    mirrored.snapshot("c", "")
    mirrored.replicate(status=1)  # from cron, before anybody comes to look
    assert mirrored.here() == f"a!{RECEIVED} b!{RECEIVED}"
    mirrored.replicate(rollback=True)
    assert mirrored.here() == f"a c!{RECEIVED}"
    assert "received from the source, which has no more of it, so perhaps the last copy: @b" in capsys.readouterr().err


def test_fence_refuses_commands_that_leave_the_tree() -> None:
    """The belt: each of these would be a fault of the plan."""
    fence = FencedHost(Machine(World(), "backup", "offsite"), LOCAL)
    for command in (
        ("zfs", "destroy", f"{LOCAL}-yearly@a,b"),
        ("zfs", "rename", f"{LOCAL}/www", f"{LOCAL}-gone"),
        ("zfs", "rename", f"{LOCAL}-gone", f"{LOCAL}/www"),
        ("zfs", "hold", "t", f"{LOCAL}@a", f"{LOCAL}0@a"),
        ("zfs", "recv", "-s", "-u", "-h", "-o", f"origin={LOCAL}@a", f"{LOCAL}0@a"),
        ("zfs", "recv", "-A", "offsite/home"),
        ("zfs", "create", "-u", "-o", "canmount=off", f"{LOCAL}0"),
        ("zfs", "set", "readonly=on", "offsite"),
        ("zfs", "rollback", "-r", "offsite@a"),
        ("zfs", "unmount", "offsite/virt"),
        ("zfs", "no-such-verb", "-x", "offsite/home"),
    ):
        with pytest.raises(Failure, match="refusing"):
            fence.ask(command)
        with pytest.raises(Failure, match="refusing"):
            fence.stream_command(command)
    for command in (
        ("zfs", "create", "-u", "-o", "canmount=off", "offsite/virt"),
        ("zfs", "rename", LOCAL, f"{LOCAL}{ASIDE}2026-11-27-120000"),
        ("zfs", "list", "-H", "offsite/home"),
    ):
        fence.check(command)


def test_stream_with_another_base_sets_nothing_aside(mirrored: Job) -> None:
    """zfs recv says of it what it says of a mirror that somebody has changed."""
    mirrored.snapshot("b", "")

    def lie(where: Machine, command: Command, moment: str) -> Answer | None:
        if moment == "half-way":
            raise Refused(f"cannot receive: destination {LOCAL} has been modified since most recent snapshot")
        return None

    for way in ({"quarantine": True}, {"rollback": True}, {}):
        said = mirrored.replicate(status=1, at=lie, **way)  # type: ignore[arg-type]
        assert "nothing was changed here since" in said
        assert mirrored.done("rename", "rollback") == []
    mirrored.replicate()
    assert mirrored.here() == f"a b!{RECEIVED}"


def test_take_over_keeps_properties_after_an_interrupted_increment(job: Job) -> None:
    """Its properties are undone then, and its rest brings none: the next increment is the first to bring any."""
    taken_over(job)
    job.snapshot("b")
    job.replicate(status=1, at=refusing("^zfs send .*machines/www@b", moment="half-way"))
    store = job.backup.datasets[f"{LOCAL}/www"]
    store.has_received = False  # undone
    store.values.update({"compression": "zstd", TAKEN_OVER: str(store.newest and store.newest.guid)})
    job.replicate()
    assert job.here("/www") == f"a b!{RECEIVED}"
    job.snapshot("c")
    job.replicate()
    assert (store.values["compression"], store.values["canmount"]) == ("zstd", "noauto")
    assert TAKEN_OVER not in store.values
