"""What people's trees do, by their public reports: names that move, tokens that died, clones, pools and snapshots that
are not as a tool expects them. Where each comes from says its docstring."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

import pytest
from site_pair import JOB, MIRROR, TAG, TREE, get, held, history, names
from test_zfs_encryption import KEYS, encrypted
from test_zfs_limits import import_again
from test_zfs_mirror import interrupt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import Machine
    from site_pair import Site

pytestmark = pytest.mark.zfs


def named(machine: Machine, tree: str) -> dict[int, str]:
    """All snapshots of a tree by guid: what they are called below it."""
    return {point.guid: point.name[len(tree) :] for points in history(machine, tree).values() for point in points}


def own_guids(machine: Machine, tree: str, *children: str) -> list[str]:
    """The guids of datasets. One that is pulled anew has another than before; one that is renamed keeps it."""
    return [get(machine, "guid", tree + child)[0] for child in children]


# --- Names that move --------------------------------------------------------------------------------------------------

ROTATE = f"""
zfs destroy -r {TREE}@2daysago 2>/dev/null
zfs rename -r {TREE}@yesterday @2daysago 2>/dev/null
zfs rename -r {TREE}@today @yesterday 2>/dev/null
zfs snapshot -r {TREE}@today
"""


def test_rolling_snapshot_names_are_followed_for_days(site: Site) -> None:
    """zfs-rename(8), example 2: the oldest goes, all others are renamed, a new one comes. A replica that follows:
    https://github.com/openzfs/zfs/issues/12476"""
    site.source.run(f"zfs create -p {TREE}/www")
    seen: set[int] = set()
    for day in range(1, 7):
        site.source.run(f"echo {day} > /{TREE}/www/file; {ROTATE}")
        assert names(site.source, TREE) == ["2daysago", "yesterday", "today"][-day:]
        site.replicate_silently()
        site.assert_in_step()
        there, here = named(site.source, TREE), named(site.backup, MIRROR)
        seen |= there.keys()
        assert here.keys() == seen, f"day {day}: what the source has dropped stays here"
        if day <= 3:  # nothing was dropped yet
            assert here == there
        for child in ("", "/www"):
            assert names(site.backup, MIRROR + child)[-1] == "today"
        for machine in (site.source, site.backup):
            machine.shift_clock(1)
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)


def test_snapshot_names_that_move_in_chains_and_circles(site: Site) -> None:
    """Each new name is that of another one here, up to one that is free; and names that change places. From
    https://github.com/openzfs/zfs/issues/17594"""
    site.source.run(f"zfs create -p {TREE}/www")
    for name in "abc":
        site.snapshot(name)
    site.replicate_silently("-I")

    def renamed(*steps: str, new: str) -> None:
        for old, name in (step.split(">") for step in steps):
            site.source.run(f"zfs rename -r {TREE}@{old} @{name}")
        site.snapshot(new)
        site.replicate_silently("-I")
        site.assert_in_step()
        assert named(site.backup, MIRROR).keys() == named(site.source, TREE).keys()

    renamed("c>d", "b>c", "a>b", new="a")
    assert names(site.backup, f"{MIRROR}/www") == ["b", "c", "d", "a"]
    renamed("b>t", "d>b", "c>d", "t>c", new="e")  # three in a circle, and none of them is in the way
    renamed("b>old", "d>b", "c>d", new="c")
    assert named(site.backup, MIRROR) == named(site.source, TREE)


@pytest.mark.parametrize("places", ["ab", pytest.param("abc", marks=pytest.mark.full)])
def test_datasets_that_change_places_are_followed(site: Site, places: str) -> None:
    """A swap, and a rotation of three: no full pull, and nobody's history goes on in another's.
    https://github.com/openzfs/zfs/issues/9412"""
    children = [child for place in places for child in (place, f"{place}/sub")]
    site.plant(*children)
    site.snapshot("x")
    site.replicate_silently()
    before = own_guids(site.backup, MIRROR, *(f"/{child}" for child in children))
    moves = [(places[-1], "t"), *zip(places[-2::-1], places[:0:-1]), ("t", places[0])]
    site.source.run(" && ".join(f"zfs rename {TREE}/{old} {TREE}/{new}" for old, new in moves))
    site.write("two", *children)
    site.snapshot("y")
    site.replicate_silently()
    site.assert_in_step()
    now = own_guids(site.backup, MIRROR, *(f"/{child}" for child in children))
    assert now == before[-2:] + before[:-2]
    for child in children:
        assert names(site.backup, f"{MIRROR}/{child}") == ["x", "y"]
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)
    site.replicate_silently()


