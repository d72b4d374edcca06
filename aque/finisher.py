"""finish -> release: write outcomes and wake what waited for them, in one transaction."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from aque.states import Reason, State
from aque.store import Finished, Store, attempt_write
from aque.values import Outcome


def finish(store: Store, connection: Any, outcomes: Sequence[Outcome], max_lost: int, one_by_one: bool) -> Finished:
    """Record `outcomes` inside the caller's transaction.

    `one_by_one` is for a batch that the database refused for its data: each outcome then stands for itself, and the one
    that cannot be written is recorded as `error: not_storable` instead of poisoning the others.
    """
    if not one_by_one:
        return store.finish(connection, outcomes, max_lost)
    whole = Finished()
    for outcome in outcomes:
        written = attempt_write(connection, lambda outcome=outcome: store.finish(connection, [outcome], max_lost))  # type: ignore[misc]
        if written is None:
            bare = Outcome(outcome.id, outcome.attempt, outcome.token, State.ERROR, Reason.NOT_STORABLE)
            written = store.finish(connection, [replace(bare, ran_seconds=outcome.ran_seconds, ended=outcome.ended)])
        whole.ready += written.ready
        whole.skipped += written.skipped
        whole.groups |= written.groups
        whole.freed = whole.freed or written.freed
        whole.ended |= written.ended
        whole.repeated += written.repeated
        whole.refused += written.refused
    return whole
