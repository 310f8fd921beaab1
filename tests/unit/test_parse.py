"""The text of zfs, in the shapes real zfs prints it."""

from __future__ import annotations

import signal
import string

import pytest
from hypothesis import given, strategies as st

import zfs_replicate
from zfs_replicate import (
    LIST_COLUMNS,
    UNKNOWN_CREATION,
    Dataset,
    Failure,
    NotBelieved,
    Partial,
    Snapshot,
    Tree,
    count_objects,
    in_order,
    number,
    parse_estimates,
    parse_failing,
    parse_hold_dates,
    parse_holds,
    parse_holds_and_ivsets,
    parse_space,
    parse_token,
    parse_tree,
    parse_usage,
    whole_tree,
    with_clones,
    with_tags,
)

LETTERS = string.ascii_letters + string.digits + "-_.: "
components = st.text(LETTERS, min_size=1, max_size=20).filter(lambda name: name not in (".", ".."))
datasets = st.lists(components, min_size=1, max_size=4).map(lambda parts: "tank/" + "/".join(parts))
numbers = st.integers(0, 2**64 - 1)
tag_names = st.text(string.printable[:95], min_size=1, max_size=30).filter(lambda tag: not tag.startswith("."))

GUID = 18446744073709551615


def row(
    name: str,
    kind: str,
    guid: int = GUID,
    txg: int = 5,
    refs: str = "0",
    token: str = "-",
    key: str = "off",
    origin: str = "-",
    ivset: str = "-",
) -> str:
    """A line of `zfs list -Hp -o LIST_COLUMNS`. Datasets have no userrefs, bookmarks neither that nor encryption."""
    if kind in ("filesystem", "volume", "bookmark"):
        refs = "-"
    encryption = "-" if kind == "bookmark" else key
    words = (name, kind, str(guid), str(txg), "1700000000", refs, token, encryption, origin, ivset, "off")
    return "\t".join(words) + "\n"


# numbers


@pytest.mark.parametrize("value", [0, 7, 2**63, 2**64 - 1])
def test_number_of_64_bits_is_read(value: int) -> None:
    assert number(str(value), "a guid") == value


@pytest.mark.parametrize(
    "text", ["", "-", "-1", "+1", " 1", "1\n", "1_0", "0x1", "1.5", "x", "\u0661", "\u00b2", str(2**64), "9" * 5_000]
)
def test_number_refuses_anything_else(text: str) -> None:
    with pytest.raises(Failure, match=r"^a guid should be a whole number below 2\^64") as caught:
        number(text, "a guid")
    assert len(caught.value.what) < 100
    assert caught.value.hint


# zfs list


def test_list_columns_are_those_of_the_rows_in_these_tests() -> None:
    assert LIST_COLUMNS == (
        "name",
        "type",
        "guid",
        "createtxg",
        "creation",
        "userrefs",
        "receive_resume_token",
        "encryption",
        "origin",
        "ivsetguid",
        "compression",
    )


def test_tree_is_read() -> None:
    text = (
        row("tank/vm", "filesystem")
        + row("tank/vm@new", "snapshot", 2, txg=20)
        + row("tank/vm@old", "snapshot", 1, txg=10, refs="2")
        + row("tank/vm#old", "bookmark", 1, txg=10)
        + row("tank/vm/disk", "volume", key="aes-256-gcm")
        + row("tank/vm/disk@new", "snapshot", 3, txg=20, key="aes-256-gcm")
    )
    tree, held = parse_tree(text, "tank/vm")
    old = Snapshot("tank/vm@old", 1, 10, 1700000000, tags=None)
    new = Snapshot("tank/vm@new", 2, 20, 1700000000, tags=frozenset())
    mark = Snapshot("tank/vm#old", 1, 10, 1700000000)
    disk = Snapshot("tank/vm/disk@new", 3, 20, 1700000000)
    assert tree == {
        "": Dataset("tank/vm", "filesystem", (old, new), (mark,)),
        "/disk": Dataset("tank/vm/disk", "volume", (disk,), encrypted=True),
    }
    assert [snapshot.short for snapshot in tree[""].snapshots] == ["@old", "@new"]  # oldest first
    assert held == {"tank/vm@old": 2}


def test_tree_of_nothing_is_empty() -> None:
    assert parse_tree("", "tank") == ({}, {})


def test_tree_may_be_a_whole_pool() -> None:
    tree, _ = parse_tree(row("tank", "filesystem") + row("tank/a", "filesystem"), "tank")
    assert list(tree) == ["", "/a"]


