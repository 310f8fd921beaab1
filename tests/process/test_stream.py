"""The pipeline: real processes, every way in which one of them can end."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Callable

import pytest
from near_end import MEBIBYTE, SshConfig, executable, shell
from ssh_server import PATIENCE, Fault, Server

from zfs_replicate import (
    COMPRESSORS,
    STDERR_BYTES,
    Account,
    Command,
    Connection,
    Failure,
    Host,
    LinkLost,
    LocalHost,
    Pipeline,
    ReceivedStream,
    SshHost,
    Stage,
    Stopped,
    StreamBatch,
    StreamFailed,
    Transport,
    buffer_stage,
    carry_out,
    pull,
    raise_for_status,
    refused_properties,
    unset_properties,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


PLAIN = Transport()


def stream(commands: Sequence[Command], *more: Command, transport: Transport = PLAIN) -> list[ReceivedStream]:
    """Run one pipeline, with more receivers after the last command. Raises its failure."""
    with contextlib.closing(Pipeline(commands[:-1], [commands[-1], *more], transport)) as pipeline:
        carry_out(pipeline)
        if pipeline.failure:
            raise pipeline.failure
        return pipeline.arrived


def carried(source: Host, sending: Command, target: Host, receiving: Command, transport: Transport) -> ReceivedStream:
    """Pull one stream. Raises its failure."""
    result = pull(source, target, StreamBatch(((sending, receiving),)), transport)
    if result.failure:
        raise result.failure
    return result.arrived[0]


def into(path: Path) -> Command:
    return shell('exec cat > "$1"', str(path))


@pytest.fixture(autouse=True)
def _nothing_remains() -> Iterator[None]:
    """Whatever becomes of a stream: no child, alive or not waited for, no open file, and no endless wait."""

    def blocked_by_length(number: int, frame: Any) -> None:
        faulthandler.dump_traceback(2)
        raise AssertionError(f"hangs for {PATIENCE} seconds")

    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = files()
    handler = signal.signal(signal.SIGALRM, blocked_by_length)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert files() <= before


# --- Streams that arrive ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [0, 1, 3])
def test_stream_arrives_whole(tmp_path: Path, between: int) -> None:
    data = os.urandom(5 * MEBIBYTE)
    (tmp_path / "in").write_bytes(data)
    stream([("cat", str(tmp_path / "in")), *[("cat",)] * between, into(tmp_path / "out")])
    assert (tmp_path / "out").read_bytes() == data


def test_stages_that_are_equal_are_different_processes(tmp_path: Path) -> None:
    same = shell('cat; echo x >> "$1"', str(tmp_path / "out"))
    stream([same, same, same])
    assert (tmp_path / "out").read_text() == "x\n" * 3


def test_stage_that_is_first_has_nothing_to_read() -> None:
    stream([shell('test -z "$(cat)"')])


def test_stage_that_is_last_prints_nothing_to_the_user(capfd: pytest.CaptureFixture[str]) -> None:
    stream([shell("echo out; echo warning >&2"), shell("cat; echo warning >&2")])
    assert capfd.readouterr() == ("", "")


def test_stream_does_not_block_on_many_complaints() -> None:
    noisy = shell('head -c "$1" /dev/zero | tr "\\0" "\\n" >&2; cat', str(4 * MEBIBYTE))
    stream([noisy, noisy, noisy])


# --- Stages that fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 2])
def test_stage_that_fails_is_named_with_what_it_said(place: int) -> None:
    stages = [shell("echo some data"), ("cat",), shell("cat > /dev/null")]
    stages[place] = ("sh", "-c", "cat > /dev/null; echo 'out of space' >&2; exit 3")
    with pytest.raises(StreamFailed) as caught:
        stream(stages)
    assert caught.value.what == "the stream failed: sh: out of space"
    assert not isinstance(caught.value, LinkLost)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_stage_that_fails_silently_is_told_by_its_status(place: int) -> None:
    stages = [shell("echo some data"), ("cat",), shell("cat > /dev/null")]
    stages[place] = shell("cat > /dev/null; exit 3")
    with pytest.raises(StreamFailed, match=r"^the stream failed: sh ended with status 3$"):
        stream(stages)


def test_stage_that_is_first_dies_half_way(tmp_path: Path) -> None:
    """What follows sees a clean end of its input: only the status tells."""
    with pytest.raises(StreamFailed, match=r"sh: dataset is busy"):
        stream([shell("echo half; echo 'dataset is busy' >&2; exit 1"), ("cat",), into(tmp_path / "out")])
    assert (tmp_path / "out").read_text() == "half\n"


def test_stage_that_is_last_dies_early() -> None:
    """The endless stages before it get SIGPIPE, and it is the last one that is blamed."""
    with pytest.raises(StreamFailed, match=r"^the stream failed: sh: cannot receive$"):
        stream([("cat", "/dev/zero"), ("cat",), shell("head -c 10; echo 'cannot receive' >&2; exit 1")])


def test_stage_that_is_last_must_read_all_to_succeed() -> None:
    with pytest.raises(StreamFailed, match=rf"cat ended by signal {signal.SIGPIPE}"):
        stream([("cat", "/dev/zero"), ("head", "-c", "10")])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_stage_killed_by_a_signal(place: int) -> None:
    stages = [shell("echo some data"), ("cat",), shell("cat > /dev/null")]
    stages[place] = shell("kill -KILL $$")
    with pytest.raises(StreamFailed, match="sh ended by signal 9"):
        stream(stages)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("program", ["no-such-program", "/dev/null"])
def test_stage_that_cannot_start_is_named(place: int, program: str) -> None:
    stages: list[Command] = [("cat", "/dev/zero"), ("cat",), ("sleep", "60")]
    stages[place] = (program, "-q")
    with pytest.raises(Failure, match=program):
        stream(stages)


def test_stderr_of_a_stage_is_told_in_its_last_lines() -> None:
    with pytest.raises(StreamFailed) as caught:
        stream([shell("seq 100 >&2; printf '\\377' >&2; exit 1")])
    assert caught.value.what == "the stream failed: sh: 97\n98\n99\n100\n\ufffd"


# --- Bounds: what no stage can make us wait for, or keep ---------------------------------------------------------------


def test_stderr_without_end_is_kept_in_its_last_part() -> None:
    """In memory, and nowhere else; the longest line is as long."""
    flood = shell('echo first >&2; head -c "$1" /dev/zero | tr "\\0" e >&2; echo last >&2; exit 1', str(9 * MEBIBYTE))
    with contextlib.closing(Pipeline([flood], [("cat",)], PLAIN)) as pipeline:
        carry_out(pipeline)
        assert pipeline.failure
        assert pipeline.failure.sender_said.endswith("elast")
        assert len(pipeline.failure.what) < STDERR_BYTES + 100
        assert len(pipeline.upstream[0].tail.kept) <= 3 * STDERR_BYTES


def test_stderr_that_others_keep_open_is_not_waited_for(tmp_path: Path) -> None:
    """A master of ssh lives on for a minute, and may have inherited it."""
    sender = shell('sleep 60 >/dev/null & echo $! > "$1"; echo some; echo "a word" >&2', str(tmp_path / "pid"))
    try:
        stream([sender, into(tmp_path / "out")])
        assert (tmp_path / "out").read_text() == "some\n"
        os.kill(int((tmp_path / "pid").read_text()), 0)  # it is still there
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_stall_watch_ends_a_stream_that_stands_still() -> None:
    moved: list[int] = []
    transport = Transport(stall_timeout=0.3, on_progress=lambda: moved.append(1))
    with pytest.raises(StreamFailed, match=r"the stream stalled: no data came for 0s, .* \(still running: sh, cat\)"):
        stream([("sh", "-c", "echo some; exec sleep 60"), ("cat",)], transport=transport)
    assert moved


def test_stall_watch_waits_longer_for_the_last_process() -> None:
    """All bytes are in its hands; it has some writing to do."""
    transport = Transport(stall_timeout=0.15)
    stream([("echo", "some"), ("sh", "-c", "cat > /dev/null; sleep 0.3")], transport=transport)
    with pytest.raises(StreamFailed, match="no data came"):
        stream([("echo", "some"), ("sh", "-c", "cat > /dev/null; sleep 60")], transport=transport)


TALK = "while :; do echo word >&2; sleep 0.05; done"


def test_stall_watch_takes_words_for_no_movement() -> None:
    moved: list[int] = []
    transport = Transport(stall_timeout=1.0, on_progress=lambda: moved.append(1))
    with pytest.raises(StreamFailed, match=r"the stream stalled: no data came for 1s, .* \(still running: sh, cat\)"):
        stream([shell(TALK), ("cat",)], transport=transport)
    assert len(moved) <= 1, "a receiver has begun, and that is all"


def test_stall_watch_takes_a_byte_at_times_for_no_stream() -> None:
    sender = shell("while :; do printf x; sleep 0.05; done")
    with pytest.raises(StreamFailed, match=r"the stream stalled: only \d+ bytes came for 1s, ") as caught:
        stream([sender, ("cat",)], transport=Transport(stall_timeout=1.0))
    assert caught.value.hint.endswith("--stall-timeout")


def test_receiver_that_failed_waits_for_no_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says nothing does not notice that nobody reads any more; and shall not hide what was said here."""
    monkeypatch.setattr("zfs_replicate.LINK_SECONDS", 1)
    began = time.monotonic()
    with pytest.raises(StreamFailed, match="destination is busy") as caught:
        stream(
            [("sleep", "60"), shell("echo destination is busy >&2; exit 1")], transport=Transport(stall_timeout=30.0)
        )
    assert "destination is busy" in caught.value.receiver_said
    assert time.monotonic() - began < 15


