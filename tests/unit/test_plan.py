"""The planner, against every small history, on a model of what zfs send and receive permit."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import pytest
from histories import EVERY, LOCAL, POLICY, SOURCE, local, partial, source

from zfs_replicate import (
    MAX_STEPS,
    NAME_LIMIT,
    AbortReceive,
    Blocked,
    Dataset,
    Partial,
    Policy,
    Receive,
    RenameSnapshots,
    Selection,
    Snapshot,
    Step,
    newest_common,
    plan_dataset,
)

# ---------------------------------------------------------------------------------------------------------------------
# A model of zfs: it knows positions in history, and neither txgs nor the order in which things are listed
# ---------------------------------------------------------------------------------------------------------------------

FOREIGN = -1
Marks = tuple[str, ...]
"""What the source has at each position of its history: "" nothing, "@" a snapshot, "#" a bookmark, "@#" both."""
Local = tuple[tuple[int, str], ...]
"""Position (or FOREIGN) and short name of each local snapshot, oldest first."""

# Neither guid nor name nor creation runs with time.
GUIDS = {0: 90, 1: 30, 2: 18446744073709551615, 3: 10, 4: 50, FOREIGN: 70}
POSITION = {guid: position for position, guid in GUIDS.items()}
LETTERS = "dbeacf"


def at(position: int) -> str:
    """The short name of the source's snapshot at a position."""
    return f"@{LETTERS[position]}"


SOME = Selection(snapshots=("[abd]", "c*"), exclude_snapshots=("?*c", "d"))
SELECTED = [position for position, letter in enumerate(LETTERS) if letter in "abc"]


class Refused(AssertionError):
    """zfs would not do this."""


def mapped(snapshot: Snapshot, marks: Marks) -> int:
    """The position of a point of the source; refuses one the source does not have."""
    position = POSITION[snapshot.guid]
    if snapshot.name[len(SOURCE)] not in marks[position] or snapshot.name[len(SOURCE) + 1 :] != LETTERS[position]:
        raise Refused(f"{snapshot} is not at the source")
    return position


def sent(marks: Marks, step: Receive) -> list[int]:
    """The positions of the snapshots that the stream of a step carries."""
    last = mapped(step.snapshot, marks)
    if step.snapshot.is_bookmark:
        raise Refused("a bookmark cannot be sent")
    if step.base is None:
        return [last]
    first = mapped(step.base, marks)
    if first >= last:
        raise Refused(f"{step.base.short} is not an earlier snapshot of {step.snapshot.short}")
    return [last]


def received(marks: Marks, here: Local | None, step: Receive) -> Local:
    """The local history after a step."""
    carried = sent(marks, step)
    if step.base is None and here is not None:
        raise Refused("destination exists")
    if step.base is not None and (not here or here[-1][0] != POSITION[step.base.guid]):
        raise Refused("most recent snapshot does not match incremental source")
    return appended(here, carried)


def resumed(marks: Marks, here: Local | None, waiting: Partial, step: Receive) -> Local:
    """The local history after an interrupted receive went on."""
    if step.token != waiting.token or step.snapshot.guid != waiting.to_guid:
        raise Refused("contains partially-complete state")
    if not alive(marks, here, waiting):
        raise Refused("the source lacks what the token needs, or the most recent snapshot is not its base")
    return appended(here, [mapped(step.snapshot, marks)])


def appended(here: Local | None, positions: list[int]) -> Local:
    for position in positions:
        if any(name == at(position) for _, name in here or ()):
            raise Refused(f"{at(position)} exists")
        here = (*(here or ()), (position, at(position)))
    assert here
    return here


def alive(marks: Marks, here: Local | None, waiting: Partial) -> bool:
    """Whether an interrupted receive can still be completed."""
    if waiting.to_guid is None or "@" not in marks[POSITION[waiting.to_guid]]:
        return False
    if waiting.from_guid is None:
        return here is None
    base = POSITION[waiting.from_guid]
    return bool(marks[base] and here and here[-1][0] == base)


