"""SQLite: the index of ready tasks in the order in which they are claimed, which copying the table for 0004 has lost"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.drop_index("ix_aque_task_ready", "aque_task")
        op.create_index(
            "ix_aque_task_ready",
            "aque_task",
            ["requirement_id", sa.text("rank DESC"), sa.text("duration DESC"), "id"],
            sqlite_where=sa.text("state = 'ready'"),
        )
