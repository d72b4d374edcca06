"""The tables. Times are seconds since 1970, UTC; `id` is a bigint from one sequence for tasks, jobs and workers alike."""

from typing import Any

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s",
    }
)

#: SQLite gives only INTEGER PRIMARY KEY the table's own key; a BIGINT one would be a second index.
Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _usage() -> list[sa.Column[Any]]:
    """What an attempt has used; null: not measured."""
    return [
        sa.Column("cpu_seconds", sa.Double, comment="of all its processes"),
        sa.Column("max_rss_bytes", sa.BigInteger, comment="of the largest of its processes"),
        sa.Column("read_bytes", sa.BigInteger, comment="from disks and servers, not from the page cache"),
        sa.Column("written_bytes", sa.BigInteger),
    ]


sequence = sa.Table(
    "aque_sequence",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
    comment="SQLite's id sequence; PostgreSQL has a real one, aque_id",
)

requirement = sa.Table(
    "aque_requirement",
    metadata,
    sa.Column("id", Id, primary_key=True, autoincrement=False),
    sa.Column("queue", sa.Text, nullable=False),
    sa.Column("pattern", sa.Text, nullable=False),
    sa.Column("cpus", sa.Text, nullable=False, comment="as requested"),
    sa.Column("memory_bytes", sa.BigInteger, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("platform", sa.Text, nullable=False),
    sa.Column("user", sa.Text, nullable=False, comment="whose processes it runs; empty: the worker's own"),
    sa.Column("interpreter", sa.Text, nullable=False, comment="of a Python task; empty: the worker's own"),
    sa.Column("resources", sa.Text, nullable=False, comment="as in gpu=1,nuke=2"),
    sa.Column("limits", sa.Text, nullable=False, comment="tokens of farm-wide limits, as in nuke=1"),
    sa.Column("tags", sa.Text, nullable=False, comment="that the worker must have, with commas; ! excludes"),
    sa.Column("requires_paths", sa.LargeBinary, nullable=False, comment="that the host must have, each ended by NUL"),
    sa.Column("places", sa.LargeBinary, nullable=False, comment="where its files are, each ended by NUL"),
    sa.Column("digest", sa.Text, nullable=False, comment="of all of it: equal requirements have one row"),
    sa.UniqueConstraint("digest", name="uq_aque_requirement"),
    comment="one row per distinct requirement: a worker decides in Python which of them fit",
)

task = sa.Table(
    "aque_task",
    metadata,
    sa.Column("id", Id, primary_key=True, autoincrement=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("requirement_id", Id, nullable=True, comment="null for a group: it needs no worker"),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("rank", sa.BigInteger, nullable=False, comment="the priority by which it is chosen: with what age adds"),
    sa.Column("duration", sa.Double, nullable=False, comment="expected seconds; 0: unknown"),
    sa.Column(
        "not_before", sa.Double, comment="counts as one of unmet until then; null: nothing to wait for (any more)"
    ),
    sa.Column("expires_at", sa.Double, comment="not started by then, it is cancelled; null once it has"),
    sa.Column("io_bytes", sa.BigInteger, nullable=False, comment="size of its io_paths; 0: unknown"),
    sa.Column("unmet", sa.Integer, nullable=False, comment="dependencies left, and 1 for not_before"),
    sa.Column("dependents", sa.Integer, nullable=False, comment="edges out of it; 0: its end concerns nobody"),
    sa.Column("attempt", sa.Integer, nullable=False, comment="0 before the first"),
    sa.Column("failed", sa.Integer, nullable=False, comment="attempts that ended in error"),
    sa.Column("lost", sa.Integer, nullable=False, comment="attempts whose worker died"),
    sa.Column("max_attempts", sa.Integer, nullable=False),
    sa.Column("requeue", sa.Boolean, nullable=False, comment="false: a lost attempt is the last"),
    sa.Column("worker_id", Id, comment="of the latest attempt"),
    sa.Column("token", sa.BigInteger, comment="of the claim; null unless active"),
    sa.Column("tokens", sa.Integer, nullable=False, comment="of farm-wide limits, which its claim holds"),
    sa.Column("kill_signal", sa.Integer, comment="a kill that its worker has not carried out yet"),
    sa.Column("kill_grace", sa.Double, comment="of that kill, in seconds; null: the worker's setting"),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("pattern", sa.Text, nullable=False),
    sa.Column("job_id", Id, nullable=False),
    sa.Column("layer", sa.Text, nullable=False),
    sa.Column("parent_id", Id),
    sa.Column("children", sa.Text, nullable=False, comment="wait, detach or cancel: what its end means for them"),
    sa.Column("children_left", sa.Integer, nullable=False, comment="children that have not ended; none if detached"),
    sa.Column("children_failed", sa.Integer, nullable=False, comment="children that ended otherwise than well"),
    sa.Column("blocked", sa.Boolean, nullable=False, comment="it waits inside for other tasks; its CPUs are free"),
    sa.Column("seq", sa.Integer, nullable=False, comment="position within the job"),
    sa.Column("submitter", sa.Text, nullable=False),
    sa.Column("progress", sa.Double, comment="0 to 1, as the task reports it"),
    sa.Column("celery_id", sa.Text, comment="where the caller brought one"),
    sa.Column("reason", sa.Text),
    sa.Column("exit_code", sa.Integer),
    sa.Column("signal", sa.Integer),
    sa.Column("truncated", sa.Boolean, nullable=False, comment="output of the latest attempt was cut"),
    sa.Column("submitted_at", sa.Double, nullable=False),
    sa.Column("ready_at", sa.Double, comment="since when it may be claimed"),
    sa.Column("near_host", sa.Text, comment="where what it waited for has ended last"),
    sa.Column("started_at", sa.Double),
    sa.Column("finished_at", sa.Double),
    *_usage(),
    postgresql_with={"fillfactor": 85},
)
_ready = task.c.state == sa.literal_column("'ready'")
_active = task.c.state.in_([sa.literal_column("'claimed'"), sa.literal_column("'running'")])
_member = task.c.job_id != task.c.id
sa.Index(
    "ix_aque_task_ready",
    task.c.requirement_id,
    task.c.rank.desc(),
    task.c.duration.desc(),
    task.c.id,
    postgresql_where=_ready,
    sqlite_where=_ready,
)
sa.Index("ix_aque_task_active", task.c.worker_id, postgresql_where=_active, sqlite_where=_active)
sa.Index("ix_aque_task_job", task.c.job_id, postgresql_where=_member, sqlite_where=_member)
_child = task.c.parent_id.is_not(None)
sa.Index("ix_aque_task_parent", task.c.parent_id, postgresql_where=_child, sqlite_where=_child)
_timed = task.c.not_before.is_not(None)
sa.Index("ix_aque_task_not_before", task.c.not_before, postgresql_where=_timed, sqlite_where=_timed)
_expiring = task.c.expires_at.is_not(None)
sa.Index("ix_aque_task_expires", task.c.expires_at, postgresql_where=_expiring, sqlite_where=_expiring)
_named = task.c.celery_id.is_not(None)
sa.Index("ix_aque_task_celery_id", task.c.celery_id, unique=True, postgresql_where=_named, sqlite_where=_named)

payload = sa.Table(
    "aque_payload",
    metadata,
    sa.Column("task_id", Id, primary_key=True, autoincrement=False),
    sa.Column("function", sa.Text, nullable=False, comment="module:qualname"),
    sa.Column("arguments", sa.LargeBinary, nullable=False, comment="JSON of [args, kwargs]"),
    sa.Column(
        "inputs", sa.LargeBinary, nullable=False, comment="JSON list of the tasks whose results the arguments name"
    ),
    sa.Column("argv", sa.LargeBinary, nullable=False, comment="each word ended by NUL"),
    sa.Column("stdin", sa.LargeBinary, comment="null: /dev/null"),
    sa.Column("stdin_path", sa.LargeBinary, comment="in its place: a file, opened on the worker"),
    sa.Column("stdout_path", sa.LargeBinary, comment="null: captured"),
    sa.Column("stderr_path", sa.LargeBinary, comment="null: captured"),
    sa.Column("login", sa.Boolean, nullable=False, comment="run it in the user's login shell"),
    sa.Column("cwd", sa.LargeBinary, nullable=False),
    sa.Column("umask", sa.Integer, nullable=False),
    sa.Column("environment_id", sa.Text, comment="digest"),
    sa.Column("import_path", sa.LargeBinary, nullable=False, comment="JSON list"),
    sa.Column("io_paths", sa.LargeBinary, nullable=False, comment="each path ended by NUL"),
    sa.Column("time_limit_seconds", sa.Double),
    sa.Column("soft_time_limit_seconds", sa.Double),
    sa.Column("strict_lease", sa.Boolean, nullable=False, comment="killed on its host when the lease has ended there"),
    sa.Column("extra", sa.LargeBinary, nullable=False, comment="JSON object: whatever has no column of its own"),
    comment="what a task is: written once, read at the claim",
)

environment = sa.Table(
    "aque_environment",
    metadata,
    sa.Column("id", sa.Text, primary_key=True, comment="SHA-256 of the content"),
    sa.Column("content", sa.LargeBinary, nullable=False, comment="NAME=VALUE, each ended by NUL"),
)

edge = sa.Table(
    "aque_edge",
    metadata,
    sa.Column("upstream", Id, primary_key=True, autoincrement=False),
    sa.Column("downstream", Id, primary_key=True, autoincrement=False),
    sa.Column("condition", sa.Text, nullable=False, comment="ok, any, failed or error"),
    sa.Column("satisfied", sa.Boolean, nullable=False),
    postgresql_with={"fillfactor": 85},
)
sa.Index("ix_aque_edge_downstream", edge.c.downstream)

result = sa.Table(
    "aque_result",
    metadata,
    sa.Column("task_id", Id, primary_key=True, autoincrement=False),
    sa.Column("value", sa.LargeBinary, comment="JSON; no row at all: null"),
    sa.Column("error", sa.LargeBinary, comment="JSON object: type, message, traceback"),
)

progress = sa.Table(
    "aque_progress",
    metadata,
    sa.Column("task_id", Id, primary_key=True, autoincrement=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False, comment="a name of the task's own, as Celery's update_state has it"),
    sa.Column("meta", sa.LargeBinary, nullable=False, comment="JSON"),
    comment="what tasks have last told of themselves",
)

attempt = sa.Table(
    "aque_attempt",
    metadata,
    sa.Column("task_id", Id, primary_key=True, autoincrement=False),
    sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("worker_id", Id),
    sa.Column("state", sa.Text, nullable=False, comment="how it ended"),
    sa.Column("reason", sa.Text),
    sa.Column("exit_code", sa.Integer),
    sa.Column("signal", sa.Integer),
    sa.Column("started_at", sa.Double),
    sa.Column("finished_at", sa.Double),
    *_usage(),
    comment="attempts that another one followed; the latest is in the task's own row",
)

output = sa.Table(
    "aque_output",
    metadata,
    sa.Column("task_id", Id, primary_key=True, autoincrement=False),
    sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("fd", sa.Integer, primary_key=True, autoincrement=False, comment="1: stdout, 2: stderr"),
    sa.Column(
        "offset", sa.BigInteger, primary_key=True, autoincrement=False, comment="of the first byte in the stream"
    ),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

worker = sa.Table(
    "aque_worker",
    metadata,
    sa.Column("id", Id, primary_key=True, autoincrement=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False, comment="live, stopped or lost"),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("pid_started", sa.Double, nullable=False),
    sa.Column("boot_id", sa.Text, nullable=False),
    sa.Column("cpus", sa.Text, nullable=False, comment="a fraction"),
    sa.Column("memory_bytes", sa.BigInteger, nullable=False),
    sa.Column("python_slots", sa.Integer, nullable=False),
    sa.Column("command_slots", sa.Integer, nullable=False),
    sa.Column("queues", sa.Text, nullable=False, comment="JSON list"),
    sa.Column("platform", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("seen_at", sa.Double, nullable=False),
    sa.Column("lease_seconds", sa.Double, nullable=False),
    sa.Column("lease_until", sa.Double, nullable=False, comment="on the lease clock, see engine.lease_clock"),
    sa.Column("user", sa.Text, nullable=False, comment="whose tasks it runs; empty: whoever's, as itself"),
    sa.Column("switches_user", sa.Boolean, nullable=False, comment="it runs the tasks of other users as these"),
    sa.Column("containment", sa.Text, nullable=False, comment="how it keeps processes together"),
    sa.Column("draining", sa.Boolean, nullable=False, comment="claims nothing, as a person asked"),
    sa.Column("resources", sa.Text, nullable=False, comment="as in gpu=2,nuke=4"),
    sa.Column("tags", sa.Text, nullable=False, comment="JSON list"),
    sa.Column("missing_paths", sa.Text, nullable=False, comment="JSON object: a path that tasks require -> why not"),
    sa.Column("avoids", sa.Text, nullable=False, comment="JSON list: what it does not claim for a while, and why"),
)

limit = sa.Table(
    "aque_limit",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("capacity", sa.Integer, nullable=False),
    comment="farm-wide limits: of each name no more tokens are held than this",
)

token = sa.Table(
    "aque_token",
    metadata,
    sa.Column("limit_name", sa.Text, primary_key=True),
    sa.Column("slot", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("task_id", Id, comment="that holds it; null: free"),
    comment="a row for each token of a limit, so that many workers take some at once without waiting for each other",
    postgresql_with={"fillfactor": 70},
)
_held = token.c.task_id.is_not(None)
sa.Index("ix_aque_token_task", token.c.task_id, postgresql_where=_held, sqlite_where=_held)

reservation = sa.Table(
    "aque_reservation",
    metadata,
    sa.Column("task_id", Id, primary_key=True, autoincrement=False),
    sa.Column("worker_id", Id, nullable=False, unique=True),
    sa.Column("until", sa.Double, nullable=False, comment="on the lease clock, see engine.lease_clock"),
    comment="large tasks for which a worker keeps room: one worker for a task, one task for a worker",
)

run_time = sa.Table(
    "aque_run_time",
    metadata,
    sa.Column("name", sa.Text, primary_key=True, comment="digits are 0; empty: all runs; 1: all with a size"),
    sa.Column("runs", sa.BigInteger, nullable=False),
    sa.Column("seconds", sa.Double, nullable=False, comment="moving average of successful runs"),
    sa.Column("io_bytes", sa.Double, comment="moving average of the size of their io_paths; null: unknown"),
    sa.Column("updated_at", sa.Double, nullable=False),
    comment="how long tasks have run, by name",
)

refusal = sa.Table(
    "aque_refusal",
    metadata,
    sa.Column("task_id", Id, primary_key=True, autoincrement=False),
    sa.Column("host", sa.Text, primary_key=True),
    sa.Column("job_id", Id, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("refused_at", sa.Double, nullable=False),
    comment="hosts on which a task could not be started, through no fault of its own",
)

transition = sa.Table(
    "aque_transition",
    metadata,
    sa.Column("id", Id, primary_key=True, comment="rises in the order in which each task moved; gaps: rolled back"),
    sa.Column("task_id", Id, nullable=False),
    sa.Column("job_id", Id, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False, comment="that it moved to; ready or pending: another attempt follows"),
    sa.Column("reason", sa.Text),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("worker_id", Id),
    sa.Column("at", sa.Double, nullable=False),
    comment="what has happened to tasks, written by triggers (see aque/store/recording.py); append only",
    sqlite_autoincrement=True,  # or the ids of deleted rows would be used again
)

recording = sa.Table(
    "aque_recording",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False, comment="1: there is one row"),
    sa.Column("is_on", sa.Boolean, nullable=False, comment="transitions are recorded"),
    sa.Column("deleted_up_to", sa.BigInteger, nullable=False, comment="of transitions, by retention"),
)

cursor = sa.Table(
    "aque_cursor",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("position", sa.BigInteger, nullable=False, comment="the last transition that was handled"),
    sa.Column("holder", sa.Text, comment="the reader whose turn it is; null: nobody's"),
    sa.Column("until", sa.Double, comment="on the lease clock, see engine.lease_clock"),
    sa.Column("updated_at", sa.Double, nullable=False),
    comment="how far durable readers of transitions have come",
)
