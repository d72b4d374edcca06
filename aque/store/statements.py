"""Every statement on the tables, one function each. They are built once per database and take only parameters after that.

Sets of rows travel as one JSON parameter (see `engine.row_set`). PostgreSQL locks rows in id order wherever a statement
touches several, so that two workers cannot wait for each other; SQLite has one writer at a time and leaves the locks out.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from aque.states import ACTIVE_STATES, COMPLETE_STATES, ENDING_SIGNALS, Event, Reason, State, sources
from aque.store.engine import closure, first_of_each, lease_clock, one_of, per_class, row_set, wall_clock
from aque.store.tables import attempt, edge, environment, output, payload, requirement, result, sequence, task, worker
from aque.values import Condition, Pattern

Statement = Any  # some SQLAlchemy construct: its own type says nothing that a caller could use
_ON_WORKER = (State.CLAIMED, State.RUNNING)


# Literals, not parameters: PostgreSQL uses a partial index only where it can prove its condition.
def _in_states(states: Any) -> sa.ColumnElement[bool]:
    return task.c.state.in_([sa.literal_column(f"'{state}'") for state in sorted(states)])


def _is_state(state: State) -> sa.ColumnElement[bool]:
    return task.c.state == sa.literal_column(f"'{state}'")


def _locked_in_order(where: sa.ColumnElement[bool]) -> sa.CTE:
    """The ids of these tasks, locked smallest first, groups last: what a group waits for is always locked before it."""
    ordered = sa.select(task.c.id).where(where).order_by(task.c.requirement_id.is_(None), task.c.id)
    return ordered.with_for_update(of=task).cte("locked")


# -- submit -----------------------------------------------------------------------------------------------------------


@cache
def reserve_ids(dialect: str) -> Statement:
    """`count` new ids: the last of them on SQLite, all of them on PostgreSQL."""
    if dialect == "sqlite":
        return (
            sa.update(sequence)
            .where(sequence.c.name == "id")
            .values(value=sequence.c.value + sa.bindparam("count", type_=sa.Integer))
            .returning(sequence.c.value)
        )
    series = sa.func.generate_series(1, sa.bindparam("count", type_=sa.Integer)).alias("n")
    return sa.select(sa.func.nextval("aque_id")).select_from(series)


@cache
def add_requirement(dialect: str) -> Statement:
    """Insert a requirement class unless there is an equal one."""
    return _insert(dialect, requirement).on_conflict_do_nothing()


@cache
def find_requirement() -> Statement:
    names = ("queue", "pattern", "cpus", "memory_bytes", "host", "platform", "user", "interpreter")
    return sa.select(requirement.c.id).where(*[requirement.c[n] == sa.bindparam(n) for n in names])


@cache
def requirements(dialect: str) -> Statement:
    """The requirement classes with these `ids`."""
    return sa.select(requirement).where(one_of(dialect, requirement.c.id, "ids"))


@cache
def add_environment(dialect: str) -> Statement:
    return _insert(dialect, environment).on_conflict_do_nothing()


@cache
def add_task() -> Statement:
    """PostgreSQL: insert a task and its payload (parameters `t_` and `p_` before the names of their columns)."""
    columns = {column.name: sa.bindparam(f"t_{column.name}", type_=column.type) for column in task.c}
    new = sa.insert(task).values(columns).returning(task.c.id).cte("new")
    names = [column.name for column in payload.c]
    values = [sa.bindparam(f"p_{column.name}", type_=column.type) for column in payload.c]
    return sa.insert(payload).from_select(names, sa.select(*values).select_from(new))


@cache
def add_dependents(dialect: str) -> Statement:
    """Count `n` more dependents for each task in `rows` (id, n); returns their states. The row stays locked until the
    submission has committed: a worker that finishes it waits, and then reads the count and sees the new edges."""
    rows = row_set(dialect, "rows", id=sa.BigInteger(), n=sa.Integer())
    locked = _locked_in_order(task.c.id.in_(sa.select(rows.c.id)))
    return (
        sa.update(task)
        .where(task.c.id == locked.c.id, rows.c.id == locked.c.id)
        .values(dependents=task.c.dependents + rows.c.n)
        .returning(task.c.id, task.c.state)
    )


@cache
def now() -> Statement:
    """Seconds since 1970 on the database's clock."""
    return sa.select(wall_clock())