def test_stall_watch_allows_a_receiver_that_takes_its_time() -> None:
    """What lies in the pipe has come."""
    reads = (
        "import sys, time\nfor _ in range(25): sys.stdin.buffer.raw.read(10); time.sleep(0.1)\nsys.stdin.buffer.read()"
    )
    stream(
        [shell("head -c 60000 /dev/zero; sleep 3"), (sys.executable, "-c", reads)],
        transport=Transport(stall_timeout=1.0),
    )


HOUR = 3600


class Watched(Pipeline):
    """A pipeline of which the test says what has come by when, and which processes still run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, coming: Callable[[int], int | None]) -> None:
        self.now = 0
        self.coming = coming
        self.at_work: list[int] = [0, 1]
        self.told: list[int] = []
        self.clock = SimpleNamespace(monotonic=lambda: self.now)
        transport = Transport(stall_timeout=HOUR, on_progress=lambda: self.told.append(self.now))
        with monkeypatch.context() as patch:
            patch.setattr("zfs_replicate.time", self.clock)
            super().__init__([("sleep", "60")], [("sleep", "60")] * 2, transport)

    def bytes_given(self) -> int | None:
        return self.coming(self.now)

    def running(self) -> list[Stage]:
        return [self.stages()[number] for number in self.at_work]

    def watch_for(self, monkeypatch: pytest.MonkeyPatch, seconds: int, *, waiting: bool = False) -> int | None:
        """When it gives up; None if it does not."""
        if not waiting:
            self.receivers_left.clear()
        with monkeypatch.context() as patch:
            patch.setattr("zfs_replicate.time", self.clock)
            while self.now < seconds and not self.is_over:
                self.now += 5
                self.check_stall()
        return self.now if self.is_over else None


def ended_at(
    monkeypatch: pytest.MonkeyPatch,
    coming: Callable[[int], int | None],
    *,
    tail_from: int = 10**9,
    waiting: bool = False,
) -> tuple[int | None, list[int]]:
    """When a stream that comes like this is given up, within 24 hours, and when it was told to have moved."""
    with contextlib.closing(Watched(monkeypatch, coming)) as it:
        ended = it.watch_for(monkeypatch, min(tail_from, 24 * HOUR), waiting=waiting)
        if ended is None and tail_from < 24 * HOUR:
            it.at_work = [1]
            ended = it.watch_for(monkeypatch, 24 * HOUR, waiting=waiting)
        return ended, it.told


def test_floor_leaves_a_slow_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 bytes a second, or all of an hour's at once."""
    assert ended_at(monkeypatch, lambda now: 400 * now)[0] is None
    assert ended_at(monkeypatch, lambda now: now // 3000 * 2**21)[0] is None


def test_floor_ends_a_line_that_dribbles_in_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, or after much has come."""
    ended, told = ended_at(monkeypatch, lambda now: now // 60)
    assert ended is not None
    assert HOUR <= ended <= HOUR + 120
    assert told
    ended, told = ended_at(monkeypatch, lambda now: 10**6 * min(now, 7 * HOUR) + now)
    assert ended is not None
    assert 8 * HOUR - 10 <= ended <= 8 * HOUR + 10


def test_floor_counts_from_the_first_byte_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the receiver has read of its own by the first look is no beginning."""
    assert ended_at(monkeypatch, lambda now: 60_000 + max(now - HOUR + 60, 0) * 400)[0] is None
    ended, told = ended_at(monkeypatch, lambda now: 60_000)
    assert ended == HOUR + 5
    assert told == [5]


def test_floor_allows_longer_for_the_tail_of_a_small_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole after a minute, and less than the floor asks for in an hour."""
    for waiting in (False, True):  # where others wait behind it, nobody knows whether it is whole
        ended, _ = ended_at(monkeypatch, lambda now: min(now, 60) * 100, tail_from=65, waiting=waiting)
        assert ended is not None
        assert 4 * HOUR <= ended <= 4 * HOUR + 70


def test_floor_ends_nothing_where_bytes_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc, or with a receiver that is root's: but what does move keeps the lock."""
    monkeypatch.setattr(Stage, "io_bytes", lambda stage: (0, 0))
    ended, told = ended_at(monkeypatch, lambda now: None)
    assert (ended, told) == (None, [5])


def test_bytes_given_tells_unknown_apart_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(Pipeline([("sleep", "60")], [("sleep", "60")], PLAIN)) as pipeline:
        receiver = pipeline.receiver
        assert receiver
        monkeypatch.setattr(Stage, "io_bytes", lambda stage: (7, 5) if stage is receiver else (0, 0))
        assert pipeline.bytes_given() == 7
        monkeypatch.setattr(Stage, "io_bytes", lambda stage: (0, 0) if stage is receiver else (7, 5))
        assert pipeline.bytes_given() is None
        pipeline.receiver = None
        assert pipeline.bytes_given() == 0
        pipeline.receiver = receiver


# --- Batches ----------------------------------------------------------------------------------------------------------


def slice_of(count: int, path: Path, then: str = "exit 0") -> Command:
    """A receiver that reads its own bytes and no more, as zfs recv does."""
    return shell(f"dd bs=1 count={count} status=none > '{path}'; {then}")


@pytest.mark.parametrize("feeders", [[], [("cat",)], [("mbuffer",)]], ids=["plain", "cat", "mbuffer"])
def test_receivers_take_turns_on_one_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, feeders: list[Command]
) -> None:
    executable(tmp_path / "mbuffer", "#!/bin/sh\nexec cat\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    sender = shell("printf abc; printf defgh; printf ij")
    receivers = [slice_of(size, tmp_path / str(size)) for size in (3, 5, 2)]
    arrived = stream([sender, *feeders, receivers[0]], *receivers[1:])
    assert [(tmp_path / str(size)).read_text() for size in (3, 5, 2)] == ["abc", "defgh", "ij"]
    if feeders == [("mbuffer",)]:
        assert [it.bytes for it in arrived] == [3, 5, 2]


def test_receivers_take_turns_also_without_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    receiver = shell("head -c 3 >/dev/null")
    assert len(stream([shell("printf abc; printf def"), receiver], receiver)) == 2


def test_receivers_behind_one_that_fails_get_nothing(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    receivers = [slice_of(3, first), slice_of(2, second, "echo 'out of space' >&2; exit 1"), slice_of(3, third)]
    with contextlib.closing(Pipeline([("yes",), ("cat",)], receivers, Transport())) as pipeline:
        carry_out(pipeline)
        assert len(pipeline.arrived) == 1
        assert pipeline.failure
        assert pipeline.failure.what == "the stream failed: sh: out of space"
    assert second.exists()
    assert not third.exists()


def test_blame_falls_on_a_sender_that_fails_in_the_middle(tmp_path: Path) -> None:
    receivers = [slice_of(3, tmp_path / "first"), shell("grep -q x || { echo 'incomplete stream' >&2; exit 1; }")]
    sender = shell("printf abc; echo 'no such snapshot' >&2; exit 1")
    with contextlib.closing(Pipeline([sender], receivers, Transport())) as pipeline:
        carry_out(pipeline)
        assert len(pipeline.arrived) == 1
        assert pipeline.failure
        assert pipeline.failure.what == "the stream failed: sh: no such snapshot; sh: incomplete stream"


# --- Interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stubborn", [False, True], ids=["willing", "stubborn"])
def test_signal_ends_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stubborn: bool) -> None:
    """Stopped comes out of the wait; what runs is ended, by force if need be."""
    started = tmp_path / "started"
    os.mkfifo(started)
    script = f"{'trap : TERM;' if stubborn else ''} echo $$ > '{started}'; while :; do read line; done"
    poll = Pipeline.poll
    pids: list[int] = []

    def await_signal(pipeline: Pipeline) -> bool:
        if not pids:
            pids.append(int(started.read_text()))  # the stage has set its trap
            signal.setitimer(signal.ITIMER_REAL, 0.02)
        return poll(pipeline)

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    monkeypatch.setattr(Pipeline, "poll", await_signal)
    monkeypatch.setattr("zfs_replicate.END_SECONDS", 0.05)
    signal.signal(signal.SIGALRM, stop)
    with pytest.raises(Stopped):
        stream([("sleep", "60"), ("sh", "-c", script), ("cat",)])
    assert pids
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


# --- Over the ssh client ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def source_host(
    directory: Path, monkeypatch: pytest.MonkeyPatch, login_shell: str = "sh"
) -> Iterator[tuple[SshHost, Server]]:
    """A far end for the real ssh client, served by us."""
    config = SshConfig(directory, monkeypatch)
    with contextlib.closing(Server(directory, login_shell)) as server:
        config.add("source", server)
        with contextlib.closing(SshHost(Connection.resolve("source", None, None))) as host:
            yield host, server


