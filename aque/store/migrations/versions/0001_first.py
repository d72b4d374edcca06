"""The first tables"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "aque_attempt",
        sa.Column("task_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("worker_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("state", sa.Text(), nullable=False, comment="how it ended"),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("signal", sa.Integer(), nullable=True),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("task_id", "attempt", name=op.f("pk_aque_attempt")),
        comment="attempts that another one followed; the latest is in the task's own row",
    )
    op.create_table(
        "aque_edge",
        sa.Column(
            "upstream", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False
        ),
        sa.Column(
            "downstream", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False
        ),
        sa.Column("condition", sa.Text(), nullable=False, comment="ok, any or failed"),
        sa.Column("satisfied", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("upstream", "downstream", name=op.f("pk_aque_edge")),
        postgresql_with={"fillfactor": 85},
    )
    op.create_index("ix_aque_edge_downstream", "aque_edge", ["downstream"], unique=False)
    op.create_table(
        "aque_environment",
        sa.Column("id", sa.Text(), nullable=False, comment="SHA-256 of the content"),
        sa.Column("content", sa.LargeBinary(), nullable=False, comment="NAME=VALUE, each ended by NUL"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_aque_environment")),
    )
    op.create_table(
        "aque_output",
        sa.Column("task_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("fd", sa.Integer(), autoincrement=False, nullable=False, comment="1: stdout, 2: stderr"),
        sa.Column(
            "offset", sa.BigInteger(), autoincrement=False, nullable=False, comment="of the first byte in the stream"
        ),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("task_id", "attempt", "fd", "offset", name=op.f("pk_aque_output")),
    )
    op.create_table(
        "aque_payload",
        sa.Column("task_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("function", sa.Text(), nullable=False, comment="module:qualname"),
        sa.Column("arguments", sa.LargeBinary(), nullable=False, comment="JSON of [args, kwargs]"),
        sa.Column(
            "inputs",
            sa.LargeBinary(),
            nullable=False,
            comment="JSON list of the tasks whose results the arguments name",
        ),
        sa.Column("argv", sa.LargeBinary(), nullable=False, comment="each word ended by NUL"),
        sa.Column("stdin", sa.LargeBinary(), nullable=True, comment="null: /dev/null"),
        sa.Column("cwd", sa.LargeBinary(), nullable=False),
        sa.Column("umask", sa.Integer(), nullable=False),
        sa.Column("environment_id", sa.Text(), nullable=True, comment="digest"),
        sa.Column("import_path", sa.LargeBinary(), nullable=False, comment="JSON list"),
        sa.Column("io_paths", sa.LargeBinary(), nullable=False, comment="each path ended by NUL"),
        sa.Column("time_limit_seconds", sa.Double(), nullable=True),
        sa.Column("extra", sa.LargeBinary(), nullable=False, comment="JSON object: whatever has no column of its own"),
        sa.PrimaryKeyConstraint("task_id", name=op.f("pk_aque_payload")),
        comment="what a task is: written once, read at the claim",
    )
    op.create_table(
        "aque_requirement",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("pattern", sa.Text(), nullable=False),
        sa.Column("cpus", sa.Text(), nullable=False, comment="as requested"),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("platform", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_aque_requirement")),
        sa.UniqueConstraint(
            "queue", "pattern", "cpus", "memory_bytes", "host", "platform", name=op.f("uq_aque_requirement")
        ),
        comment="one row per distinct requirement: a worker decides in Python which of them fit",
    )
    op.create_table(
        "aque_result",
        sa.Column("task_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=True, comment="JSON; no row at all: null"),
        sa.Column("error", sa.LargeBinary(), nullable=True, comment="JSON object: type, message, traceback"),
        sa.PrimaryKeyConstraint("task_id", name=op.f("pk_aque_result")),
    )
    op.create_table(
        "aque_sequence",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_aque_sequence")),
        comment="SQLite's id sequence; PostgreSQL has a real one, aque_id",
    )
    op.create_table(
        "aque_task",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column(
            "requirement_id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            nullable=True,
            comment="null for a group: it needs no worker",
        ),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("duration", sa.Double(), nullable=False, comment="expected seconds; 0: unknown"),
        sa.Column("unmet", sa.Integer(), nullable=False, comment="dependencies left"),
        sa.Column("dependents", sa.Integer(), nullable=False, comment="edges out of it; 0: its end concerns nobody"),
        sa.Column("attempt", sa.Integer(), nullable=False, comment="0 before the first"),
        sa.Column("failed", sa.Integer(), nullable=False, comment="attempts that ended in error"),
        sa.Column("lost", sa.Integer(), nullable=False, comment="attempts whose worker died"),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column(
            "worker_id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            nullable=True,
            comment="of the latest attempt",
        ),
        sa.Column("token", sa.BigInteger(), nullable=True, comment="of the claim; null unless active"),
        sa.Column("kill_signal", sa.Integer(), nullable=True, comment="a kill that its worker has not carried out yet"),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("pattern", sa.Text(), nullable=False),
        sa.Column("job_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("layer", sa.Text(), nullable=False),
        sa.Column("parent_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("seq", sa.Integer(), nullable=False, comment="position within the job"),
        sa.Column("submitter", sa.Text(), nullable=False),
        sa.Column("progress", sa.Double(), nullable=True, comment="0 to 1, as the task reports it"),
        sa.Column("celery_id", sa.Text(), nullable=True, comment="where the caller brought one"),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("signal", sa.Integer(), nullable=True),
        sa.Column("submitted_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_aque_task")),
        postgresql_with={"fillfactor": 85},
    )
    op.create_index(
        "ix_aque_task_active",
        "aque_task",
        ["worker_id"],
        unique=False,
        postgresql_where=sa.text("state IN ('claimed', 'running')"),
        sqlite_where=sa.text("state IN ('claimed', 'running')"),
    )
    op.create_index(
        "ix_aque_task_celery_id",
        "aque_task",
        ["celery_id"],
        unique=True,
        postgresql_where=sa.text("celery_id IS NOT NULL"),
        sqlite_where=sa.text("celery_id IS NOT NULL"),
    )
    op.create_index(
        "ix_aque_task_job",
        "aque_task",
        ["job_id"],
        unique=False,
        postgresql_where=sa.text("job_id != id"),
        sqlite_where=sa.text("job_id != id"),
    )
    op.create_index(
        "ix_aque_task_ready",
        "aque_task",
        ["requirement_id", sa.literal_column("priority DESC"), sa.literal_column("duration DESC"), "id"],
        unique=False,
        postgresql_where=sa.text("state = 'ready'"),
        sqlite_where=sa.text("state = 'ready'"),
    )
    op.create_table(
        "aque_worker",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False, comment="live, stopped or lost"),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("pid_started", sa.Double(), nullable=False),
        sa.Column("boot_id", sa.Text(), nullable=False),
        sa.Column("cpus", sa.Text(), nullable=False, comment="a fraction"),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("python_slots", sa.Integer(), nullable=False),
        sa.Column("command_slots", sa.Integer(), nullable=False),
        sa.Column("queues", sa.Text(), nullable=False, comment="JSON list"),
        sa.Column("platform", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.Column("lease_seconds", sa.Double(), nullable=False),
        sa.Column("lease_until", sa.Double(), nullable=False, comment="on the lease clock, see engine.lease_clock"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_aque_worker")),
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute("CREATE SEQUENCE aque_id")
    else:
        op.execute("INSERT INTO aque_sequence (name, value) VALUES ('id', 0)")
