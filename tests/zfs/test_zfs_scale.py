"""Large trees: time is the machines' own; memory and the number of commands are ours. For 100,000 snapshots see
`tests/bench growth`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Callable

import pytest
from site_pair import JOB, MIRROR, TREE, history, logins_and_commands, mounts_apart

if TYPE_CHECKING:
    from site_pair import Site

pytestmark = [pytest.mark.zfs, pytest.mark.full]

MEASURED = r"""
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
sys.exit(status)
"""

LIMIT = 150
"""MiB of memory."""


def measured(site: Site, *options: str) -> tuple[int, int]:
    """MiB of the largest process of a run, and the commands that it ran at the source."""
    before = logins_and_commands(site.source)[1]
    job = f"python3 -c '{MEASURED}' {JOB}"
    done = site.replicate(*options, job=job, timeout=7200)
    assert done.stderr == ""
    return int(done.stdout.splitlines()[-1]), logins_and_commands(site.source)[1] - before


def make(site: Site, datasets: int, apart: str) -> None:
    """Only the first hundred are mounted: each takes 700 KiB of a small machine."""
    each = f"zfs create $([ $i -le 100 ] || echo -u) {TREE}/dataset$i || exit"
    script = f"zfs create -p {TREE}; for i in $(seq {datasets - 1}); do {each}; done"
    site.source.run(f"{apart} sh -c {shlex.quote(script)}", timeout=3600)


def snapshots(site: Site, first: int, last: int) -> None:
    each = f"zfs snapshot -r {TREE}@autosnap_$i || exit"
    site.source.run(f"for i in $(seq {first} {last}); do {each}; done", timeout=7200)


Record = Callable[[str, object], None]


def test_scale_of_500_datasets_with_20_snapshots_each(site: Site, record_property: Record) -> None:
    with mounts_apart(site.source) as apart:
        make(site, 500, apart)
        snapshots(site, 1, 1)
        first = measured(site)
        few = measured(site)
        snapshots(site, 2, 20)
        next_one = measured(site)
        many = measured(site)
        found = {"first pull": first, "nothing new": few, "increment": next_one, "nothing new of 10,000": many}
        record_property("MiB and commands", found)
        print(found)
        ends = [points[-1].name.partition("@")[2] for points in history(site.backup, MIRROR).values()]
        assert ends == ["autosnap_20"] * 500
        site.assert_in_step()
    assert max(memory for memory, _ in found.values()) < LIMIT
    assert few[1] == many[1] == 2
    assert max(first[1], next_one[1]) < 20, "five batches, and few for all"


def test_scale_of_every_one_of_20_snapshots_of_50_datasets(site: Site, record_property: Record) -> None:
    with mounts_apart(site.source) as apart:
        make(site, 50, apart)
        snapshots(site, 1, 1)
        measured(site)
        snapshots(site, 2, 3)
        few = measured(site, "-I")
        snapshots(site, 4, 20)
        many = measured(site, "-I")
        record_property("MiB and commands", (few, many))
        print(few, many)
        assert {len(points) for points in history(site.backup, MIRROR).values()} == {20}
        site.assert_in_step()
    assert few[1] == many[1] < 20
