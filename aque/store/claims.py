"""claim: what is ready, who takes it, what goes back, and what a running task tells. Every write carries its claim."""

import json
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa

from aque.backoff import NOTHING_AVOIDED, Avoided
from aque.states import Reason, State
from aque.store import hot
from aque.store import statements as sql
from aque.store.engine import attempt_write, inside_transaction
from aque.store.questions import Questions
from aque.store.reservations import ready_task
from aque.store.rows import claimed_task
from aque.values import ClaimedTask, ReadyTask


class Claims(Questions):
    """What a worker writes of tasks that it has, up to their ends."""

    def candidates(
        self,
        connection: sa.Connection,
        unfit: Iterable[int],
        limit: int,
        avoided: Avoided = NOTHING_AVOIDED,
        names: Collection[str] = (),
    ) -> dict[int, list[ReadyTask]]:
        """Up to `limit` ready tasks of each requirement class, best first within a class, but for the classes in `unfit` and
        what is `avoided`, or has one of these `names`."""
        parameters = {"unfit": [*unfit, *avoided.classes], "limit": limit}
        by_class: dict[int, list[ReadyTask]] = {}
        if left_out := bool(avoided.tasks or avoided.jobs or names):
            parameters |= {"tasks": list(avoided.tasks), "jobs": list(avoided.jobs), "names": list(names)}
        execute = connection.execute if left_out else partial(hot.run, connection)
        for row in execute(sql.candidates(self.dialect, left_out), parameters):
            by_class.setdefault(row.requirement_id, []).append(ready_task(row))
        for ready in by_class.values():  # the join gives them in no promised order
            ready.sort(key=lambda t: (-t.priority, -t.duration, t.id))
        return by_class

    def claim(
        self,
        connection: sa.Connection,
        ids: Sequence[int],
        worker_id: int,
        token: int,
        state: State,
        *,
        limits: Mapping[int, Mapping[str, int]] | None = None,
    ) -> list[ClaimedTask]:
        """Give those of `ids` that are still ready to the worker, in the order of `ids`. Others may have been faster.

        `limits` says what of them must hold which tokens of farm-wide limits (task -> name -> how many): it is left ready if
        they are not to be had. All in one transaction, the caller's if there is one.
        """
        wanted = {i: limits[i] for i in ids if limits.get(i)} if limits else {}
        if not wanted:
            return self._claim(connection, ids, worker_id, token, state, {})
        with inside_transaction(connection):
            # Tokens first: where they are short, nobody's rows are locked for nothing.
            taken = self.limits.take(connection, wanted)
            ids = [i for i in ids if i not in wanted or i in taken]
            held = {i: len(tokens) for i, tokens in taken.items() if tokens}
            claimed = self._claim(connection, ids, worker_id, token, state, held)
            got = {task.id for task in claimed}
            self.limits.undo(connection, [held for i, tokens in taken.items() if i not in got for held in tokens])
        return claimed

    def _claim(
        self,
        connection: sa.Connection,
        ids: Sequence[int],
        worker_id: int,
        token: int,
        state: State,
        held: Mapping[int, int],
    ) -> list[ClaimedTask]:
        if not ids:
            return []
        parameters: dict[str, Any] = {
            "ids": list(ids),
            "to_worker": worker_id,
            "new_token": token,
            "to_state": str(state),
        }
        parameters["starts_at"] = self._wall(connection, time.monotonic()) if state is State.RUNNING else None
        if held:
            parameters["held"] = json.dumps([{"id": i, "n": n} for i, n in held.items()])
        rows = hot.run(connection, sql.claim(self.dialect, bool(held)), parameters)
        if self.dialect == "sqlite" and rows:
            moved = [row.id for row in rows]
            rows = hot.run(connection, sql.claimed_tasks(self.dialect), {"ids": moved})
        position = {task_id: index for index, task_id in enumerate(ids)}
        return sorted((claimed_task(row, token) for row in rows), key=lambda t: position[t.id])

    def start(self, connection: sa.Connection, started: Iterable[tuple[int, int, float]], ran: bool = True) -> None:
        """Buffered tasks that run now, as (id, token, when on the monotonic clock). Without `ran` their worker has only tried:
        they still expire."""
        rows = [{"id": i, "token": token, "started_at": self._wall(connection, when)} for i, token, when in started]
        if rows:
            connection.execute(sql.start(self.dialect), {"rows": json.dumps(rows), "ran": ran})

    def give_back(
        self, connection: sa.Connection, claims: Iterable[tuple[int, int]], reason: Reason | None = None
    ) -> list[int]:
        """Make these active tasks, as (id, token), ready again without spending an attempt; returns which were. `reason` is
        kept with the attempts."""
        rows = [{"id": i, "token": token} for i, token in claims]
        if not rows:
            return []
        moved = connection.execute(sql.give_back(self.dialect), {"rows": json.dumps(rows)}).all()
        returned = [row.id for row in moved]
        if returned:
            self._keep_attempts(connection, returned, "given back", reason)
            self._free_tokens(connection, moved)
        return returned

    def _free_tokens(self, connection: sa.Connection, moved: Iterable[Any]) -> bool:
        """Free what tasks (rows of id, tokens) hold that this transaction has taken from their worker; True if anything."""
        return self.limits.give_back(connection, [row.id for row in moved if row.tokens])

    def _keep_attempts(
        self, connection: sa.Connection, ids: Sequence[int], state: State | str, reason: Reason | None
    ) -> None:
        parameters = {
            "ids": list(ids),
            "ended_as": str(state),
            "because": None if reason is None else str(reason),
        }
        connection.execute(sql.keep_attempts(self.dialect), parameters)

    def set_blocked(self, connection: sa.Connection, blocked: Mapping[tuple[int, int], bool]) -> None:
        """Running tasks, as (id, token), that wait for others from now on, or go on."""
        rows = [{"id": i, "token": token, "blocked": waits} for (i, token), waits in blocked.items()]
        if rows:
            connection.execute(sql.set_blocked(self.dialect), {"rows": json.dumps(rows)})

    def tell(self, connection: sa.Connection, told: Mapping[tuple[int, int], tuple[str, bytes]]) -> None:
        """What running tasks, as (id, token), tell of themselves: a state of their own naming, and JSON."""
        for (task_id, token), (state, meta) in told.items():
            parameters = {"which": task_id, "with_token": token, "new_state": state, "new_meta": meta}
            attempt_write(connection, partial(connection.execute, sql.tell(self.dialect), parameters))

    def append_output(self, connection: sa.Connection, pieces: Iterable[tuple[int, int, int, int, bytes]]) -> None:
        """Captured bytes as (task, attempt, fd, offset, data)."""
        names = ("task_id", "attempt", "fd", "offset", "data")
        rows = [dict(zip(names, piece, strict=True)) for piece in pieces]
        if rows:
            connection.execute(sql.append_output(self.dialect), rows)

    def claims_of(self, connection: sa.Connection, worker_id: int) -> list[tuple[int, int]]:
        """What the table says that this worker has, as (id, token)."""
        return [(row.id, row.token) for row in connection.execute(sql.claims_of(), {"which_worker": worker_id})]

    def is_anything_active(self, connection: sa.Connection) -> bool:
        """True while any worker has a task: its end may release others."""
        return connection.execute(sql.any_active()).first() is not None
