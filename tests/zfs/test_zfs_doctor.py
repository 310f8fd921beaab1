"""--doctor finds what is wrong with a setup, says what to do, and changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from site_pair import MIRROR, TREE

if TYPE_CHECKING:
    import subprocess

    from site_pair import Site

pytestmark = pytest.mark.zfs

STATE = """
zfs list -Hp -r -t all -o name,guid,createtxg,userrefs,receive_resume_token
zfs get -Hp -r -s local,received all; zpool get -Hp all | grep -v 'size\\|alloc\\|free\\|fragment\\|capacity'
zfs list -H -o name -t snapshot | xargs -r zfs holds -H
"""


def doctor(site: Site, *options: str, status: int) -> list[str]:
    """What it says of both machines, which must be as they were."""
    before = [machine.run(STATE).stdout for machine in (site.source, site.backup)]
    done: subprocess.CompletedProcess[str] = site.replicate("--doctor", *options, status=status)
    assert [machine.run(STATE).stdout for machine in (site.source, site.backup)] == before
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.full
def test_doctor_before_the_first_run_and_when_all_is_well(site: Site) -> None:
    site.plant("www")
    said = doctor(site, status=1)
    at = said.index(f"!!  {TREE}: 3 datasets, 0 snapshots")
    assert said[at + 1] == "    make snapshots at the source: there is nothing to pull"
    site.snapshot("monday")
    said = doctor(site, status=0)
    assert f"ok  {MIRROR}: 3 to be pulled" in said
    assert any(" bytes available, " in line for line in said)
    site.replicate_silently()
    said = doctor(site, status=0)
    assert all(line.startswith("ok  ") for line in said), said
    assert f"ok  {MIRROR}: 3 in step" in said
    assert f"ok  {MIRROR}: read-only, not mounted, not shared" in said
    assert "ok  offsite: ONLINE" in said
    assert sum("OpenZFS zfs-" in line for line in said) == 2


def test_doctor_names_what_is_wrong_with_its_remedy(site: Site) -> None:
    site.plant("www", "mail")
    site.snapshot("monday")
    site.replicate_silently()
    site.backup.run(
        f"""
        mv /usr/bin/mbuffer /root/mbuffer.away; zfs snapshot {MIRROR}/mail@mine &&
        zfs set readonly=off canmount=on {MIRROR}/www && zfs mount {MIRROR}/www
        """
    )
    site.snapshot("tuesday")
    site.backup.shift_clock(1 / 24)
    try:
        said = doctor(site, status=1)
    finally:
        site.backup.run("mv /root/mbuffer.away /usr/bin/mbuffer")
    remedies = {said[at]: said[at + 1].strip() for at, line in enumerate(said) if line.startswith("!!")}
    assert remedies.pop("!!  mbuffer: missing") == "apt install mbuffer"
    (skew,) = [line for line in remedies if "clocks: " in line]
    assert "NTP" in remedies.pop(skew)
    (blocked,) = [line for line in remedies if f"{MIRROR}/mail has 1 local snapshot newer" in line]
    assert remedies.pop(blocked).endswith("--quarantine")
    (open_one,) = [line for line in remedies if f"{MIRROR}/www: readonly=off, canmount=on, mounted=yes" in line]
    remedy = remedies.pop(open_one)
    assert not remedies
    site.backup.run(f"zfs rollback -r {MIRROR}/mail@monday; {remedy}")
    site.backup.shift_clock(-1 / 24)
    doctor(site, status=0)


@pytest.mark.full
def test_doctor_finds_a_hold_of_ours_and_a_run_releases_it(site: Site) -> None:
    site.plant("www")
    for day in ("monday", "tuesday"):
        site.snapshot(day)
        site.replicate_silently()
    site.source.run(f"zfs hold offsite {TREE}/www@monday")
    site.replicate_silently()
    site.assert_in_step()
    doctor(site, status=0)


@pytest.mark.full
def test_doctor_names_a_host_that_is_not_reached(site: Site) -> None:
    done = site.backup.run(f"zfs_replicate -h source -p 2 -r {TREE} -l {MIRROR} -t x --doctor", check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("!!  cannot reach source port 2")
