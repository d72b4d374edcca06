"""`python -m benchmarks.policies`: ways to keep big tasks from starving, compared on a simulated farm; see docs/benchmarks.md.

Aque's own row runs `aque.chooser` itself.
"""

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from fractions import Fraction
from typing import Literal

from aque.resources import Capacity
from benchmarks.harness import RESULTS
from benchmarks.simulator import Farm, Order, Policy, Run, Task, Worker, as_given, longest_first, makespan, simulate

#: A time that depends on a task of unknown duration.
UNKNOWN = math.inf



class Skip:
    """First fit: what does not fit is passed over, and may wait forever."""

    def __init__(self, order: Order = as_given) -> None:
        self.order = order

    def start(self, farm: Farm, worker: Worker, now: float) -> Sequence[Task]:
        chosen, free, full = [], worker.free, set[str]()
        for task in farm.in_order(full):
            if free.lacking(task.need) is None:
                chosen.append(task)
                free = free - task.need
            else:
                full.add(task.kind)
        return chosen


class HeadOfLine:
    """Strict: nothing overtakes the first task that fits nowhere yet."""

    def __init__(self, order: Order = as_given) -> None:
        self.order = order

    def start(self, farm: Farm, worker: Worker, now: float) -> Sequence[Task]:
        chosen, free = [], worker.free
        for task in farm.in_order(set()):
            if free.lacking(task.need) is not None:
                break
            chosen.append(task)
            free = free - task.need
        return chosen


class Drain:
    """First fit, until a task has waited `after` seconds: then every worker that it does not fit starts nothing else."""

    def __init__(self, after: float, order: Order = as_given) -> None:
        self.order = order
        self.after = after

    def start(self, farm: Farm, worker: Worker, now: float) -> Sequence[Task]:
        chosen, free, full = [], worker.free, set[str]()
        for task in farm.in_order(full):
            if free.lacking(task.need) is None:
                chosen.append(task)
                free = free - task.need
            elif now - task.arrives >= self.after and worker.whole.lacking(task.need) is None:
                break
            else:
                full.add(task.kind)
        return chosen


class Leased:
    """First fit; for one task at a time that has waited `after` seconds, the worker that can free up soonest reserves.

    That worker starts what does not delay the reserved task (EASY backfill), or nothing else without `backfill`; the others go
    on, and take the task over if it fits them first.
    """

    def __init__(self, after: float, backfill: bool, order: Order = as_given) -> None:
        self.order = order
        self.after = after
        self.backfill = backfill
        self.lease: tuple[Task, Worker] | None = None

    def start(self, farm: Farm, worker: Worker, now: float) -> Sequence[Task]:
        chosen, free, full = [], worker.free, set[str]()
        due, spare = UNKNOWN, None  # None: this worker holds no reservation
        if self.lease is not None:
            reserved = self.lease[0]
            if free.lacking(reserved.need) is None:
                self.lease = None
                chosen.append(reserved)
                free = free - reserved.need
            elif self.lease[1] is worker:
                due, spare = shadow(worker, reserved.need, now)
        for task in farm.in_order(full):
            if task in chosen:
                continue
            if free.lacking(task.need) is not None:
                if spare is None and self._may_reserve(farm, worker, task, chosen, now):
                    self.lease = task, worker
                    due, spare = shadow(worker, task.need, now, chosen)
                full.add(task.kind)
                continue
            if spare is not None:
                if not self.backfill:
                    break
                if not task.expected or now + task.expected > due or due == UNKNOWN:
                    if spare.lacking(task.need) is not None:
                        continue
                    spare = spare - task.need
            chosen.append(task)
            free = free - task.need
        return chosen

    def _may_reserve(self, farm: Farm, worker: Worker, task: Task, chosen: Sequence[Task], now: float) -> bool:
        if self.lease is not None or now - task.arrives < self.after:
            return False

        def soonest(each: Worker) -> tuple[float, Fraction, int]:
            due, _ = shadow(each, task.need, now, chosen if each is worker else ())
            return due, -each.free.cpus, each.number

        able = [each for each in farm.workers if each.whole.lacking(task.need) is None]
        return min(able, key=soonest, default=None) is worker


def shadow(worker: Worker, need: Capacity, now: float, starting: Sequence[Task] = ()) -> tuple[float, Capacity]:
    """When `need` will fit, infinity if that depends on a task of unknown duration, and what is free beside it then."""
    free = worker.free
    running = dict(worker.running)
    for task in starting:
        free = free - task.need
        running[task] = now
    ends = sorted(
        ((began + task.expected if task.expected else UNKNOWN, task.id, task) for task, began in running.items())
    )
    due = now
    for end, _, task in ends:
        if free.lacking(need) is None:
            break
        if end == UNKNOWN:
            return end, (free - need).without_debts()
        due = max(due, end)
        free = free + task.need
    return due, free - need


# -- workloads --------------------------------------------------------------------------------------------------------

#: What a policy is told of durations: the truth, the truth times a lognormal(1) factor, or nothing.
Hints = Literal["known", "noisy", "unknown"]

WORKERS, CPUS = 8, 8
STREAM_SECONDS = 200.0
BIG_TASKS, BIG_SECONDS, SMALL_SECONDS = 20, 6.0, 4.0


def stream(load: float, seed: int) -> list[Task]:
    """1-CPU tasks that arrive by chance and take `load` of the farm, and among them tasks of a whole worker."""
    chance = random.Random(f"stream {load} {seed}")
    one, whole = Capacity(Fraction(1)), Capacity(Fraction(CPUS))
    arrivals = [(chance.uniform(0, STREAM_SECONDS), "big", whole, BIG_SECONDS) for _ in range(BIG_TASKS)]
    now = 0.0
    while (now := now + chance.expovariate(load * WORKERS * CPUS / SMALL_SECONDS)) < STREAM_SECONDS:
        arrivals.append((now, "small", one, chance.expovariate(1 / SMALL_SECONDS)))
    arrivals.sort(key=lambda arrival: arrival[0])
    return [Task(number, kind, need, now, seconds) for number, (now, kind, need, seconds) in enumerate(arrivals, 1)]


def told(tasks: Sequence[Task], hints: Hints, seed: int) -> list[Task]:
    """The tasks with what the policy is told of their durations."""
    chance = random.Random(f"hints {seed}")
    if hints == "known":
        return [replace(task, expected=task.seconds) for task in tasks]
    if hints == "noisy":
        return [replace(task, expected=task.seconds * chance.lognormvariate(0, 1)) for task in tasks]
    return list(tasks)
