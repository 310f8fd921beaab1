"""What people's hosts do, by their public reports: logins that print, refuse, or take short words only, ciphers that
both sides do not share, half a listing. Where each comes from says its docstring."""

from __future__ import annotations

import contextlib
import re
import shlex
from typing import TYPE_CHECKING

import pytest
from site_pair import JOB, MIRROR, TAG, TREE, held, history, names
from test_zfs_hostile import attempt, changes, state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import Machine
    from site_pair import Site

pytestmark = pytest.mark.zfs


def account(site: Site, name: str, shell: str = "/bin/bash", restriction: str = "") -> str:
    """A login at the source that is root by another name, with a shell and files of its own; `restriction` stands
    before the key in authorized_keys. Returns the crontab line that uses it."""
    site.source.run(f"id {name} 2>/dev/null || useradd -o -u 0 -g 0 -m -d /home/{name} -s {shell} {name}")
    key = site.backup.read("/root/.ssh/id_ed25519.pub")
    site.source.write(f"/home/{name}/.ssh/authorized_keys", f"{restriction} {key}".lstrip(), 0o600)
    return JOB.replace("-h source", f"-h {name}@source")


# --- What the other side says ----------------------------------------------------------------------------------------

MODES = {"": 3, "--dry-run": 3, "--status": 3, "--doctor": 1}
"""With the exit code of each where the source does not answer as zfs does."""


def assert_told(site: Site, job: str, *facts: str) -> None:
    """Every mode tells what the other side has said and why, and nothing changes on either side."""
    before = [state(site.source, "backuppool"), state(site.backup)]
    for mode, status in MODES.items():
        done = attempt(site, *filter(None, [mode]), job=job)
        said = done.stdout + done.stderr
        assert done.returncode == status, f"{mode}: exit {done.returncode}: {said}"
        lacking = [fact for fact in facts if not re.search(fact, said, re.IGNORECASE)]
        assert not lacking, f"{mode}: it does not say {lacking}: {said}"
    after = [state(site.source, "backuppool"), state(site.backup)]
    assert [changes(*both) for both in zip(before, after)] == [[], []]


def mirrored(site: Site) -> None:
    """A small mirror that is in step, and something to pull."""
    site.source.run(f"zfs create -p {TREE}/www")
    site.snapshot("monday")
    site.replicate_silently()
    site.snapshot("tuesday")


def test_login_shell_that_prints_is_told_with_the_files_to_mend(site: Site) -> None:
    """Debian's bash reads ~/.bashrc also for `ssh HOST COMMAND`. https://github.com/pgbackrest/pgbackrest/pull/2815"""
    mirrored(site)
    job = account(site, "chatty")
    site.source.write("/home/chatty/.bashrc", 'echo "Welcome to $(hostname)"\n')
    assert site.backup.run("ssh chatty@source echo here").stdout == "Welcome to source\nhere\n"
    assert_told(site, job, "Welcome to source", r"\.bashrc")
    site.source.write("/home/chatty/.bashrc", 'case $- in *i*) echo "Welcome to $(hostname)" ;; esac\n')
    site.replicate_silently(job=job)
    site.assert_in_step()


def forced(status: int) -> str:
    """As cloud images have it for root."""
    return (
        rf"""command="echo 'Please login as the user \"debian\" rather than the user \"root\".';echo;exit {status}" """
    )


@pytest.mark.parametrize("status", [pytest.param(0, marks=pytest.mark.full), 142])
def test_forced_command_that_only_talks_is_quoted(site: Site, status: int) -> None:
    """It prints on stdout whom to log in as, and ends with that status.
    https://github.com/canonical/cloud-init/issues/2534"""
    mirrored(site)
    job = account(site, f"forced{status}", restriction=forced(status))
    done = site.backup.run(f"ssh forced{status}@source zfs version", check=False)
    assert (done.returncode, done.stdout[:12]) == (status, "Please login")
    assert_told(site, job, "Please login as the user", "authorized_keys|forced command")


@pytest.mark.full
def test_account_that_may_not_log_in_is_quoted(site: Site) -> None:
    """nologin says so on stdout, and ends with 1. https://github.com/teemtee/tmt/pull/748"""
    mirrored(site)
    job = account(site, "barred", "/usr/sbin/nologin")
    assert site.backup.run("ssh barred@source zfs version", check=False).returncode == 1
    assert_told(site, job, r"This account is currently not available\.", "login shell|nologin|usermod|chsh")


# --- Logins ----------------------------------------------------------------------------------------------------------


