"""Room for a task that does not fit: when there will be enough, which worker keeps it, and what may run until then. Pure.

EASY backfilling (Lifka 1995; Feitelson and Weil 1998), without a central scheduler: one worker, the one that can free up
soonest, keeps room for the task. Others carry on; it carries on too, with what does not delay the task. Simulated on 8 workers
of 8 CPUs this cuts the worst wait of whole-machine tasks nine times against passing them over, at the same makespan; to let
every worker drain costs a fifth of it (see `benchmarks/policies.py`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from aque.resources import Capacity

#: After so many seconds more, any worker keeps room: the one that should has not.
PATIENCE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Busy:
    """A running task as the forecast sees it; `ends_at` in seconds since 1970, infinite if nobody knows."""

    need: Capacity
    ends_at: float = math.inf


@dataclass(frozen=True, slots=True)
class Forecast:
    """When a task will fit (infinite: nobody knows), and what is free then beside it."""

    at: float
    spare: Capacity


@dataclass(frozen=True, slots=True)
class Hold:
    """The task for which this worker keeps room, and the forecast for it."""

    task_id: int
    priority: int
    forecast: Forecast


@dataclass(frozen=True, slots=True)
class Load:
    """A worker that could run the task: what the task needs there, what is free there, what runs there."""

    worker_id: int
    need: Capacity
    free: Capacity
    running: Sequence[Busy]


def expected_end(started: float, seconds: float, now: float) -> float:
    """When a task that runs since `started` and was expected to take `seconds` (0: unknown) will end; one that is late: now.

    To expect more of it would put the forecast off again and again, and backfill would never stop: simulated with durations
    that are wrong, large tasks then waited as long as without any reservation."""
    return max(now, started + seconds) if seconds > 0 else math.inf


def forecast(need: Capacity, free: Capacity, running: Iterable[Busy], now: float) -> Forecast:
    """When `need` will fit if what runs ends as expected and nothing else starts."""
    if free.lacking(need) is None:
        return Forecast(now, free - need)
    for busy in sorted(running, key=lambda busy: busy.ends_at):
        free = free + busy.need
        if free.lacking(need) is None:
            return Forecast(busy.ends_at, free - need)
    return Forecast(math.inf, Capacity())


def may_fill(need: Capacity, seconds: float, spare: Capacity, at: float, now: float) -> str | None:
    """How a task of lower rank may start beside a hold: "time" if it will have ended by then (`seconds`: its expected length, 0
    if unknown), "room" if it fits beside the held task; None if it could delay that one."""
    if 0 < seconds <= at - now < math.inf:
        return "time"
    return "room" if spare.lacking(need) is None else None


def keeper(loads: Iterable[Load], now: float) -> int | None:
    """The worker that shall keep room: the one that can free up soonest; where nobody knows, who has the most CPUs free."""
    best = min(
        loads,
        key=lambda load: (forecast(load.need, load.free, load.running, now).at, -load.free.cpus, load.worker_id),
        default=None,
    )
    return None if best is None else best.worker_id


def smallest(needs: Iterable[Capacity]) -> dict[str, Fraction | int]:
    """Of each thing that anybody needs, the least that somebody needs."""
    found: dict[str, Fraction | int] = {}
    for need in needs:
        for name, amount in need.amounts():
            if amount > 0:
                found[name] = min(found.get(name, amount), amount)
    return found


def is_overtaken(need: Capacity, free: Capacity, least: Mapping[str, Fraction | int]) -> bool:
    """True if smaller tasks can take, piece by piece, what a task waits for: somebody needs less (`least`: see `smallest`) of
    something of which too little is free. Where all need the same nobody is overtaken, and to keep room would only cost some.
    """
    there = dict(free.amounts())
    return any(amount > there.get(name, 0) and least.get(name, amount) < amount for name, amount in need.amounts())
