"""What is old goes, in batches, and never what somebody still needs."""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery

from aque import settings
from aque.cleaner import Cleaner
from aque.errors import UnknownTask
from aque.states import State
from aque.store import Ages, Store
from aque.store import retention as module
from aque.store.tables import environment, output, requirement, result, task
from aque.values import Outcome, Requirement, TaskSpec
from aque.worker import ages
from tests.servers import wait_until
from tests.store.farm import (
    COMMAND,
    GROUP,
    SPEC,
    after,
    claim,
    finish,
    ids,
    outcome,
    run,
    states,
    submit,
    worker,
)

DAY = 86400.0
#: Ages of which those of the tests below are beyond, and fresh tasks are not.
TASKS = Ages(task_seconds=90 * DAY)
OUTPUT = Ages(output_seconds=14 * DAY)


def make_older(store: Store, days: float, task_ids: Sequence[int] | None = None) -> None:
    """Let everything, or these tasks, have happened so many days earlier."""
    seconds = days * DAY
    aged = sa.update(task).values(submitted_at=task.c.submitted_at - seconds, finished_at=task.c.finished_at - seconds)
    with store.begin() as connection:
        connection.execute(aged if task_ids is None else aged.where(task.c.id.in_(task_ids)))


def count(store: Store, table: sa.Table) -> int:
    with store.connect() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


def ended(store: Store, n: int = 1, state: State = State.SUCCESS) -> list[int]:
    """So many tasks that have run, with a result and output."""
    new = ids(store, n)
    submit(store, [replace(SPEC, id=i) for i in new])
    by = worker(store)
    claims = claim(store, new, by)
    with store.begin() as connection:
        store.append_output(connection, [(i, 1, 1, 0, b"x" * 100) for i in new])
    finish(store, *[replace(outcome(c, state), value=b"[1]" if state is State.SUCCESS else None) for c in claims])
    return new


def test_a_task_goes_with_all_that_is_its_own_when_it_is_old_enough(store: Store) -> None:
    old, young = ended(store, 3), ended(store, 2)
    make_older(store, 91, old)
    make_older(store, 89, young)
    assert store.retention.clean(TASKS).tasks == 3
    assert sorted(states(store)) == young
    assert (count(store, output), count(store, result)) == (2, 2)


def test_nothing_goes_without_an_age(store: Store) -> None:
    ended(store, 3)
    make_older(store, 10_000)
    assert not store.retention.clean(Ages())
    assert len(states(store)) == 3


def test_what_has_not_ended_never_goes(store: Store) -> None:
    submit(store, [replace(SPEC, id=i) for i in ids(store, 3)])
    running, *_ = new = sorted(states(store))
    claim(store, [running], worker(store))
    make_older(store, 1000)
    store.retention.clean(Ages(1, 1, 1, 1))
    assert sorted(states(store)) == new


def test_what_an_open_task_depends_on_stays_with_its_output_and_result_until_that_ends(store: Store) -> None:
    (upstream,) = ended(store)
    (downstream,) = ids(store, 1)
    submit(store, [after(downstream, upstream)])
    make_older(store, 1000)
    ages = Ages(1, 1, 1, 1)
    assert not store.retention.clean(ages)
    run(store, worker(store), downstream)
    make_older(store, 1000)
    assert store.retention.clean(ages).tasks == 2
    assert states(store) == {}


def chord(store: Store) -> tuple[list[int], int]:
    """Members that have ended with results and output, in a group that is in another; and the body, which has not."""
    members = ended(store, 2)
    inner, outer, body = ids(store, 3)
    group = TaskSpec(id=0, name="group", requirement=GROUP, submitter="someone")
    specs = [after(inner, *members, spec=replace(group, inputs=tuple(members))), after(outer, inner, spec=group)]
    submit(store, [*specs, after(body, outer)])
    assert {states(store)[i] for i in (inner, outer)} == {"success"}
    return members, body


