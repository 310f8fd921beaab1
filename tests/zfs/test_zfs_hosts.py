"""Between real machines: logins that fail, other shells, chains, overlapping runs, real cron."""

from __future__ import annotations

import email
import re
import time
from typing import TYPE_CHECKING

import pytest
from site_pair import JOB, MIRROR, PROGRAM, TAG, TREE, get, held, history, names, renew

if TYPE_CHECKING:
    from lab import Machine
    from site_pair import Site

pytestmark = pytest.mark.zfs


@pytest.mark.full
def test_host_that_is_unreachable_is_named(site: Site) -> None:
    done = site.replicate(status=3, job=f"zfs_replicate -h source -p 2 -r {TREE} -l {MIRROR} -t {TAG}")
    assert "cannot reach source port 2" in done.stderr
    done = site.replicate(status=3, job=f"zfs_replicate -h nowhere.invalid -r {TREE} -l {MIRROR} -t {TAG}")
    assert "cannot reach nowhere.invalid port 22" in done.stderr


@pytest.mark.full
def test_host_key_unknown_is_refused_with_the_remedy(site: Site) -> None:
    site.backup.write("/root/.ssh/config", "Host source\n  GlobalKnownHostsFile none\n")
    try:
        done = site.replicate(status=3)
    finally:
        site.backup.run("rm /root/.ssh/config")
    assert "the host key of source is not known here (ssh-ed25519 SHA256:" in done.stderr
    assert "log in once by hand" in done.stderr


@pytest.mark.full
def test_identity_that_is_wrong_is_refused_with_the_remedy(site: Site) -> None:
    site.backup.run("rm -f /root/stranger*; ssh-keygen -q -t ed25519 -N '' -f /root/stranger")
    done = site.replicate("-i", "/root/stranger", status=3)
    assert "does not accept our login (/root/stranger)" in done.stderr
    assert "ssh -i /root/stranger -o IdentitiesOnly=yes source true" in done.stderr


def test_ssh_config_rules_both_connections(site: Site) -> None:
    """Alias, user, port, key, proxy jump over the backup machine itself, known_hosts under another name."""
    site.plant()
    site.snapshot("monday")
    site.source.run(
        "useradd -o -u 0 -g 0 -m -d /home/toor -s /bin/sh toor 2>/dev/null || true; "
        "printf 'Port 22\\nPort 2222\\n' > /etc/ssh/sshd_config.d/port.conf && systemctl restart ssh && "
        "mkdir -p /home/toor/.ssh"
    )
    site.backup.run("rm -f /root/toor*; ssh-keygen -q -t ed25519 -N '' -f /root/toor")
    site.source.write("/home/toor/.ssh/authorized_keys", site.backup.read("/root/toor.pub"))
    site.backup.run("awk '/source/ { $1 = \"the-source\"; print }' /etc/ssh/ssh_known_hosts > /root/known")
    site.backup.write(
        "/root/.ssh/config",
        "Host vault\n  HostName source\n  User toor\n  Port 2222\n  IdentityFile /root/toor\n  IdentitiesOnly yes\n"
        "  HostKeyAlias the-source\n  UserKnownHostsFile /root/known\n  GlobalKnownHostsFile none\n  ProxyJump backup\n",
    )
    try:
        site.replicate_silently(job=JOB.replace("-h source", "-h vault"))
        site.snapshot("tuesday")
        site.backup.run(
            "sed -i 's/ProxyJump .*/ProxyCommand ssh -W %h:%p -o UserKnownHostsFile=none backup/' /root/.ssh/config"
        )
        site.replicate_silently(job=JOB.replace("-h source", "-h vault"))
    finally:
        site.backup.run("rm /root/.ssh/config")
        site.source.run("rm /etc/ssh/sshd_config.d/port.conf && systemctl restart ssh")
    assert names(site.backup, MIRROR) == ["monday", "tuesday"]


