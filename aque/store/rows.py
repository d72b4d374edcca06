"""Rows <-> values: what comes out of the tables, and how it is written in them."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

from aque.chooser import Place
from aque.resources import Capacity, parse_resources
from aque.states import Reason, State
from aque.values import ClaimedTask, Pattern, ReadyTask, Redirections, Requirement, WorkerInfo


@dataclass(slots=True)
class Released:
    """What a set of ended tasks set in motion."""

    ready: list[ReadyTask] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    groups: dict[int, State] = field(default_factory=dict)  #: groups that ended with their last member
    expired: list[int] = field(default_factory=list)  #: were not started in time
    closed: dict[int, State] = field(default_factory=dict)  #: tasks that ended with their last child
    freed: bool = False  #: tokens of limits, for which others may wait
    signalled: bool = False  #: workers have children to kill


@dataclass(slots=True)
class Finished(Released):
    """What became of a batch of outcomes."""

    ended: dict[int, State] = field(default_factory=dict)
    repeated: list[int] = field(default_factory=list)  #: another attempt follows, now or later
    waiting: list[int] = field(default_factory=list)  #: succeeded, and their children are open
    refused: list[int] = field(default_factory=list)  #: the claim no longer stands: nothing was written
    elsewhere: list[int] = field(default_factory=list)  #: of `repeated`: this host could not start them


@dataclass(slots=True)
class Killed(Released):
    """What a kill did, by id."""

    cancelled: list[int] = field(default_factory=list)  #: no process of theirs ran
    requested: list[int] = field(default_factory=list)  #: their workers will signal them
    spared: list[int] = field(default_factory=list)  #: reached, and left to others that still need them
    untouched: dict[int, State] = field(default_factory=dict)  #: complete already, or nothing to signal


@dataclass(frozen=True, slots=True)
class Kill:
    """A kill that a worker has yet to carry out."""

    id: int
    attempt: int
    token: int
    signal: int
    grace_seconds: float | None  #: until SIGKILL; None: the worker's setting


@dataclass(frozen=True, slots=True)
class Orders:
    """What people want of a worker."""

    draining: bool  #: to claim nothing
    kills: list[Kill]  #: that it has yet to carry out


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A task's end as stored."""

    id: int
    name: str
    state: State
    reason: Reason | None
    exit_code: int | None
    signal: int | None
    pattern: Pattern
    finished_at: float | None
    value: bytes | None
    error: bytes | None
    failed: int = 0  #: attempts
    parent_id: int | None = None
    has_children: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """What Celery's extended results tell of a task beside its end."""

    arguments: bytes | None  #: JSON of [args, kwargs]; None: not a function's
    queue: str | None
    worker: str | None


@dataclass(frozen=True, slots=True)
class Inherited:
    """What a task's children have of it unless they say otherwise."""

    requirement: Requirement
    priority: int


@dataclass(frozen=True, slots=True)
class KnownCall:
    """A task that was submitted under a Celery id, and what it calls."""

    id: int
    state: State
    function: str
    arguments: bytes
    argv: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker as registered; `expired_seconds` ago its lease ended (negative: it holds), `unseen_seconds` ago it renewed."""

    info: WorkerInfo
    state: str
    started_at: float
    seen_at: float
    lease_until: float
    expired_seconds: float
    unseen_seconds: float
    draining: bool  #: claims nothing, as a person asked
    missing_paths: Mapping[bytes, str] = field(default_factory=dict)  #: that tasks require, its host has not -> why
    avoids: tuple[str, ...] = ()  #: what it does not claim for a while, as sentences

    @property
    def is_live(self) -> bool:
        """True while its lease holds and it has not stopped."""
        return self.state == "live" and self.expired_seconds < 0

    @property
    def place(self) -> Place:
        """The worker as the choice sees it."""
        info = self.info
        resources = parse_resources(info.resources)
        whole = Capacity(Fraction(info.cpus), info.memory_bytes, info.python_slots, info.command_slots, resources)
        return Place(
            info.host,
            info.platform,
            frozenset(info.queues),
            whole,
            info.user,
            info.switches_user,
            self.draining,
            frozenset(info.tags),
            self.missing_paths,
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken invariant and the tasks (or workers, or names of limits) that break it."""

    rule: str
    ids: tuple[int | str, ...]


