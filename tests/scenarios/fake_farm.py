"""A farm under a fake clock, whose workers decide as real ones do: `aque.chooser` and `aque.backfill`, put together as in
`aque.claimer` and `aque.roomkeeper`. Nothing sleeps."""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from aque import backfill, chooser
from aque.backfill import Busy, Hold, Load, expected_end
from aque.chooser import Class, Place
from aque.options import parse_requirement
from aque.resources import Capacity, parse_limits, parse_memory, parse_resources
from aque.values import Pattern, ReadyTask, Requirement
from tests.scenarios import scenario
from tests.scenarios.scenario import Run, Scenario, Task

#: A worker looks so often though no bell rings.
POLL_SECONDS = 1.0


@dataclass(slots=True)
class Worker:
    name: str
    place: Place
    free: Capacity
    running: dict[int, float] = field(default_factory=dict)  #: task -> since when
    keeps: int | None = None  #: the task for which it keeps room

    @classmethod
    def of(cls, given: scenario.Worker) -> "Worker":
        resources = parse_resources(given.resources)
        whole = Capacity(Fraction(str(given.cpus)), parse_memory(given.memory), given.python_slots, 128, resources)
        tags = frozenset(given.tags)
        return cls(given.name, Place(given.host, "linux", frozenset({"celery"}), whole, tags=tags), whole)


