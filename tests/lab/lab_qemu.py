"""QEMU for the lab: one virtual machine as a process, its monitor, its ssh, and templates to resume from.

A cold boot takes 20 s under emulation, a resume 4. A template is a booted machine, stopped: its memory is a file,
the rest of its state a few hundred kilobytes. A copy maps the same memory file copy-on-write and goes on from there.
So a template must be nobody yet: ZFS draws its random seed when the module loads, hence a template has not loaded it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
import os
import re
import shlex
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab_image import CACHE, Image, Keys, LabError, Progress, built, call, fingerprint, locked, ready_keys

QEMU = "qemu-system-x86_64"
MEMORY = 512 * 2**20
LARGE_MEMORY = 2 * 2**30
"""For a hundred thousand snapshots: `zfs list` alone takes 2 KB for each."""
EMULATED_CPU = "Westmere"
"""Has AES, but not the wide vectors of `max`, which cost more to emulate than they save: a run takes a tenth less."""
KERNEL_ARGUMENTS = (
    "root=/dev/vda rw console=ttyS0 mitigations=off net.ifnames=0 tsc=reliable "
    "random.trust_cpu=on nowatchdog audit=0 panic=-1 quiet"
)
WITHOUT_ZFS = "systemd.mask=zfs-load-module.service"

# Whatever is read before the snapshot need not be read from disk by any copy.
WARM_UP = """
systemctl is-system-running --wait
cat /lib/modules/*/updates/dkms/*.ko* /sbin/zfs /sbin/zpool /usr/bin/mbuffer /usr/bin/ssh >/dev/null
cat /lib/modules/*/kernel/net/sched/sch_netem.ko* /lib/x86_64-linux-gnu/libzfs* >/dev/null
python3 -c 'import paramiko'
sync
! grep -q '^zfs ' /proc/modules
"""


def wait_until(what: str, timeout: float, interval: float = 0.05) -> Iterator[None]:
    """Loop until the caller breaks out; a LabError naming what was awaited when the time is up."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        yield
        time.sleep(interval)
    raise LabError(f"{what}: not within {timeout:.0f} s")


def end(process: subprocess.Popen[Any]) -> None:
    """End a process we started, now, and reap it."""
    if process.poll() is None:
        process.kill()
    process.wait(timeout=10)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            with contextlib.suppress(OSError):
                stream.close()


# --- The monitor ------------------------------------------------------------------------------------------------------


class Monitor:
    """QEMU's control channel (QMP) over a socket pair: no path, no port, and every answer has a time limit."""

    def __init__(self) -> None:
        self._ours, self.theirs = socket.socketpair()
        self._ours.settimeout(60)
        self._lines = self._ours.makefile("rb")
        self._lock = threading.Lock()

    def open(self) -> None:
        """Shake hands, once QEMU runs and alone holds the other end."""
        self.theirs.close()
        self._receive()
        self.command("qmp_capabilities")

    def close(self) -> None:
        """Let go of both ends."""
        for end_of_pair in (self._lines, self._ours, self.theirs):
            end_of_pair.close()

    def command(self, name: str, /, **arguments: Any) -> Any:
        """Execute a QMP command (`_` in argument names stands for `-`); its return value, or a LabError."""
        message = {"execute": name, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}
        with self._lock:
            try:
                self._ours.sendall(json.dumps(message).encode() + b"\n")
            except OSError as error:
                raise LabError(f"QEMU's monitor is gone: {error}") from error
            while True:
                answer = self._receive()
                if "error" in answer:
                    raise LabError(f"QEMU refused {name}: {answer['error']['desc']}")
                if "return" in answer:
                    return answer["return"]

    def _receive(self) -> dict[str, Any]:
        """The next message; what is neither answer nor error is an event."""
        try:
            line = self._lines.readline()
        except OSError as error:
            raise LabError(f"QEMU's monitor does not answer: {error}") from error
        if not line:
            raise LabError("QEMU's monitor closed")
        message: dict[str, Any] = json.loads(line)
        return message


