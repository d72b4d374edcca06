"""retention: what is old enough to go, and what nobody uses any more.

Ids rise with time, so that what is old is a range at the beginning of every table, found without an index on times.
"""

from functools import cache
from typing import Any

import sqlalchemy as sa

from aque.states import COMPLETE_STATES
from aque.store.engine import closure, one_of
from aque.store.statements.common import Statement, in_states
from aque.store.tables import (
    attempt,
    edge,
    environment,
    output,
    payload,
    progress,
    refusal,
    requirement,
    result,
    task,
    worker,
)

#: What belongs to a task and goes with it: the column that names the task.
OF_TASK = (
    payload.c.task_id,
    result.c.task_id,
    progress.c.task_id,
    attempt.c.task_id,
    output.c.task_id,
    refusal.c.task_id,
)

_COMPLETE: list[Any] = [sa.literal_column(f"'{state}'") for state in sorted(COMPLETE_STATES)]


@cache
def id_range() -> Statement:
    """The lowest and the highest id of a task; nulls without any."""
    return sa.select(sa.func.min(task.c.id).label("first"), sa.func.max(task.c.id).label("last"))


@cache
def first_from() -> Statement:
    """The first task from `from_id` on, and when it was submitted."""
    return (
        sa.select(task.c.id, task.c.submitted_at)
        .where(task.c.id >= sa.bindparam("from_id", type_=sa.BigInteger))
        .order_by(task.c.id)
        .limit(1)
    )


def _is_over(of: Any = task) -> sa.ColumnElement[bool]:
    """It has ended before `before`."""
    return sa.and_(
        of.c.state.in_(_COMPLETE),
        of.c.finished_at < sa.bindparam("before", type_=sa.Double),
    )


def _is_needed(dialect: str, of: Any = task) -> sa.ColumnElement[bool]:
    """Something that has not ended depends on it, or on a group that it is in, or on one that this is in: who reads the value
    of a group reads those of its members."""
    node, downstream = task.alias("node"), task.alias("downstream")
    is_ended_group = (
        sa.exists()
        .where(node.c.id == edge.c.upstream, node.c.requirement_id.is_(None), node.c.state.in_(_COMPLETE))
        .correlate(edge)
    )
    first = sa.select(edge.c.downstream.label("id")).where(edge.c.upstream == of.c.id).correlate(of)
    found = closure(dialect, first, [(edge.c.upstream, edge.c.downstream, is_ended_group)], per_row=True)
    needing: Any = (
        sa.select(sa.literal_column("1"))
        .select_from(found.join(downstream, downstream.c.id == found.c.id))
        .where(_is_open(downstream))
    )
    return _exists(needing, of)


def _has_open_parent(of: Any = task) -> sa.ColumnElement[bool]:
    """It is a child of a task that has not ended."""
    parent = task.alias("parent")
    return _exists(sa.select(sa.literal_column("1")).where(parent.c.id == of.c.parent_id, _is_open(parent)), of)


def _is_open(of: Any) -> sa.ColumnElement[bool]:
    return of.c.state.not_in(_COMPLETE)  # type: ignore[no-any-return]


def _exists(found: Any, of: Any) -> sa.ColumnElement[bool]:
    """Asked for each row of `of`, by an index: without the OFFSET PostgreSQL may find it once for all rows of the table."""
    return found.correlate(of).offset(sa.literal_column("0")).exists()  # type: ignore[no-any-return]


def _may_go(dialect: str, of: Any = task) -> sa.ColumnElement[bool]:
    return sa.and_(_is_over(of), sa.not_(_is_needed(dialect, of)), sa.not_(_has_open_parent(of)))


def _between(column: Any) -> sa.ColumnElement[bool]:
    return sa.and_(
        column > sa.bindparam("after", type_=sa.BigInteger), column < sa.bindparam("below", type_=sa.BigInteger)
    )


