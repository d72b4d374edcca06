"""Farm-wide limits, on both databases: taken in the claim, freed with the task, never exceeded."""

import random
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest
from farm import COMMAND, SPEC, after, finish, ids, outcome, reap, states, submit, worker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from statements import counted

from aque.errors import BadInput
from aque.states import Reason, State
from aque.store import LimitRow, Store, again
from aque.values import ClaimedTask, Outcome
from tests.servers import wait_until


def set_limit(store: Store, name: str, capacity: int) -> None:
    with store.begin() as connection:
        store.limits.set(connection, name, capacity)


def remove(store: Store, name: str) -> bool:
    with store.begin() as connection:
        return store.limits.remove(connection, name)


def claim(
    store: Store,
    limits: Mapping[int, Mapping[str, int]],
    worker_id: int,
    *,
    token: int = 7,
    state: State = State.RUNNING,
) -> list[ClaimedTask]:
    """The tasks of `limits`, with these."""
    with store.begin() as connection:
        return store.claim(connection, list(limits), worker_id, token, state, limits=limits)


def each(task_ids: list[int], **limits: int) -> dict[int, dict[str, int]]:
    return dict.fromkeys(task_ids, limits)


def free(store: Store, *names: str) -> dict[str, int]:
    with store.connect() as connection:
        return store.limits.free(connection, names)


def rows(store: Store) -> dict[str, LimitRow]:
    with store.connect() as connection:
        return {row.name: row for row in store.limits.rows(connection)}


def used(store: Store, name: str = "nuke") -> int:
    return rows(store)[name].used


def ready(store: Store, count: int) -> list[int]:
    """So many tasks, ready to be claimed."""
    new = ids(store, count)
    submit(store, [after(i) for i in new])
    return new


def without_ends(sent: list[str]) -> int:
    """How many statements that is, but for those that only begin or end a transaction."""
    return sum(not statement.startswith(("BEGIN IMMEDIATE", "COMMIT")) for statement in sent)


# -- claim


def test_a_claim_takes_no_more_than_a_limit_has_and_first_what_comes_first(store: Store) -> None:
    set_limit(store, "nuke", 3)
    a, b, c, d, e = ready(store, 5)
    me = worker(store)
    claimed = claim(store, each([e, d, c, b, a], nuke=1), me)
    assert [task.id for task in claimed] == [e, d, c]
    assert rows(store)["nuke"] == LimitRow("nuke", 3, 3, (c, d, e), 0)
    assert free(store, "nuke") == {"nuke": 0}
    assert claim(store, each([a], nuke=1), worker(store, "other")) == []


def test_a_task_gets_all_that_it_asks_for_or_nothing(store: Store) -> None:
    set_limit(store, "nuke", 3)
    set_limit(store, "disk", 1)
    large, both, other, small = ready(store, 4)
    wanted = {large: {"nuke": 2}, both: {"nuke": 2, "disk": 1}, other: {"disk": 1}, small: {"nuke": 1}}
    assert [task.id for task in claim(store, wanted, worker(store))] == [large, other, small]
    assert free(store, "nuke", "disk") == {"nuke": 0, "disk": 0}


def test_what_asks_for_nothing_is_claimed_beside_what_does(store: Store) -> None:
    set_limit(store, "nuke", 1)
    new = ready(store, 3)
    me = worker(store)
    with store.begin() as connection:
        claimed = store.claim(connection, new, me, 7, State.RUNNING, limits={new[0]: {"nuke": 1}, new[1]: {}})
    assert [task.id for task in claimed] == new
    assert used(store) == 1


def test_a_name_that_is_no_limit_bounds_nothing(store: Store) -> None:
    new = ready(store, 2)
    assert len(claim(store, each(new, nothing=5), worker(store))) == 2
    assert free(store, "nothing") == {}


def test_a_claim_without_limits_sends_what_it_always_sent(store: Store) -> None:
    new = ready(store, 2)
    me = worker(store)
    claim(store, {new[0]: {}}, me)  # the clock has been read
    with counted(store) as sent:
        claim(store, {new[1]: {}}, me)
    assert not any("aque_token" in statement for statement in sent)
    assert without_ends(sent) == 1 + (store.dialect == "sqlite")


