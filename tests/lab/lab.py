#!/usr/bin/env python3
"""The lab: throwaway virtual machines with real OpenZFS, on one network, to try replication and its accidents.

    with Lab() as lab:
        source = lab.machine("source")
        backup = lab.machine("backup", release="trixie")
        source.run("zpool create tank /dev/disk/by-id/virtio-data && zfs snapshot tank@one")
        backup.run("ssh source zfs send tank@one | cat >/dev/null")
        source.power_loss()
        source.power_on()

On the command line: `lab.py build [RELEASE...]` fills the cache, `lab.py shell NAME[:RELEASE]...` boots machines
and prints how to log in. Images, templates and keys are kept under ~/.cache/zfs_replicate; needs root or sudo.

In reading order: lab_image (disks), lab_qemu (one process), and here the machines and their network.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import concurrent.futures
import contextlib
import dataclasses
import datetime as dt
import os
import random
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lab_image import CACHE, HOSTS, RELEASES, Image, Keys, LabError, Progress, mac_address, ready_image, ready_keys
from lab_qemu import (
    KERNEL_ARGUMENTS,
    LARGE_MEMORY,
    MEMORY,
    WITHOUT_ZFS,
    Boot,
    Control,
    Template,
    VirtualMachine,
    accelerator,
    end,
    overlay,
    ready_template,
)

__all__ = ["HOSTS", "LARGE_MEMORY", "MEMORY", "RELEASES", "CommandFailed", "Lab", "LabError", "Machine"]

DATA_DISK_SIZE = 8 * 2**30


class CommandFailed(LabError):
    """A command in a machine failed; everything one wants to know of it is in the message."""

    def __init__(self, machine: str, command: str, result: subprocess.CompletedProcess[str]) -> None:
        """Keep the result for tests that look closer."""
        self.result = result
        said = f"stdout: {result.stdout}\nstderr: {result.stderr}"
        super().__init__(f"{machine}: exit {result.returncode}: {command}\n{said}")


@dataclasses.dataclass(frozen=True)
class Network:
    """The wire between the machines of one lab: a multicast group on the loopback, of a port of its own."""

    group: str
    port: int

    @classmethod
    def draw(cls) -> Network:
        """A network no other lab is likely to use."""
        dice = random.SystemRandom()
        return cls(f"239.77.{dice.randrange(256)}.{dice.randrange(1, 255)}", dice.randrange(20000, 30000))


@dataclasses.dataclass(frozen=True)
class Stock:
    """What the machines of one release are made from."""

    image: Image
    template: Template | None
    accelerator: str
    memory: int
    keys: Keys


# --- A machine --------------------------------------------------------------------------------------------------------


class Machine:
    """A Debian with OpenZFS, an empty disk at /dev/disk/by-id/virtio-data and a real sshd on the lab's network."""

    def __init__(self, name: str, stock: Stock, network: Network, directory: Path) -> None:
        """Only noted down here; `start` makes it run."""
        self.name = name
        self.release = stock.image.release
        self.address = HOSTS[name]
        self._stock, self._network, self._directory = stock, network, directory
        self._clock_shift = dt.timedelta()
        self._background: list[subprocess.Popen[str]] = []
        self._machine: VirtualMachine | None = None
        self._control: Control | None = None

    # Life and death

    def start(self, progress: Progress) -> None:
        """Bring it to life: from the template, or by a cold boot where that does not work."""
        data = self._directory / "data.raw"
        with data.open("wb") as disk:
            disk.truncate(DATA_DISK_SIZE)
        if self._stock.template:
            try:
                self._resume(self._stock.template)
            except LabError as error:
                progress(f"{self.name}: could not resume ({error}); booting instead")
                self.power_loss()
        if not self._machine:
            self._disk.unlink(missing_ok=True)
            overlay(self._disk, self._stock.image.disk, "raw")
            self._boot(f"{KERNEL_ARGUMENTS} {WITHOUT_ZFS}")
        self._personalise()

    def power_loss(self) -> None:
        """Pull the plug: nothing is flushed, nothing is said to anybody."""
        for process in self._background:
            end(process)
        self._background.clear()
        if self._control:
            self._control.close()
        if self._machine:
            self._machine.kill()
        self._control = self._machine = None

    def power_on(self) -> None:
        """Boot on the same disks, until the boot is over: pools are imported as on any Debian."""
        if self._machine:
            raise LabError(f"{self.name} is on already")
        self._boot(KERNEL_ARGUMENTS)
        self.run("systemctl is-system-running --wait", check=False, timeout=300)

    def reboot(self) -> None:
        """Restart in good order, until the boot is over."""
        if not self._machine:
            raise LabError(f"{self.name} is off")
        # The answer may be lost with the connection; that QEMU ends is the proof (it runs with -no-reboot).
        self.run("systemctl reboot", check=False)
        try:
            self._machine.process.wait(timeout=180)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{self.name} did not shut down; console:\n{self._machine.console_tail()}") from error
        self.power_loss()
        self.power_on()

    def close(self) -> None:
        """End it and discard its disks."""
        self.power_loss()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def _disk(self) -> Path:
        return self._directory / "root.qcow2"

    def _resume(self, template: Template) -> None:
        overlay(self._disk, template.disk, "qcow2")
        boot = Boot(self._stock.image, self._disk, self._stock.accelerator, self._stock.memory, template.memory)
        self._machine = VirtualMachine(boot, self._directory, "-incoming", "defer")
        self._machine.restore(template.state)
        self._start_processors(60)

    def _boot(self, kernel_arguments: str) -> None:
        boot = Boot(
            self._stock.image,
            self._disk,
            self._stock.accelerator,
            self._stock.memory,
            kernel_arguments=kernel_arguments,
            clock_shift=self._clock_shift,
        )
        self._machine = VirtualMachine(boot, self._directory)
        self._start_processors(300)

    def _start_processors(self, timeout: float) -> None:
        """Plug in what no template has, run, and connect."""
        machine = self._running
        cache = {"direct": False, "no-flush": True}
        data = {"driver": "file", "filename": str(self._directory / "data.raw"), "cache": cache, "discard": "unmap"}
        command = machine.monitor.command
        command("blockdev-add", node_name="data", driver="raw", file=data, cache=cache, discard="unmap")
        command("device_add", id="data", driver="virtio-blk-pci", drive="data", serial="data")
        wire = f"{self._network.group}:{self._network.port}"
        command("netdev_add", type="socket", id="lab", mcast=wire, localaddr="127.0.0.1")
        command("device_add", id="card", driver="virtio-net-pci", netdev="lab", mac=mac_address(self.name), romfile="")
        machine.go()
        self._control = Control(machine.wait_for_ssh(timeout), self._directory, self._stock.keys)

    def _personalise(self) -> None:
        """Make it somebody: clock, random seed, names; then load ZFS and wait for disk and network."""
        entropy = base64.b64encode(secrets.token_bytes(64)).decode()
        identity = f"{self.name} {secrets.randbelow(0xFFFFFFFE) + 1:08x} {time.time():.3f}"
        ready = (
            "for i in $(seq 100); do test -e /dev/disk/by-id/virtio-data && ip -br addr show dev lab0 2>/dev/null"
            f" | grep -q {self.address} && exit 0; sleep 0.1; done; echo no data disk or no lab0 >&2; exit 1"
        )
        self.run(f"lab-personalise {identity} && {{ {ready}; }}", input=entropy)

    @property
    def _running(self) -> VirtualMachine:
        if not self._machine:
            raise LabError(f"{self.name} is off")
        return self._machine

    # Commands and files

    def run(
        self,
        command: str,
        *,
        check: bool = True,
        timeout: float = 120.0,
        input: str | None = None,  # noqa: A002 -- as subprocess.run calls it
        user: str = "root",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the user's login shell and wait for it.

        Raises CommandFailed where it fails (unless `check` is off), and subprocess.TimeoutExpired where the machine
        or the command hangs: then our end is gone, but the command may still run in there.
        """
        result = subprocess.run(
            [*self._connection(user), command],
            input="" if input is None else input,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=timeout,
            check=False,
        )
        if check and result.returncode:
            raise CommandFailed(self.name, command, result)
        return result

    def popen(
        self,
        command: str,
        *,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.PIPE,
        user: str = "root",
    ) -> subprocess.Popen[str]:
        """Run a command in the background. It ends with the machine; killing it here may leave it running in there."""
        process = subprocess.Popen(
            [*self._connection(user), command],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            encoding="utf-8",
            errors="surrogateescape",
        )
        self._background.append(process)
        return process

    def ssh_command(self, user: str = "root") -> list[str]:
        """How to log in from the host."""
        self._connection(user)
        return self._control.command_line(user) if self._control else []

    def put(self, local_path: str | os.PathLike[str], remote_path: str, mode: int = 0o755) -> None:
        """Copy a file into the machine; directories are made on the way."""
        self.write(remote_path, Path(local_path).read_bytes().decode("utf-8", "surrogateescape"), mode)

    def write(self, remote_path: str, text: str, mode: int = 0o644) -> None:
        """Make a file with that text; directories are made on the way."""
        self.run(f"install -D -m {mode:o} /dev/stdin {shlex.quote(remote_path)}", input=text)

    def read(self, remote_path: str) -> str:
        """The text of a file."""
        return self.run(f"cat {shlex.quote(remote_path)}").stdout

    def ssh_log(self) -> list[str]:
        """What sshd wrote since the boot about logins and commands from other machines, oldest first.

        `Accepted publickey for root from 10.77.0.12 ...` is a login, `Starting session: command for root from ...` a
        command; our own control connection comes from elsewhere and is left out.
        """
        journal = self.run("journalctl --sync; journalctl -b -q -u ssh -o cat --no-pager").stdout
        wanted = ("Accepted ", "Starting session: ")
        network = f"from {self.address.rpartition('.')[0]}."
        return [line for line in journal.splitlines() if line.startswith(wanted) and network in line]

    def _connection(self, user: str) -> list[str]:
        if not self._control:
            raise LabError(f"{self.name} is off")
        return self._control.connected(user)

    # Accidents

    def freeze(self) -> None:
        """Stop the processors: the peer hangs and closes nothing. Its clock stands still meanwhile."""
        self._running.monitor.command("stop")

    def thaw(self) -> None:
        """Go on after `freeze`, as if nothing had happened."""
        self._running.monitor.command("cont")

    def cable(self, plugged: bool) -> None:
        """Pull or plug the lab network's cable; our own control connection stays."""
        self._running.monitor.command("set_link", name="card", up=plugged)

    def netem(self, delay_ms: float = 0, megabits: float = 0) -> None:
        """Delay what this machine sends on the lab network, or let no more megabits a second pass; nothing ends it."""
        limits = [f"delay {delay_ms}ms"] * bool(delay_ms) + [f"rate {megabits}mbit"] * bool(megabits)
        self.run("tc qdisc del dev lab0 root", check=False)
        if limits:
            self.run(f"tc qdisc add dev lab0 root netem {' '.join(limits)}")

    def set_clock(self, moment: dt.datetime) -> None:
        """Set date and time (without a time zone: local time of the host); later boots keep the difference."""
        self._clock_shift = dt.timedelta(seconds=moment.timestamp() - time.time())
        self.run(f"date -u -s @{moment.timestamp():.3f}")

    def shift_clock(self, days: float) -> None:
        """Move the clock by days from where it stands; negative goes back."""
        self.set_clock(dt.datetime.now(dt.timezone.utc) + self._clock_shift + dt.timedelta(days=days))


# --- The lab ----------------------------------------------------------------------------------------------------------


def say(message: str) -> None:
    """Progress for people: one line on stderr."""
    print(f"lab: {message}", file=sys.stderr, flush=True)


class Lab:
    """Up to four machines on one network. All that it starts ends with it, signals included."""

    def __init__(self, progress: Progress = say) -> None:
        """Nothing is started before the first machine is asked for."""
        self.progress = progress
        self._network = Network.draw()
        self._machines: list[Machine] = []
        self._stocks: dict[tuple[str, int], Stock] = {}
        self._lock = threading.Lock()
        self._old_handler: Any = None
        runs = CACHE / "run"
        runs.mkdir(parents=True, exist_ok=True)
        remove_stale_runs(runs)
        self._directory = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=runs))

    def __enter__(self) -> Lab:  # noqa: PYI034 -- Self came with Python 3.11
        """Make SIGTERM as orderly as Ctrl-C: an exception in the main thread, so that every `with` and fixture ends."""
        atexit.register(self.close)
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all machines."""
        self.close()
        if self._old_handler is not None:
            signal.signal(signal.SIGTERM, self._old_handler)
        atexit.unregister(self.close)

    def machine(self, name: str, release: str = "bookworm", memory: int = MEMORY) -> Machine:
        """A new machine of that name, with so many bytes of memory. May be called from several threads at once."""
        if name not in HOSTS:
            raise LabError(f"no machine can be called {name!r}; names are {', '.join(HOSTS)}")
        stock = self._stock(release, memory)
        directory = self._directory / name
        try:
            directory.mkdir()
        except FileExistsError:
            raise LabError(f"there is a machine {name} already; close it first") from None
        machine = Machine(name, stock, self._network, directory)
        self._machines.append(machine)
        try:
            machine.start(self.progress)
        except BaseException:
            machine.close()
            raise
        return machine

    def machines(self, names: Iterable[str], release: str = "bookworm") -> list[Machine]:
        """Several machines, started side by side."""
        with concurrent.futures.ThreadPoolExecutor() as pool:
            return list(pool.map(lambda name: self.machine(name, release), names))

    def close(self) -> None:
        """End all machines and discard their disks."""
        for machine in self._machines:
            machine.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _stock(self, release: str, memory: int) -> Stock:
        with self._lock:
            if (release, memory) not in self._stocks:
                self._stocks[release, memory] = ready_stock(release, self.progress, memory)
            return self._stocks[release, memory]


def ready_stock(release: str, progress: Progress, memory: int = MEMORY) -> Stock:
    """Image and template of a release, made where missing; a template that cannot be made only costs time."""
    image = ready_image(release, progress)
    accel = accelerator(image, progress)
    template = None
    try:
        template = ready_template(image, accel, memory, progress)
    except LabError as error:
        progress(f"{release}: no template, machines will boot instead: {error}")
    return Stock(image, template, accel, memory, ready_keys())


def remove_stale_runs(runs: Path) -> None:
    """End what labs left behind whose process was killed, and remove their files."""
    for directory in runs.iterdir():
        owner = directory.name.partition("-")[0]
        if Path("/proc", owner).exists():
            continue
        for pid in processes_of(directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


def processes_of(directory: Path) -> list[int]:
    """Processes on whose command line a lab's private directory stands: no others than its own have reason to."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if words[0] in (b"qemu-system-x86_64", b"ssh") and any(os.fsencode(directory) in word for word in words):
                found.append(int(entry.parent.name))
    return found


# --- Command line -----------------------------------------------------------------------------------------------------


def shell(names: Sequence[str]) -> None:
    """Start machines, say how to log in, and wait for Ctrl-C."""
    with Lab() as lab:
        for word in names:
            name, _, release = word.partition(":")
            machine = lab.machine(name, release or "bookworm")
            print(f"{name}: {shlex.join(machine.ssh_command())}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


def main(arguments: Sequence[str] | None = None) -> int:
    """Build images, or boot machines by hand."""
    parser = argparse.ArgumentParser(description="Throwaway virtual machines with real OpenZFS.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build images and templates into the cache")
    build.add_argument("releases", nargs="*", metavar="RELEASE", help=f"of {', '.join(RELEASES)}; default all")
    boot = commands.add_parser("shell", help="boot machines and print how to log in, until Ctrl-C")
    boot.add_argument("names", nargs="+", metavar="NAME[:RELEASE]", help=f"of {', '.join(HOSTS)}")
    options = parser.parse_args(arguments)
    try:
        if options.command == "shell":
            shell(options.names)
        else:
            for release in options.releases or RELEASES:
                ready_stock(release, say)
    except LabError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
