"""Workers and their leases, and what becomes of the tasks of lost ones."""

from functools import cache

import sqlalchemy as sa

from aque.states import State
from aque.store.engine import lease_clock, one_of, row_set, wall_clock
from aque.store.statements.common import (
    ON_WORKER,
    Statement,
    in_states,
    is_state,
)
from aque.store.statements.finishes import MOVED
from aque.store.tables import task, worker


@cache
def insert_worker() -> Statement:
    return sa.insert(worker).values(
        started_at=wall_clock(), seen_at=wall_clock(), lease_until=lease_clock() + sa.bindparam("lease")
    )


@cache
def renew() -> Statement:
    """Extend the lease of `which_worker` by `lease` seconds; no row: it has been declared lost."""
    return (
        sa.update(worker)
        .where(worker.c.id == sa.bindparam("which_worker"), worker.c.state == "live")
        .values(
            seen_at=wall_clock(),
            lease_seconds=sa.bindparam("lease", type_=sa.Double),
            lease_until=lease_clock() + sa.bindparam("lease", type_=sa.Double),
        )
        .returning(worker.c.id)
    )


@cache
def set_queues() -> Statement:
    return (
        sa.update(worker).where(worker.c.id == sa.bindparam("which_worker")).values(queues=sa.bindparam("new_queues"))
    )


#: Of a worker, what a restart can change.
DESCRIBED = (
    "name", "cpus", "memory_bytes", "python_slots", "command_slots", "queues", "version", "lease_seconds", "user",
    "switches_user", "containment", "resources", "tags",
)  # fmt: skip


@cache
def describe_worker() -> Statement:
    """After a restart of `which_worker`: what it is called and has now."""
    values = {name: sa.bindparam(f"new_{name}", type_=worker.c[name].type) for name in DESCRIBED}
    return sa.update(worker).where(worker.c.id == sa.bindparam("which_worker")).values(values)


@cache
def set_draining(dialect: str) -> Statement:
    """Let these live workers (`ids`) claim nothing more, or claim again."""
    return (
        sa.update(worker)
        .where(one_of(dialect, worker.c.id, "ids"), worker.c.state == "live")
        .values(draining=sa.bindparam("wanted", type_=sa.Boolean))
        .returning(worker.c.id)
    )


@cache
def stop_worker() -> Statement:
    """Sign off `which_worker`, unless it still has tasks: those are for the reapers, who look at live workers only."""
    busy = sa.exists().where(task.c.worker_id == worker.c.id, in_states(ON_WORKER))
    return (
        sa.update(worker)
        .where(worker.c.id == sa.bindparam("which_worker"), worker.c.state == "live", sa.not_(busy))
        .values(state="stopped", seen_at=wall_clock())
    )


@cache
def live_workers() -> Statement:
    return workers().where(worker.c.state == "live")


@cache
def workers() -> Statement:
    """All workers with `expired`: how many seconds ago the lease ended (negative: it holds), and `unseen`: how many seconds
    ago it was renewed."""
    return sa.select(
        worker,
        (lease_clock() - worker.c.lease_until).label("expired"),
        (wall_clock() - worker.c.seen_at).label("unseen"),
    ).order_by(worker.c.id)


@cache
def declare_lost(dialect: str) -> Statement:
    """End a live worker, if its lease still is what the reaper saw: ownership changes only by this row."""
    return (
        sa.update(worker)
        .where(
            worker.c.id == sa.bindparam("which_worker"),
            worker.c.state == "live",
            worker.c.lease_until == sa.bindparam("seen_lease_until"),
        )
        .values(state="lost")
        .returning(worker.c.id)
    )


@cache
def held_by_worker() -> Statement:
    """The tasks that `which_worker` has, locked in order."""
    return (
        sa.select(task.c.id, task.c.state, task.c.lost, task.c.requeue, task.c.kill_signal)
        .where(task.c.worker_id == sa.bindparam("which_worker"), in_states(ON_WORKER))
        .order_by(task.c.id)
        .with_for_update(of=task)
    )


@cache
def lose(dialect: str) -> Statement:
    """Tasks (`rows`: id, state) of a dead worker. Running ones: an attempt is lost; buffered ones: none is counted, but it
    may have started unseen, so that its number is not used again."""
    rows = row_set(dialect, "rows", id=sa.BigInteger(), state=sa.Text(), reason=sa.Text())
    ran = is_state(State.RUNNING)
    return (
        sa.update(task)
        .where(task.c.id == rows.c.id, in_states(ON_WORKER))
        .values(
            state=rows.c.state,
            lost=task.c.lost + sa.case((ran, 1), else_=0),
            token=None,
            blocked=False,
            kill_signal=None,
            kill_grace=None,
            reason=rows.c.reason,
            expires_at=sa.case((rows.c.state == State.READY, task.c.expires_at), else_=sa.null()),
            finished_at=sa.case((rows.c.state == State.READY, sa.null()), else_=wall_clock()),
        )
        .returning(*MOVED)
    )
