"""Installing from a checkout, as the README says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.network

PACKAGE = ("zfs_replicate.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy, for pip builds in place and leaves its scraps behind."""
    (tmp_path / "checkout").mkdir()
    for name in PACKAGE:
        shutil.copy(Path(__file__).parents[2] / name, tmp_path / "checkout" / name)
    return tmp_path / "checkout"


def call(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_pip_installs_the_checkout(tmp_path: Path, checkout: Path) -> None:
    call(sys.executable, "-m", "venv", f"{tmp_path}/venv")
    call(f"{tmp_path}/venv/bin/pip", "install", "--quiet", str(checkout))
    assert call(f"{tmp_path}/venv/bin/zfs_replicate", "--version").startswith("zfs_replicate ")
    call(f"{tmp_path}/venv/bin/python", "-c", "import paramiko")


def test_pipx_installs_the_checkout(tmp_path: Path, checkout: Path) -> None:
    home = {"PIPX_HOME": f"{tmp_path}/home", "PIPX_BIN_DIR": f"{tmp_path}/bin", "PIPX_MAN_DIR": f"{tmp_path}/man"}
    call(sys.executable, "-m", "pipx", "install", "--quiet", str(checkout), **home)
    assert "--remote-host" in call(f"{tmp_path}/bin/zfs_replicate", "--help")
