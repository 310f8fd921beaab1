"""Large trees: time is the machines' own; memory and the number of commands are ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from site_pair import JOB, MIRROR, TREE, history, logins_and_commands

if TYPE_CHECKING:
    from collections.abc import Callable

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


@pytest.mark.either
def test_500_datasets_with_20_snapshots_each(site: Site, record_property: Callable[[str, object], None]) -> None:
    site.source.run(
        f"zfs create -p {TREE} && for i in $(seq 499); do zfs create -u {TREE}/dataset$i; done", timeout=1800
    )
    site.snapshot("first")
    few, _ = measured(site)
    nothing = measured(site)[1]
    site.source.run(f"for i in $(seq 19); do zfs snapshot -r {TREE}@day$i; done", timeout=1800)
    most, commands = measured(site, "-I")
    again = measured(site)
    assert {len(points) for points in history(site.backup, MIRROR).values()} == {20}
    site.assert_in_step()
    found = {"MiB": (few, most, again[0]), "commands": (nothing, commands, again[1])}
    record_property("scale", found)
    print(found)
    assert max(few, most, again[0]) < LIMIT
    assert again[1] == nothing == 2
    assert commands < 500 + 20, "one stream each, and few for all"


@pytest.mark.either
def test_listing_100000_snapshots(site: Site, record_property: Callable[[str, object], None]) -> None:
    site.source.run(f"zfs create -p {TREE} && for i in $(seq 99); do zfs create -u {TREE}/dataset$i; done", timeout=600)
    site.source.run(f"for i in $(seq 1000); do zfs snapshot -r {TREE}@autosnap_$i || exit; done", timeout=7200)
    counted = site.source.run(f"zfs list -H -o name -t snapshot -r {TREE} | wc -l", timeout=1800).stdout.strip()
    memory, commands = measured(site, "--doctor")
    found = {"snapshots": counted, "MiB": memory, "commands": commands}
    record_property("scale", found)
    print(found)
    assert counted == "100000"
    assert memory < LIMIT
    assert commands <= 5, "version, date, listing, space"
