"""A source that lies: to the real main(), on simulated machines. hostile.py says how, and what must be so."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Callable

import pytest
from hostile import (
    ASIDE,
    LOCAL,
    RECEIVED,
    SOURCE,
    TAG,
    Case,
    Host,
    Liar,
    Site,
    Told,
    first_site,
    fresh,
    grown_site,
    mirrored_site,
    other_line_site,
    picture,
    search,
)
from simulated import Point, Store
from test_state_machine import EXAMPLES

import zfs_replicate as program

if TYPE_CHECKING:
    from collections.abc import Sequence

CHUNKS = 10
CASES = 50 * int(EXAMPLES) if EXAMPLES else 2000
FIRST = random.SystemRandom().randrange(2**40) if EXAMPLES else 0
"""Of the seeds: the same on every run, unless asked to look longer."""


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_hostile_source_by_random_cases(chunk: int) -> None:
    """Tells what has happened, with `pytest -rP`; a case that fails, by its seed, how to see it."""
    sums = search(range(FIRST + chunk, FIRST + CASES, CHUNKS))
    print(f"seeds {FIRST + chunk} to {FIRST + CASES - 1}, each {CHUNKS}th: {sums}")
    assert not sums.wrong, sums.complaint()
    assert sums.runs > CASES / CHUNKS


def test_honest_source_passes_all_that_lies_are_judged_by() -> None:
    """None of what the lies are judged by happens where there are none."""
    for begin in (first_site, mirrored_site, grown_site):
        for words in (("-k", "30"), ("-I", "-k", "1", "--bookmark", "-vv"), ("--quarantine", "--json"), ("--dry-run",)):
            case = Case(fresh(begin), random.Random(0))
            for _ in range(2):
                assert case.run(words).status == 0
            assert case.run(("--doctor",)).status in (0, 1)
            for looking in ("--status", "--check", "--retire"):
                assert case.run((looking,)).status in (0, 2, 3), looking
            assert not case.wrong


# ---------------------------------------------------------------------------------------------------------------------
# Single lies, by name
# ---------------------------------------------------------------------------------------------------------------------


class Lie(Liar):
    """One lie: what an answer becomes."""

    def __init__(self, change: Callable[[tuple[str, ...], str], str]) -> None:
        super().__init__(random.Random(0), 0, 0)
        self.change = change

    def answer(self, command: program.Command, truth: program.Answer) -> program.Answer:
        return program.Answer(truth.status, self.change(command, truth.stdout), truth.stderr)


def told(begin: Callable[[Sequence[str]], Site], change: Callable[[tuple[str, ...], str], str], *words: str) -> Told:
    """A run whose answers from the source are changed; nothing of all that must never be has been."""
    case = Case(fresh(begin), random.Random(0), Lie(change))
    found = case.run(words)
    assert not case.wrong
    return found


def listed(*rows: str) -> Callable[[tuple[str, ...], str], str]:
    """Rows in the lists of datasets and of points, as `name kind guid`."""

    def change(command: tuple[str, ...], text: str) -> str:
        """The list of the points comes behind that of the datasets, in one answer."""
        if not {"list", "-r"} <= {*command}:
            return text
        for row in rows:
            name, kind, guid = row.split(" ")
            if kind != "snapshot":
                text += f"{name}\t{kind}\t{guid}\t1\t1\t-\t-\toff\t-\t-\tlz4\n"
            elif "filesystem,volume" in command:
                text += f"{name}\t{guid}\t99999\n"
            else:
                text += f"{name}\tsnapshot\t{guid}\t99999\t1\t0\t-\t-\t-\t-\t-\n"
        return text

    return change


def guid_here(site: Site, name: str) -> int:
    dataset, _, short = name.partition("@")
    return site.target.datasets[dataset].snapshots[short].guid


@pytest.mark.parametrize("place", ["-yearly", "0", "-gone", "-yearly/www"])
def test_listing_of_a_name_beside_the_tree_is_refused(place: str) -> None:
    guid = guid_here(fresh(mirrored_site), f"{LOCAL}-yearly@e")
    found = told(grown_site, listed(f"{SOURCE}{place} filesystem 1", f"{SOURCE}{place}@d7 snapshot {guid}"), "-k", "1")
    assert found.status == 3
    assert place in found.err


@pytest.mark.parametrize("name", [SOURCE[:-1], "backuppool", "otherpool/x", "", "/", LOCAL])
def test_listing_of_a_name_of_another_tree_is_refused(name: str) -> None:
    assert told(grown_site, listed(f"{name} filesystem 1")).status == 3


@pytest.mark.parametrize(
    "name",
    ["/a\0b", "/a\x1b[2J", "/\udcff", "/a//b", "/a/", "/../home", "/a%b", "/a\rb", "/" + "x" * 300, "/x" * 20_000],
)
def test_listing_of_a_name_that_zfs_cannot_have_is_refused(name: str) -> None:
    found = told(grown_site, listed(f"{SOURCE}{name} filesystem 1"))
    assert found.status == 3
    assert len(found.err) < 4096


@pytest.mark.parametrize("guid", ["abc", "-1", "1.5", "9" * 5000, str(2**64), "\u0661"])
def test_listing_of_a_number_that_zfs_cannot_print_is_refused(guid: str) -> None:
    assert told(grown_site, listed(f"{SOURCE}@n snapshot {guid}")).status == 3


@pytest.mark.parametrize("row", ["/a/b filesystem 1", "/a@s snapshot 1", "@d0 snapshot 1", "/www filesystem 1"])
def test_listing_of_a_row_without_parent_or_twice_is_refused(row: str) -> None:
    assert told(grown_site, listed(SOURCE + row)).status == 3


def test_listing_that_is_empty_is_refused() -> None:
    found = told(grown_site, lambda command, text: "" if "list" in command else text)
    assert found.status == 3


def test_listing_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "OUTPUT_BYTES", 2**14)
    found = told(grown_site, listed(*(f"{SOURCE}@n{number} snapshot {number + 1}" for number in range(1000))))
    assert found.status == 3
    assert "has printed more than" in found.err


def in_a_chain(command: tuple[str, ...], text: str) -> str:
    """A thousand clones, each of the one before."""
    if "-r" not in command:
        return text
    if "filesystem" in command[command.index("-t") + 1]:
        rows = (f"{SOURCE}/c{n}\tfilesystem\t1\t1\t1\t-\t-\toff\t{SOURCE}/c{n - 1}@o\t-\tlz4\n" for n in range(1, 1100))
        return f"{text}{SOURCE}/c0\tfilesystem\t1\t1\t1\t-\t-\toff\t-\t-\tlz4\n{''.join(rows)}"
    return text + "".join(f"{SOURCE}/c{n}@o\t{n + 1}\t{n + 1}\n" for n in range(1100))


def in_a_circle(command: tuple[str, ...], text: str) -> str:
    if "filesystem,volume" not in command:
        return text
    return text.replace("off\t-\t-\tlz4", f"off\t{SOURCE}/www@e\t-\tlz4")


@pytest.mark.parametrize("change", [in_a_chain, in_a_circle])
def test_listing_of_origins_that_lead_nowhere_does_no_harm(change: Callable[[tuple[str, ...], str], str]) -> None:
    assert told(mirrored_site, change, "--dry-run").status in (0, 1, 3)


@pytest.mark.parametrize(
    "row", [f"{LOCAL}/www@d0\t{RECEIVED}", f"{SOURCE}/www@none\t{TAG}", f"{SOURCE}-yearly@d0\t{TAG}"]
)
def test_holds_on_names_that_were_not_asked_for_are_refused(row: str) -> None:
    """None of that answer is believed."""
    change = Lie(lambda command, text: f"{text}{row}\tdate\n" if "holds" in command else text)
    case = Case(fresh(mirrored_site), random.Random(0), change)
    found = case.run(("-k", "1"))
    assert found.status == 1
    assert f"was not asked about: {row.split(maxsplit=1)[0]!r}" in found.err
    assert not case.wrong


# ---------------------------------------------------------------------------------------------------------------------
# Whole stories
# ---------------------------------------------------------------------------------------------------------------------


def test_aside_does_not_expire_once_the_source_has_its_name() -> None:
    site = fresh(grown_site)
    case = Case(site, random.Random(0))
    name = f"/www{ASIDE}2023-11-14-221320"
    site.source.datasets[SOURCE + name] = Store(
        snapshots={
            short: Point(point.guid, site.source.next_txg(), point.creation)
            for short, point in site.target.datasets[LOCAL + name].snapshots.items()
        }
    )
    before = dict(site.target.datasets[LOCAL + name].snapshots)
    case.run(("-k", "1"))
    assert site.target.datasets[LOCAL + name].snapshots == before
    assert not case.wrong


def test_parent_made_for_two_mirrors_is_filled_later() -> None:
    """/www and /disk come to be /new/www and /new/disk; then /new has a snapshot, and it is received without -F."""
    site = fresh(mirrored_site)
    case = Case(site, random.Random(0))
    site.source.create(f"{SOURCE}/new", files=False)
    for key in ("/www", "/disk"):
        site.source.rename_dataset(SOURCE + key, f"{SOURCE}/new{key}")
    assert case.run(()).status == 0
    assert f"{LOCAL}/new/www/logs" in site.target.datasets
    site.source.snapshot(f"{SOURCE}/new@s")
    for _ in range(2):
        told = case.run(())
    assert not case.wrong
    assert told.status == 0
    assert "s" in site.target.datasets[f"{LOCAL}/new"].snapshots


@pytest.mark.parametrize("way", ["--rollback", "--quarantine"])
def test_sender_that_calls_the_mirror_modified_is_not_believed(way: str) -> None:
    """What the source says of our side is not believed."""

    class Teller(Liar):
        def stream(self, segments: list[object], source: Host) -> tuple[str, list[object]]:  # type: ignore[override]
            return "cut", segments

        def words(self) -> str:
            return "cannot receive incremental stream: destination has been modified since most recent snapshot"

    site = fresh(grown_site)
    case = Case(site, random.Random(0), Teller(random.Random(0), 0, 0))
    before = [*site.target.datasets]
    assert case.run((way,)).status == 1
    assert [*site.target.datasets] in (before, [*before, f"{LOCAL}/new"])  # its first receive has begun
    assert not case.wrong


def test_mirror_of_another_line_keeps_its_snapshots() -> None:
    site = fresh(other_line_site)
    case = Case(site, random.Random(0))
    kept = site.target.datasets[f"{LOCAL}/www/logs"]
    before = dict(kept.snapshots)
    for _ in range(2):
        case.run(("-k", "1", "--quarantine"))
    assert kept.snapshots == before
    assert not case.wrong


def test_mirror_that_is_ahead_does_not_expire() -> None:
    site = fresh(grown_site)
    site.target.snapshot(f"{LOCAL}/www@mine")
    www = site.target.datasets[f"{LOCAL}/www"]
    before = {*www.snapshots}
    case = Case(site, random.Random(0))
    assert case.run(("-k", "1")).status == 1
    assert {*www.snapshots} == before
    assert not {*site.target.datasets[f"{LOCAL}/www/logs"].snapshots} >= before - {"mine"}  # as what is in step does
    assert not case.wrong


def lost_and_renamed(key: str, new: str) -> Site:
    """The mirror of a dataset is gone, and the dataset has another name at the source."""
    site = fresh(mirrored_site)
    site.source.rename_dataset(SOURCE + key, SOURCE + new)
    for name in site.target.below(LOCAL + key):
        del site.target.datasets[name]
    return site


def test_aside_does_not_come_back() -> None:
    """Its snapshots, held by this line, are those of a dataset that is missing here."""
    site = lost_and_renamed("/www", "/web")
    name = f"{LOCAL}/www{ASIDE}2023-11-14-221320"
    aside = site.target.datasets[name]
    case = Case(site, random.Random(0))
    for _ in range(2):
        assert case.run(()).status == 0
    assert site.target.datasets[name] is aside
    assert "e" in site.target.datasets[f"{LOCAL}/web"].snapshots
    assert not case.wrong


def test_mirror_of_another_line_is_not_taken_for_a_renamed_one() -> None:
    """Both lines hold it: ours did so once."""
    site = lost_and_renamed("/empty/full", "/full")
    archive = site.target.datasets[f"{LOCAL}/archive"]
    site.target.hold(RECEIVED, f"{LOCAL}/archive@e")
    case = Case(site, random.Random(0))
    for _ in range(2):
        case.run(())
    assert site.target.datasets[f"{LOCAL}/archive"] is archive
    assert "e" in site.target.datasets[f"{LOCAL}/full"].snapshots
    assert not case.wrong


def test_copy_at_the_source_is_not_taken_for_a_renamed_dataset() -> None:
    """It has what both once had in common, and not what was so last."""
    site = fresh(mirrored_site)
    mirror = site.target.datasets[f"{LOCAL}/www"]
    copy = site.source.datasets.pop(f"{SOURCE}/www")
    del copy.snapshots["e"]
    site.source.datasets[f"{SOURCE}/copy"] = copy
    site.source.rename_dataset(f"{SOURCE}/www/logs", f"{SOURCE}/logs")
    case = Case(site, random.Random(0))
    for _ in range(2):
        case.run(())
    assert site.target.datasets[f"{LOCAL}/www"] is mirror
    assert not case.wrong


SELECTED = ((), ("--no-recursive",), ("--exclude", "www/logs"))


@pytest.mark.parametrize("words", SELECTED)
def test_mirror_of_another_line_below_does_not_go_aside(words: tuple[str, ...]) -> None:
    """Below what has nothing in common with its source any more, be it selected or not: /www/logs, below /www."""
    key = "" if "--no-recursive" in words else "/www"
    site = fresh(other_line_site)
    theirs = site.source.datasets[SOURCE + key]
    theirs.snapshots = {"z": Point(site.world.guid(), site.source.next_txg(), site.world.now)}
    before = {name: store for name, store in site.target.datasets.items() if name.startswith(f"{LOCAL}/www")}
    case = Case(site, random.Random(0))
    for looking in (("--dry-run",), ()):
        told = case.run(("--quarantine", "-k", "1", *words, *looking))
        assert told.status == 1
        assert f"{LOCAL}{key} is not renamed" in told.err
    assert all(site.target.datasets.get(name) is store for name, store in before.items())
    assert not case.wrong


@pytest.mark.parametrize("words", SELECTED[::2])
def test_mirror_of_another_line_below_is_not_renamed(words: tuple[str, ...]) -> None:
    """/www is /web at the source by now."""
    site = fresh(other_line_site)
    site.source.rename_dataset(f"{SOURCE}/www", f"{SOURCE}/web")
    logs = site.target.datasets[f"{LOCAL}/www/logs"]
    case = Case(site, random.Random(0))
    for looking in (("--dry-run",), (), ("-j", "3")):
        told = case.run(("-k", "1", *words, *looking))
        assert f"{LOCAL}/www: rename to" not in told.out
        assert site.target.datasets[f"{LOCAL}/www/logs"] is logs
    assert not case.wrong


def pictures(site: Site) -> dict[str, tuple[object, ...]]:
    return {name: picture(it) for host in (site.source, site.target) for name, it in host.datasets.items()}


def production(site: Site) -> Case:
    """The line is run on the wrong host: what is to be mirrored is taken for the mirror."""
    return Case(Site(site.world, site.target, site.source), random.Random(0))


@pytest.mark.parametrize(
    "words", [("-k", "1"), ("-k", "30", "--quarantine"), ("-k", "1", "--rollback", "-I"), ("-k", "1", "-t", "other")]
)
@pytest.mark.parametrize("begin", [mirrored_site, grown_site])
def test_wrong_host_runs_do_nothing(begin: Callable[[Sequence[str]], Site], words: tuple[str, ...]) -> None:
    """But that the runs of the line fail is remembered where it is run."""
    site = fresh(begin)
    before = pictures(site)
    for _ in range(3):
        production(site).run(("-r", LOCAL, "-l", SOURCE, *words))
        site.source.datasets[SOURCE].mark = ""
    assert pictures(site) == before


def test_pool_root_given_by_mistake_is_left_alone() -> None:
    """-l names the pool, with others' data in it: nothing is set on it, and nothing is received there."""
    site = fresh(first_site)
    case = Case(site, random.Random(0))
    told = case.run(("-l", "offsite"))
    assert told.status in (1, 3)
    assert not site.target.datasets["offsite"].readonly
    assert not site.target.datasets["offsite"].snapshots


def test_mirror_of_another_line_is_not_renamed_from_one_level_up() -> None:
    site = fresh(mirrored_site)
    case = Case(site, random.Random(0))
    before = {name: store for name, store in site.target.datasets.items() if name.startswith(LOCAL)}
    case.run(("-r", "backuppool/virt", "-l", "offsite", "-t", "t2"))
    assert all(site.target.datasets.get(name) is store for name, store in before.items())
