"""The measurements of tests/bench: each a table of what was measured in this one run."""

from __future__ import annotations

import contextlib
import queue
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Callable

import paths
from lab import LARGE_MEMORY, MEMORY, Lab, say
from lab_image import CACHE
from site_pair import JOB, MIRROR, TREE, Pair, Site, logins_and_commands, mounts_apart

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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
        "--ssh-config /root/shared --ssh-source source job offsite/autobackup",
        f"zfs set autobackup:job=true {TREE}",
    ),
)
OURS = 1
"""As many of them are ours."""

SHARED = """\
Include ~/.ssh/config
ControlMaster auto
ControlPath /root/shared-%C
ControlPersist 3600
"""
"""The connection for many commands that the manual of zfs-autobackup recommends; the others make one by themselves."""


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


HANG_UP = 'for it in $(find /root /tmp -xdev -type s); do timeout 5 ssh -S "$it" -O exit there 2>/dev/null; done; true'
"""Runs are hours apart: a connection that the last one left open for the next is closed."""


def timed(site: Site, line: str) -> Effort:
    """Run a line on the backup machine; by its own clock."""
    site.backup.run(HANG_UP)
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
    """Some kilobytes in each of the first datasets, and a snapshot of them, called as zfs-autobackup wants it."""
    site.source.run(
        f"for i in $(seq {datasets}); do head -c 20k /dev/urandom > /{TREE}/d$i/{name}; done; "
        f"zfs snapshot {'' if datasets == 1 else '-r'} {TREE}{'/d1' if datasets == 1 else ''}@job-{name}",
        timeout=3600,
    )


def distance(release: str = "bookworm", datasets: str = "50", *delays: str) -> None:
    """Nothing new, and increments of one dataset and of all, at 0, 20 and 100 ms of round trip."""
    many = int(datasets)
    with machines(release) as site:
        install_tools(site.backup)
        site.backup.run("zfs create offsite/autobackup; zfs create offsite/bzfs")  # these want their target to be there
        site.backup.write("/root/shared", SHARED)
        grow(site, many)
        change(site, many, "20260101000000")
        for it in CONTENDERS:
            site.source.run(it.prepare or "true")
            say(f"first pull: {it.name}: {timed(site, it.line).seconds:.0f} s")
        day = 0
        print(f"{many + 1} datasets, {release}")
        print(f"{'seconds':<20}{in_columns(it.name for it in CONTENDERS)}  best other / ours", flush=True)
        last: dict[str, list[Effort]] = {}  # of each kind of run; but for the seconds the distance does not matter
        for delay in map(int, delays or ("100", "0", "20")):
            site.source.netem(delay_ms=delay)
            for what, count in (("nothing new", 0), ("1 changed", 1), (f"{many + 1} changed", many)):
                if count:
                    day += 1
                    change(site, count, f"202601{day + 1:02}000000")
                last[what] = []
                for it in CONTENDERS:
                    say(f"{delay} ms, {what}: {it.name}")
                    last[what].append(timed(site, it.line))
                seconds = [effort.seconds for effort in last[what]]
                ratio = min(seconds[OURS:]) / seconds[0]
                row = in_columns(f"{it:.1f}" for it in seconds)
                print(f"{f'{what}, {delay} ms':<20}{row}{ratio:>19.1f}", flush=True)
        site.source.netem()
    for kind in ("logins", "commands", "processes"):
        print(f"{kind:<20}{in_columns(it.name for it in CONTENDERS)}")
        for what, efforts in last.items():
            print(f"{what:<20}{in_columns(str(getattr(effort, kind)) for effort in efforts)}")


def in_columns(cells: Iterable[str]) -> str:
    """One cell for each contender."""
    return "".join(f"{cell:>{max(len(it.name), 8) + 2}}" for cell, it in zip(cells, CONTENDERS))


@contextlib.contextmanager
def machines(release: str, memory: int = MEMORY) -> Iterator[Site]:
    with Lab() as lab, Pair(lab, release, memory=memory) as pair:
        yield pair.fresh()