# --- Receives that were cut -------------------------------------------------------------------------------------------

POND = "pond/virt/machines"
RENAME_POOL = (
    "for i in $(seq 30); do zpool export backuppool && exec zpool import backuppool pond; sleep 1; done; exit 1"
)
COPY_POOL = f"""
truncate -s 4G /var/tmp/pond && zpool create -f pond /var/tmp/pond && zfs create pond/virt &&
zfs send -R {TREE}@tuesday | zfs recv -u {POND} || exit
for i in $(seq 30); do zpool destroy backuppool && exit; sleep 1; done; exit 1
"""


@pytest.mark.parametrize(
    ("cut", "move"),
    [
        pytest.param("first", RENAME_POOL, id="first-renamed", marks=pytest.mark.full),
        pytest.param("increment", RENAME_POOL, id="increment-renamed"),
        pytest.param("increment", COPY_POOL, id="increment-copied", marks=pytest.mark.full),
    ],
)
def test_token_of_a_pool_with_another_name_is_given_up(site: Site, cut: str, move: str) -> None:
    """Both guids are there, but `zfs send -t` looks for them below the name in the token, for ever in vain.
    https://github.com/yboetz/pyznap/issues/110 and https://github.com/zrepl/zrepl/issues/855"""
    site.source.run(f"zfs create -p {TREE}")
    site.snapshot("monday")
    if cut == "increment":
        site.replicate_silently()
    site.source.run(f"head -c 30M /dev/urandom > /{TREE}/big")
    site.snapshot("tuesday")
    interrupt(site)
    assert get(site.backup, "receive_resume_token", MIRROR)[0].startswith("1-")
    before = named(site.backup, MIRROR)
    assert list(before.values()) == ["@monday"] * (cut == "increment")
    job = JOB.replace(TREE, POND)
    try:
        site.source.run(move, timeout=300)
        site.replicate("-v", job=job)
        site.assert_in_step(tree=POND)
        assert get(site.backup, "receive_resume_token", MIRROR) == ["-"]
        assert named(site.backup, MIRROR).items() >= before.items()
        assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, POND)
        site.replicate_silently(job=job)
    finally:
        site.source.run("rm -f /var/tmp/pond")


STUB = """\
#!/bin/bash
# A token that `zfs recv -A` knows nothing of; where DATASET is one, it stands in listings of that.
case "$1 $2" in
    "recv -A" | "receive -A")
        echo "'${@: -1}' does not have any resumable receive state to abort" >&2
        exit 1 ;;
esac
case "$*" in
    "list "*receive_resume_token*)
        columns=$(sed 's/.* -o \\([^ ]*\\).*/\\1/' <<< "$*")
        column=$(tr , '\\n' <<< "$columns" | grep -nx receive_resume_token | cut -d : -f 1)
        /usr/sbin/zfs "$@" | awk -F '\\t' -v OFS='\\t' -v at="$column" '$1 == "DATASET" { $at = "TOKEN" } { print }'
        exit "${PIPESTATUS[0]}" ;;
esac
exec /usr/sbin/zfs "$@"
"""


@contextlib.contextmanager
def nothing_to_abort(site: Site, token: str = "") -> Iterator[None]:
    """While `zfs recv -A` here says that there is nothing; with a token, the mirror seems to wait for its rest."""
    stub = STUB.replace("DATASET", MIRROR if token else "-").replace("TOKEN", token)
    site.backup.write("/usr/local/bin/zfs", stub, 0o755)
    try:
        yield
    finally:
        site.backup.run("rm /usr/local/bin/zfs")


def cut_and_gone(site: Site, name: str, base: str = "") -> str:
    """A receive is cut, and the source has its snapshot no more. Returns its token."""
    site.source.run(f"head -c 30M /dev/urandom > /{TREE}/big")
    site.snapshot(name)
    interrupt(site)
    assert held(site.source, TREE, TAG) == {f"{TREE}@{it}" for it in (base, name) if it}
    site.source.run(f"zfs release {TAG} {TREE}@{name} && zfs destroy {TREE}@{name}")
    token = get(site.backup, "receive_resume_token", MIRROR)[0]
    assert token.startswith("1-")
    return token


def test_token_with_nothing_to_abort_does_not_stop_the_pull(site: Site) -> None:
    """Pools written by ZFS before 0.8.3 have finished datasets with a token; here a stub shows one.
    https://github.com/openzfs/zfs/issues/10439"""
    site.source.run(f"zfs create -p {TREE}")
    token = cut_and_gone(site, "monday")
    site.snapshot("tuesday")
    site.replicate()
    assert names(site.backup, MIRROR) == ["tuesday"]
    with nothing_to_abort(site, token):
        for day in ("wednesday", "thursday"):
            site.snapshot(day)
            site.replicate()
            site.assert_in_step()
        site.replicate()  # nothing is new
    assert names(site.backup, MIRROR) == ["tuesday", "wednesday", "thursday"]
    site.replicate_silently()