def after(marks: Marks, here: Local | None, waiting: Partial | None, step: Step) -> Local | None:
    """The local history after any step. Giving up leaves what was here before: of a first receive, nothing."""
    if isinstance(step, RenameSnapshots):
        for old, new in step.names:
            assert new not in {name for _, name in here or ()}, "a name is taken"
            here = tuple((position, new if name == old else name) for position, name in here or ())
        return here
    if waiting is None:
        assert isinstance(step, Receive), "there is nothing to abandon"
        return received(marks, here, step)
    if isinstance(step, Receive):
        return resumed(marks, here, waiting, step)
    assert not alive(marks, here, waiting), "gave up what could have gone on"
    return here


# Histories as the planner sees them: txgs of either side run independently, times run as they like, lists are shuffled.


def source_of(marks: Marks, rng: random.Random) -> Dataset:
    txgs = sorted(rng.sample(range(1, 100), len(marks)))
    points = [
        Snapshot(f"{SOURCE}{mark}{LETTERS[position]}", GUIDS[position], txgs[position], rng.randrange(3))
        for position, kinds in enumerate(marks)
        for mark in kinds
    ]
    rng.shuffle(points)
    snapshots = tuple(point for point in points if not point.is_bookmark)
    return Dataset(SOURCE, "filesystem", snapshots, tuple(point for point in points if point.is_bookmark))


def local_of(here: Local | None, rng: random.Random) -> Dataset | None:
    if here is None:
        return None
    txgs = sorted(rng.sample(range(1, 100), len(here)))
    points = [Snapshot(LOCAL + n, GUIDS[p], txg, rng.randrange(3)) for (p, n), txg in zip(here, txgs)]
    rng.shuffle(points)
    return Dataset(LOCAL, "filesystem", tuple(points))


def local_histories(length: int, rng: random.Random) -> Iterator[Local | None]:
    """Each choice of received positions, with a foreign snapshot at each place among them or none; names renamed,
    swapped, or taken from positions that are not here, so that they tell nothing of the guid."""
    for present in itertools.product((False, True), repeat=length):
        for place in (None, *range(length + 1)):
            history = [position for position in range(length) if present[position]]
            if place is not None:
                history.insert(sum(present[:place]), FOREIGN)
            if not history:
                yield None
                continue
            names = [at(position) if position != FOREIGN else "@manual" for position in history]
            manner = rng.randrange(4)
            if manner == 0:
                rng.shuffle(names)
            elif manner == 1:
                names = rng.sample([at(position) for position in range(length + 1)], len(names))
            elif manner == 2:
                names = [rng.choice((name, f"{name}.old")) for name in names]
            yield tuple(zip(history, names))


@dataclass
class Case:
    """A source, and what is here: its history, and how the planner gets to see it."""

    origin: Dataset
    marks: Marks
    here: Local | None
    dataset: Dataset | None

    def run(self, policy: Policy, rng: random.Random) -> tuple[bool, Local, list[tuple[Step, ...]]]:
        """Take the first step of a plan, then plan anew, until no step is left.

        Returns whether it ended in step (else it is blocked), what is here then, and the plans before.
        """
        here, dataset = self.here, self.dataset
        plans: list[tuple[Step, ...]] = []
        while not plans or len(plans) < MAX_STEPS + len(plans[0]):
            try:
                steps = plan_dataset(self.origin, dataset, policy, LOCAL)
            except Blocked:
                return False, here or (), plans
            if not steps:
                assert dataset is None or dataset.partial is None, "an interrupted receive is left lying"
                return True, here or (), plans
            plans.append(steps)
            waiting = dataset.partial if dataset else None
            here = after(self.marks, here, waiting, steps[0])
            dataset = local_of(here, rng)
            if isinstance(steps[0], RenameSnapshots):
                dataset = replace(dataset or Dataset(LOCAL, "filesystem"), partial=waiting)
        raise AssertionError("never done")


