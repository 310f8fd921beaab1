"""Prints what the program says when it refuses, for whoever writes a row of the README's table."""

from __future__ import annotations

import tempfile
from pathlib import Path

import paths  # noqa: F401, it finds the next one
from test_refusals import refusals

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for said, way_out in refusals(Path(scratch)):
            print(f"{said}\n    {way_out}")
