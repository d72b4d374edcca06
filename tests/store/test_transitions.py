"""What is recorded of tasks, that readers see each of it once and in order, and how far they have come."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from aque import settings
from aque.errors import NotRecorded
from aque.feed import GAP, Event, Feed, settled
from aque.states import Reason, State
from aque.store import Store, open_store, schema
from aque.store.engine import open_engine, transaction
from aque.values import Again, Outcome
from tests.servers import wait_until
from tests.store.farm import GROUP, SPEC, after, claim, finish, ids, outcome, reap, run, submit, worker


def recorded(store: Store, *task_ids: int) -> list[tuple[int, str, str | None, int]]:
    """(task, state, reason, attempt) in the order of their numbers."""
    with store.connect() as connection:
        rows = store.transitions.after(connection, 0, 10_000)
    return [(t.task_id, t.state, t.reason, t.attempt) for t in rows if not task_ids or t.task_id in task_ids]


def story(store: Store, task_id: int) -> list[str]:
    return [state for _, state, _, _ in recorded(store, task_id)]


@pytest.fixture
def task(store: Store) -> int:
    (new,) = ids(store, 1)
    submit(store, [replace(SPEC, id=new, max_attempts=2)])
    return new


def test_a_task_that_runs_and_succeeds_has_two_transitions(store: Store, task: int) -> None:
    run(store, worker(store), task)
    assert recorded(store) == [(task, "running", None, 1), (task, "success", None, 1)]


def test_what_has_only_been_submitted_or_claimed_ahead_has_none(store: Store, task: int) -> None:
    (claimed,) = claim(store, [task], worker(store), state=State.CLAIMED)
    with store.begin() as connection:
        store.give_back(connection, [(claimed.id, claimed.token)])
    assert recorded(store) == []


def test_what_was_claimed_ahead_and_ended_before_its_start_was_written_has_started(store: Store, task: int) -> None:
    (claimed,) = claim(store, [task], worker(store), state=State.CLAIMED)
    finish(store, replace(outcome(claimed), ran_seconds=0.5))
    with store.connect() as connection:
        started, ended = store.transitions.after(connection, 0, 10)
    assert [started.state, ended.state] == ["running", "success"]
    assert ended.at - started.at == pytest.approx(0.5)


def test_what_was_withdrawn_from_a_worker_before_it_started_has_not_started(store: Store, task: int) -> None:
    (claimed,) = claim(store, [task], worker(store), state=State.CLAIMED)
    finish(store, Outcome(claimed.id, claimed.attempt, claimed.token, State.CANCELLED, Reason.REQUEST))
    assert recorded(store) == [(task, "cancelled", "request", 0)]


def test_what_says_of_itself_that_nothing_is_to_come_of_it_has_started(store: Store, task: int) -> None:
    (claimed,) = claim(store, [task], worker(store), state=State.CLAIMED)
    finish(store, Outcome(claimed.id, claimed.attempt, claimed.token, State.CANCELLED, Reason.IGNORED))
    assert recorded(store) == [(task, "running", None, 1), (task, "cancelled", "ignored", 1)]


@pytest.mark.parametrize("state", [State.RUNNING, State.CLAIMED])
@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_an_attempt_that_asks_for_another_is_a_retry(store: Store, task: int, state: State, seconds: float) -> None:
    (claimed,) = claim(store, [task], worker(store), state=state)
    finish(store, replace(outcome(claimed, State.ERROR), again=Again(seconds)))
    assert story(store, task) == ["running", "pending" if seconds else "ready"]


def test_a_failed_attempt_that_is_repeated_is_a_retry(store: Store, task: int) -> None:
    worker_id = worker(store)
    run(store, worker_id, task, state=State.ERROR)
    (claimed,) = claim(store, [task], worker_id, state=State.CLAIMED)
    finish(store, Outcome(claimed.id, claimed.attempt, claimed.token, State.ERROR, Reason.EXIT))
    assert [(state, attempt) for _, state, _, attempt in recorded(store)] == [
        ("running", 1),
        ("ready", 1),
        ("running", 2),
        ("error", 2),
    ]


def test_what_a_dead_worker_ran_is_a_retry_and_then_an_error(store: Store, task: int) -> None:
    for name, last in (("first", "ready"), ("second", "error")):
        worker_id = worker(store, name)
        claim(store, [task], worker_id)
        reap(store, worker_id, max_lost=2)
        assert recorded(store, task)[-1][1:3] == (last, "worker_lost")


def test_what_a_failure_makes_impossible_is_recorded_with_it(store: Store) -> None:
    first, second, third = ids(store, 3)
    submit(store, [replace(SPEC, id=first), after(second, first), after(third, second)])
    run(store, worker(store), first, state=State.ERROR)
    assert [story(store, i)[-1] for i in (first, second, third)] == ["error", "skipped", "skipped"]
    (late,) = ids(store, 1)
    submit(store, [after(late, first)])
    assert story(store, late) == ["skipped"]


def test_groups_and_kills_are_recorded(store: Store) -> None:
    member, group, withdrawn = ids(store, 3)
    submit(store, [replace(SPEC, id=member), after(group, member, spec=replace(SPEC, requirement=GROUP))])
    submit(store, [replace(SPEC, id=withdrawn)])
    run(store, worker(store), member)
    with store.begin() as connection:
        store.kill(connection, [withdrawn], 15)
    assert story(store, group) == ["success"]
    assert recorded(store, withdrawn) == [(withdrawn, "cancelled", "request", 0)]


def test_many_tasks_in_one_transaction_are_recorded_each(store: Store) -> None:
    many = ids(store, 300)
    submit(store, [replace(SPEC, id=i) for i in many])  # by COPY on PostgreSQL
    run(store, worker(store), *many)
    rows = recorded(store)
    assert [row[0] for row in rows if row[1] == "success"] == many and len(rows) == 600


# -- readers --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def feeds(store: Store) -> Iterator[Any]:
    """Makes open feeds, closed after the test."""
    made: list[Feed] = []

    def make(cursor: str | None = None) -> Feed:
        feed = Feed(store, cursor)
        made.append(feed)
        feed.open()
        return feed

    yield make
    for feed in made:
        feed.close()


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events]


def write(connection: Any, task_id: int, state: str = "success") -> None:
    """A transition as the trigger writes it."""
    connection.exec_driver_sql(
        "INSERT INTO aque_transition (task_id, job_id, name, state, attempt, at) "
        f"VALUES ({task_id}, {task_id}, 'x', '{state}', 1, 0)"
    )


@pytest.mark.parametrize(
    ("numbers", "position", "bound", "found"),
    [
        ([], 0, 0, 0),
        ([1, 2, 3], 0, 0, 3),
        ([1, 3, 4], 0, 0, 1),
        ([3, 4], 1, 0, 0),
        ([3, 4, 6], 1, 3, 2),
        ([3, 4, 6], 1, 5, 3),
    ],
)
def test_numbers_are_read_up_to_one_that_may_yet_come(numbers, position, bound, found):
    assert settled(numbers, position, bound) == found


def test_a_reader_sees_what_happens_after_it_was_opened(store: Store, task: int, feeds: Any) -> None:
    other, worker_id = ids(store, 1)[0], worker(store)
    submit(store, [replace(SPEC, id=other)])
    run(store, worker_id, task)
    feed = feeds()
    run(store, worker_id, other)
    started, ended = feed.wait(5)
    assert (started.kind, ended.kind) == ("task.started", "task.success")
    assert (ended.task_id, ended.job_id, ended.name, ended.state, ended.attempt) == (other, other, "true", "success", 1)
    assert feed.wait(0) == []


@pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK"])
def test_a_later_number_that_commits_first_waits_for_the_earlier(store: Store, feeds: Any, ending: str) -> None:
    if store.dialect == "sqlite":
        pytest.skip("SQLite has one writer at a time: numbers commit in their order")
    feed = feeds()
    with store.connect() as slow, store.connect() as quick:
        slow.exec_driver_sql("BEGIN")
        write(slow, 1)
        with transaction(quick):
            write(quick, 2)
        assert feed.wait(0.2) == []
        with transaction(quick):
            write(quick, 3)
        assert feed.wait(0.2) == []
        slow.exec_driver_sql(ending)
    seen: list[int] = []
    wait_until(lambda: seen.extend(e.task_id for e in feed.wait(1)) or len(seen) >= 2, 60)
    assert seen == ([1, 2, 3] if ending == "COMMIT" else [2, 3])


def test_a_reader_that_is_opened_meanwhile_counts_open_transactions_as_before(store: Store) -> None:
    if store.dialect == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    feed = Feed(store)
    with store.connect() as slow:
        slow.exec_driver_sql("BEGIN")
        write(slow, 1)
        opening = threading.Thread(target=feed.open)
        opening.start()
        opening.join(0.3)
        assert opening.is_alive()  # what is committed when it returns is not lost in between
        slow.exec_driver_sql("COMMIT")
        opening.join()
    with store.begin() as connection:
        write(connection, 2)
    assert [e.task_id for e in feed.wait(5)] == [2]
    feed.close()


def test_many_writers_lose_nothing_and_each_task_is_in_order(store: Store, feeds: Any) -> None:
    writers, each = 4, 40
    many = ids(store, writers * each)
    submit(store, [replace(SPEC, id=i) for i in many])
    feed = feeds()
    failures: list[BaseException] = []

    def work(mine: list[int], worker_id: int) -> None:
        try:
            for start in range(0, each, 4):
                run(store, worker_id, *mine[start : start + 4])
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(many[n * each : (n + 1) * each], worker(store, f"w{n}")))
        for n in range(writers)
    ]
    for thread in threads:
        thread.start()
    events: list[Event] = []
    wait_until(lambda: events.extend(feed.wait(0.5)) or len(events) >= 2 * len(many), 60)
    for thread in threads:
        thread.join()
    assert failures == []
    assert [e.seq for e in events] == sorted({e.seq for e in events})
    for task_id in many:
        assert kinds([e for e in events if e.task_id == task_id]) == ["task.started", "task.success"]


# -- cursors --------------------------------------------------------------------------------------------------------------


def test_a_cursor_goes_on_where_it_was(store: Store, task: int, feeds: Any) -> None:
    first = feeds("billing")
    worker_id = worker(store)
    (claimed,) = claim(store, [task], worker_id)
    (started,) = first.wait(5)
    assert first.done(started.seq, now=True)
    first.close()
    finish(store, outcome(claimed))  # while nobody listens
    assert kinds(feeds("billing").wait(5)) == ["task.success"]


def test_what_was_not_handled_comes_again(store: Store, task: int, feeds: Any) -> None:
    first = feeds("billing")
    run(store, worker(store), task)
    started, _ = first.wait(5)
    assert first.done(started.seq)  # not written at once: it is when the reader closes
    first.close()
    assert kinds(feeds("billing").wait(5)) == ["task.success"]


def test_a_cursor_has_one_reader_at_a_time(store: Store, task: int, feeds: Any) -> None:
    first, second = feeds("billing"), feeds("billing")
    assert first.wait(0) == second.wait(0) == []
    run(store, worker(store), task)
    assert len(first.wait(5)) == 2 and second.wait(0.1) == []
    first.close()
    assert len(second.wait(5)) == 2


def test_who_has_gone_without_a_word_loses_the_cursor_and_writes_nothing_more(
    store: Store, task: int, feeds: Any
) -> None:
    first, second = feeds("billing"), feeds("billing")
    run(store, worker(store), task)
    seen = first.wait(5)
    with store.begin() as connection:  # as if it had stood still for the time of its lease
        connection.exec_driver_sql("UPDATE aque_cursor SET until = 0")
    assert kinds(second.wait(5)) == kinds(seen)
    assert not first.done(seen[-1].seq, now=True)
    assert second.done(seen[0].seq, now=True)
    second.close()
    assert kinds(first.wait(5)) == ["task.success"]


def test_a_lease_of_an_earlier_boot_holds_nobody_up(store: Store, task: int, feeds: Any) -> None:
    assert feeds("billing").wait(0) == []
    with store.begin() as connection:
        connection.exec_driver_sql("UPDATE aque_cursor SET until = until + 1000000")
    run(store, worker(store), task)
    assert len(feeds("billing").wait(5)) == 2


# -- retention and the switch ---------------------------------------------------------------------------------------------


def aged(store: Store, seconds: float) -> None:
    with store.begin() as connection:
        connection.exec_driver_sql(f"UPDATE aque_transition SET at = at - {seconds}")


def deleted(store: Store, older_than: float) -> int:
    with store.connect() as connection:
        return store.transitions.delete_older(connection, store.now(connection) - older_than)


def test_old_transitions_are_deleted_and_a_cursor_that_missed_them_is_told(store: Store, feeds: Any) -> None:
    feed = feeds("slow")
    assert feed.wait(0) == []
    first, second = ids(store, 2)
    submit(store, [replace(SPEC, id=i) for i in (first, second)])
    run(store, worker(store), first)
    aged(store, 100)
    run(store, worker(store, "other"), second)
    assert deleted(store, 50) == 2 and deleted(store, 50) == 0
    assert [row[0] for row in recorded(store)] == [second, second]
    (gap,) = feed.wait(5)
    assert (gap.kind, gap.task_id, gap.state) == (GAP, 0, None)
    assert kinds(feed.wait(5)) == ["task.started", "task.success"]


def test_a_reader_that_has_seen_all_that_was_deleted_misses_nothing(store: Store, task: int, feeds: Any) -> None:
    feed = feeds("quick")
    run(store, worker(store), task)
    for event in feed.wait(5):
        feed.done(event.seq, now=True)
    aged(store, 100)
    assert deleted(store, 50) == 2 and recorded(store) == []
    (other,) = ids(store, 1)
    submit(store, [replace(SPEC, id=other)])
    run(store, worker(store, "other"), other)
    assert kinds(feed.wait(5)) == ["task.started", "task.success"]


def switch(store: Store, wanted: bool) -> bool:
    with store.connect() as connection:
        return store.transitions.record(connection, wanted)


def test_a_farm_may_record_nothing(store: Store, task: int, feeds: Any) -> None:
    cursor = feeds("billing")
    assert cursor.wait(0) == []
    assert switch(store, False) and not switch(store, False)
    with pytest.raises(NotRecorded, match="aque init --events"):
        feeds()
    worker_id = worker(store)
    run(store, worker_id, task)
    assert story(store, task) == []
    assert switch(store, True)
    (other,) = ids(store, 1)
    submit(store, [replace(SPEC, id=other)])
    run(store, worker_id, other)
    assert kinds(cursor.wait(5)) == [GAP, "task.started", "task.success"]


def test_an_upgrade_keeps_the_switch_and_makes_the_triggers_anew(store_url: str) -> None:
    configured = settings.load({"AQUE_BROKER": store_url})
    engine = open_engine(configured.store_url)
    schema.upgrade(engine)
    with engine.connect() as connection, transaction(connection):
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("DROP TRIGGER aque_task_moved")
        else:
            connection.exec_driver_sql("DROP TRIGGER aque_task_moved ON aque_task")
        from aque.store import recording

        recording.restore(connection)
    opened = open_store(configured)
    (new,) = ids(opened, 1)
    submit(opened, [replace(SPEC, id=new)])
    run(opened, worker(opened), new)
    assert story(opened, new) == ["running", "success"]
    opened.close()
    schema.drop(engine)
    schema.upgrade(engine)  # nothing is left that would be in the way
    engine.dispose()


# -- the doctor -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        ("UPDATE aque_transition SET state = 'running' WHERE state = 'success'", "the last that is recorded"),
        (
            "INSERT INTO aque_transition (task_id, job_id, name, state, attempt, at) "
            "SELECT task_id, job_id, name, state, attempt, at FROM aque_transition WHERE state = 'success'",
            "in order",
        ),
        ("UPDATE aque_cursor SET position = 1000", "no cursor is ahead"),
    ],
)
def test_the_doctor_sees_what_cannot_be(store: Store, task: int, feeds: Any, damage: str, rule: str) -> None:
    feeds("billing").close()
    run(store, worker(store), task)
    with store.connect() as connection:
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql(damage)
        findings = store.doctor(connection)
        connection.exec_driver_sql("ROLLBACK")
    assert any(rule in finding.rule for finding in findings), findings