def possible(marks: Marks, here: Local, wanted: list[int]) -> bool:
    """Whether any chain of streams brings exactly these, in order, with nothing destroyed."""
    return here[-1][0] != FOREIGN and bool(marks[here[-1][0]]) and bool(wanted)


def newest_of_both(marks: Marks, here: Local) -> int:
    """The position of the newest mutual point, or -1."""
    ours = {position for position, _ in here}
    return max((p for p in range(len(marks)) if marks[p] and p in ours), default=-1)


def check(case: Case, policy: Policy, rng: random.Random) -> None:
    marks = case.marks
    before: Local = case.here or ()
    is_in_step, then, _ = case.run(policy, rng)
    assert [position for position, _ in then[: len(before)]] == [position for position, _ in before], "of history"
    for (position, name), (_, old) in zip(then, before):
        renamed = (
            {at(position)} if position != FOREIGN and "@" in marks[position] else {f"{old}.dropped-{GUIDS[position]}"}
        )
        assert name in {old, *renamed}, "a snapshot was given the name of another"
    if case.dataset and case.dataset.partial and alive(marks, case.here, case.dataset.partial):
        before = then[: len(before) + 1]
        assert GUIDS[before[-1][0]] == case.dataset.partial.to_guid, "another snapshot came before the interrupted one"
    newer = [p for p in range(newest_of_both(marks, before) + 1, len(marks)) if "@" in marks[p]]
    if policy.selection == SOME:
        newer = [p for p in newer if p in SELECTED]
    wanted = newer if policy.intermediates else newer[-1:]
    gained = [position for position, _ in then[len(before) :]]
    if not is_in_step:
        assert wanted, "blocked, but there is nothing to pull"
        assert before, "blocked, but there is nothing in the way"
        assert not possible(marks, before, wanted), "blocked, but there was a way"
        assert not gained
    else:
        # Everything asked for is here by guid, and nothing else came along.
        assert gained == wanted


def check_all(cases: Iterable[Case], policy: Policy, rng: random.Random) -> int:
    count = 0
    for case in cases:
        try:
            check(case, policy, rng)
        except AssertionError as error:
            waiting = case.dataset and case.dataset.partial
            raise AssertionError(f"source {case.marks}, local {case.here}, waiting {waiting}: {error}") from error
        count += 1
    return count


def sources(length: int, rng: random.Random) -> Iterator[tuple[Dataset, Marks]]:
    for marks in itertools.product(("", "@", "#", "@#"), repeat=length):
        yield source_of(marks, rng), marks


@pytest.mark.parametrize(
    ("policy", "length", "count"),
    [
        pytest.param(POLICY, 4, 24_576, id="newest"),
        pytest.param(POLICY, 5, 229_376, id="newest-of-five", marks=pytest.mark.full),
        pytest.param(EVERY, 4, 24_576, id="intermediates"),
        pytest.param(replace(POLICY, selection=SOME), 4, 24_576, id="newest-of-some", marks=pytest.mark.full),
        pytest.param(replace(EVERY, selection=SOME), 4, 24_576, id="some"),
    ],
)
def test_plan_of_every_history(policy: Policy, length: int, count: int) -> None:
    rng = random.Random(length)
    ours = [(here, local_of(here, rng)) for here in local_histories(length, rng)]
    cases = (Case(*origin, *mine) for origin in sources(length, rng) for mine in ours)
    assert check_all(cases, policy, rng) == count


def interrupted(length: int, rng: random.Random) -> Iterator[Case]:
    """Each local history with a receive that was interrupted on it: its base is here (the partial state pins it), or
    it was a first one; or its token cannot be decoded. A snapshot made here later may lie on top."""
    receives: list[tuple[Local | None, Partial]] = [(None, partial(None))]
    for target in range(length):
        receives.append((None, partial(GUIDS[target])))
        for present in itertools.product((False, True), repeat=target):
            history = tuple((position, at(position)) for position in range(target) if present[position])
            for mine in (history, (*history, (FOREIGN, "@manual"))) if history else ():
                receives += [(mine, partial(GUIDS[target], GUIDS[history[-1][0]])), (mine, partial(None))]
    for origin, marks in sources(length, rng):
        for here, waiting in receives:
            dataset = local_of(here, rng) or Dataset(LOCAL, "filesystem")
            yield Case(origin, marks, here, replace(dataset, partial=waiting))


