"""finish -> release: outcomes, and what they set in motion."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa

from aque.states import COMPLETE_STATES, Event, Reason, State, sources
from aque.store.engine import closure, one_of, row_set, wall_clock
from aque.store.statements.claims import READY_COLUMNS
from aque.store.statements.common import (
    ON_WORKER,
    USAGE_COLUMNS,
    Statement,
    in_states,
    insert_into,
    is_not_being_ended,
    is_state,
    locked_in_order,
)
from aque.store.tables import attempt, edge, output, payload, result, task
from aque.values import Children, Condition

#: What the table is told of an outcome.
_OUTCOME: dict[str, sa.types.TypeEngine[Any]] = {
    "id": sa.BigInteger(),
    "attempt": sa.Integer(),
    "token": sa.BigInteger(),
    "state": sa.Text(),
    "reason": sa.Text(),
    "exit_code": sa.Integer(),
    "signal": sa.Integer(),
    "truncated": sa.Boolean(),
    "started_at": sa.Double(),
    "ended_at": sa.Double(),
    **{name: task.c[name].type for name in USAGE_COLUMNS},
    "repeat": sa.Boolean(),
    "again": sa.Boolean(),
    "not_before": sa.Double(),
    "counts": sa.Boolean(),
}
#: What `Store.release` has to know of a task that has moved.
MOVED = (
    task.c.id,
    task.c.state,
    task.c.dependents,
    task.c.tokens,
    task.c.parent_id,
    task.c.children,
    task.c.children_left,
)


@cache
def finish(dialect: str) -> Statement:
    """Record outcomes (`rows`), each only if its claim still stands. Returns what really moved: only that may release.

    A failed attempt that may be repeated (its row says `repeat`) goes back to ready; so does a lost one (its state says
    `ready`), unless it was killed meanwhile, or is the last of `max_lost`; and one that asks for it (`again`), which may
    wait until `not_before`. A success with open children waits for them.
    """
    rows = row_set(dialect, "rows", **_OUTCOME)
    locked = locked_in_order(task.c.id.in_(sa.select(rows.c.id)))
    return _finish(rows.c).where(task.c.id == locked.c.id)


@cache
def finish_one() -> Statement:
    """The same for a single outcome, whose fields are parameters with `o_` before their names: no set to plan for, no order
    to lock in (0.3 ms less on PostgreSQL)."""
    return _finish(SimpleNamespace(**{name: sa.bindparam(f"o_{name}", type_=kind) for name, kind in _OUTCOME.items()}))


@cache
def finish_one_with_result() -> Statement:
    """PostgreSQL: `finish_one` and `store_results` (parameters `o_value`, `o_error`) in one round trip."""
    return _with_result(finish_one())


def _with_result(finishing: Any) -> Statement:
    moved = finishing.cte("moved")
    values = sa.select(
        moved.c.id, sa.bindparam("o_value", type_=sa.LargeBinary), sa.bindparam("o_error", type_=sa.LargeBinary)
    )
    stored = (
        _store_results("postgresql", ["task_id", "value", "error"], values).returning(result.c.task_id).cte("stored")
    )
    return sa.select(*moved.c).add_cte(stored)


@cache
def finish_alone(with_result: bool) -> Statement:
    """PostgreSQL: `finish_one`, or with its result, for a success that nothing waits for, that holds no tokens and has
    neither a parent nor children that are open or have failed: nothing else has to be in its transaction. No row: its claim
    does not stand, or it is not such a one (any more)."""
    alone = finish_one().where(
        task.c.dependents == 0,
        task.c.tokens == 0,
        task.c.parent_id.is_(None),
        task.c.children_left == 0,
        task.c.children_failed == 0,
    )
    return _with_result(alone) if with_result else alone


def _finish(row: Any) -> Any:
    lost = row.state == State.READY
    repeat = sa.and_(row.repeat, is_not_being_ended(), task.c.failed + 1 < task.c.max_attempts)
    postponed = sa.and_(row.again, is_not_being_ended(), row.not_before.is_not(None))
    waits = sa.and_(row.state == State.SUCCESS, task.c.children == Children.WAIT)
    waiting = sa.and_(waits, task.c.children_left > 0)
    bereft = sa.and_(waits, task.c.children_failed > 0)
    return (
        sa.update(task)
        .where(
            task.c.id == row.id,
            task.c.token == row.token,
            task.c.attempt == row.attempt,
            in_states(ON_WORKER),
        )
        .values(
            state=sa.case(
                (sa.and_(lost, sa.not_(is_not_being_ended())), State.KILLED.value),
                (
                    sa.and_(
                        lost,
                        sa.or_(sa.not_(task.c.requeue), task.c.lost + 1 >= sa.bindparam("max_lost", type_=sa.Integer)),
                    ),
                    State.ERROR.value,
                ),
                (postponed, State.PENDING.value),
                (sa.and_(row.again, is_not_being_ended()), State.READY.value),
                (row.again, State.KILLED.value),
                (repeat, State.READY.value),
                # Whether its signal came in time or what it needed was killed first: it was killed.
                (sa.and_(row.state == State.ERROR, sa.not_(is_not_being_ended())), State.KILLED.value),
                (waiting, State.WAITING.value),
                (bereft, State.ERROR.value),
                else_=row.state,
            ),
            unmet=sa.case((postponed, 1), else_=task.c.unmet),
            not_before=sa.case((postponed, sa.cast(row.not_before, sa.Double)), else_=sa.null()),
            expires_at=None,  # it was started in time, whether or not that has been written
            # Withdrawn by its worker before it started; not if the task itself said that nothing is to come of it.
            attempt=task.c.attempt
            - sa.case((sa.and_(row.state == State.CANCELLED, row.reason == Reason.REQUEST), 1), else_=0),
            lost=task.c.lost + sa.case((lost, 1), else_=0),
            failed=task.c.failed + sa.case((sa.and_(row.state == State.ERROR, row.counts), 1), else_=0),
            reason=sa.case(
                (waiting, sa.null()),
                (bereft, Reason.CHILD.value),
                (sa.and_(row.state == State.ERROR, sa.not_(is_not_being_ended())), Reason.REQUEST.value),
                else_=row.reason,
            ),
            exit_code=row.exit_code,
            signal=row.signal,
            truncated=row.truncated,
            started_at=sa.func.coalesce(task.c.started_at, row.started_at),
            finished_at=sa.case((sa.or_(waiting, postponed), sa.null()), else_=row.ended_at),
            ready_at=sa.case((sa.or_(lost, repeat, row.again), row.ended_at), else_=task.c.ready_at),
            token=None,
            blocked=False,
            kill_signal=None,
            kill_grace=None,
            **{name: getattr(row, name) for name in USAGE_COLUMNS},
        )
        .returning(*MOVED)
    )


@cache
def leave() -> Statement:
    """The task `which` leaves its claim (`with_token`) and waits for what takes its place; one that is being killed is
    killed."""
    return (
        sa.update(task)
        .where(task.c.id == sa.bindparam("which"), task.c.token == sa.bindparam("with_token"), in_states(ON_WORKER))
        .values(
            state=sa.case((is_not_being_ended(), State.PENDING.value), else_=State.KILLED.value),
            reason=sa.case((is_not_being_ended(), sa.null()), else_=Reason.REQUEST.value),
            name=sa.bindparam("new_name", type_=sa.Text),
            requirement_id=sa.func.coalesce(sa.bindparam("new_class", type_=sa.BigInteger), task.c.requirement_id),
            token=None,
            kill_signal=None,
            kill_grace=None,
            blocked=False,
            expires_at=None,
            finished_at=sa.case((is_not_being_ended(), sa.null()), else_=wall_clock()),
        )
        .returning(*MOVED)
    )


@cache
def upstream_of() -> Statement:
    """What the task `which` depends on."""
    return sa.select(edge.c.upstream).where(edge.c.downstream == sa.bindparam("which"))


@cache
def enter() -> Statement:
    """The task `which` goes on in `to_state`, with so many dependencies left (`new_unmet`); what takes its place may have
    failed already, and then it ends here."""
    to_state = sa.bindparam("to_state", type_=sa.Text)
    skipped = to_state == State.SKIPPED
    return (
        sa.update(task)
        .where(task.c.id == sa.bindparam("which"), is_state(State.PENDING))
        .values(
            state=to_state,
            unmet=sa.bindparam("new_unmet", type_=sa.Integer),
            ready_at=wall_clock(),
            reason=sa.case((skipped, Reason.DEPENDENCY.value), else_=sa.null()),
            finished_at=sa.case((skipped, wall_clock()), else_=sa.null()),
        )
        .returning(*MOVED)
    )


@cache
def set_payload() -> Statement:
    """What the task `which` runs from now on."""
    return (
        sa.update(payload)
        .where(payload.c.task_id == sa.bindparam("which"))
        .values(
            function=sa.bindparam("new_function"),
            arguments=sa.bindparam("new_arguments"),
            inputs=sa.bindparam("new_inputs"),
        )
    )


@cache
def set_arguments() -> Statement:
    """Tasks (`id`) get other arguments (`arguments`)."""
    return (
        sa.update(payload)
        .where(payload.c.task_id == sa.bindparam("which"))
        .values(arguments=sa.bindparam("new_arguments"))
    )


@cache
def keep_attempts(dialect: str) -> Statement:
    """Copy the latest attempt of those of these tasks (`ids`) that have started, and that another will follow, into the
    history as `ended_as`."""
    chosen = sa.select(
        task.c.id,
        task.c.attempt,
        task.c.worker_id,
        sa.bindparam("ended_as", type_=sa.Text),
        sa.func.coalesce(sa.bindparam("because", type_=sa.Text), task.c.reason),
        task.c.exit_code,
        task.c.signal,
        task.c.started_at,
        sa.func.coalesce(task.c.finished_at, wall_clock()),
        *(task.c[name] for name in USAGE_COLUMNS),
    ).where(one_of(dialect, task.c.id, "ids"), task.c.started_at.is_not(None))
    names = ["task_id", "attempt", "worker_id", "state", "reason", "exit_code", "signal", "started_at", "finished_at"]
    return sa.insert(attempt).from_select([*names, *USAGE_COLUMNS], chosen)


def _matches(dialect: str) -> sa.ColumnElement[bool]:
    """True for an edge that the completion of its upstream task satisfies: `succeeded` and `in_error`
    say which of them did.

    Arrays, not a set of rows: joined to one, PostgreSQL read the whole table of edges for each task that finished.
    """
    succeeded = one_of(dialect, edge.c.upstream, "succeeded")
    in_error = one_of(dialect, edge.c.upstream, "in_error")
    return sa.case(
        (edge.c.condition == Condition.OK, succeeded),
        (edge.c.condition == Condition.FAILED, sa.not_(succeeded)),
        (edge.c.condition == Condition.ERROR, in_error),
        else_=sa.true(),
    )


def _satisfy(dialect: str) -> Any:
    """Mark the edges that the completions of `ids` satisfy; returns the dependent of each."""
    return (
        sa.update(edge)
        .where(one_of(dialect, edge.c.upstream, "ids"), sa.not_(edge.c.satisfied), _matches(dialect))
        .values(satisfied=True)
        .returning(edge.c.downstream)
    )


_COUNTED = (task.c.state, task.c.unmet, *(task.c[name] for name in READY_COLUMNS))


def _count_down(met: Any) -> Any:
    """Take `met.n` from the dependencies left of each task `met.id`; at 0 it is ready. A group is left pending:
    `end_groups` settles it."""
    locked = locked_in_order(task.c.id.in_(sa.select(met.c.id)))
    left = task.c.unmet - met.c.n
    released = sa.and_(left == 0, is_state(State.PENDING), task.c.requirement_id.is_not(None))
    return (
        sa.update(task)
        .where(task.c.id == locked.c.id, met.c.id == locked.c.id)
        .values(
            unmet=left,
            state=sa.case((released, State.READY.value), else_=task.c.state),
            ready_at=sa.case((released, sa.bindparam("released_at", type_=sa.Double)), else_=task.c.ready_at),
            near_host=sa.case((released, sa.bindparam("released_on", type_=sa.Text)), else_=task.c.near_host),
        )
    )


@cache
def satisfy_and_count_down() -> Statement:
    """PostgreSQL: `satisfy` and `count_down` in one round trip; each dependent with `n`, its newly satisfied edges."""
    satisfied = _satisfy("postgresql").cte("satisfied")
    met = (
        sa.select(satisfied.c.downstream.label("id"), sa.func.count().label("n"))
        .group_by(satisfied.c.downstream)
        .cte("met")
    )
    return _count_down(met).returning(*_COUNTED, met.c.n)


@cache
def satisfy() -> Statement:
    """SQLite: see `_satisfy`."""
    return _satisfy("sqlite")


@cache
def count_down() -> Statement:
    """SQLite: see `_count_down`; `rows`: id, n."""
    return _count_down(row_set("sqlite", "rows", id=sa.BigInteger(), n=sa.Integer())).returning(*_COUNTED)


@cache
def doomed(dialect: str) -> Statement:
    """Every task that the completions of `ids` (`succeeded`, `in_error`: see `_matches`) make impossible, at once and however
    far down the graph: a dependent whose condition cannot be met any more, and all that need such a one to have run."""
    first = sa.select(edge.c.downstream.label("id")).where(
        one_of(dialect, edge.c.upstream, "ids"), sa.not_(edge.c.satisfied), sa.not_(_matches(dialect))
    )
    found = closure(
        dialect,
        first,
        [(edge.c.upstream, edge.c.downstream, edge.c.condition.in_([Condition.OK.value, Condition.ERROR.value]))],
    )
    return sa.select(found.c.id)


@cache
def skip(dialect: str) -> Statement:
    """Settle these unstarted tasks (`ids`) as skipped."""
    locked = locked_in_order(sa.and_(one_of(dialect, task.c.id, "ids"), in_states(sources(Event.SKIP))))
    return (
        sa.update(task)
        .where(task.c.id == locked.c.id)
        .values(
            state=State.SKIPPED, reason=Reason.DEPENDENCY, not_before=None, expires_at=None, finished_at=wall_clock()
        )
        .returning(*MOVED)
    )


@cache
def end_groups(dialect: str) -> Statement:
    """Settle these groups (`ids`), all of whose members have ended: success if all of them succeeded."""
    upstream = task.alias("upstream")
    failed = sa.exists().where(
        edge.c.downstream == task.c.id, edge.c.upstream == upstream.c.id, upstream.c.state != State.SUCCESS
    )
    return (
        sa.update(task)
        .where(one_of(dialect, task.c.id, "ids"), is_state(State.PENDING), task.c.unmet == 0)
        .values(
            state=sa.case((failed, State.ERROR.value), else_=State.SUCCESS.value),
            reason=sa.case((failed, Reason.DEPENDENCY.value), else_=sa.null()),
            expires_at=None,
            finished_at=wall_clock(),
        )
        .returning(*MOVED)
    )


@cache
def count_children(dialect: str) -> Statement:
    """Take ended children (`rows`: id, n, failed) from those that each parent `id` waits for; those for whom these were the
    last."""
    rows = row_set(dialect, "rows", id=sa.BigInteger(), n=sa.Integer(), failed=sa.Integer())
    locked = locked_in_order(task.c.id.in_(sa.select(rows.c.id)))
    return (
        sa.update(task)
        .where(task.c.id == locked.c.id, rows.c.id == locked.c.id, task.c.children != Children.DETACH)
        .values(children_left=task.c.children_left - rows.c.n, children_failed=task.c.children_failed + rows.c.failed)
        .returning(task.c.id, task.c.state, task.c.children_left)
    )


@cache
def close(dialect: str) -> Statement:
    """Settle these tasks (`ids`), whose children have ended: success if all of them succeeded."""
    failed = task.c.children_failed > 0
    return (
        sa.update(task)
        .where(one_of(dialect, task.c.id, "ids"), is_state(State.WAITING), task.c.children_left == 0)
        .values(
            state=sa.case((failed, State.ERROR.value), else_=State.SUCCESS.value),
            reason=sa.case((failed, Reason.CHILD.value), else_=sa.null()),
            finished_at=wall_clock(),
        )
        .returning(*MOVED)
    )


@cache
def store_results(dialect: str) -> Statement:
    """Results of tasks (`task_id`, `value`, `error`), in place of those of an earlier attempt."""
    return _store_results(dialect)


def _store_results(dialect: str, names: list[str] | None = None, values: Any = None) -> Any:
    insert = insert_into(dialect, result)
    if values is not None:
        insert = insert.from_select(names, values)
    return insert.on_conflict_do_update(
        index_elements=[result.c.task_id], set_={"value": insert.excluded.value, "error": insert.excluded.error}
    )


@cache
def append_output(dialect: str) -> Statement:
    """Captured bytes; the same piece written twice (a replayed batch) is written once."""
    return insert_into(dialect, output).on_conflict_do_nothing()


@cache
def results(dialect: str) -> Statement:
    """State, result and error of these tasks (`ids`)."""
    child = task.alias("child")
    return (
        sa.select(
            task.c.id,
            task.c.state,
            task.c.reason,
            task.c.name,
            task.c.celery_id,
            task.c.pattern,
            task.c.attempt,
            task.c.failed,
            task.c.parent_id,
            task.c.exit_code,
            task.c.signal,
            task.c.finished_at,
            sa.exists().where(child.c.parent_id == task.c.id).correlate(task).label("has_children"),
            result.c.value,
            result.c.error,
        )
        .select_from(task.outerjoin(result, result.c.task_id == task.c.id))
        .where(one_of(dialect, task.c.id, "ids"))
    )


@cache
def existing(dialect: str) -> Statement:
    return sa.select(task.c.id).where(one_of(dialect, task.c.id, "ids"))


@cache
def completed(dialect: str) -> Statement:
    """Which of these tasks (`ids`) are complete, and how."""
    return sa.select(task.c.id, task.c.state).where(one_of(dialect, task.c.id, "ids"), in_states(COMPLETE_STATES))
