"""Keeps room on this worker for a task that would starve, if it is this worker's turn: see `aque.backfill` for the rule."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from aque import chooser
from aque.backfill import PATIENCE_SECONDS, Busy, Hold, Load, expected_end, forecast, keeper
from aque.resources import Capacity
from aque.settings import Settings
from aque.store import Store, transaction
from aque.values import ReadyTask, Requirement

logger = logging.getLogger(__name__)

#: Tells what runs on this worker.
Running = Callable[[], Sequence[Busy]]
#: What other workers run is read so often at most.
LOOK_SECONDS = 1.0


class RoomKeeper:
    """What one worker knows of the task for which it keeps room. All times are in seconds since 1970."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._kept: tuple[int, int] | None = None  #: the task and its class
        self._renewed_at = 0.0
        self._looked_at = 0.0

    @property
    def is_holding(self) -> bool:
        """True while this worker keeps room for a task."""
        return self._kept is not None

    def kept(self, connection: Any, worker_id: int) -> ReadyTask | None:
        """The task for which this worker keeps room, as it is now; the lease on it is renewed. Without one, nothing is asked of
        the database."""
        if self._kept is None:
            return None
        reservations = self._store.reservations
        task = reservations.kept(connection, worker_id)
        if task is None or (task.id, task.class_id) != self._kept:
            self.give_up(connection, worker_id)
            return None
        if time.monotonic() - self._renewed_at > self._settings.lease_seconds / 3:
            reservations.renew(connection, worker_id, self._settings.lease_seconds)
            self._renewed_at = time.monotonic()
        return task

    def give_up(self, connection: Any, worker_id: int) -> None:
        """Keep room no more: the task has started, or could not start here now even if there were room."""
        self._kept = None
        self._store.reservations.drop(connection, worker_id)

    def consider(
        self,
        connection: Any,
        worker_id: int,
        starving: Sequence[ReadyTask],
        free: Capacity,
        running: Running,
        now: float,
    ) -> Hold | None:
        """Of these starving tasks, most urgent first, keep room for the first that nobody keeps room for, if this worker is
        the one to do that; what it has kept room for before is given up."""
        if not starving or time.monotonic() - self._looked_at < LOOK_SECONDS:
            return None
        self._looked_at = time.monotonic()
        taken = self._store.reservations.rows(connection)
        # A row of this worker's own may be left from before a restart.
        others = {row.task_id for row in taken if row.worker_id != worker_id}
        left = [task for task in starving if task.id not in others]
        if not left:
            return None
        task = left[0]
        (requirement,) = self._store.requirements(connection, [task.class_id]).values()
        busy = {row.worker_id for row in taken if row.worker_id != worker_id}
        here = Load(worker_id, Capacity(), free, running())  # the table does not know of ordinary tasks of Celery
        loads = self._loads(connection, requirement, busy, here, now)
        if not any(load.worker_id == worker_id for load in loads):
            return None
        patience = self._settings.reserve_after_seconds + PATIENCE_SECONDS
        if keeper(loads, now) != worker_id and now - task.ready_at < patience:
            return None
        with transaction(connection):
            if not self._store.reservations.take(connection, task.id, worker_id, self._settings.lease_seconds):
                return None
        (need,) = (load.need for load in loads if load.worker_id == worker_id)
        self._kept, self._renewed_at = (task.id, task.class_id), time.monotonic()
        logger.info("keeping room for task %d, which smaller ones overtake", task.id)
        return Hold(task.id, task.priority, forecast(need, free, here.running, now))

    def _loads(self, connection: Any, requirement: Requirement, busy: set[int], here: Load, now: float) -> list[Load]:
        """The workers that could keep room for such a task."""
        loads = []
        tasks = self._store.reservations.running(connection)
        for row in self._store.live_workers(connection):
            place, number = row.place, row.info.id
            if number in busy or not row.is_live or place.draining:
                continue
            if chooser.why_never(requirement, place) is not None:
                continue
            need = chooser.need(requirement, place)
            if number == here.worker_id:
                loads.append(replace(here, need=need))
                continue
            classes = self._store.requirements(connection, {task.class_id for task in tasks.get(number, ())})
            there = [
                Busy(chooser.need(classes[task.class_id], place), expected_end(task.started_at, task.duration, now))
                for task in tasks.get(number, ())
            ]
            left = place.whole
            for one in there:
                left = left - one.need
            loads.append(Load(number, need, left, there))
        return loads
