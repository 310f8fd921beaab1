"""The file is what its docstring says: rooms in order, a pure core, options as in the README."""

from __future__ import annotations

import argparse
import ast
import dis
import functools
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Union

import pytest

import zfs_replicate

PATH = Path(zfs_replicate.__file__)
TEXT = PATH.read_text(encoding="utf-8")
TREE = ast.parse(TEXT, feature_version=(3, 9))
README = PATH.parent / "README.md"

BANNER = re.compile(r"^# Room (\d+): (.+)$", re.MULTILINE)
RULE = "# " + "-" * 117

WORLD = {
    "os", "io", "subprocess", "paramiko", "time", "datetime", "logging", "socket", "signal", "sys", "shutil", "tempfile",
    "fcntl", "pathlib", "random", "threading", "concurrent", "ThreadPoolExecutor", "argparse", "open", "print", "input",
    "__import__", "exec", "eval",
}  # fmt: skip

Definition = Union[ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef]


@functools.cache
def banners() -> list[tuple[int, str, int]]:
    """Number, name and line of each room."""
    return [(int(found[1]), found[2], TEXT.count("\n", 0, found.start()) + 1) for found in BANNER.finditer(TEXT)]


def room_of(node: ast.stmt) -> int:
    """The room a statement stands in; 0 is the front door."""
    return max((number for number, _, line in banners() if line < node.lineno), default=0)


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def defined(node: ast.stmt) -> set[str]:
    """The names a statement of the module defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


@functools.cache  # it takes long, and two tests ask
def used(node: ast.stmt) -> set[str]:
    """The global names a statement of the module needs when it runs; annotations do not run."""

    def loaded(code: CodeType) -> set[str]:
        loads = ("LOAD_GLOBAL", "LOAD_NAME")
        names = {str(instruction.argval) for instruction in dis.get_instructions(code) if instruction.opname in loads}
        return names.union(*(loaded(inner) for inner in code.co_consts if isinstance(inner, CodeType)))

    return loaded(compile(ast.Module([node], []), str(PATH), "exec", annotations.compiler_flag))


def test_docstring_maps_the_rooms_in_their_order() -> None:
    plan = (zfs_replicate.__doc__ or "").split("Rooms of this file", 1)[1]
    listed = re.findall(r"^ +(\d+) +(\S+(?: \S+)*?)  +\S", plan, re.MULTILINE)
    listed += re.findall(r"^ +(\d+) (Command line) \S", plan, re.MULTILINE)
    assert [(int(number), name) for number, name in listed] == [(number, name) for number, name, _ in banners()]
    assert [number for number, _, _ in banners()] == list(range(1, len(banners()) + 1))


def test_banners_look_alike() -> None:
    lines = TEXT.splitlines()
    for _, _, line in banners():
        assert [lines[line - 2], lines[line]] == [RULE, RULE]


def test_rooms_1_to_5_touch_nothing_outside_the_process() -> None:
    found = {
        f"line {node.lineno}: {name}" for node in TREE.body if 1 <= room_of(node) <= 5 for name in used(node) & WORLD
    }
    assert found == set()


def test_rooms_import_nothing_but_paramiko_where_a_login_is_made() -> None:
    imports = (ast.Import, ast.ImportFrom)
    assert all(room_of(node) == 0 for node in TREE.body if isinstance(node, imports))
    late = [
        (room_of(node), *(alias.name for alias in inner.names))
        for node in TREE.body
        if not isinstance(node, imports)
        for inner in ast.walk(node)
        if isinstance(inner, imports)
    ]
    assert set(late) == {(6, "paramiko")}


def test_rooms_use_only_rooms_above_them() -> None:
    home = {name: room_of(node) for node in TREE.body for name in defined(node)}
    violations = [
        f"line {node.lineno}: room {room_of(node)} uses {name} of room {home[name]}"
        for node in TREE.body
        for name in sorted(used(node) & home.keys())
        if home[name] > room_of(node)
    ]
    assert violations == []


def public_definitions() -> Iterator[Definition]:
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node


def has_contract(node: Definition) -> bool:
    """Classes, and functions of more than a few lines, or that raise; not the converters of the command line, whose
    contract is argparse's."""
    if isinstance(node, ast.ClassDef):
        return True
    raises = {
        ast.unparse(inner.exc).split("(")[0] for inner in ast.walk(node) if isinstance(inner, ast.Raise) and inner.exc
    }
    if "argparse.ArgumentTypeError" in raises:
        return False
    body = [statement for statement in node.body if not is_docstring(statement)]
    return bool(raises) or (body[-1].end_lineno or 0) - body[0].lineno >= 4


