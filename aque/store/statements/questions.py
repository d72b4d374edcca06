"""Questions that people and programs ask of the tables."""

from functools import cache
from typing import Any

import sqlalchemy as sa

from aque.store.engine import first_of_each, one_of, row_set
from aque.store.statements.common import (
    Statement,
)
from aque.store.tables import edge, output, requirement, task, worker

#: What `aque.tasks` and `aque status` can ask for, by the names of the command line's contract.
FIELDS: dict[str, sa.ColumnElement[Any]] = {
    "id": task.c.id,
    "name": task.c.name,
    "state": task.c.state,
    "reason": task.c.reason,
    "attempt": task.c.attempt,
    "worker": worker.c.name,
    "exit_code": task.c.exit_code,
    "signal": task.c.signal,
    "truncated": task.c.truncated,
    "priority": task.c.priority,
    "cpus": requirement.c.cpus,
    "memory": requirement.c.memory_bytes,
    "queue": requirement.c.queue,
    "host": requirement.c.host,
    "platform": requirement.c.platform,
    "user": requirement.c.user,
    "interpreter": requirement.c.interpreter,
    "resources": requirement.c.resources,
    "limits": requirement.c.limits,
    "tags": requirement.c.tags,
    "requires_paths": requirement.c.requires_paths,
    "places": requirement.c.places,
    "pattern": task.c.pattern,
    "layer": task.c.layer,
    "seq": task.c.seq,
    "unmet": task.c.unmet,
    "lost": task.c.lost,
    "progress": task.c.progress,
    "duration": task.c.duration,
    "parent_id": task.c.parent_id,
    "job_id": task.c.job_id,
    "celery_id": task.c.celery_id,
    "submitter": task.c.submitter,
    "submitted_at": task.c.submitted_at,
    "ready_at": task.c.ready_at,
    "not_before": task.c.not_before,
    "expires_at": task.c.expires_at,
    "started_at": task.c.started_at,
    "finished_at": task.c.finished_at,
    "io_bytes": task.c.io_bytes,
    "cpu_seconds": task.c.cpu_seconds,
    "max_rss_bytes": task.c.max_rss_bytes,
    "read_bytes": task.c.read_bytes,
    "written_bytes": task.c.written_bytes,
}
WORKER_FIELDS = frozenset({"worker"})
REQUIREMENT_FIELDS = frozenset(
    {
        "cpus",
        "memory",
        "queue",
        "host",
        "platform",
        "user",
        "interpreter",
        "resources",
        "limits",
        "tags",
        "requires_paths",
    }
    | {"places"}
)


def tasks(fields: tuple[str, ...], where: dict[str, Any], newest: int | None = None) -> sa.Select[Any]:
    """These fields of the tasks that match `where` (field -> value, or a list of values), in id order; with `newest` only
    so many, those with the highest ids, the newest first."""
    source: Any = task
    asked = {*fields, *where}
    if asked & REQUIREMENT_FIELDS:
        source = source.outerjoin(requirement, requirement.c.id == task.c.requirement_id)
    if asked & WORKER_FIELDS:
        source = source.outerjoin(worker, worker.c.id == task.c.worker_id)
    statement = sa.select(*[FIELDS[name].label(name) for name in fields]).select_from(source)
    for name, value in where.items():
        column = FIELDS[name]
        if isinstance(value, (list, tuple, set, frozenset)):
            statement = statement.where(column.in_(list(value)))
        else:
            statement = statement.where(column.is_(None) if value is None else column == value)
    return statement.order_by(task.c.id) if newest is None else statement.order_by(task.c.id.desc()).limit(newest)


@cache
def dependencies(dialect: str) -> Statement:
    """Edges into these tasks (`ids`)."""
    return (
        sa.select(edge.c.downstream, edge.c.upstream)
        .where(one_of(dialect, edge.c.downstream, "ids"))
        .order_by(edge.c.downstream, edge.c.upstream)
    )


@cache
def counts() -> Statement:
    return sa.select(task.c.state, sa.func.count()).group_by(task.c.state)


@cache
def last_id() -> Statement:
    """The newest task or job that `submitter` submitted."""
    return sa.select(sa.func.max(task.c.job_id)).where(task.c.submitter == sa.bindparam("submitter"))


@cache
def output_after(dialect: str) -> Statement:
    """The next `limit` captured pieces of each of these streams (`rows`: task_id, attempt, fd, after): those whose offset is
    greater than `after`. They need not be contiguous: a flood is cut."""
    kinds = {"task_id": sa.BigInteger(), "attempt": sa.Integer(), "fd": sa.Integer(), "after": sa.BigInteger()}
    rows = row_set(dialect, "rows", **kinds)
    stream = [output.c[name] == rows.c[name] for name in ("task_id", "attempt", "fd")]
    return first_of_each(dialect, rows, output, stream, output.c.offset, rows.c.after, "limit")


@cache
def output_sizes(dialect: str) -> Statement:
    """How many bytes of each stream were captured of the latest attempt of these tasks (`ids`)."""
    return (
        sa.select(output.c.task_id, output.c.attempt, output.c.fd, sa.func.sum(sa.func.length(output.c.data)))
        .select_from(output.join(task, sa.and_(task.c.id == output.c.task_id, task.c.attempt == output.c.attempt)))
        .where(one_of(dialect, output.c.task_id, "ids"))
        .group_by(output.c.task_id, output.c.attempt, output.c.fd)
    )


@cache
def outputs(dialect: str) -> Statement:
    """All that was captured of the latest attempt of these tasks (`ids`), in order within each stream."""
    return (
        sa.select(output.c.task_id, output.c.fd, output.c.data)
        .select_from(output.join(task, sa.and_(task.c.id == output.c.task_id, task.c.attempt == output.c.attempt)))
        .where(one_of(dialect, output.c.task_id, "ids"))
        .order_by(output.c.task_id, output.c.fd, output.c.offset)
    )
