#!/usr/bin/env python3
# ruff: noqa: Q003 -- code within strings
"""Are the fast tests any good? Plants one bug after another in a copy of the program and runs them on it.

    tests/planted.py                 all of them, about ten seconds each
    tests/planted.py WORD...         those whose names have one of the words

Prints each bug with the test that caught it first; exits 1 if one was not caught. That every plant still fits the
program is among the fast tests themselves.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAM = "zfs_replicate.py"

Edits = tuple[tuple[str, str], ...]

BUGS: dict[str, Edits] = {
    "what comes later is not held": (
        ("        return tuple(step.snapshot for step in self.steps if isinstance(step, Receive))\n",
         "        return tuple(step.snapshot for step in self.steps[:1] if isinstance(step, Receive))\n"),
    ),
    "a host mirrored onto itself": (("            if guids[0] == guids[1]:\n", "            if False:\n"),),
    "a failed sender is taken for a lost link": (("    if not failure.link_held and not source.connected():\n", "    if not source.connected():\n"),),
    "holds are asked for from the newest one here on": (
        ("    since = min((times.get(guid, 0) for guid in ours), default=0)\n", "    since = max((times.get(guid, 0) for guid in ours), default=0)\n"),
    ),
    "holds are asked for of what is newer than nothing": (
        ("    since = min((times.get(guid, 0) for guid in ours), default=0)\n", "    since = min((times.get(guid, 0) for guid in ours), default=2**63)\n"),
    ),
    "match by name": (
        ("    ours = {snapshot.guid: snapshot for snapshot in local.snapshots}\n", "    ours = {snapshot.short: snapshot for snapshot in local.snapshots}\n"),
        ("if point.guid in ours]", "if point.short in ours]"),
        ("ours[newest.guid])", "ours[newest.short])"),
    ),
    "any error means absent": (
        ("    return answer.status != 0 and f\"'{name}': dataset does not exist\" in answer.stderr\n", "    return answer.status != 0\n"),
    ),
    "forgotten sort": (
        ("tuple(sorted(getattr(self, field), key=lambda snapshot: snapshot.createtxg))", "tuple(getattr(self, field))"),
    ),
    "sort by time": (("key=lambda snapshot: snapshot.createtxg))", "key=lambda snapshot: snapshot.creation))"),),
    "leaked hold on the target of a token": (
        ("s.guid not in wanted and s.tags and tag in s.tags)", "s is snapshots[0] and s.guid not in wanted and s.tags and tag in s.tags)"),
    ),
    "target of a token not held": (("        on_source.add(local.partial.to_guid)\n", "        pass\n"),),
    "plain increments onto a raw mirror": (("    if is_raw and not policy.raw(source):\n", "    if False:\n"),),
    "the origin of a clone expires": (("    if snapshot.cloned:\n", "    if False:\n"),),
    "what was set aside is renamed back": (("or key in fixed or is_set_aside(key) or", "or key in fixed or"),),
    "an older common snapshot is enough for a rename": (
        ("        held = newest_received(local, policy)\n        if not held or not key",
         "        held = local.snapshots[0] if local.snapshots else None\n        if not held or not key"),
    ),
    "the mirror of another line is renamed": (("or key in fixed or", "or"),),
    "names that begin alike are taken for names below": (
        ("    return name == root or name.startswith(f\"{root}/\")\n", "    return name.startswith(root)\n"),
    ),
    "a stream without a name": (
        ("        name = self.local_name(key) + step.snapshot.short\n", "        name = self.local_name(key)\n"),
    ),
    "holds come with the stream": (("\"-s\", \"-u\", \"-h\", *force", "\"-s\", \"-u\", *force"),),
    "names that begin alike, and no fence": (
        ("    return name == root or name.startswith(f\"{root}/\")\n", "    return name.startswith(root)\n"),
        ("            wrong = outside(command, self.root)\n", "            wrong: list[str] = []\n"),
    ),
    "numbers are not checked": (("    if found >= 2**64:\n", "    if False:\n"),),
    "characters of names are not checked": (("is_short and bool(form.fullmatch(name)) and", "is_short and"),),
    "datasets are believed without their parents": (
        ("    missing += [key.rpartition(\"/\")[0] for key in tree.keys() - {*roots} if key.rpartition(\"/\")[0] not in tree]\n", ""),
    ),
    "snapshots are believed without their dataset": (
        ("        for name in self.points.keys() - self.datasets.keys():\n", "        for name in ():\n"),
    ),
    "a row may come twice": (("        if name in own:\n", "        if False:\n"),),
    "holds of what was not asked for": (
        ("        if name not in asked:\n            raise NotBelieved(f\"zfs printed a hold", "        if False:\n            raise NotBelieved(f\"zfs printed a hold"),
    ),
    "what was set aside is as anything else": (("    return ASIDE in key\n", "    return False\n"),),
    "what was set aside is at the source": (
        ("if not is_passing(key)}", "}"),
    ),
    "the mirror of another line expires": (
        ("    if others_tags(local, policy):\n        return f\"another line holds", "    if False:\n        return f\"another line holds"),
    ),
    "the mirror of another line goes aside with its parent": (
        ("        if others:\n            blocked", "        if False:\n            blocked"),
    ),
    "what paramiko trips over is a traceback": (
        ("        except Exception as error:  # noqa: BLE001 -- paramiko hands on", "        except OSError as error:  # noqa: BLE001 -- paramiko hands on"),
    ),
    "a failed receiver waits for a silent sender": (
        ("        if self.broken and now - self.moved_at >= LINK_SECONDS:\n", "        if False:\n"),
    ),
    "what the source lost loses its hold here": (
        ("        on_local.update(it.guid for it in newer if policy.received_tag in (it.tags or ()))\n", ""),
    ),
    "a placeholder of the source is mirrored": (("is_set_aside(key) or PLACEHOLDER in key\n", "is_set_aside(key)\n"),),
    "a line that is run the other way round": (("and is_reversed(source, local):", "and False:"),),
    "an empty listing is believed": (("    missing = [root for root in roots if root not in tree]\n", "    missing = []\n"),),
    "strangers below are no matter": (("    if local.strangers:\n", "    if False:\n"),),
    "received over children": (("    way = (MakeWay(),) if local is not None and local.parent else ()\n", "    way = ()\n"),),
    "what makes way is lost from sight": (
        ("        asked = [*names, *([aside] if len(aside) <= NAME_LIMIT else [])]\n", "        asked = names\n"),
    ),
    "a copy in place of a clone": (("    if origin and (local is None or way):\n", "    if False:\n"),),
    "unread holds count as none": (("            NO_TAGS if is_known else None,\n", "            NO_TAGS,\n"),),
    "twin at the source forgotten": (
        ("    if twin and twin.tags and policy.tag in twin.tags:\n        return f\"its twin", "    if False:\n        return f\"its twin"),
    ),
    "base of a partial receive expires": (
        ("    if local.partial and local.partial.from_guid in (snapshot.guid, None) and local.snapshots:\n", "    if False:\n"),
    ),
    "stale token resumed for ever": (
        ("    if target and ends_match and partial.raw == policy.raw(source) and not local.changed:\n", "    if target:\n"),
    ),
    "token given up on any error": (
        ("corrupt = \"resume token is corrupt\" in text", "corrupt = bits(\"toguid\") is None"),
    ),
    "-F onto data": (("    force = (\"-F\",) if local and local.empty and not local.parent else ()\n", "    force = (\"-F\",) if local else ()\n"),),
    "first receive onto data": (("    if not local.empty:\n", "    if False:\n"),),
    "one tag for both sides": (("        return self.tag + RECEIVED\n", "        return self.tag\n"),),
    "names stripped": (("        row = line.split(\"\\t\", max(widths))\n", "        row = [it.strip() for it in line.split(\"\\t\")]\n"),),
    "only the last status counts": (("    failed = [(program, status, text) for program, status, text in ended if status != 0]\n", "    failed = [(program, status, text) for program, status, text in ended[-1:] if status != 0]\n"),),
    "dead link looks like a clean end": (("channel.status_event.wait(CONNECT_SECONDS) or channel.exit_status == -1", "channel.status_event.wait(CONNECT_SECONDS) and channel.exit_status == 1"),),
    "rollback of what others hold": (("    elif snapshot.tags - {policy.received_tag}:\n", "    elif False:\n"),),
    "older bookmark goes before the new one is there": (
        ("[*place, *map(destroy_bookmark, marks.remove)]", "[*map(destroy_bookmark, marks.remove), *place]"),
    ),
    "what any process reads is movement": (("for stage in self.stages()) if given is None else given\n", "for stage in self.stages())\n"),),
    "the sender speaks for the receiver": (
        ("        said = failure.receiver_said if isinstance(failure, StreamFailed) else \"\"\n", "        said = failure.what\n"),
    ),
    "a hint from what another host says": (("\"out of space|quota exceeded\", failure.receiver_said)", "\"out of space|quota exceeded\", failure.what)"),),
    "a command prints as much as it likes": (("        if len(self.kept) > self.most:\n            raise", "        if False:\n            raise"),),
    "a command complains as much as it likes": (("        if len(self.kept) > 2 * self.most:", "        if False:"),),
    "patience for each piece of an answer": (
        ("        if left <= 0:\n            raise socket.timeout\n        channel.settimeout(left)\n", ""),
    ),
    "the lock is not inherited": (("                pass_fds=self.transport.inherit if is_last else (),\n", ""),),
    "side by side no child waits for its parent": (("            if self.jobs == 1:\n", "            if True:\n"),),
    "another job's lock is our own": (("    if found.job != job:\n", "    if False:\n"),),
    "lock of the trees above left alone": (("        *above, own = files\n", "        above, own = [], files[-1]\n"),),
    "lock file of anybody": (("        if why:\n            self.close()\n", "        if False:\n            self.close()\n"),),
    "a mark of any source counts": (('"-H", "-s", "local", "-o", "value", FAILING', '"-H", "-o", "value", FAILING'),),
    "escapes reach the terminal": (("        print(paragraph(line), file", "        print(line, file"),),
    "all that was said is told": (("    is_cut = len(text)", "    head, is_cut = printable(text), len(text)"),),
    "a date in the future keeps a mirror young": (("now - min(it.common.creation, it.received or now, now)", "now - it.common.creation"),),
    "a date in the future is no finding": (("    if ahead:\n        what", "    if False:\n        what"),),
}  # fmt: skip


def planted(text: str, bug: str) -> str:
    """The program with a bug. Each edit must fit at exactly one place."""
    for old, new in BUGS[bug]:
        assert text.count(old) == 1, f"{bug}: fits {text.count(old)} times: {old!r}"
        text = text.replace(old, new)
    return text


def caught_by(bug: str, scratch: Path) -> str:
    """The first test that fails; "" if none does."""
    shutil.copytree(ROOT, scratch, ignore=shutil.ignore_patterns(".git"))
    (scratch / PROGRAM).write_text(planted((ROOT / PROGRAM).read_text(encoding="utf-8"), bug), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "-m", "not zfs and not network"]
    command += ["--deselect", "tests/test_planted.py"]
    done = subprocess.run(command, cwd=scratch, capture_output=True, encoding="utf-8", errors="replace", timeout=600)
    found = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", done.stdout, re.MULTILINE)
    assert found or done.returncode == 0, done.stdout + done.stderr
    return found[1] if found else ""


def main(words: list[str]) -> int:
    survivors = 0
    bugs = [bug for bug in BUGS if not words or any(word in bug for word in words)]
    for bug in bugs:
        with tempfile.TemporaryDirectory() as directory:
            test = caught_by(bug, Path(directory, "copy"))
        survivors += not test
        print(f"{bug:55} {test or 'NOT CAUGHT'}", flush=True)
    print(f"{len(bugs)} bugs planted, {len(bugs) - survivors} caught")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
