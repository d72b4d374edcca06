"""Each broker is away for a while in the middle of work: `python -m tests.faults.brokers [SECONDS] [BROKER...]` prints a table.

Tasks of the table and ordinary ones run before, during and after it; the broker is ended by kill -9 and started again. (The
file of aque+sqlite is no server: it is locked for so long.) What must hold: running tasks go on; with RabbitMQ and Redis tasks
of the table start and finish meanwhile; afterwards ordinary tasks and remote control work again; nothing is lost, and no task
of the table has run twice.
"""

import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aque
from aque.errors import StoreUnreachable
from tests.servers import PostgreSQL, wait_until
from tests.worker import tasks
from tests.worker.brokers import BROKERS, Brokered, Monitor, served

#: How long what comes after an outage may take.
LIMIT = 60.0
REDELIVERED_SECONDS = 30.0
ORDINARY = 10


@dataclass
class Report:
    """What an outage did."""

    broker: str
    meanwhile: int  #: tasks of the table that started and ended while the broker was away
    survived: bool  #: what ran before it ended as it should
    control_seconds: float  #: after it, until remote control answered
    events_again: bool  #: after it a monitor heard the events of a task of the table
    ordinary_seconds: float  #: after it, until all ordinary tasks of before had run
    lost: int  #: tasks of the table that did not run
    #: ordinary ones; Redis may have taken one off its list for a connection that died, and then kombu has it nowhere
    ordinary_lost: int
    twice: int  #: tasks of the table that ran more than once
    ordinary_twice: int  #: ordinary tasks that ran more than once: Celery promises at least once, no more

    def row(self) -> str:
        return (
            f"{self.broker:16}{self.meanwhile:>10}{'yes' if self.survived else 'NO':>10}{self.control_seconds:>10.1f}"
            f"{'yes' if self.events_again else 'NO':>8}"
            f"{self.ordinary_seconds:>10.1f}{self.lost:>6}{self.ordinary_lost:>11}{self.twice:>7}{self.ordinary_twice:>16}"
        )

    HEADER = (
        f"{'broker':16}{'meanwhile':>10}{'survived':>10}{'control s':>10}{'events':>8}{'plain s':>10}{'lost':>6}"
        f"{'plain lost':>11}{'twice':>7}{'plain twice':>16}"
    )


@contextmanager
def away(on: Brokered) -> Iterator[None]:
    """The broker cannot be used inside this block."""
    if on.server is None:
        file = on.farm.bus_url.removeprefix("aque+sqlite:///")
        locked = sqlite3.connect("/" + file.lstrip("/"), isolation_level=None, timeout=30)
        locked.execute("BEGIN EXCLUSIVE")
        try:
            yield
        finally:
            locked.rollback()
            locked.close()
    else:
        on.server.stop("immediate" if isinstance(on.server, PostgreSQL) else "kill")
        try:
            yield
        finally:
            on.server.start()
            on.farm.store.close()  # PostgreSQL: this process's connections are gone, too


def outage(on: Brokered, directory: Path, seconds: float) -> Report:
    """Let the broker be away for so long, while there is work."""
    runs = directory / "runs"
    store_is_away = isinstance(on.server, PostgreSQL)
    gate = directory / "gate"
    long_ones: list[Any] = [
        tasks.started.apply_async((str(directory / "function"), str(gate)), cpus=0.5),
        aque.shell(["sh", "-c", 'until [ -e "$1" ]; do sleep 0.1; done', "sh", str(gate)], cpus=0.5),
    ]
    for task in long_ones:
        on.farm.wait_for_state(task, "running")
    ours = [aque.shell(["sh", "-c", 'echo ours-$0 >> "$1"', str(n), str(runs)], cpus=0.1) for n in range(10)]
    # Some of these are on their way, some with the worker, some run and some are acknowledged when it happens.
    plain = [on.send("note", str(runs), f"plain-{n}", 0.2) for n in range(ORDINARY)]
    meanwhile = 0
    with away(on):
        until = time.monotonic() + seconds
        if store_is_away:
            wait_until(lambda: time.monotonic() > until, seconds + 5)
        while time.monotonic() < until:
            more = [
                aque.shell(["sh", "-c", 'echo more-$0 >> "$1"', f"{meanwhile}", str(runs)], cpus=0.1),
                tasks.echo.delay(1),
            ]
            for task in more:
                task.get(timeout=LIMIT)
            meanwhile += len(more)
    began = time.monotonic()
    client = on.farm.client()
    wait_until(lambda: on.worker.ask(client, "ping"), LIMIT, "remote control answers")
    control_seconds = time.monotonic() - began
    del plain  # their answers may have been on their way to connections that are gone

    def noted() -> Counter[str]:
        with suppress(FileNotFoundError):
            return Counter(runs.read_text().split())
        return Counter()

    def all_noted() -> bool:
        return sum(1 for line in noted() if line.startswith("plain-")) == ORDINARY

    with suppress(AssertionError):
        wait_until(all_noted, REDELIVERED_SECONDS)
    ordinary_seconds = time.monotonic() - began
    for task in ours:
        on.farm.wait_for_state(task, "success")
    gate.touch()
    ends = [on.farm.wait_for_state(task, "success", "error") for task in long_ones]
    assert client.send_task("tests.worker.ordinary.multiply", (2, 3)).get(timeout=LIMIT) == 6

    def submitted() -> Any:
        with suppress(StoreUnreachable):  # PostgreSQL: the connections of who submits here are gone, too
            return tasks.echo.delay(1)

    monitor = Monitor(client)
    # The worker's heartbeat, every 2 s: on Redis who has just begun to listen misses what is published in the next moment.
    wait_until(lambda: monitor.events, LIMIT, "a monitor hears the worker")
    last = wait_until(submitted, LIMIT, "a task is submitted")
    events_again = monitor.wait_for(last, "task-succeeded")[-1] == "task-succeeded"
    monitor.end()
    lines = noted()
    wanted = [f"ours-{n}" for n in range(10)]
    wanted += [f"more-{n}" for n in range(0, meanwhile, 2)]
    plain_again = sum(count - 1 for line, count in lines.items() if line.startswith("plain-"))
    return Report(
        on.name,
        meanwhile,
        all(row["state"] == "success" and row["attempt"] == 1 for row in ends),
        control_seconds,
        events_again,
        ordinary_seconds,
        sum(1 for line in wanted if not lines[line]),
        sum(1 for n in range(ORDINARY) if not lines[f"plain-{n}"]),
        sum(lines.values()) - len(lines) - plain_again,
        plain_again,
    )


def with_broker(name: str, act: Callable[[Brokered, Path], Report], **chosen: Any) -> Report:
    with tempfile.TemporaryDirectory() as base:
        directory = Path(base)
        with served(name, directory, **chosen) as on:
            report = act(on, directory)
            assert on.farm.findings() == []
            return report


def main() -> int:
    words = sys.argv[1:]
    seconds = float(words.pop(0)) if words and words[0].replace(".", "").isdecimal() else 10.0
    reports = [with_broker(name, lambda on, directory: outage(on, directory, seconds)) for name in words or BROKERS]
    print(f"away for {seconds:g} s\n{Report.HEADER}")
    for report in reports:
        print(report.row())
    return any(report.lost or report.twice or not report.survived for report in reports)


if __name__ == "__main__":
    sys.exit(main())