# --- Parents, clones, boot environments -------------------------------------------------------------------------------


@pytest.mark.full
def test_encrypted_parent_that_comes_late_costs_no_second_pull(site: Site) -> None:
    """Only a grandchild has a snapshot at first, as with sanoid's process_children_only.
    https://github.com/yboetz/pyznap/pull/101"""
    children = ("", "/mid", "/mid/leaf")
    site.source.write("/root/one", KEYS["one"])
    site.source.run(
        f"zfs create -p backuppool/virt && zfs create {encrypted('one')} {TREE} && zfs create {TREE}/mid && "
        f"zfs create {TREE}/mid/leaf && head -c 300000 /dev/urandom > /{TREE}/mid/leaf/file"
    )
    site.snapshot("1", f"{TREE}/mid/leaf")
    site.replicate_silently()
    leaf = f"{MIRROR}/mid/leaf"
    before, first = own_guids(site.backup, leaf, ""), history(site.backup, leaf)[""]
    site.source.run(f"for it in {TREE} {TREE}/mid; do head -c 300000 /dev/urandom > /$it/file; done")
    for name in ("2", "3"):
        site.snapshot(name)
        site.replicate_silently()
        site.assert_in_step()
    site.replicate_silently()
    assert own_guids(site.backup, leaf, "") == before
    assert history(site.backup, leaf)[""][:1] == first, "not even its createtxg is another"
    assert names(site.backup, leaf) == ["1", "2", "3"]
    site.backup.write("/root/one", KEYS["one"])
    for child in children:
        site.backup.run(f"zfs load-key -L file:///root/one {MIRROR}{child}")
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)


# --- Pools that are read-only, snapshots that are busy ----------------------------------------------------------------


@pytest.mark.full
def test_source_that_is_read_only_is_pulled_without_holds(site: Site) -> None:
    """The day on which a mirror matters most: the pool cannot be imported otherwise. Nothing can vanish there.
    https://github.com/openzfs/zfs/issues/11985"""
    site.source.run(f"zfs create -p {TREE}/www && head -c 300000 /dev/urandom > /{TREE}/www/one")
    site.snapshot("monday")
    site.replicate_silently("--bookmark")
    site.source.run(f"head -c 300000 /dev/urandom > /{TREE}/www/two && zfs create {TREE}/mail")
    site.snapshot("tuesday")
    import_again(site.source, "backuppool", "-o readonly=on")
    done = site.replicate("--bookmark", status=1)
    assert re.search("^zfs_replicate: .*read[- ]?only", done.stderr, re.MULTILINE | re.IGNORECASE)
    assert done.stderr.count("zfs_replicate: ") == 1, done.stderr
    assert named(site.backup, MIRROR).items() >= named(site.source, TREE).items()
    assert names(site.backup, f"{MIRROR}/mail") == ["tuesday"]
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)
    site.replicate("--bookmark", status=1)
    assert held(site.source, TREE, TAG) == {f"{TREE}@monday", f"{TREE}/www@monday"}

    import_again(site.source, "backuppool")
    site.replicate_silently("--bookmark")
    site.assert_in_step()
    marks = site.source.run(f"zfs list -Hp -r -t bookmark -o guid {TREE}").stdout.split()
    assert {int(guid) for guid in marks} == {points[-1].guid for points in history(site.source, TREE).values()}


def test_expiry_keeps_what_is_busy_until_it_is_so_for_too_long(site: Site) -> None:
    """One snapshot here is mounted, of another there is a clone outside of the tree. The others go.
    https://github.com/truenas/zettarepl/pull/75"""
    site.source.run(f"zfs create -p {TREE}/www")
    for day in ("monday", "tuesday", "wednesday"):
        site.snapshot(day)
    site.replicate_silently("-I")
    www = f"{MIRROR}/www"
    site.backup.run(
        f"mkdir -p /run/look && mount -t zfs -o ro {www}@monday /run/look && "
        f"zfs clone -o canmount=off {www}@tuesday offsite/clone"
    )
    try:
        later(site, 31, "now")
        done = site.replicate("-v", "-k", "30")
        for day in ("monday", "tuesday"):
            assert re.search(f"^.*{www}@{day}: .*kept.*$", done.stderr, re.MULTILINE)
        assert names(site.backup, www) == ["monday", "tuesday", "now"]
        assert names(site.backup, MIRROR) == ["now"]
        site.replicate_silently("-k", "30")
        later(site, 400, "later")
        done = site.replicate("-k", "30", status=1)
        assert f"{www}@monday" in done.stderr
        assert names(site.backup, www) == ["monday", "tuesday", "later"]
    finally:
        site.backup.run("umount /run/look")
    site.backup.run("zfs destroy offsite/clone")
    site.replicate_silently("-k", "30")
    assert names(site.backup, www) == ["later"]
    site.assert_in_step()


