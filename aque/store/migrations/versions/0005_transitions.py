"""What has happened to tasks, and how far readers of it have come"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "aque_transition",
        sa.Column("id", _ID, nullable=False, comment="rises in the order in which each task moved; gaps: rolled back"),
        sa.Column("task_id", _ID, nullable=False),
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column(
            "state", sa.Text(), nullable=False, comment="that it moved to; ready or pending: another attempt follows"
        ),
        sa.Column("reason", sa.Text()),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("worker_id", _ID),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_aque_transition"),
        comment="what has happened to tasks, written by triggers (see aque/store/recording.py); append only",
        sqlite_autoincrement=True,
    )
    recording = op.create_table(
        "aque_recording",
        sa.Column("id", sa.Integer(), nullable=False, autoincrement=False, comment="1: there is one row"),
        sa.Column("is_on", sa.Boolean(), nullable=False, comment="transitions are recorded"),
        sa.Column("deleted_up_to", sa.BigInteger(), nullable=False, comment="of transitions, by retention"),
        sa.PrimaryKeyConstraint("id", name="pk_aque_recording"),
    )
    op.bulk_insert(recording, [{"id": 1, "is_on": True, "deleted_up_to": 0}])
    op.create_table(
        "aque_cursor",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False, comment="the last transition that was handled"),
        sa.Column("holder", sa.Text(), comment="the reader whose turn it is; null: nobody's"),
        sa.Column("until", sa.Double(), comment="on the lease clock, see engine.lease_clock"),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_aque_cursor"),
        comment="how far durable readers of transitions have come",
    )
