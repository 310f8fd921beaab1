"""What `ssh -G` says, applied to both connections; proxies; the ssh client of the stream."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import paramiko
import pytest
from near_end import SshConfig, but, eventually, executable, log_into
from ssh_server import PATIENCE, Server, make_key, public

import zfs_replicate
from zfs_replicate import (
    AES,
    CHACHA,
    Command,
    Connection,
    Failure,
    LinkLost,
    fast_cipher,
    has_aes_instructions,
    open_socket,
    ssh_client,
)


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
