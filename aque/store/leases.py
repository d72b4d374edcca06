"""Workers, their leases, and what becomes of the tasks of lost ones."""

import json
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from aque.states import ENDING_SIGNALS, Reason, State
from aque.store import statements as sql
from aque.store.finishes import Finishes
from aque.store.rows import Released, WorkerRow, worker_row
from aque.values import WorkerInfo


class Leases(Finishes):
    """What workers write of themselves, and reapers of others."""

    def register(self, connection: sa.Connection, info: WorkerInfo, draining: bool = False) -> None:
        """Add a live worker; its lease starts now."""
        row = {name: getattr(info, name) for name in WorkerInfo.__slots__}
        connection.execute(
            sql.insert_worker(),
            {
                **row,
                "queues": json.dumps(info.queues),
                "tags": json.dumps(info.tags),
                "state": "live",
                "draining": draining,
                "missing_paths": "{}",
                "avoids": "[]",
                "lease": info.lease_seconds,
            },
        )

    def renew(self, connection: sa.Connection, worker_id: int, lease_seconds: float) -> bool:
        """Extend the worker's lease; False: a reaper has declared it lost, and it owns nothing any more."""
        parameters = {"which_worker": worker_id, "lease": lease_seconds}
        return connection.execute(sql.renew(), parameters).first() is not None

    def set_queues(self, connection: sa.Connection, worker_id: int, queues: Iterable[str]) -> None:
        """The queues that this worker serves from now on."""
        connection.execute(sql.set_queues(), {"which_worker": worker_id, "new_queues": json.dumps(sorted(queues))})

    def set_draining(self, connection: sa.Connection, worker_ids: Iterable[int], wanted: bool) -> list[int]:
        """Let these workers claim nothing more, or claim again; returns those that are live."""
        parameters = {"ids": list(worker_ids), "wanted": wanted}
        return list(connection.execute(sql.set_draining(self.dialect), parameters).scalars())

    def describe(self, connection: sa.Connection, info: WorkerInfo) -> None:
        """A worker that has restarted goes on under its id: write what has changed about it."""
        row: dict[str, Any] = {f"new_{name}": getattr(info, name) for name in sql.DESCRIBED}
        row |= {
            "new_queues": json.dumps(info.queues),
            "new_tags": json.dumps(info.tags),
            "which_worker": info.id,
        }
        connection.execute(sql.describe_worker(), row)

    def unregister(self, connection: sa.Connection, worker_id: int) -> None:
        """The worker has stopped; one that has not given everything back stays, for the reapers."""
        self.reservations.drop(connection, worker_id)
        connection.execute(sql.stop_worker(), {"which_worker": worker_id})

    def live_workers(self, connection: sa.Connection) -> list[WorkerRow]:
        """Workers that have neither stopped nor been declared lost; some may have died."""
        return [worker_row(row) for row in connection.execute(sql.live_workers())]

    def workers(self, connection: sa.Connection) -> list[WorkerRow]:
        """All workers ever, oldest first."""
        return [worker_row(row) for row in connection.execute(sql.workers())]

    def reap(self, connection: sa.Connection, row: WorkerRow, max_lost: int) -> Released | None:
        """Declare a worker lost and free its tasks, inside the caller's transaction; None: it has renewed, or another
        reaper was faster. A task that has lost `max_lost` attempts ends in error."""
        parameters = {"which_worker": row.info.id, "seen_lease_until": row.lease_until}
        if connection.execute(sql.declare_lost(self.dialect), parameters).first() is None:
            return None
        self.reservations.drop(connection, row.info.id)
        held = connection.execute(sql.held_by_worker(), {"which_worker": row.info.id}).all()
        rows: list[dict[str, Any]] = []
        for item in held:
            started = item.state == State.RUNNING
            if item.kill_signal in ENDING_SIGNALS:
                state, reason = (State.KILLED if started else State.CANCELLED), Reason.REQUEST
            elif started and (not item.requeue or item.lost + 1 >= max_lost):
                state, reason = State.ERROR, Reason.WORKER_LOST
            else:
                state, reason = State.READY, Reason.WORKER_LOST
            rows.append({"id": item.id, "state": str(state), "reason": str(reason)})
        if not rows:
            return Released()
        again = {r["id"] for r in rows if r["state"] == State.READY}
        if ran := [item.id for item in held if item.state == State.RUNNING and item.id in again]:
            self._keep_attempts(connection, ran, "lost", Reason.WORKER_LOST)
        moved = connection.execute(sql.lose(self.dialect), {"rows": json.dumps(rows)}).all()
        withdrawn, signalled = self._end_children(connection, moved)
        released = self.release(connection, [*moved, *withdrawn])
        released.freed = self._free_tokens(connection, moved)
        released.signalled = bool(signalled)
        return released
