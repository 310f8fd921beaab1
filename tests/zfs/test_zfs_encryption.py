"""Encrypted datasets: sent raw and opened at the mirror, or decrypted; never one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from site_pair import MIRROR, TREE, get, names

if TYPE_CHECKING:
    from lab import Machine
    from site_pair import Site

pytestmark = pytest.mark.zfs

CHILDREN = ("", "/child", "/own", "/plain", "/plain/secret", "/disk")
ENCRYPTED = ("", "/child", "/own", "/plain/secret", "/disk")


KEYS = {"one": "1" * 64, "two": "2" * 64, "local": "3" * 64, "another": "4" * 64}
"""In hex: to make a key of a passphrase takes an emulated processor seconds, each time."""


def encrypted(key: str) -> str:
    return f"-o encryption=on -o keyformat=hex -o keylocation=file:///root/{key}"


def plant(site: Site) -> None:
    """A tree under one key: a child and a volume under the same, one under its own, a plain one with one below."""
    for key in ("one", "two"):
        site.source.write(f"/root/{key}", KEYS[key])
    site.source.run(
        f"""
        zfs create -p {TREE.rpartition("/")[0]} && zfs create {encrypted("one")} {TREE} && zfs create {TREE}/child &&
        zfs create {encrypted("two")} {TREE}/own && zfs create -o encryption=off {TREE}/plain &&
        zfs create {encrypted("two")} {TREE}/plain/secret && zfs create -V 16M {TREE}/disk
        """
    )
    site.write("one", "child", "own", "plain", "plain/secret")


def lock(machine: Machine) -> None:
    machine.run("zfs unmount -a; zfs unload-key -a")


def unlock(machine: Machine) -> None:
    machine.run("zfs load-key -a && zfs mount -a && udevadm settle")


def of_each(machine: Machine, name: str, root: str, children: tuple[str, ...]) -> list[str]:
    return [get(machine, name, root + child)[0] for child in children]


@pytest.mark.full
def test_raw_mirror_needs_no_key_and_opens_with_it(site: Site) -> None:
    plant(site)
    site.snapshot("monday")
    lock(site.source)
    site.replicate_silently("-I")
    site.assert_in_step()
    assert of_each(site.backup, "keystatus", MIRROR, ENCRYPTED) == ["unavailable"] * 5
    assert get(site.backup, "encryption", f"{MIRROR}/plain") == ["off"]

    unlock(site.source)
    site.write("two", "child", "own", "plain", "plain/secret")
    site.source.write("/root/one", KEYS["another"])
    site.source.run(f"zfs change-key {TREE}")
    for day in ("tuesday", "wednesday"):
        site.snapshot(day)
    site.replicate_silently("-I")
    site.assert_in_step()

    # Plain increments onto a raw mirror are what zfs itself lets pass, and what spoils it.
    site.snapshot("thursday")
    done = site.replicate("--decrypt", status=1)
    assert f"{MIRROR}/own was received raw (encrypted) from {TREE}/own" in done.stderr
    assert done.stderr.count("leave --decrypt out") == 5
    assert of_each(site.backup, "keystatus", MIRROR, ENCRYPTED) == ["unavailable"] * 5
    site.replicate_silently("-I")

    for key in ("another", "two"):
        site.backup.write(f"/root/{key}", KEYS[key])
    for child, key in zip(ENCRYPTED, ("another", "another", "two", "two", "another")):
        site.backup.run(f"zfs load-key -L file:///root/{key} {MIRROR}{child}")
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)
    for child in CHILDREN:
        assert names(site.backup, MIRROR + child) == ["monday", "tuesday", "wednesday", "thursday"]


@pytest.mark.full
def test_decrypted_mirror_is_under_the_key_of_the_local_parent(site: Site) -> None:
    plant(site)
    parent = MIRROR.rpartition("/")[0]
    site.backup.write("/root/local", KEYS["local"])
    site.backup.run(f"zfs create {encrypted('local')} {parent}")
    site.snapshot("monday")
    lock(site.source)
    done = site.replicate("--decrypt", status=1)
    assert "dataset key must be loaded" in done.stderr
    assert "load it at the source" in done.stderr
    unlock(site.source)
    site.replicate_silently("--decrypt")
    site.write("two", "child", "own", "plain", "plain/secret")
    site.snapshot("tuesday")
    site.replicate_silently("--decrypt")
    site.assert_in_step()
    assert of_each(site.backup, "encryptionroot", MIRROR, CHILDREN) == [parent] * 6
    assert site.checksums(site.backup, MIRROR) == site.checksums(site.source, TREE)

    site.snapshot("wednesday")
    done = site.replicate(status=1)
    assert done.stderr.count("add --decrypt, to go on as it began") == 5
    lock(site.backup)
    done = site.replicate("--decrypt", status=1)
    assert "inherited key must be loaded" in done.stderr
    assert "load the key of the local parent" in done.stderr
    unlock(site.backup)
    site.replicate_silently("--decrypt")
    site.assert_in_step()
