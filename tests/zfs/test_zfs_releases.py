"""Between OpenZFS releases, and onto pools that lack what newer ones know."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from lab_image import NEWEST, OLDEST, RELEASES
from site_pair import DISK, MIRROR, TAG, TREE, Pair, held, history, names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import Lab
    from site_pair import Site

pytestmark = pytest.mark.zfs

PAIRS = [
    pytest.param(pair, id="-to-".join(pair), marks=() if pair == (OLDEST, NEWEST) else pytest.mark.full)
    for pair in itertools.permutations(RELEASES, 2)
]


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest, free_lab: Lab) -> Iterator[Pair]:
    with Pair(free_lab, *request.param) as it:
        yield it


def plant(site: Site) -> None:
    site.source.write("/root/one", "1" * 64)
    site.plant("www")
    site.source.run(
        f"""
        zfs create -o recordsize=1M {TREE}/large && zfs create -o compression=zstd {TREE}/zstd &&
        zfs create -o encryption=on -o keyformat=hex -o keylocation=file:///root/one {TREE}/secret
        """
    )
    write(site)


def write(site: Site) -> None:
    for child in ("www", "large", "zstd", "secret"):
        site.source.run(f"cd /{TREE}/{child}; seq 200000 >>text; head -c 2500000 /dev/urandom >bytes")


def sums(site: Site) -> list[str]:
    """Checksums of both sides must agree; but what is encrypted cannot be read here."""
    site.source.run(f"zfs unmount {TREE}/secret && zfs unload-key {TREE}/secret")
    found = []
    for machine, tree in ((site.source, TREE), (site.backup, MIRROR)):
        children = [child for child in history(machine, tree) if child not in ("/secret", "")]
        found.append("".join(f"{child}\n{site.checksums(machine, tree + child)}" for child in children))
    site.source.run(f"zfs load-key {TREE}/secret && zfs mount {TREE}/secret")
    return found


def test_release_to_another_release(site: Site) -> None:
    plant(site)
    too_new = site.backup.release == OLDEST
    if too_new:
        site.source.run(f"zfs create -o longname=on {TREE}/long && touch /{TREE}/long/$(printf 'x%.0s' $(seq 400))")
    for day in ("monday", "tuesday"):
        site.snapshot(day)
        if too_new:
            done = site.replicate(status=1)
            assert "the pool here lacks longname: zpool upgrade, with a newer OpenZFS if need be" in done.stderr
            assert f"{TREE}/long@{day}" not in held(site.source, TREE, TAG)
        site.replicate_silently("--exclude", "long")
        write(site)
    if too_new:
        site.source.run(f"zfs destroy -r {TREE}/long")
    site.snapshot("wednesday")
    site.replicate_silently()
    site.assert_in_step()
    there, here = sums(site)
    assert there == here
    assert there.count("bytes") == 3


@pytest.mark.full
def test_pool_that_lacks_features_and_gains_them(site: Site) -> None:
    site.backup.run(
        f"""
        zpool destroy offsite && zpool create -f -d -o feature@extensible_dataset=enabled -o feature@lz4_compress=enabled \
            -O compression=lz4 offsite {DISK}-part1
        """
    )
    plant(site)
    site.snapshot("monday")
    done = site.replicate(status=1)
    assert f"{MIRROR}/secret: the stream failed:" in done.stderr
    assert "the pool here lacks large_blocks or large_dnode or encryption or zstd_compress" in done.stderr
    site.backup.run("zpool upgrade offsite")
    write(site)
    site.snapshot("tuesday")
    site.replicate_silently()
    site.assert_in_step()
    assert names(site.backup, f"{MIRROR}/large") == ["monday", "tuesday"]
    there, here = sums(site)
    assert there == here
    assert there.count("bytes") == 3
