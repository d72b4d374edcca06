"""LISTEN and NOTIFY: PostgreSQL's carrier of the doorbell."""

from collections.abc import Collection, Iterable
from hashlib import sha256
from typing import Any

import sqlalchemy as sa

from aque.store.engine import run_text

#: A NOTIFY wakes the backend of every process that listens anywhere in the database (before PostgreSQL 19), but only
#: those that listen on its channel tell their client. So one channel per name, and not one for all.
_PREFIX = "aque "


def channel(name: str) -> str:
    """The channel of the doorbell `name`; a long name is hashed, since a channel has at most 63 bytes."""
    whole = _PREFIX + name
    return whole if len(whole.encode()) <= 63 else _PREFIX + sha256(name.encode()).hexdigest()[:40]


def dedicated_connection(engine: sa.Engine) -> Any:
    """A psycopg2 connection in autocommit mode that belongs to no pool; the caller closes it.

    A new one: after a restart of the server those that wait in the engine's pool are dead. SQLAlchemy's errors, as
    `engine.connect()` has them, if there is none to be had.
    """
    driver_error = engine.dialect.loaded_dbapi.Error
    try:
        borrowed = engine.pool.recreate().connect()
    except driver_error as error:
        raise sa.exc.DBAPIError.instance("connect", None, error, driver_error) from error
    connection: Any = borrowed.dbapi_connection
    borrowed.detach()
    connection.autocommit = True
    return connection


def listen(connection: Any, channels: Iterable[str]) -> None:
    """LISTEN on all of `channels` in one round trip; `connection` is psycopg2's."""
    statements = [f'LISTEN "{name.replace(chr(34), chr(34) * 2)}"' for name in channels]
    if statements:
        with connection.cursor() as cursor:
            cursor.execute("; ".join(statements))


def notify(connection: sa.Connection, channels: Collection[str]) -> None:
    """NOTIFY all of `channels`, in one statement and a transaction of its own.

    The statement does not wait for the disk: what it says was true before, and a lost ring is allowed. The setting is
    local to it, because the commits of tasks on the same connection must wait.
    """
    run_text(connection, _NOTIFY, {"channels": list(channels)})


_NOTIFY = (
    "SELECT set_config('synchronous_commit', 'off', true), pg_notify(channel, '') "
    "FROM unnest(%(channels)s::text[]) AS channel"
)
