"""Our own ssh connection: the login, the commands that go over it, and links that break."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import paramiko
import pytest
from near_end import but, eventually, log_into
from ssh_server import FLOOD_BYTES, PATIENCE, Fault, Server, make_key, public

import zfs_replicate
from zfs_replicate import (
    COMPLAINT_BYTES,
    KEEPALIVE_SECONDS,
    LINK_SECONDS,
    Answer,
    Connection,
    Failure,
    LinkLost,
    SshHost,
    Stopped,
    Stuck,
    log_in,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def test_login_serves_many_commands(source: SshHost, server: Server) -> None:
    for number in range(20):
        assert source.ask(("echo", str(number))).stdout == f"{number}\n"
    assert len(server.commands) == 20
    assert server.logins == 1


def test_command_leaves_no_channel_and_no_thread(source: SshHost) -> None:
    """No channel but that of the next one, no thread: a run may ask thousands."""
    source.ask(("true",))
    before = threading.active_count()
    for _ in range(5):
        source.ask(("true",))
    transport = source.client.get_transport()
    assert transport is not None
    assert eventually(lambda: len(transport._channels) == 1 and threading.active_count() <= before)


def test_notes_tell_each_step(connection: Connection) -> None:
    notes: list[str] = []
    with contextlib.closing(log_into(connection, notes.append)) as host:
        host.ask(("echo", "two words"))
    assert notes == [f"source: logged in as puller at 127.0.0.1:{connection.port}", "source: echo 'two words'"]


def test_host_key_unknown_is_refused_with_its_fingerprint(connection: Connection, server: Server) -> None:
    stranger = but(connection, userknownhostsfile="/nonexistent")
    with pytest.raises(Failure) as caught:
        log_into(stranger)
    assert not isinstance(caught.value, LinkLost)
    assert f"[127.0.0.1]:{server.port} is not known here (ecdsa-sha2-nistp256 SHA256:" in caught.value.what
    assert fingerprint(server) in caught.value.what
    assert f"ssh -p {server.port} source" in caught.value.hint
    assert server.logins == 0


def fingerprint(server: Server) -> str:
    """As ssh-keygen tells it."""
    line = server.known_hosts_line.partition(" ")[2]
    told = subprocess.run(("ssh-keygen", "-lf", "-"), input=line, capture_output=True, text=True, check=True).stdout
    return told.split()[1]


def test_host_key_changed_is_refused(connection: Connection, server: Server) -> None:
    server.host_key = paramiko.ECDSAKey.generate()
    with pytest.raises(Failure, match="has changed") as caught:
        log_into(connection)
    assert not isinstance(caught.value, LinkLost)
    assert f"ssh-keygen -R '[127.0.0.1]:{server.port}'" in caught.value.hint
    assert server.logins == 0


def test_host_key_is_looked_up_under_its_alias(connection: Connection, server: Server, tmp_path: Path) -> None:
    (tmp_path / "known_hosts").write_text(server.known_hosts_line.replace(f"[127.0.0.1]:{server.port}", "vault"))
    with pytest.raises(Failure, match="is not known here"):
        log_into(connection)
    log_into(but(connection, hostkeyalias="vault")).close()


def test_known_hosts_with_hashed_names_are_read(connection: Connection, tmp_path: Path) -> None:
    subprocess.run(("ssh-keygen", "-q", "-H", "-f", tmp_path / "known_hosts"), capture_output=True, check=True)
    assert "127.0.0.1" not in (tmp_path / "known_hosts").read_text()
    log_into(connection).close()


def test_known_hosts_in_a_second_file_are_read(connection: Connection, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    files = f"{tmp_path}/empty {tmp_path}/missing {tmp_path}/known_hosts"
    log_into(but(connection, userknownhostsfile=files)).close()
    log_into(but(connection, userknownhostsfile="", globalknownhostsfile=files)).close()


@pytest.mark.parametrize(
    "line",
    [
        *("# a comment", "@x", "host ssh-rsa", "host ssh-rsa !!!!", "host ssh-rsa AAAA", "host ssh-future AAAA"),
        *("host ssh-ed25519 A", "caf\udce9 ssh-rsa AAAA"),
    ],
)
def test_known_hosts_with_a_broken_line_are_read_or_named(connection: Connection, tmp_path: Path, line: str) -> None:
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_bytes(os.fsencode(line) + b"\n" + known_hosts.read_bytes())
    try:
        log_into(connection).close()
    except Failure as failure:
        assert str(known_hosts) in failure.what


@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "ed25519"])
def test_login_with_the_right_key_of_each_kind(
    connection: Connection, server: Server, tmp_path: Path, kind: str
) -> None:
    key = make_key(tmp_path / kind, kind)
    connection = but(connection, identityfile=str(key))
    assert f"({key})" in refused(connection).what
    server.authorized.add(public(key))
    log_into(connection).close()


def refused(connection: Connection) -> Failure:
    """How a login that must be refused is told."""
    with pytest.raises(Failure) as caught:
        log_into(connection)
    assert not isinstance(caught.value, LinkLost)
    assert f"puller@127.0.0.1 port {connection.port} does not accept our login" in caught.value.what
    assert "ssh-copy-id" in caught.value.hint
    assert connection.ssh_command_for_user() in caught.value.hint
    return caught.value


@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "ed25519"])
def test_login_with_a_good_key_after_a_bad_one(
    connection: Connection, server: Server, tmp_path: Path, kind: str
) -> None:
    keys = (str(make_key(tmp_path / "first", kind)), str(server.key_file))
    log_into(replace(connection, config={**connection.config, "identityfile": keys})).close()


def test_login_without_any_key_is_refused(connection: Connection, tmp_path: Path) -> None:
    assert "no key file" in refused(but(connection, identityfile="/nonexistent")).what


def test_login_with_a_public_key_file_is_refused(connection: Connection, server: Server) -> None:
    refused(but(connection, identityfile=f"{server.key_file}.pub"))


def test_login_with_a_locked_key_is_refused(connection: Connection, server: Server) -> None:
    subprocess.run(("ssh-keygen", "-q", "-p", "-N", "secret", "-f", server.key_file), capture_output=True, check=True)
    refused(connection)


def test_login_as_another_user_is_refused(connection: Connection) -> None:
    with pytest.raises(Failure, match=r"somebody@127.0.0.1 port .* does not accept our login"):
        log_into(but(connection, user="somebody"))


def test_login_that_fails_leaves_nothing_open(connection: Connection, server: Server) -> None:
    server.fault = Fault.KEY_REJECTED
    with pytest.raises(Failure):
        log_into(connection)
    assert eventually(lambda: not server.transports[0].is_active())


# --- Links that break -------------------------------------------------------------------------------------------------


@pytest.fixture
def dead_port() -> int:
    """Nobody listens here."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize("error", [IndexError("pop from empty list"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x")])
