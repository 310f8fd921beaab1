"""The plan of a whole tree: every step planned on what the steps before it leave."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from histories import LOCAL, POLICY, RECEIVED, SOURCE, local, partial, source

from zfs_replicate import MADE_WAY, NAME_LIMIT, Dataset, Failure, Policy, Tree, TreePlan, Trees, with_clones

ANCESTORS = ("offsite", "offsite/virt")


def told(there: dict[str, Dataset], here: dict[str, Dataset], policy: Policy = POLICY, *given_up: str) -> list[str]:
    """The entries of a plan, a word or two for each."""
    plan = planned(there, here, policy, given_up)
    return [f"{key or '(root)'}: {word(entry)}" for key, entry in plan.entries if entry is not None]


def planned(there: Tree, here: Tree, policy: Policy = POLICY, given_up: Container[str] = ()) -> TreePlan:
    existing = (*ANCESTORS, LOCAL) if "" in here else ANCESTORS
    return TreePlan(Trees(with_clones(there), with_clones(here), existing), policy, given_up)


def word(entry: object) -> str:
    if isinstance(entry, Failure):
        return f"failed, {entry.what}"
    kind = type(entry).__name__
    old = getattr(entry, "old", "")
    return f"{kind} {old or getattr(entry, 'name', '') or (entry if kind in ('Receive', 'Rollback') else '')}".strip()


def there(**histories: str) -> dict[str, Dataset]:
    """Datasets of the source by key, `_` for the root."""
    keys = {key: "" if key == "_" else "/" + key.replace("_", "/") for key in histories}
    return {keys[key]: source(history, SOURCE + keys[key]) for key, history in histories.items()}


def here(**histories: str) -> dict[str, Dataset]:
    keys = {key: "" if key == "_" else "/" + key.replace("_", "/") for key in histories}
    return {keys[key]: local(history, name=LOCAL + keys[key]) for key, history in histories.items()}


def test_tree_plan_of_a_first_pull_has_parents_first() -> None:
    """A parent without a snapshot is a placeholder; its child comes below it."""
    assert told(there(_="@a,1", a="", a_b="@a,2"), {}) == [
        "(root): Receive full @a",
        f"/a/b: Create {LOCAL}/a",
        "/a/b: Receive full @a",
    ]


def test_tree_plan_of_a_tree_in_step_has_no_step() -> None:
    assert told(there(_="@a,1", a="@a,2"), here(_=f"@a,1!{RECEIVED}", a=f"@a,2!{RECEIVED}")) == []


def test_tree_plan_leaves_out_what_is_given_up_and_skips_its_children() -> None:
    tree = there(_="@a,1", a="@a,2", a_b="@a,3", c="@a,4")
    parent = f"{LOCAL}/a"
    assert told(tree, {}, POLICY, "/a") == [
        "(root): Receive full @a",
        f"/a/b: failed, skipped: its parent {parent} is not here",
        "/c: Receive full @a",
    ]


def test_tree_plan_follows_a_rename_before_another_dataset_takes_the_old_name() -> None:
    """/a is called /b by now, and there is a new /a."""
    tree = there(_="@r,9", a="@new,5", b="@a,1 @b,2")
    assert told(tree, here(_="@r,9", a=f"@a,1!{RECEIVED}")) == [
        "/b: Rename /a",
        "/a: Receive full @new",
        "/b: Receive @a -> @b",
    ]


def test_tree_plan_renames_into_a_parent_that_comes_first() -> None:
    tree = there(_="@r,9", new="@n,5", new_www="@a,1 @b,2")
    assert told(tree, here(_="@r,9", www=f"@a,1!{RECEIVED}")) == [
        "/new: Receive full @n",
        "/new/www: Rename /www",
        "/new/www: Receive @a -> @b",
    ]


def test_tree_plan_brings_a_clone_behind_its_origin() -> None:
    tree = {
        **there(_="@r,9", golden="@v0,1 @v1,2"),
        "/x": replace(source("@x,4", f"{SOURCE}/x"), origin=f"{SOURCE}/golden@v1"),
    }
    assert told(tree, here(_="@r,9")) == [
        "/golden: Receive full @v1",
        f"/x: Receive @x, as a clone of {LOCAL}/golden@v1",
    ]


def test_tree_plan_brings_no_clone_in_full_whose_origin_is_late() -> None:
    """It follows, as a clone, when that failure is mended."""
    tree = {
        **there(_="@r,9", golden="@v0,1 @v1,2"),
        "/x": replace(source("@x,4", f"{SOURCE}/x"), origin=f"{SOURCE}/golden@v1"),
    }
    assert told(tree, here(_="@r,9"), POLICY, "/golden") == [
        f"/x: failed, skipped: its origin {SOURCE}/golden@v1 has not been received completely"
    ]
    skipped = there(_="@r,9", p="@p,3", p_golden="@v0,1 @v1,2")
    skipped["/x"] = replace(source("@x,4", f"{SOURCE}/x"), origin=f"{SOURCE}/p/golden@v1")
    assert told(skipped, here(_="@r,9"), POLICY, "/p")[-1] == (
        f"/x: failed, skipped: its origin {SOURCE}/p/golden@v1 has not been received completely"
    )


def test_tree_plan_says_of_a_clone_that_its_origin_is_not_in_this_mirror() -> None:
    tree = {**there(_="@r,9"), "/x": replace(source("@x,4", f"{SOURCE}/x"), origin="backuppool/golden@v1")}
    (step,) = [entry for _, entry in planned(tree, here(_="@r,9")).entries if entry is not None]
    assert getattr(step, "lost_origin", "") == "backuppool/golden@v1"


def test_tree_plan_takes_no_override_that_does_not_help() -> None:
    """After the rollback a name would be too long: then nothing is destroyed for nothing."""
    long = "b" * (NAME_LIMIT - len(LOCAL))
    tree, mirror = there(_=f"@a,1 @{long},2"), {"": local("@a,1 @x,9")}
    (entry,) = told(tree, mirror, replace(POLICY, rollback=True))
    assert entry.startswith("(root): failed, ")
    assert entry.endswith("bytes ZFS allows")
    (entry, receive) = told(there(_="@a,1 @b,2"), mirror, replace(POLICY, rollback=True))
    assert entry.startswith("(root): Rollback rolling back to @a")
    assert receive == "(root): Receive @a -> @b"


def test_tree_plan_pulls_children_afresh_that_go_aside_with_their_parent() -> None:
    tree = there(_="@r,9", a="@a,1 @b,2", a_b="@c,3")
    mirror = here(_="@r,9", a="@a,1 @x,7", a_b=f"@c,3!{RECEIVED}")
    assert told(tree, mirror, replace(POLICY, quarantine=True)) == [
        "/a: Quarantine",
        "/a: Receive full @b",
        "/a/b: Receive full @c",
    ]


def test_tree_plan_puts_nothing_into_a_parent_that_is_half_received_unless_its_rest_comes() -> None:
    tree = there(_="@r,9", a="@a,1", a_b="@c,3")
    mirror = {**here(_="@r,9"), "/a": local("", partial(1), f"{LOCAL}/a")}
    assert told(tree, mirror) == ["/a: Receive rest of @a", "/a/b: Receive full @c"]
    assert told(tree, mirror, POLICY, "/a") == [
        f"/a/b: failed, skipped: its parent {LOCAL}/a has not been received completely"
    ]


def test_tree_plan_lets_children_return_when_the_dataset_itself_is_here() -> None:
    away = f"/a{MADE_WAY}"
    tree = there(_="@r,9", a="@a,1", a_b="@c,3")
    mirror = {**here(_="@r,9"), away: local("", name=LOCAL + away), f"{away}/b": local("@c,3", name=f"{LOCAL}{away}/b")}
    assert told(tree, mirror) == ["/a: Receive full @a", f"/a/b: Rename {away}/b"]
    assert told(tree, {**mirror, **here(a="@a,1")}) == [f"/a/b: Rename {away}/b"]


def test_tree_plan_leaves_alone_what_may_be_of_another_line() -> None:
    tree = there(_="@r,9", a="@a,1 @b,2", a_b="@c,3")
    unread = replace(local("@a,1?", name=f"{LOCAL}/a"), held_before=False)
    plan = planned(tree, {**here(_="@r,9"), "/a": unread})
    assert plan.left_alone == {"/a"}
    assert [word(entry) for key, entry in plan.entries if key != ""] == [
        f"failed, skipped: its parent {LOCAL}/a here is no mirror of the source's dataset"
    ]