@cache
def ids_of_celery_ids() -> Statement:
    return sa.select(task.c.celery_id, task.c.id).where(
        task.c.celery_id.in_(sa.bindparam("celery_ids", expanding=True))
    )


# -- claim ------------------------------------------------------------------------------------------------------------


def _ready_classes() -> sa.CTE:
    """The requirement classes that have ready tasks: a loose scan of the index, one step per class, however many tasks
    there are (1,000,000 rows: 0.6 ms, against 177 ms for a filter on the rows)."""
    smallest = sa.select(sa.func.min(task.c.requirement_id).label("id")).where(_is_state(State.READY))
    found = smallest.cte("found", recursive=True)
    following = (
        sa.select(sa.func.min(task.c.requirement_id))
        .where(_is_state(State.READY), task.c.requirement_id > found.c.id)
        .scalar_subquery()
    )
    return found.union_all(sa.select(following).where(found.c.id.is_not(None)))


@cache
def candidates(dialect: str) -> Statement:
    """The first `limit` ready tasks of each requirement class, without the classes in `unfit`."""
    found = _ready_classes()
    fit = sa.select(found.c.id).where(found.c.id.is_not(None), sa.not_(one_of(dialect, found.c.id, "unfit"))).cte("fit")
    wanted = per_class(
        dialect,
        fit,
        task,
        task.c.requirement_id,
        _is_state(State.READY),
        (task.c.priority.desc(), task.c.duration.desc(), task.c.id),
        "limit",
    ).subquery("first_rows")
    columns = wanted.c
    return sa.select(columns.id, columns.requirement_id, columns.priority, columns.duration, columns.name)


def _claim(dialect: str) -> Any:
    """Give the ready tasks among `ids` to `to_worker` in `to_state` (claimed or running). Others may have been faster."""
    # A CTE, not a subquery: PostgreSQL may run a subquery again and lock other rows.
    # A worker that has been declared lost or is drained claims nothing: its row is held until this has committed.
    me = (
        sa.select(worker.c.id)
        .where(
            worker.c.id == sa.bindparam("to_worker", type_=sa.BigInteger),
            worker.c.state == "live",
            sa.not_(worker.c.draining),
        )
        .with_for_update(read=True)
        .cte("me")
    )
    picked = (
        sa.select(task.c.id)
        .where(one_of(dialect, task.c.id, "ids"), _is_state(State.READY), sa.exists().where(me.c.id.is_not(None)))
        .with_for_update(skip_locked=True, of=task)
        .cte("picked")
    )
    return (
        sa.update(task)
        .where(task.c.id == picked.c.id, _is_state(State.READY))
        .values(
            state=sa.bindparam("to_state"),
            worker_id=sa.bindparam("to_worker"),
            token=sa.bindparam("new_token"),
            attempt=task.c.attempt + 1,
            started_at=sa.bindparam("starts_at", type_=sa.Double),
            finished_at=None,
            reason=None,
            exit_code=None,
            signal=None,
            truncated=False,
            progress=None,
        )
        .returning(*_CLAIMED)
    )


