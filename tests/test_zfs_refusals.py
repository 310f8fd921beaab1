"""What is refused on real ZFS, and that nothing is lost by it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from site_pair import MIRROR, TAG, TREE, held, names

if TYPE_CHECKING:
    from site_pair import Site

pytestmark = pytest.mark.zfs


def test_target_with_data_is_refused_and_the_rest_is_done(site: Site) -> None:
    site.plant("www", "mail")
    site.snapshot("monday")
    site.backup.run(
        f"zfs create -p {MIRROR}/www && echo precious > /{MIRROR}/www/file && zfs create -V 16M {MIRROR}/disk"
    )
    done = site.replicate(status=1)
    assert f"{MIRROR}/www: {MIRROR}/www holds data but no snapshot" in done.stderr
    assert f"{MIRROR}/disk: {MIRROR}/disk holds data but no snapshot" in done.stderr
    assert f"zfs rename '{MIRROR}/www' '{MIRROR}/www.old'" in done.stderr
    assert site.backup.run(f"cat /{MIRROR}/www/file").stdout == "precious\n"
    assert names(site.backup, f"{MIRROR}/mail") == ["monday"]
    assert held(site.source, TREE, TAG) == {f"{TREE}{child}@monday" for child in ("/mail",)}


def test_same_name_with_other_guid_is_refused(site: Site) -> None:
    site.plant("www")
    site.snapshot("monday")
    site.replicate()
    site.source.run(f"zfs release {TAG} {TREE}/www@monday && zfs bookmark {TREE}/www@monday {TREE}/www#monday")
    site.source.run(f"zfs destroy {TREE}/www@monday && zfs snapshot {TREE}/www@monday")
    done = site.replicate(status=1)
    assert "already has a snapshot @monday that is another one" in done.stderr
    site.source.run(f"zfs destroy {TREE}/www#monday")
    done = site.replicate(status=1)
    assert "no snapshot in common" in done.stderr
    assert names(site.backup, f"{MIRROR}/www") == ["monday"]


def test_newer_local_snapshot_is_refused(site: Site) -> None:
    site.plant("www")
    site.snapshot("monday")
    site.replicate()
    site.backup.run(f"zfs snapshot {MIRROR}/www@mine")
    site.replicate_silently()
    site.snapshot("tuesday")
    done = site.replicate(status=1)
    assert f"{MIRROR}/www has 1 local snapshot newer than the newest common one (@monday)" in done.stderr
    assert names(site.backup, f"{MIRROR}/www") == ["monday", "mine"]
    assert names(site.backup, MIRROR) == ["monday", "tuesday"]
    assert f"{TREE}/www@monday" in held(site.source, TREE, TAG)
    assert f"{TREE}/www@tuesday" not in held(site.source, TREE, TAG)


def test_local_change_is_refused_by_zfs_and_explained(site: Site) -> None:
    site.plant("www")
    site.snapshot("monday")
    site.replicate()
    site.backup.run(
        f"zfs set readonly=off {MIRROR}/www && zfs mount {MIRROR}/www && echo mine > /{MIRROR}/www/mine && zfs umount {MIRROR}/www"
    )
    site.snapshot("tuesday")
    done = site.replicate(status=1)
    assert "has been modified" in done.stderr
    assert names(site.backup, f"{MIRROR}/www") == ["monday"]
    assert held(site.source, f"{TREE}/www", TAG) == {f"{TREE}/www@monday"}
    assert names(site.backup, MIRROR) == ["monday", "tuesday"]


def test_failed_parent_keeps_its_children_waiting_and_says_so(site: Site) -> None:
    site.plant("www/logs")
    site.snapshot("monday")
    site.backup.run(f"zfs create -p {MIRROR} && zfs create -V 16M {MIRROR}/www")
    done = site.replicate(status=1)
    assert f"the source has a filesystem, but {MIRROR}/www is a volume" in done.stderr
    assert f"{MIRROR}/www/logs" in done.stderr
    assert names(site.backup, MIRROR) == ["monday"]


def test_missing_dataset_missing_pool_and_missing_zfs_stop_before_the_start(site: Site) -> None:
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
