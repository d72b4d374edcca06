"""The store of one farm: what the rest of Aque asks of the tables, put together of one part for each arrow of the work.

Methods take an open connection; those that write several rows belong inside `transaction(connection)`. Every write by a
worker carries its claim, (task, attempt, token): a worker that stalled past its lease finds 0 rows.
"""

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from aque.errors import BadStateDirectory
from aque.settings import Settings
from aque.store import schema
from aque.store.engine import open_engine
from aque.store.kills import Kills
from aque.store.leases import Leases


class Store(Kills, Leases):
    """The tables of one farm. Safe to share between threads; every thread opens a connection of its own."""


def unchecked_store(settings: Settings) -> "Store":
    """The store of this farm for who has used it a moment ago: it need not be reachable just now."""
    return Store(open_engine(settings.store_url))


def open_store(settings: Settings, **engine_options: Any) -> "Store":
    """The store of this farm, checked: reachable and of the version that this Aque uses. A fresh SQLite file gets its
    tables here; on PostgreSQL `aque init` makes them. Raises a StoreError."""
    if settings.broker.startswith("sqlite:"):
        directory = Path(unquote(urlsplit(settings.store_url).path)[1:]).parent
        if not directory.is_dir():  # the default directory is made; one that was named may be a slip
            raise BadStateDirectory(
                f"AQUE_BROKER names a file in {directory}, which does not exist. Make the directory first."
            )
    engine = open_engine(settings.store_url, **engine_options)
    store = Store(engine)
    with store.connect() as connection:
        # Not by the file's size: another process may be about to create the tables just now.
        is_fresh = engine.dialect.name == "sqlite" and schema.is_empty(connection)
    if is_fresh:
        schema.upgrade(engine)
    with store.connect() as connection:
        schema.check(connection)
    return store
