"""Fixtures of the integration tests, and the order of all: the fast ones first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import Lab
    from site_pair import Pair, Site

# The same examples on every run, however slow the machine: a failure must be one of the change at hand.
settings.register_profile(
    "steady", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")

RELEASES = ("bookworm", "trixie")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what needs no VM first: a mistake shows in seconds."""
    items.sort(key=lambda item: item.get_closest_marker("zfs") is not None)


@pytest.fixture(scope="session")
def lab(pytestconfig: pytest.Config) -> Iterator[Lab]:
    """The machines' home. Its progress goes past pytest's capture: building an image takes minutes."""
    from lab import Lab, say

    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def progress(line: str) -> None:
        with capture.global_and_fixture_disabled():
            say(line)

    with Lab(progress) as it:
        yield it


@pytest.fixture(scope="module", params=RELEASES)
def pair(request: pytest.FixtureRequest, lab: Lab) -> Iterator[Pair]:
    """Two machines of one release, `source` and `backup`, for the tests of one module."""
    from site_pair import Pair

    with Pair(lab, request.param) as it:
        yield it


@pytest.fixture
def site(pair: Pair) -> Site:
    """Both machines with empty pools, `backuppool` and `offsite`, and the program installed."""
    return pair.fresh()
