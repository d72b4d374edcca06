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
from aque.states import State
from aque.store import Store
from aque.values import ClaimedTask, Outcome, Pattern, Requirement
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
