"""The operator's day: what a run shows at a terminal, what it would do, how far the mirror is, its end."""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from site_pair import JOB, MIRROR, PROGRAM, TAG, TREE, held, history, names

if TYPE_CHECKING:
    from site_pair import Site

pytestmark = pytest.mark.zfs

STATE = """
zfs list -Hp -r -t all -o name,guid,createtxg,userrefs,receive_resume_token
zfs get -Hp -r -s local,received all
zfs list -H -o name -t snapshot | xargs -r zfs holds -H
"""
UNREACHABLE = ("-p", "1")


def state(site: Site) -> list[str]:
    return [machine.run(STATE).stdout for machine in (site.source, site.backup)]


def looking_on(site: Site, *options: str, status: int = 0) -> str:
    """What something that only looks on prints; both machines must be as they were."""
    before = state(site)
    done = site.replicate(*options, status=status)
    assert state(site) == before
    if status == 0:
        assert done.stderr == ""
    return str(done.stdout)


def at_a_terminal(site: Site, columns: int, *options: str) -> list[str]:
    """The lines that come to stand on a terminal so wide; those that were written over are among them."""
    line = f"stty cols {columns}; exec {JOB} {shlex.join(options)}"
    done = site.backup.run(f"script -qec {shlex.quote(line)} /dev/null", timeout=600)
    return [part for part in re.split(r"[\r\n]+|\x1b\[K", done.stdout) if part.strip()]


@pytest.mark.full
@pytest.mark.parametrize("columns", [80, 200])
def test_progress_at_a_terminal(site: Site, columns: int) -> None:
    child = "a-name-that-is-much-too-long-for-a-line-of-eighty-columns" if columns == 80 else "www"
    site.source.run(f"zfs create -p {TREE}/{child} && head -c 20M /dev/urandom > /{TREE}/{child}/big")
    site.snapshot("monday")
    site.source.netem(megabits=30)
    lines = at_a_terminal(site, columns)
    progress = [line for line in lines if " left buf " in line]
    assert progress, lines
    assert {len(line) for line in progress} == {columns - 1}
    shown = [re.search(r"([0-9.]+[BKMG]) of +20\.[0-9]M +([0-9]+)% +[0-9.]+[BKMG]/s", line) for line in progress]
    percents = [int(found[2]) for found in shown if found]
    assert percents == sorted(percents)
    assert len(set(percents)) > 2, lines
    name = f"{MIRROR}/{child}"
    assert any(re.fullmatch(rf"{name}: full @monday: 20\.[0-9]M in 0:[0-9]+, [0-9.]+M/s", line) for line in lines), (
        lines
    )
    assert re.fullmatch(
        rf"zfs_replicate: {MIRROR}: 0 in step before, 2 pulled \(20\.[0-9]M\), 0 expired, in 0:\d+", lines[-1]
    )
    site.source.netem()
    assert at_a_terminal(site, columns)[-1].startswith(f"zfs_replicate: {MIRROR}: 2 in step before, 0 pulled (0B)")
    assert at_a_terminal(site, columns, "-q") == []
    assert "in step before" in site.replicate("--progress").stderr
    site.assert_in_step()


@pytest.mark.full
def test_progress_of_a_resumed_stream_counts_what_is_there(site: Site) -> None:
    site.source.run(f"zfs create -p {TREE} && head -c 30M /dev/urandom > /{TREE}/big")
    site.snapshot("monday")
    running = site.start(after=15_000_000)
    site.backup.run("kill -TERM $(cat /run/job.pid)")
    running.communicate(timeout=60)
    (row,) = [line for line in looking_on(site, "--status").splitlines() if line.startswith(MIRROR)]
    partial = float(re.fullmatch(rf"{MIRROR} +none +- +1 +30\.\dM +no +([0-9.]+)M +0B", row)[1])  # type: ignore[index]
    assert partial > 5
    (rest,) = re.findall("pull rest of @monday: ([0-9.]+)M", looking_on(site, "--dry-run"))
    assert 29 < float(rest) + partial < 32
    lines = at_a_terminal(site, 80)
    first = next(line for line in lines if " left buf " in line)
    assert float(re.search(r"([0-9.]+)M of +3[0-9]\.[0-9]M", first)[1]) >= partial  # type: ignore[index]
    site.assert_in_step()


