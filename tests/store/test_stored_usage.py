"""What an attempt has used: in its task's row until another one begins, in the history after that."""

from dataclasses import replace
from typing import Any

from aque.states import State
from aque.store import Store
from aque.values import Usage
from tests.store import farm

FIELDS = list(Usage.__slots__)
USAGE = Usage(1.5, 300 << 20, 4096, 5 << 40)
ROW = dict(zip(FIELDS, (1.5, 300 << 20, 4096, 5 << 40), strict=True))
NOTHING = dict.fromkeys(FIELDS)


def usage(store: Store, task_id: int) -> dict[str, Any]:
    with store.connect() as connection:
        (row,) = store.tasks(connection, {"id": task_id}, FIELDS)
    return row


def of_attempts(store: Store, task_id: int) -> list[tuple[Any, ...]]:
    names = ", ".join(FIELDS)
    with store.connect() as connection:
        found = connection.exec_driver_sql(
            f"SELECT attempt, {names} FROM aque_attempt WHERE task_id = {task_id} ORDER BY attempt"
        )
        return [tuple(row) for row in found]


def test_a_single_outcome_says_what_its_attempt_has_used(store: Store) -> None:
    worker_id, (task_id,) = farm.worker(store), farm.ids(store, 1)
    farm.submit(store, [farm.after(task_id)])
    assert usage(store, task_id) == NOTHING
    (task,) = farm.claim(store, [task_id], worker_id)
    farm.finish(store, replace(farm.outcome(task), usage=USAGE))
    assert usage(store, task_id) == ROW


def test_so_does_each_outcome_of_a_batch_and_one_with_a_result(store: Store) -> None:
    worker_id, ids = farm.worker(store), farm.ids(store, 4)
    farm.submit(store, [farm.after(i) for i in ids])
    *batch, lone = farm.claim(store, ids, worker_id)
    used = [None if n == 1 else replace(USAGE, cpu_seconds=float(n)) for n in range(3)]
    farm.finish(store, *(replace(farm.outcome(t), usage=u) for t, u in zip(batch, used, strict=True)))
    with store.begin() as connection:
        store.finish(connection, [replace(farm.outcome(lone), value=b"1", usage=USAGE)])
    assert [usage(store, i) for i in ids] == [ROW | {"cpu_seconds": 0.0}, NOTHING, ROW | {"cpu_seconds": 2.0}, ROW]


def test_a_lone_success_says_it_in_its_one_statement(store: Store) -> None:
    worker_id, (task_id,) = farm.worker(store), farm.ids(store, 1)
    farm.submit(store, [farm.after(task_id)])
    (task,) = farm.claim(store, [task_id], worker_id)
    with store.connect() as connection:
        done = store.finish_alone(connection, replace(farm.outcome(task), usage=USAGE))
    if not done:  # SQLite
        farm.finish(store, replace(farm.outcome(task), usage=USAGE))
    assert usage(store, task_id) == ROW


def test_another_attempt_begins_with_nothing_and_the_history_keeps_the_one_before(store: Store) -> None:
    worker_id, (task_id,) = farm.worker(store), farm.ids(store, 1)
    farm.submit(store, [farm.after(task_id, spec=replace(farm.SPEC, max_attempts=2))])
    (task,) = farm.claim(store, [task_id], worker_id)
    farm.finish(store, replace(farm.outcome(task, State.ERROR), usage=USAGE))
    assert of_attempts(store, task_id) == [(1, *ROW.values())]
    (task,) = farm.claim(store, [task_id], worker_id, token=8)
    assert usage(store, task_id) == NOTHING
    farm.finish(store, farm.outcome(task))
    assert usage(store, task_id) == NOTHING
