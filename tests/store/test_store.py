"""The store's promises, on both databases: submit, claim, finish, release, kill, lose."""

import random
import threading
from dataclasses import replace
from itertools import pairwise

import pytest
from farm import COMMAND, GROUP, SPEC, after, claim, finish, ids, outcome, ready, reap, run, states, submit, worker

from aque.errors import BadInput, Cycle, UnknownTask
from aque.states import Reason, State
from aque.store import Store
from aque.values import Condition, Dependency, Outcome


def test_a_task_comes_back_from_the_store_as_it_was_submitted(store: Store) -> None:
    (new,) = ids(store, 1)
    spec = replace(
        SPEC,
        id=new,
        argv=(b"echo", b"", b"\xff\xfe", "ü\n\t\\".encode()),
        stdin=b"\x00\x01",
        cwd=b"/tmp/\xe9",
        environment=b"A=1\0B=\xff\0",
        umask=0o077,
        priority=-3,
        time_limit_seconds=2.5,
        name="a\tname\\N",
    )
    submit(store, [spec])
    (task,) = claim(store, [new], worker(store), token=1 << 61)
    assert (task.argv, task.stdin, task.cwd, task.environment) == (spec.argv, spec.stdin, spec.cwd, spec.environment)
    assert (task.umask, task.priority, task.time_limit_seconds) == (0o077, -3, 2.5)
    assert (task.name, task.attempt, task.token, task.job_id) == (spec.name, 1, 1 << 61, new)


def test_many_tasks_at_once_come_back_as_they_were_submitted(store: Store) -> None:
    new = ids(store, 300)
    odd = [b"", b"\xff\\x", b"a\tb\nc\rd\\", "é\x01".encode()]
    submit(store, [replace(SPEC, id=i, argv=(b"echo", odd[i % 4]), name=f"n\t{i}\\") for i in new])
    assert ready(store) == new
    for task in claim(store, new, worker(store)):
        assert task.argv == (b"echo", odd[task.id % 4])
        assert task.name == f"n\t{task.id}\\"


def test_a_child_becomes_ready_when_its_last_parent_finishes(store: Store) -> None:
    a, b, child = ids(store, 3)
    me = worker(store)
    assert submit(store, [after(a), after(b), after(child, a, b)])[child] is State.PENDING
    assert run(store, me, a).ready == []
    assert [t.id for t in run(store, me, b).ready] == [child]
    assert states(store)[child] == "ready"


def test_a_finish_that_is_replayed_releases_nothing_twice(store: Store) -> None:
    a, b, child = ids(store, 3)
    me = worker(store)
    submit(store, [after(a), after(b), after(child, a, b)])
    (done,) = claim(store, [a], me)
    finish(store, outcome(done))
    assert finish(store, outcome(done)).refused == [a]
    assert states(store)[child] == "pending"


def test_a_failure_skips_everything_that_needs_its_success_and_releases_what_waits_for_a_failure(store: Store) -> None:
    a, b, c, cleanup, always, never = ids(store, 6)
    me = worker(store)
    submit(
        store,
        [
            after(a),
            after(b, a),
            after(c, b),
            after(cleanup, b, condition=Condition.FAILED),
            after(always, c, condition=Condition.ANY),
            after(never, always, condition=Condition.FAILED),
        ],
    )
    finished = run(store, me, a, state=State.ERROR)
    assert sorted(finished.skipped) == [b, c]
    assert sorted(t.id for t in finished.ready) == [cleanup, always]
    run(store, me, cleanup, always)
    assert states(store) == {
        a: "error",
        b: "skipped",
        c: "skipped",
        cleanup: "success",
        always: "success",
        never: "skipped",
    }


def test_a_chain_of_5000_is_skipped_in_the_transaction_that_failed_its_head(store: Store) -> None:
    new = ids(store, 5000)
    submit(store, [after(new[0]), *[after(i, before) for before, i in pairwise(new)]])
    assert len(run(store, worker(store), new[0], state=State.ERROR).skipped) == 4999


def test_a_graph_may_depend_on_tasks_submitted_earlier(store: Store) -> None:
    done, failed, running = ids(store, 3)
    me = worker(store)
    submit(store, [after(done), after(failed), after(running)])
    run(store, me, done)
    run(store, me, failed, state=State.ERROR)
    a, b, c, d = ids(store, 4)
    assert submit(
        store, [after(a, done), after(b, failed), after(c, b, condition=Condition.ANY), after(d, running)]
    ) == {
        a: State.READY,
        b: State.SKIPPED,
        c: State.READY,
        d: State.PENDING,
    }
    run(store, me, running)
    assert states(store)[d] == "ready"


