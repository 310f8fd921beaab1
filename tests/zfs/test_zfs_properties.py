"""Properties on real ZFS: what a mirror takes over and what it never does, and what a restore gives back."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from site_pair import DISK, MIRROR, PROGRAM, TREE, get, held

if TYPE_CHECKING:
    from lab import Machine
    from site_pair import Site

pytestmark = pytest.mark.zfs

# From OpenZFS 2.3 on, sa is what xattr=on means, and is shown as that.
TAKEN_OVER = {
    "compression": "gzip-3", "recordsize": "32768", "checksum": "sha512", "copies": "2", "xattr": "sa",
    "acltype": "posix", "aclinherit": "passthrough", "atime": "off", "dnodesize": "auto", "primarycache": "metadata",
    "secondarycache": "none", "logbias": "throughput", "sync": "disabled", "redundant_metadata": "most",
    "snapdir": "visible", "overlay": "off", "exec": "off",
    "com.example:owner": "us and them",
}  # fmt: skip
LIMITS = {"quota": "1073741824", "refquota": "900000000", "reservation": "20000000", "refreservation": "10000000"}
SWITCHES = {
    "setuid": "off",
    "devices": "off",
    "volmode": "none",
    "snapdev": "hidden",
    "org.openzfs.systemd:ignore": "on",
}
NOT_TAKEN_OVER = {
    "mountpoint": "/srv/elsewhere", "canmount": "on", "readonly": "off", "sharenfs": "on", "volmode": "dev",
    "snapdev": "visible", "filesystem_limit": "7", "snapshot_limit": "8", "org.openzfs.systemd:wanted-by": "a.target",
    "zfs_replicate:failing": "0 offsite/virt/machines", **LIMITS,
}  # fmt: skip
OF_OUR_OWN = {
    "readonly", "canmount", "mountpoint", "sharenfs", "sharesmb", "zoned", "filesystem_limit", "snapshot_limit",
    "org.openzfs.systemd:wanted-by", "zfs_replicate:failing", *SWITCHES, *LIMITS,
}  # fmt: skip
FIXED = ("type", "volblocksize", "volsize", "normalization", "utf8only", "casesensitivity")

UNLIMITED = "none"
FORMERLY = str(2**64 - 1)
"""As -p prints that there is no limit: so since OpenZFS 2.4, and as a number before."""

Values = dict[str, dict[str, str]]
"""The values of properties by name, of datasets by their name below the tree."""


def values(machine: Machine, tree: str, *options: str) -> Values:
    command = f"zfs get -Hp -r -t filesystem,volume -o name,property,value {' '.join(options)} all {tree}"
    found: Values = {}
    for line in machine.run(command).stdout.splitlines():
        name, key, value = line.split("\t")
        if key not in ("filesystem_count", "snapshot_count"):
            found.setdefault(name[len(tree) :], {})[key] = UNLIMITED if value == FORMERLY else value
    return found


def said(machine: Machine, tree: str) -> Values:
    """What was said of each dataset by `zfs set`, or by a stream."""
    return values(machine, tree, "-s local,received")


def share_by_nfs(machine: Machine) -> None:
    """All that zfs wants of an NFS server is this program; what it shares is then in a file."""
    machine.run("printf '#!/bin/sh\\n' > /usr/sbin/exportfs && chmod 755 /usr/sbin/exportfs && sync")


def mounts_and_shares(machine: Machine) -> str:
    return machine.run("cut -d ' ' -f 2 /proc/mounts; cat /etc/exports.d/zfs.exports").stdout


def plant(site: Site) -> None:
    """A tree with all kinds of properties; `cold` has what cannot be done on a machine without Samba."""
    for machine in (site.source, site.backup):
        share_by_nfs(machine)
    site.plant("www", "www/logs")
    odd = " ".join(f"-o '{key}={value}'" for key, value in {**TAKEN_OVER, **NOT_TAKEN_OVER}.items())
    site.source.run(
        f"zfs create -o normalization=formD {odd} {TREE}/odd && "
        f"zfs create -s -V 24M -o volblocksize=32K -o compression=zstd {TREE}/thin && "
        f"zfs create -o canmount=off {TREE}/cold && zfs set sharesmb=on {TREE}/cold && "
        f"zfs set sharenfs=rw,no_root_squash {TREE}/www && "
        "echo of value > /srv/elsewhere/file && setfacl -m u:daemon:r /srv/elsewhere/file && "
        "setfattr -n user.example -v 'a b' /srv/elsewhere/file"
    )


def assert_mirrored(site: Site, own: Values) -> None:
    """All that was said at the source is here, but what a mirror has of its own; `own` is the administrator's."""
    theirs, ours = values(site.source, TREE), values(site.backup, MIRROR)
    wanted = said(site.source, TREE)
    assert theirs.keys() == ours.keys() == {"", "/cold", "/disk", "/odd", "/thin", "/www", "/www/logs"}
    for child, here in ours.items():
        kept = own.get(child, {})
        taken = {key: value for key, value in wanted.get(child, {}).items() if key not in OF_OUR_OWN}
        taken.update({key: theirs[child][key] for key in FIXED if key in theirs[child]})
        expected = {"readonly": "on", "reservation": "0", "refreservation": "0", **SWITCHES}
        assert {"org.openzfs.systemd:wanted-by", "zfs_replicate:failing"}.isdisjoint(here), child
        if here["type"] == "volume":
            del expected["setuid"], expected["devices"]
        if here["type"] == "filesystem":
            expected.update(canmount="noauto", mounted="no", sharenfs="off", sharesmb="off", quota="0", refquota="0")
            expected.update(zoned="off", snapshot_limit=UNLIMITED, filesystem_limit=UNLIMITED)
            expected.update(mountpoint=f"/{MIRROR}{child}")
        expected = {**taken, **expected, **kept}
        assert {key: here[key] for key in expected} == expected, child


