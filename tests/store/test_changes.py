"""Changes of waiting tasks, and the questions of `aque explain`, on both databases."""

import threading
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from aque import control, observer, settings
from aque.errors import BadInput, UnknownTask
from aque.machine import user_name
from aque.states import State
from aque.store import Store
from aque.values import Dependency, TaskSpec
from tests.store.farm import COMMAND, GROUP, SPEC, after, claim, finish, ids, outcome, ready, run, submit, worker

MINE = replace(SPEC, submitter=user_name())
PERSONAL = settings.load({"AQUE_STATE_DIR": "/nowhere"})
SHARED = {"AQUE_BROKER": "postgresql://farm/aque"}


def tasks(store: Store, *specs: TaskSpec) -> list[int]:
    found = ids(store, len(specs))
    submit(store, [replace(spec, id=task_id) for task_id, spec in zip(found, specs, strict=True)])
    return found


def row(store: Store, task_id: int, *fields: str) -> Mapping[str, Any]:
    with store.connect() as connection:
        (found,) = store.tasks(connection, {"id": task_id}, fields)
    return found


def order(store: Store) -> list[int]:
    with store.connect() as connection:
        rows = [task for found in store.candidates(connection, [], 100).values() for task in found]
    return [task.id for task in sorted(rows, key=lambda task: (-task.priority, -task.duration, task.id))]


def test_a_priority_reorders_what_is_ready_and_keeps_what_age_has_added(store: Store) -> None:
    old = replace(MINE, age_rank=-10)
    first, second, third = tasks(store, old, old, replace(MINE, age_rank=-13))
    assert order(store) == [first, second, third]
    control.change(store, PERSONAL, [third], priority=4)
    assert order(store) == [third, first, second]
    control.change(store, PERSONAL, [third], priority=2)
    assert order(store) == [first, second, third]
    assert row(store, third, "priority") == {"priority": 2}
    control.change(store, PERSONAL, [second], duration=5.0)
    assert order(store) == [second, first, third]


def test_a_new_requirement_is_a_class_that_equal_ones_share(store: Store) -> None:
    first, second, third = tasks(store, MINE, replace(MINE, requirement=replace(COMMAND, cpus="2")), MINE)
    control.change(store, PERSONAL, [first], requirement={"cpus": "2"})
    with store.connect() as connection:
        found = store.candidates(connection, [], 10)
        assert sorted([task.id for task in row] for row in found.values()) == [[first, second], [third]]
        needs = store.requirements(connection, found)
    assert {needs[class_id].cpus for class_id in found} == {"1", "2"}


def test_members_that_run_are_left_and_a_task_that_runs_is_an_error(store: Store) -> None:
    job, running, waiting, ended = ids(store, 4)
    member = replace(MINE, job_id=job)
    specs = [replace(member, id=task_id) for task_id in (running, waiting, ended)]
    depends = tuple(Dependency(spec.id) for spec in specs)
    submit(store, [*specs, TaskSpec(job, "job", GROUP, dependencies=depends, submitter=user_name())])
    one = worker(store)
    (claimed,) = claim(store, [running], one)
    run(store, one, ended)
    changed = control.change(store, PERSONAL, [job], requirement={"cpus": "2"})
    assert (changed.ids, changed.left) == ([waiting], {running: State.RUNNING, ended: State.SUCCESS})
    assert row(store, running, "cpus") == {"cpus": "1"}
    changed = control.change(store, PERSONAL, [job], priority=3)
    assert (changed.ids, changed.left) == ([running, waiting], {ended: State.SUCCESS})
    assert row(store, job, "priority") == {"priority": 3}
    with pytest.raises(BadInput, match=f"task {running} is running: a worker has it"):
        control.change(store, PERSONAL, [running, waiting], priority=9, requirement={"cpus": "3"})
    assert row(store, waiting, "priority", "cpus") == {"priority": 3, "cpus": "2"}
    finish(store, outcome(claimed))
    run(store, one, waiting)


def test_nothing_is_changed_where_one_id_is_unknown(store: Store) -> None:
    (task,) = tasks(store, MINE)
    with pytest.raises(UnknownTask):
        control.change(store, PERSONAL, [task, 10_000], priority=1)
    assert row(store, task, "priority") == {"priority": 0}


