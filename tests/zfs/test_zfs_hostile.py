"""A source that lies, on real ZFS: what is here stays, nothing is mounted or shared, and an honest run repairs.

The liar is a `zfs` of its own at the source, found before the real one. It lies to other machines alone.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
from typing import TYPE_CHECKING

import pytest
from site_pair import JOB, MIRROR, TAG, TREE, dataset_of, get, held, history, holds, names
from test_zfs_properties import assert_neither_mounted_nor_shared, share_by_nfs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import Machine
    from site_pair import Site

pytestmark = pytest.mark.zfs

LIAR = """\
#!/bin/bash
case $SSH_CLIENT in 10.77.*) ;; *) exec /usr/sbin/zfs "$@" ;; esac
zfs() { /usr/sbin/zfs "$@"; }
told() { echo "$*" >> /run/zfs.lies; }
said=$*
case $said in
LIES
esac
exec /usr/sbin/zfs "$@"
"""


@contextlib.contextmanager
def lying(site: Site, lies: str) -> Iterator[None]:
    """A source that lies as these cases of a shell's `case` say; each is to call `told`. Fails if one never came up."""
    site.source.run("rm -f /run/zfs.lies /run/zfs.sent")
    site.source.write("/usr/local/bin/zfs", LIAR.replace("LIES", lies), 0o755)
    try:
        yield
        told = set(site.source.run("cat /run/zfs.lies", check=False).stdout.splitlines())
        expected = set(re.findall(r"\btold ([a-z0-9-]+)", lies))
        assert told == expected, f"lies that nobody heard: {expected - told}"
    finally:
        site.source.run("rm -f /usr/local/bin/zfs")


def attempt(site: Site, *options: str, job: str = JOB) -> subprocess.CompletedProcess[str]:
    """A run that may end in any way but a traceback."""
    done = site.backup.run(f"{job} {shlex.join(options)}", check=False, timeout=600)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


def state(machine: Machine, tree: str = "offsite") -> list[str]:
    """All datasets and points of a tree by guid, what was said of them, holds, mounts, shares; but not whether runs
    fail, which a run may note."""
    told = machine.run(
        f"zfs list -Hp -r -t all -o name,type,guid,createtxg,origin,userrefs {tree}; "
        f"zfs get -Hp -r -t filesystem,volume -s local,received,inherited -o name,property,value,source all {tree} | "
        "sed /zfs_replicate:failing/d; grep ' zfs ' /proc/mounts; cat /etc/exports.d/zfs.exports 2>/dev/null || true"
    ).stdout.splitlines()
    return told + [f"{tag} {name}" for tag, found in holds(machine, tree).items() for name in sorted(found)]


def changes(before: list[str], after: list[str]) -> list[str]:
    """What two states differ in."""
    return [f"- {it}" for it in before if it not in after] + [f"+ {it}" for it in after if it not in before]


def copy_of(dataset: str, snapshot: str, name: str) -> str:
    """Makes a dataset at the source with the same snapshots, by guid, up to that one."""
    return f"zfs send -R {dataset}@{snapshot} | zfs recv -u {name}"


# --- Streams ----------------------------------------------------------------------------------------------------------


