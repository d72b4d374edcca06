"""`make bench`: Aque on PostgreSQL and on SQLite beside Celery with Redis, then what has no peer; see docs/benchmarks.md."""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from benchmarks.aque_side import AquePostgreSQL, AqueSide, AqueSQLite
from benchmarks.harness import (
    MEASUREMENT_SECONDS,
    MEASURES,
    RESULTS,
    Measure,
    Run,
    Series,
    Side,
    measure_all,
    measure_once,
    time_limit,
)
from benchmarks.peers import CeleryRedis
from tests.servers import MissingBinary

AnySide = TypeVar("AnySide", bound=Side)

#: Without a promise: a program that has many tasks at hand submits them together.
ONE_EACH = Measure("one_each", "no-op tasks, one submission each", 5000, math.inf)

#: Submitted on PostgreSQL: layers of so many tasks, and so many layers; twice as many edges.
GRAPH_WIDTH, GRAPH_LAYERS = 1000, 100
IDLE_SECONDS = 20

#: What `--only` takes beside the names of the measures that have a peer.
ALONE = ("submit_graph", "idle_worker")


class Peer(CeleryRedis):
    """Celery has no other way to submit than one by one."""

    def one_each(self, n: int) -> float:
        return self.noops(n)


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the second table: a value and what is promised of it, or why there is none."""

    title: str
    side: str
    value: float | None = None
    unit: str = ""
    promised: float | None = None
    error: str = ""

    def missed(self) -> str:
        """By how much; empty if kept, or nothing was promised or measured."""
        if self.promised is None or self.value is None or self.value <= self.promised:
            return ""
        over = self.value / self.promised - 1
        return f"MISSED by {over:.1%}: {self.value:.2f} {self.unit}, promised <= {self.promised:g} {self.unit}"

    def line(self) -> str:
        if self.error:
            return f"{self.title:48} {self.side:18} failed: {self.error}"
        promised = "" if self.promised is None else f"  <= {self.promised:g}"
        verdict = "  MISSED" if self.missed() else ""
        return f"{self.title:48} {self.side:18} {self.value:9.2f} {self.unit}{promised}{verdict}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; 1 if something could not be measured. A missed promise is printed, and no failure."""
    names = [*(measure.method for measure in (*MEASURES, ONE_EACH)), *ALONE]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each side does everything (default: 3)")
    parser.add_argument("--scale", type=float, default=1, help="multiply the number of tasks by this (default: 1)")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="start no round that would not end")
    parser.add_argument("--only", action="append", choices=names, help="may be repeated")
    options = parser.parse_args(arguments)
    only = set(options.only or names)

    forget_settings()
    run, one_each = beside_the_peer(only, options)
    figures = [*compared(run, one_each), *alone(only, options.scale)]
    print()
    print("\n".join(figure.line() for figure in figures))
    if missed := missed_promises(run, figures):
        print("\n" + "\n".join(missed))
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}.json"
    result = {**(run.as_json() if run else {}), "figures": [asdict(figure) for figure in figures]}
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {file}")
    return int((run is not None and run.failed()) or any(figure.error for figure in figures))


def forget_settings() -> None:
    """No settings of whoever runs this: not for the client, which is this process, nor for the workers that it starts."""
    for name in [name for name in os.environ if name.startswith(("AQUE_", "CELERY_", "PG"))]:
        del os.environ[name]
    os.environ["AQUE_CONFIG"] = os.devnull  # instead of the file in the home directory


def beside_the_peer(only: set[str], options: argparse.Namespace) -> tuple[Run | None, Run | None]:
    """The measures with a peer, printed; and the one without a promise."""
    measures = [measure for measure in MEASURES if measure.method in only]
    if not measures and ONE_EACH.method not in only:
        return None, None
    deadline = time.monotonic() + options.limit
    with ExitStack() as stack:
        makers: tuple[Callable[[], Side], ...] = (AquePostgreSQL, AqueSQLite, Peer)
        sides = list(entered(stack, makers))
        run = measure_all(
            sides, Peer.name, measures, rounds=options.rounds, scale=options.scale, limit_seconds=options.limit
        )
        if measures:
            print(run.table())
        if ONE_EACH.method not in only:
            return run, None
        size = max(1, round(ONE_EACH.size * options.scale))
        series = {ONE_EACH.method: {side.name: Series() for side in sides}}
        one_each = Run(Peer.name, {ONE_EACH.method: size}, run.machine, run.versions, series)
        for side in sides:
            measure_once(one_each, ONE_EACH, side, max(60, min(MEASUREMENT_SECONDS, deadline - time.monotonic())))
    return run, one_each


