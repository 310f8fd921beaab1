"""Hosts: one contract for all of them, and what no command can make us wait for, or keep."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Callable

import pytest
from near_end import MEBIBYTE, SshConfig, eventually, executable, log_into, shell
from ssh_server import PATIENCE, Server

import zfs_replicate
from zfs_replicate import (
    COMPLAINT_BYTES,
    COMPRESSORS,
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
    Stuck,
    SudoHost,
    Tail,
    run,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


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


# --- Bounds: what no command can make us wait for, or keep ------------------------------------------------------------


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


def test_sudo_missing_or_refusing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("zfs_replicate.SBIN", str(tmp_path))
    with pytest.raises(CommandFailed, match=r"^zfs list failed on this host: sudo is not installed$"):
        run(SudoHost(LocalHost()), ("zfs", "list"))
    executable(tmp_path / "sudo", "#!/bin/sh\necho 'sudo: a password is required' >&2; exit 1\n")
    with pytest.raises(CommandFailed, match=r"^zfs list failed on this host: sudo: a password is required$"):
        run(SudoHost(LocalHost()), ("zfs", "list"))
