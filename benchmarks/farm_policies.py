"""Policies for a simulated farm: the usual ways to treat a task that does not fit, and Aque's: `aque.chooser` itself."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from aque import backfill, chooser
from aque.backfill import Busy, Forecast, Hold, Load
from aque.claimer import FEWEST, MOST, ROWS
from aque.resources import Capacity
from aque.roomkeeper import LOOK_SECONDS
from aque.scheduler import SMOOTHING
from aque.settings import Settings
from aque.values import ReadyTask
from benchmarks.simulator import Farm, Order, Policy, Task, Worker, as_given, longest_first

#: A time that depends on a task of unknown duration.
UNKNOWN = math.inf


class Skip(Policy):
    """First fit: what does not fit is passed over, and may wait forever."""

    def start(self, farm: Farm, worker: Worker, now: float) -> Sequence[Task]:
        chosen, free, full = [], worker.free, set[str]()
        for task in farm.in_order(full):
            if free.lacking(task.need) is None:
                chosen.append(task)
                free = free - task.need
            else:
                full.add(task.kind)
        return chosen


class HeadOfLine(Policy):
    """Strict: nothing overtakes the first task that fits nowhere yet."""

    def start(self, farm: Farm, worker: Worker, now: float) -> Sequence[Task]:
        chosen, free = [], worker.free
        for task in farm.in_order(set()):
            if free.lacking(task.need) is not None:
                break
            chosen.append(task)
            free = free - task.need
        return chosen


class Drain(Policy):
    """First fit, until a task has waited `after` seconds: then every worker that it does not fit starts nothing else."""

    def __init__(self, after: float, order: Order = as_given) -> None:
        super().__init__(order)
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


class Leased(Policy):
    """First fit; for one task at a time that has waited `after` seconds, the worker that can free up soonest reserves.

    That worker starts what does not delay the reserved task (EASY backfill), or nothing else without `backfill`; the others go
    on, and take the task over if it fits them first.
    """

    def __init__(self, after: float, backfill: bool, order: Order = as_given) -> None:
        super().__init__(order)
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


class Aque(Policy):
    """What a worker of Aque does: `aque.chooser` and `aque.backfill`, put together as in `aque.claimer` and `aque.roomkeeper`.

    `cost` gives what the files of a kind of tasks cost on a worker (its number). With `learns`, a worker takes its own past
    runs for the durations of tasks of which it was told none.
    """

    def __init__(
        self,
        after: float = Settings().reserve_after_seconds,
        *,
        learns: bool = False,
        cost: Callable[[int, str], int] = lambda worker, kind: 0,
    ) -> None:
        super().__init__(longest_first)
        self.after = after
        self.learns = learns
        self.cost = cost
        self.ready: dict[Task, ReadyTask] = {}
        self.tasks: dict[int, Task] = {}
        self.kinds: dict[str, int] = {}
        self.kept: dict[int, Task] = {}  #: for which each worker keeps room
        self.looked_at: dict[int, float] = {}
        self.measured: dict[tuple[int, str], float] = {}

    def start(self, farm: Farm, worker: Worker, now: float) -> Sequence[Task]:
        classes: dict[int, chooser.Class] = {}
        ready: dict[int, list[ReadyTask]] = {}
        cut: set[int] = set()  # what is left out is seen at the next look, which is not at once as it is there
        window = min(max(ROWS // max(sum(map(bool, farm.waiting.values())), 1), FEWEST), MOST)
        for kind, row in farm.waiting.items():
            if row and worker.whole.lacking(row[0].need) is None:
                number = self.kinds.setdefault(kind, len(self.kinds))
                classes[number] = chooser.Class(row[0].need, cost=self.cost(worker.number, kind))
                ready[number] = [self._ready(task) for task in row[:window]]
                cut.update([number] if len(row) >= window else [])

        def choose(hold: Hold | None) -> chooser.Choice:
            return chooser.choose(
                ready,
                classes,
                worker.free,
                MOST,
                now=now,
                hold=hold,
                seconds=lambda name: self._seconds(worker, name),
                cut=cut,
            )

        hold = self._hold(worker, now)
        choice = choose(hold)
        if choice.blocked and now - self.looked_at.get(worker.number, -UNKNOWN) >= LOOK_SECONDS:
            running = [task.need for task in worker.running]
            starving = chooser.starving(ready, classes, choice, lambda: running, now, self.after)
            if hold is not None:
                starving = [task for task in starving if task.priority > hold.priority]
            if another := self._consider(farm, worker, starving, now):
                choice = choose(another)
        started = [self.tasks[task.id] for task in choice.start]
        for number, task in list(self.kept.items()):  # a reservation is in force while its task waits
            if task in started:
                del self.kept[number]
        return started

    def ended(self, worker: Worker, task: Task) -> None:
        before = self.measured.get((worker.number, task.kind), task.seconds)
        self.measured[worker.number, task.kind] = before + SMOOTHING * (task.seconds - before)

    def _ready(self, task: Task) -> ReadyTask:
        if task not in self.ready:
            kind = self.kinds[task.kind]
            self.ready[task] = ReadyTask(task.id, kind, 0, task.expected, task.kind, ready_at=task.arrives)
            self.tasks[task.id] = task
        return self.ready[task]

    def _seconds(self, worker: Worker, name: str) -> float | None:
        return self.measured.get((worker.number, name)) if self.learns else None

    def _busy(self, worker: Worker, now: float, as_known_to: Worker) -> list[Busy]:
        """What runs on a worker. The table tells others what was told of it, and not what the worker has measured."""
        busy = []
        for task, began in worker.running.items():
            measured = self._seconds(worker, task.kind) if worker is as_known_to else None
            busy.append(Busy(task.need, backfill.expected_end(began, task.expected or measured or 0.0, now)))
        return busy

    def _forecast(self, worker: Worker, need: Capacity, now: float) -> Forecast:
        return backfill.forecast(need, worker.free, self._busy(worker, now, worker), now)

    def _hold(self, worker: Worker, now: float) -> Hold | None:
        task = self.kept.get(worker.number)
        return None if task is None else Hold(task.id, 0, self._forecast(worker, task.need, now))

    def _consider(self, farm: Farm, worker: Worker, starving: Sequence[ReadyTask], now: float) -> Hold | None:
        if not starving:
            return None
        self.looked_at[worker.number] = now
        left = [self.tasks[task.id] for task in starving if self.tasks[task.id] not in self.kept.values()]
        if not left:
            return None
        task = left[0]
        loads = [
            Load(each.number, task.need, each.free, self._busy(each, now, worker))
            for each in farm.workers
            if each.whole.lacking(task.need) is None and (each is worker or each.number not in self.kept)
        ]
        is_patient = now - task.arrives < self.after + backfill.PATIENCE_SECONDS
        if backfill.keeper(loads, now) != worker.number and is_patient:
            return None
        self.kept[worker.number] = task
        return Hold(task.id, 0, self._forecast(worker, task.need, now))
