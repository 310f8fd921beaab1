"""What honest people do by mistake, on real ZFS: it is refused or told, and nobody's snapshots, names or properties go."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

import pytest
from site_pair import JOB, MIRROR, TAG, TREE, get, held, history, names
from test_zfs_hostile import attempt, changes, state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from site_pair import Site

pytestmark = pytest.mark.zfs


def aged(site: Site, *children: str) -> None:
    """A tree of three snapshots, forty days old, and one of today."""
    site.source.run(" && ".join(f"zfs create -p {TREE}{child}" for child in ("", *children)))
    for day in ("monday", "tuesday", "wednesday"):
        site.snapshot(day)
    site.source.shift_clock(40)
    site.backup.shift_clock(40)
    site.snapshot("now")


def test_wrong_host_expires_nothing_of_the_production(site: Site) -> None:
    """With both trees exchanged, and with the same name on both sides; also where it is run again."""
    aged(site, "/www")
    site.replicate_silently("-I")
    before, ours = history(site.source, TREE), history(site.backup, MIRROR)
    exchanged = f"zfs_replicate -h backup -r {MIRROR} -l {TREE} -t {TAG} -k 30"
    for day in ("thursday", "friday"):
        done = site.source.run(exchanged, check=False)
        assert "Traceback" not in done.stderr
        assert history(site.source, TREE) == before, f"before {day}: exit {done.returncode}: {done.stderr}"
        assert history(site.backup, MIRROR) == ours
        site.snapshot(day)  # as a production has that is at work
        before = history(site.source, TREE)
    assert get(site.source, "readonly", TREE) + get(site.source, "readonly", f"{TREE}/www") == ["off", "off"]


@pytest.mark.full
def test_target_with_other_data_below_is_left_alone(site: Site) -> None:
    """`-l` is the root of a pool, or a dataset, below which other data lives."""
    site.source.run(f"zfs create -p {TREE}/www && zfs set atime=off compression=gzip {TREE}")
    site.snapshot("monday")
    site.backup.run("zfs create offsite/home && echo mine > /offsite/home/file && zfs create -p offsite/data/music")
    before = state(site.backup)
    for there in ("offsite", "offsite/data"):
        done = site.replicate(status=1, job=JOB.replace(MIRROR, there))
        assert re.search(f"^zfs_replicate: {there}(/www)?: ", done.stderr, re.MULTILINE)
        assert re.search(r"offsite/(home|data)", done.stderr), done.stderr
        assert changes(before, state(site.backup)) == [], done.stderr
    site.backup.run("echo still mine > /offsite/home/file")
    site.replicate_silently()
    site.assert_in_step()
    site.replicate_silently()


@pytest.mark.full
def test_target_that_is_no_mirror_gets_nothing_below_it(site: Site) -> None:
    """It has data and a history of its own; what is beside it is done."""
    site.source.run(f"zfs create -p {TREE}")
    site.snapshot("sunday")
    site.replicate_silently()
    site.source.run(f"zfs create -p {TREE}/www/logs && zfs create {TREE}/mail")
    site.snapshot("monday")
    site.backup.run(
        f"zfs create -o readonly=off {MIRROR}/www && echo precious > /{MIRROR}/www/file && zfs snapshot {MIRROR}/www@mine"
    )
    before = state(site.backup, f"{MIRROR}/www")
    done = attempt(site)
    assert changes(before, state(site.backup, f"{MIRROR}/www")) == [], done.stderr
    assert done.returncode == 1
    assert f"zfs_replicate: {MIRROR}/www: " in done.stderr
    assert f"{MIRROR}/www/logs" in done.stderr
    assert names(site.backup, f"{MIRROR}/mail") == ["monday"]
    assert site.backup.run(f"cat /{MIRROR}/www/file").stdout == "precious\n"


@pytest.mark.full
def test_mirror_of_another_line_is_not_renamed_from_one_level_up(site: Site) -> None:
    site.source.run(f"zfs create -p {TREE}/www")
    site.snapshot("monday")
    site.replicate_silently()
    before = state(site.backup, MIRROR)
    for job in ("-r backuppool/virt -l offsite", "-r backuppool -l offsite/virt", "-r backuppool/virt -l offsite/virt"):
        done = attempt(site, job=f"zfs_replicate -h source {job} -t t2")
        assert done.returncode in (0, 1), done.stderr
        assert changes(before, state(site.backup, MIRROR)) == [], f"{job}: {done.stderr}"
    site.snapshot("tuesday")
    site.replicate_silently()
    assert names(site.backup, MIRROR) == ["monday", "tuesday"]


def test_mirror_of_two_lines_loses_nothing_that_one_keeps(site: Site) -> None:
    """One keeps it for years, the other 30 days; in either order the snapshots of the first stay, and it is said."""
    aged(site, "/www")
    site.replicate_silently("-I", job="zfs_replicate -h source -r backuppool/virt -l offsite/virt -t years")
    before = history(site.backup, MIRROR)
    done = attempt(site, "-k", "30")
    assert history(site.backup, MIRROR) == before, done.stderr
    assert re.search(f"{MIRROR}.*years", done.stderr, re.DOTALL), f"exit {done.returncode}: {done.stderr}"
    site.snapshot("later")
    done = attempt(site, "-k", "30")
    assert {key: points[:4] for key, points in history(site.backup, MIRROR).items()} == before, done.stderr
    assert held(site.backup, MIRROR, "years:received") >= {f"{MIRROR}@now", f"{MIRROR}/www@now"}
    assert held(site.source, TREE, "years") == {f"{TREE}@now", f"{TREE}/www@now"}


@contextlib.contextmanager
def at_work(site: Site, job: str = JOB) -> Iterator[None]:
    """While a run of this job is in the middle of its stream, where it stands still."""
    site.source.netem(megabits=8)
    running = site.backup.popen(job)
    try:
        site.source.run(
            "for i in $(seq 300); do pkill -STOP -f '^zfs send' && exit; sleep 0.1; done; exit 1", timeout=120
        )
        site.source.netem()
        yield
        assert running.poll() is None, f"it ended before the others: nothing was tested: {running.communicate()}"
    finally:
        site.source.run("pkill -CONT -f '^zfs send'", check=False)
        site.source.netem()
    stdout, stderr = running.communicate(timeout=300)
    assert (running.returncode, stdout + stderr) == (0, "")


@pytest.mark.full
def test_lock_of_another_job_is_told(site: Site) -> None:
    """The same line is silent; the same tree from elsewhere, and a tree within or around, are told. One beside is free."""
    site.source.run(
        f"zfs create -p {TREE} && head -c 40M /dev/urandom > /{TREE}/big && zfs create -p backuppool/other/www"
    )
    site.snapshot("monday")
    site.snapshot("monday", "backuppool/other")
    line = "zfs_replicate -h source -t offsite"
    with at_work(site):
        site.replicate_silently()
        for job in (
            f"{line} -r backuppool/other -l {MIRROR}",
            f"{line} -r backuppool/virt -l offsite/virt",
            f"{line} -r backuppool/other -l {MIRROR}/below",
        ):
            done = attempt(site, job=job)
            told = re.search("^zfs_replicate: offsite/virt.* at work", done.stderr, re.MULTILINE)
            assert (done.returncode, bool(told)) == (3, True), f"{job}: {done.returncode}: {done.stderr}"
        site.replicate_silently(job=f"{line} -r backuppool/other -l offsite/virt/other")
    site.assert_in_step()
    assert set(history(site.backup, "offsite")) == {"", "/virt", "/virt/machines", "/virt/other", "/virt/other/www"}


def test_tag_that_is_not_ours_alone(site: Site) -> None:
    """At the first run somebody has holds of that name; later another backup host uses the tag too."""
    site.source.run(f"zfs create -p {TREE}/www && zfs snapshot -r {TREE}@old && zfs hold {TAG} {TREE}/www@old")
    site.snapshot("monday")
    done = attempt(site)
    assert re.search(f"{TREE}/www@old", done.stdout + done.stderr), f"exit {done.returncode}: not a word"
    if done.returncode:
        assert f"{TREE}/www@old" in held(site.source, TREE, TAG)
        site.source.run(f"zfs release {TAG} {TREE}/www@old")
        site.replicate_silently()
    site.replicate_silently()

    # The other host's run, as it moves the hold to what it has by now.
    site.snapshot("tuesday")
    site.source.run(
        f"for it in '' /www; do zfs hold {TAG} {TREE}$it@tuesday && zfs release {TAG} {TREE}$it@monday; done"
    )
    site.snapshot("wednesday")
    done = site.replicate()
    assert re.search("@monday.*(no longer|not|any more|another)", done.stderr, re.DOTALL), "not a word"
    assert names(site.backup, MIRROR)[-1] == "wednesday"
    site.replicate_silently()


def test_rollback_tells_what_may_be_a_last_copy(site: Site) -> None:
    """The source was rolled back itself: what it lost is here alone. What was made here was never there."""
    site.source.run(f"zfs create -p {TREE}/www")
    site.snapshot("monday")
    site.replicate_silently()
    site.snapshot("tuesday")
    site.replicate_silently()
    site.backup.run(f"zfs snapshot {MIRROR}/www@mine")
    site.source.run(f"zfs release {TAG} {TREE}/www@tuesday && zfs rollback -r {TREE}/www@monday")
    site.snapshot("wednesday", f"{TREE}/www", "")
    done = site.replicate(status=1)
    assert names(site.backup, f"{MIRROR}/www") == ["monday", "tuesday", "mine"]
    assert "--rollback" in done.stderr
    done = site.replicate("--rollback")
    assert (
        "rolling back to @monday, which destroys @tuesday, @mine; received from the source, which has no more of it, so "
        "perhaps the last copy: @tuesday\n" in done.stderr
    )
    site.replicate_silently()
