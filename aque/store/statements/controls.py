"""What Celery's remote control asks of tasks that are in the table and on no worker."""

from functools import cache
from typing import Any

import sqlalchemy as sa

from aque.states import COMPLETE_STATES, State
from aque.store.statements.common import Statement, in_states, is_state
from aque.store.tables import payload, requirement, task


@cache
def scheduled() -> Statement:
    """The `limit` tasks of these `queues` that wait for the earliest times."""
    queues: sa.BindParameter[Any] = sa.bindparam("queues", expanding=True)
    return (
        sa.select(
            *[task.c[name] for name in ("id", "celery_id", "name", "not_before", "priority", "pattern")],
            requirement.c.queue,
            payload.c.argv,
            payload.c.arguments,
        )
        .select_from(
            task.join(requirement, requirement.c.id == task.c.requirement_id).join(
                payload, payload.c.task_id == task.c.id
            )
        )
        .where(task.c.not_before.is_not(None), is_state(State.PENDING), requirement.c.queue.in_(queues))
        .order_by(task.c.not_before, task.c.id)
        .limit(sa.bindparam("limit", type_=sa.Integer))
    )


@cache
def with_extra() -> Statement:
    """What has no column, of the tasks that have not ended and have something of the kind."""
    return (
        sa.select(task.c.id, payload.c.extra)
        .select_from(task.join(payload, payload.c.task_id == task.c.id))
        .where(in_states(set(State) - COMPLETE_STATES), sa.func.length(payload.c.extra) > len("{}"))
    )