@pytest.mark.parametrize("size", [2, 300])
def test_a_cycle_is_refused_with_its_path_and_nothing_is_written(store: Store, size: int) -> None:
    new = ids(store, size)
    with pytest.raises(Cycle) as refused:
        submit(store, [after(i, before) for before, i in zip(new, [*new[1:], new[0]], strict=True)])
    assert refused.value.path[0] == refused.value.path[-1]
    assert len(refused.value.path) == size + 1
    assert states(store) == {}


def test_an_unknown_dependency_is_refused_by_id_and_nothing_is_written(store: Store) -> None:
    (new,) = ids(store, 1)
    with pytest.raises(UnknownTask) as refused:
        submit(store, [after(new, 999_999)])
    assert refused.value.ids == [999_999]
    assert states(store) == {}


def test_a_group_ends_with_its_last_member_and_releases_its_dependents(store: Store) -> None:
    group, a, b, nested, after_all = ids(store, 5)
    me = worker(store)
    submit(
        store,
        [
            replace(after(a), job_id=group),
            replace(after(b), job_id=group),
            replace(after(group, a, b, condition=Condition.ANY), requirement=GROUP),
            replace(after(nested, group, condition=Condition.ANY), requirement=GROUP),
            after(after_all, nested),
        ],
    )
    run(store, me, a)
    finished = run(store, me, b)
    assert finished.groups == {group: State.SUCCESS, nested: State.SUCCESS}
    assert [t.id for t in finished.ready] == [after_all]


def test_a_group_with_a_failed_member_fails(store: Store) -> None:
    group, a, b = ids(store, 3)
    me = worker(store)
    submit(store, [after(a), after(b), replace(after(group, a, b, condition=Condition.ANY), requirement=GROUP)])
    run(store, me, a, state=State.ERROR)
    assert states(store)[group] == "pending"
    assert run(store, me, b).groups == {group: State.ERROR}


def test_an_empty_group_is_a_success_at_once(store: Store) -> None:
    (group,) = ids(store, 1)
    assert submit(store, [replace(after(group), requirement=GROUP)]) == {group: State.SUCCESS}


