"""The measurements of tests/bench: each a table of what was measured in this one run."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Callable

from lab import Lab, say
from lab_image import CACHE
from site_pair import JOB, TREE, Pair, Site, logins_and_commands

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import Machine

TOOLS = CACHE / "peers"
"""What others made, as fetched from Debian and from PyPI."""

PACKAGES = ("sanoid", "libcapture-tiny-perl", "libconfig-inifiles-perl")
WHEELS = ("bzfs==1.25.0", "zfs-autobackup==3.3", "colorama==0.4.6")


@dataclass(frozen=True)
class Contender:
    """A tool, and its line that brings the tree below `target` up to date; what it needs once at the source."""

    name: str
    line: str
    prepare: str = ""


CONTENDERS = (
    Contender("zfs_replicate", JOB.replace("offsite/virt/machines", "offsite/ours/machines")),
    Contender("syncoid", f"syncoid --quiet --recursive --no-sync-snap root@source:{TREE} offsite/syncoid"),
    Contender("bzfs", f"python3 -m bzfs_main.bzfs --quiet --recursive root@source:{TREE} offsite/bzfs"),
    Contender(
        "zfs-autobackup",
        "python3 -m zfs_autobackup.ZfsAutobackup --no-progress --no-snapshot --no-thinning --clear-mountpoint "
        "--ssh-source source job offsite/autobackup",
        f"zfs set autobackup:job=true {TREE}",
    ),
)


def fetch_tools() -> list[Path]:
    """Packages and wheels of the others, cached."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    if not (TOOLS / "complete").exists():
        say("fetching the other tools (once)")
        for words in (
            ("apt-get", "-q", "download", *PACKAGES),
            (sys.executable, "-m", "pip", "-q", "download", "--no-deps", *WHEELS),
        ):
            subprocess.run(words, cwd=TOOLS, check=True, stdout=subprocess.DEVNULL)
        (TOOLS / "complete").touch()
    return sorted(path for path in TOOLS.iterdir() if path.suffix in (".deb", ".whl"))


def install_tools(machine: Machine) -> None:
    """On the backup machine; the packages are scripts, whatever the release."""
    for path in fetch_tools():
        subprocess.run([*machine.ssh_command(), f"cat > /root/{path.name}"], stdin=path.open("rb"), check=True)
    machine.run(
        "dpkg -i --force-depends /root/*.deb >/dev/null 2>&1; for it in /root/*.whl; do python3 -m zipfile -e $it /opt/peers; done"
    )
    machine.run("command -v syncoid && PYTHONPATH=/opt/peers python3 -m bzfs_main.bzfs --version")


@dataclass
class Effort:
    """What a run took: seconds, logins and commands at the source, processes started on both machines."""

    seconds: float
    logins: int
    commands: int
    processes: int


def timed(site: Site, line: str) -> Effort:
    """Run a line on the backup machine; by its own clock."""
    before = logins_and_commands(site.source), processes(site)
    script = f"export PYTHONPATH=/opt/peers; s=$(date +%s%N); {line} >/root/said 2>&1; r=$?; e=$(date +%s%N); echo $r $((e-s))"
    status, nanoseconds = site.backup.run(script, timeout=7200).stdout.split()
    if status != "0":
        raise SystemExit(f"{line}: exit {status}: {site.backup.read('/root/said')}")
    after = logins_and_commands(site.source), processes(site)
    (logins, commands), (logins_now, commands_now) = before[0], after[0]
    return Effort(int(nanoseconds) / 1e9, logins_now - logins, commands_now - commands, after[1] - before[1])


def processes(site: Site) -> int:
    """Started since the boot, on both machines."""
    script = "awk '/^processes/ {print $2}' /proc/stat"
    return sum(int(machine.run(script).stdout) for machine in (site.source, site.backup))


def grow(site: Site, datasets: int) -> None:
    site.source.run(f"zfs create -p {TREE} && for i in $(seq {datasets}); do zfs create {TREE}/d$i; done", timeout=3600)


def change(site: Site, datasets: int, name: str) -> None:
    """Some kilobytes in each of the first datasets, and a snapshot of all, called as zfs-autobackup wants it."""
    site.source.run(
        f"for i in $(seq {datasets}); do head -c 20k /dev/urandom > /{TREE}/d$i/{name}; done; "
        f"zfs snapshot -r {TREE}@job-{name}",
        timeout=3600,
    )