def compared(run: Run | None, one_each: Run | None) -> Iterator[Figure]:
    """Ratios to the peer that promise nothing."""
    title = "idle submit -> result, p99 over the peer's"
    latencies = run.series.get("idle_latency", {}) if run else {}
    peer = latencies.get(Peer.name, Series())
    for side, series in latencies.items():
        if side != Peer.name and series.rounds and peer.rounds:
            yield Figure(title, side, series.percentile(99) / peer.percentile(99), "x")
    if one_each is None:
        return
    title = f"{one_each.sizes[ONE_EACH.method]:,} {ONE_EACH.title}"
    for side, series in one_each.series[ONE_EACH.method].items():
        if series.error:
            yield Figure(title, side, error=series.error)
            continue
        yield Figure(title, side, series.median(), "s")
        if side != Peer.name and (ratio := one_each.ratio(ONE_EACH.method, side)):
            yield Figure("  ratio to the peer's", side, ratio[0], "x")


def alone(only: set[str], scale: float) -> Iterator[Figure]:
    """What has no peer, each side with the machine to itself: two workers would share, and so halve, common memory."""
    makers: tuple[Callable[[], AqueSide], ...] = (AquePostgreSQL, AqueSQLite)
    for make in makers:
        wanted = only.intersection(ALONE if make is AquePostgreSQL else ["idle_worker"])
        if not wanted:
            continue
        with ExitStack() as stack:
            for side in entered(stack, (make,)):
                if "idle_worker" in wanted:
                    yield from attempted("idle worker", side, partial(idle_worker, side))
                if "submit_graph" in wanted:
                    layers = max(2, round(GRAPH_LAYERS * scale))
                    yield from attempted("graph submitted", side, partial(submitted_graph, side, layers))


def attempted(title: str, side: AqueSide, measure: Callable[[], list[Figure]]) -> list[Figure]:
    """What `measure` finds, or the reason why it found nothing."""
    try:
        with time_limit(MEASUREMENT_SECONDS):
            return measure()
    except Exception as error:
        return [Figure(title, side.name, error=f"{type(error).__name__}: {error}".splitlines()[0][:200])]


def idle_worker(side: AqueSide) -> list[Figure]:
    idle = side.idle(IDLE_SECONDS)
    return [
        Figure(f"idle worker, {idle.processes} processes: CPU", side.name, idle.cpu_percent, "% of a core", 1.0),
        Figure(f"idle worker, {idle.processes} processes: memory (PSS)", side.name, idle.memory_mib, "MiB", 150.0),
    ]


def submitted_graph(side: AqueSide, layers: int) -> list[Figure]:
    seconds, tasks, edges = side.submit_graph(GRAPH_WIDTH, layers)
    promised = 10.0 if layers == GRAPH_LAYERS else None
    return [Figure(f"{tasks:,} tasks, {edges:,} edges: submit", side.name, seconds, "s", promised)]


def entered(stack: ExitStack, makers: Sequence[Callable[[], AnySide]]) -> Iterator[AnySide]:
    """These sides, started; one whose server is not installed is left out."""
    for make in makers:
        try:
            side = make()
        except MissingBinary as missing:
            print(f"one side is left out: {missing}", file=sys.stderr)
        else:
            stack.enter_context(side)
            yield side


def missed_promises(run: Run | None, figures: Sequence[Figure]) -> list[str]:
    """A sentence for each promise that was not kept."""
    sentences = []
    for measure in MEASURES:
        for side in run.series.get(measure.method, {}) if run else ():
            if side != Peer.name and run is not None and (ratio := run.ratio(measure.method, side)):
                figures = [*figures, Figure(measure.title, side, ratio[0], "x", measure.target)]
    for figure in figures:
        if missed := figure.missed():
            sentences.append(f"{figure.title} ({figure.side}): {missed}")
    return sentences


if __name__ == "__main__":
    sys.exit(main())