def test_package_in_answer_to_a_plain_send_is_refused(site: Site) -> None:
    """Into a place that is free, into a placeholder with a child, and upon an ordinary increment."""
    site.source.run(
        f"zfs create -p {TREE}/new/www && zfs create {TREE}/ours && echo 1 > /{TREE}/new/www/file && "
        f"zfs snapshot {TREE}/ours@keep && echo 1 > /{TREE}/ours/file && "
        f"zfs snapshot {TREE}@monday && zfs snapshot {TREE}/new/www@monday && zfs snapshot {TREE}/ours@monday"
    )
    site.replicate_silently("-I")
    evil = "backuppool/evil"
    site.source.run(
        f"{copy_of(f'{TREE}/ours', 'monday', evil)} && zfs rename {evil}@keep {evil}@0 && "
        f"zfs rename {evil}@monday {evil}@1 && zfs create {evil}/child && zfs snapshot {evil}/child@1 && "
        f"zfs snapshot -r {evil}@2 && zfs create {TREE}/first && echo 2 > /{TREE}/first/file && "
        f"for it in '' /first /new /ours; do zfs snapshot {TREE}$it@tuesday; done"
    )
    kept, ours = points(site), state(site.backup, f"{MIRROR}/ours")
    lies = f"""
        "send "*{TREE}/first@tuesday) told first; zfs send -R {evil}@1; exit ;;
        "send "*{TREE}/new@tuesday) told new; zfs send -R -i @1 {evil}@2; exit ;;
        "send "*{TREE}/ours@tuesday) told ours; zfs send -R -i @1 {evil}@2; exit ;;
    """
    with lying(site, lies):
        done = attempt(site, "-I")
    # The placeholder may stand aside until what is to take its place is here, with all that is below it.
    now = points(site)
    wrong = [f"gone: {it}" for it in kept.keys() - now.keys()]
    wrong += [
        f"no longer held: {kept[guid]}"
        for guid in kept.keys() & now.keys()
        if now[guid][1] < kept[guid][1] and dataset_of(kept[guid][0]) != MIRROR
    ]
    wrong += [f"ours: {it}" for it in changes(ours, state(site.backup, f"{MIRROR}/ours"))]
    wrong += [f"new here: {now[guid]}" for guid in now.keys() - kept.keys() if dataset_of(now[guid][0]) != MIRROR]
    wrong += [f"not told: {it}" for it in ("first", "new", "ours") if f"{MIRROR}/{it}: " not in done.stderr]
    assert not wrong, "\n".join([*wrong, f"exit {done.returncode}", done.stderr])
    assert done.returncode == 1, done.stderr
    assert names(site.backup, MIRROR)[-1] == "tuesday", "the others were done"

    site.replicate_silently("-I")
    site.assert_in_step()
    left = history(site.backup, MIRROR)
    assert left.keys() >= {"", "/first", "/new", "/new/www", "/ours"}
    assert not any(left[key] for key in left.keys() - {"", "/first", "/new", "/new/www", "/ours"})
    assert names(site.backup, f"{MIRROR}/ours") == ["keep", "monday", "tuesday"]
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)
    site.replicate_silently("-I")


@pytest.mark.full
def test_package_in_answer_to_any_other_send_is_refused(site: Site) -> None:
    """Whatever kind of stream was asked for: a package is refused at its head, and nothing below is touched."""
    key = "-o encryption=on -o keyformat=raw -o keylocation=file:///root/raw"
    site.source.run(
        f"head -c 32 /dev/urandom > /root/raw && zfs create -p {TREE}/rest/below && zfs create -V 16M {TREE}/vol && "
        f"zfs create {key} {TREE}/raw && zfs create {TREE}/raw/below && zfs create {TREE}/origin && "
        f"head -c 4M /dev/urandom > /{TREE}/rest/file && udevadm settle"
    )
    site.snapshot("monday")
    site.replicate_silently()
    evil = "backuppool/evil"
    site.source.run(
        f"head -c 8M /dev/urandom > /{TREE}/rest/file && zfs clone {TREE}/origin@monday {TREE}/clone && "
        f"{copy_of(f'{TREE}/rest', 'monday', evil)} && zfs send -w -R {TREE}/raw@monday | zfs recv -u backuppool/dark && "
        f"zfs snapshot -r {evil}@tuesday && zfs destroy -r {evil}/below@monday && zfs snapshot -r backuppool/dark@tuesday"
    )
    site.snapshot("tuesday")
    cut = f"""
        "send "*{TREE}/rest@tuesday) told cut; zfs "$@" | head -c 3000000; exit 1 ;;
        "send "*{TREE}/vol@tuesday|"send "*{TREE}/clone@tuesday|"send "*{TREE}/raw@tuesday) told later; exit 1 ;;
    """
    with lying(site, cut):
        attempt(site)
    assert get(site.backup, "receive_resume_token", f"{MIRROR}/rest") != ["-"]
    kept = {guid: name for guid, (name, _) in points(site).items()}
    package, dark = f"zfs send -R -i @monday {evil}@tuesday", "zfs send -w -R -i @monday backuppool/dark@tuesday"
    lies = f"""
        "send -t "*) told rest; {package}; exit ;;
        "send "*{TREE}/vol@tuesday) told vol; {package}; exit ;;
        "send "*{TREE}/clone@tuesday) told clone; {package}; exit ;;
        "send "*{TREE}/raw@tuesday) told raw; {dark}; exit ;;
    """
    with lying(site, lies):
        done = attempt(site)
    assert done.returncode == 1, done.stderr
    for child in ("rest", "vol", "clone", "raw"):
        assert f"{MIRROR}/{child}: " in done.stderr, done.stderr
    assert {guid: name for guid, (name, _) in points(site).items()} == kept

    site.replicate_silently()
    site.assert_in_step()
    assert site.checksums(site.backup, f"{MIRROR}/rest") == site.checksums(site.source, f"{TREE}/rest")


