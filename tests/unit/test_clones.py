"""Clones, promoted clones and renamed datasets, as the planner sees them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from histories import LOCAL, POLICY, RECEIVED, SOURCE, TAG, local, partial, shorts, source

from zfs_replicate import (
    ASIDE,
    Dataset,
    Receive,
    Snapshot,
    Tree,
    Trees,
    all_hold_changes,
    bookmark_changes,
    expire,
    former_name,
    hold_changes,
    in_order,
    moved_mirrors,
    newest_common,
    plan_dataset,
    with_clones,
)

FAR = 10**10
TREE = {
    "": source(""),
    "/golden": source("@v0,1 @v1,2 @v2,3", f"{SOURCE}/golden"),
    "/a": Dataset(f"{SOURCE}/a", "filesystem", (Snapshot(f"{SOURCE}/a@x", 4, 2000, 0),), origin=f"{SOURCE}/golden@v1"),
}


def test_with_clones_inherits_what_lies_before_the_origin() -> None:
    tree = with_clones({**TREE, "/b": replace(source("@y,5", f"{SOURCE}/b"), origin=f"{SOURCE}/a@x")})
    assert shorts(tree["/a"].inherited) == "@v0 @v1"
    assert shorts(tree["/b"].inherited) == "@v0 @v1 @x"
    assert [snapshot.short for snapshot in tree["/golden"].snapshots if snapshot.cloned] == ["@v1"]
    assert with_clones({"/a": TREE["/a"]})["/a"].inherited == (), "its origin is not in the tree"


def test_in_order_puts_origins_before_clones_and_parents_first() -> None:
    assert in_order(TREE) == ["", "/golden", "/a"]
    circle = {
        "": source(""),
        "/p": Dataset(f"{SOURCE}/p", "filesystem", origin=f"{SOURCE}/p/promoted@s"),
        "/p/promoted": source("@s,1", f"{SOURCE}/p/promoted"),
    }
    assert in_order(circle) == ["", "/p", "/p/promoted"]
    chain = {f"/{n}": Dataset(f"{SOURCE}/{n}", "filesystem", origin=f"{SOURCE}/{n + 1}@s") for n in range(9)}
    assert in_order(chain) == [f"/{n}" for n in reversed(range(9))]


def test_clone_is_sent_from_its_origin_where_that_is_here() -> None:
    clone = with_clones(TREE)["/a"]
    origin = local("@v1,2", name=f"{LOCAL}/golden").snapshots[0]
    steps = plan_dataset(clone, None, POLICY, f"{LOCAL}/a", origin)
    assert steps == (Receive(clone.snapshots[0], clone.inherited[-1], origin=origin.name),)
    assert plan_dataset(clone, None, POLICY, f"{LOCAL}/a") == (Receive(clone.snapshots[0]),)


def test_clone_origins_are_pulled_besides_the_newest() -> None:
    golden = with_clones(TREE)["/golden"]
    steps = plan_dataset(golden, None, POLICY, f"{LOCAL}/golden")
    assert [str(step) for step in steps] == ["full @v1", "@v1 -> @v2"]
    steps = plan_dataset(golden, local("@v0,1", name=f"{LOCAL}/golden"), POLICY, f"{LOCAL}/golden")
    assert [str(step) for step in steps] == ["@v0 -> @v1", "@v1 -> @v2"]


def test_clone_that_was_interrupted_goes_on() -> None:
    clone = with_clones(TREE)["/a"]
    origin = local("@v1,2", name=f"{LOCAL}/golden").snapshots[0]
    waiting = replace(local("", partial(4, 2), name=f"{LOCAL}/a"), origin=origin.name)
    (step,) = plan_dataset(clone, waiting, POLICY, f"{LOCAL}/a", origin)
    assert isinstance(step, Receive)
    assert step.token
    step, *_ = plan_dataset(clone, waiting, POLICY, f"{LOCAL}/a")
    assert type(step).__name__ == "AbortReceive", "its origin is not here any more"


def test_clone_promoted_keeps_the_holds_its_former_origin_needs() -> None:
    """And its twin here is not expired while that is so."""
    clone = source(f"@a,1,0!{TAG} @b,2,50 @c,3,60", f"{SOURCE}/clone")
    former = Dataset(f"{SOURCE}/www", "filesystem", origin=f"{SOURCE}/clone@a")
    there = with_clones({"/clone": clone, "/www": former})
    here = {"/clone": local("@b,2 @c,3", name=f"{LOCAL}/clone"), "/www": local("@z,9,0 @a,1,1", name=f"{LOCAL}/www")}
    common = newest_common(there["/www"], here["/www"])
    assert common is not None
    assert common.source.name == f"{SOURCE}/clone@a"
    assert all_hold_changes(Trees(there, here), POLICY)["/clone"].release_source == ()
    assert hold_changes(there["/clone"], here["/clone"], POLICY).release_source == (f"{SOURCE}/clone@a",)
    assert bookmark_changes(there["/www"], here["/www"], POLICY).place is None
    assert plan_dataset(there["/www"], here["/www"], POLICY, f"{LOCAL}/www") == ()
    assert there["/www"].twin(here["/www"].snapshots[-1]) == clone.snapshots[0]


def test_clone_here_keeps_its_origin_from_expiry() -> None:
    here = with_clones(
        {
            "/golden": local("@v0,1,0 @v1,2,1 @v2,3,99", name=f"{LOCAL}/golden"),
            "/a": Dataset(f"{LOCAL}/a", "filesystem", origin=f"{LOCAL}/golden@v1"),
        }
    )
    expiry = expire(source("@v2,3", f"{SOURCE}/golden"), here["/golden"], POLICY, FAR)
    assert shorts(expiry.destroy) == "@v0"
    assert [(snapshot.short, why) for snapshot, why in expiry.kept] == [("@v1", "a dataset here is its clone")]


def formerly(there: Tree, here: Tree, key: str) -> str | None:
    return former_name(there[key], key, here, moved_mirrors(there, here, POLICY))


def test_rename_is_known_by_the_snapshots() -> None:
    there = {"": source(""), "/web": source("@a,1 @b,2", f"{SOURCE}/web"), "/db": source("@n,9", f"{SOURCE}/db")}
    here = {
        "": local(""),
        "/www": local(f"@z,7 @a,1!{RECEIVED}", name=f"{LOCAL}/www"),
        "/db": local(f"@c,3!{RECEIVED}", name=f"{LOCAL}/db"),
    }
    assert formerly(there, here, "/web") == "/www"
    there["/old"] = source("@c,3", f"{SOURCE}/old")
    assert formerly(there, here, "/old") == "/db", "what has its name now is another dataset"
    there["/www"] = source("@a,1", f"{SOURCE}/www")
    assert formerly(there, here, "/web") is None, "it is there under both names"
    del there["/www"]
    assert formerly(there, {**here, "/www2": here["/www"]}, "/web") is None, "which of the two?"
    aside = {f"/www{ASIDE}2026-11-25-120000": here["/www"]}
    assert formerly(there, aside, "/web") is None
    assert formerly({"/www/web": there["/web"]}, here, "/www/web") is None, "nothing moves below itself"


@pytest.mark.parametrize(
    ("web", "www", "why"),
    [
        ("@a,1", f"@a,1 @b,2!{RECEIVED}", "only an older snapshot is in common, as with a copy by send | recv"),
        ("@a,1 @b,2", "@a,1 @b,2", "we hold nothing there: it never was a mirror of this line"),
        ("@a,1 @b,2", f"@a,1 @b,2!{RECEIVED}!years:received", "another line holds it"),
        ("#b,2 @c,3", f"@b,2!{RECEIVED}", "only a bookmark is left of it"),
        ("@b,2", "@b,2?", "its holds could not be read"),
    ],
)
def test_rename_is_not_followed_in_doubt(web: str, www: str, why: str) -> None:
    there = {"": source(""), "/web": source(web, f"{SOURCE}/web")}
    here = {"": local(""), "/www": local(www, name=f"{LOCAL}/www")}
    assert formerly(there, here, "/web") is None, why


def test_rename_is_not_followed_if_two_datasets_fit() -> None:
    there = {key: source("@a,1", f"{SOURCE}{key}") for key in ("/web", "/copy")}
    here = {"/www": local(f"@a,1!{RECEIVED}", name=f"{LOCAL}/www")}
    assert formerly(there, here, "/web") is formerly(there, here, "/copy") is None


def test_rename_leaves_a_place_with_the_mirror_of_another_line_below() -> None:
    there = {"/web": source("@a,1", f"{SOURCE}/web")}
    here = {
        "/www": local(f"@a,1!{RECEIVED}", name=f"{LOCAL}/www"),
        "/www/x": local("@m,9!years:received", name=f"{LOCAL}/www/x"),
    }
    assert formerly(there, here, "/web") is None
