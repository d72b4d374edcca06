"""What one host cannot start goes back for others, on both databases; and what is avoided is not read."""

from contextlib import closing
from dataclasses import replace
from fractions import Fraction

import pytest
from farm import SPEC, after, claim, finish, ids, outcome, ready, states, submit, worker
from statements import counted

from aque import finisher
from aque.backoff import Avoided
from aque.chooser import Place
from aque.claimer import Claimer
from aque.classes import Classes
from aque.mounts import Mounts
from aque.resources import Capacity
from aque.settings import load
from aque.states import Reason, State
from aque.store import Finished, Store
from aque.values import ClaimedTask, HostFailure, Outcome, Pattern, Requirement

WHY = "cannot enter /shots/a: No such file or directory"


@pytest.fixture
def bad(store: Store) -> int:
    """A worker on the host of this store, beside one on another."""
    store.host = "bad"
    worker(store, "celery@good", host="good")
    return worker(store, "celery@bad", host="bad")


def failed(task: ClaimedTask) -> Outcome:
    failure = HostFailure(task.class_id, task.job_id, Reason.CANNOT_ENTER_CWD, WHY)
    return replace(outcome(task, State.ERROR), reason=Reason.CANNOT_ENTER_CWD, error=b"{}", host_failure=failure)


def refuse(store: Store, *tasks: ClaimedTask, is_shared: bool = True, one_by_one: bool = False) -> Finished:
    with store.begin() as connection:
        return finisher.finish(store, connection, [failed(task) for task in tasks], 3, one_by_one, is_shared)


def counts(store: Store, task_id: int) -> dict[str, object]:
    with store.connect() as connection:
        statement = f"SELECT state, attempt, failed, lost, reason FROM aque_task WHERE id = {task_id}"
        return dict(connection.exec_driver_sql(statement).one()._mapping)


def history(store: Store, task_id: int) -> list[tuple[object, ...]]:
    with store.connect() as connection:
        statement = f"SELECT attempt, state, reason FROM aque_attempt WHERE task_id = {task_id} ORDER BY attempt"
        return [tuple(row) for row in connection.exec_driver_sql(statement)]


def hosts(store: Store, task_id: int) -> list[str]:
    with store.connect() as connection:
        return [refusal.host for refusal in store.refusals.of(connection, [task_id]).get(task_id, [])]


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("state", [State.RUNNING, State.CLAIMED])
def test_a_refused_task_is_ready_again_and_has_spent_nothing_but_the_number_of_its_attempt(
    store: Store, bad: int, state: State, one_by_one: bool
) -> None:
    first, second, child = ids(store, 3)
    submit(store, [after(first), after(second), after(child, first)])
    done = refuse(store, *claim(store, [first, second], bad, state=state), one_by_one=one_by_one)
    assert (sorted(done.elsewhere), sorted(done.repeated), done.ended, done.ready) == (
        [first, second],
        [first, second],
        {},
        [],
    )
    assert counts(store, first) == {"state": "ready", "attempt": 1, "failed": 0, "lost": 0, "reason": None}
    assert history(store, first) == [(1, "given back", "cannot_enter_cwd")]
    with store.connect() as connection:
        (refusal,) = store.refusals.of(connection, [first, child])[first]
    assert (refusal.host, refusal.job_id, refusal.reason, refusal.message) == ("bad", first, "cannot_enter_cwd", WHY)
    (again,) = claim(store, [first], bad, token=8)
    assert again.attempt == 2
    assert [task.id for task in finish(store, outcome(again)).ready] == [child]


def test_in_a_store_of_one_person_it_ends_at_once(store: Store, bad: int) -> None:
    (new,) = ids(store, 1)
    submit(store, [after(new)])
    assert refuse(store, *claim(store, [new], bad), is_shared=False).ended == {new: State.ERROR}
    assert counts(store, new)["reason"] == "cannot_enter_cwd"
    assert hosts(store, new) == []


def test_it_ends_when_the_last_host_has_refused_it(store: Store, bad: int) -> None:
    (new,) = ids(store, 1)
    submit(store, [after(new)])
    refuse(store, *claim(store, [new], bad))
    store.host = "good"
    assert refuse(store, *claim(store, [new], bad)).ended == {new: State.ERROR}
    assert hosts(store, new) == ["bad"]


def test_a_host_whose_worker_has_gone_is_no_other_host(store: Store) -> None:
    store.host = "bad"
    gone = worker(store, "celery@good", host="good", lease_seconds=-1)
    me = worker(store, "celery@bad", host="bad")
    (new,) = ids(store, 1)
    submit(store, [after(new)])
    assert refuse(store, *claim(store, [new], me)).ended == {new: State.ERROR}
    assert gone < me