@contextlib.contextmanager
def sending(
    directory: Path, monkeypatch: pytest.MonkeyPatch, command: Command, login_shell: str = "sh"
) -> Iterator[tuple[Command, Server]]:
    """The first stage of a pull: `command` on the far end."""
    with source_host(directory, monkeypatch, login_shell) as (host, server):
        yield host.stream_command(command), server


def test_stream_over_ssh_arrives_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(3 * MEBIBYTE)
    (tmp_path / "in").write_bytes(data)
    with sending(tmp_path, monkeypatch, ("cat", str(tmp_path / "in"))) as (stage, _):
        stream([stage, ("cat",), into(tmp_path / "out")])
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.parametrize("compressor", [name for name in COMPRESSORS if shutil.which(name)])
def test_stream_is_compressed_on_the_wire_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressor: str
) -> None:
    with source_host(tmp_path, monkeypatch) as (host, _):
        there, here, wire = tmp_path / "there", tmp_path / "here", tmp_path / "wire"
        there.write_bytes(b"much of the same " * 100_000)
        transport = Transport((("tee", str(wire)),), compressor=compressor)
        sending, receiving = ("cat", str(there)), shell(f"cat > '{here}'")
        assert carried(host, sending, LocalHost(), receiving, transport).bytes == there.stat().st_size
        assert 0 <= carried(host, sending, LocalHost(), receiving, Transport()).bytes - there.stat().st_size < 50_000
        assert here.read_bytes() == there.read_bytes()
        assert wire.stat().st_size < there.stat().st_size / 10
        with pytest.raises(StreamFailed, match="No such file"):
            carried(host, ("cat", str(there) + ".gone"), LocalHost(), receiving, transport)


