"""Reservations: which worker keeps room for which task, and what it takes to decide that."""

from functools import cache

import sqlalchemy as sa

from aque.states import State
from aque.store.engine import lease_clock
from aque.store.statements.claims import READY_COLUMNS
from aque.store.statements.common import Statement, insert_into, is_state
from aque.store.tables import reservation, task, worker

_IN_FORCE = (
    reservation.c.until > lease_clock(),
    worker.c.state == "live",
    sa.not_(worker.c.draining),
    is_state(State.READY),
)


@cache
def reservations() -> Statement:
    """Those in force: their lease holds, their worker lives, their task waits."""
    return (
        sa.select(reservation.c.task_id, reservation.c.worker_id, worker.c.name)
        .select_from(
            reservation.join(worker, worker.c.id == reservation.c.worker_id).join(
                task, task.c.id == reservation.c.task_id
            )
        )
        .where(*_IN_FORCE)
    )


@cache
def drop_reservation() -> Statement:
    return sa.delete(reservation).where(reservation.c.worker_id == sa.bindparam("which_worker"))


@cache
def reserve(dialect: str) -> Statement:
    """Let `which_worker` keep room for `which_task` for `lease` seconds, in place of a reservation that is not in force. No
    row: another worker keeps room for it."""
    new = insert_into(dialect, reservation).values(
        task_id=sa.bindparam("which_task"),
        worker_id=sa.bindparam("which_worker"),
        until=lease_clock() + sa.bindparam("lease", type_=sa.Double),
    )
    holder_lives = sa.exists().where(worker.c.id == reservation.c.worker_id, worker.c.state == "live")
    return new.on_conflict_do_update(
        index_elements=[reservation.c.task_id],
        set_={"worker_id": new.excluded.worker_id, "until": new.excluded.until},
        where=sa.or_(reservation.c.until <= lease_clock(), sa.not_(holder_lives)),
    ).returning(reservation.c.task_id)


@cache
def renew_reservation() -> Statement:
    """Extend the reservation of `which_worker` by `lease` seconds."""
    return (
        sa.update(reservation)
        .where(reservation.c.worker_id == sa.bindparam("which_worker"))
        .values(until=lease_clock() + sa.bindparam("lease", type_=sa.Double))
    )


@cache
def kept_task() -> Statement:
    """The task for which `which_worker` keeps room, if it is ready and nobody else keeps room for it by now."""
    return (
        sa.select(*(task.c[name] for name in READY_COLUMNS))
        .select_from(reservation.join(task, task.c.id == reservation.c.task_id))
        .where(reservation.c.worker_id == sa.bindparam("which_worker"), is_state(State.READY))
    )


@cache
def running_tasks() -> Statement:
    """What runs on live workers, since when, and how long it is expected to take."""
    return (
        sa.select(task.c.worker_id, task.c.requirement_id, task.c.started_at, task.c.duration)
        .select_from(task.join(worker, worker.c.id == task.c.worker_id))
        .where(is_state(State.RUNNING), worker.c.state == "live")
    )
