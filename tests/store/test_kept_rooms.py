"""Room that a worker keeps for a task: one worker for a task, one task for a worker, as long as both are there."""

from dataclasses import replace
from fractions import Fraction

from aque.states import State
from aque.store import Store
from aque.store.reservations import Reserved
from tests.store.farm import SPEC, claim, ids, outcome, reap, submit, worker
from tests.store.farm import finish as finish_all


def reserved(store: Store) -> dict[int, int]:
    with store.connect() as connection:
        return {row.task_id: row.worker_id for row in store.reservations.rows(connection)}


def take(store: Store, task_id: int, worker_id: int, seconds: float = 30.0) -> bool:
    with store.begin() as connection:
        return store.reservations.take(connection, task_id, worker_id, seconds)


def renew(store: Store, task_id: int, worker_id: int, seconds: float = 30.0) -> bool:
    with store.connect() as connection:
        kept = store.reservations.kept(connection, worker_id)
        store.reservations.renew(connection, worker_id, seconds)
    return kept is not None and kept.id == task_id


def tasks(store: Store, count: int) -> list[int]:
    found = ids(store, count)
    submit(store, [replace(SPEC, id=task_id) for task_id in found])
    return found


def test_one_worker_keeps_room_for_a_task_and_no_other_gets_it_meanwhile(store: Store) -> None:
    (task,), one, other = tasks(store, 1), worker(store), worker(store)
    assert take(store, task, one)
    assert not take(store, task, other)
    assert reserved(store) == {task: one}
    with store.connect() as connection:
        assert store.reservations.rows(connection) == [Reserved(task, one, "celery@here")]


def test_a_worker_keeps_room_for_one_task_at_a_time(store: Store) -> None:
    (first, second), one, other = tasks(store, 2), worker(store), worker(store)
    assert take(store, first, one)
    assert take(store, second, one)
    assert reserved(store) == {second: one}
    assert take(store, first, other)
    assert not renew(store, first, one)
    assert renew(store, second, one)


def test_a_reservation_ends_with_its_lease_and_with_its_holder(store: Store) -> None:
    (first, second), one, other = tasks(store, 2), worker(store, lease_seconds=-1.0), worker(store)
    assert take(store, first, one, seconds=-1.0)
    assert reserved(store) == {}
    assert take(store, first, other)
    assert take(store, second, one)
    reap(store, one)
    assert reserved(store) == {first: other}
    assert take(store, second, other)
    assert reserved(store) == {second: other}


def test_there_is_nothing_to_keep_once_the_task_runs(store: Store) -> None:
    (task,), one, other = tasks(store, 1), worker(store), worker(store)
    assert take(store, task, one)
    (claimed,) = claim(store, [task], other)
    assert reserved(store) == {}
    assert not renew(store, task, one)
    finish_all(store, outcome(claimed, State.SUCCESS))
    assert reserved(store) == {}


def test_a_forecast_is_told_what_runs_on_live_workers(store: Store) -> None:
    (first, second, third), one, dead = tasks(store, 3), worker(store), worker(store, lease_seconds=-1.0)
    claim(store, [first], one)
    claim(store, [second], dead)
    reap(store, dead)
    with store.connect() as connection:
        running = store.reservations.running(connection)
        (candidate,) = [t for row in store.candidates(connection, [], 9).values() for t in row if t.id == third]
    assert {worker_id: [task.class_id for task in row] for worker_id, row in running.items()} == {
        one: [candidate.class_id]
    }
    assert running[one][0].started_at >= candidate.ready_at


def test_the_cpus_of_a_user_are_counted_over_all_workers(store: Store) -> None:
    found, small, large = ids(store, 3), worker(store, cpus="4"), worker(store, cpus="8")
    anna = replace(SPEC.requirement, cpus="1/4", user="anna")
    bob = replace(SPEC.requirement, cpus="1.5", user="bob")
    submit(store, [replace(SPEC, id=i, requirement=r) for i, r in zip(found, (anna, anna, bob), strict=True)])
    claim(store, [found[0]], small)
    claim(store, [found[1], found[2]], large)
    with store.connect() as connection:
        assert store.usage(connection) == {"anna": Fraction("3.002"), "bob": Fraction("1.501")}
