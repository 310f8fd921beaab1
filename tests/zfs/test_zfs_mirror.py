"""The main job on real ZFS: full and incremental pulls of a tree, its holds, and what a second run does not do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from site_pair import MIRROR, TAG, TREE, get, held, history, holds, logins_and_commands, names

if TYPE_CHECKING:
    from site_pair import Site

pytestmark = pytest.mark.zfs


@pytest.mark.each
def test_crontab_line_does_a_full_then_an_incremental_pull(site: Site) -> None:
    site.plant("www", "www/logs", "mail")
    site.snapshot("monday")
    site.replicate_silently()
    site.assert_in_step()
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)

    site.write("two", "www", "www/logs", "mail")
    site.snapshot("tuesday")
    site.snapshot("wednesday")
    site.replicate_silently()
    site.assert_in_step()
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)
    assert "/www/two" in site.checksums(site.backup, MIRROR)
    assert names(site.backup, MIRROR) == ["monday", "wednesday"]
    assert names(site.source, TREE) == ["monday", "tuesday", "wednesday"]


def test_mirror_is_unmounted_and_read_only_below_missing_parents(site: Site) -> None:
    site.plant("www")
    site.source.run(f"zfs set compression=gzip-3 atime=off quota=1G sharenfs=off {TREE}/www")
    site.snapshot("monday")
    site.replicate()
    assert get(site.backup, "canmount,mounted", "offsite/virt") == ["off", "no"]
    for child in ("", "/www"):
        state = get(site.backup, "mounted,readonly,canmount,mountpoint", MIRROR + child)
        assert state == ["no", "on", "noauto", f"/{MIRROR}{child}"]
    assert get(site.backup, "compression,atime,quota", f"{MIRROR}/www") == ["gzip-3", "off", "0"]
    assert get(site.backup, "readonly,refreservation", f"{MIRROR}/disk") == ["on", "0"]


@pytest.mark.full
def test_property_set_on_the_mirror_survives_an_increment(site: Site) -> None:
    site.plant("www")
    site.snapshot("monday")
    site.replicate()
    site.backup.run(f"zfs set canmount=on {MIRROR}/www")
    site.source.run(f"zfs set compression=gzip-3 {TREE}/www")
    site.snapshot("tuesday")
    site.replicate()
    assert get(site.backup, "canmount,readonly,compression,mounted", f"{MIRROR}/www") == ["on", "on", "gzip-3", "no"]


@pytest.mark.full
def test_quota_and_reservation_are_not_taken_over(site: Site) -> None:
    """ZFS 2.1 does at every second one, if such a property is only left out (`-x`)."""
    site.plant("www")
    site.source.run(f"zfs set quota=2G refquota=1G reservation=1M {TREE}/www")
    for day in ("monday", "tuesday", "wednesday", "thursday"):
        site.snapshot(day)
        site.replicate_silently()
        assert get(site.backup, "quota,refquota,reservation", f"{MIRROR}/www") == ["0", "0", "0"], day
        assert get(site.backup, "reservation,refreservation", f"{MIRROR}/disk") == ["0", "0"], day


def test_second_run_does_nothing_with_one_login_and_two_commands(site: Site) -> None:
    site.plant("www")
    site.snapshot("monday")
    site.replicate()
    before = site.backup.run(f"zpool sync; zfs list -Hpr -t all -o name,guid,userrefs,used {MIRROR}").stdout
    logins, commands = logins_and_commands(site.source)
    site.replicate_silently()
    after = logins_and_commands(site.source)
    assert (after[0] - logins, after[1] - commands) == (1, 2)
    assert site.backup.run(f"zpool sync; zfs list -Hpr -t all -o name,guid,userrefs,used {MIRROR}").stdout == before
    site.assert_in_step()


@pytest.mark.full
def test_batch_takes_one_command_and_a_failure_holds_nobody_up(site: Site) -> None:
    """The number of commands at the source is that of the batches, whatever the number of datasets."""
    children = [f"d{number}" for number in range(6)]
    site.plant(*children, "d1/inner")

    def effort(*options: str, status: int = 0) -> tuple[int, int]:
        logins, commands = logins_and_commands(site.source)
        site.replicate(*options, status=status)
        logins_now, commands_now = logins_and_commands(site.source)
        return logins_now - logins, commands_now - commands

    site.snapshot("monday")
    assert effort() == (2, len(["list", "holds", "hold", "send", "list", "holds"]))
    site.assert_in_step()
    site.write("two", *children, "d1/inner")
    site.snapshot("tuesday")
    assert effort("-j", "3") == (2, len(["list", "holds", "hold", "send", "release", "list", "holds"]))
    site.assert_in_step()
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)
    site.backup.run(
        f"zfs set readonly=off {MIRROR}/d2 && zfs mount {MIRROR}/d2 && echo mine > /{MIRROR}/d2/mine && zfs umount {MIRROR}/d2"
    )
    site.write("three", *children, "d1/inner")
    site.snapshot("wednesday")
    effort(status=1)
    assert names(site.backup, f"{MIRROR}/d2") == ["monday", "tuesday"]
    assert names(site.backup, f"{MIRROR}/d5") == names(site.backup, f"{MIRROR}/d1/inner") == names(site.source, TREE)
    site.replicate("--rollback")
    site.assert_in_step()


def test_intermediates_bring_every_snapshot_between(site: Site) -> None:
    site.plant("www")
    for day in ("monday", "tuesday", "wednesday"):
        site.write(day, "www")
        site.snapshot(day)
    site.replicate_silently("-I")
    assert names(site.backup, f"{MIRROR}/www") == ["monday", "tuesday", "wednesday"]
    for day in ("thursday", "friday"):
        site.snapshot(day)
    site.replicate_silently("--intermediates")
    assert names(site.backup, MIRROR) == ["monday", "tuesday", "wednesday", "thursday", "friday"]
    site.assert_in_step()


@pytest.mark.full
def test_children_come_later_and_go_at_the_source(site: Site) -> None:
    site.plant("www", "mail")
    site.snapshot("monday")
    site.replicate()
    site.source.run(f"zfs create {TREE}/new && zfs release -r {TAG} {TREE}/mail@monday && zfs destroy -r {TREE}/mail")
    site.snapshot("tuesday")
    done = site.replicate("-v")
    assert f"{MIRROR}/mail: no longer exists at the source; kept" in done.stderr
    assert names(site.backup, f"{MIRROR}/mail") == ["monday"]
    assert names(site.backup, f"{MIRROR}/new") == ["tuesday"]
    site.assert_in_step()


def test_placeholder_becomes_a_mirror_later(site: Site) -> None:
    site.plant("www/logs")
    site.snapshot("monday", f"{TREE}/www/logs")
    site.replicate_silently()
    assert names(site.backup, f"{MIRROR}/www/logs") == ["monday"]
    assert get(site.backup, "canmount", f"{MIRROR}/www") == ["off"]
    site.snapshot("tuesday")
    site.replicate_silently()
    site.assert_in_step()
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)


@pytest.mark.full
def test_tree_without_any_snapshot_creates_nothing(site: Site) -> None:
    site.plant("www")
    site.replicate_silently()
    assert site.backup.run("zfs list -H -r -o name offsite").stdout == "offsite\n"


@pytest.mark.full
def test_empty_target_is_accepted(site: Site) -> None:
    site.plant("www")
    site.snapshot("monday")
    site.backup.run(f"zfs create -p {MIRROR}")
    site.replicate_silently()
    site.assert_in_step()
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)


@pytest.mark.full
def test_base_may_be_renamed_at_the_source(site: Site) -> None:
    site.plant("www")
    site.snapshot("monday")
    site.replicate()
    site.source.run(f"zfs rename -r {TREE}@monday {TREE}@renamed")
    site.replicate_silently()
    site.snapshot("tuesday")
    site.replicate_silently()
    assert names(site.backup, MIRROR) == ["monday", "tuesday"]
    site.assert_in_step()


@pytest.mark.full
def test_base_may_be_a_bookmark(site: Site) -> None:
    site.plant("www")
    site.snapshot("monday")
    site.replicate()
    site.source.run(
        f"zfs bookmark {TREE}/www@monday {TREE}/www#mark && zfs release {TAG} {TREE}/www@monday && "
        f"zfs destroy {TREE}/www@monday"
    )
    site.replicate_silently()
    site.write("two", "www")
    site.snapshot("tuesday")
    site.snapshot("wednesday")
    site.replicate_silently("-I")
    assert names(site.backup, f"{MIRROR}/www") == ["monday", "tuesday", "wednesday"]
    site.assert_in_step()


@pytest.mark.full
def test_names_with_spaces_also_trailing_ones(site: Site) -> None:
    site.source.run(f"zfs create -p '{TREE}/my files/a ' && head -c 9999 /dev/urandom > '/{TREE}/my files/a /f'")
    site.snapshot("first day ")
    site.replicate_silently("-k", "30")
    site.snapshot("day two")
    site.replicate_silently("-k", "30")
    assert names(site.backup, f"{MIRROR}/my files/a ") == ["first day ", "day two"]
    site.assert_in_step()


@pytest.mark.full
def test_snapshots_by_the_thousand(site: Site) -> None:
    site.source.run(f"zfs create -p {TREE}/a && zfs create {TREE}/b && zfs create {TREE}/c")
    site.snapshot("first")
    site.replicate_silently()
    site.source.run(f"for n in $(seq 250); do zfs snapshot -r {TREE}@s$n || exit; done", timeout=600)
    site.replicate_silently("-k", "30")
    assert names(site.backup, f"{MIRROR}/a") == ["first", "s250"]
    assert len(names(site.source, f"{TREE}/a")) == 251
    site.assert_in_step()


def test_interrupted_first_receive_goes_on_from_its_token(site: Site) -> None:
    site.source.run(f"zfs create -p {TREE} && head -c 30M /dev/urandom > /{TREE}/big")
    site.snapshot("monday")
    interrupt(site)
    token = get(site.backup, "receive_resume_token", MIRROR)[0]
    assert token.startswith("1-")
    assert held(site.source, TREE, TAG) == {f"{TREE}@monday"}
    site.snapshot("tuesday")
    done = site.replicate("-v")
    assert "rest of @monday" in done.stderr
    assert names(site.backup, MIRROR) == ["monday", "tuesday"]
    assert get(site.backup, "readonly,canmount,mounted,mountpoint", MIRROR) == ["on", "noauto", "no", f"/{MIRROR}"]
    site.assert_in_step()
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)


@pytest.mark.full
def test_interrupted_first_receive_into_an_empty_target_goes_on(site: Site) -> None:
    site.source.run(f"zfs create -p {TREE} && head -c 30M /dev/urandom > /{TREE}/big")
    site.snapshot("monday")
    site.backup.run(f"zfs create -p {MIRROR}")
    interrupt(site)
    assert get(site.backup, "receive_resume_token", MIRROR)[0].startswith("1-")
    # Nobody can write there meanwhile, which -F would overwrite without a word.
    assert get(site.backup, "readonly", MIRROR) == ["on"]
    assert "rest of @monday" in site.replicate("-v").stderr
    assert get(site.backup, "readonly,canmount,mounted", MIRROR) == ["on", "noauto", "no"]
    site.assert_in_step()
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)


@pytest.mark.full
def test_interrupted_increment_goes_on_and_its_base_stays(site: Site) -> None:
    site.source.run(f"zfs create -p {TREE}")
    site.snapshot("monday")
    site.replicate()
    site.source.run(f"head -c 30M /dev/urandom > /{TREE}/big")
    site.snapshot("tuesday")
    interrupt(site)
    assert get(site.backup, "receive_resume_token", MIRROR)[0].startswith("1-")
    assert held(site.source, TREE, TAG) == {f"{TREE}@monday", f"{TREE}@tuesday"}
    assert held(site.backup, MIRROR, f"{TAG}:received") == {f"{MIRROR}@monday"}
    assert "rest of @tuesday" in site.replicate("-v").stderr
    site.assert_in_step()
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)


@pytest.mark.full
def test_interrupted_receive_with_a_stale_token_is_given_up(site: Site) -> None:
    site.source.run(f"zfs create -p {TREE} && head -c 30M /dev/urandom > /{TREE}/big")
    site.snapshot("monday")
    interrupt(site)
    site.source.run(f"zfs release {TAG} {TREE}@monday && zfs destroy {TREE}@monday")
    site.snapshot("tuesday")
    assert "abandon an interrupted receive" in site.replicate("-v").stderr
    assert names(site.backup, MIRROR) == ["tuesday"]
    site.assert_in_step()


def interrupt(site: Site) -> None:
    """Start a run and kill it, and its receive, once some MiB have arrived."""
    running = site.start()
    site.backup.run(
        "kill -9 $(cat /run/job.pid); for i in $(seq 300); do pgrep -x zfs || exit 0; pkill -9 -x zfs; done; exit 1"
    )
    assert running.wait(timeout=60)
    site.source.netem()


def test_localhost_runs_without_ssh(site: Site) -> None:
    site.source.run(
        f"zfs create -p {TREE}/www && truncate -s 4G /var/tmp/pool && zpool create -f offsite /var/tmp/pool"
    )
    site.snapshot("monday")
    logins, _ = logins_and_commands(site.source)
    job = f"zfs_replicate -h localhost -r {TREE} -l {MIRROR} -t {TAG} -k 30"
    done = site.source.run(f"strace -f -e trace=execve -o /tmp/execs {job}")
    assert done.stdout + done.stderr == ""
    assert site.source.run("grep -c '/ssh\"' /tmp/execs", check=False).stdout == "0\n"
    assert history(site.source, MIRROR)["/www"][-1].guid == history(site.source, TREE)["/www"][-1].guid
    assert holds(site.source, TREE)[TAG] == [f"{TREE}@monday", f"{TREE}/www@monday"]
    done = site.source.run(f"zfs_replicate -h localhost -r backuppool -l {TREE} -t x", check=False)
    assert done.returncode == 2
    assert "overlap" in done.stderr
    assert logins_and_commands(site.source)[0] == logins
