#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["paramiko>=2.12"]
# ///
"""Keep a mirror of ZFS dataset trees, pulled over SSH from cron.

One run finds, for every dataset of a tree, the newest snapshot that both sides have, pulls what is newer, keeps that
common snapshot alive with `zfs hold` on both sides, and expires old local snapshots:

    zfs_replicate -h HOST -r backuppool/virt/machines -l offsite/virt/machines -t offsite -k 30

What it does to your data
    - On the source it changes nothing but holds named TAG (and, with --bookmark, bookmarks named after TAG).
    - Here it adds what it receives. With -k it destroys expired snapshots, but none whose twin on the source carries
      our hold, or might. It never overwrites data.
    - Nothing that the source says or sends destroys a snapshot here, except by -k and --rollback.
    - It rolls local data back (--rollback), or renames it aside (--quarantine), only if that very command line says so.
    - It destroys no dataset, except one that holds nothing but an interrupted first receive which the source, by its
      listing, cannot complete for this command line.
    - Without being asked it renames what was renamed at the source, and what is in the way of that (`MADE_WAY`,
      `BETWEEN_NAMES`, `@NAME.dropped-GUID`). It makes another tool's mirror inert before it pulls into it. And it sets
      the properties `FAILING` and `TAKEN_OVER`. Nothing is lost by these.

How one run goes
    1. lock the local tree, list both trees                                   lock, Run.begin, Lister
    2. plan the whole tree: what --dry-run prints                             Run.execute, TreePlan
    3. follow renames, take overrides, hold all that will be sent, stream:
       ssh HOST zfs send | mbuffer | zfs recv, one dataset behind another     Run.transfer, Executor
    4. list again what was touched, and believe only that; plan anew, until no step is left
    5. move the holds to the new common snapshots, then the bookmarks         Run.update_holds, Holds
    6. destroy local snapshots older than keep-days                           Run.expire
No run depends on any state outside ZFS. Whatever an earlier one left behind, the listing shows it, and the next one
repairs it.

Exit codes (--check has those of monitoring plugins; --doctor ends with 1 if it finds anything)
    0      in step, or nothing to do, or another run of this job is at work and moving
    1      something failed, or is blocked; what else could be done was done
    2      usage
    3      could not start: login, listing, a run of another job on an overlapping tree, or one that is stuck
    128+n  ended by signal n

Words that are not in zfs(8) or ssh(1)
    tree               a dataset with all below it; its datasets are known by their keys
    key                a dataset's name below the root of its tree: "" is the root itself, "/www/logs" a grandchild
    common snapshot    one that both sides have, by guid; the newest one is the base of the next increment
    twin               the snapshot with the same guid on the other side
    tag, received tag  TAG holds at the source, TAG:received here
    placeholder        a local filesystem that is only there as a parent of others
    partial            an interrupted receive that waits for its rest
    override           what --rollback or --quarantine does where nothing else helps
    batch              streams that come one after another through one ssh and one pipe
    inert              read-only, not mounted, not shared, without device nodes, now and after a reboot

Rooms of this file, in reading order; a room uses only rooms above it (and the type `Report`)
    1  Failures      what may go wrong in an expected way, each with its way out
    2  Model         snapshots, datasets, policy; the steps of a plan
    3  Parse         text of zfs to model; nothing is believed that zfs cannot have printed
    4  Plan          what to send, which holds to move, what to expire: pure decisions
    5  Commands      every command as a value: those that look, then those that change something
    6  Hosts         run commands here (subprocess) and on the source (paramiko)
    7  Stream        pipelines of processes, through which batches go; every exit status read
    8  Run           the lock, and the steps above
    9  Inspect       the dry run, --status, --check, --doctor; the end of a mirror (--retire)
    10 Report        what the user sees
    11 Command line  options and main()
Rooms 1 to 5 touch nothing outside this process; time comes in as an argument.

How to audit it
    - What can harm your data: rooms 2 and 4, "Commands that change something" in room 5, room 8, and `retire` in
      room 9. Each changing command begins in room 5 and nowhere else; room 8 only appends names. On this host
      `FencedHost` refuses those that name what is not in the local tree.
    - That listings, bytes and exit statuses are told truthfully: rooms 3, 6 and 7.
    - Looking modes get nothing but `ReadOnly` hosts: see `open_run` and `check` in room 11. Room 10 writes only to the
      terminal, and room 11 the metrics file.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import fnmatch
import functools
import hashlib
import heapq
import io
import itertools
import json
import logging
import os
import pwd
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import syslog
import tempfile
import termios
import threading
import time
import warnings
from base64 import b64encode
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import IO, Any, Callable, NoReturn, Protocol, Union

__version__ = "0.1.0"

# ---------------------------------------------------------------------------------------------------------------------
# Room 1: Failures
# ---------------------------------------------------------------------------------------------------------------------


class Failure(Exception):
    """Something expected went wrong. `what` says what and why, `hint` the way out."""

    # It is printed as one paragraph. Any other exception is a bug, and keeps its traceback.

    def __init__(self, what: str, *hints: str) -> None:
        super().__init__(what, *hints)
        self.what = what
        self.hint = "; ".join(filter(None, hints))

    def __str__(self) -> str:
        return f"{self.what}\n{self.hint}".strip()


# So many lines and bytes are shown of what others said.
MAX_LINES = 10
MAX_EXCERPT = 2048


def printable(text: str) -> str:
    """The text, with an escape for each character that could steer a terminal or reorder others; a TAB as a space."""
    if text.isprintable():
        return text
    shown = []
    for letter in text.replace("\t", " "):
        number = ord(letter)
        if 0xDC80 <= number <= 0xDCFF:  # stands for a byte that is no UTF-8 (https://peps.python.org/pep-0383/)
            number -= 0xDC00
        form = r"\x{:02x}" if number < 0x100 else r"\u{:04x}" if number < 0x10000 else r"\U{:08x}"
        shown.append(letter if letter.isprintable() or letter == "\n" else form.format(number))
    return "".join(shown)


def excerpt(text: str) -> str:
    """The beginning of what somebody else said, printable; `...` if it goes on."""
    lines = text[:MAX_EXCERPT].split("\n")
    whole = printable("\n".join(lines[:MAX_LINES]))
    # Escapes may have made it longer. The cut may go through a character, whose half is dropped.
    head = whole.encode()[:MAX_EXCERPT].decode(errors="ignore")
    is_cut = len(text) > MAX_EXCERPT or len(lines) > MAX_LINES or head != whole
    return head + "..." * is_cut


def few(names: Sequence[str], most: int = 3) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class CommandFailed(Failure):
    """A command ended with a status other than 0."""


class NotBelieved(Failure):
    """A host printed what its zfs cannot have printed. None of it is believed, and nothing is done upon it."""


class LinkLost(Failure):
    """The connection to a host broke, or could not be made. What the command did there is unknown."""


class Stuck(Failure):
    """A command did not finish in time. On a suspended pool every zfs command hangs: ask that host no more."""


class StreamFailed(Failure):
    """A stream did not arrive whole."""

    def __init__(
        self, what: str, *hints: str, link_held: bool = False, sender_said: str = "", receiver_said: str = ""
    ) -> None:
        super().__init__(what, *hints)
        # Whether the sender's own exit status came through: then the link is not to blame.
        self.link_held = link_held
        # What either end said, if it failed. Only the receiver is believed about this side: the sender is another host,
        # and may say what it likes.
        self.sender_said = sender_said
        self.receiver_said = receiver_said


# ---------------------------------------------------------------------------------------------------------------------
# Room 2: Model
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """One point in the history of a dataset; also a bookmark of such a point, whose name has `#` instead of `@`."""

    name: str
    # The same on every pool the snapshot was sent to, whatever it is called there.
    guid: int
    # Orders the snapshots of one pool. The creation, in seconds since 1970, may tie or run backwards.
    createtxg: int
    creation: int
    # Of its holds. None if they could not be read, or were not asked for: never taken for "not held".
    tags: frozenset[str] | None = frozenset()
    # A number that every encrypted snapshot gets and only a raw stream takes along. 0: not encrypted, or not asked for.
    ivset: int = 0
    cloned: bool = False  # a dataset of the tree is its clone

    def may_be_held_by(self, tag: str) -> bool:
        return self.tags is None or tag in self.tags

    @property
    def is_bookmark(self) -> bool:
        return "@" not in self.name

    @property
    def short(self) -> str:
        """The name without its dataset: `@daily` or `#mark`."""
        return self.name[re.search("[@#]", self.name).start() :]  # type: ignore[union-attr]


@dataclass(frozen=True)
class Partial:
    """An interrupted receive that waits for its rest."""

    token: str
    # The snapshot that it was receiving, and the base of that. Both are None if the token was not decoded.
    to_guid: int | None
    from_guid: int | None
    raw: bool = False  # the stream was sent raw
    corrupt: bool = False  # the token cannot be decoded, or the sender will never accept it again
    bytes: int = 0  # of it have arrived


@dataclass(frozen=True)
class Dataset:
    """A filesystem or volume and its history. Snapshots and bookmarks are kept oldest first."""

    name: str
    kind: str
    snapshots: tuple[Snapshot, ...] = ()
    bookmarks: tuple[Snapshot, ...] = ()
    partial: Partial | None = None
    encrypted: bool = False
    compressed: bool = False  # its data are stored compressed
    origin: str = ""  # the snapshot that it is a clone of
    # Snapshots of other datasets of the tree that belong to its history: its origin, and what came before that.
    inherited: tuple[Snapshot, ...] = ()
    # The rest is asked of local datasets only. `empty`: a filesystem without snapshots contains no files, so a first
    # receive may replace it; None if nobody knows.
    empty: bool | None = False
    parent: bool = False  # something is below it
    strangers: tuple[str, ...] = ()  # the datasets below it that are neither ours nor the source's
    changed: bool = False  # zfs found it modified since its newest snapshot
    held_before: bool = False  # we held a snapshot of it when the run began
    recognised: bool = False  # its properties are those of what we receive

    def __post_init__(self) -> None:
        for field in ("snapshots", "bookmarks", "inherited"):
            ordered = tuple(sorted(getattr(self, field), key=lambda snapshot: snapshot.createtxg))
            object.__setattr__(self, field, ordered)  # as it is frozen

    def find(self, guid: int | None) -> Snapshot | None:
        """The snapshot with this guid; bookmarks do not count."""
        return next((snapshot for snapshot in self.snapshots if snapshot.guid == guid), None)

    @property
    def history(self) -> tuple[Snapshot, ...]:
        return self.inherited + self.snapshots

    def twin(self, snapshot: Snapshot) -> Snapshot | None:
        """Our copy of a snapshot of the other side (same guid); inherited snapshots count too."""
        return next((own for own in self.history if own.guid == snapshot.guid), None)


# Datasets by key: "" is the root of the tree, "/www/logs" a grandchild.
Tree = dict[str, Dataset]


def with_ancestors(name: str) -> list[str]:
    """A dataset and its ancestors, the pool first."""
    parts = name.split("/")
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


# At the end of the name of a placeholder that has made way for the dataset itself.
MADE_WAY = ".made-way-for-mirror"


# At the end of a dataset's name while its own is being freed: two have swapped their names at the source.
BETWEEN_NAMES = ".between-names"


# In the name of a snapshot that has given its own to another; its guid follows.
DROPPED = ".dropped-"


@dataclass(frozen=True)
class Selection:
    """Which datasets and snapshots to replicate. The default is all of them."""

    # Globs are as in fnmatch, and `*` takes `/` too. Those of datasets are matched against the name below the root of
    # the tree, those of snapshots against what follows the `@`. A child of an excluded dataset is excluded.
    recursive: bool = True
    exclude: tuple[str, ...] = ()
    snapshots: tuple[str, ...] = ("*",)
    exclude_snapshots: tuple[str, ...] = ()

    def has_dataset(self, key: str) -> bool:
        # A dataset under a temporary name is selected by its usual one.
        key = key.replace(MADE_WAY, "").replace(BETWEEN_NAMES, "")
        if not key:
            return True
        names = with_ancestors(key[1:])
        return self.recursive and not any(fnmatch.fnmatchcase(name, glob) for glob in self.exclude for name in names)

    def of_snapshots(self, snapshots: Iterable[Snapshot]) -> list[Snapshot]:
        found = []
        for snapshot in snapshots:
            # What has given its name to another is selected by that.
            fits = functools.partial(fnmatch.fnmatchcase, snapshot.short[1:].partition(DROPPED)[0])
            if any(map(fits, self.snapshots)) and not any(map(fits, self.exclude_snapshots)):
                found.append(snapshot)
        return found


@dataclass(frozen=True)
class Properties:
    """Properties of the mirror that differ from the source's."""

    values: tuple[str, ...] = ()  # `NAME=VALUE`, set at the first receive
    ignored: tuple[str, ...] = ()  # names of those that are neither copied nor set


# At the end of the tags by which lines of a crontab hold their newest common snapshots here.
RECEIVED = ":received"


@dataclass(frozen=True)
class Policy:
    """What the user asked for."""

    source_root: str
    target_root: str
    tag: str
    keep_days: int | None = None  # None: nothing expires
    intermediates: bool = False
    bookmark: bool = False
    rollback: bool = False
    quarantine: bool = False
    keep_min: int = 0  # so many of the newest local snapshots never expire
    selection: Selection = Selection()
    properties: Properties = Properties()
    decrypt: bool = False

    @property
    def received_tag(self) -> str:
        # It differs from `tag` so that a chain A -> B -> C can use one tag.
        return self.tag + RECEIVED

    def raw(self, source: Dataset) -> bool:
        """Whether a dataset is sent raw: as it is stored, encrypted, so that its key is needed nowhere."""
        return source.encrypted and not self.decrypt

    def mark(self, guid: int) -> str:
        """The name of our bookmark of a snapshot."""
        # With the guid, so that several mirrors of one source do not clash. zfs allows less in it than in a tag: where
        # a character had to be replaced, a checksum tells the tag `a/b` from `a+b`.
        name = re.sub("[^A-Za-z0-9_.:-]", "_", self.tag)
        if name != self.tag:
            name += f"-{hashlib.sha256(self.tag.encode()).hexdigest()[:8]}"
        return f"#{name}-{guid}"


# Steps of a plan.


@dataclass(frozen=True)
class Receive:
    """Receive `snapshot`: in full, or as an increment from `base` (a snapshot or bookmark of the source)."""

    # Held until all steps are done: if we are cut off after it, the mirror ends there, and needs it as its base.
    snapshot: Snapshot
    base: Snapshot | None = None
    token: str | None = None  # of an interrupted receive, which is resumed
    # A local snapshot: the dataset is created as a clone of it, as the source dataset is a clone of `base`.
    origin: str = ""
    lost_origin: str = ""  # the snapshot that it should be a clone of, but that is not in this mirror

    @property
    def facts(self) -> dict[str, Any]:
        """The step as data, for JSON."""
        base = self.base
        return {
            "snapshot": self.snapshot.short,
            "guid": str(self.snapshot.guid),  # text, because many programs read no number of 64 bits
            "base": base.short if base else None,
            "base_guid": str(base.guid) if base else None,
            "resumed": self.token is not None,
            "clone_of": self.origin or None,
        }

    def __str__(self) -> str:
        if self.token:
            return f"rest of {self.snapshot.short}"
        if self.base is None:
            return f"full {self.snapshot.short}"
        if self.origin:
            return f"{self.snapshot.short}, as a clone of {self.origin}"
        return f"{self.base.short} -> {self.snapshot.short}"


@dataclass(frozen=True)
class AbortReceive:
    """Abort an interrupted receive whose rest the source can no longer send (zfs recv -A)."""

    partial: Partial

    def __str__(self) -> str:
        return "abandon an interrupted receive that the source can no longer complete"


@dataclass(frozen=True)
class MakeWay:
    """Rename a placeholder with all that is below it, so that the dataset itself can be received in its place."""

    # So no stream is ever received over a dataset that has children. They return when it has arrived.

    def __str__(self) -> str:
        return "rename the placeholder here out of the way; its children return when the dataset itself is here"


@dataclass(frozen=True)
class RenameSnapshots:
    """Rename local snapshots that are in the way of a name to come: each from its old name to a new one, in order."""

    names: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "rename " + ", ".join(f"{old} to {new}" for old, new in self.names)


Step = Union[Receive, AbortReceive, MakeWay, RenameSnapshots]


@dataclass(frozen=True)
class Rollback:
    """An override: roll the local dataset back to its snapshot `to`. Newer snapshots and changes are lost."""

    to: Snapshot
    newer: tuple[Snapshot, ...] = ()
    received: tuple[Snapshot, ...] = ()  # of those, what the source once had and has no more

    def __str__(self) -> str:
        lost = ", ".join(snapshot.short for snapshot in self.newer)
        copies = ", ".join(snapshot.short for snapshot in self.received)
        last = f"; received from the source, which has no more of it, so perhaps the last copy: {copies}"
        return (
            f"rolling back to {self.to.short}, which destroys {lost or 'what was changed since'}{last * bool(copies)}"
        )


@dataclass(frozen=True)
class Quarantine:
    """An override: rename the local dataset aside with its children, and start afresh."""


Override = Union[Rollback, Quarantine]


class Blocked(Failure):
    """The dataset cannot be brought up to date without losing local data."""

    def __init__(self, what: str, advice: str, *ways: Override, elsewhere: bool = False) -> None:
        offers = {
            Rollback: "to destroy what is in the way: --rollback",
            Quarantine: "to rename all that is here aside and pull afresh: --quarantine",
        }
        super().__init__(what, advice, *(offers[type(way)] for way in ways))
        self.ways = ways  # the overrides that would help
        # What is here never was a mirror of the source's dataset: so it is the wrong place for its children too.
        self.elsewhere = elsewhere


@dataclass(frozen=True)
class Create:
    """Create a placeholder: a parent that has no snapshot at the source, or an ancestor of the local root."""

    name: str


@dataclass(frozen=True)
class Rename:
    """Rename the local dataset `old` (its key) and all below it to the name that its source has by now."""

    old: str


# The steps that need no stream, and change the names here.
LocalStep = Union[Rename, MakeWay, Rollback, Quarantine, AbortReceive, RenameSnapshots]
LOCAL_STEPS = (Rename, MakeWay, Rollback, Quarantine, AbortReceive, RenameSnapshots)

# What the plan of a tree says of a dataset: a step; why there is none; or None, if it is in step.
Entry = Union[Step, Create, Rename, Override, Failure, None]


@dataclass(frozen=True)
class Trees:
    """What is known of both sides, as listed last."""

    source: Tree
    target: Tree
    existing: tuple[str, ...] = ()  # the local root and its ancestors, as far as they exist
    failing: bool = False  # earlier runs have marked the local root as failing
    source_whole: bool = True  # False if zfs could list only a part of the tree, as with a damaged dataset
    target_whole: bool = True

    @property
    def whole(self) -> bool:
        return self.source_whole and self.target_whole


@dataclass(frozen=True)
class CommonPoint:
    """A point that both sides have, as each side names it. On the source it may be a bookmark."""

    source: Snapshot
    local: Snapshot


@dataclass(frozen=True)
class HoldChanges:
    """Names of snapshots to hold and to release, for one dataset."""

    place_source: tuple[str, ...] = ()
    place_local: tuple[str, ...] = ()
    release_source: tuple[str, ...] = ()
    release_local: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.place_source or self.place_local or self.release_source or self.release_local)


@dataclass(frozen=True)
class BookmarkChanges:
    """The source snapshot to bookmark, and our old bookmarks to destroy afterwards."""

    place: Snapshot | None = None
    remove: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expiry:
    """Which local snapshots expire, and which are older than keep-days but kept, and why."""

    destroy: tuple[Snapshot, ...] = ()
    kept: tuple[tuple[Snapshot, str], ...] = ()
    cutoff: int = 0  # what was created before that time is older than keep-days


@dataclass(frozen=True)
class MirrorStatus:
    """How far a mirror has come. What is None is not known."""

    name: str
    # "" if the dataset no longer exists at the source. None if we did not ask: then `common` is what we hold here.
    source: str | None
    common: Snapshot | None = None
    held_here: bool = False
    held_there: bool | None = None
    behind: int | None = None  # so many newer snapshots are at the source
    lacking: int | None = None  # bytes of these
    pinned: int | None = None  # bytes at the source that only the common snapshot needs
    partial: int | None = None  # bytes of an interrupted receive that are here
    received: float | None = None  # when the common snapshot arrived, by our own clock


# ---------------------------------------------------------------------------------------------------------------------
# Room 3: Parse
# ---------------------------------------------------------------------------------------------------------------------

DATASET_KINDS = "filesystem,volume"
POINT_KINDS = "snapshot,bookmark"
LIST_KINDS = f"{DATASET_KINDS},{POINT_KINDS}"
LIST_COLUMNS = (
    "name", "type", "guid", "createtxg", "creation", "userrefs", "receive_resume_token", "encryption", "origin",
    "ivsetguid", "compression",
)  # fmt: skip
# Those which zfs, from 2.2 on, lists without opening each snapshot (zfs_list_only_by_fast in its sources): in a quarter
# of the time.
FAST_COLUMNS = ("name", "guid", "createtxg")

# As a time of creation. It is later than any other, so nothing ever expires by it.
UNKNOWN_CREATION = 2**63 - 1

# Seconds by which the clocks of both hosts may differ unnoticed.
MAX_CLOCK_SKEW = 300

# One for all. With 100,000 snapshots, each with an empty set of its own, these would take 20 MiB.
NO_TAGS: frozenset[str] = frozenset()


def fields(text: str, *widths: int) -> Iterator[list[str]]:
    """The rows of `zfs ... -H`. Raises NotBelieved for a row that has not one of these numbers of columns."""
    # Not splitlines(): it also cuts at characters that a hold tag of somebody else's may contain.
    if text and not text.endswith("\n"):
        raise NotBelieved(f"zfs printed a line without an end: {text[-80:]!r}")
    for found in re.finditer(".*\n", text):
        line = found[0][:-1]
        # On TAB alone, and nothing stripped: names may contain spaces, even at their end.
        row = line.split("\t", max(widths))
        # To guess what such a row means could end in destroying the wrong thing.
        if len(row) not in widths:
            asked = " or ".join(map(str, widths))
            count = line.count("\t") + 1
            raise NotBelieved(f"zfs printed a line of {count} columns where {asked} were asked for: {line[:200]!r}")
        yield row


# Of the largest number of 64 bits, which is the longest that zfs prints.
NUMBER_DIGITS = 20


def number(text: str, what: str) -> int:
    """A whole number of 64 bits, as zfs prints it. Raises NotBelieved for anything else, which it calls `what`."""
    # The length comes first, because the time of int() grows with the square of the digits.
    found = int(text) if len(text) <= NUMBER_DIGITS and text.isascii() and text.isdigit() else 2**64
    if found >= 2**64:
        raise NotBelieved(
            f"{what} should be a whole number below 2^64, and is {text[:40]!r}",
            "what says so is no zfs, or not the one meant: run the command by hand (-vv shows it)",
        )
    return found


# Bytes of the longest name of a dataset with its snapshot (ZFS_MAX_DATASET_NAME_LEN less the closing NUL).
NAME_LIMIT = 255

# Most levels of a dataset, the pool being the first (zfs_max_dataset_nesting, which nobody should raise).
NESTING_LIMIT = 50

# What the parts of a listing look like (zfs_namecheck.c of OpenZFS). The `%` of hidden datasets is never printed.
COMPONENT = "[A-Za-z0-9_.: -]+"
DATASET_NAME = re.compile(f"{COMPONENT}(?:/{COMPONENT})*")
POINT_NAME = re.compile(f"[@#]{COMPONENT}")
SNAPSHOT_NAME = re.compile(f"{COMPONENT}(?:/{COMPONENT})*@{COMPONENT}")
TOKEN = re.compile("[0-9]+(?:-[0-9a-f]+){3}")


def is_name(name: str, form: re.Pattern[str]) -> bool:
    parts = re.split("[@#]", name)[0].split("/")
    is_short = len(name) <= NAME_LIMIT and len(parts) <= NESTING_LIMIT
    return is_short and bool(form.fullmatch(name)) and not {".", ".."}.intersection(parts)


def is_below(name: str, root: str) -> bool:
    """Whether a dataset is `root` or below it. `backuppool/vm2` is not below `backuppool/vm`."""
    return name == root or name.startswith(f"{root}/")


class Listing:
    """Takes the rows of a listing of a tree, and believes none that zfs cannot print for it."""

    # What a source says decides what is done here. So a row is refused, and the listing with it, unless its name is the
    # root of the tree or below it, its numbers are numbers, and it was not there before.

    def __init__(self, *roots: str) -> None:
        self.roots = roots  # of the tree: one, or two while a placeholder makes way (see `MakeWay`)
        self.owners: set[str] = set()  # datasets whose names are right
        self.datasets: dict[str, Dataset] = {}
        self.points: dict[str, dict[str, Snapshot]] = {}  # by dataset
        self.holds: dict[str, int] = {}  # how many holds there are on the held snapshots

    def take(self, row: list[str]) -> None:
        name = row[0]
        owner = re.split("[@#]", name, maxsplit=1)[0]
        try:
            if owner not in self.owners:  # once for each dataset, because it may have 100,000 snapshots
                self.check_owner(owner)
            if len(row) == len(FAST_COLUMNS):
                self.take_point(owner, name, row[1], row[2])
            elif row[1] in ("filesystem", "volume") and name == owner:
                self.take_dataset(row)
            elif {"snapshot": "@", "bookmark": "#"}.get(row[1]) == name[len(owner) : len(owner) + 1]:
                self.take_point(owner, name, row[2], row[3], row[4], row[5], row[9])
            else:
                raise NotBelieved(f"it is no {row[1][:20]!r}")
        except NotBelieved as failure:
            raise NotBelieved(f"zfs printed a row that it cannot: {name[:NAME_LIMIT]!r}: {failure.what}") from None

    def check_owner(self, name: str) -> None:
        if not any(is_below(name, root) for root in self.roots):
            raise NotBelieved(f"it is not in {self.roots[0]}")
        if not is_name(name, DATASET_NAME):
            raise NotBelieved("no dataset can have that name")
        self.owners.add(name)

    def take_dataset(self, row: list[str]) -> None:
        name, kind, guid, createtxg, creation, _, token, encryption, origin, _, compression = row
        if name in self.datasets:
            raise NotBelieved("it is there twice")
        # Nobody needs these of a dataset. But whoever prints none is no zfs.
        for text, what in ((guid, "guid"), (createtxg, "createtxg"), (creation, "creation")):
            number(text, what)
        if token not in ("-", "") and not TOKEN.fullmatch(token):
            raise NotBelieved(f"its resume token is none: {token[:80]!r}")
        if origin != "-" and not is_name(origin, SNAPSHOT_NAME):
            raise NotBelieved(f"its origin is no snapshot: {origin[:80]!r}")
        self.datasets[name] = Dataset(
            name,
            kind,
            partial=None if token in ("-", "") else Partial(token, None, None),
            encrypted=encryption not in ("off", "-"),
            compressed=compression != "off",
            origin="" if origin == "-" else origin,
        )

    def take_point(self, owner: str, name: str, guid: str, createtxg: str, *slow: str) -> None:
        creation, userrefs, ivset = slow or ("", "-", "-")  # which a row of the fast listing does not have
        if len(name) > NAME_LIMIT or not POINT_NAME.fullmatch(name, len(owner)):
            raise NotBelieved("no snapshot or bookmark can have that name")
        own = self.points.setdefault(owner, {})
        if name in own:
            raise NotBelieved("it is there twice")
        count = 0 if userrefs == "-" else number(userrefs, "userrefs")
        # A bookmark cannot be held. Whose the holds of a snapshot are, no listing tells.
        is_known = "#" in name or (creation != "" and count == 0)
        own[name] = Snapshot(
            name,
            number(guid, "guid"),
            number(createtxg, "createtxg"),
            number(creation, "creation") if creation else UNKNOWN_CREATION,
            NO_TAGS if is_known else None,
            0 if ivset == "-" else number(ivset, "ivsetguid"),
        )
        if count:
            self.holds[name] = count

    @property
    def tree(self) -> Tree:
        """The datasets by key. Raises NotBelieved if there are snapshots of a dataset that is not listed."""
        for name in self.points.keys() - self.datasets.keys():
            raise NotBelieved(f"zfs printed snapshots of {name!r}, and not that dataset")
        tree = {}
        for name, dataset in self.datasets.items():
            own = self.points.get(name, {}).values()
            snapshots = tuple(point for point in own if not point.is_bookmark)
            bookmarks = tuple(point for point in own if point.is_bookmark)
            tree[name[len(self.roots[0]) :]] = replace(dataset, snapshots=snapshots, bookmarks=bookmarks)
        return tree


# Datasets, snapshots and bookmarks of a tree: some 250 MiB here, and far more than zfs lists within an hour.
MAX_ROWS = 1_000_000


def parse_tree(text: str, *roots: str) -> tuple[Tree, dict[str, int]]:
    """Datasets from `zfs list -Hp -o LIST_COLUMNS`, and the number of holds on each held snapshot.

    Tags are still unknown, and tokens undecoded. Of snapshots there may be FAST_COLUMNS alone. Raises NotBelieved if
    zfs cannot have printed that for this tree.
    """
    listing = Listing(*roots)
    for count, row in enumerate(fields(text, len(LIST_COLUMNS), len(FAST_COLUMNS))):
        if count == MAX_ROWS:
            raise NotBelieved(f"zfs printed more than {MAX_ROWS:,} datasets and snapshots of {roots[0]}")
        listing.take(row)
    return listing.tree, listing.holds


def rooted_rows(text: str, roots: Iterable[str]) -> str:
    """Of a listing that is not whole: the rows of datasets whose parents are in it too, and of their snapshots."""
    owners = [(re.split("[@#\t]", line, maxsplit=1)[0], line) for line in text.splitlines(keepends=True)]
    listed = {owner for owner, line in owners if line.startswith(f"{owner}\t")}
    kept = listed.intersection(roots)
    for name in sorted(listed):  # parents first
        if name.rpartition("/")[0] in kept:
            kept.add(name)
    return "".join(line for owner, line in owners if owner in kept)


def whole_tree(tree: Tree, *roots: str) -> Tree:
    """The tree, if it is complete. Raises NotBelieved unless its roots and each dataset's parent are in it."""
    missing = [root for root in roots if root not in tree]
    missing += [key.rpartition("/")[0] for key in tree.keys() - {*roots} if key.rpartition("/")[0] not in tree]
    if missing:
        raise NotBelieved(f"zfs printed a tree without {missing[0] or 'its root'}")
    return tree


def parse_sources(text: str, asked: Iterable[str]) -> dict[str, dict[str, str]]:
    """Whether each property is `local` or `received`, by dataset, from `zfs get -H -o name,property,source`."""
    found: dict[str, dict[str, str]] = {name: {} for name in asked}
    for name, key, source in fields(text, 3):
        if name not in found:
            raise NotBelieved(f"zfs told of what it was not asked about: {name[:NAME_LIMIT]!r}")
        found[name][key] = source
    return found


def parse_hold_dates(text: str, tag: str) -> dict[str, str]:
    """Since when `tag` holds each snapshot, from `zfs holds -H`. Other lines are ignored."""
    rows = (line.split("\t") for line in text.split("\n"))
    return {row[0]: row[2] for row in rows if len(row) == 3 and row[1] == tag}


def parse_holds(text: str, asked: Container[str]) -> dict[str, frozenset[str]]:
    """The tags of each snapshot, from `zfs holds -H`. Raises NotBelieved for a row that was not asked for."""
    tags: dict[str, set[str]] = {}
    for name, tag, _date in fields(text, 3):  # a tag with a TAB in it makes four
        if name not in asked:  # what follows a newline in a tag looks like a row
            raise NotBelieved(f"zfs printed a hold on what it was not asked about: {name[:NAME_LIMIT]!r}")
        tags.setdefault(name, set()).add(tag)
    return {name: frozenset(some) for name, some in tags.items()}


def parse_holds_and_ivsets(text: str, asked: Container[str]) -> tuple[dict[str, frozenset[str]], dict[str, int]]:
    """As `parse_holds`; and the ivset numbers, from `zfs list -Hp -o name,ivsetguid` in the same text."""
    tags: list[str] = []
    ivsets = {}
    for row in fields(text, 2, 3):
        if len(row) == 3:
            tags.append("\t".join(row) + "\n")
        elif row[0] in asked:
            ivsets[row[0]] = 0 if row[1] == "-" else number(row[1], "ivsetguid")
        else:
            raise NotBelieved(f"zfs told of what it was not asked about: {row[0][:NAME_LIMIT]!r}")
    return parse_holds("".join(tags), asked), ivsets


def with_tags(tree: Tree, tags: dict[str, frozenset[str]], ivsets: dict[str, int] | None = None) -> Tree:
    """The tree with the tags of some snapshots, and the ivset numbers of some of these, filled in."""
    numbers = ivsets or {}

    def fill(snapshot: Snapshot) -> Snapshot:
        name = snapshot.name
        return replace(snapshot, tags=tags[name], ivset=numbers.get(name, snapshot.ivset)) if name in tags else snapshot

    return {key: replace(dataset, snapshots=tuple(map(fill, dataset.snapshots))) for key, dataset in tree.items()}


# So many snapshots may all clones of a tree have inherited together. Chains of clones could else fill the memory.
MAX_INHERITED = 2_000_000


def with_clones(tree: Tree) -> Tree:
    """The tree with clones and origins linked, if these are in it. Raises NotBelieved for circles and long chains."""
    owners = {dataset.name: dataset for dataset in tree.values()}
    origins = {dataset.origin for dataset in tree.values()}
    # Where each origin is in its own dataset's history. Looked for once: a thousand clones may have the same one.
    places = {it.name: at for own in tree.values() for at, it in enumerate(own.snapshots, 1) if it.name in origins}
    inherited: dict[str, tuple[Snapshot, ...]] = {}
    total = 0
    for clone in owners:
        name = clone
        chain: dict[str, None] = {}  # from a clone down to what is known already
        while name in owners and name not in inherited:
            if name in chain:
                raise NotBelieved(f"zfs printed that {name} is a clone of its own clone")
            chain[name] = None
            name = owners[name].origin.partition("@")[0]
        for name in reversed([*chain]):
            origin = owners[name].origin
            owner = owners.get(origin.partition("@")[0])
            inherited[name] = ()
            if owner and origin in places:  # its dataset's snapshots up to it, and what that one has inherited
                inherited[name] = inherited[owner.name] + owner.snapshots[: places[origin]]
            total += len(inherited[name])
            if total > MAX_INHERITED:
                raise NotBelieved(
                    f"the clones in this tree have more than {MAX_INHERITED:,} snapshots of their origins"
                )

    linked = {}
    for key, dataset in tree.items():
        marked = (replace(it, cloned=True) if it.name in origins else it for it in dataset.snapshots)
        linked[key] = replace(dataset, snapshots=tuple(marked), inherited=inherited[dataset.name])
    return linked


def parse_token(token: str, text: str) -> Partial:
    """Decode a resume token from what `zfs send -nvt TOKEN` says, on either stream and whatever its exit status."""
    found = re.findall(r"^[ \t]*(toguid|fromguid|bytes) = 0x([0-9a-f]{1,16})$", text, re.MULTILINE)
    numbers = {key: int(digits, 16) for key, digits in reversed(found)}  # the first of each counts
    raw = re.search(r"^[ \t]*rawok = 1$", text, re.MULTILINE) is not None
    corrupt = "resume token is corrupt" in text
    return Partial(token, numbers.get("toguid"), numbers.get("fromguid"), raw, corrupt, numbers.get("bytes", 0))


# Many times as many as are asked for at once.
MAX_ESTIMATES = 10_000


def parse_estimates(text: str) -> list[tuple[int, int]]:
    """For each stream in turn: the bytes that `zfs send -nP` estimates, and those that have arrived before."""
    found = []
    before = 0
    # Line by line, each looked at once: the source may say much that is neither. What has more than 64 bits is ignored.
    for line in re.finditer(r"^(?:size\t([0-9]{1,20})|[ \t]*bytes = 0x([0-9a-f]{1,16}))$", text, re.MULTILINE):
        if line[2]:
            before = int(line[2], 16)
        elif int(line[1]) < 2**64:
            found.append((int(line[1]), before))
            before = 0
            if len(found) == MAX_ESTIMATES:
                break
    return found


def parse_usage(text: str) -> dict[str, tuple[int, int]]:
    """The bytes that only a snapshot needs, and those written until it, from `zfs list -Hp -o name,used,written`."""
    rows = itertools.islice(fields(text, 3), MAX_ROWS)
    return {
        name: (number(used, f"used of {name}"), number(written, f"written of {name}")) for name, used, written in rows
    }