@cache
def window() -> Statement:
    """The first `limit` tasks with ids between `after` and `below`, and whether each is a job that ended before `before`. So is
    a member without its job: it was submitted while that was being removed."""
    job = task.alias("job")
    has_job = sa.exists().where(job.c.id == task.c.job_id).correlate(task)
    is_old_job = sa.and_(sa.or_(task.c.job_id == task.c.id, sa.not_(has_job)), _is_over())
    return (
        sa.select(task.c.id, is_old_job.label("is_old_job"))
        .where(_between(task.c.id))
        .order_by(task.c.id)
        .limit(sa.bindparam("limit", type_=sa.Integer))
    )


@cache
def jobs_that_stay(dialect: str) -> Statement:
    """Those of these jobs (`ids`) that did not end before `before` with all their members, or that something needs."""
    member = task.alias("member")
    heads = sa.select(task.c.id).where(one_of(dialect, task.c.id, "ids"), sa.not_(_may_go(dialect)))
    members = sa.select(member.c.job_id).where(
        one_of(dialect, member.c.job_id, "ids"), member.c.job_id != member.c.id, sa.not_(_may_go(dialect, member))
    )
    return heads.union(members)


@cache
def members_of(dialect: str) -> Statement:
    """The members of these jobs (`ids`), without the jobs themselves."""
    return (
        sa.select(task.c.id)
        .where(one_of(dialect, task.c.job_id, "ids"), task.c.job_id != task.c.id)
        .order_by(task.c.id)
    )


@cache
def lock_if_complete(dialect: str) -> Statement:
    """Lock those of these tasks (`ids`) that are complete; what another transaction is busy with is left out."""
    return (
        sa.select(task.c.id)
        .where(one_of(dialect, task.c.id, "ids"), in_states(COMPLETE_STATES))
        .order_by(task.c.id)
        .with_for_update(skip_locked=True)
    )


@cache
def may_go(dialect: str) -> Statement:
    """Those of these tasks (`ids`), which are locked, that may go: a dependent or a member that came meanwhile keeps one."""
    member = task.alias("member")
    has_members = sa.exists().where(member.c.job_id == task.c.id, member.c.job_id != member.c.id).correlate(task)
    return sa.select(task.c.id).where(one_of(dialect, task.c.id, "ids"), _may_go(dialect), sa.not_(has_members))


@cache
def edges_from_others(dialect: str) -> Statement:
    """Tasks outside of `ids` upon which tasks in `ids` depend, and by how many edges."""
    return (
        sa.select(edge.c.upstream.label("id"), sa.func.count().label("n"))
        .where(one_of(dialect, edge.c.downstream, "ids"), sa.not_(one_of(dialect, edge.c.upstream, "ids")))
        .group_by(edge.c.upstream)
        .order_by(edge.c.upstream)
    )


@cache
def delete_edges(dialect: str, direction: str) -> Statement:
    """The edges whose `direction` (upstream or downstream) is one of `ids`."""
    return sa.delete(edge).where(one_of(dialect, edge.c[direction], "ids"))


@cache
def delete_of_tasks(dialect: str, table: str) -> Statement:
    """The rows of one of the tables in OF_TASK that belong to `ids`."""
    (column,) = [column for column in OF_TASK if column.table.name == table]
    return sa.delete(column.table).where(one_of(dialect, column, "ids"))


@cache
def delete_tasks(dialect: str) -> Statement:
    return sa.delete(task).where(one_of(dialect, task.c.id, "ids"))


@cache
def tasks_with_output() -> Statement:
    """The first `limit` tasks, with ids between `after` and `below`, of which output is stored."""
    return (
        sa.select(output.c.task_id)
        .where(_between(output.c.task_id))
        .distinct()
        .order_by(output.c.task_id)
        .limit(sa.bindparam("limit", type_=sa.Integer))
    )


@cache
def tasks_with_value() -> Statement:
    """The first `limit` tasks, with ids between `after` and `below`, whose result is stored."""
    return (
        sa.select(result.c.task_id)
        .where(_between(result.c.task_id), result.c.value.is_not(None))
        .order_by(result.c.task_id)
        .limit(sa.bindparam("limit", type_=sa.Integer))
    )


