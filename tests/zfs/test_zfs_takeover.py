"""Mirrors that other tools made, with what an administrator set there: after the first run of ours as inert as one of
ours, with all that was set locally, and never mounted or shared on the way."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from bench import install_tools
from site_pair import TREE, get, history

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lab import Machine
    from site_pair import Point, Site

pytestmark = pytest.mark.zfs

CHILDREN = ("", "/www", "/jail", "/disk")
SNAPSHOT = "job-20260101000000"
"""Called as zfs-autobackup wants it."""


@dataclass(frozen=True)
class Kind:
    """A tool, and the line that makes its mirror of the tree, `offsite/NAME/machines`; whether that is `mounted`."""

    name: str
    line: str
    mounted: bool

    @property
    def mirror(self) -> str:
        return f"offsite/{self.name}/machines"

    @property
    def job(self) -> str:
        """The crontab line that takes it over."""
        return f"zfs_replicate -h source -r {TREE} -l {self.mirror} -t {self.name}"


def by_hand(name: str, options: str) -> str:
    """A receive of each dataset, without properties."""
    each = f"ssh source zfs send {TREE}$child@{SNAPSHOT} | zfs recv {options} offsite/{name}/machines$child"
    return f"for child in '' {' '.join(CHILDREN[1:])}; do {each} || exit; done"


MOUNTED = Kind("mounted", by_hand("mounted", ""), mounted=True)
LIKE_ZREPL = Kind("unmounted", f"zfs set readonly=on offsite/unmounted && {by_hand('unmounted', '-u')}", mounted=False)
SYNCOID = Kind(
    "syncoid", f"syncoid --quiet --recursive --no-sync-snap root@source:{TREE} offsite/syncoid/machines", mounted=True
)
BZFS = Kind(
    "bzfs", f"python3 -m bzfs_main.bzfs --quiet --recursive root@source:{TREE} offsite/bzfs/machines", mounted=False
)
AUTOBACKUP = Kind(
    "autobackup",
    f"ssh source zfs set autobackup:job=true {TREE} && python3 -m zfs_autobackup.ZfsAutobackup --no-progress "
    "--no-snapshot --no-thinning --strip-path 2 --ssh-source source job offsite/autobackup",
    mounted=False,
)

FORGED = "\t".join(("offsite/mounted/machines", "/srv/forged", "on", "on", "off", *["on"] * 5, "-", "none"))
"""A row of what zed lists for the generator of mount units, as the value of a property: it is one, behind a newline."""


def plant(site: Site) -> None:
    """A tree that says all that a mirror must not do."""
    site.source.run(
        f"""
        zfs create -p {TREE} && zfs create -o compression=gzip-3 -o recordsize=16K {TREE}/www &&
        zfs create {TREE}/jail && zfs create -V 16M -o volmode=dev -o snapdev=visible {TREE}/disk && udevadm settle &&
        head -c 300000 /dev/urandom > /{TREE}/www/file && head -c 1000 /dev/urandom > /{TREE}/jail/file &&
        dd if=/dev/urandom of=/dev/zvol/{TREE}/disk bs=64k count=10 oflag=direct status=none &&
        zfs set sharenfs=on canmount=on com.example:owner=them atime=on {TREE} &&
        zfs set mountpoint=/srv/x canmount=on quota=1G refquota=900M snapshot_limit=100 filesystem_limit=100 \
            setuid=on devices=on volmode=dev snapdev=visible org.openzfs.systemd:wanted-by=multi-user.target \
            org.openzfs.systemd:required-by=multi-user.target {TREE}/www &&
        zfs set mountpoint=/srv/jail {TREE}/jail && zfs set zoned=on {TREE}/jail &&
        mkdir -p /{TREE}/www /{TREE}/jail  # or a tool that mounts the mirror would change it by making these
        """
    )
    words = ["zfs", "set", f"org.openzfs.systemd:requires=any\n{FORGED}", f"{TREE}/www"]
    site.source.run("xargs -0 env", input="\0".join(words))
    site.snapshot(SNAPSHOT)


LOCALLY = {
    "": {
        "compression": "zstd", "recordsize": "65536", "atime": "off", "quota": "5000000000",
        "com.example:owner": "two words",
    },
    "/www": {
        "compression": "zstd", "mountpoint": "/srv/own", "exec": "off", "sharenfs": "off",
        "com.example:owner": "us\tand\nthem",
    },
    "/disk": {"compression": "zstd", "checksum": "sha256", "com.example:owner": ""},
}  # fmt: skip
"""What the administrator set in each mirror."""


def own(kind: Kind, child: str) -> dict[str, str]:
    """But to move a mounted one would remove the directory where it was, which changes the dataset above it."""
    values = LOCALLY.get(child, {})
    if kind.mounted:
        return {key: value for key, value in values.items() if key != "mountpoint"}
    return {key: f"{value}/{kind.name}" if key == "mountpoint" else value for key, value in values.items()}


def set_locally(machine: Machine, kind: Kind) -> None:
    for child in LOCALLY:
        words = ["zfs", "set", *(f"{key}={value}" for key, value in own(kind, child).items()), kind.mirror + child]
        machine.run("xargs -0 env", input="\0".join(words))


NO_LIMIT = "none"
FORMERLY = str(2**64 - 1)
"""What `zfs get -p` prints for that, before OpenZFS 2.3 or 2.4."""

INERT = {
    "readonly": "on", "reservation": "0", "refreservation": "0", "volmode": "none", "snapdev": "hidden",
    "snapshot_limit": NO_LIMIT, "org.openzfs.systemd:requires": "-", "org.openzfs.systemd:wanted-by": "-",
    "org.openzfs.systemd:required-by": "-",
}  # fmt: skip
INERT_FILESYSTEM = {
    "canmount": "noauto", "mounted": "no", "sharenfs": "off", "sharesmb": "off", "zoned": "off", "quota": "0",
    "refquota": "0", "filesystem_limit": NO_LIMIT,
}  # fmt: skip

ROW = re.compile(
    r"^(offsite[^\t]*)\t([^\t]+)\t(.*?)\t(local|default|received|temporary|-|inherited from [^\n]+)\n(?=offsite|\Z)",
    re.MULTILINE | re.DOTALL,
)
"""A line of `zfs get`, whatever is in the value."""


def values_here(machine: Machine) -> dict[tuple[str, str], tuple[str, str]]:
    """By dataset and property the value, and where it is from."""
    keys = sorted({*INERT, *INERT_FILESYSTEM, "mountpoint", *(key for values in LOCALLY.values() for key in values)})
    listing = machine.run(
        f"zfs get -Hp -r -t filesystem,volume -o name,property,value,source {','.join(keys)} offsite"
    ).stdout
    return {
        (name, key): (value.replace(FORMERLY, NO_LIMIT), source) for name, key, value, source in ROW.findall(listing)
    }


def assert_inert(machine: Machine, kinds: Iterable[Kind]) -> None:
    """Nothing the source says comes into force but as data; what was set here is set here."""
    found = values_here(machine)
    for kind in kinds:
        for child in CHILDREN:
            expected = dict(INERT)
            if child != "/disk":
                expected.update(INERT_FILESYSTEM, mountpoint=f"/bk/{kind.name}/machines{child}")
            expected.update(own(kind, child))
            here = {key: found[kind.mirror + child, key] for key in expected}
            assert {key: value for key, (value, _) in here.items()} == expected, (kind.name, child)
            assert {here[key][1] for key in own(kind, child)} <= {"local"}, (kind.name, child)
    nodes = machine.run("udevadm settle; find /dev/zvol -type l 2>/dev/null; true").stdout.split()
    assert [node for node in nodes if node.startswith(tuple(f"/dev/zvol/{kind.mirror}" for kind in kinds))] == []


def assert_in_step(site: Site, kinds: Iterable[Kind], before: dict[str, dict[str, list[Point]]]) -> None:
    for kind in kinds:
        site.assert_in_step(mirror=kind.mirror, tag=kind.name)
        now = history(site.backup, kind.mirror)
        for child, points in before[kind.name].items():
            assert points == now[child][: len(points)], f"gone from {kind.mirror}{child}"


EXPORTFS = """\
#!/bin/sh
cat /etc/exports.d/zfs.exports >> /root/shared 2>/dev/null
true
"""
LISTED = (
    "ZEVENT_POOL=offsite ZEVENT_SUBCLASS=history_event ZEVENT_HISTORY_INTERNAL_NAME=import ZEVENT_HISTORY_DSNAME=offsite "
    "ZED_ZEDLET_DIR=/etc/zfs/zed.d ZFS=zfs ZED_LOCKDIR=/run sh /usr/lib/zfs-linux/zed.d/history_event-zfs-list-cacher.sh"
)
"""What zed does at each change in the pool."""
UNITS = "grep -rl '^What=offsite' /run/systemd/generator* | sed 's|.*/||'"


def prepare(machine: Machine) -> None:
    """A pool that is shared and mounted elsewhere; a program that notes what is shared; a list for the generator.

    Without atime: to mount a child reads the directory below, which would change what is mounted above it.
    """
    machine.write("/usr/sbin/exportfs", EXPORTFS, 0o755)
    machine.run(
        "mkdir -p /etc/zfs/zfs-list.cache && touch /etc/zfs/zfs-list.cache/offsite && "
        "zfs set mountpoint=/bk sharenfs=on atime=off offsite"
    )


def of_mirrors(lines: str) -> set[str]:
    """Of lines of mounts or exports, those of mirrors, or of places that the source names."""
    return {line for line in lines.splitlines() if re.search("machines|/srv/", line)}


def mounts_and_shares(machine: Machine) -> set[str]:
    return of_mirrors(machine.run("grep ' zfs ' /proc/mounts; cat /etc/exports.d/zfs.exports").stdout)


def run_watched(site: Site, kind: Kind, *options: str) -> None:
    """A run of ours which mounts nothing, and shares nothing that was not shared before."""
    before = site.backup.run("rm -f /root/shared; cat /etc/exports.d/zfs.exports").stdout
    watched = f"strace --seccomp-bpf -f -qq -e signal=none -e trace=mount,fsmount,move_mount -o /root/mounts {kind.job}"
    said = site.replicate(*options, job=watched).stderr
    assert ("rolling back to" in said) if options else not said, said
    assert site.backup.read("/root/mounts") == ""
    assert of_mirrors(site.backup.run("cat /root/shared; true").stdout) <= of_mirrors(before)


def take_over(site: Site, kinds: Sequence[Kind]) -> None:
    """Mirrors made by others, side by side; our runs, those of what is mounted with nothing new at first; a boot."""
    backup = site.backup
    plant(site)
    prepare(backup)
    for kind in kinds:
        backup.run(f"zfs create offsite/{kind.name} && export PYTHONPATH=/opt/peers && {kind.line}", timeout=300)
        set_locally(backup, kind)
    before = {kind.name: history(backup, kind.mirror) for kind in kinds}
    assert all([len(points) for points in before[kind.name].values()] == [1] * len(CHILDREN) for kind in kinds), before

    values = values_here(backup)
    for kind in (kind for kind in kinds if kind.mounted):
        run_watched(site, kind)
    assert values_here(backup) == values  # it might be the wrong host, and this the original
    for day in ("tuesday", "wednesday"):
        site.source.run(f"head -c 300000 /dev/urandom > /srv/x/{day} && zfs set com.example:day={day} {TREE}/www")
        site.snapshot(day)
        for kind in kinds:
            # zfs itself has changed one that it mounted: it makes the directories anew on which it mounts what is below.
            run_watched(site, kind, *(["--rollback"] if kind.mounted and day == "tuesday" else []))
        assert_inert(backup, kinds)
        assert_in_step(site, kinds, before)
    assert mounts_and_shares(backup) == set()

    backup.run(f"{LISTED} && grep -q machines /etc/zfs/zfs-list.cache/offsite && sync")
    backup.power_loss()
    backup.power_on()
    backup.run("systemctl daemon-reload && zfs mount -a && zfs share -a")
    assert mounts_and_shares(backup) == set()
    assert set(backup.run(UNITS).stdout.split()) == {"bk.mount", *(f"bk-{kind.name}.mount" for kind in kinds)}
    assert_inert(backup, kinds)


@pytest.mark.full
def test_take_over_of_mirrors_made_by_hand_and_as_zrepl_does(site: Site) -> None:
    take_over(site, (MOUNTED, LIKE_ZREPL))


@pytest.mark.full
def test_take_over_of_mirrors_made_by_other_tools(site: Site) -> None:
    install_tools(site.backup)
    take_over(site, (SYNCOID, BZFS, AUTOBACKUP))


@pytest.mark.full
def test_take_over_whose_first_increment_is_interrupted(site: Site) -> None:
    """What is resumed carries no properties: those of the increment after it are the first ones."""
    plant(site)
    prepare(site.backup)
    kind = LIKE_ZREPL
    site.backup.run(f"zfs create offsite/{kind.name} && {kind.line}")
    set_locally(site.backup, kind)
    before = {kind.name: history(site.backup, kind.mirror)}
    site.source.run("head -c 24M /dev/urandom > /srv/x/large")
    site.snapshot("tuesday")
    run = site.start(job=kind.job)
    site.backup.run("kill $(cat /run/job.pid)")
    run.communicate(timeout=120)
    site.source.netem()
    assert get(site.backup, "receive_resume_token", f"{kind.mirror}/www") != ["-"], history(site.backup, kind.mirror)
    for day in ("wednesday", "thursday"):
        site.replicate_silently(job=kind.job)
        assert_inert(site.backup, [kind])
        assert_in_step(site, [kind], before)
        site.snapshot(day)
