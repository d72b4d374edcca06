"""What people set of tasks that wait: their priority, their expected duration, what they need."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from aque.states import State
from aque.store.statements import changes as sql


@dataclass(frozen=True, slots=True)
class Changeable:
    """A task as far as changes of it are concerned."""

    id: int
    state: State
    class_id: int | None  #: None: a group
    submitter: str


class Changes:
    """Statements on tasks that somebody has locked with `find`. Methods take an open connection."""

    def __init__(self, dialect: str) -> None:
        self._dialect = dialect

    def find(self, connection: sa.Connection, ids: Collection[int], *, lock: bool) -> list[Changeable]:
        """These tasks and the members of those that are jobs; with `lock` they stay as they are until the caller's transaction
        ends."""
        rows = connection.execute(sql.changeable(self._dialect, lock), {"ids": list(ids)})
        return [Changeable(row.id, State(row.state), row.requirement_id, row.submitter) for row in rows]

    def set_priority(self, connection: sa.Connection, ids: Iterable[int], priority: int) -> None:
        """Higher first; what age has added stays."""
        connection.execute(sql.set_priority(self._dialect), {"ids": list(ids), "wanted_priority": priority})

    def set_duration(self, connection: sa.Connection, ids: Iterable[int], seconds: float) -> None:
        """Expected seconds; 0: unknown."""
        connection.execute(sql.set_duration(self._dialect), {"ids": list(ids), "wanted_seconds": seconds})

    def set_classes(self, connection: sa.Connection, classes: Mapping[int, int]) -> None:
        """Other requirement classes, by task; who keeps room for one of them keeps what it needed before, and gives that up."""
        rows = [{"id": task_id, "requirement_id": class_id} for task_id, class_id in sorted(classes.items())]
        connection.execute(sql.set_requirement(self._dialect), {"rows": json.dumps(rows)})
        connection.execute(sql.drop_reservations(self._dialect), {"ids": sorted(classes)})