def test_a_claim_with_limits_takes_two_round_trips_more_however_many_tasks(store: Store) -> None:
    set_limit(store, "nuke", 64)
    set_limit(store, "disk", 64)
    new = ready(store, 61)
    me = worker(store)
    claim(store, each(new[:1], nuke=1), me)
    with counted(store) as sent:
        assert len(claim(store, each(new[1:], nuke=1, disk=1), me)) == 60
    assert without_ends(sent) == 3 + (store.dialect == "sqlite")


def test_tokens_of_a_task_that_another_worker_was_faster_with_are_given_back(store: Store) -> None:
    set_limit(store, "nuke", 3)
    (new,) = ready(store, 1)
    assert len(claim(store, each([new], nuke=1), worker(store))) == 1
    assert claim(store, each([new], nuke=2), worker(store, "late")) == []
    assert rows(store)["nuke"].holders == (new,)
    assert free(store, "nuke") == {"nuke": 2}


def test_a_worker_that_may_claim_nothing_takes_no_tokens(store: Store) -> None:
    set_limit(store, "nuke", 1)
    new = ready(store, 1)
    gone = worker(store, "gone")
    reap(store, gone)
    assert claim(store, each(new, nuke=1), gone) == []
    assert free(store, "nuke") == {"nuke": 1}


def test_a_claim_outside_of_a_transaction_is_all_or_nothing(store: Store) -> None:
    set_limit(store, "nuke", 1)
    new = ready(store, 1)
    me = worker(store)
    with store.connect() as connection:
        (task,) = store.claim(connection, new, me, 7, State.RUNNING, limits=each(new, nuke=1))
    assert used(store) == 1
    with pytest.raises(ZeroDivisionError), store.begin() as connection:
        store.finish(connection, [outcome(task)])
        raise ZeroDivisionError
    assert used(store) == 1


# -- and back


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("state", [State.SUCCESS, State.ERROR, State.KILLED, State.CANCELLED])
def test_every_end_frees_what_the_task_held_in_the_same_transaction(store: Store, state: State, number: int) -> None:
    set_limit(store, "nuke", 10)
    tasks = claim(store, each(ready(store, number), nuke=2), worker(store))
    finished = finish(store, *[outcome(task, state) for task in tasks])
    assert finished.freed
    assert free(store, "nuke") == {"nuke": 10}
    assert not finish(store, *[outcome(task, state) for task in tasks]).freed


def test_an_end_with_a_result_frees_too(store: Store) -> None:
    set_limit(store, "nuke", 1)
    (task,) = claim(store, each(ready(store, 1), nuke=1), worker(store))
    assert finish(store, replace(outcome(task), value=b"7")).freed
    assert free(store, "nuke") == {"nuke": 1}


def test_a_task_that_is_repeated_waits_without_its_tokens(store: Store) -> None:
    set_limit(store, "nuke", 2)
    failing, losing = ids(store, 2)
    submit(store, [replace(SPEC, id=i, max_attempts=2) for i in (failing, losing)])
    a, b = claim(store, each([failing, losing], nuke=1), worker(store))
    finished = finish(store, outcome(a, State.ERROR), Outcome(b.id, 1, b.token, State.READY, Reason.WORKER_LOST))
    assert (sorted(finished.repeated), finished.freed) == ([failing, losing], True)
    assert free(store, "nuke") == {"nuke": 2}


def test_what_ends_without_tokens_frees_nothing_and_asks_nothing(store: Store) -> None:
    set_limit(store, "nuke", 1)
    new = ready(store, 2)
    me = worker(store)
    tasks = claim(store, each(new), me)
    assert not finish(store, outcome(tasks[0])).freed
    with counted(store) as sent:
        finish(store, outcome(tasks[1]))
    assert without_ends(sent) == 1


def test_a_refused_outcome_frees_nothing_that_the_current_attempt_holds(store: Store) -> None:
    set_limit(store, "nuke", 1)
    new = ready(store, 1)
    stale = worker(store, "stale")
    (old,) = claim(store, each(new, nuke=1), stale)
    reap(store, stale)
    claim(store, each(new, nuke=1), worker(store), token=8)
    assert finish(store, outcome(old)).refused == new
    assert free(store, "nuke") == {"nuke": 0}