# --- One virtual machine ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Boot:
    """How to start a virtual machine: hardware and kernel, nothing about who it will be."""

    image: Image
    disk: Path
    accelerator: str
    memory: int = MEMORY
    memory_file: Path | None = None
    share_memory: bool = False
    kernel_arguments: str = KERNEL_ARGUMENTS
    clock_shift: dt.timedelta = dt.timedelta()

    def arguments(self) -> list[str]:
        """QEMU's command line, without monitor and console. The device set is part of every template."""
        now = dt.datetime.now(dt.timezone.utc) + self.clock_shift
        options = {
            "-accel": "kvm" if self.accelerator == "kvm" else "tcg,thread=multi,tb-size=256",
            "-cpu": "host" if self.accelerator == "kvm" else EMULATED_CPU,
            # Emulated, one processor does a quarter more than two: a flush of the other's TLB stops them both. But where
            # there can never be two, TCG leaves memory barriers out, as if disks and cards were not served by another
            # thread: once in some hours a completion was lost, and a pool stood still for ever. (QEMU 7.2; see
            # https://gitlab.com/qemu-project/qemu/-/commit/c914d46d0a645e7c633292146f4e38c945d4f847, of 8.1.)
            "-smp": "2" if self.accelerator == "kvm" else "1,maxcpus=2",
            "-m": f"{self.memory >> 20}",
            "-object": self._memory(),
            "-machine": "pc,usb=off,memory-backend=ram",
            "-kernel": str(self.image.kernel),
            "-initrd": str(self.image.initrd),
            "-append": self.kernel_arguments,
            "-drive": f"if=none,id=root,format=qcow2,cache=unsafe,discard=unmap,file={option(self.disk)}",
            "-netdev": "user,id=control,hostfwd=tcp:127.0.0.1:0-:22",
            "-rtc": f"base={now:%Y-%m-%dT%H:%M:%S}",
        }
        devices = ["-device", "virtio-blk-pci,drive=root", "-device", "virtio-net-pci,netdev=control,romfile="]
        fixed = ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-S"]
        return [QEMU, *fixed, *(word for pair in options.items() for word in pair), *devices]

    def _memory(self) -> str:
        if self.memory_file is None:
            return f"memory-backend-ram,id=ram,size={self.memory}"
        share = "on" if self.share_memory else "off"
        return f"memory-backend-file,id=ram,size={self.memory},share={share},mem-path={option(self.memory_file)}"


def option(path: Path) -> str:
    """A path inside a QEMU option, where a comma ends the value."""
    return str(path).replace(",", ",,")


