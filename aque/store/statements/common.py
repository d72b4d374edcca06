"""Words that the statements share."""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from aque.states import ENDING_SIGNALS, State
from aque.store.tables import task
from aque.values import Usage

Statement = Any  # some SQLAlchemy construct: its own type says nothing that a caller could use
ON_WORKER = (State.CLAIMED, State.RUNNING)
#: Of a task and of an attempt.
USAGE_COLUMNS = tuple(Usage.__slots__)


# Literals, not parameters: PostgreSQL uses a partial index only where it can prove its condition.
def in_states(states: Any) -> sa.ColumnElement[bool]:
    return task.c.state.in_([sa.literal_column(f"'{state}'") for state in sorted(states)])


def is_state(state: State) -> sa.ColumnElement[bool]:
    return task.c.state == sa.literal_column(f"'{state}'")


def locked_in_order(where: sa.ColumnElement[bool]) -> sa.CTE:
    """The ids of these tasks, locked smallest first, groups last: what a group waits for is always locked before it.

    Not within this order: `finishes.count_children` locks parents when their children, whose ids are greater, are locked
    already. Who locks a parent and then its children may meet that in a deadlock, and then one of the two is run again.
    """
    ordered = sa.select(task.c.id).where(where).order_by(task.c.requirement_id.is_(None), task.c.id)
    return ordered.with_for_update(of=task).cte("locked")


def is_not_being_ended() -> sa.ColumnElement[bool]:
    """A signal that only has to be delivered changes nothing about what becomes of a task."""
    ending: list[Any] = [sa.literal_column(str(number)) for number in sorted(ENDING_SIGNALS)]
    return sa.func.coalesce(task.c.kill_signal, 0).not_in(ending)


def insert_into(dialect: str, table: sa.Table) -> Any:
    """An INSERT that knows ON CONFLICT; both databases have the same one."""
    return (sqlite.insert if dialect == "sqlite" else postgresql.insert)(table)