@pytest.mark.parametrize("policy", [POLICY, EVERY], ids=["newest", "intermediates"])
def test_plan_of_every_interrupted_receive(policy: Policy) -> None:
    rng = random.Random(4)
    assert check_all(interrupted(4, rng), policy, rng) > 10_000


@pytest.mark.parametrize(
    "policy", [POLICY, EVERY, replace(EVERY, selection=SOME)], ids=["newest", "intermediates", "some"]
)
def test_plan_names_first_all_snapshots_that_are_ever_sent(policy: Policy) -> None:
    """The snapshots of the first plan are held before any byte flows, and no others are."""
    rng = random.Random(6)
    for case in interrupted(3, rng):
        with contextlib.suppress(Refused):
            _, _, plans = case.run(policy, rng)
            held = [step.snapshot for step in plans[0] if isinstance(step, Receive)] if plans else []
            sent_snapshots = [steps[0].snapshot for steps in plans if isinstance(steps[0], Receive)]
            unheld = [snapshot.short for snapshot in sent_snapshots if snapshot not in held]
            assert not unheld, f"source {case.marks}, local {case.here}: {unheld} sent without a hold"


# ---------------------------------------------------------------------------------------------------------------------
# Cases in words
# ---------------------------------------------------------------------------------------------------------------------


FREED = "rename @b to @b.dropped-8; @a -> @b"


def decide(origin: Dataset, here: Dataset | None, policy: Policy = POLICY, local_name: str = LOCAL) -> str:
    """The plan in a line: its steps, or a word why there is none."""
    try:
        steps = plan_dataset(origin, here, policy, local_name)
    except Blocked:
        return "blocked"
    return "; ".join("abandon" if isinstance(step, AbortReceive) else str(step) for step in steps) or "in step"


def blocked(origin: Dataset, here: Dataset | None, policy: Policy = POLICY, local_name: str = LOCAL) -> Blocked:
    with pytest.raises(Blocked) as caught:
        plan_dataset(origin, here, policy, local_name)
    return caught.value


@pytest.mark.parametrize(
    ("there", "here", "newest", "every"),
    [
        pytest.param("@a,1 @x,2", None, "full @a", "full @a", id="absent"),
        pytest.param("@x,1 @y,2", None, "in step", "in step", id="none-is-meant"),
        pytest.param("@a,1 @x,2 @c,3", "@a,1", "@a -> @c", "@a -> @c", id="past-another"),
        pytest.param("@a,1 @b,2 @c,3 @x,4", "@a,1", "@a -> @c", "@a -> @b; @b -> @c", id="up-to-another"),
        pytest.param(
            "@a,1 @b,2 @x,3 @c,4 @d,5", "@a,1", "@a -> @d", "@a -> @b; @b -> @c; @c -> @d", id="around-another"
        ),
        pytest.param("@a,1 @x,2 @b,3", "@a,1 @x,2", "@x -> @b", "@x -> @b", id="from-another"),
        pytest.param("@a,1 @b,2 @x,3", "@a,1 @b,2", "in step", "in step", id="only-another-is-newer"),
    ],
)
def test_plan_with_some_snapshots_selected(there: str, here: str | None, newest: str, every: str) -> None:
    meant = Selection(snapshots=("[a-d]",))
    assert decide(source(there), local(here) if here else None, replace(POLICY, selection=meant)) == newest
    assert decide(source(there), local(here) if here else None, replace(EVERY, selection=meant)) == every


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ((), ["", "/a", "/a/b", "/a/b/c", "/d e", "/d e/f"]),
        (("a",), ["", "/d e", "/d e/f"]),
        (("a/*",), ["", "/a", "/d e", "/d e/f"]),
        (("*b",), ["", "/a", "/d e", "/d e/f"]),
        (("d e",), ["", "/a", "/a/b", "/a/b/c"]),
        (("*/[cf]",), ["", "/a", "/a/b", "/d e"]),
        (("a", "d*"), [""]),
        (("", "/a", "A", "b"), ["", "/a", "/a/b", "/a/b/c", "/d e", "/d e/f"]),
    ],
)
def test_selection_leaves_out_datasets_with_their_children(exclude: tuple[str, ...], left: list[str]) -> None:
    tree = {key: source("", SOURCE + key) for key in ("", "/a", "/a/b", "/a/b/c", "/d e", "/d e/f")}
    assert [key for key in tree if Selection(exclude=exclude).has_dataset(key)] == left
    assert [key for key in tree if Selection(recursive=False).has_dataset(key)] == [""]