@pytest.mark.full
def test_dry_run_tells_what_a_run_does(site: Site) -> None:
    site.plant("www", "mail")
    site.snapshot("monday")
    plan = looking_on(site, "--dry-run")
    guids = {key: points[-1].guid for key, points in history(site.source, TREE).items()}
    for key, guid in guids.items():
        assert re.search(rf"^{MIRROR}{key}: pull full @monday: [0-9.]+[KM] \(guid {guid}\)$", plan, re.MULTILINE)
    assert "offsite/virt: create" in plan
    site.replicate_silently()
    site.backup.shift_clock(40)
    site.source.shift_clock(40)
    site.write("two", "www", "mail")
    site.snapshot("tuesday")
    site.backup.run(f"zfs hold keep {MIRROR}/mail@monday")
    plan = looking_on(site, "--dry-run", "-k", "30")
    document: dict[str, Any] = json.loads(looking_on(site, "--dry-run", "--json", "-k", "30"))
    assert f"{MIRROR}/mail@monday: older than --keep-days, but kept: held by keep\n" in plan
    assert f"{MIRROR}/www@monday: expires\n" in plan
    assert f"{TREE}/www@monday: release {TAG}\n" in plan
    told = {(event["event"], event["dataset"], event.get("snapshot")) for event in document["events"]}
    assert document["dry_run"]
    done: dict[str, Any] = json.loads(site.replicate("--json", "-k", "30").stdout)
    assert (done["exit"], done["dry_run"], done["local"]) == (0, False, MIRROR)
    for event in done["events"]:
        assert (event["event"], event["dataset"], event.get("snapshot")) in told, event
    pulls = {event["dataset"]: event for event in done["events"] if event["event"] == "pull"}
    assert {name: int(event["guid"]) for name, event in pulls.items()} == {
        f"{MIRROR}{key}": points[-1].guid for key, points in history(site.source, TREE).items()
    }
    assert all(300_000 < pulls[f"{MIRROR}/{name}"]["bytes"] < 500_000 for name in ("www", "mail")), pulls
    assert names(site.backup, f"{MIRROR}/www") == ["tuesday"]
    assert names(site.backup, f"{MIRROR}/mail") == ["monday", "tuesday"]
    assert "in step" in looking_on(site, "--dry-run", "-k", "30")


def test_status_with_and_without_the_source(site: Site) -> None:
    site.plant("www", "mail")
    site.snapshot("monday")
    site.replicate_silently()
    site.write("two", "www")
    site.snapshot("tuesday", f"{TREE}/www", flags="")
    site.source.run(f"zfs release -r {TAG} {TREE}/mail@monday; zfs destroy -r {TREE}/mail; zfs create {TREE}/new")
    rows = {line.split()[0]: line.split() for line in looking_on(site, "--status").splitlines()}
    assert rows[MIRROR][1:-1] == ["@monday", rows[MIRROR][2], "0", "0B", "both", "-"]
    assert re.fullmatch("[0-9]m", rows[MIRROR][2])
    assert rows[f"{MIRROR}/www"][1] == "@monday"
    assert rows[f"{MIRROR}/www"][3] == "1"
    assert rows[f"{MIRROR}/www"][4].endswith("K")
    assert " ".join(rows[f"{MIRROR}/mail"][1:6]) == "@monday (gone at the source)"
    assert rows[f"{MIRROR}/new"][1] == "none"
    found = {row["dataset"]: row for row in json.loads(looking_on(site, "--status", "--json"))["events"]}
    assert found[f"{MIRROR}/www"]["lacking_bytes"] > 300_000
    assert found[f"{MIRROR}/mail"]["source"] == ""
    said = looking_on(site, "--status", *UNREACHABLE, status=3)
    rows = {line.split()[0]: line.split() for line in said.splitlines()}
    assert rows[f"{MIRROR}/www"][3:] == ["?", "?", "here", "-", "?"]
    assert f"{MIRROR}/new" not in rows


