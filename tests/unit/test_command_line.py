"""The command line: a contract with crontabs out there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import stat
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import zfs_replicate
from zfs_replicate import Failure, LinkLost, Report, Selection, __version__, format_timeout, main, parse, policy_of

if TYPE_CHECKING:
    from collections.abc import Iterator

CRONTAB = "0 */6 * * *  zfs_replicate -h backup.example.org -r backuppool/virt/machines -l offsite/virt/machines -t offsite -k 30"
NEEDED = {
    "-h": "backup.example.org",
    "-r": "backuppool/vm",
    # Some of these tests take its lock, and others may run them at the same time.
    "-l": f"offsite/vm-{os.getpid()}",
    "-t": "offsite",
}


def words(**changes: str | None) -> list[str]:
    """The least command line, with short options replaced by `changes` (None leaves one out)."""
    options = {**NEEDED, **{f"-{name}": value for name, value in changes.items()}}
    return [word for option, value in options.items() if value is not None for word in (option, value)]


def accepted(**changes: str | None) -> Namespace:
    return parse(words(**changes))


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a usage error says: one line, and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.out == ""
    assert said.err.startswith("zfs_replicate: ")
    assert said.err.endswith(" (see --help)\n")
    assert len(said.err.splitlines()) == 1, said.err
    return said.err


def test_crontab_line_parses_word_for_word() -> None:
    assert vars(parse(shlex.split(CRONTAB.split("  ")[1])[1:])) == {
        "remote_host": "backup.example.org",
        "remote_fs": "backuppool/virt/machines",
        "local_fs": "offsite/virt/machines",
        "tag": "offsite",
        "keep_days": 30,
        "mbuffer": "256M",
        "port": None,
        "identity": None,
        "compress": "auto",
        "rate_limit": None,
        "cipher": None,
        "ssh_option": [],
        "keep_min": 0,
        "jobs": 1,
        "no_recursive": False,
        "exclude": [],
        "snapshots": None,
        "exclude_snapshots": [],
        "set": [],
        "ignore": [],
        "decrypt": False,
        "doctor": False,
        "dry_run": False,
        "status": False,
        "check": False,
        "retire": False,
        "max_age": 30,
        "syslog": False,
        "metrics": None,
        "json": False,
        "progress": False,
        "quiet": False,
        "sudo": None,
        "intermediates": False,
        "stall_timeout": 3600.0,
        "retries": 0,
        "bookmark": False,
        "rollback": False,
        "quarantine": False,
        "verbose": 0,
    }


def test_options_long_and_short_say_the_same(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch()
    short = "-h me@host -r a/b -l c/d -t x -k 7 -b 1G -p 2222 -n -I -v -v -i"
    long = (
        "--remote-host me@host --remote-fs a/b --local-fs c/d --tag x --keep-days 7 --mbuffer 1G --port 2222 --no-pigz"
        " --intermediates --verbose --verbose --identity"
    )
    assert parse([*short.split(), str(key)]) == parse([*long.split(), str(key)])


@pytest.mark.parametrize("option", NEEDED)
def test_options_that_are_required(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"arguments are required: {option}/--" in refused(words(**{option[1:]: None}), capsys)


def test_options_needed_are_named_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(option in refused([], capsys) for option in NEEDED)


def test_option_h_takes_a_user_with_an_at_sign() -> None:
    """As ssh does: accounts of a directory are called so."""
    assert parse(words(h="puller@corp.example@source")).remote_host == "puller@corp.example@source"


def test_option_h_is_the_host_and_not_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert accepted(h="other").remote_host == "other"
    assert "-h/--remote-host: expected one argument" in refused(["-h"], capsys)


@pytest.mark.parametrize("words", ["-h, --remote-host", "-k, --keep-days"])
def test_parser_has_the_options_of_crontabs_out_there(words: str) -> None:
    known = [option for action in zfs_replicate.parser()._actions for option in action.option_strings]
    assert all(word in known for word in words.split(", "))


def test_help_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    said = capsys.readouterr()
    assert stop.value.code == 0
    assert said.err == ""
    assert "-h [USER@]HOST" in said.out
    assert "Exit codes:" in said.out


def test_version_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"zfs_replicate {__version__}\n"


@pytest.mark.parametrize(
    "extra", ["extra", "--remote-f=a", "--keep", "-x", "--no-such-option", "-I=3"], ids=lambda word: word.strip("-")
)
def test_options_unknown_are_refused(extra: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused([*words(), extra], capsys)


LONG = "tank/" + "x" * 250

BAD = {
    "h": ["", " ", "-oProxyCommand=id", "me@-host", "@host", "me@", "a@@c", "a@b@", "a@b@-c", "two words", "host\n"],
    "r": ["", "/", "/tank", "tank/", "tank//a", "tank@a", "tank#a", "tank/%recv", "-tank", "tank/a,b", "t\tb", "tänk",
          "1tank", "tank/a\n", "tank/a\nb", LONG + "x", "tank/$(id)", "tank/a'b", "tank/a*"],
    "t": ["", ".send", "-t", "two words", "a'b", "a!b", "a\tb", "a\n", "ä", "x" * 247, "a:received"],
    "k": ["", "0", "00", "-1", "1.5", "30d", "abc", "1e3", "1_000", " 30", "30 ", "30\n", "1234567", "٣"],
    "b": ["", "0M", "256", "M", "-1M", "1T", "1.5G", "256 M", "256MB", "25%", "256M\n", "01M"],
    "-keep-min": ["", "-1", "1.5", "x", "12345"],
    "-exclude": ["", "a@b", "a,b", "a\n", "{a,b}", "ä*"],
    "-snapshots": ["", "@a", "a\tb"],
    "-set": ["", "readonly", "readonly=", "=on", "Readonly=on", "a b=c"],
    "-ignore": ["", "readonly=on", "-x", "a b", "quota\n"],
    "p": ["", "0", "65536", "-22", "ssh", "22.0", " 22", "22\n", "1_000", "٢"],
    "i": ["", "/no/such/key", "/"],
}  # fmt: skip
BAD["l"] = BAD["r"]


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in BAD.items() for value in values])
def test_value_that_is_bad_is_refused_in_one_line(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(
        [
            *words(**{option: None}),
            f"-{option}{'=' * option.startswith('-')}{value}" if value else f"-{option}",
            *([] if value else [""]),
        ],
        capsys,
    )
    assert re.search(f"argument -{option}(/--|:)", line)


@pytest.mark.parametrize("option", ["-r", "-l", "-t", "--exclude", "--set"])
@pytest.mark.parametrize("value", ["t\u00e4nk\u2028x".encode(), b"tank\xff"])
def test_value_of_strange_bytes_is_refused_in_any_locale(option: str, value: bytes) -> None:
    """As a cron job without a locale would run it."""
    argv = [word.encode() for word in words()] + [option.encode(), value]
    done = subprocess.run(
        [sys.executable, zfs_replicate.__file__, *argv],
        env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        capture_output=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"argument {option}".encode() in done.stderr


TALKATIVE = """#!/bin/sh
printf 'cannot open \\342\\200\\256\\303\\251\\033[2J\\377|\\r\\n' >&2
exit 1
"""
"""A zfs that answers all questions with an error in letters of its own."""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize(
    ("look", "status"),
    [("--check", 3), ("--status", 3), ("--doctor", 1), ("--dry-run", 3), ("--json", 3), ("-vv", 3)],
)
def test_output_of_zfs_is_told_in_any_locale(look: str, status: int, encoding: str, tmp_path: Path) -> None:
    program = tmp_path / "zfs"
    program.write_text(TALKATIVE, encoding="ascii")
    program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, zfs_replicate.__file__, *words(h="localhost"), look],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "LC_ALL": "C", "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    said = (done.stdout + done.stderr).decode(encoding)
    assert done.returncode == status, said
    assert "Traceback" not in said
    accent = r"\xe9" if encoding == "ascii" else "é"
    assert rf"cannot open \u202e{accent}\x1b[2J\xff" in said
    if look == "--json":
        assert json.loads(done.stdout)["exit"] == 3
    if look == "--check":
        assert len(done.stdout.splitlines()) == 1
        assert b"|" not in done.stdout


GOOD = {
    "h": ["localhost", "backup", "me@backup.example.org", "192.0.2.1", "fe80::1%eth0", "::1", "some_alias"],
    "r": ["tank", "tank/a", "tank/a b", "tank/a ", "tank/-a", "tank/a.b_c:d-e", "tank/1/2/3", LONG],
    "t": ["offsite", "a.b", "host:job", "a/b", "me@host", "x" * 246, "1"],
    "k": ["1", "30", "999999", "007"],
    "p": ["1", "22", "65535"],
}
GOOD["l"] = GOOD["r"]
DESTINATION = {"h": "remote_host", "r": "remote_fs", "l": "local_fs", "t": "tag", "k": "keep_days", "p": "port"}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in GOOD.items() for value in values])
def test_value_that_is_good_is_taken(option: str, value: str) -> None:
    assert vars(accepted(**{option: value}))[DESTINATION[option]] == (int(value) if option in "kp" else value)


@pytest.mark.parametrize(
    ("given", "taken"),
    [("256M", "256M"), ("1G", "1G"), ("1g", "1G"), ("64m", "64M"), ("512k", "512k"), ("512K", "512k")],
)
def test_mbuffer_memory_is_spelt_as_mbuffer_wants_it(given: str, taken: str) -> None:
    assert accepted(b=given).mbuffer == taken


def test_tag_of_full_length_leaves_room_for_the_received_tag() -> None:
    assert len(accepted(t="x" * 246).tag + ":received") == 255


def test_identity_that_cannot_be_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "key"
    key.touch()
    assert accepted(i=str(key)).identity == str(key)
    key.chmod(0)
    if not stat.S_IMODE(key.stat().st_mode) and not readable(key):
        assert "not a file we can read" in refused(words(i=str(key)), capsys)


def readable(path: Path) -> bool:
    """Whether we may read it; root may always."""
    try:
        path.read_bytes()
    except PermissionError:
        return False
    return True


@pytest.mark.parametrize(
    ("remote", "here"),
    [("tank/a", "tank/a"), ("tank/a", "tank/a/b"), ("tank/a/b", "tank/a"), ("tank", "tank/backup"), ("tank/a", "tank")],
)
def test_trees_that_overlap_on_one_host_are_refused(remote: str, here: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "overlap" in refused(words(h="localhost", r=remote, l=here), capsys)
    assert accepted(r=remote, l=here)  # on two hosts this is no overlap


@pytest.mark.parametrize(("remote", "here"), [("tank/a", "tank/ab"), ("tank/ab", "tank/a"), ("tank/a", "tank/a-b/c")])
def test_trees_side_by_side_on_one_host_are_accepted(remote: str, here: str) -> None:
    assert accepted(h="localhost", r=remote, l=here)


# Retries


class Attempts:
    """Stands in for the runs: what each attempt does is said in a word."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
        self.words = list(words)
        self.slept: list[float] = []
        self.failing = None
        monkeypatch.setattr("zfs_replicate.open_run", self.open_run)
        monkeypatch.setattr("time.sleep", self.slept.append)

    @contextlib.contextmanager
    def open_run(self, options: Namespace, report: Report, alone: object) -> Iterator[Attempts]:
        self.lost: tuple[str, LinkLost] | None = None
        self.lister, self.trees = self, self
        self.held_before: set[str] | None = None
        self.word = self.words.pop(0)
        if self.word == "unreachable":
            raise LinkLost("cannot reach it")
        if self.word == "refused":
            raise Failure("does not accept our login")
        yield self

    def begin(self, now: int) -> None:
        if self.word == "lost in the survey":
            raise LinkLost("lost in the survey")

    def execute(self, now: int) -> None:
        if self.word == "lost":
            self.lost = ("offsite/vm/www", LinkLost("the link broke"))