def test_the_tries_of_a_task_are_not_spent_by_refusals(store: Store, bad: int) -> None:
    (new,) = ids(store, 1)
    submit(store, [replace(SPEC, id=new, max_attempts=2)])
    for _ in range(3):
        assert refuse(store, *claim(store, [new], bad)).elsewhere == [new]
    (task,) = claim(store, [new], bad)
    assert finish(store, outcome(task, State.ERROR)).repeated == [new]
    (task,) = claim(store, [new], bad)
    assert (task.attempt, finish(store, outcome(task, State.ERROR)).ended) == (5, {new: State.ERROR})


def test_of_many_refusals_by_one_host_the_latest_is_kept_and_comes_last(store: Store, bad: int) -> None:
    (new,) = ids(store, 1)
    submit(store, [after(new)])
    with store.begin() as connection:
        for host, why in (("bad", "first"), ("good", "second"), ("bad", "third")):
            store.refusals.add(connection, new, host, HostFailure(1, new, Reason.CANNOT_ENTER_CWD, why))
    with store.connect() as connection:
        found = store.refusals.of(connection, [new])[new]
    assert [(refusal.host, refusal.message) for refusal in found] == [("good", "second"), ("bad", "third")]


def test_a_task_that_was_killed_meanwhile_does_not_go_elsewhere(store: Store, bad: int) -> None:
    (new,) = ids(store, 1)
    submit(store, [replace(SPEC, id=new, max_attempts=5)])
    (task,) = claim(store, [new], bad)
    with store.begin() as connection:
        assert store.kill(connection, [new], 15).requested == [new]
    assert refuse(store, task).ended == {new: State.KILLED}
    assert (ready(store), hosts(store, new)) == ([], [])


def test_a_stale_worker_sends_nothing_elsewhere(store: Store, bad: int) -> None:
    (new,) = ids(store, 1)
    submit(store, [after(new)])
    (task,) = claim(store, [new], bad, token=1)
    done = refuse(store, replace(task, token=2))
    assert (done.elsewhere, done.refused, states(store), hosts(store, new)) == ([], [new], {new: "running"}, [])


def test_what_is_avoided_is_not_read_and_does_not_hide_what_comes_after_it(store: Store) -> None:
    elsewhere = Requirement("celery", Pattern.SHELL, cpus="2")
    task, member, other, of_class, last = ids(store, 5)
    submit(
        store,
        [
            replace(SPEC, id=task, priority=9),
            replace(SPEC, id=member, priority=8, job_id=other),
            replace(SPEC, id=other, priority=7),
            replace(SPEC, id=of_class, requirement=elsewhere),
            replace(SPEC, id=last),
        ],
    )
    with store.connect() as connection:
        found = store.candidates(connection, [], 2)
        (class_id,) = [i for i, row in found.items() if row[0].id == of_class]
        avoided = Avoided(frozenset({task}), frozenset({other}), frozenset({class_id}))
        left = store.candidates(connection, [], 1, avoided)
    assert [[t.id for t in row] for row in left.values()] == [[last]]


def test_a_worker_that_avoids_nothing_asks_the_ordinary_question(store: Store) -> None:
    with store.connect() as connection:
        with counted(store) as ordinary:
            store.candidates(connection, [], 1)
        with counted(store) as classes_only:
            store.candidates(connection, [], 1, Avoided(classes=frozenset({1})))
    assert ordinary == classes_only
    assert "job_id =" not in ordinary[0]


def test_what_a_worker_avoids_is_in_its_row(store: Store, bad: int) -> None:
    with store.begin() as connection:
        store.refusals.set_avoids(connection, bad, (f"job 12: {WHY} (until 10:41 UTC)",), {b"/shots": "No such file"})
        rows = {row.info.id: row.avoids for row in store.workers(connection)}
    assert rows[bad] == (f"job 12: {WHY} (until 10:41 UTC)",)
    assert set(rows.values()) == {rows[bad], ()}


def test_what_a_finish_releases_is_left_alone_too_if_it_is_avoided(store: Store) -> None:
    place = Place("bad", "linux", frozenset({"celery"}), Capacity(Fraction(8), 1 << 30, 2, 32))
    settings = load({"AQUE_BROKER": "sqlite:////nowhere/aque.db"})
    with closing(Mounts("bad", lambda: None)) as mounts:
        chooser = Claimer(store, settings, Classes(store, settings, place, mounts), lambda name: None)
    first, second, third, fourth = ids(store, 4)
    submit(store, [replace(SPEC, id=i, job_id=first if i == second else i) for i in (first, second, third, fourth)])
    with store.connect() as connection:
        released = [task for row in store.candidates(connection, [], 10).values() for task in row]
        assert chooser.choose_released(connection, released, place.whole) == released
        chooser.avoided = Avoided(tasks=frozenset({third}), jobs=frozenset({first}))
        assert [task.id for task in chooser.choose_released(connection, released, place.whole)] == [fourth]
        chooser.avoided = Avoided(classes=frozenset({released[0].class_id}))
        assert chooser.choose_released(connection, released, place.whole) == []
