"""The bugs of planted.py must fit the program as it is now; whether they are caught is for that script to try."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted import BUGS, planted

import zfs_replicate

TEXT = Path(zfs_replicate.__file__).read_text(encoding="utf-8")


@pytest.mark.parametrize("bug", BUGS)
def test_the_plant_fits_and_compiles(bug: str) -> None:
    compile(planted(TEXT, bug), "planted", "exec")
