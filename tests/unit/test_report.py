"""What the user sees: sizes and times, the progress line, the summary, the document."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from histories import LOCAL, POLICY, SOURCE
from hypothesis import example, given, strategies as st
from prometheus_client.parser import text_string_to_metric_families

from zfs_replicate import (
    MAX_EXCERPT,
    MAX_LINES,
    Account,
    Answer,
    BatchResult,
    Command,
    Dataset,
    Doctor,
    Failure,
    Finding,
    MirrorStatus,
    Progress,
    ProgressLine,
    Receive,
    ReceivedStream,
    Report,
    Run,
    RunResult,
    Snapshot,
    Trees,
    clock,
    excerpt,
    few,
    format_age,
    format_bytes,
    format_clock,
    format_rate,
    format_timeout,
    json_document,
    last_success,
    log_line,
    metrics,
    nagios_result,
    parse,
    printable,
    status_data,
    status_table,
    summary,
    write_log,
    write_metrics,
)  # fmt: skip

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = "\x1b]0;owned\x07\x1b[2J\rgone\x00\x7f\x9b31m\u202e\u2066\u200f\u2028\udcff\ud800\U000e0041\tend"
ESCAPED = r"\x1b]0;owned\x07\x1b[2J\x0dgone\x00\x7f\x9b31m\u202e\u2066\u200f\u2028\xff\ud800\U000e0041 end"
STEP = Receive(Snapshot(f"{LOCAL}@b", 2**64 - 1, 9, 9), Snapshot(f"{LOCAL}@a", 7, 1, 1))
LINE = ["-h", "HOST", "-r", "backuppool/virt/machines", "-l", LOCAL, "-t", "offsite"]


def test_printable_escapes_what_a_terminal_could_act_upon() -> None:
    assert printable(HOSTILE) == ESCAPED
    assert printable(f"{HOSTILE}\n{HOSTILE}") == f"{ESCAPED}\n{ESCAPED}"
    legal = "backuppool/virt/machines/a b-_.:c@2023-11-14 é 日本\\"
    assert printable(legal) == legal


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("one\ntwo", "one\ntwo"),
        ("\n".join("x" * MAX_LINES), "\n".join("x" * MAX_LINES)),
        ("\n".join("x" * MAX_LINES) + "\ny", "\n".join("x" * MAX_LINES) + "..."),
        ("x" * MAX_EXCERPT, "x" * MAX_EXCERPT),
        ("x" * MAX_EXCERPT + "y", "x" * MAX_EXCERPT + "..."),
        ("\x1b" * MAX_EXCERPT, r"\x1b" * (MAX_EXCERPT // 4) + "..."),
        ("é" * MAX_EXCERPT, "é" * (MAX_EXCERPT // 2) + "..."),
        ("x" * 10_000_000, "x" * MAX_EXCERPT + "..."),
    ],
    ids=["nothing", "all", "ten-lines", "eleven-lines", "2-KB", "more", "escapes", "letters", "10-MB"],
)
def test_excerpt_shows_the_beginning(text: str, shown: str) -> None:
    assert excerpt(text) == shown


def test_few_tells_some_of_many_names() -> None:
    assert few(["a"]) == "a"
    assert few(["a", "b", "c"]) == "a, b, c"
    assert few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_report_is_printable_and_indents_each_paragraph(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(2)
    said = f"{HOSTILE}\nzfs_replicate: all is well"
    told = f"{ESCAPED}\n    zfs_replicate: all is well"
    report.step(said)
    report.event("kind", "dataset", said)
    report.notice("kind", "dataset", said)
    report.command(said)
    report.failure("dataset", Failure(said, said))
    assert capsys.readouterr().err == (
        f"{told}\n{told}\nzfs_replicate: {told}\n    {told}\nzfs_replicate: dataset: {told}\n    {told}\n"
    )
    report.finding(Finding(said))
    report.finding(Finding(said, said))
    assert capsys.readouterr().out == f"ok  {told}\n!!  {told}\n    {told}\n"
    (failure,) = (event for event in report.events if event["event"] == "failure")
    assert failure["what"] == f"{ESCAPED}\nzfs_replicate: all is well"


def test_report_of_a_failure_is_short_whatever_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.failure("dataset", Failure("\n" * 500 + "x" * 1_000_000, "y" * 1_000_000))
    report.failure("dataset", Failure("z" * 1_000_000, "w\n" * 1_000_000))
    report.finding(Finding("x\n" * 1_000_000, "y" * 1_000_000))
    told = capsys.readouterr()
    assert len(told.err) < 9 * 1024
    assert len(told.err.splitlines()) < 40
    assert len(told.out) < 5 * 1024
    assert len(json.dumps(report.events)) < 9 * 1024
    assert report.failures[1].count("...") == 2


def test_log_takes_any_words(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[bytes] = []
    monkeypatch.setattr("syslog.syslog", lambda _level, line: logged.append(line.encode()))
    report = Report()
    report.failure(f"{LOCAL}/\udcff", Failure(f"{HOSTILE}\n{'x' * 5000}", HOSTILE))
    options = parse(["-h", "HO\udcffST", *LINE[2:], "--syslog"])
    write_log(options, report, RunResult(NOW, 1, 3))
    first, last = logged
    assert first.startswith(rf"{LOCAL}/\xff: \x1b]0;owned".encode())
    assert len(first) <= MAX_EXCERPT + 3
    assert last.startswith(rf"HO\xffST:{SOURCE}".encode())


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0B"),
        (999, "999B"),
        (1000, "0.98K"),
        (1024, "1.00K"),
        (10230, "9.99K"),
        (10240, "10.0K"),
        (102400, "100K"),
        (1023000, "999K"),
        (1023999, "0.98M"),
        (1.5 * 2**40, "1.50T"),
        (2**64, "16.0E"),
    ],
)
def test_format_bytes_is_as_zfs_prints_sizes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@given(st.floats() | st.integers() | st.integers(-(10**400), 10**400))
@example(10**30)
@example(10**400)
@example(-(10**400))
@example(float("inf"))
@example(float("nan"))
def test_format_takes_any_figure(figure: float) -> None:
    for told in (format_bytes(figure), format_timeout(figure), clock(figure), format_age(figure), format_clock(figure)):
        assert 0 < len(told) <= 40


def test_clock_tells_a_moment_beyond_any_calendar_as_its_number() -> None:
    assert clock(10**18) == "1000000000000000000"
    assert clock(10**20) == "100000000000000000000"
    assert format_bytes(10**30) == "867362E"


def test_format_clock_in_minutes_and_hours() -> None:
    assert [format_clock(it) for it in (0.9, 65, 3599, 3600, 360000)] == [
        "0:00",
        "1:05",
        "59:59",
        "1:00:00",
        "100:00:00",
    ]
    assert format_rate(3 * 2**20, 1.5) == "3.00M in 0:01, 2.00M/s"
    assert format_rate(0, 0) == "0B in 0:00, 0B/s"


class Terminal(ProgressLine):
    """A meter that keeps what it writes."""

    def __init__(self, columns: int = 80) -> None:
        self.paper = io.StringIO()
        super().__init__(self.paper, lambda: columns)
        self.begin(LOCAL, None, 0)

    def begin(self, dataset: str, size: int | None, before: int) -> None:
        self.stream = Progress(dataset, size, before, 0, 0, 0)

    def line(self, arrived: int, buffered: int = 0) -> str:
        """What stands there a second later."""
        self.stream = replace(self.stream, arrived=arrived, buffered=buffered, seconds=self.stream.seconds + 1)
        self.show(self.stream)
        shown = self.paper.getvalue().rpartition("\r")[2]
        assert shown.endswith("\x1b[K")
        return shown[:-3]


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("name", [LOCAL, "offsite/" + "long/" * 40 + "end"])
def test_progress_line_fits_any_terminal(columns: int, name: str) -> None:
    it = Terminal(columns)
    it.begin(name, 2**50, 0)
    for arrived in (0, 1, 2**30, 2**49, 2**50, 2**51):
        line = it.line(arrived, 2**28)
        assert len(line) == columns - 1
        assert line.split(" ")[0].endswith(name[-8:])
    assert "100%" in line


def test_progress_line_tells_the_estimate_the_rate_and_the_rest() -> None:
    it = Terminal()
    it.begin("offsite/www", 100 * 2**20, 0)
    assert "  0B of  100M   0%    0B/s  -:-- left buf    0B" in it.line(0)
    line = it.line(10 * 2**20, 5 * 2**20)
    assert "10.0M of  100M  10% 5.00M/s  0:18 left buf 5.00M" in line


def test_progress_line_of_a_resumed_stream_counts_what_is_there() -> None:
    it = Terminal()
    it.begin("offsite/www", 100 * 2**20, 75 * 2**20)
    assert "75.0M of  100M  75% " in it.line(0)
    assert "80.0M of  100M  80% 2.50M/s  0:08 left" in it.line(5 * 2**20)


def test_progress_line_of_no_size_and_of_unknown_size() -> None:
    it = Terminal()
    it.begin("offsite/www", 0, 0)
    assert "0B of    0B   0%" in it.line(0)
    it.begin("offsite/mail", None, 0)
    assert it.line(1024).endswith("  1.00K 1.00K/s buf    0B")


def test_progress_line_is_wiped_before_other_lines(capsys: pytest.CaptureFixture[str]) -> None:
    it = Terminal()
    report = Report(meter=it)
    it.line(1)
    report.failure(LOCAL, Failure("no", "way"))
    assert it.paper.getvalue().endswith("\r\x1b[K")
    assert capsys.readouterr().err == f"zfs_replicate: {LOCAL}: no\n    way\n"
    report.failure(LOCAL, Failure("no", "way"))
    assert capsys.readouterr().err == ""


def test_summary_and_document_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(meter=Terminal())
    options, ending = parse(LINE), RunResult(1_700_000_000.9, 3.00049, 1)
    report.pulled(LOCAL, STEP, ReceivedStream(2**20, 2.0))
    report.event("in step", f"{LOCAL}/www", "")
    report.expired(Snapshot(f"{LOCAL}@old", 1, 1, 1), "expired")
    assert capsys.readouterr().err == f"{LOCAL}: @a -> @b: 1.00M in 0:02, 512K/s\n"
    said = summary(options, report, ending)
    assert said == f"zfs_replicate: {LOCAL}: 1 in step before, 1 pulled (1.00M), 1 expired, in 0:03"
    report.failure(f"{LOCAL}/mail", Failure("no", "way"))
    assert "1 expired, 1 failed, in" in summary(options, report, ending)
    assert json_document(options, report, ending) == {
        "version": "0.1.0",
        "host": "HOST",
        "source": "backuppool/virt/machines",
        "local": LOCAL,
        "tag": "offsite",
        "dry_run": False,
        "began": 1_700_000_000,
        "seconds": 3.0,
        "exit": 1,
        "events": [
            {
                "event": "pull",
                "dataset": LOCAL,
                "snapshot": "@b",
                "guid": "18446744073709551615",
                "base": "@a",
                "base_guid": "7",
                "resumed": False,
                "clone_of": None,
                "bytes": 2**20,
                "seconds": 2.0,
            },
            {"event": "in step", "dataset": f"{LOCAL}/www"},
            {"event": "expire", "dataset": LOCAL, "snapshot": "@old"},
            {"event": "failure", "dataset": f"{LOCAL}/mail", "what": "no", "hint": "way"},
        ],
    }


# --- --status, --check, --metrics ---------------------------------------------------------------------------------------

NOW = 1_700_000_000
HOUR = 3600


def common(name: str = "@monday", hours: float = 2) -> Snapshot:
    return Snapshot(f"{LOCAL}{name}", 42, 1, int(NOW - hours * HOUR))


def test_status_table() -> None:
    found = [
        MirrorStatus(LOCAL, SOURCE, common(), True, True, 3, 5 * 2**30, 12288),
        MirrorStatus(f"{LOCAL}/www", f"{SOURCE}/www", common(hours=100), False, True, 0, 0, 0, partial=2**20),
        MirrorStatus(f"{LOCAL}/new", f"{SOURCE}/new", None, behind=1, held_there=False, lacking=0, pinned=0),
        MirrorStatus(f"{LOCAL}/old", "", common(hours=2000), True),
        MirrorStatus(f"{LOCAL}/alone", None, common(hours=0.5), True),
        MirrorStatus(f"{LOCAL}/ahead", None, common(hours=-0.5), True),
    ]
    assert status_table(found, NOW) == [
        "DATASET                      NEWEST COMMON                    AGE  BEHIND  LACKING  HELD        PARTIAL  PINNED",
        "offsite/virt/machines        @monday                           2h       3    5.00G  both              -   12.0K",
        "offsite/virt/machines/www    @monday                           4d       0       0B  there only    1.00M      0B",
        "offsite/virt/machines/new    none                               -       1       0B  no                -      0B",
        "offsite/virt/machines/old    @monday (gone at the source)     83d       ?        ?  here              -       ?",
        "offsite/virt/machines/alone  @monday                          30m       ?        ?  here              -       ?",
        "offsite/virt/machines/ahead  @monday                       future       ?        ?  here              -       ?",
    ]
    assert status_data(found[1]) == {
        "dataset": f"{LOCAL}/www",
        "source": f"{SOURCE}/www",
        "common": "@monday",
        "common_guid": "42",
        "common_creation": NOW - 100 * HOUR,
        "held_here": False,
        "held_there": True,
        "behind": 0,
        "lacking_bytes": 0,
        "partial_bytes": 2**20,
        "pinned_bytes": 0,
    }


FRESH, LATE = MirrorStatus(LOCAL, None, common()), MirrorStatus(f"{LOCAL}/www", None, common(hours=50))
LIMIT = 30 * HOUR
CAME_LONG_AGO = MirrorStatus(f"{LOCAL}/mail", None, common(hours=2), received=NOW - 50 * HOUR)
CAME_LATELY = MirrorStatus(f"{LOCAL}/mail", None, common(hours=2), received=NOW - HOUR)
CAME_TOMORROW = MirrorStatus(f"{LOCAL}/mail", None, common(hours=2), received=NOW + 50 * HOUR)
OLD_BUT_CAME_LATELY = MirrorStatus(f"{LOCAL}/mail", None, common(hours=50), received=NOW - HOUR)
IN_2100 = MirrorStatus(f"{LOCAL}/mail", None, common(hours=-670_000), received=NOW - HOUR)
A_LITTLE_AHEAD = MirrorStatus(f"{LOCAL}/mail", None, common(hours=-0.08), received=NOW - HOUR)


@pytest.mark.parametrize(
    ("found", "failing", "ran", "status", "text"),
    [
        ([FRESH], None, NOW - 60, 0, "OK - none of 1 late, offsite/virt/machines is of 2h ago"),
        ([FRESH], NOW - 600, NOW - 60, 1, "WARNING - runs fail since .*; none late yet, offsite/virt/machines is of"),
        (
            [FRESH, LATE],
            None,
            NOW - 60,
            2,
            "CRITICAL - 1 of 2 late, .*/www is of 50h ago; no run is known to fail: is one",
        ),
        ([FRESH, LATE], NOW - 99, NOW - 60, 2, "CRITICAL - 1 of 2 late, .*/www is of 50h ago; runs fail since "),
        ([FRESH, LATE], None, NOW - 2 * LIMIT, 2, "CRITICAL - 1 of 2 late, .*; no run since 20"),
        ([FRESH, LATE], None, None, 2, "CRITICAL - 1 of 2 late, .*; no run of root or this account since this machine"),
        ([], None, None, 3, "UNKNOWN - no dataset of this mirror has completed a run yet$"),
        ([], NOW - HOUR, None, 3, "UNKNOWN - no dataset of this mirror has completed a run yet; runs fail since 20"),
        ([CAME_LATELY], None, NOW - 60, 0, "OK - none of 1 late, .*/mail is of 2h ago"),
        ([CAME_TOMORROW], None, NOW - 60, 0, "OK - none of 1 late, .*/mail is of 2h ago"),
        ([A_LITTLE_AHEAD], None, NOW - 60, 0, "OK - none of 1 late, .*/mail is of 60m ago"),
        (
            [CAME_LONG_AGO],
            None,
            NOW - 60,
            2,
            "CRITICAL - 1 of 1 late, .*/mail is of 50h ago; no run is known to fail: is",
        ),
        ([OLD_BUT_CAME_LATELY], None, NOW - 60, 2, "CRITICAL - 1 of 1 late, .*/mail is of 50h ago"),
        (
            [FRESH, IN_2100],
            None,
            NOW - 60,
            2,
            f"CRITICAL - {LOCAL}@monday dated 2100-.*, in the future: compare the clocks .*; 0 of 2 late, .* is of 2h ago ",
        ),
        ([IN_2100] * 3, NOW - 99, None, 2, "CRITICAL - .*@monday and 2 more .* in the future: .*; runs fail since"),
    ],
)
def test_nagios_result_and_its_line(
    found: list[MirrorStatus], failing: int | None, ran: float | None, status: int, text: str
) -> None:
    ended, line = nagios_result(found, failing, ran, LIMIT, NOW)
    assert ended == status
    assert re.match(f"ZFS_REPLICATE {text}", line)
    assert "\n" not in line
    if found:
        said, figures = line.split(" | ")
        assert "=" not in said
        label = r"[a-z]+=[0-9.]+s?;[0-9.]*;[0-9.]*;[0-9.]*(;[0-9.]*)?"
        assert re.fullmatch(f"{label}( {label})*", figures)


def test_format_age_in_minutes_hours_and_days() -> None:
    assert [format_age(it) for it in (-5, 59, 119 * 60, 120 * 60, 71 * HOUR, 72 * HOUR)] == [
        "0m", "0m", "119m", "2h", "71h", "3d",
    ]  # fmt: skip


def test_metrics_are_read_by_the_client_library_of_prometheus() -> None:
    report = Report()
    report.pulled(LOCAL, STEP, ReceivedStream(2**20, 2.5))
    report.expired(Snapshot(f"{LOCAL}@old", 1, 1, 1), "expired")
    found_here = [FRESH, replace(LATE, received=NOW - 49 * HOUR)]
    text = metrics(LOCAL, report, found_here, RunResult(NOW, 12.5, 0), NOW + 12.5)
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert len(families) == 11
    assert all(family.type == "gauge" and family.documentation for family in families.values())
    found = {
        (sample.name.removeprefix("zfs_replicate_"), sample.labels.get("dataset")): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert {sample.labels["tree"] for family in families.values() for sample in family.samples} == {LOCAL}
    assert found["last_run_timestamp_seconds", None] == NOW + 12.5
    assert found["last_success_timestamp_seconds", None] == NOW + 12.5
    assert found["dataset_last_run_received_bytes", LOCAL] == 2**20
    assert found["dataset_last_run_received_bytes", f"{LOCAL}/www"] == 0
    assert found["dataset_last_run_receive_seconds", LOCAL] == 2.5
    assert found["dataset_last_run_expired_snapshots", LOCAL] == 1
    assert found["dataset_common_timestamp_seconds", f"{LOCAL}/www"] == NOW - 50 * HOUR
    assert found["dataset_received_timestamp_seconds", f"{LOCAL}/www"] == NOW - 49 * HOUR
    assert found["dataset_received_timestamp_seconds", LOCAL] == 0
    assert last_success(text) == NOW + 12.5
    assert last_success("") == 0


def test_metrics_of_a_first_run_that_fails_tell_no_success(tmp_path: Path) -> None:
    target = tmp_path / "job.prom"
    options = parse([*LINE, "--metrics", str(target)])
    write_metrics(options, Report(), RunResult(NOW, 1, 3))
    assert last_success(target.read_text(encoding="utf-8")) == 0
    write_metrics(options, Report(), RunResult(NOW, 1, 0))
    write_metrics(options, Report(), RunResult(NOW + 60, 1, 3))
    assert last_success(target.read_text(encoding="utf-8")) == NOW + 1


def test_metrics_quote_labels_as_the_format_has_it() -> None:
    """Names in a tree have none of these."""
    name = 'a"b\\c\nd\x1b\udcff'
    text = metrics(name, Report(), [replace(FRESH, name=name)], RunResult(NOW, 1, 0), NOW)
    samples = [it for family in text_string_to_metric_families(text) for it in family.samples]
    assert {it.labels["tree"] for it in samples} == {'a"b\\c\nd\\x1b\\xff'}
    assert {it.labels["dataset"] for it in samples if "dataset" in it.labels} == {'a"b\\c\nd\\x1b\\xff'}


SUCCESS = 'zfs_replicate_last_success_timestamp_seconds{tree="x"}'


@pytest.mark.parametrize("value", ["abc", "inf", "nan", "-1", "1e5", "1" * 400, "\u0663", "1 2", "", "0x10", "1_0"])
def test_last_success_that_is_no_time_is_none(value: str) -> None:
    assert last_success(f"{SUCCESS} {value}\n") == 0


@pytest.mark.parametrize("kind", ["fifo", "symlink", "device", "bytes", "long", "directory"])
def test_metrics_file_of_any_kind_does_no_harm(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "job.prom"
    if kind == "fifo":
        os.mkfifo(target)
    elif kind == "symlink":
        (tmp_path / "elsewhere").write_text(f"{SUCCESS} 5\n", encoding="utf-8")
        target.symlink_to(tmp_path / "elsewhere")
    elif kind == "device":
        target.symlink_to("/dev/zero")
    elif kind == "bytes":
        target.write_bytes(f"\u00e4\n{SUCCESS} 5\n".encode("latin-1"))
    elif kind == "long":
        with target.open("wb") as file:
            file.truncate(2**40)
    else:
        target.mkdir()
    options = parse([*LINE, "--metrics", str(target)])
    if kind == "directory":
        with pytest.raises(IsADirectoryError):
            write_metrics(options, Report(), RunResult(NOW, 1, 3))
        assert os.listdir(tmp_path) == ["job.prom"]
        return
    write_metrics(options, Report(), RunResult(NOW, 1, 3))
    assert not target.is_symlink()
    assert last_success(target.read_text(encoding="utf-8")) == (5 if kind == "bytes" else 0)


def test_log_line_of_a_run() -> None:
    report = Report()
    report.pulled(LOCAL, STEP, ReceivedStream(2**20, 2.5))
    assert log_line(parse(LINE), report, RunResult(NOW, 12.4, 0)) == (
        f"HOST:{SOURCE} -> {LOCAL}: exit=0 streams=1 bytes=1048576 expired=0 failures=0 seconds=12"
    )


# --- What the doctor reads --------------------------------------------------------------------------------------------


class Says:
    """A host that gives the same answer to every command that begins with these words."""

    def __init__(self, label: str, **answers: str) -> None:
        self.label = label
        self.account: Account | None = None
        self.answers = answers

    def ask(self, *commands: Command) -> Answer:
        ((program, *words),) = commands
        key = program if program == "date" else f"{program}_{words[0]}"
        return Answer(0, self.answers[key], "")

    def has(self, program: str) -> bool:
        return False

    def stream_command(self, *commands: Command, then: Command = ()) -> Command:
        raise AssertionError("the doctor sends nothing")

    def connected(self) -> bool:
        return True

    def close(self) -> None:
        pass


GOOD = {
    "date": "1700000000\n",
    "zfs_version": "zfs-2.3.2-1\nzfs-kmod-2.3.2-1\n",
    "zfs_list": "1000\t2000\n",
    "zpool_get": "health\tONLINE\ncapacity\t7\nfeature@large_blocks\tenabled\n",
}


def examined(**answers: str) -> dict[str, str]:
    """What the doctor finds, and the remedies, where the source gives such answers and this host good ones; what is said
    of this host's pool, where it gives them."""
    source, target = Says("source", **{**GOOD, **answers}), Says("this host", **{**GOOD, **answers})
    run = Run(POLICY, source, target, lambda batch: BatchResult(), Report())
    run.trees = Trees({}, {}, ("offsite",))
    doctor = Doctor(run)
    looks = (doctor.programs, lambda: doctor.clocks(source.answers["date"]), doctor.pool)
    found: list[Finding] = [finding for look in looks for finding in doctor.tried(look)]
    return {finding.what: finding.remedy for finding in found}


