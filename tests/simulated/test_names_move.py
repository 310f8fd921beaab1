"""Datasets change their names at the source, and leave them to others: both mirrors live on, and nothing is pulled
into the one that is still there under the other's name."""

from __future__ import annotations

import re

import pytest
from histories import LOCAL, RECEIVED, SOURCE, TAG
from jobs import EACH, Disturbance, Job, half_way, new_job, once, refusing
from simulated import Machine, Near, Point, Wire, World, days

from zfs_replicate import ASIDE, BETWEEN_NAMES, MADE_WAY, Answer, Command, FencedHost, Policy, Report, Selection, retire


def of(*keys: str) -> Job:
    """A tree of these datasets, in step at @a."""
    world = World()
    source = Machine(world, "source", "backuppool", txg=9000)
    for key in ("", *keys):
        source.create(SOURCE + key)
    job = Job(source, Machine(world, "backup", "offsite"))
    job.snapshot("a")
    job.replicate()
    return job


def move(job: Job, old: str, new: str) -> None:
    job.source.rename_dataset(SOURCE + old, SOURCE + new)


def test_names_that_rotate_are_followed_in_one_run() -> None:
    """As zfs-rename(8) has it: the newest always has the same name."""
    job = of("/r0", "/r1", "/r2")
    for old, new in (("/r2", "/r3"), ("/r1", "/r2"), ("/r0", "/r1")):
        move(job, old, new)
    job.snapshot("b")
    job.replicate(quarantine=True)
    assert [job.here(key) for key in ("/r1", "/r2", "/r3")] == [f"a b!{RECEIVED}"] * 3


@pytest.mark.parametrize("has_news", [False, True])
def test_names_left_by_what_goes_below_a_new_parent_are_free_again(has_news: bool) -> None:
    """The rename waits for the parent, and the new dataset for the rename."""
    job = of("/r0")
    job.source.create(f"{SOURCE}/z")
    move(job, "/r0", "/z/m")
    job.source.create(f"{SOURCE}/r0")
    job.snapshot("b", *([""] if has_news else []), "/z", "/z/m", "/r0")
    job.replicate(quarantine=True)
    assert job.here("/z/m") == f"a b!{RECEIVED}"
    assert job.here("/r0") == job.here("/z") == f"b!{RECEIVED}"
    assert job.there("/z/m") == f"a b!{TAG}"


def test_names_left_to_another_renamed_dataset() -> None:
    job = of("/r0", "/q")
    job.source.create(f"{SOURCE}/z")
    move(job, "/r0", "/z/m")
    move(job, "/q", "/r0")
    job.snapshot("b", "/z", "/z/m", "/r0")
    job.replicate()
    assert job.here("/z/m") == job.here("/r0") == f"a b!{RECEIVED}"


def test_names_of_a_mirror_to_be_renamed_get_no_child() -> None:
    job = of("/r0")
    job.source.create(f"{SOURCE}/z")
    move(job, "/r0", "/z/m")
    job.source.create(f"{SOURCE}/r0/kid")
    job.snapshot("b", "/z", "/z/m", "/r0/kid")
    job.replicate()
    assert job.here("/r0/kid") == f"b!{RECEIVED}"
    assert job.here("/z/m/kid") == "absent"


def test_names_of_placeholders_serve_the_first_that_needs_them() -> None:
    """/y cannot be renamed, and so its child cannot; the other one goes all the same."""
    job = of("/y/c", "/w")
    move(job, "/y", "/x")
    job.source.create(f"{SOURCE}/zz")
    move(job, "/x/c", "/zz/a")
    move(job, "/w", "/zz/b")
    job.snapshot("b", "/zz/a", "/zz/b", "/x")
    said = job.replicate(status=1, at=refusing("zfs rename .*/y "))
    assert f"{LOCAL}/zz/b" not in said
    assert job.here("/zz/b") == f"a b!{RECEIVED}"


def test_names_below_another_line_s_mirror_are_not_followed() -> None:
    job = of("/disk")
    job.backup.create(f"{LOCAL}/x")
    job.backup.snapshot(f"{LOCAL}/x@foreign")
    job.backup.hold("other:received", f"{LOCAL}/x@foreign")
    job.source.create(f"{SOURCE}/x")
    move(job, "/disk", "/x/disk")
    job.snapshot("b")
    job.replicate(status=1)
    assert (job.here("/disk"), job.here("/x/disk")) == (f"a!{RECEIVED}", "absent")
    assert job.there("/x/disk").startswith(f"a!{TAG}")


