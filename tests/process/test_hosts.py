"""Hosts: one contract for all of them, then what is particular to SSH."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Callable

import paramiko
import pytest
from ssh_server import FLOOD_BYTES, PATIENCE, Fault, Server, make_key, public

import zfs_replicate
from zfs_replicate import (
    AES,
    CHACHA,
    COMPLAINT_BYTES,
    COMPRESSORS,
    KEEPALIVE_SECONDS,
    LINK_SECONDS,
    SBIN,
    Answer,
    Command,
    CommandFailed,
    Connection,
    Failure,
    Host,
    LinkLost,
    LocalHost,
    SshHost,
    Stopped,
    Stuck,
    SudoHost,
    Tail,
    fast_cipher,
    has_aes_instructions,
    ignore_line,
    log_in,
    open_socket,
    run,
    ssh_client,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MEBIBYTE = 1024 * 1024


def log_into(connection: Connection, note: Callable[[str], None] = ignore_line) -> SshHost:
    """A host that was reached."""
    host = SshHost(connection, note)
    assert host.client
    return host


def shell(script: str, *arguments: str) -> Command:
    return ("sh", "-c", script, "sh", *arguments)


# --- The ssh client, kept away from the user's files ------------------------------------------------------------------


class SshConfig:
    """An `ssh` in front of the real one in PATH, which reads our configuration instead of the user's and system's."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.file = directory / "ssh_config"
        self.known_hosts = directory / "known_hosts"
        self.known_hosts.touch()
        programs = directory / "bin"
        programs.mkdir()
        real = shutil.which("ssh")
        assert real is not None
        executable(programs / "ssh", f'#!/bin/sh\nexec {real} -F {self.file} "$@"\n')
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        self.write("")

    def write(self, text: str) -> None:
        """`text`, then defaults that lead to none of the user's files."""
        self.file.write_text(
            textwrap.dedent(text)
            + f"Host *\n  IdentityAgent none\n  GlobalKnownHostsFile none\n  UserKnownHostsFile {self.known_hosts}\n"
        )

    def know(self, server: Server) -> None:
        with self.known_hosts.open("a") as file:
            file.write(server.known_hosts_line)

    def add(self, name: str, server: Server, *more: str) -> None:
        """Let `name` stand for a server whose key is known."""
        self.know(server)
        lines = (f"HostName 127.0.0.1\nPort {server.port}\nUser {server.user}\nIdentityFile {server.key_file}", *more)
        self.file.write_text(f"Host {name}\n" + "\n".join(lines) + "\n" + self.file.read_text())


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def ssh_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SshConfig:
    return SshConfig(tmp_path, monkeypatch)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with contextlib.closing(Server(tmp_path)) as it:
        yield it


@pytest.fixture
def connection(server: Server, tmp_path: Path) -> Connection:
    """A way to the server that asks neither `ssh -G` nor an agent."""
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_text(server.known_hosts_line)
    return Connection(
        "source",
        ("-p", str(server.port)),
        {
            "hostname": ("127.0.0.1",),
            "port": (str(server.port),),
            "user": (server.user,),
            "identityfile": (str(server.key_file),),
            "identitiesonly": ("yes",),
            "userknownhostsfile": (str(known_hosts),),
        },
    )


@pytest.fixture
def source(connection: Connection) -> Iterator[SshHost]:
    with contextlib.closing(log_into(connection)) as host:
        yield host


def but(connection: Connection, **values: str) -> Connection:
    """The connection with other settings."""
    return replace(connection, config={**connection.config, **{key: (value,) for key, value in values.items()}})


# --- The contract: whatever a host is, commands go and answers come like this -----------------------------------------