def test_doctor_is_content_with_two_good_hosts() -> None:
    found = examined()
    assert found["source: OpenZFS zfs-2.3.2-1 zfs-kmod-2.3.2-1"] == ""
    assert found["clocks: 0s apart"] == ""
    assert found["offsite: ONLINE"] == found["offsite: 7 % full"] == ""
    assert found[f"offsite: 2,000 bytes available, 1,000 used by {SOURCE}"] == ""


NONSENSE = ["", "\n", "abc\n", "9" * 400 + "\n", "9" * 5_000 + "\n", "-1\n", "1e9\n", "\u0661\n"]


@pytest.mark.parametrize("text", NONSENSE)
def test_doctor_finds_a_date_that_is_none(text: str) -> None:
    remedies = [
        remedy for what, remedy in examined(date=text).items() if what.startswith("the date on source should be")
    ]
    assert len(remedies) == 1
    assert remedies[0]


@pytest.mark.parametrize("text", ["", "zfs-" + "9" * 5_000 + ".9.1\n", "zfs-0.8.6-1\n", "zfs-2.0.7\n", "abc\n"])
def test_doctor_finds_a_version_that_is_none_or_old(text: str) -> None:
    remedies = {what: remedy for what, remedy in examined(zfs_version=text).items() if ": OpenZFS" in what}
    assert set(remedies.values()) == {"use 2.1 or newer"}


