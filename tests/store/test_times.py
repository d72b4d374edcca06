"""Times before which tasks do not start, and after which they are not started."""

import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import sqlalchemy as sa

from aque import finisher
from aque.states import Reason, State
from aque.store import Released, Store
from aque.store import statements as sql
from aque.store.tables import payload, task
from aque.values import Condition, HostFailure, Outcome, TaskSpec
from aque.words import moment
from tests.store.farm import GROUP, SPEC, after, claim, finish, ids, outcome, ready, reap, run, states, submit, worker

HOUR = 3600.0


def later(seconds: float) -> float:
    return time.time() + seconds


def let_times_come(store: Store) -> None:
    """All that waits for a time, and all that expires, does so now."""
    values = {column: sa.case((column.is_not(None), 1.0)) for column in (task.c.not_before, task.c.expires_at)}
    with store.begin() as connection:
        connection.execute(sa.update(task).values(values))


def advance(store: Store) -> Released:
    with store.begin() as connection:
        return store.advance(connection)


def next_time(store: Store) -> float | None:
    with store.connect() as connection:
        return store.next_time(connection)


def timed(store: Store, count: int = 1, **times: float) -> list[int]:
    new = ids(store, count)
    submit(store, [replace(SPEC, id=i, **times) for i in new])  # type: ignore[arg-type]
    return new


# -- not before -----------------------------------------------------------------------------------------------------------


def test_a_task_is_ready_when_its_time_has_come(store: Store) -> None:
    (new,) = timed(store, not_before=later(HOUR))
    assert HOUR - 60 < (next_time(store) or 0) <= HOUR
    assert not advance(store).ready
    let_times_come(store)
    assert next_time(store) == 0
    assert [found.id for found in advance(store).ready] == [new]
    assert next_time(store) is None


@pytest.mark.parametrize("end", [State.SUCCESS, State.ERROR])
def test_a_group_whose_members_have_ended_ends_with_its_time_and_is_never_ready(store: Store, end: State) -> None:
    member, group, follower = ids(store, 3)
    head = TaskSpec(id=group, name="group", requirement=GROUP, not_before=later(HOUR), submitter="someone")
    submit(store, [after(member), after(group, member, condition=Condition.ANY, spec=head), after(follower, group)])
    run(store, worker(store), member, state=end)
    assert states(store)[group] == "pending"
    let_times_come(store)
    released = advance(store)
    assert released.groups == {group: end}
    assert [found.id for found in released.ready] == ready(store) == ([follower] if end is State.SUCCESS else [])
    assert next_time(store) is None


# -- expiry ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", [1e12, float("inf"), -1e12])
def test_a_time_that_no_calendar_has_can_be_shown(store: Store, when: float) -> None:
    submit(store, [replace(SPEC, id=1, not_before=when)])
    with store.connect() as connection:
        (row,) = store.tasks(connection)
    assert row["not_before"].year in (1, 9999)
    assert "UTC" in moment(row["not_before"].timestamp(), time.time()) and "UTC" in moment(when, time.time())


def test_what_was_not_started_in_time_is_cancelled(store: Store) -> None:
    new = timed(store, 2, expires_at=later(HOUR))
    let_times_come(store)
    assert next_time(store) == 0
    assert advance(store).expired == new
    assert next_time(store) is None


def test_what_was_claimed_ahead_does_not_expire_until_it_is_given_back(store: Store) -> None:
    (new,) = timed(store, expires_at=later(HOUR))
    (held,) = claim(store, [new], worker(store), state=State.CLAIMED)
    let_times_come(store)
    assert next_time(store) is None
    assert not advance(store).expired
    with store.begin() as connection:
        store.give_back(connection, [(new, held.token)])
    assert next_time(store) == 0
    assert advance(store).expired == [new]


def test_what_was_claimed_ahead_by_a_worker_that_is_lost_expires(store: Store) -> None:
    (new,) = timed(store, expires_at=later(HOUR))
    by = worker(store)
    claim(store, [new], by, state=State.CLAIMED)
    reap(store, by)
    let_times_come(store)
    assert advance(store).expired == [new]


@pytest.mark.parametrize("ahead", [False, True], ids=["at once", "ahead"])
def test_what_has_started_in_time_never_expires(store: Store, ahead: bool) -> None:
    (new,) = timed(store, expires_at=later(HOUR))
    (held,) = claim(store, [new], worker(store), state=State.CLAIMED if ahead else State.RUNNING)
    with store.begin() as connection:
        store.start(connection, [(new, held.token, time.monotonic())])
        store.give_back(connection, [(new, held.token)])
    let_times_come(store)
    assert next_time(store) is None
    assert not advance(store).expired
    assert ready(store) == [new]


def test_what_ended_before_its_start_was_written_has_started_in_time(store: Store) -> None:
    (new,) = ids(store, 1)
    submit(store, [replace(SPEC, id=new, expires_at=later(HOUR), max_attempts=2)])
    (held,) = claim(store, [new], worker(store), state=State.CLAIMED)
    finish(store, outcome(held, State.ERROR))
    let_times_come(store)
    assert next_time(store) is None
    assert ready(store) == [new]


def test_what_a_host_could_not_start_still_expires(store: Store) -> None:
    worker(store, "celery@there", host="there")
    (new,) = timed(store, expires_at=later(HOUR))
    (held,) = claim(store, [new], worker(store, host=store.host), state=State.CLAIMED)
    failure = HostFailure(held.class_id, held.job_id, Reason.CANNOT_ENTER_CWD, "cannot enter /x")
    end = Outcome(new, held.attempt, held.token, State.ERROR, Reason.CANNOT_ENTER_CWD, host_failure=failure)
    with store.begin() as connection:
        assert finisher.finish(store, connection, [end], 3, False, True).elsewhere == [new]
    let_times_come(store)
    assert advance(store).expired == [new]


# -- what is looked for ---------------------------------------------------------------------------------------------------


def test_a_time_that_is_left_in_a_row_is_not_due_for_ever(store: Store) -> None:
    new = timed(store, len(State))
    with store.begin() as connection:
        for task_id, state in zip(new, State, strict=True):
            row = sa.update(task).where(task.c.id == task_id)
            connection.execute(row.values(state=str(state), not_before=1.0, expires_at=1.0))
    assert next_time(store) == 0
    advance(store)
    assert next_time(store) is None
    with store.begin() as connection:
        connection.execute(sa.delete(payload))
        connection.execute(sa.delete(task))


@pytest.mark.parametrize(("statement", "column"), [(sql.due, "not_before"), (sql.expire, "expires_at")])
def test_what_is_due_is_found_by_an_index_however_much_is_to_come(store: Store, statement: object, column: str) -> None:
    timed(store, 200, not_before=later(HOUR), expires_at=later(HOUR))
    plan = "\n".join(explained(store, statement(store.dialect)))  # type: ignore[operator]
    if store.dialect == "postgresql":
        assert any(column in line and "<=" in line for line in plan.splitlines() if "Index Cond" in line), plan
    else:
        assert f"({column}<?)" in plan.replace(f"{column}>? AND ", ""), plan


def explained(store: Store, statement: sa.Update) -> Sequence[str]:
    text = str(statement.compile(store.engine, compile_kwargs={"literal_binds": True}))
    with store.begin() as connection:
        if store.dialect == "sqlite":
            return [row[-1] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")]
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        return [row[0] for row in connection.exec_driver_sql(f"EXPLAIN {text.replace('%%', '%')}")]