def test_names_of_placeholders_do_not_matter_to_a_selection() -> None:
    """A placeholder makes way: its children are seen, though the glob matches the name that it has meanwhile."""
    job = new_job()
    job.snapshot("a", "/www/logs")
    selection = Selection(exclude=("*mirror*", "*.*"))
    job.replicate(selection=selection)
    job.snapshot("b", "", "/www")
    job.replicate(selection=selection)
    assert [job.here(key) for key in ("", "/www", "/www/logs")] == [f"b!{RECEIVED}", f"b!{RECEIVED}", f"a!{RECEIVED}"]
    assert job.here(f"/www{MADE_WAY}/logs") == "absent"


def test_read_only_refused_stops_only_its_own_dataset() -> None:
    job = new_job()
    job.source.create(f"{SOURCE}/other")
    job.snapshot("a", "/www", "/www/logs")
    job.replicate()
    job.backup.create(f"{LOCAL}/other", files=False)
    job.snapshot("b")
    said = job.replicate(status=1, at=refusing(f"zfs set readonly=on {LOCAL}/other$"))
    assert said.startswith(f"zfs_replicate: {LOCAL}/other: ")
    assert [job.here(key) for key in ("", "/disk")] == [f"b!{RECEIVED}"] * 2
    assert job.there("/other") == "b", "what did not come is not held"


def test_pool_root_whose_stream_fails_blocks_nothing_for_good() -> None:
    world = World()
    source = Machine(world, "source", "backuppool", txg=9000)
    source.create(f"{SOURCE}/www")
    job = Job(source, Machine(world, "backup", "offsite"), SOURCE, "offsite")
    job.snapshot("a")
    job.replicate(status=1, at=refusing(f"zfs send .*{SOURCE}@a$"))
    job.replicate()
    assert job.here() == job.here("/www") == f"a!{RECEIVED}"


def test_take_over_that_fails_is_told_in_each_run() -> None:
    """Somebody else holds its base here, and somebody writes to it just before the stream."""
    job = of()
    store = job.backup.datasets[LOCAL]
    for point in store.snapshots.values():
        point.tags = {"keep"}
    store.values = {}
    job.source.release(TAG, f"{SOURCE}@a")
    job.snapshot("b")

    def write() -> None:
        store.content = job.source.world.guid()

    said = job.replicate(status=1, at=once("before", write, "^zfs send -L -c -p -i"))
    assert f"{LOCAL} was changed since the newest common one" in said
    assert job.there() == "a b", "what did not come is not held"


def test_take_over_that_keeps_failing_leaves_no_holds_behind() -> None:
    job = of()
    store = job.backup.datasets[LOCAL]
    newest = store.newest
    assert newest
    job.backup.datasets[LOCAL].snapshots = {"a": Point(newest.guid, newest.createtxg, newest.creation, store.content)}
    store.values = {}
    job.source.release(TAG, f"{SOURCE}@a")
    for name in "bcd":
        job.snapshot(name)
        job.source.world.now += days(1)
        job.replicate(status=1, at=refusing("^zfs send -L"))
    assert job.there() == "a b c d"


def test_a_take_over_that_fails_releases_no_hold_that_another_run_may_have_placed() -> None:
    """The holds at the source could not be read at first, so nobody knows whose the hold on @b is."""
    job = of()
    store = job.backup.datasets[LOCAL]
    for point in store.snapshots.values():
        point.tags = set()
    store.values = {}
    job.source.release(TAG, f"{SOURCE}@a")
    job.snapshot("b")
    job.source.hold(TAG, f"{SOURCE}@b")
    streams = refusing("^zfs send -L")
    holds = refusing("zfs holds", "source")
    placing: list[str] = []

    def disturb(where: Machine, command: Command, moment: str) -> Answer | None:
        placing.extend(it for it in [command[1]] if it == "hold")
        return streams(where, command, moment) or (None if placing else holds(where, command, moment))

    job.replicate(status=1, at=disturb)
    assert job.there() == f"a b!{TAG}"


