"""What it costs to record transitions, and how long an event takes from the finish of its task to its handler.

    python -m benchmarks.events [--rounds 5] [--tasks 5000] [--events 300] [--only cost|statements|latency]

Cost: no-ops and the latency of single tasks on one farm whose recording is switched on and off in turns; figures are medians of
the rounds, ratios those of with to without in the same round. Latency: single tasks, one after the other; the finish is
what the worker wrote, on the clock of the same machine. Beside `aque.events` the peer on the same farm: Celery's own event
`task-succeeded`, through each broker.
"""

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from aque.events import Event, connect, disconnect
from aque.farm import farm_of, settings_of
from benchmarks.aque_side import UNSERVED, AquePostgreSQL, AqueSide, AqueSQLite
from tests.servers import MissingBinary, RabbitMQ, Redis
from tests.store import farm as store_words

SIDES: tuple[Callable[[], AqueSide], ...] = (AquePostgreSQL, AqueSQLite)


def cost(rounds: int, tasks: int) -> None:
    """With recording and without, in turns."""
    singles = max(tasks // 20, 20)
    for side in found_sides():
        store = farm_of(side.app).store
        seconds: dict[bool, list[float]] = {True: [], False: []}
        latencies: dict[bool, list[float]] = {True: [], False: []}
        side.noops(200)
        for number in range(rounds):
            for wanted in (True, False) if number % 2 else (False, True):
                with store.connect() as connection:
                    store.transitions.record(connection, wanted)
                seconds[wanted].append(side.noops(tasks))
                latencies[wanted].append(statistics.median(side.idle_latency(singles)))
        print(side.name)
        for title, found, factor, unit in (
            (f"{tasks:,} no-ops", seconds, 1.0, "s"),
            (f"median of {singles} single tasks", latencies, 1e3, "ms"),
        ):
            ratios = [on / off for on, off in zip(found[True], found[False], strict=True)]
            print(
                f"    {title:32} recorded {statistics.median(found[True]) * factor:7.2f} {unit}  "
                f"not {statistics.median(found[False]) * factor:7.2f} {unit}  "
                f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
            )


def statements(rounds: int) -> None:
    """What the table alone takes, without workers: claim and success of tasks, in batches and one by one. On SQLite also the
    CPU time, which a busy machine does not change."""
    for side in found_sides():
        store = farm_of(side.app).store
        spec = replace(store_words.SPEC, requirement=replace(store_words.COMMAND, queue=UNSERVED))
        worker_id = store_words.worker(store)
        print(f"{side.name}, the table alone")
        for size, batches in ((64, 10), (1, 50)):
            seconds: dict[bool, list[float]] = {True: [], False: []}
            cpu: dict[bool, list[float]] = {True: [], False: []}
            for number in range(2 * rounds):
                wanted = bool(number % 2)
                with store.connect() as connection:
                    store.transitions.record(connection, wanted)
                ids = store_words.ids(store, size * batches)
                store_words.submit(store, [replace(spec, id=i) for i in ids])
                began, used = time.perf_counter(), time.process_time()
                for start in range(0, len(ids), size):
                    store_words.run(store, worker_id, *ids[start : start + size])
                seconds[wanted].append((time.perf_counter() - began) / len(ids))
                cpu[wanted].append((time.process_time() - used) / len(ids))
            ratios = [on / off for on, off in zip(seconds[True], seconds[False], strict=True)]
            print(
                f"    batches of {size:3}: recorded {statistics.median(seconds[True]) * 1e6:8.0f} us a task  "
                f"not {statistics.median(seconds[False]) * 1e6:8.0f}  "
                f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})  "
                f"CPU here {statistics.median(cpu[True]) * 1e6:.0f} and {statistics.median(cpu[False]) * 1e6:.0f} us",
                flush=True,
            )


def found_sides() -> Iterator[AqueSide]:
    """Each side that can be started, with the machine to itself."""
    for make in SIDES:
        with suppress_missing(), make() as side:
            yield side