def test_lost_link_is_not_what_fails_at_the_far_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = shell("echo some data; echo 'cannot open: no such dataset' >&2; exit 1")
    with (
        sending(tmp_path, monkeypatch, script) as (stage, _),
        pytest.raises(StreamFailed, match=r"^the stream failed: ssh: cannot open: no such dataset$"),
    ):
        stream([stage, shell("cat > /dev/null")])


def test_lost_link_if_the_connection_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = shell("cat > /dev/null; echo 'incomplete stream' >&2; exit 1")
    with source_host(tmp_path, monkeypatch) as (host, server):
        assert subprocess.check_output(host.stream_command(("echo", "first")), timeout=PATIENCE) == b"first\n"
        server.fault = Fault.DROPPED
        with pytest.raises(LinkLost, match=r"^the link to source broke: .*incomplete stream\n"):
            carried(host, ("cat", "/dev/zero"), LocalHost(), receiver, Transport())


@pytest.mark.parametrize("login_shell", [name for name in ("sh", "bash") if shutil.which(name)])
def test_lost_link_is_not_a_receiver_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, login_shell: str
) -> None:
    """The sender then dies of SIGPIPE, for which ssh has its status 255 too; the other datasets can still be sent."""
    receiver = shell("head -c 10; echo 'out of space' >&2; exit 1")
    with (
        source_host(tmp_path, monkeypatch, login_shell) as (host, _),
        pytest.raises(StreamFailed, match="out of space"),
    ):
        carried(host, ("cat", "/dev/zero"), LocalHost(), receiver, Transport((("cat",),)))


