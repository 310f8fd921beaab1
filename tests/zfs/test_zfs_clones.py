"""Clones stay clones, and a dataset that moves at the source moves here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from site_pair import MIRROR, TREE, get, names

if TYPE_CHECKING:
    from site_pair import Site

pytestmark = pytest.mark.zfs


def origin(site: Site, child: str) -> str:
    return get(site.backup, "origin", MIRROR + child)[0]


@pytest.mark.full
def test_clones_arrive_as_clones_also_promoted_ones(site: Site) -> None:
    """`a-clone` sorts before its origin, `golden` after what was cloned from it and promoted."""
    site.plant("golden", "before")
    site.source.run(f"head -c 6000000 /dev/urandom >/{TREE}/golden/big && zfs snapshot {TREE}/golden@v1")
    site.write("later", "golden", "before")
    site.source.run(
        f"""
        zfs create backuppool/outside && zfs snapshot backuppool/outside@o &&
        zfs clone backuppool/outside@o {TREE}/foreign && zfs clone {TREE}/golden@v1 {TREE}/a-clone &&
        zfs snapshot {TREE}/a-clone@one && zfs snapshot {TREE}/disk@one && zfs clone {TREE}/disk@one {TREE}/disk2 &&
        zfs snapshot {TREE}/before@p && zfs clone {TREE}/before@p {TREE}/before/promoted &&
        zfs promote {TREE}/before/promoted && echo new >/{TREE}/a-clone/own
        """
    )
    site.snapshot("monday")
    done = site.replicate("-v")
    assert f"{MIRROR}/foreign: in full, for its origin backuppool/outside@o is not in this mirror" in done.stderr
    site.assert_in_step()
    assert origin(site, "/a-clone") == f"{MIRROR}/golden@v1"
    assert origin(site, "/disk2") == f"{MIRROR}/disk@one"
    assert origin(site, "/before/promoted") == "-"
    assert names(site.backup, f"{MIRROR}/golden") == ["v1", "monday"]
    assert int(get(site.backup, "used", f"{MIRROR}/a-clone")[0]) < 2_000_000
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)

    # What is an origin here is not expired, and a clone that is promoted now goes on.
    site.source.shift_clock(40)
    site.backup.shift_clock(40)
    site.source.run(
        f"zfs promote {TREE}/a-clone && zfs snapshot {TREE}/golden@mine && zfs clone {TREE}/golden@mine {TREE}/third"
    )
    site.write("two", "golden", "a-clone", "third")
    site.snapshot("tuesday")
    site.replicate_silently("-k", "30")
    site.assert_in_step()
    assert names(site.backup, f"{MIRROR}/golden") == ["v1", "mine", "tuesday"]
    assert origin(site, "/third") == f"{MIRROR}/golden@mine"
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)
    site.replicate_silently("-k", "30")


@pytest.mark.full
def test_clone_that_took_over_all_common_snapshots(site: Site) -> None:
    """zfs receives no increment from an origin; a fresh copy is a clone of the old one."""
    site.plant("www")
    site.snapshot("monday")
    site.replicate()
    site.source.run(f"zfs clone {TREE}/www@monday {TREE}/copy && zfs promote {TREE}/copy")
    site.write("two", "www", "copy")
    site.snapshot("tuesday")
    done = site.replicate(status=1)
    assert f"{TREE}/www and its clone have swapped roles (zfs promote)" in done.stderr
    assert names(site.backup, f"{MIRROR}/www") == ["monday"]
    assert names(site.backup, f"{MIRROR}/copy") == ["monday", "tuesday"]
    site.replicate("--quarantine")
    site.assert_in_step()
    assert origin(site, "/www").endswith("@monday")
    for child in ("/www", "/copy"):
        assert site.checksums(site.backup, MIRROR + child) == site.checksums(site.source, TREE + child)
    site.replicate_silently()


@pytest.mark.full
def test_clone_that_was_interrupted_goes_on(site: Site) -> None:
    site.plant("golden")
    site.snapshot("v1")
    site.replicate()
    site.source.run(f"zfs clone {TREE}/golden@v1 {TREE}/clone && head -c 30M /dev/urandom >/{TREE}/clone/big")
    site.snapshot("monday", f"{TREE}/clone")
    run = site.start()
    site.backup.run("kill $(cat /run/job.pid)")
    assert run.wait(timeout=60) == 128 + 15
    site.source.netem()
    assert get(site.backup, "receive_resume_token", f"{MIRROR}/clone") != ["-"]
    done = site.replicate("-v")
    assert f"{MIRROR}/clone: rest of @monday" in done.stderr
    assert origin(site, "/clone") == f"{MIRROR}/golden@v1"
    site.assert_in_step()
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)


def test_renames_and_moves_are_followed_and_nothing_is_lost(site: Site) -> None:
    site.plant("www/logs", "mail", "db")
    site.snapshot("monday")
    site.replicate_silently()
    before = get(site.backup, "guid", f"{MIRROR}/www/logs")
    site.source.run(
        f"""
        zfs rename {TREE}/www {TREE}/web && zfs create {TREE}/hosts && zfs rename {TREE}/mail {TREE}/hosts/mail &&
        zfs rename -r {TREE}@monday @mon && zfs rename {TREE}/db {TREE}/old && zfs create {TREE}/db &&
        zfs rename {TREE}/disk {TREE}/disk1
        """
    )
    site.source.run(f"echo new >/{TREE}/web/new; echo new >/{TREE}/db/new")
    site.snapshot("tuesday")
    done = site.replicate("-v")
    assert f"{MIRROR}/www: now called {MIRROR}/web, as at the source" in done.stderr
    assert "full @tuesday" in done.stderr
    site.replicate_silently()
    site.assert_in_step()
    assert get(site.backup, "guid", f"{MIRROR}/web/logs") == before
    for child in ("/web", "/web/logs", "/hosts/mail", "/old", "/disk1"):
        assert names(site.backup, MIRROR + child) == ["monday", "tuesday"], child
    assert names(site.backup, f"{MIRROR}/db") == ["tuesday"]
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)
    site.source.run(
        f"zfs destroy -r {TREE}/hosts/mail 2>/dev/null || zfs release offsite {TREE}/hosts/mail@tuesday && zfs destroy -r {TREE}/hosts/mail"
    )
    done = site.replicate("-v")
    assert f"{MIRROR}/hosts/mail: no longer exists at the source; kept" in done.stderr
    assert names(site.backup, f"{MIRROR}/hosts/mail") == ["monday", "tuesday"]


@pytest.mark.full
def test_rename_that_is_refused_here_keeps_the_base_at_the_source(site: Site) -> None:
    site.plant("www/logs")
    site.snapshot("monday")
    site.replicate_silently()
    site.backup.run(f"zfs mount {MIRROR}/www; cd /{MIRROR}/www; sleep 3600 >/dev/null 2>&1 & echo $! >/run/reader.pid")
    site.source.run(f"zfs rename {TREE}/www {TREE}/web")
    site.write("two", "web", "web/logs")
    site.snapshot("tuesday")
    said = site.replicate(status=1).stderr
    assert f"cannot unmount '/{MIRROR}/www': pool or dataset is busy\n" in said
    assert f"    on this host: see who uses it: fuser -vm /{MIRROR}/www\n" in said
    held = site.source.run(f"zfs holds -H {TREE}/web@monday {TREE}/web/logs@monday").stdout
    assert [line.split()[:2] for line in held.splitlines()] == [
        [f"{TREE}/web@monday", "offsite"],
        [f"{TREE}/web/logs@monday", "offsite"],
    ]
    site.backup.run(
        f"kill $(cat /run/reader.pid); timeout 30 tail --pid=$(cat /run/reader.pid) -f /dev/null; zfs unmount {MIRROR}/www"
    )
    site.replicate_silently()
    site.assert_in_step()
    assert names(site.backup, f"{MIRROR}/web/logs") == ["monday", "tuesday"]
