"""The bugs of planted.py must fit the program as it is now, and the fast tests must catch each of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from planted import BUGS, caught_by, part_of, planted

import zfs_replicate

PROGRAM = ast.parse(Path(zfs_replicate.__file__).read_text(encoding="utf-8"))


@pytest.mark.parametrize("bug", BUGS)
def test_plant_fits_and_compiles(bug: str) -> None:
    tops = {plant.where.partition(".")[0] for plant in BUGS[bug]}
    with planted(PROGRAM, bug):
        for top in tops:
            compile(ast.unparse(part_of(PROGRAM, top)), "planted", "exec")


def test_plants_all_gone_leave_the_program_but_for_its_comments() -> None:
    """Also after all bugs were planted, and gone again."""
    text = Path(zfs_replicate.__file__).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(ast.unparse(PROGRAM))) == ast.dump(ast.parse(text))


@pytest.mark.full
@pytest.mark.parametrize("bug", BUGS)
def test_plant_is_caught(bug: str) -> None:
    assert caught_by(bug, workers=1), f"no fast test fails on this bug: {bug}"
