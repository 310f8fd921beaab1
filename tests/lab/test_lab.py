"""The lab itself: are its machines different, connected, and do they fail the way they are told to?"""

from __future__ import annotations

import datetime as dt
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from lab_image import RELEASES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import Lab, Machine

pytestmark = pytest.mark.zfs

OPENZFS = {"bookworm": "2.1", "trixie": "2.3", "backports": "2.4"}
HELLO = "ssh -o ConnectTimeout=3 source hostname"


@pytest.fixture(scope="module", params=RELEASES)
def machines(request: pytest.FixtureRequest, free_lab: Lab) -> Iterator[list[Machine]]:
    """`source` and `backup` of one release, each with a pool `tank`."""
    started = free_lab.machines(["source", "backup"], request.param)
    for machine in started:
        machine.run("zpool create tank /dev/disk/by-id/virtio-data")
    yield started
    for machine in started:
        machine.close()


@pytest.mark.each
def test_release_has_its_openzfs(machines: list[Machine]) -> None:
    for machine in machines:
        version = OPENZFS[machine.release]
        tools, module = machine.run("zfs version").stdout.split()
        assert tools.startswith(f"zfs-{version}.")
        assert module.startswith(f"zfs-kmod-{version}.")


def test_template_copies_draw_different_guids(machines: list[Machine]) -> None:
    command = "hostid; zpool get -H -o value guid tank; zfs snapshot tank@guid; zfs get -H -o value guid tank@guid"
    ours, theirs = (machine.run(command).stdout.split() for machine in machines)
    assert len(ours) == len(theirs) == 3
    assert not set(ours) & set(theirs)


def test_machines_know_each_other_and_logins_can_be_counted(machines: list[Machine]) -> None:
    source, backup = machines
    before = source.ssh_log()
    assert backup.run(HELLO).stdout == "source\n"
    news = source.ssh_log()[len(before) :]
    assert [line.split()[0] for line in news] == ["Accepted", "Starting"]
    assert source.run(f"ssh {backup.address} hostname").stdout == "backup\n"


def test_mail_to_root_is_delivered(machines: list[Machine]) -> None:
    machines[0].run("echo something failed | sendmail root")
    machines[0].run("for i in $(seq 50); do grep -q 'something failed' /var/mail/root && exit; sleep 0.1; done; exit 1")


def test_files_arrive_unchanged_with_their_mode(machines: list[Machine]) -> None:
    text = "#!/bin/sh\necho 'ä\t\\n'\n\n"
    machines[0].write("/opt/new/directory/program", text, 0o750)
    assert machines[0].read("/opt/new/directory/program") == text
    assert machines[0].run("stat -c %a /opt/new/directory/program").stdout == "750\n"


def test_user_logs_in_with_a_shell_of_his_own(machines: list[Machine]) -> None:
    machines[0].run("id visitor >/dev/null 2>&1 || useradd -m -s /bin/tcsh visitor")
    assert machines[0].run("echo $shell; whoami", user="visitor").stdout == "/bin/tcsh\nvisitor\n"


def test_cable_pulled_cuts_machines_off_but_not_from_us(machines: list[Machine]) -> None:
    source, backup = machines
    source.cable(plugged=False)
    assert backup.run(HELLO, check=False).returncode == 255
    assert source.run("hostname").stdout == "source\n"
    source.cable(plugged=True)
    assert backup.run(HELLO).stdout == "source\n"


def test_freeze_makes_a_peer_hang_until_it_is_thawed(machines: list[Machine]) -> None:
    source, backup = machines
    asking = backup.popen("ssh source 'echo begun; sleep 2; echo done'")
    assert asking.stdout
    assert asking.stdout.readline() == "begun\n"
    source.freeze()
    with pytest.raises(subprocess.TimeoutExpired):
        asking.wait(timeout=5)
    with pytest.raises(subprocess.TimeoutExpired):
        source.run("true", timeout=1)
    source.thaw()
    assert asking.communicate(timeout=30)[0] == "done\n"


def test_netem_delays_the_lab_network(machines: list[Machine]) -> None:
    source, backup = machines
    program = (
        "import socket, time\nt = time.time()\nsocket.create_connection(('source', 22), 9)\nprint(time.time() - t)"
    )
    source.netem(400)
    slow = float(backup.run("python3 -", input=program).stdout)
    source.netem(0)
    fast = float(backup.run("python3 -", input=program).stdout)
    assert fast < 0.4 <= slow


@pytest.mark.full
def test_clock_shift_and_pools_survive_a_power_loss(machines: list[Machine]) -> None:
    source = machines[0]
    guid = source.run("zpool get -H -o value guid tank").stdout
    source.run("zfs create tank/kept && zfs snapshot tank/kept@one && zpool sync")
    source.shift_clock(40)
    source.power_loss()
    source.power_on()
    assert source.run("zpool get -H -o value guid tank && hostname").stdout == f"{guid}source\n"
    assert source.run("zfs list -H -o name -t snapshot tank/kept").stdout == "tank/kept@one\n"
    assert machines[1].run(HELLO).stdout == "source\n"
    ahead = float(source.run("date +%s").stdout) - time.time()
    assert ahead == pytest.approx(dt.timedelta(days=40).total_seconds(), abs=30)
    source.set_clock(dt.datetime.now(dt.timezone.utc))
    assert float(source.run("date +%s").stdout) == pytest.approx(time.time(), abs=5)


def test_reboot_keeps_the_machine_what_it_was(machines: list[Machine]) -> None:
    source = machines[0]
    before = source.run("hostname; hostid; zpool list -H -o name,guid").stdout
    source.reboot()
    assert source.run("hostname; hostid; zpool list -H -o name,guid").stdout == before