def test_what_an_open_task_needs_through_groups_keeps_its_output_and_result(store: Store) -> None:
    members, body = chord(store)
    make_older(store, 1000)
    assert not store.retention.clean(Ages(output_seconds=1, value_seconds=1, output_quota_bytes=1))
    store.retention.forget(members)
    assert (count(store, result), count(store, output)) == (2, 2)
    run(store, worker(store), body)
    make_older(store, 1000)
    removed = store.retention.clean(Ages(output_seconds=1, value_seconds=1))
    assert (removed.outputs, removed.values) == (2, 2)


def test_what_an_open_task_needs_through_groups_of_other_jobs_stays(store: Store) -> None:
    members, body = chord(store)
    make_older(store, 1000)
    assert not store.retention.clean(TASKS)
    run(store, worker(store), body)
    make_older(store, 1000)
    assert store.retention.clean(TASKS).tasks == 5
    assert states(store) == {}
    assert members


def test_a_task_that_depended_on_a_younger_one_leaves_it_with_the_right_number_of_dependents(store: Store) -> None:
    upstream, old = ids(store, 2)
    submit(store, [replace(SPEC, id=upstream), after(old, upstream)])
    by = worker(store)
    run(store, by, upstream)
    run(store, by, old)
    make_older(store, 91, [old])
    assert store.retention.clean(TASKS).tasks == 1
    assert list(states(store)) == [upstream]  # and the doctor counts its dependents


def job(store: Store, members: int) -> tuple[int, list[int]]:
    head, *rest = ids(store, members + 1)
    group = TaskSpec(id=head, name="job", requirement=GROUP, submitter="someone")
    submit(store, [after(head, *rest, spec=group), *[replace(SPEC, id=i, job_id=head) for i in rest]])
    return head, rest


def test_a_job_goes_as_a_whole_or_not_at_all(store: Store) -> None:
    head, members = job(store, 4)
    by = worker(store)
    run(store, by, *members[:3])
    make_older(store, 100)
    assert not store.retention.clean(TASKS)  # a member has not ended
    run(store, by, members[3])
    assert not store.retention.clean(TASKS)  # and now it has, just now
    make_older(store, 100)
    assert store.retention.clean(TASKS).tasks == 5
    assert states(store) == {}
    assert head


def test_a_member_of_a_job_that_something_needs_keeps_the_whole_job(store: Store) -> None:
    _, members = job(store, 3)
    run(store, worker(store), *members)
    (downstream,) = ids(store, 1)
    submit(store, [after(downstream, members[1])])
    make_older(store, 100)
    assert not store.retention.clean(TASKS)
    assert len(states(store)) == 5


def test_a_member_that_came_while_its_job_was_removed_goes_too(store: Store) -> None:
    job, member = ended(store, 2)
    make_older(store, 91, [job])
    assert store.retention.clean(TASKS).tasks == 1
    with store.begin() as connection:
        connection.execute(sa.update(task).where(task.c.id == member).values(job_id=job))
    make_older(store, 91, [member])
    assert store.retention.clean(TASKS).tasks == 1
    assert states(store) == {}


def test_a_child_stays_as_long_as_its_parent_has_not_ended(store: Store) -> None:
    parent, child = ids(store, 2)
    submit(store, [replace(SPEC, id=parent), replace(SPEC, id=child, parent_id=parent)])
    by = worker(store)
    (held,) = claim(store, [parent], by)
    run(store, by, child)
    make_older(store, 100)
    assert not store.retention.clean(TASKS)
    finish(store, outcome(held))


def test_output_goes_before_its_task_which_says_that_it_is_cut(store: Store) -> None:
    old, young = ended(store, 3), ended(store, 2)
    make_older(store, 15, old)
    assert store.retention.clean(OUTPUT).outputs == 3
    with store.connect() as connection:
        sizes = store.output_sizes(connection, [*old, *young])
        cut = {row["id"] for row in store.tasks(connection, fields=["id", "truncated"]) if row["truncated"]}
    assert sorted(i for i, _, _ in sizes) == young
    assert cut == set(old)


