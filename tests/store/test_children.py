"""What the end of a task means for those that it has submitted, and theirs for its own."""

from collections.abc import Sequence
from dataclasses import replace
from signal import SIGTERM

import pytest

from aque import doorbell, finisher
from aque.reaper import Heartbeat
from aque.states import State
from aque.store import Store
from aque.values import Children, ClaimedTask, Replacement
from tests.servers import wait_until
from tests.store.farm import SPEC, claim, finish, ids, outcome, ready, reap, run, states, submit, worker


def family(
    store: Store, count: int, by: int, children: Children = Children.WAIT, **parent: object
) -> tuple[ClaimedTask, list[int]]:
    """A task that runs, and so many tasks that it has submitted."""
    head, *rest = ids(store, count + 1)
    submit(store, [replace(SPEC, id=head, children=children, **parent)])  # type: ignore[arg-type]
    (running,) = claim(store, [head], by)
    submit_children(store, head, rest)
    return running, rest


def submit_children(store: Store, parent: int, children: Sequence[int]) -> None:
    submit(store, [replace(SPEC, id=i, parent_id=parent) for i in children])


def reason(store: Store, task_id: int) -> str | None:
    with store.connect() as connection:
        (row,) = store.tasks(connection, {"id": task_id}, ["reason"])
    found: str | None = row["reason"]
    return found


# -- cancel ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("requeue", "max_lost"), [(False, 3), (True, 1)], ids=["no requeue", "last loss"])
def test_children_end_with_a_parent_that_its_lost_worker_has_ended(store: Store, requeue: bool, max_lost: int) -> None:
    dead, other = worker(store), worker(store, "celery@there", host="there")
    parent, (waits, runs) = family(store, 2, dead, Children.CANCEL, requeue=requeue)
    (running,) = claim(store, [runs], other)
    released = reap(store, dead, max_lost)
    assert released is not None
    assert released.signalled
    found = states(store)
    assert (found[parent.id], found[waits], found[runs]) == ("error", "cancelled", "running")
    with store.connect() as connection:
        assert [kill.id for kill in store.orders(connection, other).kills] == [runs]
    finish(store, outcome(running, State.KILLED))


def test_children_of_a_parent_that_runs_again_go_on(store: Store) -> None:
    dead = worker(store)
    parent, (child,) = family(store, 1, dead, Children.CANCEL)
    released = reap(store, dead)
    assert released is not None
    assert not released.signalled
    assert ready(store) == [parent.id, child]


def test_who_reaps_wakes_the_workers_that_have_children_to_kill(store: Store) -> None:
    me, dead = worker(store), worker(store, "celery@gone", lease_seconds=-1, host="gone")
    _, (child,) = family(store, 1, dead, Children.CANCEL, requeue=False)
    (running,) = claim(store, [child], me)
    bell = doorbell.Doorbell(store.engine, [doorbell.KILL])
    beat = Heartbeat(store, me, 30, 3, lambda: me, lambda *_: None, lambda: None)
    beat.start()
    try:
        wait_until(lambda: doorbell.KILL in bell.wait(1), 60)
    finally:
        beat.stop()
        bell.close()
    finish(store, outcome(running, State.KILLED))


# -- wait -----------------------------------------------------------------------------------------------------------------


def test_a_child_that_fails_while_its_parent_runs_fails_it_when_it_succeeds(store: Store) -> None:
    by = worker(store)
    parent, (child,) = family(store, 1, by)
    run(store, by, child, state=State.ERROR)
    with store.connect() as connection:
        assert not store.finish_alone(connection, outcome(parent)), "it is no lone success"
    assert finish(store, outcome(parent)).ended == {parent.id: State.ERROR}
    assert reason(store, parent.id) == "child"


def test_children_that_failed_under_an_earlier_attempt_do_not_count_for_the_next(store: Store) -> None:
    by = worker(store)
    parent, (child,) = family(store, 1, by, max_attempts=2)
    run(store, by, child, state=State.ERROR)
    finish(store, outcome(parent, State.ERROR))
    assert ready(store) == [parent.id]
    assert run(store, by, parent.id).ended == {parent.id: State.SUCCESS}


def test_children_of_an_earlier_attempt_that_are_open_count_for_the_next(store: Store) -> None:
    by = worker(store)
    parent, (child,) = family(store, 1, by, max_attempts=2)
    finish(store, outcome(parent, State.ERROR))
    assert run(store, by, parent.id).waiting == [parent.id]
    assert run(store, by, child, state=State.ERROR).closed == {parent.id: State.ERROR}


# -- a place that is given up ---------------------------------------------------------------------------------------------


def test_a_task_that_is_killed_before_another_takes_its_place_says_why(store: Store) -> None:
    by = worker(store)
    running, _ = family(store, 0, by)
    with store.begin() as connection:
        store.kill(connection, [running.id], SIGTERM)
    place = Replacement("other", "m:f", b"[[],{}]", (), ())
    finish(store, replace(outcome(running, State.PENDING), replacement=place))
    assert (states(store)[running.id], reason(store, running.id)) == ("killed", "request")


# -- one by one -----------------------------------------------------------------------------------------------------------


def test_outcomes_that_are_recorded_one_by_one_tell_all_that_they_set_in_motion(store: Store) -> None:
    by, other = worker(store), worker(store, "celery@there", host="there")
    ends, (killed,) = family(store, 1, by, Children.CANCEL)
    (running,) = claim(store, [killed], other)
    waits, (open_child,) = family(store, 1, by)
    closes, (last,) = family(store, 1, by)
    finish(store, outcome(closes))
    (last_claim,) = claim(store, [last], by)
    with store.begin() as connection:
        outcomes = [outcome(ends), outcome(waits), outcome(last_claim)]
        finished = finisher.finish(store, connection, outcomes, 3, one_by_one=True, is_shared=False)
    assert finished.signalled
    assert finished.waiting == [waits.id]
    assert finished.closed == {closes.id: State.SUCCESS}
    assert finished.ended == {ends.id: State.SUCCESS, last: State.SUCCESS}
    finish(store, outcome(running, State.KILLED))
    run(store, by, open_child)