@pytest.mark.parametrize("text", ["zfs-2.1.11-1\n", "zfs-2.4\n", "zfs-10.0.0-rc1\n"])
def test_doctor_is_content_with_a_version_that_is_new_enough(text: str) -> None:
    assert {remedy for what, remedy in examined(zfs_version=text).items() if ": OpenZFS" in what} == {""}


@pytest.mark.parametrize("text", ["", "x\n", "x\ty\n", "1\t2\n3\t4\n", "9" * 30 + "\t1\n", "1\t-\n"])
def test_doctor_finds_space_that_cannot_be_read(text: str) -> None:
    found = examined(zfs_list=text)
    assert not [what for what in found if "bytes available" in what]
    assert [what for what, remedy in found.items() if remedy]


@pytest.mark.parametrize(
    "text", ["", "health\tONLINE\n", "health\tONLINE\ncapacity\t-\n", "capacity\t" + "9" * 400 + "\n"]
)
def test_doctor_finds_a_pool_that_tells_no_capacity(text: str) -> None:
    assert [remedy for what, remedy in examined(zpool_get=text).items() if what.startswith("capacity of offsite")]


@pytest.mark.parametrize("creation", [10**18, 10**19, 10**20])
def test_doctor_takes_a_snapshot_of_an_age_beyond_any_calendar(creation: int) -> None:
    run = Run(POLICY, Says("source"), Says("this host"), lambda batch: BatchResult(), Report())
    run.trees = Trees({"": Dataset(SOURCE, "filesystem", (Snapshot(f"{SOURCE}@a", 1, 1, creation),))}, {})
    (finding,) = Doctor(run).trees()
    assert finding == Finding(f"{SOURCE}: 1 datasets, 1 snapshots, the newest of {creation}")