def test_tree_names_keep_spaces_also_at_their_end() -> None:
    text = (
        row("tank/my vm ", "filesystem") + row("tank/my vm @ a day ", "snapshot") + row("tank/my vm # m ", "bookmark")
    )
    dataset = parse_tree(text, "tank/my vm ")[0][""]
    assert dataset.name == "tank/my vm "
    assert dataset.snapshots[0].name == "tank/my vm @ a day "
    assert dataset.snapshots[0].short == "@ a day "
    assert dataset.bookmarks[0].short == "# m "


def test_tree_datasets_with_like_names_keep_their_own_snapshots() -> None:
    text = row("t/a", "filesystem") + row("t/a@1", "snapshot") + row("t/a ", "filesystem") + row("t/a-b", "filesystem")
    tree, _ = parse_tree(text.replace("t/a", "t/r/a") + row("t/r", "filesystem"), "t/r")
    assert {key: len(dataset.snapshots) for key, dataset in tree.items()} == {"/a": 1, "/a ": 0, "/a-b": 0, "": 0}


def test_tree_keeps_a_resume_token_undecoded() -> None:
    tree, _ = parse_tree(
        row("tank/vm", "filesystem", token="1-c0ffee-d8-789c63") + row("tank/vm/a", "volume"), "tank/vm"
    )
    assert tree[""].partial == Partial("1-c0ffee-d8-789c63", None, None)
    assert tree["/a"].partial is None


@pytest.mark.parametrize("origin", ["tank/golden@one", "tank/golden@-", "tank/golden@-one-"])
def test_tree_has_the_origin_of_a_clone_whatever_its_name(origin: str) -> None:
    assert parse_tree(row("tank", "filesystem", origin=origin), "tank")[0][""].origin == origin
    assert parse_tree(row("tank", "filesystem"), "tank")[0][""].origin == ""


@pytest.mark.parametrize("key", ["aes-256-gcm", "aes-128-ccm"])
def test_tree_knows_what_is_encrypted(key: str) -> None:
    assert parse_tree(row("tank", "filesystem", key=key), "tank")[0][""].encrypted
    assert not parse_tree(row("tank", "filesystem"), "tank")[0][""].encrypted


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(row("tank", "filesystem").rpartition("\t")[0] + "\n", id="too-few"),
        pytest.param(row("tank", "filesystem")[:-1] + "\tmore\n", id="too-many"),
        pytest.param(row("tank", "filesystem") + "\n", id="an-empty-line"),
        pytest.param("no datasets available\n", id="a-message"),
        pytest.param(row("tank", "filesystem").replace("\t", "    "), id="spaces-for-tabs"),
    ],
)
def test_tree_row_of_another_width_is_refused(text: str) -> None:
    with pytest.raises(Failure, match="columns where 11 or 3 were asked for"):
        parse_tree(text, "tank")


@given(
    root=datasets,
    children=st.lists(components, unique=True, max_size=4),
    points=st.lists(
        st.tuples(st.sampled_from("@#"), components, numbers, numbers), max_size=6, unique_by=lambda p: p[:2]
    ),
)
def test_tree_gives_back_every_name(root: str, children: list[str], points: list[tuple[str, str, int, int]]) -> None:
    names = [root, *(f"{root}/{child}" for child in children)]
    text = "".join(row(name, "filesystem") for name in names)
    for mark, short, guid, txg in points:
        for name in names:
            text += row(name + mark + short, "snapshot" if mark == "@" else "bookmark", guid, txg)
    tree, held = parse_tree(text, root)
    assert {root + key for key in tree} == set(names)
    assert held == {}
    for key, dataset in tree.items():
        assert dataset.name == root + key
        back = {(s.name, s.guid, s.createtxg) for s in dataset.snapshots + dataset.bookmarks}
        assert back == {(dataset.name + mark + short, guid, txg) for mark, short, guid, txg in points}
        assert all(snapshot.is_bookmark == (snapshot in dataset.bookmarks) for snapshot in dataset.snapshots)
        assert [s.createtxg for s in dataset.snapshots] == sorted(s.createtxg for s in dataset.snapshots)


# zfs holds


def test_holds_are_read() -> None:
    text = (
        "tank/my vm @a \tkeep it \tThu Nov 16 10:00 2023\n"
        "tank/my vm @a \toffsite\tThu Nov 16 10:00 2023\n"
        "tank@b\t.send-123-1\tThu Nov 16 10:00 2023\n"
    )
    assert parse_holds(text, {"tank/my vm @a ", "tank@b"}) == {
        "tank/my vm @a ": frozenset({"keep it ", "offsite"}),
        "tank@b": frozenset({".send-123-1"}),
    }


