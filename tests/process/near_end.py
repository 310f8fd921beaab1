"""The near end of the tests of processes: short programs, and an ssh client kept away from the user's files.

The fixtures are those of all tests, for conftest.py names this file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import textwrap
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Callable

import pytest
from ssh_server import PATIENCE, Server

from zfs_replicate import Command, Connection, SshHost, ignore_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


MEBIBYTE = 1024 * 1024


def log_into(connection: Connection, note: Callable[[str], None] = ignore_line) -> SshHost:
    """A host that was reached."""
    host = SshHost(connection, note)
    assert host.client
    return host


def shell(script: str, *arguments: str) -> Command:
    return ("sh", "-c", script, "sh", *arguments)


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


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE / 10
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
