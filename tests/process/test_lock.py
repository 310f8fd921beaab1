"""The lock: which runs exclude each other, what is said of them, and that nobody else can take it or make it up."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import subprocess
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Callable

import pytest
from test_stream import stream

import zfs_replicate
from zfs_replicate import Failure, Holder, Lock, LockFile, job_of, last_activity, lock, lock_name, main, parse

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT_ALONE = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
MINE = f"test-{os.getpid()}/offsite"
"""A tree that nobody else locks: others may run these tests at the same time."""
JOB = f"-h HOST -r backuppool/vm -l {MINE} -t offsite"
NOBODY = 65534


@contextlib.contextmanager
def held(tree: str = MINE, job: str = JOB) -> Iterator[Lock]:
    with lock(tree, job, 60) as it:
        assert it
        yield it


def is_busy(tree: str = MINE, job: str = JOB) -> bool:
    """Whether another run of this very job is at work."""
    with lock(tree, job, 60) as it:
        return it is None


def refusal(tree: str = MINE, job: str = JOB) -> str:
    """Why the lock cannot be had."""
    with pytest.raises(Failure) as caught, lock(tree, job, 60):
        raise AssertionError("never comes here")
    assert caught.value.hint
    return caught.value.what


def path_of(tree: str = MINE) -> Path:
    return Path(zfs_replicate.lock_directory(), lock_name(tree))


@pytest.fixture(autouse=True)
def _leave_nothing_behind() -> Iterator[None]:
    yield
    for tree in (
        MINE,
        f"{MINE}/a",
        f"{MINE}/a/b",
        f"{MINE}/b",
        f"{MINE}-and-more",
        *zfs_replicate.with_ancestors(MINE),
    ):
        with contextlib.suppress(OSError):
            path_of(tree).unlink()


def ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def rewritten(it: Lock, text: bytes) -> None:
    os.ftruncate(it.filenos[0], 0)
    os.pwrite(it.filenos[0], text, 0)


# --- One tree, one job --------------------------------------------------------------------------------------------


def test_lock_of_a_run_that_moves_is_left_alone() -> None:
    with held():
        assert is_busy()
    assert not is_busy()


def test_lock_of_a_run_that_stands_still_is_told() -> None:
    with held() as ours:
        moment = time.time() - 60 * zfs_replicate.LAST_BYTES_FACTOR
        os.utime(ours.filenos[0], (moment + 9, moment + 9))
        assert is_busy(), "its receive may still be busy with the last of a stream"
        os.utime(ours.filenos[0], (moment, moment))
        assert f"another run (pid {os.getpid()}, since " in refusal()
        ours.moved()
        assert is_busy()


def test_lock_outlives_us_in_a_process_that_inherits_it(tmp_path: Path) -> None:
    """As zfs recv does, and no other process of the stream: the locks of the trees above as well."""
    commands = [("sh", "-c", f"ls -l /proc/$$/fd > {tmp_path}/{word}") for word in ("first", "last")]
    with held() as ours:
        names = [os.readlink(f"/proc/self/fd/{fileno}") for fileno in ours.filenos]
        stream(commands, transport=zfs_replicate.Transport(inherit=ours.filenos))
    assert len(names) == 2
    for name in names:
        assert name in (tmp_path / "last").read_text()
        assert name not in (tmp_path / "first").read_text()


def test_lock_that_outlives_an_orderly_end_is_told() -> None:
    """A zfs recv that waits for a suspended pool cannot be ended. It keeps out runs on trees above and below, too."""
    with held() as ours:
        left_behind = subprocess.Popen(["sleep", "60"], pass_fds=ours.filenos)
        rewritten(ours, f"{ended_process()} 1700000000 {JOB}\n".encode())
    try:
        for job in (JOB, "another"):
            assert "is still running" in refusal(job=job)
        assert "is still running" in refusal(f"{MINE}/a")
        above = MINE.partition("/")[0]
        assert f"a run on a tree within {above} is at work" in refusal(above)
    finally:
        left_behind.kill()
        left_behind.wait()
    assert not is_busy()


def test_last_activity_is_not_in_the_future() -> None:
    """The clock may have been put back since."""
    with held() as ours:
        os.utime(ours.filenos[0], (1_700_000_000, 1_700_000_000))
        assert last_activity(MINE, 1_700_000_000) == 1_700_000_000
        assert last_activity(MINE, 1_699_999_999) is None
    assert last_activity(f"{MINE}/never", time.time()) is None


# --- Other jobs, other trees --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [JOB.replace("HOST", "other"), JOB.replace("pool/vm", "pool/mail"), JOB + "2"],
    ids=["host", "source", "tag"],
)
def test_lock_of_another_job_is_told_however_lively(other: str) -> None:
    with held():
        said = refusal(job=other)
        assert f"a run of another line is at work on {MINE}: {JOB} (pid {os.getpid()}, since 20" in said


def test_job_is_the_options_that_say_what_goes_where() -> None:
    line = ["-h", "HOST", "-r", "backuppool/a b", "-l", "offsite/a b", "-t", "offsite"]
    job = job_of(parse(line))
    assert job == "-h HOST -r 'backuppool/a b' -l 'offsite/a b' -t offsite"
    assert job_of(parse([*line, "-k", "30", "--rate-limit", "1M"])) == job
    strange = job_of(parse(["-h", "h\u00e9\x1b\udcff" + "x" * 5000, *line[2:]]))
    assert strange.startswith(r"-h 'h\xe9\x1b\xff")
    with held(job=strange) as ours:
        assert is_busy(job=strange)
        assert os.fstat(ours.filenos[0]).st_size < 4096


def test_lock_excludes_trees_within_each_other() -> None:
    inner, beside = f"{MINE}/a", f"{MINE}/b"
    with held(inner, "inner"):
        assert f"a run on a tree within {MINE} is at work" in refusal()
        with held(beside, "beside"):
            assert f"a run on a tree within {MINE} is at work" in refusal()
            assert is_busy(inner, "inner")
        assert f"a run on {inner}, in which {inner}/b lies, is at work: inner (pid " in refusal(f"{inner}/b")
    with held(), contextlib.ExitStack() as stack:
        for tree in (inner, beside, f"{inner}/b"):
            assert f"a run on {MINE}, in which {tree} lies, is at work: {JOB} (pid {os.getpid()}, since " in refusal(
                tree
            )
        stack.enter_context(held(f"{MINE}-and-more"))
    assert not is_busy()
    assert not is_busy(f"{inner}/b")


def test_lock_of_another_job_ends_a_run_with_3_its_own_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["-h", "HOST", "-r", "backuppool/vm", "-l", MINE, "-t", "offsite"]
    with held(job=job_of(parse(line))):
        assert main(line) == 0
        assert capsys.readouterr().err == ""
        assert main(["-h", "OTHER", *line[2:]]) == 3
        assert "a run of another line is at work" in capsys.readouterr().err
        assert main([*line, "--retire"]) == 3
        assert "a run is at work" in capsys.readouterr().err


# --- What a lock file says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"4711",
        b"1 1700000000 " + b"x" * 5000 + b"\n",
        b"9" * 30 + b" 1700000000 x\n",
        b"9" * 5000 + b" 1700000000 x\n",
        b"1 1" + b"0" * 30 + b" x\n",
        b"0 1700000000 x\n",
        b"-1 1700000000 x\n",
        b"1 1700000000 \xff\n",
        b"1 1700000000 a\x1b[2Jb\n",
        "\u0663 1700000000 x\n".encode(),
        b"\0" * 100,
    ],
)
def test_lock_of_an_unknown_holder_is_told_once_it_stands_still(text: bytes) -> None:
    with held() as ours:
        rewritten(ours, text)
        file = LockFile(str(path_of()))
        assert file.holder() is None
        file.close()
        assert is_busy(), "it may be just beginning"
        os.utime(ours.filenos[0], (1_700_000_000, 1_700_000_000))
        assert f"somebody who does not say who he is holds the lock of {MINE} since 2023-11-1" in refusal()
        assert refusal(f"{MINE}/a") == f"a run on {MINE}, in which {MINE}/a lies, is at work"


def test_lock_names_its_holder() -> None:
    with held():
        file = LockFile(str(path_of()))
        found = file.holder()
        file.close()
    assert found
    assert abs(found.since - time.time()) < 60
    assert found == Holder(os.getpid(), found.since, JOB)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")
def test_lock_file_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    pwrite = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda _fd, data, offset: pwrite(full, data, offset))
    assert refusal() == f"cannot write the lock file {path_of()}: No space left on device"
    os.close(full)


# --- Whose file it is ---------------------------------------------------------------------------------------------


def fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


def symlink(path: Path) -> None:
    target = path.parent / "target"
    target.touch(0o600)
    path.symlink_to(target)


def hard_link(path: Path) -> None:
    path.touch(0o600)
    os.link(path, path.parent / "another")


def writable(path: Path) -> None:
    path.touch(0o600)
    path.chmod(0o666)


def foreign(path: Path) -> None:
    path.touch(0o600)
    os.chown(path, NOBODY, NOBODY)


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "fifo": (fifo, "is no lock file of ours: it is no regular file"),
    "directory": (Path.mkdir, "cannot open the lock file .*: Is a directory"),
    "symlink": (symlink, "cannot open the lock file .*: Too many levels of symbolic links"),
    "hard link": (hard_link, "is no lock file of ours: it has another name besides"),
    "writable": (writable, r"is no lock file of ours: others may write to it \(mode 666\)"),
    "foreign": (foreign, "is no lock file of ours: it belongs to nobody"),
}


@pytest.mark.parametrize("tree", zfs_replicate.with_ancestors(MINE), ids=["above", "own"])
@pytest.mark.parametrize("kind", STRANGE)
def test_lock_file_that_cannot_be_ours_is_refused(
    kind: str, tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "foreign" and os.geteuid() != 0:
        pytest.skip("only root can make one")
    monkeypatch.setattr(zfs_replicate, "ROOTS_LOCKS", str(tmp_path))
    monkeypatch.setattr(zfs_replicate, "lock_directory", lambda: str(tmp_path))
    make, said = STRANGE[kind]
    make(tmp_path / lock_name(tree))
    with pytest.raises(Failure, match=said), lock(MINE, JOB, 60):
        raise AssertionError("never comes here")
    assert last_activity(tree, time.time()) is None


def as_account(number: int, home: Path, work: Callable[[], object]) -> str:
    """What `work` returns, or fails with, as another user with that home."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(number)
                os.setuid(number)
            entry = pwd.struct_passwd(("keeper", "x", number, number, "", str(home), "/bin/sh"))
            pwd.getpwuid = lambda _number: entry
            try:
                told = str(work())
            except Failure as failure:
                told = f"Failure: {failure}"
            except BaseException:  # noqa: BLE001 -- it is told to the test
                told = traceback.format_exc()
            os.write(writing, told.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read().decode()
    os.waitpid(child, 0)
    return told


@pytest.fixture
def home() -> Iterator[Path]:
    """Of an account that is not root. Not below pytest's own directory, which is closed to others."""
    account = os.geteuid() or NOBODY
    done = subprocess.run(["mktemp", "-d"], capture_output=True, check=True, text=True)
    path = Path(done.stdout.strip())
    os.chown(path, account, -1)
    yield path
    subprocess.run(["rm", "-rf", str(path)], check=True)


ACCOUNT = os.geteuid() or NOBODY


def test_lock_of_an_account_is_in_its_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("TMPDIR", "/nonexistent")

    def work() -> object:
        with held():
            moved = last_activity(MINE, time.time() + 1)
            assert is_busy()
            return moved and time.time() - moved < 60

    assert as_account(ACCOUNT, home, work) == "True"
    directory = home / ".local/state/zfs_replicate"
    assert directory.stat().st_mode & 0o777 == 0o700
    names = {lock_name(MINE), lock_name(MINE.partition("/")[0])}
    assert {it.name for it in directory.iterdir()} == names
    assert {it.stat().st_mode & 0o777 for it in directory.iterdir()} == {0o600}
    assert not names & set(os.listdir("/tmp"))


def test_lock_in_a_home_that_others_may_write_to_is_refused(home: Path) -> None:
    directory = home / ".local/state/zfs_replicate"
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    os.chown(directory, ACCOUNT, -1)
    said = as_account(ACCOUNT, home, is_busy)
    assert said.startswith(f"Failure: cannot keep locks in {directory}: others may write there\n")


@ROOT_ALONE
def test_lock_in_a_home_that_is_read_only_is_refused(home: Path) -> None:
    os.chown(home, 0, -1)
    said = as_account(ACCOUNT, home, is_busy)
    assert said == (
        f"Failure: cannot keep locks in {home}/.local/state/zfs_replicate: Permission denied\n"
        "give this account a home that it may write to"
    )


def test_lock_of_an_account_without_a_home_is_refused(home: Path) -> None:
    def work() -> object:
        def unknown(number: int) -> pwd.struct_passwd:
            raise KeyError(number)

        pwd.getpwuid = unknown
        assert last_activity(MINE, time.time()) is None
        return is_busy()

    said = as_account(ACCOUNT, home, work)
    assert said.startswith(f"Failure: this account (uid {ACCOUNT}) has no home, ")


def test_lock_ignores_what_somebody_leaves_in_tmp() -> None:
    planted = Path("/tmp", lock_name(MINE))
    planted.write_text(f"1 1700000000 {JOB}\n", encoding="ascii")
    try:
        with planted.open(encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert last_activity(MINE, time.time() + 1) is None
            assert not is_busy()
    finally:
        planted.unlink()
