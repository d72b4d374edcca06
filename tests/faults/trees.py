"""What is left of a tree of processes after every way in which an attempt can end, and when the next attempt starts.

    python -m tests.faults.trees                                              # on SQLite
    python -m tests.faults.trees --broker postgresql://postgres@127.0.0.1/test

Each row runs a command or a function that starts five processes: a plain one, one in a session of its own, one without
environment, one that is deaf to SIGTERM, and a daemon that has lost its parents and holds the output. All of them hold a lock
of their attempt, in an open file that each inherits. The next attempt writes down whether that lock was free when it started.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

import aque
from aque import processes
from tests.faults import tree
from tests.servers import wait_until
from tests.worker.farm import LIMIT_SECONDS, SETTINGS, Farm, Worker, processes_named

#: After the grace, for everything to be gone: much more than it takes.
PATIENCE_SECONDS = 10.0
TIME_LIMIT_SECONDS = 1.0
GRACE_SECONDS = float(SETTINGS["kill_grace_seconds"])
WORKER = ("-c", "1")


@dataclass(frozen=True)
class Row:
    """What happened in one row, and what should have."""

    what: str
    kind: str
    survivors: int
    seconds: float  #: until the last process was gone
    state: str
    attempts: int
    expected: tuple[str, int]
    clean: bool | None  #: the next attempt started after the last process was gone; None: there is none

    @property
    def is_right(self) -> bool:
        return self.survivors == 0 and (self.state, self.attempts) == self.expected and self.clean is not False

    def __str__(self) -> str:
        clean = {None: "-", True: "yes", False: "NO"}[self.clean]
        wrong = "" if self.is_right else f"  WRONG: expected {self.expected[0]}, {self.expected[1]} attempts"
        return (
            f"{self.what:<28} {self.kind:<9} {self.survivors:>9} {self.seconds:>8.2f} "
            f"{self.state:<22} {self.attempts:>8} {clean:>10}{wrong}"
        )


HEADER = f"{'what was done':<28} {'task':<9} {'survivors':>9} {'seconds':>8} {'state':<22} {'attempts':>8} {'next clean':>10}"


class Tree:
    """A task with its five processes, found by a word of their command lines: a number of seconds that nobody else sleeps."""

    def __init__(self, directory: Path, kind: str, *, ends: bool = False, **options: object) -> None:
        self.mark = f"9{random.randrange(10**6)}.{random.randrange(1, 10**6)}"
        self.directory = Path(tempfile.mkdtemp(dir=directory))
        self.kind = kind
        words = [str(self.directory), self.mark, "ends" if ends else "stays"]
        if kind == "command":
            self.task = aque.shell(["sh", "-c", tree.COMMAND, "tree", *words], cpus=0.5, **options)
        else:
            self.task = tree.grow.apply_async(words, cpus=0.5, **options)

    def living(self) -> set[int]:
        """The processes of the tree."""
        return {process.pid for process in processes_named(self.mark)}

    def records(self) -> list[list[str]]:
        """Of each attempt: its number, its pid, and how it found the locks of those before."""
        path = self.directory / "started"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def wait_until_it_has_grown(self) -> None:
        wait_until(lambda: self.records() and len(self.living()) >= tree.PROCESSES, LIMIT_SECONDS, "the tree has grown")

    @property
    def pid(self) -> int:
        """Of the shell or the pool child of the first attempt."""
        return int(self.records()[0][1])

    def supervisor(self) -> int:
        return next(above for above, below in processes.children_of_all().items() if self.pid in below)


Act = Callable[[Farm, Tree, Worker], None]


class Trees:
    """Runs rows on one farm."""

    def __init__(self, farm: Farm, directory: Path) -> None:
        self.farm = farm
        self.directory = directory

    def run(
        self, what: str, kind: str, act: Act, expected: tuple[str, int], *, other_worker: bool = False, **given: object
    ) -> Row:
        """Grow a tree on a worker of its own, do `act` to it, and see. `other_worker`: another one is there to go on."""
        worker = self.farm.start_worker(*WORKER, name=f"first{len(self.farm.workers)}", cpus=1)
        grown = Tree(self.directory, kind, **given)  # type: ignore[arg-type]
        grown.wait_until_it_has_grown()
        others = {child.pid for child in worker.pool_children()} if other_worker else set()
        if other_worker:
            self.farm.start_worker(*WORKER, name=f"second{len(self.farm.workers)}", cpus=1)
        first = grown.living() | others
        began = time.monotonic()
        act(self.farm, grown, worker)
        with suppress(AssertionError):
            wait_until(lambda: not left(first), GRACE_SECONDS + PATIENCE_SECONDS)
        seconds = time.monotonic() - began
        row = self.farm.wait_for_state(grown.task, "success", "error", "killed")
        records = grown.records()
        result = Row(
            what,
            kind,
            len(left(first) | grown.living()),
            seconds,
            f"{row['state']} {row['reason'] or ''}".rstrip(),
            row["attempt"],
            expected,
            all(found == "clean" for _, _, found in records[1:]) if len(records) > 1 else None,
        )
        for started in self.farm.workers:
            if started.running():
                started.end()
        return result


def left(pids: set[int]) -> set[int]:
    """Those that live."""
    return {pid for pid in pids if not processes.is_over(pid)}


def kill_worker(farm: Farm, grown: Tree, worker: Worker) -> None:
    worker.deliver(signal.SIGKILL)


def quit_worker(farm: Farm, grown: Tree, worker: Worker) -> None:
    worker.deliver(signal.SIGQUIT)


def kill_supervisor(farm: Farm, grown: Tree, worker: Worker) -> None:
    os.kill(grown.supervisor(), signal.SIGKILL)


def server_of(worker: Worker) -> psutil.Process:
    """Of the supervisors."""
    (server,) = supervisors_below(worker)
    return server


def supervisors_below(worker: Worker) -> list[psutil.Process]:
    """The server; and supervisors that have lost theirs."""
    return [child for child in psutil.Process(worker.pid).children() if child.name() == "aque-superv"]


def kill_server_and_supervisor(farm: Farm, grown: Tree, worker: Worker) -> None:
    """Nobody but the worker is left to end the command."""
    above = psutil.Process(grown.supervisor())
    server_of(worker).kill()
    wait_until(lambda: above.ppid() == worker.pid, LIMIT_SECONDS, "the supervisor has come to the worker")
    above.kill()


def kill_server_and_worker(farm: Farm, grown: Tree, worker: Worker) -> None:
    """The next server knows of the pool."""
    server = server_of(worker)
    old = {server.pid, *(below.pid for below in server.children())}
    server.kill()

    def is_replaced() -> bool:
        return any(p.pid not in old and p.name() == "aque-superv" for p in supervisors_below(worker))

    wait_until(is_replaced, LIMIT_SECONDS, "there is another server")
    worker.deliver(signal.SIGKILL)


def kill_leader(farm: Farm, grown: Tree, worker: Worker) -> None:
    """The shell of a command, or the pool child of a function."""
    os.kill(grown.pid, signal.SIGKILL)


def aque_kill(farm: Farm, grown: Tree, worker: Worker) -> None:
    grown.task.kill()


def let_it_end(farm: Farm, grown: Tree, worker: Worker) -> None:
    (grown.directory / "go").touch()


def nothing(farm: Farm, grown: Tree, worker: Worker) -> None:
    """It runs into its time limit."""


def rows(trees: Trees) -> Iterator[Row]:
    """The whole table."""
    for kind in ("command", "function"):
        yield trees.run("kill -9 of the worker", kind, kill_worker, ("success", 2), other_worker=True)
        yield trees.run("... after the server's", kind, kill_server_and_worker, ("success", 2), other_worker=True)
        if kind == "command":
            yield trees.run("kill -9 of the supervisor", kind, kill_supervisor, ("success", 2))
            yield trees.run("... after its server's", kind, kill_server_and_supervisor, ("success", 2))
            yield trees.run("kill -9 of the shell", kind, kill_leader, ("error signal", 1))
        else:
            yield trees.run("kill -9 of the pool child", kind, kill_leader, ("success", 2))
        yield trees.run(
            f"time limit of {TIME_LIMIT_SECONDS:g} s",
            kind,
            nothing,
            ("error time_limit", 1),
            time_limit=TIME_LIMIT_SECONDS,
        )
        yield trees.run("aque kill", kind, aque_kill, ("killed request", 1))
        yield trees.run("QUIT of the worker", kind, quit_worker, ("success", 2), other_worker=True)
        yield trees.run("it ends by itself", kind, let_it_end, ("success", 1), ends=True)


@contextmanager
def _trees(broker: str | None) -> Iterator[Trees]:
    with tempfile.TemporaryDirectory(prefix="aque-trees-") as name:
        directory = Path(name)
        with Farm(broker or f"sqlite:///{directory / 'aque.db'}", directory) as farm, farm.entered():
            yield Trees(farm, directory)


def main() -> int:
    """Print the table; 0 if nothing survived, and every task ended as it should."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.trees", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--broker", help="an empty store, as AQUE_BROKER names it; else SQLite")
    chosen = parser.parse_args()
    with _trees(chosen.broker) as trees:
        print(HEADER)
        found = []
        for row in rows(trees):
            print(row, flush=True)
            found.append(row)
        findings = trees.farm.findings()
    print(f"doctor: {findings or 'clean'}")
    return 0 if all(row.is_right for row in found) and not findings else 1


if __name__ == "__main__":
    sys.exit(main())
