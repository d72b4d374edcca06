"""Users, interpreters, redirections, soft limits, drained workers, an index of children"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # Rows that are there need a value; new ones are written with one, so that the tables keep no default.
    with op.batch_alter_table("aque_requirement") as table:
        _add(table, "user", sa.Text(), "", comment="whose processes it runs; empty: the worker's own")
        _add(table, "interpreter", sa.Text(), "", comment="of a Python task; empty: the worker's own")
    with op.batch_alter_table("aque_requirement") as table:
        table.drop_constraint("uq_aque_requirement", type_="unique")
        table.create_unique_constraint(
            "uq_aque_requirement",
            ["queue", "pattern", "cpus", "memory_bytes", "host", "platform", "user", "interpreter"],
        )
        _without_default(table, "user", "interpreter")
    with op.batch_alter_table("aque_task") as table:
        _add(table, "requeue", sa.Boolean(), sa.true(), comment="false: a lost attempt is the last")
        _add(table, "truncated", sa.Boolean(), sa.false(), comment="output of the latest attempt was cut")
        table.add_column(
            sa.Column("kill_grace", sa.Double(), comment="of that kill, in seconds; null: the worker's setting")
        )
    with op.batch_alter_table("aque_payload") as table:
        table.add_column(
            sa.Column("stdin_path", sa.LargeBinary(), comment="in its place: a file, opened on the worker")
        )
        table.add_column(sa.Column("stdout_path", sa.LargeBinary(), comment="null: captured"))
        table.add_column(sa.Column("stderr_path", sa.LargeBinary(), comment="null: captured"))
        table.add_column(sa.Column("soft_time_limit_seconds", sa.Double()))
        _add(table, "login", sa.Boolean(), sa.false(), comment="run it in the user's login shell")
        _add(
            table, "strict_lease", sa.Boolean(), sa.false(), comment="killed on its host when the lease has ended there"
        )
    with op.batch_alter_table("aque_worker") as table:
        _add(table, "user", sa.Text(), "", comment="whose tasks it runs; empty: whoever's, as itself")
        _add(table, "switches_user", sa.Boolean(), sa.false(), comment="it runs the tasks of other users as these")
        _add(table, "containment", sa.Text(), "", comment="how it keeps processes together")
        _add(table, "draining", sa.Boolean(), sa.false(), comment="claims nothing, as a person asked")
    op.create_index(
        "ix_aque_task_parent",
        "aque_task",
        ["parent_id"],
        unique=False,
        postgresql_where=sa.text("parent_id IS NOT NULL"),
        sqlite_where=sa.text("parent_id IS NOT NULL"),
    )
    if op.get_bind().dialect.name == "postgresql":
        for name, columns in _FILLED.items():
            with op.batch_alter_table(name) as table:
                _without_default(table, *columns)


#: What was filled in above, and is always written from now on. SQLite keeps its defaults: to drop one is to copy the table.
_FILLED = {
    "aque_task": ("requeue", "truncated"),
    "aque_payload": ("login", "strict_lease"),
    "aque_worker": ("user", "switches_user", "containment", "draining"),
}


def _add(table: Any, name: str, kind: Any, value: Any, **options: Any) -> None:
    table.add_column(sa.Column(name, kind, nullable=False, server_default=value, **options))


def _without_default(table: Any, *columns: str) -> None:
    for name in columns:
        table.alter_column(name, server_default=None)
