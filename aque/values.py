"""One task at four moments: as submitted, as ready, as claimed, and its outcome. Frozen; no behaviour."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from aque.states import Reason, State


class Pattern(StrEnum):
    """How a task runs."""

    SHELL = "shell"  #: a command
    PYTHON = "python"  #: a function, in the worker's process pool
    GROUP = "group"  #: nothing of its own: it ends when its members have


#: In place of a program: the worker's own Python, in a process of its own.
OWN_INTERPRETER = "worker"


class Condition(StrEnum):
    """What a dependency must have done for the dependent to start."""

    OK = "ok"  #: succeeded
    ANY = "any"  #: completed, however
    FAILED = "failed"  #: completed in any other state than success
    ERROR = "error"  #: ended in error itself: neither killed, withdrawn nor skipped


class Children(StrEnum):
    """What becomes of a task's children, which it submits while it runs, when its own process has ended."""

    WAIT = "wait"  #: the task is `waiting` until they have ended, and succeeds if they all do
    DETACH = "detach"  #: they are nothing to it
    CANCEL = "cancel"  #: they are killed


@dataclass(frozen=True, slots=True)
class Dependency:
    """One edge into a task."""

    upstream: int
    condition: Condition = Condition.OK


@dataclass(frozen=True, slots=True)
class Redirections:
    """Files in place of a command's captured streams, opened as its user, below its working directory; None: captured."""

    stdin: bytes | None = None
    stdout: bytes | None = None
    stderr: bytes | None = None


NO_REDIRECTIONS = Redirections()


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a task needs of a worker: tasks with equal requirements form a requirement class, claimed together."""

    queue: str
    pattern: Pattern
    cpus: str = "1"  #: as requested; see `resources.CpuRequest`
    memory_bytes: int = 0
    host: str = ""  #: comma-separated globs, `!` excludes; empty: any host
    platform: str = ""  #: as `sys.platform`; empty: any
    user: str = ""  #: whose processes it runs; empty: the worker's own
    interpreter: str = ""  #: PYTHON: the program that runs it, or OWN_INTERPRETER; empty: a child of the worker's pool
    resources: str = ""  #: custom resources of the worker, canonical: see `resources.parse_resources`
    limits: str = ""  #: tokens of farm-wide limits, canonical: see `resources.parse_limits`
    tags: str = ""  #: that the worker must have, sorted, with commas; `!` excludes
    requires_paths: tuple[bytes, ...] = ()  #: that the host must have
    places: tuple[bytes, ...] = ()  #: files, directories or mount points that stand for its `io_paths`, few in number


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """A task as submitted. `id` comes from the store (`reserve_ids`), before anything is written."""

    id: int
    name: str
    requirement: Requirement
    priority: int = 0  #: higher first
    age_rank: int = 0  #: added to the priority: what its age is worth, see setting priority_per_hour
    duration: float = 0.0  #: expected seconds; 0: what past runs say
    relative_duration: float = 0.0  #: in its place: so many times the average of its priority
    not_before: float | None = None  #: it stays pending until then (seconds since 1970)
    expires_at: float | None = None  #: not started by then (seconds since 1970), it is cancelled
    children: Children = Children.WAIT
    function: str = ""  #: PYTHON: "module:qualname", or "@name" of a task that the worker's Celery app has registered
    arguments: bytes = b""  #: PYTHON: JSON of [args, kwargs]
    #: PYTHON: tasks whose results the arguments name. GROUP: members whose results make its own, in order
    inputs: tuple[int, ...] = ()
    argv: tuple[bytes, ...] = ()  #: SHELL
    stdin: bytes | None = None  #: SHELL; None: /dev/null
    redirections: Redirections = NO_REDIRECTIONS  #: SHELL
    login: bool = False  #: SHELL: in the user's login shell
    cwd: bytes = b"/"
    umask: int = 0o022
    environment: bytes = b""  #: NAME=VALUE, each ended by NUL; empty for PYTHON that only a pool may run
    import_path: tuple[str, ...] = ()  #: PYTHON: the submitter's, for the message when the import fails on a worker
    io_paths: (
        tuple[bytes, ...] | None
    ) = ()  #: absolute; None: SHELL, those of its words that are paths, see `Submitter.submit`
    io_bytes: int = 0  #: their size, as the submitter sees it; 0: unknown
    dependencies: tuple[Dependency, ...] = ()
    job_id: int | None = None  #: None: its own job
    parent_id: int | None = None
    layer: str = ""  #: display label; empty: the name
    seq: int = 0  #: position within the job
    max_attempts: int = 1
    requeue: bool = True  #: False: a lost attempt is the last
    time_limit_seconds: float | None = None
    soft_time_limit_seconds: float | None = None  #: SHELL: SIGTERM; PYTHON: SoftTimeLimitExceeded
    strict_lease: bool = False  #: killed on its host when its worker's lease has ended there
    submitter: str = ""
    celery_id: str | None = None
    #: what has no column: "headers", "stamps" and "stamped_headers" as Celery's messages have them, "ignore_result",
    #: "errbacks": signatures
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReadyTask:
    """A task that may be claimed, with what the choice needs."""

    id: int
    class_id: int
    priority: int  #: with what age adds
    duration: float
    name: str
    ready_at: float = 0.0  #: since when, in seconds since 1970
    job_id: int = 0
    near_host: str = ""  #: where what it waited for has ended last; empty: it waited for nothing


@dataclass(frozen=True, slots=True)
class ClaimedTask:
    """A task that this worker owns until it finishes, gives back or loses it: everything that running it needs.

    `(id, attempt, token)` is the claim: every write about the task carries it.
    """

    id: int
    attempt: int
    token: int
    class_id: int
    name: str
    pattern: Pattern
    queue: str
    priority: int
    function: str
    arguments: bytes
    inputs: tuple[int, ...]
    argv: tuple[bytes, ...]
    stdin: bytes | None
    redirections: Redirections
    login: bool
    cwd: bytes
    umask: int
    environment: bytes
    import_path: tuple[str, ...]
    user: str
    interpreter: str
    parent_id: int | None
    job_id: int
    celery_id: str | None
    max_attempts: int
    time_limit_seconds: float | None
    soft_time_limit_seconds: float | None
    strict_lease: bool
    duration: float  #: expected seconds; 0: unknown
    io_bytes: int
    #: edges out of it, when it was claimed
    dependents: int
    #: results of `inputs`, as stored
    results: Mapping[int, bytes] = field(default_factory=dict)
    failed: int = 0  #: attempts that ended in error or asked to be repeated: Celery's `retries`
    extra: Mapping[str, Any] = field(default_factory=dict)  #: see TaskSpec


@dataclass(frozen=True, slots=True)
class Usage:
    """What an attempt has used, with all of its processes that somebody waited for."""

    cpu_seconds: float  #: user and system time
    max_rss_bytes: int  #: of the largest process
    read_bytes: int  #: from disks and servers; what was in the page cache is not counted
    written_bytes: int  #: to disks and servers, when it was written to the page cache


@dataclass(frozen=True, slots=True)
class HostFailure:
    """The host could not start a task, through no fault of the task's: another host may."""

    class_id: int
    job_id: int
    reason: Reason
    why: str  #: as a sentence part, as in `cannot enter /shots/a: No such file or directory`