def parse_space(text: str) -> tuple[int, int]:
    """Bytes used and available, from `zfs list -Hp -o used,available` of one dataset."""
    rows = list(fields(text, 2))
    if len(rows) != 1:
        raise Failure(f"zfs printed {len(rows)} lines where one was asked for", "run it by hand: -vv shows it")
    return number(rows[0][0], "used"), number(rows[0][1], "available")


def parse_failing(text: str, root: str, now: float) -> int | None:
    """Since when the runs of a tree fail, from our property at its local root; None if that says nothing of now."""
    # A clone, or a dataset that was restored elsewhere, has the property too, with the name of another root. No run can
    # have noted a time in the future.
    found = re.fullmatch(r"([1-9][0-9]{0,10}) (.*)\n", text)
    return int(found[1]) if found and found[2] == root and int(found[1]) <= now + MAX_CLOCK_SKEW else None


def count_objects(text: str) -> int:
    """How many files and directories a filesystem contains, from `zfs userspace -Hp -o objused`."""
    return sum(number(row[0], "objused") for row in fields(text, 1) if row[0] not in ("-", "none"))


# What a person can do where zfs says so: any command, or one end of a stream. Only the receiver is believed about this
# side: the sender is another host, and may say what it likes.
HINTS = (
    ("", "I/O is currently suspended", "see zpool status; when its disks are back: zpool clear"),
    ("", "cannot unmount '([^'\n]*)': pool or dataset is busy", "see who uses it: fuser -vm {}"),
    ("send", "dataset key must be loaded", "load it at the source (zfs load-key), or mirror raw, to another place"),
    ("receive", "inherited key must be loaded", "load the key of the local parent (zfs load-key)"),
    ("receive", "out of space|quota exceeded", "make space; what arrived is kept, and the next run goes on from there"),
)


def hint_for(said: str, end: str = "") -> str:
    """The hint for what zfs has said, at that `end` of a stream; "" if there is none."""
    for where, pattern, hint in HINTS:
        if where == end and (found := re.search(pattern, said)):
            return hint.format(*map(shlex.quote, found.groups()))
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Room 4: Plan
# ---------------------------------------------------------------------------------------------------------------------

DAY = 24 * 60 * 60

# In the name of what was renamed aside; the date follows. It is nobody's mirror any more, nor is what is below it.
ASIDE = ".quarantine-"

# Where the source is a mirror itself, what has such a name is passed over.
PASSING = (ASIDE, MADE_WAY, BETWEEN_NAMES)

# What both sides have.


def newest_common(source: Dataset | None, local: Dataset | None, *, to_hold: bool = False) -> CommonPoint | None:
    """The newest point of the source that the local dataset also has, by guid; `to_hold` leaves out bookmarks."""
    if source is None or local is None:
        return None
    ours = {snapshot.guid: snapshot for snapshot in local.snapshots}
    # Of equals max() takes the first: a snapshot wins over its bookmark, and that over an inherited snapshot (one that
    # a promoted clone took over from this dataset).
    points = source.snapshots + (() if to_hold else source.bookmarks) + source.inherited
    known = [point for point in points if point.guid in ours]
    if not known:
        return None
    # No zfs makes two snapshots of a dataset in one transaction group. Should a source say so, ours tell their order.
    newest = max(known, key=lambda point: (point.createtxg, ours[point.guid].createtxg))
    return CommonPoint(newest, ours[newest.guid])


def newest_received(local: Dataset, policy: Policy) -> Snapshot | None:
    """The newest snapshot that we hold here: it was the newest common one when a run last got that far."""
    return next((it for it in reversed(local.snapshots) if policy.received_tag in (it.tags or ())), None)


def newest_of(source: Dataset, local: Dataset) -> str:
    """Where both sides stand, for a person to compare."""
    here, there = (dataset.snapshots[-1].short if dataset.snapshots else "none" for dataset in (local, source))
    return f"newest snapshot here: {here}, at the source: {there}"


# Whose a local dataset is.


def others_tags(local: Dataset, policy: Policy) -> list[str]:
    """The received tags of other crontab lines in this dataset."""
    tags = {tag for snapshot in local.snapshots for tag in snapshot.tags or () if tag.endswith(RECEIVED)}
    return sorted(tags - {policy.received_tag})


def is_ours(source: Dataset, local: Dataset | None) -> bool:
    """Whether a local dataset is ours: we hold a snapshot of it, or have received it."""
    # What was here before is not: it may be another tool's mirror, or the original itself if the line is run on the
    # wrong host. We take it over when the source is ahead of it, and we pull. If they have no snapshot in common, there
    # is nothing to take over.
    return local is None or local.held_before or local.recognised or newest_common(source, local) is None


def is_reversed(source: Dataset, local: Dataset) -> bool:
    """Whether the source is the mirror, and we are its source: its common snapshot carries `TAG:received`, ours TAG."""
    twins = ((it, source.twin(it)) for it in local.snapshots if it.tags)
    pairs = ((it.tags or NO_TAGS, twin.tags or NO_TAGS) for it, twin in twins if twin)
    return any(tag + RECEIVED in theirs and tag + RECEIVED not in ours for ours, theirs in pairs for tag in ours)


def strangers_below(
    place: str, tree: Tree, empty: Mapping[str, bool | None], source: Tree, policy: Policy
) -> tuple[str, ...]:
    """The names of what must not be below a `place` that is going to be received into.

    Fine are our mirrors, what we set aside, and the empty parents of these. `tree` is the place and all below it;
    `empty` says which of its datasets are known to contain no files.
    """
    strangers = []
    parents = {inner.rpartition("/")[0] for inner in tree}
    for inner, local in tree.items():
        key = place + inner
        there = source.get(key)
        if not inner:
            continue
        if not policy.selection.has_dataset(key) or others_tags(local, policy):
            is_fine = False
        elif ASIDE in key or newest_received(local, policy) or (there and local.partial):
            is_fine = True
        elif local.snapshots or local.kind != "filesystem":
            is_fine = newest_common(there, local) is not None
        else:
            is_parent = there is not None or key.endswith(MADE_WAY) or inner in parents
            is_fine = is_parent and empty.get(inner) is True
        if not is_fine:
            strangers.append(local.name)
    return tuple(sorted(strangers))


# The steps of one dataset.


def plan_dataset(
    source: Dataset, local: Dataset | None, policy: Policy, local_name: str, origin: Snapshot | None = None
) -> tuple[Step, ...]:
    """The steps that bring `local` in step with `source`; none if it is. Raises Blocked if local data would be lost.

    `local` is None if it does not exist yet; it is, or will be, called `local_name`. `origin` is our copy of the
    snapshot that the source dataset was cloned from.
    """
    if local is not None:
        if others_tags(local, policy):
            raise blocked_by_another_line(local, policy)
        if not local.held_before and not local.recognised and is_reversed(source, local):
            raise Blocked(
                f"{source.name} is the mirror of {local.name}, by the holds on both sides ({newest_of(source, local)})",
                "this line may be meant for the other host: check -h, -r and -l; if the hosts have swapped roles, end "
                "the other line first, with --retire",
                elsewhere=True,
            )
        if local.kind != source.kind:
            raise Blocked(
                f"{source.name} is a {source.kind}, but {local.name} is a {local.kind} ({newest_of(source, local)})",
                "see which of them is right, and check -r and -l",
                Quarantine(),
                elsewhere=newest_received(local, policy) is None,
            )
        if local.partial is not None:  # until that is resumed or aborted, zfs receives nothing else here
            return plan_partial(source, local, local.partial, policy, origin)
    if not policy.selection.of_snapshots(source.snapshots):
        return ()
    if local is None or not local.snapshots:
        return plan_first(source, local, policy, local_name, origin)
    return plan_next(source, local, policy)


def blocked_by_another_line(local: Dataset, policy: Policy) -> Blocked:
    """Why the mirror of another crontab line is left alone: each would move what the other relies on."""
    tags = others_tags(local, policy)
    lines = " and ".join(tag[: -len(RECEIVED)] for tag in tags)
    return Blocked(
        f"{local.name} is the mirror of another line, of the tag {lines}",
        "let each line have a tree of its own with -l; or, if that line is no more, end it with its own -t and "
        f"--retire; or release what it holds here: zfs release {shlex.quote(tags[0])} SNAPSHOT",
        elsewhere=True,
    )


def plan_partial(
    source: Dataset, local: Dataset, partial: Partial, policy: Policy, origin: Snapshot | None
) -> tuple[Step, ...]:
    """Resume an interrupted receive, or abort it; then go on from what is here by then. Raises Blocked."""
    if partial.to_guid is None and not partial.corrupt:
        raise Blocked(
            f"{local.name} has an interrupted receive, and zfs could not say whose",
            f"look at its token: zfs send -nvt $(zfs get -Hp -o value receive_resume_token '{local.name}'); "
            f"to give it up, bytes and all: zfs recv -A '{local.name}'",
        )
    target = source.find(partial.to_guid)
    # Its base must still be the newest snapshot here (for a clone, our copy of the origin). The source must still have
    # both ends, and send it in the same way, raw or plain.
    base = local.snapshots[-1] if local.snapshots else origin if local.origin else None
    bases = {None, *(point.guid for point in source.inherited + source.snapshots + source.bookmarks)}
    ends_match = target and partial.from_guid in bases and partial.from_guid == (base and base.guid)
    if target and ends_match and partial.raw == policy.raw(source) and not local.changed and not partial.corrupt:
        steps: list[Step] = [*freed_names([target], source, local, policy), Receive(target, token=partial.token)]
        # What follows is part of the plan, because it must be held as well before anything is sent. What blocks it is
        # told when its own turn comes.
        with contextlib.suppress(Blocked):
            steps += plan_dataset(source, after_receives(source, local, local.name, steps), policy, local.name)
        return tuple(steps)
    # To abort a first receive destroys the local dataset: that was all there is of it.
    left = replace(local, partial=None) if local.snapshots else None
    return AbortReceive(partial), *plan_dataset(source, left, policy, local.name, origin)


def after_receives(source: Dataset, local: Dataset | None, local_name: str, steps: Iterable[Step]) -> Dataset:
    """The local dataset as these steps will leave it."""
    here = local or Dataset(local_name, source.kind)
    for old, new in (names for step in steps if isinstance(step, RenameSnapshots) for names in step.names):
        renamed = (replace(it, name=local_name + new) if it.short == old else it for it in here.snapshots)
        here = replace(here, snapshots=tuple(renamed))
    last = here.snapshots[-1].createtxg if here.snapshots else 0
    wanted = (step.snapshot for step in steps if isinstance(step, Receive))
    arrived = [
        replace(snapshot, name=local_name + snapshot.short, createtxg=last + place, tags=NO_TAGS, cloned=False)
        for place, snapshot in enumerate(wanted, 1)
    ]
    return replace(here, partial=None, empty=False, snapshots=(*here.snapshots, *arrived))


def wanted_snapshots(later: Sequence[Snapshot], policy: Policy) -> Sequence[Snapshot]:
    """Of the snapshots that we lack, those that we want: the newest, those that have clones, or all."""
    return [it for it in later if policy.intermediates or it.cloned or it is later[-1]]


def incremental_receives(base: Snapshot, arrivals: Sequence[Snapshot]) -> tuple[Receive, ...]:
    """One increment for each of `arrivals`: `base` -> first, first -> second, and so on."""
    # A single stream of `zfs send -I` would bring them all. But then zfs recv cannot be told the name of the snapshot
    # to take, and without a name it takes whatever package of datasets the source chooses to send.
    return tuple(Receive(arrival, before) for before, arrival in zip([base, *arrivals], arrivals))


def plan_first(
    source: Dataset, local: Dataset | None, policy: Policy, local_name: str, origin: Snapshot | None
) -> tuple[Step, ...]:
    """First the oldest wanted snapshot, in full or as a clone; then increments to the newest. Raises Blocked."""
    if local is not None:
        check_place(source, local, policy)
    # What is legal at the source may be too deep under our root.
    if len(with_ancestors(local_name)) > NESTING_LIMIT:
        raise Blocked(
            f"{local_name} would be nested deeper than the {NESTING_LIMIT} levels ZFS allows",
            "mirror to a place nearer to the pool with -l, or leave it out with --exclude",
        )
    way = (MakeWay(),) if local is not None and local.parent else ()
    arrivals = wanted_snapshots(policy.selection.of_snapshots(source.snapshots), policy)
    check_length([snapshot.short for snapshot in arrivals], local_name)
    oldest, *later = arrivals
    first = Receive(oldest)
    if origin and (local is None or way):  # zfs makes a clone only where nothing is
        first = Receive(oldest, source.inherited[-1], origin=origin.name)
    return (*way, first, *incremental_receives(oldest, later))


def check_place(source: Dataset, local: Dataset, policy: Policy) -> None:
    """Raise Blocked unless a first receive finds an empty filesystem with nothing but ours below it."""
    if local.strangers:
        raise Blocked(
            f"{local.name} has datasets below it that are neither ours nor the source's: {few(local.strangers)}; as a "
            "mirror it would make them read-only, and hand down to them what the source says",
            "this may be the wrong place: check -l; mirror to a dataset of its own, that is not there yet; if what is "
            "below it is empty and left over, zfs destroy it",
            elsewhere=True,
        )
    if local.empty is None:  # no override: a healthy placeholder would be set aside, with all that is below it
        raise Blocked(
            f"it is not known whether {local.name} is empty, and a first receive would overwrite what it holds "
            f"({newest_of(source, local)})",
            f"what keeps this from working? zfs userspace '{local.name}'; or mirror to another place with -l",
        )
    if not local.empty:
        raise Blocked(
            f"{local.name} is not empty: it holds data but no snapshot, and a first receive would overwrite it "
            f"({newest_of(source, local)})",
            "mirror to another place with -l; or, if nothing in it is needed, destroy it yourself",
            Quarantine(),
            elsewhere=True,
        )
    if local.parent and "/" not in local.name:
        raise Blocked(
            f"{local.name} is the root of a pool, with a mirror below it, and cannot make way for {source.name} "
            f"({newest_of(source, local)})",
            "mirror to a dataset of its own with -l",
        )
    if (local.encrypted or policy.raw(source)) and not local.parent:
        raise Blocked(
            f"{local.name} is already here, and zfs receives no first stream into a dataset if either is encrypted "
            f"({newest_of(source, local)})",
            "mirror to a dataset that is not there yet with -l; or, if nothing in it is needed, destroy it yourself",
            Quarantine(),
        )


def plan_next(source: Dataset, local: Dataset, policy: Policy) -> tuple[Step, ...]:
    """Increments from the newest common point to what is newer. Raises Blocked if something is in the way."""
    common = newest_common(source, local)
    if common is None:
        # Our hold on a local snapshot proves that there was a common one once.
        if any(it.may_be_held_by(policy.received_tag) for it in local.snapshots):
            raise Blocked(
                f"the common base of {local.name} is gone: {source.name} has none of the snapshots that are here "
                f"({newest_of(source, local)})",
                "find out who destroyed it there, or whether the dataset was made anew",
                Quarantine(),
            )
        raise Blocked(
            f"{local.name} is no mirror of {source.name}: they never had a snapshot in common "
            f"({newest_of(source, local)})",
            "this may be the wrong tree: check -h, -r and -l",
            Quarantine(),
            elsewhere=True,
        )
    later = [snapshot for snapshot in source.snapshots if snapshot.createtxg > common.source.createtxg]
    arrivals = wanted_snapshots(policy.selection.of_snapshots(later), policy)
    if not arrivals:
        return ()
    if common.source in source.inherited:
        # zfs recv takes an increment from an inherited snapshot for the stream of a new clone.
        raise Blocked(
            f"{source.name} and its clone have swapped roles (zfs promote): the newest common snapshot, "
            f"{common.source.name}, belongs to the clone by now, and {local.name} can receive no increment from it "
            f"({newest_of(source, local)})",
            "destroy neither before a fresh copy is here, which will be a clone as well",
            Quarantine(),
        )
    check_encryption_mode(source, local, common, policy)
    check_divergence(source, local, common, policy)
    check_length([snapshot.short for snapshot in arrivals], local.name)
    return *freed_names(arrivals, source, local, policy), *incremental_receives(common.source, arrivals)


def freed_names(
    arrivals: Sequence[Snapshot], source: Dataset, local: Dataset, policy: Policy
) -> tuple[RenameSnapshots, ...]:
    """What frees the names of snapshots to come, if others have them here. Raises Blocked if one gets too long."""
    # Names rotate: in the manual's own example @today is @yesterday by tomorrow (zfs-rename(8)). What is in the way
    # gets the name that its twin has by now, which may be taken as well, and so on. Twins have different names, so such
    # a chain cannot form a circle. What the source has dropped gets a free name.
    taken = {snapshot.short: snapshot for snapshot in local.snapshots}
    coming = {snapshot.short for snapshot in arrivals}
    names: list[tuple[str, str]] = []
    for arrival in arrivals:
        chain: list[tuple[str, str]] = []
        name = arrival.short
        while name in taken:
            twin = source.find(taken[name].guid)
            if twin and not policy.selection.of_snapshots([twin]):
                twin = None  # under that name it would never expire
            if twin and twin.short in {name, *(old for old, _ in chain)}:  # two here have one guid
                twin = None
            new = twin.short if twin else f"{name}{DROPPED}{taken[name].guid}"
            while not twin and (new in taken or new in coming):
                new += ".0"
            chain.append((name, new))
            name = new
        check_length([new for _, new in chain], local.name)
        for old, new in reversed(chain):
            taken[new] = taken.pop(old)
        names += reversed(chain)
    return (RenameSnapshots(tuple(names)),) if names else ()


def check_encryption_mode(source: Dataset, local: Dataset, common: CommonPoint, policy: Policy) -> None:
    """Raise Blocked for a change between raw and plain streams of an encrypted dataset."""
    # They do not mix, though guids match: https://github.com/openzfs/zfs/issues/8758
    if not common.source.ivset:
        return
    is_raw = common.source.ivset == common.local.ivset
    if is_raw and not policy.raw(source):
        raise Blocked(
            f"{local.name} was received raw (encrypted) from {source.name}, and cannot take decrypted streams "
            f"({newest_of(source, local)})",
            "leave --decrypt out, to go on as it began",
            Quarantine(),
        )
    if policy.raw(source) and not is_raw:
        raise Blocked(
            f"{local.name} was received decrypted from {source.name}, and cannot take raw (encrypted) streams "
            f"({newest_of(source, local)})",
            "add --decrypt, to go on as it began",
            Quarantine(),
        )


def check_divergence(source: Dataset, local: Dataset, common: CommonPoint, policy: Policy) -> None:
    """Raise Blocked for what was made here: snapshots newer than the common one, or changes since the newest."""
    ahead = [snapshot for snapshot in local.snapshots if snapshot.createtxg > common.local.createtxg]
    where = f"the newest common one, {common.local.short} ({newest_of(source, local)})"
    reasons = ((it.short, why_not_rolled_back(it, source, policy)) for it in ahead)
    protected = [f"{short} ({why})" for short, why in reasons if why]
    # What is not newer than our hold came from the source, which has lost it since.
    held = newest_received(local, policy)
    received = [it for it in ahead if held and it.createtxg <= held.createtxg]
    ways: tuple[Override, ...] = () if protected else (Rollback(common.local, tuple(ahead), tuple(received)),)
    if ahead:
        count = f"{len(ahead)} local snapshot{'s' * (len(ahead) > 1)}"
        spared = f"; not to be rolled back: {', '.join(protected)}" if protected else ""
        advice = f"stop what makes snapshots on the mirror{spared}"
        raise Blocked(f"{local.name} has {count} newer than {where}", advice, *ways, Quarantine())
    if local.changed:
        advice = f"stop what writes to the mirror; to see what was changed: zfs diff '{common.local.name}'"
        raise Blocked(f"{local.name} was changed since {where}", advice, *ways, Quarantine())


def why_not_rolled_back(snapshot: Snapshot, source: Dataset, policy: Policy) -> str | None:
    """Why a local snapshot must not be rolled back; None if it may."""
    twin = source.twin(snapshot)
    if snapshot.tags is None or (twin and twin.tags is None):
        return "its holds could not be read"
    # Our own hold does not count: an earlier run left it, when the source still had that snapshot.
    if snapshot.tags - {policy.received_tag}:
        return "held by " + ", ".join(sorted(snapshot.tags - {policy.received_tag}))
    if twin and twin.tags and policy.tag in twin.tags:
        return f"its twin at the source is held by {policy.tag}"
    return None


def check_length(suffixes: Iterable[str], local_name: str) -> None:
    """Raise Blocked for the name of a snapshot that is legal at the source and too long under our root."""
    for suffix in suffixes:
        if len((local_name + suffix).encode()) > NAME_LIMIT:
            raise Blocked(
                f"{local_name}{suffix} would be longer than the {NAME_LIMIT} bytes ZFS allows",
                "mirror to a shorter name with -l, or rename the snapshot at the source",
            )


# What was renamed at the source.

# Local datasets, with their keys, that may have another name at the source by now, by the guid of what we hold.
Moved = dict[int, tuple[str, Dataset]]


def moved_mirrors(source: Tree, target: Tree, policy: Policy) -> Moved:
    """Local datasets that mirror nothing under their own name, and clearly one other dataset of the source."""
    owners: dict[int, int] = {}
    for dataset in source.values():
        for snapshot in dataset.snapshots:
            owners[snapshot.guid] = owners.get(snapshot.guid, 0) + 1
    # What another line holds stays where it is, and so does what has such a dataset below it.
    theirs = {key for key, local in target.items() if others_tags(local, policy)}
    fixed = {above for key in theirs for above in with_ancestors(key)}
    found: Moved = {}
    twice: set[int] = set()
    for key, local in target.items():
        # Only the newest snapshot that we hold counts: copies made by `send | recv`, `clone` or `promote` share older
        # ones. It must be in exactly one dataset of the source, and be held by us in exactly one here.
        held = newest_received(local, policy)
        if not held or not key or key in fixed or ASIDE in key or owners.get(held.guid) != 1:
            continue
        if not newest_common(source.get(key), local):
            twice |= {held.guid} & found.keys()
            found[held.guid] = (key, local)
    return {guid: it for guid, it in found.items() if guid not in twice}


def rekeyed(key: str, old: str, new: str) -> str:
    """The key of a dataset after `old` was renamed to `new`, with all below it."""
    return new + key[len(old) :] if is_below(key, old) else key


def former_name(source: Dataset, key: str, target: Tree, moved: Moved) -> str | None:
    """The key under which a dataset of the source is here, if that is not its own; else None."""
    if key in target:
        return None
    # A parent of it may have made way.
    for old in (above + MADE_WAY + key[len(above) :] for above in with_ancestors(key)[:-1]):
        if old in target:
            return old
    # Or it was renamed at the source. Then it is the only one that shares with it the newest snapshot that we hold.
    found = dict(moved[it.guid] for it in source.snapshots if it.guid in moved)
    # Nothing can be renamed to a name below its own.
    fits = [old for old, local in found.items() if local.kind == source.kind and not is_below(key, old)]
    return fits[0] if len(fits) == 1 else None


def mirrors_of(trees: Trees, policy: Policy) -> Tree:
    """The local copy of each dataset of the source; under its old name if the rename has not been followed yet."""
    moved = moved_mirrors(trees.source, trees.target, policy)
    found = {}
    for key, source in trees.source.items():
        old = former_name(source, key, trees.target, moved)
        local = trees.target.get(key if old is None else old)
        if local:
            found[key] = local
    return found


# The steps of the whole tree.


def in_order(tree: Tree) -> list[str]:
    """The datasets of a tree: parents before children, and origins before clones where both is possible."""
    keys = {dataset.name: key for key, dataset in tree.items()}
    origins = {key: keys.get(dataset.origin.partition("@")[0]) for key, dataset in tree.items()}
    followers: dict[str | None, list[str]] = {}
    for key, origin in origins.items():
        followers.setdefault(key.rpartition("/")[0] if key else None, []).append(key)
        followers.setdefault(origin, []).append(key)
    done: dict[str, None] = {}
    # Heaps, so that those that are due are taken in the order of their names.
    ready: list[tuple[list[str], str]] = []  # whose parent is done and whose origin
    rest: list[tuple[list[str], str]] = []  # whose parent is done

    def offer(key: str) -> None:
        parent = key.rpartition("/")[0]
        if key not in done and (not key or parent in done or parent not in tree):
            heapq.heappush(rest, (key.split("/"), key))
            if origins[key] is None or origins[key] in done:
                heapq.heappush(ready, (key.split("/"), key))

    for key in tree:
        offer(key)
    while ready or rest:
        # In a circle (a filesystem that is a clone of its promoted child) one clone comes before its origin.
        key = heapq.heappop(ready or rest)[1]
        if key not in done:
            done[key] = None
            for follower in followers.get(key, ()):
                offer(follower)
    return list(done)


PARENT_FIRST = "it will be pulled once the parent's problem is fixed"
WHOLE_FIRST = "it will be pulled once zfs lists the whole tree again"
ORIGIN_FIRST = "it will be pulled, as a clone, once the problem of its origin's dataset is fixed"


def missing_parents(key: str, source: Tree, target: Tree, existing: Container[str], policy: Policy) -> list[str]:
    """The placeholders that are missing above a local dataset. Raises Failure if a parent should be here, and is not.

    Placeholders are the ancestors of the root, and parents that have no snapshot at the source.
    """
    if key == "":
        return [name for name in with_ancestors(policy.target_root)[:-1] if name not in existing]
    parent = key.rpartition("/")[0]
    here = target.get(parent)
    if here and here.snapshots:
        return []
    is_to_come = bool(policy.selection.of_snapshots(source[parent].snapshots))
    # With something below it, an interrupted first receive could not be given up if its rest never comes: zfs gives up
    # no dataset that has children. And a pool's root could not make way for itself any more.
    if here and (here.partial or (is_to_come and "/" not in here.name)):
        raise Failure(f"skipped: its parent {here.name} has not been received completely", PARENT_FIRST)
    if here:
        return []
    name = policy.target_root + parent
    if is_to_come:
        raise Failure(f"skipped: its parent {name} is not here", PARENT_FIRST)
    return [*missing_parents(parent, source, target, existing, policy), name]


class TreePlan:
    """The plan of the whole tree: `entries`, in order, of a dataset's key and what the plan says of it."""

    # Every step is planned on the state that the steps before it will leave; `target` is that state in the end.
    # --dry-run prints this plan. A run carries out what it can at once, lists again, and plans anew until no step is
    # left: see `Run.transfer`.

    def __init__(self, trees: Trees, policy: Policy, given_up: Container[str] = ()) -> None:
        # What zfs could not list may be anywhere: then nothing is renamed, set aside or rolled back.
        self.policy = policy if trees.whole else replace(policy, rollback=False, quarantine=False)
        self.is_incomplete = not trees.whole
        self.given_up = given_up  # what has failed in this run, and gets no step
        self.source = trees.source
        self.target = dict(trees.target)
        self.existing = {*trees.existing}
        self.entries: list[tuple[str, Entry]] = []
        self.left_alone: set[str] = set()  # of which we touch nothing, not even a hold
        self.elsewhere: set[str] = set()  # where what is here is no mirror of the source's dataset
        self.late: set[int] = set()  # guids of what should be here by now, and failed to come
        self.unlisted: set[str] = set()  # what has a name in this plan under which it is not listed yet
        self.moved = moved_mirrors(trees.source, trees.target, policy)
        self.unclear = set() if trees.whole else {key for key in self.source if self.is_unclear(key, trees)}
        # So may be what holds a snapshot here whose tags could not be read.
        unread = {
            it.guid
            for key, local in trees.target.items()
            if not newest_common(self.source.get(key), local)
            for it in local.snapshots
            if it.tags is None
        }
        self.unclear |= {
            key
            for key, source in self.source.items()
            if key not in trees.target and any(it.guid in unread for it in source.snapshots)
        }
        if not trees.whole:
            self.moved = {}
        # Which local dataset has a copy of the snapshots that clones of the source come from.
        origins = {source.inherited[-1].guid for source in trees.source.values() if source.inherited}
        self.copies: dict[int, str | None] = dict.fromkeys(origins)
        for key in self.target:
            self.note_copies(key)
        for key in [key for key in trees.target if key.endswith(MADE_WAY)]:
            self.return_children(key[: -len(MADE_WAY)])
        # Names first: what has got a new name at the source may have left its old one to another dataset.
        order = in_order(self.source)
        circle: str | None = ""
        while circle is not None:
            while sum(map(self.follow_rename, order)):
                pass  # each that is renamed may have freed a name for another
            circle = self.circle_of_names()
            if circle is not None:
                self.move(circle, circle + BETWEEN_NAMES)
        for key in sorted(order, key=self.under_names_of_others(order).__contains__):
            self.plan_one(key)

    def local_name(self, key: str) -> str:
        return self.policy.target_root + key

    def fail(self, key: str, failure: Failure) -> None:
        if key not in self.given_up:  # whose failure was told when it failed
            self.entries.append((key, failure))

    def note_copies(self, key: str) -> None:
        for snapshot in self.target[key].snapshots if self.copies else ():
            if snapshot.guid in self.copies:
                self.copies[snapshot.guid] = key

    def origin_of(self, source: Dataset) -> Snapshot | None:
        """Our copy of the snapshot that a dataset of the source was cloned from."""
        guid = source.inherited[-1].guid if source.inherited else None
        key = self.copies.get(guid) if guid is not None else None
        local = self.target.get(key) if key is not None else None
        return local.find(guid) if local else None

    def under_names_of_others(self, order: Sequence[str]) -> set[str]:
        # Datasets whose name here still belongs to a mirror that has to be renamed first, with their children and
        # clones. They are planned last.
        moved = {key for key, _ in self.moved.values()}
        owners = {dataset.name: key for key, dataset in self.source.items()}
        found: set[str] = set()
        for key in order:
            is_anothers = key in moved and not newest_common(self.source[key], self.target.get(key))
            origin = owners.get(self.source[key].origin.partition("@")[0])
            if is_anothers or (key and key.rpartition("/")[0] in found) or origin in found:
                found.add(key)
        return found

    def follow_rename(self, key: str) -> bool:
        old = former_name(self.source[key], key, self.target, self.moved)
        if self.is_incomplete or old is None or old not in self.target or key in self.given_up:
            return False
        parent = key.rpartition("/")[0]
        try:
            parents = missing_parents(key, self.source, self.target, self.existing, self.policy)
            if parent in self.target and parent in self.source:
                self.decide(parent)
        except Blocked as blocked:
            if blocked.elsewhere:
                return False  # nothing of ours goes below what is no mirror of the source's
        except Failure:
            return False  # its parent may be here when its own turn comes
        self.create(key, parents)
        self.move(old, key)
        return True

    def circle_of_names(self) -> str | None:
        """A local dataset whose name is wanted by one that has to leave its own to another, and so on, back to it."""
        wanted: dict[str, str] = {}
        for key, source in self.source.items():
            fits = {self.moved[it.guid][0] for it in source.snapshots if it.guid in self.moved}
            for old in fits if len(fits) == 1 else ():
                if source.kind == self.target[old].kind and key not in self.given_up:
                    wanted[old] = key
        for old, key in wanted.items():  # it leaves its name to its new parent
            is_mirrored = newest_common(self.source.get(old), self.target[old]) is not None
            if is_below(key, old) and not is_mirrored and self.is_free_between(old):
                return old
        done: set[str] = set()
        for start in wanted:
            path: dict[str, None] = {}
            key = start
            while key in wanted and key not in done:
                done.add(key)
                path[key] = None
                key = wanted[key]
            circle = [*path][[*path].index(key) :] if key in path else []
            # None of them can be below another, where it would move along.
            is_free = not any(above in path for it in circle for above in with_ancestors(it)[:-1])
            first = next((it for it in circle if self.is_free_between(it)), None)
            if len(circle) > 1 and is_free and first:
                return first
        return None

    def is_free_between(self, key: str) -> bool:
        away = key + BETWEEN_NAMES
        return away not in self.given_up and away not in self.target

    def create(self, key: str, names: Iterable[str]) -> None:
        for name in names:
            self.entries.append((key, Create(name)))
            self.existing.add(name)
            if is_below(name, self.policy.target_root):
                self.target[name[len(self.policy.target_root) :]] = Dataset(name, "filesystem", empty=True)

    def move(self, old: str, key: str) -> None:
        self.entries.append((key, Rename(old)))
        target: Tree = {}
        for before, local in self.target.items():
            now = rekeyed(before, old, key)
            target[now] = local
            if now != before:
                name = self.local_name(now)
                snapshots = tuple(replace(snapshot, name=name + snapshot.short) for snapshot in local.snapshots)
                target[now] = replace(local, name=name, snapshots=snapshots)
        self.target = target
        self.unlisted |= {it for it in self.target if is_below(it, key)}
        self.moved = {guid: (rekeyed(it, old, key), local) for guid, (it, local) in self.moved.items()}
        self.copies = {guid: it if it is None else rekeyed(it, old, key) for guid, it in self.copies.items()}

    def return_children(self, key: str) -> None:
        """Rename the children of a placeholder that has made way back, once the dataset itself is here."""
        away, here = key + MADE_WAY, self.target.get(key)
        if self.is_incomplete or not here or not here.snapshots or away not in self.target or away in self.source:
            return
        for old in sorted(it for it in self.target if it.rpartition("/")[0] == away):
            home = key + old[len(away) :]
            if home not in self.target and home not in self.given_up:
                self.move(old, home)

    def is_unclear(self, key: str, trees: Trees) -> bool:
        """Whether a dataset that is not listed here may be here all the same, under this name or a former one."""
        is_listed = key in trees.target
        return not is_listed and (
            not trees.target_whole or former_name(self.source[key], key, trees.target, self.moved) is not None
        )

    def plan_one(self, key: str) -> None:
        self.follow_rename(key)
        source, parent = self.source[key], key.rpartition("/")[0]
        local = self.target.get(key)
        if key in self.unlisted and local and not local.snapshots:
            return  # whether its place is empty is found out under the name that it will have
        is_sure = local is not None and (local.held_before or local.recognised)
        may_be_of_others = local and not is_sure and any(it.tags is None for it in local.snapshots)
        if may_be_of_others or key in self.unclear:
            # Another line may hold it, or it may be here and not listed. What could not be read was reported.
            self.elsewhere.add(key)
            self.left_alone.add(key)
            return
        try:
            steps = self.decide_or_override(key)
        except Blocked as blocked:
            if blocked.elsewhere:
                self.elsewhere.add(key)
                self.left_alone.add(key)
            self.fail(key, blocked)
            return
        if key and parent in self.elsewhere and not newest_common(source, self.target.get(key)):
            self.elsewhere.add(key)
            if steps:
                what = f"skipped: its parent {self.local_name(parent)} here is no mirror of the source's dataset"
                self.fail(key, Failure(what, PARENT_FIRST))
        elif not steps:
            self.entries.append((key, None))
        else:
            try:
                if key not in self.given_up:
                    self.add_steps(key, source, steps)
                    return
            except Failure as failure:
                self.fail(key, failure)
            self.late.update(step.snapshot.guid for step in steps if isinstance(step, Receive))

    def decide(self, key: str) -> tuple[Step, ...]:
        source = self.source[key]
        return plan_dataset(source, self.target.get(key), self.policy, self.local_name(key), self.origin_of(source))

    def decide_or_override(self, key: str) -> tuple[Step, ...]:
        """The steps of a dataset; if it is blocked, those after an override that the user allows. Raises Blocked."""
        try:
            return self.decide(key)
        except Blocked as blocked:
            allowed = {Rollback: self.policy.rollback, Quarantine: self.policy.quarantine}
            override = next((way for way in blocked.ways if allowed[type(way)]), None)
            # A mirror whose dataset has another name by now is renamed, in this run or a later one.
            is_anothers = any(key == it for it, _ in self.moved.values())
            if override is None or key in self.given_up or is_anothers:
                raise
        before = dict(self.target)
        if isinstance(override, Quarantine):
            self.target = {it: local for it, local in before.items() if not is_below(it, key)}
        else:
            kept = tuple(snapshot for snapshot in before[key].snapshots if snapshot not in override.newer)
            self.target[key] = replace(before[key], partial=None, changed=False, snapshots=kept)
        try:
            steps = self.decide(key)
        except Blocked:  # for another reason: then nothing is destroyed for nothing
            self.target = before
            raise
        self.entries.append((key, override))
        return steps

    def add_steps(self, key: str, source: Dataset, planned: Iterable[Step]) -> None:
        """Add the steps of one dataset. Raises Failure if its parent or origin should be here, and is not."""
        steps = list(planned)
        local = self.target.get(key)
        if self.is_incomplete and not all(isinstance(step, Receive) for step in steps):
            raise Failure("skipped: what seems to be gone may only be missing in the listing", WHOLE_FIRST)
        is_first = local is None or any(isinstance(step, MakeWay) for step in steps)
        parents = []
        if local is None:
            parents = missing_parents(key, self.source, self.target, self.existing, self.policy)
        first = next((step for step in steps if isinstance(step, Receive)), None)
        if is_first and first and source.origin and not first.origin and not first.token:
            if self.is_incomplete:
                raise Failure(f"skipped: its origin {source.origin} may only be missing in the listing", WHOLE_FIRST)
            if source.inherited and source.inherited[-1].guid in self.late:
                raise Failure(f"skipped: its origin {source.origin} has not been received completely", ORIGIN_FIRST)
            steps[steps.index(first)] = replace(first, lost_origin=source.origin)
        self.create(key, parents)
        self.entries += [(key, step) for step in steps]
        after = after_receives(source, None if is_first else local, self.local_name(key), steps)
        self.target[key] = replace(after, recognised=True)
        self.note_copies(key)
        self.return_children(key)

    def streams_due(self) -> tuple[dict[str, list[Receive]], dict[str, list[str]]]:
        """What can be received before names change again, by dataset, and the placeholders to be created above."""
        receives: dict[str, list[Receive]] = {}
        parents: dict[str, list[str]] = {}
        late: set[str] = set()  # what a step that follows a stream has still to name
        for key, step in self.entries:
            if isinstance(step, Receive) and late.isdisjoint(with_ancestors(key)):
                receives.setdefault(key, []).append(step)
            elif isinstance(step, Create):
                parents.setdefault(key, []).append(step.name)
            elif isinstance(step, LOCAL_STEPS):
                late |= {key, step.old} if isinstance(step, Rename) else {key}
        return receives, parents