def points(site: Site) -> dict[str, tuple[str, str]]:
    """Names and holds of all that is on the backup pool, by guid."""
    rows = site.backup.run("zfs list -Hp -r -t all -o guid,name,userrefs offsite").stdout.splitlines()
    return {guid: (name, users) for guid, name, users in (row.split("\t") for row in rows)}


@pytest.mark.full
def test_stream_of_another_dataset_is_not_believed(site: Site) -> None:
    """A first one; an increment from the right base; a whole one in answer to an increment."""
    site.source.run(f"zfs create -p {TREE}/fork && zfs create {TREE}/whole && echo 1 > /{TREE}/fork/file")
    site.snapshot("monday")
    site.replicate_silently()
    site.source.run(
        f"zfs create {TREE}/first && echo 2 > /{TREE}/first/file && zfs create backuppool/other && "
        "echo wrong > /backuppool/other/file && zfs snapshot backuppool/other@tuesday && "
        f"{copy_of(f'{TREE}/fork', 'monday', 'backuppool/fork')} && zfs mount backuppool/fork && "
        "echo wrong > /backuppool/fork/file && zfs snapshot backuppool/fork@tuesday"
    )
    site.snapshot("tuesday")
    before = {child: history(site.backup, MIRROR + child)[""] for child in ("/fork", "/whole")}
    lies = f"""
        "send "*{TREE}/first@tuesday) told first; zfs send -p backuppool/other@tuesday; exit ;;
        "send "*{TREE}/fork@tuesday) told fork; zfs send -p -i @monday backuppool/fork@tuesday; exit ;;
        "send "*{TREE}/whole@tuesday) told whole; zfs send -p backuppool/other@tuesday; exit ;;
    """
    with lying(site, lies):
        done = site.replicate(status=1)
    for child in ("first", "fork", "whole"):
        assert f"{MIRROR}/{child}: " in done.stderr
    assert history(site.backup, f"{MIRROR}/whole")[""] == before["/whole"]
    assert history(site.backup, f"{MIRROR}/fork")[""][:1] == before["/fork"]
    # What has come wrongly is taken for nothing that both sides know.
    assert held(site.backup, MIRROR, f"{TAG}:received") == {
        f"{MIRROR}@tuesday", f"{MIRROR}/fork@monday", f"{MIRROR}/whole@monday"
    }  # fmt: skip
    assert {f"{TREE}/fork@monday", f"{TREE}/whole@monday"} <= held(site.source, TREE, TAG)

    done = site.replicate(status=1)  # an honest source now
    assert f"{MIRROR}/whole" not in done.stderr
    assert re.search(f"^zfs_replicate: {MIRROR}/first: .*\n.*--quarantine", done.stderr, re.MULTILINE)
    assert re.search(f"^zfs_replicate: {MIRROR}/fork: .*1 local snapshot newer", done.stderr, re.MULTILINE)
    assert history(site.backup, f"{MIRROR}/fork")[""][:1] == before["/fork"]
    assert names(site.backup, f"{MIRROR}/whole") == ["monday", "tuesday"]
    site.replicate("--rollback", status=1)  # /first has nothing to go back to
    site.replicate("--quarantine")
    site.assert_in_step()
    site.replicate_silently()
    assert site.checksums(site.backup, f"{MIRROR}/fork") == site.checksums(site.source, f"{TREE}/fork")
    assert site.checksums(site.backup, f"{MIRROR}/first") == site.checksums(site.source, f"{TREE}/first")


