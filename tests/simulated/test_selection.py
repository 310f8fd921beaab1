"""Runs that mirror a part of the tree, or some of its snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from histories import RECEIVED, TAG
from simulated import days

from zfs_replicate import Selection

if TYPE_CHECKING:
    from jobs import Job


def test_selection_leaves_the_rest_as_it_is_on_both_sides(mirrored: Job) -> None:
    mirrored.source.world.now += days(90)
    mirrored.snapshot("b")
    mirrored.replicate(keep=1, selection=Selection(exclude=("www",)))
    assert mirrored.here() == f"b!{RECEIVED}"
    for key in ("/www", "/www/logs"):
        assert (mirrored.here(key), mirrored.there(key)) == (f"a!{RECEIVED}", f"a!{TAG} b")
    mirrored.snapshot("c")
    mirrored.replicate(selection=Selection(recursive=False))
    assert (mirrored.here(), mirrored.here("/disk")) == (f"b c!{RECEIVED}", f"b!{RECEIVED}")
    assert not [words for words in mirrored.done() if "www" in words or "disk" in words]


def test_selection_of_snapshots_comes_and_expires(mirrored: Job) -> None:
    for name in ("d1", "h1", "d2", "d3", "h2"):
        mirrored.snapshot(name, "")
    mirrored.replicate(every=True, selection=Selection(snapshots=("d*",)))
    assert (mirrored.here(), mirrored.there()) == (f"a d1 d2 d3!{RECEIVED}", f"a d1 h1 d2 d3!{TAG} h2")
    mirrored.source.world.now += days(90)
    mirrored.snapshot("d4", "")
    mirrored.replicate(keep=1, selection=Selection(snapshots=("d*",), exclude_snapshots=("*2",)))
    assert mirrored.here() == f"a d2 d4!{RECEIVED}"


def test_placeholder_stands_for_a_parent_without_selected_snapshot(job: Job) -> None:
    job.snapshot("h", "")
    job.snapshot("d", "/www")
    job.replicate(selection=Selection(snapshots=("d",)))
    assert (job.here(), job.here("/www")) == ("", f"d!{RECEIVED}")
    assert job.there() == "h"
