"""How long tasks have run, by name."""

from functools import cache
from typing import Any

import sqlalchemy as sa

from aque.durations import ALL, NAMES, SIZED
from aque.store.engine import row_set, wall_clock
from aque.store.statements.common import Statement, insert_into
from aque.store.tables import run_time, task

_RUNS: dict[str, sa.types.TypeEngine[Any]] = {
    "name": sa.Text(),
    "runs": sa.BigInteger(),
    "seconds": sa.Double(),
    "weight": sa.Double(),
    "io_bytes": sa.Double(),
    "io_weight": sa.Double(),
}


@cache
def run_times(dialect: str) -> Statement:
    """The averages of these names (`rows`: name)."""
    rows = row_set(dialect, "rows", name=sa.Text())
    return sa.select(run_time.c.name, run_time.c.seconds, run_time.c.io_bytes).where(
        run_time.c.name.in_(sa.select(rows.c.name))
    )


@cache
def fold_runs(dialect: str) -> Statement:
    """Move the averages of names that are known towards these runs (`rows`), as far as their weights say. Returns the names.

    Locked in order, the row of all runs first: two workers that write at once wait there, and never for each other.
    """
    rows = row_set(dialect, "rows", **_RUNS)
    locked = (
        sa.select(run_time.c.name)
        .where(run_time.c.name.in_(sa.select(rows.c.name)))
        .order_by(run_time.c.name)
        .with_for_update()
        .cte("locked")
    )
    old = run_time.c.io_bytes
    return (
        sa.update(run_time)
        .where(run_time.c.name == locked.c.name, rows.c.name == locked.c.name)
        .values(
            runs=run_time.c.runs + rows.c.runs,
            seconds=run_time.c.seconds + rows.c.weight * (rows.c.seconds - run_time.c.seconds),
            io_bytes=sa.case(
                (old.is_(None), rows.c.io_bytes),
                (rows.c.io_bytes.is_(None), old),
                else_=old + rows.c.io_weight * (rows.c.io_bytes - old),
            ),
            updated_at=wall_clock(),
        )
        .returning(run_time.c.name)
    )


@cache
def add_runs(dialect: str) -> Statement:
    """Names that were not known yet (`rows`); another worker may have been faster, and then these runs are not counted."""
    rows = row_set(dialect, "rows", **_RUNS)
    new = (
        sa.select(rows.c.name, rows.c.runs, rows.c.seconds, rows.c.io_bytes, wall_clock())
        .where(sa.true())  # SQLite would take ON CONFLICT for a join's ON
        .order_by(rows.c.name)
    )
    names = ["name", "runs", "seconds", "io_bytes", "updated_at"]
    return insert_into(dialect, run_time).from_select(names, new).on_conflict_do_nothing()


@cache
def forget_run_times() -> Statement:
    """Of more than NAMES names those go that have not run for the longest time."""
    oldest = (
        sa.select(run_time.c.name)
        .where(run_time.c.name.not_in([ALL, SIZED]))
        .order_by(run_time.c.updated_at.desc(), run_time.c.name)
        .offset(NAMES)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    return sa.delete(run_time).where(run_time.c.name.in_(oldest))


@cache
def average_duration() -> Statement:
    """The average expected duration of tasks of `wanted_priority`, where there is one, among the newest `newest` ids."""
    last = sa.select(sa.func.max(task.c.id)).scalar_subquery()
    return sa.select(sa.func.avg(task.c.duration)).where(
        task.c.id > last - sa.bindparam("newest", type_=sa.BigInteger),
        task.c.priority == sa.bindparam("wanted_priority", type_=sa.Integer),
        task.c.duration > 0,
    )
