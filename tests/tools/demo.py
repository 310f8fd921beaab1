"""The story told by tests/demo."""

from __future__ import annotations

import sys
import textwrap
import time

import paths  # noqa: F401, it finds the next two
from lab import Lab, Machine
from site_pair import JOB, MIRROR, TAG, TREE, Pair, Site, held

LINE = f"{JOB} -k 30"
AUTO_SNAPSHOT = "zfs-auto-snapshot --quiet --label=daily --keep=7 -r backuppool/virt"


class Demo:
    """Tells what it does, shows what came of it, and counts what was wrong."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.wrong = 0

    def tell(self, text: str) -> None:
        print(f"\n{bold(text)}")

    def show(self, machine: Machine, command: str, *, status: int = 0) -> str:
        """Run a command as a person would, and print it with what it says."""
        print(f"  {dim(f'root@{machine.name} #')} {command}")
        done = machine.run(command, check=False, timeout=600)
        for line in (done.stdout + done.stderr).splitlines():
            print(f"    {line}")
        if done.returncode != status:
            self.check(f"exit code {done.returncode}", right=False)
        return done.stdout + done.stderr

    def check(self, claim: str, *, right: bool) -> None:
        self.wrong += not right
        print(f"  {green('right') if right else red('WRONG')}  {claim}")

    def run_the_line(self) -> None:
        started = time.monotonic()
        said = self.show(self.site.backup, LINE)
        self.check(f"it says nothing, so cron sends no mail ({time.monotonic() - started:.0f} s)", right=said == "")

    def tree(self) -> None:
        self.tell("A source: machine `source`, pool backuppool, a tree with children and a volume")
        self.site.plant("www", "www/logs", "mail")
        self.show(self.site.source, "zfs list -r -o name,type,used,volsize backuppool")

    def first(self) -> None:
        self.tell("Its snapshots are made by zfs-auto-snapshot, as on any Debian server")
        self.show(self.site.source, AUTO_SNAPSHOT)
        self.show(self.site.source, f"zfs list -H -r -t snapshot -o name {TREE}")
        self.tell(
            "The backup host `backup` has an empty pool offsite. Its crontab line, typed by hand, the first time:"
        )
        self.run_the_line()
        self.tell("All is there, parents too; nothing is mounted, everything is read-only:")
        self.show(self.site.backup, "zfs list -r -o name,type,used,mounted,readonly offsite")

    def second(self) -> None:
        self.tell("Forty days pass; every dataset changes, a new one appears; zfs-auto-snapshot snaps again")
        for machine in (self.site.source, self.site.backup):
            machine.shift_clock(40)
        self.site.source.run(f"zfs create {TREE}/new")
        self.site.write("later", "www", "www/logs", "mail", "new")
        self.show(self.site.source, "date; " + AUTO_SNAPSHOT)
        self.tell("The same line again pulls the difference:")
        self.run_the_line()
        self.tell("And once more finds nothing to do:")
        self.run_the_line()

    def outcome(self) -> None:
        source, backup = self.site.source, self.site.backup
        self.tell("What is mirrored: checksums of every file and of the volume, on both sides")
        theirs, ours = self.site.checksums(source, TREE), self.site.checksums(backup, MIRROR)
        print(textwrap.indent(ours, "    ").rstrip())
        self.check("they agree", right=ours == theirs and "later" in ours)
        self.tell("What is held: on each side the newest snapshot that both know, and no other")
        for machine, tree, tag in ((source, TREE, TAG), (backup, MIRROR, f"{TAG}:received")):
            self.show(machine, f"zfs list -H -r -t snapshot -o name {tree} | xargs zfs holds")
            newest = machine.run(
                f"zfs list -H -o name {tree} -r | while read -r ds; do "
                "zfs list -H -d 1 -t snapshot -o name -s createtxg $ds | tail -n 1; done"
            )
            self.check(f"{tag} is where it belongs", right=held(machine, tree, tag) == set(newest.stdout.split()))
        self.tell("What expired: the first snapshots, over 30 days old, on the backup host alone")
        self.show(source, f"zfs list -r -t snapshot -o name,creation {TREE}")
        self.show(backup, f"zfs list -r -t snapshot -o name,creation {MIRROR}")
        counts = [
            m.run(f"zfs list -H -r -t snapshot -o name {t}").stdout.count("\n")
            for m, t in ((source, TREE), (backup, MIRROR))
        ]
        self.check("the source keeps its 11 snapshots, the mirror has the 6 newest", right=counts == [11, 6])


def bold(text: str) -> str:
    return paint("1", text)


def dim(text: str) -> str:
    return paint("2", text)


def green(text: str) -> str:
    return paint("32", text)


def red(text: str) -> str:
    return paint("31;1", text)


def paint(code: str, text: str) -> str:
    """Colour on a terminal alone."""
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() else text


def main(release: str = "bookworm") -> int:
    with Lab() as lab, Pair(lab, release) as pair:
        demo = Demo(pair.fresh())
        demo.tree()
        demo.first()
        demo.second()
        demo.outcome()
    print(bold("\nAll was right." if not demo.wrong else f"\n{demo.wrong} things were WRONG."))
    return 1 if demo.wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