def test_giving_a_task_back_gives_its_tokens_back(store: Store) -> None:
    set_limit(store, "nuke", 2)
    started, buffered = ready(store, 2)
    me = worker(store)
    claim(store, each([started], nuke=1), me)
    claim(store, each([buffered], nuke=1), me, state=State.CLAIMED)
    with store.begin() as connection:
        store.give_back(connection, [(started, 7), (buffered, 7)])
    assert free(store, "nuke") == {"nuke": 2}


def test_the_tokens_of_a_dead_worker_are_free_when_it_is_declared_lost(store: Store) -> None:
    set_limit(store, "nuke", 2)
    new = ready(store, 2)
    me = worker(store)
    claim(store, each(new, nuke=1), me)
    lost = reap(store, me, max_lost=1)
    assert lost is not None and lost.freed
    assert set(states(store).values()) == {"error"}
    assert free(store, "nuke") == {"nuke": 2}


def test_a_lone_success_that_holds_tokens_is_not_recorded_by_one_statement(store: Store) -> None:
    set_limit(store, "nuke", 1)
    (task,) = claim(store, each(ready(store, 1), nuke=1), worker(store))
    with store.connect() as connection:
        assert not store.finish_alone(connection, outcome(task))
    assert finish(store, outcome(task)).freed


# -- changes of a limit


def test_a_raised_limit_gives_more(store: Store) -> None:
    set_limit(store, "nuke", 1)
    new = ready(store, 3)
    me = worker(store)
    claim(store, each(new, nuke=1), me)
    set_limit(store, "nuke", 2)
    assert [task.id for task in claim(store, each(new[1:], nuke=1), me)] == [new[1]]


def test_a_lowered_limit_gives_nothing_until_what_is_in_use_is_within_it(store: Store) -> None:
    set_limit(store, "nuke", 4)
    me = worker(store)
    tasks = claim(store, each(ready(store, 4), nuke=1), me)
    waiting = ready(store, 2)
    set_limit(store, "nuke", 2)
    for left in (4, 3, 2):
        assert used(store) == left
        assert free(store, "nuke") == {"nuke": 0}
        assert claim(store, each(waiting, nuke=1), me) == []
        finish(store, outcome(tasks.pop(0 if left == 4 else -1)))  # one that is within the new limit, then those beyond
    assert [task.id for task in claim(store, each(waiting, nuke=1), me)] == waiting[:1]


def test_a_limit_of_0_lets_nothing_start(store: Store) -> None:
    set_limit(store, "nuke", 0)
    new = ready(store, 1)
    assert claim(store, each(new, nuke=1), worker(store)) == []
    assert free(store, "nuke") == {"nuke": 0}


def test_a_limit_that_is_lowered_and_raised_again_is_whole(store: Store) -> None:
    set_limit(store, "nuke", 3)
    me = worker(store)
    tasks = claim(store, each(ready(store, 3), nuke=1), me)
    set_limit(store, "nuke", 1)
    set_limit(store, "nuke", 5)
    assert free(store, "nuke") == {"nuke": 2}
    finish(store, *map(outcome, tasks))
    assert free(store, "nuke") == {"nuke": 5}


def test_a_limit_that_is_removed_bounds_nothing_and_what_was_held_counts_when_it_is_set_again(store: Store) -> None:
    set_limit(store, "nuke", 2)
    me = worker(store)
    tasks = claim(store, each(ready(store, 2), nuke=1), me)
    assert remove(store, "nuke") and not remove(store, "nuke")
    assert rows(store) == {}
    unbounded = ready(store, 3)
    assert len(claim(store, each(unbounded, nuke=1), me)) == 3
    set_limit(store, "nuke", 3)
    assert free(store, "nuke") == {"nuke": 1}
    finish(store, *map(outcome, tasks))
    assert free(store, "nuke") == {"nuke": 3}


def test_nothing_is_left_of_removed_limits_once_another_has_changed(store: Store) -> None:
    set_limit(store, "old", 2)
    (task,) = claim(store, each(ready(store, 1), old=1), worker(store))
    remove(store, "old")
    finish(store, outcome(task))
    set_limit(store, "new", 1)
    with store.connect() as connection:
        assert connection.exec_driver_sql("SELECT DISTINCT limit_name FROM aque_token").scalars().all() == ["new"]


