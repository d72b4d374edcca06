"""finish -> release: outcomes, and what they and the time set in motion. Every outcome carries its claim."""

import json
import signal as signals
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from aque import deps
from aque.states import COMPLETE_STATES, Reason, State
from aque.store import hot
from aque.store import statements as sql
from aque.store.base import EDGE_COLUMNS
from aque.store.claims import Claims
from aque.store.reservations import ready_task
from aque.store.rows import Finished, Released, to_json
from aque.store.submissions import Submissions
from aque.store.tables import edge
from aque.values import Again, Children, Outcome, Usage


class Finishes(Submissions, Claims):
    """What an end writes, and what a time that has come does."""

    def finish(self, connection: sa.Connection, outcomes: Sequence[Outcome], max_lost: int = 3) -> Finished:
        """Record outcomes whose claims still stand and release what waited for them, inside the caller's transaction.

        An outcome of state `ready` is a lost attempt: the task goes back, and with `max_lost` of them it ends in error.

        A batch may be replayed after a commit in doubt: what was recorded the first time is `refused` the second.
        """
        if not outcomes:
            return Finished()
        replaced = [o for o in outcomes if o.replacement is not None]
        rows = [self._outcome_row(connection, o) for o in sorted(outcomes, key=lambda o: o.id) if o.replacement is None]
        values = [
            {"task_id": o.id, "value": o.value, "error": o.error}
            for o in outcomes
            if o.value is not None or o.error is not None
        ]
        written: Sequence[Any] = []
        if len(rows) == 1:
            one: dict[str, Any] = {f"o_{name}": value for name, value in rows[0].items()} | {"max_lost": max_lost}
            if values and self.dialect == "postgresql":
                one |= {"o_value": values[0]["value"], "o_error": values[0]["error"]}
                written, values = hot.run(connection, sql.finish_one_with_result(), one), []
            else:
                written = hot.run(connection, sql.finish_one(), one)
        elif rows:
            parameters = {"rows": json.dumps(rows), "max_lost": max_lost}
            written = connection.execute(sql.finish(self.dialect), parameters).all()
        moved = {row.id: State(row.state) for row in written}
        ended = {i: state for i, state in moved.items() if state in COMPLETE_STATES}
        waiting = [i for i, state in moved.items() if state is State.WAITING]
        repeated = [i for i in moved if i not in ended and i not in waiting]
        lost = {o.id for o in outcomes if o.state is State.READY}
        retried = [o.id for o in outcomes if o.again is not None and o.id in repeated]
        if retried:
            self._keep_attempts(connection, retried, "retry", None)
        if failed := [i for i in repeated if i not in lost and i not in retried]:
            self._keep_attempts(connection, failed, State.ERROR, None)
        if new_arguments := [
            {"which": o.id, "new_arguments": o.again.arguments}
            for o in outcomes
            if o.again is not None and o.again.arguments is not None and o.id in repeated
        ]:
            connection.execute(sql.set_arguments(), new_arguments)
        for outcome in outcomes:
            if outcome.again is not None and outcome.id in repeated:
                self._change(connection, outcome.id, outcome.again)
        if gone := [i for i in repeated if i in lost]:
            self._keep_attempts(connection, gone, "lost", Reason.WORKER_LOST)
        if values := [row for row in values if row["task_id"] in moved]:
            connection.execute(sql.store_results(self.dialect), values)
        written = list(written)
        for outcome in replaced:
            new = self._replace(connection, outcome)
            written += new
            ended |= {row.id: State(row.state) for row in new if row.state in COMPLETE_STATES}
            repeated += [row.id for row in new if row.state not in COMPLETE_STATES]
        withdrawn, signalled = self._end_children(connection, written)
        released = self.release(connection, [*written, *withdrawn])
        return Finished(
            ready=released.ready,
            skipped=released.skipped,
            groups=released.groups,
            closed=released.closed,
            freed=self._free_tokens(connection, written),
            signalled=bool(signalled),
            ended=ended,
            repeated=repeated,
            waiting=waiting,
            refused=[o.id for o in outcomes if o.id not in {row.id for row in written}],
        )

    def _change(self, connection: sa.Connection, task_id: int, again: Again) -> None:
        """What a task that is to run again is from now on."""
        if again.priority is not None:
            self.changes.set_priority(connection, [task_id], again.priority)
        if again.class_id is not None:
            self.changes.set_classes(connection, {task_id: again.class_id})

    def _replace(self, connection: sa.Connection, outcome: Outcome) -> Sequence[Any]:
        """Give a task's row to what takes its place: its dependents, its id and its job stay, and its claim ends. None if the
        claim does not stand any more; one that is being killed is killed."""
        replacement = outcome.replacement
        assert replacement is not None
        parameters = {"which": outcome.id, "with_token": outcome.token, "new_name": replacement.name}
        parameters["new_class"] = replacement.class_id
        moved = connection.execute(sql.leave(), parameters).all()
        if not moved or moved[0].state == State.KILLED:
            return moved
        self._keep_attempts(connection, [outcome.id], "replaced", None)
        connection.execute(
            sql.set_payload(),
            {
                "which": outcome.id,
                "new_function": replacement.function,
                "new_arguments": replacement.arguments,
                "new_inputs": to_json(replacement.inputs) if replacement.inputs else b"",
            },
        )
        # What it has waited for before has an edge already, and has let it start.
        known = set(connection.execute(sql.upstream_of(), {"which": outcome.id}).scalars())
        new = tuple(d for d in replacement.dependencies if d.upstream not in known)
        states = self._add_dependents(connection, {d.upstream: 1 for d in new})
        start = deps.starts({outcome.id: new}, (), states)[outcome.id]
        edges = [
            (d.upstream, outcome.id, str(d.condition), deps.is_satisfied(d.condition, states[d.upstream])) for d in new
        ]
        self._insert(connection, edge, EDGE_COLUMNS, edges)
        parameters = {"which": outcome.id, "to_state": str(start.state), "new_unmet": start.unmet}
        return connection.execute(sql.enter(), parameters).all()

    def _end_children(self, connection: sa.Connection, moved: Iterable[Any]) -> tuple[Sequence[Any], Sequence[int]]:
        """Kill the open children of those of these tasks (rows of `sql.MOVED`) that have ended and want it so, and theirs: the
        rows that ended at once, and those that workers will end."""
        parents = [
            row.id
            for row in moved
            if row.state in COMPLETE_STATES and row.children == Children.CANCEL and row.children_left
        ]
        if not parents:
            return [], []
        ids = connection.execute(sql.descendants(self.dialect), {"ids": parents}).scalars().all()
        return self._end(connection, ids, {"wanted_signal": int(signals.SIGTERM), "wanted_grace": None})

    def _end(
        self, connection: sa.Connection, ids: Sequence[int], wanted: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Sequence[int]]:
        ended = [*connection.execute(sql.cancel(self.dialect), {"ids": list(ids)})]
        ended += connection.execute(sql.kill_waiting(self.dialect), {"ids": list(ids)})
        return ended, connection.execute(sql.request_kill(self.dialect), {"ids": list(ids), **wanted}).scalars().all()

    def next_time(self, connection: sa.Connection) -> float | None:
        """In how many seconds (0: now) there is something for `advance`; None: never, as things are."""
        found = connection.execute(sql.next_time()).scalar()
        return None if found is None else max(0.0, found - self._wall(connection, time.monotonic()))

    def advance(self, connection: sa.Connection) -> Released:
        """Release what has waited for its time, and cancel what was not started in time, inside the caller's transaction."""
        rows = connection.execute(sql.due(self.dialect)).all()
        expired = connection.execute(sql.expire(self.dialect)).all()
        groups = [row.id for row in rows if row.state == State.PENDING and row.unmet == 0]
        ended_groups = connection.execute(sql.end_groups(self.dialect), {"ids": groups}).all() if groups else []
        released = self.release(connection, [*expired, *ended_groups])
        released.expired = [row.id for row in expired]
        released.groups |= {row.id: State(row.state) for row in ended_groups}
        released.ready += [ready_task(row) for row in rows if row.state == State.READY]
        return released

    def _outcome_row(self, connection: sa.Connection, outcome: Outcome) -> dict[str, Any]:
        ended = self._wall(connection, time.monotonic() if outcome.ended is None else outcome.ended)
        again = outcome.again
        return {
            "id": outcome.id,
            "attempt": outcome.attempt,
            "token": outcome.token,
            "state": str(outcome.state),
            "reason": None if outcome.reason is None else str(outcome.reason),
            "exit_code": outcome.exit_code,
            "signal": outcome.signal,
            "truncated": outcome.truncated,
            "started_at": ended - outcome.ran_seconds,
            "ended_at": ended,
            **{name: getattr(outcome.usage, name, None) for name in Usage.__slots__},
            "repeat": outcome.state is State.ERROR and outcome.again is None,
            "again": again is not None,
            "not_before": ended + again.after_seconds if again is not None and again.after_seconds > 0 else None,
            "counts": again is None or again.counts,
        }

    def finish_alone(self, connection: sa.Connection, outcome: Outcome) -> bool:
        """Record the success of a task that nothing waits for, outside of any transaction: one statement. False: nothing was
        written, `finish` must say what has become of it; always on SQLite, which gains nothing by it."""
        if self.dialect != "postgresql":
            return False
        row = self._outcome_row(connection, outcome)
        parameters = {f"o_{name}": value for name, value in row.items()}
        parameters["max_lost"] = 0
        if outcome.value is not None:
            parameters |= {"o_value": outcome.value, "o_error": None}
        return bool(hot.run(connection, sql.finish_alone(outcome.value is not None), parameters))

    def release(self, connection: sa.Connection, moved: Iterable[Any]) -> Released:
        """Settle everything that waited for the tasks that this transaction has just moved (rows of `sql.MOVED`): count down,
        skip what has become impossible (all the way down), end groups and parents whose last member or child this was."""
        result = Released()
        ended_rows = list(moved)
        while ended_rows := [row for row in ended_rows if row.state in COMPLETE_STATES]:
            closed = self._count_children(connection, ended_rows)
            wave = {row.id: (State(row.state), row.dependents) for row in ended_rows if row.dependents}
            ended_rows = list(closed)
            result.closed |= {row.id: State(row.state) for row in closed}
            if not wave:
                continue
            ended = {
                "ids": sorted(wave),
                "succeeded": [i for i, (state, _) in wave.items() if state is State.SUCCESS],
                "in_error": [i for i, (state, _) in wave.items() if state is State.ERROR],
            }
            counted = self._count_down(connection, ended)
            if sum(n for _, n in counted) < sum(n for _, n in wave.values()):
                doomed = connection.execute(sql.doomed(self.dialect), ended).scalars().all()
                skipped = connection.execute(sql.skip(self.dialect), {"ids": list(doomed)}).all()
            else:  # every edge out of these tasks is satisfied: none has become impossible
                skipped = []
            result.skipped += [row.id for row in skipped]
            ended_rows += skipped
            groups = []
            for row, _ in counted:
                if row.unmet == 0 and row.state == State.READY:
                    result.ready.append(ready_task(row))
                elif row.unmet == 0 and row.state == State.PENDING:
                    groups.append(row.id)
            if groups:
                ended_groups = connection.execute(sql.end_groups(self.dialect), {"ids": groups}).all()
                result.groups |= {row.id: State(row.state) for row in ended_groups}
                ended_rows += ended_groups
        return result

    def _count_children(self, connection: sa.Connection, ended: Iterable[Any]) -> Sequence[Any]:
        """These rows have ended: tell their parents, and settle those that have waited for them."""
        counts: dict[int, list[int]] = {}
        for row in ended:
            if row.parent_id is not None:
                count = counts.setdefault(row.parent_id, [0, 0])
                count[0] += 1
                # One that is skipped says nothing: what it waited for did, or an error callback was not needed.
                count[1] += row.state not in (State.SUCCESS, State.SKIPPED)
        if not counts:
            return []
        rows = json.dumps([{"id": i, "n": n, "failed": failed} for i, (n, failed) in sorted(counts.items())])
        counted = connection.execute(sql.count_children(self.dialect), {"rows": rows}).all()
        due = [row.id for row in counted if row.state == State.WAITING and row.children_left == 0]
        return connection.execute(sql.close(self.dialect), {"ids": due}).all() if due else []

    def _count_down(self, connection: sa.Connection, ended: dict[str, list[int]]) -> list[tuple[Any, int]]:
        """Satisfy what these completions (`ids`, `succeeded`, `in_error`) satisfy: each dependent as it now is, and how many of
        its edges that were."""
        released = {"released_at": self._wall(connection, time.monotonic()), "released_on": self.worker_host}
        if self.dialect == "postgresql":
            return [(row, row.n) for row in hot.run(connection, sql.satisfy_and_count_down(), ended | released)]
        met = Counter(row.downstream for row in hot.run(connection, sql.satisfy(), ended))
        if not met:
            return []
        counts = json.dumps([{"id": i, "n": n} for i, n in sorted(met.items())])
        return [(row, met[row.id]) for row in hot.run(connection, sql.count_down(), {"rows": counts, **released})]
