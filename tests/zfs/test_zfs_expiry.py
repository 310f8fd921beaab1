"""Expiry on real ZFS: what goes after keep-days, and all that must not."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from site_pair import MIRROR, TAG, TREE, held, names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import Machine
    from site_pair import Site

pytestmark = pytest.mark.zfs


@pytest.fixture
def aged(site: Site) -> Site:
    """A mirror of three snapshots, forty days later; the source has made one more."""
    site.source.run(f"zfs create -p {TREE}/www")
    for day in ("monday", "tuesday", "wednesday"):
        site.snapshot(day)
    site.replicate("-I")
    site.source.shift_clock(40)
    site.backup.shift_clock(40)
    site.snapshot("now")
    return site


def test_expiry_takes_local_snapshots_and_none_of_the_source(aged: Site) -> None:
    aged.replicate_silently("-k", "30")
    for child in ("", "/www"):
        assert names(aged.backup, MIRROR + child) == ["now"]
        assert names(aged.source, TREE + child) == ["monday", "tuesday", "wednesday", "now"]
    aged.assert_in_step()


@pytest.mark.full
def test_expiry_needs_keep_days(aged: Site) -> None:
    aged.replicate_silently()
    assert names(aged.backup, MIRROR) == ["monday", "tuesday", "wednesday", "now"]


@pytest.mark.full
def test_expiry_leaves_the_mirror_of_a_source_that_stopped(aged: Site) -> None:
    aged.source.run(f"zfs destroy -r {TREE}@now")
    aged.replicate_silently("-k", "30")
    assert names(aged.backup, MIRROR) == ["monday", "tuesday", "wednesday"]


@pytest.mark.full
def test_expiry_leaves_what_is_held_and_names_the_tag(aged: Site) -> None:
    aged.backup.run(f"zfs hold keepsake {MIRROR}/www@monday")
    aged.source.run(f"zfs hold {TAG} {TREE}/www@tuesday && zfs hold other {TREE}/www@wednesday")
    done = aged.replicate("-v", "-k", "30")
    assert f"{MIRROR}/www@monday: older than --keep-days, but kept: held by keepsake" in done.stderr
    assert names(aged.backup, f"{MIRROR}/www") == ["monday", "now"]
    aged.assert_in_step()


def test_expiry_takes_nothing_while_the_source_is_unreachable(aged: Site) -> None:
    aged.replicate("-I")
    aged.source.cable(plugged=False)
    try:
        aged.replicate("-k", "30", status=3)
    finally:
        aged.source.cable(plugged=True)
    assert names(aged.backup, MIRROR) == ["monday", "tuesday", "wednesday", "now"]


@contextlib.contextmanager
def failing(machine: Machine, word: str) -> Iterator[None]:
    """Let `zfs WORD` fail on a machine, as it does when the module is too busy or a right is missing."""
    machine.write(
        "/root/zfs.failing",
        f'#!/bin/sh\n[ "$1" = {word} ] && {{ echo "cannot {word}: permission denied" >&2; exit 1; }}\nexec /root/zfs.real "$@"\n',
        0o755,
    )
    machine.run("cp /usr/sbin/zfs /root/zfs.real && mount --bind /root/zfs.failing /usr/sbin/zfs")
    try:
        yield
    finally:
        machine.run("umount /usr/sbin/zfs")


@pytest.mark.full
@pytest.mark.parametrize("word", ["holds", "release"])
def test_expiry_takes_nothing_while_holds_cannot_be_read_or_released(aged: Site, word: str) -> None:
    with failing(aged.source, word):
        done = aged.replicate("-k", "30", status=1)
    assert f"cannot {word}: permission denied" in done.stderr or "still held" in done.stderr
    for child in ("", "/www"):
        ours = names(aged.backup, MIRROR + child)
        for day in held(aged.source, TREE + child, TAG):
            assert day.partition("@")[2] in ours
    assert "wednesday" in names(aged.backup, MIRROR)
    aged.replicate_silently("-k", "30")
    assert names(aged.backup, MIRROR) == ["now"]
    aged.assert_in_step()


@pytest.mark.full
def test_expiry_goes_on_after_one_that_cannot_be_destroyed(aged: Site) -> None:
    aged.backup.run(f"zfs clone -o canmount=off {MIRROR}/www@tuesday offsite/clone")
    aged.replicate_silently("-k", "36")
    assert names(aged.backup, f"{MIRROR}/www") == ["tuesday", "now"]
    done = aged.replicate("-k", "30", status=1)
    assert f"{MIRROR}/www@tuesday" in done.stderr
    assert "dependent clones" in done.stderr
    assert names(aged.backup, f"{MIRROR}/www") == ["tuesday", "now"]