@contextlib.contextmanager
def local(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield LocalHost()


def over_ssh(login_shell: str) -> Callable[[Path, pytest.MonkeyPatch], contextlib.AbstractContextManager[Host]]:
    @contextlib.contextmanager
    def open_host(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
        config = SshConfig(directory, monkeypatch)
        with contextlib.closing(Server(directory, login_shell)) as server:
            config.add("source", server)
            with contextlib.closing(log_into(Connection.resolve("source", None, None))) as host:
                yield host

    return open_host


SUDO = """#!/bin/sh
[ "$1" = -n ] || exit 9
shift
[ -e "$1" ] || command -v "$1" >/dev/null || { echo "sudo: $1: command not found" >&2; exit 1; }
exec "$@"
"""


@contextlib.contextmanager
def by_sudo(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    executable(directory / "sudo", SUDO)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    yield SudoHost(LocalHost())


HOSTS = {
    "local": local,
    "sudo": by_sudo,
    **{f"ssh-{name}": over_ssh(name) for name in ("sh", "bash", "tcsh", "fish", "zsh") if shutil.which(name)},
}
"""Ways to open a host in an empty directory. A further kind of host, or a double of one, is a line here."""


@pytest.fixture(scope="module", params=HOSTS)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with pytest.MonkeyPatch.context() as patch, HOSTS[request.param](tmp_path_factory.mktemp("host"), patch) as it:
        yield it


def test_ask_tells_both_outputs_and_the_status_apart(host: Host) -> None:
    assert host.ask(shell("echo out; echo err >&2; exit 3")) == Answer(3, "out\n", "err\n")
    assert host.ask(("true",)) == Answer(0, "", "")
    assert host.ask(("false",)) == Answer(1, "", "")


@pytest.mark.parametrize("error", [IndexError("pop from empty list"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x")])
def test_ssh_that_paramiko_trips_over_is_a_lost_link(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Its thread hands on what it met in a malformed packet."""

    def trip(*_: object) -> Answer:
        raise error

    host = SshHost(Connection("source", (), {"hostname": ("source",), "user": ("root",)}))
    vars(host)["client"] = SimpleNamespace(get_transport=lambda: None, close=lambda: None)
    monkeypatch.setattr(host, "exchange", trip)
    with pytest.raises(LinkLost, match="lost the connection to source during zfs list"):
        host.ask(("zfs", "list"))


def test_run_returns_what_was_printed(host: Host) -> None:
    assert run(host, shell("echo ' two  words '; echo ignored >&2")) == " two  words \n"


def test_run_raises_what_was_complained(host: Host) -> None:
    with pytest.raises(CommandFailed) as caught:
        run(host, shell("echo out; echo 'no such dataset' >&2; exit 1"))
    assert caught.value.what == f"sh -c failed on {host.label}: no such dataset"


def test_run_raises_the_status_of_a_silent_failure(host: Host) -> None:
    with pytest.raises(CommandFailed, match="exit status 7 and no message"):
        run(host, shell("exit 7"))


def test_run_tells_a_missing_right_with_what_grants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(tmp_path / "zfs", '#!/bin/sh\necho "cannot $1 snapshots: permission denied" >&2; exit 1\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("zfs_replicate.own_name", lambda: "keeper")
    for tree, hint in (("tank/a", "as root on this host: zfs allow keeper destroy,mount tank/a"), ("", "")):
        with pytest.raises(CommandFailed) as caught:
            run(LocalHost(tree=tree), ("zfs", "destroy", "tank/a/b@c"))
        assert caught.value.hint == hint
    assert LocalHost(tree="tank/a").account
    assert SudoHost(LocalHost(tree="tank/a")).account is None
    monkeypatch.setattr("zfs_replicate.own_name", lambda: "root")
    assert LocalHost(tree="tank/a").account is None


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        (
            "cannot open 'tank': pool I/O is currently suspended",
            "see zpool status; when its disks are back: zpool clear",
        ),
        ("cannot unmount '/tank/a b': pool or dataset is busy", "see who uses it: fuser -vm '/tank/a b'"),
    ],
)
def test_run_tells_what_zfs_says_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, hint: str
) -> None:
    executable(tmp_path / "zfs", f'#!/bin/sh\necho "{said}" >&2; exit 1\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(CommandFailed) as caught:
        run(LocalHost(), ("zfs", "list", "tank"))
    assert caught.value.what == f"zfs list failed on this host: {said}"
    assert caught.value.hint == f"on this host: {hint}"


def test_run_names_a_missing_program(host: Host) -> None:
    assert host.ask(("no-such-program", "list")).status in (127, 1)  # sudo has no status of its own for that
    with pytest.raises(CommandFailed) as caught:
        run(host, ("no-such-program", "list"))
    assert re.search("'no-such-program'|sudo: no-such-program: command not found", caught.value.what)
    assert host.label in caught.value.what


def test_ask_of_a_program_that_may_not_run_is_an_answer(host: Host, tmp_path: Path) -> None:
    program = tmp_path / "zfs"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o644)
    answer = host.ask((str(program),))
    assert answer.status == 126
    assert "ermission denied" in answer.stderr
    with pytest.raises(CommandFailed, match="ermission denied"):
        run(host, (str(program),))


WORDS = (
    *("", " ", "two words", "trailing ", " leading", "it's", 'say "hi"', "'", '"', "tab\there"),
    *("$HOME", "`id`", "$(id)", "a;b", "a|b>c<d&e", "*", "?[a]", "~", "#x", "{a,b}", "a=b", "%h %%"),
    *("-n", "--", "tank/a b@x y ", "äöü ✓ 日本"),
)


def test_ask_passes_arguments_word_for_word(host: Host) -> None:
    answer = host.ask(shell('for word; do printf "<%s>" "$word"; done', *WORDS))
    assert answer == Answer(0, "".join(f"<{word}>" for word in WORDS), "")


def test_run_returns_output_byte_for_byte(host: Host) -> None:
    """Also what is no UTF-8, and no line end of ours."""
    assert run(host, ("printf", r"\377 \303\244\r\n\r")) == "\udcff ä\r\n\r"


def test_ask_leaves_standard_input_empty(host: Host) -> None:
    assert host.ask(shell("cat; echo done")) == Answer(0, "done\n", "")


def test_has_knows_compressors_after_the_first_command(host: Host) -> None:
    assert host.ask(("sh", "-c", "echo /usr/bin/false >&2")).stderr == "/usr/bin/false\n"
    assert {name: host.has(name) for name in COMPRESSORS} == {
        name: shutil.which(name) is not None for name in COMPRESSORS
    }
    assert not host.has("no-such-program")


def test_ask_does_not_block_on_much_output(host: Host) -> None:
    script = 'head -c "$1" /dev/zero | tr "\\0" e >&2; head -c "$1" /dev/zero | tr "\\0" o'
    answer = host.ask(shell(script, str(4 * MEBIBYTE)))
    assert answer.status == 0
    assert answer.stdout == "o" * 4 * MEBIBYTE
    assert answer.stderr == "e" * COMPLAINT_BYTES


def test_environment_finds_zfs_and_speaks_english(host: Host) -> None:
    path, language = run(host, shell('echo "$PATH"; echo "$LC_ALL"')).splitlines()
    assert path.endswith(":" + SBIN)
    assert language == "C"


def test_run_fails_if_a_signal_killed_the_command(host: Host) -> None:
    with pytest.raises(Failure):
        run(host, shell("echo looks fine; kill -KILL $$"))


def test_stream_command_carries_bytes_both_ways(host: Host) -> None:
    data = os.urandom(3 * MEBIBYTE)
    script = 'cat; printf "%s" "$1" >&2; exit 3'
    done = subprocess.run(
        host.stream_command(shell(script, "it's all ")), input=data, capture_output=True, timeout=PATIENCE, check=False
    )
    assert done.stdout == data
    assert done.stderr == b"it's all "
    assert done.returncode == 3


def test_stream_command_ends_if_nobody_reads(host: Host) -> None:
    command = host.stream_command(("cat", "/dev/zero"))
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(10) == bytes(10)
        process.stdout.close()
        assert process.wait(PATIENCE) != 0


@pytest.mark.parametrize("name", HOSTS)
def test_close_twice_is_harmless(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HOSTS[name](tmp_path, monkeypatch) as host:
        host.close()
        host.close()


# --- Bounds: what no command can make us wait for, or keep -------------------------------------------------------------

ENDLESS = ("sh", "-c", "exec head -c 20000000 /dev/zero")  # for us
COMPLAINS = ("sh", "-c", "exec cat /dev/zero >&2")
DRIBBLES = ("sh", "-c", "for i in $(seq 200); do echo line; echo line >&2; sleep 0.05; done")
COMPLAINS_AT_TIMES = ("sh", "-c", "for i in $(seq 200); do echo line >&2; sleep 0.05; done")
LIVES_ON = ("sh", "-c", "exec >&- 2>&-; sleep 10")


@pytest.fixture(params=["local", "ssh"])
def bounded_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHost | SshHost]:
    """One that may print a mebibyte."""
    monkeypatch.setattr(zfs_replicate, "OUTPUT_BYTES", MEBIBYTE)
    host: LocalHost | SshHost = LocalHost() if request.param == "local" else request.getfixturevalue("source")
    host.ask(("true",))
    yield host


def test_output_without_end_is_ended(bounded_host: LocalHost | SshHost) -> None:
    with pytest.raises(Failure, match=r"^sh -c on .* has printed more than 1.00M: ") as caught:
        bounded_host.ask(ENDLESS)
    assert type(caught.value) is Failure
    assert "in parts" in caught.value.hint


def test_output_flood_over_ssh_ends_the_connection(
    source: SshHost, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """paramiko keeps what still comes for a channel that we have closed."""
    monkeypatch.setattr(zfs_replicate, "OUTPUT_BYTES", MEBIBYTE)
    with pytest.raises(Failure, match="has printed more than"):
        source.ask(ENDLESS)
    assert eventually(lambda: not server.transports[0].is_active())
    with pytest.raises(LinkLost, match="it is closed"):
        source.ask(("true",))


@pytest.mark.parametrize("command", [COMPLAINS, DRIBBLES, COMPLAINS_AT_TIMES, LIVES_ON])
def test_deadline_of_a_command_is_one_whatever_it_prints(
    bounded_host: LocalHost | SshHost, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.setattr(bounded_host, "stall_timeout", 1.0)
    with pytest.raises(Stuck, match=r"^sh -c on .* has not ended after 1s\n"):
        bounded_host.ask(command)


def test_output_that_is_long_but_in_time_is_an_answer(bounded_host: LocalHost | SshHost) -> None:
    answer = bounded_host.ask(shell('head -c "$1" /dev/zero', str(MEBIBYTE)))
    assert answer == Answer(0, "\0" * MEBIBYTE, "")


def test_tail_keeps_the_last_of_many_words() -> None:
    tail, said = Tail(100), bytearray()
    for number in range(1000):
        word = b"%d " % number * (number % 7)
        tail.add(word)
        said += word
        assert tail.last() == said[-100:]
        assert len(tail.kept) <= 200 + len(word)
    tail.add(b"x" * 1000)
    assert tail.last() == b"x" * 100
    assert len(tail.kept) == 100


def test_tail_keeps_complaints_about_a_whole_batch_of_names() -> None:
    names = next(zfs_replicate.batches(f"a@{number:x}" for number in range(100_000)))
    told = "".join(f"cannot hold snapshot '{name}': tag already exists on this dataset\n" for name in names)
    assert len(told) < COMPLAINT_BYTES


# --- SSH: the login ---------------------------------------------------------------------------------------------------


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


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE / 10
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# --- SSH: links that break --------------------------------------------------------------------------------------------


@pytest.fixture
def dead_port() -> int:
    """Nobody listens here."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


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


def test_sudo_missing_or_refusing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("zfs_replicate.SBIN", str(tmp_path))
    with pytest.raises(CommandFailed, match=r"^zfs list failed on this host: sudo is not installed$"):
        run(SudoHost(LocalHost()), ("zfs", "list"))
    executable(tmp_path / "sudo", "#!/bin/sh\necho 'sudo: a password is required' >&2; exit 1\n")
    with pytest.raises(CommandFailed, match=r"^zfs list failed on this host: sudo: a password is required$"):
        run(SudoHost(LocalHost()), ("zfs", "list"))


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


# --- Connection: what `ssh -G` says, applied to both connections ------------------------------------------------------


def resolve(name: str, port: int | None = None, identity: str | None = None) -> Connection:
    return Connection.resolve(name, port, identity)


def test_connection_takes_all_from_an_alias(ssh_config: SshConfig, tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    ssh_config.write(
        f"""\
        Host vault
          HostName backup.example.org
          Port 2222
          User puller
          IdentityFile {key}
          IdentityFile {tmp_path}/missing
          IdentityFile {tmp_path}/key_sk
          IdentitiesOnly yes
          HostKeyAlias the-vault
        """
    )
    (tmp_path / "key_sk").touch()
    connection = resolve("vault")
    assert connection.get("hostname") == "backup.example.org"
    assert connection.port == 2222
    assert connection.get("user") == "puller"
    assert connection.identities == [str(key)]
    assert connection.get("identitiesonly") == "yes"
    assert connection.known_as == ("the-vault", 22)
    assert connection.proxy is None
    assert connection.ssh_command_for_user() == "ssh vault"


def test_connection_prefers_the_command_line_to_ssh_config(ssh_config: SshConfig, tmp_path: Path) -> None:
    ssh_config.write(f"Host vault\n  Port 2222\n  User puller\n  IdentityFile {make_key(tmp_path / 'key')}\n")
    other = make_key(tmp_path / "other key")
    connection = resolve("root@vault", 2200, str(other))
    assert (connection.get("user"), connection.port) == ("root", 2200)
    assert connection.identities[0] == str(other)
    assert connection.get("identitiesonly") == "yes"
    assert connection.known_as == ("vault", 2200)
    assert connection.ssh_command_for_user() == f"ssh -p 2200 -i '{other}' -o IdentitiesOnly=yes root@vault"


def test_connection_finds_known_hosts_in_the_home_directory(
    ssh_config: SshConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("one", "two", "three"):
        (tmp_path / name).touch()
    ssh_config.write(
        f"Host vault\n  UserKnownHostsFile ~/no-such-file-of-zfs-replicate {tmp_path}/one {tmp_path}/two\n"
        f"  GlobalKnownHostsFile {tmp_path}/three {tmp_path}/four\n"
    )
    assert resolve("vault").known_hosts == [f"{tmp_path}/{name}" for name in ("one", "two", "three")]
    unexpanded = Connection("vault", (), {"userknownhostsfile": ("~/one ~/four ~/two",)})
    assert unexpanded.known_hosts == [f"{tmp_path}/{name}" for name in ("one", "two")]
    assert Connection("vault", (), {"identityfile": ("~/one", "~/four")}).identities == [f"{tmp_path}/one"]


def test_connection_finds_a_key_named_with_tokens(ssh_config: SshConfig, tmp_path: Path) -> None:
    """ssh -G prints `%h` and the like in IdentityFile as they stand."""
    key = make_key(tmp_path / "key-vault.example-puller-100%")
    ssh_config.write(
        f"Host vault\n  HostName vault.example\n  User puller\n  IdentityFile {tmp_path}/key-%h-%r-100%%\n"
    )
    assert resolve("vault").identities == [str(key)]


def test_connection_fails_on_an_unreadable_configuration(ssh_config: SshConfig) -> None:
    ssh_config.write("Nonsense yes\n")
    with pytest.raises(Failure, match=r"(?s)ssh -G failed .*: Bad configuration option: nonsense"):
        resolve("vault")


def test_connection_names_a_missing_ssh_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zfs_replicate, "environment", lambda: {"PATH": "/nonexistent"})
    with pytest.raises(Failure, match="has no program 'ssh'"):
        resolve("vault")


def test_connection_expands_a_proxy_command(ssh_config: SshConfig) -> None:
    ssh_config.write(
        "Host vault\n  HostName v.example\n  Port 2222\n  User puller\n  ProxyCommand relay %h:%p %r 100%% %%h %n\n"
    )
    assert resolve("vault").proxy == ("sh", "-c", "exec relay v.example:2222 puller 100% %h vault")
    assert resolve("root@vault").proxy == ("sh", "-c", "exec relay v.example:2222 root 100% %h vault")


@pytest.mark.parametrize("setting", ["ProxyCommand", "ProxyJump"])
def test_connection_takes_none_for_no_proxy(ssh_config: SshConfig, setting: str) -> None:
    ssh_config.write(f"Host vault\n  {setting} none\nHost *\n  {setting} relay\n")
    assert resolve("vault").proxy is None


@pytest.mark.parametrize(
    ("jump", "words"),
    [
        ("gate", ("--", "ssh://gate")),
        ("me@gate:2222", ("--", "ssh://me@gate:2222")),
        ("a,me@b:2222", ("-J", "a", "--", "ssh://me@b:2222")),
        ("me@a:2200,b,c", ("-J", "me@a:2200,b", "--", "ssh://c")),
        ("ssh://me@gate:2222", ("--", "ssh://me@gate:2222")),
    ],
)
def test_connection_turns_a_jump_into_a_client_that_forwards(ssh_config: SshConfig, jump: str, words: Command) -> None:
    ssh_config.write(f"Host vault\n  HostName v.example\n  Port 2022\n  ProxyJump {jump}\n")
    proxy = resolve("vault").proxy
    assert proxy is not None
    assert proxy[0] == "ssh"
    assert {"BatchMode=yes", "UpdateHostKeys=no"} <= set(proxy)
    rest = [word for word in proxy[1:] if word != "-o" and "=" not in word]
    assert [word for word in rest if word not in ("-W", "[v.example]:2022")] == list(words)
    assert proxy[proxy.index("-W") + 1] == "[v.example]:2022"
    # The real client understands it so.
    told = subprocess.run((proxy[0], "-G", *proxy[1:]), capture_output=True, text=True, check=True).stdout.splitlines()
    last = resolve(words[-1])
    assert {f"hostname {last.get('hostname')}", f"user {last.get('user')}", f"port {last.port}"} <= set(told)
    assert [line for line in told if line.startswith("proxyjump ")] == [f"proxyjump {words[1]}"] * (words[0] == "-J")


def test_connections_of_control_and_stream_log_in_alike(ssh_config: SshConfig, server: Server, tmp_path: Path) -> None:
    """Same host, port, user, key and known_hosts, from one configuration and flags."""
    other = make_key(tmp_path / "other")
    server.authorized = {public(other)}
    ssh_config.know(server)
    ssh_config.write(
        f"Host vault\n  HostName 127.0.0.1\n  User {server.user}\n  Port 1\n  IdentityFile {server.key_file}\n"
    )
    connection = resolve("vault", server.port, str(other))
    with contextlib.closing(log_into(connection)) as host:
        assert host.ask(("echo", "control")).stdout == "control\n"
        assert subprocess.check_output(host.stream_command(("echo", "bulk")), timeout=PATIENCE) == b"bulk\n"
    assert server.logins == 2


def test_connection_of_streams_is_one_login_that_ends_with_us(ssh_config: SshConfig, server: Server) -> None:
    ssh_config.add("vault", server)
    with contextlib.closing(log_into(resolve("vault"))) as host:
        for _ in range(3):
            assert subprocess.check_output(host.stream_command(("echo", "bulk")), timeout=PATIENCE) == b"bulk\n"
        assert server.logins == 2
        assert host.streams is not None
        master = Path(host.streams.name) / "master"
        assert master.is_socket()
    assert not master.parent.exists()
    ours = bytes(master)  # a master's command line becomes "ssh: CONTROLPATH [mux]"
    assert eventually(lambda: not [path for path in Path("/proc").glob("[0-9]*/cmdline") if ours in read(path)])


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has just ended
        return b""


def test_connections_of_control_and_stream_refuse_a_changed_key(ssh_config: SshConfig, server: Server) -> None:
    ssh_config.add("vault", server)
    connection = resolve("vault")
    with contextlib.closing(log_into(connection)) as host:
        server.host_key = paramiko.ECDSAKey.generate()
        done = subprocess.run(host.stream_command(("true",)), capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 255
        assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in done.stderr
    with pytest.raises(Failure, match="has changed"):
        log_into(connection)
    assert server.logins == 1


# --- dial: through proxies, for real ----------------------------------------------------------------------------------

RELAY = """\
#!{python}
import os, socket, sys, threading
link = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def inward():
    while data := os.read(0, 65536):
        link.sendall(data)
    link.shutdown(socket.SHUT_RDWR)
threading.Thread(target=inward, daemon=True).start()
while data := link.recv(65536):
    os.write(1, data)
"""


def test_login_through_a_proxy_command(ssh_config: SshConfig, server: Server, tmp_path: Path) -> None:
    relay = executable(tmp_path / "relay", RELAY.format(python=f"{sys.executable} -IS"))
    ssh_config.add("vault", server, f"ProxyCommand {relay} %h %p")
    with contextlib.closing(log_into(resolve("vault"))) as host:
        assert host.ask(("echo", "control")).stdout == "control\n"
        assert subprocess.check_output(host.stream_command(("echo", "bulk")), timeout=PATIENCE) == b"bulk\n"


def test_login_through_a_jump_host(ssh_config: SshConfig, server: Server, tmp_path: Path) -> None:
    (tmp_path / "gate").mkdir()
    with contextlib.closing(Server(tmp_path / "gate")) as gate:
        ssh_config.add("gate", gate)
        ssh_config.add("vault", server, "ProxyJump gate")
        with contextlib.closing(log_into(resolve("vault"))) as host:
            assert host.ask(("echo", "control")).stdout == "control\n"
            assert gate.targets == [("127.0.0.1", server.port)]
            assert subprocess.check_output(host.stream_command(("echo", "bulk")), timeout=PATIENCE) == b"bulk\n"
            assert gate.targets == [("127.0.0.1", server.port)] * 2


@pytest.mark.parametrize("proxy", ["no-such-program %h", "false", "exec false"])
def test_lost_link_if_the_proxy_fails(connection: Connection, proxy: str) -> None:
    with pytest.raises(LinkLost, match=r"cannot reach 127.0.0.1 port"):
        log_into(but(connection, proxycommand=proxy))


def test_proxy_ends_with_the_connection(connection: Connection, tmp_path: Path) -> None:
    told = tmp_path / "pid"
    link = open_socket(but(connection, proxycommand=f"sh -c 'echo $$ > {told}; exec cat'"))
    link.sendall(b"echo")
    assert link.recv(4) == b"echo"
    pid = int(told.read_text())
    link.close()
    assert eventually(lambda: gone(pid))


def gone(pid: int) -> bool:
    """Ended, whether or not it was waited for."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# --- The ssh client for the stream ------------------------------------------------------------------------------------


def test_ssh_client_is_never_interactive(ssh_config: SshConfig) -> None:
    """Whatever the user likes for sessions, the stream gets none of it."""
    ssh_config.write(
        """\
        Host vault
          RequestTTY force
          RemoteCommand tmux attach
          Compression yes
          ControlMaster auto
          ControlPath ~/.ssh/%C
          LocalForward 8080 localhost:80
          ForwardAgent yes
          ForwardX11 yes
          StrictHostKeyChecking no
          UpdateHostKeys yes
        """
    )
    client = ssh_client(resolve("vault"), "/private/master")
    told = subprocess.run(
        (*client, "-G", "--", "vault"), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {
        "requesttty false",
        "batchmode yes",
        "updatehostkeys false",
        "compression no",
        "controlmaster auto",
        "controlpath /private/master",
        "forwardagent no",
        "forwardx11 no",
        "stricthostkeychecking true",
        "permitlocalcommand no",
        "clearallforwardings yes",
    } <= set(told)
    assert not [line for line in told if line.startswith(("remotecommand", "localforward"))]


@pytest.mark.parametrize("aes", [True, False])
def test_fast_cipher_comes_first_if_none_is_named(
    ssh_config: SshConfig, monkeypatch: pytest.MonkeyPatch, aes: bool
) -> None:
    monkeypatch.setattr("zfs_replicate.has_aes_instructions", lambda: aes)
    connection = resolve("vault")
    (setting,) = fast_cipher(connection)
    key, _, ciphers = setting.partition("=")
    assert key == "Ciphers"
    first = [AES, CHACHA] if aes else [CHACHA, AES]
    assert ciphers.startswith(",".join([*first[0], *first[1], ""]))
    assert sorted(ciphers.split(",")) == sorted(connection.get("ciphers").split(","))
    told = subprocess.run(
        (*ssh_client(connection, "none"), "-G", "vault"), capture_output=True, text=True, check=True
    ).stdout
    assert f"\nciphers {ciphers}\n" in told


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse4_2 aes avx\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n", False),  # a Raspberry Pi 4
        ("processor\t: 0\ncpu\t\t: POWER9, altivec supported\n", True),
    ],
)
def test_fast_cipher_depends_on_what_the_processor_knows(tmp_path: Path, cpuinfo: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo, encoding="ascii")
    assert has_aes_instructions(str(tmp_path / "cpuinfo")) is expected
    assert has_aes_instructions(str(tmp_path / "absent"))


@pytest.mark.parametrize("ciphers", ["aes256-ctr", "-aes128-gcm@openssh.com", "^aes256-ctr"])
def test_fast_cipher_leaves_what_the_user_named(ssh_config: SshConfig, ciphers: str) -> None:
    ssh_config.write(f"Host vault\n  Ciphers {ciphers}\n")
    connection = resolve("vault")
    assert fast_cipher(connection) == []
    told = subprocess.run(
        (*ssh_client(connection, "none"), "-G", "vault"), capture_output=True, text=True, check=True
    ).stdout
    assert f"\nciphers {connection.get('ciphers')}\n" in told