def test_holds_in_a_stream_are_left_out(site: Site) -> None:
    """Of tags with TAB and newline; one of them forges a row of `zfs holds`."""
    site.source.run(f"zfs create -p {TREE}/www && echo 1 > /{TREE}/www/file")
    evil = "backuppool/evil"
    tags = ("$(printf 'a\\tb')", f"$(printf 't\\tdate\\n{MIRROR}/www@monday\\toffsite:received')", "keep")
    last = ""
    for day in ("monday", "tuesday"):
        site.snapshot(day)
        base = f"-i @{last}" if last else ""
        site.source.run(
            f"zfs send {base} {TREE}/www@{day} | zfs recv -u {evil} && zfs set readonly=on {evil} && "
            + " && ".join(f'zfs hold "{tag}" {evil}@{day}' for tag in tags)
        )
        with lying(site, f'"send "*{TREE}/www@{day}) told {day}; zfs send -h -p {base} {evil}@{day}; exit ;;'):
            done = attempt(site)
        users = site.backup.run(f"zfs list -Hp -r -t snapshot -o name,userrefs {MIRROR}").stdout
        expected = {day: "1", last: "0"}
        assert dict(line.split("\t") for line in users.splitlines()) == {
            f"{MIRROR}{child}@{name}": count for child in ("", "/www") for name, count in expected.items() if name
        }, done.stderr
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
        assert held(site.backup, MIRROR, f"{TAG}:received") == {f"{MIRROR}@{day}", f"{MIRROR}/www@{day}"}
        assert site.replicate("--check").stdout.startswith("ZFS_REPLICATE OK - ")
        site.replicate_silently()
        last = day
    site.assert_in_step()
    site.source.shift_clock(40)
    site.backup.shift_clock(40)
    site.snapshot("now")
    site.replicate_silently("-k", "30")
    assert names(site.backup, f"{MIRROR}/www") == ["now"]


# --- Properties -------------------------------------------------------------------------------------------------------

FOR_THE_GENERATOR = (
    "name,mountpoint,canmount,atime,relatime,devices,exec,readonly,setuid,nbmand,encroot,keylocation,"
    "org.openzfs.systemd:requires,org.openzfs.systemd:requires-mounts-for,org.openzfs.systemd:before,"
    "org.openzfs.systemd:after,org.openzfs.systemd:wanted-by,org.openzfs.systemd:required-by,"
    "org.openzfs.systemd:nofail,org.openzfs.systemd:ignore"
)
"""What zed writes down for the generator of mount units (history_event-zfs-list-cacher.sh in OpenZFS)."""


def assert_inert(site: Site) -> None:
    """After `zfs mount -a`, `zfs share -a` and a generator of mount units as well."""
    backup = site.backup
    backup.run("zfs mount -a && zfs share -a && udevadm settle")
    assert_neither_mounted_nor_shared(backup)
    assert backup.run(f"find /dev/zvol -path '*/{MIRROR}*'", check=False).stdout == "", "device nodes of volumes"
    # As at a boot; what it makes is started only where something wants it.
    backup.run(
        f"mkdir -p /etc/zfs/zfs-list.cache && zfs list -H -t filesystem -r -o {FOR_THE_GENERATOR} offsite "
        "> /etc/zfs/zfs-list.cache/offsite && sync && rm -rf /run/units && mkdir -p /run/units/1 /run/units/2 /run/units/3 && "
        "/usr/lib/systemd/system-generators/zfs-mount-generator /run/units/1 /run/units/2 /run/units/3"
    )
    wanted = backup.run("find /run/units -type l").stdout.splitlines()
    assert any(it.endswith("/offsite.mount") for it in wanted), f"the generator made nothing of the pool: {wanted}"
    assert [it for it in wanted if "machines" in it or "srv" in it] == []
    rows = backup.run(f"zfs get -Hp -r -o name,property,value zoned,snapdev,volmode,keystatus {MIRROR}").stdout
    bad = {"zoned\ton", "snapdev\tvisible", "volmode\tfull", "volmode\tdefault", "keystatus\tavailable"}
    assert [row for row in rows.splitlines() if row.partition("\t")[2] in bad] == []


