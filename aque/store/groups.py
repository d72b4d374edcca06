"""A group's row stands for its members in the order of the canvas: their values, their failures, what joins them."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from aque.errors import BadInput
from aque.states import COMPLETE_STATES, State
from aque.store.statements import groups as sql
from aque.store.tables import edge
from aque.values import Condition, Pattern

#: A group as Celery's results see it: its id, and its members, each an id or a group again.
Tree = tuple[str, list[Any]]


class Groups:
    """Methods take an open connection; `join` belongs inside a transaction."""

    def __init__(self, dialect: str) -> None:
        self._dialect = dialect

    def members(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, list[int]]:
        """The members of these groups in the order of their canvas, one that is twice in it twice. The job of an
        `aque.graph()` is left out: its members have no order."""
        rows = connection.execute(sql.members(self._dialect), {"ids": list(ids)})
        return {row.task_id: json.loads(row.inputs) for row in rows if row.inputs}

    def tree(self, connection: sa.Connection, group_id: int) -> Tree | None:
        """A group and its members by the ids that Celery knows them by; None if it is no group of a canvas."""
        order: dict[int, list[int]] = {}
        asked = {group_id}
        names: dict[int, str] = {}
        while asked:
            for row in connection.execute(sql.named_members(self._dialect), {"ids": list(asked)}):
                names[row.id] = row.celery_id or str(row.id)
                if row.pattern == Pattern.GROUP:
                    order[row.id] = []
            order |= self.members(connection, [i for i in asked if i in order])
            asked = {i for group in asked & order.keys() for i in order[group] if i not in names}
        if not order.get(group_id):
            return None
        trees: dict[int, Tree] = {}
        for group in in_turn(order):
            trees[group] = (names[group], [trees.get(i) or names[i] for i in order[group]])
        return trees[group_id]

    def cause(self, connection: sa.Connection, task_id: int) -> int | None:
        """The task whose own end made this one, or this group, end badly; None if there is none, or not any more."""
        found = connection.execute(sql.causes(self._dialect), {"ids": [task_id]}).scalar()
        return None if found is None else int(found)

    def followers(self, connection: sa.Connection, task_id: int) -> list[str]:
        """What gets the result of this task, and what it has submitted, by the ids that Celery knows."""
        rows = connection.execute(sql.followers(self._dialect), {"ids": [task_id]})
        return [row.celery_id or str(row.id) for row in sorted(rows, key=lambda row: row.id)]

    def join(self, connection: sa.Connection, new: int, state: State, member: int) -> None:
        """Make the task `new`, which this transaction has inserted in this `state`, a member of the group that `member`
        belongs to. Raises BadInput if that is in no group, or its group has ended."""
        group = connection.execute(sql.group_of(), {"member": member}).first()
        if group is None:
            raise BadInput(
                f"task {member} is no member of a group that is still open. Nothing was submitted: only the last task of a "
                "member of a group or chord can add to it."
            )
        is_over = state in COMPLETE_STATES
        if not is_over:
            connection.execute(sql.join_group(), {"of_group": group.id})
        connection.execute(sql.count_dependent(), {"of_task": new})
        values = {"upstream": new, "downstream": group.id, "condition": str(Condition.ANY), "satisfied": is_over}
        connection.execute(sa.insert(edge), values)
        inputs = json.dumps([*json.loads(group.inputs), new], separators=(",", ":")).encode()
        connection.execute(sql.set_members(), {"of_group": group.id, "new_inputs": inputs})


def in_turn(order: Mapping[int, list[int]]) -> list[int]:
    """These groups (group -> members), each after the groups among its members."""
    left, done = dict(order), []
    while left:
        now = [group for group, members in left.items() if not any(i in left for i in members)]
        if not now:  # a group within itself: its submission would have been refused
            raise ValueError(f"groups {sorted(left)} are members of each other")
        done += now
        for group in now:
            del left[group]
    return done