# Holds and bookmarks.


def hold_changes(
    source: Dataset, local: Dataset | None, policy: Policy, promoted_clones: Iterable[int] = ()
) -> HoldChanges:
    """What puts our holds where they belong. `promoted_clones` still need the snapshots of these guids as bases."""
    here, partial = (local.snapshots, local.partial) if local else ((), None)
    common = newest_common(source, local)
    # Where the histories have nothing in common, our hold may be the last thing that lets the mirror be repaired. And
    # what another line holds is left alone.
    if local and here and (common is None or others_tags(local, policy)):
        return HoldChanges()
    held = newest_common(source, local, to_hold=True)
    on_source = {*promoted_clones, *([held.source.guid] if held else ())}
    if partial and partial.to_guid is not None:
        on_source.add(partial.to_guid)
    on_local = {common.local.guid} if common else set()
    if common:
        # What is newer than the common one and held stays held: the source had it once and has lost it, so it may be
        # the last copy. By its hold --rollback knows that.
        newer = (it for it in here if it.createtxg > common.local.createtxg)
        on_local.update(it.guid for it in newer if policy.received_tag in (it.tags or ()))
    place_source, release_source = moves(source.snapshots, policy.tag, on_source)
    place_local, release_local = moves(here, policy.received_tag, on_local)
    if partial and partial.to_guid is None:
        release_source = ()  # any of these may be what the token waits for
    return HoldChanges(place_source, place_local, release_source, release_local)