def test_holds_of_nothing_are_none() -> None:
    assert parse_holds("", ["tank@a"]) == {}


@pytest.mark.parametrize("text", ["tank@a\toffsite\n", "tank@a\toffsite\tThu\tNov\n", "cannot open 'tank@a'\n", "\n"])
def test_holds_row_of_another_width_is_refused(text: str) -> None:
    with pytest.raises(Failure, match="columns where 3 were asked for"):
        parse_holds(text, ["tank@a"])


@given(st.dictionaries(st.tuples(datasets, components).map("@".join), st.sets(tag_names, min_size=1), max_size=5))
def test_holds_give_back_every_tag(holds: dict[str, set[str]]) -> None:
    text = "".join(f"{name}\t{tag}\tThu Nov 16 10:00 2023\n" for name, tags in holds.items() for tag in tags)
    assert parse_holds(text, holds) == holds


def test_holds_and_ivsets_come_in_one_text() -> None:
    text = "tank@a\t18446744073709551615\ntank/plain@a\t-\ntank@a\tkeep\tThu Nov 16 10:00 2023\n"
    assert parse_holds_and_ivsets(text + "tank@a\tx\tThu Nov 16 10:00 2023\n", ["tank@a", "tank/plain@a"]) == (
        {"tank@a": frozenset({"keep", "x"})},
        {"tank@a": 18446744073709551615, "tank/plain@a": 0},
    )


def test_tree_in_outline_leaves_holds_and_age_unknown() -> None:
    text = row("tank", "filesystem") + "tank@a\t3\t5\ntank#m\t3\t5\n"
    tree, held = parse_tree(text, "tank")
    assert tree[""].snapshots == (Snapshot("tank@a", 3, 5, UNKNOWN_CREATION, None),)
    assert tree[""].bookmarks == (Snapshot("tank#m", 3, 5, UNKNOWN_CREATION),)
    assert held == {}


def test_with_tags_fills_in_only_what_is_known() -> None:
    text = row("tank", "filesystem") + "".join(row(f"tank@{n}", "snapshot", refs=n, txg=int(n)) for n in "012")
    tree, held = parse_tree(text, "tank")
    assert held == {"tank@1": 1, "tank@2": 2}
    filled = with_tags(tree, {"tank@1": frozenset({"offsite"})})[""]
    assert [snapshot.tags for snapshot in filled.snapshots] == [frozenset(), {"offsite"}, None]


@pytest.mark.parametrize("letter", ["\x0b", "\x1c", "\x85", "\u2028", "é", "\r"], ids=ascii)
def test_holds_of_others_may_have_any_letter_in_their_tag(letter: str) -> None:
    """zfs checks the length of a tag and no more; a line ends at a newline and nowhere else."""
    assert parse_holds(f"tank@a\ta{letter}b\tThu Nov 16 10:00 2023\n", ["tank@a"]) == {"tank@a": {f"a{letter}b"}}


# Resume tokens, as `zfs send -nvt` tells of them

INCREMENTAL = """resume token contents:
nvlist version: 0
	fromguid = 0x5d33bd9ad1bb21a4
	object = 0x2
	offset = 0x1a0000
	bytes = 0x1b6a28
	toguid = 0xffffffffffffffff
	toname = tank/my vm @b c
	compressok = 1
	rawok = 1
send from @a to tank/my vm @b c estimated size is 4.00M
"""


def test_token_of_an_increment() -> None:
    assert parse_token("1-x", INCREMENTAL) == Partial("1-x", GUID, 0x5D33BD9AD1BB21A4, raw=True, bytes=0x1B6A28)


def test_token_of_a_first_receive_has_no_base() -> None:
    text = INCREMENTAL.replace("\tfromguid = 0x5d33bd9ad1bb21a4\n", "")
    assert parse_token("1-x", text) == Partial("1-x", GUID, None, raw=True, bytes=0x1B6A28)


def test_token_decodes_where_its_snapshot_is_not() -> None:
    """Here, the name in the token is that of the source: the contents come on stdout all the same."""
    text = (
        INCREMENTAL.rsplit("send from", 1)[0]
        + "cannot resume send: 'tank/my vm @b c' is no longer the same snapshot used in the initial send\n"
    )
    assert parse_token("1-x", text) == Partial("1-x", GUID, 0x5D33BD9AD1BB21A4, raw=True, bytes=0x1B6A28)


