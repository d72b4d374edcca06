"""transitions: what has happened to tasks, and how far its readers have come."""

from functools import cache

import sqlalchemy as sa

from aque.store.engine import lease_clock, wall_clock
from aque.store.statements.common import Statement, insert_into
from aque.store.tables import cursor, recording, transition


@cache
def transitions_after() -> Statement:
    """The first `limit` transitions after `position`, in order."""
    return (
        sa.select(transition)
        .where(transition.c.id > sa.bindparam("position", type_=sa.BigInteger))
        .order_by(transition.c.id)
        .limit(sa.bindparam("limit", type_=sa.Integer))
    )


@cache
def last_transition(dialect: str) -> sa.ScalarSelect[int]:
    """The highest number that a transition has ever got; 0 before the first."""
    if dialect == "sqlite":
        drawn = sa.select(sa.literal_column("seq", sa.BigInteger)).select_from(sa.text("sqlite_sequence"))
        found = drawn.where(sa.literal_column("name") == transition.name).scalar_subquery()
        return sa.select(sa.func.coalesce(found, 0)).scalar_subquery()
    value = sa.literal_column("CASE WHEN is_called THEN last_value ELSE 0 END", sa.BigInteger)
    return sa.select(value).select_from(sa.text("aque_transition_id_seq")).scalar_subquery()


@cache
def writers_of_transitions() -> Statement:
    """PostgreSQL: the transactions in progress that have written transitions."""
    return sa.text(
        "SELECT virtualtransaction FROM pg_locks WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted "
        "AND relation = 'aque_transition'::regclass AND pid <> pg_backend_pid() "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )


@cache
def oldest_to_keep() -> Statement:
    """Of the first `limit` transitions the first that is not older than `before`; null: all of them are. With the last."""
    first = (
        sa.select(transition.c.id, transition.c.at)
        .order_by(transition.c.id)
        .limit(sa.bindparam("limit", type_=sa.Integer))
        .subquery("first")
    )
    kept = sa.case((first.c.at >= sa.bindparam("before", type_=sa.Double), first.c.id))
    return sa.select(sa.func.min(kept).label("kept"), sa.func.max(first.c.id).label("last"))


@cache
def delete_transitions() -> Statement:
    return sa.delete(transition).where(transition.c.id <= sa.bindparam("last", type_=sa.BigInteger))


@cache
def note_deleted() -> Statement:
    return sa.update(recording).values(deleted_up_to=sa.bindparam("last", type_=sa.BigInteger))


@cache
def deleted_up_to() -> Statement:
    return sa.select(recording.c.deleted_up_to)


def _is_mine() -> sa.ColumnElement[bool]:
    return sa.and_(cursor.c.name == sa.bindparam("which"), cursor.c.holder == sa.bindparam("me"))


def _until() -> sa.ColumnElement[float]:
    return lease_clock() + sa.bindparam("lease", type_=sa.Double)


@cache
def add_cursor(dialect: str) -> Statement:
    """A cursor at `position`, unless there is one of that name."""
    values = {"name": sa.bindparam("which"), "position": sa.bindparam("at_first", type_=sa.BigInteger)}
    return insert_into(dialect, cursor).values(**values, updated_at=wall_clock()).on_conflict_do_nothing()


@cache
def take_cursor() -> Statement:
    """Make a cursor `me`'s for `lease` seconds, if nobody has it but one that is `gone`; its position."""
    # A lease that ends later than it could have begun now is of an earlier boot, see engine.lease_clock.
    lapsed = sa.or_(cursor.c.until <= lease_clock(), cursor.c.until > _until())
    mine = cursor.c.holder.in_([sa.bindparam("me"), sa.bindparam("gone")])
    free = sa.or_(cursor.c.holder.is_(None), mine, lapsed)
    return (
        sa.update(cursor)
        .where(cursor.c.name == sa.bindparam("which"), free)
        .values(holder=sa.bindparam("me"), until=_until())
        .returning(cursor.c.position)
    )


@cache
def renew_cursor() -> Statement:
    return sa.update(cursor).where(_is_mine()).values(until=_until()).returning(cursor.c.name)


@cache
def move_cursor() -> Statement:
    """Put a cursor that is `me`'s at `position`; no row: it is somebody else's by now."""
    return (
        sa.update(cursor)
        .where(_is_mine())
        .values(position=sa.bindparam("new_position", type_=sa.BigInteger), updated_at=wall_clock(), until=_until())
        .returning(cursor.c.name)
    )


@cache
def release_cursor() -> Statement:
    return sa.update(cursor).where(_is_mine()).values(holder=None, until=None)


@cache
def cursors(dialect: str) -> Statement:
    """All of them, with `behind`, the transitions that they have yet to reach, at most."""
    return sa.select(cursor, (last_transition(dialect) - cursor.c.position).label("behind")).order_by(cursor.c.name)


@cache
def delete_cursor() -> Statement:
    return sa.delete(cursor).where(cursor.c.name == sa.bindparam("which")).returning(cursor.c.name)
