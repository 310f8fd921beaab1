"""The README tells what the program does: its options, its messages, and the rights that it needs.

In the table of messages a row writes DATASET, HOST, N and the like for what differs from case to case, and ` / `
between several beginnings. `tests/tools/messages.py` prints what the program says, for whoever writes a row.
"""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from test_commands import OURS
from test_refusals import refusals

import zfs_replicate
from zfs_replicate import RIGHTS

PATH = Path(zfs_replicate.__file__)
README = PATH.parent / "README.md"


def readme() -> str:
    return README.read_text(encoding="utf-8")


# --- Options ----------------------------------------------------------------------------------------------------------


def options() -> dict[str, argparse.Action]:
    return {option: action for action in zfs_replicate.parser()._actions for option in action.option_strings}


def groups() -> list[tuple[str, list[tuple[list[str], str]]]]:
    """The groups of the table of options: title, and of each row the code in the first cell and the default."""
    table = readme().partition("\noption | meaning | default\n---|---|---\n")[2].partition("\n\n")[0]
    found: list[tuple[str, list[tuple[list[str], str]]]] = []
    for line in table.splitlines():
        title = re.fullmatch(r"\*\*(.+)\*\* \|", line)
        if title:
            found.append((title[1], []))
        else:
            words, _, default = (line + " | " * (line.count(" | ") == 1)).split(" | ")
            found[-1][1].append((re.findall("`([^`]+)`", words), default))
    return found


def test_readme_options_are_those_of_the_help() -> None:
    """The same options, in the same groups and order: -h, -r, -l, -t and -k first."""
    expected = [
        (
            group.title,
            [[*it.option_strings, *([str(it.metavar)] if it.metavar else [])] for it in group._group_actions],
        )
        for group in zfs_replicate.parser()._action_groups
        if group._group_actions
    ]
    assert [(title, [words for words, _ in rows]) for title, rows in groups()] == expected
    assert [words[0] for words, _ in groups()[0][1]] == ["-h", "-r", "-l", "-t", "-k"]
    assert len(expected) == 6


def test_readme_options_are_in_one_group_each() -> None:
    grouped = [option for _, rows in groups() for words, _ in rows for option in words if option.startswith("-")]
    assert sorted(grouped) == sorted(options())


def test_readme_options_have_their_defaults_and_what_is_required() -> None:
    for words, default in (row for _, rows in groups() for row in rows):
        action = options()[words[0]]
        assert action.required == (default == "required"), words
        if isinstance(action.default, str) and action.default != argparse.SUPPRESS:
            assert action.default in default, words


def test_readme_names_no_option_that_is_not() -> None:
    """Whatever it writes as `--option` in code of its own, or on a command line of ours."""
    before, heading, rest = readme().partition("## Coming from another tool")
    others, end, after = rest.partition("\n## ")
    ours = re.sub(r"^.* \| .* \| .* \| (.*)$", r"\1", others, flags=re.MULTILINE)  # of the table, our column
    text = re.sub("^    pipx run argparse-manpage .*", "", before + heading + ours + end + after, flags=re.MULTILINE)
    spans = re.findall(r"(?<!`)`(--[a-z][a-z-]*)", text)
    lines = re.findall(r"\b(?:zfs_replicate(?:\.py)?|job)( -[^|\n]*)", text)
    words = [word for line in lines for word in re.findall(r"(?<=\s)--?[A-Za-z][a-z-]*", line)]
    assert [word for word in spans + words if word not in options()] == []


def test_man_page_comes_from_the_parser(tmp_path: Path) -> None:
    (line,) = re.findall(r"^    pipx run (argparse-manpage .*)$", readme(), re.MULTILINE)
    tool, *words = shlex.split(line)
    program = Path(sys.executable).with_name(tool)
    subprocess.run([program, *words[:1], PATH, *words[2:]], cwd=tmp_path, check=True)
    page = (tmp_path / words[-1]).read_text(encoding="utf-8")
    assert words[:2] == ["--pyfile", PATH.name]
    assert set(re.findall(r"\\fB(\S+)\\fR", page.replace("\\-", "-"))) >= options().keys() - {"--help"}


# --- Messages ---------------------------------------------------------------------------------------------------------


PLACEHOLDERS = {
    "DATASET": r"[\w.:/-]+",
    "SNAPSHOT": r"[\w.:/-]+@\S+",
    "NAME": r"\S+",
    "TAG": r"\S+",
    "HOST": r"\S+",
    "TYPE": "(?:filesystem|volume)",
    "DATE": r"[\d-]+ [\d:]+",
    "N": r"[\d,]+",
}


PLACEHOLDER_WORDS = re.compile(rf"\b(?:{'|'.join(PLACEHOLDERS)})\b")


@dataclass(frozen=True)
class Row:
    """A row of the README: how messages begin, what happened, what to do."""

    beginnings: tuple[str, ...]
    cause: str
    remedy: str

    def fits(self, message: str) -> bool:
        return any(pattern_of(beginning).match(message) for beginning in self.beginnings)


def pattern_of(beginning: str) -> re.Pattern[str]:
    return re.compile(PLACEHOLDER_WORDS.sub(lambda word: PLACEHOLDERS[word[0]], re.escape(beginning)))


def readme_rows() -> list[Row]:
    head = "message begins with | what happened | what to do\n---|---|---\n"
    rows = [line.split(" | ") for line in readme().partition(head)[2].partition("\n\n")[0].splitlines()]
    return [Row(tuple(first.split(" / ")), cause, remedy) for first, cause, remedy in rows]


def written_messages() -> list[str]:
    """All texts that are written in the program, with an X for each value that is put in."""
    tree = ast.parse(PATH.read_text(encoding="utf-8"))
    return [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
    ]


def test_readme_has_a_row_for_each_refusal(tmp_path: Path) -> None:
    rows = readme_rows()
    for what, _ in refusals(tmp_path):
        fitting = [row.beginnings for row in rows if row.fits(what)]
        assert len(fitting) == 1, (what, fitting)


def test_readme_has_no_row_for_what_the_program_does_not_say(tmp_path: Path) -> None:
    reasons = [what for what, _ in refusals(tmp_path)]
    written = written_messages()
    for beginning in (it for row in readme_rows() for it in row.beginnings):
        is_said = any(pattern_of(beginning).match(what) for what in reasons)
        is_written = any(text.startswith(PLACEHOLDER_WORDS.sub("X", beginning)) for text in written)
        assert is_said or is_written, beginning


def test_readme_rows_offer_the_options_that_the_program_does(tmp_path: Path) -> None:
    reasons = list(refusals(tmp_path))
    for row in readme_rows():
        hints = " ".join(hint for what, hint in reasons if row.fits(what))
        offered = set(re.findall("--[a-z-]+", row.remedy))
        assert offered <= {*re.findall("--[a-z-]+", hints)}, row
        assert ("--rollback" in offered) == ("--rollback" in hints), row


# --- Rights -----------------------------------------------------------------------------------------------------------


def test_readme_grants_all_rights_that_the_commands_need() -> None:
    lines = [line for line in readme().splitlines() if line.startswith("    zfs allow ")]
    there, here, _mirrored = (set(line.split()[3].split(",")) for line in lines)
    assert there == {RIGHTS[verb] for verb in ("send", "hold", "release")}
    verbs = ("hold", "release", "create", "recv", "recv -A", "destroy", "userspace")
    needed = {right for verb in verbs for right in RIGHTS[verb].split(",")} | set(OURS.split(","))
    assert needed <= here