def test_lost_link_is_not_a_sender_whose_status_came_through() -> None:
    """However long the receiver was busy afterwards: the shared connection is gone by then."""

    class Hung(LocalHost):
        def connected(self) -> bool:
            return False

    for sender, receiver in (("exit 1", "exit 0"), ("exit 0", "exit 1")):
        with pytest.raises(StreamFailed, match="the stream failed: sh ended with status 1"):
            carried(Hung(), shell(sender), LocalHost(), shell(f"cat > /dev/null; {receiver}"), Transport())
    with pytest.raises(LinkLost):
        carried(Hung(), shell("exit 255"), LocalHost(), shell("cat > /dev/null"), Transport())


# --- Blame ------------------------------------------------------------------------------------------------------------


def test_blame_names_nobody_if_all_went_well() -> None:
    raise_for_status([], [])
    raise_for_status([("ssh", 0, "a warning")], [("zfs", 0, "another")])


def test_blame_names_those_with_something_to_say() -> None:
    with pytest.raises(StreamFailed) as caught:
        raise_for_status(
            [("ssh", -13, ""), ("mbuffer", 1, "mbuffer: error: outputThread")],
            [("zfs", 1, "cannot receive: out of space")],
        )
    assert caught.value.what == (
        "the stream failed: mbuffer: mbuffer: error: outputThread; zfs: cannot receive: out of space"
    )


