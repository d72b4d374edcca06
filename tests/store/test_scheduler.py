"""The scheduler's tick on a real store, with attempts that the test ends by hand."""

import queue
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from aque import settings
from aque.chooser import Place
from aque.ledger import Ledger
from aque.resources import Capacity
from aque.scheduler import Scheduler
from aque.states import Reason, State
from aque.store import Store
from aque.values import ClaimedTask, HostFailure, Outcome, Pattern, Requirement
from tests.servers import wait_until
from tests.store import farm

LIMIT_SECONDS = 60
WHOLE = Capacity(Fraction(2), 1 << 30, 2, 32)


class Attempt:
    def kill(self, number: int, grace_seconds: float) -> None: ...
    def signal(self, number: int) -> None: ...


def test_what_ends_during_a_tick_is_not_given_to_others_before_it_is_in_the_table(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker_id = farm.worker(store, cpus="2")
    first, second, third = farm.ids(store, 3)
    whole = Requirement("celery", Pattern.SHELL, cpus="all")
    farm.submit(
        store,
        [farm.after(first), farm.after(second), farm.after(third, first, spec=replace(farm.SPEC, requirement=whole))],
    )
    started: queue.Queue[tuple[ClaimedTask, list[Any]]] = queue.Queue()

    def start(task: ClaimedTask, cpus: Any) -> Attempt:
        with store.connect() as connection:
            started.put((task, store.doctor(connection)))
        return Attempt()

    scheduler = Scheduler(
        store,
        settings.load({}),
        worker_id,
        Ledger(WHOLE),
        Place("here", "linux", frozenset({"celery"}), WHOLE),
        start,
        until=None,
        on_end=lambda: None,
        is_urgent=lambda: False,
    )
    scheduler.start()
    claimed = {task.id: task for task, _ in (started.get(timeout=LIMIT_SECONDS) for _ in range(2))}
    finish = store.finish

    def finish_while_the_second_ends(connection: Any, outcomes: Any, max_lost: int = 3) -> Any:
        if [outcome.id for outcome in outcomes] == [first]:
            scheduler.finished(farm.outcome(claimed[second]))
        return finish(connection, outcomes, max_lost)

    monkeypatch.setattr(store, "finish", finish_while_the_second_ends)
    scheduler.finished(farm.outcome(claimed[first]))
    task, findings = started.get(timeout=LIMIT_SECONDS)
    assert (task.id, findings) == (third, [])
    scheduler.finished(Outcome(task.id, task.attempt, task.token, State.SUCCESS))
    assert scheduler.stop(1.0)


def on_a_bad_host(store: Store) -> tuple[Scheduler, "queue.Queue[ClaimedTask]"]:
    """A scheduler on a host beside a good one, and the tasks that it starts."""
    store.host = "bad"
    worker_id = farm.worker(store, cpus="2", host="bad")
    farm.worker(store, "celery@good", host="good")
    started: queue.Queue[ClaimedTask] = queue.Queue()

    def start(task: ClaimedTask, cpus: Any) -> Attempt:
        started.put(task)
        return Attempt()

    scheduler = Scheduler(
        store,
        settings.load({"AQUE_BROKER": "postgresql://a@farm/that-is-shared"}),
        worker_id,
        Ledger(WHOLE),
        Place("bad", "linux", frozenset({"celery"}), WHOLE),
        start,
        until=None,
        on_end=lambda: None,
        is_urgent=lambda: False,
    )
    return scheduler, started


def refusal(task: ClaimedTask) -> Outcome:
    failure = HostFailure(task.class_id, task.job_id, Reason.CANNOT_ENTER_CWD, "cannot enter /a: No such file")
    return replace(farm.outcome(task, State.ERROR), host_failure=failure)


def test_what_a_host_could_not_start_is_written_before_it_claims_the_like_of_it(store: Store) -> None:
    scheduler, started = on_a_bad_host(store)
    job, *tasks = farm.ids(store, 11)
    farm.submit(store, [replace(farm.SPEC, id=i, job_id=job) for i in tasks])
    scheduler.start()
    for _ in range(3):
        scheduler.finished(refusal(started.get(timeout=LIMIT_SECONDS)))
    wait_until(lambda: any("job" in line for line in scheduler.avoids()), LIMIT_SECONDS, "the job is avoided")
    beside = []

    def is_idle() -> bool:
        while not started.empty():
            beside.append(started.get())
            scheduler.finished(farm.outcome(beside[-1], State.ERROR))
        return not scheduler.running()

    wait_until(is_idle, LIMIT_SECONDS, "what ran beside the third has ended")
    assert scheduler.stop(1.0)
    assert len(beside) + started.qsize() <= 1


def test_what_was_claimed_ahead_goes_back_when_its_job_is_left_to_other_hosts(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aque.scheduler.BUFFER_SECONDS", LIMIT_SECONDS)
    scheduler, started = on_a_bad_host(store)
    quick, job, *tasks = farm.ids(store, 22)
    farm.submit(store, [farm.after(quick)])
    scheduler.start()
    scheduler.finished(farm.outcome(started.get(timeout=LIMIT_SECONDS)))  # tasks of this name are short
    farm.submit(store, [replace(farm.SPEC, id=i, job_id=job) for i in tasks])
    scheduler.look()
    wait_until(lambda: list(farm.states(store).values()).count("claimed") == 18, LIMIT_SECONDS, "18 are claimed ahead")
    for _ in range(3):
        scheduler.finished(refusal(started.get(timeout=LIMIT_SECONDS)))
    running = [started.get(timeout=LIMIT_SECONDS) for _ in range(2)]
    wait_until(lambda: "claimed" not in farm.states(store).values(), LIMIT_SECONDS, "they are given back")
    for task in running:
        scheduler.finished(farm.outcome(task, State.ERROR))
    assert scheduler.stop(1.0)
    assert started.empty()
    assert sorted(farm.states(store).values()) == ["error"] * 2 + ["ready"] * 18 + ["success"]
    (sentence,) = scheduler.avoids()
    assert sentence.startswith(f"job {job}: cannot enter /a: No such file (until ")