def test_properties_of_the_source_mount_share_and_expose_nothing(site: Site) -> None:
    for machine in (site.source, site.backup):
        share_by_nfs(machine)
        machine.run("echo passphrase > /root/key")
    site.plant("www", "jail")
    site.backup.run("zfs set sharenfs=on offsite")
    site.source.run(
        f"""
        zfs create -o encryption=on -o keyformat=passphrase -o keylocation=file:///root/key {TREE}/secret &&
        zfs set org.openzfs.systemd:wanted-by=multi-user.target org.openzfs.systemd:required-by=multi-user.target \
            mountpoint=/srv/www canmount=on sharenfs=on setuid=on devices=on exec=on {TREE}/www &&
        zfs set snapdev=visible volmode=full {TREE}/disk && zfs set zoned=on {TREE}/jail &&
        zfs set "zfs_replicate:failing=$(printf '0 x\\ny\\tz')" {TREE}
        """
    )
    try:
        for day in ("monday", "tuesday"):
            site.snapshot(day)
            site.replicate_silently()
            assert_inert(site)
        site.backup.power_loss()
        site.backup.power_on()
        share_by_nfs(site.backup)
        units = site.backup.run("find /run/systemd/generator* -type l").stdout.splitlines()
        assert any(it.endswith("/offsite.mount") for it in units), "the generator did not run at the boot"
        assert_inert(site)
        assert site.replicate("--check").stdout.startswith("ZFS_REPLICATE OK - ")
        site.replicate_silently()

        # What the source says of our own property hides no failure from --check.
        site.source.run(f"zfs set 'zfs_replicate:failing=0 {MIRROR}' {TREE}")
        site.snapshot("wednesday")
        with lying(site, f'"send "*{TREE}/www@wednesday) told nothing; echo "no way" >&2; exit 1 ;;'):
            site.replicate(status=1)
        assert "runs fail since 20" in site.replicate("--check", status=1).stdout
        site.replicate_silently()
        assert site.replicate("--check").stdout.startswith("ZFS_REPLICATE OK - ")
        site.assert_in_step()
    finally:
        site.backup.run("rm -rf /etc/zfs/zfs-list.cache /run/units && sync")


# --- Bounds -----------------------------------------------------------------------------------------------------------

MEASURED = '''
"""measured SECONDS COMMAND...: how it ended, its peak memory and what it took of /tmp in KiB, and its seconds."""
import os, resource, subprocess, sys, time

with open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")
began, peak = time.monotonic(), 0
limit, *command = sys.argv[1:]
free = lambda: os.statvfs("/tmp").f_bavail * os.statvfs("/tmp").f_frsize // 1024
before = free()
process = subprocess.Popen(command)
while True:
    peak = max(peak, before - free())
    try:
        status = process.wait(0.5)
        break
    except subprocess.TimeoutExpired:
        if time.monotonic() - began > float(limit):
            process.kill()
memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(f"measured: {status} {memory} {peak} {time.monotonic() - began:.0f}", file=sys.stderr)
'''

LIMIT = 300
"""Seconds after which a run is taken for endless; and MiB that one may take of memory, its streams included."""


def job_of(name: str) -> str:
    return f"zfs_replicate -h source -r backuppool/{name} -l offsite/{name} -t {TAG} --stall-timeout 20s"


def measured(site: Site, options: dict[str, str]) -> dict[str, str]:
    """Runs side by side, one for each tree. Returns what each said; the figures go to standard output."""
    site.backup.write("/root/measured", MEASURED)
    started = {
        name: site.backup.popen(f"python3 /root/measured {LIMIT} {job_of(name)} {more}")
        for name, more in options.items()
    }
    said = {}
    for name, process in started.items():
        stdout, stderr = process.communicate(timeout=LIMIT + 60)
        text, found, figures = stderr.rpartition("measured: ")
        assert found, f"{name}: not even measured: {stdout[-2000:]}{stderr[-2000:]}"
        status, memory, disk, seconds = map(int, figures.split())
        print(f"{name}: exit {status}, {memory // 1024} MiB of memory, {disk // 1024} MiB in /tmp, {seconds} s")
        said[name] = f"{status} {text}"
        assert seconds < LIMIT, f"{name}: it did not end: {text[-2000:]}"
        assert memory < LIMIT * 1024, name
        assert disk < 64 * 1024, name
        assert "Traceback" not in text, text[-2000:]
        assert len(stdout + text) < 8000, "that is too much to say"
    return said


def plant_trees(site: Site, *trees: str) -> None:
    """A tree of one dataset each, mirrored, with a snapshot that is still to come."""
    for tree in trees:
        site.source.run(f"zfs create backuppool/{tree} && zfs snapshot backuppool/{tree}@monday")
    for tree in trees:
        site.replicate_silently(job=job_of(tree))
        site.source.run(f"head -c 3M /dev/urandom > /backuppool/{tree}/file && zfs snapshot backuppool/{tree}@tuesday")


