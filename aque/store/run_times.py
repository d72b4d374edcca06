"""How long tasks have run, by name: moving averages that workers write and submitters read."""

import json
from collections.abc import Iterable

import sqlalchemy as sa

from aque.durations import ALL, SIZED, Runs, RunTime
from aque.store import statements as sql
from aque.store.engine import transaction

#: The average of a priority is that of the newest so many ids.
NEWEST = 10_000


class RunTimes:
    """The run times of one farm."""

    def __init__(self, dialect: str) -> None:
        self._dialect = dialect

    def record(self, connection: sa.Connection, runs: Iterable[Runs]) -> None:
        """Add successful runs to the averages, in a transaction of their own."""
        rows = [
            {
                "name": one.name,
                "runs": one.count,
                "seconds": one.seconds,
                "weight": one.weight,
                "io_bytes": one.io_bytes,
                "io_weight": one.io_weight,
            }
            for one in runs
        ]
        if not rows:
            return
        with transaction(connection):
            folded = connection.execute(sql.fold_runs(self._dialect), {"rows": json.dumps(rows)}).scalars()
            known = set(folded)
            if new := [row for row in rows if row["name"] not in known]:
                connection.execute(sql.add_runs(self._dialect), {"rows": json.dumps(new)})
                connection.execute(sql.forget_run_times())

    def read(self, connection: sa.Connection, names: Iterable[str]) -> dict[str, RunTime]:
        """The averages of those of these names (see `durations.key`) that have any, and of ALL and SIZED."""
        rows = json.dumps([{"name": name} for name in {ALL, SIZED, *names}])
        found = connection.execute(sql.run_times(self._dialect), {"rows": rows})
        return {row.name: RunTime(row.seconds, row.io_bytes) for row in found}

    def average_of_priority(self, connection: sa.Connection, priority: int) -> float | None:
        """The average expected duration of the newest tasks of this priority; None if of none of them one is known."""
        parameters = {"wanted_priority": priority, "newest": NEWEST}
        found = connection.execute(sql.average_duration(), parameters).scalar()
        return None if found is None else float(found)
