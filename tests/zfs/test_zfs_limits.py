"""Where ZFS itself says no: names, pools and rights at their limits. The message is clear, and the next run repairs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from site_pair import JOB, MIRROR, TAG, TREE, get, held, history, names
from test_zfs_hosts import accounts

if TYPE_CHECKING:
    from lab import Machine
    from site_pair import Site

pytestmark = pytest.mark.zfs

PARENT = "offsite" + "/x" * 46
"""Of 47 levels; ZFS allows 50."""


@pytest.mark.full
def test_names_too_long_too_deep_and_odd(site: Site) -> None:
    tag, deep = "t" * 246, f"{PARENT}/m"
    job = f"zfs_replicate -h source -r {TREE} -l {deep} -t {tag} -k 30"
    site.backup.run(f"zfs set mountpoint=none offsite && zfs create -p {PARENT}")
    site.source.run(f"zfs create -p {TREE}/-x/--/z && zfs create '{TREE}/b ' && zfs create {TREE}/c")
    site.snapshot("-a:b._ ")
    site.snapshot("l" * 180, f"{TREE}/c")
    done = site.replicate(job=job, status=1)
    assert done.stderr == (
        f"zfs_replicate: {deep}/-x/--/z: {deep}/-x/--/z would be nested deeper than the 50 levels ZFS allows\n"
        "    mirror to a place nearer to the pool with -l, or leave it out with --exclude\n"
        f"zfs_replicate: {deep}/c: {deep}/c@{'l' * 180} would be longer than the 255 bytes ZFS allows\n"
        "    mirror to a shorter name with -l, or rename the snapshot at the source\n"
    )
    done_keys = ("", "/-x", "/-x/--", "/b ")
    assert set(history(site.backup, deep)) == set(done_keys)
    assert held(site.source, TREE, tag) == {f"{TREE}{key}@-a:b._ " for key in done_keys}
    assert held(site.backup, deep, f"{tag}:received") == {f"{deep}{key}@-a:b._ " for key in done_keys}

    # What the hints say works, and such names expire like others.
    site.source.shift_clock(40)
    site.backup.shift_clock(40)
    site.snapshot("-")
    site.source.run(f"zfs rename {TREE}/c@{'l' * 180} {TREE}/c@short")
    site.replicate_silently("--exclude=-x/--/z", job=job)
    for key in (*done_keys, "/c"):
        assert names(site.backup, f"{deep}{key}") == ["-"]
    # What the command line refuses, zfs refuses too.
    site.source.run(f"! zfs snapshot {TREE}@a%b 2>&1 && ! zfs create {TREE}/a%b 2>&1 && ! zfs create {TREE}/ä 2>&1")


@pytest.mark.full
def test_datasets_without_snapshots_and_datasets_made_anew(site: Site) -> None:
    site.source.run(f"zfs create -p {TREE}")
    site.replicate_silently()
    assert site.backup.run("zfs list -H -r -o name offsite").stdout == "offsite\n"

    site.plant("www")
    site.snapshot("monday")
    site.source.run(f"zfs create {TREE}/empty")
    done = site.replicate("-v")
    assert f"{MIRROR}/empty: no snapshot to pull\n" in done.stderr
    assert set(history(site.backup, MIRROR)) == {"", "/disk", "/www"}
    site.replicate_silently()

    for child in ("disk", "www"):
        site.source.run(
            f"zfs release {TAG} {TREE}/{child}@monday && zfs destroy -r {TREE}/{child} && zfs create {TREE}/{child}"
        )
    site.snapshot("tuesday")
    done = site.replicate(status=1)
    assert f"{TREE}/disk is a filesystem, but {MIRROR}/disk is a volume" in done.stderr
    assert f"the common base of {MIRROR}/www is gone: {TREE}/www has none of the snapshots that are here" in done.stderr
    assert "or whether the dataset was made anew; to rename all that is here aside" in done.stderr
    ours = history(site.backup, MIRROR)
    assert {key: [point.name.partition("@")[2] for point in points] for key, points in ours.items()} == {
        "": ["monday", "tuesday"],
        "/disk": ["monday"],
        "/www": ["monday"],
        "/empty": ["tuesday"],
    }
    done = site.replicate("--quarantine")
    for child in ("disk", "www"):
        assert f"zfs_replicate: {MIRROR}/{child}: renaming it to {MIRROR}/{child}.quarantine-" in done.stderr
    site.assert_in_step()
    kept = {key.partition(".quarantine-")[0] for key in history(site.backup, MIRROR) if ".quarantine-" in key}
    assert kept == {"/disk", "/www"}
    site.replicate_silently("--quarantine")


@pytest.mark.full
def test_pools_as_a_whole_on_both_sides(site: Site) -> None:
    site.plant("www")
    site.source.run("head -c 300000 /dev/urandom > /backuppool/file")
    job = f"zfs_replicate -h source -r backuppool -l offsite -t {TAG}"
    for day in ("monday", "tuesday"):
        site.write(day, "www")
        site.snapshot(day, "backuppool")
        site.replicate_silently(job=job)
        site.assert_in_step(tree="backuppool", mirror="offsite")
    assert names(site.backup, "offsite") == ["monday", "tuesday"]
    assert get(site.backup, "readonly", "offsite") == ["on"]
    assert site.checksums(site.backup, "offsite") == site.checksums(site.source, "backuppool")


def import_again(machine: Machine, pool: str, options: str = "") -> None:
    """A pool may be busy for a moment after it was used."""
    machine.run(f"for i in $(seq 30); do zpool export {pool} && break; sleep 1; done; zpool import {options} {pool}")


@pytest.mark.full
def test_pools_that_are_read_only_not_there_or_full(site: Site) -> None:
    site.source.run(f"zfs create -p {TREE}/www && head -c 300000 /dev/urandom > /{TREE}/www/one")
    site.snapshot("monday")
    import_again(site.backup, "offsite", "-o readonly=on")
    done = site.replicate(status=1)
    assert "cannot create 'offsite/virt': pool is read-only" in done.stderr
    assert held(site.source, TREE, TAG) == set()
    import_again(site.backup, "offsite")

    import_again(site.source, "backuppool", "-o readonly=on")
    assert site.backup.run("zfs list -H -r -o name offsite").stdout == "offsite\n"
    done = site.replicate(status=1)
    assert re.fullmatch(f"zfs_replicate: {MIRROR}: the source's pool is read-only: .*\n    .*\n", done.stderr)
    assert names(site.backup, f"{MIRROR}/www") == ["monday"]
    site.source.run("for i in $(seq 30); do zpool export backuppool && exit; sleep 1; done; exit 1")
    done = site.replicate(status=3)
    assert done.stderr == (
        f"zfs_replicate: {MIRROR}: zfs list failed on source: cannot open '{TREE}': dataset does not exist\n"
        "    check -r; is the pool imported there? zpool import backuppool\n"
    )
    site.source.run("zpool import backuppool")
    site.replicate_silently()
    site.assert_in_step()

    # No space: what arrived is kept, and goes on when there is some.
    site.source.run(f"head -c 6M /dev/urandom > /{TREE}/www/two")
    site.snapshot("tuesday")
    site.backup.run("zfs set quota=2M offsite")
    done = site.replicate(status=1)
    assert re.fullmatch(
        f"zfs_replicate: {MIRROR}/www: the stream failed: zfs: cannot receive .*(out of space|quota exceeded).*\n"
        "    make space; what arrived is kept, and the next run goes on from there\n",
        done.stderr,
    )
    assert names(site.backup, MIRROR) == ["monday", "tuesday"]
    assert names(site.backup, f"{MIRROR}/www") == ["monday"]
    assert held(site.source, f"{TREE}/www", TAG) == {f"{TREE}/www@monday", f"{TREE}/www@tuesday"}
    site.backup.run("zfs set quota=none offsite")
    site.replicate_silently()
    site.assert_in_step()


@pytest.mark.full
def test_pool_that_is_suspended_is_told_and_goes_on_when_it_is_back(site: Site) -> None:
    """Its disk is a file that can no longer grow: every write fails, and ZFS waits for somebody to mend that."""
    site.source.run(f"zfs create -p {TREE} && head -c 300000 /dev/urandom > /{TREE}/one")
    site.snapshot("monday")
    site.backup.run(
        "mkdir -p /run/small && mount -t tmpfs -o size=40M tmpfs /run/small && truncate -s 200M /run/small/disk && "
        "zpool create shaky /run/small/disk"
    )
    job = JOB.replace("-l offsite/virt", "-l shaky/virt")
    try:
        site.replicate_silently(job=job)
        site.source.run(f"head -c 4M /dev/urandom > /{TREE}/two")
        site.snapshot("tuesday")
        site.backup.run(
            "head -c 40M /dev/zero > /run/small/filler; (head -c 9M /dev/urandom > /shaky/file) >/dev/null 2>&1 & "
            "for i in $(seq 60); do zpool list -H -o health shaky | grep -q SUSPENDED && exit 0; sleep 1; done; exit 1"
        )
        done = site.replicate("--stall-timeout", "20s", job=job, status=3)
        assert "cannot open 'shaky': pool I/O is currently suspended\n" in done.stderr
        assert "see zpool status; when its disks are back: zpool clear" in done.stderr
        site.backup.run("rm /run/small/filler && zpool clear shaky")
        site.backup.run("for i in $(seq 60); do pgrep -x zfs >/dev/null || exit 0; sleep 1; done; exit 1")
        site.replicate_silently(job=job)
        site.assert_in_step(mirror="shaky/virt/machines")
    finally:
        site.backup.run(
            "rm -f /run/small/filler; zpool clear shaky; zpool destroy -f shaky; umount /run/small", check=False
        )


@pytest.mark.full
def test_rights_that_are_missing_are_granted_by_the_hints(site: Site) -> None:
    """Allowed nothing at first, then what the hints say, and no more."""
    job = accounts(site)
    site.source.run(f"zfs create -p {TREE}/a/b")
    site.snapshot("monday", TREE, "")
    site.snapshot("monday", f"{TREE}/a/b", "")
    values = (
        "readonly,canmount,sharenfs,sharesmb,setuid,devices,zoned,volmode,snapdev,quota,refquota,reservation,"
        "refreservation,snapshot_limit,filesystem_limit,userprop"
    )
    assert obeyed(site, job) == [
        f"source: zfs allow puller hold {TREE}",
        "this host: zfs allow keeper create,mount,canmount offsite",
        f"source: zfs allow puller release {TREE}",  # of what was held, and then not sent
        f"source: zfs allow puller send {TREE}",
        f"this host: zfs allow keeper receive,create,mount,{values} offsite/virt",
        f"this host: zfs allow keeper hold {MIRROR}",
    ]
    assert names(site.backup, f"{MIRROR}/a/b") == ["monday"]

    site.source.shift_clock(40)
    site.backup.shift_clock(40)
    site.source.run(f"zfs create {TREE}/www")
    site.backup.run("zfs unallow -r keeper readonly offsite")
    site.snapshot("tuesday")
    said = obeyed(site, job)
    # The placeholder /a: is it empty, and may it make way? And /www came without readonly=on.
    assert set(said) >= {
        f"this host: zfs allow keeper userused,userquota,userobjused,userobjquota {MIRROR}",
        f"this host: zfs allow keeper rename,create,mount {MIRROR}",
        f"this host: zfs allow keeper receive,create,mount,{values} {MIRROR}",
        f"this host: zfs allow keeper release {MIRROR}",
        f"this host: zfs allow keeper destroy,mount {MIRROR}",
    }
    assert len(said) <= 7
    left = ".made-way-for-mirror"  # of the placeholder, empty
    for key, points in (
        (key, points) for key, points in history(site.backup, MIRROR).items() if not key.endswith(left)
    ):
        assert [point.name.partition("@")[2] for point in points] == ["tuesday"]
        assert get(site.backup, "readonly", f"{MIRROR}{key}") == ["on"]
    site.assert_in_step()


def obeyed(site: Site, job: str) -> list[str]:
    """Run the job, and as root what its hints say, until it succeeds. Returns what was to be run, and where."""
    obeyed: list[str] = []
    for _ in range(12):
        done = site.backup.run(job, check=False, timeout=600)
        if done.returncode == 0:
            assert done.stderr == ""
            return obeyed
        hints = re.findall("as root on (source|this host): (zfs allow [^;\n]*)", done.stderr)
        hints += [("this host", command) for command in re.findall("for this once, as root: (zfs set .*)", done.stderr)]
        new = [hint for hint in dict.fromkeys(hints) if ": ".join(hint) not in obeyed]
        assert new, f"exit {done.returncode} without a hint:\n{done.stderr}"
        for where, command in new:
            (site.source if where == "source" else site.backup).run(command)
            obeyed.append(f"{where}: {command}")
    raise AssertionError(f"it never succeeds: {obeyed}")