def test_blame_passes_over_what_is_but_a_consequence() -> None:
    noise = ("mbuffer", 1, "mbuffer: error: outputThread: error writing to <stdout>: Broken pipe")
    with pytest.raises(StreamFailed, match=r"^the stream failed: zfs: cannot receive: dataset is busy$"):
        raise_for_status([("ssh", 0, ""), noise], [("zfs", 1, "cannot receive: dataset is busy")])
    with pytest.raises(StreamFailed, match=r"^the stream failed: mbuffer: mbuffer: error"):
        raise_for_status([("ssh", 0, ""), noise], [("zfs", -9, "")])


def test_blame_tells_a_status_where_nobody_speaks() -> None:
    with pytest.raises(StreamFailed, match=r"^the stream failed: ssh ended by signal 13; zfs ended with status 2$"):
        raise_for_status([("ssh", -13, ""), ("mbuffer", 0, "a warning")], [("zfs", 2, "")])


# --- Rights -----------------------------------------------------------------------------------------------------------

KEEPER = Account("keeper", "this host", "offsite/vm")
RECEIVING = ("zfs", "recv", "-s", "-u", "-o", "readonly=on", "-o", "canmount=noauto", "offsite/vm/a")


def told(sender: str, receiver: str) -> StreamFailed:
    """What is said of a stream whose ends are these scripts."""

    class Scripted(LocalHost):
        def __init__(self, script: str, account: Account) -> None:
            super().__init__()
            self.script, self.account = script, account

        def stream_command(self, *commands: Command, then: Command = ()) -> Command:
            return shell(self.script)

    source = Scripted(sender, Account("puller", "source", "tank/vm"))
    with pytest.raises(StreamFailed) as caught:
        carried(source, ("zfs", "send", "tank/vm/a@b"), Scripted(receiver, KEEPER), RECEIVING, Transport())
    return caught.value


