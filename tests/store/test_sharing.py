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
            used = sum((self_need(one, task).cpus for task in one.running.values()), Fraction(0))
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


def self_need(one: Worker, task: ClaimedTask) -> Capacity:
    return one.classes.need(task.class_id)


@contextmanager
def a_farm(store: Store) -> Iterator[SharedFarm]:
    with closing(Mounts("here", lambda: None)) as mounts, pytest.MonkeyPatch.context() as patch:
        patch.setattr(roomkeeper, "LOOK_SECONDS", 0.0)
        yield SharedFarm(store, mounts)


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