def test_user_name_with_an_at_sign_is_split_as_ssh_does(site: Site) -> None:
    """At the last one. https://github.com/blinksh/blink/issues/1303"""
    name = "puller@corp.example"
    site.source.run(
        f"grep -q '^{name}:' /etc/passwd || {{ echo '{name}:x:0:0::/home/corp:/bin/sh' >> /etc/passwd && "
        f"echo '{name}:*:19000:0:99999:7:::' >> /etc/shadow; }}"
    )
    site.source.write("/home/corp/.ssh/authorized_keys", site.backup.read("/root/.ssh/id_ed25519.pub"), 0o600)
    assert site.backup.run(f"ssh {name}@source id -u").stdout == "0\n"
    mirrored(site)
    before = len(site.source.ssh_log())
    site.replicate_silently(job=JOB.replace("-h source", f"-h {name}@source"))
    logins = [line for line in site.source.ssh_log()[before:] if line.startswith("Accepted ")]
    assert logins
    assert all(f" for {name} from " in line for line in logins)
    site.assert_in_step()


# --- Half a listing --------------------------------------------------------------------------------------------------

DAMAGED = """\
#!/bin/bash
# The list of all below ROOT lacks one child, as if that could not be read.
case "$* " in
    "list "*" -"[rd]" "*" ROOT "*)
        /usr/sbin/zfs "$@" | sed '\\|^ROOT/CHILD[@\\t]|d'
        echo 'cannot iterate filesystems: I/O error' >&2
        exit 1 ;;
esac
exec /usr/sbin/zfs "$@"
"""


@contextlib.contextmanager
def damaged(machine: Machine, root: str, child: str) -> Iterator[None]:
    """While `zfs list` on a machine cannot read a child of that dataset."""
    text = DAMAGED.replace("ROOT", root).replace("CHILD", child)
    machine.write("/usr/local/bin/zfs", text, 0o755)
    try:
        yield
    finally:
        machine.run("rm /usr/local/bin/zfs")


@pytest.mark.parametrize("where", ["source", pytest.param("backup", marks=pytest.mark.full)])
def test_half_a_listing_is_pulled_and_nothing_taken_for_gone(site: Site, where: str) -> None:
    """One damaged dataset, and `zfs list` prints the others, fails, and says so.
    https://github.com/openzfs/zfs/issues/12566"""
    site.source.run(f"for it in db mail www; do zfs create -p {TREE}/$it || exit; done")
    for day in ("monday", "tuesday"):
        site.snapshot(day)
    site.replicate_silently("-I")
    for machine in (site.source, site.backup):
        machine.shift_clock(40)
    site.snapshot("now")
    before = history(site.backup, MIRROR)
    with damaged(*((site.source, TREE) if where == "source" else (site.backup, MIRROR)), "mail"):
        done = site.replicate("-v", "-k", "30", status=1)
    assert "cannot iterate filesystems: I/O error" in done.stderr
    assert "no longer exists at the source" not in done.stderr
    now = history(site.backup, MIRROR)
    assert now.keys() == before.keys()
    assert {key: points[:2] for key, points in now.items()} == before, "nothing expires"
    for child in ("db", "www"):
        assert names(site.backup, f"{MIRROR}/{child}") == ["monday", "tuesday", "now"]
    assert held(site.source, f"{TREE}/mail", TAG)
    assert held(site.backup, f"{MIRROR}/mail", f"{TAG}:received")

    site.replicate_silently("-k", "30")
    site.assert_in_step()
    assert {key: len(points) for key, points in history(site.backup, MIRROR).items()} == dict.fromkeys(before, 1)


# --- Terminals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(it, marks=pytest.mark.full) for it in ("latin-1", "utf-8"))]
)
def test_dry_run_on_a_terminal_of_another_encoding(site: Site, encoding: str) -> None:
    """What it tells of holds has their tags in it, which may be any bytes. (Found while reading, without a report.)"""
    site.source.run(f"zfs create -p {TREE}/www")
    site.snapshot("monday")
    site.replicate_silently()
    site.backup.run(f"zfs hold \"$(printf 'caf\\351')\" {MIRROR}/www@monday && zfs hold café {MIRROR}/www@monday")
    for machine in (site.source, site.backup):
        machine.shift_clock(40)
    site.snapshot("now")
    line = f"env PYTHONUTF8=0 PYTHONIOENCODING={encoding} {JOB} --dry-run -k 30"
    done = site.backup.run(f"script -qec {shlex.quote(line)} /dev/null", check=False, timeout=300)
    assert "Traceback" not in done.stdout
    assert done.returncode == 0, done.stdout
    assert re.search(rf"{MIRROR}/www@monday: .*kept: held by .*caf", done.stdout)
    assert f"{MIRROR}/www: pull @monday -> @now" in done.stdout
