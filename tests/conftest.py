"""Fixtures of the integration tests, and the order of all: the fast ones first."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from lab_image import RELEASES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lab import Lab
    from site_pair import Keeper, Pair, Site

pytest_plugins = ("jobs", "near_end")
"""Where fixtures are that several files share."""

# The same examples on every run, however slow the machine: a failure must be one of the change at hand.
settings.register_profile(
    "steady", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all of it, every fault instead of a sample: takes hours")


def pytest_configure(config: pytest.Config) -> None:
    """What searches at random searches longer."""
    if config.getoption("--full"):
        os.environ.setdefault("ZFS_REPLICATE_EXAMPLES", "1000")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run what needs no VM first: a mistake shows in seconds. What takes very long is left out unless asked for, and so
    are the releases whose turn it is not."""
    if not config.getoption("--full"):
        left_out = {item for item in items if item.get_closest_marker("full")} | out_of_turn(items)
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: (item.get_closest_marker("zfs") is not None, release_of(item)))


def out_of_turn(items: list[pytest.Item]) -> set[pytest.Item]:
    """The variants of tests whose release has no turn."""
    tests: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and release_of(item) in RELEASES:
            tests.setdefault(f"{item.path}::{item.originalname}", []).append(item)
    for_each = [variants[0].get_closest_marker("each") is not None for variants in tests.values()]
    releases = [sorted({release_of(item) for item in variants}, key=RELEASES.index) for variants in tests.values()]
    chosen = turns(zip(for_each, releases))
    return {item for variants, turn in zip(tests.values(), chosen) for item in variants if release_of(item) not in turn}


def turns(tests: Iterable[tuple[bool, Sequence[str]]]) -> list[set[str]]:
    """Of each test whether it is for each release, and those it can run on: on which it runs. The others take turns."""
    chosen, dealt = [], 0
    for for_each, releases in tests:
        chosen.append(set(releases) if for_each else {releases[dealt % len(releases)]})
        dealt += not for_each
    return chosen


def release_of(item: pytest.Item) -> str:
    """Of the machines that a test needs; "" if it needs none."""
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return str(next((params[fixture] for fixture in ("pair", "machines", "bench", "release") if fixture in params), ""))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of the faults that struck."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    rows = [value for report in reports for name, value in report.user_properties if name == "faults"]
    if not rows:
        return
    line = "{:<9} {:<10} {:<36} {:>6} {:>8} {:>8} {:>9} {:>10}".format
    numbers = ("points", "injected", "survived", "resumable")
    terminalreporter.section("faults on real ZFS")
    terminalreporter.line(line("release", "run", "fault", *numbers, "s a fault"))
    for row in sorted(rows, key=lambda row: (row["release"], row["scenario"])):
        each = f"{row['seconds'] / max(row['points'], 1):.0f}"
        what = (row["release"], row["scenario"], row["kind"])
        terminalreporter.line(line(*what, *(row[number] for number in numbers), each))
    sums = [sum(row[number] for row in rows) for number in numbers]
    terminalreporter.line(line("together", "", "", *sums, ""))


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


@pytest.fixture(scope="session")
def keeper(lab: Lab) -> Keeper:
    """Keeps the two machines from one module to the next, for it takes long to boot them."""
    from site_pair import Keeper

    return Keeper(lab)


@pytest.fixture(scope="module")
def free_lab(keeper: Keeper) -> Lab:
    """The lab without any machine in it, for tests that boot their own."""
    keeper.clear()
    return keeper.lab


@pytest.fixture(scope="module", params=RELEASES)
def pair(request: pytest.FixtureRequest, keeper: Keeper) -> Pair:
    """Two machines of one release, `source` and `backup`. Each test puts back what it changes on them."""
    return keeper.pair_of(request.param)


@pytest.fixture
def site(request: pytest.FixtureRequest, pair: Pair) -> Iterator[Site]:
    """Both machines with empty pools, `backuppool` and `offsite`, and the program installed."""
    failed = request.session.testsfailed
    yield pair.fresh()
    if request.session.testsfailed > failed:
        pair.replace()  # who knows in what state the test has left them
