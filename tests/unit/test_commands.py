"""Commands: what is refused, what is quoted, how many names go into one."""

from __future__ import annotations

import shutil
import string
import subprocess
from dataclasses import replace

import pytest
from histories import LOCAL, SOURCE, local, source
from hypothesis import given, settings, strategies as st

from zfs_replicate import (
    ABORT_RECEIVE,
    BATCH_BYTES,
    CLOCK_TIME,
    COUNT_FILES,
    CREATE_PARENT,
    LIST_HOLDS,
    LIST_RIGHTS,
    MAKE_READ_ONLY,
    SBIN,
    SYNC_POOL,
    Account,
    Command,
    Dataset,
    Properties,
    Receive,
    Snapshot,
    after_receives,
    allow_command,
    batches,
    bookmark,
    changed_by,
    destroy,
    destroy_bookmark,
    hold,
    lacking,
    list_features,
    list_tree,
    outside,
    receive,
    release,
    remote_line,
    rename,
    rollback,
    send,
    stream_flags,
)

NAME_LETTERS = string.ascii_letters + string.digits + "-_.: "
WORD_OF_LINUX = 128 * 1024


def snapshots(*names: str) -> list[Snapshot]:
    return [Snapshot(name, place, place, 0) for place, name in enumerate(names)]


# destroy


def test_destroy_names_each_snapshot_of_one_dataset() -> None:
    assert destroy(snapshots("tank/a@1", "tank/a@2 ", "tank/a@3")) == ("zfs", "destroy", "tank/a@1,2 ,3")
    assert destroy(snapshots("tank@1")) == ("zfs", "destroy", "tank@1")


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["tank/a"], id="a-dataset"),
        pytest.param(["tank/a", "tank/a@1"], id="a-dataset-among-snapshots"),
        pytest.param(["tank/a@1", "tank/b@1"], id="two-datasets"),
        pytest.param(["tank/a@1%3"], id="a-range"),
        pytest.param(["tank/a@%"], id="every-snapshot"),
        pytest.param(["tank/a@1", "tank/a@%2"], id="a-range-among-snapshots"),
        pytest.param(["tank/a@1,2"], id="two-in-one"),
        pytest.param(["tank/a#1"], id="a-bookmark"),
        pytest.param(["tank/a@1@2"], id="two-at-signs"),
        pytest.param(["tank/a/%recv"], id="partial-state"),
        pytest.param(["tank/a/%recv@1"], id="a-snapshot-of-partial-state"),
        pytest.param([""], id="an-empty-name"),
        pytest.param([], id="nothing"),
    ],
)
def test_destroy_refuses_all_but_plain_snapshots_of_one_dataset(names: list[str]) -> None:
    with pytest.raises(AssertionError, match="refusing to destroy"):
        destroy(snapshots(*names))


@given(st.text(NAME_LETTERS + "@%,#/", max_size=12))
def test_destroy_never_lets_anything_but_one_snapshot_through(name: str) -> None:
    try:
        *_, word = destroy(snapshots(name))
    except AssertionError:
        return
    assert word == name
    assert word.count("@") == 1
    assert not set(word) & set("%,#")


# The line for a remote shell


def words_through(shell: str, command: Command) -> list[str]:
    """What arrives at the program, word by word, when a login shell of this kind gets the line."""
    line = remote_line(command)
    done = subprocess.run([shell, "-c", line], capture_output=True, check=True, env={"PATH": "/usr/bin:/bin"})
    return done.stdout.decode().split("\0")[:-1]


SHELLS = [shell for shell in ("sh", "dash", "bash", "zsh", "csh", "tcsh", "fish") if shutil.which(shell)]
IN_ANY_SHELL = [
    "tank/my vm @a day ",
    " leading",
    "-rf",
    "a:b_c-d.e",
    "$HOME",
    "`id`",
    "$(id)",
    "*",
    "~",
    "it's",
    '"quoted"',
    "a;b|c&d>e<f",
    "{a,b}",
    "",
    " ",
    "a  b",
    "#mark",
    "tank/vm#mark",
    "%",
    "=ls",
    "[a-z]",
    "?",
    "größe",
]


