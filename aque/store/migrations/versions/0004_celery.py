"""Times before and after which a task does not start; children; what a task tells of itself"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    # Rows that are there need a value; new ones are written with one, so that the tables keep no default. Nobody has counted
    # the children of those, so that their ends are nothing to them, as before.
    with op.batch_alter_table("aque_task") as table:
        table.add_column(
            sa.Column(
                "not_before",
                sa.Double(),
                comment="counts as one of unmet until then; null: nothing to wait for (any more)",
            )
        )
        table.add_column(
            sa.Column("expires_at", sa.Double(), comment="not started by then, it is cancelled; null once it has")
        )
        for name, kind, value, comment in _NEW:
            table.add_column(sa.Column(name, kind, nullable=False, server_default=value, comment=comment))
    if op.get_bind().dialect.name == "postgresql":
        with op.batch_alter_table("aque_task") as table:
            for name, *_ in _NEW:
                table.alter_column(name, server_default=None)
            table.alter_column("unmet", comment="dependencies left, and 1 for not_before")
        with op.batch_alter_table("aque_edge") as table:
            table.alter_column("condition", comment="ok, any, failed or error")
    for name, column, which in (
        ("ix_aque_task_not_before", "not_before", "not_before IS NOT NULL"),
        ("ix_aque_task_expires", "expires_at", "expires_at IS NOT NULL"),
    ):
        where = sa.text(which)
        op.create_index(name, "aque_task", [column], postgresql_where=where, sqlite_where=where)
    op.create_table(
        "aque_progress",
        sa.Column("task_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False, autoincrement=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column(
            "state", sa.Text(), nullable=False, comment="a name of the task's own, as Celery's update_state has it"
        ),
        sa.Column("meta", sa.LargeBinary(), nullable=False, comment="JSON"),
        sa.PrimaryKeyConstraint("task_id", name="pk_aque_progress"),
        comment="what tasks have last told of themselves",
    )


_NEW = (
    ("children", sa.Text(), "detach", "wait, detach or cancel: what its end means for them"),
    ("children_left", sa.Integer(), "0", "children that have not ended; none if detached"),
    ("children_failed", sa.Integer(), "0", "children that ended otherwise than well"),
    ("blocked", sa.Boolean(), sa.false(), "it waits inside for other tasks; its CPUs are free"),
)
