"""Links that break, runs that are killed, peers that hang: each run ends by itself, and the next one goes on."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from site_pair import MIRROR, TAG, TREE, get, held, names

if TYPE_CHECKING:
    from collections.abc import Callable

    from site_pair import Site

pytestmark = pytest.mark.zfs

ALIVE = "pgrep -x -l 'zfs|ssh|mbuffer|zfs_replicate'"
"""On the backup machine nobody else runs these."""


ON_ONE = pytest.mark.parametrize("pair", ["trixie"], indirect=True)
"""Waits long for the program's own sake: one release is enough."""


def plant_big(site: Site, size: str = "30M") -> None:
    site.source.run(f"zfs create -p {TREE} && head -c {size} /dev/urandom > /{TREE}/big")
    site.snapshot("monday")


def goes_on(site: Site, *options: str) -> None:
    """The next plain run resumes what was interrupted, and all is as it should be."""
    site.source.netem()
    assert "rest of @monday" in site.replicate("-v", *options).stderr
    site.assert_in_step()
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)


@ON_ONE
def test_cable_pulled_during_a_stream(site: Site) -> None:
    """It ends by its own stall watch, and finds the control connection dead by its keepalive."""
    plant_big(site)
    running = site.start("--stall-timeout", "20s")
    site.source.cable(plugged=False)
    try:
        _, said = running.communicate(timeout=200)
    finally:
        site.source.cable(plugged=True)
    assert running.returncode == 1
    assert "the stream stalled: no data came for 20s" in said
    assert "lost the connection to source during" in said
    assert "Traceback" not in said
    assert site.backup.run(ALIVE, check=False).stdout == ""
    goes_on(site)


@pytest.mark.full
@ON_ONE
def test_peer_frozen_during_a_stream(site: Site) -> None:
    """Without a word on the command line: keepalives notice."""
    plant_big(site)
    running = site.start()
    site.source.freeze()
    try:
        _, said = running.communicate(timeout=300)
    finally:
        site.source.thaw()
    assert running.returncode == 1
    assert "the link to source broke" in said
    goes_on(site)


@pytest.mark.full
def test_lost_link_is_retried_and_the_stream_resumed(site: Site) -> None:
    plant_big(site)
    running = site.start("-v", "--retries", "3")
    site.source.run("ss -K src 10.77.0.0/16 sport = 22")
    _, said = running.communicate(timeout=300)
    assert running.returncode == 0, said
    assert "trying again in" in said
    assert "rest of @monday" in said
    site.assert_in_step()


@pytest.mark.full
def test_signals_end_everything_and_leave_a_resumable_state(site: Site) -> None:
    plant_big(site, "50M")
    temporary = site.backup.run("ls /tmp").stdout
    for signal, status in (("TERM", 143), ("INT", 130), ("HUP", 129)):
        running = site.start(after=6_000_000)
        site.backup.run(f"kill -{signal} $(cat /run/job.pid)")
        assert running.wait(timeout=60) == status
        assert running.communicate()[1] == ""
        assert site.backup.run(ALIVE, check=False).stdout == ""
        assert site.backup.run("ls /tmp").stdout == temporary
    goes_on(site)


@pytest.mark.full
def test_receive_that_outlives_its_run_is_told_and_left_alone(site: Site) -> None:
    plant_big(site, "80M")
    running = site.start()
    site.backup.run("kill -KILL $(cat /run/job.pid)")
    running.wait(timeout=60)
    done = site.replicate(status=3)
    assert "is still running" in done.stderr
    assert site.backup.run("pgrep -x -c zfs").stdout == "1\n", "it was gone already: nothing was tested"
    site.backup.run("for i in $(seq 600); do pgrep -x zfs >/dev/null || exit 0; sleep 0.2; done; exit 1", timeout=300)
    site.replicate_silently()
    assert names(site.backup, MIRROR) == ["monday"]
    site.assert_in_step()


@pytest.mark.full
def test_run_that_stands_still_is_named(site: Site) -> None:
    plant_big(site)
    running = site.start()
    pid = site.backup.run("kill -STOP $(cat /run/job.pid) && cat /run/job.pid").stdout.strip()
    site.backup.run("pkill -STOP -x mbuffer; sleep 9")
    done = site.replicate("--stall-timeout", "2s", status=3)
    assert f"another run (pid {pid}, since " in done.stderr
    assert "nothing has moved there since" in done.stderr
    site.backup.run(f"kill -CONT {pid}; pkill -CONT -x mbuffer")
    assert running.wait(timeout=300) == 0
    site.assert_in_step()


@pytest.mark.full
def test_bookmark_of_our_own_carries_the_chain_on(site: Site) -> None:
    site.plant("www")
    site.snapshot("monday")
    site.replicate_silently("--bookmark")
    site.snapshot("tuesday")
    site.replicate_silently("--bookmark")
    marks = site.source.run(f"zfs list -H -r -t bookmark -o name,guid {TREE}").stdout.splitlines()
    tuesdays = site.source.run(f"zfs list -H -r -t snapshot -o name,guid {TREE} | grep @tuesday").stdout.splitlines()
    named = {f"{name.partition('@')[0]}#{TAG}-{guid}\t{guid}" for name, guid in (line.split("\t") for line in tuesdays)}
    assert set(marks) == named
    site.source.run(f"zfs release -r {TAG} {TREE}@tuesday && zfs destroy -r {TREE}@tuesday")
    site.write("more", "www")
    site.snapshot("wednesday")
    site.replicate_silently("--bookmark")
    assert names(site.backup, f"{MIRROR}/www") == ["monday", "tuesday", "wednesday"]
    assert len(site.source.run(f"zfs list -H -r -t bookmark -o name {TREE}").stdout.splitlines()) == len(named)
    site.assert_in_step()
    assert held(site.source, TREE, TAG) == {f"{TREE}{child}@wednesday" for child in ("", "/disk", "/www")}
    before = site.source.run(f"zfs list -Hpr -t all -o name,guid,createtxg {TREE}").stdout
    site.replicate_silently("--bookmark")
    assert site.source.run(f"zfs list -Hpr -t all -o name,guid,createtxg {TREE}").stdout == before


@ON_ONE
@pytest.mark.full
def test_stream_cut_five_times_costs_little_more_than_one(
    site: Site, record_property: Callable[[str, object], None]
) -> None:
    """At random points; each cut costs at most what had not come to rest on the disk of the backup machine."""
    plant_big(site, "1G")
    total = 2**30
    seed = random.randrange(2**32)
    points = random.Random(seed)
    cuts = sorted(points.uniform(0.05, 0.95) * total for _ in range(5))
    print(f"seed {seed}: cuts after {', '.join(f'{cut / total:.0%}' for cut in cuts)}")
    sent_before = sent(site)
    arrived = 0.0
    for cut in cuts:
        running = site.start(after=int(cut - arrived), megabits=0)
        site.source.run("ss -K src 10.77.0.0/16 sport = 22")
        assert running.wait(timeout=120) == 1
        assert get(site.backup, "receive_resume_token", MIRROR)[0].startswith("1-")
        arrived = cut
    site.replicate(timeout=1200)
    ratio = (sent(site) - sent_before) / total
    print(f"bytes on the wire: {ratio:.3f} of the stream")
    record_property("bytes on the wire", ratio)
    assert ratio < 1.3
    site.assert_in_step()
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)


def sent(site: Site) -> int:
    """Bytes that the source has put on the wire since it was booted."""
    return int(site.source.read("/sys/class/net/lab0/statistics/tx_bytes"))
