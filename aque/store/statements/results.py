"""results: what Celery's AsyncResult asks of tasks."""

from functools import cache

import sqlalchemy as sa

from aque.states import ACTIVE_STATES, COMPLETE_STATES
from aque.store.engine import one_of
from aque.store.statements.common import Statement, in_states
from aque.store.statements.finishes import results
from aque.store.tables import payload, progress, requirement, task, worker


@cache
def ended_results(dialect: str) -> Statement:
    """The same of those that are complete."""
    return results(dialect).where(in_states(COMPLETE_STATES))


@cache
def children_of(dialect: str) -> Statement:
    """The children of these tasks (`ids`), by their parents."""
    return (
        sa.select(task.c.parent_id, task.c.id, task.c.celery_id)
        .where(one_of(dialect, task.c.parent_id, "ids"))
        .order_by(task.c.id)
    )


@cache
def told(dialect: str) -> Statement:
    """What those of these tasks (`ids`) that run now have told of themselves in this attempt."""
    return (
        sa.select(progress.c.task_id, progress.c.state, progress.c.meta)
        .select_from(
            progress.join(task, sa.and_(task.c.id == progress.c.task_id, task.c.attempt == progress.c.attempt))
        )
        .where(one_of(dialect, task.c.id, "ids"), in_states(ACTIVE_STATES))
    )


@cache
def calls(dialect: str) -> Statement:
    """What these tasks (`ids`) are calls of, and where they ran."""
    return (
        sa.select(task.c.id, payload.c.arguments, requirement.c.queue, worker.c.name.label("worker"))
        .select_from(
            task.outerjoin(payload, payload.c.task_id == task.c.id)
            .outerjoin(requirement, requirement.c.id == task.c.requirement_id)
            .outerjoin(worker, worker.c.id == task.c.worker_id)
        )
        .where(one_of(dialect, task.c.id, "ids"))
    )
