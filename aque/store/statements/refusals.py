"""refuse: hosts on which tasks could not be started, and what workers avoid for it."""

from functools import cache

import sqlalchemy as sa

from aque.store.engine import one_of, wall_clock
from aque.store.statements.common import Statement, insert_into
from aque.store.tables import refusal, worker


@cache
def add_refusal(dialect: str) -> Statement:
    """A host has refused a task; if it had before, what it says now counts."""
    columns = {c.name: sa.bindparam(c.name, type_=c.type) for c in refusal.c if c.name != "refused_at"}
    insert = insert_into(dialect, refusal).values(refused_at=wall_clock(), **columns)
    changed = {name: insert.excluded[name] for name in ("reason", "message", "refused_at")}
    return insert.on_conflict_do_update(index_elements=[refusal.c.task_id, refusal.c.host], set_=changed)


@cache
def refusals(dialect: str) -> Statement:
    """The refusals of these tasks (`ids`), the latest of each last."""
    return (
        sa.select(refusal)
        .where(one_of(dialect, refusal.c.task_id, "ids"))
        .order_by(refusal.c.task_id, refusal.c.refused_at, refusal.c.host)
    )


@cache
def set_avoids() -> Statement:
    """What `which_worker` does not claim for a while, as sentences (a JSON list), and which required paths its host has not (a
    JSON object)."""
    return (
        sa.update(worker)
        .where(worker.c.id == sa.bindparam("which_worker"))
        .values(avoids=sa.bindparam("new_avoids"), missing_paths=sa.bindparam("new_missing"))
    )