@pytest.mark.full
def test_check_and_metrics_tell_why_a_mirror_is_late(site: Site) -> None:
    """The three reasons of a late mirror are told apart, and since when runs fail."""
    site.plant("www")
    assert looking_on(site, "--check", status=3).startswith("ZFS_REPLICATE UNKNOWN - ")
    site.snapshot("monday")
    site.replicate_silently("--metrics", "/run/job.prom", "--syslog")
    assert looking_on(site, "--check").startswith("ZFS_REPLICATE OK - none of 3 late, ")
    site.backup.shift_clock(2)
    assert "; no run since " in looking_on(site, "--check", status=2)
    site.replicate_silently()
    line = looking_on(site, "--check", "--max-age", "24", status=2)
    assert re.fullmatch(
        rf"ZFS_REPLICATE CRITICAL - 3 of 3 late, {MIRROR}\S* is of 48h ago; no run is known to fail: is one at work, "
        r"or does the source make no snapshots\? \| age=1[0-9]{5}s;;86400;0 datasets=3;;;0 late=3;;;0\n",
        line,
    )
    first = site.replicate("--metrics", "/run/job.prom", "--syslog", *UNREACHABLE, status=3)
    assert "fail since" not in first.stderr
    site.backup.run("sleep 1")
    again = site.replicate("--metrics", "/run/job.prom", *UNREACHABLE, status=3)
    assert re.search(rf"^zfs_replicate: {MIRROR}: runs fail since 20\d\d-", again.stderr, re.MULTILINE)
    assert "; runs fail since 20" in looking_on(site, "--check", status=2)
    assert looking_on(site, "--check", "--max-age", "999", status=1).startswith(
        "ZFS_REPLICATE WARNING - runs fail since"
    )
    families = text_string_to_metric_families(site.backup.read("/run/job.prom"))
    samples = {(it.name, it.labels.get("dataset")): it.value for family in families for it in family.samples}
    assert samples["zfs_replicate_last_run_exit_code", None] == 3
    behind = samples["zfs_replicate_last_run_timestamp_seconds", None]
    assert 2 * 86000 < behind - samples["zfs_replicate_last_success_timestamp_seconds", None] < 2 * 87000
    assert behind - samples["zfs_replicate_dataset_common_timestamp_seconds", f"{MIRROR}/www"] > 2 * 86000
    assert site.backup.run("stat -c %a /run/job.prom").stdout == "644\n"
    logged = site.backup.run("journalctl -q -t zfs_replicate -o cat --no-pager").stdout.splitlines()
    assert re.fullmatch(
        rf"source:{TREE} -> {MIRROR}: exit=0 streams=3 bytes=\d+ expired=0 failures=0 seconds=\d+", logged[-3]
    )
    assert logged[-2].startswith(f"{MIRROR}: cannot reach source port 1: ")
    assert logged[-1].startswith(f"source:{TREE} -> {MIRROR}: exit=3 streams=0 bytes=0 expired=0 failures=1")
    site.replicate_silently()
    assert site.backup.run(f"zfs get -H -o value zfs_replicate:failing {MIRROR}").stdout == "-\n"
    site.source.shift_clock(3)
    site.snapshot("tomorrow")
    site.replicate_silently()
    said = looking_on(site, "--check", status=2)
    assert re.match(rf"ZFS_REPLICATE CRITICAL - {MIRROR}@tomorrow and 2 more dated 20\S+ \S+, in the future: ", said)
    assert "future" in looking_on(site, "--status")


@pytest.mark.full
def test_retire_ends_a_mirror(site: Site) -> None:
    site.plant("www")
    site.snapshot("monday")
    site.replicate_silently("--bookmark", "--exclude", "disk")
    site.replicate_silently()
    site.source.run(f"zfs hold other {TREE}@monday; zfs bookmark {TREE}@monday {TREE}#mine")
    before = [history(site.source, TREE), history(site.backup, MIRROR)]
    said = site.replicate("--retire").stdout.splitlines()
    assert sorted(said) == sorted(
        [
            *(f"{TREE}{child}@monday: released {TAG}" for child in ("", "/disk", "/www")),
            *(f"{MIRROR}{child}@monday: released {TAG}:received" for child in ("", "/disk", "/www")),
            *(line for line in said if line.endswith(": destroyed")),
        ]
    )
    assert [line.partition("#")[0] for line in said if line.endswith(": destroyed")] == [TREE, f"{TREE}/www"]
    assert [history(site.source, TREE), history(site.backup, MIRROR)] == before
    assert not held(site.source, TREE, TAG)
    assert held(site.source, TREE, "other") == {f"{TREE}@monday"}
    assert site.source.run(f"zfs list -H -o name -t bookmark -r {TREE}").stdout == f"{TREE}#mine\n"
    assert site.replicate("--retire").stdout == ""
    site.backup.run("zfs destroy -r offsite/virt")
    site.source.run(f"zfs hold {TAG} {TREE}@monday")
    assert site.replicate("--retire").stdout.splitlines() == [
        f"{TREE}@monday: released {TAG}",
        f"{MIRROR}: not there (any more)",
    ]