@pytest.mark.parametrize("capacity", [-1, 10_001, True, 1.5])
def test_a_limit_is_a_number_from_0_to_10000(store: Store, capacity: int) -> None:
    with pytest.raises(BadInput, match="10000"):
        set_limit(store, "nuke", capacity)
    set_limit(store, "nuke", 10_000)
    with store.connect() as connection:
        assert store.limits.capacities(connection) == {"nuke": 10_000}


@pytest.mark.parametrize("name", ["", "a b", "nuke=2", "a,b", "x" * 201])
def test_a_limit_has_a_name_that_can_be_asked_for(store: Store, name: str) -> None:
    with pytest.raises(BadInput, match="name"):
        set_limit(store, name, 1)


def test_who_waits_for_a_limit_is_counted_by_what_it_asks_for_and_by_its_user(store: Store) -> None:
    for name in ("nuke", "disk", "user:ann"):
        set_limit(store, name, 1)
    new = ids(store, 4)
    asks = [replace(COMMAND, limits="nuke=1"), replace(COMMAND, limits="disk=2,nuke=1", user="ann"), COMMAND]
    asks.append(replace(COMMAND, user="ann"))
    submit(store, [replace(SPEC, id=i, requirement=asked) for i, asked in zip(new, asks, strict=True)])
    assert {row.name: row.waiting for row in rows(store).values()} == {"nuke": 2, "disk": 1, "user:ann": 2}


def test_workers_that_take_from_one_limit_at_once_do_not_wait_for_each_other(store: Store) -> None:
    if store.dialect == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    set_limit(store, "nuke", 3)
    new = ready(store, 4)
    me = worker(store)
    with store.begin() as first, store.begin() as second:
        second.exec_driver_sql("SET LOCAL lock_timeout = '10s'")
        limits = each(new, nuke=1)
        assert len(store.claim(first, new[:1], me, 7, State.RUNNING, limits=limits)) == 1
        assert [t.id for t in store.claim(second, new[1:], me, 8, State.RUNNING, limits=limits)] == new[1:3]


def is_anybody_waiting_for_tokens(store: Store) -> bool:
    asked = "SELECT 1 FROM pg_locks WHERE relation = 'aque_token'::regclass AND NOT granted"
    with store.connect() as connection:
        return connection.exec_driver_sql(asked).first() is not None


def test_a_change_of_a_limit_and_claims_wait_for_each_other(store: Store) -> None:
    """So that who looks at what is held sees all that was taken under the old capacity."""
    if store.dialect == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    set_limit(store, "nuke", 3)
    new = ready(store, 6)
    me = worker(store)
    claimed: list[ClaimedTask] = []
    lower = threading.Thread(target=lambda: again(lambda: set_limit(store, "nuke", 2)))
    late = threading.Thread(target=lambda: claimed.extend(claim(store, each(new[3:], nuke=1), me)))
    with store.begin() as connection:
        limits = each(new[:3], nuke=1)
        early = store.claim(connection, new[:3], me, 7, State.RUNNING, limits=limits)
        lower.start()
        wait_until(lambda: is_anybody_waiting_for_tokens(store))
    lower.join(60)
    assert len(early) == 3
    assert claim(store, each(new[3:], nuke=1), me) == []
    finish(store, *map(outcome, early))
    with store.begin() as connection:
        store.limits.set(connection, "nuke", 1)
        late.start()
        wait_until(lambda: is_anybody_waiting_for_tokens(store))
    late.join(60)
    assert len(claimed) == 1


# -- the doctor


@pytest.mark.parametrize(
    ("harm", "rule"),
    [
        ("UPDATE aque_token SET task_id = 999999 WHERE slot = 1", "on workers alone"),
        ("UPDATE aque_token SET task_id = NULL", "as its claim took"),
        ("DELETE FROM aque_token WHERE slot = 1", "each unit of its capacity"),
    ],
)
def test_the_doctor_finds_tokens_that_are_wrong(store: Store, harm: str, rule: str) -> None:
    set_limit(store, "nuke", 2)
    (task,) = claim(store, each(ready(store, 1), nuke=1), worker(store))
    with store.begin() as connection:
        connection.exec_driver_sql(harm)
    with store.connect() as connection:
        (finding,) = store.doctor(connection)
    assert rule in finding.rule and finding.ids
    with store.begin() as connection:  # sound again, for the doctor's last look
        connection.exec_driver_sql("DELETE FROM aque_token")
        connection.exec_driver_sql("DELETE FROM aque_limit")
        connection.exec_driver_sql("UPDATE aque_task SET tokens = 0")
    finish(store, outcome(task))


