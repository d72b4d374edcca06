"""Farm-wide limits: of each no more tokens are held than its capacity, whatever the number of workers."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from aque.errors import BadInput
from aque.resources import LARGEST_LIMIT, parse_limits
from aque.store import statements as sql
from aque.store.engine import lock_table
from aque.store.tables import token

#: A token: the limit's name, and which of it.
Token = tuple[str, int]


@dataclass(frozen=True, slots=True)
class LimitRow:
    """A limit, for people."""

    name: str
    capacity: int
    used: int  #: tokens held; more than the capacity for a while after it was lowered
    holders: tuple[int, ...]  #: the tasks that hold them
    waiting: int  #: ready tasks that ask for it


class Limits:
    """The limits of a store. What a task holds is counted in its row (`tokens`), so that who ends it knows whether there is
    anything to free."""

    def __init__(self, dialect: str) -> None:
        self.dialect = dialect

    def set(self, connection: sa.Connection, name: str, capacity: int) -> None:
        """Let tasks hold at most `capacity` (0 to 10000) tokens of this limit together, inside the caller's transaction.

        What is held beyond that stays, and until it has been given back nothing more is given. Tasks that run already and
        asked for a limit that there was not hold nothing. Raises BadInput.
        """
        if not _is_name(name):
            raise BadInput(
                f"a limit's name is 1 to 200 letters, digits and _ . : / @ + -, not {name!r:.60}. Nothing was changed."
            )
        if isinstance(capacity, bool) or not isinstance(capacity, int) or not 0 <= capacity <= LARGEST_LIMIT:
            raise BadInput(
                f"a limit is a whole number from 0 to {LARGEST_LIMIT}, not {capacity!r:.60}. Nothing was changed."
            )
        self._be_alone(connection)
        connection.execute(sql.set_limit(self.dialect), {"name": name, "capacity": capacity})
        connection.execute(sql.drop_tokens())
        connection.execute(sql.add_tokens(self.dialect), {"which_limit": name, "below": capacity})

    def remove(self, connection: sa.Connection, name: str) -> bool:
        """Let nothing bound the tasks that ask for this limit, inside the caller's transaction; False: there is none."""
        self._be_alone(connection)
        found = connection.execute(sql.remove_limit(), {"which_limit": name}).first() is not None
        connection.execute(sql.drop_tokens())
        return found

    def _be_alone(self, connection: sa.Connection) -> None:
        """Wait until all that is being taken has been, and let nobody begin: a limit changes once a day, and who takes tokens a
        thousand times a second need not look out for it."""
        lock_table(connection, token)

    def capacities(self, connection: sa.Connection) -> dict[str, int]:
        """All limits, by name."""
        return {row.name: row.capacity for row in connection.execute(sql.capacities())}

    def free(self, connection: sa.Connection, names: Collection[str]) -> dict[str, int]:
        """How many tokens there are to be had of those of `names` that are limits: 0 while more is held than it may be."""
        if not names:
            return {}
        rows = json.dumps([{"name": name} for name in sorted(set(names))])
        return {row.name: row.n for row in connection.execute(sql.free_counts(self.dialect), {"rows": rows})}

    def rows(self, connection: sa.Connection) -> list[LimitRow]:
        """All limits, with who holds them and how many wait, in order of name."""
        held: dict[str, dict[int, int]] = {}
        for row in connection.execute(sql.held_tokens()):
            held.setdefault(row.limit_name, {})[row.task_id] = row.n
        waiting: Counter[str] = Counter()
        for row in connection.execute(sql.limited_ready()):
            for name in [*parse_limits(row.limits), f"user:{row.user}"]:
                waiting[name] += row.n
        return [
            LimitRow(name, capacity, sum(held.get(name, {}).values()), tuple(sorted(held.get(name, ()))), waiting[name])
            for name, capacity in self.capacities(connection).items()
        ]

    def take(self, connection: sa.Connection, wanted: Mapping[int, Mapping[str, int]]) -> dict[int, list[Token]]:
        """Let tasks hold what they want (limit -> tokens, 1 or more), each all of it or nothing, first those that come first;
        inside the caller's transaction. Returns those that got all, with what they hold now; names that are no limits
        bound nothing.

        What another transaction is about to take or to leave counts as taken: nobody waits for anybody.
        """
        totals: Counter[str] = Counter()
        for names in wanted.values():
            totals.update(names)
        if not totals:
            return {task_id: [] for task_id in wanted}
        rows = json.dumps([{"name": name, "n": min(n, LARGEST_LIMIT)} for name, n in sorted(totals.items())])
        free: dict[str, list[int]] = {}
        for row in connection.execute(sql.lock_free_tokens(self.dialect), {"rows": rows}):
            free.setdefault(row.name, []).extend(() if row.slot is None else (row.slot,))
        for slots in free.values():
            slots.sort(reverse=True)  # the lowest are taken first: fewer are beyond a limit that is lowered
        got: dict[int, list[Token]] = {}
        for task_id, names in wanted.items():
            bounded = {name: n for name, n in names.items() if name in free}
            if all(len(free[name]) >= n for name, n in bounded.items()):
                got[task_id] = [(name, free[name].pop()) for name, n in bounded.items() for _ in range(n)]
        held = ((name, slot, task_id) for task_id, tokens in got.items() for name, slot in tokens)
        self._write(connection, held)
        return got

    def undo(self, connection: sa.Connection, tokens: Iterable[Token]) -> None:
        """Give back tokens that `take` gave in this transaction, to a task that then was not claimed. Not all that this task
        holds: who was faster with it has others in its name."""
        self._write(connection, ((name, slot, None) for name, slot in tokens))

    def _write(self, connection: sa.Connection, held: Iterable[tuple[str, int, int | None]]) -> None:
        rows = [{"limit_name": name, "slot": slot, "task_id": task_id} for name, slot, task_id in held]
        if rows:
            connection.execute(sql.take_tokens(self.dialect), {"rows": json.dumps(rows)})

    def give_back(self, connection: sa.Connection, task_ids: Iterable[int]) -> bool:
        """Free all that these tasks hold, whose rows this transaction has locked; True if that was anything."""
        ids = list(task_ids)
        if not ids:
            return False
        freed = connection.execute(sql.free_tokens(self.dialect), {"ids": ids}).all()
        if self.dialect == "sqlite":
            connection.execute(sql.count_no_tokens(), {"ids": ids})
        return bool(freed)


def _is_name(name: str) -> bool:
    """True for what tasks can ask for."""
    try:
        return isinstance(name, str) and list(parse_limits(name)) == [name]
    except BadInput:
        return False
