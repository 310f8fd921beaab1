"""The file is what its docstring says: rooms in order, a pure core, and what depends on what."""

from __future__ import annotations

import ast
import dis
import functools
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Union

import zfs_replicate

PATH = Path(zfs_replicate.__file__)
TEXT = PATH.read_text(encoding="utf-8")
TREE = ast.parse(TEXT, feature_version=(3, 9))

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


def changing_commands() -> Iterator[ast.Tuple]:
    """Each tuple in the file that begins like a command of zfs that changes something, except those that are only shown
    to a person."""
    calls = [node for node in ast.walk(TREE) if isinstance(node, ast.Call) and ast.unparse(node.func) == "shlex.join"]
    shown = {id(word) for call in calls for word in call.args}
    for node in ast.walk(TREE):
        if isinstance(node, ast.Tuple) and len(node.elts) > 1 and id(node) not in shown:
            first, second = (it.value if isinstance(it, ast.Constant) else None for it in node.elts[:2])
            if first in ("zfs", "zpool") and second not in zfs_replicate.LOOKING:
                yield node


def test_commands_that_change_something_are_built_in_one_place() -> None:
    """So whoever audits the file finds them on one screen."""
    begin = TEXT[: TEXT.index("# Commands that change something.")].count("\n")
    end = TEXT[: TEXT.index("\nRIGHTS = {")].count("\n")
    built = [node.lineno for node in changing_commands()]
    assert len(built) >= 15
    assert [line for line in built if not begin < line < end] == []
