"""finish -> release: write outcomes and wake what waited for them, in one transaction."""

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

from aque.chooser import Place, why_never
from aque.states import Reason, State
from aque.store import Finished, Store, attempt_write
from aque.values import Outcome, Requirement


def finish(
    store: Store, connection: Any, outcomes: Sequence[Outcome], max_lost: int, one_by_one: bool, is_shared: bool
) -> Finished:
    """Record `outcomes` inside the caller's transaction. What this host could not start goes back for other hosts, if the
    store `is_shared` and there are any.

    `one_by_one` is for a batch that the database refused for its data: each outcome then stands for itself, and the one
    that cannot be written is recorded as `error: not_storable` instead of poisoning the others.
    """
    refused = [outcome for outcome in outcomes if outcome.host_failure is not None] if is_shared else []
    elsewhere: list[int] = []
    if refused and not one_by_one:
        elsewhere = _send_elsewhere(store, connection, refused)
    elif refused:
        elsewhere = attempt_write(connection, lambda: _send_elsewhere(store, connection, refused)) or []
    finished = _record(store, connection, [o for o in outcomes if o.id not in elsewhere], max_lost, one_by_one)
    finished.repeated += elsewhere
    finished.elsewhere = elsewhere
    return finished


def may_start_elsewhere(requirement: Requirement, refused_by: Collection[str], places: Iterable[Place]) -> bool:
    """True if one of these workers, on a host that has not refused the task, could run it one day."""
    return any(
        place.host not in refused_by and not place.draining and why_never(requirement, place) is None
        for place in places
    )


def _send_elsewhere(store: Store, connection: Any, refused: Sequence[Outcome]) -> list[int]:
    """Give back those of these tasks that another host may start; returns which. One that somebody has killed meanwhile, or
    that is not this worker's any more, is left."""
    failures = {o.id: o.host_failure for o in refused if o.host_failure is not None}
    places = [row.place for row in store.live_workers(connection) if row.is_live]
    requirements = store.requirements(connection, {failure.class_id for failure in failures.values()})
    refusals = store.refusals.of(connection, failures)
    going: dict[Reason, list[Outcome]] = {}
    for outcome in refused:
        failure = failures[outcome.id]
        refused_by = {store.host, *(refusal.host for refusal in refusals.get(outcome.id, ()))}
        if may_start_elsewhere(requirements[failure.class_id], refused_by, places):
            going.setdefault(failure.reason, []).append(outcome)
    given_back: list[int] = []
    for reason, outcomes in going.items():
        # What was claimed ahead is not in the table as started yet: the number of its attempt must not be used again.
        tried = [(o.id, o.token, (o.ended or time.monotonic()) - o.ran_seconds) for o in outcomes]
        store.start(connection, tried, ran=False)
        given_back += store.give_back(connection, [(o.id, o.token) for o in outcomes], reason)
    for task_id in given_back:
        store.refusals.add(connection, task_id, store.host, failures[task_id])
    return given_back


def _record(store: Store, connection: Any, outcomes: Sequence[Outcome], max_lost: int, one_by_one: bool) -> Finished:
    if not one_by_one:
        return store.finish(connection, outcomes, max_lost)
    whole = Finished()
    for outcome in outcomes:
        written = attempt_write(connection, lambda outcome=outcome: store.finish(connection, [outcome], max_lost))  # type: ignore[misc]
        if written is None:
            bare = Outcome(outcome.id, outcome.attempt, outcome.token, State.ERROR, Reason.NOT_STORABLE)
            written = store.finish(connection, [replace(bare, ran_seconds=outcome.ran_seconds, ended=outcome.ended)])
        whole = _both(whole, written)
    return whole


def _both(one: Finished, other: Finished) -> Finished:
    """What became of two batches, in all their fields."""
    merged = Finished()
    for name in (field.name for field in fields(Finished)):
        first, second = getattr(one, name), getattr(other, name)
        setattr(merged, name, first + second if isinstance(first, list) else first | second)
    return merged
