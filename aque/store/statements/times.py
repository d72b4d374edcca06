"""Times: tasks that do not start before one, and tasks that are not started after one."""

from functools import cache

import sqlalchemy as sa

from aque.states import UNREADY_STATES, Event, Reason, State, sources
from aque.store.engine import wall_clock
from aque.store.statements.claims import READY_COLUMNS
from aque.store.statements.common import Statement, in_states, is_state
from aque.store.statements.finishes import MOVED
from aque.store.tables import task

#: So many at a time: a transaction must not hold its locks for long.
MOST = 1000


def _timed() -> sa.ColumnElement[bool]:
    """It waits for a time."""
    return sa.and_(task.c.not_before.is_not(None), in_states(UNREADY_STATES))


def _expiring() -> sa.ColumnElement[bool]:
    """It is cancelled if it is not started in time. What a worker has claimed ahead is left to it: it expires if it comes
    back."""
    return sa.and_(task.c.expires_at.is_not(None), in_states(sources(Event.CANCEL) - {State.CLAIMED}))


def _now() -> sa.ScalarSelect[float]:
    """A subquery, read once: PostgreSQL compares no index with the clock itself, which may tick from row to row."""
    return sa.select(wall_clock()).scalar_subquery()


@cache
def next_time() -> Statement:
    """When there is next something for `due` or `expire`, in seconds since 1970; null: never, as things are."""
    due = sa.select(sa.func.min(task.c.not_before).label("at")).where(_timed())
    expires = sa.select(sa.func.min(task.c.expires_at).label("at")).where(_expiring())
    both = sa.union_all(due, expires).subquery()
    return sa.select(sa.func.min(both.c.at))


@cache
def due(dialect: str) -> Statement:
    """What has waited for its time waits for it no longer; with nothing else to wait for it is ready. A group is left pending:
    `end_groups` settles it."""
    picked = (
        sa.select(task.c.id)
        .where(_timed(), task.c.not_before <= _now())
        .order_by(task.c.not_before)
        .limit(MOST)
        .with_for_update(skip_locked=True, of=task)
        .cte("picked")
    )
    released = sa.and_(task.c.unmet == 1, is_state(State.PENDING), task.c.requirement_id.is_not(None))
    return (
        sa.update(task)
        .where(task.c.id == picked.c.id, _timed())
        .values(
            unmet=task.c.unmet - 1,
            not_before=None,
            state=sa.case((released, State.READY.value), else_=task.c.state),
            ready_at=sa.case((released, wall_clock()), else_=task.c.ready_at),
        )
        .returning(task.c.state, task.c.unmet, *(task.c[name] for name in READY_COLUMNS))
    )


@cache
def expire(dialect: str) -> Statement:
    """Cancel what was not started in time."""
    picked = (
        sa.select(task.c.id)
        .where(_expiring(), task.c.expires_at <= _now())
        .order_by(task.c.expires_at)
        .limit(MOST)
        .with_for_update(skip_locked=True, of=task)
        .cte("picked")
    )
    return (
        sa.update(task)
        .where(task.c.id == picked.c.id, _expiring())
        .values(
            state=State.CANCELLED,
            reason=Reason.EXPIRED,
            expires_at=None,
            not_before=None,
            finished_at=wall_clock(),
        )
        .returning(*MOVED)
    )