def assert_neither_mounted_nor_shared(machine: Machine, *but: str) -> None:
    """Though the pool's own filesystem is both."""
    lines = mounts_and_shares(machine).splitlines()
    assert "/offsite" in lines
    assert any(line.startswith("/offsite *(") for line in lines), lines
    assert [line for line in lines if MIRROR in line or line.startswith("/srv")] == list(but)


def test_properties_that_a_mirror_takes_over_and_never_does(site: Site) -> None:
    """Below a pool that is shared, over increments and a boot, with changes at the source and here."""
    plant(site)
    site.backup.run("zfs set sharenfs=on offsite")
    site.snapshot("monday")
    site.replicate_silently()
    taken = said(site.backup, MIRROR)["/odd"]
    assert {key: taken[key].replace("on", "sa") if key == "xattr" else taken[key] for key in TAKEN_OVER} == TAKEN_OVER
    assert_mirrored(site, {})

    site.source.run(
        f"zfs set recordsize=64K mountpoint=/srv/other sharenfs=ro quota=2G com.example:owner=them {TREE}/odd && "
        f"zfs inherit atime {TREE}/odd && zfs set mountpoint=/srv/late sharenfs=on quota=3G {TREE}/www/logs && "
        f"zfs set volsize=32M {TREE}/disk && zfs set volsize=16M refreservation=1M {TREE}/thin"
    )
    own = {"/odd": {"compression": "zstd", "refquota": "5000000000"}, "/thin": {"checksum": "sha256"}}
    for child, pairs in own.items():
        site.backup.run(f"zfs set {' '.join(f'{key}={value}' for key, value in pairs.items())} {MIRROR}{child}")
    for day in ("tuesday", "wednesday"):
        site.snapshot(day)
        site.replicate_silently()
        assert_mirrored(site, own)
    asked = "recordsize,com.example:owner,atime,copies"
    assert get(site.backup, asked, f"{MIRROR}/odd") == ["65536", "them", "on", "2"]
    assert [get(site.backup, "volsize", f"{MIRROR}/{name}") for name in ("disk", "thin")] == [
        ["33554432"],
        ["16777216"],
    ]

    site.backup.power_loss()
    site.backup.power_on()
    share_by_nfs(site.backup)
    site.backup.run("zfs mount -a && zfs share -a")
    assert_neither_mounted_nor_shared(site.backup)
    assert_mirrored(site, own)
    site.backup.run(f"zfs set canmount=on {MIRROR}/odd && zfs mount {MIRROR}/odd && zfs share -a")
    assert_neither_mounted_nor_shared(site.backup, f"/{MIRROR}/odd")


README = (PROGRAM.parent / "README.md").read_text(encoding="utf-8")
RESTORE = README.partition("\n## Restore\n")[2].partition("\n## ")[0]


def commands(word: str) -> list[str]:
    """The commands of the section on restoring, of the block in which `word` stands."""
    blocks = re.findall(r"(?:^    .*\n)+", RESTORE, re.MULTILINE)
    (block,) = [block for block in blocks if word in block]
    return [line.strip().replace("HOST", "source") for line in block.splitlines()]


@pytest.mark.full
def test_readme_restore(site: Site) -> None:
    plant(site)
    site.snapshot("monday")
    site.replicate_silently("--set", "recordsize=16K")
    site.write("two", "www", "www/logs")
    site.source.run(f"zfs set mountpoint=/srv/late quota=3G {TREE}/www/logs && zfs set volsize=32M {TREE}/disk")
    site.snapshot("tuesday")
    site.replicate_silently()
    site.backup.run(f"zfs set copies=3 quota=5G {MIRROR}/odd")

    def state() -> list[object]:
        attributes = "cd /srv/elsewhere && getfacl file && getfattr -d file && cat file"
        seen = [line for line in mounts_and_shares(site.source).splitlines() if "backuppool" in line or "/srv/" in line]
        return [said(site.source, TREE), sorted(seen), site.source.run(attributes).stdout]

    before, checksums = state(), site.checksums(site.source, TREE)
    assert f"/{TREE}/www *(" in str(before)
    assert "/srv/elsewhere *(" in str(before)
    site.source.run(f"zpool destroy -f backuppool && zpool create -f -O compression=lz4 backuppool {DISK}-part1")
    for command in commands("zfs send -R"):
        site.backup.run(command.replace("SNAPSHOT", "tuesday"), timeout=300)
    assert state() == before
    assert site.checksums(site.source, TREE) == checksums

    site.snapshot("wednesday")
    site.replicate_silently()
    site.assert_in_step()
    assert held(site.source, TREE, "offsite:received") == set()
