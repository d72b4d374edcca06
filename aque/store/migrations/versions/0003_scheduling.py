"""Resources, limits, tags, places; ranks; usage; reservations; run times; refusals"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # Rows that are there need a value; new ones are written with one, so that the tables keep no default.
    with op.batch_alter_table("aque_requirement") as table:
        _add(table, "resources", sa.Text(), "", comment="as in gpu=1,nuke=2")
        _add(table, "limits", sa.Text(), "", comment="tokens of farm-wide limits, as in nuke=1")
        _add(table, "tags", sa.Text(), "", comment="that the worker must have, with commas; ! excludes")
        _add(table, "requires_paths", sa.LargeBinary(), _EMPTY, comment="that the host must have, each ended by NUL")
        _add(table, "places", sa.LargeBinary(), _EMPTY, comment="where its files are, each ended by NUL")
        _add(table, "digest", sa.Text(), "", comment="of all of it: equal requirements have one row")
    # Classes of before have no digest that a new submission could find: it makes a class of its own.
    op.execute("UPDATE aque_requirement SET digest = 'before 0003: ' || id")
    with op.batch_alter_table("aque_requirement") as table:
        table.drop_constraint("uq_aque_requirement", type_="unique")
        table.create_unique_constraint("uq_aque_requirement", ["digest"])
        _without_default(table, "resources", "limits", "tags", "requires_paths", "places", "digest")
    with op.batch_alter_table("aque_task") as table:
        _add(
            table,
            "rank",
            sa.BigInteger(),
            "0",
            comment="the priority by which it is chosen: with what age adds",
        )
        _add(table, "io_bytes", sa.BigInteger(), "0", comment="size of its io_paths; 0: unknown")
        _add(table, "tokens", sa.Integer(), "0", comment="of farm-wide limits, which its claim holds")
        table.add_column(sa.Column("ready_at", sa.Double(), comment="since when it may be claimed"))
        table.add_column(sa.Column("near_host", sa.Text(), comment="where what it waited for has ended last"))
        _add_usage(table)
    op.execute("UPDATE aque_task SET rank = priority, ready_at = submitted_at")
    ready = sa.text("state = 'ready'")
    op.drop_index("ix_aque_task_ready", "aque_task")
    op.create_index(
        "ix_aque_task_ready",
        "aque_task",
        ["requirement_id", sa.text("rank DESC"), sa.text("duration DESC"), "id"],
        postgresql_where=ready,
        sqlite_where=ready,
    )
    with op.batch_alter_table("aque_attempt") as table:
        _add_usage(table)
    with op.batch_alter_table("aque_worker") as table:
        _add(table, "resources", sa.Text(), "", comment="as in gpu=2,nuke=4")
        _add(table, "tags", sa.Text(), "[]", comment="JSON list")
        _add(table, "missing_paths", sa.Text(), "{}", comment="JSON object: a path that tasks require -> why not")
        _add(table, "avoids", sa.Text(), "[]", comment="JSON list: what it does not claim for a while, and why")
    _create_tables()
    if op.get_bind().dialect.name == "postgresql":
        for name, columns in _FILLED.items():
            with op.batch_alter_table(name) as table:
                _without_default(table, *columns)


def _create_tables() -> None:
    identity = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "aque_limit",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("capacity", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_aque_limit"),
        comment="farm-wide limits: of each name no more tokens are held than this",
    )
    op.create_table(
        "aque_token",
        sa.Column("limit_name", sa.Text(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("task_id", identity, comment="that holds it; null: free"),
        sa.PrimaryKeyConstraint("limit_name", "slot", name="pk_aque_token"),
        comment="a row for each token of a limit, so that many workers take some at once without waiting for each other",
        postgresql_with={"fillfactor": 70},
    )
    held = sa.text("task_id IS NOT NULL")
    op.create_index("ix_aque_token_task", "aque_token", ["task_id"], postgresql_where=held, sqlite_where=held)
    op.create_table(
        "aque_reservation",
        sa.Column("task_id", identity, nullable=False, autoincrement=False),
        sa.Column("worker_id", identity, nullable=False),
        sa.Column("until", sa.Double(), nullable=False, comment="on the lease clock, see engine.lease_clock"),
        sa.PrimaryKeyConstraint("task_id", name="pk_aque_reservation"),
        sa.UniqueConstraint("worker_id", name="uq_aque_reservation"),
        comment="large tasks for which a worker keeps room: one worker for a task, one task for a worker",
    )
    op.create_table(
        "aque_run_time",
        sa.Column("name", sa.Text(), nullable=False, comment="digits are 0; empty: all runs; 1: all with a size"),
        sa.Column("runs", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False, comment="moving average of successful runs"),
        sa.Column("io_bytes", sa.Double(), comment="moving average of the size of their io_paths; null: unknown"),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_aque_run_time"),
        comment="how long tasks have run, by name",
    )
    op.create_table(
        "aque_refusal",
        sa.Column("task_id", identity, nullable=False, autoincrement=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("job_id", identity, nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("refused_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("task_id", "host", name="pk_aque_refusal"),
        comment="hosts on which a task could not be started, through no fault of its own",
    )


#: What was filled in above, and is always written from now on. SQLite keeps its defaults: to drop one is to copy the table.
_FILLED = {
    "aque_task": ("rank", "io_bytes", "tokens"),
    "aque_worker": ("resources", "tags", "missing_paths", "avoids"),
}
_EMPTY = sa.text("''")


def _add_usage(table: Any) -> None:
    table.add_column(sa.Column("cpu_seconds", sa.Double(), comment="of all its processes"))
    table.add_column(sa.Column("max_rss_bytes", sa.BigInteger(), comment="of the largest of its processes"))
    table.add_column(
        sa.Column("read_bytes", sa.BigInteger(), comment="from disks and servers, not from the page cache")
    )
    table.add_column(sa.Column("written_bytes", sa.BigInteger()))


def _add(table: Any, name: str, kind: Any, value: Any, **options: Any) -> None:
    table.add_column(sa.Column(name, kind, nullable=False, server_default=value, **options))


def _without_default(table: Any, *columns: str) -> None:
    for name in columns:
        table.alter_column(name, server_default=None)
