"""change: what people set of tasks that wait."""

from functools import cache

import sqlalchemy as sa

from aque.store.engine import one_of, row_set
from aque.store.statements.common import Statement
from aque.store.tables import reservation, task


@cache
def changeable(dialect: str, lock: bool) -> Statement:
    """What decides whether and how these tasks (`ids`) and the members of those that are jobs can be changed; with `lock`
    locked in order until the transaction ends."""
    member = sa.and_(one_of(dialect, task.c.job_id, "ids"), task.c.job_id != task.c.id)
    found = (
        sa.select(task.c.id, task.c.state, task.c.requirement_id, task.c.submitter)
        .where(sa.or_(one_of(dialect, task.c.id, "ids"), member))
        .order_by(task.c.requirement_id.is_(None), task.c.id)
    )
    return found.with_for_update(of=task) if lock else found


@cache
def set_priority(dialect: str) -> Statement:
    """What age has added to the priority stays."""
    wanted = sa.bindparam("wanted_priority", type_=sa.Integer)
    return (
        sa.update(task)
        .where(one_of(dialect, task.c.id, "ids"))
        .values(priority=wanted, rank=task.c.rank + (sa.bindparam("wanted_priority") - task.c.priority))
    )


@cache
def set_duration(dialect: str) -> Statement:
    return sa.update(task).where(one_of(dialect, task.c.id, "ids")).values(duration=sa.bindparam("wanted_seconds"))


@cache
def set_requirement(dialect: str) -> Statement:
    """Other requirement classes for tasks (`rows`: id, requirement_id)."""
    rows = row_set(dialect, "rows", id=sa.BigInteger(), requirement_id=sa.BigInteger())
    return sa.update(task).where(task.c.id == rows.c.id).values(requirement_id=rows.c.requirement_id)


@cache
def drop_reservations(dialect: str) -> Statement:
    """Nobody keeps room for these tasks (`ids`) any more."""
    return sa.delete(reservation).where(one_of(dialect, reservation.c.task_id, "ids"))