@pytest.mark.full
def test_login_shell_may_be_csh(site: Site) -> None:
    site.plant("my files")
    site.snapshot("day one ")
    site.source.run(
        "useradd -o -u 0 -g 0 -m -d /home/csher -s /bin/tcsh csher 2>/dev/null || true; "
        "mkdir -p /home/csher/.ssh && cp /root/.ssh/authorized_keys /home/csher/.ssh/"
    )
    site.replicate_silently(job=JOB.replace("-h source", "-h csher@source"))
    site.assert_in_step()


def test_chain_of_three_hosts_with_one_tag(site: Site) -> None:
    with site.pair.third() as third:
        renew(third, "vault")
        chain(site, third)


def chain(site: Site, third: Machine) -> None:
    site.plant("www")
    onward = f"zfs_replicate -h backup -r {MIRROR} -l vault/machines -t {TAG} -k 30"
    for day in ("monday", "tuesday"):
        site.write(day, "www")
        site.snapshot(day)
        site.replicate_silently("-k", "30")
        done = third.run(onward)
        assert done.stdout + done.stderr == ""
    site.assert_in_step()
    for child in ("", "/www", "/disk"):
        assert names(third, f"vault/machines{child}") == ["monday", "tuesday"]
        assert history(third, "vault/machines")[child][-1].guid == history(site.source, TREE)[child][-1].guid
    assert held(site.backup, MIRROR, TAG) == {f"{MIRROR}{child}@tuesday" for child in ("", "/www", "/disk")}
    assert site.checksums(third, "vault/machines") == site.checksums(site.source, TREE)
    assert site.backup.run(f"{JOB} -k 30").stderr == ""


@pytest.mark.full
def test_second_run_leaves_silently(site: Site) -> None:
    site.source.run(f"zfs create -p {TREE} && head -c 80M /dev/urandom > /{TREE}/big")
    site.snapshot("monday")
    first = site.backup.popen(JOB)
    site.backup.run("for i in $(seq 300); do pgrep -x mbuffer && exit; sleep 0.1; done; exit 1")
    done = site.replicate("-v")
    assert "another run is at work" in done.stderr
    assert first.poll() is None, "the first run ended before the second: nothing was tested"
    assert first.wait(timeout=300) == 0
    site.assert_in_step()


@pytest.mark.full
def test_stream_goes_without_mbuffer(site: Site) -> None:
    site.plant()
    site.snapshot("monday")
    site.backup.run("mv /usr/bin/mbuffer /root/mbuffer.away")
    try:
        assert "mbuffer is not installed here" in site.replicate("-v").stderr
    finally:
        site.backup.run("mv /root/mbuffer.away /usr/bin/mbuffer")
    site.assert_in_step()


README = (PROGRAM.parent / "README.md").read_text(encoding="utf-8")


def accounts(site: Site) -> str:
    """An account on each machine, and the job from the one here to the one there."""
    site.source.run("id puller || useradd -m puller; [ $(id -u puller) != 0 ]")
    site.backup.run(
        "id keeper || useradd -m keeper; rm -rf ~keeper/.ssh; "
        "su keeper -c 'mkdir -m 700 ~/.ssh && ssh-keygen -q -t ed25519 -N \"\" -f ~/.ssh/id_ed25519'"
    )
    site.source.write("/home/puller/.ssh/authorized_keys", site.backup.read("/home/keeper/.ssh/id_ed25519.pub"))
    return f"su keeper -c '{JOB.replace('-h source', '-h puller@source')} -k 30'"


@pytest.mark.full
def test_readme_setup_with_sudo(site: Site) -> None:
    rule = re.findall("^    (puller ALL=.*)$", README, re.MULTILINE)[0]
    job = accounts(site)
    site.plant("www")
    site.snapshot("monday")
    done = site.replicate(status=3, job=f"{job[:-1]} --sudo remote'")
    assert "zfs list failed on puller@source: sudo: a password is required" in done.stderr
    job = f"{job[:-1]} --sudo both'"
    site.source.write("/etc/sudoers.d/zfs_replicate", rule + "\n", 0o440)
    site.backup.write("/etc/sudoers.d/zfs_replicate", rule.replace("puller", "keeper") + "\n", 0o440)
    try:
        assert "!!" not in site.replicate(job=f"{job[:-1]} --doctor'").stdout
        site.replicate_silently(job=job)
        site.write("two", "www")
        site.snapshot("tuesday")
        site.replicate_silently(job=job)
        site.replicate_silently(job=job)
    finally:
        for machine in (site.source, site.backup):
            machine.run("rm /etc/sudoers.d/zfs_replicate")
    site.assert_in_step()
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)


