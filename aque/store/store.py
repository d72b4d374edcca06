"""Rows <-> values: what the rest of Aque asks of the tables. Methods take an open connection; those that write several
rows belong inside `transaction(connection)`.

Every write by a worker carries its claim, (task, attempt, token): a worker that stalled past its lease finds 0 rows.
"""

import hashlib
import json
import math
import os
import signal as signals
import socket
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa

from aque import deps
from aque.backoff import NOTHING_AVOIDED, Avoided
from aque.chooser import Place, weight
from aque.errors import BadInput, BadStateDirectory, UnknownTask
from aque.resources import Capacity, CpuRequest, parse_resources
from aque.settings import Settings
from aque.states import COMPLETE_STATES, ENDING_SIGNALS, Reason, State
from aque.store import schema
from aque.store import statements as sql
from aque.store.changes import Changes
from aque.store.engine import (
    attempt_write,
    copy_rows,
    inside_transaction,
    open_engine,
    reachable,
    transaction,
    why_not_personal,
)
from aque.store.explanations import Explanations
from aque.store.groups import Groups, in_turn
from aque.store.limits import Limits
from aque.store.refusals import Refusals
from aque.store.reservations import Reservations, ready_task
from aque.store.retention import KNOWN_SECONDS, Retention, environment_id
from aque.store.run_times import RunTimes
from aque.store.tables import edge, payload, task
from aque.store.transitions import Transitions
from aque.values import (
    Children,
    ClaimedTask,
    Dependency,
    Outcome,
    Pattern,
    ReadyTask,
    Redirections,
    Requirement,
    TaskSpec,
    Usage,
    WorkerInfo,
)

#: How long a reading of the database's clock is good for.
CLOCK_SECONDS = 60.0
#: Of a command's stdout, as dependents and `.get()` see it.
STDOUT_LIMIT = 64 << 10
#: So many pieces of captured output are read at a time.
PIECES = 64
#: From this many rows on COPY is faster than an INSERT with its parameters.
COPY_FROM = 100
#: Requirement classes kept in memory: with a place of their own, files make many in the course of time.
CLASSES_KEPT = 10_000
#: See `Store.is_crowded`.
MOST_CLASSES = 256


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


def unchecked_store(settings: Settings) -> "Store":
    """The store of this farm for who has used it a moment ago: it need not be reachable just now."""
    return Store(open_engine(settings.store_url))


def open_store(settings: Settings, **engine_options: Any) -> "Store":
    """The store of this farm, checked: reachable and of the version that this Aque uses. A fresh SQLite file gets its
    tables here; on PostgreSQL `aque init` makes them. Raises a StoreError."""
    if settings.broker.startswith("sqlite:"):
        directory = Path(unquote(urlsplit(settings.store_url).path)[1:]).parent
        if not directory.is_dir():  # the default directory is made; one that was named may be a slip
            raise BadStateDirectory(
                f"AQUE_BROKER names a file in {directory}, which does not exist. Make the directory first."
            )
    engine = open_engine(settings.store_url, **engine_options)
    store = Store(engine)
    with store.connect() as connection:
        # Not by the file's size: another process may be about to create the tables just now.
        is_fresh = engine.dialect.name == "sqlite" and schema.is_empty(connection)
    if is_fresh:
        schema.upgrade(engine)
    with store.connect() as connection:
        schema.check(connection)
    return store


