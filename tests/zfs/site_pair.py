"""Two machines and what the integration tests ask of them: build a tree, run the program, look at both pools.

What these helpers know about ZFS is written apart from the program, so that they can prove it wrong.
"""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from lab import MEMORY

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from lab import Lab, Machine

PROGRAM = Path(__file__).parents[2] / "zfs_replicate.py"
TREE = "backuppool/virt/machines"
MIRROR = "offsite/virt/machines"
TAG = "offsite"
JOB = f"zfs_replicate -h source -r {TREE} -l {MIRROR} -t {TAG}"
DISK = "/dev/disk/by-id/virtio-data"


class Pair(contextlib.AbstractContextManager["Pair"]):
    """A source and a backup machine."""

    def __init__(self, lab: Lab, release: str, backup_release: str | None = None, memory: int = MEMORY) -> None:
        self.lab, self.memory = lab, memory
        self.releases = (release, backup_release or release)
        self.source, self.backup = self.boot()

    def boot(self) -> tuple[Machine, Machine]:
        source, backup = (self.lab.machine(*it, self.memory) for it in zip(("source", "backup"), self.releases))
        return source, backup

    def replace(self) -> None:
        """New machines in place of these."""
        self.__exit__()
        self.source, self.backup = self.boot()

    @contextlib.contextmanager
    def third(self) -> Iterator[Machine]:
        """One more machine, for a chain."""
        machine = self.lab.machine("third", self.source.release)
        try:
            yield machine
        finally:
            machine.close()

    def __exit__(self, *exc: object) -> None:
        for machine in (self.source, self.backup):
            machine.close()

    def fresh(self) -> Site:
        """Both pools made anew, the program installed, both clocks right."""
        renew(self.source, "backuppool")
        renew(self.backup, "offsite")
        return Site(self, self.source, self.backup)