def on_the_wire(site: Site, *options: str) -> tuple[int, int, str]:
    """Bytes that the source sent in a run, those of its streams, and the commands that it ran."""
    counter = "/sys/class/net/lab0/statistics/tx_bytes"
    before = int(site.source.read(counter))
    done = site.replicate("--json", "-vv", *options)
    site.assert_in_step()
    arrived = sum(event.get("bytes", 0) for event in json.loads(done.stdout)["events"])
    return int(site.source.read(counter)) - before, arrived, done.stderr


@pytest.mark.full
def test_streams_are_compressed_and_limited_between_two_machines(site: Site) -> None:
    """What lies uncompressed at the source is small on the wire alone, if both ends have what it takes."""
    site.source.run(f"zfs create -p -o compression=off {TREE}")
    sizes = {}
    for number, options in enumerate(
        (["-n"], [], ["--compress", "lz4"], ["--compress", "pigz"], ["--compress", "auto"])
    ):
        site.source.run(f"yes {'words' * 9} | head -c 4M > /{TREE}/file{number}")
        site.snapshot(f"day{number}")
        if number == 4:
            site.backup.run("mv $(command -v zstd) /root/zstd.away")
        try:
            sent, arrived, said = on_the_wire(site, *options)
        finally:
            site.backup.run("[ ! -e /root/zstd.away ] || mv /root/zstd.away /usr/bin/zstd")
        assert arrived > 4_000_000
        sizes[" ".join(options)] = sent
        assert ("zstd is not installed on this host: the stream goes without it" in said) == (number == 4)
    assert sizes["-n"] > 4_000_000
    assert sizes["--compress auto"] > 4_000_000
    assert max(sizes[packed] for packed in ("", "--compress lz4", "--compress pigz")) < 1_000_000, sizes
    site.source.run(f"head -c 6M /dev/urandom > /{TREE}/last")
    site.snapshot("last")
    assert "no matching cipher found" in site.replicate("--cipher", "3des-cbc", status=1).stderr
    done = site.replicate(
        "--json", "--rate-limit", "1M", "--cipher", "aes256-ctr", "--ssh-option", "MACs=hmac-sha2-512"
    )
    (pull,) = [event for event in json.loads(done.stdout)["events"] if event["event"] == "pull"]
    assert pull["seconds"] > 4, "six mebibytes at one a second, less what mbuffer takes at once"
    site.assert_in_step()


README = (PROGRAM.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.full
def test_readme_lines_work_word_for_word(site: Site) -> None:
    """The line of the crontab, run by the systemd timer's service; where our holds are."""
    site.plant("www")
    site.snapshot("monday")
    block = re.findall(r"(?:^    .*\n|^\n(?=    ))+", README.partition("A systemd timer")[2], re.MULTILINE)[0]
    unit, _, timer = "\n".join(line[4:] for line in block.splitlines()).partition("[Timer]")
    assert f"ExecStart=/usr/local/bin/{JOB} -k 30".replace("source", "HOST") in unit
    assert f"    0 */6 * * *  {JOB} -k 30".replace("source", "HOST") in README
    directory = "/etc/systemd/system/mirror-machines"
    site.backup.write(f"{directory}.service", unit.replace("HOST", "source"))
    site.backup.write(f"{directory}.timer", f"[Timer]{timer}")
    try:
        site.backup.run(f"systemd-analyze verify {directory}.service {directory}.timer")
        site.backup.run("systemctl daemon-reload && systemctl start mirror-machines.timer mirror-machines.service")
        assert "mirror-machines.service" in site.backup.run("systemctl list-timers --no-pager").stdout
    finally:
        site.backup.run(f"systemctl stop mirror-machines.timer; rm {directory}.*; systemctl daemon-reload")
    site.assert_in_step()
    (line,) = re.findall("^    (zfs list .* zfs holds)$", README, re.MULTILINE)
    assert site.source.run(line).stdout.count(f"  {TAG}  ") == 3
    (line,) = re.findall("`(complete .*)` completes", README)
    words = line.partition('"')[2].rpartition('"')[0]
    completed = site.backup.run("bash", input=f'{line}\ncompgen -W "{words}" -- --ret').stdout
    assert set(completed.split()) == {"--retries", "--retire"}