def assert_over_and_repaired(site: Site, *trees: str) -> None:
    """Nothing is left of the runs, and honest ones bring what is missing."""
    left = "pgrep -a -x 'mbuffer|ssh|zfs'; find /tmp /run -name 'zfs_replicate-*' ! -name '*.lock'"
    assert site.backup.run(left, check=False).stdout == ""
    for tree in trees:
        assert names(site.backup, f"offsite/{tree}")[:1] == ["monday"]
        site.replicate_silently(job=job_of(tree))
        site.assert_in_step(tree=f"backuppool/{tree}", mirror=f"offsite/{tree}")


@pytest.mark.full
def test_answer_or_stream_that_dribbles_is_ended(site: Site) -> None:
    """A listing, and a stream, of which a byte comes now and then; a stream of which nothing comes but endless words."""
    trees = ("listing", "stream", "words")
    plant_trees(site, *trees)
    lies = r"""
        "list "*backuppool/listing*) told listing; zfs "$@"; row=$(zfs "$@" | tail -n 1)
            for i in $(seq 900); do echo "${row/@/@$i-}"; sleep 1; done; exit ;;
        "send "*backuppool/stream@tuesday) told stream; zfs "$@" | head -c 100000
            for i in $(seq 900); do printf x; sleep 1; done; exit ;;
        "send "*backuppool/words@tuesday) told words; zfs "$@" | head -c 100000; yes 'there is no end of this' >&2; exit ;;
    """
    with lying(site, lies):
        said = measured(site, dict.fromkeys(trees, ""))
    assert said["listing"].startswith("3 zfs_replicate: offsite/listing: "), said["listing"]
    for tree in ("stream", "words"):
        assert said[tree].startswith(f"1 zfs_replicate: offsite/{tree}: "), said[tree]
    assert_over_and_repaired(site, *trees)


@pytest.mark.full
def test_answer_or_stream_without_end_is_ended(site: Site) -> None:
    """Answers without end on either stream, too long an estimate, a name too deep, and a stream that ends in noise."""
    expected = {"stdout": 3, "stderr": 3, "slashes": 3, "noise": 1, "estimate": 0}
    plant_trees(site, *expected)
    lies = r"""
        "list "*backuppool/stdout*) told stdout; zfs "$@"; yes "$(zfs "$@" | tail -n 1)"; exit ;;
        "list "*backuppool/stderr*) told stderr; zfs "$@"; yes 'there is no end of this' >&2; exit ;;
        "list "*backuppool/slashes*) told slashes
            zfs "$@" | sed "p;s#^backuppool/slashes#&$(printf '/x%.0s' $(seq 20000))#"; exit ;;
        "send -nP "*backuppool/estimate@tuesday) told estimate; yes 'there is no size in this' | head -c 10000000; exit ;;
        "send "*backuppool/noise@tuesday) told noise; zfs "$@" | head -c 100000; exec cat /dev/urandom ;;
    """
    with lying(site, lies):
        for tree, status in expected.items():
            said = measured(site, {tree: "--dry-run" if tree == "estimate" else ""})[tree]
            assert said.startswith(f"{status} zfs_replicate: offsite/{tree}" if status else "0 "), said
    assert_over_and_repaired(site, *expected)


# --- Listings ---------------------------------------------------------------------------------------------------------

YEARLY = f"{MIRROR}-yearly"
ASIDE = "www.quarantine-2026-01-01-000000"


def also_called(alias: str, real: str) -> str:
    """Lies by which a dataset is there under another name as well, and may be held and sent under it."""
    forth, both = rf"s#^{real}\([@\t]\)#{alias}\1#", f"alias={alias} real={real}"
    return rf"""
        "list "*) told list; zfs "$@" | sed -n 'p;{forth}p'; exit ;;
        "holds "*) {both}; shift; for it; do case $it in -*) ;;
            $alias@*) zfs holds -H "${{it/$alias/$real}}" | sed '{forth}' ;; *) zfs holds -H "$it" ;; esac; done; exit ;;
        "hold "*{alias}@*|"release "*{alias}@*) {both}; verb=$1 tag=$2; shift 2
            for it; do zfs $verb "$tag" "${{it/$alias/$real}}"; done 2>/dev/null; exit 0 ;;
        "send "*{alias}@*) {both}; zfs "${{@//$alias/$real}}"; exit ;;
    """