@pytest.mark.parametrize("shell", SHELLS)
def test_remote_line_brings_words_as_they_are_through_any_shell(shell: str) -> None:
    assert words_through(shell, ("printf", "%s\\0", *IN_ANY_SHELL)) == IN_ANY_SHELL


@given(st.lists(st.text(NAME_LETTERS + "'\"$`&|;<>()*?[]{}~#@%^+=,/", max_size=20), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_remote_line_brings_any_words_through_sh(words: list[str]) -> None:
    assert words_through("sh", ("printf", "%s\\0", *words)) == words


def test_remote_line_ends_with_the_status_of_the_command() -> None:
    assert subprocess.run(["sh", "-c", remote_line(("sh", "-c", "exit 7"))], check=False).returncode == 7


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("first", "second", "status", "output"),
    [
        (("printf", "it's %s", "all"), ("tr", "a-z", "A-Z"), 0, b"IT'S ALL"),
        (("sh", "-c", "echo some; exit 7"), ("cat",), 7, b"some\n"),
        (("echo", "some"), ("sh", "-c", "cat; exit 8"), 8, b"some\n"),
        (("sh", "-c", "exit 7"), ("sh", "-c", "cat; exit 8"), 7, b""),
        (("no-such-program",), ("cat",), 127, b""),
        (("echo", "some"), ("no-such-program",), 127, b""),
        (("sh", "-c", "cat /dev/zero; exit 9"), ("sh", "-c", "exit 8"), 8, b""),
    ],
)
def test_remote_line_with_two_programs_tells_the_status_of_both(
    shell: str, first: Command, second: Command, status: int, output: bytes
) -> None:
    """A pipe of sh would tell of the second alone."""
    done = subprocess.run([shell, "-c", remote_line(first, then=second)], capture_output=True, check=False, timeout=60)
    assert done.stdout == output
    assert done.returncode == status or {done.returncode, status} <= {8, 141}  # SIGPIPE may come first


@pytest.mark.parametrize("shell", SHELLS)
def test_remote_line_looks_for_programs_on_the_way(shell: str) -> None:
    line = remote_line(("sh", "-c", "echo out; echo err >&2; exit 7"), look_for=("cat", "no-such-program", "env"))
    done = subprocess.run([shell, "-c", line], capture_output=True, check=False, text=True)
    assert (done.returncode, done.stdout) == (7, "out\n")
    assert [line.rpartition("/")[2] for line in done.stderr.splitlines()] == ["cat", "env", "err"]


def test_remote_line_puts_sbin_last_and_asks_for_english() -> None:
    line = remote_line(("env",))
    done = subprocess.run(["sh", "-c", line], capture_output=True, env={"PATH": "/bin", "LC_ALL": "de_DE"}, text=True)
    assert f"PATH=/bin:{SBIN}\n" in done.stdout
    assert "LC_ALL=C\n" in done.stdout


# Batches


@given(st.lists(st.tuples(st.integers(5, 255), st.integers(1, 400)), max_size=12))
@settings(deadline=None)
def test_batches_lose_nothing_and_each_fits_into_one_remote_word(runs: list[tuple[int, int]]) -> None:
    names = [f"p/d@{'s ' * length}"[:length] for length, count in runs for _ in range(count)]
    found = list(batches(names))
    assert [name for batch in found for name in batch] == names
    for batch in found:
        assert batch
        assert sum(map(len, batch)) <= BATCH_BYTES
        for command in (hold("t" * 246, batch), (*LIST_HOLDS, *batch)):
            assert len(remote_line(command).encode()) < WORD_OF_LINUX


def test_batches_are_as_few_as_will_do() -> None:
    assert list(batches([])) == []
    assert list(batches(["a@1", "a@2"])) == [["a@1", "a@2"]]
    assert len(list(batches(["tank/data@" + "x" * 90] * 10_000))) < 20


def test_batches_of_the_shortest_names_fit_too() -> None:
    for batch in batches(["p@ "] * 50_000):
        assert len(remote_line((*LIST_HOLDS, *batch))) < WORD_OF_LINUX


# send and receive

FULL = Receive(source("@a,1").snapshots[0])


def step(history: str) -> tuple[Dataset, Receive]:
    there = source(history)
    return there, Receive(there.snapshots[-1], (there.bookmarks + there.snapshots)[0])


def test_send_from_nothing_a_snapshot_or_a_bookmark() -> None:
    flags = ("-L", "-c")
    assert send(source("@a,1"), FULL, False, flags) == ("zfs", "send", "-L", "-c", "-p", f"{SOURCE}@a")
    assert send(source("@a,1"), FULL, False, ()) == ("zfs", "send", "-p", f"{SOURCE}@a")
    assert send(*step("@a,1 @b,2"), False, flags)[-3:] == ("-i", f"{SOURCE}@a", f"{SOURCE}@b")
    assert send(*step("#a,1 @b,2"), False, flags)[-3:] == ("-i", f"{SOURCE}#a", f"{SOURCE}@b")


def test_send_of_an_encrypted_dataset_is_raw_or_without_properties() -> None:
    there = Dataset(SOURCE, "filesystem", encrypted=True)
    for it in (FULL, step("@a,1 @b,2")[1]):
        assert {"-w", "-p"} <= set(send(there, it, True, ()))
        assert not {"-w", "-p"} & set(send(there, it, False, ()))
    assert "-w" not in send(source("@a,1"), FULL, False, ())


def test_send_of_a_rest_takes_no_flag_but_its_token() -> None:
    rest = Receive(FULL.snapshot, token="1-c0ffee")
    there = Dataset(SOURCE, "filesystem", encrypted=True)
    assert send(there, rest, True, ("-L", "-c")) == ("zfs", "send", "-t", "1-c0ffee")


def test_stream_flags_are_those_the_local_pool_understands() -> None:
    assert stream_flags(["large_blocks", "lz4_compress", "zstd_compress"]) == ("-L", "-c")
    assert stream_flags(["large_blocks", "lz4_compress"]) == ("-L",)
    assert stream_flags([]) == ()


def test_lacking_features_of_a_pool_are_named() -> None:
    said = "zfs: cannot receive: stream has unsupported feature, feature flags = 10420004"
    assert lacking(said, ["large_blocks"]) == ["longname"]
    said = "zfs: cannot receive new filesystem stream: pool must be upgraded to receive this stream."
    assert lacking(said, ["large_blocks", "large_dnode", "encryption"]) == [
        "zstd_compress", "longname", "large_microzap",
    ]  # fmt: skip
    assert lacking("zfs: cannot receive: kernel modules must be upgraded to receive this stream.", []) == []


def options(command: Command, flag: str) -> set[str]:
    return {value for word, value in zip(command, command[1:]) if word == flag}


SYSTEMD = ("requires", "requires-mounts-for", "before", "after", "wanted-by", "required-by", "nofail")
NEVER = {"zfs_replicate:failing", "zfs_replicate:taken-over", *(f"org.openzfs.systemd:{name}" for name in SYSTEMD)}
"""What is neither set nor taken over."""
OF_ALL = {
    "reservation=none", "refreservation=none", "snapshot_limit=none", "volmode=none", "snapdev=hidden",
    "org.openzfs.systemd:ignore=on",
}  # fmt: skip
"""What filesystems and volumes have of their own, besides readonly."""


def test_receive_sets_properties_the_first_time_only() -> None:
    first, later = receive(source("@a,1"), None, "t/a@a"), receive(source("@a,1"), local("@a,1"), "t/a@a")
    limits = {"quota", "refquota", "reservation", "refreservation", "snapshot_limit", "filesystem_limit"}
    switches = {
        "readonly=on", "canmount=noauto", "sharenfs=off", "sharesmb=off", "setuid=off", "devices=off", "zoned=off",
        "volmode=none", "snapdev=hidden", "org.openzfs.systemd:ignore=on",
    }  # fmt: skip
    assert options(first, "-o") == {*switches, *(f"{limit}=none" for limit in limits)}
    assert options(first, "-x") == {"mountpoint", *NEVER}
    assert options(later, "-o") == set()
    assert options(later, "-x") == {"mountpoint", *NEVER, *limits, *(switch.split("=")[0] for switch in switches)}
    for command in (first, later):
        assert command[:5] == ("zfs", "recv", "-s", "-u", "-h")
        assert command[-1] == "t/a@a", "with the name of its snapshot zfs recv takes no package of others"


def test_receive_sets_again_what_would_be_lost() -> None:
    own = {"compression": "zstd", "readonly": "off", "com.example:note": "two\nlines"}
    command = receive(source("@a,1"), local("@a,1"), "t/a@b", own=own)
    assert options(command, "-o") == {"compression=zstd", "readonly=off", "com.example:note=two\nlines"}
    assert not options(command, "-x") & own.keys()
    assert "canmount" in options(command, "-x")


def test_receive_gives_a_volume_no_properties_of_a_filesystem() -> None:
    for mine in (None, local("@a,1", kind="volume")):
        command = receive(source("@a,1", kind="volume"), mine, "t/a@a")
        names = {value.split("=")[0] for value in options(command, "-o") | options(command, "-x")}
        assert names == {"readonly", *NEVER, *(value.split("=")[0] for value in OF_ALL)}


OWN = Properties(
    ("compression=zstd", "recordsize=1M", "canmount=on", "volblocksize=4k", "com.sun:auto-snapshot=false", "a:b=c=d"),
    ("readonly", "atime", "com.example:x", "volsize"),
)


def test_receive_sets_what_the_mirror_has_of_its_own() -> None:
    limits = {"quota=none", "refquota=none", "filesystem_limit=none", "setuid=off", "devices=off", "zoned=off"} | OF_ALL
    for_all = {"compression=zstd", "com.sun:auto-snapshot=false", "a:b=c=d"}
    first = receive(source("@a,1"), None, "t/a@a", OWN)
    assert options(first, "-o") == for_all | limits | {"recordsize=1M", "canmount=on", "sharenfs=off", "sharesmb=off"}
    assert options(first, "-x") == {"mountpoint", *NEVER, "readonly", "atime", "com.example:x"}
    later = receive(source("@a,1"), local("@a,1"), "t/a@a", OWN)
    assert options(later, "-o") == set()
    assert options(later, "-x") == options(first, "-x") | {value.split("=")[0] for value in options(first, "-o")}


def test_receive_sets_on_a_volume_only_what_volumes_have() -> None:
    first = receive(source("@a,1", kind="volume"), None, "t/a@a", OWN)
    own = {"compression=zstd", "volblocksize=4k", "com.sun:auto-snapshot=false", "a:b=c=d"}
    assert options(first, "-o") == OF_ALL | own
    assert options(first, "-x") == {*NEVER, "readonly", "com.example:x", "volsize"}


def test_receive_does_not_exclude_what_it_sets() -> None:
    first = receive(source("@a,1"), None, "t/a@a", Properties(("mountpoint=none",)))
    assert "mountpoint=none" in options(first, "-o")
    assert "mountpoint" not in options(first, "-x")


@pytest.mark.parametrize("mine", [None, local(""), local("@a,1"), local("@a,1", kind="volume")])
def test_receive_forces_nothing_where_data_may_be(mine: Dataset | None) -> None:
    assert "-F" not in receive(source("@a,1"), mine, "t/a@a")


def test_receive_overwrites_an_empty_filesystem() -> None:
    assert "-F" in receive(source("@a,1"), local("", empty=True), "t/a@a")


def test_receive_forces_nothing_onto_what_the_same_batch_brought() -> None:
    there = source("@a,1 @b,2")
    assert "-F" not in receive(there, replace(local("@a,1"), empty=True), "t/a@b")
    after = after_receives(there, local("", empty=True), LOCAL, [Receive(there.snapshots[0])])
    assert not after.empty
    assert "-F" not in receive(there, after, "t/a@b")


def test_receive_forces_nothing_over_children() -> None:
    assert "-F" not in receive(source("@a,1"), replace(local("", empty=True), parent=True), "t/a@a")


# What an account needs that is not root

MY = Account("keeper", "here", "offsite/vm")
OURS = (
    "readonly,canmount,sharenfs,sharesmb,setuid,devices,zoned,volmode,snapdev,quota,refquota,reservation,refreservation,"
    "snapshot_limit,filesystem_limit,userprop"
)
ONE = Snapshot("offsite/vm/a@one", 1, 1, 0)


@pytest.mark.parametrize(
    ("command", "granted"),
    [
        (send(source("@a,1", "offsite/vm/a"), Receive(ONE), raw=False, flags=()), "send offsite/vm"),
        (hold("tag=x", ["offsite/vm/a@one", "offsite/vm/b@one"]), "hold offsite/vm"),
        (release("tag", ["offsite/vm@one"]), "release offsite/vm"),
        (destroy([ONE]), "destroy,mount offsite/vm"),
        (rollback(ONE), "rollback,destroy,mount offsite/vm"),
        (bookmark(ONE, "#m"), "bookmark offsite/vm"),
        (destroy_bookmark("offsite/vm/a#m"), "destroy,mount offsite/vm"),
        ((*ABORT_RECEIVE, "offsite/vm/a"), "receive,destroy,mount offsite/vm"),
        ((*MAKE_READ_ONLY, "offsite/vm/a"), "readonly offsite/vm"),
        ((*COUNT_FILES, "offsite/vm"), "userused,userquota,userobjused,userobjquota offsite/vm"),
        ((*CREATE_PARENT, "offsite/vm/a"), "create,mount,canmount offsite/vm"),
        ((*CREATE_PARENT, "offsite/x/y"), "create,mount,canmount offsite/x"),
        (rename("offsite/vm/a", "offsite/vm/a.old"), "rename,create,mount offsite/vm"),
        (rename("offsite/vm", "offsite/vm.old"), "rename,create,mount offsite"),
        (receive(source("@a,1"), None, "offsite/vm/a@a"), f"receive,create,mount,{OURS} offsite/vm"),
        (receive(source("@a,1"), None, "offsite/vm@a"), f"receive,create,mount,{OURS} offsite"),
        (receive(source("@a,1"), local("@a,1"), "offsite/vm@b"), "receive,create,mount offsite/vm"),
        (receive(source("@a,1"), local("", empty=True), "offsite@a"), f"receive,create,mount,{OURS} offsite"),
        (
            receive(source("@a,1"), None, "offsite/vm@a", Properties(("a:b=c", "d:e=f", "atime=off"))),
            f"receive,create,mount,{OURS},atime offsite",
        ),
        (hold("tag", ["offsite/my files@one"]), "hold 'offsite/my files'"),
    ],
)
def test_allow_command_grants_what_is_needed_on_the_whole_tree(command: Command, granted: str) -> None:
    assert allow_command(command, MY) == f"as root on here: zfs allow keeper {granted}"


def test_allow_command_is_empty_for_what_needs_no_right() -> None:
    assert allow_command(list_tree("offsite/vm"), MY) == ""


@pytest.mark.parametrize(
    "command",
    [
        ("sudo", "-n", "zfs", "destroy", "offsite/vm@a"),
        ("rm", "-r", "/offsite"),
        ("zpool", "destroy", "offsite"),
        ("zfs", "allow", "puller", "destroy", "offsite/vm"),
        ("zfs", "upgrade", "offsite/vm"),
    ],
)
def test_command_that_nobody_has_thought_of_counts_as_a_change(command: Command) -> None:
    assert changed_by(command)
    assert outside(command, "backuppool")


@pytest.mark.parametrize(
    "command", [CLOCK_TIME, (*SYNC_POOL, "offsite"), list_features("offsite"), (*LIST_RIGHTS, "offsite/vm")]
)
def test_command_that_looks_counts_as_no_change(command: Command) -> None:
    assert changed_by(command) == []