def test_results_go_and_errors_and_rows_stay(store: Store) -> None:
    (good,) = ended(store)
    (bad,) = ids(store, 1)
    submit(store, [replace(SPEC, id=bad)])
    (held,) = claim(store, [bad], worker(store))
    finish(store, Outcome(bad, held.attempt, held.token, State.ERROR, error=b"{}"))
    make_older(store, 2)
    assert store.retention.clean(Ages(value_seconds=DAY)).values == 1
    with store.connect() as connection:
        found = store.stored_results(connection, [good, bad])
    assert (found[good].state, found[good].value, found[bad].error) == (State.SUCCESS, None, b"{}")


def test_of_too_much_output_the_oldest_goes(store: Store) -> None:
    with store.begin() as connection:
        connection.execute(sa.delete(output))
    new = ended(store, 10)  # of 100 bytes each
    store.retention.clean(Ages(output_quota_bytes=650))
    with store.connect() as connection:
        left = sorted(i for i, _, _ in store.output_sizes(connection, new))
    assert left == new[4:]
    assert not store.retention.clean(Ages(output_quota_bytes=650))


def test_a_dependent_of_a_task_that_has_gone_is_refused(store: Store) -> None:
    (old,) = ended(store)
    make_older(store, 100)
    store.retention.clean(TASKS)
    (new,) = ids(store, 1)
    with pytest.raises(UnknownTask):
        submit(store, [after(new, old)])