class Keeper:
    """Keeps a pair of machines as long as the next one that is asked for is of the same release."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.pair: Pair | None = None

    def pair_of(self, release: str) -> Pair:
        if self.pair is None or self.pair.releases != (release, release):
            self.clear()
            self.pair = Pair(self.lab, release)
        return self.pair

    def clear(self) -> None:
        if self.pair is not None:
            self.pair.__exit__()
            self.pair = None


ENTRY_POINT = """\
#!/usr/bin/python3
import sys
from zfs_replicate import main
sys.exit(main())
"""


def install(machine: Machine) -> None:
    """The program as pip leaves it: a compiled module beside the distribution's paramiko, and an entry point. Compiling
    it at every start, as the copied file does, takes these machines more than a second."""
    directory = machine.run("echo /usr/local/lib/python3*/dist-packages").stdout.strip()
    machine.put(PROGRAM, f"{directory}/zfs_replicate.py", 0o644)
    machine.run(f"python3 -m compileall -q {directory} && sync")
    machine.write("/usr/local/bin/zfs_replicate", ENTRY_POINT, 0o755)


def renew(machine: Machine, pool: str) -> None:
    """An empty pool on the data disk, and the program installed.

    The first pool partitions the disk. Later ones take the partition: partitioning anew races with udev.
    """
    if machine.run("test -e /usr/local/bin/zfs_replicate", check=False).returncode:
        install(machine)
    machine.run(
        "tc qdisc del dev lab0 root 2>/dev/null; rm -rf /run/zfs_replicate-*.lock /home/*/.local/state/zfs_replicate; "
        "for pool in $(zpool list -H -o name); do zpool destroy -f $pool; done; "
        # On a busy host udev may take the partition away for a moment just when the pool is to be opened.
        f"for try in 1 2 3; do disk={DISK}; [ -e $disk-part1 ] && disk=$disk-part1; "
        f"zpool create -f -O compression=lz4 {pool} $disk && break; udevadm settle; done; udevadm settle; zpool list {pool}",
    )
    machine.set_clock(datetime.now(timezone.utc))


@contextlib.contextmanager
def mounts_apart(machine: Machine) -> Iterator[str]:
    """What to put before a `zfs create` that is to mount where systemd does not see it, for at each mount that looks at
    all others, which is what takes longest of a hundred. Unmounted they would be worse: `zfs list` opens a filesystem
    anew for each of its snapshots."""
    machine.run("systemd-run -q --unit=apart -p PrivateMounts=yes sleep infinity")
    try:
        yield "nsenter -m -t $(systemctl show -P MainPID apart)"
    finally:
        machine.run("systemctl stop apart")


def logins_and_commands(machine: Machine) -> tuple[int, int]:
    """How often other machines have logged in here, and how many commands they have run."""
    log = machine.ssh_log()
    return sum(line.startswith("Accepted ") for line in log), sum(line.startswith("Starting ") for line in log)


def dataset_of(point: str) -> str:
    return point.partition("@")[0]


@dataclass
class Site:
    """One test's view of the two machines."""

    pair: Pair
    source: Machine
    backup: Machine

    def replicate(
        self, *options: str, status: int = 0, job: str = JOB, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run the crontab line, with more options, on the backup machine; it must exit with `status`."""
        done = self.backup.run(f"{job} {shlex.join(options)}", check=False, timeout=timeout)
        assert done.returncode == status, f"exit {done.returncode}, not {status}:\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    def replicate_silently(self, *options: str, job: str = JOB) -> None:
        """A run that succeeds, and prints nothing."""
        done = self.replicate(*options, job=job)
        assert done.stdout + done.stderr == ""

    def start(
        self, *options: str, after: int = 5_000_000, megabits: float = 5, job: str = JOB
    ) -> subprocess.Popen[str]:
        """Start a run; returns when `after` bytes have arrived on the backup pool.

        No more than `megabits` a second leave the source from now on, so that the stream is not over when we look.
        """
        self.source.netem(megabits=megabits)
        used = "$(zpool sync offsite; zfs get -Hp -o value used offsite)"
        before = self.backup.run(f"echo {used}").stdout.strip()
        running = self.backup.popen(f"echo $$ > /run/job.pid; exec {job} {shlex.join(options)}")
        self.backup.run(
            f"for i in $(seq 600); do [ $(({used} - {before})) -gt {after} ] && exit; done; exit 1", timeout=300
        )
        assert running.poll() is None, f"it ended too soon:\n{running.communicate()}"
        return running

    def plant(self, *children: str, size: str = "16M") -> None:
        """The tree with a file in each dataset: its root, the named children, and a volume `disk` of `size`."""
        lines = [f"zfs create -p {TREE}", f"zfs create -V {size} {TREE}/disk"]
        lines += [f"zfs create -p '{TREE}/{child}'" for child in children]
        self.source.run(" && ".join(lines))
        self.write("one", *children)

    def write(self, word: str, *children: str) -> None:
        """Change every dataset of the tree: a file called `word` in the filesystems, new bytes on the volume."""
        lines = [f"head -c 300000 /dev/urandom > '/{TREE}/{child}/{word}'" for child in ("", *children)]
        lines.append(f"dd if=/dev/urandom of=/dev/zvol/{TREE}/disk bs=64k count=10 oflag=direct status=none")
        self.source.run(f"udevadm settle && {' && '.join(lines)}")

    def snapshot(self, name: str, dataset: str = TREE, flags: str = "-r") -> None:
        self.source.run(f"zfs snapshot {flags} {shlex.quote(f'{dataset}@{name}')}")

    def assert_in_step(
        self, source: Machine | None = None, tree: str = TREE, mirror: str = MIRROR, tag: str = TAG
    ) -> None:
        """Each dataset of the source ends, by guid, in a local snapshot, and our holds are where they belong."""
        theirs = history(source or self.source, tree)
        ours = history(self.backup, mirror)
        assert theirs, f"nothing listed below {tree}"
        for key, snapshots in theirs.items():
            if not snapshots:
                continue
            assert snapshots[-1].guid in {it.guid for it in ours[key]}, f"{mirror}{key} lacks {snapshots[-1]}"
        assert held(source or self.source, tree, tag) == {
            mutual(snapshots, ours.get(key, [])) for key, snapshots in theirs.items() if snapshots
        }
        ours_held = {
            name for name in held(self.backup, mirror, f"{tag}:received") if dataset_of(name)[len(mirror) :] in theirs
        }
        wanted = {mutual(ours[key], snapshots) for key, snapshots in theirs.items() if snapshots}
        assert ours_held == wanted, f"not held: {wanted - ours_held}; held: {ours_held - wanted}"

    def checksums(self, machine: Machine, tree: str) -> str:
        """Checksums of all files in the newest snapshots of a tree, and of its volumes, at paths below it."""
        return machine.run(CHECKSUMS, input=tree, timeout=300).stdout


CHECKSUMS = r"""
tree=$(cat); top=$(mktemp -d); udevadm settle
zfs list -H -r -o name,type -t filesystem,volume "$tree" | while IFS="$(printf '\t')" read -r name type; do
    below=${name#"$tree"}
    if [ "$type" = volume ]; then
        mode=$(zfs get -H -o value volmode "$name")
        if [ "$mode" = none ]; then  # of a mirror: it has no device to read from
            zfs set volmode=dev "$name"
            for i in $(seq 100); do [ -e "/dev/zvol/$name" ] && break; sleep 0.1; done
        fi
        sha256sum < "/dev/zvol/$name" | sed "s| -| $below|"
        if [ "$mode" = none ]; then zfs set volmode=none "$name"; fi
    else
        last=$(zfs list -H -d 1 -t snapshot -o name -s createtxg "$name" | tail -n 1)
        mount -t zfs -o ro "$last" "$top"
        (cd "$top" && find . -type f -exec sha256sum {} + | sort -k 2 | sed "s|  \.|  $below|")
        umount "$top"
    fi
done
"""


@dataclass(frozen=True, order=True)
class Point:
    """A snapshot as a test sees it, ordered by createtxg."""

    createtxg: int
    guid: int
    name: str


def history(machine: Machine, tree: str) -> dict[str, list[Point]]:
    """The snapshots of each dataset of a tree, oldest first, by the dataset's name below the tree."""
    listing = machine.run(
        f"zfs list -Hp -r -t filesystem,volume,snapshot -o name,createtxg,guid {shlex.quote(tree)}", timeout=900
    )
    found: dict[str, list[Point]] = {}
    for line in listing.stdout.splitlines():
        name, createtxg, guid = line.split("\t")
        points = found.setdefault(dataset_of(name)[len(tree) :], [])
        if "@" in name:
            points.append(Point(int(createtxg), int(guid), name))
    return {key: sorted(points) for key, points in found.items()}


def mutual(own: list[Point], others: list[Point]) -> str:
    """The name, among `own`, of the newest one that is also among `others`."""
    guids = {point.guid for point in others}
    return next((point.name for point in reversed(own) if point.guid in guids), "")


def names(machine: Machine, dataset: str) -> list[str]:
    """The snapshots of one dataset, oldest first, without its name."""
    return [point.name.partition("@")[2] for point in history(machine, dataset)[""]]


def get(machine: Machine, properties: str, dataset: str) -> list[str]:
    """The values of some properties of a dataset."""
    return machine.run(f"zfs get -Hp -o value {properties} '{dataset}'").stdout.splitlines()


def held(machine: Machine, tree: str, tag: str) -> set[str]:
    """The snapshots of a tree that carry `tag`."""
    return set(holds(machine, tree).get(tag, ()))


def holds(machine: Machine, tree: str) -> dict[str, list[str]]:
    """The held snapshots of a tree, by tag."""
    found: dict[str, list[str]] = {}
    for line in iter_holds(machine, tree):
        name, tag, _ = line.split("\t")
        found.setdefault(tag, []).append(name)
    return found


def iter_holds(machine: Machine, tree: str) -> Iterator[str]:
    command = (
        f"zfs list -Hp -r -t snapshot -o userrefs,name {shlex.quote(tree)} | grep -v '^0\t' | cut -f 2 | "
        "tr '\\n' '\\0' | xargs -0 -r zfs holds -H"
    )
    yield from machine.run(command, timeout=900).stdout.splitlines()