class FakeFarm:
    """One run of a scenario."""

    def __init__(self, given: Scenario) -> None:
        self.given = given
        self.now = 0.0
        self.workers = [Worker.of(worker) for worker in given.workers]
        self.tasks = {task.number: task for task in given.tasks}
        kinds = {number: (requirement(task), tuple(sorted(task.cost.items()))) for number, task in self.tasks.items()}
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds.values()), start=1)}
        self.class_of = {number: numbers[kind] for number, kind in kinds.items()}
        self.classes = {number: kind for kind, number in numbers.items()}
        self.ready: dict[int, float] = {}  #: task -> since when
        self.arrived: set[int] = set()
        self.open = Counter(task.name for task in given.tasks)  #: tasks of each name that have not ended
        self.tokens = dict(given.limits)
        self.runs: list[Run] = []

    def run(self) -> list[Run]:
        """All tasks, to the end."""
        # (when, number; then the worker whose task ends, or None for one that arrives; the task, or None for a poll)
        events: list[tuple[float, int, Worker | None, int | None]] = []
        for task in self.given.tasks:
            heapq.heappush(events, (task.arrives, len(events), None, task.number))
        number = len(events)
        for worker in self.workers:
            heapq.heappush(events, (POLL_SECONDS, number := number + 1, worker, None))
        while self.runs_left() and self.now < 100_000:
            self.now = events[0][0]
            while events and events[0][0] == self.now:
                _, _, worker, ended = heapq.heappop(events)
                if worker is None:
                    assert ended is not None
                    self.arrived.add(ended)
                elif ended is not None:
                    self.end(worker, ended)
                else:
                    heapq.heappush(events, (self.now + POLL_SECONDS, number := number + 1, worker, None))
            self.release()
            for worker in self.workers:  # each looks for itself, one after the other
                for started in self.start(worker):
                    end = self.now + started.seconds
                    heapq.heappush(events, (end, number := number + 1, worker, started.number))
                    self.runs.append(Run(started, worker.name, self.now, end))
        assert not self.runs_left(), "some tasks never end"
        return self.runs

    def runs_left(self) -> bool:
        return any(self.open.values())

    def release(self) -> None:
        for task_id in list(self.arrived):
            if not any(self.open[name] for name in self.tasks[task_id].after):
                self.arrived.remove(task_id)
                self.ready[task_id] = self.now

    def end(self, worker: Worker, task_id: int) -> None:
        del worker.running[task_id]
        self.open[self.tasks[task_id].name] -= 1
        worker.free = worker.free + self.need(task_id, worker)
        for name, n in self.limits_of(task_id).items():
            self.tokens[name] += n

    def need(self, task_id: int, worker: Worker) -> Capacity:
        return chooser.need(self.classes[self.class_of[task_id]][0], worker.place)

    def limits_of(self, task_id: int) -> dict[str, int]:
        wanted = parse_limits(self.classes[self.class_of[task_id]][0].limits)
        return {name: n for name, n in wanted.items() if name in self.tokens}

    def start(self, worker: Worker) -> Sequence[Task]:
        """Look, choose, claim."""
        classes: dict[int, Class] = {}
        ready: dict[int, list[ReadyTask]] = {}
        for task_id in self.ready:
            class_id = self.class_of[task_id]
            wanted, cost = self.classes[class_id]
            if chooser.why_never(wanted, worker.place) is None:
                need, limits = chooser.need(wanted, worker.place), self.limits_of(task_id)
                classes[class_id] = Class(need, wanted.user, dict(cost).get(worker.name, 0), limits)
                ready.setdefault(class_id, []).append(self.ready_task(task_id))
        for row in ready.values():
            row.sort(key=chooser.order)

        def choose(hold: Hold | None) -> chooser.Choice:
            usage = self.usage() if self.given.is_fair else None
            return chooser.choose(
                ready, classes, worker.free, 256, now=self.now, tokens=self.tokens, usage=usage, hold=hold
            )

        hold = self.hold(worker)
        choice = choose(hold)
        starving = chooser.starving(
            ready, classes, choice, lambda: [b.need for b in self.busy(worker)], self.now, self.given.reserve_after
        )
        if hold is not None:
            starving = [task for task in starving if task.priority > hold.priority]
        if another := self.consider(worker, starving):
            choice = choose(another)
        started = [self.tasks[task.id] for task in choice.start]
        for task in started:
            del self.ready[task.number]
            worker.running[task.number] = self.now
            worker.free = worker.free - self.need(task.number, worker)
            for name, n in self.limits_of(task.number).items():
                self.tokens[name] -= n
            for other in self.workers:
                other.keeps = None if other.keeps == task.number else other.keeps
        assert not worker.free.is_overdrawn, f"{worker.name} has promised more than it has"
        assert min(self.tokens.values(), default=0) >= 0, "a limit is exceeded"
        return started

    def ready_task(self, task_id: int) -> ReadyTask:
        task = self.tasks[task_id]
        class_id = self.class_of[task_id]
        return ReadyTask(task_id, class_id, task.priority, task.duration, task.name, self.ready[task_id])

    def usage(self) -> dict[str, Fraction]:
        used: dict[str, Fraction] = {}
        for worker in self.workers:
            for task_id in worker.running:
                user = self.classes[self.class_of[task_id]][0].user
                used[user] = used.get(user, Fraction(0)) + self.need(task_id, worker).cpus
        return used

    def busy(self, worker: Worker) -> list[Busy]:
        return [
            Busy(self.need(task_id, worker), expected_end(began, self.tasks[task_id].duration, self.now))
            for task_id, began in worker.running.items()
        ]

    def hold(self, worker: Worker) -> Hold | None:
        if worker.keeps is None:
            return None
        expects = backfill.forecast(self.need(worker.keeps, worker), worker.free, self.busy(worker), self.now)
        return Hold(worker.keeps, self.tasks[worker.keeps].priority, expects)

    def consider(self, worker: Worker, starving: Sequence[ReadyTask]) -> Hold | None:
        kept = {other.keeps for other in self.workers}
        left = [task for task in starving if task.id not in kept]
        if not left:
            return None
        task = left[0]
        wanted = self.classes[task.class_id][0]
        loads = [
            Load(number, self.need(task.id, other), other.free, self.busy(other))
            for number, other in enumerate(self.workers)
            if (other is worker or other.keeps is None) and chooser.why_never(wanted, other.place) is None
        ]
        patience = self.given.reserve_after + backfill.PATIENCE_SECONDS
        if backfill.keeper(loads, self.now) != self.workers.index(worker) and self.now - task.ready_at < patience:
            return None
        worker.keeps = task.id
        return self.hold(worker)


def requirement(task: Task) -> Requirement:
    """What a task of a scenario needs, as it would be submitted."""
    texts = {name: str(value) for name, value in task.needs.items() if name != "user"}
    return Requirement(**{"queue": "celery", "pattern": Pattern.SHELL, **parse_requirement(texts)},
                       user=task.needs.get("user", ""))  # fmt: skip
