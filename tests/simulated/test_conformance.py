"""The simulated machine against real ZFS: both play the same scenes and must give the same answers.

A scene is a list of lines `operation => answer`. The fast tests play all on simulated machines; the integration test
plays all in a VM of each release, with real pools. The answer is what both must say: nothing for a success without
output; the output in our own short words; or `!` and the phrases that tell a refusal (after its exit status, if that
is not 1). `there` is a dataset on the pool of the source, `here` one on the pool of the mirror.

    snapshot there@a
    pull there@a here
    tree here => here: a
    hold keep here@a here@b => ! dataset does not exist

Operations are those of the table OPERATIONS, what administrators do, and of COMMANDS, what the program runs, made by the
program's own functions; and the streams:

    pull [-F] [-i BASE] SNAPSHOT HERE              send | recv
    pull [-F] -t HERE@SNAPSHOT                     the rest of what waits in HERE
    half pull ...                                  cut off in the middle
    pull ... while OPERATION; OPERATION            done by others half-way

A tree is told dataset by dataset: `half` where a partial receive waits, then its points, oldest first. `b!2` has two
holds; `c=b` has the guid that first was seen on a `b`, whatever it is called by now.
"""

from __future__ import annotations

import re
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable

import pytest
from lab_image import RELEASES
from simulated import Machine, Refused, World
from site_pair import DISK

