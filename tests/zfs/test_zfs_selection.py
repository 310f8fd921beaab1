"""What is meant of a tree: datasets, snapshots, properties. All else is left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from site_pair import MIRROR, TAG, TREE, get, held, history, names

if TYPE_CHECKING:
    from site_pair import Site

pytestmark = pytest.mark.zfs


@pytest.mark.full
def test_properties_that_the_mirror_has_of_its_own(site: Site) -> None:
    site.plant("www")
    site.source.run(f"zfs set com.example:owner=us {TREE}; zfs set com.example:tool=on atime=off {TREE}/www")
    values, ignored = ("compression=gzip-3", "recordsize=64K", "com.example:mirror=yes"), ("com.example:tool", "atime")
    own = [*(f"--set={value}" for value in values), *(f"--ignore={name}" for name in ignored)]
    for day in ("monday", "tuesday", "wednesday"):
        site.snapshot(day)
        site.replicate_silently(*own)
        asked = "compression,recordsize,com.example:mirror,com.example:owner,com.example:tool,atime,readonly"
        expected = ["gzip-3", "65536", "yes", "us", "-", "on", "on"]
        assert get(site.backup, asked, f"{MIRROR}/www") == expected, day
        assert get(site.backup, "compression,com.example:mirror", f"{MIRROR}/disk") == ["gzip-3", "yes"]
    site.assert_in_step()


@pytest.mark.full
def test_selection_of_datasets_and_snapshots(site: Site) -> None:
    site.plant("www/cache", "mail")
    for name in ("daily-1", "hourly-1", "daily-2", "daily-3", "hourly-2"):
        site.snapshot(name)
    meant = ("-I", "--exclude", "*/cache", "--snapshots", "daily-*", "-k", "30", "--keep-min", "2")
    site.replicate_silently(*meant)
    assert history(site.backup, MIRROR).keys() == {"", "/disk", "/mail", "/www"}
    for child in ("", "/disk", "/mail", "/www"):
        assert names(site.backup, MIRROR + child) == ["daily-1", "daily-2", "daily-3"]
    assert held(site.source, TREE, TAG) == {f"{TREE}{child}@daily-3" for child in ("", "/disk", "/mail", "/www")}

    site.replicate("--no-recursive")
    assert names(site.backup, MIRROR) == ["daily-1", "daily-2", "daily-3", "hourly-2"]
    assert names(site.backup, f"{MIRROR}/mail") == ["daily-1", "daily-2", "daily-3"]

    site.source.shift_clock(40)
    site.backup.shift_clock(40)
    site.write("two", "mail")
    site.snapshot("daily-4")
    site.replicate_silently(*meant)
    assert names(site.backup, MIRROR) == ["daily-3", "hourly-2", "daily-4"]
    assert names(site.backup, f"{MIRROR}/mail") == ["daily-3", "daily-4"]
    site.replicate_silently(*meant)
