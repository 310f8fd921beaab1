"""On which releases a test runs unless all are asked for."""

from __future__ import annotations

from collections import Counter

from conftest import turns

THREE = ["old", "middle", "new"]


def test_those_marked_either_run_once_each_and_take_turns() -> None:
    chosen = turns([({"zfs", "either"}, THREE)] * 7)
    assert chosen == [{"old"}, {"middle"}, {"new"}, {"old"}, {"middle"}, {"new"}, {"old"}]


def test_others_between_them_keep_nobody_from_a_turn() -> None:
    chosen = turns([({"either"}, THREE), (set(), THREE), ({"each"}, THREE)] * 4)
    assert Counter(release for turn in chosen[::3] for release in turn) == {"old": 2, "middle": 1, "new": 1}


def test_what_bears_no_mark_runs_on_the_oldest_and_the_newest() -> None:
    assert turns([({"zfs"}, THREE), (set(), ["old", "middle"])]) == [{"old", "new"}, {"old", "middle"}]


def test_what_is_for_each_runs_on_all() -> None:
    assert turns([({"each"}, THREE)]) == [set(THREE)]


def test_no_test_runs_where_it_is_not_written_for() -> None:
    assert turns([({mark}, ["middle"]) for mark in ("", "either", "each", "either")]) == [{"middle"}] * 4