def later(site: Site, days: int, name: str) -> None:
    """Days have gone by, and the source makes a snapshot."""
    for machine in (site.source, site.backup):
        machine.shift_clock(days)
    site.snapshot(name)


# --- Two lines at one source, one place ------------------------------------------------------------------------------


@pytest.mark.full
def test_mirror_within_another_mirror_stays_where_it_is(site: Site) -> None:
    """A dataset is copied from the inner tree to the outer one, with all its guids, and goes in the inner one: its
    mirror there is none of the outer line's. (Found while reading.)"""
    outer = "zfs_replicate -h source -r backuppool/one -l offsite/all -t one"
    inner = "zfs_replicate -h source -r backuppool/two -l offsite/all/two -t two"
    site.source.run(
        "zfs create -p backuppool/one/www && zfs create -p backuppool/two/db && echo 1 > /backuppool/two/db/file"
    )
    for root in ("one", "two"):
        site.snapshot("monday", f"backuppool/{root}")
    for job in (outer, inner):
        site.replicate_silently(job=job)
    before = history(site.backup, "offsite/all/two")["/db"]
    site.source.run(
        "zfs send backuppool/two/db@monday | zfs recv -u backuppool/one/db && "
        "zfs release two backuppool/two/db@monday && zfs destroy -r backuppool/two/db"
    )
    for root in ("one", "two"):
        site.snapshot("tuesday", f"backuppool/{root}")
    for job in (outer, inner, outer):
        site.replicate_silently(job=job)
    assert history(site.backup, "offsite/all/two")["/db"] == before
    assert names(site.backup, "offsite/all/db")[-1] == "tuesday"
    site.assert_in_step(tree="backuppool/one", mirror="offsite/all", tag="one")
    site.assert_in_step(tree="backuppool/two", mirror="offsite/all/two", tag="two")


@pytest.mark.full
def test_bookmarks_of_tags_that_look_alike_do_not_clash(site: Site) -> None:
    """`a/b` and `a+b` differ only in what no bookmark's name may have. (Found while reading, without a report.)"""
    line = f"zfs_replicate -h source -r {TREE} --bookmark"
    first, second = f"{line} -l offsite/one -t a/b", f"{line} -l offsite/two -t a+b"
    site.source.run(f"zfs create -p {TREE}")
    site.snapshot("monday")
    site.replicate_silently(job=first)
    site.replicate_silently(job=second)
    site.snapshot("tuesday")
    site.replicate_silently(job=first)
    assert held(site.source, TREE, "a+b") == {f"{TREE}@monday"}
    site.source.run(f"zfs release a+b {TREE}@monday && zfs destroy {TREE}@monday")
    site.snapshot("wednesday")
    site.replicate_silently(job=second)
    site.assert_in_step(mirror="offsite/two", tag="a+b")
    assert names(site.backup, "offsite/two") == ["monday", "wednesday"]
    site.replicate_silently(job=first)
    site.assert_in_step(mirror="offsite/one", tag="a/b")


@pytest.mark.full
def test_bookmark_whose_name_would_be_too_long_stops_nothing(site: Site) -> None:
    """The dataset's name and `#TAG-GUID` are longer than the 255 bytes that ZFS allows. (Found while reading.)"""
    long = "l" * 210
    site.source.run(f"zfs create -p {TREE}/{long} && zfs create {TREE}/www")
    for day in ("monday", "tuesday"):
        site.snapshot(day)
        site.replicate("--bookmark")
        site.assert_in_step()
    assert names(site.backup, f"{MIRROR}/{long}") == ["monday", "tuesday"]
    marks = site.source.run(f"zfs list -Hp -r -t bookmark -o name,guid {TREE}").stdout.splitlines()
    newest = {key: str(points[-1].guid) for key, points in history(site.source, TREE).items()}
    for key in ("", "/www"):
        found = [mark.split("\t")[1] for mark in marks if mark.startswith(f"{TREE}{key}#")]
        assert found == [newest[key]]
