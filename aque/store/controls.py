"""Tasks that wait, as Celery's remote control asks for them."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from aque.store.statements import controls as sql
from aque.values import Pattern


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A task that waits for a time."""

    id: int
    celery_id: str | None
    name: str
    not_before: float  #: seconds since 1970
    priority: int
    queue: str
    pattern: Pattern
    argv: tuple[bytes, ...]
    arguments: bytes


def scheduled(connection: sa.Connection, queues: Collection[str], limit: int) -> list[Scheduled]:
    """The tasks of these queues that wait for a time: at most `limit`, the earliest first."""
    rows = connection.execute(sql.scheduled(), {"queues": list(queues), "limit": limit})
    return [
        Scheduled(
            row.id,
            row.celery_id,
            row.name,
            row.not_before,
            row.priority,
            row.queue,
            Pattern(row.pattern),
            tuple(bytes(row.argv).split(b"\0")[:-1]),
            bytes(row.arguments),
        )
        for row in rows
    ]


def stamped(connection: sa.Connection, wanted: Mapping[str, Collection[str]]) -> Iterator[int]:
    """The tasks that have not ended and bear one of these stamps (header -> values, as texts)."""
    for task_id, extra in connection.execute(sql.with_extra()):
        stamps = json.loads(bytes(extra)).get("stamps") or {}
        if any(_values(stamps.get(header)) & set(values) for header, values in wanted.items()):
            yield task_id


def _values(stamp: object) -> set[str]:
    """A stamp is one value or several."""
    if stamp is None:
        return set()
    return {str(value) for value in stamp} if isinstance(stamp, (list, tuple, set)) else {str(stamp)}