def test_two_workers_never_claim_the_same_task(store: Store) -> None:
    new = ids(store, 200)
    submit(store, [after(i) for i in new])
    workers = [worker(store, f"w{n}") for n in range(4)]
    taken: list[list[int]] = [[] for _ in workers]

    def take(n: int) -> None:
        for start in range(0, 200, 20):
            taken[n] += [t.id for t in claim(store, new[start : start + 20], workers[n], token=n)]

    threads = [threading.Thread(target=take, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(i for ids_ in taken for i in ids_) == new


def test_siblings_that_finish_together_release_each_child_exactly_once(store: Store) -> None:
    me = worker(store)
    new = ids(store, 300)
    parents, children = new[:200], new[200:]
    submit(
        store,
        [
            *[after(p) for p in parents],
            *[after(c, parents[2 * n], parents[2 * n + 1]) for n, c in enumerate(children)],
        ],
    )
    claimed = {t.id: t for t in claim(store, parents, me)}
    released: list[int] = []
    lock = threading.Lock()

    def end(mine: list[int]) -> None:
        for start in range(0, len(mine), 10):
            finished = finish(store, *[outcome(claimed[i]) for i in mine[start : start + 10]])
            with lock:
                released.extend(t.id for t in finished.ready)

    halves = [parents[0::2], parents[1::2]]
    random.Random(1).shuffle(halves[1])
    threads = [threading.Thread(target=end, args=(half,)) for half in halves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(released) == children


def test_candidates_come_best_first_within_a_class_and_one_class_does_not_hide_another(store: Store) -> None:
    new = ids(store, 6)
    big = replace(COMMAND, cpus="64")
    submit(
        store,
        [
            replace(after(new[0]), priority=1),
            replace(after(new[1]), priority=5, duration=1.0),
            replace(after(new[2]), priority=5, duration=9.0),
            *[replace(after(i), requirement=big, priority=9) for i in new[3:]],
        ],
    )
    with store.connect() as connection:
        found = store.candidates(connection, [], 2)
        assert sorted([t.id for t in row] for row in found.values()) == [[new[2], new[1]], [new[3], new[4]]]
        classes = store.requirements(connection, found)
        assert {c.cpus for c in classes.values()} == {"1", "64"}
        unfit = [class_id for class_id, requirement in classes.items() if requirement.cpus == "64"]
        (rest,) = store.candidates(connection, unfit, 2).values()
        assert [t.id for t in rest] == [new[2], new[1]]


def test_a_stale_worker_can_neither_finish_nor_give_back_what_another_has(store: Store) -> None:
    (new,) = ids(store, 1)
    submit(store, [after(new)])
    stale, other = worker(store, "stale", lease_seconds=0.0), worker(store, "other")
    (old,) = claim(store, [new], stale, token=1)
    assert reap(store, stale) is not None
    (current,) = claim(store, [new], other, token=2)
    assert (current.attempt, finish(store, outcome(old)).refused) == (2, [new])
    with store.begin() as connection:
        assert store.give_back(connection, [(new, 1)]) == []
        assert not store.renew(connection, stale, 30.0)
    assert finish(store, outcome(current)).ended == {new: State.SUCCESS}


def test_a_worker_that_renewed_in_time_is_not_reaped(store: Store) -> None:
    me = worker(store)
    with store.begin() as connection:
        (seen,) = store.workers(connection)
        assert store.renew(connection, me, 30.0)
        assert store.reap(connection, seen, 3) is None


def test_the_third_lost_attempt_ends_the_task(store: Store) -> None:
    first, second = ids(store, 2)
    submit(store, [after(first), after(second, first)])
    for n in range(3):
        me = worker(store, f"w{n}")
        claim(store, [first], me)
        reap(store, me)
    with store.connect() as connection:
        (row,) = store.tasks(connection, {"id": first})
    assert (row["state"], row["reason"], row["lost"], row["attempt"]) == ("error", Reason.WORKER_LOST, 3, 3)
    assert states(store)[second] == "skipped"


def test_a_buffered_task_that_is_lost_or_given_back_spends_no_attempt(store: Store) -> None:
    a, b = ids(store, 2)
    submit(store, [after(a), after(b)])
    me = worker(store)
    claim(store, [a], me, token=1, state=State.CLAIMED)
    with store.begin() as connection:
        assert store.give_back(connection, [(a, 1)]) == [a]
    claim(store, [b], me, state=State.CLAIMED)
    reap(store, me)
    with store.connect() as connection:
        found = [(r["state"], r["attempt"], r["lost"]) for r in store.tasks(connection)]
        assert found == [("ready", 0, 0), ("ready", 1, 0)]  # the lost one may have started unseen: its number is gone


def test_a_started_task_that_is_given_back_counts_no_failure_and_its_number_is_not_used_again(store: Store) -> None:
    (new,) = ids(store, 1)
    submit(store, [after(new)])
    me = worker(store)
    claim(store, [new], me, token=1)
    with store.begin() as connection:
        assert store.give_back(connection, [(new, 1)]) == [new]
    (again,) = claim(store, [new], me, token=2)
    assert again.attempt == 2
    assert finish(store, outcome(again)).ended == {new: State.SUCCESS}
    with store.connect() as connection:
        (row,) = store.tasks(connection)
    assert row["lost"] == 0


def test_a_failed_attempt_is_repeated_as_often_as_allowed(store: Store) -> None:
    (new,) = ids(store, 1)
    submit(store, [replace(after(new), max_attempts=2)])
    me = worker(store)
    assert run(store, me, new, state=State.ERROR).repeated == [new]
    assert run(store, me, new, state=State.ERROR).ended == {new: State.ERROR}
    with store.connect() as connection:
        (row,) = store.tasks(connection)
    assert row["attempt"] == 2


def test_a_kill_withdraws_what_waits_and_asks_the_worker_of_what_runs(store: Store) -> None:
    waiting, running, child, done = ids(store, 4)
    submit(store, [after(waiting), after(running), after(child, waiting), after(done)])
    me = worker(store)
    run(store, me, done)
    (task,) = claim(store, [running], me)
    with store.begin() as connection:
        killed = store.kill(connection, [waiting, running, done], 15)
    assert (killed.cancelled, killed.requested, killed.skipped) == ([waiting], [running], [child])
    assert killed.untouched == {done: State.SUCCESS}
    with store.connect() as connection:
        assert [(k.id, k.signal) for k in store.orders(connection, me).kills] == [(running, 15)]
    finish(store, Outcome(running, task.attempt, task.token, State.KILLED, Reason.REQUEST, signal=15))
    assert states(store) == {waiting: "cancelled", running: "killed", child: "skipped", done: "success"}


def test_a_killed_task_whose_worker_dies_does_not_run_again(store: Store) -> None:
    (new,) = ids(store, 1)
    submit(store, [after(new)])
    me = worker(store)
    claim(store, [new], me)
    with store.begin() as connection:
        store.kill(connection, [new], 9)
    reap(store, me)
    assert states(store) == {new: "killed"}


def test_a_kill_of_an_unknown_task_kills_nothing(store: Store) -> None:
    (new,) = ids(store, 1)
    submit(store, [after(new)])
    with pytest.raises(UnknownTask), store.begin() as connection:
        store.kill(connection, [new, 999_999], 15)
    assert states(store) == {new: "ready"}


def test_a_kill_of_a_job_reaches_its_members(store: Store) -> None:
    group, a, b = ids(store, 3)
    members = [replace(after(i), job_id=group) for i in (a, b)]
    submit(store, [*members, replace(after(group, a, b, condition=Condition.ANY), requirement=GROUP)])
    with store.begin() as connection:
        store.kill(connection, [group], 15)
    assert set(states(store).values()) == {"cancelled"}


def test_a_success_that_nothing_waits_for_may_be_recorded_by_one_statement(store: Store) -> None:
    worker_id = worker(store)
    lone, waited_for, late = ids(store, 3)
    submit(store, [after(lone), after(waited_for)])
    claimed = {task.id: task for task in claim(store, [lone, waited_for], worker_id)}
    assert [claimed[i].dependents for i in (lone, waited_for)] == [0, 0]
    submit(store, [after(late, waited_for)])
    ends = {i: replace(outcome(task), value=b"7") for i, task in claimed.items()}

    def alone(end: Outcome) -> bool:
        with store.connect() as connection:
            return store.finish_alone(connection, end)

    stale = replace(ends[lone], token=8)
    assert [alone(stale), alone(ends[waited_for])] == [False, False], "nor what something has come to wait for"
    assert alone(ends[lone]) == (store.dialect == "postgresql")
    assert not alone(ends[lone]), "a replay writes nothing"
    if store.dialect == "sqlite":
        finish(store, ends[lone])
    assert finish(store, ends[waited_for]).ready[0].id == late
    with store.connect() as connection:
        assert [found.value for found in store.stored_results(connection, [lone, waited_for]).values()] == [b"7", b"7"]
    run(store, worker_id, late)


def test_output_and_results_are_bytes(store: Store) -> None:
    (new,) = ids(store, 1)
    submit(store, [after(new)])
    (task,) = claim(store, [new], worker(store))
    everything = bytes(range(256))
    with store.begin() as connection:
        for _ in range(2):  # a replayed batch
            store.append_output(connection, [(new, 1, 1, 0, everything), (new, 1, 1, 256, b"\0")])
        store.finish(connection, [replace(outcome(task), value=b'{"a": "\\u0000"}')])
    with store.connect() as connection:
        stream = (new, 1, 1)
        assert store.output_after(connection, {stream: -1}) == [(stream, 0, everything), (stream, 256, b"\0")]
        assert store.stored_results(connection, [new])[new].value == b'{"a": "\\u0000"}'


def test_a_question_for_a_field_that_there_is_not_names_those_there_are(store: Store) -> None:
    with pytest.raises(BadInput, match="started_at"), store.connect() as connection:
        list(store.tasks(connection, fields=["stared_at"]))


def test_a_random_graph_runs_to_its_end_in_order(store: Store) -> None:
    rng = random.Random(5)
    new = ids(store, 400)
    specs = []
    for n, i in enumerate(new):
        upstream = rng.sample(new[max(0, n - 30) : n], min(n, rng.randrange(4)))
        specs.append(
            replace(after(i), dependencies=tuple(Dependency(u, rng.choice(list(Condition))) for u in upstream))
        )
    submit(store, specs)
    me = worker(store)
    while waiting := ready(store):
        tasks = claim(store, rng.sample(waiting, min(len(waiting), 7)), me)
        finish(store, *[outcome(t, rng.choice([State.SUCCESS, State.SUCCESS, State.ERROR])) for t in tasks])
        with store.connect() as connection:
            assert store.doctor(connection) == []
    assert set(states(store).values()) <= {"success", "error", "skipped"}


def test_a_lost_attempt_is_the_last_of_a_task_that_may_not_be_requeued_whoever_finds_it_lost(store: Store) -> None:
    told, reaped, unstarted = ids(store, 3)
    me = worker(store)
    submit(store, [replace(SPEC, id=i, requeue=False, max_attempts=5) for i in (told, reaped, unstarted)])
    (task,) = claim(store, [told], me)
    finish(store, Outcome(task.id, task.attempt, task.token, State.READY, Reason.WORKER_LOST))
    claim(store, [reaped], me)
    claim(store, [unstarted], me, state=State.CLAIMED)
    reap(store, me)
    with store.connect() as connection:
        rows = {row["id"]: (row["state"], row["reason"], row["lost"]) for row in store.tasks(connection)}
    assert rows[told] == rows[reaped] == ("error", "worker_lost", 1)
    assert rows[unstarted][0] == "ready"  # no attempt of it was lost


def test_the_third_lost_attempt_is_the_last_however_often_it_may_fail(store: Store) -> None:
    (new,) = ids(store, 1)
    submit(store, [replace(SPEC, id=new, max_attempts=10)])
    for attempt in (1, 2, 3):
        assert states(store)[new] == "ready"
        me = worker(store)
        (task,) = claim(store, [new], me)
        assert task.attempt == attempt
        if attempt == 2:
            finish(store, Outcome(task.id, task.attempt, task.token, State.READY, Reason.WORKER_LOST))
        else:
            reap(store, me)
    assert states(store)[new] == "error"
