"""claim: look at what is ready, choose what fits here, take it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aque import chooser
from aque.backoff import NOTHING_AVOIDED
from aque.chooser import Place
from aque.resources import Capacity
from aque.states import State
from aque.store import Store
from aque.values import ClaimedTask, ReadyTask, Requirement

#: Ready tasks looked at per requirement class and round.
LOOK = 256


@dataclass(frozen=True, slots=True)
class Picked:
    """What a look found: tasks to start, short tasks to claim ahead, and whether there is more than that."""

    start: list[ReadyTask]
    ahead: list[ReadyTask]
    more: bool


class Claimer:
    """Chooses for one worker. `seconds` gives the measured run time of tasks with a name, or None."""

    def __init__(self, store: Store, place: Place, seconds: Callable[[str], float | None]) -> None:
        self._store = store
        self._place = place
        self._seconds = seconds
        self._needs: dict[int, Capacity] = {}
        self._never: dict[int, bool] = {}
        #: What this host could not start lately; whoever looks sets it before.
        self.avoided = NOTHING_AVOIDED

    def serve(self, queues: frozenset[str]) -> None:
        """Claim from these queues from now on."""
        self._place = replace(self._place, queues=queues)
        self._never = {}

    def commands_only(self) -> None:
        """Claim nothing more that needs a child of the pool."""
        self._place = replace(self._place, whole=replace(self._place.whole, python_slots=0))
        self._never = {}

    def need(self, class_id: int) -> Capacity:
        """What a task of this class reserves here."""
        return self._needs[class_id]

    def look(self, connection: Any, free: Capacity, buffered: int) -> Picked:
        """Read what is ready, outside of any transaction, and choose: nothing is claimed yet."""
        unfit = [class_id for class_id, never in self._never.items() if never]
        found = self._store.candidates(connection, unfit, LOOK, self.avoided)
        fitting = self._fitting(self._store.requirements(connection, found))
        ready = [row for class_id, row in found.items() if class_id in fitting]
        start, _ = chooser.choose(ready, free, fitting, LOOK)
        chosen = {task.id for task in start}
        rest = [[task for task in row if task.id not in chosen] for row in ready]
        ahead = chooser.ahead(rest, self._seconds, buffered, self._place.whole.python_slots)
        more = any(len(row) >= LOOK for row in ready) or sum(map(len, rest)) > len(ahead)
        return Picked(start, ahead, more)

    def choose_released(self, connection: Any, released: Sequence[ReadyTask], free: Capacity) -> list[ReadyTask]:
        """Of tasks that this very transaction has released, those that fit here: a chain needs no second look."""
        released = [task for task in released if not self.avoided.includes(task.class_id, task.job_id, task.id)]
        classes = self._store.requirements(connection, {task.class_id for task in released})
        fitting = self._fitting(classes)
        rows: dict[int, list[ReadyTask]] = {}
        for task in sorted(released, key=chooser.order):
            if task.class_id in fitting:
                rows.setdefault(task.class_id, []).append(task)
        chosen, _ = chooser.choose(rows.values(), free, fitting, LOOK)
        return chosen

    def claim(
        self, connection: Any, tasks: Sequence[ReadyTask], worker_id: int, token: int, state: State
    ) -> list[ClaimedTask]:
        """Take those that nobody else has taken meanwhile."""
        return self._store.claim(connection, [task.id for task in tasks], worker_id, token, state)

    def _fitting(self, classes: dict[int, Requirement]) -> dict[int, Capacity]:
        never = self._never
        for class_id, requirement in classes.items():
            if class_id not in never:
                never[class_id] = chooser.why_never(requirement, self._place) is not None
                self._needs[class_id] = chooser.need(requirement, self._place)
        return {class_id: self._needs[class_id] for class_id in classes if not never[class_id]}