def moves(snapshots: Sequence[Snapshot], tag: str, wanted: set[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of snapshots to hold and to release, so that `tag` is on exactly the guids `wanted`."""
    # Where the tags are unknown, ours is placed once more, and never released.
    place = tuple(it.name for it in snapshots if it.guid in wanted and tag not in (it.tags or ()))
    return place, tuple(it.name for it in snapshots if it.guid not in wanted and tag in (it.tags or ()))


def all_hold_changes(trees: Trees, policy: Policy, left_alone: Container[str] = ()) -> dict[str, HoldChanges]:
    """By dataset of the source, what puts our holds where they belong; nothing for what is left alone, or not ours."""
    mirrors = mirrors_of(trees, policy)
    needed: dict[str, list[int]] = {}  # by dataset, what a promoted clone inherited from it and still has as its base
    for key, source in trees.source.items():
        held = newest_common(source, mirrors.get(key), to_hold=True) if source.inherited else None
        if held and held.source in source.inherited:
            needed.setdefault(held.source.name.partition("@")[0], []).append(held.source.guid)
    found = {
        key: hold_changes(source, mirrors.get(key), policy, needed.get(source.name, ()))
        for key, source in trees.source.items()
        if key not in left_alone and is_ours(source, mirrors.get(key))
    }
    if not trees.whole:  # the hold that looks out of place may belong to what is not listed
        found = {key: HoldChanges(changes.place_source, changes.place_local) for key, changes in found.items()}
    return {key: changes for key, changes in found.items() if changes}


def held_after(dataset: Dataset, tag: str, place: Container[str], release: Container[str] = ()) -> Dataset:
    """The dataset after `tag` was placed on some snapshots and released from others."""

    def hold(snapshot: Snapshot) -> Snapshot:
        tags = (snapshot.tags or NO_TAGS) | {tag} if snapshot.name in place else snapshot.tags
        return replace(snapshot, tags=tags - {tag} if tags and snapshot.name in release else tags)

    return replace(dataset, snapshots=tuple(map(hold, dataset.snapshots)))


def bookmark_changes(source: Dataset, local: Dataset | None, policy: Policy) -> BookmarkChanges:
    """What moves our bookmark to the newest common snapshot."""
    common = newest_common(source, local)
    # Without a common snapshot the old bookmarks stay: they may be the last link. Another dataset's snapshot gets none.
    if common is None or common.source in source.inherited:
        return BookmarkChanges()
    there = {point.name for point in source.bookmarks}
    wanted = source.name + policy.mark(common.source.guid)
    older = sorted(there & {source.name + policy.mark(point.guid) for point in source.bookmarks} - {wanted})
    if wanted in there:
        return BookmarkChanges(None, tuple(older))
    # Somebody else's bookmark may go at any time. So our older ones stay until there is a snapshot to bookmark. And
    # where the name would be too long, there is none: the hold alone has to do.
    if common.source.is_bookmark or len(wanted) > NAME_LIMIT:
        return BookmarkChanges()
    return BookmarkChanges(common.source, tuple(older))


def lost_holds(trees: Trees, policy: Policy, left_alone: Container[str]) -> Iterator[tuple[str, str]]:
    """By local dataset, what to report of holds at the source that are gone."""
    # Somebody has released them, or another backup host with the same tag has moved them. Next time the base itself may
    # be gone.
    for key, local in mirrors_of(trees, policy).items():
        if not local.held_before or key in left_alone:
            continue
        common = newest_common(trees.source[key], local)
        if common is None or common.local != newest_received(local, policy):
            continue
        base = common.source
        if base.tags is not None and not base.is_bookmark and policy.tag not in base.tags:
            line = (
                f"{base.name} is not held by {policy.tag} any more, and is needed: somebody has released it, or "
                "another backup host uses the same tag; let each mirror have a tag of its own"
            )
            yield local.name, line


def holds_of_others(trees: Trees, policy: Policy, plan: TreePlan) -> Iterator[tuple[str, str]]:
    """By local dataset, what to report of holds at the source that are going to be released and may not be ours."""
    # They carry our tag, but no earlier run of this line can have placed them: somebody else may count on them.
    coming: dict[str, set[int]] = {}
    for key, step in ((key, step) for key, step in plan.entries if key in trees.source):
        coming.setdefault(key, set()).update({step.snapshot.guid} if isinstance(step, Receive) else ())
    mirrors = mirrors_of(trees, policy)
    for key, ours in coming.items():
        source, local = trees.source[key], mirrors.get(key)
        is_foreign = local and local.snapshots and not newest_common(source, local)
        if local and (local.held_before or not is_ours(source, local) or is_foreign):
            continue
        if local:
            ours.update(it.guid for it in local.snapshots)
            ours.update({local.partial.to_guid or 0} if local.partial else ())
        held = [it.name for it in source.snapshots if policy.tag in (it.tags or ()) and it.guid not in ours]
        if held:
            line = (
                f"{few(held)} held by {policy.tag}, and there is no mirror of it here: that hold goes now; "
                "if no earlier run of this line left it, let each mirror have a tag of its own"
            )
            yield policy.target_root + key, line


def holds_to_read(source: Dataset, local: Dataset | None, policy: Policy, now: int) -> list[Snapshot]:
    """The snapshots of a source dataset's history whose holds a run must know."""
    # Our tag can be on none that is older than the oldest one we hold here, because that hold is always released last
    # (see `Holds.move_all`). It can be on any if we hold none here, or one that is no snapshot there any more.
    times = {snapshot.guid: snapshot.createtxg for snapshot in source.history}
    ours = [it.guid for it in local.snapshots if it.may_be_held_by(policy.received_tag)] if local else []
    since = min((times.get(guid, 0) for guid in ours), default=0)
    # And before a local snapshot expires, the holds on its twin must be known.
    due = may_expire(source, local, policy, now) if local else set()
    return [it for it in source.history if it.createtxg >= since or it.guid in due]


# Expiry.


def expire(source: Dataset | None, local: Dataset, policy: Policy, now: int) -> Expiry:
    """Which local snapshots are older than keep-days, and which of these expire."""
    common = newest_common(source, local)
    if policy.keep_days is None or source is None or common is None:
        return Expiry()
    # The days count back from the newest common snapshot, or from now if that is earlier. So a source that stopped
    # making snapshots empties nothing.
    cutoff = min(now, common.local.creation) - policy.keep_days * DAY
    destroy, kept = [], []
    twins = {there.guid: there for there in source.history}
    ours = policy.selection.of_snapshots(local.snapshots)
    spared = why_all_kept(local, common, policy)
    for snapshot in ours[: max(len(ours) - policy.keep_min, 0)]:
        if snapshot.creation >= cutoff:
            continue
        why = spared or why_kept(snapshot, twins.get(snapshot.guid), local, common, policy)
        if why:
            kept.append((snapshot, why))
        else:
            destroy.append(snapshot)
    return Expiry(tuple(destroy), tuple(kept), cutoff)


def why_all_kept(local: Dataset, common: CommonPoint, policy: Policy) -> str | None:
    """Why nothing in a local dataset expires, because it may be no mirror of ours; None if it may."""
    # On the wrong host, a line finds datasets that have all that the other side has, and more, and that no run ever
    # received.
    if not local.held_before:
        return "this line held nothing here when the run began, so it is its first one"
    if local.snapshots[-1].guid != common.local.guid:
        return f"there are local snapshots newer than the newest common one, {common.local.short}"
    if others_tags(local, policy):
        return f"another line holds it: {', '.join(others_tags(local, policy))}"
    return None


def why_kept(
    snapshot: Snapshot, twin: Snapshot | None, local: Dataset, common: CommonPoint, policy: Policy
) -> str | None:
    """Why a local snapshot must not expire, however old it is; None if it may. `twin` is its twin at the source."""
    if snapshot.guid == common.local.guid:
        return "the newest common snapshot"
    if local.partial and local.partial.from_guid in (snapshot.guid, None) and local.snapshots:
        return "the base of an interrupted receive, or may be"
    if snapshot.cloned:
        return "a dataset here is its clone"
    if snapshot.tags is None:
        return "its holds could not be read"
    if snapshot.tags:
        return "held by " + ", ".join(sorted(snapshot.tags))
    if twin and twin.tags is None:
        return "the holds on its twin at the source could not be read"
    if twin and twin.tags and policy.tag in twin.tags:
        return f"its twin at the source is held by {policy.tag}"
    return None


def may_expire(source: Dataset | None, local: Dataset, policy: Policy, now: int) -> set[int]:
    """Guids of local snapshots that would expire if every hold on the source that we do not know were absent."""
    if policy.keep_days is None or source is None:
        return set()
    unheld = tuple(replace(it, tags=NO_TAGS) if it.tags is None else it for it in source.history)
    inherited = len(source.inherited)
    hoped = replace(source, inherited=unheld[:inherited], snapshots=unheld[inherited:])
    return {snapshot.guid for snapshot in expire(hoped, local, policy, now).destroy}


# How far a mirror is.

# By snapshot, the bytes that only it needs, and those written until it.
Usage = dict[str, tuple[int, int]]


def mirror_status(source: Dataset, local: Dataset | None, name: str, policy: Policy, usage: Usage) -> MirrorStatus:
    """The status of the local dataset `name` compared to its source."""
    common = newest_common(source, local)
    later = [it for it in source.snapshots if common is None or it.createtxg > common.source.createtxg]
    newer = policy.selection.of_snapshots(later)
    return MirrorStatus(
        name,
        source.name,
        common.local if common else None,
        held_here=common is not None and policy.received_tag in (common.local.tags or ()),
        held_there=common is not None and policy.tag in (common.source.tags or ()),
        behind=len(newer),
        lacking=sum(usage.get(it.name, (0, 0))[1] for it in later),
        pinned=usage.get(common.source.name, (0, 0))[0] if common else 0,
        partial=local.partial.bytes if local and local.partial else None,
    )


def local_status(local: Dataset, policy: Policy, source: str | None = None) -> MirrorStatus:
    """The status of a local dataset by what is here alone."""
    held = newest_received(local, policy)  # what both sides had in the last complete run
    partial = local.partial.bytes if local.partial else None
    return MirrorStatus(local.name, source, held, held_here=held is not None, partial=partial)


# ---------------------------------------------------------------------------------------------------------------------
# Room 5: Commands
# ---------------------------------------------------------------------------------------------------------------------

# A command as its words. It becomes text for a shell only in `joined_by_and` and `remote_line`, so only they quote.
Command = tuple[str, ...]

# Where zfs may be installed: the PATH of cron, and of a login without a terminal, often lacks the sbin directories.
SBIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Bytes of names in one command. A remote command travels as one word, and Linux takes at most 128 KiB in a word.
BATCH_BYTES = 64 * 1024

# What each name costs besides its own bytes, about: a space, and quotes if it contains one.
NAME_COST = 8


def joined_by_and(commands: Sequence[Command]) -> str:
    """A line for sh that runs commands one after another, up to the first that fails."""
    *first, last = map(shlex.join, commands)
    # exec: no shell waits beside the last one, so its end, and a signal to it, is what the caller sees.
    return " && ".join([*first, f"exec {last}"])


def remote_line(*commands: Command, then: Command = (), look_for: Iterable[str] = ()) -> str:
    """One line for the remote login shell that runs `commands` one after another.

    With `then`, their output passes through that command, and the exit status is that of whichever failed first.
    Before they run, the paths of programs to `look_for` are printed on stderr, one a line.
    """
    words = joined_by_and(commands)
    if then:
        # A pipe of sh has the exit status of its last process alone. So each side writes its status to fd 4 if it
        # failed; $( ) collects these, and the first is ours. The output reaches the real stdout through fd 3:
        #
        #     first | second >&3
        #       \________\_______ >&4, which is $( )
        #
        # Neither process keeps 3 or 4 open itself: who reads there waits until the last of them has closed it.
        first, second = f"( {words} ) 3>&- 4>&-", f"{shlex.join(then)} >&3 3>&- 4>&-"
        statuses = f"$( ( ( {first} || echo $? >&4 ) | ( {second} || echo $? >&4 ) ) 4>&1 )"
        words = f"exec 3>&1; set -- {statuses}; exit ${{1:-0}}"
    look = f"for it in {' '.join(look_for)}; do command -v $it; done >&2; " if look_for else ""
    # The login shell may be csh or fish. These agree with sh on what is single-quoted, unless it contains a newline,
    # `!` or a backslash; names with one of those are refused earlier. LC_ALL: we look for messages in English.
    return f"sh -c {shlex.quote(f'PATH=$PATH:{SBIN} LC_ALL=C; export PATH LC_ALL; {look}{words}')}"


# What compresses a stream for the wire, and what restores it.
COMPRESSORS: dict[str, tuple[Command, Command]] = {
    "zstd": (("zstd", "-q", "-c", "-T0"), ("zstd", "-q", "-d", "-c")),
    "lz4": (("lz4", "-q", "-c"), ("lz4", "-q", "-d", "-c")),
    "pigz": (("pigz", "-c"), ("pigz", "-d", "-c")),
}


def batches(names: Iterable[str], most: int = BATCH_BYTES) -> Iterator[list[str]]:
    """Split `names` into lists of at most `most` bytes, so that each list fits into one command."""
    batch: list[str] = []
    size = 0
    for name in names:
        if batch and size + len(name) > most:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += len(name) + NAME_COST
    if batch:
        yield batch


# The property of the local root that says since when runs fail. The first run that fails sets it, and the first that
# succeeds removes it. It is a property because there is no state outside ZFS.
FAILING = "zfs_replicate:failing"

# Set on another tool's mirror before our first stream into it: to the guid of its newest snapshot. While that one is
# the newest, no stream of ours has arrived. We remove it after the first stream that brings properties. A source cannot
# forge it: streams leave it out (`LEFT_OUT`), and only a value that was set here counts.
TAKEN_OVER = "zfs_replicate:taken-over"


# Commands that look. What they are asked about follows at their end.

# Prints those names that exist. Exits 1 if one does not.
LIST_EXISTING: Command = ("zfs", "list", "-H", "-o", "name", "-t", DATASET_KINDS)

# Only what was set on this very dataset: what came with a stream is the source's word, whose TABs and newlines zfs
# prints as they are.
GET_FAILING: Command = ("zfs", "get", "-H", "-s", "local", "-o", "value", FAILING)

LIST_USAGE: Command = ("zfs", "list", "-Hp", "-r", "-t", "snapshot", "-o", "name,used,written")
LIST_SPACE: Command = ("zfs", "list", "-Hp", "-o", "used,available")
LIST_MOUNTED: Command = ("zfs", "list", "-H", "-o", "name,mounted")
LIST_HOLDS: Command = ("zfs", "holds", "-H")
LIST_IVSETS: Command = ("zfs", "list", "-Hp", "-t", "snapshot", "-o", "name,ivsetguid")

# With which dataset each shares its encryption key.
LIST_KEY_ROOTS: Command = ("zfs", "list", "-H", "-o", "name,encryptionroot")

# Datasets and snapshots alone, without what belongs to them. Exits 1 if one does not exist.
LIST_EXACTLY: Command = ("zfs", "list", "-Hp", "-t", LIST_KINDS, "-o", ",".join(LIST_COLUMNS))

# Which properties were set or received, without their values, which may be any text.
LIST_SOURCES: Command = ("zfs", "get", "-H", "-s", "local,received", "-o", "name,property,source", "all")

# A property, and the names of the datasets, follow.
GET_VALUE: Command = ("zfs", "get", "-Hp", "-o", "value")
GET_VALUES: Command = ("zfs", "get", "-Hp", "-o", "name,value")

# Those datasets whose mountpoint came with a stream.
LIST_FOREIGN_MOUNTPOINTS: Command = ("zfs", "get", "-H", "-s", "received", "-o", "name", "mountpoint")

# How many objects each user and group owns. An empty filesystem has one: its root directory.
COUNT_FILES: Command = ("zfs", "userspace", "-Hp", "-o", "objused")

DECODE_TOKEN: Command = ("zfs", "send", "-nvt")

# Who may do what with a dataset, by what was allowed on it and on its ancestors.
LIST_RIGHTS: Command = ("zfs", "allow")

# The versions of the programs and of the kernel module.
ZFS_VERSION: Command = ("zfs", "version")
CLOCK_TIME: Command = ("date", "+%s")

STATE_COLUMNS = ("name", "type", "readonly", "canmount", "mounted", "sharenfs", "sharesmb")
LIST_STATE: Command = ("zfs", "list", "-Hp", "-r", "-t", DATASET_KINDS, "-o", ",".join(STATE_COLUMNS))


def list_tree(
    *names: str, alone: bool = False, kinds: str = LIST_KINDS, columns: tuple[str, ...] = LIST_COLUMNS
) -> Command:
    """List these datasets and everything below. With `alone`: these datasets with their snapshots, and the bare rows of
    their children, which zfs cannot leave out. Exits 1 if one does not exist."""
    depth = ("-d", "1") if alone else ("-r",)
    return ("zfs", "list", "-Hp", *depth, "-t", kinds, "-o", ",".join(columns), *names)


def list_fast(*names: str, alone: bool = False) -> tuple[Command, Command]:
    """Of points only what zfs answers fast, a command for itself: one slow column makes all of them slow."""
    datasets = list_tree(*names, alone=alone, kinds=DATASET_KINDS)
    return datasets, list_tree(*names, alone=alone, kinds=POINT_KINDS, columns=FAST_COLUMNS)


# Verbs of zfs that change nothing, on either side.
LOOKING = ("list", "get", "holds", "send", "allow", "userspace", "version")


def changed_by(command: Command) -> list[str]:
    """The datasets that a command changes or creates, by name."""
    # `zpool sync` writes out what was written, and changes nothing else. What is not known here counts as a change.
    if command[:2] in (SYNC_POOL, ("zpool", "get"), CLOCK_TIME):
        return []
    words = command[2:] if command[0] == "zfs" else command
    if command[0] == "zfs" and command[1] in LOOKING and (command[1] != "allow" or len(words) == 1):
        return []
    if command[1] in ("hold", "release"):
        words = words[1:]  # without the tag
    elif command[1] in ("recv", "set", "create", "inherit", "bookmark"):
        words = words[-1:]  # without the options and values before it
    # Of any other verb, also one that nobody has thought of here, each word may be a dataset.
    return [re.split("[@#]", word)[0] for word in words if not word.startswith("-")]


def outside(command: Command, root: str) -> list[str]:
    """The datasets outside the local tree that a command would change. It must not be run if there are any."""
    # A root that makes way for itself is in the tree under both names (`MakeWay`).
    wrong = [name for name in changed_by(command) if not any(is_below(name, it) for it in (root, root + MADE_WAY))]
    if command[1] == "create":  # the ancestors of the root as well
        return [name for name in wrong if name not in with_ancestors(root)]
    if command[1] == "rename":  # --quarantine of the root itself: its new name is beside it
        return [name for name in wrong if not (name.startswith(root + ASIDE) and command[-1] == name)]
    return wrong


# Flags of zfs send that keep blocks as they are stored, over 128 KiB (-L) and compressed (-c), and the features that
# the receiving pool needs for each.
STREAM_FLAGS = {"-L": ("large_blocks",), "-c": ("lz4_compress", "zstd_compress")}


def stream_flags(features: Iterable[str]) -> Command:
    """The flags of zfs send for a receiving pool with these features."""
    # Once used, a flag stays, because a pool gains features and never loses one. Dropping -L between increments lost
    # data once (https://github.com/openzfs/zfs/issues/6224), and is refused since.
    return tuple(flag for flag, needs in STREAM_FLAGS.items() if set(needs) <= set(features))


# zfs get may list these as set, but zfs recv takes no value for them. Nor does a receive lose them.
NEVER_SET_AGAIN = (
    "volsize", "volblocksize", "encryption", "keyformat", "keylocation", "pbkdf2iters", "version", "filesystem_count",
    "snapshot_count", TAKEN_OVER,
)  # fmt: skip


# The features that a stream may need of the receiving pool, by their bit in its header (zfs_ioctl.h of OpenZFS).
FEATURE_BITS = {
    19: "large_blocks", 23: "large_dnode", 24: "encryption", 25: "zstd_compress", 28: "longname", 29: "large_microzap",
}  # fmt: skip


def lacking(said: str, features: Iterable[str]) -> list[str]:
    """The features that a pool must gain for a stream, by what zfs recv `said`. It has these `features`."""
    flags = re.search("unsupported feature, feature flags = ([0-9a-f]+)", said)
    if not flags and "pool must be upgraded" not in said:
        return []
    bits = int(flags[1], 16) if flags else -1  # without the flags, any of them may be meant
    return [name for bit, name in FEATURE_BITS.items() if bits >> bit & 1 and name not in features]


def send(dataset: Dataset, step: Receive, raw: bool, flags: Command) -> Command:
    """The sending end of a step."""
    if step.token:  # which contains the snapshots and the flags; zfs takes hardly any other beside it
        return ("zfs", "send", "-t", step.token)
    base: Command = ()
    if step.base is not None:
        base = ("-i", step.base.name)
    # With properties; but zfs sends those of an encrypted dataset only in a raw stream.
    how = ("-p", "-w") if raw else () if dataset.encrypted else ("-p",)
    # Never -R: it renames datasets at the receiver, and needs the snapshot on every child.
    return ("zfs", "send", *flags, *how, *base, step.snapshot.name)


def estimate(sending: Command) -> Command:
    """The command that tells the size of a stream instead of sending it."""
    return (*sending[:2], "-nP", *sending[2:])


# What a mirror has of its own, whatever the source says: the properties of zfsprops(7) of OpenZFS 2.4 that belong to a
# place and not to the data. All others come along: they belong to the data (recordsize, compression, acltype, ...), or
# do nothing to a filesystem that is read-only and not mounted (sync, overlay, vscan, contexts, users' quotas). The
# source's values of these are kept beside ours as the received ones, so `zfs send -b` gives them back.
OVERRIDES = (
    # Nobody writes to the mirror, mounts it, or sees it over the network. These are set and not only left out of the
    # stream: what is left out is inherited, and the pool here may well be shared.
    "readonly=on",
    "canmount=noauto",
    "sharenfs=off",
    "sharesmb=off",
    # Mounted by somebody who looks into it, it gives no rights away. (exec gives none away: it is as at the source.)
    "setuid=off",
    "devices=off",
    # It belongs to this host and not to a container, which would also keep us from renaming it.
    "zoned=off",
    # Volumes and their snapshots have no device nodes, in which this host would look for partitions and file systems.
    "volmode=none",
    "snapdev=hidden",
    # Nothing limits what arrives. Set to none and not only left out: before OpenZFS 2.2, and from there up to 2.3.9 and
    # 2.4.4, every second increment takes over those properties that -x excludes and that do not inherit.
    "quota=none",
    "refquota=none",
    "reservation=none",
    "refreservation=none",
    "snapshot_limit=none",
    "filesystem_limit=none",
    # systemd's generator of mount units makes none for it. A unit for canmount=noauto would be started by whatever
    # requires a path below it (https://github.com/openzfs/zfs/issues/17144).
    "org.openzfs.systemd:ignore=on",
)

# Properties that streams leave out, and that get no value of our own. `keylocation` cannot be left out: see
# `key_places`.
# - mountpoint: no fixed value would do. Left out, it follows from the parent's.
# - our own: they are notes of this host, and a source could else forge them.
# - those of systemd's generator, which reads them from a table with TABs and newlines: one value could forge the row of
#   another dataset (history_event-zfs-list-cacher.sh of OpenZFS).
GENERATED = ("requires", "requires-mounts-for", "before", "after", "wanted-by", "required-by", "nofail")
LEFT_OUT = ("mountpoint", FAILING, TAKEN_OVER, *(f"org.openzfs.systemd:{name}" for name in GENERATED))

# Properties that only one kind of dataset has (zfsprops(7)): zfs recv refuses them for the other kind.
OF_FILESYSTEMS = (
    "aclinherit aclmode acltype atime canmount casesensitivity devices direct dnodesize exec filesystem_limit longname "
    "mountpoint nbmand normalization overlay quota recordsize refquota relatime setuid sharenfs sharesmb snapdir "
    "utf8only vscan xattr zoned"
)
OF_VOLUMES = "volblocksize volsize volthreading"
NOT_OF = {"filesystem": OF_VOLUMES.split(), "volume": OF_FILESYSTEMS.split()}


def first_receive_options(source: Dataset, parent: Dataset | None, step: Receive, policy: Policy) -> Command:
    """Options for the first receive only: origin and encryption. `parent` is the parent at the source."""
    origin = ("-o", f"origin={step.origin}") if step.origin else ()
    if source.encrypted:
        return origin
    # A plain stream carries encryption=off. Drop it (-x), so that the dataset inherits from its local parent; unless
    # that parent is a raw mirror, whose key we do not have.
    return (*origin, *(("-o", "encryption=off") if parent and policy.raw(parent) else ("-x", "encryption")))


def kinds_values(kind: str, properties: Properties) -> dict[str, str]:
    """The OVERRIDES of this kind of dataset, without those that the user ignores."""
    values = dict(value.partition("=")[::2] for value in OVERRIDES)
    return {it: value for it, value in values.items() if it not in NOT_OF[kind] and it not in properties.ignored}


@dataclass(frozen=True)
class Exposure:
    """What a local dataset lacks to be inert.

    `missing` are the values to set. `own` are properties that are set here and would be lost with the first ones that a
    stream brings (see `receive`). `mountpoint_came`: its mountpoint came from the source. `is_marked`: it is being
    taken over, and `TAKEN_OVER` is set, or will be.
    """

    key: str
    missing: dict[str, str]
    own: tuple[str, ...]
    is_mounted: bool
    mountpoint_came: bool
    is_marked: bool = False

    def __str__(self) -> str:
        return "set " + ", ".join(f"{key}={value}" for key, value in self.missing.items())


def exposure(
    key: str, local: Dataset, sources: Mapping[str, str], properties: Properties, is_mounted: bool
) -> Exposure:
    """What a local dataset lacks to be inert. `sources` say of its properties whether they are set here (`local`) or
    were `received`."""
    missing = {it: value for it, value in kinds_values(local.kind, properties).items() if sources.get(it) != "local"}
    own = tuple(it for it, source in sources.items() if source == "local" and it not in NEVER_SET_AGAIN)
    is_marked = sources.get(TAKEN_OVER) == "local"
    is_new = not (local.held_before or local.recognised)  # so another tool's mirror, which we take over
    # What is set here gets lost with the first properties that arrive, and only then.
    is_first = "received" not in sources.values() and (is_marked or is_new)
    marked = {TAKEN_OVER: str(local.snapshots[-1].guid)} if is_new and not is_marked else {}
    came = sources.get("mountpoint") == "received"
    # What we held before stays mounted: an administrator may have mounted a mirror of ours, to look into it.
    shows = is_mounted and not local.held_before
    own = (*own, *missing) if is_first else ()
    return Exposure(key, {**missing, **marked}, own, shows, came, is_marked or bool(marked))


SHARES = ("sharenfs", "sharesmb")
LIMITS = ("quota", "refquota", "reservation", "refreservation", "snapshot_limit", "filesystem_limit")


# The features of a pool that streams need.
FEATURES = tuple(dict.fromkeys((*FEATURE_BITS.values(), *(need for needs in STREAM_FLAGS.values() for need in needs))))


def list_features(pool: str) -> Command:
    """Prints health and capacity of the pool, and one of `disabled`, `enabled`, `active` for `feature@NAME` of those
    FEATURES that its zfs knows: the others it passes over.

    By name, for a pool may have properties of its users too, which are printed as they are, newlines and all.
    """
    names = ("health", "capacity", *(f"feature@{name}" for name in FEATURES))
    return ("zpool", "get", "-Hp", "-o", "property,value", ",".join(names), pool)


# Commands that change something. There are no others: a test searches the file for tuples that begin like one. They
# name datasets of the local tree only (see `outside`), except `hold`, `release`, and our own bookmarks at the source.


# A placeholder never mounts. -u: without it zfs tries once, and an account that is not root may not.
CREATE_PARENT: Command = ("zfs", "create", "-u", "-o", "canmount=off")

MAKE_READ_ONLY: Command = ("zfs", "set", "readonly=on")
INHERIT: Command = ("zfs", "inherit")  # a property, and the name of the dataset, follow
UNMOUNT: Command = ("zfs", "unmount")
ABORT_RECEIVE: Command = ("zfs", "recv", "-A")

# Until a transaction group is written out, `written` and `zfs userspace` do not count what is in it.
SYNC_POOL: Command = ("zpool", "sync")


def set_failing(root: str, since: int) -> Command:
    # With the root, so that a copy of the property (a clone, a restored dataset) says nothing: see `parse_failing`.
    return ("zfs", "set", f"{FAILING}={since} {root}", root)


def clear_failing(root: str) -> Command:
    return (*INHERIT, FAILING, root)


def hold(tag: str, snapshots: Iterable[str]) -> Command:
    # Never -r: one tag already there on any child, and nothing at all is held (a single atomic task).
    return ("zfs", "hold", tag, *snapshots)


def release(tag: str, snapshots: Iterable[str]) -> Command:
    return ("zfs", "release", tag, *snapshots)


def destroy(snapshots: Iterable[Snapshot]) -> Command:
    """Destroy snapshots of one dataset. Raises AssertionError for any other names."""
    names = [snapshot.name for snapshot in snapshots]
    datasets = {name.split("@")[0] for name in names}
    # Without `@` zfs would destroy the dataset itself. `%` is a range, `,` begins another name, `#` a bookmark.
    if len(datasets) != 1 or any(name.count("@") != 1 or re.search("[%,#]", name) for name in names):
        raise AssertionError(f"refusing to destroy anything but plain snapshots of one dataset: {names}")
    return ("zfs", "destroy", datasets.pop() + "@" + ",".join(name.split("@")[1] for name in names))


def rollback(to: Snapshot) -> Command:
    # -r destroys newer snapshots, but none that is held or has a clone (that would take -R).
    return ("zfs", "rollback", "-r", to.name)


def rename(name: str, new_name: str) -> Command:
    return ("zfs", "rename", name, new_name)


def bookmark(snapshot: Snapshot, mark: str) -> Command:
    return ("zfs", "bookmark", snapshot.name, snapshot.name.partition("@")[0] + mark)


def destroy_bookmark(name: str) -> Command:
    """Destroy a bookmark. Raises AssertionError for any other name."""
    if name.count("#") != 1 or "@" in name:  # it would be a dataset or a snapshot
        raise AssertionError(f"refusing to destroy anything but a bookmark: {name}")
    return ("zfs", "destroy", name)


def set_values(name: str, values: Mapping[str, str]) -> Command:
    return ("zfs", "set", *(f"{key}={value}" for key, value in values.items()), name)


def receive(
    source: Dataset,
    local: Dataset | None,
    snapshot: str,
    properties: Properties = Properties(),
    born: Command = (),
    *,
    own: Mapping[str, str] = {},
) -> Command:
    """The receiving end of a step: resumable, unmounted, and read-only from the first moment.

    `snapshot` is the full name of what comes; `born` are the options for the first receive. `own` are the properties
    that are set on the dataset and would be lost with the first ones that arrive.
    """
    others = NOT_OF[source.kind]
    values = kinds_values(source.kind, properties)
    said = dict(value.partition("=")[::2] for value in properties.values)
    values.update({key: value for key, value in said.items() if key not in others and key not in properties.ignored})
    left_out = [key for key in (*LEFT_OUT, *properties.ignored) if key not in others and key not in values]
    if local is not None and local.snapshots:
        # What was set on the first receive is left out of increments: the administrator may have changed it since.
        # A dataset that never received a property loses all that are set there when the first ones arrive
        # (first_recvd_props in zfs_ioctl.c). `own` sets them again in the same moment.
        left_out += values
        values = dict(own)
    options = [word for key, value in values.items() for word in ("-o", f"{key}={value}")]
    options += [word for key in left_out if key not in values for word in ("-x", key)]
    if local is None:
        options += born
    # -F only where it overwrites nothing: on a filesystem known to be empty, with nothing below it.
    force = ("-F",) if local and local.empty and not local.snapshots and not local.parent else ()
    # The snapshot is named, so that zfs recv takes no package of several datasets or snapshots: one could rename, roll
    # back and destroy whatever is below. -h drops the holds that the sender puts on it.
    return ("zfs", "recv", "-s", "-u", "-h", *force, *options, snapshot)


# What an account that is not root must be allowed for each verb, besides the properties that it sets (zfs-allow(8)).
RIGHTS = {
    "send": "send",
    "hold": "hold",
    "release": "release",
    "bookmark": "bookmark",
    "destroy": "destroy,mount",
    "rollback": "rollback,destroy,mount",
    "rename": "rename,create,mount",
    "unmount": "mount",
    "set": "",
    "create": "create,mount",
    "recv": "receive,create,mount",
    "recv -A": "receive,destroy,mount",
    "userspace": "userused,userquota,userobjused,userobjquota",
}


# The verbs that a plain crontab line runs on either side.
SOURCE_RIGHTS = ("send", "hold", "release")
TARGET_RIGHTS = ("recv", "recv -A", "create", "destroy", "hold", "release", "userspace")


@dataclass(frozen=True)
class Account:
    """A `user` that runs zfs on a host without being root there, and the tree that it works on."""

    user: str
    host: str
    tree: str


def rights_of(text: str, user: str) -> set[str]:
    """The rights of a user, by what `zfs allow` has printed."""
    # The rights of every group count: we do not know which groups he is in on that host.
    found = re.findall(r"^\t(?:user (\S+)|group \S+|everyone) (\S+)$", text, re.MULTILINE)
    return {right for name, rights in found if name in ("", user) for right in rights.split(",")}


def right_to_set(key: str) -> str:
    """The right that setting a property takes."""
    return "userprop" if ":" in key else key


def allow_command(command: Command, account: Account) -> str:
    """What root must run so that the account may run `command` anywhere in its tree; "" if no right is known for it."""
    verb = " ".join(command[1:3]) if "-A" in command[2:3] else command[1]
    if verb not in RIGHTS:
        return ""
    values = command[2:-1] if verb in ("create", "recv", "set") else ()
    properties = [name for name, is_set, _ in (word.partition("=") for word in values) if is_set and name != "origin"]
    rights = [RIGHTS[verb], *map(right_to_set, properties)]
    place = re.split("[@#]", command[-1])[0]
    # Creating or moving a dataset takes the rights on its parent. And on a tree that does not exist yet, zfs allows
    # nothing.
    if verb in ("create", "rename") or (verb == "recv" and properties):
        place = place.rpartition("/")[0] or place
    if f"{place}/".startswith(f"{account.tree}/"):
        place = account.tree
    words = ("zfs", "allow", account.user, ",".join(filter(None, dict.fromkeys(rights))), place)
    return f"as root on {account.host}: {shlex.join(words)}"


# ---------------------------------------------------------------------------------------------------------------------
# Room 6: Hosts
# ---------------------------------------------------------------------------------------------------------------------

CONNECT_SECONDS = 30.0
# Longest silence of a command, and of a stream. It is an hour because `zfs list` prints nothing until it has sorted
# everything, and an incremental `zfs send` prints nothing until it has found what changed.
STALL_SECONDS = 3600
KEEPALIVE_SECONDS = 15
# How long a link may leave bytes unacknowledged before it counts as lost.
LINK_SECONDS = 60
# How long a process may take to end when told to.
END_SECONDS = 5

# The most that a listing may print, and any other command. The longest is the listing of a tree: a million snapshots
# with names of 130 bytes are that long. All of it is in memory, as bytes and then as text.
OUTPUT_BYTES = 192 << 20
ANSWER_BYTES = 32 << 20
# How much is kept of a command's stderr: the end of it. zfs says a line for each name, some 6 times as long as a short
# name. So what it says of BATCH_BYTES of names is kept whole, and can be read name by name.
COMPLAINT_BYTES = 8 * BATCH_BYTES
# How much to read at a time: what a pipe holds.
READ_BYTES = 64 * 1024

# For every ssh client that we start.
ALIVE_SETTINGS = (
    # No endless wait, and no question asked.
    f"ServerAliveInterval={KEEPALIVE_SECONDS}",
    f"ServerAliveCountMax={LINK_SECONDS // KEEPALIVE_SECONDS}",
    f"ConnectTimeout={CONNECT_SECONDS:.0f}",
    "BatchMode=yes",
    # Learn no further key of a host: with it somebody could pose as that host after it was installed anew.
    "UpdateHostKeys=no",
)


@dataclass(frozen=True)
class Answer:
    """Exit status and output of a command."""

    status: int
    stdout: str
    stderr: str

    @classmethod
    def of(cls, status: int, stdout: bytes | bytearray, stderr: bytes | bytearray) -> Answer:
        # In a str with one character beyond Latin, each character takes two bytes or four. What is long is a listing,
        # whose names are ASCII: read as that, a million snapshots cannot take four times the memory.
        encoding = "utf-8" if len(stdout) <= ANSWER_BYTES else "ascii"
        return cls(status, stdout.decode(encoding, errors="surrogateescape"), stderr.decode(errors="surrogateescape"))


class Host(Protocol):
    """Where commands run. `label` names it to the user. `account` is who runs them there; None if that is root."""

    label: str
    account: Account | None

    def ask(self, *commands: Command) -> Answer:
        """Run commands one after another, up to the first that fails. Any exit status is an answer. Raises LinkLost or
        Stuck if none came."""

    def has(self, program: str) -> bool:
        """Whether one of the COMPRESSORS is installed there. Valid only after the first command."""

    def stream_command(self, *commands: Command, then: Command = ()) -> Command:
        """A local command that runs `commands` one after another on this host. Its standard input and output are
        theirs; with `then`, their output passes through that command first."""

    def connected(self) -> bool:
        """Whether the connection that `stream_command` uses still stands, after a stream has failed."""

    def close(self) -> None:
        """Close the connection."""


def run(host: Host, *commands: Command) -> str:
    """Run commands one after another, and return their output. Raises CommandFailed if one fails."""
    return output(host, commands[0], host.ask(*commands))


HERE = "this host"
LOGIN_TALKS = (
    "if the login prints that: let its start-up files be silent without a terminal (~/.bashrc, ~/.profile, ~/.zshenv, "
    "~/.cshrc), and see command= in authorized_keys and its login shell"
)


def output(host: Host, command: Command, answer: Answer) -> str:
    """What `command` printed. Raises CommandFailed unless its exit status is 0."""
    if answer.status == 127:  # a shell's word for "not found"
        raise CommandFailed(
            f"{host.label} has no program {command[0]!r} in its PATH or in {SBIN}",
            "install it there, or check that the login may run it",
        )
    if answer.status != 0:
        # A login that is refused, by nologin or by a forced command, gives its reason on stdout.
        said = answer.stderr.strip() or answer.stdout.strip() or f"exit status {answer.status} and no message"
        hint = hint_for(said)
        hint = allow_hint(host, command, said) or (hint and f"on {host.label}: {hint}")
        login = LOGIN_TALKS if host.label != HERE and not answer.stderr.strip() else ""
        raise CommandFailed(f"{' '.join(command[:2])} failed on {host.label}: {said}", hint, login)
    return answer.stdout


def allow_hint(host: Host, command: Command, said: str) -> str:
    """What gives our account the right that zfs says it lacks; "" if zfs says something else."""
    return allow_command(command, host.account) if host.account and "permission denied" in said else ""


def stuck(host: Host, command: Command, stall_timeout: float) -> Stuck:
    return Stuck(
        f"{' '.join(command[:2])} on {host.label} has not ended after {format_timeout(stall_timeout)}",
        "is the pool suspended, or very busy? zpool status; patience is a matter of --stall-timeout",
    )


class Output:
    """Collects what a command prints. `doing` names the command, `label` its host.

    `add` raises Failure for more than OUTPUT_BYTES of `zfs list`, or ANSWER_BYTES of any other command: a host that
    never stops talking must not fill our memory.
    """

    def __init__(self, doing: str, label: str) -> None:
        self.doing = doing
        self.label = label
        self.most = OUTPUT_BYTES if doing == "zfs list" else min(OUTPUT_BYTES, ANSWER_BYTES)
        self.kept = bytearray()

    def add(self, data: bytes) -> None:
        self.kept += data
        if len(self.kept) > self.most:
            raise Failure(
                f"{self.doing} on {self.label} has printed more than {format_bytes(self.most)}: no answer is so long",
                "see what it prints when run by hand (-vv shows it); "
                "a tree of millions of snapshots is mirrored in parts, with a line for each",
            )


class Tail:
    """Keeps the last `most` bytes of what a program says, however much that is."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept = bytearray()

    def add(self, data: bytes) -> None:
        self.kept += data
        if len(self.kept) > 2 * self.most:  # not at every call, because each cut moves all that is kept
            del self.kept[: -self.most]

    def last(self) -> bytearray:
        return self.kept[-self.most :]


# Seconds of one wait: epoll counts milliseconds in 32 bits, and --stall-timeout may be years.
LONGEST_WAIT = 86400.0


def listen(process: subprocess.Popen[bytes], output: Output, complaints: Tail, until: float) -> None:
    """Read stdout and stderr of a process until it has ended. Raises TimeoutExpired if it has not ended by `until`,
    however much it still says."""
    # Both at once: a process that waits until somebody reads its stderr prints nothing on stdout.
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, output.add)  # type: ignore[arg-type]  # it is a pipe
        selector.register(process.stderr, selectors.EVENT_READ, complaints.add)  # type: ignore[arg-type]
        while selector.get_map():
            left = until - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(process.args, left)
            for key, _ in selector.select(min(left, LONGEST_WAIT)):
                data = os.read(key.fd, READ_BYTES)
                if data:
                    key.data(data)
                else:
                    selector.unregister(key.fileobj)
    process.wait(max(until - time.monotonic(), 0))


def ignore_line(line: str) -> None:
    pass


def in_background(work: Callable[[], Any]) -> Future[Any]:
    """Start `work` in a thread. Returns its future result, or exception."""
    # Not a ThreadPoolExecutor: at exit Python waits for the threads of one, and a signal must end us at once.
    answer: Future[Any] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:  # noqa: BLE001 -- it is raised again by whoever asks for the result
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs because we are leaving early."""
    for signal_it in (process.terminate, process.kill):
        if process.poll() is None:
            # Nobody can end a process that waits for a suspended pool, and we may not end one that runs by sudo, as
            # root. Either is left alone then.
            with contextlib.suppress(subprocess.TimeoutExpired, PermissionError):
                signal_it()
                process.wait(timeout=END_SECONDS)


def account_of(user: str, host: str, tree: str) -> Account | None:
    return None if user == "root" or not tree else Account(user, host, tree)


def own_name() -> str:
    return user_name(os.geteuid())  # not $USER, which su and cron may leave as it was


def user_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


class LocalHost:
    """This machine. A command that has not ended after `stall_timeout` seconds is ended, as is one that prints too
    much. `note` is told each command; `tree` is what `account` works on."""

    def __init__(
        self,
        label: str = HERE,
        note: Callable[[str], None] = ignore_line,
        stall_timeout: float = STALL_SECONDS,
        tree: str = "",
    ) -> None:
        self.label = label
        self.note = note
        self.stall_timeout = stall_timeout
        self.account = account_of(own_name(), label, tree)

    def ask(self, *commands: Command) -> Answer:
        command = self.stream_command(*commands)
        self.note(f"{self.label}: {shlex.join(command)}")
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environment())
        except FileNotFoundError:
            return Answer(127, "", f"{command[0]}: not found")
        except OSError as error:
            return Answer(126, "", f"{command[0]}: {error.strerror}")
        with contextlib.ExitStack() as stack:
            stack.callback(end, process)
            stack.callback(process.stdout.close)  # type: ignore[union-attr]  # it is a pipe
            stack.callback(process.stderr.close)  # type: ignore[union-attr]
            output, complaints = Output(" ".join(command[:2]), self.label), Tail(COMPLAINT_BYTES)
            try:
                listen(process, output, complaints, time.monotonic() + self.stall_timeout)
            except subprocess.TimeoutExpired:
                raise stuck(self, command, self.stall_timeout) from None
        return Answer.of(process.returncode, output.kept, complaints.last())

    def has(self, program: str) -> bool:
        return installed(program)

    def stream_command(self, *commands: Command, then: Command = ()) -> Command:
        assert not then, "there is no wire to this host"
        return commands[0] if len(commands) == 1 else ("sh", "-c", joined_by_and(commands))

    def connected(self) -> bool:
        return True

    def close(self) -> None:
        pass


class WrappedHost:
    """A host behind a check. `admit` returns what runs instead of some commands, or raises Failure."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.label = host.label
        self.account = host.account
        self.connected = host.connected
        self.has = host.has
        self.close = host.close

    def admit(self, *commands: Command) -> Iterable[Command]:
        raise NotImplementedError

    def ask(self, *commands: Command) -> Answer:
        return self.host.ask(*self.admit(*commands))

    def stream_command(self, *commands: Command, then: Command = ()) -> Command:
        return self.host.stream_command(*self.admit(*commands), then=then)


class SudoHost(WrappedHost):
    """A host on which every command runs by sudo, which must not ask for a password."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.account = None

    def admit(self, *commands: Command) -> Iterable[Command]:
        # Nobody needs to be root for the time of day, and sudo may be set up to permit zfs alone.
        return [it if it == CLOCK_TIME else ("sudo", "-n", *it) for it in commands]

    def ask(self, *commands: Command) -> Answer:
        answer = super().ask(*commands)
        # If zfs is missing, sudo says so itself, and exits with 1.
        return Answer(1, "", "sudo is not installed\n") if answer.status == 127 else answer


class FencedHost(WrappedHost):
    """A host on which no command can change anything outside the local tree `root`."""

    # No plan contains such a command. But if that were wrong, it would cost data of which nobody has a copy. So each
    # command is checked once more before it runs. Keep this wrapper outermost: below `sudo -n` it would see no zfs.

    def __init__(self, host: Host, root: str) -> None:
        super().__init__(host)
        self.root = root

    def admit(self, *commands: Command) -> Iterable[Command]:
        self.check(*commands)
        return commands

    def check(self, *commands: Command) -> None:
        """Raises Failure for a command that would change anything outside."""
        for command in commands:
            wrong = outside(command, self.root)
            if wrong:
                raise Failure(
                    f"refusing {' '.join(command[:2])!r}: it names {wrong[0][:NAME_LIMIT]!r}, not in {self.root}",
                    "this is a fault of the program, and nothing was changed by it: please report it",
                )


class ReadOnly(FencedHost):
    """A host on which no command can change anything. --dry-run, --status, --check and --doctor get no other, so an
    auditor need not read what they do."""

    def __init__(self, host: Host) -> None:
        super().__init__(host, root="")

    def check(self, *commands: Command) -> None:
        """Raises AssertionError for a command that would change anything."""
        for command in commands:
            if changed_by(command):
                raise AssertionError(f"a mode that only looks must not change anything: {command}")

    def stream_command(self, *commands: Command, then: Command = ()) -> Command:
        raise AssertionError(f"a mode that only looks must not receive anything: {commands}")


def environment() -> dict[str, str]:
    """Our environment, with untranslated messages, and with the sbin directories that cron leaves out of PATH."""
    path = ":".join(filter(None, (os.environ.get("PATH"), SBIN)))  # an empty entry would mean the current directory
    return {**os.environ, "LC_ALL": "C", "PATH": path}


def installed(program: str) -> bool:
    """Whether this host has a program."""
    return shutil.which(program, path=environment()["PATH"]) is not None


# Beyond any number of 64 bits, so no count of anything. Some formats raise for much larger ones.
MAX_FIGURE = 1e24


def tellable(figure: float) -> float:
    """The nearest figure that any format takes; 0 for NaN."""
    return max(min(figure, MAX_FIGURE), -MAX_FIGURE) if figure == figure else 0  # noqa: PLR0124 -- NaN is not itself


def format_timeout(seconds: float) -> str:
    """A duration as --stall-timeout takes it: `90s`, `30m`, `2h`."""
    seconds = tellable(seconds)
    for unit, size in (("h", 3600), ("m", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def format_bytes(count: float) -> str:
    """A number of bytes, as zfs prints it: `512B`, `1.50K`, `12.0M`, `345G`."""
    count, unit = tellable(count), "B"
    for larger in "KMGTPE":
        if count < 999.5:  # it would be rounded to four digits
            break
        count, unit = count / 1024, larger
    digits = 0 if unit == "B" or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{digits}f}{unit}"


def settings(values: Iterable[str]) -> Command:
    """`KEY=VALUE` settings as options of ssh."""
    return tuple(word for value in values for word in ("-o", value))


@dataclass(frozen=True)
class Connection:
    """How to reach a host: resolved once by `ssh -G`, and used for both connections, paramiko's and the ssh client's.

    `options` are those of our command line (`-p`, `-i`, ...), in the words of ssh. `config` is what `ssh -G` printed.
    """

    destination: str
    options: Command
    config: dict[str, tuple[str, ...]]

    @classmethod
    def resolve(cls, destination: str, port: int | None, identity: str | None, more: Command = ()) -> Connection:
        """Resolve a destination. `more` are further options of ssh. Raises CommandFailed if there is no ssh client, or
        if it refuses its configuration."""
        # Asking OpenSSH itself is the only way in which Include, Match and everything else in ssh_config counts:
        # paramiko's own reader knows less.
        options = list(more)
        if port is not None:
            options += ["-p", str(port)]
        if identity is not None:
            options += ["-i", identity, "-o", "IdentitiesOnly=yes"]  # else ssh also tries an agent's keys
        config: dict[str, tuple[str, ...]] = {}
        for line in run(LocalHost(), ("ssh", "-G", *options, "--", destination)).splitlines():
            key, _, value = line.partition(" ")
            config[key] = (*config.get(key, ()), value)
        return cls(destination, tuple(options), config)

    def get(self, key: str) -> str:
        """The first value of `key`; "" if there is none, or if it is `none`."""
        value = self.config.get(key, ("",))[0]
        return "" if value == "none" else value

    @property
    def port(self) -> int:
        return int(self.get("port"))

    def expand(self, text: str) -> str:
        """Replace the %-tokens of ssh_config, which `ssh -G` leaves as they are."""
        values = {
            "%h": self.get("hostname"),
            "%p": self.get("port"),
            "%r": self.get("user"),
            "%n": self.destination.rpartition("@")[2],
            "%d": os.path.expanduser("~"),
            "%%": "%",
        }
        return re.sub("%.", lambda found: values.get(found[0], found[0]), text)

    def files(self, words: Iterable[str]) -> list[str]:
        """The files among `words` of ssh_config that we can read."""
        # ssh ignores the others as well: by default it looks for a key of each type.
        paths = [os.path.expanduser(self.expand(word)) for word in words]
        return [path for path in paths if os.path.isfile(path) and os.access(path, os.R_OK)]

    @property
    def identities(self) -> list[str]:
        """The key files, without those for security keys (FIDO), which paramiko cannot use."""
        return [path for path in self.files(self.config.get("identityfile", ())) if not path.endswith("_sk")]

    @property
    def known_hosts(self) -> list[str]:
        return self.files(f"{self.get('userknownhostsfile')} {self.get('globalknownhostsfile')}".split())

    @property
    def known_as(self) -> tuple[str, int]:
        """Name and port under which known_hosts lists the host."""
        alias = self.get("hostkeyalias")
        # ssh adds no port to an alias, and paramiko adds none to a name if it is 22.
        return (alias, 22) if alias else (self.get("hostname"), self.port)

    @property
    def proxy(self) -> Command | None:
        """The command that carries the connection, from ProxyCommand or ProxyJump."""
        if self.get("proxycommand"):
            return ("sh", "-c", f"exec {self.expand(self.get('proxycommand'))}")
        if self.get("proxyjump"):
            *first, last = self.get("proxyjump").split(",")
            jumps = ("-J", ",".join(first)) if first else ()
            via = last if last.startswith("ssh://") else f"ssh://{last}"
            # As ssh does itself: log in at the last jump, through those before it, and forward stdin and stdout to %h.
            return ("ssh", *settings(ALIVE_SETTINGS), *jumps, "-W", self.expand("[%h]:%p"), "--", via)
        return None

    def ssh_command_for_user(self) -> str:
        """The ssh command a person would type."""
        return shlex.join(("ssh", *self.options, self.destination))


def open_socket(connection: Connection) -> socket.socket:
    """A socket to the SSH port of the host: over TCP, or to the proxy command. Raises OSError if the host cannot be
    reached."""
    if connection.proxy is None:
        link = socket.create_connection((connection.get("hostname"), connection.port), CONNECT_SECONDS)
        # If the peer goes away without a word, the kernel gives up unacknowledged keepalives after this time.
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LINK_SECONDS * 1000)
        # paramiko leaves Nagle's algorithm on, which costs each command one delayed acknowledgement, 40 ms.
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return link
    link, other = socket.socketpair()
    # Nobody waits for the proxy: it ends by itself when our end of the socket closes.
    end = other.fileno()
    subprocess.Popen(connection.proxy, stdin=end, stdout=end, stderr=subprocess.DEVNULL, env=environment())
    other.close()
    return link


class KnownHostsOnly:
    """The policy of paramiko for an unknown host key: refuse it, and tell what to do."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def missing_host_key(self, client: Any, hostname: str, key: Any) -> NoReturn:
        digest = b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")
        raise Failure(
            f"the host key of {hostname} is not known here ({key.get_name()} SHA256:{digest})",
            "log in once by hand as this user, compare that fingerprint, and say yes: "
            f"{self.connection.ssh_command_for_user()}",
        )


def why(error: Exception) -> str:
    return str(error) or type(error).__name__  # paramiko raises timeouts and ends of file without a message


class SshHost:
    """A host behind SSH. Commands run over one paramiko login, one at a time. Streams share one login of the ssh
    client, so that no byte of them passes through Python. Either login is made when it is needed first."""

    def __init__(
        self,
        connection: Connection,
        note: Callable[[str], None] = ignore_line,
        stall_timeout: float = STALL_SECONDS,
        tree: str = "",
    ) -> None:
        self.connection = connection
        self.label = connection.destination
        self.account = account_of(connection.get("user"), self.label.rpartition("@")[2], tree)
        self.note = note
        # By then a lost link has shown itself as lost. So what still does not answer is the command.
        self.stall_timeout = max(stall_timeout, 2 * LINK_SECONDS)
        self.programs: set[str] | None = None  # the COMPRESSORS that are installed there; None before the first answer
        self.next_channel: Future[Any] | None = None
        self.opens_ahead = True
        self.streams: tempfile.TemporaryDirectory[str] | None = None
        self.ssh: Command = ()

    @functools.cached_property
    def client(self) -> Any:
        """The login. Raises LinkLost if the host cannot be reached, and Failure if either side refuses the other."""
        client = log_in(self.connection)
        get = self.connection.get
        self.note(f"{self.label}: logged in as {get('user')} at {get('hostname')}:{self.connection.port}")
        return client

    def ask(self, *commands: Command) -> Answer:
        transport = self.client.get_transport()
        self.note(f"{self.label}: {' && '.join(map(shlex.join, commands))}")
        doing = " ".join(commands[0][:2])
        try:
            if self.programs is not None:
                return self.exchange(transport, doing, remote_line(*commands))
            # The first answer also tells which compressors are there. A command of its own would cost a round trip.
            answer = self.exchange(transport, doing, remote_line(*commands, look_for=COMPRESSORS))
            found = f"^/.*/({'|'.join(COMPRESSORS)})\n"
            self.programs = set(re.findall(found, answer.stderr, re.MULTILINE))
            return replace(answer, stderr=re.sub(found, "", answer.stderr, flags=re.MULTILINE))
        except Failure:
            raise
        except Exception as error:  # noqa: BLE001 -- paramiko raises here whatever its thread met in a malformed packet
            if isinstance(error, socket.timeout) and error.errno is None:  # our own; that of the kernel has ETIMEDOUT
                raise stuck(self, commands[0], self.stall_timeout) from None
            raise LinkLost(f"lost the connection to {self.label} during {doing}: {why(error)}") from None

    def exchange(self, transport: Any, doing: str, line: str) -> Answer:
        """Run one line of shell. Raises OSError or socket.timeout if no exit status came."""
        if transport is None or not transport.is_active():
            raise OSError("it is closed")
        until = time.monotonic() + self.stall_timeout
        channel = self.channel(transport)
        output, complaints = Output(doing, self.label), Tail(COMPLAINT_BYTES)
        # Drain both ends before asking for the status: an undrained stderr stalls stdout after some 2 MiB.
        with contextlib.closing(channel):
            channel.settimeout(self.stall_timeout)
            # paramiko waits without end for the answer to "may this command start?".
            watch = threading.Timer(LINK_SECONDS, transport.close)
            watch.start()
            try:
                channel.exec_command(line)
            finally:
                watch.cancel()
            channel.shutdown_write()
            complained = in_background(lambda: drain(channel, channel.recv_stderr, complaints.add, until))
            try:
                drain(channel, channel.recv, output.add, until)
            except Failure:
                transport.close()  # closing the channel is not enough: paramiko keeps in memory what still comes on it
                raise
            complained.result()
            if not channel.status_event.wait(CONNECT_SECONDS) or channel.exit_status == -1:
                if channel.eof_received:  # sshd itself said that this is the end; a dead link only looks like one
                    raise LinkLost(
                        f"a signal ended {doing} on {self.label}",
                        "a shutdown, or was memory short? its kernel's log tells: dmesg",
                    )
                raise OSError("the command ended without an exit status")
        return Answer.of(channel.exit_status, output.kept, complaints.last())

    def channel(self, transport: Any) -> Any:
        """A channel for one command."""
        # The channel for the next command is opened while this one is at work. That saves a round trip for each
        # command, but a host with MaxSessions 1 refuses it: then none is opened ahead any more.
        channel: Any = None
        try:
            channel = self.next_channel.result() if self.next_channel else None
        except Exception:  # noqa: BLE001 -- as in `ask`; if the link is lost, opening the next one will tell
            self.opens_ahead = False
        if channel is None or channel.closed:
            channel = self.open_channel(transport)
        self.next_channel = None
        if self.opens_ahead:
            self.next_channel = in_background(lambda: transport.open_session(timeout=CONNECT_SECONDS))
        return channel

    def open_channel(self, transport: Any) -> Any:
        """Open a channel, and retry for a while if that is refused."""
        import paramiko

        # With MaxSessions 1 the server needs a moment to notice that we closed the last one.
        until = time.monotonic() + CONNECT_SECONDS
        while True:
            try:
                return transport.open_session(timeout=CONNECT_SECONDS)
            except paramiko.ChannelException:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    def has(self, program: str) -> bool:
        return program in (self.programs or ())

    def stream_command(self, *commands: Command, then: Command = ()) -> Command:
        if self.streams is None:
            # A directory that nobody else can enter: who can reach the master's socket can use our login.
            try:
                self.streams = tempfile.TemporaryDirectory(prefix="zfs_replicate-")
            except OSError as error:
                raise StreamFailed(f"cannot make a private directory for ssh: {error}", "is there space?") from None
            self.ssh = ssh_client(self.connection, self.streams.name + "/master")
        return (*self.ssh, "--", self.connection.destination, remote_line(*commands, then=then))

    def connected(self) -> bool:
        return self.control("check")

    def control(self, request: str) -> bool:
        """Send a request to the ssh master of the streams. Returns whether it complied."""
        command = (*self.ssh, "-O", request, "--", self.connection.destination)
        with contextlib.suppress(Stuck):
            return LocalHost(stall_timeout=CONNECT_SECONDS).ask(command).status == 0
        return False

    def close(self) -> None:
        if "client" in vars(self):
            self.client.close()
        if self.streams is not None:
            self.control("exit")  # if we cannot ask it to, it ends by itself after a while (ControlPersist)
            self.streams.cleanup()


def drain(channel: Any, receive: Callable[[int], bytes], take: Callable[[bytes], None], until: float) -> None:
    """Read all that comes at one end of a channel. Raises socket.timeout if the end has not come by `until`."""
    while True:
        # A timeout of paramiko is for one read. A host that says a word now and then would keep us for ever.
        left = until - time.monotonic()
        if left <= 0:
            raise socket.timeout
        channel.settimeout(left)
        data = receive(READ_BYTES)
        if not data:
            return
        take(data)


def log_in(connection: Connection) -> Any:
    """A connected paramiko client. Raises LinkLost if the host is out of reach, and Failure if either side refuses the
    other."""
    with warnings.catch_warnings():
        # An older paramiko warns beside a newer cryptography. That is not the user's business.
        warnings.simplefilter("ignore")
        try:
            # Not at the top of the file: it takes a quarter of a second, which --help and localhost need not pay. A
            # third of that is invoke, if it is installed. paramiko needs it only for `Match exec`, which we leave to
            # ssh -G. With None there, importing it is an ImportError.
            sys.modules.setdefault("invoke", None)  # type: ignore[arg-type]
            import paramiko
        except ImportError as error:
            raise Failure(f"cannot use paramiko: {error}", "install it: apt install python3-paramiko") from None

    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)  # its transport thread logs tracebacks to stderr
    if hasattr(paramiko.client, "DSSKey"):  # before 4.0 it tries a rejected RSA key as a DSS one, and fails over that
        paramiko.client.DSSKey = paramiko.RSAKey
    client = paramiko.SSHClient()
    try:
        load_known_hosts(client, connection)
        connect(client, connection)
    except BaseException:
        client.close()
        raise
    client.get_transport().set_keepalive(KEEPALIVE_SECONDS)  # type: ignore[union-attr]  # it is connected
    return client


def load_known_hosts(client: Any, connection: Connection) -> None:
    """Make the client accept the hosts that ssh knows, and no others. Raises Failure for a file that paramiko cannot
    read."""
    import paramiko

    client.set_missing_host_key_policy(KnownHostsOnly(connection))
    for path in connection.known_hosts:
        try:
            client.load_system_host_keys(path)
        except (OSError, ValueError, paramiko.hostkeys.InvalidHostKey) as error:
            raise Failure(f"cannot read {path}: {error}", "ssh skips a broken line, we cannot: remove it") from None


def connect(client: Any, connection: Connection) -> None:
    """Reach the host, check its key, log in. Raises LinkLost or Failure as `log_in` does."""
    import paramiko

    where = f"{connection.get('hostname')} port {connection.port}"
    name, port = connection.known_as
    try:
        client.connect(
            name,
            port,
            connection.get("user"),
            sock=open_socket(connection),
            key_filename=connection.identities,
            allow_agent=connection.get("identitiesonly") != "yes",
            look_for_keys=False,
            timeout=CONNECT_SECONDS,
            banner_timeout=CONNECT_SECONDS,
            auth_timeout=CONNECT_SECONDS,
        )
    except paramiko.BadHostKeyException as error:
        listed = name if port == 22 else f"[{name}]:{port}"  # as known_hosts writes it
        raise Failure(
            f"the host key of {name} has changed: somebody may be in between ({error.key.get_name()} was offered)",
            f"if the change is genuine: ssh-keygen -R {shlex.quote(listed)}, then {connection.ssh_command_for_user()}",
        ) from None
    except Failure:
        raise
    except Exception as error:  # noqa: BLE001 -- as in SshHost.ask
        # Once keys are exchanged, the host is reached; unless the link broke, it is our login that failed. The
        # exception does not tell: often it says only that the key is not of the type that paramiko tried last.
        transport = client.get_transport()
        broke = isinstance(error, (OSError, EOFError)) or "timeout" in str(error)
        if broke or transport is None or not transport.initial_kex_done:
            hint = f"this must work: {connection.ssh_command_for_user()} true"
            raise LinkLost(f"cannot reach {where}: {why(error)}", hint) from None
        keys = ", ".join(connection.identities) or "no key file"
        raise Failure(
            f"{connection.get('user')}@{where} does not accept our login ({keys}): {why(error)}",
            "authorise a key there (ssh-copy-id), or name the right one with -i; "
            f"this must work without a question asked: {connection.ssh_command_for_user()} true",
        ) from None


def ssh_client(connection: Connection, control_path: str) -> Command:
    """The ssh client for streams: no questions, no terminal, no forwarding, no compression, a fast cipher. Its master
    process listens at `control_path`."""
    quiet = (
        *ALIVE_SETTINGS,
        "StrictHostKeyChecking=yes",
        "LogLevel=INFO",  # with less, a broken link is not told
        "Compression=no",  # see --compress: ssh has zlib only, on one core
        # What the user's ssh_config may ask for, and a stream must not have.
        "ClearAllForwardings=yes",
        "ForwardAgent=no",
        "ForwardX11=no",
        "PermitLocalCommand=no",
        "RemoteCommand=none",
        # The streams of a run share one login. The first of them leaves the master behind; if we are killed, that ends
        # by itself. It is our own master: the user's may have other settings.
        "ControlMaster=auto",
        f"ControlPath={control_path}",
        f"ControlPersist={LINK_SECONDS}",
        *fast_cipher(connection),
    )
    return ("ssh", "-T", *connection.options, *settings(quiet))


# Ciphers that need no separate MAC. AES is the fastest one where the processor has instructions for it, and by far the
# slowest where it has not.
AES = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")
CHACHA = ("chacha20-poly1305@openssh.com",)


def fast_cipher(connection: Connection) -> list[str]:
    """A setting of ssh that prefers the fastest cipher, unless the user's configuration names ciphers."""
    # It does if the result differs from that of an empty configuration.
    default = LocalHost().ask(("ssh", "-G", "-F", "none", "--", "localhost")).stdout
    configured = connection.get("ciphers")
    if f"\nciphers {configured}\n" not in default:
        return []
    ours = configured.split(",")
    ranked = [cipher for cipher in (AES + CHACHA if has_aes_instructions() else CHACHA + AES) if cipher in ours]
    return ["Ciphers=" + ",".join(ranked + [cipher for cipher in ours if cipher not in ranked])]


def has_aes_instructions(path: str = "/proc/cpuinfo") -> bool:
    """Whether this processor has instructions for AES; True if that cannot be known. Small ARM boards have none."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            told = re.search(r"^(?:flags|Features)\s*:(.*)", file.read(), re.MULTILINE)
    except OSError:
        return True
    return told is None or "aes" in told[1].split()


# ---------------------------------------------------------------------------------------------------------------------
# Room 7: Stream
# ---------------------------------------------------------------------------------------------------------------------


def buffer_stage(size: str, rate: str | None = None) -> tuple[Command, ...]:
    """The stage of mbuffer, with `size` of memory and reading at most `rate` a second; none if it is not installed."""
    # It evens out the bursts of both ends: zfs send waits for disks, and zfs recv writes once every few seconds.
    limit = ("-r", rate) if rate else ()
    return (("mbuffer", "-q", "-m", size, *limit),) if installed("mbuffer") else ()


# How much is kept of the stderr of a process: the end of it. zfs recv says less than that of all properties together.
STDERR_BYTES = 64 * 1024


@dataclass(frozen=True)
class Stage:
    """One process of a pipeline. `errors` is the pipe from its stderr, `tail` what it has said last."""

    # stderr is read as it comes. If it were not, the pipe could fill up, and the process would wait for ever. But
    # nobody waits for the end of that pipe, because others may keep it open, as a master of ssh does.

    program: str
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    tail: Tail

    def hear(self) -> bool:
        """Take what it has said by now, without waiting for more. Returns whether there was anything."""
        waiting = 0 if self.errors.closed else unread_bytes(self.errors)
        if waiting:
            self.tail.add(os.read(self.errors.fileno(), waiting))
        return waiting > 0

    def has_ended(self) -> bool:
        # WNOWAIT does not reap the process, so its /proc/PID/io stays readable.
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return self.process.returncode is not None or os.waitid(os.P_PID, self.process.pid, look) is not None

    def io_bytes(self) -> tuple[int, int]:
        """Bytes that it has read and written so far, as the kernel counts them; 0 where that cannot be known."""
        try:
            with open(f"/proc/{self.process.pid}/io", encoding="ascii") as counters:
                found = dict(line.split(": ") for line in counters)
        except OSError:
            return 0, 0
        return int(found["rchar"]), int(found["wchar"])

    def said(self, lines: int = 5) -> str:
        """The last `lines` of its stderr; with 0, all that is kept."""
        self.hear()
        return "\n".join(self.tail.last().decode(errors="replace").strip().splitlines()[-lines:])

    def ended(self) -> ExitedProcess:
        return self.program, self.process.wait(), self.said()


# A program, its exit status, and the last lines of its stderr.
ExitedProcess = tuple[str, int, str]


@dataclass(frozen=True)
class Transport:
    """How streams are carried: through which `buffer`, and by which of the COMPRESSORS ("" for none).

    A pipeline is ended if its receiver has been given nothing for `stall_timeout` seconds, or less than FLOOR.
    `on_progress` is called when it has been given something. Receivers inherit the open files `inherit` (the lock), and
    keep them open if we are killed.
    """

    buffer: tuple[Command, ...] = ()
    stall_timeout: float = STALL_SECONDS
    on_progress: Callable[[], None] = lambda: None
    inherit: tuple[int, ...] = ()
    compressor: str = ""


@dataclass(frozen=True)
class ReceivedStream:
    """A stream that arrived whole: its bytes, the seconds it took, and what its receiver said."""

    bytes: int
    seconds: float
    said: str = ""


# How often to look whether bytes move, and how often to show it to a user.
WATCH_SECONDS = 5.0
SHOW_SECONDS = 1.0
# How much longer zfs recv may be quiet once it has all bytes: it still has to write them and account for them.
LAST_BYTES_FACTOR = 4
# Bytes a second that a stream must bring once it has begun, on the average of a stall timeout: a mebibyte in an hour.
# No line is so slow, but a peer may want to keep us, and the lock, waiting for ever.
FLOOR = 300


class StallWatch:
    """Tells when to give up a stream that brings nothing, or next to nothing, for `stall_timeout` seconds."""

    # Until a stream begins, zfs send may search for as long as the stall timeout lasts. From then on it must bring
    # FLOOR bytes a second, on the average. It begins with the first byte after the first look: by then a receiver has
    # read its own libraries, which are counted like bytes of the stream.

    def __init__(self, stall_timeout: float) -> None:
        self.stall_timeout = stall_timeout
        self.pause = min(WATCH_SECONDS, stall_timeout / 2)
        self.restart()

    def restart(self) -> None:
        """Begin anew, for another receiver."""
        self.started = self.moved_at = time.monotonic()  # moved_at: when a byte came last
        self.next_look = self.started + self.pause
        self.count: int | None = None  # bytes at the last look
        self.mark: tuple[float, int] | None = None  # when the stream was last seen to keep FLOOR, and its bytes then

    def is_due(self) -> bool:
        now = time.monotonic()
        if now < self.next_look:
            return False
        self.next_look = now + self.pause
        return True

    def look(self, count: int) -> bool:
        """Take note that `count` bytes have come by now. Returns whether that differs from the last look."""
        now = time.monotonic()
        if count == self.count:
            return False
        if self.count is not None and (not self.mark or count - self.mark[1] >= FLOOR * self.stall_timeout):
            self.mark = (now, count)
        self.count, self.moved_at = count, now
        return True

    def spare_floor(self) -> None:
        """Measure FLOOR anew from now on: it was not the sender that was slow."""
        if self.mark:
            self.mark = (time.monotonic(), self.count or 0)

    def too_few(self, factor: int) -> int | None:
        """The bytes that came lately, if these are too few for `factor` times the stall timeout; else None."""
        now, limit = time.monotonic(), self.stall_timeout * factor
        since, then = self.mark or (now, self.count or 0)
        if now - self.moved_at >= limit:
            return 0
        return (self.count or 0) - then if now - since >= limit else None


class Pipeline:
    """Processes joined by kernel pipes: those `upstream`, and at their end one receiver after another.

    `arrived` are the streams whose receiver exited with 0. If any process did not, `failure` says so, and the streams
    behind it are lost.
    """

    # Each zfs recv reads exactly its own stream, and leaves the next one in the pipe. So one `ssh HOST zfs send` after
    # another can fill that pipe, and the line is never idle between two streams.
    #
    # The end of a stream does not mean that it arrived: every exit status is read.

    def __init__(self, upstream: Sequence[Command], receivers: Sequence[Command], transport: Transport) -> None:
        self.receivers_left = list(receivers)
        self.transport = transport
        self.arrived: list[ReceivedStream] = []
        self.failure: StreamFailed | None = None
        self.is_over = False
        self.stack = contextlib.ExitStack()
        self.upstream: list[Stage] = []
        self.receiver: Stage | None = None
        self.failed: list[ExitedProcess] = []
        self.pipe: IO[bytes] | None = None  # the end of it that is still to be read
        self.bytes_before = 0  # bytes of the streams that have arrived
        self.stall = StallWatch(transport.stall_timeout)
        try:
            for command in upstream:
                self.upstream.append(self.start(command, subprocess.PIPE))
                self.pipe = self.upstream[-1].process.stdout
            self.receive_next()
        except StreamFailed as failure:
            self.fail(failure)
        except BaseException:
            self.stack.close()
            raise

    def close(self) -> None:
        """End the processes that still run."""
        self.close_pipe()
        self.stack.close()

    def start(self, command: Command, stdout: int) -> Stage:
        """Start a process that reads the open end of the pipe. Raises StreamFailed if it cannot be started."""
        is_last = stdout == subprocess.DEVNULL
        try:
            process = subprocess.Popen(
                command,
                stdin=self.pipe or subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.PIPE,
                env=environment(),
                pass_fds=self.transport.inherit if is_last else (),
            )
        except OSError as error:
            raise StreamFailed(f"cannot start {command[0]}: {error.strerror}", "is it installed?") from None
        errors = self.stack.enter_context(process.stderr)  # type: ignore[arg-type]  # it is a pipe
        self.stack.callback(end, process)
        if not is_last:
            self.close_pipe()  # if we kept it open, the process before would not notice that this one has ended
            enlarge_pipe(process.stdout)  # type: ignore[arg-type]  # it is a pipe
        return Stage(command[0], process, errors, Tail(STDERR_BYTES))

    def close_pipe(self) -> None:
        if self.pipe:
            self.pipe.close()
        self.pipe = None

    def receive_next(self) -> None:
        self.receiver = self.start(self.receivers_left.pop(0), subprocess.DEVNULL)
        self.stall.restart()

    def fail(self, failure: StreamFailed) -> None:
        self.failure = failure
        self.is_over = True
        self.close()

    def poll(self) -> bool:
        """Go on if a process has ended; else check that bytes move. Returns whether one had ended."""
        if self.receiver and self.receiver.has_ended():
            self.receiver_ended(self.receiver)
        elif not self.receiver and all(stage.has_ended() for stage in self.upstream):
            self.finish()
        else:
            self.check_stall()
            return False
        return True

    def receiver_ended(self, receiver: Stage) -> None:
        """Start the next receiver in the place of one that has ended, unless that failed."""
        arrival = ReceivedStream(self.bytes_received(receiver), time.monotonic() - self.stall.started, receiver.said(0))
        ended = receiver.ended()
        receiver.errors.close()
        self.receiver = None
        if ended[1] == 0:
            self.bytes_before += arrival.bytes
            self.arrived.append(arrival)
            self.transport.on_progress()
        else:
            self.failed = [ended]
            self.stall.moved_at = time.monotonic()
        if self.failed or not self.receivers_left:
            self.close_pipe()  # so that the sender notices
            return
        try:
            self.receive_next()
        except StreamFailed as failure:
            self.fail(failure)

    def finish(self) -> None:
        """All processes have ended: read the exit statuses of those upstream."""
        self.is_over = True
        try:
            raise_for_status([stage.ended() for stage in self.upstream], self.failed)
        except StreamFailed as failure:
            self.failure = failure

    def check_stall(self) -> None:
        """Fail if for too long the receiver has been given nothing, or too little."""
        if self.failed and time.monotonic() - self.stall.moved_at >= LINK_SECONDS:
            try:
                # A sender that has nothing to send does not notice that nobody reads any more. Do not wait for it.
                raise_for_status([], self.failed)
            except StreamFailed as failure:
                self.fail(failure)
            return
        if not self.stall.is_due():
            return
        # Only what the receiver is given counts. What ssh reads and writes does not: a peer can make it do that as
        # slowly as it likes, and would keep the lock fresh for ever.
        given = self.bytes_given()
        if self.stall.look(sum(sum(stage.io_bytes()) for stage in self.stages()) if given is None else given):
            self.transport.on_progress()
        if given is None:  # then only the keepalives of ssh guard the link
            return
        if self.pipe and unread_bytes(self.pipe):
            self.stall.spare_floor()  # bytes wait, so it is the receiver that is slow; it may be, until the timeout
        running = self.running()
        may_be_tail = self.upstream and (self.receivers_left or running == [self.receiver])
        factor = LAST_BYTES_FACTOR if may_be_tail else 1
        few = self.stall.too_few(factor)
        if few is not None:
            programs = [stage.program for stage in running]
            self.fail(stalled(self.transport.stall_timeout * factor, self.bytes_received(self.receiver), programs, few))

    def bytes_given(self) -> int | None:
        """Bytes that the receivers have been given so far. None if that is unknown: without /proc, or if the process
        runs by sudo, as root."""
        if self.receiver and not any(self.counter(self.receiver).io_bytes()):
            return None
        return self.bytes_before + self.bytes_received(self.receiver)

    def stages(self) -> list[Stage]:
        return [*self.upstream, *([self.receiver] if self.receiver else [])]

    def running(self) -> list[Stage]:
        """The processes that have not ended yet."""
        return [stage for stage in self.stages() if not stage.has_ended()]

    def bytes_received(self, receiver: Stage | None) -> int:
        """Bytes of the current stream that its receiver has been given."""
        if not receiver:
            return 0
        counter = self.counter(receiver)
        if counter is receiver:
            return receiver.io_bytes()[0]
        # What the last process before it has written, less what still waits in the pipe. The two are not counted at one
        # instant: count again until nothing has moved in between.
        written = waiting = 0
        for _ in range(MAX_RECOUNTS):
            written, waiting = counter.io_bytes()[1], unread_bytes(self.pipe)
            if counter.io_bytes()[1] == written:
                break
        return max(written - waiting - self.bytes_before, 0)

    def counter(self, receiver: Stage) -> Stage:
        """The process whose counts tell what a receiver has been given."""
        # The receiver's own are too large by some thousand bytes, because it reads its libraries as well, and they are
        # secret if it runs by sudo. Those of the process before it are exact, if it does nothing but pass on bytes.
        feeder = self.upstream[-1] if self.upstream else receiver
        return feeder if feeder.program in ("mbuffer", *COMPRESSORS) else receiver

    def buffered(self) -> int:
        """Bytes that wait in mbuffer."""
        counts = [stage.io_bytes() for stage in self.upstream if stage.program == "mbuffer"]
        return sum(read - written for read, written in counts)


# A call of Linux. Python has its name since 3.10.
F_SETPIPE_SZ = 1031
# The most that Linux gives to any user (/proc/sys/fs/pipe-max-size).
PIPE_BYTES = 1 << 20


def enlarge_pipe(pipe: IO[bytes]) -> None:
    """Let a pipe hold more than 64 KiB, if we may."""
    # Its two ends then wait for each other less often. That was measured to save a seventh of the time of a stream.
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, F_SETPIPE_SZ, PIPE_BYTES)


# How often to count again at most. It ends earlier: when nobody reads a pipe, it is soon full, and nothing moves.
MAX_RECOUNTS = 100


def unread_bytes(pipe: IO[bytes] | None) -> int:
    """Bytes that wait in a pipe to be read."""
    return int(struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]) if pipe else 0


def carry_out(pipeline: Pipeline, show: Callable[[], None] | None = None) -> None:
    """Watch over a pipeline until it has ended. `show` is called every second meanwhile."""
    shown = time.monotonic()
    while not pipeline.is_over:
        running = [stage.process.pid for stage in pipeline.running()]
        if pipeline.poll():
            continue
        until = pipeline.stall.next_look
        if show:
            if time.monotonic() - shown >= SHOW_SECONDS:
                shown = time.monotonic()
                show()
            until = min(until, shown + SHOW_SECONDS)
        # `running` is of before the poll: a process that has ended since then wakes us at once.
        await_news(running, pipeline.stages(), until - time.monotonic())


# How often to look whether a process has ended, on a kernel that cannot wake us then.
POLL_SECONDS = 0.02


def await_news(pids: Iterable[int], stages: Iterable[Stage], seconds: float) -> None:
    """Wait until a process ends, or until a stage says something, but no longer than `seconds`. Takes what is said."""
    with contextlib.ExitStack() as stack:
        speakers = {stage.errors.fileno(): stage for stage in stages if not stage.errors.closed}
        watched: list[int] = []
        try:
            for pid in pids:
                watched.append(os.pidfd_open(pid))
                stack.callback(os.close, watched[-1])
        except (AttributeError, OSError):  # not Linux, or before 5.3
            watched, seconds = [], min(seconds, POLL_SECONDS)
        ready, _, _ = select.select([*watched, *speakers], [], [], max(seconds, 0))
        for speaker in (speakers[it] for it in ready if it in speakers):
            if not speaker.hear():
                speaker.errors.close()  # end of file: it would wake us again at once, for ever


def stalled(stall_timeout: float, moved: int, running: Sequence[str], few: int = 0) -> StreamFailed:
    """The failure of a stream that stands still after `moved` bytes, or nearly so: `few` of these came lately."""
    came = f"only {few:,} bytes came" if few else "no data came"
    return StreamFailed(
        f"the stream stalled: {came} for {format_timeout(stall_timeout)}, after about {moved:,} bytes "
        f"(still running: {', '.join(running)})",
        "what arrived is kept, and the next run goes on from there; if it happens again, look at zpool status on "
        "both sides, or be more patient: --stall-timeout",
    )


SSH_FAILED = 255


def raise_for_status(upstream: Sequence[ExitedProcess], receivers: Sequence[ExitedProcess]) -> None:
    """Raise StreamFailed if any process failed, with what those have said. The first one upstream is the sender."""
    ended = [*upstream, *receivers]
    failed = [(program, status, text) for program, status, text in ended if status != 0]
    if not failed:
        return
    silent = [f"{program} ended {f'with status {n}' if n > 0 else f'by signal {-n}'}" for program, n, _ in failed]
    spoken = [(program, text) for program, _, text in failed if text]
    # mbuffer complains when the process behind it has ended. That is no cause: the other one says itself why.
    causes = [each for each in spoken if each[0] != "mbuffer" or "Broken pipe" not in each[1]]
    what = "; ".join([f"{program}: {text}" for program, text in causes or spoken] or silent)
    sender_said = "".join(text for _, status, text in upstream[:1] if status != 0)
    receiver_said = "".join(text for _, status, text in receivers if status != 0)
    raise StreamFailed(
        f"the stream failed: {what}",
        hint_for(sender_said, "send") or hint_for(receiver_said, "receive"),
        # ssh exits with 255 if the link broke, or if a signal ended the command there; else with the command's status.
        link_held=ended[0][1] != SSH_FAILED,
        sender_said=sender_said,
        receiver_said=receiver_said,
    )


@dataclass(frozen=True)
class StreamBatch:
    """Streams that go one after another: for each, the sending and the receiving command. `compressible` says that a
    compressor would make them smaller."""

    streams: tuple[tuple[Command, Command], ...]
    compressible: bool = False


@dataclass(frozen=True)
class BatchResult:
    """What became of a batch: the streams that arrived; and, if one was lost, why."""

    arrived: tuple[ReceivedStream, ...] = ()
    failure: Failure | None = None


def pull(
    source: Host,
    target: Host,
    batch: StreamBatch,
    transport: Transport,
    show: Callable[[Pipeline], None] | None = None,
) -> BatchResult:
    """Send a batch from the source into the target. The failure in the result is LinkLost if the link broke. Raises
    StreamFailed if the batch cannot even begin."""
    compress, decompress = COMPRESSORS.get(transport.compressor, ((), ()))
    upstream = (
        source.stream_command(*(sending for sending, _ in batch.streams), then=compress),
        *transport.buffer,
        *((decompress,) if decompress else ()),
    )
    receivers = [target.stream_command(receiving) for _, receiving in batch.streams]
    with contextlib.closing(Pipeline(upstream, receivers, transport)) as pipeline:
        carry_out(pipeline, show and (lambda: show(pipeline)))
        # The stream that was lost is the one behind those that arrived; all may have, and ssh fail after that.
        sending, receiving = batch.streams[min(len(pipeline.arrived), len(batch.streams) - 1)]
        failure = pipeline.failure and with_hint(pipeline.failure, source, sending, target, receiving)
        return BatchResult(tuple(pipeline.arrived), failure)


def with_hint(failure: StreamFailed, source: Host, sending: Command, target: Host, receiving: Command) -> Failure:
    """A failed stream with a hint what to do; or LinkLost, if the link broke."""
    # If the exit status of ssh leaves it open, ask its master. Not otherwise: the master also ends by itself, while a
    # receiver is still busy with the last bytes of a stream.
    if not failure.link_held and not source.connected():
        return LinkLost(
            f"the link to {source.label} broke: {failure.what}", "what arrived is kept; the next run goes on from there"
        )
    for host, command, verb, said in (
        (source, sending, "send", failure.sender_said),
        (target, receiving, "receive", failure.receiver_said),
    ):
        denied = re.search(f"cannot {verb}[^;]{{0,{MAX_EXCERPT}}}: permission denied", said)
        failure.hint = failure.hint or (allow_hint(host, command, said) if denied else "")
    return failure


def refused_properties(said: str) -> dict[str, str]:
    """The properties that zfs recv could not set, and why."""
    # It exits with 0 all the same. STDERR_BYTES have room for such a message of each property.
    return dict(re.findall(r"cannot receive (\S+) property on .*: (.*)", said))


def unset_properties(target: Host, receiving: Command, refused: dict[str, str]) -> StreamFailed | None:
    """The failure to report if zfs recv could not set a property that we told it to set."""
    # Only those. A property of the source that did not come along is no failure: an account without the right to set it
    # gets its mirror all the same.
    unset = [word for word in receiving if "=" in word and word.partition("=")[0] in refused]
    if not unset:
        return None
    reason = refused[unset[0].partition("=")[0]]
    rights = allow_hint(target, receiving, reason)
    once = f"for this once, as root: {shlex.join(('zfs', 'set', *unset, receiving[-1].partition('@')[0]))}"
    return StreamFailed(f"received, but {', '.join(unset)} could not be set: {reason}", rights, once)


# ---------------------------------------------------------------------------------------------------------------------
# Room 8: Run
# ---------------------------------------------------------------------------------------------------------------------

MAX_STEPS = 6
"""How often a dataset may be worked on in one run without getting any further, before we give it up."""

READ_ONLY = "pool is read-only"
PULLED_UNHELD = (
    "the source's pool is read-only: what it has is pulled all the same, but without holds, and nothing expires",
    "once the pool is writable again, the next run puts the holds right",
)

# What somebody uses, with a shell in it or a clone of it outside of the tree, may stay for so long beyond its time.
BUSY = "dataset is busy|snapshot has dependent clones"
BUSY_DAYS = 7

REFUSED_FOR_NOW = "permission denied|key must be loaded|currently suspended"
"""What a sender says when it refuses a token now, but may accept it later."""

Send = Callable[[StreamBatch], BatchResult]
"""Carries a batch of streams from the source to here; see `pull`."""


class LockFile:
    """A lock file: a regular file that belongs to this account alone. Raises Failure if there cannot be one."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:  # O_NONBLOCK: a FIFO must not keep us waiting
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            self.descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            hint = f"see who owns it, and who may write to {os.path.dirname(path)}: ls -ld {shlex.quote(path)}"
            raise Failure(f"cannot open the lock file {path}: {error.strerror}", hint) from None
        why = strange(os.fstat(self.descriptor), os.geteuid())
        if why:
            self.close()
            raise Failure(f"{path} is no lock file of ours: {why}", f"see who made it, then: rm {shlex.quote(path)}")

    def close(self) -> None:
        os.close(self.descriptor)

    def take(self, how: int) -> bool:
        """Lock the file: exclusively (fcntl.LOCK_EX) or shared (fcntl.LOCK_SH). Returns False if somebody else holds
        it."""
        try:
            fcntl.flock(self.descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise Failure(f"cannot lock {self.path}: {error.strerror}", "its file system may know no locks") from None
        return True

    def holder(self) -> Holder | None:
        """Who locked it exclusively last. None if the file does not say, or not yet."""
        text = os.pread(self.descriptor, MAX_EXCERPT * 2, 0).decode("ascii", errors="replace")
        found = re.fullmatch("([1-9][0-9]{0,6}) ([0-9]{1,11}) ([ -~]+)\n", text)
        return Holder(int(found[1]), int(found[2]), found[3]) if found else None

    def moved(self) -> float:
        return os.fstat(self.descriptor).st_mtime


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, since when, and for which job (the words of the command line that identify it)."""

    pid: int
    since: int
    job: str

    def __str__(self) -> str:
        return f"pid {self.pid}, since {clock(self.since)}"


class Lock:
    """The lock of a local tree, and a share in those of the trees that it lies in: held as long as their files are
    open, here or in the `zfs recv` that inherits them. So what a killed run leaves behind keeps the next one out until
    it has ended. The kernel drops it with the last of them.

    Its own file says who took it last, when and for which job; its time of change is when something last moved. So we
    can tell who holds the lock: a live run, a `zfs recv` left over from a run that was killed, a run that has only just
    started (the file is empty), or a run of another job.
    """

    def __init__(self, own: LockFile, above: Sequence[LockFile], job: str) -> None:
        self.filenos = (own.descriptor, *(it.descriptor for it in above))
        try:
            os.ftruncate(own.descriptor, 0)
            os.pwrite(own.descriptor, f"{os.getpid()} {time.time():.0f} {job}\n".encode("ascii"), 0)
        except OSError as error:
            raise Failure(f"cannot write the lock file {own.path}: {error.strerror}", "is there space?") from None

    def moved(self) -> None:
        with contextlib.suppress(OSError):  # the place may be read-only by now
            os.utime(self.filenos[0])


ROOTS_LOCKS = "/run"
"""Where root's locks are: nobody else may write there."""


def lock_directory() -> str:
    """The directory for this account's locks, where nobody else may write. Raises Failure if the account has no
    home."""
    account = os.geteuid()
    if account == 0:
        return ROOTS_LOCKS
    try:  # not $HOME: cron and a shell must agree
        return os.path.join(pwd.getpwuid(account).pw_dir, ".local/state/zfs_replicate")
    except KeyError:
        raise Failure(
            f"this account (uid {account}) has no home, which is where its locks would be",
            "run it as an account with a home, or as root",
        ) from None


def make_lock_directory(path: str) -> None:
    """Raises Failure if others may write there."""
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        found = os.lstat(path)
    except OSError as error:
        raise Failure(
            f"cannot keep locks in {path}: {error.strerror}", "give this account a home that it may write to"
        ) from None
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not is_ours or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Failure(
            f"cannot keep locks in {path}: others may write there",
            f"see who made it, then: chmod 700 {shlex.quote(path)}",
        )


def strange(found: os.stat_result, owner: int) -> str:
    """Why a file is not a lock file of that user; "" if it may be one."""
    if not stat.S_ISREG(found.st_mode):
        return "it is no regular file"
    if found.st_uid != owner:
        return f"it belongs to {user_name(found.st_uid)}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to it (mode {stat.S_IMODE(found.st_mode):o})"
    return "it has another name besides" if found.st_nlink != 1 else ""


def lock_name(tree: str) -> str:
    return f"zfs_replicate-{hashlib.sha256(tree.encode()).hexdigest()[:16]}.lock"


def last_activity(tree: str, now: float) -> float | None:
    """When a run of this tree, of root or of this account, last moved something, or began; None if that is not known.

    What lies ahead of `now` says nothing: the clock was put back since, and another user's lock may be of before.
    """
    places = {(ROOTS_LOCKS, 0)}
    with contextlib.suppress(Failure):
        places.add((lock_directory(), os.geteuid()))
    times = []
    for directory, owner in places:
        with contextlib.suppress(OSError):
            found = os.lstat(os.path.join(directory, lock_name(tree)))
            times += [] if strange(found, owner) else [found.st_mtime]
    return max((moved for moved in times if moved <= now), default=None)


@contextlib.contextmanager
def lock(tree: str, job: str, stall_timeout: float) -> Iterator[Lock | None]:
    """Hold the lock of a local tree. Yields None if another run of this very job holds it and has moved something
    lately.

    Raises Failure if that run has moved nothing for too long (`stall_timeout`); if it has ended and its `zfs recv`
    lives on; or if another job is at work on this tree, on a tree around it, or on one within it.
    """
    directory = lock_directory()
    if directory != ROOTS_LOCKS:
        make_lock_directory(directory)
    with contextlib.ExitStack() as stack:
        files = []
        for name in with_ancestors(tree):
            files.append(LockFile(os.path.join(directory, lock_name(name))))
            stack.callback(files[-1].close)
        *above, own = files
        for name, file in zip(with_ancestors(tree), above):
            if not file.take(fcntl.LOCK_SH):
                raise taken_above(file.holder(), name, tree, file.path)
        if take_alone(own, tree):
            yield Lock(own, above, job)
        else:
            judge_holder(own, tree, job, stall_timeout)
            yield None


def take_alone(file: LockFile, tree: str) -> bool:
    """Lock a tree's own file, unless another run on it has. Raises Failure if runs on trees within it share it."""
    for _ in range(2):
        if file.take(fcntl.LOCK_EX):
            return True
        if file.take(fcntl.LOCK_SH):
            if file.take(fcntl.LOCK_EX):  # who had it has just ended
                return True
            raise Failure(
                f"a run on a tree within {tree} is at work",
                f"{ONE_AT_A_TIME}; to see it: fuser -v {shlex.quote(file.path)}",
            )
        found = file.holder()
        if found is None or is_alive(found.pid):
            return False
    return False


ONE_AT_A_TIME = "trees that overlap are worked on one at a time: give the lines different hours"


def left_behind(found: Holder, path: str) -> Failure:
    return Failure(
        f"the zfs recv of an earlier run ({found}) is still running",
        f"when that has ended the next run goes on from there; to see it: fuser -v {shlex.quote(path)}",
    )


def taken_above(found: Holder | None, name: str, tree: str, path: str) -> Failure:
    """Why the lock of `name`, a tree around ours, cannot be shared."""
    if found and not is_alive(found.pid):
        return left_behind(found, path)
    whose = f": {found.job} ({found})" if found else ""
    return Failure(f"a run on {name}, in which {tree} lies, is at work{whose}", ONE_AT_A_TIME)


def judge_holder(file: LockFile, tree: str, job: str, stall_timeout: float) -> None:
    """Raise Failure unless the lock is held by a live run of this job that has moved something lately."""
    found, moved = file.holder(), file.moved()
    is_still = time.time() - moved >= stall_timeout * LAST_BYTES_FACTOR
    if found is None and is_still:
        raise Failure(
            f"somebody who does not say who he is holds the lock of {tree} since {clock(moved)}",
            f"see who it is: fuser -v {shlex.quote(file.path)}",
        )
    if found is None:
        return  # it is just beginning
    if not is_alive(found.pid):
        raise left_behind(found, file.path)
    if found.job != job:
        raise Failure(
            f"a run of another line is at work on {tree}: {found.job} ({found})",
            "one place mirrors one source: give each line its own -l; or, if it is the same source, its own hours",
        )
    if is_still:
        raise Failure(
            f"another run ({found}) is at work, but nothing has moved there since {clock(moved)}",
            f"see what it waits for (ps -f --ppid {found.pid}; zpool status), or end it: kill {found.pid}",
        )


def is_alive(pid: int) -> bool:
    """Whether there is such a process, of whatever user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def clock(moment: float) -> str:
    """A moment in local time; as a plain number if no calendar goes so far."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
    except (OverflowError, OSError, ValueError):
        return f"{tellable(moment):.0f}"


def overlap(one: str, other: str) -> bool:
    """Whether one of two trees would be within the other, if they were in one pool."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def believed(host: Host, look: Callable[[], Tree]) -> Tree:
    """Take a look at a host; take a second one if the first is not believed, because a dataset may come, go or be
    renamed during the first. Raises NotBelieved if the second is not believed either."""
    with contextlib.suppress(NotBelieved):
        return look()
    try:
        return look()
    except NotBelieved as failure:
        raise NotBelieved(
            f"cannot believe what {host.label} says: {failure.what}",
            "nothing was done upon it; run zfs list there by hand, and find out what prints that",
            LOGIN_TALKS if host.label != HERE else "",
        ) from None


Tell = Callable[[str, Failure], None]
"""Reports a failure that does not end the run: what it is about, and the failure itself."""


def read_tree(
    host: Host,
    root: str,
    selection: Selection,
    tell: Tell,
    *,
    only: Iterable[str] = (),
    places: Sequence[str] = (),
    fast: bool = False,
    incomplete: list[Failure] | None = None,
) -> Tree:
    """List what is selected of a tree, or `only` some of its datasets, and read the holds. If these cannot be read they
    are unknown (None), and the reason is told.

    `places` are where the tree is, if not at its root alone (see `MakeWay`). `fast` leaves out what makes a listing
    slow where the history is long: of snapshots come their names, guids and order alone, and no holds. Raises Failure
    if the tree cannot be listed, or is not believed. With `incomplete`, what zfs still lists will do, and the reason is
    added there.
    """
    roots, only = [*places] or [root], {*only}
    names, alone = sorted(only) or roots, bool(only) or not selection.recursive
    commands = list_fast(*names, alone=alone) if fast else (list_tree(*names, alone=alone),)

    def look() -> Tree:
        refused: Failure | None = None
        for _ in range(2):  # a snapshot may go between our two questions, and then one more look will do
            text = run(host, *commands) if incomplete is None else run_in_part(host, commands, roots, incomplete)
            tree, held = parse_tree(text, root, *places)
            if not only:
                whole_tree(tree, *(name[len(root) :] for name in roots))
            # The children of `only` are listed as well: zfs cannot leave them out.
            tree = {key: it for key, it in tree.items() if selection.has_dataset(key) and (not only or it.name in only)}
            if fast:
                return with_clones(tree)
            selected = {name: n for name, n in held.items() if name.partition("@")[0][len(root) :] in tree}
            try:
                return with_clones(with_tags(tree, read_tags(host, selected)))
            except (LinkLost, Stuck):
                raise
            except Failure as failure:
                refused = failure
        if refused:
            tell(f"holds on {host.label}", refused)
        return with_clones(tree)

    return believed(host, look)


def listed_in_part(why: Failure) -> Failure:
    hint = "what is listed is pulled; nothing is released, renamed or expired"
    return Failure(f"zfs lists only a part of the tree: {why.what}", why.hint, hint)


def run_in_part(host: Host, commands: Sequence[Command], roots: Iterable[str], incomplete: list[Failure]) -> str:
    """As `run`. But of listings that fail it returns what there is, and adds the reason to `incomplete`."""
    incomplete.clear()
    try:
        return run(host, *commands)
    except CommandFailed as failure:
        # One damaged dataset takes its neighbours along (https://github.com/openzfs/zfs/issues/12566).
        text = rooted_rows("".join(host.ask(command).stdout for command in commands), roots)
        if not text:
            raise
        incomplete.append(failure)
        return text


def whole(host: Host, root: str, selection: Selection) -> Tree:
    """What is selected of a tree, with its holds. Raises Failure if they cannot be read."""

    def refuse(_: str, failure: Failure) -> NoReturn:
        raise failure

    return read_tree(host, root, selection, refuse)


def read_tags(host: Host, held: dict[str, int]) -> dict[str, frozenset[str]]:
    """The tags of snapshots, given how many holds each has (userrefs). Raises Failure if the numbers differ: a tag
    with a newline can look like the hold of another snapshot."""
    tags: dict[str, frozenset[str]] = {}
    for batch in batches(held):
        tags.update(parse_holds(run(host, (*LIST_HOLDS, *batch)), held))
    for name, count in held.items():
        found = len(tags.get(name, ()))
        if found != count:
            raise NotBelieved(f"{name} has {count} holds, and zfs holds tells of {found}", f"see: zfs holds '{name}'")
    return tags


def says_absent(answer: Answer, name: str) -> bool:
    """Whether zfs itself says that a dataset does not exist."""
    # Any other error must not count: a mirror that we take for absent would lose the hold on its base.
    return answer.status != 0 and f"'{name}': dataset does not exist" in answer.stderr


def place_holds(host: Host, tag: str, names: Iterable[str]) -> dict[str, str]:
    """Hold each snapshot. Returns those that are not known to be held now, with what zfs said."""
    missing = {}
    for batch in batches(names):
        answer = host.ask(hold(tag, batch))
        if answer.status != 0:
            # Some may be done, some may have had the tag before: an exit status tells neither, so look.
            found = parse_holds(host.ask((*LIST_HOLDS, *batch)).stdout, {*batch})
            said = answer.stderr.strip()
            missing.update({name: said for name in batch if tag not in found.get(name, ())})
    return missing


def refusals(missing: dict[str, str]) -> str:
    """What `place_holds` could not hold, each message of zfs once."""
    names: dict[str, list[str]] = {}
    for name, said in missing.items():
        names.setdefault(said, []).append(name)
    return "; ".join(f"{few(some)}: {excerpt(said)}" for said, some in names.items())


def read_holds_and_ivsets(
    host: Host, names: Iterable[str], encrypted: set[str]
) -> tuple[dict[str, frozenset[str]], dict[str, int]]:
    """Read the tags of these snapshots, and the ivset numbers of the encrypted ones among them (`Snapshot.ivset`).
    Raises Failure if a snapshot does not exist."""
    tags: dict[str, frozenset[str]] = {}
    ivsets: dict[str, int] = {}
    for batch in batches(names, BATCH_BYTES // 2 if encrypted else BATCH_BYTES):  # those are named twice
        raw = [name for name in batch if name in encrypted]
        held, numbers = parse_holds_and_ivsets(
            run(host, *([(*LIST_IVSETS, *raw)] if raw else []), (*LIST_HOLDS, *batch)), {*batch}
        )
        tags.update({name: held.get(name, NO_TAGS) for name in batch})
        ivsets.update(numbers)
    return tags, ivsets


def also_to_read(names: Sequence[str], others: Iterable[str], now: int) -> list[str]:
    """Choose other snapshots whose holds are read as well: as many as still fit into the request for `names`."""
    # This is how a hold of ours that should not be there is found, whoever left it. Each day has another part of them,
    # so that in a large tree every snapshot's turn comes.
    *_, last = [[], *batches(names)]
    room = BATCH_BYTES - sum(len(name) + NAME_COST for name in last)
    turns = list(batches(others, room)) if room > NAME_LIMIT else []
    return turns[now // DAY % len(turns)] if turns else []


MAX_PER_REQUEST = 100
"""Commands in one request, streams in one batch: they travel as one word, of which Linux takes 128 KiB."""

Both = Callable[[Callable[[], Any], Callable[[], Any]], tuple[Any, Any]]
"""Calls two functions, and returns what they return."""


def both_in_turn(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    return first(), second()


def both_at_once(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    """Call both at once, the first in the background. If both fail, the first failure counts."""
    answer = in_background(first)
    try:
        found = second()
    except Failure:
        answer.result()
        raise
    return answer.result(), found


class Lister:
    """Lists both trees, and asks for what no listing tells.

    For the whole run it remembers in which local datasets we held something when the run began (`held_before`), and
    which datasets we have `received`. `dead_tokens` are those for which `zfs recv -A` found nothing
    to abort.
    """

    def __init__(self, policy: Policy, source: Host, target: FencedHost, report: Report, both: Both) -> None:
        self.policy = policy
        self.source_host = source
        self.target_host = target
        self.report = report
        self.both = both
        self.held_before: set[str] | None = None
        self.received: set[str] = set()
        self.dead_tokens: set[str] = set()
        self.incomplete: tuple[list[Failure], list[Failure]] = ([], [])  # why a tree could be listed in part only

    def list_both(self, now: int, *, in_full: bool = False) -> Trees:
        """List both trees at the same time, and read the holds that a run must know; `in_full`: all holds of the
        source. Raises Failure if a tree cannot be listed."""
        source, trees = self.both(lambda: self.list_source(fast=not in_full), self.list_target)
        trees = self.inspect(replace(trees, source=source))
        return trees if in_full else self.read_holds(trees, source, now)

    def list_again(self, trees: Trees, keys: Iterable[str], now: int) -> Trees | None:
        """List these datasets of the source again, and their mirrors. None if everything is to be listed instead: if
        these are most of the tree, or if one of them is gone or renamed by now."""
        mirrors = mirrors_of(trees, self.policy)
        keys = [key for key in keys if key in trees.source]
        there = [trees.source[key].name for key in keys]
        here = [mirrors[key].name for key in keys if key in mirrors]
        if 2 * len(there) > len(trees.source) or 2 * sum(map(len, there + here)) > BATCH_BYTES:
            return None
        try:
            source, target = self.both(lambda: self.list_source(there), lambda: self.read_target(here))
        except CommandFailed:
            return None
        trees = replace(
            trees, source=with_clones({**trees.source, **source}), target=with_clones({**trees.target, **target})
        )
        return self.read_holds(self.inspect(trees, target), source, now)

    def list_some_again(self, trees: Trees, keys: Iterable[str]) -> Trees:
        """List some local datasets again; those that are not there any more are left out. Raises Failure if it is not
        known whether one exists."""
        keys = [*dict.fromkeys(keys)]
        target = {key: local for key, local in trees.target.items() if key not in keys}
        for names in batches(self.policy.target_root + key for key in keys):
            target.update(self.read_target(self.existing(names)))
        return self.inspect(replace(trees, target=target), keys)

    def list_received(self, trees: Trees, streams: Sequence[Stream]) -> tuple[Trees, list[str]]:
        """Verify by a listing what is said to have arrived. Returns also the datasets where it has not."""
        steps: dict[str, list[Receive]] = {}
        for stream in streams:
            steps.setdefault(stream.key, []).append(stream.step)
        names = {key: self.policy.target_root + key for key in steps}
        # The last snapshot of each proves that those before it have arrived too. The whole history may be long.
        exactly = (it for key, some in steps.items() for it in (names[key], names[key] + some[-1].snapshot.short))
        found: Tree = {}
        for batch in batches(exactly):
            found.update(parse_tree(self.target_host.ask((*LIST_EXACTLY, *batch)).stdout, *self.places)[0])
        target, unproven = dict(trees.target), []
        for key, some in steps.items():
            local = found.get(key)
            if local and [snapshot.guid for snapshot in local.snapshots] == [some[-1].snapshot.guid]:
                *past, _ = after_receives(trees.source[key], trees.target.get(key), local.name, some).snapshots
                target[key] = replace(local, snapshots=(*past, *local.snapshots))
            else:
                unproven.append(key)
        return self.inspect(replace(trees, target=target), steps.keys() - set(unproven)), unproven

    def list_source(self, only: Sequence[str] = (), *, fast: bool = True) -> Tree:
        root, selection = self.policy.source_root, self.policy.selection
        try:
            incomplete = None if only else self.incomplete[0]
            tree = read_tree(
                self.source_host, root, selection, self.report.failure, only=only, fast=fast, incomplete=incomplete
            )
        except CommandFailed as failure:
            if f"'{root}': dataset does not exist" in failure.what:
                failure.hint = f"check -r; is the pool imported there? zpool import {root.split('/')[0]}"
            raise
        # The source may be a mirror itself. What has a name there only for a while is nothing to follow. Its own name
        # may be another's by now, until the run there is done.
        if not only and any(BETWEEN_NAMES in key for key in tree):
            self.incomplete[0].append(Failure("a run there is renaming datasets, or was killed", "run that line again"))
        return with_clones({key: it for key, it in tree.items() if not any(it in key for it in PASSING)})

    def list_target(self) -> Trees:
        """The local tree, and what there is of its ancestors."""
        names = with_ancestors(self.policy.target_root)
        root, aside = self.places
        may_make_way = "/" in root and len(aside) <= NAME_LIMIT
        existing = self.existing([*names, *([aside] if may_make_way else [])])
        failing = root in existing and bool(self.target_host.ask((*GET_FAILING, root)).stdout)
        places = [name for name in (root, aside) if name in existing]
        tree: Tree = {}
        if places:
            selection = self.policy.selection
            tell, incomplete = self.report.failure, self.incomplete[1]
            tree = read_tree(self.target_host, root, selection, tell, places=places, incomplete=incomplete)
        if self.held_before is None:
            self.held_before = {key for key, local in tree.items() if newest_received(local, self.policy)}
        return Trees({}, tree, tuple(name for name in names if name in existing), failing)

    def existing(self, names: Sequence[str]) -> list[str]:
        """Those of these local datasets that exist. Raises Failure if zfs does not say so clearly of one, or if a pool
        is not there."""
        answer = self.target_host.ask((*LIST_EXISTING, *names))
        found = [row[0] for row in fields(answer.stdout, 1)]
        for name in names:
            if name not in found and ("/" not in name or not says_absent(answer, name)):
                hint = hint_for(answer.stderr) or f"is the pool imported? zpool import {name.split('/')[0]}"
                raise Failure(f"cannot list {name} on {self.target_host.label}: {answer.stderr.strip()}", hint)
        return found

    def read_target(self, names: Sequence[str]) -> Tree:
        """Some datasets of the local tree, if there are any."""
        policy, tell = self.policy, self.report.failure
        if not names:
            return {}
        return read_tree(self.target_host, policy.target_root, policy.selection, tell, only=names, places=self.places)

    @property
    def places(self) -> tuple[str, str]:
        """Where the local tree is: its root, and the name that this has while it makes way."""
        return self.policy.target_root, self.policy.target_root + MADE_WAY

    # what only further commands can tell

    def inspect(self, trees: Trees, keys: Iterable[str] | None = None) -> Trees:
        """Ask for what no listing tells of local datasets: what a resume token waits for, whether a place is empty,
        what is below it, which datasets are ours."""
        policy, host, target = self.policy, self.target_host, dict(trees.target)
        for side, reasons in zip((self.source_host, host), self.incomplete):
            for why in reasons:
                self.report.failure(side.label, listed_in_part(why))
        trees = replace(trees, source_whole=not self.incomplete[0], target_whole=not self.incomplete[1])
        keys = [key for key in (target if keys is None else keys) if key in target]
        for key in keys:
            local, there = target[key], trees.source.get(key)
            if local.partial and local.partial.token in self.dead_tokens:
                local = replace(local, partial=None)
            if local.partial:
                answer = host.ask((*DECODE_TOKEN, local.partial.token))
                local = replace(local, partial=parse_token(local.partial.token, answer.stdout + answer.stderr))
            local = replace(local, held_before=key in (self.held_before or ()), recognised=key in self.received)
            is_place = local.kind == "filesystem" and not local.snapshots and not local.partial
            if is_place and there and policy.selection.of_snapshots(there.snapshots):
                tree = read_tree(host, local.name, Selection(), self.report.failure)
                host.ask((*SYNC_POOL, with_ancestors(local.name)[0]))  # so that what was written lately counts
                doubtful = [it for it in tree.items() if it[1].kind == "filesystem" and not it[1].snapshots]
                empty = {inner: self.is_empty(it.name) for inner, it in doubtful if ASIDE not in inner}
                strangers = strangers_below(key, tree, empty, trees.source, policy)
                local = replace(local, empty=empty.get(""), parent=len(tree) > 1, strangers=strangers)
            target[key] = local
        ours = self.recognise(replace(trees, target=target), keys)
        self.received |= ours
        return replace(trees, target={**target, **{key: replace(target[key], recognised=True) for key in ours}})

    def is_empty(self, name: str) -> bool | None:
        """Whether a filesystem contains no files; None if that cannot be determined."""
        command = (*COUNT_FILES, name)
        answer = self.target_host.ask(command)
        if answer.status != 0:
            rights = allow_hint(self.target_host, command, answer.stderr)
            self.report.failure(name, Failure(f"cannot determine whether it is empty: {answer.stderr.strip()}", rights))
            return None
        return count_objects(answer.stdout) == 1

    def recognise(self, trees: Trees, keys: Iterable[str]) -> set[str]:
        """Find the datasets that an earlier run received, and did not live to hold."""
        target, found = trees.target, set()
        doubtful = [key for key in keys if key in target and key in trees.source]
        doubtful = [key for key in doubtful if not is_ours(trees.source[key], target[key])]
        for batch in batches(target[key].name for key in doubtful):
            for name, sources in parse_sources(run(self.target_host, (*LIST_SOURCES, *batch)), batch).items():
                key = name[len(self.policy.target_root) :]
                # They have all the properties that we set. Nobody else sets them all.
                ours = kinds_values(target[key].kind, self.policy.properties)
                if any(sources.get(it) != "local" for it in ours):
                    continue
                # Another tool's mirror gets them too, before our first stream: then this tells whether one has arrived.
                is_marked = sources.get(TAKEN_OVER) == "local"
                mark = run(self.target_host, (*GET_VALUE, TAKEN_OVER, name)).strip() if is_marked else ""
                if mark != str(target[key].snapshots[-1].guid):
                    found.add(key)
        return found

    def read_holds(self, trees: Trees, keys: Iterable[str], now: int) -> Trees:
        """Add to a fast listing the holds that a run must know (`holds_to_read`), and the ivset numbers of encrypted
        snapshots that both sides have."""
        source, target = trees.source, trees.target
        wanted = (it for key in keys for it in holds_to_read(source[key], target.get(key), self.policy, now))
        names = [*dict.fromkeys(it.name for it in wanted)]
        if not names:
            return trees
        commons = (newest_common(there, target.get(key)) for key, there in source.items() if there.encrypted)
        encrypted = {common.source.name for common in commons if common}
        every = [it.name for dataset in source.values() for it in dataset.snapshots]
        # A full listing is quicker than many questions about most of it. And of bookmarks only it has ivset numbers.
        is_long = sum(map(len, names)) > BATCH_BYTES and 2 * len(names) > len(every)
        if not is_long and not any("#" in name for name in encrypted):
            others = also_to_read(names, (name for name in every if name not in {*names}), now)
            for asked in ([*names, *others], names):
                try:
                    found = with_tags(source, *read_holds_and_ivsets(self.source_host, asked, encrypted))
                except (LinkLost, Stuck):
                    raise
                except Failure:
                    continue  # one may be gone by now; whatever else is wrong, the next question meets and reports it
                return replace(trees, source=with_clones(found))
        return replace(trees, source=self.list_source(fast=False))


@dataclass(frozen=True)
class Stream:
    """A step of one dataset, with the commands that send and receive it, and whether a compressor is worth it."""

    key: str
    step: Receive
    ends: tuple[Command, Command]
    compress: bool


class LocalSteps:
    """Takes the steps of a plan that need no stream: renames, overrides, aborted receives."""

    def __init__(self, policy: Policy, lister: Lister, report: Report) -> None:
        self.policy = policy
        self.lister = lister
        self.host = lister.target_host
        self.report = report

    def take(self, trees: Trees, key: str, step: LocalStep, now: int, parents: Iterable[str]) -> None:
        """Take one step. `parents` are the placeholders to be created before a rename. Raises Failure."""
        name = self.local_name(key)
        if isinstance(step, Rename):
            for parent in parents:
                self.report.creation(parent)
                run(self.host, (*CREATE_PARENT, parent))
            self.move(step.old, key)
        elif isinstance(step, MakeWay):
            self.make_way(trees, key)
        elif isinstance(step, RenameSnapshots):
            self.rename_snapshots(trees.target[key], step)
        elif isinstance(step, Quarantine):
            self.quarantine(key, now)
        elif isinstance(step, Rollback):
            self.roll_back(trees.target[key], step)
        else:
            self.abort_receive(name, step)

    def rename_snapshots(self, local: Dataset, step: RenameSnapshots) -> None:
        # What is no mirror of ours yet may be in use, and another tool may go by these names.
        if not local.held_before and not local.recognised and is_written(self.host, local.name):
            raise Failure(f"{local.name} was changed since its newest snapshot", "stop what writes to the mirror")
        self.report.event("rename", local.name, f"{local.name}: {step}, as at the source")
        for old, new in step.names:
            run(self.host, rename(local.name + old, local.name + new))

    def abort_receive(self, name: str, step: AbortReceive) -> None:
        self.report.event("abandon", name, f"{name}: {step}")
        try:
            run(self.host, (*ABORT_RECEIVE, name))
        except CommandFailed as failure:
            if "does not have any resumable receive state" not in failure.what:
                raise
            # A pool that an old ZFS wrote may show a token of nothing (https://github.com/openzfs/zfs/issues/10439).
            self.lister.dead_tokens.add(step.partial.token)

    def local_name(self, key: str) -> str:
        return self.policy.target_root + key

    def move(self, old: str, key: str) -> None:
        """Rename a local dataset and all below it. Nothing is lost."""
        name, as_there = self.local_name(key), ""
        if MADE_WAY not in old + key:
            self.check_below(old)
            as_there = "" if key.endswith(BETWEEN_NAMES) else ", as at the source"
        self.report.event("rename", name, f"{self.local_name(old)}: now called {name}{as_there}")
        run(self.host, rename(self.local_name(old), name))
        self.lister.held_before = {rekeyed(it, old, key) for it in self.lister.held_before or ()}
        self.lister.received = {rekeyed(it, old, key) for it in self.lister.received}

    def make_way(self, trees: Trees, key: str) -> None:
        """Rename a placeholder, so that the dataset itself can take its place."""
        name, away = self.local_name(key), self.local_name(key + MADE_WAY)
        if key + MADE_WAY in trees.target:
            raise Failure(
                f"{name} is to make way for what is to be received there, but {away} is left of an earlier time",
                f"see that nothing is in it, then: zfs destroy '{away}'",
            )
        self.report.step(f"{name}: {MakeWay()}")
        self.move(key, key + MADE_WAY)

    def check_below(self, key: str) -> None:
        """Raise Failure if another line's mirror is below a dataset that is to be renamed, selected or not."""
        tree = whole(self.host, self.local_name(key), Selection())
        others = [it for it in tree.values() if others_tags(it, self.policy)]
        if others:
            blocked = blocked_by_another_line(others[0], self.policy)
            raise Failure(f"{blocked.what}; so {self.local_name(key)} is not renamed", blocked.hint)

    def quarantine(self, key: str, now: int) -> None:
        self.check_below(key)
        name, aside = self.local_name(key), aside_of(self.local_name(key), now)
        self.report.notice("quarantine", name, f"{name}: renaming it to {aside}, children and all, to pull it afresh")
        run(self.host, rename(name, aside))
        for known in (self.lister.held_before or set(), self.lister.received):
            known.difference_update([it for it in known if is_below(it, key)])

    def roll_back(self, local: Dataset, way: Rollback) -> None:
        host, policy = self.host, self.policy
        self.report.notice("rollback", local.name, f"{local.name}: {way}")
        # Hold the common snapshot first: our only hold may be on one that the rollback destroys, if the source itself
        # was rolled back. A dataset that we have never held gets no hold yet, because it is not inert.
        missing = place_holds(host, policy.received_tag, [way.to.name] if local.held_before else [])
        if missing:
            said = missing[way.to.name]
            rights = allow_hint(host, hold(policy.received_tag, [way.to.name]), said)
            raise Failure(f"cannot hold {way.to.name}: {said}", "nothing was rolled back", rights)
        for batch in batches(snapshot.name for snapshot in way.newer if snapshot.tags):
            run(host, release(policy.received_tag, batch))
        if local.partial and local.partial.from_guid != way.to.guid:
            run(host, (*ABORT_RECEIVE, local.name))  # it hangs on a snapshot that is to go
        run(host, rollback(way.to))


class InertMirror:
    """Makes what we pull into inert, whoever made it: read-only, not mounted, not shared.

    `own_values` are, by dataset, the values that are set there and would be lost with the first properties to arrive
    (see `receive`). `refused` are datasets that could not be made inert and are not ours yet.
    """

    def __init__(self, policy: Policy, host: FencedHost, report: Report) -> None:
        self.policy = policy
        self.host = host
        self.report = report
        self.own_values: dict[str, dict[str, str]] = {}
        self.refused: set[str] = set()
        self.marked: set[str] = set()  # where `TAKEN_OVER` is set

    def exposures(self, trees: Trees, keys: Sequence[str]) -> Iterator[Exposure]:
        """What each local dataset that we are going to pull into lacks to be inert."""
        host = self.host
        for batch in batches(trees.target[key].name for key in keys):
            sources = parse_sources(run(host, (*LIST_SOURCES, *batch)), batch)
            mounted = {row[0] for row in fields(run(host, (*LIST_MOUNTED, *batch)), 2) if row[1] == "yes"}
            for name in batch:
                key = name[len(self.policy.target_root) :]
                yield exposure(key, trees.target[key], sources[name], self.policy.properties, name in mounted)

    def make_inert(self, trees: Trees, keys: Iterable[str]) -> tuple[Trees, set[str]]:
        """Make inert, before the first stream, what we did not make ourselves: the mirrors of other tools, and those of
        an earlier version of this program. What is set here stays set.

        A dataset that turns out to be modified is marked so in the trees, and nothing is set there. Returns also the
        datasets where it failed and that are not ours yet. Nothing is pulled into these: it might be mounted or shared.
        """
        target = dict(trees.target)
        # Children first: to unmount a dataset unmounts what is mounted below it.
        found = self.exposures(trees, [key for key in keys if key not in self.own_values])
        for it in sorted(found, key=lambda it: it.key, reverse=True):
            local = target[it.key]
            is_new = not local.held_before and not local.recognised
            try:
                # It may be in use, and no mirror at all: nothing is set before it is known that we may pull into it.
                if is_new and is_written(self.host, local.name):
                    target[it.key] = replace(local, changed=True)
                else:
                    self.own_values[it.key] = self.expose_no_more(local.name, it)
                    self.marked |= {it.key} if it.is_marked else set()
            except CommandFailed as failure:
                self.report.failure(local.name, failure)
                self.own_values[it.key] = {}
                self.refused |= set() if local.held_before else {it.key}
        return replace(trees, target=target), self.refused

    def expose_no_more(self, name: str, it: Exposure) -> dict[str, str]:
        """Unmount a dataset, and set what is missing. Returns the values that are set here, which zfs would drop
        with the first stream."""
        host = self.host
        self.report.exposure(name, it)
        if it.is_mounted:  # first: each `zfs set` of a mount property would remount it
            run(host, (*UNMOUNT, name))
        # While zoned is on, zfs lets nobody set a share. And setting one to off while canmount is on mounts the dataset
        # (changelist_postfix in libzfs). So zoned and canmount come first.
        shares = {key: value for key, value in it.missing.items() if key in SHARES}
        others = {key: value for key, value in it.missing.items() if key not in SHARES}
        for values in filter(None, (others, shares)):
            run(host, set_values(name, values))
        if it.mountpoint_came:
            run(host, (*INHERIT, "mountpoint", name))
        own = {key: run(host, (*GET_VALUE, key, name))[:-1] for key in it.own}
        # What has no limit, `zfs get -p` prints as 0, or as all ones. `zfs set` takes neither.
        unlimited = ("0", str(2**64 - 1))
        return {key: "none" if key in LIMITS and value in unlimited else value for key, value in own.items()}

    def put_back(
        self, trees: Trees, raw: Sequence[str], keys_before: Mapping[str, str], arrived: Sequence[Stream]
    ) -> None:
        """Undo what streams have set here and zfs recv cannot be told to leave out: `keylocation`, and in some releases
        the mountpoint."""
        host, root = self.host, self.policy.target_root
        here = [name for name in raw if name[len(root) :] in trees.target]
        for name, place in key_places(host, here).items():
            wanted = keys_before.get(name, "prompt")  # that of what is new here
            if place != wanted:
                try:
                    run(host, set_values(name, {"keylocation": wanted}))
                except CommandFailed as failure:
                    self.report.failure(name, failure)
        # Up to OpenZFS 2.3.8 and 2.4.3, a dataset that was here before takes over the source's mountpoint in spite of
        # -x, if one is set above it (https://github.com/openzfs/zfs/commit/66a45b8269). Once inherited, it stays so.
        # Nothing is mounted meanwhile, because canmount came with the stream.
        taken = sorted({root + it.key for it in arrived if self.own_values.get(it.key)})
        for name in sorted({root + it.key for it in arrived if it.key in self.marked and not it.step.token}):
            host.ask((*INHERIT, TAKEN_OVER, name))  # it came with properties; what is left of that is no harm
        for batch in batches(name for name in taken if name[len(root) :] in trees.target):
            for (name,) in fields(run(host, (*LIST_FOREIGN_MOUNTPOINTS, *batch)), 1):
                run(host, (*INHERIT, "mountpoint", name))


def is_written(host: Host, name: str) -> bool:
    """Whether anything was written to a local dataset since its newest snapshot."""
    host.ask((*SYNC_POOL, with_ancestors(name)[0]))
    return number(run(host, (*GET_VALUE, "written", name)).strip(), "written") > 0


def key_places(host: Host, names: Iterable[str]) -> dict[str, str]:
    """The `keylocation` of each encryption root among local datasets."""
    # Each raw stream with properties sets it to what the source says: to a file of this host, or an address of another.
    # zfs recv cannot be told to leave it out (recv_fix_encryption_hierarchy in libzfs).
    found: dict[str, str] = {}
    for batch in batches(names):
        roots = [row[0] for row in fields(run(host, (*LIST_KEY_ROOTS, *batch)), 2) if row[0] == row[1]]
        for some in batches(roots):
            rows: list[list[str]] = []
            with contextlib.suppress(NotBelieved):
                rows = [*fields(run(host, (*GET_VALUES, "keylocation", *some)), 2)]
            if sorted(row[0] for row in rows) != sorted(some):  # a value has newlines in it: then one by one
                rows = [[name, run(host, (*GET_VALUE, "keylocation", name))[:-1]] for name in some]
            found.update((name, place) for name, place in rows)
    return found


class Executor:
    """Carries out the plan of a tree, in rounds (see `Run.transfer`): names and overrides first, then streams in few
    batches. Lists again what it has touched.

    A dataset that fails is reported and `given_up`; the others go on. A link that is `lost` ends the transfer.
    """

    def __init__(self, policy: Policy, lister: Lister, send: Send, report: Report) -> None:
        self.policy = policy
        self.lister = lister
        self.local_steps = LocalSteps(policy, lister, report)
        self.inert = InertMirror(policy, lister.target_host, report)
        self.send = send
        self.report = report
        self.given_up: set[str] = set()
        self.placed: dict[str, set[str]] = {}  # what was held at the source to be sent
        self.touched: set[str] = set()  # the datasets of which anything may have changed on either side
        self.tries: dict[str, tuple[int, int | None]] = {}  # how often a dataset got no further; steps left at the last
        self.lost: tuple[str, LinkLost] | None = None  # what was at work when the link broke
        self.is_read_only = False  # the pool of the source: then nothing can be held there, and nothing can vanish

    @functools.cached_property
    def features(self) -> list[str]:
        """Those of the local pool that streams may use."""
        rows = fields(run(self.lister.target_host, list_features(with_ancestors(self.policy.target_root)[0])), 2)
        return [name.partition("@")[2] for name, value in rows if value in ("enabled", "active")]

    def local_name(self, key: str) -> str:
        return self.policy.target_root + key

    def give_up(self, key: str, failure: Failure) -> None:
        self.given_up.add(key)
        self.report.failure(self.local_name(key), failure)

    def tried_too_often(self, key: str, left: int) -> bool:
        """Give up a dataset that we have worked on too often without getting any further; so many steps are left."""
        count, before = self.tries.get(key, (0, None))
        count += before is not None and left >= before
        self.tries[key] = (count, left)
        if count > MAX_STEPS:
            what = f"still not in step after {MAX_STEPS} steps that brought it no further"
            self.give_up(key, StreamFailed(what, "run again; if it stays so, report it"))
        return count > MAX_STEPS

    def spare(self, keys: Iterable[str]) -> None:
        """Do not count a round in which the turn of a dataset did not come."""
        self.tries.update((key, (self.tries[key][0], None)) for key in keys)

    # names and overrides

    def change_names(self, trees: Trees, plan: TreePlan, now: int) -> tuple[Trees, bool]:
        """Take all steps that need no stream, except those that have to wait for one. Returns whether there were
        any."""
        # A step waits if a stream must come first at its dataset, at one above it or, for a rename, at the old name.
        # `coming` are these names. A step that waits adds its own: nothing may arrive under a name that another
        # dataset still has. Any step but a rename waits for a new listing, too, of what was renamed (`moved`).
        coming: set[str] = set()
        moved: set[str] = set()
        parents: list[str] = []  # placeholders that are still to be made
        is_done = False
        for key, step in plan.entries:
            if isinstance(step, Create):
                parents.append(step.name)
            elif isinstance(step, Receive):
                coming.add(key)
            elif isinstance(step, LOCAL_STEPS):
                names = {key, step.old} if isinstance(step, Rename) else {key}
                places = [*with_ancestors(key), *(with_ancestors(step.old) if isinstance(step, Rename) else ())]
                late = coming if isinstance(step, Rename) else coming | moved
                if key in self.given_up or not late.isdisjoint(places):
                    coming |= names
                    continue
                is_done = True
                moved |= {key} if isinstance(step, Rename) else set()
                above = [name for name in parents if is_below(self.local_name(key), name)]
                parents = [name for name in parents if name not in above]
                coming |= set() if self.change_name(trees, key, step, now, above) else names
        if is_done:
            trees = self.lister.inspect(replace(self.lister.list_target(), source=trees.source))
        return trees, is_done

    def change_name(self, trees: Trees, key: str, step: LocalStep, now: int, parents: Sequence[str]) -> bool:
        """Take one such step. Returns whether it succeeded."""
        self.touched.add(key)
        if self.tried_too_often(key, 0):
            return False
        try:
            self.local_steps.take(trees, key, step, now, parents)
        except (LinkLost, Stuck):
            raise
        except Failure as failure:
            self.give_up(key, failure)
            return False
        if isinstance(step, Rename):
            self.inert.own_values = {rekeyed(it, step.old, key): own for it, own in self.inert.own_values.items()}
        elif isinstance(step, (Quarantine, MakeWay)):
            self.inert.own_values = {it: own for it, own in self.inert.own_values.items() if not is_below(it, key)}
        return True

    # streams

    def prepare(self, trees: Trees, plan: TreePlan) -> tuple[Trees, list[Stream] | None]:
        """Hold what will be sent, and prepare the places for it. Returns the batch that can be sent now. It is empty
        if another plan is due first, and None if nothing is left to send."""
        receives, parents = plan.streams_due()
        receives = {key: steps for key, steps in receives.items() if not self.tried_too_often(key, len(steps))}
        if not receives:
            return trees, None
        self.touched |= receives.keys()
        mirrors = [key for key in receives if newest_common(trees.source[key], trees.target.get(key))]
        trees, refused = self.inert.make_inert(trees, mirrors)
        self.given_up |= refused
        batch: list[Stream] = []
        # What was found modified just now is planned anew, before anything is held for it.
        if not any((local := trees.target.get(key)) and local.changed for key in receives):
            trees = self.hold(trees, {key: steps for key, steps in receives.items() if key not in refused})
            receives = {key: steps for key, steps in receives.items() if key not in self.given_up}
            trees, created = self.create_parents(trees, receives, parents)
            empty = self.protect_empty(trees, receives)
            trees = self.lister.list_some_again(trees, [*created, *empty])
            empty = [key for key in empty if key not in self.given_up]
            if all((local := trees.target.get(key)) and local.empty for key in empty):
                batch = self.next_batch(trees, receives)
        if batch:
            self.spare(receives.keys() - {it.key for it in batch})
        return trees, batch

    def hold(self, trees: Trees, receives: Mapping[str, Sequence[Receive]]) -> Trees:
        """Hold all that will be sent, in one command. If that fails, try dataset by dataset, and give up those that
        cannot be held."""
        tag, host, source = self.policy.tag, self.lister.source_host, dict(trees.source)
        wanted = {
            key: [it.snapshot.name for it in steps if tag not in (it.snapshot.tags or ())]
            for key, steps in receives.items()
        }
        missing = place_holds(host, tag, [name for names in wanted.values() for name in names])
        for key, names in wanted.items():
            refused = place_holds(host, tag, [name for name in names if name in missing])
            if refused and all(READ_ONLY in said for said in refused.values()):
                self.is_read_only = True
            elif refused:
                rights = allow_hint(host, hold(tag, refused), "".join({*refused.values()}))
                why = "nothing was sent, because a snapshot without a hold could be destroyed during the transfer"
                self.give_up(key, Failure(f"cannot hold {refusals(refused)}", why, rights))
                continue
            placed = {name for name in names if name not in refused}
            self.report.holds("hold", tag, sorted(placed))
            # What could not be read may have been held before: that hold is not ours to release again.
            known = {it.snapshot.name for it in receives[key] if it.snapshot.tags is not None}
            self.placed.setdefault(key, set()).update(placed & known)
            source[key] = held_after(source[key], tag, placed)
        return replace(trees, source=source)

    def create_parents(
        self, trees: Trees, receives: Iterable[str], parents: Mapping[str, Sequence[str]]
    ) -> tuple[Trees, list[str]]:
        """Create the placeholders above what will be received. Returns those that are new in the local tree, which are
        to be listed. Gives up what is below one that cannot be created."""
        root = self.policy.target_root
        known = {*trees.existing, *(local.name for local in trees.target.values())}
        created: list[str] = []
        for name in (name for key in receives for name in parents.get(key, ()) if key not in self.given_up):
            above = name.rpartition("/")[0]
            if name in known or (above and above not in known):
                continue
            try:
                self.report.creation(name)
                run(self.lister.target_host, (*CREATE_PARENT, name))
            except CommandFailed as failure:
                for other in receives:
                    if is_below(self.local_name(other), name):
                        self.give_up(other, failure)
            else:
                known.add(name)
                created.append(name)
        existing = (*trees.existing, *(name for name in created if not is_below(name, root)))
        return replace(trees, existing=existing), [name[len(root) :] for name in created if is_below(name, root)]

    def protect_empty(self, trees: Trees, receives: Iterable[str]) -> list[str]:
        """Make empty filesystems that will be replaced read-only. Returns them: they are to be listed again."""
        empty = [key for key in receives if (local := trees.target.get(key)) and local.empty and not local.snapshots]
        for key in empty:
            # Hours may have gone since the listing, and hours may go until the stream is whole: what anybody writes
            # meanwhile -F would overwrite.
            try:
                run(self.lister.target_host, (*MAKE_READ_ONLY, self.local_name(key)))
            except CommandFailed as failure:
                self.give_up(key, failure)
        return empty

    def next_batch(self, trees: Trees, receives: Mapping[str, Sequence[Receive]]) -> list[Stream]:
        """The streams that can be sent together now: through one compressor, at most MAX_PER_REQUEST. A child may
        follow its parent in the batch, and a clone its origin."""
        policy, flags = self.policy, stream_flags(self.features)
        batch: list[Stream] = []
        coming: set[str] = set()  # datasets, and names of snapshots, that this batch brings
        for key, some in receives.items():
            source, local, steps = trees.source[key], trees.target.get(key), some[:MAX_PER_REQUEST]
            # Nothing makes smaller what is encrypted, or is sent as it is stored, compressed.
            compress = not policy.raw(source) and not (source.compressed and "-c" in flags)
            fits = not batch or (len(batch) + len(steps) <= MAX_PER_REQUEST and compress == batch[0].compress)
            if not fits or key in self.given_up or not self.has_place(trees, key, receives, coming):
                continue
            parent = trees.source.get(key.rpartition("/")[0]) if key else None
            own = self.inert.own_values.get(key, {})
            for step in steps:
                name = self.local_name(key) + step.snapshot.short
                born = first_receive_options(source, parent, step, policy)
                receiving = receive(source, local, name, policy.properties, born, own=own)
                self.lister.target_host.check(receiving)  # a stream runs beside the fence
                batch.append(Stream(key, step, (send(source, step, policy.raw(source), flags), receiving), compress))
                # The next one of this dataset comes on top of that.
                local = after_receives(source, local, self.local_name(key), [step])
            coming |= {key, *(self.local_name(key) + step.snapshot.short for step in steps)}
        return batch

    def has_place(
        self, trees: Trees, key: str, receives: Mapping[str, Sequence[Receive]], coming: Container[str]
    ) -> bool:
        """Whether a dataset's parent and origin are here, or come before it in this batch."""
        if key in trees.target:
            return True
        first = receives[key][0]
        above = with_ancestors(self.policy.target_root)[:-1] if key == "" else []
        if key:
            # A parent that is still to be received comes first: nothing must be below it then.
            parent = key.rpartition("/")[0]
            here = trees.target.get(parent)
            is_whole = here is not None and (here.snapshots or not (here.partial or parent in receives))
            if not is_whole and parent not in coming:
                return False
        owner = first.origin.partition("@")[0][len(self.policy.target_root) :]
        origins = trees.target[owner].snapshots if first.origin and owner in trees.target else ()
        has_origin = not first.origin or first.origin in coming or any(it.name == first.origin for it in origins)
        return has_origin and all(name in trees.existing for name in above)

    def send_batch(self, trees: Trees, batch: Sequence[Stream]) -> Trees:
        """Send a batch, and verify with a listing what has arrived. At most one stream of a batch fails; those
        behind it are planned again."""
        for stream in batch:
            self.report.stream(self.local_name(stream.key), stream.step)
        raw = sorted({self.local_name(it.key) for it in batch if self.policy.raw(trees.source[it.key])})
        here = {local.name for local in trees.target.values()}
        keys_before = key_places(self.lister.target_host, [name for name in raw if name in here])
        try:
            ends = tuple(stream.ends for stream in batch)
            result = self.send(StreamBatch(ends, batch[0].compress))
        except StreamFailed as failure:
            result = BatchResult((), failure)
        arrived, lost = batch[: len(result.arrived)], batch[len(result.arrived) :][:1]
        self.spare({it.key for it in batch} - {it.key for it in [*arrived, *lost]})
        self.lister.received |= {it.key for it in arrived}
        trees, unproven = self.lister.list_received(trees, arrived)
        trees = self.lister.list_some_again(trees, [*unproven, *(it.key for it in lost)])
        self.inert.put_back(trees, raw, keys_before, arrived)
        self.tell_arrived(trees, arrived, result.arrived)
        return self.judge(trees, [*lost, *batch[-1:]][0], result.failure) if result.failure else trees

    def tell_arrived(self, trees: Trees, arrived: Sequence[Stream], arrivals: Sequence[ReceivedStream]) -> None:
        """Report what has arrived, and give up datasets where something is wrong with it."""
        last = {it.key: it.step for it in arrived}
        for stream, arrival in zip(arrived, arrivals):
            name = self.local_name(stream.key)
            refused = refused_properties(arrival.said)
            for key, said in refused.items():
                self.report.step(f"{name}: arrived without property {key}: {excerpt(said)}")
            local, end = trees.target.get(stream.key), last[stream.key].snapshot
            if not local or not local.snapshots or local.snapshots[-1].guid != end.guid:
                what = f"zfs recv reported success, but {name} does not end in {end.short}"
                self.give_up(stream.key, StreamFailed(what))
            elif wrong := unset_properties(self.lister.target_host, stream.ends[1], refused):
                self.give_up(stream.key, wrong)
            else:
                self.report.pulled(name, stream.step, arrival)

    def judge(self, trees: Trees, stream: Stream, failure: Failure) -> Trees:
        """Decide about a dataset whose stream failed. Usually it is given up, with a hint from the listing. If ZFS
        found it modified, note that in the tree: the next plan will say what to do."""
        if isinstance(failure, LinkLost):
            self.lost = self.lost or (self.local_name(stream.key), failure)  # the others would wait for the same link
            return trees
        local = trees.target.get(stream.key)
        said = failure.receiver_said if isinstance(failure, StreamFailed) else ""
        sender_said = failure.sender_said if isinstance(failure, StreamFailed) else ""
        waiting = local.partial if local and local.partial and local.partial.token == stream.step.token else None
        if local and waiting and "cannot resume send" in sender_said and not re.search(REFUSED_FOR_NOW, sender_said):
            # A token names its snapshot: where its pool has another name by now, it is never accepted again. The next
            # plan gives it up, once, for what comes then has another token.
            partial = replace(waiting, corrupt=True)
            return replace(trees, target={**trees.target, stream.key: replace(local, partial=partial)})
        missing = " or ".join(lacking(said, self.features))
        if local and "has been modified" in said:
            # zfs says so too of a stream that has another base than it should. Then nothing here is to be rolled back
            # or set aside, whatever the command line allows.
            if is_written(self.lister.target_host, local.name):
                return replace(trees, target={**trees.target, stream.key: replace(local, changed=True)})
            newest = local.snapshots[-1].guid if local.snapshots else None
            base = stream.step.base.guid if stream.step.base else local.partial.from_guid if local.partial else None
            if newest != base:
                return trees  # a snapshot was made here meanwhile: the plan will say so
            failure.hint = (
                "nothing was changed here since: find out what the source has sent instead of what it was asked for"
            )
        elif missing:
            failure.hint = f"the pool here lacks {missing}: zpool upgrade, with a newer OpenZFS if need be"
        elif local and waiting and not failure.hint:
            failure.hint = f"if this rest never comes, give it up, bytes and all: zfs recv -A '{local.name}'"
        self.give_up(stream.key, failure)
        return trees


def in_step(source: Dataset, local: Dataset | None, policy: Policy) -> str:
    """What to tell of a dataset for which there is nothing to do."""
    if not is_ours(source, local):
        return "in step, and not held: it is taken over when there is something to pull"
    return "in step" if policy.selection.of_snapshots(source.snapshots) else "no snapshot to pull"


class Holds:
    """Moves our holds and bookmarks to where they belong."""

    def __init__(self, policy: Policy, source: Host, target: Host, report: Report) -> None:
        self.policy = policy
        self.report = report
        self.source_host = source
        self.target_host = target
        self.refused: list[tuple[Host, Command, str]] = []  # what could not be placed or released, and what zfs said

    def move_all(self, trees: Trees, changes: Mapping[str, HoldChanges]) -> None:
        """Move the holds, in four phases. Their order is what keeps a mirror alive.

        Nothing of ours on the source is ever older than our oldest hold here. Every run relies on that: it looks for
        ours on the source from there on, and not in all of a long history (see `holds_to_read`). So our oldest hold
        here must not come, nor move up, before everything older is gone there: phases 3 and 4 follow phase 2.
        """
        source, target = (self.source_host, self.policy.tag), (self.target_host, self.policy.received_tag)
        self.refused = []
        mirrors = mirrors_of(trees, self.policy)
        # Where nothing is held here yet, the first hold will be our oldest one.
        new = {
            key
            for key in changes
            if not any(it.may_be_held_by(target[1]) for it in (mirrors[key].snapshots if key in mirrors else ()))
        }
        # 1  Place new ones, on the source everywhere, here where one of ours is already. At every instant one common
        #    snapshot must be held, and a release can destroy (`zfs destroy -d`): so this comes first.
        #    The source's come first: a hold here alone would look as if somebody had released its twin (`lost_holds`).
        missing = self.place_new(*source, (it for each in changes.values() for it in each.place_source))
        held = [key for key, it in changes.items() if key not in new and missing.isdisjoint(it.place_source)]
        missing |= self.place_new(*target, (it for key in held for it in changes[key].place_local))
        # 2  Release old ones on the source, of datasets where 1 succeeded.
        sure = [key for key, it in changes.items() if missing.isdisjoint([*it.place_local, *it.place_source])]
        left = self.release_old(*source, (it for key in sure for it in changes[key].release_source))
        # 3  Place the first one of a dataset here, where 2 left nothing behind.
        clean = [key for key in sure if left.isdisjoint(it.name for it in trees.source[key].history)]
        self.place_new(*target, (it for key in clean if key in new for it in changes[key].place_local))
        # 4  Release old ones here, of the same datasets.
        self.release_old(*target, (it for key in clean for it in changes[key].release_local))

    def place_new(self, host: Host, tag: str, names: Iterable[str]) -> set[str]:
        """Place holds. Returns the snapshots that are not known to be held now."""
        names = [*names]
        missing = place_holds(host, tag, names)
        self.report.holds("hold", tag, [name for name in names if name not in missing])
        self.refused += [(host, hold(tag, [name]), said) for name, said in missing.items()]
        return {*missing}

    def release_old(self, host: Host, tag: str, names: Iterable[str]) -> set[str]:
        """Release holds. Returns the snapshots that may still be held. The listing that follows tells."""
        left: set[str] = set()
        for batch in batches(names):
            answer = host.ask(release(tag, batch))
            self.refused.append((host, release(tag, batch), answer.stderr))
            if answer.status == 0:
                self.report.holds("release", tag, batch)
            else:
                left.update(batch)
        return left

    def problems(self, changes: Mapping[str, HoldChanges]) -> Iterator[tuple[str, Failure]]:
        """By dataset, what to report of changes that could not be made."""
        rights = [*dict.fromkeys(filter(None, (allow_hint(*refused) for refused in self.refused)))]
        hint = "; ".join(["the next run tries again", *(rights or ["see who may hold and release"])])
        for key, it in changes.items():
            not_placed = few(it.place_source + it.place_local)
            not_released = few(it.release_source + it.release_local)
            what = [f"not held: {not_placed}"] * bool(not_placed) + [f"still held: {not_released}"] * bool(not_released)
            yield self.policy.target_root + key, Failure("; ".join(what), hint)

    def bookmark_commands(self, trees: Trees) -> dict[str, list[Command]]:
        """The commands that move our bookmarks, by dataset of the source. A new bookmark is placed before old ones
        go."""
        commands: dict[str, list[Command]] = {}
        for key, source in trees.source.items():
            marks = bookmark_changes(source, trees.target.get(key), self.policy)
            place = [bookmark(marks.place, self.policy.mark(marks.place.guid))] if marks.place else []
            commands[source.name] = [*place, *map(destroy_bookmark, marks.remove)]
        return commands


class Run:
    """One run over a tree: list, bring up to date, move the holds, expire. `trees` is what is known by now."""

    def __init__(
        self,
        policy: Policy,
        source: Host,
        target: Host,
        send: Send,
        report: Report,
        *,
        both: Both = both_in_turn,
    ) -> None:
        """`both` calls two functions, and returns both results."""
        self.policy = policy
        self.report = report
        self.lister = Lister(policy, source, FencedHost(target, policy.target_root), report, both)
        self.executor = Executor(policy, self.lister, send, report)
        self.trees = Trees({}, {})

    @property
    def source_host(self) -> Host:
        return self.lister.source_host

    @property
    def target_host(self) -> FencedHost:
        return self.lister.target_host

    def begin(self, now: int, *, in_full: bool = False) -> None:
        """List both trees for the first time. Raises Failure also if they overlap in one pool."""
        roots = (self.policy.source_root, self.policy.target_root)
        if overlap(*roots):  # on one host, expiry would take the source for its own mirror
            guids = [
                run(host, (*GET_VALUE, "guid", roots[0].split("/")[0])) for host in (self.source_host, self.target_host)
            ]
            if guids[0] == guids[1]:
                raise Failure(
                    f"{self.source_host.label} is this host, and {roots[0]} and {roots[1]} overlap: "
                    "a tree cannot be mirrored into itself",
                    "this line may be meant for another host: check -h and -l",
                )
        self.trees = self.lister.list_both(now, in_full=in_full)

    def execute(self, now: int) -> None:
        """Everything after the first listing. Failures are reported, and the rest goes on. A lost link is only noted
        in `lost`: it may be worth another try."""
        try:
            plan = TreePlan(self.trees, self.policy)
            # What nobody should miss about holds at the source is told before any of them moves.
            for name, line in lost_holds(self.trees, self.policy, plan.left_alone):
                self.report.notice("hold lost", name, line)
            for name, line in holds_of_others(self.trees, self.policy, plan):
                self.report.notice("others hold", name, line)
            # A run that was killed after a stream left its properties as the source set them: repair these.
            received = [key for key, local in self.trees.target.items() if local.recognised and not local.held_before]
            self.trees, _ = self.executor.inert.make_inert(self.trees, received)
            plan = self.transfer(plan, now)
            self.update_holds(plan.left_alone | self.executor.inert.refused, now)
            if self.executor.is_read_only:
                # A pool that can only be imported so is perhaps dying: then nothing here goes either.
                self.report.failure(self.policy.target_root, Failure(*PULLED_UNHELD))
                return
            if self.policy.bookmark and self.trees.whole:
                self.update_bookmarks(now)
            # After a lost link some datasets were not dealt with: the next run may have to set them aside, with all
            # their snapshots.
            if not self.lost and self.trees.whole:
                self.expire(now)
        except LinkLost as failure:
            self.executor.lost = self.lost or (self.policy.target_root, failure)
        except Failure as failure:
            self.report.failure(self.policy.target_root, failure)

    def transfer(self, plan: TreePlan, now: int) -> TreePlan:
        """Bring the mirror up to date, in rounds: do what the plan allows at once, list again, plan again, until no
        step is left. Returns the last plan."""
        executor, root = self.executor, self.policy.target_root
        for key, entry in plan.entries:
            if entry is None:
                self.report.in_step(root + key, in_step(self.trees.source[key], plan.target.get(key), self.policy))
        is_done = False
        while not is_done and not self.lost:
            for key, entry in plan.entries:
                if isinstance(entry, Failure):  # blocked, or behind one that failed
                    executor.give_up(key, entry)
            try:
                self.trees, is_changed = executor.change_names(self.trees, plan, now)
                if not is_changed:
                    self.trees, batch = executor.prepare(self.trees, plan)
                    is_done = batch is None
                    if batch:
                        self.trees = executor.send_batch(self.trees, batch)
            except LinkLost as failure:
                executor.lost = self.lost or (self.policy.target_root, failure)
            plan = TreePlan(self.trees, self.policy, executor.given_up)
        return plan

    @property
    def lost(self) -> tuple[str, LinkLost] | None:
        """What was at work when the link broke, if it did."""
        return self.executor.lost

    def update_holds(self, left_alone: Container[str], now: int) -> None:
        """Move the holds, and list again what was touched, until nothing is left to move. The listing may show holds
        that were not known before, and datasets that were renamed meanwhile."""
        holds = Holds(self.policy, self.source_host, self.target_host, self.report)
        # Release what we held at the source for a take-over that failed. We hold nothing here, so no later run would
        # look for that hold.
        mirrors = mirrors_of(self.trees, self.policy)
        for key, names in self.executor.placed.items():
            local = mirrors.get(key)
            if (
                key in self.trees.source
                and not is_ours(self.trees.source[key], local)
                and not (local and local.partial)
            ):
                holds.release_old(self.source_host, self.policy.tag, names)
        touched = {*self.executor.touched}
        if touched:  # hours may have gone by: what is to be destroyed is looked at anew as well
            touched |= {
                key
                for key, local in self.trees.target.items()
                if may_expire(self.trees.source.get(key), local, self.policy, now)
            }
        for _ in range(3):
            changes = {} if self.executor.is_read_only else all_hold_changes(self.trees, self.policy, left_alone)
            holds.move_all(self.trees, changes)
            if any(host is self.source_host and READ_ONLY in said for host, _, said in holds.refused):
                self.executor.is_read_only = True
                return
            touched |= changes.keys()
            if not touched:
                return
            self.trees = self.lister.list_again(self.trees, touched, now) or self.lister.list_both(now)
            touched = set()
        for name, failure in holds.problems(all_hold_changes(self.trees, self.policy, left_alone)):
            self.report.failure(name, failure)

    def update_bookmarks(self, now: int) -> None:
        """Place our bookmarks, each before its older ones go: all in one request, or one by one if that fails. A
        failure is reported, and the next run tries again."""
        holds = Holds(self.policy, self.source_host, self.target_host, self.report)
        together = [command for commands in holds.bookmark_commands(self.trees).values() for command in commands]
        requests = (together[at : at + MAX_PER_REQUEST] for at in range(0, len(together), MAX_PER_REQUEST))
        if all(self.source_host.ask(*some).status == 0 for some in requests):
            return
        self.trees = self.lister.list_both(now)
        for name, commands in holds.bookmark_commands(self.trees).items():
            try:
                for command in commands:
                    run(self.source_host, command)
            except CommandFailed as failure:
                self.report.failure(name, failure)

    def expire(self, now: int) -> None:
        for expiry in self.expiries(now):
            self.destroy_all({snapshot.name: snapshot for snapshot in expiry.destroy}, expiry.cutoff)

    def expiries(self, now: int) -> Iterator[Expiry]:
        """What expires, by dataset. Reports why the rest is kept."""
        for key, local in self.trees.target.items():
            source = self.trees.source.get(key)
            if source is None and MADE_WAY not in key and self.trees.source_whole:
                self.report.event("gone", local.name, f"{local.name}: no longer exists at the source; kept")
            expiry = expire(source, local, self.policy, now)
            for snapshot, why in expiry.kept:
                self.tell_kept(snapshot, why)
            yield expiry

    def tell_kept(self, snapshot: Snapshot, why: str) -> None:
        line = f"{snapshot.name}: older than --keep-days, but kept: {why}"
        self.report.event("keep", snapshot.name.partition("@")[0], line, snapshot=snapshot.short, why=why)

    def destroy_all(self, snapshots: dict[str, Snapshot], cutoff: int) -> None:
        """Destroy snapshots in few commands, or one by one: zfs destroys none of a list if one of them cannot go."""
        for batch in batches(snapshots):
            together = [snapshots[name] for name in batch]
            done = self.target_host.ask(destroy(together)).status == 0
            for snapshot in together:
                try:
                    if not done:
                        run(self.target_host, destroy([snapshot]))
                    self.report.expired(snapshot, "expired")
                except CommandFailed as failure:
                    busy = re.search(BUSY, failure.what)
                    if busy and snapshot.creation >= cutoff - BUSY_DAYS * DAY:
                        self.tell_kept(snapshot, busy[0])
                        continue
                    if busy:
                        due = f"it was due more than {BUSY_DAYS} days ago; see who uses it: mount -t zfs, "
                        failure.hint = f"{due}zfs holds '{snapshot.name}', zfs list -o name,origin"
                    self.report.failure(snapshot.name, failure)


def mark_failing(target: Host, root: str, now: int) -> int:
    """Note at the local root that its runs fail. Returns since when they do."""
    answer = target.ask((*GET_FAILING, root))
    since = parse_failing(answer.stdout, root, now)
    if since is None and answer.status == 0:
        target.ask(set_failing(root, now))  # whoever may not do so has his mirror all the same
    return since or now


def aside_of(name: str, now: int) -> str:
    """The name under which a dataset is set aside."""
    return f"{name}{ASIDE}{time.strftime('%Y-%m-%d-%H%M%S', time.gmtime(now))}"


# ---------------------------------------------------------------------------------------------------------------------
# Room 9: Inspect
# ---------------------------------------------------------------------------------------------------------------------


def all_statuses(it: Run) -> Iterator[MirrorStatus]:
    """The status of each dataset of the source, then of those that are only here."""
    source, target, root = it.trees.source, it.trees.target, it.policy.target_root
    usage = parse_usage(run(it.source_host, (*LIST_USAGE, it.policy.source_root)))
    # By components, so that children follow their parent: as text, "/a-b" would come before "/a/b".
    for key in sorted(source, key=lambda key: key.split("/")):
        yield mirror_status(source[key], target.get(key), root + key, it.policy, usage)
    for key in sorted(target.keys() - source.keys(), key=lambda key: key.split("/")):
        yield local_status(target[key], it.policy, "")


def local_statuses(target: Host, policy: Policy) -> Iterator[MirrorStatus]:
    """The status of each local dataset that was ever in step, without asking the source. Raises Failure if the tree
    cannot be listed."""
    tree = whole(target, policy.target_root, policy.selection)
    # What was set aside is no mirror any more: it would be late for ever.
    keys = sorted((key for key in tree if ASIDE not in key), key=lambda key: key.split("/"))
    # Nor is a placeholder, or somebody else's dataset: of those we hold nothing.
    found = [it for it in (local_status(tree[key], policy) for key in keys) if it.common]
    came = arrivals(target, policy.received_tag, [it.common.name for it in found if it.common])
    for it in found:
        yield replace(it, received=came.get(it.common.name) if it.common else None)


def arrivals(target: Host, tag: str, names: Iterable[str]) -> dict[str, float]:
    """When these local snapshots came, by our own clock: when `tag` was placed on them."""
    # Their creation would not do: what that is, the source says, and it may say 2100.
    found = {}
    for batch in batches(names):
        for name, date in parse_hold_dates(target.ask((*LIST_HOLDS, *batch)).stdout, tag).items():
            with contextlib.suppress(ValueError, OverflowError):  # no date: --check then goes by the creation alone
                found[name] = time.mktime(time.strptime(date, HOLD_DATE))
    return found


# As zfs prints it, in local time. Seconds since 1970 (zfs holds -p) exist from 2.2 on.
HOLD_DATE = "%a %b %d %H:%M %Y"


def retire(source: Host, target: Host, policy: Policy, report: Report) -> None:
    """Release all our holds on both sides, and destroy our bookmarks; nothing else. A tree that no longer exists is
    skipped. Raises Failure if one cannot be listed."""
    for mark in release_all(source, policy.source_root, policy.tag, report):
        if mark.short == policy.mark(mark.guid):  # else it is the bookmark of somebody else, or of another tag
            try:
                run(source, destroy_bookmark(mark.name))
            except CommandFailed as failure:
                report.failure(mark.name, failure)
            else:
                report.event("unmark", mark.name.partition("#")[0], f"{mark.name}: destroyed", bookmark=mark.short)
    release_all(target, policy.target_root, policy.received_tag, report)
    # A run that was killed while the root made way has left children under this name (`MakeWay`).
    if target.ask((*LIST_EXISTING, policy.target_root + MADE_WAY)).status == 0:
        release_all(target, policy.target_root + MADE_WAY, policy.received_tag, report)
    target.ask(clear_failing(policy.target_root))


def release_all(host: Host, root: str, tag: str, report: Report) -> list[Snapshot]:
    """Release `tag` in a whole tree, and report what was done. Returns the bookmarks of the tree."""
    answer = host.ask((*LIST_EXISTING, root))
    if says_absent(answer, root):  # if it cannot be listed for another reason, that is raised below
        report.step(f"{root}: not there (any more)")
        return []
    tree = whole(host, root, Selection())
    ours = [s for dataset in tree.values() for s in dataset.snapshots if tag in (s.tags or ())]
    said = "".join(host.ask(release(tag, batch)).stderr for batch in batches(snapshot.name for snapshot in ours))
    # An exit status does not tell which of the holds are gone. List again, and believe only that.
    after = whole(host, root, Selection()) if ours else {}
    still = {s.name for dataset in after.values() for s in dataset.snapshots if tag in (s.tags or ())}
    for snapshot in ours:
        if snapshot.name not in still:
            dataset = snapshot.name.partition("@")[0]
            report.event("release", dataset, f"{snapshot.name}: released {tag}", snapshot=snapshot.short, tag=tag)
    if still:
        names = [snapshot.name for snapshot in ours if snapshot.name in still]
        hint = allow_hint(host, release(tag, names), said) or "see who may release them"
        report.failure(root, Failure(f"{few(names)}: still held by {tag}: {said.strip()}", hint))
    return [mark for dataset in tree.values() for mark in dataset.bookmarks]


def print_plan(it: Run, now: int) -> None:
    """What --dry-run does: print the plan that a run would carry out, then the holds and the expiry that follow."""
    # Everything is planned and worded by what a run uses. Only the changes that it makes on the way are made here in
    # `it.trees` instead, so that the next step is planned on what the steps before it would leave.
    plan = permitted_plan(it)
    receives = {key: step for key, step in plan.entries if isinstance(step, Receive)}
    # A run makes inert only what it pulls into. What it creates is so from the first moment.
    mirrors = [key for key in receives if newest_common(it.trees.source[key], it.trees.target.get(key))]
    for exposed in it.executor.inert.exposures(it.trees, mirrors):
        it.report.exposure(it.executor.local_name(exposed.key), exposed)
    sizes = estimated_sizes(it, plan)
    # A plan has all renames first, as a run takes them. A person looks for what happens to one dataset.
    places = {key: number for number, key in enumerate(in_order(it.trees.source))}
    for key, step in sorted(plan.entries, key=lambda entry: places.get(entry[0], len(places))):
        print_step(it, key, step, sizes, now)
    it.trees = replace(it.trees, target=plan.target)
    if receives:  # after them other snapshots may be due to expire, and the holds on their twins must be known
        it.trees = it.lister.read_holds(it.trees, it.trees.source, now)
    source, target = dict(it.trees.source), dict(it.trees.target)
    tag, received = it.policy.tag, it.policy.received_tag
    for key, changes in all_hold_changes(it.trees, it.policy, plan.left_alone).items():
        it.report.holds("hold", tag, changes.place_source)
        it.report.holds("hold", received, changes.place_local)
        it.report.holds("release", tag, changes.release_source)
        it.report.holds("release", received, changes.release_local)
        source[key] = held_after(source[key], tag, changes.place_source, changes.release_source)
        if key in target:
            target[key] = held_after(target[key], received, changes.place_local, changes.release_local)
    it.trees = replace(it.trees, source=source, target=target)
    for expiry in it.expiries(now) if it.trees.whole else ():
        for snapshot in expiry.destroy:
            it.report.expired(snapshot, "expires")


def permitted_plan(it: Run) -> TreePlan:
    """The plan, with a Failure for each rename that a run would refuse because of another line's mirror below."""
    executor = it.executor
    for key, step in TreePlan(it.trees, it.policy).entries:
        if isinstance(step, (Rename, Quarantine)):
            try:
                # A dataset that an earlier step of the plan renames still has its old name: it is not found.
                with contextlib.suppress(CommandFailed):
                    executor.local_steps.check_below(step.old if isinstance(step, Rename) else key)
            except Failure as failure:
                executor.give_up(key, failure)
    return TreePlan(it.trees, it.policy, executor.given_up)


def print_step(it: Run, key: str, step: Entry, sizes: Mapping[str, int], now: int) -> None:
    """Print one step of the plan."""
    report, name = it.report, it.policy.target_root + key
    if isinstance(step, Failure):
        report.failure(name, step)
    elif step is None:
        local = it.trees.target.get(key)
        report.in_step(name, in_step(it.trees.source[key], local, it.policy))
    elif isinstance(step, Create):
        report.creation(step.name)
    # A run tells the next two as done; here they are yet to come.
    elif isinstance(step, Rename):
        how = "for a while" if key.endswith(BETWEEN_NAMES) else "as at the source"
        report.event("rename", name, f"{it.policy.target_root + step.old}: rename to {name}, {how}")
    elif isinstance(step, Quarantine):
        report.event("quarantine", name, f"{name}: rename to {aside_of(name, now)}")
    elif isinstance(step, Receive):
        if step.lost_origin:
            report.step(f"{name}: in full, for its origin {step.lost_origin} is not in this mirror")
        size = sizes.get(step.snapshot.name)
        base = f", onto that of guid {step.base.guid}" if step.base else ""
        amount = "size unknown" if size is None else format_bytes(size)
        line = f"{name}: pull {step}: {amount} (guid {step.snapshot.guid}{base})"
        report.event("pull", name, line, **step.facts, bytes=size)
    else:
        kinds = {Rollback: "rollback", AbortReceive: "abandon", MakeWay: "make way", RenameSnapshots: "rename"}
        report.event(kinds[type(step)], name, f"{name}: {step}")


def estimated_sizes(it: Run, plan: TreePlan) -> dict[str, int]:
    """The estimated bytes of each stream of a plan, by snapshot. What the source cannot tell is left out."""
    found: dict[str, int] = {}
    source, raw = it.trees.source, it.policy.raw
    sendings: dict[str, Command] = {
        step.snapshot.name: estimate(send(source[key], step, raw(source[key]), stream_flags(it.executor.features)))
        for key, step in plan.entries
        if isinstance(step, Receive)
    }
    names = [*sendings]
    for start in range(0, len(names), MAX_PER_REQUEST):
        some = names[start : start + MAX_PER_REQUEST]
        sizes = parse_estimates(it.source_host.ask(*(sendings[name] for name in some)).stdout)
        found.update((name, size) for name, (size, _) in zip(some, sizes))
    # The first that fails ends a request, and nothing is known of those behind it. Ask for each of them alone.
    for name in sendings.keys() - found.keys():
        found.update((name, size) for size, _ in parse_estimates(it.source_host.ask(sendings[name]).stdout)[:1])
    return found


# From here on a pool gets slow, and a snapshot or two may fill it.
FULL_PERCENT = 90


@dataclass(frozen=True)
class Finding:
    """A result of --doctor: what was looked at, and a `remedy` if something is wrong with it."""

    what: str
    remedy: str = ""


class Doctor:
    """Looks at everything that a run needs. Changes nothing, because its hosts are `ReadOnly`."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.policy = run.policy

    def examine(self) -> Iterator[Finding]:
        """All findings. Raises Failure if the source cannot be reached, or a tree cannot be listed."""
        # The first command makes the connection. Asking for the time needs no rights, and the answer is wanted anyway.
        there = run(self.run.source_host, CLOCK_TIME)
        yield Finding(f"{self.run.source_host.label}: connection, host key and login OK")
        for look in (self.programs, lambda: self.clocks(there)):
            yield from self.tried(look)
        # Without both trees there is nothing to say about the rest.
        self.run.begin(int(time.time()), in_full=True)
        for look in (self.trees, self.rights, self.plans, self.dates, self.pool, self.mirror):
            yield from self.tried(look)

    def tried(self, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
        """The findings of one look. If it fails, that is a finding too, and the other looks follow."""
        try:
            yield from look()
        except (LinkLost, Stuck):
            raise
        except Failure as failure:
            yield Finding(failure.what, failure.hint or "no known remedy; see the message")

    def programs(self) -> Iterator[Finding]:
        for host in (self.run.source_host, self.run.target_host):
            # The version of the programs, then that of the kernel module. The source may print anything, so few digits.
            said = run(host, ZFS_VERSION).split()
            known = re.match(r"zfs-([0-9]{1,4})\.([0-9]{1,4})(?![0-9])", said[0]) if said else None
            old = not known or (int(known[1]), int(known[2])) < (2, 1)
            yield Finding(f"{host.label}: OpenZFS {' '.join(said[:2])}", "use 2.1 or newer" if old else "")
        missing = not buffer_stage("1M")
        yield Finding(f"mbuffer: {'missing' if missing else 'here'}", "apt install mbuffer" if missing else "")

    def clocks(self, there: str) -> Iterator[Finding]:
        """Whether both clocks agree. `there` is what `date` has printed on the source."""
        # Some seconds have passed since the source was asked. The limit is wide enough for that.
        here = run(self.run.target_host, CLOCK_TIME)
        try:
            theirs = number(there.strip(), f"the date on {self.run.source_host.label}")
        except NotBelieved as failure:
            raise Failure(failure.what, LOGIN_TALKS) from None
        skew = abs(theirs - number(here.strip(), f"the date on {self.run.target_host.label}"))
        what = f"clocks: {format_timeout(skew)} apart"
        yield Finding(what, "keep-days counts by them: set both by NTP" if skew > MAX_CLOCK_SKEW else "")

    def trees(self) -> Iterator[Finding]:
        source, selection = self.run.trees.source, self.policy.selection
        snapshots = [it for dataset in source.values() for it in selection.of_snapshots(dataset.snapshots)]
        what = f"{self.policy.source_root}: {len(source)} datasets, {len(snapshots)} snapshots"
        if not snapshots:
            yield Finding(what, "make snapshots at the source: there is nothing to pull")
        else:
            yield Finding(f"{what}, the newest of {clock(max(snapshot.creation for snapshot in snapshots))}")

    def rights(self) -> Iterator[Finding]:
        """Whether accounts that are not root have the rights that the crontab line needs."""
        ours = [right_to_set(value.partition("=")[0]) for value in OVERRIDES]
        for host, place, verbs, properties in (
            (self.run.source_host, self.policy.source_root, SOURCE_RIGHTS, []),
            # On a tree that does not exist yet nothing is allowed: then the nearest ancestor counts.
            (self.run.target_host, self.run.trees.existing[-1], TARGET_RIGHTS, ours),
        ):
            if host.account is None:  # root, or by sudo
                continue
            user = host.account.user
            needed = {right for verb in verbs for right in RIGHTS[verb].split(",")} | set(properties)
            missing = ",".join(sorted(needed - rights_of(run(host, (*LIST_RIGHTS, place)), user)))
            what = f"{host.label}: {user} " + (f"lacks rights on {place}: {missing}" if missing else "has all rights")
            remedy = f"as root on {host.account.host}: {shlex.join(('zfs', 'allow', user, missing, place))}"
            yield Finding(what, remedy if missing else "")

    def plans(self) -> Iterator[Finding]:
        """How many datasets a run would pull, and each that it could not."""
        # Without the overrides, a dataset that needs one is a finding.
        plan = TreePlan(self.run.trees, replace(self.policy, rollback=False, quarantine=False))
        found: dict[str, str] = {}
        for key, step in plan.entries:
            if isinstance(step, Failure):
                yield Finding(step.what, step.hint)
                found[key] = "blocked"
            elif step is None or isinstance(step, Receive):
                found[key] = "to be pulled" if step else "in step"
        counts = {word: [*found.values()].count(word) for word in dict.fromkeys(found.values())}
        yield Finding(f"{self.policy.target_root}: " + ", ".join(f"{n} {word}" for word, n in counts.items()))

    def dates(self) -> Iterator[Finding]:
        """Common snapshots with a date in the future: they expire late, and --check cannot tell how old they are."""
        for source, local in ((it, self.run.trees.target.get(key)) for key, it in self.run.trees.source.items()):
            common = newest_common(source, local)
            if common and common.local.creation > time.time() + MAX_CLOCK_SKEW:
                what = f"{common.local.name} is dated {clock(common.local.creation)}, in the future"
                yield Finding(what, "compare the clocks (date) on both hosts")

    def pool(self) -> Iterator[Finding]:
        """Health, room and features of the local pool."""
        name = with_ancestors(self.policy.target_root)[0]
        known = dict(fields(run(self.run.target_host, list_features(name)), 2))
        health = known.get("health", "health unknown")
        yield Finding(f"{name}: {health}", "" if health == "ONLINE" else f"zpool status {name}")
        percent = number(known.get("capacity", ""), f"capacity of {name}")
        yield Finding(
            f"{name}: {percent} % full", "make room, or expire earlier: -k" if percent >= FULL_PERCENT else ""
        )
        if not self.run.trees.target:  # only the first pull moves all of a tree
            used, _ = parse_space(run(self.run.source_host, (*LIST_SPACE, self.policy.source_root)))
            _, available = parse_space(run(self.run.target_host, (*LIST_SPACE, self.run.trees.existing[-1])))
            what = f"{name}: {available:,} bytes available, {used:,} used by {self.policy.source_root}"
            yield Finding(what, "make room: a first pull may not fit" if available < used else "")
        lacks = [f for f in FEATURE_BITS.values() if known.get(f"feature@{f}") not in ("enabled", "active")]
        if lacks:  # no remedy, because most sources never send such a stream
            yield Finding(f"{name}: without {', '.join(lacks)}; a stream that needs one of them will be refused")

    def mirror(self) -> Iterator[Finding]:
        """Whether somebody could write to the mirror, or see it, by accident; and placeholders that are left over."""
        if not self.run.trees.target:
            return
        # A run leaves it: the program destroys no dataset.
        for key, local in self.run.trees.target.items():
            if (
                key.endswith(MADE_WAY)
                and not local.snapshots
                and not any(it != key and is_below(it, key) for it in self.run.trees.target)
            ):
                remedy = shlex.join(("zfs", "destroy", local.name))
                yield Finding(f"{local.name}: a placeholder that has made way, and is empty", remedy)
        wrong = 0
        for row in fields(run(self.run.target_host, (*LIST_STATE, self.policy.target_root)), len(STATE_COLUMNS)):
            name, _, readonly, canmount, mounted, nfs, smb = row
            # A placeholder never mounts, and what the source does not have is not ours to judge.
            if canmount == "off" or name[len(self.policy.target_root) :] not in self.run.trees.source:
                continue
            # What each would repair, and whether it is wrong. A volume has "-" where there is no such property.
            it = shlex.quote(name)
            faults = {
                f"zfs set readonly=on {it}": readonly != "on",
                f"zfs unmount {it}": mounted == "yes",
                f"zfs set canmount=noauto {it}": canmount == "on",
                f"zfs set sharenfs=off {it}; zfs set sharesmb=off {it}": bool({nfs, smb} - {"off", "-"}),
            }
            remedies = [remedy for remedy, is_wrong in faults.items() if is_wrong]
            wrong += bool(remedies)
            if remedies:
                state = f"readonly={readonly}, canmount={canmount}, mounted={mounted}, sharenfs={nfs}, sharesmb={smb}"
                yield Finding(f"{name}: {state}", "; ".join(remedies))
        if not wrong:
            yield Finding(f"{self.policy.target_root}: read-only, not mounted, not shared")


# ---------------------------------------------------------------------------------------------------------------------
# Room 10: Report
# ---------------------------------------------------------------------------------------------------------------------


class Report:
    """What the user sees: nothing if all goes well, and a paragraph for each failure; more with -v, at a terminal, and
    as JSON. `steps` is the file that single steps are written to, if any; the rest goes to stderr."""

    def __init__(self, verbosity: int = 0, steps: IO[str] | None = None, meter: ProgressLine | None = None) -> None:
        self.verbosity = verbosity
        self.steps = steps or (sys.stderr if verbosity else None)
        self.meter = meter
        self.failures: list[str] = []
        self.failed: set[str] = set()  # their texts, to find each one fast: there may be thousands
        self.overlapped = False  # another run was at work, so this one did nothing
        # What was done, or would be. Collected in any case: totals and metrics are sums over these as well.
        self.events: list[dict[str, Any]] = []

    @property
    def status(self) -> int:
        """The exit code of what got as far as it could: 1 if anything failed, whether or not it could be printed."""
        return 1 if self.failures else 0

    def say(self, line: str, file: IO[str] | None = None) -> None:
        """Print a line. If `line` contains newlines, what follows them is indented."""
        if self.meter:
            self.meter.clear()
        # If nobody reads any more, the run goes on all the same.
        with contextlib.suppress(OSError):
            # What the source said may be in it: no character of that gets to act on a terminal or begin a paragraph.
            # flush: where both streams go to one file, lines keep their order.
            print(printable(line).replace("\n", "\n    "), file=file or sys.stderr, flush=True)

    def step(self, line: str) -> None:
        if self.steps:
            self.say(line, self.steps)

    def event(self, kind: str, dataset: str, line: str, **facts: Any) -> None:
        """Record a step as an event for --json, and tell it as `line`."""
        self.events.append({"event": kind, "dataset": dataset, **facts})
        self.step(line)

    def holds(self, verb: str, tag: str, names: Iterable[str]) -> None:
        """A hold on each of these snapshots was placed or released, or will be."""
        for name in names:
            dataset, _, suffix = name.partition("@")
            self.event(verb, dataset, f"{name}: {verb} {tag}", snapshot=f"@{suffix}", tag=tag)

    def creation(self, name: str) -> None:
        """A placeholder will be created."""
        self.event("create", name, f"{name}: create, as a parent that never mounts")

    def in_step(self, dataset: str, what: str) -> None:
        """There is nothing to do for a dataset; `what` says why."""
        self.event(what, dataset, f"{dataset}: {what}")

    def stream(self, dataset: str, step: Receive) -> None:
        """A stream is about to be received."""
        if step.lost_origin:
            self.step(f"{dataset}: in full, for its origin {step.lost_origin} is not in this mirror")
        self.step(f"{dataset}: {step}")

    def exposure(self, dataset: str, it: Exposure) -> None:
        """A local dataset will be made inert."""
        if it.is_mounted:
            self.event("unmount", dataset, f"{dataset}: unmount what another tool has mounted")
        if it.missing:
            self.event("set", dataset, f"{dataset}: {it}", values=it.missing)

    def expired(self, snapshot: Snapshot, how: str) -> None:
        """A local snapshot was destroyed, or will be; `how` is the word for that."""
        dataset = snapshot.name.partition("@")[0]
        self.event("expire", dataset, f"{snapshot.name}: {how}", snapshot=snapshot.short)

    def pulled(self, dataset: str, step: Receive, stream: ReceivedStream) -> None:
        """A stream was received completely."""
        figures = {"bytes": stream.bytes, "seconds": stream.seconds}
        self.events.append({"event": "pull", "dataset": dataset, **step.facts, **figures})
        if self.meter:
            self.say(f"{dataset}: {step}: {format_rate(stream.bytes, stream.seconds)}")

    def notice(self, kind: str, dataset: str, line: str) -> None:
        """Tell what the user must not miss, although nothing failed."""
        # With our name before it, as a failure: in the mail of cron others may speak as well.
        self.events.append({"event": kind, "dataset": dataset})
        self.say(f"zfs_replicate: {line}")

    def command(self, line: str) -> None:
        if self.verbosity >= 2:  # it is no event: these are what was done, and not by which command
            self.say(f"    {line}")

    def finding(self, finding: Finding) -> None:
        """Print a result of --doctor on stdout, and the remedy below it."""
        told = [f"{'!!' if finding.remedy else 'ok'}  {finding.what}", *filter(None, [finding.remedy])]
        self.say("\n".join(map(excerpt, told)), sys.stdout)

    def failure(self, subject: str, failure: Failure) -> None:
        """Record a failure, and print it. If the same was recorded before, word for word, it is ignored."""
        # A run lists and plans several times, and meets what it could not read each time.
        what, hint = excerpt(failure.what), excerpt(failure.hint)
        text = f"zfs_replicate: {subject}: {what}\n{hint}".strip()
        if text not in self.failed:
            self.failed.add(text)
            self.failures.append(printable(text).replace("\n", "\n    "))
            self.events.append({"event": "failure", "dataset": subject, "what": what, "hint": hint})
            self.say(text)


STATUS_HEAD = ("DATASET", "NEWEST COMMON", "AGE", "BEHIND", "LACKING", "HELD", "PARTIAL", "PINNED")


def status_table(found: Sequence[MirrorStatus], now: float) -> list[str]:
    """The lines of --status."""
    rows = [STATUS_HEAD, *(status_row(it, now) for it in found)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    # Names and words to the left, figures to the right.
    pads = "<<>>><>>"
    return ["  ".join(f"{cell:{pad}{width}}" for cell, pad, width in zip(row, pads, widths)).rstrip() for row in rows]


def status_row(it: MirrorStatus, now: float) -> tuple[str, ...]:
    """The cells of one row of the table. `?`: unknown without the source."""
    common = it.common.short if it.common else "none"
    held = {(True, True): "both", (True, False): "here only", (False, True): "there only", (False, False): "no"}
    # Held on one side only: a run was cut off, or somebody has released the other hold; the next run repairs either.
    # Or the source has only a bookmark left, which cannot be held.
    sides = "here" if it.held_here else "no"
    return (
        it.name,
        common if it.source != "" else f"{common} (gone at the source)",
        "-" if not it.common else "future" if is_ahead(it, now) else format_age(now - it.common.creation),
        "?" if it.behind is None else str(it.behind),
        "?" if it.lacking is None else format_bytes(it.lacking),
        sides if it.held_there is None else held[it.held_here, it.held_there],
        "-" if it.partial is None else format_bytes(it.partial),
        "?" if it.pinned is None else format_bytes(it.pinned),
    )


def status_data(it: MirrorStatus) -> dict[str, Any]:
    """A row of --status as data."""
    # Guids are text, as in `facts`: many programs read no number of 64 bits.
    return {
        "dataset": it.name,
        "source": it.source,
        "common": it.common and it.common.short,
        "common_guid": it.common and str(it.common.guid),
        "common_creation": it.common and it.common.creation,
        "held_here": it.held_here,
        "held_there": it.held_there,
        "behind": it.behind,
        "lacking_bytes": it.lacking,
        "partial_bytes": it.partial,
        "pinned_bytes": it.pinned,
    }


def format_age(seconds: float) -> str:
    """An age in one unit: `45m`, `30h`, `12d`."""
    seconds = tellable(seconds)
    # Up to two hours in minutes, up to three days in hours: a 1 would be too coarse.
    for unit, size, most in (("m", 60, 120), ("h", 3600, 72)):
        if seconds < size * most:
            return f"{max(seconds, 0) // size:.0f}{unit}"
    return f"{seconds // DAY:.0f}d"


def is_ahead(it: MirrorStatus, now: float) -> bool:
    """Whether the newest common snapshot has a date in the future."""
    return it.common is not None and it.common.creation > now + MAX_CLOCK_SKEW


def nagios_result(
    found: Sequence[MirrorStatus], failing: int | None, ran: float | None, max_age: float, now: float
) -> tuple[int, str]:
    """Exit code and line of --check, in the form of a monitoring plugin
    (https://www.monitoring-plugins.org/doc/guidelines.html).

    `failing` is since when runs fail, `ran` when the last one moved something; None if that is not known. A dataset
    whose newest common snapshot is older than `max_age` seconds is late.
    """
    # The exit codes of a plugin: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.
    fails = f"runs fail since {clock(failing)}" if failing else ""
    if not found:
        none = "no dataset of this mirror has completed a run yet"
        return 3, f"ZFS_REPLICATE UNKNOWN - {'; '.join(filter(None, (none, fails)))}"
    # A snapshot is as old as its source says, but at least as old as it has been here. So if nothing comes any more,
    # the mirror gets late, whatever date its last snapshot has.
    ages = {it.name: now - min(it.common.creation, it.received or now, now) for it in found if it.common}
    late = [name for name, age in ages.items() if age > max_age]
    worst = max(ages, key=lambda name: ages[name])
    oldest = f"{worst} is of {format_age(ages[worst])} ago"
    # Behind the bar, figures to draw: label=value;warning;critical;minimum.
    figures = f"age={ages[worst]:.0f}s;;{max_age:.0f};0 datasets={len(ages)};;;0 late={len(late)};;;0"
    ahead = [it.common for it in found if it.common and is_ahead(it, now)]
    if ahead:  # with that date, or that clock of ours, no age means anything
        what = f"{few([it.name for it in ahead], 1)} dated {clock(ahead[0].creation)}, in the future"
        lates = f"{len(late)} of {len(ages)} late, {oldest}"
        clocks = "; ".join(filter(None, ("compare the clocks (date) on both hosts", lates, fails)))
        return 2, f"ZFS_REPLICATE CRITICAL - {what}: {clocks} | {figures}"
    if late:
        # For one of three reasons: nothing runs, runs fail, or neither and the source has nothing newer.
        idle = ran is None or now - ran > max_age
        none = f"no run since {clock(ran)}" if ran else "no run of root or this account since this machine came up"
        why = fails or (
            none if idle else "no run is known to fail: is one at work, or does the source make no snapshots?"
        )
        return 2, f"ZFS_REPLICATE CRITICAL - {len(late)} of {len(ages)} late, {oldest}; {why} | {figures}"
    if failing:  # early enough to repair it before anything is late
        return 1, f"ZFS_REPLICATE WARNING - {fails}; none late yet, {oldest} | {figures}"
    return 0, f"ZFS_REPLICATE OK - none of {len(ages)} late, {oldest} | {figures}"


@dataclass(frozen=True)
class Totals:
    """What a run has done: streams received, with their bytes and seconds; snapshots expired; failures."""

    streams: int
    bytes: int
    seconds: float
    expired: int
    failures: int

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> Totals:
        """The sums over the events of a run, or over those of one dataset."""
        kinds = [it["event"] for it in events]
        pulls = [it for it in events if it["event"] == "pull"]
        size, seconds = (sum(it[key] for it in pulls) for key in ("bytes", "seconds"))
        return cls(len(pulls), size, seconds, kinds.count("expire"), kinds.count("failure"))


def metrics(tree: str, report: Report, found: Sequence[MirrorStatus], ending: RunResult, succeeded: float) -> str:
    """A run in the text format of Prometheus. `succeeded` is when a run last succeeded; 0 if that is not known."""
    events: dict[str, list[dict[str, Any]]] = {it.name: [] for it in found}
    for event in report.events:
        events.setdefault(event["dataset"], []).append(event)
    done = [Totals.of(events[it.name]) for it in found]
    common = [it.common.creation if it.common else 0 for it in found]
    received = [it.received or 0 for it in found]
    # Values of the run, or of each dataset in turn.
    table: list[tuple[str, str, Sequence[float]]] = [
        ("last_run_timestamp_seconds", "When the last run ended.", [ending.at]),
        ("last_success_timestamp_seconds", "When a run last ended in step.", [succeeded]),
        ("last_run_duration_seconds", "How long the last run took.", [ending.seconds]),
        ("last_run_exit_code", "Exit code of the last run: 0 is success.", [ending.status]),
        ("last_run_failures", "What failed in the last run.", [len(report.failures)]),
        ("dataset_common_timestamp_seconds", "When the newest common snapshot was made, as its source says.", common),
        ("dataset_received_timestamp_seconds", "When the newest common snapshot came here.", received),
        ("dataset_last_run_received_bytes", "Bytes received by the last run.", [it.bytes for it in done]),
        (
            "dataset_last_run_receive_seconds",
            "Seconds that the streams of the last run took.",
            [it.seconds for it in done],
        ),
        ("dataset_last_run_expired_snapshots", "Snapshots that the last run expired.", [it.expired for it in done]),
        ("dataset_last_run_failures", "What failed of this dataset in the last run.", [it.failures for it in done]),
    ]
    lines = []
    for name, meaning, values in table:
        # All are gauges, also what a run did: the next run does not add to it, but replaces the file.
        lines += [f"# HELP zfs_replicate_{name} {meaning}", f"# TYPE zfs_replicate_{name} gauge"]
        datasets = [f',dataset="{label(it.name)}"' for it in found] if name.startswith("dataset_") else [""]
        for dataset, value in zip(datasets, values):
            lines.append(f'zfs_replicate_{name}{{tree="{label(tree)}"{dataset}}} {value:.15g}')
    return "\n".join(lines) + "\n"


def label(text: str) -> str:
    """The value of a label, escaped (https://prometheus.io/docs/instrumenting/exposition_formats/)."""
    return printable(text).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def last_success(text: str) -> float:
    """When a run last succeeded, by the metrics of an earlier one; 0 if they do not say."""
    # So few digits, because the file may be anybody's: nothing is read that no run of ours has written.
    number = r"[0-9]{1,11}(?:\.[0-9]{1,9})?"
    found = re.search(rf"^zfs_replicate_last_success_timestamp_seconds\{{.*\}} ({number})$", text, re.MULTILINE)
    return float(found[1]) if found else 0


def format_rate(arrived: int, seconds: float) -> str:
    """Amount, time and rate: `1.20G in 0:25, 49.1M/s`."""
    # A small stream may take no time at all.
    return f"{format_bytes(arrived)} in {format_clock(seconds)}, {format_bytes(arrived / max(seconds, 0.001))}/s"


def format_clock(seconds: float) -> str:
    """A duration as on a clock: `0:05`, `12:34`, `1:02:03`."""
    whole = int(tellable(seconds))
    return (
        f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02}"
    )


@dataclass(frozen=True)
class Progress:
    """How far a stream has come. It has `size` bytes, None if that is not known. Of these, `before` were here when it
    was resumed, and `arrived` have come in the `seconds` since then. `buffered` bytes wait in mbuffer."""

    name: str
    size: int | None
    before: int
    arrived: int
    buffered: int
    seconds: float


class ProgressLine:
    """The progress of a stream, on one line of a terminal that is overwritten again and again."""

    def __init__(self, out: IO[str], columns: Callable[[], int]) -> None:
        self.out = out
        self.columns = columns
        self.shown = False
        self.name = ""
        self.seen: list[tuple[float, int]] = []

    def show(self, it: Progress) -> None:
        if it.name != self.name:
            self.name, self.seen = it.name, [(0, 0)]
        # The rate is that of the last seconds: the average since the beginning says little about when it will end.
        self.seen = [*self.seen[-RATE_SAMPLES:], (it.seconds, it.arrived)]
        (then, were), (now, are) = self.seen[0], self.seen[-1]
        rate = (are - were) / max(now - then, 0.001)
        here = it.before + it.arrived
        figures = f"{format_bytes(here):>5} {format_bytes(rate):>5}/s"
        if it.size is not None:
            percent = min(100 * here // max(it.size, 1), 100)
            left = format_clock(max(it.size - here, 0) / rate) if rate else "-:--"
            so_far = f"{format_bytes(here):>5} of {format_bytes(it.size):>5} {percent:3}%"
            figures = f"{so_far} {format_bytes(rate):>5}/s {left:>5} left"
        figures += f" buf {format_bytes(it.buffered):>5}"
        # One column less than there are: in the last one, some terminals begin a new line. The window may have got
        # another width by now. Of a long name the end is shown: the beginning is the same for the whole tree.
        space = max(self.columns() - len(figures) - 2, 10)
        shown = it.name if len(it.name) <= space else "..." + it.name[3 - space :]
        self.out.write(f"\r{shown:<{space}} {figures}\x1b[K")  # ESC [K: clear what is left of a longer line
        self.out.flush()
        self.shown = True

    def clear(self) -> None:
        if self.shown:
            self.out.write("\r\x1b[K")
            self.out.flush()
        self.shown = False


# The rate of a stream is measured over so many looks, one a second.
RATE_SAMPLES = 10


@dataclass(frozen=True)
class RunResult:
    """When a run began, how long it took, both in seconds, and its exit code."""

    began: float
    seconds: float
    status: int

    @property
    def at(self) -> float:
        """When it ended."""
        return self.began + self.seconds


def json_document(options: argparse.Namespace, report: Report, ending: RunResult) -> dict[str, Any]:
    """A run as data, for --json. The README describes the fields."""
    return {
        "version": __version__,
        "host": options.remote_host,
        "source": options.remote_fs,
        "local": options.local_fs,
        "tag": options.tag,
        "dry_run": options.dry_run,
        "began": int(ending.began),
        "seconds": round(ending.seconds, 3),
        "exit": ending.status,
        # No more digits than anybody wants to see.
        "events": [{**it, "seconds": round(it["seconds"], 3)} if "seconds" in it else it for it in report.events],
    }


def summary(options: argparse.Namespace, report: Report, ending: RunResult) -> str:
    """One line about a whole run, for a person."""
    done = Totals.of(report.events)
    in_step = sum(event["event"] == "in step" for event in report.events)
    # "before": the datasets that were pulled are in step as well by now.
    what = [f"{in_step} in step before", f"{done.streams} pulled ({format_bytes(done.bytes)})"]
    what += [f"{done.expired} expired"] + ([f"{done.failures} failed"] if done.failures else [])
    return f"zfs_replicate: {options.local_fs}: {', '.join(what)}, in {format_clock(ending.seconds)}"


def log_line(options: argparse.Namespace, report: Report, ending: RunResult) -> str:
    """One line about a whole run, for the system's log. Programs may rely on its form."""
    done = Totals.of(report.events)
    return (
        f"{options.remote_host}:{options.remote_fs} -> {options.local_fs}: exit={ending.status} streams={done.streams} "
        f"bytes={done.bytes} expired={done.expired} failures={done.failures} seconds={ending.seconds:.0f}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Room 11: Command line
# ---------------------------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """A signal asked us to end."""

    # Not an Exception: nothing that handles errors on the way may take it for one.
    def __init__(self, number: int) -> None:
        self.number = number


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a usage error in one line."""

    # cron mails it at each run: the whole usage above it would bury it.
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def pattern_type(pattern: str, what: str, convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """A converter for argparse. It accepts what matches `pattern`; of anything else it says that it is not `what`."""

    def converter(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"not {what}: {text!r}")
        return convert(text)

    return converter


def dataset_name(text: str) -> str:
    if len(text) > NAME_LIMIT:
        raise argparse.ArgumentTypeError(f"longer than the {NAME_LIMIT} bytes ZFS allows: {text!r}")
    what = "a dataset name (letters, digits, '-_.: ' between slashes)"
    # A pool begins with a letter. So no name is ever taken for an option, by us or by zfs.
    return str(pattern_type(f"(?=[A-Za-z]){DATASET_NAME.pattern}", what)(text))


def seconds_of(text: str) -> float:
    return float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]


def mbuffer_size(text: str) -> str:
    """A size as mbuffer takes it: with a small k, and a capital M or G."""
    return text[:-1] + {"k": "k", "m": "M", "g": "G"}[text[-1].lower()]


# A hold tag may be as long as a name. That of our local holds is longer than TAG by this suffix, so a tag must not end
# in it either: it would be the other side's.
LONGEST_TAG = NAME_LIMIT - len(RECEIVED)

# Neither part may begin with `-`: ssh or a proxy command could take it for an option.
# A user may be called USER@DOMAIN: ssh splits at the last @.
host_name = pattern_type(r"([^\s@-][^\s@]*(@[^\s@]+)*@)?[^\s@-][^\s@]*", "a [USER@]HOST")
# Stricter than zfs: `zfs holds` prints tags as they are, so one with a TAB or a newline could not be read back. zfs
# keeps those that begin with `.` for itself.
hold_tag = pattern_type(
    rf"(?=.{{1,{LONGEST_TAG}}}$)(?![.-])[A-Za-z0-9_.:/+=@,-]+(?<!{RECEIVED})",
    f"a hold tag (letters, digits, '-_.:/+=@,', at most {LONGEST_TAG}, not starting with '.' or '-', not ending with "
    "':received')",
)
# Numbers have so few digits that no sum or product of them can be too large for anything.
count = pattern_type("[0-9]{1,4}", "a number", int)
job_count = pattern_type("[1-9][0-9]?", "a number from 1 to 99", int)
day_count = pattern_type(
    "(?=[0-9]{1,6}$)0*[1-9][0-9]*", "a number of days, 1 or more (leave -k out to expire nothing)", int
)
hour_count = pattern_type(r"(?=.*[1-9])[0-9]{1,5}(\.[0-9]{1,3})?", "a number of hours", float)
memory_size = pattern_type("[1-9][0-9]*[kKmMgG]", "a size like 256M or 1G", mbuffer_size)
time_span = pattern_type("[1-9][0-9]{0,5}[smh]", "a duration like 90s, 30m or 2h", seconds_of)
# These become words of ssh. No newline in a setting: it would be a second one.
cipher_names = pattern_type("[A-Za-z0-9@.,+^-]+", "a list of ciphers (see ssh -Q cipher)")
ssh_setting = pattern_type("[A-Za-z0-9]+[= ][^\n]+", "a KEY=VALUE of ssh_config")
name_glob = pattern_type(r"[A-Za-z0-9_.:/ *?!\[\]-]+", "a glob of names (their characters, '*', '?', '[...]')")
# A native property, or a user property, which has a colon in its name (zfsprops(7)).
PROPERTY = "([a-z][a-z0-9_]*|[a-z0-9:._-]*:[a-z0-9:._-]*)"
property_name = pattern_type(PROPERTY, "the name of a property")
property_value = pattern_type(f"(?s:{PROPERTY}=.+)", "a PROPERTY=VALUE")


def port_number(text: str) -> int:
    number = int(pattern_type("[0-9]{1,5}", "a port")(text))
    if not 0 < number < 65536:
        raise argparse.ArgumentTypeError(f"not a port: {text!r}")
    return number


def readable_file(text: str) -> str:
    if not os.path.isfile(text) or not os.access(text, os.R_OK):
        raise argparse.ArgumentTypeError(f"not a file we can read: {text!r}")
    return text


def parser() -> argparse.ArgumentParser:  # noqa: PLR0915 -- a statement for each option
    """The options, in the groups and order of the README."""
    # Names and defaults are a contract with crontabs out there: they stay as they are, and new ones are long only. -h
    # is the host, so help is --help alone. No abbreviations: a new option could make one of them ambiguous.
    it = Parser(
        prog="zfs_replicate",
        description="Keep a mirror of a ZFS dataset tree: pull what is newer over SSH, hold the common snapshot, "
        "expire old local ones.",
        epilog="Exit codes: 0 in step; 1 a dataset failed, the others were done; 2 usage; 3 could not start; "
        "128+n ended by signal n.",
        add_help=False,
        allow_abbrev=False,
    )
    # Two or three lines for each option, and not one for each of its arguments:
    # fmt: off
    add = it.add_argument_group("The crontab line").add_argument
    add("-h", "--remote-host", required=True, type=host_name, metavar="[USER@]HOST",
        help="source host, an ssh_config alias too; localhost runs without SSH")
    add("-r", "--remote-fs", required=True, type=dataset_name, metavar="DATASET", help="tree to mirror")
    add("-l", "--local-fs", required=True, type=dataset_name, metavar="DATASET", help="where to mirror it")
    add("-t", "--tag", required=True, type=hold_tag, metavar="TAG", help="hold tag; one for each mirror of a source")
    add("-k", "--keep-days", type=day_count, metavar="DAYS",
        help="expire local snapshots older than this; without it none is destroyed")
    add = it.add_argument_group("What is mirrored and kept").add_argument
    add("-I", "--intermediates", action="store_true", help="pull every snapshot between, not only the newest")
    add("--keep-min", type=count, default=0, metavar="N",
        help="never expire the N newest snapshots of a dataset (default: %(default)s)")
    add("--no-recursive", action="store_true", help="only the dataset itself, without its children")
    add("--exclude", type=name_glob, action="append", default=[], metavar="GLOB",
        help="leave out datasets, with their children, whose names below the tree's root match; may be repeated, as "
        "those that follow")
    add("--snapshots", type=name_glob, action="append", metavar="GLOB",
        help="only these snapshots are pulled, and only these expire (default: all)")
    add("--exclude-snapshots", type=name_glob, action="append", default=[], metavar="GLOB",
        help="but not these snapshots")
    add("--set", type=property_value, action="append", default=[], metavar="PROPERTY=VALUE",
        help="what datasets have of their own here, set when they are first received")
    add("--ignore", type=property_name, action="append", default=[], metavar="PROPERTY",
        help="neither take this property over from the source nor set it")
    add("--decrypt", action="store_true",
        help="send encrypted datasets as plain ones; their keys must be loaded at the source, and a mirror stays as it "
        "began")
    add("--bookmark", action="store_true",
        help="keep a bookmark of the newest common snapshot at the source: should that one have to go, the chain "
        "lives on")
    add = it.add_argument_group("Connection and streams").add_argument
    add("-p", "--port", type=port_number, metavar="PORT", help="SSH port (default: as in ssh_config, else 22)")
    add("-i", "--identity", type=readable_file, metavar="FILE",
        help="log in with this private key, and with none of the agent's")
    add("--ssh-option", type=ssh_setting, action="append", default=[], metavar="KEY=VALUE",
        help="a setting of ssh_config, for both connections; may be repeated")
    add("--cipher", type=cipher_names, metavar="NAMES", help="ciphers for streams, as ssh -c takes them")
    add("--sudo", choices=("remote", "local", "both"), metavar="SIDE",
        help="run zfs by sudo: on the remote side, the local one, or both")
    add("-j", "--jobs", type=job_count, default=1, metavar="N",
        help="still accepted, and without effect: streams go one after another through one connection")
    add("-b", "--mbuffer", type=memory_size, default="256M", metavar="SIZE",
        help="memory of mbuffer (default: %(default)s)")
    add("--compress", choices=("auto", "none", *COMPRESSORS), default="auto", metavar="PROGRAM",
        help="compress streams on the wire by zstd, lz4 or pigz, where both ends have it; none; or auto: by zstd those "
        "of datasets that are not compressed already (default: %(default)s)")
    add("-n", "--no-pigz", action="store_const", dest="compress", const="none",
        help="the same as --compress none, for old crontabs")
    add("--rate-limit", type=memory_size, metavar="SIZE",
        help="let streams take no more than SIZE of the line a second; by mbuffer")
    add("--stall-timeout", type=time_span, default=format_timeout(STALL_SECONDS), metavar="DURATION",
        help="give up a stream of which nothing comes for so long, or next to nothing, and a command that has not "
        "ended by then: 90s, 30m, 2h (default: %(default)s)")
    add("--retries", type=count, default=0, metavar="N",
        help="when the link is lost, list and plan anew up to N times, with growing pauses (default: %(default)s, "
        "the next run goes on)")
    ways = it.add_argument_group("When a dataset is blocked").add_mutually_exclusive_group()
    ways.add_argument("--rollback", action="store_true",
        help="destroy local snapshots and changes that are newer than the newest common snapshot")
    ways.add_argument("--quarantine", action="store_true",
        help="rename aside a local dataset that cannot be brought up to date, children and all, and pull it afresh")
    group = it.add_argument_group("Instead of a run")
    instead = group.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true",
        help="no run: tell what one would send, hold, release and expire, and change nothing")
    instead.add_argument("--status", action="store_true",
        help="no run: tell for each dataset how far the mirror has come, and what it lacks")
    instead.add_argument("--check", action="store_true",
        help="no run: one line and an exit code for a monitoring system, by what is here alone")
    instead.add_argument("--doctor", action="store_true",
        help="no run: look at all that one needs, change nothing; exit 1 if anything is not as it should be")
    instead.add_argument("--retire", action="store_true",
        help="no run, and none to follow: release all our holds on both sides, destroy our bookmarks, and nothing else")
    group.add_argument("--max-age", type=hour_count, default=30, metavar="HOURS",
        help="with --check: from what age on a newest common snapshot is too old (default: %(default)s)")
    add = it.add_argument_group("Output").add_argument
    add("-v", "--verbose", action="count", default=0, help="tell each step; twice: each command")
    add("--progress", action="store_true",
        help="show the progress of each stream and a summary, also where stderr is no terminal")
    add("-q", "--quiet", action="store_true", help="show neither, also at a terminal")
    add("--json", action="store_true",
        help="print one JSON document at the end: what was done, or with --dry-run and --status what they tell")
    add("--syslog", action="store_true", help="tell the system's log how the run ended")
    add("--metrics", metavar="FILE", help="write figures of the run to FILE, for the textfile collector of Prometheus")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    add("--help", action="help", help="show this help")
    # fmt: on
    return it


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of a command line. Exits with 2 if they make no sense, alone or together."""
    it = parser()
    options = it.parse_args(argv)
    if options.remote_host == "localhost" and overlap(options.remote_fs, options.local_fs):
        it.error(f"{options.local_fs} and {options.remote_fs} overlap: a tree cannot be mirrored into itself")
    # --check has a form of its own, and what --doctor says is for a person.
    if options.json and (options.doctor or options.check):
        it.error("--json goes with a run, --dry-run, --status and --retire")
    return options


def policy_of(options: argparse.Namespace) -> Policy:
    """What the options ask for."""
    # By keyword, because --bookmark must not turn into --rollback when somebody reorders the fields.
    return Policy(
        source_root=options.remote_fs,
        target_root=options.local_fs,
        tag=options.tag,
        keep_days=options.keep_days,
        keep_min=options.keep_min,
        intermediates=options.intermediates,
        bookmark=options.bookmark,
        rollback=options.rollback,
        quarantine=options.quarantine,
        decrypt=options.decrypt,
        selection=Selection(
            recursive=not options.no_recursive,
            exclude=tuple(options.exclude),
            snapshots=tuple(options.snapshots or ("*",)),
            exclude_snapshots=tuple(options.exclude_snapshots),
        ),
        properties=Properties(values=tuple(options.set), ignored=tuple(options.ignore)),
    )


def job_of(options: argparse.Namespace) -> str:
    """The words of a command line that make it one job, for its lock file."""
    words = ("-h", options.remote_host, "-r", options.remote_fs, "-l", options.local_fs, "-t", options.tag)
    # Printable ASCII of one line: that is all that the lock's reader believes (`LockFile.holder`).
    return printable(shlex.join(words)).encode("ascii", errors="backslashreplace").decode()[:MAX_EXCERPT]


def retry_delays(retries: int, draw: Callable[[float, float], float] = random.uniform) -> Iterator[float]:
    """Seconds to wait before each retry: from 5 s, times 3 each, up to 5 minutes."""
    # With jitter: if a server restarts, its many clients must not all come back at one moment.
    for number in range(retries):
        yield min(5.0 * 3**number, 300) * draw(0.5, 1.5)


def replicate(options: argparse.Namespace, report: Report, alone: Lock) -> int:
    """Run. If that fails, note at the local root since when runs fail, or tell since when they do."""
    now = int(time.time())
    try:
        status = run_with_retries(options, report, alone)
    except Failure as failure:
        report.failure(options.local_fs, failure)
        status = 3
    if status:  # --check reads this mark; a success removes it (see `run_with_retries`)
        since = mark_failing(FencedHost(here(options), options.local_fs), options.local_fs, now)
        if since < now:
            report.notice("failing", options.local_fs, f"{options.local_fs}: runs fail since {clock(since)}")
    return status


def run_with_retries(options: argparse.Namespace, report: Report, alone: Lock) -> int:
    """Run, and run again if the link was lost. Raises Failure if no run could even start."""
    # A retry is a new run: it logs in, lists and plans anew. So it repeats no step that the lost run has taken.
    started = False
    held: set[str] | None = None
    lost: tuple[str, Failure] | None = None
    for pause in (0.0, *retry_delays(options.retries)):
        if lost:
            report.step(f"{lost[0]}: {excerpt(lost[1].what)}; trying again in {pause:.0f} s")
            alone.moved()  # a run that waits is no stuck run
            time.sleep(pause)
        try:
            with open_run(options, report, alone) as it:
                # What an earlier attempt took over was not held before this run, so nothing of it may expire yet.
                it.lister.held_before = held
                now = int(time.time())
                try:
                    it.begin(now)
                    started = True  # from here on a failure is one of the run: exit code 1, no longer 3
                    it.execute(now)
                finally:
                    held = it.lister.held_before
                lost = it.lost
                if it.trees.failing and not lost and not report.failures:
                    it.target_host.ask(clear_failing(options.local_fs))
        except LinkLost as failure:
            lost = (options.local_fs, failure)
        except Failure as failure:
            if not started:
                raise
            lost = (options.local_fs, failure)  # a host that has just come back may refuse us for a while
        if lost is None:
            break
    if lost and not started:
        raise lost[1]
    if lost:
        report.failure(*lost)
    return report.status


def run_doctor(options: argparse.Namespace, report: Report) -> int:
    """What --doctor does."""
    # Without the lock, as --dry-run and --status: looking does no harm while a run is at work.
    findings = []
    try:
        with open_run(options, report, None) as it:
            for finding in Doctor(it).examine():
                report.finding(finding)
                findings.append(finding)
    except Failure as failure:
        findings.append(Finding(failure.what, failure.hint or "no known remedy; see the message"))
        report.finding(findings[-1])
    return 1 if any(finding.remedy for finding in findings) else 0


def run_dry_run(options: argparse.Namespace, report: Report) -> int:
    """What --dry-run does."""
    with open_run(options, report, None) as it:
        now = int(time.time())
        it.begin(now)
        print_plan(it, now)
    return report.status


def show_status(options: argparse.Namespace, report: Report) -> int:
    """What --status does. If the source cannot be asked, it shows what is known here."""
    try:
        with open_run(options, report, None) as it:
            it.begin(int(time.time()), in_full=True)
            found = list(all_statuses(it))
    except Failure as failure:
        # Most of all when the source is down, one wants to know how old the mirror is.
        report.failure(options.local_fs, failure)
        report.say("zfs_replicate: showing local information only")
        found = list(local_statuses(ReadOnly(here(options)), policy_of(options)))
    if options.json:
        report.events = [status_data(it) for it in found]
    else:
        print(printable("\n".join(status_table(found, time.time()))))
    return 3 if report.failures else 0


def check(options: argparse.Namespace) -> int:
    """What --check does."""
    # It asks this host alone: a monitoring system must get its answer at once, and also if the source is down.
    host = ReadOnly(here(options))
    try:
        found = list(local_statuses(host, policy_of(options)))
        mark = run(host, (*GET_FAILING, options.local_fs))
    except Failure as failure:
        # One line, and no bar: what follows a bar is read as figures.
        print(f"ZFS_REPLICATE UNKNOWN - {excerpt(failure.what)}".replace("\n", " ").replace("|", "/"))
        return 3
    now = time.time()
    failing = parse_failing(mark, options.local_fs, now)
    status, line = nagios_result(found, failing, last_activity(options.local_fs, now), options.max_age * 3600, now)
    print(printable(line))
    return status


def choose_compressor(options: argparse.Namespace, source: Host, compressible: bool, report: Report) -> str:
    """Which of the COMPRESSORS a stream goes through; "" for none."""
    if options.remote_host == "localhost" or options.compress == "none":  # there is no wire, or it is not wanted
        return ""
    if options.compress == "auto" and not compressible:  # sent raw, or compressed as it is stored
        return ""
    compressor = "zstd" if options.compress == "auto" else str(options.compress)
    places = {source.label: source.has(compressor), HERE: installed(compressor)}
    without = [place for place, is_here in places.items() if not is_here]
    if without:
        report.step(f"{compressor} is not installed on {' and '.join(without)}: the stream goes without it")
    return "" if without else compressor


def here(options: argparse.Namespace, note: Callable[[str], None] = ignore_line) -> Host:
    """This host, with or without sudo."""
    host = LocalHost(HERE, note, options.stall_timeout, options.local_fs)
    return SudoHost(host) if options.sudo in ("local", "both") else host


@contextlib.contextmanager
def open_run(options: argparse.Namespace, report: Report, alone: Lock | None) -> Iterator[Run]:
    """Yield a run that is ready to begin. Raises Failure if there cannot be one. Without the lock it can only look."""
    moved = alone.moved if alone else lambda: None
    inherit = alone.filenos if alone else ()

    def note(line: str) -> None:
        moved()  # a run that runs commands is no stuck run
        report.command(line)

    target = here(options, note)
    source: Host = LocalHost("localhost", note, options.stall_timeout, options.remote_fs)
    if options.remote_host != "localhost":
        more = settings(options.ssh_option) + (("-c", options.cipher) if options.cipher else ())
        connection = Connection.resolve(options.remote_host, options.port, options.identity, more)
        source = SshHost(connection, note, options.stall_timeout, options.remote_fs)
    if options.sudo in ("remote", "both"):
        source = SudoHost(source)
    if alone is None:  # whatever looks may run beside a run, and so must not change anything
        source, target = ReadOnly(source), ReadOnly(target)

    def carry(batch: StreamBatch) -> BatchResult:
        buffer = buffer_stage(options.mbuffer, options.rate_limit)
        if not buffer and options.rate_limit:  # that was asked for, maybe because others need the line
            raise StreamFailed("mbuffer is not installed here, and it is what limits the rate", "apt install mbuffer")
        if not buffer:
            report.step("mbuffer is not installed here: the stream goes without it")
        for sending, receiving in batch.streams:  # for -vv: what runs is longer, with ssh and its options
            note(f"{source.label}: {shlex.join(sending)} | {target.label}: {shlex.join(receiving)}")
        compressor = choose_compressor(options, source, batch.compressible, report)
        show = progress_feed(report.meter, source, batch) if report.meter else None
        return pull(source, target, batch, Transport(buffer, options.stall_timeout, moved, inherit, compressor), show)

    with contextlib.closing(source):
        # Listing both sides at once hides the time of one. On one host they would only compete for its disks.
        both = both_in_turn if options.remote_host == "localhost" else both_at_once
        yield Run(policy_of(options), source, target, carry, report, both=both)


def progress_feed(meter: ProgressLine, source: Host, batch: StreamBatch) -> Callable[[Pipeline], None]:
    """A function that shows how far the streams of a batch have come. Asks the source for their sizes."""
    found = parse_estimates(source.ask(*(estimate(sending) for sending, _ in batch.streams)).stdout)
    # The source may tell fewer sizes than there are streams: the others are unknown.
    sizes = [*found, *[(None, 0)] * (len(batch.streams) - len(found))]

    def show(pipeline: Pipeline) -> None:
        if pipeline.receiver:
            at = len(pipeline.arrived)
            size, before = sizes[at]
            meter.show(
                Progress(
                    batch.streams[at][1][-1].partition("@")[0],
                    None if size is None else before + size,
                    before,
                    pipeline.bytes_received(pipeline.receiver),
                    pipeline.buffered(),
                    time.monotonic() - pipeline.stall.started,
                )
            )

    return show


@contextlib.contextmanager
def signals_stop_us() -> Iterator[None]:
    """Raise Stopped on a signal that asks a program to end, so that everything we started is ended on the way out."""

    def stop(number: int, _frame: Any) -> NoReturn:
        # One is enough. Another one must not interrupt what is being ended.
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    # What is ignored stays ignored: nohup ignores SIGHUP.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_run(options: argparse.Namespace) -> bool:
    """Whether the options ask for a run, and not for one of the modes instead of it."""
    return not (options.dry_run or options.status or options.check or options.doctor or options.retire)


def columns() -> int:
    """The current width of the terminal."""
    # stderr is where progress is shown. With --progress it may be a file, which has none.
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        return 80


def report_for(options: argparse.Namespace) -> Report:
    """The report for who looks on: a terminal, cron, or a program that reads JSON."""
    told = options.dry_run or options.retire  # whose steps are their result, so they go to stdout
    is_seen = sys.stderr is not None and sys.stderr.isatty()
    shown = is_run(options) and (options.progress or (is_seen and not options.quiet))
    meter = ProgressLine(sys.stderr, columns) if shown else None
    return Report(options.verbose, sys.stdout if told and not options.json else None, meter)


def conclude(options: argparse.Namespace, report: Report, ending: RunResult) -> int:
    """Tell the user, --json, --syslog and --metrics how it ended. Returns the exit code."""
    if report.meter:
        report.say(summary(options, report, ending))
    if options.json:
        print(json.dumps(json_document(options, report, ending), indent=1))
    if options.syslog and is_run(options):
        write_log(options, report, ending)
    # Not of a run that did nothing because another one is at work: that one writes its own.
    if options.metrics and is_run(options) and not report.overlapped:
        try:
            write_metrics(options, report, ending)
        except OSError as error:
            report.failure(options.metrics, Failure(f"cannot write it: {error.strerror}", "may this user write there?"))
            return ending.status or 1
    return ending.status


def write_log(options: argparse.Namespace, report: Report, ending: RunResult) -> None:
    """Write each failure to the system's log, and how the run ended."""
    syslog.openlog("zfs_replicate", syslog.LOG_PID, syslog.LOG_DAEMON)
    for failure in report.failures:  # each in one line: a log has no paragraphs
        syslog.syslog(syslog.LOG_ERR, excerpt(" ".join(failure.removeprefix("zfs_replicate: ").split())))
    syslog.syslog(syslog.LOG_ERR if ending.status else syslog.LOG_INFO, printable(log_line(options, report, ending)))


def write_metrics(options: argparse.Namespace, report: Report, ending: RunResult) -> None:
    """Write the metrics of a run to the file of --metrics. Raises OSError."""
    found: list[MirrorStatus] = []
    with contextlib.suppress(Failure):  # the run itself has met and reported it
        found = list(local_statuses(ReadOnly(here(options)), policy_of(options)))
    succeeded = 0.0 if ending.status else ending.at
    if ending.status:  # there is no state outside ZFS: only the file itself knows when a run last succeeded
        succeeded = last_success(metrics_before(options.metrics))
    directory, name = os.path.split(options.metrics)
    # A new file takes the place of the old one, so that nobody ever reads half of it. The directory must be the same,
    # and the name must not end like the other's: the collector reads all *.prom.
    place, hidden = directory or ".", f".{name}."
    with tempfile.NamedTemporaryFile("w", dir=place, prefix=hidden, encoding="utf-8", delete=False) as file:
        try:
            file.write(metrics(options.local_fs, report, found, ending, succeeded))
            file.flush()  # before it gets its name, all of it is there
            os.fchmod(file.fileno(), 0o644)  # the collector is another user
            os.replace(file.name, options.metrics)
        except BaseException:
            os.unlink(file.name)
            raise


# Bytes that are read of the metrics of an earlier run.
MAX_METRICS = 2**20


def metrics_before(path: str) -> str:
    """The text of the metrics file; "" if there is none."""
    # The directory is another user's as a rule (node_exporter's), who may have put anything there: a link to a secret
    # file, or a FIFO, on which we would wait for ever.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        return os.read(descriptor, MAX_METRICS).decode(errors="replace") if is_file else ""
    finally:
        os.close(descriptor)


def dispatch(options: argparse.Namespace, report: Report) -> int:
    """Do what the options ask for. Returns the exit code. Raises Failure, or Stopped after a signal."""
    with signals_stop_us():
        # These change nothing, and need no lock.
        if options.doctor:
            return run_doctor(options, report)
        if options.check:
            return check(options)
        if options.status:
            return show_status(options, report)
        if options.dry_run:
            return run_dry_run(options, report)
        with lock(options.local_fs, job_of(options), options.stall_timeout) as alone:
            if alone is None and options.retire:
                raise Failure("a run is at work", "retire it when that has ended")
            if alone is None:  # it is still at work when cron starts this one: no failure, and no mail
                report.overlapped = True
                report.event("overlap", options.local_fs, f"{options.local_fs}: another run is at work")
                return 0
            if not options.retire:
                return replicate(options, report, alone)
            with open_run(options, report, alone) as it:
                retire(it.source_host, it.target_host, it.policy, report)
            return report.status


def main(argv: list[str] | None = None) -> int:
    """The program. Returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in cron's locale there is only ASCII: print what is not as escapes
            stream.reconfigure(errors="backslashreplace")
    options = parse(argv)
    report = report_for(options)
    began = time.time()
    try:
        status = dispatch(options, report)
    except Stopped as stopped:
        status = 128 + stopped.number
    except Failure as failure:
        report.failure(options.local_fs, failure)
        status = 3
    return conclude(options, report, RunResult(began, time.time() - began, status))


if __name__ == "__main__":
    sys.exit(main())
