"""What every part of the store needs: the engine, connections, the database's clock, ids, requirement classes."""

import math
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from aque.store import statements as sql
from aque.store.changes import Changes
from aque.store.engine import copy_rows, reachable, transaction, why_not_personal
from aque.store.explanations import Explanations
from aque.store.groups import Groups
from aque.store.limits import Limits
from aque.store.refusals import Refusals
from aque.store.reservations import Reservations
from aque.store.retention import Retention
from aque.store.rows import requirement_of
from aque.store.run_times import RunTimes
from aque.store.transitions import Transitions
from aque.values import Requirement

#: How long a reading of the database's clock is good for.
CLOCK_SECONDS = 60.0
#: From this many rows on COPY is faster than an INSERT with its parameters.
COPY_FROM = 100
#: Requirement classes kept in memory: with a place of their own, files make many in the course of time.
CLASSES_KEPT = 10_000
EDGE_COLUMNS = ("upstream", "downstream", "condition", "satisfied")


class Base:
    """An engine, and what is known of the farm that it leads to."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.dialect = engine.dialect.name
        self.limits = Limits(self.dialect)
        self.groups = Groups(self.dialect)
        self.host = socket.gethostname()
        #: Where the tasks have run whose ends this process records, if it is a worker's.
        self.worker_host = ""
        self.reservations = Reservations(self.dialect)
        self.explanations = Explanations(self.dialect)
        self.changes = Changes(self.dialect)
        self.refusals = Refusals(self.dialect)
        self.retention = Retention(engine)
        self._requirement_ids: dict[Requirement, int] = {}
        self._looked_up: dict[Requirement, float] = {}  # when, in seconds since 1970
        self._requirements: dict[int, Requirement] = {}
        self._environment_ids: dict[str, str] = {}  # by digest
        self._clock = (-math.inf, 0.0)
        self.run_times = RunTimes(self.dialect)
        self.transitions = Transitions(self.dialect)

    @contextmanager
    def connect(self) -> Iterator[sa.Connection]:
        """A connection in autocommit mode; StoreUnreachable if there is none to be had, or it breaks."""
        with reachable(self.engine), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A connection inside one write transaction."""
        with self.connect() as connection, transaction(connection):
            yield connection

    def why_not_personal(self) -> str | None:
        """Why an SQLite store is not its user's alone, as a sentence part; None if it is."""
        return why_not_personal(Path(self.engine.url.database or ""))

    def close(self) -> None:
        """Close the pooled connections."""
        self.engine.dispose()

    def now(self, connection: sa.Connection) -> float:
        """Seconds since 1970 on the database's clock, as far as it was read within the last minute."""
        return self._wall(connection, time.monotonic())

    def _wall(self, connection: sa.Connection, monotonic: float) -> float:
        """A moment of this process's monotonic clock in seconds since 1970, as the database's clock has it.

        That clock is read once a minute: a round trip for each task would cost more, and so the times that one worker writes
        are in the order in which things happened.
        """
        read, wall = self._clock
        if not 0 <= time.monotonic() - read < CLOCK_SECONDS:
            wall, read = connection.execute(sql.now()).scalar_one(), time.monotonic()
            self._clock = (read, wall)
        return wall + (monotonic - read)

    def reserve_ids(self, connection: sa.Connection, count: int) -> list[int]:
        """`count` ids that no other task has or will have, rising."""
        rows = connection.execute(sql.reserve_ids(self.dialect), {"count": count}).scalars().all()
        if self.dialect == "sqlite":
            return list(range(rows[0] - count + 1, rows[0] + 1))
        return sorted(rows)

    def requirements(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, Requirement]:
        """Requirement classes by id; they never change, so each is read once."""
        wanted = list(ids)
        if len(self._requirements) > CLASSES_KEPT:
            self._requirements = {}
        if unknown := [i for i in wanted if i not in self._requirements]:
            for row in connection.execute(sql.requirements(self.dialect), {"ids": unknown}):
                self._requirements[row.id] = requirement_of(row)
        return {i: self._requirements[i] for i in wanted}

    def _insert(self, connection: sa.Connection, table: sa.Table, columns: Sequence[str], rows: list[Any]) -> None:
        if len(rows) >= COPY_FROM or (rows and self.dialect == "sqlite"):
            copy_rows(connection, table, columns, rows)
        elif rows:
            connection.execute(sa.insert(table), [dict(zip(columns, row, strict=True)) for row in rows])