class Store:
    """The tables of one farm. Safe to share between threads; every thread opens a connection of its own."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.dialect = engine.dialect.name
        self.limits = Limits(self.dialect)
        self.groups = Groups(self.dialect)
        self.host = socket.gethostname()
        #: Where the tasks have run whose ends this process records, if it is a worker's.
        self.worker_host = ""
        self.reservations = Reservations(self.dialect)
        self.explanations = Explanations(self.dialect)
        self.changes = Changes(self.dialect)
        self.refusals = Refusals(self.dialect)
        self.retention = Retention(engine)
        self._requirement_ids: dict[Requirement, int] = {}
        self._looked_up: dict[Requirement, float] = {}  # when, in seconds since 1970
        self._requirements: dict[int, Requirement] = {}
        self._environment_ids: dict[str, str] = {}  # by digest
        self._clock = (-math.inf, 0.0)
        self.run_times = RunTimes(self.dialect)
        self.transitions = Transitions(self.dialect)

    @contextmanager
    def connect(self) -> Iterator[sa.Connection]:
        """A connection in autocommit mode; StoreUnreachable if there is none to be had, or it breaks."""
        with reachable(self.engine), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A connection inside one write transaction."""
        with self.connect() as connection, transaction(connection):
            yield connection

    def why_not_personal(self) -> str | None:
        """Why an SQLite store is not its user's alone, as a sentence part; None if it is."""
        return why_not_personal(Path(self.engine.url.database or ""))

    def close(self) -> None:
        """Close the pooled connections."""
        self.engine.dispose()

    # -- submit -------------------------------------------------------------------------------------------------------

    def reserve_ids(self, connection: sa.Connection, count: int) -> list[int]:
        """`count` ids that no other task has or will have, rising."""
        rows = connection.execute(sql.reserve_ids(self.dialect), {"count": count}).scalars().all()
        if self.dialect == "sqlite":
            return list(range(rows[0] - count + 1, rows[0] + 1))
        return sorted(rows)

    def submit(
        self, connection: sa.Connection, specs: Sequence[TaskSpec], durations: Mapping[int, float] | None = None
    ) -> dict[int, State]:
        """Insert these tasks and their edges, all or nothing, inside the caller's transaction; their first states.
        `durations` are expected seconds by id, in place of what the specs say.

        Raises Cycle or UnknownTask, and then nothing has been written.
        """
        graph: dict[int, Sequence[Dependency]] = {spec.id: spec.dependencies for spec in specs}
        dependents = Counter(d.upstream for spec in specs for d in spec.dependencies)
        states = self._add_dependents(connection, {i: n for i, n in dependents.items() if i not in graph})
        groups = [s.id for s in specs if s.requirement.pattern is Pattern.GROUP]
        starts = deps.starts(graph, groups, states, [s.id for s in specs if s.not_before is not None])
        # One that is skipped from the start never ends, and nobody is to wait for that.
        open_specs = [spec for spec in specs if starts[spec.id].state not in COMPLETE_STATES]
        children = Counter(spec.parent_id for spec in open_specs if spec.parent_id is not None)
        self._add_children(connection, {i: n for i, n in children.items() if i not in graph})
        everything = {**states, **{task_id: start.state for task_id, start in starts.items()}}
        now = self._wall(connection, time.monotonic())
        task_rows, payload_rows, edge_rows = [], [], []
        durations = durations or {}
        for spec in specs:
            start = starts[spec.id]
            duration = durations.get(spec.id, spec.duration)
            task_rows.append(self._task_row(spec, start, dependents[spec.id], children[spec.id], duration, now))
            if spec.requirement.pattern is not Pattern.GROUP or spec.inputs:
                payload_rows.append(self._payload_row(spec))
            edge_rows += [
                (d.upstream, spec.id, str(d.condition), deps.is_satisfied(d.condition, everything[d.upstream]))
                for d in spec.dependencies
            ]
        if self.is_one_statement(specs):
            values = dict(zip((f"t_{name}" for name in _TASK_COLUMNS), task_rows[0], strict=True))
            values |= zip((f"p_{name}" for name in _PAYLOAD_COLUMNS), payload_rows[0], strict=True)
            connection.execute(sql.add_task(), _NOTHING_YET | values)
            return {specs[0].id: starts[specs[0].id].state}
        self._insert(connection, task, _TASK_COLUMNS, task_rows)
        self._insert(connection, payload, _PAYLOAD_COLUMNS, payload_rows)
        self._insert(connection, edge, _EDGE_COLUMNS, edge_rows)
        return {task_id: start.state for task_id, start in starts.items()}

    def is_one_statement(self, specs: Sequence[TaskSpec]) -> bool:
        """True if `submit` sends one statement for these: it needs no transaction around it, which is two round trips."""
        if len(specs) != 1 or self.dialect != "postgresql":
            return False
        spec = specs[0]
        return not spec.dependencies and spec.parent_id is None and spec.requirement.pattern is not Pattern.GROUP

    def now(self, connection: sa.Connection) -> float:
        """Seconds since 1970 on the database's clock, as far as it was read within the last minute."""
        return self._wall(connection, time.monotonic())

    def _wall(self, connection: sa.Connection, monotonic: float) -> float:
        """A moment of this process's monotonic clock in seconds since 1970, as the database's clock has it.

        That clock is read once a minute: a round trip for each task would cost more, and so the times that one worker writes
        are in the order in which things happened.
        """
        read, wall = self._clock
        if not 0 <= time.monotonic() - read < CLOCK_SECONDS:
            wall, read = connection.execute(sql.now()).scalar_one(), time.monotonic()
            self._clock = (read, wall)
        return wall + (monotonic - read)

    def intern(self, connection: sa.Connection, specs: Iterable[TaskSpec]) -> None:
        """Make sure that the requirement classes and environments of `specs` have rows. Outside of the submission's own
        transaction, so that two submitters of the same class never wait for each other."""
        wanted = {spec.requirement for spec in specs if spec.requirement.pattern is not Pattern.GROUP}
        self.requirement_ids(connection, wanted)
        for content in {spec.environment for spec in specs if spec.environment}:
            digest = _digest(content)
            new = environment_id(digest, self.now(connection))
            if self._environment_ids.get(digest) != new:
                connection.execute(sql.add_environment(self.dialect), {"id": new, "content": content})
                self._environment_ids[digest] = new

    def requirement_ids(self, connection: sa.Connection, wanted: Iterable[Requirement]) -> dict[Requirement, int]:
        """The classes of these requirements, made if there are none, outside of any transaction: see `intern`."""
        known = self._requirement_ids
        found = {}
        for requirement in wanted:
            # Not for ever: one that nobody has used for long may have been removed, see `retention`. By the wall clock,
            # which goes on while the machine sleeps.
            now = time.time()
            if not 0 <= now - self._looked_up.get(requirement, -math.inf) < KNOWN_SECONDS:
                known[requirement] = self._requirement_id(connection, requirement)
                self._looked_up[requirement] = now
            found[requirement] = known[requirement]
        return found

    def is_crowded(self, connection: sa.Connection, requirements: Iterable[Requirement]) -> bool:
        """True if some of these classes have places and are new, while so many classes with places have ready tasks that
        more of them would make every claim slower."""
        new = {r for r in requirements if r.places and r not in self._requirement_ids}
        digests = [_requirement_key(requirement)["digest"] for requirement in new]
        if not new or connection.execute(sql.known_digests(), {"digests": digests}).scalar_one() == len(new):
            return False
        return bool(connection.execute(sql.ready_classes_with_places(self.dialect)).scalar_one() > MOST_CLASSES)

    def _requirement_id(self, connection: sa.Connection, requirement: Requirement) -> int:
        key = _requirement_key(requirement)
        found = connection.execute(sql.find_requirement(), key).scalar()
        if found is None:
            (new,) = self.reserve_ids(connection, 1)
            connection.execute(sql.add_requirement(self.dialect), {"id": new, **key})
            found = connection.execute(sql.find_requirement(), key).scalar_one()
        return int(found)

    def _add_dependents(self, connection: sa.Connection, counts: Mapping[int, int]) -> dict[int, State]:
        if not counts:
            return {}
        rows = json.dumps([{"id": i, "n": n} for i, n in sorted(counts.items())])
        found = connection.execute(sql.add_dependents(self.dialect), {"rows": rows})
        states = {row.id: State(row.state) for row in found}
        if missing := [i for i in sorted(counts) if i not in states]:
            raise UnknownTask(missing)
        return states

    def _add_children(self, connection: sa.Connection, counts: Mapping[int, int]) -> None:
        """Tasks get so many more children. Raises BadInput for those that have ended."""
        if not counts:
            return
        rows = json.dumps([{"id": i, "n": n} for i, n in sorted(counts.items())])
        found = set(connection.execute(sql.add_children(self.dialect), {"rows": rows}).scalars())
        if missing := [i for i in counts if i not in found]:
            raise BadInput(
                f"task {missing[0]}, whose child this would be, has ended or is being killed. Nothing was submitted."
            )

    def _task_row(
        self, spec: TaskSpec, start: deps.Start, dependents: int, children: int, duration: float, now: Any
    ) -> tuple[Any, ...]:
        is_group = spec.requirement.pattern is Pattern.GROUP
        reason = {State.SKIPPED: Reason.DEPENDENCY, State.ERROR: Reason.DEPENDENCY}.get(start.state)
        return (
            spec.id,
            str(start.state),
            None if is_group else self._requirement_ids[spec.requirement],
            spec.priority,
            spec.priority + spec.age_rank,
            duration,
            spec.not_before if start.state is State.PENDING else None,
            spec.expires_at if start.state not in COMPLETE_STATES else None,
            spec.io_bytes,
            start.unmet,
            dependents,
            0,
            0,
            0,
            0,
            spec.max_attempts,
            spec.requeue,
            False,
            spec.name,
            str(spec.requirement.pattern),
            spec.id if spec.job_id is None else spec.job_id,
            spec.layer or spec.name,
            spec.parent_id,
            str(spec.children),
            0 if spec.children is Children.DETACH else children,
            0,
            False,
            spec.seq,
            spec.submitter,
            spec.celery_id,
            None if reason is None else str(reason),
            now,
            now if start.state is State.READY else None,
            now if start.state in COMPLETE_STATES else None,
        )

    def _payload_row(self, spec: TaskSpec) -> tuple[Any, ...]:
        return (
            spec.id,
            spec.function,
            spec.arguments,
            _json(spec.inputs) if spec.inputs else b"",
            _join(spec.argv),
            spec.stdin,
            spec.redirections.stdin,
            spec.redirections.stdout,
            spec.redirections.stderr,
            spec.login,
            spec.cwd,
            spec.umask,
            self._environment_ids[_digest(spec.environment)] if spec.environment else None,
            _json_list(spec.import_path) if spec.import_path else b"",
            _join(spec.io_paths or ()),
            spec.time_limit_seconds,
            spec.soft_time_limit_seconds,
            spec.strict_lease,
            _json(spec.extra) if spec.extra else b"",
        )

    def _insert(self, connection: sa.Connection, table: sa.Table, columns: Sequence[str], rows: list[Any]) -> None:
        if len(rows) >= COPY_FROM:
            copy_rows(connection, table, columns, rows)
        elif rows:
            connection.execute(sa.insert(table), [dict(zip(columns, row, strict=True)) for row in rows])

    # -- claim --------------------------------------------------------------------------------------------------------

    def requirements(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, Requirement]:
        """Requirement classes by id; they never change, so each is read once."""
        wanted = list(ids)
        if len(self._requirements) > CLASSES_KEPT:
            self._requirements = {}
        if unknown := [i for i in wanted if i not in self._requirements]:
            for row in connection.execute(sql.requirements(self.dialect), {"ids": unknown}):
                self._requirements[row.id] = _requirement(row)
        return {i: self._requirements[i] for i in wanted}

    def candidates(
        self,
        connection: sa.Connection,
        unfit: Iterable[int],
        limit: int,
        avoided: Avoided = NOTHING_AVOIDED,
        names: Collection[str] = (),
    ) -> dict[int, list[ReadyTask]]:
        """Up to `limit` ready tasks of each requirement class, best first within a class, but for the classes in `unfit` and
        what is `avoided`, or has one of these `names`."""
        parameters = {"unfit": [*unfit, *avoided.classes], "limit": limit}
        by_class: dict[int, list[ReadyTask]] = {}
        if left_out := bool(avoided.tasks or avoided.jobs or names):
            parameters |= {"tasks": list(avoided.tasks), "jobs": list(avoided.jobs), "names": list(names)}
        for row in connection.execute(sql.candidates(self.dialect, left_out), parameters):
            by_class.setdefault(row.requirement_id, []).append(ready_task(row))
        for ready in by_class.values():  # the join gives them in no promised order
            ready.sort(key=lambda t: (-t.priority, -t.duration, t.id))
        return by_class

    def claim(
        self,
        connection: sa.Connection,
        ids: Sequence[int],
        worker_id: int,
        token: int,
        state: State,
        *,
        limits: Mapping[int, Mapping[str, int]] | None = None,
    ) -> list[ClaimedTask]:
        """Give those of `ids` that are still ready to the worker, in the order of `ids`. Others may have been faster.

        `limits` says what of them must hold which tokens of farm-wide limits (task -> name -> how many): it is left ready if
        they are not to be had. All in one transaction, the caller's if there is one.
        """
        wanted = {i: limits[i] for i in ids if limits.get(i)} if limits else {}
        if not wanted:
            return self._claim(connection, ids, worker_id, token, state, {})
        with inside_transaction(connection):
            # Tokens first: where they are short, nobody's rows are locked for nothing.
            taken = self.limits.take(connection, wanted)
            ids = [i for i in ids if i not in wanted or i in taken]
            held = {i: len(tokens) for i, tokens in taken.items() if tokens}
            claimed = self._claim(connection, ids, worker_id, token, state, held)
            got = {task.id for task in claimed}
            self.limits.undo(connection, [held for i, tokens in taken.items() if i not in got for held in tokens])
        return claimed

    def _claim(
        self,
        connection: sa.Connection,
        ids: Sequence[int],
        worker_id: int,
        token: int,
        state: State,
        held: Mapping[int, int],
    ) -> list[ClaimedTask]:
        if not ids:
            return []
        parameters: dict[str, Any] = {
            "ids": list(ids),
            "to_worker": worker_id,
            "new_token": token,
            "to_state": str(state),
        }
        parameters["starts_at"] = self._wall(connection, time.monotonic()) if state is State.RUNNING else None
        if held:
            parameters["held"] = json.dumps([{"id": i, "n": n} for i, n in held.items()])
        rows = connection.execute(sql.claim(self.dialect, bool(held)), parameters).all()
        if self.dialect == "sqlite" and rows:
            moved = [row.id for row in rows]
            rows = connection.execute(sql.claimed_tasks(self.dialect), {"ids": moved}).all()
        position = {task_id: index for index, task_id in enumerate(ids)}
        return sorted((_claimed(row, token) for row in rows), key=lambda t: position[t.id])

    def usage(self, connection: sa.Connection) -> dict[str, Fraction]:
        """The CPUs that run for each user on the whole farm, as `chooser.weight` counts them."""
        found: dict[str, Fraction] = {}
        for row in connection.execute(sql.usage()):
            cpus = weight(CpuRequest.parse(row.cpus).share(Fraction(row.worker_cpus))) * row.n
            found[row.user] = found.get(row.user, Fraction(0)) + cpus
        return found

    def values(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, bytes]:
        """The results of these tasks as JSON: `null` where there is none, a command's end and stdout for a command, the list
        of its members' for a group of a canvas. Of one that did not succeed: what is known of its failure, an object."""
        wanted = list(ids)
        found: dict[int, bytes] = {}
        order: dict[int, list[int]] = {}
        asked: Collection[int] = wanted
        while asked:
            groups = []
            for row in connection.execute(sql.results(self.dialect), {"ids": list(asked)}).all():
                if row.state in _ENDED_BADLY:
                    found[row.id] = self._failure(connection, row)
                elif row.pattern == Pattern.SHELL:
                    found[row.id] = self._command_result(connection, row)
                elif row.pattern == Pattern.GROUP:
                    groups.append(row.id)
                else:
                    found[row.id] = b"null" if row.value is None else bytes(row.value)
            members = self.groups.members(connection, groups) if groups else {}
            found |= {i: b"null" for i in groups if i not in members}
            order |= members
            asked = {i for group in members.values() for i in group if i not in found and i not in order}
        for group in in_turn(order):
            found[group] = b"[" + b",".join(found.get(i, b"null") for i in order[group]) + b"]"
        return {i: found[i] for i in wanted if i in found}

    def _failure(self, connection: sa.Connection, row: Any) -> bytes:
        """{"state", "reason", "type", "message", "traceback"}; of a group, or a skipped task, the failure that caused it,
        and the id of the task that failed as "cause"."""
        cause = None
        if row.pattern == Pattern.GROUP or row.state == State.SKIPPED:
            cause = self.groups.cause(connection, row.id)
            if cause is not None:
                row = connection.execute(sql.results(self.dialect), {"ids": [cause]}).one()
        fields = json.loads(row.error) if row.error else {}
        shown = {"state": row.state, "reason": row.reason, "name": row.name, "cause": row.celery_id or str(row.id)}
        return json.dumps(fields | shown).encode()

    def _command_result(self, connection: sa.Connection, row: Any) -> bytes:
        """{"exit_code", "stdout", "truncated"}: what dependents see of a command; stdout up to 64 KiB as text."""
        stream, last, stdout = (row.id, row.attempt, 1), -1, b""
        while len(stdout) <= STDOUT_LIMIT and (found := self.output_after(connection, {stream: last})):
            stdout += b"".join(data for _, _, data in found)
            last = found[-1][1]
        shown = stdout[:STDOUT_LIMIT].decode(errors="backslashreplace")
        result = {"exit_code": row.exit_code, "stdout": shown, "truncated": len(stdout) > STDOUT_LIMIT}
        return json.dumps(result).encode()

    def start(self, connection: sa.Connection, started: Iterable[tuple[int, int, float]], ran: bool = True) -> None:
        """Buffered tasks that run now, as (id, token, when on the monotonic clock). Without `ran` their worker has only tried:
        they still expire."""
        rows = [{"id": i, "token": token, "started_at": self._wall(connection, when)} for i, token, when in started]
        if rows:
            connection.execute(sql.start(self.dialect), {"rows": json.dumps(rows), "ran": ran})

    def give_back(
        self, connection: sa.Connection, claims: Iterable[tuple[int, int]], reason: Reason | None = None
    ) -> list[int]:
        """Make these active tasks, as (id, token), ready again without spending an attempt; returns which were. `reason` is
        kept with the attempts."""
        rows = [{"id": i, "token": token} for i, token in claims]
        if not rows:
            return []
        moved = connection.execute(sql.give_back(self.dialect), {"rows": json.dumps(rows)}).all()
        returned = [row.id for row in moved]
        if returned:
            self._keep_attempts(connection, returned, "given back", reason)
            self._free_tokens(connection, moved)
        return returned

    def _free_tokens(self, connection: sa.Connection, moved: Iterable[Any]) -> bool:
        """Free what tasks (rows of id, tokens) hold that this transaction has taken from their worker; True if anything."""
        return self.limits.give_back(connection, [row.id for row in moved if row.tokens])

    def set_blocked(self, connection: sa.Connection, blocked: Mapping[tuple[int, int], bool]) -> None:
        """Running tasks, as (id, token), that wait for others from now on, or go on."""
        rows = [{"id": i, "token": token, "blocked": waits} for (i, token), waits in blocked.items()]
        if rows:
            connection.execute(sql.set_blocked(self.dialect), {"rows": json.dumps(rows)})

    def tell(self, connection: sa.Connection, told: Mapping[tuple[int, int], tuple[str, bytes]]) -> None:
        """What running tasks, as (id, token), tell of themselves: a state of their own naming, and JSON."""
        for (task_id, token), (state, meta) in told.items():
            parameters = {"which": task_id, "with_token": token, "new_state": state, "new_meta": meta}
            attempt_write(connection, partial(connection.execute, sql.tell(self.dialect), parameters))

    # -- finish and release -------------------------------------------------------------------------------------------

    def finish(self, connection: sa.Connection, outcomes: Sequence[Outcome], max_lost: int = 3) -> Finished:
        """Record outcomes whose claims still stand and release what waited for them, inside the caller's transaction.

        An outcome of state `ready` is a lost attempt: the task goes back, and with `max_lost` of them it ends in error.

        A batch may be replayed after a commit in doubt: what was recorded the first time is `refused` the second.
        """
        if not outcomes:
            return Finished()
        replaced = [o for o in outcomes if o.replacement is not None]
        rows = [self._outcome_row(connection, o) for o in sorted(outcomes, key=lambda o: o.id) if o.replacement is None]
        values = [
            {"task_id": o.id, "value": o.value, "error": o.error}
            for o in outcomes
            if o.value is not None or o.error is not None
        ]
        written: Sequence[Any] = []
        if len(rows) == 1:
            one: dict[str, Any] = {f"o_{name}": value for name, value in rows[0].items()} | {"max_lost": max_lost}
            if values and self.dialect == "postgresql":
                one |= {"o_value": values[0]["value"], "o_error": values[0]["error"]}
                written, values = connection.execute(sql.finish_one_with_result(), one).all(), []
            else:
                written = connection.execute(sql.finish_one(), one).all()
        elif rows:
            parameters = {"rows": json.dumps(rows), "max_lost": max_lost}
            written = connection.execute(sql.finish(self.dialect), parameters).all()
        moved = {row.id: State(row.state) for row in written}
        ended = {i: state for i, state in moved.items() if state in COMPLETE_STATES}
        waiting = [i for i, state in moved.items() if state is State.WAITING]
        repeated = [i for i in moved if i not in ended and i not in waiting]
        lost = {o.id for o in outcomes if o.state is State.READY}
        retried = [o.id for o in outcomes if o.again is not None and o.id in repeated]
        if retried:
            self._keep_attempts(connection, retried, "retry", None)
        if failed := [i for i in repeated if i not in lost and i not in retried]:
            self._keep_attempts(connection, failed, State.ERROR, None)
        if new_arguments := [
            {"which": o.id, "new_arguments": o.again.arguments}
            for o in outcomes
            if o.again is not None and o.again.arguments is not None and o.id in repeated
        ]:
            connection.execute(sql.set_arguments(), new_arguments)
        if gone := [i for i in repeated if i in lost]:
            self._keep_attempts(connection, gone, "lost", Reason.WORKER_LOST)
        if values := [row for row in values if row["task_id"] in moved]:
            connection.execute(sql.store_results(self.dialect), values)
        written = list(written)
        for outcome in replaced:
            new = self._replace(connection, outcome)
            written += new
            ended |= {row.id: State(row.state) for row in new if row.state in COMPLETE_STATES}
            repeated += [row.id for row in new if row.state not in COMPLETE_STATES]
        withdrawn, signalled = self._end_children(connection, written)
        released = self.release(connection, [*written, *withdrawn])
        return Finished(
            ready=released.ready,
            skipped=released.skipped,
            groups=released.groups,
            closed=released.closed,
            freed=self._free_tokens(connection, written),
            signalled=bool(signalled),
            ended=ended,
            repeated=repeated,
            waiting=waiting,
            refused=[o.id for o in outcomes if o.id not in {row.id for row in written}],
        )

    def _replace(self, connection: sa.Connection, outcome: Outcome) -> Sequence[Any]:
        """Give a task's row to what takes its place: its dependents, its id and its job stay, and its claim ends. None if the
        claim does not stand any more; one that is being killed is killed."""
        replacement = outcome.replacement
        assert replacement is not None
        parameters = {"which": outcome.id, "with_token": outcome.token, "new_name": replacement.name}
        parameters["new_class"] = replacement.class_id
        moved = connection.execute(sql.leave(), parameters).all()
        if not moved or moved[0].state == State.KILLED:
            return moved
        self._keep_attempts(connection, [outcome.id], "replaced", None)
        connection.execute(
            sql.set_payload(),
            {
                "which": outcome.id,
                "new_function": replacement.function,
                "new_arguments": replacement.arguments,
                "new_inputs": _json(replacement.inputs) if replacement.inputs else b"",
            },
        )
        # What it has waited for before has an edge already, and has let it start.
        known = set(connection.execute(sql.upstream_of(), {"which": outcome.id}).scalars())
        new = tuple(d for d in replacement.dependencies if d.upstream not in known)
        states = self._add_dependents(connection, {d.upstream: 1 for d in new})
        start = deps.starts({outcome.id: new}, (), states)[outcome.id]
        edges = [
            (d.upstream, outcome.id, str(d.condition), deps.is_satisfied(d.condition, states[d.upstream])) for d in new
        ]
        self._insert(connection, edge, _EDGE_COLUMNS, edges)
        parameters = {"which": outcome.id, "to_state": str(start.state), "new_unmet": start.unmet}
        return connection.execute(sql.enter(), parameters).all()

    def _end_children(self, connection: sa.Connection, moved: Iterable[Any]) -> tuple[Sequence[Any], Sequence[int]]:
        """Kill the open children of those of these tasks (rows of `sql.MOVED`) that have ended and want it so, and theirs: the
        rows that ended at once, and those that workers will end."""
        parents = [
            row.id
            for row in moved
            if row.state in COMPLETE_STATES and row.children == Children.CANCEL and row.children_left
        ]
        if not parents:
            return [], []
        ids = connection.execute(sql.descendants(self.dialect), {"ids": parents}).scalars().all()
        return self._end(connection, ids, {"wanted_signal": int(signals.SIGTERM), "wanted_grace": None})

    def _end(
        self, connection: sa.Connection, ids: Sequence[int], wanted: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Sequence[int]]:
        ended = [*connection.execute(sql.cancel(self.dialect), {"ids": list(ids)})]
        ended += connection.execute(sql.kill_waiting(self.dialect), {"ids": list(ids)})
        return ended, connection.execute(sql.request_kill(self.dialect), {"ids": list(ids), **wanted}).scalars().all()

    # -- times --------------------------------------------------------------------------------------------------------

    def next_time(self, connection: sa.Connection) -> float | None:
        """In how many seconds (0: now) there is something for `advance`; None: never, as things are."""
        found = connection.execute(sql.next_time()).scalar()
        return None if found is None else max(0.0, found - self._wall(connection, time.monotonic()))

    def advance(self, connection: sa.Connection) -> Released:
        """Release what has waited for its time, and cancel what was not started in time, inside the caller's transaction."""
        rows = connection.execute(sql.due(self.dialect)).all()
        expired = connection.execute(sql.expire(self.dialect)).all()
        groups = [row.id for row in rows if row.state == State.PENDING and row.unmet == 0]
        ended_groups = connection.execute(sql.end_groups(self.dialect), {"ids": groups}).all() if groups else []
        released = self.release(connection, [*expired, *ended_groups])
        released.expired = [row.id for row in expired]
        released.groups |= {row.id: State(row.state) for row in ended_groups}
        released.ready += [ready_task(row) for row in rows if row.state == State.READY]
        return released

    def _outcome_row(self, connection: sa.Connection, outcome: Outcome) -> dict[str, Any]:
        ended = self._wall(connection, time.monotonic() if outcome.ended is None else outcome.ended)
        again = outcome.again
        return {
            "id": outcome.id,
            "attempt": outcome.attempt,
            "token": outcome.token,
            "state": str(outcome.state),
            "reason": None if outcome.reason is None else str(outcome.reason),
            "exit_code": outcome.exit_code,
            "signal": outcome.signal,
            "truncated": outcome.truncated,
            "started_at": ended - outcome.ran_seconds,
            "ended_at": ended,
            **{name: getattr(outcome.usage, name, None) for name in Usage.__slots__},
            "repeat": outcome.state is State.ERROR and outcome.again is None,
            "again": again is not None,
            "not_before": ended + again.after_seconds if again is not None and again.after_seconds > 0 else None,
            "counts": again is None or again.counts,
        }

    def finish_alone(self, connection: sa.Connection, outcome: Outcome) -> bool:
        """Record the success of a task that nothing waits for, outside of any transaction: one statement. False: nothing was
        written, `finish` must say what has become of it; always on SQLite, which gains nothing by it."""
        if self.dialect != "postgresql":
            return False
        row = self._outcome_row(connection, outcome)
        parameters = {f"o_{name}": value for name, value in row.items()}
        parameters["max_lost"] = 0
        if outcome.value is not None:
            parameters |= {"o_value": outcome.value, "o_error": None}
        return connection.execute(sql.finish_alone(outcome.value is not None), parameters).first() is not None

    def release(self, connection: sa.Connection, moved: Iterable[Any]) -> Released:
        """Settle everything that waited for the tasks that this transaction has just moved (rows of `sql.MOVED`): count down,
        skip what has become impossible (all the way down), end groups and parents whose last member or child this was."""
        result = Released()
        ended_rows = list(moved)
        while ended_rows := [row for row in ended_rows if row.state in COMPLETE_STATES]:
            closed = self._count_children(connection, ended_rows)
            wave = {row.id: (State(row.state), row.dependents) for row in ended_rows if row.dependents}
            ended_rows = list(closed)
            result.closed |= {row.id: State(row.state) for row in closed}
            if not wave:
                continue
            ended = {
                "ids": sorted(wave),
                "succeeded": [i for i, (state, _) in wave.items() if state is State.SUCCESS],
                "in_error": [i for i, (state, _) in wave.items() if state is State.ERROR],
            }
            counted = self._count_down(connection, ended)
            if sum(n for _, n in counted) < sum(n for _, n in wave.values()):
                doomed = connection.execute(sql.doomed(self.dialect), ended).scalars().all()
                skipped = connection.execute(sql.skip(self.dialect), {"ids": list(doomed)}).all()
            else:  # every edge out of these tasks is satisfied: none has become impossible
                skipped = []
            result.skipped += [row.id for row in skipped]
            ended_rows += skipped
            groups = []
            for row, _ in counted:
                if row.unmet == 0 and row.state == State.READY:
                    result.ready.append(ready_task(row))
                elif row.unmet == 0 and row.state == State.PENDING:
                    groups.append(row.id)
            if groups:
                ended_groups = connection.execute(sql.end_groups(self.dialect), {"ids": groups}).all()
                result.groups |= {row.id: State(row.state) for row in ended_groups}
                ended_rows += ended_groups
        return result

    def _count_children(self, connection: sa.Connection, ended: Iterable[Any]) -> Sequence[Any]:
        """These rows have ended: tell their parents, and settle those that have waited for them."""
        counts: dict[int, list[int]] = {}
        for row in ended:
            if row.parent_id is not None:
                count = counts.setdefault(row.parent_id, [0, 0])
                count[0] += 1
                # One that is skipped says nothing: what it waited for did, or an error callback was not needed.
                count[1] += row.state not in (State.SUCCESS, State.SKIPPED)
        if not counts:
            return []
        rows = json.dumps([{"id": i, "n": n, "failed": failed} for i, (n, failed) in sorted(counts.items())])
        counted = connection.execute(sql.count_children(self.dialect), {"rows": rows}).all()
        due = [row.id for row in counted if row.state == State.WAITING and row.children_left == 0]
        return connection.execute(sql.close(self.dialect), {"ids": due}).all() if due else []

    def _count_down(self, connection: sa.Connection, ended: dict[str, list[int]]) -> list[tuple[Any, int]]:
        """Satisfy what these completions (`ids`, `succeeded`, `in_error`) satisfy: each dependent as it now is, and how many of
        its edges that were."""
        released = {"released_at": self._wall(connection, time.monotonic()), "released_on": self.worker_host}
        if self.dialect == "postgresql":
            return [(row, row.n) for row in connection.execute(sql.satisfy_and_count_down(), ended | released)]
        met = Counter(connection.execute(sql.satisfy(), ended).scalars())
        if not met:
            return []
        counts = json.dumps([{"id": i, "n": n} for i, n in sorted(met.items())])
        return [(row, met[row.id]) for row in connection.execute(sql.count_down(), {"rows": counts, **released})]

    def _keep_attempts(
        self, connection: sa.Connection, ids: Sequence[int], state: State | str, reason: Reason | None
    ) -> None:
        parameters = {
            "ids": list(ids),
            "ended_as": str(state),
            "because": None if reason is None else str(reason),
        }
        connection.execute(sql.keep_attempts(self.dialect), parameters)

    def append_output(self, connection: sa.Connection, pieces: Iterable[tuple[int, int, int, int, bytes]]) -> None:
        """Captured bytes as (task, attempt, fd, offset, data)."""
        names = ("task_id", "attempt", "fd", "offset", "data")
        rows = [dict(zip(names, piece, strict=True)) for piece in pieces]
        if rows:
            connection.execute(sql.append_output(self.dialect), rows)

    # -- kill ---------------------------------------------------------------------------------------------------------

    def kill(
        self,
        connection: sa.Connection,
        ids: Iterable[int],
        signal: int,
        *,
        grace_seconds: float | None = None,
        waiting_only: bool = False,
        dependencies: bool = False,
        dependents: bool = False,
    ) -> Killed:
        """Withdraw what has not started, and leave `signal` for the workers of what has (unless `waiting_only`); members
        of a job go with it.

        `dependencies`: and what they depend on, unless somebody else still needs it. `dependents`: and what depends on them.
        Either takes children along, and goes on from there. A signal that does not end a task (see
        `states.ENDING_SIGNALS`) touches running tasks only. Raises UnknownTask.
        """
        wanted = sorted(set(ids))
        ends = signal in ENDING_SIGNALS
        if dependencies or dependents:
            named, everything, spared = self._lock_reached(connection, wanted, dependencies, dependents, ends)
        else:
            named = self._states(connection, sql.lock_with_members(self.dialect), wanted)
            _check_known(wanted, named)
            everything, spared = list(named), []
        if ends and not waiting_only:  # what a task has submitted goes with it
            children = connection.execute(sql.descendants(self.dialect), {"ids": everything}).scalars()
            everything = [*dict.fromkeys([*everything, *children])]
        withdrawn: list[Any] = []
        if ends:
            withdrawn += connection.execute(sql.cancel(self.dialect), {"ids": everything})
        if ends and not waiting_only:
            withdrawn += connection.execute(sql.kill_waiting(self.dialect), {"ids": everything})
        requested: list[int] = []
        if not waiting_only:
            parameters = {
                "ids": everything,
                "wanted_signal": signal,
                "wanted_grace": grace_seconds if ends else None,
            }
            requested = list(connection.execute(sql.request_kill(self.dialect), parameters).scalars())
        released = self.release(connection, withdrawn)
        ended = [row.id for row in withdrawn]
        touched = {*ended, *requested, *released.skipped, *released.groups, *released.closed}
        return Killed(
            ready=released.ready,
            skipped=released.skipped,
            groups=released.groups,
            closed=released.closed,
            freed=released.freed,
            cancelled=ended,
            requested=requested,
            spared=spared,
            untouched={i: state for i, state in named.items() if i not in touched},
        )

    def _states(self, connection: sa.Connection, statement: Any, ids: Sequence[int]) -> dict[int, State]:
        return {row.id: State(row.state) for row in connection.execute(statement, {"ids": ids})}

    def _lock_reached(
        self, connection: sa.Connection, wanted: Sequence[int], dependencies: bool, dependents: bool, ends: bool
    ) -> tuple[dict[int, State], list[int], list[int]]:
        """What a recursive kill is about, locked: the tasks named with their states, all that is to be killed, and what is
        spared."""
        locked: dict[int, State] = {}
        while True:
            named = self._states(connection, sql.with_members(self.dialect), wanted)
            _check_known(wanted, named)
            reached, spared = self._reach(connection, named, dependencies, dependents, ends)
            missing = sorted(reached.difference(locked))
            if not missing:
                return {i: locked[i] for i in named}, sorted(reached), sorted(spared)
            # Only what is locked stays as it is: who submits a dependent or a child meanwhile is seen by another look.
            locked |= self._states(connection, sql.lock_tasks(self.dialect), missing)

    def _reach(
        self, connection: sa.Connection, named: Mapping[int, State], dependencies: bool, dependents: bool, ends: bool
    ) -> tuple[set[int], set[int]]:
        """All that a kill of the tasks `named` takes, and what it would take if nobody else needed it."""
        chosen = set(named)
        if dependents:
            # A group on the way is left to end with its members: others of them may go on.
            rows = self._unfinished(connection, sql.downstream(self.dialect), list(named))
            chosen |= {row.id for row in rows if not row.is_group}
        if not dependencies:
            return chosen, set()
        rows = self._unfinished(connection, sql.upstream(self.dialect), list(chosen))
        reached = chosen | {row.id for row in rows}
        ending = [i for i in chosen if named.get(i) not in COMPLETE_STATES] if ends else []
        spared = self._needed_by_others(connection, reached, chosen, ending)
        return reached - spared, spared

    def _unfinished(self, connection: sa.Connection, statement: Any, ids: list[int]) -> Sequence[Any]:
        """What of a closure of `ids` is not complete."""
        found = connection.execute(statement, {"ids": ids}).scalars().all()
        return connection.execute(sql.unfinished(self.dialect), {"ids": list(found)}).all()

    def _needed_by_others(
        self, connection: sa.Connection, reached: set[int], chosen: set[int], ending: list[int]
    ) -> set[int]:
        """What of `reached`, but for `chosen`, tasks need that are not reached and not made impossible by the end of those
        in `ending`."""
        needs: list[tuple[int, int]] = []
        groups: set[int] = set()
        look = reached
        while look:  # a group needs its members if somebody else needs the group
            rows = connection.execute(sql.open_dependents(self.dialect), {"ids": list(look)}).all()
            needs += [(row.upstream, row.downstream) for row in rows]
            look = {row.downstream for row in rows if row.is_group} - reached - groups
            groups |= look
        others = {downstream for _, downstream in needs} - reached - groups
        if others and ending:
            ended: dict[str, list[int]] = {"ids": ending, "succeeded": [], "in_error": []}
            others -= set(connection.execute(sql.doomed(self.dialect), ended).scalars())
        if not others:
            return set()
        for row in connection.execute(sql.children(self.dialect), {"ids": list(reached)}):
            needs.append((row.id, row.parent_id))
        return deps.needed(others, needs, chosen) & reached

    def orders(self, connection: sa.Connection, worker_id: int) -> Orders:
        """What people want of this worker."""
        rows = connection.execute(sql.orders(), {"which_worker": worker_id}).all()
        kills = [Kill(*row[1:]) for row in rows if row.id is not None]
        return Orders(any(row.draining for row in rows), kills)

    def claims_of(self, connection: sa.Connection, worker_id: int) -> list[tuple[int, int]]:
        """What the table says that this worker has, as (id, token)."""
        return [(row.id, row.token) for row in connection.execute(sql.claims_of(), {"which_worker": worker_id})]

    def is_anything_active(self, connection: sa.Connection) -> bool:
        """True while any worker has a task: its end may release others."""
        return connection.execute(sql.any_active()).first() is not None

    def signal_delivered(self, connection: sa.Connection, kills: Iterable[Kill]) -> None:
        """These signals only had to be delivered, and have been."""
        rows = [{"id": kill.id, "token": kill.token, "signal": kill.signal} for kill in kills]
        if rows:
            connection.execute(sql.signal_delivered(self.dialect), {"rows": json.dumps(rows)})

    # -- workers and leases -------------------------------------------------------------------------------------------

    def register(self, connection: sa.Connection, info: WorkerInfo, draining: bool = False) -> None:
        """Add a live worker; its lease starts now."""
        row = {name: getattr(info, name) for name in WorkerInfo.__slots__}
        connection.execute(
            sql.insert_worker(),
            {
                **row,
                "queues": json.dumps(info.queues),
                "tags": json.dumps(info.tags),
                "state": "live",
                "draining": draining,
                "missing_paths": "{}",
                "avoids": "[]",
                "lease": info.lease_seconds,
            },
        )

    def renew(self, connection: sa.Connection, worker_id: int, lease_seconds: float) -> bool:
        """Extend the worker's lease; False: a reaper has declared it lost, and it owns nothing any more."""
        parameters = {"which_worker": worker_id, "lease": lease_seconds}
        return connection.execute(sql.renew(), parameters).first() is not None

    def set_queues(self, connection: sa.Connection, worker_id: int, queues: Iterable[str]) -> None:
        """The queues that this worker serves from now on."""
        connection.execute(sql.set_queues(), {"which_worker": worker_id, "new_queues": json.dumps(sorted(queues))})

    def set_draining(self, connection: sa.Connection, worker_ids: Iterable[int], wanted: bool) -> list[int]:
        """Let these workers claim nothing more, or claim again; returns those that are live."""
        parameters = {"ids": list(worker_ids), "wanted": wanted}
        return list(connection.execute(sql.set_draining(self.dialect), parameters).scalars())

    def describe(self, connection: sa.Connection, info: WorkerInfo) -> None:
        """A worker that has restarted goes on under its id: write what has changed about it."""
        row: dict[str, Any] = {f"new_{name}": getattr(info, name) for name in sql.DESCRIBED}
        row |= {
            "new_queues": json.dumps(info.queues),
            "new_tags": json.dumps(info.tags),
            "which_worker": info.id,
        }
        connection.execute(sql.describe_worker(), row)

    def unregister(self, connection: sa.Connection, worker_id: int) -> None:
        """The worker has stopped; one that has not given everything back stays, for the reapers."""
        self.reservations.drop(connection, worker_id)
        connection.execute(sql.stop_worker(), {"which_worker": worker_id})

    def live_workers(self, connection: sa.Connection) -> list[WorkerRow]:
        """Workers that have neither stopped nor been declared lost; some may have died."""
        return [_worker(row) for row in connection.execute(sql.live_workers())]

    def workers(self, connection: sa.Connection) -> list[WorkerRow]:
        """All workers ever, oldest first."""
        return [_worker(row) for row in connection.execute(sql.workers())]

    def reap(self, connection: sa.Connection, row: WorkerRow, max_lost: int) -> Released | None:
        """Declare a worker lost and free its tasks, inside the caller's transaction; None: it has renewed, or another
        reaper was faster. A task that has lost `max_lost` attempts ends in error."""
        parameters = {"which_worker": row.info.id, "seen_lease_until": row.lease_until}
        if connection.execute(sql.declare_lost(self.dialect), parameters).first() is None:
            return None
        self.reservations.drop(connection, row.info.id)
        held = connection.execute(sql.held_by_worker(), {"which_worker": row.info.id}).all()
        rows: list[dict[str, Any]] = []
        for item in held:
            started = item.state == State.RUNNING
            if item.kill_signal in ENDING_SIGNALS:
                state, reason = (State.KILLED if started else State.CANCELLED), Reason.REQUEST
            elif started and (not item.requeue or item.lost + 1 >= max_lost):
                state, reason = State.ERROR, Reason.WORKER_LOST
            else:
                state, reason = State.READY, Reason.WORKER_LOST
            rows.append({"id": item.id, "state": str(state), "reason": str(reason)})
        if not rows:
            return Released()
        again = {r["id"] for r in rows if r["state"] == State.READY}
        if ran := [item.id for item in held if item.state == State.RUNNING and item.id in again]:
            self._keep_attempts(connection, ran, "lost", Reason.WORKER_LOST)
        moved = connection.execute(sql.lose(self.dialect), {"rows": json.dumps(rows)}).all()
        withdrawn, signalled = self._end_children(connection, moved)
        released = self.release(connection, [*moved, *withdrawn])
        released.freed = self._free_tokens(connection, moved)
        released.signalled = bool(signalled)
        return released

    # -- questions ----------------------------------------------------------------------------------------------------

    def tasks(
        self,
        connection: sa.Connection,
        where: Mapping[str, Any] | None = None,
        fields: Sequence[str] | None = None,
        newest: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Tasks that match `where` (field -> value or list of values) in id order, as dictionaries of `fields`; only the
        `newest` so many of them if given.

        Times are datetimes (UTC), memory is in bytes, `depends_on` is a list of ids. Raises BadInput, naming the fields
        there are.
        """
        wanted = tuple(fields) if fields is not None else (*sql.FIELDS, "depends_on")
        for name in {*wanted, *(where or {})} - set(sql.FIELDS) - {"depends_on"}:
            raise BadInput(f"there is no field {name!r}; there are: {', '.join([*sql.FIELDS, 'depends_on'])}.")
        if "depends_on" in (where or {}):
            raise BadInput("depends_on can be shown, not asked for.")
        columns = tuple(dict.fromkeys(("id", *(name for name in wanted if name != "depends_on"))))
        rows = sorted(connection.execute(sql.tasks(columns, dict(where or {}), newest)), key=lambda row: row.id)
        upstream: dict[int, list[int]] = {}
        if "depends_on" in wanted:
            for edge_row in connection.execute(sql.dependencies(self.dialect), {"ids": [r.id for r in rows]}):
                upstream.setdefault(edge_row.downstream, []).append(edge_row.upstream)
        for row in rows:
            found = dict(row._mapping)
            for name in ("submitted_at", "not_before", "expires_at", "started_at", "finished_at"):
                if found.get(name) is not None:
                    found[name] = datetime.fromtimestamp(found[name], UTC)
            for name in ("requires_paths", "places"):
                if found.get(name) is not None:
                    found[name] = _split(found[name])
            found["depends_on"] = upstream.get(row.id, [])
            yield {name: found[name] for name in wanted}

    def counts(self, connection: sa.Connection) -> dict[State, int]:
        """How many tasks are in each state that has any."""
        return {State(state): count for state, count in connection.execute(sql.counts())}

    def existing(self, connection: sa.Connection, ids: Iterable[int]) -> set[int]:
        """Those of `ids` that are tasks."""
        return set(connection.execute(sql.existing(self.dialect), {"ids": list(ids)}).scalars())

    def completed(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, State]:
        """Those of `ids` that are complete, and how."""
        rows = connection.execute(sql.completed(self.dialect), {"ids": list(ids)})
        return {row.id: State(row.state) for row in rows}

    def stored_results(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, StoredResult]:
        """State, result and error of each of these tasks that there is."""
        return _stored_results(connection.execute(sql.results(self.dialect), {"ids": list(ids)}))

    def ended_results(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, StoredResult]:
        """The same of those that are complete."""
        return _stored_results(connection.execute(sql.ended_results(self.dialect), {"ids": list(ids)}))

    def children_of(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, list[tuple[int, str | None]]]:
        """The children of these tasks, as (id, Celery's id where a caller brought one)."""
        found: dict[int, list[tuple[int, str | None]]] = {}
        for row in connection.execute(sql.children_of(self.dialect), {"ids": list(ids)}):
            found.setdefault(row.parent_id, []).append((row.id, row.celery_id))
        return found

    def told(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, tuple[str, bytes]]:
        """The states of their own, with their JSON, that those of these tasks that run have told."""
        rows = connection.execute(sql.told(self.dialect), {"ids": list(ids)})
        return {row.task_id: (row.state, bytes(row.meta)) for row in rows}

    def calls(self, connection: sa.Connection, ids: Iterable[int]) -> dict[int, Call]:
        """What these tasks are calls of, and where they ran."""
        rows = connection.execute(sql.calls(self.dialect), {"ids": list(ids)})
        return {row.id: Call(_bytes(row.arguments), row.queue, row.worker) for row in rows}

    def ids_of(self, connection: sa.Connection, celery_ids: Sequence[str]) -> dict[str, int]:
        """The tasks that Celery knows by these ids: decimal ones, and those that a caller brought."""
        brought = [i for i in celery_ids if not i.isdecimal()]
        found = {i: int(i) for i in celery_ids if i.isdecimal() and len(i) < 19}
        if brought:
            found.update(dict(connection.execute(sql.ids_of_celery_ids(), {"celery_ids": brought}).all()))
        return found

    def calls_of(self, connection: sa.Connection, celery_ids: Sequence[str]) -> dict[str, KnownCall]:
        """What was submitted under these Celery ids."""
        if not celery_ids:
            return {}
        rows = connection.execute(sql.calls_of(), {"celery_ids": list(celery_ids)})
        return {
            row.celery_id: KnownCall(
                row.id, State(row.state), row.function or "", bytes(row.arguments or b""), _split(row.argv or b"")
            )
            for row in rows
        }

    def inherited(self, connection: sa.Connection, task_id: int) -> Inherited | None:
        """What children of this task have of it; None if there is no such task, or it needs no worker."""
        row = connection.execute(sql.inherited(), {"which": task_id}).first()
        if row is None:
            return None
        return Inherited(self.requirements(connection, [row.requirement_id])[row.requirement_id], row.priority)

    def last_id(self, connection: sa.Connection, submitter: str) -> int | None:
        """The newest task or job of this submitter: `@last` on the command line."""
        found = connection.execute(sql.last_id(), {"submitter": submitter}).scalar()
        return None if found is None else int(found)

    def output_after(
        self, connection: sa.Connection, streams: Mapping[tuple[int, int, int], int]
    ) -> list[tuple[tuple[int, int, int], int, bytes]]:
        """The next pieces of captured streams, as (stream, offset, bytes), in order within each; call again until there are
        none. A stream is (task, attempt, fd); its value is the offset of the last piece that was read, -1 before the first.

        An offset may be greater than the end of the piece before: what was between has been cut out.
        """
        if not streams:
            return []
        rows = [
            {"task_id": task_id, "attempt": number, "fd": fd, "after": after}
            for (task_id, number, fd), after in streams.items()
        ]
        # Of one stream many, of many a few of each, so that none waits long for the others.
        parameters = {"rows": json.dumps(rows), "limit": max(PIECES // len(rows), 4)}
        found = connection.execute(sql.output_after(self.dialect), parameters)
        return [((row.task_id, row.attempt, row.fd), row.offset, bytes(row.data)) for row in found]

    def output_sizes(self, connection: sa.Connection, ids: Iterable[int]) -> dict[tuple[int, int, int], int]:
        """Bytes captured of the latest attempts of these tasks, by (task, attempt, fd); streams without any are left out."""
        rows = connection.execute(sql.output_sizes(self.dialect), {"ids": list(ids)})
        return {(task_id, attempt, fd): int(size) for task_id, attempt, fd, size in rows}

    def outputs(self, connection: sa.Connection, ids: Iterable[int]) -> dict[tuple[int, int], bytes]:
        """All that was captured of the latest attempts of these tasks, by (task, fd): ask `output_sizes` before."""
        pieces: dict[tuple[int, int], list[bytes]] = {}
        for row in connection.execute(sql.outputs(self.dialect), {"ids": list(ids)}):
            pieces.setdefault((row.task_id, row.fd), []).append(bytes(row.data))
        return {stream: b"".join(data) for stream, data in pieces.items()}

    def running(self, connection: sa.Connection) -> dict[int, tuple[int, Fraction]]:
        """How many tasks each worker runs, and the CPUs that they reserve of it; workers that run none are left out."""
        found: dict[int, tuple[int, Fraction]] = {}
        for row in connection.execute(sql.reservations()):
            count, cpus = found.get(row.id, (0, Fraction(0)))
            found[row.id] = count + 1, cpus + CpuRequest.parse(row.cpus).share(Fraction(row.worker_cpus))
        return found

    def doctor(self, connection: sa.Connection) -> list[Finding]:
        """The invariants that this store breaks; empty for a sound one."""
        findings = []
        for rule, statement in sql.checks(self.dialect).items():
            if ids := connection.execute(statement.distinct().limit(100)).scalars().all():
                findings.append(Finding(rule, tuple(ids)))
        reserved: dict[int, tuple[Fraction, Fraction, int, int]] = {}
        for row in connection.execute(sql.reservations()):
            whole = Fraction(row.worker_cpus)
            cpus, _, memory, _ = reserved.get(row.id, (Fraction(0), whole, 0, 0))
            cpus += CpuRequest.parse(row.cpus).share(whole)
            reserved[row.id] = (cpus, whole, memory + row.memory_bytes, row.worker_memory)
        if over := [i for i, (cpus, whole, memory, total) in reserved.items() if cpus > whole or memory > total]:
            findings.append(Finding("I8 reservations on a worker do not exceed its capacity", tuple(over)))
        return findings


_TASK_COLUMNS = (
    "id", "state", "requirement_id", "priority", "rank", "duration", "not_before", "expires_at", "io_bytes", "unmet",
    "dependents", "attempt", "failed", "lost", "tokens", "max_attempts", "requeue", "truncated", "name", "pattern", "job_id",
    "layer", "parent_id", "children", "children_left", "children_failed", "blocked", "seq", "submitter", "celery_id", "reason",
    "submitted_at", "ready_at", "finished_at",
)  # fmt: skip
_PAYLOAD_COLUMNS = (
    "task_id", "function", "arguments", "inputs", "argv", "stdin", "stdin_path", "stdout_path", "stderr_path", "login",
    "cwd", "umask", "environment_id", "import_path", "io_paths", "time_limit_seconds", "soft_time_limit_seconds",
    "strict_lease", "extra",
)  # fmt: skip
#: Columns of a task that its submission leaves empty.
_NOTHING_YET = {f"t_{column.name}": None for column in task.c if column.name not in _TASK_COLUMNS}
#: Complete, and no success.
_ENDED_BADLY = frozenset(str(state) for state in COMPLETE_STATES - {State.SUCCESS})
_EDGE_COLUMNS = ("upstream", "downstream", "condition", "satisfied")


def _check_known(wanted: Iterable[int], found: Collection[int]) -> None:
    if missing := [i for i in wanted if i not in found]:
        raise UnknownTask(missing, "Nothing was killed.")


def _requirement_key(requirement: Requirement) -> dict[str, Any]:
    """Its columns, with the digest that says whether two are equal."""
    key: dict[str, Any] = {name: getattr(requirement, name) for name in Requirement.__slots__}
    key["pattern"] = str(requirement.pattern)
    for name in ("requires_paths", "places"):
        key[name] = _join(key[name])
    text = "\0".join(f"{name}={value!r}" for name, value in sorted(key.items()))
    return key | {"digest": hashlib.sha256(text.encode()).hexdigest()}


def _requirement(row: Any) -> Requirement:
    columns = {name: getattr(row, name) for name in Requirement.__slots__}
    columns["pattern"] = Pattern(row.pattern)
    for name in ("requires_paths", "places"):
        columns[name] = _split(columns[name])
    return Requirement(**columns)


@lru_cache(maxsize=16)
def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@lru_cache(maxsize=64)
def _json_list(values: tuple[Any, ...]) -> bytes:
    """The same few lists stand in many rows of a graph."""
    return _json(values)


def _json(value: Any) -> bytes:
    return json.dumps(dict(value) if isinstance(value, Mapping) else list(value), separators=(",", ":")).encode()


def _join(words: Iterable[bytes]) -> bytes:
    return b"".join(word + b"\0" for word in words)


def _split(joined: bytes) -> tuple[bytes, ...]:
    return tuple(bytes(joined).split(b"\0")[:-1])


def _list(text: bytes) -> tuple[Any, ...]:
    """A JSON list; empty for one that cannot be read: the task will say what it misses, and the worker goes on."""
    try:
        return tuple(json.loads(text)) if text else ()
    except (ValueError, TypeError):
        return ()


def _claimed(row: Any, token: int) -> ClaimedTask:
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
        inputs=_list(row.inputs),
        argv=_split(row.argv),
        stdin=_bytes(row.stdin),
        redirections=Redirections(_bytes(row.stdin_path), _bytes(row.stdout_path), _bytes(row.stderr_path)),
        login=row.login,
        cwd=bytes(row.cwd),
        umask=row.umask,
        environment=bytes(row.environment or b""),
        import_path=_list(row.import_path),
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


def _stored_results(rows: Iterable[Any]) -> dict[int, StoredResult]:
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
            _bytes(row.value),
            _bytes(row.error),
            row.failed,
            row.parent_id,
            bool(row.has_children),
        )
        for row in rows
    }


def _bytes(value: Any) -> bytes | None:
    return None if value is None else bytes(value)


def _worker(row: Any) -> WorkerRow:
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


__all__ = [
    "Finding",
    "Finished",
    "Inherited",
    "Kill",
    "Killed",
    "KnownCall",
    "Orders",
    "Released",
    "Store",
    "StoredResult",
    "WorkerRow",
    "open_store",
    "unchecked_store",
]
