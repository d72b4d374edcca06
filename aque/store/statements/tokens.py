"""Farm-wide limits: a limit of N is N rows, its tokens, which are taken and given back one by one."""

from functools import cache
from typing import Any

import sqlalchemy as sa

from aque.states import State
from aque.store.engine import first_unlocked, one_of, row_set
from aque.store.statements.common import Statement, insert_into, is_state
from aque.store.tables import limit, requirement, task, token

_IS_FREE = token.c.task_id.is_(None)


def _below() -> sa.ColumnElement[int]:
    """The slots of a row of `limit` that may be taken are those below this: none while what was held when the limit was
    lowered is beyond it, so that with what is held within it never more is in use."""
    held = token.alias("held")
    beyond = sa.exists().where(
        held.c.limit_name == limit.c.name, held.c.slot >= limit.c.capacity, held.c.task_id.is_not(None)
    )
    return sa.case((beyond.correlate(limit), 0), else_=limit.c.capacity)


@cache
def lock_free_tokens(dialect: str) -> Statement:
    """For each of these limits (`rows`: name, n) that there is, up to `n` free slots that nobody else is about to take, as
    (name, slot), locked until the transaction ends; a slot of null where there is none."""
    rows = row_set(dialect, "rows", name=sa.Text(), n=sa.Integer())
    wanted = (
        sa.select(limit.c.name, rows.c.n, _below().label("below"))
        .select_from(limit.join(rows, limit.c.name == rows.c.name))
        .subquery("wanted")
    )
    return first_unlocked(dialect, wanted, token, token.c.limit_name, _IS_FREE, token.c.slot)


@cache
def take_tokens(dialect: str) -> Statement:
    """Let tasks hold these locked tokens (`rows`: limit_name, slot, task_id; without a task: nobody)."""
    rows = row_set(dialect, "rows", limit_name=sa.Text(), slot=sa.Integer(), task_id=sa.BigInteger())
    return (
        sa.update(token)
        .where(token.c.limit_name == rows.c.limit_name, token.c.slot == rows.c.slot)
        .values(task_id=rows.c.task_id)
    )


@cache
def free_tokens(dialect: str) -> Statement:
    """Free what these tasks (`ids`) hold, and on PostgreSQL, in the same statement, let them count it as none; on SQLite
    `count_no_tokens` does. Returns a row for each token."""
    freed = sa.update(token).where(one_of(dialect, token.c.task_id, "ids")).values(task_id=None)
    freed_rows = freed.returning(token.c.limit_name, token.c.slot)
    if dialect == "sqlite":
        return freed_rows
    counted = sa.update(task).where(one_of(dialect, task.c.id, "ids")).values(tokens=0).returning(task.c.id)
    return sa.select(freed_rows.cte("freed")).add_cte(counted.cte("counted"))


@cache
def count_no_tokens() -> Statement:
    """SQLite: see `free_tokens`."""
    return sa.update(task).where(one_of("sqlite", task.c.id, "ids")).values(tokens=0)


@cache
def set_limit(dialect: str) -> Statement:
    statement = insert_into(dialect, limit)
    return statement.on_conflict_do_update(
        index_elements=[limit.c.name], set_={"capacity": statement.excluded.capacity}
    )


@cache
def remove_limit() -> Statement:
    return sa.delete(limit).where(limit.c.name == sa.bindparam("which_limit")).returning(limit.c.name)


@cache
def add_tokens(dialect: str) -> Statement:
    """The slots under `below` of `which_limit` that it does not have."""
    first = sa.select(sa.literal(0).label("slot")).where(sa.bindparam("below", type_=sa.Integer) > 0)
    slots = first.cte("slots", recursive=True)
    slots = slots.union_all(
        sa.select(slots.c.slot + 1).where(slots.c.slot + 1 < sa.bindparam("below", type_=sa.Integer))
    )
    there = token.alias("there")
    missing = sa.select(sa.bindparam("which_limit", type_=sa.Text), slots.c.slot).where(
        sa.not_(
            sa.exists().where(
                there.c.limit_name == sa.bindparam("which_limit", type_=sa.Text), there.c.slot == slots.c.slot
            )
        )
    )
    return sa.insert(token).from_select(["limit_name", "slot"], missing)


@cache
def drop_tokens() -> Statement:
    """Remove the free tokens that are beyond their limits, or of limits that are gone: of all limits, so that those that
    were held when one was removed go one day."""
    capacity = sa.select(limit.c.capacity).where(limit.c.name == token.c.limit_name).scalar_subquery()
    return sa.delete(token).where(_IS_FREE, token.c.slot >= sa.func.coalesce(capacity, 0))


@cache
def capacities() -> Statement:
    return sa.select(limit.c.name, limit.c.capacity).order_by(limit.c.name)


@cache
def free_counts(dialect: str) -> Statement:
    """How many tokens of each of these limits (`rows`: name) can be taken."""
    rows = row_set(dialect, "rows", name=sa.Text())
    wanted = (
        sa.select(limit.c.name, _below().label("below"))
        .select_from(limit.join(rows, limit.c.name == rows.c.name))
        .subquery("wanted")
    )
    count = (
        sa.select(sa.func.count())
        .select_from(token)
        .where(token.c.limit_name == wanted.c.name, _IS_FREE, token.c.slot < wanted.c.below)
        .scalar_subquery()
    )
    return sa.select(wanted.c.name, count.label("n"))


@cache
def held_tokens() -> Statement:
    """(limit, task, how many) for all that is held."""
    return (
        sa.select(token.c.limit_name, token.c.task_id, sa.func.count().label("n"))
        .where(token.c.task_id.is_not(None))
        .group_by(token.c.limit_name, token.c.task_id)
        .order_by(token.c.task_id)
    )


@cache
def limited_ready() -> Statement:
    """How many tasks are ready of each requirement class that asks for limits, or whose user has one."""
    mine: Any = sa.select(limit.c.name).where(limit.c.name == sa.literal_column("'user:'") + requirement.c.user)
    return (
        sa.select(requirement.c.limits, requirement.c.user, sa.func.count().label("n"))
        .select_from(requirement.join(task, task.c.requirement_id == requirement.c.id))
        .where(is_state(State.READY), sa.or_(requirement.c.limits != "", mine.exists()))
        .group_by(requirement.c.id, requirement.c.limits, requirement.c.user)
    )