@dataclass(frozen=True, slots=True)
class Again:
    """An attempt asks for another one, however many there were: Celery's `self.retry`."""

    after_seconds: float = 0.0
    arguments: bytes | None = None  #: with these from now on; None: with the same
    counts: bool = True  #: as a failed attempt
    priority: int | None = None  #: from now on; None: the same
    class_id: int | None = None  #: of its requirement from now on; None: the same


@dataclass(frozen=True, slots=True)
class Replacement:
    """What takes a task's place, in its row and under its id: Celery's `self.replace`."""

    name: str
    function: str
    arguments: bytes
    inputs: tuple[int, ...]
    dependencies: tuple[Dependency, ...]  #: in the table already
    class_id: int | None = None  #: of its requirement; None: that of the row


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended. `value` and `error` are encoded JSON, already within the result limit."""

    id: int
    attempt: int
    token: int
    state: State
    reason: Reason | None = None
    exit_code: int | None = None
    signal: int | None = None
    ran_seconds: float = 0.0
    value: bytes | None = None
    error: bytes | None = None
    truncated: bool = False  #: output was cut
    ended: float | None = None  #: when, on this process's monotonic clock; None: now
    usage: Usage | None = None  #: None: not measured
    host_failure: HostFailure | None = None  #: the end is the host's, not the task's
    again: Again | None = None  #: state ERROR: it is to be repeated
    replacement: Replacement | None = None  #: state PENDING: its row gets another task to run


#: Of a worker whose functions run in its own process.
NO_KILLS = "functions run in the worker: no kills, no time limits"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker process: what it is and what it has. `id` is one incarnation; a restart is a new worker."""

    id: int
    name: str
    host: str
    pid: int
    pid_started: float  #: seconds since 1970; with `pid` and `boot_id` it names one process for ever
    boot_id: str
    cpus: str  #: a fraction such as "2" or "3/2"
    memory_bytes: int
    python_slots: int
    command_slots: int
    queues: tuple[str, ...]
    platform: str
    version: str
    lease_seconds: float
    user: str  #: whose tasks it runs; empty: whoever's, as itself (a store of one person)
    switches_user: bool  #: it runs the tasks of other users as these
    containment: str  #: how it keeps processes together, for people; NO_KILLS in it: no functions
    resources: str = ""  #: as in gpu=2,nuke=4
    tags: tuple[str, ...] = ()