def test_retire_finds_what_a_killed_run_has_made_way_for() -> None:
    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    job = new_job()
    job.snapshot("a", "/www", "/www/logs")
    job.replicate()
    job.snapshot("b", "")
    with pytest.raises(Killed):
        job.replicate(at=once("before", kill, "^zfs send -L"))
    wire, report = Wire(job.source, job.backup), Report()
    policy = Policy(SOURCE, LOCAL, TAG)
    retire(Near(wire, job.source), FencedHost(Near(wire, job.backup), LOCAL), policy, report)
    assert not report.failures
    held = [
        name for name, dataset in job.backup.datasets.items() if any(point.tags for point in dataset.snapshots.values())
    ]
    assert held == []


def guids_of(machine: Machine, dataset: str) -> dict[str, int]:
    return {name: point.guid for name, point in machine.datasets[dataset].snapshots.items()}


def test_names_of_snapshots_that_roll_are_followed_every_day(job: Job) -> None:
    """Example 2 of zfs-rename(8), for a fortnight."""
    kept = ["today", "yesterday", "2daysago", "3daysago"]
    for day in range(14):
        for key in EACH:
            dataset = SOURCE + key
            names = job.source.datasets[dataset].snapshots
            if kept[-1] in names:
                job.source.destroy(dataset, [kept[-1]])
            for old, new in reversed([*zip(kept, kept[1:])]):
                if old in names:
                    job.source.rename(f"{dataset}@{old}", new)
        job.snapshot("today")
        job.source.world.now += days(1)
        job.replicate(keep=10)
        for key in EACH:
            there, here = guids_of(job.source, SOURCE + key), guids_of(job.backup, LOCAL + key)
            assert {name: guid for name, guid in here.items() if "dropped" not in name} == there
            assert len(here) == min(day + 1, 10), "what was dropped there stays till it expires"
    job.replicate()
    assert job.done() == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_names_of_snapshots_are_put_right_after_a_cut(job: Job, moment: str) -> None:
    job.snapshot("today")
    job.replicate()
    for key in EACH:
        job.source.rename(f"{SOURCE}{key}@today", "yesterday")
    job.snapshot("today")
    job.replicate(status=1, at=refusing("^zfs rename .*www@today", moment=moment))
    job.replicate()
    for key in EACH:
        assert job.here(key) == f"yesterday today!{RECEIVED}"
        assert guids_of(job.source, SOURCE + key) == guids_of(job.backup, LOCAL + key)


def test_names_of_snapshots_are_freed_for_a_rest(job: Job) -> None:
    for name in ("yesterday", "today"):
        job.snapshot(name, "")
        job.replicate()
    job.snapshot("now", "")
    job.replicate(status=1, at=half_way())
    for old, new in (("yesterday", "2daysago"), ("today", "yesterday"), ("now", "today")):
        job.source.rename(f"{SOURCE}@{old}", new)
    job.replicate()
    assert guids_of(job.source, SOURCE) == guids_of(job.backup, LOCAL)
    assert job.here() == f"2daysago yesterday today!{RECEIVED}"


def swap(job: Job, *keys: str) -> None:
    """Each takes the name of the next one, and the last that of the first."""
    move(job, keys[-1], "/aside")
    for old, new in reversed([*zip(keys, keys[1:])]):
        move(job, old, new)
    move(job, "/aside", keys[0])


def identities(machine: Machine, root: str) -> dict[str, int]:
    """The oldest snapshot of each dataset: which dataset that is, whatever it is called."""
    stores = {name[len(root) :]: machine.datasets[name] for name in machine.below(root)}
    return {key: min(it.snapshots.values(), key=lambda point: point.createtxg).guid for key, it in stores.items()}


