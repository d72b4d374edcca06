"""Times: tasks that do not start before one, and tasks that are not started after one."""

from functools import cache

import sqlalchemy as sa

from aque.states import Event, Reason, State, sources
from aque.store.engine import wall_clock
from aque.store.statements.claims import READY_COLUMNS
from aque.store.statements.common import Statement, in_states, is_state
from aque.store.statements.finishes import MOVED
from aque.store.tables import task

#: So many at a time: a transaction must not hold its locks for long.
MOST = 1000


@cache
def next_time() -> Statement:
    """When the next task is due or expires, in seconds since 1970; null: none."""
    due = sa.select(sa.func.min(task.c.not_before).label("at")).where(task.c.not_before.is_not(None))
    expires = sa.select(sa.func.min(task.c.expires_at).label("at")).where(task.c.expires_at.is_not(None))
    both = sa.union_all(due, expires).subquery()
    return sa.select(sa.func.min(both.c.at))


@cache
def due(dialect: str) -> Statement:
    """What has waited for its time waits for it no longer; with nothing else to wait for it is ready."""
    picked = (
        sa.select(task.c.id)
        .where(task.c.not_before.is_not(None), task.c.not_before <= wall_clock())
        .order_by(task.c.not_before)
        .limit(MOST)
        .with_for_update(skip_locked=True, of=task)
        .cte("picked")
    )
    released = sa.and_(task.c.unmet == 1, is_state(State.PENDING))
    return (
        sa.update(task)
        .where(task.c.id == picked.c.id, task.c.not_before.is_not(None))
        .values(
            unmet=task.c.unmet - 1,
            not_before=None,
            state=sa.case((released, State.READY.value), else_=task.c.state),
            ready_at=sa.case((released, wall_clock()), else_=task.c.ready_at),
        )
        .returning(task.c.state, *(task.c[name] for name in READY_COLUMNS))
    )


@cache
def expire(dialect: str) -> Statement:
    """Cancel what was not started in time."""
    picked = (
        sa.select(task.c.id)
        .where(task.c.expires_at.is_not(None), task.c.expires_at <= wall_clock())
        .order_by(task.c.expires_at)
        .limit(MOST)
        .with_for_update(skip_locked=True, of=task)
        .cte("picked")
    )
    unstarted = in_states(sources(Event.CANCEL) - {State.CLAIMED})
    return (
        sa.update(task)
        .where(task.c.id == picked.c.id, unstarted)
        .values(
            state=State.CANCELLED,
            reason=Reason.EXPIRED,
            expires_at=None,
            not_before=None,
            finished_at=wall_clock(),
        )
        .returning(*MOVED)
    )
