"""Faults on real ZFS, driven from outside: the program has no hook, and is told nothing.

A wrapper of `zfs` on both machines counts the calls of a run. An undisturbed run says which calls there are; each fault
then strikes at one of them: before it, after it, or midway through the bytes of its stream. At once, and after plain
re-runs, both pools are compared with what they were and with what the undisturbed run gives.

What is known about ZFS here is written apart from the program, as in site_pair.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from lab import LabError
from site_pair import JOB, MIRROR, TAG, TREE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab import Machine
    from site_pair import Pair

T = TypeVar("T")
RECEIVED = f"{TAG}:received"
FOREIGN = "keepsake"
DIRECTORY = "/run/faults"
WRAPPER_PATH = "/usr/local/sbin/zfs"
KEEP_DAYS = 30
MOST_RERUNS = 3
MOST_INTERRUPTIONS = 3

WRAPPER = r"""#!/bin/sh
# Counts the calls of zfs while there is a plan: NUMBER WHEN BYTES. At that call it does the deed.
zfs=/usr/sbin/zfs
cd /run/faults 2>/dev/null && read -r number when bytes 2>/dev/null <plan || exec $zfs "$@"
set -C
n=1
until echo "$*" 2>/dev/null >call.$n; do n=$((n + 1)); done
set +C
mark() { true >struck; }
case $n.$when in
$number.before) . ./deed ;;
$number.after) $zfs "$@"; status=$?; . ./deed; exit $status ;;
$number.midway)
    case $1 in
    send) $zfs "$@" | { head -c $bytes; . ./deed; cat; } ;;
    recv) { head -c $bytes; . ./deed; cat; } | $zfs "$@" ;;
    esac
    exit ;;
*.count)
    [ "$1" = send ] && [ "$2" != -nvt ] || exec $zfs "$@"
    $zfs "$@" | dd bs=64k 2>bytes.$n
    exit ;;
