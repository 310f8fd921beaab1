"""Holds converge: our tags stand where they belong, and on nothing else, whatever an earlier run left behind."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from histories import EVERY, LOCAL, POLICY, RECEIVED, SOURCE, TAG, local, partial, source

from zfs_replicate import (
    NAME_LIMIT,
    Dataset,
    HoldChanges,
    Policy,
    Snapshot,
    bookmark_changes,
    hold_changes,
    holds_to_read,
)

Tags = frozenset[str]

GUIDS = (30, 10, 20)  # by position; neither they nor the txgs of one side tell the order of the other
SOURCE_TXGS, LOCAL_TXGS = (1, 50, 99), (61, 62, 63)


def held(tag: str, rng: random.Random) -> tuple[Tags | None, ...]:
    """The tags a snapshot may carry: ours or not, beside foreign ones of all kinds, or not known."""
    foreign = ("nightly", TAG if tag == RECEIVED else RECEIVED, f"{TAG}2", ".send-1-2")
    others = frozenset(name for name in foreign if rng.randrange(4) == 0)
    return (others, others | {tag}, None)


def sources(rng: random.Random) -> Iterator[Dataset]:
    """Each position: absent, a bookmark, a snapshot (with or without a bookmark) with each kind of holds."""
    for choice in itertools.product(range(5), repeat=3):
        snapshots, bookmarks = [], []
        for position, kind in enumerate(choice):
            point = Snapshot(f"{SOURCE}@s{position}", GUIDS[position], SOURCE_TXGS[position], rng.randrange(3))
            if kind >= 2:
                snapshots.append(replace(point, tags=held(TAG, rng)[kind - 2]))
            if kind == 1 or (kind >= 2 and rng.randrange(2)):
                bookmarks.append(replace(point, name=f"{SOURCE}#s{position}"))
        rng.shuffle(snapshots)
        rng.shuffle(bookmarks)
        yield Dataset(SOURCE, "filesystem", tuple(snapshots), tuple(bookmarks))


def locals_(rng: random.Random) -> Iterator[Dataset]:
    """Each position: absent, or here with each kind of holds; now and then a foreign snapshot among them."""
    for choice in itertools.product(range(4), repeat=3):
        snapshots = [
            Snapshot(
                f"{LOCAL}@l{2 - position}", GUIDS[position], LOCAL_TXGS[position], 0, held(RECEIVED, rng)[kind - 1]
            )
            for position, kind in enumerate(choice)
            if kind
        ]
        if rng.randrange(3) == 0:
            tags = held(RECEIVED, rng)[rng.randrange(3)]
            snapshots.append(Snapshot(f"{LOCAL}@mine", 77, rng.choice((60, 70)), 9, tags))
        rng.shuffle(snapshots)
        yield Dataset(LOCAL, "filesystem", tuple(snapshots))


def cases() -> Iterator[tuple[Dataset, Dataset | None]]:
    rng = random.Random(7)
    here = list(locals_(rng))
    waits = [None, partial(None), *(partial(guid, rng.choice((*GUIDS, None))) for guid in GUIDS)]
    for there in sources(rng):
        yield there, None
        for mine, waiting in itertools.product(here, waits):
            yield there, replace(mine, partial=waiting)


def applied(dataset: Dataset | None, tag: str, place: tuple[str, ...], release: tuple[str, ...]) -> Dataset | None:
    """The dataset after the moves, each of which must make sense."""
    if dataset is None:
        assert not place
        assert not release
        return None
    names = {snapshot.name for snapshot in dataset.snapshots}
    assert names.issuperset(place), "a hold on what is not there"
    assert names.issuperset(release), "a release of what is not there"
    assert len({*place, *release}) == len(place) + len(release), "moved twice"

    def move(snapshot: Snapshot) -> Snapshot:
        if snapshot.name in place:
            assert snapshot.tags is None or tag not in snapshot.tags, f"{snapshot} is held already"
            return replace(snapshot, tags=(snapshot.tags or frozenset()) | {tag})
        if snapshot.name in release:
            assert snapshot.tags is not None, f"{snapshot}: the release of a hold that may not be there"
            assert tag in snapshot.tags, f"{snapshot} is not held"
            return replace(snapshot, tags=snapshot.tags - {tag})
        return snapshot

    return replace(dataset, snapshots=tuple(map(move, dataset.snapshots)))


def carriers(dataset: Dataset | None, tag: str) -> set[int]:
    return {s.guid for s in dataset.snapshots if s.tags and tag in s.tags} if dataset else set()


def foreign_tags(dataset: Dataset | None, tag: str) -> dict[str, Tags]:
    return {s.name: (s.tags or frozenset()) - {tag} for s in dataset.snapshots} if dataset else {}


def check(there: Dataset, mine: Dataset | None) -> None:
    moves = hold_changes(there, mine, POLICY)
    ours = {snapshot.guid for snapshot in mine.snapshots} if mine else set()
    snapshots = {snapshot.guid for snapshot in there.snapshots}
    known = snapshots | {bookmark.guid for bookmark in there.bookmarks}
    if ours and not ours & known:
        assert not moves, "history has nothing in common: its holds are left alone"
        return
    then_there = applied(there, TAG, moves.place_source, moves.release_source)
    then_mine = applied(mine, RECEIVED, moves.place_local, moves.release_local)
    # Positions in time tell the newest, by the order of GUIDS, not the txgs the program goes by.
    newest_snapshot = [guid for guid in GUIDS if guid in ours & snapshots][-1:]
    newest_point = [guid for guid in GUIDS if guid in ours & known][-1:]
    target = {mine.partial.to_guid} & snapshots if mine and mine.partial else set()
    undecoded = mine and mine.partial and mine.partial.to_guid is None
    kept = carriers(there, TAG) if undecoded else set()  # any of them may be the token's target
    assert carriers(then_there, TAG) == {*newest_snapshot, *target, *kept}
    # What was common once and is newer here may be the last copy: it keeps its hold.
    since = LOCAL_TXGS[GUIDS.index(newest_point[0])] if newest_point else 0
    newer = {snapshot.guid for snapshot in mine.snapshots if snapshot.createtxg > since} if mine else set()
    assert carriers(then_mine, RECEIVED) == {*newest_point, *(newer & carriers(mine, RECEIVED))}
    assert foreign_tags(then_there, TAG) == foreign_tags(there, TAG)
    assert foreign_tags(then_mine, RECEIVED) == foreign_tags(mine, RECEIVED)
    assert then_there
    assert not hold_changes(then_there, then_mine, POLICY), "moved again"


def test_hold_changes_converge_from_every_small_state() -> None:
    count = 0
    for there, mine in cases():
        try:
            check(there, mine)
        except AssertionError as error:
            raise AssertionError(f"there {there}\nhere {mine}\n{error}") from error
        count += 1
    assert count == 125 * (1 + 64 * 5)


# Cases in words


def moved(there: str, mine: Dataset | None) -> str:
    """The moves in a line: `there +@new -@old, here +@new`, placed before released."""

    def words(place: tuple[str, ...], release: tuple[str, ...]) -> str:
        signed = [("+", name) for name in place] + [("-", name) for name in release]
        return "".join(f" {sign}@{name.split('@')[1]}" for sign, name in signed)

    moves = hold_changes(source(there), mine, POLICY)
    sides = {
        "there": words(moves.place_source, moves.release_source),
        "here": words(moves.place_local, moves.release_local),
    }
    return ", ".join(side + said for side, said in sides.items() if said)


@pytest.mark.parametrize(
    ("there", "here", "expected"),
    [
        pytest.param(
            "@a,1!offsite @b,2!offsite", "@a,1!offsite:received @b,2", "there -@a, here +@b -@a", id="after-a-run"
        ),
        pytest.param("@a,1 @b,2!offsite", "@a,1 @b,2!offsite:received", "", id="in-place"),
        pytest.param("@a,1? @b,2?", "@a,1? @b,2?", "there +@b, here +@b", id="unknown-is-placed-never-released"),
        pytest.param("@a,1!offsite @b,2!offsite", "@x,8!offsite:received", "", id="nothing-in-common"),
        pytest.param("@a,1!offsite @b,2!offsite", "", "there -@a -@b", id="nothing-here"),
        pytest.param("@a,1!offsite #b,2", "@a,1 @b,2", "here +@b", id="a-bookmark-cannot-be-held"),
        pytest.param("#b,2", "@b,2!offsite:received", "", id="only-a-bookmark"),
        pytest.param(
            "@a,1!offsite2!offsite:received", "@a,1!offsite", "there +@a, here +@a", id="tags-that-look-like-ours"
        ),
    ],
)
def test_hold_changes_move_to_the_newest_common_snapshot(there: str, here: str, expected: str) -> None:
    assert moved(there, local(here)) == expected


def test_hold_changes_release_all_without_a_local_dataset() -> None:
    assert moved("@a,1!offsite @b,2!other", None) == "there -@a"


@pytest.mark.parametrize(
    ("there", "here", "waiting", "expected"),
    [
        ("@a,1!offsite @b,2!offsite @c,3!offsite", "@a,1!offsite:received", partial(2, 1), "there -@c"),
        ("@a,1!offsite @b,2!offsite", "", partial(1), "there -@b"),
        ("@a,1!offsite @b,2", "@a,1!offsite:received", partial(2, 1), "there +@b"),
    ],
    ids=["stays", "stays-for-a-first-receive", "is-placed"],
)
def test_hold_changes_hold_the_target_of_an_interrupted_receive(
    there: str, here: str, waiting: object, expected: str
) -> None:
    assert moved(there, replace(local(here), partial=waiting)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["place_source", "place_local", "release_source", "release_local"])
def test_hold_changes_are_true_if_there_is_any(field: str) -> None:
    assert not HoldChanges()
    assert HoldChanges(**{field: ("a@1",)})


def test_hold_changes_are_the_same_with_intermediates() -> None:
    there, mine = source("@a,1!offsite @b,2 @c,3"), local("@a,1!offsite:received @b,2 @c,3")
    assert hold_changes(there, mine, EVERY) == hold_changes(there, mine, POLICY)


@pytest.mark.parametrize(
    ("here", "asked"),
    [
        pytest.param(None, "abcd", id="nothing here"),
        pytest.param("@b,2 @c,3", "abcd", id="never held here"),
        pytest.param(f"@b,2 @c,3!{RECEIVED}", "cd", id="from the one held here on"),
        pytest.param(f"@b,2!{RECEIVED} @c,3!{RECEIVED}", "bcd", id="a run that was cut leaves two"),
        pytest.param(f"@b,2!nightly @c,3!{RECEIVED}", "cd", id="what others hold here says nothing"),
        pytest.param(f"@x,9!{RECEIVED} @c,3!{RECEIVED}", "abcd", id="one held here is gone there"),
        pytest.param(f"@m,7!{RECEIVED}", "abcd", id="one held here is a bookmark there"),
    ],
)
def test_holds_to_read_are_where_ours_may_be(here: str | None, asked: str) -> None:
    there = source("@a,1 @b,2 #m,7 @c,3 @d,4")
    found = holds_to_read(there, local(here) if here else None, POLICY, 0)
    assert "".join(snapshot.short[1:] for snapshot in found) == asked


def test_bookmarks_of_tags_that_look_alike_do_not_clash() -> None:
    names = {Policy(SOURCE, LOCAL, tag).mark(7) for tag in ("a/b", "a+b", "a=b", "a_b")}
    assert len(names) == 4
    assert "#a_b-7" in names, "a tag that zfs allows in the name of a bookmark is taken as it is"


@pytest.mark.parametrize(("excess", "is_placed"), [(0, True), (1, False)])
def test_bookmark_whose_name_would_be_too_long_is_not_made(excess: int, is_placed: bool) -> None:
    name = "tank/" + "x" * (NAME_LIMIT - len("tank/#offsite-1") + excess)
    changes = bookmark_changes(source("@a,1", name), local("@a,1"), Policy(name, LOCAL, "offsite"))
    assert (changes.place is not None) is is_placed
    assert changes.remove == ()
