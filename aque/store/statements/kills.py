"""kill: what a person withdraws or signals, and how far that reaches."""

from functools import cache
from typing import Any

import sqlalchemy as sa

from aque.states import COMPLETE_STATES, ENDING_SIGNALS, Event, Reason, State, sources
from aque.store.engine import closure, one_of, row_set, wall_clock
from aque.store.statements.common import (
    ON_WORKER,
    Statement,
    in_states,
    is_state,
    locked_in_order,
)
from aque.store.statements.finishes import MOVED
from aque.store.tables import edge, task, worker
from aque.values import Children


@cache
def with_members(dialect: str) -> Statement:
    """State of these tasks (`ids`), of the members of those that are jobs or groups, and of theirs."""
    members = (task.c.job_id, task.c.id, task.c.job_id != task.c.id)
    found = closure(dialect, _these(dialect), [members])
    return sa.select(task.c.id, task.c.state).where(task.c.id.in_(sa.select(found.c.id)))


@cache
def lock_with_members(dialect: str) -> Statement:
    """The same, locked in order until the transaction ends."""
    return _in_order_of_locks(with_members(dialect))


@cache
def lock_tasks(dialect: str) -> Statement:
    """State of these tasks (`ids`), locked in order until the transaction ends."""
    return _in_order_of_locks(sa.select(task.c.id, task.c.state).where(one_of(dialect, task.c.id, "ids")))


def _in_order_of_locks(tasks: sa.Select[Any]) -> sa.Select[Any]:
    return tasks.order_by(task.c.requirement_id.is_(None), task.c.id).with_for_update(of=task)


@cache
def upstream(dialect: str) -> Statement:
    """These tasks (`ids`), what they depend on, their children, and so on. What has succeeded is left out, and so is what
    is only behind it: all that it depended on is over."""
    node = task.alias("node")
    state = sa.select(node.c.state).where(node.c.id == edge.c.upstream).correlate(edge).scalar_subquery()
    links = [(edge.c.downstream, edge.c.upstream, state != State.SUCCESS), _CHILDREN]
    return sa.select(closure(dialect, _these(dialect), links).c.id)


@cache
def downstream(dialect: str) -> Statement:
    """These tasks (`ids`), what depends on them, their children, and so on."""
    links = [(edge.c.upstream, edge.c.downstream, sa.true()), _CHILDREN]
    return sa.select(closure(dialect, _these(dialect), links).c.id)


#: From a task to its children.
_CHILDREN = (task.c.parent_id, task.c.id, sa.true())


def _these(dialect: str) -> sa.Select[Any]:
    return sa.select(task.c.id).where(one_of(dialect, task.c.id, "ids"))


@cache
def unfinished(dialect: str) -> Statement:
    """Those of these tasks (`ids`) that are not complete."""
    is_group = task.c.requirement_id.is_(None).label("is_group")
    return sa.select(task.c.id, is_group).where(one_of(dialect, task.c.id, "ids"), sa.not_(in_states(COMPLETE_STATES)))


@cache
def open_dependents(dialect: str) -> Statement:
    """Edges out of these tasks (`ids`) whose dependents are not complete."""
    is_group = task.c.requirement_id.is_(None).label("is_group")
    return (
        sa.select(edge.c.upstream, edge.c.downstream, is_group)
        .select_from(edge.join(task, task.c.id == edge.c.downstream))
        .where(one_of(dialect, edge.c.upstream, "ids"), sa.not_(in_states(COMPLETE_STATES)))
    )


@cache
def children(dialect: str) -> Statement:
    """(parent, child) for the children of these tasks (`ids`)."""
    return sa.select(task.c.parent_id, task.c.id).where(one_of(dialect, task.c.parent_id, "ids"))


@cache
def cancel(dialect: str) -> Statement:
    """Withdraw the tasks among `ids` that no worker has."""
    unclaimed = in_states(sources(Event.CANCEL) - {State.CLAIMED})
    locked = locked_in_order(sa.and_(one_of(dialect, task.c.id, "ids"), unclaimed))
    return (
        sa.update(task)
        .where(task.c.id == locked.c.id)
        .values(
            state=State.CANCELLED, reason=Reason.REQUEST, not_before=None, expires_at=None, finished_at=wall_clock()
        )
        .returning(*MOVED)
    )