@pytest.mark.parametrize(
    ("there", "here", "newest", "every"),
    [
        pytest.param("@a,1 @b,2 @c,3", None, "full @c", "full @a; @a -> @b; @b -> @c", id="absent"),
        pytest.param("@a,1", None, "full @a", "full @a", id="absent-only-one"),
        pytest.param("@a,1 @b,2 @c,3", "@a,1", "@a -> @c", "@a -> @b; @b -> @c", id="increment"),
        pytest.param("@a,1 @b,2", "@a,1", "@a -> @b", "@a -> @b", id="increment-of-one"),
        pytest.param("#a,1 @b,2 @c,3 @d,4", "@a,1", "#a -> @d", "#a -> @b; @b -> @c; @c -> @d", id="from-bookmark"),
        pytest.param("#a,1 @b,2 @c,3", "@a,1", "#a -> @c", "#a -> @b; @b -> @c", id="from-bookmark-two"),
        pytest.param("#a,1 @b,2", "@a,1", "#a -> @b", "#a -> @b", id="from-bookmark-one"),
        pytest.param("@a,1 #a,1 @b,2", "@a,1", "@a -> @b", "@a -> @b", id="snapshot-before-its-bookmark"),
        pytest.param("@a,1 #b,2 @c,3", "@a,1 @b,2", "#b -> @c", "#b -> @c", id="newer-bookmark"),
        pytest.param("@a,1 #b,2", "@a,1 @b,2", "in step", "in step", id="newest-is-a-bookmark"),
        pytest.param("@a,1", "@a,1", "in step", "in step", id="in-step"),
        pytest.param("@a,1", "@old,1", "in step", "in step", id="in-step-renamed-here"),
        pytest.param("@a,1", "@a,1 @mine,8", "in step", "in step", id="in-step-though-ahead"),
        pytest.param("@a,1 @b,2", "@renamed,1", "@a -> @b", "@a -> @b", id="base-renamed-here"),
        pytest.param("", None, "in step", "in step", id="nothing-there"),
        pytest.param("", "@mine,8", "in step", "in step", id="nothing-there-something-here"),
        pytest.param("#a,1", "@a,1", "in step", "in step", id="only-bookmarks-there"),
        pytest.param("@a,1 @b,2", "@a,1 @mine,8", "blocked", "blocked", id="ahead"),
        pytest.param("@a,1 @c,3", "@a,1 @b,2", "blocked", "blocked", id="destroyed-there"),
        pytest.param("@a,1 @b,2", "@a,8", "blocked", "blocked", id="nothing-in-common-but-a-name"),
        pytest.param("@a,1 @b,2", "@b,8 @a,1", FREED, FREED, id="name-taken"),
        pytest.param("@a,1 @b,2 @c,3", "@b,8 @a,1", "@a -> @c", f"{FREED}; @b -> @c", id="name-taken-between"),
    ],
)
def test_plan_by_example(there: str, here: str | None, newest: str, every: str) -> None:
    mine = None if here is None else local(here)
    assert decide(source(there), mine) == newest
    assert decide(source(there), mine, EVERY) == every


def test_first_receive_takes_the_place_of_an_empty_filesystem() -> None:
    assert decide(source("@a,1 @b,2"), local("", empty=True)) == "full @b"