_CLAIMED = (
    task.c.id,
    task.c.attempt,
    task.c.requirement_id,
    task.c.name,
    task.c.pattern,
    task.c.priority,
    task.c.parent_id,
    task.c.job_id,
    task.c.celery_id,
    task.c.max_attempts,
    task.c.dependents,
)
_PAYLOAD = (
    payload.c.function,
    payload.c.arguments,
    payload.c.inputs,
    payload.c.argv,
    payload.c.stdin,
    payload.c.stdin_path,
    payload.c.stdout_path,
    payload.c.stderr_path,
    payload.c.login,
    payload.c.cwd,
    payload.c.umask,
    payload.c.import_path,
    payload.c.time_limit_seconds,
    payload.c.soft_time_limit_seconds,
    payload.c.strict_lease,
    requirement.c.queue,
    requirement.c.user,
    requirement.c.interpreter,
    environment.c.content.label("environment"),
)


@cache
def claim(dialect: str) -> Statement:
    """See `_claim`. Returns everything that running the tasks needs: on PostgreSQL in the same statement, on SQLite, whose
    CTEs cannot write, the ids for `claimed_tasks`."""
    moved = _claim(dialect)
    if dialect == "sqlite":
        return moved
    return _with_payload(moved.cte("moved"))


@cache
def claimed_tasks(dialect: str) -> Statement:
    """Everything that running these tasks (`ids`) needs."""
    return _with_payload(sa.select(*_CLAIMED).where(one_of(dialect, task.c.id, "ids")).cte("moved"))


def _with_payload(moved: sa.CTE) -> sa.Select[Any]:
    return sa.select(*moved.c, *_PAYLOAD).select_from(
        moved.join(payload, payload.c.task_id == moved.c.id)
        .join(requirement, requirement.c.id == moved.c.requirement_id)
        .outerjoin(environment, environment.c.id == payload.c.environment_id)
    )


@cache
def start(dialect: str) -> Statement:
    """Buffered tasks (`rows`: id, token, started_at) that have started: claimed -> running."""
    rows = row_set(dialect, "rows", id=sa.BigInteger(), token=sa.BigInteger(), started_at=sa.Double())
    return (
        sa.update(task)
        .where(task.c.id == rows.c.id, task.c.token == rows.c.token, _is_state(State.CLAIMED))
        .values(state=State.RUNNING, started_at=rows.c.started_at)
    )


def _is_not_being_ended() -> sa.ColumnElement[bool]:
    """A signal that only has to be delivered changes nothing about what becomes of a task."""
    return sa.or_(task.c.kill_signal.is_(None), task.c.kill_signal.not_in(sorted(ENDING_SIGNALS)))


@cache
def give_back(dialect: str) -> Statement:
    """Active tasks (`rows`: id, token) that their worker cannot or will not finish: ready again, counted neither as failed
    nor as lost. One that had started keeps its attempt's number: there is at most one start per (task, attempt).

    A task that someone has killed meanwhile is left: the caller settles it as an outcome.
    """
    rows = row_set(dialect, "rows", id=sa.BigInteger(), token=sa.BigInteger())
    return (
        sa.update(task)
        .where(task.c.id == rows.c.id, task.c.token == rows.c.token, _in_states(sources(Event.GIVE_BACK)))
        .where(_is_not_being_ended())
        .values(
            state=State.READY,
            attempt=task.c.attempt - sa.case((_is_state(State.CLAIMED), 1), else_=0),
            token=None,
            reason=None,
        )
        .returning(task.c.id)
    )


# -- finish and release -----------------------------------------------------------------------------------------------


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
    "repeat": sa.Boolean(),
}


@cache
def finish(dialect: str) -> Statement:
    """Record outcomes (`rows`), each only if its claim still stands. Returns what really moved: only that may release.

    A failed attempt that may be repeated (its row says `repeat`) goes back to ready; so does a lost one (its state says
    `ready`), unless it was killed meanwhile, or is the last of `max_lost`.
    """
    rows = row_set(dialect, "rows", **_OUTCOME)
    locked = _locked_in_order(task.c.id.in_(sa.select(rows.c.id)))
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
    return sa.select(moved.c.id, moved.c.state, moved.c.dependents).add_cte(stored)


