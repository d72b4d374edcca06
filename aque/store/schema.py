"""The version of the tables: made and upgraded by the Alembic migrations in this package, checked by everything else."""

import logging
from pathlib import Path

import sqlalchemy as sa

from aque.errors import WrongSchema
from aque.store import recording, tables
from aque.store.engine import reachable, transaction

#: The newest migration; a test holds it equal to what the migrations say.
HEAD = "0006"
VERSION_TABLE = "aque_schema_version"


def version(connection: sa.Connection) -> str | None:
    """The version of the tables in this database; None if there are none."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    found = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar()
    return None if found is None else str(found)


def is_empty(connection: sa.Connection) -> bool:
    """True for a database without any table, ours or others'."""
    return not sa.inspect(connection).get_table_names()


def check(connection: sa.Connection) -> None:
    """Raise WrongSchema unless the tables are exactly those that this version of Aque uses."""
    found = version(connection)
    if found == HEAD:
        return
    where = connection.engine.url.render_as_string(hide_password=True)
    if found is None:
        raise WrongSchema(f"{where} holds no Aque tables. Nothing was done: run `aque init` once to create them.")
    if found < HEAD:
        raise WrongSchema(
            f"the tables in {where} are of version {found}, this Aque uses {HEAD}. Nothing was done: "
            "run `aque init` to upgrade them (workers of the older version refuse them afterwards)."
        )
    raise WrongSchema(
        f"the tables in {where} are of version {found}, newer than this Aque, which uses {HEAD}. Nothing was done: "
        "upgrade Aque on this machine."
    )


def upgrade(engine: sa.Engine) -> str | None:
    """Create or upgrade the tables, in one transaction; returns the version there was before. Safe to run by many at once."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # before the import, which tells what it loads
    from alembic import command
    from alembic.config import Config

    with reachable(engine), engine.connect() as connection, transaction(connection):
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('aque_schema'))")
        before = version(connection)
        if before is None or before < HEAD:
            config = Config()
            config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            recording.restore(connection)
        else:
            check(connection)
    return before


def drop(engine: sa.Engine) -> None:
    """Remove every table of Aque, with all tasks."""
    with reachable(engine), engine.connect() as connection, transaction(connection):
        tables.metadata.drop_all(connection)
        connection.exec_driver_sql(f"DROP TABLE IF EXISTS {VERSION_TABLE}")
        recording.forget(connection)
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("DROP SEQUENCE IF EXISTS aque_id")
