"""On which releases a test runs unless all are asked for."""

from __future__ import annotations

from conftest import turns

THREE = ["old", "middle", "new"]


def test_turns_go_round_the_releases() -> None:
    assert turns([(False, THREE)] * 4) == [{"old"}, {"middle"}, {"new"}, {"old"}]


def test_turns_are_not_taken_by_tests_for_each_release() -> None:
    assert turns([(False, THREE), (True, THREE)] * 2) == [{"old"}, set(THREE), {"middle"}, set(THREE)]


def test_turns_are_only_where_a_test_can_run() -> None:
    assert turns([(for_each, ["middle"]) for for_each in (True, False, False)]) == [{"middle"}] * 3