STREAM_BYTES = 1 << 29
ROUNDS = 7
SSHD_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {home}/host
AuthorizedKeysFile {home}/user.pub
PidFile none
StrictModes no
UsePAM no
"""


def wire(rounds: str = str(ROUNDS)) -> None:
    """One big stream over a private sshd into `zstream dump`, which checks every record: seconds, and processor seconds
    of both ends."""
    tools = install_here()
    stream = a_real_stream()
    with tempfile.TemporaryDirectory(prefix="zfs_replicate-bench-") as home:
        port = prepare_sshd(Path(home))
        options = f"-p {port} -i {home}/user -o UserKnownHostsFile={home}/known -o BatchMode=yes -o LogLevel=ERROR"
        ssh, sink, cat = f"ssh {options}", f"{tools}/zstream dump", f"cat {stream}"
        pipelines = {
            "bare": f"{ssh} -o Compression=no -c aes128-gcm@openssh.com 127.0.0.1 {cat} | mbuffer -q -m 256M | {sink}",
            "zfs_replicate": f"{sys.executable} {__file__} ours {home} {port} {stream} '{sink}'",
            "syncoid": f"{ssh} 127.0.0.1 '{cat} | lzop | mbuffer -q -s 128k -m 16M' "
            f"| mbuffer -q -s 128k -m 16M | lzop -dfc | {sink}",
            "bzfs": f"{ssh} -c ^aes256-gcm@openssh.com 127.0.0.1 '{cat} | zstd -c -1 | mbuffer -s 1048576 -q -m 128M' "
            f"| mbuffer -s 1048576 -q -m 128M | zstd -dc | {sink}",
            "zfs-autobackup": f"{ssh} 127.0.0.1 {cat} | {sink}",  # and zettarepl's
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in pipelines}
        started: list[float] = []  # seconds of ours once Python has started
        for number in range(int(rounds) + 1):
            for name, line in pipelines.items():
                effort = carried(Path(home), port, line)
                say(
                    f"{'warm-up' if number == 0 else f'round {number}'}: {name}: {effort[0]:.2f} s, {effort[1]:.2f} s of processor"
                )
                if number:
                    found[name].append(effort)
            if number:
                started.append(float((Path(home) / "seconds").read_text()))
    print(f"{stream.stat().st_size / 2**20:.0f} MiB, {rounds} rounds in turn; medians; the ratios are of each round")
    print(f"{'':<16}{'seconds':>9}{'MiB/s':>8}{'processor s':>13}{'bare/it':>9}{'processor it/bare':>19}")
    for name, efforts in found.items():
        seconds, processor = (statistics.median(column) for column in zip(*efforts))
        speed = statistics.median(bare[0] / it[0] for bare, it in zip(found["bare"], efforts))
        cost = statistics.median(it[1] / bare[1] for bare, it in zip(found["bare"], efforts))
        print(
            f"{name:<16}{seconds:>9.2f}{stream.stat().st_size / 2**20 / seconds:>8.0f}{processor:>13.2f}"
            f"{speed:>9.2f}{cost:>19.2f}"
        )
    ratio = statistics.median(bare[0] / it for bare, it in zip(found["bare"], started))
    print(f"zfs_replicate, once Python has started: {statistics.median(started):.2f} seconds, bare/it {ratio:.2f}")


def carried(home: Path, port: int, line: str) -> tuple[float, float]:
    """Seconds of a pipeline, and of the processor, with an sshd that lives just as long."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with private_sshd(home, port):
        began = time.monotonic()
        subprocess.run(["bash", "-o", "pipefail", "-c", line], check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@contextlib.contextmanager
def private_sshd(home: Path, port: int) -> Iterator[None]:
    sshd = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", home / "config"], stderr=subprocess.DEVNULL)
    try:
        while subprocess.run(["ssh-keyscan", "-p", str(port), "127.0.0.1"], capture_output=True).stdout == b"":
            time.sleep(0.05)
        yield
    finally:
        sshd.terminate()
        sshd.wait()


def ours(home: str, port: str, stream: str, sink: str) -> None:
    """What the program does about one stream, its own login for streams included."""
    import zfs_replicate as program

    began = time.monotonic()
    settings = ("-o", f"UserKnownHostsFile={home}/known", "-o", "BatchMode=yes")
    host = program.SshHost(program.Connection.resolve("127.0.0.1", int(port), f"{home}/user", settings))
    with contextlib.closing(host):
        train = program.StreamBatch(((("cat", stream), tuple(sink.split())),))
        transport = program.Transport(program.buffer_stage("256M"))
        passage = program.pull(host, program.LocalHost(), train, transport)
        if passage.failure:
            raise SystemExit(str(passage.failure))
    (Path(home) / "seconds").write_text(str(time.monotonic() - began))


def prepare_sshd(home: Path) -> int:
    """Keys and a configuration of a private sshd. Returns its port."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / name], check=True)
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        port = int(it.getsockname()[1])
    (home / "config").write_text(SSHD_CONFIG.format(port=port, home=home))
    key = (home / "host.pub").read_text()
    (home / "known").write_text(f"[127.0.0.1]:{port} {key}")
    Path("/run/sshd").mkdir(exist_ok=True)
    return port


NOT_PROGRAMS = {
    "openssh-server": Path("/usr/sbin/sshd"),
    "python3-paramiko": Path("/usr/lib/python3/dist-packages/paramiko"),
}
"""Where packages are that bring no program of their name, or one that is not in every PATH."""


def install_packages(*names: str) -> None:
    """On this host, by apt, as far as they are missing."""
    here = {name: NOT_PROGRAMS[name].exists() if name in NOT_PROGRAMS else shutil.which(name) for name in names}
    missing = [name for name in names if not here[name]]
    if missing:
        say(f"installing on this host: {' '.join(missing)}")
        install = ["apt-get", "-q", "install", "-y", "--no-install-recommends", *missing]
        for words in (["apt-get", "-q", "update"], install):
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def install_here() -> Path:
    """sshd, mbuffer and compressors by apt; zstream, which Debian keeps in contrib, unpacked in our cache. Returns where."""
    install_packages("mbuffer", "lzop", "zstd", "openssh-server")
    place = CACHE / "zstream"
    if not (place / "complete").exists():
        say("fetching zstream (once)")
        place.mkdir(parents=True, exist_ok=True)
        listed = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)"],
            capture_output=True,
            text=True,
            check=True,
        )
        (place / "sources").write_text(
            "".join(f"deb {line} contrib\n" for line in sorted(set(listed.stdout.splitlines())))
        )
        lists = [
            f"-oDir::Etc::SourceList={place}/sources",
            "-oDir::Etc::SourceParts=-",
            f"-oDir::State::Lists={place}/lists",
        ]
        (place / "lists/partial").mkdir(parents=True, exist_ok=True)
        packages = ("zfsutils-linux", "libzfs4linux", "libzpool5linux", "libnvpair3linux", "libuutil3linux")
        for words in (["update"], ["download", *packages]):
            subprocess.run(["apt-get", "-q", *lists, *words], cwd=place, check=True, stdout=subprocess.DEVNULL)
        for package in place.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, place], check=True)
        libraries = f"{place}/lib/x86_64-linux-gnu:{place}/usr/lib/x86_64-linux-gnu"
        program = next(path for path in (place / "sbin/zstream", place / "usr/sbin/zstream") if path.exists())
        (place / "complete").write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={libraries} exec {program} "$@"\n')
        (place / "complete").chmod(0o755)
    (place / "bin").mkdir(exist_ok=True)
    shutil.copy(place / "complete", place / "bin/zstream")
    return place / "bin"


def a_real_stream() -> Path:
    """A full send stream, as OpenZFS in the lab makes it; cached."""
    path = CACHE / "stream"
    if not path.exists():
        say("making a stream in the lab (once)")
        with machines("bookworm") as site:
            site.source.run(
                f"zfs create -p -o recordsize=1M {TREE} && head -c {STREAM_BYTES} /dev/urandom > /{TREE}/data",
                timeout=1800,
            )
            site.snapshot("a")
            with (path.with_suffix(".part")).open("wb") as file:
                subprocess.run([*site.source.ssh_command(), f"zfs send -L -c {TREE}@a"], stdout=file, check=True)
        path.with_suffix(".part").rename(path)
    return path


MEASURED = r"""
import resource, subprocess, sys, time
began = time.monotonic()
status = subprocess.call(sys.argv[1:])
print(f"{time.monotonic() - began:.2f} {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024}")
sys.exit(status)
"""


STAGES = {"deep": ((100, 1), (100, 9), (100, 90), (100, 900)), "wide": ((10, 2), (100, 2), (1000, 2))}
"""Trees; up to how many datasets each grows, and how many recursive snapshots follow."""


def growth(release: str = "trixie", *trees: str) -> None:
    """A run that finds nothing to do, beside the slower `zfs list` of both sides, as a tree at the source grows."""
    print(f"{release}: seconds of `zfs list`, of a run that finds nothing to do, and of the one before it, which pulls")
    heads = ("datasets", "snapshots", "zfs list", "no-op", "no-op/list", "MiB", "commands", "pull")
    print("".join(f"{head:>11}" for head in heads), flush=True)
    with machines(release, LARGE_MEMORY) as site, mounts_apart(site.source) as apart:
        for name in trees or STAGES:
            stages = STAGES[name]
            tree, mirror = f"{TREE}/{name}", f"{MIRROR}/{name}"
            site.source.run(f"{apart} zfs create -p {tree}")
            datasets, snapshots = 1, 0
            for upto, more in stages:
                option = "-u" if name == "wide" else ""  # each that is mounted takes 700 KiB
                create = f"for i in $(seq {datasets} {upto - 1}); do zfs create {option} {tree}/d$i || exit; done"
                numbers = f"$(seq {snapshots + 1} {snapshots + more})"
                snap = f"for i in {numbers}; do zfs snapshot -r {tree}@day$i || exit; done"
                say(f"{tree}: {upto} datasets, {more} more snapshots of each")
                site.source.run(f"{apart} sh -c '{create}; {snap}'", timeout=7200)
                datasets, snapshots = upto, snapshots + more
                job = JOB.replace(TREE, tree).replace(MIRROR, mirror)
                say("pull")
                pull = timed(site, job).seconds
                say("nothing new")
                listed, count, noop, memory, commands = glance(site, tree, mirror, job)
                row = (datasets, count, f"{listed:.1f}", f"{noop:.1f}", f"{noop / listed:.2f}", memory, commands)
                print("".join(f"{cell:>11}" for cell in (*row, f"{pull:.1f}")), flush=True)


COLUMNS = "name,type,guid,createtxg,creation,userrefs"


def glance(site: Site, tree: str, mirror: str, job: str) -> tuple[float, int, float, int, int]:
    """Seconds of `zfs list`, of the slower side, and how many snapshots there are at the source; seconds of a run, MiB
    of its largest process, its commands at the source."""
    listed, snapshots = seconds_of_list(site.source, tree)
    listed = max(listed, seconds_of_list(site.backup, mirror)[0])
    before = logins_and_commands(site.source)[1]
    took, memory = site.backup.run(f"python3 -c '{MEASURED}' {job}", timeout=3600).stdout.split()
    return listed, snapshots, float(took), int(memory), logins_and_commands(site.source)[1] - before


def seconds_of_list(machine: Machine, tree: str) -> tuple[float, int]:
    """Also how many snapshots it has listed."""
    listing = f"zfs list -Hp -r -t all -o {COLUMNS} {tree} | grep -c @"
    said = machine.run(f"s=$(date +%s%N); {listing}; e=$(date +%s%N); echo $((e-s))", timeout=3600).stdout.split()
    return int(said[1]) / 1e9, int(said[0])


PARTS = f"""
import time
began = time.monotonic()
def lap(what):
    global began
    now = time.monotonic()
    print(what, now - began, sep="\t")
    began = now
import zfs_replicate as program
lap("imports, but paramiko")
connection = program.Connection.resolve("source", None, None)
lap("ssh -G")
host = program.SshHost(connection)
import sys
sys.modules.setdefault("invoke", None)
import paramiko
lap("import of paramiko")
host.client
lap("login")
program.read_outline(host, "{TREE}", program.Selection())
lap("list the source in outline")
program.whole(program.LocalHost(), "{MIRROR}", program.Selection())
lap("list the mirror, with holds")
"""
"""What a run does that finds nothing to do; there, listing the mirror goes beside login and listing of the source."""


def noop(release: str = "bookworm", datasets: str = "50") -> None:
    """Where the time of a run goes that finds nothing to do."""
    rows: dict[str, list[list[float]]] = {}
    delays = (0, 100)
    with machines(release) as site:
        grow(site, int(datasets))
        change(site, int(datasets), "20260101000000")
        site.replicate()
        site.backup.write("/root/parts.py", PARTS)
        for number in range(ROUNDS + 1):
            say(f"round {number}" if number else "warm-up")
            for column, delay in enumerate(delays):
                site.source.netem(delay_ms=delay)
                alone = {
                    "the whole run": timed(site, JOB).seconds,
                    "start of python3": timed(site, "python3 -c pass").seconds,
                    "zfs list at the source alone": seconds_of_list(site.source, TREE)[0],
                    "zfs list of the mirror alone": seconds_of_list(site.backup, MIRROR)[0],
                }
                laps = (line.split("\t") for line in site.backup.run("python3 /root/parts.py").stdout.splitlines())
                for what, seconds in [*alone.items(), *((what, float(took)) for what, took in laps)]:
                    if number:
                        rows.setdefault(what, [[] for _ in delays])[column].append(seconds)
    print(f"nothing new in {int(datasets) + 1} datasets, {release}; seconds, medians of {ROUNDS} rounds")
    print(f"{'':<30}" + "".join(f"{f'{delay} ms':>8}" for delay in delays))
    for what, columns in rows.items():
        print(f"{what:<30}" + "".join(f"{statistics.median(column):>8.2f}" for column in columns))


ASK_TWICE = """
import sys
sys.path.insert(0, sys.argv[1])
import zfs_replicate as program
home, port = sys.argv[2:]
settings = ("-o", f"UserKnownHostsFile={home}/known", "-o", "BatchMode=yes")
host = program.SshHost(program.Connection.resolve("127.0.0.1", int(port), f"{home}/user", settings))
for _ in range(2):
    assert host.ask(("true",)).status == 0
host.close()
"""
"""What a run does at its source that finds nothing to do, with `true` for `zfs`."""


def start(rounds: str = str(ROUNDS)) -> None:
    """What such a run takes beside ZFS, on this very machine: from the start of Python to the end of its second remote
    command, over a private sshd, with a round trip of next to nothing and of 100 ms."""
    install_packages("openssh-server", "python3-paramiko")
    found: dict[str, list[float]] = {"0 ms": [], "100 ms": []}
    with tempfile.TemporaryDirectory(prefix="zfs_replicate-bench-") as home:
        port = prepare_sshd(Path(home))
        with private_sshd(Path(home), port), far_away(port, 0.1) as distant:
            known = Path(home) / "known"
            known.write_text(known.read_text() + known.read_text().replace(f":{port} ", f":{distant} "))
            for number in range(int(rounds) + 1):
                say(f"round {number}" if number else "warm-up")
                for name, at in (("0 ms", port), ("100 ms", distant)):
                    began = time.monotonic()
                    words = ["/usr/bin/python3", "-c", ASK_TWICE, str(paths.ROOT), home, str(at)]
                    subprocess.run(words, check=True)
                    if number:
                        found[name].append(time.monotonic() - began)
    print(f"from the start of Python to the end of the second remote command; {rounds} rounds in turn")
    for name, seconds in found.items():
        low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
        print(f"{name:>8}: {middle:.2f} s, median; {low:.2f} to {high:.2f}")


def intermediates(release: str = "bookworm", snapshots: str = "1000") -> None:
    """What it costs to name each snapshot: `-I` of ours, a stream each, beside the one stream of `zfs send -I`."""
    count = int(snapshots)
    with machines(release) as site:
        site.source.run(f"zfs create -p {TREE} && zfs snapshot {TREE}@first")
        site.replicate_silently()
        one_stream = f"{MIRROR}-by-hand"
        site.backup.run(f"ssh source zfs send {TREE}@first | zfs recv -u {one_stream}")
        say(f"{count} snapshots of 16 KiB each")
        site.source.run(
            f"for i in $(seq {count}); do head -c 16K /dev/urandom > /{TREE}/file; zfs snapshot {TREE}@$i; done",
            timeout=3600,
        )
        row = "{:>22} {:>9} {:>10}".format
        print(row("", "seconds", "ms a step"))
        lines = {
            "zfs send -I, one stream": f"ssh source zfs send -p -I @first {TREE}@{count} | zfs recv -s -u -h {one_stream}",
            "zfs_replicate -I": f"{JOB} -I",
        }
        seconds = []
        for name, line in lines.items():
            began = time.monotonic()
            site.backup.run(line, timeout=7200)
            seconds.append(time.monotonic() - began)
            print(row(name, f"{seconds[-1]:.0f}", f"{seconds[-1] * 1000 / count:.0f}"), flush=True)
        print(f"ratio: {seconds[1] / seconds[0]:.2f}")
        site.assert_in_step()


@contextlib.contextmanager
def far_away(port: int, seconds: float) -> Iterator[int]:
    """A port that leads to that one, with so long a round trip; to connect takes one as well."""

    def connect(near: socket.socket) -> None:
        time.sleep(seconds)
        far = socket.create_connection(("127.0.0.1", port))
        for one, other in ((near, far), (far, near)):
            pieces: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
            threading.Thread(target=take, args=(one, pieces), daemon=True).start()
            threading.Thread(target=give, args=(other, pieces), daemon=True).start()

    def take(source: socket.socket, pieces: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        piece = b"any"
        while piece:
            try:
                piece = source.recv(1 << 16)
            except OSError:
                piece = b""
            pieces.put((time.monotonic() + seconds / 2, piece))

    def give(sink: socket.socket, pieces: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, piece = pieces.get()
                time.sleep(max(due - time.monotonic(), 0))
                if not piece:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(piece)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=connect, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield int(listener.getsockname()[1])


def main(what: str = "", *more: str) -> int:
    parts: dict[str, Callable[..., None]] = {
        "wire": wire, "start": start, "distance": distance, "growth": growth, "noop": noop, "ours": ours,
        "intermediates": intermediates,
    }  # fmt: skip
    if what not in parts:
        print("usage: tests/bench wire|start|distance|growth|noop|intermediates", file=sys.stderr)
        return 2
    parts[what](*more)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
