"""doctor: the invariants as questions; a sound store has no row for any of them."""

from functools import cache
from typing import Any

import sqlalchemy as sa

from aque.states import COMPLETE_STATES, State
from aque.store.recording import SWITCHED_OFF
from aque.store.statements.common import (
    ON_WORKER,
    Statement,
    is_state,
)
from aque.store.statements.retention import OF_TASK
from aque.store.statements.transitions import last_transition
from aque.store.tables import cursor, edge, environment, limit, payload, requirement, task, token, transition, worker
from aque.values import Children, Condition, Pattern


def checks(dialect: str) -> dict[str, sa.Select[Any]]:
    """Name of the broken rule -> the ids of the tasks, or the names of the limits, that break it."""
    upstream = task.alias("upstream")
    complete = [state.value for state in COMPLETE_STATES]
    holds = sa.and_(
        upstream.c.state.in_(complete),
        sa.or_(
            edge.c.condition == Condition.ANY,
            sa.and_(edge.c.condition == Condition.OK, upstream.c.state == State.SUCCESS),
            sa.and_(edge.c.condition == Condition.FAILED, upstream.c.state != State.SUCCESS),
            sa.and_(edge.c.condition == Condition.ERROR, upstream.c.state == State.ERROR),
        ),
    )
    open_edges = (
        sa.select(sa.func.count())
        .select_from(edge)
        .where(edge.c.downstream == task.c.id, sa.not_(edge.c.satisfied))
        .correlate(task)
        .scalar_subquery()
    )
    child = task.alias("child")
    open_children = (
        sa.select(sa.func.count())
        .select_from(child)
        .where(child.c.parent_id == task.c.id, child.c.state.not_in(complete))
        .correlate(task)
        .scalar_subquery()
    )
    unfinished = task.c.state.not_in(complete)
    edges_out = (
        sa.select(sa.func.count())
        .select_from(edge)
        .where(edge.c.upstream == task.c.id)
        .correlate(task)
        .scalar_subquery()
    )
    on_worker = [state.value for state in ON_WORKER]
    held = (
        sa.select(token.c.task_id, sa.func.count().label("n"))
        .where(token.c.task_id.is_not(None))
        .group_by(token.c.task_id)
        .subquery("held")
    )
    # Only what has been recorded without a break.
    since = (
        sa.select(sa.func.coalesce(sa.func.max(transition.c.id), 0))
        .where(transition.c.state == SWITCHED_OFF)
        .scalar_subquery()
    )
    of_a_task: dict[str, Any] = {"partition_by": transition.c.task_id, "order_by": transition.c.id}
    moves = (
        sa.select(
            transition.c.task_id,
            transition.c.state,
            sa.func.lag(transition.c.state).over(**of_a_task).label("before"),
            sa.func.lead(transition.c.state).over(**of_a_task).label("next"),
        )
        .where(transition.c.id > since)
        .subquery("moves")
    )
    again = [State.READY.value, State.PENDING.value]
    slots = (
        sa.select(sa.func.count())
        .select_from(token)
        .where(token.c.limit_name == limit.c.name, token.c.slot >= 0, token.c.slot < limit.c.capacity)
        .correlate(limit)
        .scalar_subquery()
    )
    return {
        "I8 tokens are held by tasks on workers alone": sa.select(token.c.task_id)
        .select_from(token.outerjoin(task, task.c.id == token.c.task_id))
        .where(token.c.task_id.is_not(None), sa.or_(task.c.id.is_(None), task.c.state.not_in(on_worker))),
        "I8 a task holds as many tokens as its claim took": sa.select(task.c.id)
        .select_from(task.outerjoin(held, held.c.task_id == task.c.id))
        .where(task.c.tokens != sa.func.coalesce(held.c.n, 0)),
        # With one row for each slot there cannot be more held than that, but for what was held when a limit was lowered.
        "I8 a limit has a token for each unit of its capacity": sa.select(limit.c.name).where(
            slots != limit.c.capacity
        ),
        "I7 dependents is the number of edges out of a task": sa.select(task.c.id).where(
            task.c.dependents != edges_out
        ),
        "I7 unmet is the number of open dependencies": sa.select(task.c.id).where(
            unfinished, task.c.unmet != open_edges + sa.case((task.c.not_before.is_not(None), 1), else_=0)
        ),
        "I7 children_left is the number of open children": sa.select(task.c.id).where(
            task.c.children_left != sa.case((task.c.children == Children.DETACH, 0), else_=open_children)
        ),
        "I7 a task waits for its children exactly while there are open ones": sa.select(task.c.id).where(
            is_state(State.WAITING), task.c.children_left == 0
        ),
        "I7 a dependency is satisfied exactly if its upstream task ended so": sa.select(edge.c.downstream)
        .select_from(edge.join(upstream, upstream.c.id == edge.c.upstream).join(task, task.c.id == edge.c.downstream))
        .where(unfinished, edge.c.satisfied != holds),
        "I7 what a dependency made impossible is settled": sa.select(edge.c.downstream)
        .select_from(edge.join(upstream, upstream.c.id == edge.c.upstream).join(task, task.c.id == edge.c.downstream))
        .where(unfinished, upstream.c.state.in_(complete), sa.not_(holds)),
        "I6 what may start or has started waits for nothing": sa.select(task.c.id).where(
            task.c.state.in_([State.READY.value, *[s.value for s in ON_WORKER]]), task.c.unmet != 0
        ),
        "I2 what waits for nothing is ready": sa.select(task.c.id).where(
            task.c.state == State.PENDING, task.c.unmet == 0
        ),
        "I4 an active task has a claim by a worker": sa.select(task.c.id)
        .select_from(task.outerjoin(worker, worker.c.id == task.c.worker_id))
        .where(
            task.c.state.in_([s.value for s in ON_WORKER]),
            sa.or_(task.c.token.is_(None), worker.c.id.is_(None), worker.c.state != "live"),
        ),
        "I4 a task that is not active has no claim": sa.select(task.c.id).where(
            task.c.state.not_in([s.value for s in ON_WORKER]), task.c.token.is_not(None)
        ),
        "I1 a task has a payload": sa.select(task.c.id)
        .select_from(task.outerjoin(payload, payload.c.task_id == task.c.id))
        .where(payload.c.task_id.is_(None), task.c.pattern != Pattern.GROUP),
        "I1 a task has its requirement class": sa.select(task.c.id)
        .select_from(task.outerjoin(requirement, requirement.c.id == task.c.requirement_id))
        .where(task.c.requirement_id.is_not(None), requirement.c.id.is_(None)),
        "I1 a task has its environment": sa.select(payload.c.task_id)
        .select_from(payload.outerjoin(environment, environment.c.id == payload.c.environment_id))
        .where(payload.c.environment_id.is_not(None), environment.c.id.is_(None)),
        "I1 what belongs to a task goes with it": sa.union(
            *[sa.select(column).where(sa.not_(sa.exists().where(task.c.id == column))) for column in OF_TASK]
        )
        .subquery("left_over")
        .select(),
        "I1 an edge joins two tasks": sa.select(edge.c.downstream)
        .select_from(
            edge.outerjoin(upstream, upstream.c.id == edge.c.upstream).outerjoin(task, task.c.id == edge.c.downstream)
        )
        .where(sa.or_(upstream.c.id.is_(None), task.c.id.is_(None))),
        "I3 a complete task has an end, an unfinished one has none": sa.select(task.c.id).where(
            task.c.state.in_(complete) != task.c.finished_at.is_not(None),
            sa.or_(task.c.state.in_(complete), task.c.state.in_([State.PENDING.value, State.RUNNING.value])),
        ),
        "events: what is recorded of a task is in order": sa.select(moves.c.task_id).where(
            moves.c.before.in_(complete), moves.c.state.not_in(again)
        ),
        "events: the last that is recorded of a task is its state": sa.select(task.c.id)
        .select_from(moves.join(task, task.c.id == moves.c.task_id))
        .where(moves.c.next.is_(None), moves.c.state.not_in(again), moves.c.state != task.c.state),
        "events: no cursor is ahead of what is recorded": sa.select(cursor.c.name).where(
            cursor.c.position > last_transition(dialect)
        ),
    }


@cache
def reservations() -> Statement:
    """What is reserved on each live worker, task by task, beside what the worker has."""
    return (
        sa.select(
            worker.c.id,
            worker.c.name,
            worker.c.cpus.label("worker_cpus"),
            worker.c.memory_bytes.label("worker_memory"),
            task.c.id.label("task_id"),
            # What waits inside for other tasks has lent its CPUs, and nothing else.
            sa.case((task.c.blocked, "0"), else_=requirement.c.cpus).label("cpus"),
            requirement.c.memory_bytes,
        )
        .select_from(
            task.join(worker, worker.c.id == task.c.worker_id).join(
                requirement, requirement.c.id == task.c.requirement_id
            )
        )
        .where(is_state(State.RUNNING))
        .order_by(worker.c.id)
    )