def requirement_key(requirement: Requirement) -> dict[str, Any]:
    """Its columns, with the digest that says whether two are equal."""
    key: dict[str, Any] = {name: getattr(requirement, name) for name in Requirement.__slots__}
    key["pattern"] = str(requirement.pattern)
    for name in ("requires_paths", "places"):
        key[name] = join(key[name])
    text = "\0".join(f"{name}={value!r}" for name, value in sorted(key.items()))
    return key | {"digest": hashlib.sha256(text.encode()).hexdigest()}


def requirement_of(row: Any) -> Requirement:
    columns = {name: getattr(row, name) for name in Requirement.__slots__}
    columns["pattern"] = Pattern(row.pattern)
    for name in ("requires_paths", "places"):
        columns[name] = split(columns[name])
    return Requirement(**columns)


@lru_cache(maxsize=16)
def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@lru_cache(maxsize=64)
def to_json_list(values: tuple[Any, ...]) -> bytes:
    """The same few lists stand in many rows of a graph."""
    return to_json(values)


def to_json(value: Any) -> bytes:
    return json.dumps(dict(value) if isinstance(value, Mapping) else list(value), separators=(",", ":")).encode()


def join(words: Iterable[bytes]) -> bytes:
    return b"".join(word + b"\0" for word in words)


def split(joined: bytes) -> tuple[bytes, ...]:
    return tuple(bytes(joined).split(b"\0")[:-1])


def from_json_list(text: bytes) -> tuple[Any, ...]:
    """A JSON list; empty for one that cannot be read: the task will say what it misses, and the worker goes on."""
    try:
        return tuple(json.loads(text)) if text else ()
    except (ValueError, TypeError):
        return ()


def claimed_task(row: Any, token: int) -> ClaimedTask:
    return ClaimedTask(
        id=row.id,
        attempt=row.attempt,
        token=token,
        class_id=row.requirement_id,
        name=row.name,
        pattern=Pattern(row.pattern),
        queue=row.queue,
        priority=row.priority,
        function=row.function,
        arguments=bytes(row.arguments),
        inputs=from_json_list(row.inputs),
        argv=split(row.argv),
        stdin=optional_bytes(row.stdin),
        redirections=Redirections(
            optional_bytes(row.stdin_path), optional_bytes(row.stdout_path), optional_bytes(row.stderr_path)
        ),
        login=row.login,
        cwd=bytes(row.cwd),
        umask=row.umask,
        environment=bytes(row.environment or b""),
        import_path=from_json_list(row.import_path),
        user=row.user,
        interpreter=row.interpreter,
        parent_id=row.parent_id,
        job_id=row.job_id,
        celery_id=row.celery_id,
        max_attempts=row.max_attempts,
        time_limit_seconds=row.time_limit_seconds,
        soft_time_limit_seconds=row.soft_time_limit_seconds,
        strict_lease=row.strict_lease,
        duration=row.duration,
        io_bytes=row.io_bytes,
        dependents=row.dependents,
        failed=row.failed,
        extra=json.loads(row.extra) if row.extra else {},
    )


def stored_results(rows: Iterable[Any]) -> dict[int, StoredResult]:
    return {
        row.id: StoredResult(
            row.id,
            row.name,
            State(row.state),
            None if row.reason is None else Reason(row.reason),
            row.exit_code,
            row.signal,
            Pattern(row.pattern),
            row.finished_at,
            optional_bytes(row.value),
            optional_bytes(row.error),
            row.failed,
            row.parent_id,
            bool(row.has_children),
        )
        for row in rows
    }


def optional_bytes(value: Any) -> bytes | None:
    return None if value is None else bytes(value)


def worker_row(row: Any) -> WorkerRow:
    info = {name: getattr(row, name) for name in WorkerInfo.__slots__}
    info["queues"] = tuple(json.loads(row.queues))
    info["tags"] = tuple(json.loads(row.tags))
    return WorkerRow(
        WorkerInfo(**info),
        row.state,
        row.started_at,
        row.seen_at,
        row.lease_until,
        row.expired,
        row.unseen,
        row.draining,
        {os.fsencode(path): why for path, why in json.loads(row.missing_paths).items()},
        tuple(json.loads(row.avoids)),
    )