# -- at random


NAMES = ("nuke", "disk")
WANTED = st.dictionaries(st.sampled_from([*NAMES, "none"]), st.integers(1, 3), max_size=3)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("claim"), st.integers(0, 1), st.lists(WANTED, min_size=1, max_size=5)),
        st.tuples(st.sampled_from(["finish", "fail", "give back"]), st.integers(1, 3), st.none()),
        st.tuples(st.just("lose"), st.integers(0, 1), st.none()),
        st.tuples(st.just("set"), st.integers(0, 5), st.sampled_from(NAMES)),
        st.tuples(st.just("remove"), st.just(0), st.sampled_from(NAMES)),
    ),
    min_size=5,
    max_size=25,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_whatever_happens_no_more_is_in_use_than_there_may_be_and_all_comes_back(store: Store, steps: list) -> None:
    capacity: dict[str, int] = {}
    held: dict[int, tuple[ClaimedTask, int, dict[str, int]]] = {}  # task -> claim, worker, what of limits it must hold
    workers = [worker(store), worker(store)]

    def in_use() -> Counter[str]:
        total: Counter[str] = Counter()
        for _, _, names in held.values():
            total.update(names)
        return total

    def end(count: int, how: str) -> None:
        tasks = [held.pop(i)[0] for i in list(held)[:count]]
        if how == "give back":
            with store.begin() as connection:
                store.give_back(connection, [(task.id, task.token) for task in tasks])
        else:
            finish(store, *[outcome(task, State.SUCCESS if how == "finish" else State.ERROR) for task in tasks])

    for kind, number, what in steps:
        if kind == "claim":
            wanted = dict(zip(ready(store, len(what)), what, strict=True))
            before = in_use()
            for task in claim(store, wanted, workers[number]):
                held[task.id] = task, number, {n: k for n, k in wanted[task.id].items() if n in capacity}
            for name, total in in_use().items():
                assert total == before[name] or total <= capacity[name]
        elif kind == "lose":
            reap(store, workers[number])
            workers[number] = worker(store)
            held = {i: entry for i, entry in held.items() if entry[1] != number}
        elif kind == "set":
            set_limit(store, what, number)
            capacity[what] = number
        elif kind == "remove":
            remove(store, what)
            capacity.pop(what, None)
        else:
            end(number, kind)
        total = in_use()
        assert {name: row.used for name, row in rows(store).items()} == {name: total[name] for name in capacity}
        with store.connect() as connection:
            assert store.doctor(connection) == []
    end(len(held), "finish")
    assert free(store, *NAMES) == capacity
    for name in NAMES:
        remove(store, name)


def test_threads_that_claim_and_finish_never_exceed_a_limit(store: Store) -> None:
    if store.dialect == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    set_limit(store, "nuke", 3)
    rounds, threads = 20, 8
    new = ready(store, rounds * threads)
    too_many: list[int] = []
    failed: list[BaseException] = []
    claimed: list[int] = []

    def work(n: int) -> None:
        try:
            mine, me, rng = new[n::threads], worker(store, f"w{n}"), random.Random(n)
            for _ in range(500):  # some 30 are enough
                if not mine:
                    return
                # Others' tasks too: some are faster with them.
                wanted = each(rng.sample(new, 3) + mine[:1], nuke=1)
                tasks = claim(store, wanted, me, token=n)
                if (now := used(store)) > 3:
                    too_many.append(now)
                finish(store, *map(outcome, tasks))
                claimed.extend(task.id for task in tasks)
                done = states(store)
                mine = [i for i in mine if done[i] != "success"]
        except BaseException as error:
            failed.append(error)

    running = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(120)
    assert (failed, too_many) == ([], [])
    assert sorted(claimed) == new
    assert free(store, "nuke") == {"nuke": 3}
