"""Alembic's entry: runs the migrations on the connection, and in the transaction, of the caller."""

from alembic import context

from aque.store.schema import VERSION_TABLE
from aque.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, version_table=VERSION_TABLE
)
context.run_migrations()
