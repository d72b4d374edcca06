"""Groups: their members in order, what joins one, and whose end it was that made something impossible."""

from functools import cache

import sqlalchemy as sa

from aque.states import COMPLETE_STATES, State
from aque.store.engine import closure, one_of
from aque.store.statements.common import Statement, in_states, is_state
from aque.store.tables import edge, payload, task
from aque.values import Condition, Pattern


@cache
def members(dialect: str) -> Statement:
    """The lists of members of these groups (`ids`); a job, whose members have no order, has none."""
    return sa.select(payload.c.task_id, payload.c.inputs).where(one_of(dialect, payload.c.task_id, "ids"))


@cache
def named_members(dialect: str) -> Statement:
    """Id, pattern and the id that a caller brought of these tasks (`ids`)."""
    return sa.select(task.c.id, task.c.pattern, task.c.celery_id).where(one_of(dialect, task.c.id, "ids"))


@cache
def causes(dialect: str) -> Statement:
    """Of what these tasks (`ids`) waited for, and that waited for, and so on: what ended otherwise than well by itself,
    errors first, then the one that ended first."""
    state = sa.select(task.c.state).where(task.c.id == edge.c.upstream).correlate(edge).scalar_subquery()
    bad = sorted(str(state) for state in COMPLETE_STATES - {State.SUCCESS})
    these = sa.select(task.c.id).where(one_of(dialect, task.c.id, "ids"))
    found = closure(dialect, these, [(edge.c.downstream, edge.c.upstream, state.in_(bad))])
    own = in_states({State.ERROR, State.KILLED, State.CANCELLED})
    return (
        sa.select(task.c.id)
        .select_from(task.join(found, found.c.id == task.c.id))
        .where(own, task.c.pattern != Pattern.GROUP)
        .order_by(sa.not_(is_state(State.ERROR)), task.c.finished_at, task.c.id)
        .limit(1)
    )


@cache
def group_of() -> Statement:
    """The group that waits for its member `member` in a canvas, with its list of members."""
    return (
        sa.select(task.c.id, payload.c.inputs)
        .select_from(
            edge.join(task, task.c.id == edge.c.downstream).join(payload, payload.c.task_id == edge.c.downstream)
        )
        .where(
            edge.c.upstream == sa.bindparam("member", type_=sa.BigInteger),
            edge.c.condition == Condition.ANY.value,
            task.c.pattern == Pattern.GROUP.value,
            is_state(State.PENDING),
        )
        .order_by(task.c.id)
        .limit(1)
        .with_for_update(of=task)
    )


@cache
def join_group() -> Statement:
    """Let the group `of_group` wait for one more member."""
    return (
        sa.update(task).where(task.c.id == sa.bindparam("of_group", type_=sa.BigInteger)).values(unmet=task.c.unmet + 1)
    )


@cache
def count_dependent() -> Statement:
    """One more edge out of the task `of_task`."""
    return (
        sa.update(task)
        .where(task.c.id == sa.bindparam("of_task", type_=sa.BigInteger))
        .values(dependents=task.c.dependents + 1)
    )


@cache
def set_members() -> Statement:
    """The list of members of the group `of_group` is now `new_inputs`."""
    return (
        sa.update(payload)
        .where(payload.c.task_id == sa.bindparam("of_group", type_=sa.BigInteger))
        .values(inputs=sa.bindparam("new_inputs", type_=sa.LargeBinary))
    )


@cache
def followers(dialect: str) -> Statement:
    """What waits for these tasks (`ids`), but for groups, and what they have submitted while they ran."""
    waiting = (
        sa.select(task.c.id, task.c.celery_id)
        .select_from(edge.join(task, task.c.id == edge.c.downstream))
        .where(
            one_of(dialect, edge.c.upstream, "ids"),
            edge.c.condition == Condition.OK.value,
            task.c.pattern != Pattern.GROUP.value,
        )
    )
    submitted = sa.select(task.c.id, task.c.celery_id).where(one_of(dialect, task.c.parent_id, "ids"))
    return waiting.union(submitted)