@pytest.mark.parametrize("keys", [("/a", "/b"), ("/a", "/b", "/c"), ("/z", "/p/a")])
@pytest.mark.parametrize("moment", ["", "before", "after"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_names_that_are_swapped_are_followed(keys: tuple[str, ...], moment: str, place: int) -> None:
    job = of("/p", *keys, *(f"{key}/below" for key in keys))
    swap(job, *keys)
    job.snapshot("b")
    if moment:
        seen: list[Command] = []

        def refuse(where: Machine, command: Command, when: str) -> Answer | None:
            if command[1] == "rename" and when == moment:
                seen.append(command)
                return Answer(1, "", "permission denied") if len(seen) == place + 1 else None
            return None

        job.replicate(status=1, at=refuse)
    job.replicate()
    assert identities(job.backup, LOCAL) == identities(job.source, SOURCE)
    assert all(job.here(key) == f"a b!{RECEIVED}" for key in ("", *keys, *(f"{key}/below" for key in keys)))
    assert len(job.done("rename")) <= len(keys) + 1
    job.replicate()
    assert job.done() == []


class Endless(BaseException):
    """The run does the same for ever."""


def at_most(count: int, pattern: str, answer: Answer | None = None) -> Disturbance:
    seen: list[Command] = []

    def at(_: Machine, command: Command, moment: str) -> Answer | None:
        if moment != "before" or not re.search(pattern, " ".join(command)):
            return None
        seen.append(command)
        if len(seen) > count:
            raise Endless
        return answer

    return at


def test_names_that_are_swapped_end_the_run_if_nothing_can_be_renamed() -> None:
    job = of("/a", "/b")
    swap(job, "/a", "/b")
    job.snapshot("b")
    job.replicate(status=1, at=at_most(20, "^zfs rename", Answer(1, "", "cannot rename: permission denied")))


def test_names_that_are_swapped_leave_a_name_for_a_while_that_is_taken() -> None:
    job = of("/a", "/b")
    job.backup.create(f"{LOCAL}/a{BETWEEN_NAMES}")
    swap(job, "/a", "/b")
    job.snapshot("b")
    job.replicate(at=at_most(20, "^zfs rename"))
    assert [job.here(key) for key in ("/a", "/b")] == [f"a b!{RECEIVED}"] * 2


def test_names_that_are_swapped_take_no_other_line_s_mirror_along() -> None:
    job = of("/a", "/b")
    job.backup.create(f"{LOCAL}/a/other")
    job.backup.snapshot(f"{LOCAL}/a/other@x")
    job.backup.hold("other:received", f"{LOCAL}/a/other@x")
    swap(job, "/a", "/b")
    job.snapshot("b")
    selection = Selection(exclude=("a/other",))
    job.replicate(status=1, at=at_most(20, "^zfs list .*machines/a$"), selection=selection)
    assert f"{LOCAL}/a/other" in job.backup.datasets


def test_names_of_two_snapshots_that_share_a_guid_end_the_plan() -> None:
    """No zfs makes such ones; a source may say what it likes."""
    job = of()
    snapshots = job.source.datasets[SOURCE].snapshots
    for name in ("x", "y"):
        job.snapshot(name)
    snapshots["y"].guid = snapshots["x"].guid
    job.replicate(every=True)
    job.source.rename(f"{SOURCE}@x", "gone")
    snapshots["gone"].tags.clear()
    job.source.destroy(SOURCE, ["gone"])
    job.snapshot("x")
    job.replicate()
    assert len(job.here().split()) == 4


def test_names_that_wait_are_not_set_aside() -> None:
    """/r0 is called /z/m at the source, and a new dataset has its name. /z does not come."""
    job = of("/r0")
    job.source.create(f"{SOURCE}/z")
    move(job, "/r0", "/z/m")
    job.source.create(f"{SOURCE}/r0")
    job.snapshot("b")
    job.replicate(status=1, quarantine=True, at=refusing("^zfs send .*/z@b"))
    assert not [name for name in job.backup.datasets if ASIDE in name]
    job.replicate(quarantine=True)
    assert job.here("/z/m") == f"a b!{RECEIVED}"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_names_that_are_swapped_are_not_set_aside(place: int) -> None:
    job = of("/a", "/b")
    swap(job, "/a", "/b")
    job.snapshot("b")
    seen: list[Command] = []

    def refuse(_: Machine, command: Command, moment: str) -> Answer | None:
        if command[1] == "rename" and moment == "before":
            seen.append(command)
            return Answer(1, "", "permission denied") if len(seen) == place + 1 else None
        return None

    job.replicate(status=1, quarantine=True, at=refuse)
    assert not [name for name in job.backup.datasets if ASIDE in name]
    job.replicate(quarantine=True)
    assert [job.here(key) for key in ("/a", "/b")] == [f"a b!{RECEIVED}"] * 2
