"""Reservations as rows: which worker keeps room for which task. Leased like everything that a worker owns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from aque.store.statements import rooms as sql
from aque.values import ReadyTask


@dataclass(frozen=True, slots=True)
class Reserved:
    """A worker keeps room for a task."""

    task_id: int
    worker_id: int
    worker: str  #: its name


@dataclass(frozen=True, slots=True)
class RunningTask:
    """A running task as a forecast needs it."""

    class_id: int
    started_at: float  #: seconds since 1970
    duration: float  #: expected seconds; 0: unknown


def ready_task(row: Any) -> ReadyTask:
    """A row of `statements.READY_COLUMNS`."""
    return ReadyTask(
        row.id,
        row.requirement_id,
        row.rank,
        row.duration,
        row.name,
        row.ready_at or 0.0,
        row.job_id,
        row.near_host or "",
    )


class Reservations:
    """One worker for a task, one task for a worker. Methods take an open connection."""

    def __init__(self, dialect: str) -> None:
        self._dialect = dialect

    def rows(self, connection: sa.Connection) -> list[Reserved]:
        """Those in force."""
        return [Reserved(*row) for row in connection.execute(sql.reservations())]

    def take(self, connection: sa.Connection, task_id: int, worker_id: int, lease_seconds: float) -> bool:
        """Let the worker keep room for the task, inside the caller's transaction, and for no other one; False: another worker
        does."""
        connection.execute(sql.drop_reservation(), {"which_worker": worker_id})
        parameters = {"which_task": task_id, "which_worker": worker_id, "lease": lease_seconds}
        return connection.execute(sql.reserve(self._dialect), parameters).first() is not None

    def kept(self, connection: sa.Connection, worker_id: int) -> ReadyTask | None:
        """The task for which the worker keeps room, as it is now; None: there is nothing to keep room for any more."""
        row = connection.execute(sql.kept_task(), {"which_worker": worker_id}).first()
        return None if row is None else ready_task(row)

    def renew(self, connection: sa.Connection, worker_id: int, lease_seconds: float) -> None:
        """Extend the worker's reservation."""
        connection.execute(sql.renew_reservation(), {"which_worker": worker_id, "lease": lease_seconds})

    def drop(self, connection: sa.Connection, worker_id: int) -> None:
        """The worker keeps room for nothing."""
        connection.execute(sql.drop_reservation(), {"which_worker": worker_id})

    def running(self, connection: sa.Connection) -> Mapping[int, Sequence[RunningTask]]:
        """What runs on each live worker."""
        found: dict[int, list[RunningTask]] = {}
        for row in connection.execute(sql.running_tasks()):
            found.setdefault(row.worker_id, []).append(
                RunningTask(row.requirement_id, row.started_at or 0.0, row.duration)
            )
        return found