def test_lost_link_if_paramiko_trips(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Its thread hands on what it met in a malformed packet."""

    def trip(*_: object) -> Answer:
        raise error

    host = SshHost(Connection("source", (), {"hostname": ("source",), "user": ("root",)}))
    vars(host)["client"] = SimpleNamespace(get_transport=lambda: None, close=lambda: None)
    monkeypatch.setattr(host, "exchange", trip)
    with pytest.raises(LinkLost, match="lost the connection to source during zfs list"):
        host.ask(("zfs", "list"))


def test_lost_link_at_an_unreachable_port(connection: Connection, dead_port: int) -> None:
    with pytest.raises(LinkLost, match=rf"cannot reach 127.0.0.1 port {dead_port}: .*refused") as caught:
        log_into(but(connection, port=str(dead_port)))
    assert caught.value.hint.startswith("this must work: ssh -p")


def test_lost_link_at_an_unknown_name(connection: Connection) -> None:
    with pytest.raises(LinkLost, match="cannot reach"):
        log_into(but(connection, hostname="256.0.0.1"))


def test_lost_link_at_a_host_without_a_greeting(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zfs_replicate, "CONNECT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(LinkLost, match=r"cannot reach .*: .+"):
        log_into(but(connection, port=str(mute.getsockname()[1])))


def test_lost_link_if_the_connection_drops_during_a_command(source: SshHost, server: Server) -> None:
    server.fault = Fault.DROPPED
    with pytest.raises(LinkLost, match=r"lost the connection to source during zfs list: .+"):
        source.ask(("zfs", "list", "tank"))
    with pytest.raises(LinkLost, match="it is closed"):
        source.ask(("zfs", "list", "tank"))


def test_channel_for_the_next_command_is_opened_meanwhile(source: SshHost, server: Server) -> None:
    source.ask(("echo", "one"))
    assert eventually(lambda: server.opened == 2)
    source.ask(("echo", "two"))
    assert eventually(lambda: server.opened == 3)


def test_channel_limit_of_one_at_a_time_is_enough(source: SshHost, server: Server) -> None:
    server.fault = Fault.ONE_SESSION
    assert [source.ask(("echo", word)).stdout for word in ("one", "two")] == ["one\n", "two\n"]
    assert (server.opened, server.refused) == (2, 2)


def test_lost_link_if_a_signal_ended_the_command(source: SshHost, server: Server) -> None:
    server.fault = Fault.NO_STATUS
    with pytest.raises(LinkLost, match=r"^a signal ended echo looks fine on source\n"):
        source.ask(("echo", "looks fine"))
    server.fault = None
    assert source.ask(("echo", "still here")).stdout == "still here\n"


def test_deadline_ends_a_command_that_never_ends(
    source: SshHost, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "stall_timeout", 0.1)
    server.fault = Fault.SILENCE
    with pytest.raises(Stuck, match=r"^zfs list on source has not ended after "):
        source.ask(("zfs", "list"))


def test_lost_link_if_a_command_is_not_even_begun(
    source: SshHost, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """paramiko itself would wait for ever."""
    monkeypatch.setattr("zfs_replicate.LINK_SECONDS", 0.1)
    server.fault = Fault.NEVER_BEGUN
    with pytest.raises(LinkLost, match=r"lost the connection to source during zfs list: .+"):
        source.ask(("zfs", "list"))


def test_lost_link_if_the_kernel_gives_up(source: SshHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange(transport: Any, doing: str, line: str) -> Answer:
        raise TimeoutError(110, "Connection timed out")

    monkeypatch.setattr(source, "exchange", exchange)
    with pytest.raises(LinkLost, match="Connection timed out"):
        source.ask(("zfs", "list"))


def test_lost_link_shows_before_the_deadline_of_a_command(source: SshHost) -> None:
    assert source.stall_timeout >= LINK_SECONDS + KEEPALIVE_SECONDS


def test_paramiko_missing_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paramiko", None)
    with pytest.raises(Failure, match=r"cannot use paramiko: .*\ninstall it: apt install python3-paramiko"):
        log_in(Connection("source", (), {}))


def test_ssh_does_not_block_on_a_flood_of_complaints(source: SshHost, server: Server) -> None:
    source.ask(("true",))  # which brings along what programs are there
    server.fault = Fault.FLOOD
    answer = source.ask(("echo", "done"))
    assert answer == Answer(0, "y" * FLOOD_BYTES + "done\n", "x" * COMPLAINT_BYTES)


def test_signal_ends_the_wait_for_an_answer(source: SshHost, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "stall_timeout", 1.0)
    server.fault = Fault.SILENCE
    start = time.monotonic()
    with stopped_after(0.05), pytest.raises(Stopped):
        source.ask(("zfs", "list"))
    assert time.monotonic() - start < 0.8


@contextlib.contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """A signal raises Stopped, as in main()."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


CLIENT = """
import json, sys
from zfs_replicate import Connection, Failure, SshHost
for config in json.load(sys.stdin):
    try:
        host = SshHost(Connection("source", (), config))
        print(host.ask(("echo", "hello")).stdout, end="")
    except Failure as failure:
        print(type(failure).__name__)
"""


def test_paramiko_prints_nothing_of_its_own(connection: Connection, tmp_path: Path) -> None:
    """In a process of its own: neither tracebacks of its threads nor warnings of what it imports reach the user."""
    known_hosts = tmp_path / "known_hosts"
    configs = []
    with contextlib.ExitStack() as stack:
        for fault in (None, Fault.DROPPED, Fault.DROPPED_LOGIN, Fault.KEY_REJECTED, "new key"):
            server = stack.enter_context(contextlib.closing(Server(tmp_path, key_file=connection.identities[0])))
            with known_hosts.open("a") as file:
                file.write(server.known_hosts_line)
            configs.append(but(connection, port=str(server.port)).config)
            if isinstance(fault, Fault):
                server.fault = fault
            elif fault is not None:
                server.host_key = paramiko.ECDSAKey.generate()
        done = subprocess.run(
            (sys.executable, "-c", CLIENT),
            input=json.dumps(configs),
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.path.dirname(zfs_replicate.__file__)},
            timeout=PATIENCE * len(configs),
        )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["hello", "LinkLost", "Failure", "Failure", "Failure"]
