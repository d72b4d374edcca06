"""Retention: what is stored goes in the end: captured output, results, whole jobs, and what nobody shares any more.

Everything goes in batches, each a short transaction. Rows that others have locked are passed over: the next walk finds them.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import sqlalchemy as sa

from aque.store import statements as sql
from aque.store.engine import Engine, table_bytes, transaction

#: Tasks in one transaction.
BATCH = 500
#: Tasks that are looked at in one query.
WINDOW = 2000
#: Tasks whose output goes in one transaction: it may be megabytes each.
OUTPUT_BATCH = 50
#: A requirement class that nobody can find any more is removed after so long: submitters look theirs up again every
#: KNOWN_SECONDS, and use no other after that.
RETIRED_SECONDS = 86400
KNOWN_SECONDS = 3600
#: In the digest of a class that nobody is to find any more: since when, in seconds since 1970.
RETIRED = "retired:"
#: Equal environments of one week share a row. Nobody refers anew to one of an earlier week, so that it may go when it is
#: not used (two weeks later: clocks differ).
WEEK_SECONDS = 7 * 86400

#: Called between two batches, with the seconds that the last one took; False: stop.
Pause = Callable[[float], bool]


@dataclass(frozen=True, slots=True)
class Ages:
    """How long what is kept after the end of its task, in seconds; 0: for ever. And how many bytes of output there may be."""

    output_seconds: float = 0.0
    value_seconds: float = 0.0
    task_seconds: float = 0.0
    output_quota_bytes: int = 0  #: 0: as many as there are


@dataclass(slots=True)
class Removed:
    """What has been removed."""

    tasks: int = 0
    outputs: int = 0  #: tasks whose output went, and that are still there
    values: int = 0  #: tasks whose result went, and that are still there
    classes: int = 0
    environments: int = 0
    workers: int = 0

    def __bool__(self) -> bool:
        return any((self.tasks, self.outputs, self.values, self.classes, self.environments, self.workers))


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes that the store holds."""

    output: int  #: captured output itself
    results: int  #: results and errors themselves
    rows: int  #: what the tables take on disk beyond that, with their indexes
    tables: dict[str, int] = field(default_factory=dict)  #: on disk, by table; empty where SQLite cannot tell


def environment_id(digest: str, now: float) -> str:
    """By which an environment is stored now (seconds since 1970)."""
    return f"{digest}-{int(now // WEEK_SECONDS)}"