def test_first_receive_never_overwrites_data_without_a_snapshot() -> None:
    plan = blocked(source("@a,1"), local(""))
    assert "would overwrite" in plan.what
    assert plan.hint.endswith("--quarantine")


def test_first_receive_of_nothing_is_not_blocked_by_data() -> None:
    assert decide(source("#a,1"), local("")) == "in step"


@pytest.mark.parametrize("waiting", [None, partial(2, 1)], ids=["", "partial"])
def test_plan_brings_no_volume_where_a_filesystem_is(waiting: Partial | None) -> None:
    plan = blocked(source("@a,1 @b,2", kind="volume"), local("@a,1", waiting))
    assert f"{SOURCE} is a volume, but {LOCAL} is a filesystem" in plan.what
    assert decide(source("@a,1 @b,2"), local("@a,1", kind="volume")) == "blocked"


def test_blocked_with_nothing_in_common_names_the_newest_of_both() -> None:
    plan = blocked(source("@a,1 @b,2"), local("@x,8 @y,9"))
    assert "(newest snapshot here: @y, at the source: @b)" in plan.what


@pytest.mark.parametrize(("here", "says"), [("", "1 local snapshot newer"), (" @n,9", "2 local snapshots newer")])
def test_blocked_ahead_says_how_far_and_names_the_newest(here: str, says: str) -> None:
    plan = blocked(source("@a,1 @b,2"), local("@a,1 @m,8" + here))
    assert says in plan.what
    assert ("here: @n," if here else "here: @m,") in plan.what


@pytest.mark.parametrize(
    ("there", "here", "names"),
    [
        pytest.param("@x,1 @a,2 @b,3", "@a,1 @b,2", "@a to @x, @b to @a", id="chain"),
        pytest.param("@b,1 @c,2 @a,3", "@a,1 @b,2", "@b to @c, @a to @b", id="rotation"),
        pytest.param("@b,1 @a,2 @c,3 @d,4", "@a,1 @b,2", "", id="circle-in-nobodys-way"),
        pytest.param("@b,2 @a,3", "@b,1 @a,2", "@b to @b.dropped-1, @a to @b", id="rotation-that-drops-the-oldest"),
        pytest.param("#x,1 @a,3", "@a,1", "@a to @a.dropped-1", id="base-that-is-a-bookmark"),
    ],
)
def test_names_to_come_are_freed(there: str, here: str, names: str) -> None:
    plan = decide(source(there), local(here))
    assert plan.startswith(f"rename {names}; ") if names else not plan.startswith("rename")


def test_names_of_what_was_dropped_take_no_other_name() -> None:
    assert decide(source("@a,2 @b,3"), local("@b,1 @b.dropped-1,9 @a,2")).startswith("rename @b to @b.dropped-1.0; ")


def test_names_that_get_too_long_are_told() -> None:
    short = "x" * (NAME_LIMIT - len(LOCAL) - 2)
    assert f"{short}.dropped-1 would be longer" in blocked(source(f"@a,2 @{short},3"), local(f"@{short},1 @a,2")).what


# Names that grow too long under the local root


@pytest.mark.parametrize(("excess", "expected"), [(0, "full @b"), (1, "blocked")])
def test_name_of_the_longest_length(excess: int, expected: str) -> None:
    name = "x" * (NAME_LIMIT - len("@b") + excess)
    assert decide(source("@long,1 @b,2"), None, local_name=name) == expected


def test_name_length_does_not_count_the_base() -> None:
    name = "x" * (NAME_LIMIT - len("@b"))
    assert decide(source("@long,1 @b,2"), local("@was,1", name=name), local_name=name) == "@long -> @b"


@pytest.mark.parametrize("here", [None, "@a,1"], ids=["first", "next"])
def test_name_length_counts_snapshots_between(here: str | None) -> None:
    name = "x" * (NAME_LIMIT - len("@c"))
    mine = None if here is None else local(here, name=name)
    assert decide(source("@a,1 @long,2 @c,3"), mine, EVERY, name) == "blocked"
    assert decide(source("@a,1 @long,2 @c,3"), mine, POLICY, name) != "blocked"


