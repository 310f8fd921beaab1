"""An SSH server inside the test process, for real commands on 127.0.0.1, that misbehaves when told to.

It stands in for a source host's sshd: public keys alone, each command run by the login shell, both outputs and the
exit status told apart, a command killed by a signal reported as such, a reader that went away passed on to the
command. It listens on a free port and touches nothing but the directory it is given.
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Callable

import paramiko
from paramiko.common import (
    AUTH_FAILED,
    AUTH_SUCCESSFUL,
    MSG_CHANNEL_REQUEST,
    OPEN_FAILED_CONNECT_FAILED,
    OPEN_FAILED_RESOURCE_SHORTAGE,
    OPEN_SUCCEEDED,
    cMSG_CHANNEL_REQUEST,
    cMSG_CHANNEL_SUCCESS,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 10.0
"""Seconds that nothing here may take."""
CHUNK = 64 * 1024
FLOOD_BYTES = 5 * 1024 * 1024


class Fault(enum.Enum):
    """What goes wrong with each command from now on, or with each login."""

    DROPPED = "the TCP connection ends in the middle of what the command prints"
    NEVER_BEGUN = "nobody says whether the command may start"
    SILENCE = "the command prints nothing and never ends"
    NO_STATUS = "the channel is closed after the command without an exit status"
    FLOOD = "the command first writes more to stderr than any buffer takes, while it writes to stdout"
    ONE_SESSION = "no channel is opened beside the first one, nor just after it is closed: MaxSessions 1 of OpenSSH"
    KEY_REJECTED = "no key is good enough"
    DROPPED_LOGIN = "the TCP connection ends when a key is offered"


def make_key(path: Path, kind: str = "ecdsa") -> Path:
    """A new private key without a passphrase, and its public half beside it."""
    bits = ("-b", "2048") if kind == "rsa" else ()  # half a second less
    subprocess.run(("ssh-keygen", "-q", "-t", kind, *bits, "-N", "", "-C", "test", "-f", path), check=True)
    return path


def public(key_file: Path) -> str:
    """The public half of a key, as authorized_keys lists it."""
    return key_file.with_name(key_file.name + ".pub").read_text().split()[1]


class Server:
    """Serves until `close`. `commands` and `logins` tell what was asked of it so far."""

    def __init__(self, directory: Path, shell: str = "sh", key_file: str | None = None) -> None:
        self.shell = shell
        self.user = "puller"
        self.key_file = Path(key_file) if key_file else make_key(directory / "key")
        self.authorized = {public(self.key_file)}
        self.host_key = paramiko.ECDSAKey.generate()
        self.fault: Fault | None = None
        self.commands: list[str] = []
        self.opened = self.refused = 0  # channels
        self.targets: list[tuple[str, int]] = []  # where others were reached through us, as a jump host
        self.busy: set[subprocess.Popen[bytes]] = set()
        self.transports: list[Transport] = []
        self.threads: list[threading.Thread] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.start(self.accept)

    @property
    def logins(self) -> int:
        """Connections that ever got past authentication."""
        handlers = [transport.auth_handler for transport in self.transports]
        return sum(handler is not None and handler.is_authenticated() for handler in handlers)

    @property
    def known_hosts_line(self) -> str:
        return f"[127.0.0.1]:{self.port} {self.host_key.get_name()} {self.host_key.get_base64()}\n"

    def start(self, work: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self.threads.append(thread)
        thread.start()
        return thread

    def accept(self) -> None:
        while True:
            try:
                link, _ = self.listener.accept()
            except OSError:
                return  # closed
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as sshd does
            transport = Transport(link)
            # The ssh client tells only its own kind that nobody reads its output any more.
            transport.local_version = "SSH-2.0-OpenSSH_9.2 zfs_replicate test"
            transport.add_server_key(self.host_key)
            self.transports.append(transport)
            transport.start_server(event=threading.Event(), server=Session(self, transport))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes up accept()
        self.listener.close()
        for transport in self.transports:
            with contextlib.suppress(OSError):
                transport.sock.shutdown(socket.SHUT_RDWR)  # wakes up its thread
            transport.close()
        for process in list(self.busy):
            kill(process)
        for thread in self.threads + list(self.transports):
            thread.join(PATIENCE)
            assert not thread.is_alive()


class Transport(paramiko.Transport):
    """One connection. `granted` is set when the client was told that its command starts."""

    def __init__(self, link: socket.socket) -> None:
        super().__init__(link)
        self.granted = threading.Event()

    def _send_user_message(self, data: paramiko.Message) -> None:
        super()._send_user_message(data)  # type: ignore[misc]
        if data.asbytes()[:1] == cMSG_CHANNEL_SUCCESS:
            self.granted.set()

    @staticmethod
    def hear(channel: Any, message: paramiko.Message) -> None:
        """paramiko's handler of requests, with the one it does not know: end of write, nobody reads."""
        if message.get_text() == "eow@openssh.com":
            with channel.lock:
                channel.transport.server_object.unread.add(channel.get_id())
                channel.out_buffer_cv.notify_all()
            return
        message.rewind()
        message.get_int()  # the number of the channel
        channel._handle_request(message)