@pytest.mark.parametrize(
    "text",
    [
        "cannot resume send: resume token is corrupt (invalid checksum)\n",
        "cannot resume send: resume token is corrupt (decompression failed)\n",
    ],
)
def test_token_that_is_corrupt_tells_nothing(text: str) -> None:
    assert parse_token("1-x", text) == Partial("1-x", None, None, corrupt=True)


def test_token_that_zfs_could_not_read_is_not_called_corrupt() -> None:
    assert parse_token("1-x", "internal error: out of memory\n") == Partial("1-x", None, None)


def test_token_of_a_plain_stream() -> None:
    text = INCREMENTAL.replace("\trawok = 1\n", "")
    assert parse_token("1-x", text) == Partial("1-x", GUID, 0x5D33BD9AD1BB21A4, bytes=0x1B6A28)


@given(numbers, st.none() | numbers, datasets, components)
def test_token_gives_back_every_guid(to_guid: int, from_guid: int | None, dataset: str, snapshot: str) -> None:
    base = "" if from_guid is None else f"\tfromguid = {from_guid:#x}\n"
    text = (
        f"resume token contents:\nnvlist version: 0\n{base}\tobject = 0x0\n\toffset = 0x0\n\tbytes = 0x0\n"
        f"\ttoguid = {to_guid:#x}\n\ttoname = {dataset}@{snapshot}\n"
    )
    assert parse_token("1-x", text) == Partial("1-x", to_guid, from_guid)


# zfs send -nP