def listed(command: str) -> str:
    """A lie of all listings; `command` changes the true ones."""
    return f'"list "*) told list; zfs "$@" | {command}; exit ;;'


LISTINGS = {
    "a neighbour of ours": also_called(f"{TREE}-yearly", TREE),
    "beside the tree": also_called(f"{TREE}0", f"{TREE}/www"),
    "above the tree": listed(rf"sed -n 'p;s#^{TREE}\([@\t]\)#backuppool/virt\1#p'"),
    "nothing": listed("true"),
    "not the root": listed(rf"sed '\#^{TREE}[@\t]#d'"),
    "points of no dataset": listed(rf"sed '\#^{TREE}/www\t#d'"),
    "rows twice": listed("sed -n 'p;p'"),
    "a byte 0xff": listed(rf"LC_ALL=C sed -n 'p;s#^{TREE}/www#{TREE}/w\xffw#p'"),
    "a grandchild of nobody": listed(rf"sed -n 'p;s#^{TREE}/www#{TREE}/no/body#p'"),
    "what was set aside": also_called(f"{TREE}/{ASIDE}", f"{TREE}/www"),
}


@pytest.mark.full
def test_listing_of_another_tree_is_not_believed(site: Site) -> None:
    """With another mirror beside this one, and one that was set aside in it; long after all of it would have expired."""
    site.source.run(f"zfs create -p {TREE}/www")
    for day in ("monday", "tuesday", "wednesday"):
        site.snapshot(day)
    site.replicate_silently("-I")
    site.backup.run(f"zfs rename {MIRROR}/www {MIRROR}/{ASIDE}")
    yearly = f"zfs_replicate -h source -r {TREE} -l {YEARLY} -t years -I"
    site.replicate_silently(job=yearly)
    site.source.shift_clock(40)
    site.backup.shift_clock(40)
    site.snapshot("now")
    assert f"{TREE}/www@wednesday held by {TAG}, and there is no mirror of it here" in site.replicate().stderr
    wrong = []
    before = state(site.backup)
    for what, lies in LISTINGS.items():
        aside = what == "what was set aside"
        with lying(site, lies):
            done = site.backup.run(f"{JOB} -k 30", check=False, timeout=600)
        after = state(site.backup)
        # What is set aside there is left alone, so the rest is done: this line's own old snapshots expire.
        expired = [it for it in changes(before, after) if re.match(rf"- {MIRROR}@(monday|tuesday|wednesday)\t", it)]
        wrong += [f"{what}: {it}" for it in changes(before, after) if not (aside and it in expired)]
        if done.returncode != (0 if aside else 3) or "Traceback" in done.stderr:
            wrong.append(f"{what}: exit {done.returncode}: {done.stderr!r}")
        if not aside and not re.search("source|backuppool", done.stderr):
            wrong.append(f"{what}: it is not said what: {done.stderr!r}")
        before = after
    assert not wrong, "\n".join(wrong)

    # A lie that is told only when streams have come, and words of the source that are those of a receiver.
    site.snapshot("later")
    sent = f'"send "*) told send; echo "cannot receive: {MIRROR} has been modified since most recent snapshot" >&2; exit 1 ;;'
    for override in ("--quarantine", "--rollback"):
        with lying(site, sent):
            done = attempt(site, override, "-k", "30")
        assert done.returncode == 1, done.stderr
        assert changes(before, state(site.backup)) == [], done.stderr
    beside = state(site.backup, YEARLY)
    late = rf"""
        "send "*) touch /run/zfs.sent ;;
        "list "*) [ ! -e /run/zfs.sent ] || {{ told list; zfs "$@" | sed -n 'p;s#^{TREE}\([@\t]\)#{TREE}-yearly\1#p'; exit; }} ;;
    """
    with lying(site, late):
        done = attempt(site, "-k", "30")
    assert done.returncode in (1, 3), done.stderr
    assert changes(beside, state(site.backup, YEARLY)) == [], done.stderr
    site.replicate_silently("-k", "30")
    assert names(site.backup, MIRROR) == ["now", "later"]
    assert names(site.backup, f"{MIRROR}/{ASIDE}") == ["monday", "tuesday", "wednesday"]
    assert changes(beside, state(site.backup, YEARLY)) == []
    site.assert_in_step()
    assert get(site.backup, "readonly", YEARLY) == ["on"]