class Retention:
    """What becomes of old rows in a store. Each method opens connections of its own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._dialect = engine.dialect.name

    def clean(self, ages: Ages, pause: Pause = lambda _: True) -> Removed:
        """Remove what is older than `ages` says, oldest first; never what a task that has not ended depends on, nor a part
        of a job that has not ended."""
        removed = Removed()
        with self._engine.connect() as connection:
            now = connection.execute(sql.now()).scalar_one()
            if ages.task_seconds:
                self._clean_tasks(connection, now - ages.task_seconds, pause, removed)
            if ages.output_seconds:
                self._clean_output(connection, now - ages.output_seconds, pause, removed)
            if ages.value_seconds:
                self._clean_values(connection, now - ages.value_seconds, pause, removed)
            if ages.output_quota_bytes:
                self._keep_quota(connection, now, ages.output_quota_bytes, pause, removed)
        return removed

    def clean_shared(self, ages: Ages) -> Removed:
        """Remove requirement classes and environments that no task has, and workers that have long gone. Reads all tasks: for
        once a day."""
        removed = Removed()
        with self._engine.connect() as connection:
            now = connection.execute(sql.now()).scalar_one()
            removed.classes = self._clean_classes(connection, now)
            removed.environments = self._clean_environments(connection, now)
            if ages.task_seconds:
                removed.workers = connection.execute(sql.forget_workers(), {"before": now - ages.task_seconds}).rowcount
        return removed

    def sizes(self) -> Sizes:
        """What the store holds. Reads all output and results, though not their bytes."""
        with self._engine.connect() as connection:
            output = int(connection.execute(sql.output_bytes()).scalar_one())
            results = int(connection.execute(sql.result_bytes()).scalar_one())
            tables, total = table_bytes(connection)
        return Sizes(output, results, max(0, total - output - results), tables)

    def forget(self, ids: Iterable[int]) -> None:
        """Remove the results of these tasks, as far as they are complete and nothing that has not ended depends on them."""
        with self._engine.connect() as connection, transaction(connection):
            self._delete_values(connection, sorted(ids), math.inf)

    # -- tasks --------------------------------------------------------------------------------------------------------

    def _clean_tasks(self, connection: sa.Connection, before: float, pause: Pause, removed: Removed) -> None:
        below = self._first_since(connection, before)
        after = -1
        while True:
            wanted = {"after": after, "below": below, "before": before, "limit": WINDOW}
            found = connection.execute(sql.window(), wanted).all()
            if not found:
                return
            after = found[-1].id
            old = [row.id for row in found if row.is_old_job]
            if not old:
                continue
            asked = {"ids": old, "before": before}
            staying = set(connection.execute(sql.jobs_that_stay(self._dialect), asked).scalars())
            jobs = [job for job in old if job not in staying]
            members = connection.execute(sql.members_of(self._dialect), {"ids": jobs}).scalars().all()
            # The job's own row last: as long as a member is there, so is its job.
            for batch in [*_batches(members, BATCH), *_batches(jobs, BATCH)]:
                began = time.monotonic()
                removed.tasks += self._delete_tasks(connection, batch, before)
                if not pause(time.monotonic() - began):
                    return

    def _delete_tasks(self, connection: sa.Connection, ids: Sequence[int], before: float) -> int:
        with transaction(connection):
            going = self._lock(connection, sql.may_go(self._dialect), ids, before)
            if going:
                self._delete(connection, going)
        return len(going)

    def _lock(self, connection: sa.Connection, statement: Any, ids: Sequence[int], before: float) -> list[int]:
        """Those of `ids` that `statement` lets go, locked. It is asked after the lock: who submits a dependent locks what
        that depends on, too, so that none is missed and none comes later."""
        locked = connection.execute(sql.lock_if_complete(self._dialect), {"ids": list(ids)}).scalars().all()
        return list(connection.execute(statement, {"ids": list(locked), "before": before}).scalars()) if locked else []

    def _delete(self, connection: sa.Connection, ids: list[int]) -> None:
        chosen = {"ids": ids}
        fewer = connection.execute(sql.edges_from_others(self._dialect), chosen).all()
        if fewer:
            rows = [{"id": row.id, "n": -row.n} for row in fewer]
            connection.execute(sql.add_dependents(self._dialect), {"rows": json.dumps(rows)})
        connection.execute(sql.delete_edges(self._dialect, "downstream"), chosen)
        connection.execute(sql.delete_edges(self._dialect, "upstream"), chosen)
        for column in sql.OF_TASK:
            connection.execute(sql.delete_of_tasks(self._dialect, column.table.name), chosen)
        connection.execute(sql.delete_tasks(self._dialect), chosen)

    # -- output and results -------------------------------------------------------------------------------------------

    def _clean_output(self, connection: sa.Connection, before: float, pause: Pause, removed: Removed) -> None:
        below = self._first_since(connection, before)
        for ids in self._walk(connection, sql.tasks_with_output(), below, OUTPUT_BATCH):
            began = time.monotonic()
            removed.outputs += len(self._delete_output(connection, ids, before))
            if not pause(time.monotonic() - began):
                return

    def _delete_output(self, connection: sa.Connection, ids: Sequence[int], before: float) -> list[int]:
        with transaction(connection):
            going = self._lock(connection, sql.over_and_not_needed(self._dialect), ids, before)
            if going:
                connection.execute(sql.delete_of_tasks(self._dialect, "aque_output"), {"ids": going})
                connection.execute(sql.mark_cut(self._dialect), {"ids": going})
        return going

    def _clean_values(self, connection: sa.Connection, before: float, pause: Pause, removed: Removed) -> None:
        below = self._first_since(connection, before)
        for ids in self._walk(connection, sql.tasks_with_value(), below, BATCH):
            began = time.monotonic()
            with transaction(connection):
                removed.values += self._delete_values(connection, ids, before)
            if not pause(time.monotonic() - began):
                return

    def _delete_values(self, connection: sa.Connection, ids: Sequence[int], before: float) -> int:
        going = self._lock(connection, sql.over_and_not_needed(self._dialect), ids, before)
        if going:
            connection.execute(sql.delete_values(self._dialect), {"ids": going})
        return len(going)

    def _keep_quota(self, connection: sa.Connection, now: float, quota: int, pause: Pause, removed: Removed) -> None:
        """Remove the oldest output until there is no more than `quota`."""
        if table_bytes(connection, "aque_output")[1] <= quota:  # at once, and never less than the output itself
            return
        over = int(connection.execute(sql.output_bytes()).scalar_one()) - quota
        if over <= 0:
            return
        last = connection.execute(sql.id_range()).one().last
        for ids in self._walk(connection, sql.tasks_with_output(), (last or 0) + 1, OUTPUT_BATCH):
            began = time.monotonic()
            sizes = dict(connection.execute(sql.output_sizes_of(self._dialect), {"ids": ids}).all())
            wanted: list[int] = []
            planned = 0
            for task_id in ids:
                if planned >= over:
                    break
                wanted.append(task_id)
                planned += int(sizes.get(task_id, 0))
            gone = self._delete_output(connection, wanted, now)
            removed.outputs += len(gone)
            over -= sum(int(sizes.get(task_id, 0)) for task_id in gone)
            if over <= 0 or not pause(time.monotonic() - began):
                return

    def _walk(self, connection: sa.Connection, statement: Any, below: int, limit: int) -> Iterator[list[int]]:
        """The ids that `statement` finds, in batches."""
        after = -1
        while True:
            parameters = {"after": after, "below": below, "limit": limit}
            ids = list(connection.execute(statement, parameters).scalars())
            if not ids:
                return
            yield ids
            after = ids[-1]

    def _first_since(self, connection: sa.Connection, moment: float) -> int:
        """The id below which tasks were submitted before `moment` (seconds since 1970), by and large: a submitter that has
        reserved ids ahead uses them later. 0 without any."""
        found = connection.execute(sql.id_range()).one()
        if found.first is None:
            return 0
        low, high = found.first, found.last + 1
        while low < high:  # below `low` all are older, from `high` on none is
            middle = (low + high) // 2
            row = connection.execute(sql.first_from(), {"from_id": middle}).first()
            if row is not None and row.id < high and row.submitted_at < moment:
                low = row.id + 1
            else:
                high = middle
        return int(low)

    # -- what tasks share ---------------------------------------------------------------------------------------------

    def _clean_classes(self, connection: sa.Connection, now: float) -> int:
        """A submitter may be about to use a class that it has looked up within the last hour. So a class that is not used is
        first retired, when nobody can find it any more, and goes when all have forgotten it."""
        fresh, forgotten = [], []
        for row in connection.execute(sql.unused_requirements()).all():
            if not row.digest.startswith(RETIRED):
                fresh.append(row.id)
            elif float(row.digest.split(":")[1]) < now - RETIRED_SECONDS:
                forgotten.append(row.id)
        prefix = f"{RETIRED}{now:.0f}:"
        for ids in _batches(fresh, BATCH):
            connection.execute(sql.retire_requirements(self._dialect), {"ids": ids, "prefix": prefix})
        for ids in _batches(forgotten, BATCH):
            connection.execute(sql.delete_requirements(self._dialect), {"ids": ids})
        return len(forgotten)

    def _clean_environments(self, connection: sa.Connection, now: float) -> int:
        this_week = int(now // WEEK_SECONDS)
        digests = [
            digest
            for digest in connection.execute(sql.unused_environments()).scalars()
            if int(digest.partition("-")[2] or 0) < this_week - 1
        ]
        for batch in _batches(digests, BATCH):
            connection.execute(sql.delete_environments(), {"digests": batch})
        return len(digests)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