def distance(release: str = "bookworm", datasets: str = "50") -> None:
    """Nothing new, and increments of one dataset and of all, at 0, 20 and 100 ms of round trip."""
    many = int(datasets)
    with machines(release) as site:
        install_tools(site.backup)
        site.backup.run("zfs create offsite/autobackup; zfs create offsite/bzfs")  # these want their target to be there
        grow(site, many)
        change(site, many, "20260101000000")
        for it in CONTENDERS:
            site.source.run(it.prepare or "true")
            say(f"first pull: {it.name}: {timed(site, it.line).seconds:.0f} s")
        day = 0
        rows: dict[tuple[str, int], dict[str, Effort]] = {}
        for delay in (0, 20, 100):
            site.source.netem(delay_ms=delay)
            for what, count in (("nothing new", 0), ("1 of them changed", 1), (f"all {many} changed", many)):
                if count:
                    day += 1
                    change(site, count, f"202601{day + 1:02}000000")
                for it in CONTENDERS:
                    effort = timed(site, it.line)
                    say(f"{delay} ms, {what}, {it.name}: {effort}")
                    rows.setdefault((what, delay), {})[it.name] = effort
        site.source.netem()
    print(f"{many + 1} datasets, {release}; seconds, logins / commands at the source / processes on both sides")
    print(f"{'':<28}" + "".join(f"{it.name:>26}" for it in CONTENDERS) + f"{'best other / ours':>20}")
    for (what, delay), found in sorted(rows.items()):
        cells = [f"{it.seconds:.1f} s {it.logins}/{it.commands}/{it.processes}" for it in found.values()]
        others = min(it.seconds for name, it in found.items() if name != CONTENDERS[0].name)
        ratio = others / found[CONTENDERS[0].name].seconds
        print(f"{what + f', {delay} ms':<28}" + "".join(f"{cell:>26}" for cell in cells) + f"{ratio:>20.1f}")


@contextlib.contextmanager
def machines(release: str) -> Iterator[Site]:
    with Lab() as lab, Pair(lab, release) as pair:
        yield pair.fresh()


MEASURED = r"""
import resource, subprocess, sys, time
began = time.monotonic()
status = subprocess.call(sys.argv[1:])
print(f"{time.monotonic() - began:.2f} {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024}")
sys.exit(status)
"""


def growth(release: str = "trixie") -> None:
    """A run that finds nothing to do, beside `zfs list` of both sides, as a tree grows."""
    print(f"{release}: a run that finds nothing to do")
    print(f"{'datasets':>9}{'snapshots':>11}{'seconds':>9}{'zfs list':>10}{'ratio':>7}{'MiB':>6}{'commands':>10}")
    for datasets, each in ((10, 10), (100, 10), (1000, 1), (100, 100), (100, 1000)):
        with machines(release) as site:
            grow(site, datasets - 1)
            site.source.write("/root/many.lua", MANY)
            site.source.run(
                f"zfs list -H -o name -r {TREE} | while read -r name; do "
                f"zfs program -t 1000000000000 -m 104857600 backuppool /root/many.lua $name {each} || exit; done",
                timeout=7200,
            )
            line = f"{JOB} -I"
            say(f"{datasets} datasets, {datasets * each} snapshots: first pull: {timed(site, line).seconds:.0f} s")
            columns = "name,type,guid,createtxg,creation,userrefs,receive_resume_token,encryption,origin,compression"
            listing = f"zfs list -Hp -r -t all -o {columns} %s >/dev/null"
            seconds = []
            for machine, root in ((site.source, TREE), (site.backup, "offsite/virt/machines")):
                script = f"s=$(date +%s%N); {listing % root}; e=$(date +%s%N); echo $((e-s))"
                seconds.append(int(machine.run(script, timeout=3600).stdout) / 1e9)
            before = logins_and_commands(site.source)[1]
            took, memory = site.backup.run(f"python3 -c '{MEASURED}' {line}", timeout=3600).stdout.split()
            commands = logins_and_commands(site.source)[1] - before
            print(
                f"{datasets:>9}{datasets * each:>11}{float(took):>9.1f}{max(seconds):>10.1f}"
                f"{float(took) / max(seconds):>7.1f}{memory:>6}{commands:>10}",
                flush=True,
            )


MANY = """args = ...
for i = 1, tonumber(args["argv"][2]) do zfs.sync.snapshot(args["argv"][1] .. "@autosnap_" .. i) end
"""


def main(what: str = "", *more: str) -> int:
    parts: dict[str, Callable[..., None]] = {"distance": distance, "growth": growth}
    if what not in parts:
        print(f"usage: tests/bench {'|'.join(parts)}", file=sys.stderr)
        return 2
    parts[what](*more)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
