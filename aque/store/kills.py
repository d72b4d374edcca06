"""kill: what a person withdraws or signals, how far that reaches, and what a worker has yet to carry out."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from aque import deps
from aque.errors import UnknownTask
from aque.states import COMPLETE_STATES, ENDING_SIGNALS, State
from aque.store import statements as sql
from aque.store.finishes import Finishes
from aque.store.rows import Kill, Killed, Orders


class Kills(Finishes):
    """What a kill writes, and what workers read of it."""

    def kill(
        self,
        connection: sa.Connection,
        ids: Iterable[int],
        signal: int,
        *,
        grace_seconds: float | None = None,
        waiting_only: bool = False,
        dependencies: bool = False,
        dependents: bool = False,
    ) -> Killed:
        """Withdraw what has not started, and leave `signal` for the workers of what has (unless `waiting_only`); members
        of a job go with it.

        `dependencies`: and what they depend on, unless somebody else still needs it. `dependents`: and what depends on them.
        Either takes children along, and goes on from there. A signal that does not end a task (see
        `states.ENDING_SIGNALS`) touches running tasks only. Raises UnknownTask.
        """
        wanted = sorted(set(ids))
        ends = signal in ENDING_SIGNALS
        if dependencies or dependents:
            named, everything, spared = self._lock_reached(connection, wanted, dependencies, dependents, ends)
        else:
            named = self._states(connection, sql.lock_with_members(self.dialect), wanted)
            _check_known(wanted, named)
            everything, spared = list(named), []
        if ends and not waiting_only:  # what a task has submitted goes with it
            children = connection.execute(sql.descendants(self.dialect), {"ids": everything}).scalars()
            everything = [*dict.fromkeys([*everything, *children])]
        withdrawn: list[Any] = []
        if ends:
            withdrawn += connection.execute(sql.cancel(self.dialect), {"ids": everything})
        if ends and not waiting_only:
            withdrawn += connection.execute(sql.kill_waiting(self.dialect), {"ids": everything})
        requested: list[int] = []
        if not waiting_only:
            parameters = {
                "ids": everything,
                "wanted_signal": signal,
                "wanted_grace": grace_seconds if ends else None,
            }
            requested = list(connection.execute(sql.request_kill(self.dialect), parameters).scalars())
        released = self.release(connection, withdrawn)
        ended = [row.id for row in withdrawn]
        touched = {*ended, *requested, *released.skipped, *released.groups, *released.closed}
        return Killed(
            ready=released.ready,
            skipped=released.skipped,
            groups=released.groups,
            closed=released.closed,
            freed=released.freed,
            cancelled=ended,
            requested=requested,
            spared=spared,
            untouched={i: state for i, state in named.items() if i not in touched},
        )

    def _states(self, connection: sa.Connection, statement: Any, ids: Sequence[int]) -> dict[int, State]:
        return {row.id: State(row.state) for row in connection.execute(statement, {"ids": ids})}

    def _lock_reached(
        self, connection: sa.Connection, wanted: Sequence[int], dependencies: bool, dependents: bool, ends: bool
    ) -> tuple[dict[int, State], list[int], list[int]]:
        """What a recursive kill is about, locked: the tasks named with their states, all that is to be killed, and what is
        spared."""
        locked: dict[int, State] = {}
        while True:
            named = self._states(connection, sql.with_members(self.dialect), wanted)
            _check_known(wanted, named)
            reached, spared = self._reach(connection, named, dependencies, dependents, ends)
            missing = sorted(reached.difference(locked))
            if not missing:
                return {i: locked[i] for i in named}, sorted(reached), sorted(spared)
            # Only what is locked stays as it is: who submits a dependent or a child meanwhile is seen by another look.
            locked |= self._states(connection, sql.lock_tasks(self.dialect), missing)

    def _reach(
        self, connection: sa.Connection, named: Mapping[int, State], dependencies: bool, dependents: bool, ends: bool
    ) -> tuple[set[int], set[int]]:
        """All that a kill of the tasks `named` takes, and what it would take if nobody else needed it."""
        chosen = set(named)
        if dependents:
            # A group on the way is left to end with its members: others of them may go on.
            rows = self._unfinished(connection, sql.downstream(self.dialect), list(named))
            chosen |= {row.id for row in rows if not row.is_group}
        if not dependencies:
            return chosen, set()
        rows = self._unfinished(connection, sql.upstream(self.dialect), list(chosen))
        reached = chosen | {row.id for row in rows}
        ending = [i for i in chosen if named.get(i) not in COMPLETE_STATES] if ends else []
        spared = self._needed_by_others(connection, reached, chosen, ending)
        return reached - spared, spared

    def _unfinished(self, connection: sa.Connection, statement: Any, ids: list[int]) -> Sequence[Any]:
        """What of a closure of `ids` is not complete."""
        found = connection.execute(statement, {"ids": ids}).scalars().all()
        return connection.execute(sql.unfinished(self.dialect), {"ids": list(found)}).all()

    def _needed_by_others(
        self, connection: sa.Connection, reached: set[int], chosen: set[int], ending: list[int]
    ) -> set[int]:
        """What of `reached`, but for `chosen`, tasks need that are not reached and not made impossible by the end of those
        in `ending`."""
        needs: list[tuple[int, int]] = []
        groups: set[int] = set()
        look = reached
        while look:  # a group needs its members if somebody else needs the group
            rows = connection.execute(sql.open_dependents(self.dialect), {"ids": list(look)}).all()
            needs += [(row.upstream, row.downstream) for row in rows]
            look = {row.downstream for row in rows if row.is_group} - reached - groups
            groups |= look
        others = {downstream for _, downstream in needs} - reached - groups
        if others and ending:
            ended: dict[str, list[int]] = {"ids": ending, "succeeded": [], "in_error": []}
            others -= set(connection.execute(sql.doomed(self.dialect), ended).scalars())
        if not others:
            return set()
        for row in connection.execute(sql.children(self.dialect), {"ids": list(reached)}):
            needs.append((row.id, row.parent_id))
        return deps.needed(others, needs, chosen) & reached

    def orders(self, connection: sa.Connection, worker_id: int) -> Orders:
        """What people want of this worker."""
        rows = connection.execute(sql.orders(), {"which_worker": worker_id}).all()
        kills = [Kill(*row[1:]) for row in rows if row.id is not None]
        return Orders(any(row.draining for row in rows), kills)

    def signal_delivered(self, connection: sa.Connection, kills: Iterable[Kill]) -> None:
        """These signals only had to be delivered, and have been."""
        rows = [{"id": kill.id, "token": kill.token, "signal": kill.signal} for kill in kills]
        if rows:
            connection.execute(sql.signal_delivered(self.dialect), {"rows": json.dumps(rows)})


def _check_known(wanted: Iterable[int], found: Collection[int]) -> None:
    if missing := [i for i in wanted if i not in found]:
        raise UnknownTask(missing, "Nothing was killed.")
