"""The folders of the checkout, for scripts that are started by hand: importing this lets them import what tests can."""

from __future__ import annotations

import configparser
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def import_folders() -> list[str]:
    """As pytest's configuration names them, so that they are listed once."""
    setup = configparser.RawConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return [str(ROOT / folder) for folder in setup["tool:pytest"]["pythonpath"].split()]


sys.path[:0] = [folder for folder in import_folders() if folder not in sys.path]