@pytest.mark.parametrize(
    ("attempts", "status", "retry_delays"),
    [
        pytest.param(["well"], 0, 0, id="no-need"),
        pytest.param(["lost", "well"], 0, 1, id="once"),
        pytest.param(["lost", "unreachable", "lost in the survey", "well"], 0, 3, id="thrice"),
        pytest.param(["unreachable", "well"], 0, 1, id="not-there-at-first"),
        pytest.param(["lost"] * 4, 1, 3, id="too-often"),
        pytest.param(["lost", *["unreachable"] * 3], 1, 3, id="gone"),
        pytest.param(["unreachable"] * 4, 3, 3, id="never-there"),
        pytest.param(["lost", "refused", "well"], 0, 2, id="not-ready-yet"),
        pytest.param(["refused"], 3, 0, id="not-welcome"),
    ],
)
def test_retries_follow_a_lost_link(
    attempts: list[str],
    status: int,
    retry_delays: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = Attempts(monkeypatch, *attempts)
    assert main([*words(), "--retries", "3"]) == status
    assert runs.words == []
    assert len(runs.slept) == retry_delays
    said = capsys.readouterr().err
    assert said.count("zfs_replicate: ") == (status > 0)


def test_retries_none_make_a_lost_link_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Attempts(monkeypatch, "lost", "well")
    assert main(words()) == 1
    assert runs.words == ["well"]


def test_retry_delays_grow_and_are_jittered() -> None:
    assert list(zfs_replicate.retry_delays(6, lambda low, high: 1.0)) == [5, 15, 45, 135, 300, 300]
    for low, high in zip(zfs_replicate.retry_delays(3, min), zfs_replicate.retry_delays(3, max)):
        assert low < high / 2


@pytest.mark.parametrize("text", ["90", "0s", "1d", "s", "1.5h", "1234567s"])
def test_duration_that_makes_no_sense_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a duration like 90s, 30m or 2h" in refused([*words(), "--stall-timeout", text], capsys)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200)])
def test_duration_is_read_in_any_unit(text: str, seconds: int) -> None:
    assert parse([*words(), "--stall-timeout", text]).stall_timeout == seconds
    assert format_timeout(seconds) == text


def test_policy_selects_as_the_options_say() -> None:
    options = parse(
        [*words(), "--exclude", "a", "--exclude=*/b", "--snapshots=x*", "--exclude-snapshots", "*y", "--keep-min", "3"]
    )
    assert policy_of(options).selection == Selection(True, ("a", "*/b"), ("x*",), ("*y",))
    assert policy_of(options).keep_min == 3
    assert policy_of(parse(words())).selection == Selection()
    assert not policy_of(parse([*words(), "--no-recursive"])).selection.recursive


def test_options_rollback_and_quarantine_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert "not allowed with" in refused([*words(), "--rollback", "--quarantine"], capsys)