@cache
def finish_alone(with_result: bool) -> Statement:
    """PostgreSQL: `finish_one`, or with its result, for a success that nothing waits for: no release has to be in its
    transaction. No row: its claim does not stand, or something has come to wait for it."""
    alone = finish_one().where(task.c.dependents == 0)
    return _with_result(alone) if with_result else alone


def _finish(row: Any) -> Any:
    lost = row.state == State.READY
    repeat = sa.and_(row.repeat, _is_not_being_ended(), task.c.failed + 1 < task.c.max_attempts)
    return (
        sa.update(task)
        .where(
            task.c.id == row.id,
            task.c.token == row.token,
            task.c.attempt == row.attempt,
            _in_states(_ON_WORKER),
        )
        .values(
            state=sa.case(
                (sa.and_(lost, task.c.kill_signal.in_(sorted(ENDING_SIGNALS))), State.KILLED.value),
                (
                    sa.and_(
                        lost,
                        sa.or_(sa.not_(task.c.requeue), task.c.lost + 1 >= sa.bindparam("max_lost", type_=sa.Integer)),
                    ),
                    State.ERROR.value,
                ),
                (repeat, State.READY.value),
                else_=row.state,
            ),
            attempt=task.c.attempt - sa.case((row.state == State.CANCELLED, 1), else_=0),
            lost=task.c.lost + sa.case((lost, 1), else_=0),
            failed=task.c.failed + sa.case((row.state == State.ERROR, 1), else_=0),
            reason=row.reason,
            exit_code=row.exit_code,
            signal=row.signal,
            truncated=row.truncated,
            started_at=sa.func.coalesce(task.c.started_at, row.started_at),
            finished_at=row.ended_at,
            token=None,
            kill_signal=None,
            kill_grace=None,
        )
        .returning(task.c.id, task.c.state, task.c.dependents)
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
    ).where(one_of(dialect, task.c.id, "ids"), task.c.started_at.is_not(None))
    names = ["task_id", "attempt", "worker_id", "state", "reason", "exit_code", "signal", "started_at", "finished_at"]
    return sa.insert(attempt).from_select(names, chosen)


def _matches(dialect: str) -> sa.ColumnElement[bool]:
    """True for an edge that the completion of its upstream task satisfies: `succeeded` says which of them did.

    Arrays, not a set of rows: joined to one, PostgreSQL read the whole table of edges for each task that finished.
    """
    succeeded = one_of(dialect, edge.c.upstream, "succeeded")
    return sa.or_(edge.c.condition == Condition.ANY, (edge.c.condition == Condition.OK) == succeeded)


def _satisfy(dialect: str) -> Any:
    """Mark the edges that the completions of `ids` satisfy; returns the dependent of each."""
    return (
        sa.update(edge)
        .where(one_of(dialect, edge.c.upstream, "ids"), sa.not_(edge.c.satisfied), _matches(dialect))
        .values(satisfied=True)
        .returning(edge.c.downstream)
    )


_COUNTED = (task.c.id, task.c.state, task.c.unmet, task.c.requirement_id, task.c.priority, task.c.duration, task.c.name)


