"""What a claim costs in a large table: 1,000,000 ready tasks in 200 requirement classes, on SQLite and PostgreSQL.

    python -m benchmarks.claims [--rows 1000000] [--classes 200] [--rounds 50]

Measured are the parts of one look of a worker with 8 CPUs, as its scheduler does them: `candidates` (one statement), `choose`
(pure), `claim` (one transaction of as many tasks as fit); once with all classes fitting, and once with all but one too large
for the worker, whose tasks stand before the others in the order. The peer is the plain query without classes: the first 64 rows
by priority whose `cpus` are at most what is free, from the same table.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from aque import chooser
from aque.chooser import Place
from aque.claimer import MOST, Claimer
from aque.classes import Classes
from aque.mounts import Mounts
from aque.resources import Capacity
from aque.settings import Settings, load
from aque.states import State
from aque.store import Store, open_store, schema
from aque.store.engine import open_engine
from aque.values import Pattern, Requirement, TaskSpec, WorkerInfo
from tests.servers import MissingBinary, PostgreSQL

WHOLE = Capacity(Fraction(8), 1 << 36, 8, 128)
FREE = Capacity(Fraction(1, 2), 1 << 36, 8, 128)
PLACE = Place("here", "linux", frozenset({"celery"}), WHOLE)


def requirements(count: int, fitting: int) -> list[Requirement]:
    """`fitting` that the worker can run, each with other memory; the others want more CPUs than it has."""
    return [
        Requirement("celery", Pattern.SHELL, "0.0625" if n < fitting else "64", memory_bytes=n << 20)
        for n in range(count)
    ]


def fill(store: Store, rows: int, kinds: list[Requirement]) -> None:
    """Ready tasks, spread over the classes; those of classes that do not fit have the higher priority."""
    specs = [TaskSpec(0, "frame", r, priority=int(r.cpus == "64"), argv=(b"true",)) for r in kinds]
    with store.connect() as connection:
        store.intern(connection, specs)
    for start in range(0, rows, 50_000):
        with store.begin() as connection:
            ids = store.reserve_ids(connection, min(50_000, rows - start))
            store.submit(connection, [replace(specs[i % len(specs)], id=i) for i in ids])
    with store.connect() as connection:
        connection.exec_driver_sql("ANALYZE")


def worker(store: Store) -> int:
    with store.begin() as connection:
        (worker_id,) = store.reserve_ids(connection, 1)
        info = WorkerInfo(
            worker_id, "w", "here", 1, 0.0, "boot", "8", 1 << 36, 8, 128, ("celery",), "linux", "0", 3600.0, "", False, ""
        )  # fmt: skip
        store.register(connection, info)
    return worker_id


def milliseconds(work: Callable[[], Any], rounds: int) -> float:
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        found.append(1000 * (time.perf_counter() - began))
    return statistics.median(found)


def plain(connection: Any) -> Any:
    """The same question without classes."""
    query = sa.text(
        "SELECT t.id FROM aque_task t JOIN aque_requirement r ON r.id = t.requirement_id WHERE t.state = 'ready' AND "
        "r.cpus <> '64' ORDER BY t.rank DESC, t.duration DESC, t.id LIMIT 64"
    )
    return connection.execute(query).all()


def measure(store: Store, settings: Settings, rounds: int) -> dict[str, float]:
    """Median milliseconds of each part."""
    worker_id = worker(store)
    classes = Classes(store, settings, PLACE, Mounts(PLACE.host, lambda: None))
    claimer = Claimer(store, settings, classes, lambda name: None)
    token = iter(range(1, 1 << 30))
    with store.connect() as connection:
        claimer.look(connection, worker_id, FREE, list, 0)  # from now on it knows the classes

        def look() -> Any:
            return claimer.look(connection, worker_id, FREE, list, 0)

        def claim() -> None:
            with store.begin() as own:
                taken = claimer.claim(own, look().start, worker_id, next(token), State.RUNNING)
                assert len(taken) == 8, len(taken)

        unfit = classes.unfit
        found = store.candidates(connection, unfit, claimer._window)
        known = {i: chooser.Class(classes.need(i)) for i in found}
        return {
            "candidates": milliseconds(lambda: store.candidates(connection, unfit, claimer._window), rounds),
            "choose": milliseconds(lambda: chooser.choose(found, known, FREE, MOST), rounds),
            "whole look": milliseconds(look, rounds),
            "look and claim of 8": milliseconds(claim, rounds),
            "plain query": milliseconds(lambda: plain(connection), max(rounds // 10, 3)),
        }


@contextmanager
def stores() -> Iterator[Iterator[tuple[str, str]]]:
    """URLs of new databases, by the kind of database."""
    with tempfile.TemporaryDirectory() as directory:

        def each() -> Iterator[tuple[str, str]]:
            for n in (1, 2):
                yield "SQLite", f"sqlite:///{Path(directory) / f'aque{n}.db'}"
            try:
                server = PostgreSQL()
            except MissingBinary as missing:
                print(missing)
                return
            with server:
                for _ in (1, 2):
                    with server.database() as url:
                        yield "PostgreSQL", url

        yield each()


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=50)
    chosen = parser.parse_args()
    turn: dict[str, int] = {}
    with stores() as urls:
        for kind, url in urls:
            fitting = chosen.classes if turn.setdefault(kind, 0) == 0 else 1
            turn[kind] += 1
            settings = load({"AQUE_BROKER": url})
            engine = open_engine(settings.store_url)
            schema.upgrade(engine)
            engine.dispose()
            store = open_store(settings)
            began = time.perf_counter()
            fill(store, chosen.rows, requirements(chosen.classes, fitting))
            print(
                f"{kind}: {chosen.rows} ready tasks, {chosen.classes} classes of which {fitting} fit "
                f"(submitted in {time.perf_counter() - began:.0f} s)"
            )
            for part, value in measure(store, settings, chosen.rounds).items():
                print(f"    {part:22}{value:10.2f} ms")
            store.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
