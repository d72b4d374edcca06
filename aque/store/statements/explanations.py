"""explain: what must be known of a task, of what it depends on, and of what made it impossible."""

from functools import cache
from typing import Any

import sqlalchemy as sa

from aque.states import COMPLETE_STATES
from aque.store.engine import closure, one_of
from aque.store.statements.common import Statement
from aque.store.tables import edge, task, worker

_SUBJECT = (
    task.c.id,
    task.c.name,
    task.c.state,
    task.c.reason,
    task.c.pattern,
    task.c.requirement_id,
    task.c.rank,
    task.c.duration,
    task.c.unmet,
    task.c.attempt,
    task.c.job_id,
    task.c.submitter,
    task.c.near_host,
    task.c.exit_code,
    task.c.signal,
    task.c.ready_at,
    task.c.started_at,
    task.c.finished_at,
    worker.c.name.label("worker"),
    task.c.not_before,
)


def _subjects() -> sa.Select[Any]:
    return sa.select(*_SUBJECT).select_from(task.outerjoin(worker, worker.c.id == task.c.worker_id)).order_by(task.c.id)


@cache
def subjects(dialect: str) -> Statement:
    """What is to be said of these tasks (`ids`)."""
    return _subjects().where(one_of(dialect, task.c.id, "ids"))


@cache
def member_subjects(dialect: str) -> Statement:
    """The same for the members of these jobs (`ids`)."""
    return _subjects().where(one_of(dialect, task.c.job_id, "ids"), task.c.job_id != task.c.id)


@cache
def links(dialect: str) -> Statement:
    """Edges into these tasks (`ids`), with the tasks that they come from."""
    upstream = task.alias("upstream")
    names = ("name", "state", "reason", "exit_code", "signal", "duration", "started_at")
    return (
        sa.select(
            edge.c.downstream,
            edge.c.upstream,
            edge.c.condition,
            edge.c.satisfied,
            *(upstream.c[name] for name in names),
        )
        .select_from(edge.join(upstream, upstream.c.id == edge.c.upstream))
        .where(one_of(dialect, edge.c.downstream, "ids"))
        .order_by(edge.c.downstream, edge.c.upstream)
    )


@cache
def blamed(dialect: str) -> Statement:
    """These tasks (`ids`), what made them impossible, what made that impossible, and so on."""
    node = task.alias("node")
    state = sa.select(node.c.state).where(node.c.id == edge.c.upstream).correlate(edge).scalar_subquery()
    is_broken = sa.and_(sa.not_(edge.c.satisfied), state.in_(sorted(COMPLETE_STATES)))
    these = sa.select(task.c.id).where(one_of(dialect, task.c.id, "ids"))
    return sa.select(closure(dialect, these, [(edge.c.downstream, edge.c.upstream, is_broken)]).c.id)
