"""What the user sees: sizes and times, the progress line, the summary, the document."""

from __future__ import annotations

import io

import pytest
from histories import LOCAL

from zfs_replicate import Failure, Meter, Receive, Report, Snapshot, document, human, minutes, pace, parse, summary

STEP = Receive(Snapshot(f"{LOCAL}@b", 2**64 - 1, 9, 9), Snapshot(f"{LOCAL}@a", 7, 1, 1))
LINE = ["-h", "HOST", "-r", "backuppool/virt/machines", "-l", LOCAL, "-t", "offsite"]


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
def test_sizes_are_told_as_zfs_tells_them(count: float, text: str) -> None:
    assert human(count) == text


def test_times() -> None:
    assert [minutes(it) for it in (0.9, 65, 3599, 3600, 360000)] == ["0:00", "1:05", "59:59", "1:00:00", "100:00:00"]
    assert pace(3 * 2**20, 1.5) == "3.00M in 0:01, 2.00M/s"
    assert pace(0, 0) == "0B in 0:00, 0B/s"


class Terminal(Meter):
    """A meter whose clock is ours, and which keeps what it writes."""

    def __init__(self, columns: int = 80) -> None:
        self.now = 0.0
        self.paper = io.StringIO()
        super().__init__(self.paper, lambda: columns, lambda: self.now)

    def line(self, arrived: int, buffered: int = 0) -> str:
        """What stands there a second later."""
        self.now += 1
        self.show(arrived, buffered)
        shown = self.paper.getvalue().rpartition("\r")[2]
        assert shown.endswith("\x1b[K")
        return shown[:-3]


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("name", [LOCAL, "offsite/" + "long/" * 40 + "end"])
def test_the_progress_line_fits_any_terminal(columns: int, name: str) -> None:
    it = Terminal(columns)
    it.begin(name, 2**50, 0)
    for arrived in (0, 1, 2**30, 2**49, 2**50, 2**51):
        line = it.line(arrived, 2**28)
        assert len(line) == columns - 1
        assert line.split(" ")[0].endswith(name[-8:])
    assert "100%" in line


def test_the_progress_line_tells_the_estimate_the_rate_and_the_rest() -> None:
    it = Terminal()
    it.begin("offsite/www", 100 * 2**20, 0)
    assert "  0B of  100M   0%    0B/s  -:-- left buf    0B" in it.line(0)
    line = it.line(10 * 2**20, 5 * 2**20)
    assert "10.0M of  100M  10% 5.00M/s  0:18 left buf 5.00M" in line


def test_a_resumed_stream_counts_what_is_there() -> None:
    it = Terminal()
    it.begin("offsite/www", 25 * 2**20, 75 * 2**20)
    assert "75.0M of  100M  75% " in it.line(0)
    assert "80.0M of  100M  80% 2.50M/s  0:08 left" in it.line(5 * 2**20)


def test_a_stream_of_nothing_and_one_of_unknown_size() -> None:
    it = Terminal()
    it.begin("offsite/www", 0, 0)
    assert "0B of    0B   0%" in it.line(0)
    it.begin("offsite/www", None, 0)
    assert it.line(1024).endswith("  1.00K 1.00K/s buf    0B")


def test_other_lines_wipe_the_progress_line_first(capsys: pytest.CaptureFixture[str]) -> None:
    it = Terminal()
    report = Report(meter=it)
    it.line(1)
    report.failure(LOCAL, Failure("no", "way"))
    assert it.paper.getvalue().endswith("\r\x1b[K")
    assert capsys.readouterr().err == f"zfs_replicate: {LOCAL}: no\n    way\n"
    report.failure(LOCAL, Failure("no", "way"))
    assert capsys.readouterr().err == ""


def test_the_summary_and_the_document_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(meter=Terminal())
    options = parse(LINE)
    report.pulled(LOCAL, STEP, 2**20, 2.0)
    report.event("in step", f"{LOCAL}/www", "")
    report.event("expire", LOCAL, "", snapshot="@old")
    assert capsys.readouterr().err == f"{LOCAL}: @a -> @b: 1.00M in 0:02, 512K/s\n"
    said = summary(options, report, 3)
    assert said == f"zfs_replicate: {LOCAL}: 1 in step before, 1 pulled (1.00M), 1 expired, in 0:03"
    report.failure(f"{LOCAL}/mail", Failure("no", "way"))
    assert "1 expired, 1 failed, in" in summary(options, report, 3)
    assert document(options, report, 1_700_000_000.9, 3.00049, 1) == {
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
