#!/usr/bin/env python3
"""Are the fast tests any good? Plants one bug after another in a copy of the program and runs them on it.

    tests/tools/planted.py           all of them, about half a minute each
    tests/tools/planted.py WORD...   those whose names have one of the words

Prints each bug with the test that caught it first; exits 1 if one was not caught. `tests/run --full` tries them all,
too. That every plant still fits the program is among the fast tests themselves.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from paths import ROOT

PROGRAM = "zfs_replicate.py"


@dataclass(frozen=True)
class Plant:
    """In the function or class `where`, `new` takes the place of `old`. "" is the whole module.

    Both are an expression, or both are statements; a `new` of "" leaves none. Of `if X:` without more, only the
    condition is meant. What counts is what the code says: not its lines, quotes and comments.
    """

    where: str
    old: str
    new: str


BUGS: dict[str, tuple[Plant, ...]] = {
    # Holds
    "hold after the stream": (
        Plant(
            "Executor.prepare",
            "trees = self.hold(trees, {key: steps for key, steps in receives.items() if key not in refused})",
            "",
        ),
        Plant(
            "Run.transfer",
            "executor.send_batch(self.trees, batch)",
            "executor.hold(executor.send_batch(self.trees, batch), {it.key: [it.step] for it in batch})",
        ),
    ),
    "what comes later is not held": (
        Plant(
            "Executor.hold",
            "[it.snapshot.name for it in steps if tag not in (it.snapshot.tags or ())]",
            "[it.snapshot.name for it in steps[:1] if tag not in (it.snapshot.tags or ())]",
        ),
    ),
    "sent without a hold": (Plant("Executor.hold", "READ_ONLY in said", "True"),),
    "expiry though the source is read-only": (Plant("Run.execute", "if self.executor.is_read_only:", "if False:"),),
    "a mirror that waits for its name is set aside": (
        Plant("TreePlan.decide_or_override", "any(key == it for it, _ in self.moved.values())", "False"),
    ),
    "names that cannot be swapped are tried for ever": (
        Plant("TreePlan.is_free_between", "away not in self.given_up", "True"),
        Plant("TreePlan.circle_of_names", "key not in self.given_up", "True"),
        Plant("Executor.change_names", "key in self.given_up", "False"),
    ),
    "what was dropped takes the name of another": (Plant("freed_names", "new in taken or new in coming", "False"),),
    "names in the wrong order": (Plant("freed_names", "names += reversed(chain)", "names += chain"),),
    "what half a listing leaves out is gone": (Plant("all_hold_changes", "if not trees.whole:", "if False:"),),
    "overrides by half a listing": (
        Plant(
            "TreePlan.__init__",
            "policy if trees.whole else replace(policy, rollback=False, quarantine=False)",
            "policy",
        ),
    ),
    "expiry by half a listing": (Plant("Run.execute", "not self.lost and self.trees.whole", "not self.lost"),),
    "what cannot be held leaves a placeholder": (
        Plant(
            "Executor.prepare",
            "{key: steps for key, steps in receives.items() if key not in self.given_up}",
            "receives",
        ),
        Plant("Executor.create_parents", "key not in self.given_up", "True"),
    ),
    "a hold that was refused counts as placed": (Plant("place_holds", "answer.status != 0", "False"),),
    "release before hold": (
        Plant(
            "Holds.move_all",
            "self.refused = []",
            "self.refused = []\n"
            "self.release_old(*source, (it for each in changes.values() for it in each.release_source))",
        ),
    ),
    "release although the new hold could not be placed": (
        Plant("Holds.move_all", "missing.isdisjoint([*it.place_local, *it.place_source])", "True"),
    ),
    "ours here goes before that there": (
        Plant(
            "Holds.move_all",
            "left = self.release_old(*source, (it for key in sure for it in changes[key].release_source))",
            "self.release_old(*target, (it for key in sure for it in changes[key].release_local))\n"
            "left = self.release_old(*source, (it for key in sure for it in changes[key].release_source))",
        ),
    ),
    "ours here goes whatever is left there": (
        Plant("Holds.move_all", "left.isdisjoint(it.name for it in trees.source[key].history)", "True"),
    ),
    "the first one here comes before others go there": (
        Plant(
            "Holds.move_all",
            "any(it.may_be_held_by(target[1]) for it in (mirrors[key].snapshots if key in mirrors else ()))",
            "True",
        ),
    ),
    "holds are asked for from the newest one here on": (
        Plant(
            "holds_to_read",
            "min((times.get(guid, 0) for guid in ours), default=0)",
            "max((times.get(guid, 0) for guid in ours), default=0)",
        ),
    ),
    "holds are asked for of what is newer than nothing": (
        Plant(
            "holds_to_read",
            "min((times.get(guid, 0) for guid in ours), default=0)",
            "min((times.get(guid, 0) for guid in ours), default=2**63)",
        ),
    ),
    "what expires is not asked for": (
        Plant("holds_to_read", "it.createtxg >= since or it.guid in due", "it.createtxg >= since"),
    ),
    "holds in a long history are never asked for": (
        Plant("also_to_read", "turns[now // DAY % len(turns)] if turns else []", "[]"),
    ),
    "leaked hold on the target of a token": (
        Plant(
            "moves",
            "it.guid not in wanted and tag in (it.tags or ())",
            "it is snapshots[0] and it.guid not in wanted and tag in (it.tags or ())",
        ),
    ),
    "target of a token not held": (Plant("hold_changes", "on_source.add(partial.to_guid)", ""),),
    "what the source lost loses its hold here": (
        Plant("hold_changes", "policy.received_tag in (it.tags or ())", "False"),
    ),
    "what a clone took over is released": (
        Plant(
            "hold_changes",
            "{*promoted_clones, *([held.source.guid] if held else ())}",
            "{*([held.source.guid] if held else ())}",
        ),
    ),
    "one tag for both sides": (Plant("Policy.received_tag", "self.tag + RECEIVED", "self.tag"),),
    "older bookmark goes before the new one is there": (
        Plant(
            "Holds.bookmark_commands",
            "[*place, *map(destroy_bookmark, marks.remove)]",
            "[*map(destroy_bookmark, marks.remove), *place]",
        ),
    ),
    "a rename that is not followed lets the base go": (
        Plant("mirrors_of", "trees.target.get(key if old is None else old)", "trees.target.get(key)"),
    ),
    "what is due elsewhere is not looked at again": (
        Plant("Run.update_holds", "may_expire(self.trees.source.get(key), local, self.policy, now)", "False"),
    ),
    "no look at what has changed": (
        Plant(
            "Run.update_holds",
            "self.trees = self.lister.list_again(self.trees, touched, now) or self.lister.list_both(now)",
            "",
        ),
    ),
    "a hold that was lost goes without a word": (
        Plant("Run.execute", "lost_holds(self.trees, self.policy, plan.left_alone)", "()"),
    ),
    "holds of others go without a word": (
        Plant("Run.execute", "holds_of_others(self.trees, self.policy, plan)", "()"),
    ),
    # Whose it is
    "a host mirrored onto itself": (Plant("Run.begin", "guids[0] == guids[1]", "False"),),
    "a line that is run the other way round": (Plant("plan_dataset", "is_reversed(source, local)", "False"),),
    "a line on the wrong host holds there": (Plant("all_hold_changes", "is_ours(source, mirrors.get(key))", "True"),),
    "a hold of anybody's at the source makes it ours": (
        Plant(
            "all_hold_changes",
            "is_ours(source, mirrors.get(key))",
            "(is_ours(source, mirrors.get(key))"
            " or policy.tag in (newest_common(source, mirrors[key]).source.tags or ()))",
        ),
    ),
    "what was here before is taken for ours": (
        Plant("Lister.recognise", "any(sources.get(it) != 'local' for it in ours)", "False"),
    ),
    "what we have made inert is taken for ours": (
        Plant("Lister.recognise", "mark != str(target[key].snapshots[-1].guid)", "True"),
    ),
    "what is in use is made inert": (
        Plant("InertMirror.make_inert", "is_new and is_written(self.host, local.name)", "False"),
    ),
    "what was changed is pulled into": (
        Plant(
            "Executor.prepare",
            "any((local := trees.target.get(key)) and local.changed for key in receives)",
            "False",
        ),
    ),
    "what is rolled back is not made inert": (
        Plant(
            "Executor.change_name",
            "self.local_steps.take(trees, key, step, now, parents)",
            "self.local_steps.take(trees, key, step, now, parents)\n"
            "if isinstance(step, Rollback):\n"
            "    self.inert.own_values.setdefault(key, {})",
        ),
    ),
    "what cannot be made inert is pulled into": (
        Plant("InertMirror.make_inert", "self.refused |= set() if local.held_before else {it.key}", ""),
    ),
    "what others have mounted stays mounted": (Plant("InertMirror.expose_no_more", "if it.is_mounted:", "if False:"),),
    "what is set here goes with the first stream": (
        Plant(
            "InertMirror.expose_no_more",
            "{key: 'none' if key in LIMITS and value in unlimited else value for key, value in own.items()}",
            "{}",
        ),
    ),
    "each attempt asks anew what was held before": (
        Plant("run_with_retries", "it.lister.held_before = held", "it.lister.held_before = None"),
    ),
    "each listing asks anew what was held before": (Plant("Lister.list_target", "self.held_before is None", "True"),),
    "the mirror of another line is pulled into": (Plant("plan_dataset", "others_tags(local, policy)", "False"),),
    "what another line may hold is pulled into": (
        Plant("TreePlan.plan_one", "any(it.tags is None for it in local.snapshots)", "False"),
    ),
    "the mirror of another line expires": (Plant("why_all_kept", "if others_tags(local, policy):", "if False:"),),
    "the mirror of another line is renamed": (Plant("moved_mirrors", "key in fixed", "False"),),
    "the mirror of another line goes aside with its parent": (
        Plant("LocalSteps.check_below", "if others:", "if False:"),
    ),
    "strangers below are no matter": (Plant("check_place", "if local.strangers:", "if False:"),),
    "a child comes below what is no mirror": (
        Plant(
            "TreePlan.plan_one",
            "key and parent in self.elsewhere and not newest_common(source, self.target.get(key))",
            "False",
        ),
    ),
    "names that begin alike are taken for names below": (
        Plant("is_below", "name == root or name.startswith(f'{root}/')", "name.startswith(root)"),
    ),
    "names that begin alike, and no fence": (
        Plant("is_below", "name == root or name.startswith(f'{root}/')", "name.startswith(root)"),
        Plant("FencedHost.check", "outside(command, self.root)", "[]"),
    ),
    # What is believed
    "any error means absent": (Plant("says_absent", "f\"'{name}': dataset does not exist\" in answer.stderr", "True"),),
    "what could not be listed again is absent": (
        Plant(
            "Lister.existing",
            "name not in found and ('/' not in name or not says_absent(answer, name))",
            "name not in found and '/' not in name",
        ),
    ),
    "a pool that is not imported is an empty place": (Plant("Lister.existing", "'/' not in name", "False"),),
    "match by name": (
        Plant(
            "newest_common",
            "{snapshot.guid: snapshot for snapshot in local.snapshots}",
            "{snapshot.short: snapshot for snapshot in local.snapshots}",
        ),
        Plant("newest_common", "point.guid in ours", "point.short in ours"),
        Plant("newest_common", "ours[newest.guid]", "ours[newest.short]"),
    ),
    "forgotten sort": (
        Plant(
            "Dataset.__post_init__",
            "tuple(sorted(getattr(self, field), key=lambda snapshot: snapshot.createtxg))",
            "tuple(getattr(self, field))",
        ),
    ),
    "sort by time": (Plant("Dataset.__post_init__", "snapshot.createtxg", "snapshot.creation"),),
    "numbers are not checked": (Plant("number", "found >= 2**64", "False"),),
    "characters of names are not checked": (Plant("is_name", "bool(form.fullmatch(name))", "True"),),
    "names stripped": (Plant("fields", "line.split('\\t', max(widths))", "[it.strip() for it in line.split('\\t')]"),),
    "datasets are believed without their parents": (
        Plant("whole_tree", "key.rpartition('/')[0] not in tree", "False"),
    ),
    "an empty listing is believed": (Plant("whole_tree", "[root for root in roots if root not in tree]", "[]"),),
    "snapshots are believed without their dataset": (
        Plant("Listing.tree", "self.points.keys() - self.datasets.keys()", "()"),
    ),
    "a row may come twice": (Plant("Listing.take_point", "name in own", "False"),),
    "unread holds count as none": (Plant("Listing.take_point", "NO_TAGS if is_known else None", "NO_TAGS"),),
    "holds of what was not asked for": (Plant("parse_holds", "name not in asked", "False"),),
    "token given up on any error": (
        Plant("parse_token", "'resume token is corrupt' in text", "bits('toguid') is None"),
    ),
    "a mark of any source counts": (
        Plant(
            "",
            "('zfs', 'get', '-H', '-s', 'local', '-o', 'value', FAILING)",
            "('zfs', 'get', '-H', '-o', 'value', FAILING)",
        ),
    ),
    "a mark of tomorrow counts": (Plant("parse_failing", "int(found[1]) <= now + MAX_CLOCK_SKEW", "True"),),
    "a stream that ended has arrived": (
        Plant(
            "Executor.tell_arrived",
            "local.snapshots[-1].guid != end.guid",
            "False",
        ),
    ),
    "what zfs recv says was changed here was": (
        Plant("Executor.judge", "is_written(self.lister.target_host, local.name)", "True"),
    ),
    "a token that is refused for now is given up": (
        Plant("Executor.judge", "not re.search(REFUSED_FOR_NOW, sender_said)", "True"),
    ),
    "a token that never will be accepted is kept": (
        Plant("Executor.judge", "'cannot resume send' in sender_said", "False"),
    ),
    "the sender speaks for the receiver": (
        Plant(
            "Executor.judge",
            "failure.receiver_said if isinstance(failure, StreamFailed) else ''",
            "failure.what",
        ),
    ),
    "a hint from what another host says": (
        Plant("raise_for_status", "hint_for(receiver_said, 'receive')", "hint_for(what, 'receive')"),
    ),
    # The plan
    "plain increments onto a raw mirror": (
        Plant("check_encryption_mode", "is_raw and not policy.raw(source)", "False"),
    ),
    "what was set aside is renamed back": (Plant("moved_mirrors", "ASIDE in key", "False"),),
    "an older common snapshot is enough for a rename": (
        Plant(
            "moved_mirrors",
            "newest_received(local, policy)",
            "local.snapshots[0] if local.snapshots else None",
        ),
    ),
    "what was set aside is as anything else": (
        Plant("strangers_below", "ASIDE in key", "False"),
        Plant("moved_mirrors", "ASIDE in key", "False"),
        Plant("", "(ASIDE, MADE_WAY, BETWEEN_NAMES)", "(MADE_WAY, BETWEEN_NAMES)"),
        Plant("Lister.inspect", "ASIDE not in inner", "True"),
    ),
    "what was set aside is at the source": (
        Plant("", "(ASIDE, MADE_WAY, BETWEEN_NAMES)", "(MADE_WAY, BETWEEN_NAMES)"),
    ),
    "a placeholder of the source is mirrored": (Plant("", "(ASIDE, MADE_WAY, BETWEEN_NAMES)", "(ASIDE,)"),),
    "received over children": (
        Plant("plan_first", "(MakeWay(),) if local is not None and local.parent else ()", "()"),
    ),
    "what makes way is lost from sight": (
        Plant("Lister.list_target", "[*names, *([aside] if may_make_way else [])]", "names"),
    ),
    "a copy in place of a clone": (Plant("plan_first", "origin and (local is None or way)", "False"),),
    "a clone of a late origin comes in full": (
        Plant("TreePlan.add_steps", "source.inherited and source.inherited[-1].guid in self.late", "False"),
    ),
    "stale token resumed for ever": (
        Plant(
            "plan_partial",
            "target and ends_match and partial.raw == policy.raw(source) and not local.changed and not partial.corrupt",
            "target",
        ),
    ),
    "first receive onto data": (Plant("check_place", "not local.empty", "False"),),
    "what may not be empty counts as not empty": (Plant("check_place", "local.empty is None", "False"),),
    "what may not be empty counts as empty": (Plant("Lister.is_empty", "return None", "return True"),),
    "rollback of what others hold": (
        Plant("why_not_rolled_back", "if snapshot.tags - {policy.received_tag}:", "if False:"),
    ),
    "blocked without asking for the way out": (Plant("TreePlan.decide_or_override", "self.policy.rollback", "True"),),
    "an override is taken that does not help": (
        Plant("TreePlan.decide_or_override", "self.target = before\nraise", "steps = ()"),
    ),
    "what is below is planned as if it had not gone aside": (
        Plant("TreePlan.decide_or_override", "not is_below(it, key)", "it != key"),
    ),
    "a dataset that failed gets steps again": (Plant("TreePlan.plan_one", "key not in self.given_up", "True"),),
    "a placeholder in place of a parent that failed": (Plant("missing_parents", "if is_to_come:", "if False:"),),
    # Carrying it out
    "what was in step stays behind when its parent is set aside": (
        Plant(
            "Executor.change_names",
            "self.lister.inspect(replace(self.lister.list_target(), source=trees.source))",
            "self.lister.list_some_again(trees, self.touched)",
        ),
    ),
    "a rename does not wait for the stream before it": (
        Plant(
            "Executor.change_names",
            "coming if isinstance(step, Rename) else coming | moved",
            "set() if isinstance(step, Rename) else coming | moved",
        ),
    ),
    "a stream does not wait for the rename before it": (
        Plant("TreePlan.streams_due", "late.isdisjoint(with_ancestors(key))", "True"),
    ),
    "a child does not wait for its parent": (
        Plant("Executor.has_place", "not is_whole and parent not in coming", "False"),
    ),
    "a child goes into a parent that is half received": (
        Plant("missing_parents", "here.partial", "False"),
        Plant("Executor.has_place", "not is_whole and parent not in coming", "False"),
    ),
    "what is not empty any more is received over": (
        Plant(
            "Executor.prepare",
            "self.lister.list_some_again(trees, [*created, *empty])",
            "self.lister.list_some_again(trees, created)",
        ),
    ),
    "what is blocked goes without a word": (Plant("Run.transfer", "executor.give_up(key, entry)", ""),),
    "a stream without a name": (
        Plant(
            "Executor.next_batch", "name = self.local_name(key) + step.snapshot.short", "name = self.local_name(key)"
        ),
    ),
    "holds come with the stream": (
        Plant(
            "receive",
            "('zfs', 'recv', '-s', '-u', '-h', *force, *options, snapshot)",
            "('zfs', 'recv', '-s', '-u', *force, *options, snapshot)",
        ),
    ),
    "-F onto data": (Plant("receive", "local and local.empty and not local.snapshots and not local.parent", "local"),),
    "-F onto what has just come": (
        Plant(
            "receive",
            "local and local.empty and not local.snapshots and not local.parent",
            "local and local.empty and not local.parent",
        ),
        Plant(
            "after_receives",
            "replace(here, partial=None, empty=False, snapshots=(*here.snapshots, *arrived))",
            "replace(here, partial=None, snapshots=(*here.snapshots, *arrived))",
        ),
    ),
    # Expiry
    "expiry before the holds have moved": (
        Plant(
            "Run.execute",
            "plan = self.transfer(plan, now)",
            "plan = self.transfer(plan, now)\nself.expire(now)",
        ),
    ),
    "the first run of a line expires": (Plant("why_all_kept", "not local.held_before", "False"),),
    "a mirror that is ahead expires": (
        Plant("why_all_kept", "local.snapshots[-1].guid != common.local.guid", "False"),
    ),
    "the origin of a clone expires": (Plant("why_kept", "snapshot.cloned", "False"),),
    "twin at the source forgotten": (Plant("why_kept", "twin and twin.tags and policy.tag in twin.tags", "False"),),
    "newest common snapshot expires": (Plant("why_kept", "snapshot.guid == common.local.guid", "False"),),
    "base of a partial receive expires": (
        Plant(
            "why_kept",
            "local.partial and local.partial.from_guid in (snapshot.guid, None) and local.snapshots",
            "False",
        ),
    ),
    "days counted from now alone": (Plant("expire", "min(now, common.local.creation)", "now"),),
    # Hosts and streams
    "what paramiko trips over is a traceback": (Plant("SshHost.ask", "Exception", "OSError"),),
    "dead link looks like a clean end": (
        Plant(
            "SshHost.exchange",
            "not channel.status_event.wait(CONNECT_SECONDS) or channel.exit_status == -1",
            "not channel.status_event.wait(CONNECT_SECONDS) and channel.exit_status == 1",
        ),
    ),
    "a command prints as much as it likes": (Plant("Output.add", "len(self.kept) > self.most", "False"),),
    "a command complains as much as it likes": (Plant("Tail.add", "len(self.kept) > 2 * self.most", "False"),),
    "patience for each piece of an answer": (
        Plant("drain", "if left <= 0:\n    raise socket.timeout\nchannel.settimeout(left)", ""),
    ),
    "a failed sender is taken for a lost link": (
        Plant("with_hint", "not failure.link_held and not source.connected()", "not source.connected()"),
    ),
    "a failed receiver waits for a silent sender": (
        Plant(
            "Pipeline.check_stall", "self.failed and time.monotonic() - self.stall.moved_at >= LINK_SECONDS", "False"
        ),
    ),
    "a slow receiver is the sender's fault": (
        Plant("Pipeline.check_stall", "self.pipe and unread_bytes(self.pipe)", "False"),
    ),
    "nobody watches the stream": (Plant("Pipeline.check_stall", "few is not None", "False"),),
    "a dribble is a stream": (Plant("StallWatch.too_few", "now - since >= limit", "False"),),
    "what any process reads is movement": (
        Plant(
            "Pipeline.check_stall",
            "sum(sum(stage.io_bytes()) for stage in self.stages()) if given is None else given",
            "sum(sum(stage.io_bytes()) for stage in self.stages())",
        ),
    ),
    "the end of what a stage says is awaited": (
        Plant(
            "Stage.hear",
            "0 if self.errors.closed else unread_bytes(self.errors)",
            "0 if self.errors.closed else 1",
        ),
    ),
    "only the last status counts": (
        Plant(
            "raise_for_status",
            "[(program, status, text) for program, status, text in ended if status != 0]",
            "[(program, status, text) for program, status, text in ended[-1:] if status != 0]",
        ),
    ),
    "a mode that only looks changes something": (Plant("ReadOnly.check", "changed_by(command)", "False"),),
    # Locks
    "the lock is not inherited": (Plant("Pipeline.start", "self.transport.inherit if is_last else ()", "()"),),
    "stuck holder left in peace": (
        Plant("judge_holder", "time.time() - moved >= stall_timeout * LAST_BYTES_FACTOR", "False"),
    ),
    "another job's lock is our own": (Plant("judge_holder", "found.job != job", "False"),),
    "lock of the trees above left alone": (Plant("lock", "*above, own = files", "above, own = [], files[-1]"),),
    "lock file of anybody": (Plant("LockFile.__init__", "if why:", "if False:"),),
    # What is told
    "escapes reach the terminal": (Plant("Report.say", "printable(line).replace('\\n', '\\n    ')", "line"),),
    "all that was said is told": (Plant("excerpt", "head + '...' * is_cut", "printable(text) + '...' * is_cut"),),
    "a date in the future keeps a mirror young": (
        Plant(
            "nagios_result",
            "now - min(it.common.creation, it.received or now, now)",
            "now - it.common.creation",
        ),
    ),
    "a date in the future is no finding": (Plant("nagios_result", "if ahead:", "if False:"),),
}


Part = Union[ast.Module, ast.ClassDef, ast.FunctionDef]


def part_of(program: ast.Module, where: str) -> Part:
    """The function or class of that name."""
    found: Part = program
    for name in filter(None, where.split(".")):
        fits = [it for it in found.body if isinstance(it, (ast.ClassDef, ast.FunctionDef)) and it.name == name]
        assert len(fits) == 1, f"{len(fits)} are called {where}"
        found = fits[0]
    return found


def parsed(*sources: str) -> list[Sequence[ast.AST]]:
    """Each as an expression, if all are; else as statements."""
    bodies = [ast.parse(source).body for source in sources]
    expressions = [body[0].value for body in bodies if len(body) == 1 and isinstance(body[0], ast.Expr)]
    return [[it] for it in expressions] if len(expressions) == len(bodies) else [*bodies]


def places(within: ast.AST, wanted: Sequence[ast.AST]) -> Iterator[tuple[ast.AST, str, int]]:
    """Where these nodes stand side by side: the node they belong to, its field, and from where on if that is a list."""
    dumps = [ast.dump(it) for it in wanted]
    for node in ast.walk(within):
        for field, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            for start in range(len(children) - len(wanted) + 1):
                some = children[start : start + len(wanted)]
                if [*map(type, some)] == [*map(type, wanted)] and [*map(ast.dump, some)] == dumps:
                    yield node, field, start


@contextlib.contextmanager
def planted(program: ast.Module, bug: str) -> Iterator[None]:
    """The program has a bug meanwhile. Each plant of it must fit at exactly one place."""
    with contextlib.ExitStack() as stack:
        for plant in BUGS[bug]:
            is_condition = plant.old.startswith("if ") and plant.old.endswith(":")
            old, new = parsed(*(it[len("if ") : -1] if is_condition else it for it in (plant.old, plant.new)))
            found = [*places(part_of(program, plant.where), old)]
            if is_condition:
                found = [it for it in found if isinstance(it[0], ast.If) and it[1] == "test"]
            assert len(found) == 1, f"{bug}: fits {len(found)} times in {plant.where or 'the module'}: {plant.old}"
            node, field, start = found[0]
            before = getattr(node, field)
            stack.callback(setattr, node, field, before)
            if isinstance(before, list):
                setattr(node, field, [*before[:start], *new, *before[start + len(old) :]] or [ast.Pass()])
            else:
                setattr(node, field, new[0])
        yield


def caught_by(bug: str, workers: int = 2) -> str:
    """The first test that fails; "" if none does. One that does not end fails: its worker is ended, and not all."""
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory, "copy")
        shutil.copytree(ROOT, scratch, ignore=shutil.ignore_patterns(".git"))
        program = ast.parse((ROOT / PROGRAM).read_text(encoding="utf-8"))
        with planted(program, bug):
            (scratch / PROGRAM).write_text(ast.unparse(program) + "\n", encoding="utf-8")
        return first_failure(scratch, workers)


def first_failure(checkout: Path, workers: int) -> str:
    """Of the fast tests, which run as if nobody had called us: pytest may have, and with more examples."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", str(workers), "-m", "not zfs and not network"]
    left_out = ("zfs/*", "unit/test_planted.py", "unit/test_shape.py")  # that last one reads comments
    command += [f"--ignore-glob=tests/{it}" for it in left_out]
    command += ["-o", "faulthandler_timeout=120", "-o", "faulthandler_exit_on_timeout=true"]
    command += ["-o", f"cache_dir={checkout}/.cache"]
    environment = {it: value for it, value in os.environ.items() if not it.startswith(("PYTEST_", "ZFS_REPLICATE_"))}
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, encoding="utf-8", errors="replace", timeout=900
    )
    found = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", done.stdout, re.MULTILINE)
    assert found or done.returncode == 0, done.stdout + done.stderr
    return found[1] if found else ""


def main(words: list[str]) -> int:
    survivors = 0
    bugs = [bug for bug in BUGS if not words or any(word in bug for word in words)]
    for bug in bugs:
        test = caught_by(bug)
        survivors += not test
        print(f"{bug:55} {test or 'NOT CAUGHT'}", flush=True)
    print(f"{len(bugs)} bugs planted, {len(bugs) - survivors} caught")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
