"""The fault matrix on real ZFS: every call of a run, and every kind of fault that may strike there.

A sample by default; all of it with `--full`, which takes hours. Counted is what struck.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import TYPE_CHECKING

import faults
import pytest
from faults import INCREMENT, KINDS, SCENARIOS, Bench, Kind, Scenario
from lab_image import RELEASES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from site_pair import Keeper

pytestmark = [pytest.mark.zfs, pytest.mark.each]

SAMPLE = (
    (INCREMENT, faults.TOOL_KILLED, "source", "release", "before"),
    (INCREMENT, faults.SSHD_KILLED, "source", "send", "midway"),
)
"""One point each, the first that fits; the releases take turns. All the rest of the matrix is for `--full`."""


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, keeper: Keeper) -> Iterator[Bench]:
    """Two machines of one release, made ready for faults."""
    it = Bench(keeper.pair_of(request.param))
    yield it
    it.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.config.getoption("--full"):
        chosen = list(itertools.product(RELEASES, SCENARIOS, KINDS))
    else:
        chosen = [(release, it[0], it[1]) for release, it in zip(itertools.cycle(RELEASES), SAMPLE)]
    rows = [
        pytest.param(*row, id="-".join(map(str, row)).replace(" ", "_"))
        for row in sorted(chosen, key=lambda row: row[0])
    ]
    metafunc.parametrize(("bench", "scenario", "kind"), rows, indirect=["bench"])


def test_fault_is_mended_by_plain_runs(
    bench: Bench,
    scenario: Scenario,
    kind: Kind,
    record_property: Callable[[str, object], None],
    pytestconfig: pytest.Config,
) -> None:
    points = list(faults.faults(kind, scenario, bench.count(scenario)))
    if not pytestconfig.getoption("--full"):
        places = {it[2:] for it in SAMPLE if it[:2] == (scenario, kind)}
        points = [next(p for p in points if (p.call.machine, p.call.verb, p.when) in places)]
    tally = bench.try_all(scenario, points)
    row = {**asdict(tally), "release": bench.site.source.release, "scenario": scenario.name, "kind": kind.name}
    record_property("faults", row)
    assert not tally.complaints, "\n\n".join(tally.complaints)