def test_name_too_long_is_shown_in_full() -> None:
    assert blocked(source("@a,1"), None, local_name="x" * 254).what.startswith("x" * 254 + "@a would be longer")


@pytest.mark.parametrize(("levels", "expected"), [(50, "full @a"), (51, "blocked")])
def test_name_of_the_deepest_nesting(levels: int, expected: str) -> None:
    assert decide(source("@a,1"), None, local_name="/".join("x" * levels)) == expected


def test_name_that_is_here_already_is_not_too_deep() -> None:
    """The administrator has raised zfs_max_dataset_nesting for a while."""
    name = "/".join("x" * 51)
    assert decide(source("@a,1 @b,2"), local("@a,1", name=name), local_name=name) == "@a -> @b"


# Interrupted receives


@pytest.mark.parametrize(
    ("there", "here", "waiting", "expected"),
    [
        pytest.param("@a,1 @b,2", "@a,1", partial(2, 1), "rest of @b", id="goes-on"),
        pytest.param("@a,1", "", partial(1), "rest of @a", id="first-goes-on"),
        pytest.param("#a,1 @b,2", "@a,1", partial(2, 1), "rest of @b", id="base-is-a-bookmark"),
        pytest.param("@a,1", "@a,1", partial(2, 1), "abandon", id="target-gone"),
        pytest.param("@a,1 #b,2", "@a,1", partial(2, 1), "abandon", id="target-a-bookmark-now"),
        pytest.param("@a,1 @c,3", "@a,1", partial(2, 1), "abandon; @a -> @c", id="target-gone-another-newer"),
        pytest.param("@c,3", "", partial(2), "abandon; full @c", id="first-target-gone"),
        pytest.param("", "", partial(2), "abandon", id="first-everything-gone"),
        pytest.param("@b,2", "@a,1", partial(2, 1), "blocked", id="base-gone"),
        pytest.param("@a,1 @b,2", "@a,1", partial(None), "abandon; @a -> @b", id="token-beyond-decoding"),
        pytest.param("@a,1 @b,2", "", partial(None), "abandon; full @b", id="first-token-beyond-decoding"),
    ],
)
def test_interrupted_receive_goes_on_or_is_given_up(there: str, here: str, waiting: Partial, expected: str) -> None:
    assert decide(source(there), local(here, waiting)) == expected


def test_interrupted_receive_is_asked_for_by_its_token() -> None:
    step, *_ = plan_dataset(source("@a,1 @b,2"), local("@a,1", partial(2, 1)), POLICY, LOCAL)
    assert isinstance(step, Receive)
    assert step.token == partial(2, 1).token


def test_interrupted_receive_is_blocked_by_a_newer_snapshot() -> None:
    """The rest would stream to its end and then be refused: its base must be the most recent snapshot."""
    assert "@mine" in blocked(source("@a,1 @b,2"), local("@a,1 @mine,8", partial(2, 1))).what


def test_interrupted_plain_receive_is_given_up_if_sent_raw_now() -> None:
    origin = Dataset("tank/a", "filesystem", source("@a,1 @b,2", "tank/a").snapshots, encrypted=True)
    steps = plan_dataset(origin, local("@a,1", partial(2, 1)), POLICY, LOCAL)
    assert [type(step).__name__ for step in steps] == ["AbortReceive", "Receive"]


# Points in common


def test_newest_common_is_a_bookmark_or_a_snapshot() -> None:
    there, here = source("@a,1 @b,2 #b,2 #c,3 @d,4"), local("@one,1 @two,2 @three,3 @x,8")
    common, held = newest_common(there, here), newest_common(there, here, to_hold=True)
    assert common
    assert held
    assert (common.source.short, common.local.short) == ("#c", "@three")
    assert (held.source.short, held.local.short) == ("@b", "@two")
    assert newest_common(there, local("@x,8")) is None
    assert newest_common(source("#a,1"), local("@a,1"), to_hold=True) is None