@pytest.mark.parametrize("text", ["x\n", "\n", "\t", "size\tx\n", "bytes = 0x1\n", "size\t1\r"])
@pytest.mark.parametrize("size", [40_000, 10_000_000])
def test_estimates_in_an_endless_answer_are_read_once(text: str, size: int) -> None:
    """In a moment; with the square of its length it would be days."""

    def blocked_by_length(number: int, frame: object) -> None:
        raise AssertionError("takes too long")

    before = signal.signal(signal.SIGALRM, blocked_by_length)
    signal.alarm(60)
    try:
        assert parse_estimates(text * (size // len(text))) == []
        assert parse_token("1-x", text * (size // len(text))).to_guid is None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("size", [str(2**64), "9" * 30, "9" * 5_000, "-1", "1.5", "", " 7", "\u0667"])
def test_estimates_pass_over_a_size_that_is_none(size: str) -> None:
    assert parse_estimates(f"size\t{size}\nsize\t{2**64 - 1}\n") == [(2**64 - 1, 0)]


def test_estimates_of_streams_and_rests() -> None:
    """As OpenZFS 2.1.11 and 2.3.2 print it."""
    text = "incremental\t1\tp/a@2\t1059376\nincremental\t2\tp/a@3\t534352\nsize\t1593728\n"
    rest = INCREMENTAL.rsplit("send from", 1)[0] + "full\tp/a@3\t2637648\nsize\t2637648\n"
    came = parse_token("", INCREMENTAL).bytes
    assert parse_estimates(text) == [(1593728, 0)]
    assert parse_estimates(text + rest + text) == [(1593728, 0), (2637648, came), (1593728, 0)]
    assert parse_estimates(text + INCREMENTAL) == [(1593728, 0)]


def test_hold_dates_of_one_tag() -> None:
    text = (
        "tank/a b@1\tours:received\tThu Nov 16 10:00 2023\ntank/a b@1\tother\tFri Nov 17 10:00 2023\n"
        "tank/a@2\tours:received\tWed Nov  1 09:05 2023\ntank/a@3\tother\tFri Nov 17 10:00 2023\n"
    )
    dates = {"tank/a b@1": "Thu Nov 16 10:00 2023", "tank/a@2": "Wed Nov  1 09:05 2023"}
    assert parse_hold_dates(text, "ours:received") == dates
    foreign = "tank/a@2\tours:received\tmore\tWed Nov  1 09:05 2023\n\nnonsense\n"
    assert parse_hold_dates(foreign + text + "cut", "ours:received") == dates
    assert parse_hold_dates("", "ours:received") == {}


# zfs get


@pytest.mark.parametrize(
    ("text", "since"),
    [
        ("1700000000 tank/a\n", 1_700_000_000),
        ("1700000100 tank/a\n", 1_700_000_100),
        ("1 tank/a\n", 1),
        ("1700001000 tank/a\n", None),
        ("0 tank/a\n", None),
        ("01 tank/a\n", None),
        (f"{'1' * 20} tank/a\n", None),
        (f"{'1' * 5000} tank/a\n", None),
        ("-1 tank/a\n", None),
        ("٣ tank/a\n", None),
        ("1700000000 tank/b\n", None),
        ("1700000000 tank/a/b\n", None),
        ("1700000000  tank/a\n", None),
        ("1700000000\ttank/a\n", None),
        ("1700000000 tank/a\nmore\n", None),
        ("1700000000 tank/a", None),
        ("-\n", None),
        ("", None),
    ],
)
def test_failing_since_is_read_from_the_mark(text: str, since: int | None) -> None:
    assert parse_failing(text, "tank/a", now=1_700_000_000) == since


# zfs userspace


@pytest.mark.parametrize(
    ("text", "count"), [("1\n", 1), ("1\n250\n3\n", 254), ("-\n1\n", 1), ("none\n6\n", 6), ("", 0)]
)
def test_count_objects_adds_up(text: str, count: int) -> None:
    assert count_objects(text) == count


@pytest.mark.parametrize("word", ["x", "", "-1", str(2**64), "9" * 5_000])
def test_figures_that_are_none_are_refused(word: str) -> None:
    with pytest.raises(Failure, match="used of tank/a@b should be a whole number"):
        parse_usage(f"tank/a@b\t{word}\t1\n")
    with pytest.raises(Failure, match="written of tank/a@b should be a whole number"):
        parse_usage(f"tank/a@b\t1\t{word}\n")
    with pytest.raises(Failure, match="objused should be a whole number"):
        count_objects(f"{word}\n")
    with pytest.raises(Failure, match="used should be a whole number"):
        parse_space(f"{word}\t1\n")
    with pytest.raises(Failure, match="available should be a whole number"):
        parse_space(f"1\t{word}\n")


def test_figures_of_usage_and_space_are_read() -> None:
    assert parse_usage("tank/a@b\t4096\t0\n") == {"tank/a@b": (4096, 0)}
    assert parse_space("1\t18446744073709551615\n") == (1, 2**64 - 1)


@pytest.mark.parametrize("text", ["", "x\n", "1\t2", "1\t2\n1\t2\n"])
def test_space_of_another_shape_is_refused(text: str) -> None:
    with pytest.raises(Failure):
        parse_space(text)


def test_count_objects_refuses_another_width() -> None:
    with pytest.raises(Failure, match="columns"):
        count_objects("root\t1\n")


# What zfs cannot print

ROOT = row("tank/vm", "filesystem")
GOOD = "1-c0ffee-d8-789c63"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        pytest.param(ROOT + row("tank/vm2", "filesystem"), "not in tank/vm", id="begins-alike"),
        pytest.param(ROOT + row("tank/vm-yearly@a", "snapshot"), "not in tank/vm", id="snapshot-beside"),
        pytest.param(ROOT + row("tank", "filesystem"), "not in tank/vm", id="above"),
        pytest.param(ROOT + row("other/vm", "filesystem"), "not in tank/vm", id="another-pool"),
        pytest.param(ROOT + row("", "filesystem"), "not in tank/vm", id="no-name"),
        pytest.param(ROOT + ROOT, "twice", id="a-dataset-twice"),
        pytest.param(ROOT + 2 * row("tank/vm@a", "snapshot"), "twice", id="a-snapshot-twice"),
        pytest.param(ROOT + "tank/vm@a\t1\t2\n" + row("tank/vm@a", "snapshot"), "twice", id="twice-in-both-forms"),
        *(
            pytest.param(ROOT + row(f"tank/vm/{name}", "filesystem"), "have that name", id=ascii(name)[:20])
            for name in (
                "a%b",
                "a\x00",
                "a\x1b[2J",
                "\udcff",
                "a,b",
                "",
                "a//b",
                "a/",
                "..",
                "a/./b",
                "x" * 248,
                "a/" * 49,
            )
        ),
        *(
            pytest.param(ROOT + row(f"tank/vm{name}", "snapshot"), "zfs printed a row that it cannot", id=ascii(name))
            for name in ("@", "@a@b", "@a#b", "#a", "#a@b", "", "@a/b", "@a%b", "@" + "a" * 249)
        ),
        pytest.param(ROOT + row("tank/vm@a", "bookmark"), "no 'bookmark'", id="snapshot-as-bookmark"),
        pytest.param(ROOT + row("tank/vm@a", "filesystem"), "no 'filesystem'", id="snapshot-as-filesystem"),
        pytest.param(ROOT + row("tank/vm/a", "pool"), "no 'pool'", id="no-such-type"),
        *(
            pytest.param(
                ROOT + row("tank/vm/a b", "volume") + row("tank/vm/a b@c", kind), kind, id=f"{kind}-with-a-space"
            )
            for kind in ("pool", "volume", "bookmark")
        ),
        pytest.param(ROOT + row("tank/vm/a@b", "snapshot"), "not that dataset", id="snapshot-of-nothing"),
        pytest.param(row("tank/vm", "filesystem", token="1-x"), "resume token", id="token"),
        pytest.param(row("tank/vm", "filesystem", token=f"{GOOD} tank"), "resume token", id="token-and-more"),
        pytest.param(row("tank/vm", "filesystem", origin="tank/vm"), "origin", id="origin-without-snapshot"),
        pytest.param(row("tank/vm", "filesystem", origin="tank/vm#a"), "origin", id="origin-a-bookmark"),
        *(
            pytest.param(ROOT + f"tank/vm@a\t{guid}\t{txg}\n", "whole number", id=f"{guid}-{txg}"[:20])
            for guid, txg in (
                ("abc", 1),
                ("", 1),
                (-1, 1),
                (2**64, 1),
                ("9" * 5000, 1),
                (1, "1.5"),
                (1, "+1"),
                (1, "-"),
            )
        ),
        pytest.param(ROOT + row("tank/vm@a", "snapshot", refs="x"), "whole number", id="userrefs"),
        pytest.param(ROOT + row("tank/vm@a", "snapshot", refs="-1"), "whole number", id="userrefs-below-0"),
    ],
)
def test_tree_that_zfs_cannot_print_is_not_believed(text: str, why: str) -> None:
    with pytest.raises(NotBelieved, match=why):
        parse_tree(text, "tank/vm")


def test_tree_rows_without_end_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zfs_replicate, "MAX_ROWS", 3)
    rows = [f"tank/vm@{number}\t{number}\t{number}\n" for number in range(3)]
    assert parse_tree(ROOT + "".join(rows[:2]), "tank/vm")
    with pytest.raises(NotBelieved, match="more than 3 datasets and snapshots of tank/vm"):
        parse_tree(ROOT + "".join(rows), "tank/vm")


def test_whole_tree_has_its_root_and_all_parents() -> None:
    tree, _ = parse_tree(ROOT + row("tank/vm/a", "filesystem") + row("tank/vm/a/b", "filesystem"), "tank/vm")
    assert whole_tree(tree, "") == tree
    for missing, told in (("", "its root"), ("/a", "/a")):
        with pytest.raises(NotBelieved, match=f"without {told}"):
            whole_tree({key: it for key, it in tree.items() if key != missing}, "")


def test_holds_on_what_was_not_asked_about_are_not_believed() -> None:
    """A tag with a newline forges one."""
    text = "tank@a\tx\tThu Nov 16 10:00 2023\ntank@b\toffsite:received\tThu Nov 16 10:00 2023\n"
    with pytest.raises(NotBelieved, match="not asked about: 'tank@b'"):
        parse_holds(text, {"tank@a"})
    with pytest.raises(NotBelieved, match="not asked about: 'tank@b'"):
        parse_holds_and_ivsets(text, {"tank@a"})


def clones(*origins: tuple[str, str]) -> Tree:
    return {
        f"/{name}": Dataset(f"tank/{name}", "filesystem", (Snapshot(f"tank/{name}@s", n, n, n),), origin=origin)
        for n, (name, origin) in enumerate(origins, 1)
    }


def test_with_clones_refuses_a_circle() -> None:
    for circle in ([("a", "tank/a@s")], [("a", "tank/b@s"), ("b", "tank/a@s")], [("x", "tank/a@s"), ("a", "tank/a@s")]):
        with pytest.raises(NotBelieved, match="a clone of its own clone"):
            with_clones(clones(*circle))


def test_with_clones_takes_a_chain_of_a_thousand() -> None:
    chain = clones(*((str(n), f"tank/{n - 1}@s" if n else "") for n in range(1000)))
    assert len(with_clones(dict(reversed([*chain.items()])))["/999"].inherited) == 999
    assert in_order(chain)[-1] == "/999"


def test_with_clones_refuses_chains_that_would_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zfs_replicate, "MAX_INHERITED", 40)
    with pytest.raises(NotBelieved, match="more than 40 snapshots"):
        with_clones(clones(*((str(n), f"tank/{n - 1}@s" if n else "") for n in range(10))))
