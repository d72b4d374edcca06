"""What it costs to record transitions, and how long an event takes from the finish of its task to its handler.

    python -m benchmarks.events [--rounds 5] [--tasks 5000] [--events 300] [--only cost|latency]

Cost: no-ops and the latency of single tasks on one farm whose recording is switched on and off in turns; figures are medians of
the rounds, ratios those of with to without in the same round. Latency: single commands, one after the other; the finish is
what the worker wrote, on the clock of the same machine. Beside `aque.events` the peer on the same farm: Celery's own event
`task-succeeded`, through each broker.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence

from benchmarks.aque_side import AquePostgreSQL, AqueSide, AqueSQLite
from tests.servers import MissingBinary

SIDES: tuple[Callable[[], AqueSide], ...] = (AquePostgreSQL, AqueSQLite)


def cost(rounds: int, tasks: int) -> None:
    """With recording and without, in turns."""
    from aque.farm import farm_of

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


def found_sides() -> Iterator[AqueSide]:
    """Each side that can be started, with the machine to itself."""
    for make in SIDES:
        try:
            side = make()
        except MissingBinary as missing:
            print(f"one side is left out: {missing}", file=sys.stderr)
            continue
        with side:
            yield side


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.events", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=5000)
    parser.add_argument("--events", type=int, default=300)
    parser.add_argument("--only", choices=["cost", "latency"])
    options = parser.parse_args(arguments)
    for name in [name for name in os.environ if name.startswith(("AQUE_", "CELERY_", "PG"))]:
        del os.environ[name]
    os.environ["AQUE_CONFIG"] = os.devnull
    if options.only in (None, "cost"):
        cost(options.rounds, options.tasks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