class VirtualMachine:
    """A QEMU process. It starts stopped: restore a template or plug devices in, then `go`."""

    def __init__(self, boot: Boot, directory: Path, *extra: str) -> None:
        """Start QEMU with its logs in `directory`."""
        self._log = directory / "qemu.log"
        self.console = directory / "console.log"
        self.monitor = Monitor()
        channel = self.monitor.theirs.fileno()
        wiring = ["-chardev", f"socket,id=qmp,fd={channel}", "-mon", "chardev=qmp,mode=control"]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*boot.arguments(), *wiring, "-serial", f"file:{self.console}", *extra],
                pass_fds=[channel],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C in the terminal is for us: we end QEMU ourselves, after asking nothing more of it.
                start_new_session=True,
            )
        try:
            self.monitor.open()
        except LabError as error:
            self.kill()
            raise LabError(f"{error}\n{self._log.read_text(errors='replace')[-2000:]}") from error

    def restore(self, state: Path) -> None:
        """Take over a template's state; started with its memory and `-incoming defer`."""
        self._keep_memory_in_file()
        self.monitor.command("migrate-incoming", uri=f"exec:cat {shlex.quote(str(state))}")
        for _ in wait_until("restoring a template", 30):
            if self.monitor.command("query-status")["status"] != "inmigrate":
                break

    def save(self, state: Path) -> None:
        """Stop, and write everything but the memory, which is a shared file already."""
        self.monitor.command("stop")
        self._keep_memory_in_file()
        self.monitor.command("migrate", uri=f"exec:cat > {shlex.quote(str(state))}")
        for _ in wait_until("saving a template", 60):
            status = self.monitor.command("query-migrate").get("status")
            if status == "failed":
                raise LabError("QEMU could not save the template")
            if status == "completed":
                break

    def _keep_memory_in_file(self) -> None:
        capability = {"capability": "x-ignore-shared", "state": True}
        self.monitor.command("migrate-set-capabilities", capabilities=[capability])

    def go(self) -> None:
        """Let the processors run."""
        self.monitor.command("cont")

    def control_port(self) -> int:
        """The port on 127.0.0.1 that leads to this machine's sshd; the kernel chose it, so it cannot clash."""
        text = self.monitor.command("human-monitor-command", command_line="info usernet")
        match = re.search(r"HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", text)
        if not match:
            raise LabError(f"QEMU forwards no port:\n{text}")
        return int(match[1])

    def wait_for_ssh(self, timeout: float) -> int:
        """Wait for sshd's banner (the bare port answers long before); the control port.

        More patiently each time: on a busy host a login that is given up too soon, and then the next, is all that the
        machine is at work on, and none of them ever gets its banner.
        """
        port, patience = self.control_port(), 1.0
        for _ in wait_until("ssh banner", timeout):
            if self.process.poll() is not None:
                raise LabError(f"QEMU ended with {self.process.returncode}; console:\n{self.console_tail()}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), patience) as connection:
                if connection.recv(4) == b"SSH-":
                    break
            patience = min(patience * 1.5, 20)
        return port

    def console_tail(self) -> str:
        """The last the machine wrote on its serial line."""
        return self.console.read_text(errors="replace")[-2000:] if self.console.exists() else ""

    def kill(self) -> None:
        """Power off the hard way."""
        end(self.process)
        self.monitor.close()


# --- Commands inside --------------------------------------------------------------------------------------------------


class Control:
    """Shared ssh connections to one machine, one for each user: a command costs 0.25 s instead of a login."""

    def __init__(self, port: int, directory: Path, keys: Keys) -> None:
        """Nothing is opened yet; sockets go to `directory`."""
        self._port, self._directory, self._keys = port, directory, keys
        self._masters: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    def command_line(self, user: str = "root") -> list[str]:
        """The ssh command up to the host, over the shared connection where there is one."""
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": "60",
            "ControlPath": str(self._socket(user)),
            "IdentitiesOnly": "yes",
            "LogLevel": "ERROR",
            "Port": str(self._port),
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
        }
        words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        return ["ssh", "-F", "none", "-i", str(self._keys.directory / "control"), *words, f"{user}@127.0.0.1"]

    def connected(self, user: str = "root") -> list[str]:
        """`command_line` after the shared connection was made."""
        with self._lock:
            master = self._masters.get(user)
            if master is None or master.poll() is not None:
                self._masters[user] = self._open_master(user)
        return self.command_line(user)

    def close(self) -> None:
        """Hang up."""
        for master in self._masters.values():
            end(master)
        for user in self._masters:
            self._socket(user).unlink(missing_ok=True)
        self._masters.clear()

    def _socket(self, user: str) -> Path:
        return self._directory / f"{user}.ssh"

    def _open_master(self, user: str) -> subprocess.Popen[bytes]:
        self._socket(user).unlink(missing_ok=True)
        master = subprocess.Popen(
            [*self.command_line(user), "-M", "-N"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            for _ in wait_until(f"login of {user}", 90):
                if self._socket(user).exists():
                    return master
                if master.poll() is not None and master.stderr:
                    raise LabError(f"login of {user} failed: {master.stderr.read().decode(errors='replace')}")
        except BaseException:
            end(master)
            raise
        raise AssertionError  # wait_until ends by break or error


# --- KVM or emulation -------------------------------------------------------------------------------------------------


def accelerator(image: Image, progress: Progress) -> str:
    """`kvm` where it really boots a stock kernel, else `tcg`; LAB_ACCEL overrides. One try a boot of the host."""
    chosen = os.environ.get("LAB_ACCEL", "")
    if chosen in ("kvm", "tcg"):
        return chosen
    if chosen:
        raise LabError(f"LAB_ACCEL={chosen}: must be kvm or tcg")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    answer = CACHE / "accelerator" / fingerprint(boot_id, str(image.directory), qemu_version())
    with locked(answer.with_suffix(".lock")):
        if not answer.exists():
            progress("trying whether KVM boots a stock kernel (at most 30 seconds)")
            answer.write_text("kvm" if kvm_boots(image) else "tcg", encoding="ascii")
    return answer.read_text(encoding="ascii")


def kvm_boots(image: Image) -> bool:
    """Whether a kernel gets as far as its first program under KVM: the panic at that program's end says so."""
    with tempfile.TemporaryDirectory(dir=CACHE / "accelerator") as scratch:
        disk = Path(scratch, "disk.qcow2")
        overlay(disk, image.disk, "raw")
        arguments = KERNEL_ARGUMENTS.replace("quiet", "init=/bin/true")
        try:
            machine = VirtualMachine(Boot(image, disk, "kvm", kernel_arguments=arguments), Path(scratch))
        except LabError:
            return False
        try:
            machine.go()
            machine.process.wait(timeout=30)
        except (LabError, subprocess.TimeoutExpired):
            return False
        finally:
            machine.kill()
        return "Attempted to kill init" in machine.console_tail()


def qemu_version() -> str:
    """QEMU's own words; templates and trial results are only good for the version that made them."""
    return subprocess.run([QEMU, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout


# --- Templates --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Template:
    """A booted machine that is nobody yet, as files."""

    directory: Path

    @property
    def disk(self) -> Path:
        """Its root disk, as it was when it was stopped."""
        return self.directory / "disk.qcow2"

    @property
    def memory(self) -> Path:
        """Its memory; copies map this file privately."""
        return self.directory / "memory"

    @property
    def state(self) -> Path:
        """Processors and devices."""
        return self.directory / "state"


def overlay(disk: Path, backing: Path, backing_format: str) -> None:
    """A disk that reads from `backing` what was not written to it yet."""
    call(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(backing), "-F", backing_format, str(disk)], timeout=30)


def ready_template(image: Image, accel: str, memory: int, progress: Progress) -> Template:
    """The template of an image, with so many bytes of memory, made on first use."""
    sample = Boot(image, Path("disk"), accel, memory, kernel_arguments=f"{KERNEL_ARGUMENTS} {WITHOUT_ZFS}").arguments()
    sample = sample[: sample.index("-rtc")]
    processor = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0]
    parts = [*sample, qemu_version(), WARM_UP, processor if accel == "kvm" else ""]
    template = Template(CACHE / "templates" / f"{image.release}-{fingerprint(*parts)}")
    with locked(CACHE / "templates" / f"{image.release}.lock"):
        if not template.directory.exists():
            progress(f"{image.release}: booting the template (about 30 seconds)")
            with built(template.directory) as scratch:
                make_template(image, accel, memory, Template(scratch))
    return template


def make_template(image: Image, accel: str, memory: int, template: Template) -> None:
    """Boot an image without ZFS, warm it up, stop it, save it."""
    overlay(template.disk, image.disk, "raw")
    arguments = f"{KERNEL_ARGUMENTS} {WITHOUT_ZFS}"
    boot = Boot(image, template.disk, accel, memory, template.memory, share_memory=True, kernel_arguments=arguments)
    machine = VirtualMachine(boot, template.directory)
    try:
        machine.go()
        control = Control(machine.wait_for_ssh(900), template.directory, ready_keys())
        try:
            call([*control.command_line(), WARM_UP], timeout=900)
        finally:
            control.close()
        machine.save(template.state)
    finally:
        machine.kill()
