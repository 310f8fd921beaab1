"""What is refused on real ZFS, and that nothing is lost by it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from site_pair import MIRROR, TAG, TREE, held, names

if TYPE_CHECKING:
    from site_pair import Site

pytestmark = pytest.mark.zfs


@pytest.mark.full
def test_target_with_data_is_refused_and_the_rest_is_done(site: Site) -> None:
    site.plant("www", "mail")
    site.snapshot("monday")
    site.replicate_silently("--exclude", "www", "--exclude", "disk")
    site.backup.run(f"zfs create {MIRROR}/www && zfs create -V 16M {MIRROR}/disk")
    site.backup.run(f"zfs set readonly=off {MIRROR}/www && zfs mount {MIRROR}/www; echo precious > /{MIRROR}/www/file")
    site.snapshot("tuesday")
    done = site.replicate(status=1)
    assert f"{MIRROR}/www: {MIRROR}/www is not empty: it holds data but no snapshot" in done.stderr
    assert f"{MIRROR}/disk: {MIRROR}/disk is not empty: it holds data but no snapshot" in done.stderr
    assert site.backup.run(f"cat /{MIRROR}/www/file").stdout == "precious\n"
    assert names(site.backup, f"{MIRROR}/mail") == ["monday", "tuesday"]
    assert held(site.source, TREE, TAG) == {f"{TREE}{child}@tuesday" for child in ("", "/mail")}

    done = site.replicate("--quarantine")
    assert f"zfs_replicate: {MIRROR}/www: renaming it to {MIRROR}/www.quarantine-20" in done.stderr
    site.assert_in_step()
    assert site.backup.run(f"cat /{MIRROR}/www.quarantine-*/file").stdout == "precious\n"
    site.replicate_silently("--quarantine")


@pytest.mark.full
def test_name_that_another_snapshot_has_here_is_freed(site: Site) -> None:
    site.plant("www")
    site.snapshot("monday")
    site.replicate()
    site.source.run(f"zfs release {TAG} {TREE}/www@monday && zfs bookmark {TREE}/www@monday {TREE}/www#monday")
    site.source.run(f"zfs destroy {TREE}/www@monday && zfs snapshot {TREE}/www@monday")
    old = site.backup.run(f"zfs get -Hp -o value guid {MIRROR}/www@monday").stdout.strip()
    site.replicate_silently()
    assert names(site.backup, f"{MIRROR}/www") == [f"monday.dropped-{old}", "monday"]
    assert site.backup.run(f"zfs get -Hp -o value guid {MIRROR}/www@monday.dropped-{old}").stdout.strip() == old
    site.source.run(f"zfs release {TAG} {TREE}/www@monday && zfs destroy {TREE}/www@monday")
    site.source.run(f"zfs destroy {TREE}/www#monday && zfs snapshot {TREE}/www@monday")
    done = site.replicate(status=1)
    assert f"the common base of {MIRROR}/www is gone" in done.stderr
    assert names(site.backup, f"{MIRROR}/www") == [f"monday.dropped-{old}", "monday"]


@pytest.mark.full
def test_newer_local_snapshot_is_refused(site: Site) -> None:
    site.plant("www")
    site.snapshot("monday")
    site.replicate()
    site.backup.run(f"zfs snapshot {MIRROR}/www@mine")
    site.replicate_silently()
    site.snapshot("tuesday")
    done = site.replicate(status=1)
    assert f"{MIRROR}/www has 1 local snapshot newer than the newest common one, @monday" in done.stderr
    assert names(site.backup, f"{MIRROR}/www") == ["monday", "mine"]
    assert names(site.backup, MIRROR) == ["monday", "tuesday"]
    assert f"{TREE}/www@monday" in held(site.source, TREE, TAG)
    assert f"{TREE}/www@tuesday" not in held(site.source, TREE, TAG)

    site.backup.run(f"zfs hold keep {MIRROR}/www@mine")
    assert "not to be rolled back: @mine (held by keep)" in site.replicate("--rollback", status=1).stderr
    site.backup.run(f"zfs release keep {MIRROR}/www@mine")
    done = site.replicate("--rollback")
    assert done.stderr == f"zfs_replicate: {MIRROR}/www: rolling back to @monday, which destroys @mine\n"
    assert names(site.backup, f"{MIRROR}/www") == ["monday", "tuesday"]
    site.assert_in_step()
    site.replicate_silently("--rollback")


@pytest.mark.full
def test_local_change_is_refused_by_zfs_and_explained(site: Site) -> None:
    site.plant("www")
    site.snapshot("monday")
    site.replicate()
    site.backup.run(
        f"zfs set readonly=off {MIRROR}/www && zfs mount {MIRROR}/www && echo mine > /{MIRROR}/www/mine && zfs umount {MIRROR}/www"
    )
    site.snapshot("tuesday")
    done = site.replicate(status=1)
    assert f"{MIRROR}/www was changed since the newest common one, @monday" in done.stderr
    assert names(site.backup, f"{MIRROR}/www") == ["monday"]
    assert held(site.source, f"{TREE}/www", TAG) == {f"{TREE}/www@monday"}
    assert names(site.backup, MIRROR) == ["monday", "tuesday"]

    done = site.replicate("--rollback")
    assert (
        done.stderr == f"zfs_replicate: {MIRROR}/www: rolling back to @monday, which destroys what was changed since\n"
    )
    site.assert_in_step()
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)


@pytest.mark.full
def test_parent_that_fails_keeps_its_children_waiting(site: Site) -> None:
    site.plant("www/logs")
    site.snapshot("monday")
    site.backup.run(f"zfs create -p {MIRROR} && zfs create -V 16M {MIRROR}/www")
    done = site.replicate(status=1)
    assert f"{TREE}/www is a filesystem, but {MIRROR}/www is a volume" in done.stderr
    assert f"{MIRROR}/www/logs" in done.stderr
    assert names(site.backup, MIRROR) == ["monday"]


@pytest.mark.full
def test_same_host_as_source_is_refused(site: Site) -> None:
    """One crontab on both of two hosts, or a name that leads back here: expiry would destroy the only copy."""
    site.backup.run(f"zfs create -p {MIRROR} && zfs snapshot -r offsite@monday && zfs snapshot -r offsite@tuesday")
    site.source.shift_clock(40)
    site.backup.shift_clock(40)
    for here in ("offsite", MIRROR):
        job = f"zfs_replicate -h backup -r offsite -l {here} -t {TAG} -k 30"
        done = site.replicate(status=3, job=job)
        assert (
            f"backup is this host, and offsite and {here} overlap: a tree cannot be mirrored into itself" in done.stderr
        )
    assert site.backup.run("zfs list -H -r -t all -o name offsite | wc -l").stdout == "9\n"


@pytest.mark.full
def test_missing_dataset_pool_or_zfs_stops_before_the_start(site: Site) -> None:
    site.plant()
    site.snapshot("monday")
    done = site.replicate(status=3, job=f"zfs_replicate -h source -r backuppool/none -l {MIRROR} -t {TAG}")
    assert "cannot open 'backuppool/none': dataset does not exist" in done.stderr
    done = site.replicate(status=3, job=f"zfs_replicate -h source -r {TREE} -l nopool/virt -t {TAG}")
    assert "is the pool imported? zpool import nopool" in done.stderr
    site.source.run("mv $(readlink -f $(command -v zfs)) /root/zfs.away; hash -r")
    try:
        done = site.replicate(status=3)
    finally:
        site.source.run("mv /root/zfs.away /usr/sbin/zfs")
    assert "source has no program 'zfs'" in done.stderr
    assert site.backup.run("zfs list -H -r -o name offsite").stdout == "offsite\n"
