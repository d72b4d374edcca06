"""Workers that come, claim, finish and die, in any order: nobody ever has more than there is, and all that can run does."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from aque import roomkeeper
from aque.backfill import Busy
from aque.backoff import NOTHING_AVOIDED, Avoided
from aque.chooser import Place
from aque.claimer import Claimer
from aque.classes import Classes
from aque.ledger import Ledger
from aque.mounts import Mounts
from aque.resources import Capacity
from aque.settings import load
from aque.states import State
from aque.store import Store, transaction
from aque.values import ClaimedTask
from tests.store.farm import SPEC, finish, ids, outcome, reap, states, submit, worker

LIMIT = 3
#: (cpus, limits, priority) of tasks; the workers have 4 CPUs.
KINDS = [
    ("1", "", 0),
    ("all", "", 0),
    ("1/3", "", 0),
    ("3", "nuke=2", 0),
    ("0.5", "nuke=1", 1),
    ("all", "", 1),
    ("0", "nuke=3", 0),
]
SETTINGS = load({"AQUE_BROKER": "sqlite:////nowhere/aque.db", "AQUE_RESERVE_AFTER_SECONDS": "0"})

actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, len(KINDS) - 1), st.integers(1, 6)),
        st.tuples(st.just("look"), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("finish"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("die"), st.integers(0, 2), st.just(0)),
    ),
    max_size=40,
)


@dataclass
class Worker:
    """What a scheduler does, step by step."""

    store: Store
    id: int
    claimer: Claimer
    classes: Classes
    ledger: Ledger
    running: dict[int, ClaimedTask] = field(default_factory=dict)

    def look(self) -> None:
        with self.store.connect() as connection:
            busy = [Busy(self.classes.need(task.class_id)) for task in self.running.values()]
            picked = self.claimer.look(connection, self.id, self.ledger.free, lambda: busy, 0)
            reserved = [task for task in picked.start if self.ledger.try_reserve(self.classes.need(task.class_id))]
            assert reserved == picked.start, "more was chosen than fits"
            with transaction(connection):
                got = self.claimer.claim(connection, reserved, self.id, self.id, State.RUNNING)
        for task in reserved:
            if task.id not in {claimed.id for claimed in got}:
                self.ledger.release(self.classes.need(task.class_id))
        self.running |= {task.id: task for task in got}

    def finish(self, task_id: int) -> None:
        task = self.running.pop(task_id)
        self.ledger.release(self.classes.need(task.class_id))
        finish(self.store, outcome(task))


class SharedFarm:
    """Three workers; one that dies is followed by another."""

    def __init__(self, store: Store, mounts: Mounts) -> None:
        self.store = store
        self.mounts = mounts
        self.submitted: list[int] = []
        with store.begin() as connection:
            store.limits.set(connection, "nuke", LIMIT)
        self.workers = [self.new() for _ in range(3)]

    def new(self) -> Worker:
        whole = Capacity(Fraction(4), 1 << 40, 8, 8)
        place = Place("here", "linux", frozenset({"celery"}), whole)
        classes = Classes(self.store, SETTINGS, place, self.mounts)
        claimer = Claimer(self.store, SETTINGS, classes, lambda name: None)
        return Worker(self.store, worker(self.store, lease_seconds=3600, cpus="4"), claimer, classes, Ledger(whole))

    def submit(self, kind: int, count: int) -> None:
        cpus, limits, priority = KINDS[kind]
        needs = replace(SPEC.requirement, cpus=cpus, limits=limits)
        new = ids(self.store, count)
        submit(self.store, [replace(SPEC, id=i, requirement=needs, priority=priority, max_attempts=9) for i in new])
        self.submitted += new

    def die(self, number: int) -> None:
        reap(self.store, self.workers[number].id, max_lost=1000)
        self.workers[number] = self.new()

    def check(self) -> None:
        with self.store.connect() as connection:
            assert self.store.doctor(connection) == []
            (row,) = self.store.limits.rows(connection)
            assert row.used <= LIMIT
            kept = self.store.reservations.rows(connection)
        assert len({one.worker_id for one in kept}) == len(kept)
        assert {one.worker_id for one in kept} <= {one.id for one in self.workers}
        for one in self.workers:
            used = sum((need(one, task).cpus for task in one.running.values()), Fraction(0))
            assert used + one.ledger.free.cpus == 4 and one.ledger.free.cpus >= 0

    def run_to_the_end(self) -> None:
        """Everybody looks, then the oldest of each ends, and so on."""
        for _ in range(20 * len(self.submitted) + 20):
            for one in self.workers:
                one.look()
            running = [(one, min(one.running)) for one in self.workers if one.running]
            if not running:
                break
            for one, task_id in running:
                one.finish(task_id)
        left = {task_id: state for task_id, state in states(self.store).items() if state != State.SUCCESS}
        assert left == {}, "nothing runs, and something waits"


def need(one: Worker, task: ClaimedTask) -> Capacity:
    return one.classes.need(task.class_id)


@contextmanager
def a_farm(store: Store) -> Iterator[SharedFarm]:
    with closing(Mounts("here", lambda: None)) as mounts, pytest.MonkeyPatch.context() as patch:
        patch.setattr(roomkeeper, "LOOK_SECONDS", 0.0)
        yield SharedFarm(store, mounts)


@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=actions)
def test_nobody_ever_has_more_than_there_is_and_all_that_can_run_does(
    store: Store, steps: list[tuple[str, int, int]]
) -> None:
    with a_farm(store) as farm:
        for what, number, count in steps:
            if what == "submit":
                farm.submit(number, count)
            elif what == "look":
                farm.workers[number].look()
            elif what == "die":
                farm.die(number)
            elif running := [(one, task_id) for one in farm.workers for task_id in one.running]:
                one, task_id = running[number % len(running)]
                one.finish(task_id)
            farm.check()
        farm.run_to_the_end()
        farm.check()
        for one in farm.workers:
            with store.connect() as connection:
                store.unregister(connection, one.id)


# -- what a worker may not rely on between two looks -------------------------------------------------------------------


@pytest.fixture
def farm(store: Store) -> Iterator[SharedFarm]:
    with a_farm(store) as found:
        yield found
        for one in found.workers:
            for task_id in list(one.running):
                one.finish(task_id)
        with store.begin() as connection:
            store.limits.remove(connection, "nuke")


def ready_ids(farm: SharedFarm) -> list[int]:
    return sorted(task_id for task_id, state in states(farm.store).items() if state == State.READY)


def keep_room(farm: SharedFarm, *, limits: str = "") -> tuple[Worker, int]:
    """A worker of 4 CPUs of which one is taken, and that keeps room for a task which wants all."""
    (one, *others) = farm.workers
    for other in others:
        farm.submit(1, 1)
        other.look()  # each of the others is full
    farm.submit(0, 1)
    one.look()
    (task_id,) = ids(farm.store, 1)
    needs = replace(SPEC.requirement, cpus="all", limits=limits)
    submit(farm.store, [replace(SPEC, id=task_id, requirement=needs, priority=0)])
    one.claimer._keeper._looked_at = 0.0
    one.look()
    assert kept(farm) == {task_id: one.id}
    return one, task_id


def kept(farm: SharedFarm) -> dict[int, int]:
    with farm.store.connect() as connection:
        return {row.task_id: row.worker_id for row in farm.store.reservations.rows(connection)}


def finish_others(farm: SharedFarm) -> None:
    for one in farm.workers:
        for task_id in list(one.running):
            one.finish(task_id)


def test_no_room_is_kept_for_what_could_not_start_even_then(farm: SharedFarm) -> None:
    one, big = keep_room(farm, limits="nuke=1")
    with farm.store.begin() as connection:
        farm.store.limits.set(connection, "nuke", 0)
    farm.submit(0, 3)
    one.look()
    assert kept(farm) == {}
    assert len(one.running) == 4
    assert ready_ids(farm) == [big]
    finish_others(farm)
    with farm.store.begin() as connection:
        farm.store.limits.set(connection, "nuke", 1)
    farm.run_to_the_end()


def test_no_room_is_kept_for_what_this_host_could_not_start(farm: SharedFarm) -> None:
    one, big = keep_room(farm)
    one.claimer.avoided = Avoided(tasks=frozenset({big}))
    farm.submit(0, 3)
    one.look()
    assert kept(farm) == {}
    assert len(one.running) == 4
    finish_others(farm)
    one.claimer.avoided = NOTHING_AVOIDED
    farm.run_to_the_end()


def test_a_priority_that_changes_counts_for_the_kept_room_too(farm: SharedFarm) -> None:
    one, big = keep_room(farm)
    farm.submit(4, 3)  # of priority 1: they do not care for the room
    with farm.store.begin() as connection:
        connection.exec_driver_sql(f"UPDATE aque_task SET rank = 5 WHERE id = {big}")
    one.look()
    assert len(one.running) == 1
    finish_others(farm)
    farm.run_to_the_end()


def test_a_task_that_is_changed_between_the_look_and_the_claim_is_left(farm: SharedFarm) -> None:
    one = farm.workers[0]
    farm.submit(0, 2)
    first, second = ready_ids(farm)
    with farm.store.connect() as connection:
        picked = one.claimer.look(connection, one.id, one.ledger.free, list, 0)
        assert [task.id for task in picked.start] == [first, second]
        with transaction(connection):
            large = replace(SPEC.requirement, cpus="all")
            farm.store.intern(connection, [replace(SPEC, requirement=large)])
            number = farm.store._requirement_ids[large]
            connection.exec_driver_sql(f"UPDATE aque_task SET requirement_id = {number} WHERE id = {first}")
        with transaction(connection):
            got = one.claimer.claim(connection, picked.start, one.id, 77, State.RUNNING)
    assert [task.id for task in got] == [second]
    assert ready_ids(farm) == [first]
    finish(farm.store, *[outcome(task) for task in got])
    farm.run_to_the_end()


def test_a_row_that_nobody_can_read_does_not_keep_others_from_starting(farm: SharedFarm) -> None:
    farm.submit(0, 2)
    with farm.store.begin() as connection:
        bad = replace(SPEC.requirement, cpus="a lot")
        (task_id,) = farm.store.reserve_ids(connection, 1)
        farm.store.intern(connection, [replace(SPEC, requirement=bad)])
        farm.store.submit(connection, [replace(SPEC, id=task_id, requirement=bad, priority=9)])
    for _ in range(2):
        farm.workers[0].look()
    assert len(farm.workers[0].running) == 2
    assert ready_ids(farm) == [task_id]
    finish_others(farm)
    kill(farm.store, [task_id])


def kill(store: Store, task_ids: list[int]) -> None:
    with store.begin() as connection:
        store.kill(connection, task_ids, 15)