def test_docstrings_are_where_a_contract_is() -> None:
    assert [node.name for node in public_definitions() if has_contract(node) and not ast.get_docstring(node)] == []


def test_import_of_the_program_does_not_import_paramiko() -> None:
    code = "import sys, zfs_replicate; sys.exit('paramiko' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PATH.parent).returncode == 0


def test_login_imports_paramiko_without_invoke() -> None:
    code = """
        import sys, zfs_replicate
        try:
            zfs_replicate.log_in(zfs_replicate.Connection("", (), {"hostname": ("127.0.0.1",), "port": ("1",)}))
        except zfs_replicate.LinkLost:
            print("paramiko" in sys.modules, sys.modules["invoke"])
    """
    words = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(words, cwd=PATH.parent, capture_output=True, check=True).stdout == b"True None\n"


def test_dependencies_of_the_script_block_are_those_of_the_package() -> None:
    block = re.search(r"# dependencies = \[(.*)\]", TEXT)
    python = re.search(r'# requires-python = "(.*)"', TEXT)
    setup = (PATH.parent / "setup.cfg").read_text(encoding="utf-8")
    assert block
    assert python
    assert re.findall('"(.*?)"', block[1]) == re.findall(r"install_requires =\n    (.*)\n", setup)
    assert f"python_requires = {python[1]}\n" in setup


def changing_commands() -> Iterator[tuple[ast.Tuple, str, bool]]:
    """Each tuple in the file that begins like a command of zfs that changes something, the function that it stands in,
    and whether it is only shown to a person."""
    for function in (node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)):
        shown = {
            id(word)
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "shlex.join"
            for word in node.args
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Tuple) and len(node.elts) > 1:
                first, second = (it.value if isinstance(it, ast.Constant) else None for it in node.elts[:2])
                if first in ("zfs", "zpool") and second not in zfs_replicate.LOOKING:
                    yield node, function.name, id(node) in shown


def test_commands_that_change_something_are_built_in_one_place() -> None:
    """So whoever audits the file finds them on one screen."""
    begin = TEXT[: TEXT.index("# Commands that change something.")].count("\n")
    end = TEXT[: TEXT.index("\nRIGHTS = {")].count("\n")
    built = [(node.lineno, name) for node, name, is_shown in changing_commands() if not is_shown]
    assert len(built) >= 15
    assert [name for line, name in built if not begin < line < end and name != "allow_command"] == []


# README


def options() -> dict[str, argparse.Action]:
    return {option: action for action in zfs_replicate.parser()._actions for option in action.option_strings}


def readme() -> str:
    return README.read_text(encoding="utf-8")


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


@pytest.mark.parametrize("words", ["-h, --remote-host", "-k, --keep-days"])
def test_parser_has_the_options_of_crontabs_out_there(words: str) -> None:
    assert all(word in options() for word in words.split(", "))


def test_man_page_comes_from_the_parser(tmp_path: Path) -> None:
    (line,) = re.findall(r"^    pipx run (argparse-manpage .*)$", readme(), re.MULTILINE)
    tool, *words = shlex.split(line)
    program = Path(sys.executable).with_name(tool)
    subprocess.run([program, *words[:1], PATH, *words[2:]], cwd=tmp_path, check=True)
    page = (tmp_path / words[-1]).read_text(encoding="utf-8")
    assert words[:2] == ["--pyfile", PATH.name]
    assert set(re.findall(r"\\fB(\S+)\\fR", page.replace("\\-", "-"))) >= options().keys() - {"--help"}
