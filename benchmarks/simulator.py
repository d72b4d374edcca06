"""A farm under a fake clock: workers that pull from one queue, each deciding by itself what to start. Nothing sleeps.

A worker looks when one of its tasks ends, when tasks arrive (the doorbell), and at polls. What it starts is the business of
a policy (see `benchmarks.farm_policies`); that no worker ever promises more than it has, and that every task runs once, is
asserted here in every run.
"""

import heapq
import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice

from aque.resources import Capacity

#: A worker whose bell was not heard looks so often, in seconds.
POLL_SECONDS = 1.0
#: Ready tasks that a worker looks at, of each kind; as `aque.claimer.MOST`.
LOOK = 256


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Tasks of one `kind` need the same; `expected` is what the policy is told of `seconds`, 0 if nothing."""

    id: int
    kind: str
    need: Capacity
    arrives: float
    seconds: float
    expected: float = 0.0


@dataclass(slots=True)
class Worker:
    """`running` holds since when."""

    number: int
    whole: Capacity
    free: Capacity
    running: dict[Task, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """Where and when a task ran."""

    task: Task
    worker: int
    began: float
    ended: float

    @property
    def wait(self) -> float:
        return self.began - self.task.arrives


Order = Callable[[Task], tuple[float, ...]]


def as_given(task: Task) -> tuple[float, ...]:
    """First come, first served."""
    return task.arrives, task.id


def longest_first(task: Task) -> tuple[float, ...]:
    """By expected duration."""
    return -task.expected, task.id


class Farm:
    """What a policy sees: the workers and what waits. `order` is the order of the queue."""

    def __init__(self, workers: Sequence[Capacity], order: Order) -> None:
        self.workers = [Worker(number, whole, whole) for number, whole in enumerate(workers)]
        self.order = order
        self.waiting: dict[str, list[Task]] = {}

    def in_order(self, passed_over: set[str]) -> Iterator[Task]:
        """What waits, without kinds that are put into `passed_over` meanwhile."""
        rows = [islice(row, LOOK) for kind, row in self.waiting.items() if row and kind not in passed_over]
        for task in merge(*rows, key=self.order):
            if task.kind not in passed_over:
                yield task
            elif all(kind in passed_over for kind, row in self.waiting.items() if row):
                return

    def add(self, task: Task) -> None:
        insort(self.waiting.setdefault(task.kind, []), task, key=self.order)

    def remove(self, task: Task) -> None:
        row = self.waiting[task.kind]
        place = bisect_left(row, self.order(task), key=self.order)
        assert row[place] is task, f"{task} does not wait"
        del row[place]


class Policy:
    """What workers start. It may keep what the farm's common table would keep, such as reservations."""

    def __init__(self, order: Order = as_given) -> None:
        self.order = order

    def start(self, farm: Farm, worker: Worker, now: float) -> Sequence[Task]:
        """Of the waiting tasks, those that `worker` starts now."""
        raise NotImplementedError

    def ended(self, worker: Worker, task: Task) -> None:
        """A task has ended on this worker, which looks next."""


def simulate(
    workers: Sequence[Capacity],
    tasks: Sequence[Task],
    policy: Policy,
    seed: int = 0,
    poll_seconds: float = POLL_SECONDS,
) -> list[Run]:
    """Run all tasks; `seed` decides who hears a bell first, and when in a period a worker polls."""
    chance = random.Random(seed)
    farm = Farm(workers, policy.order)
    runs: list[Run] = []
    # (when, number, worker or None for an arrival, the task that arrives or ends or None for a poll)
    events: list[tuple[float, int, Worker | None, Task | None]] = [
        (task.arrives, number, None, task) for number, task in enumerate(tasks)
    ]
    numbers = iter(range(len(events), 1 << 60))
    events += [(chance.uniform(0, poll_seconds), next(numbers), worker, None) for worker in farm.workers]
    heapq.heapify(events)
    too_late = (
        max(task.arrives for task in tasks) + sum(task.seconds for task in tasks) + (len(tasks) + 9) * poll_seconds
    )
    while len(runs) < len(tasks) or any(worker.running for worker in farm.workers):
        now = events[0][0]
        assert now <= too_late, f"{len(tasks) - len(runs)} tasks never start"
        looking: dict[int, Worker] = {}
        while events and events[0][0] == now:
            _, _, worker, task = heapq.heappop(events)
            if worker is None:
                assert task is not None
                farm.add(task)
                looking = {each.number: each for each in farm.workers}
                continue
            looking[worker.number] = worker
            if task is None:
                heapq.heappush(events, (now + poll_seconds, next(numbers), worker, None))
            else:
                del worker.running[task]
                worker.free = worker.free + task.need
                policy.ended(worker, task)
        for worker in chance.sample(list(looking.values()), len(looking)):
            for task in policy.start(farm, worker, now):
                farm.remove(task)
                assert worker.free.lacking(task.need) is None, f"{task} does not fit worker {worker.number}"
                worker.free = worker.free - task.need
                worker.running[task] = now
                runs.append(Run(task, worker.number, now, now + task.seconds))
                heapq.heappush(events, (now + task.seconds, next(numbers), worker, task))
    check(workers, tasks, runs)
    return runs


def check(workers: Sequence[Capacity], tasks: Sequence[Task], runs: Sequence[Run]) -> None:
    """Every task ran once, not before it arrived, and no worker was ever over its budget; by the record alone."""
    assert sorted(run.task.id for run in runs) == sorted(task.id for task in tasks), "not every task ran once"
    assert all(run.wait >= 0 for run in runs), "a task started before it arrived"
    changes = [(run.ended, 0, run) for run in runs] + [(run.began, 1, run) for run in runs]
    free = dict(enumerate(workers))
    for _, begins, run in sorted(changes, key=lambda change: change[:2]):  # at one moment, ends go first
        need = run.task.need
        free[run.worker] = free[run.worker] - need if begins else free[run.worker] + need
        assert not free[run.worker].is_overdrawn, f"worker {run.worker} was over its budget"


def makespan(runs: Sequence[Run]) -> float:
    """From 0 to the last end."""
    return max(run.ended for run in runs)