class Session(paramiko.ServerInterface):
    """What one connection is allowed, and its commands."""

    def __init__(self, server: Server, transport: Transport) -> None:
        self.server = server
        self.transport = transport
        self.unread: set[int] = set()  # channels whose output nobody reads any more

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        if self.server.fault is Fault.DROPPED_LOGIN:
            self.transport.sock.close()
        good = username == self.server.user and key.get_base64() in self.server.authorized
        return AUTH_SUCCESSFUL if good and self.server.fault is not Fault.KEY_REJECTED else AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        if self.server.fault is Fault.ONE_SESSION and self.server.opened == 1 and self.server.refused < 2:
            self.server.refused += 1
            return OPEN_FAILED_RESOURCE_SHORTAGE
        self.server.opened += 1
        return OPEN_SUCCEEDED

    def check_channel_direct_tcpip_request(
        self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        try:
            link = socket.create_connection(destination, PATIENCE)
        except OSError:
            return OPEN_FAILED_CONNECT_FAILED
        link.settimeout(None)
        self.server.targets.append(destination)
        self.server.start(self.relay, link)
        return OPEN_SUCCEEDED

    def relay(self, link: socket.socket) -> None:
        channel = self.transport.accept(PATIENCE)
        assert channel is not None

        def inward() -> None:
            with contextlib.suppress(OSError, EOFError):
                while data := channel.recv(CHUNK):
                    link.sendall(data)
                link.shutdown(socket.SHUT_RDWR)

        other = self.server.start(inward)
        with contextlib.suppress(OSError, EOFError), link, channel:
            while data := link.recv(CHUNK):
                channel.sendall(data)
        other.join(PATIENCE)

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        if self.server.fault is Fault.NEVER_BEGUN:
            select.select([self.transport.sock], [], [], PATIENCE)  # until the client has hung up
            return False
        self.server.commands.append(command.decode(errors="surrogateescape"))
        self.transport.granted.clear()
        self.server.start(self.serve, channel, command)
        return True

    def serve(self, channel: paramiko.Channel, command: bytes) -> None:
        """Run one command as sshd does."""
        self.transport.granted.wait(PATIENCE)
        fault = self.server.fault
        with contextlib.suppress(OSError, EOFError):
            if fault is Fault.SILENCE:
                return
            if fault is Fault.DROPPED:
                channel.sendall(b"the first half of a li")
                self.transport.close()
                return
            if fault is Fault.FLOOD:
                together = self.server.start(channel.sendall_stderr, b"x" * FLOOD_BYTES)
                channel.sendall(b"y" * FLOOD_BYTES)
                together.join(PATIENCE)
            status = self.execute(channel, command)
            with channel.lock:
                if fault is not Fault.NO_STATUS and not channel.closed:
                    report(channel, self.transport, status)
            channel.close()

    def execute(self, channel: paramiko.Channel, command: bytes) -> int:
        process = subprocess.Popen(
            (self.server.shell, "-c", command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.server.busy.add(process)
        try:
            self.server.start(feed, channel, process.stdin)
            errors = self.server.start(pump, process.stderr, channel.sendall_stderr)
            for data in chunks(process.stdout):
                if not self.write(channel, data):
                    break
            process.stdout.close()  # lets a command that goes on writing have its SIGPIPE
            errors.join(PATIENCE)
            return process.wait(PATIENCE)
        finally:
            kill(process)
            self.server.busy.remove(process)

    def write(self, channel: Any, data: bytes) -> bool:
        """Like sendall, but returns False, however full the window is, as soon as the client says that nobody reads."""

        def unread() -> bool:
            return channel.get_id() in self.unread

        while data:
            with channel.lock:
                channel.out_buffer_cv.wait_for(lambda: unread() or channel.closed or channel.out_window_size > 0)
            if unread():
                return False
            data = data[channel.send(data) :]
        return True


Transport._channel_handler_table = {  # type: ignore[attr-defined]
    **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
    MSG_CHANNEL_REQUEST: Transport.hear,
}


def chunks(output: IO[bytes]) -> Iterator[bytes]:
    while data := os.read(output.fileno(), CHUNK):
        yield data


def pump(output: IO[bytes], write: Callable[[bytes], object]) -> None:
    with output, contextlib.suppress(OSError, EOFError):  # the client has gone
        for data in chunks(output):
            write(data)


def feed(channel: paramiko.Channel, stdin: IO[bytes]) -> None:
    with contextlib.suppress(OSError), stdin:
        while data := channel.recv(CHUNK):
            stdin.write(data)
            stdin.flush()


def report(channel: Any, transport: Any, status: int) -> None:
    """Tell the client how the command ended: its status, or the signal that killed it."""
    if status >= 0:
        channel.send_exit_status(status)
        return
    message = paramiko.Message()
    message.add_byte(cMSG_CHANNEL_REQUEST)
    message.add_int(channel.remote_chanid)
    message.add_string("exit-signal")
    message.add_boolean(False)
    message.add_string(signal.Signals(-status).name[len("SIG") :])
    message.add_boolean(False)
    message.add_string("")
    message.add_string("")
    transport._send_user_message(message)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a command and all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(PATIENCE)