def test_readme_setup_without_root(site: Site) -> None:
    allow_there, *allow_here = re.findall("^    (zfs allow .*)$", README, re.MULTILINE)
    job = accounts(site)
    site.plant("www")
    doctor = f"{job[:-1]} --doctor'"
    site.source.run(allow_there)
    site.backup.run(allow_here[1])
    said = site.replicate(job=doctor, status=1).stdout
    assert "ok  puller@source: puller has all rights\n" in said
    lacking = re.search("^!!  this host: keeper lacks rights on offsite: (.*)$", said, re.MULTILINE)
    assert lacking
    assert {"canmount", "create", "destroy", "devices", "hold", "mount", "quota", "receive", "zoned"} < {
        *lacking[1].split(",")
    }
    site.backup.run(allow_here[0])
    assert "ok  this host: keeper has all rights\n" in site.replicate(job=doctor, status=1).stdout
    site.source.run(f"zfs set recordsize=32K quota=1G sharenfs=off com.example:owner=us {TREE}/www")
    site.snapshot("monday")
    assert "!!" not in site.replicate(job=doctor).stdout
    site.replicate_silently(job=job)
    site.source.shift_clock(40)
    site.backup.shift_clock(40)
    site.write("two", "www")
    site.snapshot("tuesday")
    site.replicate_silently(job=job)
    assert names(site.backup, f"{MIRROR}/www") == ["tuesday"]
    asked = "recordsize,quota,com.example:owner,readonly"
    assert get(site.backup, asked, f"{MIRROR}/www") == ["32768", "0", "us", "on"]
    site.assert_in_step()
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)


def test_cron_is_silent_on_success_and_mails_a_failure(site: Site) -> None:
    """The program is one copied file here, beside the distribution's paramiko."""
    site.plant("www")
    site.snapshot("monday")
    site.backup.put(PROGRAM, "/root/bin/zfs_replicate", 0o755)
    site.backup.run("rm -f /var/mail/root; systemctl start cron")
    cron = f"PATH=/root/bin:/usr/bin:/bin\nMAILTO=root\n* * * * * root {JOB} -k 30 && touch /run/cron.passed || touch /run/cron.failed\n"
    absent = "cannot open 'backuppool/gone': dataset does not exist"
    try:
        site.backup.write("/etc/cron.d/mirror", cron)
        wait_for(site, "/run/cron.passed")
        site.assert_in_step()
        assert site.backup.run("cat /var/mail/root 2>/dev/null || true").stdout == ""
        site.backup.write("/etc/cron.d/mirror", cron.replace(TREE, "backuppool/gone"))
        wait_for(site, "/run/cron.failed")
        wait_for(site, "/var/mail/root")
        mail = email.message_from_string(site.backup.read("/var/mail/root").partition("\n")[2])
        body = mail.get_payload(decode=True)
        hint = "    check -r; is the pool imported there? zpool import backuppool\n"
        assert body == f"zfs_replicate: {MIRROR}: zfs list failed on source: {absent}\n{hint}".encode()
        site.backup.run("rm /run/cron.passed")
        site.snapshot("tuesday")
        site.backup.write("/etc/cron.d/mirror", cron)
        wait_for(site, "/run/cron.passed")
        site.assert_in_step()
        mails = site.backup.read("/var/mail/root")  # two minutes may have gone: of each that failed there is one
        assert mails.count("\nSubject: ") == mails.count("is the pool imported there?"), "the recovery is silent"
    finally:
        site.backup.run(
            "rm -f /etc/cron.d/mirror /root/bin/zfs_replicate /run/cron.* /var/mail/root; systemctl stop cron"
        )


def wait_for(site: Site, path: str) -> None:
    deadline = time.monotonic() + 150
    while site.backup.run(f"test -s {path} || test -e {path}", check=False).returncode:
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(1)