@cache
def kill_waiting(dialect: str) -> Statement:
    """End the tasks among `ids` whose own process has ended, and that wait for their children."""
    locked = locked_in_order(sa.and_(one_of(dialect, task.c.id, "ids"), is_state(State.WAITING)))
    return (
        sa.update(task)
        .where(task.c.id == locked.c.id)
        .values(state=State.KILLED, reason=Reason.REQUEST, finished_at=wall_clock())
        .returning(*MOVED)
    )


@cache
def descendants(dialect: str) -> Statement:
    """The open children of these tasks (`ids`), theirs and so on, but for those of tasks that have detached them."""
    parent = task.alias("parent")
    attached = sa.exists().where(parent.c.id == task.c.parent_id, parent.c.children != Children.DETACH)
    links = [(task.c.parent_id, task.c.id, attached)]
    below = closure(dialect, _these(dialect), links).alias("below")
    return (
        sa.select(task.c.id)
        .select_from(task.join(below, below.c.id == task.c.id))
        .where(sa.not_(one_of(dialect, task.c.id, "ids")), sa.not_(in_states(COMPLETE_STATES)))
        .order_by(task.c.id)
    )


@cache
def request_kill(dialect: str) -> Statement:
    """Leave `wanted_signal` for the workers of the active tasks among `ids`. One that only has to be delivered does not take
    the place of one that ends. Of two that end, the later signal and the shorter grace count (`wanted_grace`; null: the
    worker's own, which it compares itself)."""
    grace = sa.bindparam("wanted_grace", type_=sa.Double)
    ends_already = task.c.kill_signal.in_(sorted(ENDING_SIGNALS))
    keeps_grace = sa.and_(ends_already, sa.or_(grace.is_(None), task.c.kill_grace <= grace))
    counts = sa.or_(
        sa.bindparam("wanted_signal").in_(sorted(ENDING_SIGNALS)),
        task.c.kill_signal.is_(None),
        task.c.kill_signal.not_in(sorted(ENDING_SIGNALS)),
    )
    locked = locked_in_order(sa.and_(one_of(dialect, task.c.id, "ids"), in_states(ON_WORKER), counts))
    return (
        sa.update(task)
        .where(task.c.id == locked.c.id)
        .values(
            kill_signal=sa.bindparam("wanted_signal"),
            kill_grace=sa.case((keeps_grace, task.c.kill_grace), else_=grace),
        )
        .returning(task.c.id)
    )


@cache
def orders() -> Statement:
    """Whether `which_worker` shall drain, and the kills that it has yet to carry out: one row at least."""
    mine = sa.and_(task.c.worker_id == worker.c.id, in_states(ON_WORKER), task.c.kill_signal.is_not(None))
    return (
        sa.select(worker.c.draining, task.c.id, task.c.attempt, task.c.token, task.c.kill_signal, task.c.kill_grace)
        .select_from(worker.outerjoin(task, mine))
        .where(worker.c.id == sa.bindparam("which_worker"))
    )


@cache
def claims_of() -> Statement:
    """What `which_worker` has."""
    return sa.select(task.c.id, task.c.token).where(
        task.c.worker_id == sa.bindparam("which_worker"), in_states(ON_WORKER)
    )


@cache
def any_active() -> Statement:
    return sa.select(task.c.id).where(in_states(ON_WORKER)).limit(1)


@cache
def signal_delivered(dialect: str) -> Statement:
    """Signals that only had to be delivered (`rows`: id, token, signal) have been; a later one stands."""
    rows = row_set(dialect, "rows", id=sa.BigInteger(), token=sa.BigInteger(), signal=sa.Integer())
    return (
        sa.update(task)
        .where(task.c.id == rows.c.id, task.c.token == rows.c.token, task.c.kill_signal == rows.c.signal)
        .values(kill_signal=None)
    )