@cache
def over_and_not_needed(dialect: str) -> Statement:
    """Those of these tasks (`ids`), which are locked, that ended before `before` and that nothing needs any more."""
    return sa.select(task.c.id).where(one_of(dialect, task.c.id, "ids"), _is_over(), sa.not_(_is_needed(dialect)))


@cache
def delete_values(dialect: str) -> Statement:
    """The values of the results of these tasks (`ids`); errors stay with their tasks."""
    return sa.delete(result).where(one_of(dialect, result.c.task_id, "ids"), result.c.error.is_(None))


@cache
def output_sizes_of(dialect: str) -> Statement:
    """Bytes of output of all attempts of each of these tasks (`ids`)."""
    return (
        sa.select(output.c.task_id, sa.func.sum(sa.func.length(output.c.data)).label("size"))
        .where(one_of(dialect, output.c.task_id, "ids"))
        .group_by(output.c.task_id)
    )


@cache
def mark_cut(dialect: str) -> Statement:
    """Output of these tasks (`ids`) is not complete any more."""
    return sa.update(task).where(one_of(dialect, task.c.id, "ids")).values(truncated=sa.true())


@cache
def forget_workers() -> Statement:
    """Workers that have gone and were last seen before `before`, and that hold nothing."""
    held = sa.exists().where(task.c.worker_id == worker.c.id, task.c.token.is_not(None)).correlate(worker)
    return sa.delete(worker).where(
        worker.c.state != "live", worker.c.seen_at < sa.bindparam("before", type_=sa.Double), sa.not_(held)
    )


# -- what tasks share ---------------------------------------------------------------------------------------------------------


@cache
def unused_requirements() -> Statement:
    """Requirement classes that no task has, with their digests. Reads the whole table of tasks."""
    used = sa.exists().where(task.c.requirement_id == requirement.c.id).correlate(requirement)
    return sa.select(requirement.c.id, requirement.c.digest).where(sa.not_(used))


@cache
def retire_requirements(dialect: str) -> Statement:
    """Let nobody find these classes (`ids`) by their digests any more; who has their id still may use it."""
    return (
        sa.update(requirement)
        .where(one_of(dialect, requirement.c.id, "ids"))
        .values(digest=sa.bindparam("prefix", type_=sa.Text) + requirement.c.digest)
    )


@cache
def delete_requirements(dialect: str) -> Statement:
    return sa.delete(requirement).where(one_of(dialect, requirement.c.id, "ids"))


@cache
def unused_environments() -> Statement:
    """Environments that no task has. Reads the whole table of payloads."""
    used = sa.exists().where(payload.c.environment_id == environment.c.id).correlate(environment)
    return sa.select(environment.c.id).where(sa.not_(used))


@cache
def delete_environments() -> Statement:
    return sa.delete(environment).where(environment.c.id.in_(sa.bindparam("digests", expanding=True)))


# -- how much there is --------------------------------------------------------------------------------------------------------


@cache
def output_bytes() -> Statement:
    """Captured bytes that are stored. Reads the whole table, though not the bytes."""
    return sa.select(sa.func.coalesce(sa.func.sum(sa.func.length(output.c.data)), 0))


@cache
def result_bytes() -> Statement:
    """Bytes of results and errors."""
    return sa.select(
        sa.func.coalesce(
            sa.func.sum(
                sa.func.coalesce(sa.func.length(result.c.value), 0)
                + sa.func.coalesce(sa.func.length(result.c.error), 0)
            ),
            0,
        )
    )


__all__ = [
    "OF_TASK",
    "delete_edges",
    "delete_environments",
    "delete_of_tasks",
    "delete_requirements",
    "delete_tasks",
    "delete_values",
    "edges_from_others",
    "first_from",
    "forget_workers",
    "id_range",
    "jobs_that_stay",
    "lock_if_complete",
    "mark_cut",
    "may_go",
    "members_of",
    "output_bytes",
    "output_sizes_of",
    "over_and_not_needed",
    "result_bytes",
    "retire_requirements",
    "tasks_with_output",
    "tasks_with_value",
    "unused_environments",
    "unused_requirements",
    "window",
]
