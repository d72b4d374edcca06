"""What a kill takes along, what it spares, and that it has one outcome whatever happens at the same time."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from signal import SIGKILL, SIGTERM, SIGUSR1
from threading import Barrier
from typing import Any

import pytest
import sqlalchemy as sa
from farm import GROUP, SPEC, after, claim, finish, ids, outcome, ready, run, states, submit, worker

from aque import control
from aque.errors import BadInput, UnknownTask
from aque.states import State
from aque.store import Killed, Store
from aque.store import statements as sql
from aque.store.tables import task
from aque.values import Condition
from tests.conftest import ON_POSTGRESQL
from tests.servers import wait_until
from tests.store.statements import counted

MANY = 10_000


def kill(store: Store, *task_ids: int, signal: int = SIGTERM, **options: Any) -> Killed:
    return control.kill(store, task_ids, signal, **options)


# -- dependencies ---------------------------------------------------------------------------------------------------------


def test_a_recursive_kill_takes_dependencies_however_far_up(store: Store) -> None:
    a, b, c, d = ids(store, 4)
    submit(store, [after(a), after(b, a), after(c, a), after(d, b, c)])
    assert kill(store, d, dependencies=True).cancelled == [a, b, c, d]


def test_what_unfinished_tasks_outside_still_need_is_spared_with_all_that_it_needs(store: Store) -> None:
    base, shared, mine, wanted, other = ids(store, 5)
    submit(
        store,
        [after(base), after(shared, base), after(mine, base), after(wanted, shared, mine), after(other, shared)],
    )
    killed = kill(store, wanted, dependencies=True)
    assert (killed.cancelled, killed.spared) == ([mine, wanted], [base, shared])
    run(store, worker(store), base)
    assert ready(store) == [shared]


def test_a_task_that_has_ended_needs_nothing_any_more(store: Store) -> None:
    shared, failed, other, wanted = ids(store, 4)
    submit(store, [after(shared), after(failed), after(other, shared, failed), after(wanted, shared)])
    run(store, worker(store), failed, state=State.ERROR)
    assert states(store)[other] == "skipped"
    assert kill(store, wanted, dependencies=True).cancelled == [shared, wanted]


def test_what_the_kill_makes_impossible_needs_nothing_any_more(store: Store) -> None:
    a, wanted, doomed = ids(store, 3)
    submit(store, [after(a), after(wanted, a), after(doomed, a, wanted)])
    killed = kill(store, wanted, dependencies=True)
    assert (killed.cancelled, killed.skipped, killed.spared) == ([a, wanted], [doomed], [])


def test_a_dependent_that_only_waits_for_the_end_keeps_its_dependency(store: Store) -> None:
    a, wanted, report = ids(store, 3)
    submit(store, [after(a), after(wanted, a), after(report, a, condition=Condition.ANY)])
    killed = kill(store, wanted, dependencies=True)
    assert (killed.cancelled, killed.spared) == ([wanted], [a])


def test_the_job_that_holds_them_all_spares_none_of_its_members_unless_somebody_waits_for_it(store: Store) -> None:
    def job() -> tuple[int, int, int]:
        group, a, b = ids(store, 3)
        members = [replace(after(a), job_id=group), replace(after(b, a), job_id=group)]
        submit(store, [*members, replace(after(group, a, b, condition=Condition.ANY), requirement=GROUP)])
        return group, a, b

    group, a, b = job()
    assert kill(store, b, dependencies=True).cancelled == [a, b]
    assert states(store)[group] == "error"
    group, a, b = job()
    (waits,) = ids(store, 1)
    submit(store, [after(waits, group, condition=Condition.ANY)])
    killed = kill(store, b, dependencies=True)
    assert (killed.cancelled, killed.spared) == ([b], [a])


def test_a_dependency_that_runs_is_signalled_and_one_that_has_succeeded_is_left(store: Store) -> None:
    done, running, wanted = ids(store, 3)
    me = worker(store)
    submit(store, [after(done), after(running, done), after(wanted, running)])
    run(store, me, done)
    (task,) = claim(store, [running], me)
    killed = kill(store, wanted, dependencies=True)
    assert (killed.cancelled, killed.requested, killed.untouched) == ([wanted], [running], {})
    finish(store, outcome(task, State.KILLED))


def test_what_holds_up_a_skipped_task_can_be_killed_through_it(store: Store) -> None:
    failed, slow, wanted = ids(store, 3)
    submit(store, [after(failed), after(slow), after(wanted, failed, slow)])
    run(store, worker(store), failed, state=State.ERROR)
    killed = kill(store, wanted, dependencies=True)
    assert (killed.cancelled, killed.untouched) == ([slow], {wanted: State.SKIPPED})


def test_a_signal_that_is_only_delivered_reaches_what_runs_and_cancels_nothing(store: Store) -> None:
    running, wanted = ids(store, 2)
    me = worker(store)
    submit(store, [after(running), after(wanted, running)])
    claim(store, [running], me)
    assert kill(store, wanted, signal=SIGUSR1, dependencies=True).requested == [running]
    assert states(store)[wanted] == "pending"


# -- dependents and children ----------------------------------------------------------------------------------------------


def test_a_kill_of_dependents_takes_what_would_run_after_a_failure_too(store: Store) -> None:
    a, needs, cleanup, always, other = ids(store, 5)
    submit(
        store,
        [
            after(a),
            after(needs, a),
            after(cleanup, needs, condition=Condition.FAILED),
            after(always, needs, condition=Condition.ANY),
            after(other),
        ],
    )
    assert kill(store, a, dependents=True).cancelled == [a, needs, cleanup, always]
    assert states(store)[other] == "ready"


def test_a_job_downstream_ends_with_its_members_and_not_before(store: Store) -> None:
    group, a, b, then = ids(store, 4)
    members = [replace(after(i), job_id=group) for i in (a, b)]
    submit(
        store,
        [*members, replace(after(group, a, b, condition=Condition.ANY), requirement=GROUP), after(then, group)],
    )
    assert kill(store, a, dependents=True).cancelled == [a, then]
    assert (states(store)[group], states(store)[b]) == ("pending", "ready")
    assert run(store, worker(store), b).groups == {group: State.ERROR}


@pytest.mark.parametrize("mode", ["dependencies", "dependents"])
def test_children_go_with_their_parents_in_either_mode(store: Store, mode: str) -> None:
    parent, child, grandchild, needed, stranger = ids(store, 5)
    me = worker(store)
    submit(store, [after(parent), after(needed), after(stranger)])
    (running,) = claim(store, [parent], me)
    submit(store, [replace(after(child), parent_id=parent), replace(after(grandchild, child), parent_id=child)])
    killed = kill(store, parent, **{mode: True})
    assert (killed.cancelled, killed.requested) == ([child, grandchild], [parent])
    finish(store, outcome(running, State.KILLED))
    assert states(store)[stranger] == "ready"


def test_children_of_a_parent_that_has_ended_are_still_its_children(store: Store) -> None:
    parent, child = ids(store, 2)
    submit(store, [after(parent)])
    (task,) = claim(store, [parent], worker(store))
    submit(store, [replace(after(child), parent_id=parent)])
    assert finish(store, outcome(task, State.ERROR)).ended == {parent: State.ERROR}
    assert kill(store, parent).cancelled == [child]


def test_both_ways_together_take_what_the_dependents_need(store: Store) -> None:
    before, a, beside, b, shared, other = ids(store, 6)
    submit(
        store,
        [
            after(before),
            after(a, before),
            after(beside),
            after(shared),
            after(b, a, beside, shared),
            after(other, shared),
        ],
    )
    killed = kill(store, a, dependencies=True, dependents=True)
    assert (killed.cancelled, killed.spared) == ([before, a, beside, b], [shared])


@pytest.mark.parametrize("seed", range(8))
def test_what_a_recursive_kill_takes_of_a_random_graph_is_what_nobody_else_needs(store: Store, seed: int) -> None:
    rng = random.Random(seed)
    new = ids(store, 60)
    graph = {i: rng.sample(new[max(0, n - 8) : n], min(n, rng.randrange(4))) for n, i in enumerate(new)}
    parents = {i: rng.choice(new[:n]) for n, i in enumerate(new) if n and rng.random() < 0.1}
    submit(store, [replace(after(i, *graph[i]), parent_id=parents.get(i)) for i in new])
    me = worker(store)
    for _ in range(rng.randrange(4)):
        run(store, me, *rng.sample(ready(store), min(3, len(ready(store)))))
    done = {i for i, state in states(store).items() if state == "success"}
    wanted = rng.choice([i for i in new if i not in done])
    # Drop from all that can be reached what others need, until nobody needs any of it.
    taken = set(new)
    doomed = {wanted}
    for i in new:
        if doomed & set(graph[i]):
            doomed.add(i)
    while True:
        reached, look = {wanted}, [wanted]
        while look:
            task = look.pop()
            children = {i for i, parent in parents.items() if parent == task}
            found = (set(graph[task]) - done | children) & taken - reached
            reached |= found
            look += found
        needed = {up for i in new if i not in reached | done | doomed for up in graph[i]} - {wanted}
        if not needed & reached and reached == taken:
            break
        taken = reached - needed | {wanted}
    taken -= done
    killed = kill(store, wanted, dependencies=True)
    assert set(killed.cancelled) <= taken
    # A child of what is spared is spared with it, also where something that is killed depends on it.
    assert taken - set(killed.cancelled) <= set(killed.spared)
    for i in killed.spared:
        assert states(store)[i] not in ("cancelled", "skipped") or i in doomed


# -- dry runs, grace, unknown ids -----------------------------------------------------------------------------------------


def test_a_dry_run_says_what_a_kill_would_do_and_changes_nothing(store: Store) -> None:
    a, b, c = ids(store, 3)
    submit(store, [after(a), after(b, a), after(c, b)])
    before = states(store)
    planned = kill(store, b, dependencies=True, dry_run=True)
    assert states(store) == before
    assert planned == kill(store, b, dependencies=True)
    assert (planned.cancelled, planned.skipped) == ([a, b], [c])


def test_a_later_kill_shortens_the_grace_and_never_lengthens_it(store: Store) -> None:
    (new,) = ids(store, 1)
    submit(store, [after(new)])
    me = worker(store)
    (task,) = claim(store, [new], me)

    def graces(*given: float | None) -> list[float | None]:
        found = []
        for grace in given:
            control.kill(store, [new], SIGTERM, grace_seconds=grace)
            with store.connect() as connection:
                (asked,) = store.orders(connection, me).kills
            found.append(asked.grace_seconds)
        return found

    assert graces(None, 20.0, None, 5.0, 30.0, 0.0) == [None, 20.0, 20.0, 5.0, 5.0, 0.0]
    finish(store, outcome(task, State.KILLED))


def test_a_recursive_kill_of_an_unknown_task_kills_nothing(store: Store) -> None:
    a, b = ids(store, 2)
    submit(store, [after(a), after(b, a)])
    with pytest.raises(UnknownTask, match="Nothing was killed"):
        kill(store, b, 999_999, dependencies=True)
    assert states(store) == {a: "ready", b: "pending"}


def test_the_links_of_a_task_are_looked_up_in_indexes(store: Store) -> None:
    """A plan that reads the whole table of edges for each level takes half a minute here."""
    new = ids(store, MANY)
    submit(store, [after(new[0]), *[after(i, before) for before, i in pairwise(new)]])
    with counted(store) as statements:
        assert len(kill(store, new[-1], dependencies=True, dry_run=True).cancelled) == MANY
        assert len(kill(store, new[0], dependents=True, dry_run=True).cancelled) == MANY
        assert len(kill(store, new[0]).skipped) == MANY - 1
    assert len(statements) < 60


# -- at the same time -----------------------------------------------------------------------------------------------------


def test_a_kill_that_races_with_a_claim_and_a_finish_has_one_outcome(store: Store) -> None:
    me = worker(store)
    seen = set()
    with ThreadPoolExecutor(2) as threads:
        for n in range(60):
            base, wanted, needs = ids(store, 3)
            submit(store, [after(base), after(wanted, base), after(needs, wanted)])
            if n % 2:
                run(store, me, base)
            barrier = Barrier(2)

            def work(
                base: int = base, wanted: int = wanted, token: int = n + 1, barrier: Barrier = barrier
            ) -> dict[int, State]:
                barrier.wait()
                ended: dict[int, State] = {}
                for task_id in (base, wanted):
                    if tasks := claim(store, [task_id], me, token=token):
                        ended |= finish(store, outcome(tasks[0])).ended
                return ended

            def end(wanted: int = wanted, barrier: Barrier = barrier) -> Killed:
                barrier.wait()
                return kill(store, wanted, signal=SIGKILL, dependencies=True)

            worked, killed = threads.submit(work), threads.submit(end)
            ended, done = worked.result(), killed.result()
            found = states(store)
            assert not set(done.cancelled) & set(ended)
            assert all(found[i] == "cancelled" for i in done.cancelled)
            assert all(found[i] == state for i, state in ended.items())
            assert (found[wanted], found[needs]) in {("cancelled", "skipped"), ("success", "ready")}
            seen.add(found[wanted])
            if found[needs] == "ready":
                kill(store, needs)
            with store.connect() as connection:
                assert store.doctor(connection) == []
    assert seen


def test_recursive_kills_and_submissions_of_dependents_at_once_end_sound(store: Store) -> None:
    me = worker(store)
    with ThreadPoolExecutor(3) as threads:
        for _ in range(10):
            new = ids(store, 22)
            chain, late = new[:20], new[20:]
            submit(store, [after(chain[0]), *[after(i, before) for before, i in pairwise(chain)]])
            barrier = Barrier(3)

            def depend(new_id: int, on: int, barrier: Barrier = barrier) -> None:
                barrier.wait()
                submit(store, [after(new_id, on)])

            def end(last: int = chain[-1], barrier: Barrier = barrier) -> Killed:
                barrier.wait()
                return kill(store, last, dependencies=True)

            jobs = [threads.submit(depend, i, on) for i, on in zip(late, (chain[5], chain[12]), strict=True)]
            killed = threads.submit(end)
            for job in jobs:
                job.result()
            spared = set(killed.result().spared)
            found = states(store)
            for task_id, on in zip(late, (chain[5], chain[12]), strict=True):
                assert found[task_id] == ("pending" if on in spared else "skipped")
            assert found[chain[-1]] == "cancelled"
            for task_id in ready(store):
                run(store, me, task_id, state=State.ERROR)


# -- drained workers ------------------------------------------------------------------------------------------------------


def test_a_draining_worker_claims_nothing_and_finishes_what_it_has(store: Store) -> None:
    first, second = ids(store, 2)
    submit(store, [after(first), after(second)])
    me, other = worker(store, "celery@one"), worker(store, "celery@two")
    (running,) = claim(store, [first], me)
    assert control.drain(store, ["celery@one"], True) == [me]
    assert claim(store, [second], me) == []
    with store.connect() as connection:
        assert (store.orders(connection, me).draining, store.orders(connection, other).draining) == (True, False)
        assert all(row.is_live for row in store.workers(connection))
    assert finish(store, outcome(running)).ended == {first: State.SUCCESS}
    control.drain(store, ["celery@one"], False)
    (running,) = claim(store, [second], me)
    assert finish(store, outcome(running)).ended == {second: State.SUCCESS}


def test_draining_a_worker_that_is_not_there_changes_nothing(store: Store) -> None:
    me = worker(store, "celery@one")
    worker(store, "celery@gone", lease_seconds=-1.0)
    for unknown in ("celery@none", "celery@gone"):
        with pytest.raises(BadInput, match="celery@one"):
            control.drain(store, ["celery@one", unknown], True)
    with store.connect() as connection:
        assert not store.orders(connection, me).draining


# -- locks ----------------------------------------------------------------------------------------------------------------


@ON_POSTGRESQL
@pytest.mark.parametrize("statement", [sql.cancel, sql.request_kill], ids=["cancel", "request"])
def test_tasks_are_locked_in_order_and_groups_after_what_they_wait_for(store: Store, statement: Any) -> None:
    group, first, second = ids(store, 3)
    # In the order of the table, which is that of a statement without one of its own, the last comes first.
    submit(store, [after(group, first, second, spec=replace(SPEC, requirement=GROUP)), after(second), after(first)])
    if statement is sql.request_kill:
        by = worker(store)
        claim(store, [second], by)
        claim(store, [first], by)
    asked = {"ids": [second, group, first], "wanted_signal": int(SIGTERM), "wanted_grace": None}
    with ThreadPoolExecutor() as pool:
        with store.begin() as connection:
            connection.execute(sql.lock_tasks(store.dialect), {"ids": [first]})
            killing = pool.submit(try_out, store, statement(store.dialect), asked)
            wait_until(lambda: is_somebody_waiting_for_a_lock(store), 60)
            free = sa.select(task.c.id).with_for_update(skip_locked=True)
            with store.begin() as another:
                left = sorted(another.execute(free).scalars())
        killing.result()
    assert left == sorted([group, second])


class Undone(Exception):
    """Takes a transaction back."""


def try_out(store: Store, statement: Any, parameters: dict[str, Any]) -> None:
    with pytest.raises(Undone), store.begin() as connection:
        connection.execute(statement, parameters)
        raise Undone


def is_somebody_waiting_for_a_lock(store: Store) -> bool:
    with store.connect() as connection:
        return bool(connection.exec_driver_sql("SELECT count(*) FROM pg_locks WHERE NOT granted").scalar_one())