from zfs_replicate import (
    ABORT_RECEIVE,
    COUNT_FILES,
    CREATE_PARENT,
    DECODE_TOKEN,
    GET_FAILING,
    HOLD_DATE,
    LIST_COLUMNS,
    LIST_EXACTLY,
    LIST_EXISTING,
    LIST_HOLDS,
    LIST_USAGE,
    Answer,
    Command,
    Dataset,
    Receive,
    Snapshot,
    clear_failing,
    count_objects,
    destroy,
    estimate,
    fields,
    hold,
    list_fast,
    list_tree,
    parse_estimates,
    parse_hold_dates,
    parse_token,
    parse_tree,
    parse_usage,
    receive,
    release,
    send,
    set_failing,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    import lab as laboratory

SCENES = {
    "marking a root": """
        create there
        existing there => there
        existing there/no there => there ! dataset does not exist
        marked there
        mark there
        create there/x
        marked there => 1700000000 there
        marked there/x
        snapshot there@a
        pull there@a here
        marked here
        unmark there
        unmark there
        marked there
        marked there/no => ! dataset does not exist
        mark there/no => ! dataset does not exist
        unmark there/no => ! dataset does not exist
        snapshot there@b
        usage there => there@a of some bytes; there@b of some bytes
        usage there/no => ! dataset does not exist
    """,
    "an outline": """
        create there
        points there =>
        snapshot there@a
        snapshot there@b
        bookmark there@a there#m
        rename-snapshot there@a there@z
        create there/x
        volume there/v
        snapshot there/v@a
        hold keep there@b
        datasets there => there:; there/v volume:; there/x:
        points there => there@z=there@z; there#m=there@z; there@b=there@b; there/v@a=there/v@a
        own-points there => there@z=there@z; there#m=there@z; there@b=there@b
        own-points there there/v there/x => there@z=there@z; there#m=there@z; there@b=there@b; there/v@a=there/v@a
        own-points there/v there/no => there/v@a=there/v@a ! dataset does not exist
        points there/x =>
        points there/no => ! dataset does not exist
    """,
    "weighing streams": """
        create there
        write there
        snapshot there@a
        snapshot there@b
        snapshot there@c
        bookmark there@a there#a
        weigh there@a => full of some bytes
        weigh -i there@a there@c => incremental of some bytes
        weigh -i there#a there@c => incremental of some bytes
        weigh there@d => ! dataset does not exist
        half pull there@a here => ! incomplete stream
        weigh-rest here => full of some bytes
    """,
    "holds": """
        create there
        snapshot there@a
        snapshot there@b
        hold keep there@a
        hold other there@a
        hold keep there@a there@b there@c => ! tag already exists; dataset does not exist
        hold keep there/no@a => ! dataset does not exist
        since keep there@a there@b => there@a since some time; there@b since some time
        since no there@a
        holds there@a there@b => there@a keep; there@a other; there@b keep
        holds there@c there@a there/no@a => there@a keep; there@a other ! dataset does not exist; dataset does not exist
        tree there => there: a!2 b!1
        release keep there@b
        release keep there@b there@c there@a => ! no such tag; dataset does not exist
        release keep there/no@a => ! dataset does not exist
        holds there@b
        tree there => there: a!1 b
    """,
    "destroying snapshots": """
        create there
        snapshot there@a
        snapshot there@b
        snapshot there@c
        hold keep there@a
        destroy there@a => ! dataset is busy
        destroy there@b there@a there@c => ! dataset is busy
        tree there => there: a!1 b c
        destroy there@b there@no
        destroy there@b there@no => ! could not find any snapshots to destroy
        destroy there/no@a => ! dataset does not exist
        destroy-dataset there => ! dataset is busy
        tree there => there: a!1 c
        release keep there@a
        destroy-dataset there
        tree there => ! dataset does not exist
        destroy-dataset there => ! dataset does not exist
    """,
    "destroying when nothing needs it any more": """
        create there
        snapshot there@a
        snapshot there@b
        hold keep there@a
        hold other there@a
        destroy-later there@a
        destroy-later there@a
        destroy-later there@b
        destroy-later there@b => ! could not find any snapshots to destroy
        tree there => there: a!2
        release keep there@a
        tree there => there: a!1
        release other there@a
        tree there => there:
    """,
    "bookmarks": """
        create there
        snapshot there@a
        snapshot there@b
        bookmark there@a there#m
        bookmark there@b there#m => ! bookmark exists
        bookmark there@c there#n => 2 ! dataset does not exist
        hold keep there@b
        bookmark there@b there#n
        tree there => there: a #m=a b!1 #n=b
        destroy there@a
        destroy-bookmark there#no => ! does not exist
        destroy-bookmark there/no#no => ! does not exist
        tree there => there: #m=a b!1 #n=b
        destroy-bookmark there#m
        destroy-bookmark there#n
        tree there => there: b!1
    """,
    "snapshots and their names": """
        create there
        snapshot there@a
        snapshot there@a => ! already exists
        snapshot there/no@a => 2 ! dataset does not exist
        hold keep there@a
        rename-snapshot there@a there@b
        snapshot there@a
        rename-snapshot there@a there@b => ! already exists
        rename-snapshot there@c there@d => ! dataset does not exist
        tree there => there: b!1 a
    """,
    "listing, and what is missing": """
        create here/kid
        snapshot here/kid@a
        snapshot here@b
        volume here/disk
        existing here here/no here/no/more here/kid => here; here/kid ! dataset does not exist; dataset does not exist
        tree here => here: b; here/disk volume:; here/kid: a
        one here => here: b; here/disk volume:; here/kid:
        snapshot here/kid@c
        exactly here/kid here/kid@c => here/kid: c
        exactly here here@b here/no here/kid here/kid@no here/kid@a => here: b; here/kid: a ! dataset does not exist; dataset does not exist
        tree here/no => ! dataset does not exist
        one here/no => ! dataset does not exist
        one here here/no here/kid => here: b; here/disk volume:; here/kid: a c ! dataset does not exist
        make here/made
        make here/made => ! already exists
        make here/no/made => ! parent does not exist
        make here/disk/made => ! parent is not a filesystem
        tree here/made => here/made:
    """,
    "files": """
        create here
        files here => none
        write here
        files here => some
        make here2
        files here2 => none
        files here/no => ! dataset does not exist
        volume here/disk
        files here/disk => ! operation not applicable
    """,
    "rolling back": """
        create there
        snapshot there@a
        snapshot there@b
        bookmark there@a there#m
        bookmark there@b there#n
        hold keep there@a
        write there
        rollback there@b
        rollback there@c => ! dataset does not exist
        tree there => there: a!1 #m=a b #n=b
        rollback there@a
        tree there => there: a!1 #m=a
    """,
    "rolling back beyond a hold destroys all others and rolls back nothing": """
        create there
        write there
        snapshot there@a
        pull there@a here
        snapshot here@b
        snapshot here@c
        snapshot here@d
        bookmark here@b here#b
        bookmark here@d here#d
        hold keep here@c
        write here
        rollback here@a => ! dataset is busy
        tree here => here: a c!1
        write there
        snapshot there@e
        pull -i there@a there@e here => ! has been modified
        release keep here@c
        rollback here@a
        pull -i there@a there@e here
        tree here => here: a e
    """,
    "rolling back while a partial receive waits": """
        create there
        write there
        snapshot there@a
        write there
        snapshot there@b
        write there
        snapshot there@c
        pull there@a here
        pull -i there@a there@b here
        half pull -i there@b there@c here => ! incomplete stream
        snapshot here@mine
        bookmark here@mine here#mine
        rollback here@a => ! clones of previous snapshots exist
        tree here => here half: a b mine #mine=mine
        rollback here@b
        tree here => here half: a b
        pull -t here@c
        rollback here@a
        tree here => here: a
    """,
    "renaming datasets": """
        create there/kid
        snapshot there@a
        snapshot there/kid@b
        hold keep there@a
        bookmark there@a there#m
        create there2
        volume there3
        rename there there2 => ! already exists
        rename there there/kid/deep => ! cannot be a descendant
        rename there there4/no => ! parent does not exist
        rename there there3/no => ! parent is not a filesystem
        rename there/no there4 => ! dataset does not exist
        rename there there2/new
        tree there2 => there2:; there2/new: a!1 #m=a; there2/new/kid: b
        tree there => ! dataset does not exist
    """,
    "streams": """
        create there
        write there
        snapshot there@a
        write there
        snapshot there@b
        write there
        snapshot there@c
        write there
        snapshot there@d
        bookmark there@a there#m
        tree there => there: a #m=a b c d
        pull there@a here
        pull -i there#m there@b here
        pull -i there@b there@c here
        pull -i there@c there@d here
        tree here => here: a b c d
        pull -i there@a there@b here
        pull -i there@c there@d here
        pull there@a here => ! must specify -F
        pull -F there@a here => ! destination has snapshots
        rename-snapshot here@d here@e
        pull -i there@c there@d here => ! has been modified
        pull -i there@a there@b here/no => ! destination here/no does not exist
        pull there@a here/no/more => ! dataset does not exist
        pull there@no here2 => ! dataset does not exist
        pull -i there@no there@d here => ! dataset does not exist
        pull -i there#no there@d here => ! incremental source (there#no) does not exist
        pull -i there@b there@a here => ! not an earlier snapshot
        tree here => here: a b c e=d
        existing here2 => ! dataset does not exist
    """,
    "into what is there": """
        create there
        write there
        snapshot there@a
        write there
        snapshot there@b
        create here
        pull -i there@a there@b here => ! does not match incremental source
        pull there@a here => ! must specify -F
        pull -F there@a here
        tree here => here: a
        create there2
        write there2
        snapshot there2@x
        write there2
        snapshot there2@y
        pull -i there2@x there2@y here => ! does not match incremental source
        snapshot here@b
        pull -i there@a there@b here => ! already exists
        destroy here@b
        rename-snapshot here@a here@b
        pull -i there@a there@b here => ! already exists
        tree here => here: b=a
    """,
    "snapshots taken and changes made here": """
        create there
        write there
        snapshot there@a
        write there
        snapshot there@b
        write there
        snapshot there@c
        pull there@a here
        snapshot here@same
        pull -i there@a there@b here
        tree here => here: a same b
        write here
        pull -i there@b there@c here => ! has been modified
        snapshot here@changed
        pull -i there@b there@c here => ! has been modified
        destroy here@changed
        pull -i there@b there@c here => ! has been modified
        rollback here@b
        pull -i there@b there@c here
        tree here => here: a same b c
    """,
    "volumes": """
        volume there
        write there
        snapshot there@a
        write there
        snapshot there@b
        pull there@a here
        half pull -i there@a there@b here => ! incomplete stream
        tree here => here volume half: a
        pull -t here@b
        tree here => here volume: a b
        half pull there@a here2 => ! incomplete stream
        tree here2 => here2 volume half:
        abandon here2
        create there2
        write there2
        snapshot there2@x
        pull there2@x here => ! must specify -F
        pull there2@x here/no => ! parent here is not a filesystem
        create here3
        pull there@a here3 => ! must specify -F
        half pull -F there@a here3 => ! incomplete stream
        tree here3 => here3 half:
        pull -F -t here3@a
        tree here3 => here3 volume: a
    """,
    "an interrupted first receive": """
        create there
        write there
        snapshot there@a
        write there
        snapshot there@b
        tree there => there: a b
        abandon here => 2 ! dataset does not exist
        half pull there@a here => ! incomplete stream
        tree here => here half:
        token here => of there@a to a
        rename here here2
        rename here2 here
        snapshot here@x => ! dataset is busy
        rollback here@a => ! dataset does not exist
        pull there@a here => ! must specify -F
        pull -F there@b here => ! partially-complete state
        pull -i there@a there@b here => ! partially-complete state
        make here/kid
        pull there@a here/kid2
        abandon here => ! already exists
        tree here => here half:; here/kid:; here/kid2: a
        half pull -t here@a => ! incomplete stream
        pull -t here@a
        tree here => here: a; here/kid:; here/kid2: a
        files here => some
        abandon here => ! does not have any resumable receive state
        half pull there@b here2 => ! incomplete stream
        abandon here2
        abandon here2 => 2 ! dataset does not exist
    """,
    "an interrupted increment": """
        create there
        write there
        snapshot there@a
        write there
        snapshot there@b
        write there
        snapshot there@c
        pull there@a here
        half pull -i there@a there@b here => ! incomplete stream
        tree here => here half: a
        destroy here@a => ! has dependent clones
        pull -i there@a there@b here => ! partially-complete state
        pull -i there@a there@c here => ! partially-complete state
        pull there@c here => ! must specify -F
        snapshot here@b
        pull -t here@b => ! kernel modules must be upgraded
        destroy here@b
        rename-snapshot here@a here@b
        pull -t here@b => ! already exists
        rename-snapshot here@b here@a
        write here
        pull -t here@b => ! has been modified
        tree here => here half: a
        rollback here@a
        destroy-later here@a
        tree here => here half: a
        pull -t here@b
        tree here => here: b
        half pull -i there@b there@c here => ! incomplete stream
        abandon here
        tree here => here: b
        half pull -i there@b there@c here => ! incomplete stream
        destroy-later here@b
        abandon here
        tree here => here:
    """,
    "an interrupted receive into an empty filesystem": """
        create there
        write there
        snapshot there@a
        make here
        make here/kid
        half pull -F there@a here => ! incomplete stream
        tree here => here half:; here/kid:
        files here => none
        abandon here
        tree here => here:; here/kid:
        half pull -F there@a here => ! incomplete stream
        pull -F there@a here => ! partially-complete state
        pull -t here@a => ! has been modified
        pull -F -t here@a
        tree here => here: a; here/kid:
    """,
    "every snapshot between, and one is in the way": """
        create there
        write there
        snapshot there@a
        write there
        snapshot there@b
        write there
        snapshot there@c
        pull there@a here
        rename-snapshot here@a here@c
        pull -i there@a there@b here
        pull -i there@b there@c here => ! already exists
        tree here => here: c b
    """,
    "tokens": """
        create there
        write there
        snapshot there@a
        write there
        snapshot there@b
        write there
        snapshot there@c
        tree there => there: a b c
        pull there@a here
        half pull -i there@a there@b here => ! incomplete stream
        token here => of there@b from a to b
        rename-snapshot there@b there@d
        rename-snapshot there@a there@e
        token here => of there@b from a to b
        snapshot there@b
        rename there there2
        rename here here2
        token here2 => of there@b from a to b
        pull -t here2@d
        rename here2 here
        rename there2 there
        tree here => here: a d=b
        half pull -i there@d there@c here => ! incomplete stream
        bookmark there@d there#d
        destroy there@d
        token here => of there@c from b to c
        destroy-bookmark there#d
        token here => 255 of there@c from b to c ! no longer exists
        pull -t here@c => ! no longer exists
        destroy there@c
        token here => 255 of there@c from b to c ! used in the initial send no longer exists
        rename there there2
        token here => 255 of there@c from b to c ! used in the initial send no longer exists
        decode garbage => 255 ! resume token is corrupt
    """,
    "what others do while a stream is under way": """
        create there
        write there
        snapshot there@a
        write there
        snapshot there@b
        write there
        snapshot there@c
        write there
        snapshot there@d
        write there
        snapshot there@e
        pull there@a here
        pull -i there@a there@b here while snapshot here@x => ! kernel modules must be upgraded
        tree here => here half: a x
        destroy here@x
        pull -t here@b
        pull -i there@b there@c here while write here => ! has been modified
        tree here => here half: a b
        rollback here@b
        pull -t here@c
        pull -i there@c there@d here while rename-snapshot here@b here@d => ! already exists
        tree here => here half: a d=b c
        rename-snapshot here@d here@b
        pull -t here@d
        pull -i there@d there@e here while rename here here2 => ! dataset does not exist; dataset does not exist
        tree here2 => here2 half: a b c d
    """,
    "what others do while -F is under way is overwritten": """
        create there
        write there
        snapshot there@a
        make here
        pull -F there@a here while write here; snapshot here@mine
        tree here => here: a
        make here2
        pull -F there@a here2 while snapshot here2@mine; hold keep here2@mine => ! dataset is busy
        pull -F -t here2@a => ! partially-complete state
        tree here2 => here2 half: mine!1
        release keep here2@mine
        pull -F -t here2@a
        tree here2 => here2: a
    """,
}


# ---------------------------------------------------------------------------------------------------------------------
# What both can do
# ---------------------------------------------------------------------------------------------------------------------


def write(machine: Machine, name: str) -> None:
    """As `change` below, for which read-only is no obstacle."""
    machine.store(name).readonly = False
    machine.write(name)


OPERATIONS: dict[str, tuple[Callable[..., object], str]] = {
    "create": (lambda machine, name: machine.create(name, files=False), "zfs create -p {}"),
    "volume": (lambda machine, name: machine.create(name, "volume"), "zfs create -p -V 4M {} && udevadm settle"),
    "write": (write, "change {}"),
    "snapshot": (Machine.snapshot, "zfs snapshot {}"),
    "rename-snapshot": (lambda machine, name, new: machine.rename(name, new.partition("@")[2]), "zfs rename {} {}"),
    "destroy-later": (Machine.doom, "zfs destroy -d {}"),
    "destroy-dataset": (Machine.destroy_dataset, "zfs destroy -r {}"),
}
"""What administrators do: in a simulated machine, and in the shell."""


def points(names: Iterable[str]) -> list[Snapshot]:
    return [Snapshot(name, 0, 0, 0) for name in names]


COMMANDS: dict[str, Callable[..., Command]] = {
    "hold": lambda tag, *names: hold(tag, names),
    "release": lambda tag, *names: release(tag, names),
    "holds": lambda *names: (*LIST_HOLDS, *names),
    "since": lambda _tag, *names: (*LIST_HOLDS, *names),
    "destroy": lambda *names: destroy(points(names)),
    "destroy-bookmark": lambda name: ("zfs", "destroy", name),
    "rollback": lambda name: ("zfs", "rollback", "-r", name),
    "rename": lambda name, new: ("zfs", "rename", name, new),
    "bookmark": lambda name, mark: ("zfs", "bookmark", name, mark),
    "existing": lambda *names: (*LIST_EXISTING, *names),
    "tree": list_tree,
    "one": lambda *names: list_tree(*names, alone=True),
    "exactly": lambda *names: (*LIST_EXACTLY, *names),
    "datasets": lambda name: list_fast(name)[0],
    "points": lambda name: list_fast(name)[1],
    "own-points": lambda *names: list_fast(*names, alone=True)[1],
    "make": lambda name: (*CREATE_PARENT, name),
    "files": lambda name: (*COUNT_FILES, name),
    "abandon": lambda name: (*ABORT_RECEIVE, name),
    "token": lambda name: (*DECODE_TOKEN, TOKEN_OF + name),
    "decode": lambda token: (*DECODE_TOKEN, token),
    "mark": lambda name: set_failing(name, 1700000000),
    "unmark": clear_failing,
    "marked": lambda name: (*GET_FAILING, name),
    "usage": lambda name: (*LIST_USAGE, name),
    "weigh": lambda *words: estimate(pull([*words, "nowhere"], set())[0]),
    "weigh-rest": lambda name: estimate(("zfs", "send", "-t", TOKEN_OF + name)),
}
"""What the program runs."""

TOKEN_OF = "token of "
"""Before a dataset: stands for the token that waits in it."""


@dataclass
class Line:
    """One line of a scene. `half`: a stream that is cut; `deeds`: what others do while it flows."""

    text: str
    expected: str
    operation: str
    words: list[str]
    half: bool
    deeds: list[Line]

    @classmethod
    def of(cls, line: str) -> Line:
        text, _, expected = line.strip().partition(" =>")
        what, _, meanwhile = text.partition(" while ")
        half = what.startswith("half ")
        operation, *words = what.split()[half:]
        deeds = [cls.of(deed) for deed in meanwhile.split(";") if deed]
        return cls(text, expected.strip(), operation, words, half, deeds)


def script(name: str) -> list[Line]:
    return [Line.of(text) for text in SCENES[name].strip().splitlines()]


def pull(words: list[str], volumes: set[str]) -> tuple[Command, Command]:
    """The program's commands at both ends of a stream. What comes from a volume is one."""
    force = words[0] == "-F"
    words = words[force:]
    flag, base = (words[0], words[1]) if words[0][0] == "-" else ("", "")
    name, target = words[-2:]
    if flag == "-t":
        name, target = base, base.partition("@")[0]
    kind = "volume" if (target if flag == "-t" else name.partition("@")[0]) in volumes else "filesystem"
    volumes |= {target} if kind == "volume" else set()
    step = Receive(Snapshot(name, 0, 0, 0), Snapshot(base, 0, 0, 0) if base else None)
    if flag == "-t":
        step = Receive(step.snapshot, token=TOKEN_OF + target)
    local = Dataset(target, kind, (Snapshot(target + "@", 0, 0, 0),) if flag and not force else (), empty=force)
    receiving = receive(Dataset("", kind), local, target + step.snapshot.short)
    return send(Dataset("", kind), step, False, ("-L", "-c")), receiving


# ---------------------------------------------------------------------------------------------------------------------
# Answers in our own words
# ---------------------------------------------------------------------------------------------------------------------

PHRASES = re.compile(
    "tag already exists|no such tag|dataset does not exist|dataset is busy|could not find any snapshots to destroy|"
    "(?:dataset|destination) (already exists)|bookmark exists|parent does not exist|parent (?:'\\S+' )?is not a filesystem|"
    "has dependent clones|clones of previous snapshots exist|cannot be a descendant|operation not applicable|"
    "incomplete stream|must specify -F|destination has snapshots|partially-complete state|has been modified|"
    "does not match incremental source|kernel modules must be upgraded|does not have any resumable receive state|"
    "destination '\\S+' does not exist|incremental source \\(\\S+\\) does not exist|not an earlier snapshot|"
    "resume token is corrupt|(?:used in the initial send )?no longer exists|does not exist"
)
NEWER = {
    "it's being held": "dataset is busy",
    "Resuming recv on existing destination": "has been modified",
}
"""How OpenZFS 2.3 says what 2.1 says otherwise. It refuses the second at the head of the stream, 2.1 at its end."""


class Teller:
    """Puts the answers of one scene in our words."""

    def __init__(self) -> None:
        self.labels: dict[int, str] = {}

    def tell(self, line: Line, answer: Answer) -> str:
        said = self.output(line, answer.stdout)
        if answer.status == 0:
            return said
        errors = " ".join(answer.stderr.split())
        for new, old in NEWER.items():
            errors = re.sub(f"{new}.*?(?=cannot|$)", old, errors)
        phrases = [found[1] or found[0].replace("'", "") for found in PHRASES.finditer(errors)] or [errors]
        status = str(answer.status) * (answer.status != 1)
        return " ".join(filter(None, [status, said, "!", "; ".join(phrases)]))

    def output(self, line: Line, text: str) -> str:
        if line.operation.endswith("points"):
            rows = sorted(fields(text, 3), key=lambda row: (re.split("[@#]", row[0])[0], int(row[2]), "#" in row[0]))
            return "; ".join(f"{name}={self.labels.setdefault(int(guid), name)}" for name, guid, _ in rows)
        if line.operation in ("tree", "one", "exactly", "datasets") and text:
            return "; ".join(self.tree(line.words[0], text))
        if line.operation == "usage":
            return "; ".join(f"{name} of some bytes" for name in sorted(parse_usage(text)))
        if line.operation == "files" and text:
            return "none" if count_objects(text) == 1 else "some"
        if line.operation in ("token", "decode") and text:
            partial = parse_token("", text)
            name = re.search("toname = (.*)", text)
            base = f" from {self.labels.get(partial.from_guid, '?')}" if partial.from_guid else ""
            return f"of {name and name[1]}{base} to {self.labels.get(partial.to_guid or 0, '?')}"
        if line.operation.startswith("weigh") and "size" in text:
            kinds = re.findall("^(full|incremental)\t", text, re.MULTILINE)
            return f"{'; '.join(kinds)}{' of some bytes' * (parse_estimates(text)[0][0] > 0)}"
        if line.operation == "since" and text:
            found = parse_hold_dates(text, line.words[0])
            return "; ".join(
                f"{name} since some time" for name, date in found.items() if time.strptime(date, HOLD_DATE)
            )
        if line.operation == "holds":
            return "; ".join(sorted(f"{name} {tag}" for name, tag, _ in fields(text, 3)))
        return "; ".join(text.splitlines())

    def tree(self, root: str, text: str) -> list[str]:
        datasets, _ = parse_tree(text, root)
        holds = {row[0]: row[5] for row in fields(text, len(LIST_COLUMNS))}
        told = []
        for key, dataset in sorted(datasets.items()):
            words = [
                f"{root}{key}",
                *["volume"] * (dataset.kind == "volume"),
                *["half"] * (dataset.partial is not None),
            ]
            told.append(" ".join(words) + ":")
            for point in sorted(dataset.snapshots + dataset.bookmarks, key=lambda it: (it.createtxg, it.is_bookmark)):
                short = point.short.lstrip("@")
                label = self.labels.setdefault(point.guid, short)
                told[-1] += f" {short}" + f"={label}" * (label != short)
                told[-1] += f"!{holds[point.name]}" * (holds[point.name] not in ("-", "0"))
        return told


# ---------------------------------------------------------------------------------------------------------------------
# The two stages
# ---------------------------------------------------------------------------------------------------------------------


POOLS = ("backuppool", "offsite")


class Stage:
    """Where scenes are played, each in a corner of its own: `there` is backuppool/NUMBER/there."""

    def play(self, name: str) -> list[str]:
        """The scene as it went."""
        number = list(SCENES).index(name)
        corners = [f"{pool}/{number}/" for pool in POOLS]
        lines = script(name)
        teller, told = Teller(), []
        text = "\n".join(line.text for line in lines)
        text = re.sub(r"\bhere", corners[1] + "here", re.sub(r"\bthere", corners[0] + "there", text))
        answers = self.answers(corners, [Line.of(placed) for placed in text.splitlines()])
        for line, answer in zip(lines, answers):
            stdout, stderr = (re.sub("|".join(corners), "", text) for text in (answer.stdout, answer.stderr))
            told.append(f"{line.text} => {teller.tell(line, Answer(answer.status, stdout, stderr))}")
        return told

    def answers(self, corners: list[str], lines: list[Line]) -> list[Answer]:
        raise NotImplementedError


class SimulatedStage(Stage):
    """Two simulated machines."""

    def __init__(self) -> None:
        world = World()
        self.machines = [Machine(world, pool, pool) for pool in POOLS]
        self.volumes: set[str] = set()

    def answers(self, corners: list[str], lines: list[Line]) -> list[Answer]:
        for machine, corner in zip(self.machines, corners):
            machine.create(corner.rstrip("/"))
        return [self.answer(line) for line in lines]

    def answer(self, line: Line) -> Answer:
        source, target = self.machines
        machine = target if any(word.startswith(POOLS[1]) for word in line.words) else source
        try:
            if line.operation == "pull":
                self.pull(line)
            elif line.operation in OPERATIONS:
                if line.operation == "volume":
                    self.volumes.add(line.words[0])
                OPERATIONS[line.operation][0](machine, *line.words)
            else:
                command = self.with_token(COMMANDS[line.operation](*line.words))
                return (source if command[1] == "send" else machine).ask(command)
        except Refused as refused:
            # Of a pipeline the status of the receiver counts, and that is 1.
            return Answer(1 if line.operation == "pull" else refused.status, "", str(refused))
        return Answer(0, "", "")

    def pull(self, line: Line) -> None:
        source, target = self.machines
        sending, receiving = pull(line.words, self.volumes)
        for segment in source.send(self.with_token(sending)):
            for _ in target.receive(receiving, segment):
                if line.half:
                    raise Refused("cannot receive: checksum mismatch or incomplete stream.")
                for deed in line.deeds:
                    self.answer(deed)

    def with_token(self, command: Command) -> Command:
        name = command[-1].partition(TOKEN_OF)[2]
        waiting = self.machines[1].store(name).partial if name else None
        return (*command[:-1], waiting.token) if waiting else command


class RealStage(Stage):
    """One virtual machine with both pools; a scene is one script."""

    def __init__(self, machine: laboratory.Machine) -> None:
        self.machine = machine
        self.volumes: set[str] = set()
        machine.run(
            f"zpool create {POOLS[0]} {DISK} && truncate -s 512M /dev/shm/disk && zpool create {POOLS[1]} /dev/shm/disk"
        )

    def answers(self, corners: list[str], lines: list[Line]) -> list[Answer]:
        begin = "cd $(mktemp -d)\n" + "".join(f"zfs create {corner[:-1]}\n" for corner in corners)
        played = self.machine.run("bash", input=PRELUDE + begin + "".join(map(self.step, lines)), timeout=300)
        found = [answer.split("\x1f") for answer in played.stdout.split("\x1e")[:-1]]
        assert len(found) == len(lines), played.stdout + played.stderr
        return [Answer(int(status), stdout, stderr) for status, stdout, stderr in found]

    def step(self, line: Line) -> str:
        return f"{{ {self.shell(line)}; }} >stdout 2>stderr </dev/null; answer $?\n"

    def shell(self, line: Line) -> str:
        if line.operation == "pull":
            return self.pull(line)
        if line.operation in OPERATIONS:
            if line.operation == "volume":
                self.volumes.add(line.words[0])
            return OPERATIONS[line.operation][1].format(*map(shlex.quote, line.words))
        return words_for_shell(COMMANDS[line.operation](*line.words))

    def pull(self, line: Line) -> str:
        """Half-way is where a receive has begun, and has not got all of any file."""
        sending, receiving = map(words_for_shell, pull(line.words, self.volumes))
        between = "| head -c 100000" * line.half
        if line.deeds:
            deeds = "; ".join(map(self.shell, line.deeds))
            between = (
                f"| {{ head -c 100000; wait_for {line.words[-1].partition('@')[0]}; {{ {deeds}; }} >/dev/null; cat; }}"
            )
        return f'{sending} 2>sender {between} | {receiving}; judge "${{PIPESTATUS[@]}}"'


def words_for_shell(command: Command) -> str:
    return re.sub(f"'{TOKEN_OF}(.*?)'", r'"$(zfs get -H -o value receive_resume_token \1)"', shlex.join(command))


PRELUDE = r"""
answer() {
    IFS= read -rd '' stdout <stdout
    IFS= read -rd '' stderr <stderr
    printf '%s\037%s\037%s\036' "$1" "$stdout" "$stderr"
}
# A sender that failed by itself has the say; one that lost its reader has not.
judge() {
    case $1 in 0|141) return ${!#};; esac
    cat sender >&2
    return 1
}
# Until a receive has begun.
wait_for() {
    for try in $(seq 100); do
        case $(zfs get -H -o value receive_resume_token "$1" 2>/dev/null) in 1-*) return;; esac
        sleep 0.1
    done
}
change() {
    if [ -e "/dev/zvol/$1" ]; then
        dd if=/dev/urandom of="/dev/zvol/$1" bs=64k count=7 oflag=direct status=none
    elif mountpoint -q "/$1"; then
        head -c 400000 /dev/urandom >"/$1/$RANDOM"
    else
        zfs set readonly=off canmount=on "$1" && zfs mount "$1" && head -c 400000 /dev/urandom >"/$1/$RANDOM"
        zfs umount "$1"
    fi
    case $1 in offsite*) zpool sync offsite;; esac
}
"""


def differences(stage: Stage, name: str) -> list[str]:
    """The lines that went otherwise than they are written."""
    written = [f"{line.text} => {line.expected}" for line in script(name)]
    return [f"{name}: {went}, not {it}" for went, it in zip(stage.play(name), written) if went != it]


@pytest.mark.parametrize("name", SCENES)
def test_simulated_machine_answers_as_the_scene_says(name: str) -> None:
    assert "\n".join(differences(SimulatedStage(), name)) == ""


@pytest.mark.zfs
@pytest.mark.parametrize("release", RELEASES)
def test_real_zfs_answers_as_the_scenes_say(free_lab: laboratory.Lab, release: str) -> None:
    """All scenes in one test, on one machine, several side by side: they mostly wait for the disk."""
    machine = free_lab.machine("source", release)
    try:
        stage = RealStage(machine)
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda name: differences(stage, name), SCENES))
        assert "\n".join(line for lines in found for line in lines) == ""
    finally:
        machine.close()