esac
exec $zfs "$@"
"""

RUN = rf"""
mkdir -p {DIRECTORY}; cd {DIRECTORY}
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
setsid -w sh -c 'echo $$ >pid; cd; exec "$@"' sh $(cat) </dev/null >said 2>&1
echo $?; cat said
"""

COUNTED = rf"""
cd {DIRECTORY} && for call in $(ls call.* | sort -t . -k 2n); do
    n=${{call#call.}}; echo "$n $(grep -s -o '^[0-9]* bytes' bytes.$n || echo 0 bytes) $(cat $call)"
done
"""

SETTLE = rf"""
pid=$(cat {DIRECTORY}/pid 2>/dev/null || echo 999999)
for i in $(seq 900); do
    pgrep -x zfs >/dev/null || pgrep -s $pid >/dev/null || {{ ls {DIRECTORY} 2>/dev/null; rm -rf {DIRECTORY}; exit 0; }}
    sleep 0.1
done
ps -ef >&2; exit 1
"""

VIEW = r"""
PATH=/usr/sbin:$PATH; root=$(cat); export root
zfs list -Hp -r -t filesystem,volume,snapshot -o name,guid,createtxg,creation,userrefs,receive_resume_token "$root" >/tmp/list ||
    [ "$(zfs list -H -o name "$root" 2>&1)" = "cannot open '$root': dataset does not exist" ] || exit 1
cat /tmp/list; echo --
awk -F '\t' '/@/ && $5 > 0 { print $1 }' /tmp/list | xargs -d '\n' -r zfs holds -H || exit; echo --
[ ! -s /tmp/list ] || zfs get -Hp -r -t filesystem,volume -s local,received -o name,property,value,source all "$root"
"""


# --- What stands in the pools -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A snapshot, and who holds it."""

    name: str
    guid: int
    createtxg: int
    creation: int
    tags: frozenset[str]


@dataclass(frozen=True)
class View:
    """A tree as it stands: snapshots oldest first by the dataset's name below the root; who waits for a rest."""

    points: dict[str, list[Point]]
    waiting: list[str]
    properties: str

    def guids(self, key: str) -> list[int]:
        return [point.guid for point in self.points.get(key, [])]

    def held(self, tag: str) -> dict[str, list[int]]:
        """Guids of the snapshots that carry `tag`, of the datasets that have any."""
        found = {key: [point.guid for point in points if tag in point.tags] for key, points in self.points.items()}
        return {key: guids for key, guids in found.items() if guids}

    def without(self, tag: str) -> dict[tuple[str, int, int], frozenset[str]]:
        """All snapshots with the holds that are not ours."""
        return {(p.name, p.guid, p.createtxg): p.tags - {tag} for points in self.points.values() for p in points}


def look(machine: Machine, root: str) -> View:
    listing, holds, properties = machine.run(VIEW, input=root, timeout=300).stdout.split("--\n")
    tags: dict[str, set[str]] = {}
    for line in holds.splitlines():
        name, tag, _ = line.split("\t")
        if not tag.startswith(".send-"):  # of a zfs send that is still at work; they go with it
            tags.setdefault(name, set()).add(tag)
    points: dict[str, list[Point]] = {}
    waiting = []
    for line in listing.splitlines():
        name, guid, createtxg, creation, _, token = line.split("\t")
        own = points.setdefault(name.partition("@")[0][len(root) :], [])
        if "@" in name:
            own.append(Point(name, int(guid), int(createtxg), int(creation), frozenset(tags.get(name, ()))))
        elif token not in ("-", ""):
            waiting.append(name)
    for own in points.values():
        own.sort(key=lambda point: point.createtxg)
    return View(points, waiting, properties)


@dataclass(frozen=True)
class Sides:
    source: View
    local: View

    def newest_mutual(self, key: str) -> Point | None:
        ours = self.local.guids(key)
        return next((point for point in reversed(self.source.points[key]) if point.guid in ours), None)


def check_at_once(before: Sides, after: Sides, scenario: Scenario, destroyed: str, status: int | None) -> Iterator[str]:
    """What of I1, I2, I4 and I6 does not hold (tests/design: README, "The promise")."""
    for key in before.source.points:
        if not before.newest_mutual(key):
            continue
        common = set(after.source.held(TAG).get(key, ())) & set(after.local.held(RECEIVED).get(key, ()))
        if not common:
            yield f"I1: no common snapshot of {TREE}{key} is held on both sides"
    for key, points in before.local.points.items():
        if key not in after.local.points:
            yield f"I4: {MIRROR}{key} is gone"
        tagged = after.source.held(TAG).get(key, ())
        for point in points:
            if point.guid in after.local.guids(key):
                continue
            if point.guid in tagged:
                yield f"I2: {point.name} was destroyed while {TAG} holds its twin"
            if point.guid not in expirable(before, key, scenario):
                yield f"I4: {point.name} was destroyed"
    expected = {it: tags for it, tags in before.source.without(TAG).items() if it[0] != destroyed}
    if after.source.without(TAG) != expected:
        yield f"I4: snapshots or foreign holds on the source were {expected}, are {after.source.without(TAG)}"
    if after.source.properties != before.source.properties:
        yield f"I4: properties on the source were\n{before.source.properties}and are\n{after.source.properties}"
    known = before.local.without(RECEIVED)
    for it, tags in after.local.without(RECEIVED).items():
        key = it[0].partition("@")[0][len(MIRROR) :]
        if it in known:
            if tags != known[it]:
                yield f"I4: foreign holds on {it[0]} were {set(known[it])}, are {set(tags)}"
        elif it[1] not in before.source.guids(key):
            yield f"I4: {it[0]} is new and not from the source"
    if status == 0:
        for key, points in after.source.points.items():
            if points[-1].guid not in after.local.guids(key):
                yield f"I6: exit 0, but {points[-1].name} is not here"


def expirable(sides: Sides, key: str, scenario: Scenario) -> set[int]:
    """Guids of local snapshots that a whole run expires."""
    if not scenario.expires:
        return set()
    newest = sides.source.points[key][-1]
    cutoff = newest.creation - KEEP_DAYS * 24 * 60 * 60
    points = (*sides.local.points.get(key, ()), *sides.source.points[key])
    local = {p.guid for p in sides.local.points.get(key, ()) if p.tags - {RECEIVED}}
    return {point.guid for point in points if point.creation < cutoff and point.guid not in local}


def check_at_last(before: Sides, after: Sides, scenario: Scenario, properties: str) -> Iterator[str]:
    """How the mirror differs from what an undisturbed run leaves."""
    for key, points in after.source.points.items():
        newest = points[-1].guid
        base = before.newest_mutual(key)
        later = [p.guid for p in points if not base or p.createtxg > base.createtxg]
        arrived = later if scenario.intermediates else later[-1:]
        gone = expirable(Sides(after.source, before.local), key, scenario)
        expected = [guid for guid in (*before.local.guids(key), *arrived) if guid not in gone]
        if after.local.guids(key) != expected:
            yield f"I3: {MIRROR}{key} has {after.local.points.get(key)}, not {expected}"
        for tag, side in ((TAG, after.source), (RECEIVED, after.local)):
            if side.held(tag).get(key) != [newest]:
                yield f"I3: {tag} of {key or 'the root'} is on {side.held(tag).get(key)}, not on {newest}"
    if after.local.waiting:
        yield f"I3: an interrupted receive is left on {after.local.waiting}"
    if after.local.points.keys() != after.source.points.keys():
        yield f"I3: datasets here are {list(after.local.points)}"
    if properties and after.local.properties != properties:
        yield f"I3: properties here are\n{after.local.properties}not\n{properties}"


# --- Runs to disturb --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A run that has something to do, with its options."""

    name: str
    options: tuple[str, ...] = ()
    first: bool = False
    resumes: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def intermediates(self) -> bool:
        return "-I" in self.options

    @property
    def expires(self) -> bool:
        return "-k" in self.options


FULL = Scenario("full", first=True)
INCREMENT = Scenario("increment", ("-I", "-k", str(KEEP_DAYS)))
REST = Scenario("rest", resumes=True)
SCENARIOS = (FULL, INCREMENT, REST)


@dataclass(frozen=True)
class Call:
    """One call of zfs in an undisturbed run; `bytes` of the stream, if it sends one."""

    machine: str
    number: int
    words: str
    bytes: int = 0

    @property
    def verb(self) -> str:
        return self.words.split()[0]

    @property
    def streams(self) -> bool:
        return self.verb == "recv" or (self.verb == "send" and "-nvt" not in self.words)

    @property
    def changes(self) -> bool:
        """Whether it changes a pool."""
        return self.verb in ("hold", "release", "recv", "destroy", "create")


# --- Faults -----------------------------------------------------------------------------------------------------------


def on(where: str, here: str, line: str) -> str:
    """`line` run on the machine `where`, in a deed done on the machine `here`."""
    return line if where == here else f"ssh {where} {shlex.quote(line)}"


def failing(fault: Fault) -> str:
    return 'mark; echo "injected fault" >&2; exit 1'


def killing(fault: Fault) -> str:
    line = f"read -r pid <{DIRECTORY}/pid; kill -0 $pid && : >{DIRECTORY}/killed && kill -9 $pid"
    return f"mark; {on('backup', fault.call.machine, line)} || rm struck; [ $when != before ] || exit 1"


def killing_all(fault: Fault) -> str:
    line = f"read -r pid <{DIRECTORY}/pid; kill -0 $pid && : >{DIRECTORY}/killed && kill -9 -$pid"
    return f"mark; {on('backup', fault.call.machine, line)} || rm struck; [ $when != before ] || exit 1"


def killing_sshd(fault: Fault) -> str:
    """The server's process of this connection; the listener lives on."""
    return r"""
    up=$PPID
    while [ $up -gt 1 ]; do
        read -r comm </proc/$up/comm
        parent=$(awk '/^PPid/ { print $2 }' /proc/$up/status)
        case $comm in sshd*) mark; kill -9 $up; break ;; esac
        up=$parent
    done
    [ $when != before ] || exit 1
    """


def waiting(fault: Fault) -> str:
    return "mark; until [ -e released ]; do sleep 0.1; done"


def filling(fault: Fault) -> str:
    # What is under way may take more than that between our two commands: then zfs refuses, and we ask again.
    line = (
        "for attempt in 1 2 3 4 5; do /usr/sbin/zpool sync offsite; "
        "/usr/sbin/zfs set quota=$(($(/usr/sbin/zfs get -Hp -o value used offsite) + 50000)) offsite 2>/dev/null && "
        "break; done"
    )
    return f"{on('backup', fault.call.machine, line)} && mark"


def destroying(fault: Fault) -> str:
    name = shlex.quote(fault.destroys)
    return f"$zfs release {TAG} {name} 2>/dev/null; $zfs destroy {name} && mark"


@dataclass(frozen=True)
class Kind:
    """One way to go wrong. `deed` is what the wrapper does; `driven` kinds wait there for an accident from outside."""

    name: str
    deed: str
    driven: bool = False

    def __str__(self) -> str:
        return self.name


COMMAND_FAILS = Kind("command fails", "failing")
TOOL_KILLED = Kind("tool killed, its children live on", "killing")
ALL_KILLED = Kind("tool and children killed", "killing_all")
SSHD_KILLED = Kind("sshd of the connection killed", "killing_sshd")
CABLE_BRIEFLY = Kind("cable out for 5 s", "waiting", driven=True)
CABLE_OUT = Kind("cable out for good", "waiting", driven=True)
FROZEN_BRIEFLY = Kind("source frozen for 5 s", "waiting", driven=True)
FROZEN = Kind("source frozen", "waiting", driven=True)
BACKUP_POWER = Kind("power loss of the backup machine", "waiting", driven=True)
SOURCE_POWER = Kind("power loss of the source", "waiting", driven=True)
POOL_FULL = Kind("pool full at the target", "filling")
DESTROYED = Kind("source snapshot destroyed", "destroying")
KINDS = (
    COMMAND_FAILS, TOOL_KILLED, ALL_KILLED, SSHD_KILLED, POOL_FULL, DESTROYED,
    CABLE_BRIEFLY, FROZEN_BRIEFLY, BACKUP_POWER, SOURCE_POWER, CABLE_OUT, FROZEN,
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """A kind of fault at one point: `when` is before, midway, or after the call. `destroys` names a source snapshot."""

    kind: Kind
    call: Call
    when: str
    bytes: int = 0
    destroys: str = ""

    def __str__(self) -> str:
        what = f" {self.destroys}" if self.destroys else ""
        midway = f" (byte {self.bytes})" if self.when == "midway" else ""
        return (
            f"{self.kind}{what} {self.when}{midway} call {self.call.number} on {self.call.machine}: {self.call.words}"
        )


def faults(kind: Kind, scenario: Scenario, calls: list[Call]) -> Iterator[Fault]:
    """Every point of an undisturbed run at which this kind of fault can strike, or for the slow kinds some of them.

    Of a run that resumes, only what deals with the rest: all else of it is an incremental run.
    """
    if kind is DESTROYED:
        yield from destructions(calls)
        return
    first = next(call for call in calls if call.verb == "recv")
    for call in calls:
        if scenario.resumes and call != first and " 1-" not in call.words:
            continue
        for when in moments(kind, call):
            # A recv has no count of its own: its stream is the one with its number among the sends.
            yield Fault(kind, call, when, midway(call, calls))


def midway(call: Call, calls: list[Call]) -> int:
    ends = {verb: [it for it in calls if it.verb == verb and it.streams] for verb in ("send", "recv")}
    return ends["send"][ends["recv"].index(call)].bytes // 2 if call in ends["recv"] else call.bytes // 2


def moments(kind: Kind, call: Call) -> tuple[str, ...]:
    """When, around this call, a kind of fault strikes. After a call that changes nothing is before the next one."""
    around = ("before", "midway", "after") if call.streams else ("before", "after") if call.changes else ("before",)
    at_source = call.machine == "source"
    if kind in (COMMAND_FAILS, TOOL_KILLED):
        return around
    if kind is ALL_KILLED:
        return around if call.changes else ()
    if kind is SSHD_KILLED:
        return around if at_source else ()
    if kind is POOL_FULL:
        return ("before", "midway") if call.verb == "recv" else ("before",) if call.changes else ()
    if kind in (CABLE_BRIEFLY, FROZEN_BRIEFLY):
        return ("midway",) if at_source and call.streams else ("before",) if at_source and call.changes else ()
    if kind in (BACKUP_POWER, SOURCE_POWER):
        return ("midway",) if at_source and call.streams else ("after",) if call.changes else ()
    first_stream = at_source and call.streams and call.number % 2 == 0
    return ("midway",) if first_stream else ("before",) if at_source and call.verb == "release" else ()


def destructions(calls: list[Call]) -> Iterator[Fault]:
    """The target of each stream, at each call of the source up to the one that sends it."""
    at_source = [call for call in calls if call.machine == "source"]
    for sending in at_source:
        if sending.streams:
            target = f"{TREE}@" if "-t" in sending.words.split() else sending.words.split()[-1]
            for call in at_source[: at_source.index(sending) + 1]:
                yield Fault(DESTROYED, call, "before", destroys=target)


# --- The bench --------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the faults of one kind in one scenario."""

    points: int = 0
    injected: int = 0
    survived: int = 0
    resumable: int = 0
    seconds: float = 0.0
    complaints: list[str] = field(default_factory=list)


class Bench:
    """Two machines with a planted tree, on which runs are disturbed one after another."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.calls: dict[str, list[Call]] = {}
        self.properties: dict[str, str] = {}
        self.injected = 0
        self.renew()
        no_retries = "--retries" in self.site.backup.run("zfs_replicate --help").stdout
        self.job = JOB + " --retries 0" * no_retries

    def renew(self) -> None:
        """Empty pools, a tree, a mirror of it, and on both sides a snapshot that somebody else holds."""
        self.site = self.pair.fresh()
        for machine in (self.site.source, self.site.backup):
            machine.run(f"rm -rf {DIRECTORY}")
            machine.write(WRAPPER_PATH, WRAPPER, 0o755)
            machine.run("sync")
        self.site.plant("www")
        self.site.snapshot("kept")
        self.site.replicate()
        self.site.source.run(f"zfs hold -r {FOREIGN} {TREE}@kept")
        self.site.backup.run(f"zfs hold -r {FOREIGN} {MIRROR}@kept")
        self.cycle = 0

    def close(self) -> None:
        for machine in (self.site.source, self.site.backup):
            machine.run(f"rm -rf {WRAPPER_PATH} {DIRECTORY}")

    def machine(self, name: str) -> Machine:
        return self.site.source if name == "source" else self.site.backup

    def look(self) -> Sides:
        return Sides(*self.both(lambda machine: look(machine, TREE if machine is self.site.source else MIRROR)))

    def both(self, work: Callable[[Machine], T]) -> list[T]:
        """The same on source and backup machine, side by side."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(work, (self.site.source, self.site.backup)))

    # A run

    def prepare(self, scenario: Scenario) -> None:
        """Give the next run something to do. Older snapshots are destroyed at the source, as sanoid would."""
        self.cycle += 1
        now = f"c{self.cycle}"
        if scenario.first:
            self.clear_mirror()
        if scenario.expires:
            self.both(lambda machine: machine.shift_clock(KEEP_DAYS + 1))
        if not scenario.first:
            self.tend_mirror(scenario)
        later = f"&& zfs snapshot -r {TREE}@{now}.later" if scenario.intermediates else ""
        self.site.source.run(
            f"""
            PATH=/usr/sbin:$PATH
            zfs list -H -o name -t snapshot -d 1 -S createtxg {TREE} | grep -v @kept | tail -n +3 |
                xargs -r -n 1 zfs destroy -r
            head -c 1200000 /dev/urandom >/{TREE}/big; head -c 300000 /dev/urandom >/{TREE}/www/one
            dd if=/dev/urandom of=/dev/zvol/{TREE}/disk bs=64k count=10 oflag=direct status=none
            zfs snapshot -r {TREE}@{now} {later}
            """
        )
        if scenario.resumes:
            self.interrupt()

    def clear_mirror(self) -> None:
        for machine, root, tag in ((self.site.source, TREE, TAG), (self.site.backup, MIRROR, RECEIVED)):
            machine.run(
                f"""
                for tag in {tag} {FOREIGN if root == MIRROR else ""}; do
                    zfs list -Hp -r -t snapshot -o userrefs,name {root} | grep -v '^0' | cut -f 2 |
                        xargs -r zfs release $tag 2>/dev/null
                done
                """,
                check=False,
            )
        self.site.backup.run(f"zfs destroy -r {MIRROR.rpartition('/')[0]}")

    def tend_mirror(self, scenario: Scenario) -> None:
        """Somebody holds the oldest local snapshot; what lies between it and the newest goes where nothing expires."""
        self.site.backup.run(
            f"""
            PATH=/usr/sbin:$PATH
            set -- $(zfs list -H -o name -t snapshot -d 1 -s createtxg {MIRROR})
            [ $# = 1 ] || zfs hold -r {FOREIGN} $1 2>/dev/null
            [ -n "{"" if scenario.expires else "prune"}" ] || exit 0
            shift; while [ $# -gt 2 ]; do zfs destroy -r $1; shift; done
            """,
            check=False,
        )

    def interrupt(self) -> None:
        """A run that ends midway through its first stream."""
        sending = next(call for call in self.count(INCREMENT) if call.streams)
        cut = Fault(ALL_KILLED, sending, "midway", sending.bytes // 2)
        for number in range(
            MOST_INTERRUPTIONS
        ):  # zfs recv may have been killed before it had looked at its first bytes
            self.arm(cut, seconds=2 * number)
            self.run_disturbed(Scenario("interrupted"))
            self.settle()
            if look(self.site.backup, MIRROR).waiting:
                return
        raise AssertionError("the interrupted runs left nothing to resume")

    def arm(self, fault: Fault, seconds: int = 0) -> None:
        """The fault strikes so many seconds after the moment it is for."""
        deeds = {it.__name__: it for it in (failing, killing, killing_all, killing_sshd, waiting, filling, destroying)}
        plan = f"{fault.call.number} {fault.when} {fault.bytes}"
        self.machine(fault.call.machine).run(
            f"mkdir -p {DIRECTORY} && cd {DIRECTORY} && cat >deed && echo {plan} >plan",
            input=f"sleep {seconds}\n{deeds[fault.kind.deed](fault)}\n",
        )

    def run_disturbed(self, scenario: Scenario) -> tuple[int, str]:
        said = self.site.backup.run(RUN, input=f"{self.job} {shlex.join(scenario.options)}", timeout=600).stdout
        status, _, text = said.partition("\n")
        return int(status), text

    def settle(self) -> bool:
        """Wait until nothing of a disturbed run is left, and put the wrapper to rest. Returns whether it struck."""
        return any("struck\n" in listing for listing in self.both(lambda machine: machine.run(SETTLE).stdout))

    def count(self, scenario: Scenario) -> list[Call]:
        """The calls of an undisturbed run."""
        if scenario.name in self.calls:
            return self.calls[scenario.name]
        self.prepare(scenario)
        before = self.look()
        for machine in (self.site.source, self.site.backup):
            machine.run(f"mkdir -p {DIRECTORY} && echo 0 count 0 >{DIRECTORY}/plan")
        status, said = self.run_disturbed(scenario)
        assert (status, said) == (0, ""), f"the undisturbed run ended with {status}: {said}"
        calls = []
        for machine in (self.site.source, self.site.backup):
            for line in machine.run(COUNTED).stdout.splitlines():
                number, size, _, words = line.split(" ", 3)
                calls.append(Call(machine.name, int(number), words, int(size)))
        self.settle()
        after = self.look()
        wrong = [*check_at_once(before, after, scenario, "", 0), *check_at_last(before, after, scenario, "")]
        assert not wrong, "\n".join(wrong)
        self.properties[scenario.name] = after.local.properties
        self.calls[scenario.name] = calls
        return calls

    # A fault

    def try_all(self, scenario: Scenario, faults: list[Fault]) -> Tally:
        """Inject faults one by one. After one that was not survived everything is made anew."""
        tally = Tally()
        for fault in faults:
            where = f"{self.site.source.release}, {scenario.name}: {fault}"
            tally.points += 1
            began = time.monotonic()
            try:
                wrong = list(self.inject(fault, scenario, tally))
            except (AssertionError, subprocess.SubprocessError, LabError) as error:
                wrong = [f"{type(error).__name__}: {error}"]
            if wrong:
                tally.complaints.append("\n    ".join([where, *wrong]))
                self.recover()
            else:
                tally.survived += 1
            took = time.monotonic() - began
            tally.seconds += took
            verdict = "NOT SURVIVED" if wrong else "survived"
            self.pair.lab.progress(f"{tally.points}/{len(faults)} {verdict} in {took:.0f} s: {where}")
        return tally

    def inject(self, fault: Fault, scenario: Scenario, tally: Tally) -> Iterator[str]:
        """One fault, and what was wrong afterwards."""
        self.prepare(scenario)
        before = self.look()
        fault = self.renamed(fault)
        self.arm(fault)
        status, said = self.drive(fault, scenario) if fault.kind.driven else self.run_disturbed(scenario)
        after = self.look()
        if not self.settle() and not fault.kind.driven:
            yield f"did not strike; the run ended with {status}: {said}"
            return
        tally.injected += 1
        self.injected += 1
        tally.resumable += bool(after.local.waiting)
        wrong = list(check_at_once(before, after, scenario, fault.destroys, status))
        if "Traceback" in said:
            wrong.append("a traceback")
        if fault.kind is POOL_FULL:
            self.site.backup.run("/usr/sbin/zfs set quota=none offsite")
        reruns = self.rerun(scenario)
        last = self.look()
        if reruns[-1] != (0, ""):
            wrong.append(f"I3: re-runs still end with {reruns[-1][0]}")
        wrong += check_at_once(before, last, scenario, fault.destroys, None)
        wrong += check_at_last(before, last, scenario, self.properties[scenario.name])
        if fault.when == "midway" or self.injected % 10 == 0:
            sums = self.both(lambda it: self.site.checksums(it, TREE if it is self.site.source else MIRROR))
            if sums[0] != sums[1]:
                wrong.append(f"checksums differ: {sums}")
        if wrong:
            runs = [f"re-run ended with {number}: {text}" for number, text in reruns]
            yield from (*wrong, f"the disturbed run ended with {status}: {said}", *runs)

    def renamed(self, fault: Fault) -> Fault:
        """The counted run sent the snapshots of its time: the same point of today."""
        if not fault.destroys:
            return fault
        dataset, _, name = fault.destroys.partition("@")
        today = f"{dataset}@c{self.cycle}" + ".later" * name.endswith(".later")
        return replace(fault, destroys=today)

    def rerun(self, scenario: Scenario) -> list[tuple[int, str]]:
        """Plain runs until one is content."""
        ended = []
        for _ in range(MOST_RERUNS):
            done = self.site.backup.run(f"{JOB} {shlex.join(scenario.options)}", check=False, timeout=600)
            ended.append((done.returncode, done.stdout + done.stderr))
            if ended[-1] == (0, ""):
                break
        return ended

    def drive(self, fault: Fault, scenario: Scenario) -> tuple[int | None, str]:
        """A run during which a machine or its cable fails while the call waits. No exit status if the run died too."""
        struck = self.machine(fault.call.machine)
        source, backup = self.site.source, self.site.backup
        options = shlex.join(scenario.options)
        tool = backup.popen(f"{RUN.replace('$(cat)', f'{self.job} {options}')}")
        struck.run(
            f"for i in $(seq 1200); do [ ! -e {DIRECTORY}/struck ] || exit 0; sleep 0.1; done; exit 1", timeout=200
        )
        if fault.kind is BACKUP_POWER:
            backup.power_loss()
            if struck is source:
                source.run(f"touch {DIRECTORY}/released")
            backup.power_on()
            return None, ""
        with accident(fault.kind, source):
            if fault.kind in (CABLE_BRIEFLY, FROZEN_BRIEFLY):
                time.sleep(5)
            elif fault.kind in (CABLE_OUT, FROZEN):
                tool.wait(timeout=300)
        with contextlib.suppress(subprocess.CalledProcessError):
            struck.run(f"mkdir -p {DIRECTORY}; touch {DIRECTORY}/released")
        said, _ = tool.communicate(timeout=300)
        status, _, text = said.partition("\n")
        return int(status), text

    def recover(self) -> None:
        """After a fault that was not survived: all cables in, all machines on, everything made anew."""
        for machine in (self.site.source, self.site.backup):
            with contextlib.suppress(Exception):
                machine.thaw()
                machine.cable(plugged=True)
            machine.power_loss()
            machine.power_on()
        self.renew()


@contextlib.contextmanager
def accident(kind: Kind, source: Machine) -> Iterator[None]:
    """The source, or its cable, fails; afterwards it is back."""
    if kind in (CABLE_OUT, CABLE_BRIEFLY):
        source.cable(plugged=False)
        yield
        source.cable(plugged=True)
    elif kind in (FROZEN, FROZEN_BRIEFLY):
        source.freeze()
        yield
        source.thaw()
    else:
        source.power_loss()
        source.power_on()
        yield