def _count_down(met: Any) -> Any:
    """Take `met.n` from the dependencies left of each task `met.id`; at 0 it is ready. A group is left pending:
    `end_groups` settles it."""
    locked = _locked_in_order(task.c.id.in_(sa.select(met.c.id)))
    left = task.c.unmet - met.c.n
    released = sa.and_(left == 0, _is_state(State.PENDING), task.c.requirement_id.is_not(None))
    return (
        sa.update(task)
        .where(task.c.id == locked.c.id, met.c.id == locked.c.id)
        .values(unmet=left, state=sa.case((released, State.READY.value), else_=task.c.state))
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
    """Every task that the completions of `ids` (`succeeded`: those that did) make impossible, at once and however far down
    the graph: a dependent whose condition cannot be met any more, and all that need the success of such a one."""
    first = sa.select(edge.c.downstream.label("id")).where(
        one_of(dialect, edge.c.upstream, "ids"), sa.not_(edge.c.satisfied), sa.not_(_matches(dialect))
    )
    found = closure(dialect, first, [(edge.c.upstream, edge.c.downstream, edge.c.condition == Condition.OK)])
    return sa.select(found.c.id)


@cache
def skip(dialect: str) -> Statement:
    """Settle these unstarted tasks (`ids`) as skipped."""
    locked = _locked_in_order(sa.and_(one_of(dialect, task.c.id, "ids"), _in_states(sources(Event.SKIP))))
    return (
        sa.update(task)
        .where(task.c.id == locked.c.id)
        .values(state=State.SKIPPED, reason=Reason.DEPENDENCY, finished_at=wall_clock())
        .returning(task.c.id, task.c.dependents)
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
        .where(one_of(dialect, task.c.id, "ids"), _is_state(State.PENDING), task.c.unmet == 0)
        .values(
            state=sa.case((failed, State.ERROR.value), else_=State.SUCCESS.value),
            reason=sa.case((failed, Reason.DEPENDENCY.value), else_=sa.null()),
            finished_at=wall_clock(),
        )
        .returning(task.c.id, task.c.state, task.c.dependents)
    )


@cache
def store_results(dialect: str) -> Statement:
    """Results of tasks (`task_id`, `value`, `error`), in place of those of an earlier attempt."""
    return _store_results(dialect)


def _store_results(dialect: str, names: list[str] | None = None, values: Any = None) -> Any:
    insert = _insert(dialect, result)
    if values is not None:
        insert = insert.from_select(names, values)
    return insert.on_conflict_do_update(
        index_elements=[result.c.task_id], set_={"value": insert.excluded.value, "error": insert.excluded.error}
    )


@cache
def append_output(dialect: str) -> Statement:
    """Captured bytes; the same piece written twice (a replayed batch) is written once."""
    return _insert(dialect, output).on_conflict_do_nothing()


@cache
def results(dialect: str) -> Statement:
    """State, result and error of these tasks (`ids`)."""
    return (
        sa.select(
            task.c.id,
            task.c.state,
            task.c.reason,
            task.c.name,
            task.c.pattern,
            task.c.attempt,
            task.c.exit_code,
            task.c.signal,
            task.c.finished_at,
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
    return sa.select(task.c.id, task.c.state).where(one_of(dialect, task.c.id, "ids"), _in_states(COMPLETE_STATES))


# -- kill -------------------------------------------------------------------------------------------------------------


@cache
def with_members(dialect: str) -> Statement:
    """State of these tasks (`ids`) and of the members of those that are jobs."""
    member = sa.and_(one_of(dialect, task.c.job_id, "ids"), task.c.job_id != task.c.id)
    return sa.select(task.c.id, task.c.state).where(sa.or_(one_of(dialect, task.c.id, "ids"), member))


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
    return sa.select(task.c.id, is_group).where(one_of(dialect, task.c.id, "ids"), sa.not_(_in_states(COMPLETE_STATES)))


@cache
def open_dependents(dialect: str) -> Statement:
    """Edges out of these tasks (`ids`) whose dependents are not complete."""
    is_group = task.c.requirement_id.is_(None).label("is_group")
    return (
        sa.select(edge.c.upstream, edge.c.downstream, is_group)
        .select_from(edge.join(task, task.c.id == edge.c.downstream))
        .where(one_of(dialect, edge.c.upstream, "ids"), sa.not_(_in_states(COMPLETE_STATES)))
    )


@cache
def children(dialect: str) -> Statement:
    """(parent, child) for the children of these tasks (`ids`)."""
    return sa.select(task.c.parent_id, task.c.id).where(one_of(dialect, task.c.parent_id, "ids"))


@cache
def cancel(dialect: str) -> Statement:
    """Withdraw the tasks among `ids` that no worker has."""
    return (
        sa.update(task)
        .where(one_of(dialect, task.c.id, "ids"), _in_states(sources(Event.CANCEL) - {State.CLAIMED}))
        .values(state=State.CANCELLED, reason=Reason.REQUEST, finished_at=wall_clock())
        .returning(task.c.id, task.c.state, task.c.dependents)
    )


@cache
def request_kill(dialect: str) -> Statement:
    """Leave `wanted_signal` for the workers of the active tasks among `ids`. One that only has to be delivered does not take
    the place of one that ends. Of two that end, the later signal and the shorter grace count (`wanted_grace`; null: the
    worker's own, which it compares itself)."""
    grace = sa.bindparam("wanted_grace", type_=sa.Double)
    ends_already = task.c.kill_signal.in_(sorted(ENDING_SIGNALS))
    keeps_grace = sa.and_(ends_already, sa.or_(grace.is_(None), task.c.kill_grace <= grace))
    return (
        sa.update(task)
        .where(one_of(dialect, task.c.id, "ids"), _in_states(ACTIVE_STATES))
        .where(
            sa.or_(
                sa.bindparam("wanted_signal").in_(sorted(ENDING_SIGNALS)),
                task.c.kill_signal.is_(None),
                task.c.kill_signal.not_in(sorted(ENDING_SIGNALS)),
            )
        )
        .values(
            kill_signal=sa.bindparam("wanted_signal"),
            kill_grace=sa.case((keeps_grace, task.c.kill_grace), else_=grace),
        )
        .returning(task.c.id)
    )


@cache
def orders() -> Statement:
    """Whether `which_worker` shall drain, and the kills that it has yet to carry out: one row at least."""
    mine = sa.and_(task.c.worker_id == worker.c.id, _in_states(_ON_WORKER), task.c.kill_signal.is_not(None))
    return (
        sa.select(worker.c.draining, task.c.id, task.c.attempt, task.c.token, task.c.kill_signal, task.c.kill_grace)
        .select_from(worker.outerjoin(task, mine))
        .where(worker.c.id == sa.bindparam("which_worker"))
    )


@cache
def claims_of() -> Statement:
    """What `which_worker` has."""
    return sa.select(task.c.id, task.c.token).where(
        task.c.worker_id == sa.bindparam("which_worker"), _in_states(_ON_WORKER)
    )


@cache
def any_active() -> Statement:
    return sa.select(task.c.id).where(_in_states(_ON_WORKER)).limit(1)


@cache
def signal_delivered(dialect: str) -> Statement:
    """Signals that only had to be delivered (`rows`: id, token, signal) have been; a later one stands."""
    rows = row_set(dialect, "rows", id=sa.BigInteger(), token=sa.BigInteger(), signal=sa.Integer())
    return (
        sa.update(task)
        .where(task.c.id == rows.c.id, task.c.token == rows.c.token, task.c.kill_signal == rows.c.signal)
        .values(kill_signal=None)
    )


# -- workers and leases -----------------------------------------------------------------------------------------------


@cache
def insert_worker() -> Statement:
    return sa.insert(worker).values(
        started_at=wall_clock(), seen_at=wall_clock(), lease_until=lease_clock() + sa.bindparam("lease")
    )


@cache
def renew() -> Statement:
    """Extend the lease of `which_worker` by `lease` seconds; no row: it has been declared lost."""
    return (
        sa.update(worker)
        .where(worker.c.id == sa.bindparam("which_worker"), worker.c.state == "live")
        .values(
            seen_at=wall_clock(),
            lease_seconds=sa.bindparam("lease", type_=sa.Double),
            lease_until=lease_clock() + sa.bindparam("lease", type_=sa.Double),
        )
        .returning(worker.c.id)
    )


@cache
def set_queues() -> Statement:
    return (
        sa.update(worker).where(worker.c.id == sa.bindparam("which_worker")).values(queues=sa.bindparam("new_queues"))
    )


#: Of a worker, what a restart can change.
DESCRIBED = (
    "name", "cpus", "memory_bytes", "python_slots", "command_slots", "queues", "version", "lease_seconds", "user",
    "switches_user", "containment",
)  # fmt: skip


@cache
def describe_worker() -> Statement:
    """After a restart of `which_worker`: what it is called and has now."""
    values = {name: sa.bindparam(f"new_{name}", type_=worker.c[name].type) for name in DESCRIBED}
    return sa.update(worker).where(worker.c.id == sa.bindparam("which_worker")).values(values)


@cache
def set_draining(dialect: str) -> Statement:
    """Let these live workers (`ids`) claim nothing more, or claim again."""
    return (
        sa.update(worker)
        .where(one_of(dialect, worker.c.id, "ids"), worker.c.state == "live")
        .values(draining=sa.bindparam("wanted", type_=sa.Boolean))
        .returning(worker.c.id)
    )


@cache
def stop_worker() -> Statement:
    """Sign off `which_worker`, unless it still has tasks: those are for the reapers, who look at live workers only."""
    busy = sa.exists().where(task.c.worker_id == worker.c.id, _in_states(_ON_WORKER))
    return (
        sa.update(worker)
        .where(worker.c.id == sa.bindparam("which_worker"), worker.c.state == "live", sa.not_(busy))
        .values(state="stopped", seen_at=wall_clock())
    )


@cache
def live_workers() -> Statement:
    return workers().where(worker.c.state == "live")


@cache
def workers() -> Statement:
    """All workers with `expired`: how many seconds ago the lease ended (negative: it holds), and `unseen`: how many seconds
    ago it was renewed."""
    return sa.select(
        worker,
        (lease_clock() - worker.c.lease_until).label("expired"),
        (wall_clock() - worker.c.seen_at).label("unseen"),
    ).order_by(worker.c.id)


@cache
def declare_lost(dialect: str) -> Statement:
    """End a live worker, if its lease still is what the reaper saw: ownership changes only by this row."""
    return (
        sa.update(worker)
        .where(
            worker.c.id == sa.bindparam("which_worker"),
            worker.c.state == "live",
            worker.c.lease_until == sa.bindparam("seen_lease_until"),
        )
        .values(state="lost")
        .returning(worker.c.id)
    )


@cache
def held_by_worker() -> Statement:
    """The tasks that `which_worker` has, locked in order."""
    return (
        sa.select(task.c.id, task.c.state, task.c.lost, task.c.requeue, task.c.kill_signal)
        .where(task.c.worker_id == sa.bindparam("which_worker"), _in_states(_ON_WORKER))
        .order_by(task.c.id)
        .with_for_update(of=task)
    )


@cache
def lose(dialect: str) -> Statement:
    """Tasks (`rows`: id, state) of a dead worker. Running ones: an attempt is lost; buffered ones: none is counted, but it
    may have started unseen, so that its number is not used again."""
    rows = row_set(dialect, "rows", id=sa.BigInteger(), state=sa.Text(), reason=sa.Text())
    ran = _is_state(State.RUNNING)
    return (
        sa.update(task)
        .where(task.c.id == rows.c.id, _in_states(_ON_WORKER))
        .values(
            state=rows.c.state,
            lost=task.c.lost + sa.case((ran, 1), else_=0),
            token=None,
            kill_signal=None,
            kill_grace=None,
            reason=rows.c.reason,
            finished_at=sa.case((rows.c.state == State.READY, sa.null()), else_=wall_clock()),
        )
        .returning(task.c.id, task.c.state, task.c.dependents)
    )


# -- questions --------------------------------------------------------------------------------------------------------

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
    "started_at": task.c.started_at,
    "finished_at": task.c.finished_at,
}
WORKER_FIELDS = frozenset({"worker"})
REQUIREMENT_FIELDS = frozenset({"cpus", "memory", "queue", "host", "platform", "user", "interpreter"})


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


# -- doctor: the invariants as questions; a sound store has no row for any of them -------------------------------------


def checks(dialect: str) -> dict[str, sa.Select[Any]]:
    """Name of the broken rule -> the ids of the tasks that break it."""
    upstream = task.alias("upstream")
    complete = [state.value for state in COMPLETE_STATES]
    holds = sa.and_(
        upstream.c.state.in_(complete),
        sa.or_(
            edge.c.condition == Condition.ANY,
            sa.and_(edge.c.condition == Condition.OK, upstream.c.state == State.SUCCESS),
            sa.and_(edge.c.condition == Condition.FAILED, upstream.c.state != State.SUCCESS),
        ),
    )
    open_edges = (
        sa.select(sa.func.count())
        .select_from(edge)
        .where(edge.c.downstream == task.c.id, sa.not_(edge.c.satisfied))
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
    return {
        "I7 dependents is the number of edges out of a task": sa.select(task.c.id).where(
            task.c.dependents != edges_out
        ),
        "I7 unmet is the number of open dependencies": sa.select(task.c.id).where(
            unfinished, task.c.unmet != open_edges
        ),
        "I7 a dependency is satisfied exactly if its upstream task ended so": sa.select(edge.c.downstream)
        .select_from(edge.join(upstream, upstream.c.id == edge.c.upstream).join(task, task.c.id == edge.c.downstream))
        .where(unfinished, edge.c.satisfied != holds),
        "I7 what a dependency made impossible is settled": sa.select(edge.c.downstream)
        .select_from(edge.join(upstream, upstream.c.id == edge.c.upstream).join(task, task.c.id == edge.c.downstream))
        .where(unfinished, upstream.c.state.in_(complete), sa.not_(holds)),
        "I6 what may start or has started waits for nothing": sa.select(task.c.id).where(
            task.c.state.in_([State.READY.value, *[s.value for s in _ON_WORKER]]), task.c.unmet != 0
        ),
        "I2 what waits for nothing is ready": sa.select(task.c.id).where(
            task.c.state == State.PENDING, task.c.unmet == 0
        ),
        "I4 an active task has a claim by a worker": sa.select(task.c.id)
        .select_from(task.outerjoin(worker, worker.c.id == task.c.worker_id))
        .where(
            task.c.state.in_([s.value for s in _ON_WORKER]),
            sa.or_(task.c.token.is_(None), worker.c.id.is_(None), worker.c.state != "live"),
        ),
        "I4 a task that is not active has no claim": sa.select(task.c.id).where(
            task.c.state.not_in([s.value for s in ACTIVE_STATES]), task.c.token.is_not(None)
        ),
        "I1 a task has a payload": sa.select(task.c.id)
        .select_from(task.outerjoin(payload, payload.c.task_id == task.c.id))
        .where(payload.c.task_id.is_(None), task.c.pattern != Pattern.GROUP),
        "I1 an edge joins two tasks": sa.select(edge.c.downstream)
        .select_from(
            edge.outerjoin(upstream, upstream.c.id == edge.c.upstream).outerjoin(task, task.c.id == edge.c.downstream)
        )
        .where(sa.or_(upstream.c.id.is_(None), task.c.id.is_(None))),
        "I3 a complete task has an end, an unfinished one has none": sa.select(task.c.id).where(
            task.c.state.in_(complete) != task.c.finished_at.is_not(None),
            sa.or_(task.c.state.in_(complete), task.c.state.in_([State.PENDING.value, State.RUNNING.value])),
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
            requirement.c.cpus,
            requirement.c.memory_bytes,
        )
        .select_from(
            task.join(worker, worker.c.id == task.c.worker_id).join(
                requirement, requirement.c.id == task.c.requirement_id
            )
        )
        .where(_is_state(State.RUNNING))
        .order_by(worker.c.id)
    )


def _insert(dialect: str, table: sa.Table) -> Any:
    """An INSERT that knows ON CONFLICT; both databases have the same one."""
    return (sqlite.insert if dialect == "sqlite" else postgresql.insert)(table)