def test_hint_for_a_missing_right_of_either_end() -> None:
    noise = "echo 'cannot receive: failed to read from stream' >&2; exit 1"
    denied = "echo \"warning: cannot send 'tank/vm/a@b:c': permission denied\" >&2; exit 1"
    assert told(denied, noise).hint == "as root on source: zfs allow puller send tank/vm"
    denied = "cat >/dev/null; echo 'cannot receive new filesystem stream: permission denied' >&2; exit 1"
    rights = "receive,create,mount,readonly,canmount"
    assert told("exit 0", denied).hint == f"as root on this host: zfs allow keeper {rights} offsite/vm"
    assert told("exit 0", noise).hint == ""


@pytest.mark.parametrize("words", ["out of space", "destination offsite/vm/a space quota exceeded."])
def test_hint_for_lack_of_space(words: str) -> None:
    failure = told("exit 0", f"cat >/dev/null; echo 'cannot receive incremental stream: {words}' >&2; exit 1")
    assert failure.hint == "make space; what arrived is kept, and the next run goes on from there"


HERE = (
    "cannot receive incremental stream: destination offsite/vm/a has been modified since most recent snapshot",
    "cannot receive new filesystem stream: permission denied",
    "cannot receive incremental stream: out of space",
    "destination offsite/vm/a space quota exceeded.",
    "cannot receive: stream has unsupported feature, feature flags = 80000",
    "cannot receive: pool must be upgraded to receive this stream.",
    "cannot receive new filesystem stream: inherited key must be loaded",
)
"""What zfs recv says of this host."""


@pytest.mark.parametrize("words", HERE)
@pytest.mark.parametrize("receiver", ["exit 0", "echo 'cannot receive: failed to read from stream' >&2; exit 1"])
def test_hint_takes_no_words_of_the_sender_for_the_receivers(words: str, receiver: str) -> None:
    failure = told(f"echo '{words}' >&2; exit 1", f"cat >/dev/null; {receiver}")
    assert words in failure.what
    assert failure.sender_said == words
    assert failure.receiver_said == ("" if receiver == "exit 0" else "cannot receive: failed to read from stream")
    assert failure.hint == ""


def test_hint_takes_no_words_of_the_receiver_for_the_senders() -> None:
    said = "warning: cannot send 'tank/vm/a@b': dataset key must be loaded"
    failure = told(f'echo "{said}" >&2; exit 1', "cat >/dev/null")
    assert failure.hint.startswith("load it at the source")
    assert (failure.sender_said, failure.receiver_said) == (said, "")
    failure = told("exit 0", f'cat >/dev/null; echo "{said}" >&2; exit 1')
    assert (failure.sender_said, failure.receiver_said) == ("", said)
    assert failure.hint == ""


def test_unset_property_of_ours_is_a_failure_though_zfs_recv_succeeds() -> None:
    refused = ("com.x:y", "atime", "readonly", "sharenfs", "quota", "a", "b", "c", "d")
    lines = "; ".join(f"echo 'cannot receive {it} property on offsite/vm/a: permission denied' >&2" for it in refused)
    done = carried(LocalHost(), shell("exit 0"), LocalHost(), shell(f"cat >/dev/null; {lines}"), Transport())
    keeper = LocalHost()
    keeper.account = KEEPER
    failure = unset_properties(keeper, RECEIVING, refused_properties(done.said))
    assert failure
    assert failure.what == "received, but readonly=on could not be set: permission denied"
    assert failure.hint == (
        "as root on this host: zfs allow keeper receive,create,mount,readonly,canmount offsite/vm; "
        "for this once, as root: zfs set readonly=on offsite/vm/a"
    )


def test_unset_property_of_the_source_is_passed_over() -> None:
    line = "cannot receive atime property on offsite/vm/a: permission denied"
    assert refused_properties(line) == {"atime": "permission denied"}
    assert unset_properties(LocalHost(), RECEIVING, refused_properties(line)) is None


# --- The buffer -------------------------------------------------------------------------------------------------------


def test_buffer_stage_is_used_where_mbuffer_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zfs_replicate.SBIN", str(tmp_path))
    monkeypatch.setenv("PATH", "/nonexistent")
    assert buffer_stage("256M") == ()
    executable(tmp_path / "mbuffer", "#!/bin/sh\n")
    assert buffer_stage("256M") == (("mbuffer", "-q", "-m", "256M"),)
