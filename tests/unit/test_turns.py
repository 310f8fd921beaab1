"""On which releases a test runs unless all are asked for."""

from __future__ import annotations

from conftest import turns

THREE = ["old", "middle", "new"]


def test_tests_take_turns() -> None:
    assert turns([(False, THREE)] * 4) == [{"old"}, {"middle"}, {"new"}, {"old"}]


def test_what_is_for_each_runs_on_all_and_keeps_nobody_from_a_turn() -> None:
    assert turns([(False, THREE), (True, THREE)] * 2) == [{"old"}, set(THREE), {"middle"}, set(THREE)]


def test_no_test_runs_where_it_is_not_written_for() -> None:
    assert turns([(for_each, ["middle"]) for for_each in (True, False, False)]) == [{"middle"}] * 3