def test_the_walk_stops_between_two_batches_when_it_is_told_to(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    ended(store, 6)
    make_older(store, 100)
    assert store.retention.clean(TASKS, lambda _: False).tasks == 2
    assert store.retention.clean(TASKS).tasks == 4


def test_many_old_tasks_go_while_a_worker_goes_on(store: Store) -> None:
    """Most of them depend on one another across jobs."""
    n = 10_000
    first, *_ = many = ids(store, n)
    edges = {i: i - 1 for i in many if i % 100 and i > first}
    specs = [after(i, edges[i]) if i in edges else replace(SPEC, id=i) for i in many]
    submit(store, specs)
    with store.begin() as connection:
        ending = sa.update(task).values(state="success", unmet=0, finished_at=task.c.submitted_at)
        connection.execute(ending)
        connection.execute(sa.text("UPDATE aque_edge SET satisfied = true"))
    make_older(store, 100)
    by, done = worker(store), threading.Event()
    ran: list[int] = []

    def work() -> None:
        while not done.is_set():
            (new,) = ids(store, 1)
            submit(store, [replace(SPEC, id=new)])
            run(store, by, new)
            ran.append(new)

    working = threading.Thread(target=work)
    working.start()
    try:
        before = len(ran)
        removed = store.retention.clean(TASKS)
        during = len(ran) - before
    finally:
        done.set()
        working.join()
    assert removed.tasks == n
    assert during > 5
    assert sorted(states(store)) == sorted(ran)


# -- who cleans -----------------------------------------------------------------------------------------------------------


def test_of_all_live_workers_the_oldest_cleans(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aque.cleaner.PERIOD_SECONDS", 0.02)
    oldest, other = worker(store), worker(store)
    ended(store, 3)
    make_older(store, 100)
    cleaners = [Cleaner(store, other, TASKS), Cleaner(store, oldest, TASKS)]
    try:
        cleaners[0].start()
        looked = threading.Event()
        monkeypatch.setattr(cleaners[0], "_is_mine", both(cleaners[0]._is_mine, looked.set))
        assert looked.wait(60) and len(states(store)) == 3
        cleaners[1].start()
        wait_until(lambda: not states(store), 60, "the oldest has cleaned")
    finally:
        for cleaner in cleaners:
            cleaner.stop()


def both(first: Callable[[], bool], second: Callable[[], None]) -> Callable[[], bool]:
    def call() -> bool:
        found = first()
        second()
        return found

    return call


@pytest.mark.parametrize(
    ("celery", "own", "expected"),
    [({}, 0.0, 0.0), ({"result_expires": 60}, 0.0, 60.0), ({"result_expires": timedelta(hours=1)}, 5.0, 5.0),
     ({"result_expires": None}, 0.0, 0.0)],
)  # fmt: skip
def test_celerys_result_expires_counts_where_the_app_sets_it(celery: Any, own: float, expected: float) -> None:
    app = Celery(set_as_current=False)
    app.conf.update(celery)
    assert ages(settings.Settings(result_retention_seconds=own), app).value_seconds == expected


# -- what tasks share -----------------------------------------------------------------------------------------------------


def test_a_class_that_no_task_has_is_retired_and_goes_a_day_later(store: Store) -> None:
    ended(store)
    make_older(store, 100)
    store.retention.clean(TASKS)
    assert count(store, requirement) == 1
    assert store.retention.clean_shared(TASKS).classes == 0  # retired
    assert count(store, requirement) == 1
    with store.begin() as connection:
        long_ago = sa.func.replace(requirement.c.digest, "retired:1", "retired:0")
        connection.execute(sa.update(requirement).values(digest=long_ago))
    assert store.retention.clean_shared(TASKS).classes == 1
    assert count(store, requirement) == 0


def test_who_has_a_retired_class_in_mind_may_use_it_and_others_make_a_new_one(store: Store) -> None:
    submit_one(store)
    forget_tasks(store)
    store.retention.clean_shared(TASKS)
    first = submit_one(store)  # this process remembers the class
    other = Store(store.engine)
    second = submit_one(other)
    assert sorted(run(store, worker(store), first, second).ended) == [first, second]
    store.retention.clean_shared(TASKS)
    assert count(store, requirement) == 2


def test_a_submitter_looks_an_old_class_up_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    submit_one(store)
    forget_tasks(store)
    with store.begin() as connection:
        connection.execute(sa.delete(requirement))
    monkeypatch.setattr("aque.store.submissions.KNOWN_SECONDS", 0)
    submit_one(store)  # and the doctor finds its class
    assert count(store, requirement) == 1


def test_an_environment_that_no_task_has_goes_when_nobody_can_refer_to_it_any_more(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit_one(store, environment=b"A=1\0")
    forget_tasks(store)
    assert store.retention.clean_shared(TASKS).environments == 0
    with store.begin() as connection:
        connection.execute(sa.update(environment).values(id="abc-17"))
    assert store.retention.clean_shared(TASKS).environments == 1
    week_later = module.WEEK_SECONDS
    monkeypatch.setattr(
        "aque.store.submissions.environment_id", lambda digest, now: f"{digest}-{int(now // week_later) + 1}"
    )
    submit_one(store, environment=b"A=1\0")
    assert count(store, environment) == 1


def test_equal_environments_are_stored_once(store: Store) -> None:
    for _ in range(3):
        submit_one(store, environment=b"A=1\0")
    assert count(store, environment) == 1


def test_a_worker_that_has_long_gone_is_forgotten(store: Store) -> None:
    gone, live = worker(store), worker(store)
    with store.begin() as connection:
        store.unregister(connection, gone)
        connection.execute(sa.text("UPDATE aque_worker SET seen_at = seen_at - 100 * 86400.0"))
    assert store.retention.clean_shared(TASKS).workers == 1
    with store.connect() as connection:
        assert [row.info.id for row in store.workers(connection)] == [live]


def test_the_store_tells_how_many_bytes_it_holds(store: Store) -> None:
    ended(store, 10)
    sizes = store.retention.sizes()
    assert (sizes.output, sizes.results) == (1000, 30)
    assert sizes.rows > 0
    assert json.dumps(sizes.tables)


def submit_one(store: Store, environment: bytes = b"") -> int:
    (new,) = ids(store, 1)
    submit(store, [replace(SPEC, id=new, environment=environment, requirement=Requirement("celery", COMMAND.pattern))])
    return new


def forget_tasks(store: Store) -> None:
    """All tasks end, and go."""
    run(store, worker(store), *states(store))
    make_older(store, 100)
    store.retention.clean(TASKS)
    assert states(store) == {}
