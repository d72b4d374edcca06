"""explain: what the table says at one moment, gathered with few queries, and what `aque.explain` makes of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aque import chooser, explain
from aque.backfill import Busy, expected_end
from aque.explain import Explanation, Limit, Refusal, Situation, Subject, Worker
from aque.settings import Settings
from aque.states import State
from aque.store import Store
from aque.values import Pattern, ReadyTask

#: Ready tasks read of each requirement class; of more than these it is not said how many go before a task.
WINDOW = 256


def explain_tasks(store: Store, settings: Settings, ids: Sequence[int]) -> list[Explanation]:
    """Why these tasks (or jobs) do not run, in the order of `ids`; those that there are not are left out."""
    with store.connect() as connection:
        subjects = store.explanations.subjects(connection, ids)
        jobs = [subject.id for subject in subjects.values() if subject.pattern is Pattern.GROUP]
        members = store.explanations.members(connection, jobs) if jobs else {}
        skipped = [subject.id for subject in subjects.values() if subject.state is State.SKIPPED]
        blamed = store.explanations.blamed(connection, skipped) if skipped else []
        links = store.explanations.links(connection, {*blamed, *subjects} - set(jobs))
        everything = [*subjects.values(), *(member for found in members.values() for member in found)]
        situation = observe(store, connection, settings, everything, with_order=True)
    found = []
    for task_id in ids:
        if (subject := subjects.get(task_id)) is None:
            continue
        if subject.pattern is Pattern.GROUP:
            found.append(situation.explain_job(subject, members.get(task_id, [])))
        else:
            chain = explain.blame(task_id, links) if subject.state is State.SKIPPED else []
            found.append(situation.explain(subject, links.get(task_id, []), chain))
    return found


def whys(store: Store, settings: Settings, ids: Iterable[int]) -> dict[int, str | None]:
    """Why these tasks do not run, in a few words: see `Situation.why`."""
    with store.connect() as connection:
        subjects = store.explanations.subjects(connection, ids)
        situation = observe(store, connection, settings, list(subjects.values()))
    return {subject.id: situation.why(subject) for subject in subjects.values()}


def observe(
    store: Store, connection: Any, settings: Settings, tasks: Sequence[Subject], *, with_order: bool = False
) -> Situation:
    """The farm as far as these tasks are concerned; `with_order`: and the ready tasks that may go before them."""
    now = store.now(connection)
    waiting = [task for task in tasks if task.state is State.READY]
    if not waiting:
        return Situation(now)
    kept = {row.worker_id: row.task_id for row in store.reservations.rows(connection)}
    known = {task.id: task for task in waiting}
    known |= store.explanations.subjects(connection, set(kept.values()) - known.keys())
    ready: Mapping[int, list[ReadyTask]] = store.candidates(connection, [], WINDOW) if with_order else {}
    classes = {*ready, *(task.class_id for task in known.values() if task.class_id is not None)}
    return Situation(
        now,
        _workers(store, connection, now),
        store.requirements(connection, classes),
        ready,
        {class_id for class_id, row in ready.items() if len(row) >= WINDOW},
        _limits(store, connection),
        kept,
        known,
        _refusals(store, connection, known),
        store.usage(connection) if settings.is_fair else None,
        settings.locality_wait_seconds,
    )


def _workers(store: Store, connection: Any, now: float) -> list[Worker]:
    running = store.reservations.running(connection)
    rows = [row for row in store.live_workers(connection) if row.is_live]
    classes = store.requirements(connection, {task.class_id for tasks in running.values() for task in tasks})
    return [
        Worker(
            row.info.id,
            row.info.name,
            row.place,
            [
                Busy(chooser.need(classes[task.class_id], row.place), expected_end(task.started_at, task.duration, now))
                for task in running.get(row.info.id, ())
            ],
            row.avoids,
        )
        for row in rows
    ]


def _limits(store: Store, connection: Any) -> dict[str, Limit]:
    rows = store.limits.rows(connection)
    free = store.limits.free(connection, [row.name for row in rows])
    return {row.name: Limit(row.capacity, free.get(row.name, 0), row.holders) for row in rows}


def _refusals(store: Store, connection: Any, ids: Iterable[int]) -> dict[int, list[Refusal]]:
    found = store.refusals.of(connection, ids)
    return {task_id: [Refusal(one.host, one.message) for one in row] for task_id, row in found.items()}