def test_room_that_is_kept_for_what_a_task_needed_before_is_given_up(store: Store) -> None:
    (task,), one = tasks(store, MINE), worker(store)
    with store.begin() as connection:
        assert store.reservations.take(connection, task, one, 30.0)
    control.change(store, PERSONAL, [task], priority=1)
    with store.connect() as connection:
        assert store.reservations.kept(connection, one) is not None
    control.change(store, PERSONAL, [task], requirement={"cpus": "2"})
    with store.connect() as connection:
        assert store.reservations.kept(connection, one) is None


def test_in_a_shared_store_one_changes_ones_own_tasks_within_the_priorities_of_users(store: Store) -> None:
    mine, other = tasks(store, MINE, replace(MINE, submitter="somebody"))
    nobody = settings.load({**SHARED, "AQUE_ADMINISTRATORS": "boss"})
    with pytest.raises(BadInput, match=f"task {other} is somebody's: only somebody and administrators"):
        control.change(store, nobody, [mine, other], priority=1)
    with pytest.raises(BadInput, match="a priority above 100 needs an administrator"):
        control.change(store, nobody, [mine], priority=101)
    assert control.change(store, nobody, [mine], priority=100).ids == [mine]
    boss = settings.load({**SHARED, "AQUE_ADMINISTRATORS": f"boss, {user_name()}"})
    assert control.change(store, boss, [mine, other], priority=1000).ids == [mine, other]


def test_two_changes_of_the_same_tasks_at_once_both_take_place(store: Store) -> None:
    found = tasks(store, *[MINE] * 40)
    both = [{"cpus": "2"}, {"memory_bytes": 1024}]
    threads = [
        threading.Thread(target=control.change, args=(store, PERSONAL, found), kwargs={"requirement": fields})
        for fields in both
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {tuple(row(store, task, "cpus", "memory").values()) for task in found} == {("2", 1024)}
    assert ready(store) == found


# -- explain


def test_the_first_failure_of_a_long_chain_is_found(store: Store) -> None:
    found = ids(store, 300)
    submit(store, [replace(MINE, id=found[0]), *(after(b, a, spec=MINE) for a, b in pairwise(found))])
    run(store, worker(store), found[0], state=State.ERROR)
    (explained,) = observer.explain_tasks(store, PERSONAL, [found[-1]])
    (ended, because) = explained.reasons
    assert ended.text.startswith("ended as skipped: dependency")
    assert because.text.endswith(f"that began with task {found[0]} (true): error")
    assert len(because.facts["chain"]) == 299


def test_what_runs_what_waits_and_what_waits_for_it_is_explained_in_the_order_of_the_question(store: Store) -> None:
    first, second, third = ids(store, 3)
    submit(
        store,
        [replace(MINE, id=first, duration=60.0), replace(MINE, id=second), after(third, first, second, spec=MINE)],
    )
    one = worker(store, cpus="1")
    (claimed,) = claim(store, [first], one)
    explained = {e.subject.id: e for e in observer.explain_tasks(store, PERSONAL, [third, first, second])}
    assert list(explained) == [third, first, second]
    assert [reason.kind for e in explained.values() for reason in e.reasons] == ["dependencies", "running", "order"]
    (facts,) = [reason.facts for reason in explained[third].reasons]
    assert (facts["left"], facts["slowest"]) == (2, first)
    (view,) = explained[second].workers
    assert view.kind == "no_room" and view.expected_at is not None
    assert observer.whys(store, PERSONAL, [third, first, second]) == {
        first: None,
        second: "waits for its turn",
        third: "waits for 2 tasks",
    }
    finish(store, outcome(claimed))
    run(store, one, second)
    run(store, one, third)


def test_room_that_a_worker_keeps_is_told_of_both_tasks(store: Store) -> None:
    big, small = tasks(store, replace(MINE, requirement=replace(COMMAND, cpus="all")), MINE)
    one = worker(store, cpus="2")
    (running,) = tasks(store, MINE)
    (claimed,) = claim(store, [running], one)
    with store.begin() as connection:
        assert store.reservations.take(connection, big, one, 30.0)
    kept, other = observer.explain_tasks(store, PERSONAL, [big, small])
    assert kept.reasons[0].text.startswith("worker celery@here keeps room for it")
    assert (other.workers[0].kind, other.workers[0].text) == ("room_kept", f"keeps room for task {big}")
    assert observer.whys(store, PERSONAL, [small]) == {small: f"room is kept for task {big}"}
    finish(store, outcome(claimed))