@contextmanager
def suppress_missing() -> Iterator[None]:
    """What needs a server that is not installed is left out, with a word."""
    try:
        yield
    except MissingBinary as missing:
        print(f"left out: {missing}", file=sys.stderr)


class Arrivals:
    """When the event of each task came, by the clock of this machine."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}
        self._came = threading.Condition()

    def note(self, task_id: str) -> None:
        with self._came:
            self.at[task_id] = time.time()
            self._came.notify_all()

    def wait_for(self, task_id: str, seconds: float) -> bool:
        with self._came:
            return self._came.wait_for(lambda: task_id in self.at, seconds)


@contextmanager
def celery_receiver(app: Any, arrivals: Arrivals) -> Iterator[None]:
    """Celery's own events, as Flower receives them."""
    with app.connection_for_read(settings_of(app).celery_broker_url) as connection:
        receiver = app.events.Receiver(
            connection, handlers={"task-succeeded": lambda event: arrivals.note(event["uuid"])}
        )
        thread = threading.Thread(target=receiver.capture, kwargs={"limit": None, "timeout": None}, daemon=True)
        thread.start()
        try:
            yield
        finally:
            receiver.should_stop = True


def latency(events: int) -> None:
    """From the finish that the table has to the handler, on four brokers."""
    farms: list[tuple[str, Callable[[], AqueSide], Any]] = [
        ("aque+sqlite", AqueSQLite, None),
        ("aque+postgresql", AquePostgreSQL, None),
        ("Redis, PostgreSQL", AquePostgreSQL, Redis),
        ("RabbitMQ, PostgreSQL", AquePostgreSQL, RabbitMQ),
    ]
    for title, make, broker in farms:
        with suppress_missing(), ExitStack() as stack:
            if broker is not None:
                os.environ["AQUE_CELERY_BROKER"] = stack.enter_context(broker()).url
                stack.callback(os.environ.pop, "AQUE_CELERY_BROKER")
            side = make()
            side.worker_options = (*side.worker_options, "-E")
            stack.enter_context(side)
            measure_latency(title, side, events)


def measure_latency(title: str, side: AqueSide, events: int) -> None:
    """One task after the other, each once the events of the one before are there or have had two seconds."""
    ours, peers = Arrivals(), Arrivals()
    finished: dict[str, float] = {}

    def handler(event: Event) -> None:
        finished[str(event.task_id)] = event.at
        ours.note(str(event.task_id))

    noop = side.task("noop")
    connect("task.success", handler, app=side.app)
    with celery_receiver(side.app, peers):
        side.noops(20)
        ids = []
        for _ in range(events):
            handle = noop.delay()
            ids.append(handle.id)
            ours.wait_for(handle.id, 10)
            peers.wait_for(handle.id, 2)
    disconnect("task.success", handler)
    for what, arrivals in (("aque.events", ours), ("Celery's task-succeeded", peers)):
        found = sorted(1e3 * (arrivals.at[i] - finished[i]) for i in ids if i in arrivals.at and i in finished)
        figures = (
            f"p50 {found[len(found) // 2]:7.2f} ms  p99 {found[int(len(found) * 0.99)]:7.2f} ms" if found else "none"
        )
        print(f"{title:22} {what:26} {figures}  of {len(found)}/{len(ids)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.events", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=5000)
    parser.add_argument("--events", type=int, default=300)
    parser.add_argument("--only", choices=["cost", "statements", "latency"])
    options = parser.parse_args(arguments)
    for name in [name for name in os.environ if name.startswith(("AQUE_", "CELERY_", "PG"))]:
        del os.environ[name]
    os.environ["AQUE_CONFIG"] = os.devnull
    if options.only in (None, "latency"):
        latency(options.events)
    if options.only in (None, "statements"):
        statements(4 * options.rounds)
    if options.only in (None, "cost"):
        cost(options.rounds, options.tasks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
