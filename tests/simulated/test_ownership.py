"""Whose it is: mirrors of other tools and lines, strangers, and what is told of holds."""

from __future__ import annotations

import pytest
from histories import LOCAL, RECEIVED, SOURCE, TAG
from jobs import EACH, Job, refusing, taken_over
from simulated import Machine, Refused, World, days

from zfs_replicate import ASIDE, TAKEN_OVER, Answer, Command, Failure, FencedHost


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
