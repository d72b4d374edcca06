"""submit: what people ask for, as task rows, in one transaction; then a ring."""

import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from aque import current, doorbell, hints
from aque.chooser import why_nowhere
from aque.errors import BadInput
from aque.expectations import Expectations
from aque.looks import FileSystems, Looks
from aque.machine import user_name
from aque.options import (
    Options,
    read_children,
    read_duration,
    read_integer,
    read_io_paths,
    read_limit,
    read_moment,
    read_not_before,
    read_path,
    read_priority,
    read_text,
    requirement_of,
)
from aque.resources import parse_limits
from aque.settings import Settings
from aque.states import COMPLETE_STATES, READY_STATES, State
from aque.store import Inherited, Store, again, is_conflict
from aque.values import NO_REDIRECTIONS, Pattern, Redirections, Requirement, TaskSpec

#: Variables that describe the task or the process they are found in, and would be wrong in another.
_OWN_VARIABLES = (
    b"AQUE_TASK_ID",
    b"AQUE_TID",
    b"AQUE_ATTEMPT",
    b"AQUE_CPUS",
    b"AQUE_PARENT_ID",
    b"AQUE_BROKER",
    b"AQUE_WORKER",
    b"AQUE_THREAD_VARIABLES",
    b"_",
)
#: So long a reading of the farm's limits is good enough to say that a task is within them.
LIMITS_SECONDS = 5.0
#: See `Submitter.next_id`.
BLOCK_SECONDS = 1.0
LARGEST_BLOCK = 64


class Submitter:
    """Writes tasks to a store."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.settings = settings
        self._expectations = Expectations(store)
        self._user = user_name()
        self._file_systems = FileSystems()
        self._lock = threading.Lock()
        self._ids: list[int] = []
        self._block = 1
        self._reserved_at = 0.0
        self._limits: dict[str, int] = {}
        self._limits_read_at = -math.inf
        self._parents: dict[int, Inherited | None] = {}

    def reserve(self, count: int) -> list[int]:
        """Ids for tasks that are submitted later."""

        def work() -> list[int]:
            with self.store.connect() as connection:
                return self.store.reserve_ids(connection, count)

        return again(work)

    def next_id(self) -> int:
        """An id for one task. Who submits many, one after the other, gets them in growing blocks: an id costs a round trip.
        What is left of a block is dropped after a second, so that ids keep the order of submission."""
        with self._lock:
            now = time.monotonic()
            if now - self._reserved_at > BLOCK_SECONDS:
                self._ids, self._block = [], 1
            if not self._ids:
                self._ids = self.reserve(self._block)[::-1]
                self._block = min(2 * self._block, LARGEST_BLOCK)
                self._reserved_at = now
            return self._ids.pop()

    def submit(self, specs: Sequence[TaskSpec], joins: tuple[int, int] | None = None) -> dict[int, State]:
        """All of these tasks or, with an error, none. Their first states. `joins`: one of them, and a task whose group it
        becomes a member of.

        Looks for the paths among the words of commands: one submission of many commands has fewer looks than many of one.
        """
        if limited := {spec.requirement.limits for spec in specs if spec.requirement.limits}:
            self._check_limits([parse_limits(limits) for limits in limited])
        specs = self._with_hints(specs)

        def work() -> dict[int, State]:
            with self.store.connect() as connection:
                self.store.intern(connection, specs)
                expected = self._expectations.of(connection, specs)
            is_one = joins is None and self.store.is_one_statement(specs)
            with self.store.connect() if is_one else self.store.begin() as connection:
                states = self.store.submit(connection, specs, expected)
                if joins is not None:
                    new, member = joins
                    self.store.groups.join(connection, new, states[new], member)
                return states

        try:
            states = again(work)
        except Exception as error:
            if not is_conflict(error) or (known := self._known(specs)) is None:
                raise
            return known
        rung = set()
        if any(state in READY_STATES for state in states.values()):
            rung.add(doorbell.READY)
        if any(state in COMPLETE_STATES for state in states.values()):
            rung.add(doorbell.DONE)
        if any(spec.not_before is not None or spec.expires_at is not None for spec in specs):
            rung.add(doorbell.TIME)
        if rung:
            with self.store.connect() as connection:
                doorbell.ring(connection, rung)
        return states

    def class_of(self, spec: TaskSpec) -> int:
        """The requirement class of this task."""
        with self.store.connect() as connection:
            return self.store.requirement_ids(connection, [spec.requirement])[spec.requirement]

    def _known(self, specs: Sequence[TaskSpec]) -> dict[int, State] | None:
        """The states of these tasks, by the ids they were to have, if all of them were submitted before under the same Celery
        ids: who repeats a submission after a failure gets the tasks that are there. None: they are not what is in the way.

        Raises BadInput if a Celery id is another task's.
        """
        named = {spec.celery_id: spec for spec in specs if spec.celery_id is not None}
        with self.store.connect() as connection:
            calls = self.store.calls_of(connection, list(named))
        if not calls:
            return None
        for name, call in calls.items():
            spec = named[name]
            if (call.function, call.arguments, call.argv) != (spec.function, spec.arguments, spec.argv):
                raise BadInput(
                    f"task {call.id} has the Celery id {name} already, and is not the same. Nothing was submitted: let Celery "
                    "make the ids, or bring one that is new."
                )
        if len(calls) < len(specs):
            raise BadInput(
                f"{len(calls)} of these {len(specs)} tasks were submitted before, as the Celery id {next(iter(calls))} was. "
                "Nothing was submitted."
            )
        return {named[name].id: call.state for name, call in calls.items()}

    def check_possible(self, specs: Iterable[TaskSpec]) -> None:
        """Raise BadInput if no live worker could ever run one of these tasks."""
        wanted = {spec.requirement for spec in specs if spec.requirement.pattern is not Pattern.GROUP}
        with self.store.connect() as connection:
            places = [row.place for row in self.store.live_workers(connection) if row.is_live]
        for requirement in wanted:
            if why := why_nowhere(requirement, places):
                raise BadInput(f"{why}. Nothing was submitted: without --strict it waits for a worker that can run it.")

    def _check_limits(self, wanted: Sequence[Mapping[str, int]]) -> None:
        """Raise BadInput if a task could not start as the farm's limits are: by limits that have just been read."""
        is_fresh = time.monotonic() - self._limits_read_at < LIMITS_SECONDS
        if is_fresh and _beyond(wanted, self._limits) is None:
            return
        with self.store.connect() as connection:
            self._limits = self.store.limits.capacities(connection)
        self._limits_read_at = time.monotonic()
        if why_not := _beyond(wanted, self._limits):
            raise BadInput(why_not)

    def _with_hints(self, specs: Sequence[TaskSpec]) -> Sequence[TaskSpec]:
        """The same with their `io_paths`, their size, and what stands for them in the requirement."""
        looks: Looks | None = None
        paths: dict[int, tuple[bytes, ...]] = {}  # by position
        for position, spec in enumerate(specs):
            found = spec.io_paths
            if found is None:
                words = (*spec.argv, *_files(spec.redirections))
                if len(words) > 1:
                    looks = looks or Looks(self._file_systems)
                    found = hints.paths_in(words, spec.cwd, looks.prefix)
            if found:
                paths[position] = found
        if not paths:
            return specs
        looks = looks or Looks(self._file_systems)
        if len(specs) == 1 and specs[0].io_paths is None:  # who submits a thousand one by one makes no thousand classes
            places = [hints.directories(found, looks.mounts) for found in paths.values()]
        else:
            places = hints.places(list(paths.values()), looks.mounts)
        requirements = _Placed()
        wanted = [requirements[specs[i].requirement, place] for i, place in zip(paths, places, strict=True)]
        with self.store.connect() as connection:
            if self.store.is_crowded(connection, set(wanted)):
                points = [hints.mount_points(found, looks.mounts) for found in paths.values()]
                wanted = [requirements[specs[i].requirement, place] for i, place in zip(paths, points, strict=True)]
        hinted = list(specs)
        for (i, found), requirement in zip(paths.items(), wanted, strict=True):
            size = sum(map(looks.size, found))
            hinted[i] = replace(specs[i], io_paths=found, io_bytes=size, requirement=requirement)
        return hinted

    def command(
        self,
        task_id: int,
        argv: Sequence[str | bytes],
        options: Options,
        *,
        stdin: bytes | None = None,
        redirections: Redirections = NO_REDIRECTIONS,
        login: bool = False,
        cwd: str | bytes | None = None,
        env: Mapping[bytes, bytes] | None = None,
    ) -> TaskSpec:
        """A command as a task: the caller's environment, working directory and umask unless given."""
        words = tuple(os.fsencode(word) for word in argv)
        if not words or not words[0]:
            raise BadInput("there is no command to run: give one, as in `aque submit -- gzip file`.")
        if bad := [word for word in words if b"\0" in word]:
            raise BadInput(
                f"the word {bad[0][:40]!r} holds a NUL byte, which no command can be given. Nothing was submitted."
            )
        if stdin is not None and len(stdin) > self.settings.stdin_limit_bytes:
            raise BadInput(
                f"stdin has {len(stdin)} bytes, at most {self.settings.stdin_limit_bytes} are stored with a task "
                "(setting stdin_limit_bytes). Nothing was submitted: let the command read a file."
            )
        if options.interpreter:
            raise BadInput(
                "interpreter is for Python tasks: name the program as the command's first word. Nothing was submitted."
            )
        if stdin is not None and redirections.stdin is not None:
            raise BadInput("stdin can be bytes or a file, not both. Nothing was submitted.")
        there = read_path("cwd", cwd) if cwd is not None else os.getcwdb()
        guesses = options.io and not options.io_paths and self.settings.io_hints
        return self._spec(
            task_id,
            options,
            Pattern.SHELL,
            os.fsdecode(os.path.basename(words[0]) or words[0]),
            argv=words,
            stdin=stdin,
            redirections=redirections,
            login=login,
            cwd=there,
            io_paths=None if guesses else read_io_paths(options, there),
            umask=_umask(),
            environment=_environment(os.environb if env is None else env),
        )

    def redirections(self, stdin: Any = None, stdout: Any = None, stderr: Any = None) -> Redirections:
        """Paths in place of a command's streams; None: no file."""
        named = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
        return Redirections(**{what: None if path is None else read_path(what, path) for what, path in named.items()})

    def paths_in(self, words: Sequence[str | bytes]) -> tuple[bytes, ...]:
        """The paths that these words name, as those of a command's; none where `io_hints` is off."""
        if not self.settings.io_hints:
            return ()
        encoded = [b"", *map(os.fsencode, words)]  # of a command the first is the program
        return hints.paths_in(encoded, os.getcwdb(), Looks(self._file_systems).prefix)

    def function(
        self,
        task_id: int,
        function: str,
        name: str,
        arguments: bytes,
        inputs: Sequence[int],
        options: Options,
        *,
        env: Mapping[bytes, bytes] | None = None,
    ) -> TaskSpec:
        """A function, given as "module:qualname", with its arguments as JSON of [args, kwargs]."""
        if options.strict_lease and not options.interpreter:
            raise BadInput(
                "strict_lease is for commands: a function runs in a child of its worker, and nobody could end it there while "
                "the worker itself stands still. Nothing was submitted: let a command call the function."
            )
        cwd = os.getcwdb()
        return self._spec(
            task_id,
            options,
            Pattern.PYTHON,
            name,
            function=function,
            arguments=arguments,
            inputs=tuple(inputs),
            cwd=cwd,
            io_paths=read_io_paths(options, cwd),
            umask=_umask(),
            # A pool's child has the worker's environment: only who runs it apart needs the submitter's.
            environment=_environment(os.environb if env is None else env)
            if options.interpreter or self.settings.is_shared
            else b"",
            import_path=tuple(entry or os.getcwd() for entry in sys.path),
        )

    def group(self, task_id: int, options: Options, members: Sequence[int] = ()) -> TaskSpec:
        """A job: it ends when the tasks in `options.dependencies` have. Its value is the list of those of `members`."""
        return self._spec(task_id, options, Pattern.GROUP, "group", inputs=tuple(members))

    def _spec(self, task_id: int, options: Options, pattern: Pattern, name: str, **fields: Any) -> TaskSpec:
        dependencies = tuple(dict.fromkeys(options.dependencies))
        if len({d.upstream for d in dependencies}) < len(dependencies):
            raise BadInput(
                "a task can depend on another one in one way only: ok, any or failed. Nothing was submitted."
            )
        parent_id = options.parent_id if options.parent_id is not None else self._parent()
        parent = None if parent_id is None else self._inherited(parent_id)
        user = self._user_of(options)
        duration, relative_duration = read_duration(options.duration)
        inherited = None if parent is None else parent.requirement
        requirement = requirement_of(options, pattern, user, self.settings.default_queue, inherited)
        return TaskSpec(
            id=task_id,
            name=read_text("name", options.name or name),
            requirement=requirement,
            priority=parent.priority
            if parent and options.priority is None
            else read_priority(options.priority or 0, self.settings, self._user),
            age_rank=-int(self.settings.priority_per_hour * time.time() / 3600),
            duration=duration,
            relative_duration=relative_duration,
            dependencies=dependencies,
            job_id=options.job_id,
            parent_id=parent_id,
            layer=read_text("layer", options.layer),
            seq=options.seq,
            max_attempts=read_integer("max_attempts", options.max_attempts, 1, 1000),
            requeue=bool(options.requeue),
            time_limit_seconds=read_limit("time_limit", options.time_limit),
            soft_time_limit_seconds=read_limit("soft_time_limit", options.soft_time_limit),
            strict_lease=bool(options.strict_lease),
            submitter=self._user,
            celery_id=options.celery_id,
            not_before=read_not_before(options.countdown, options.eta),
            expires_at=read_moment("expires", options.expires),
            children=read_children(options.children),
            extra=options.extra,
            **fields,
        )

    def _user_of(self, options: Options) -> str:
        if options.user and options.user != self._user and os.geteuid() != 0:
            raise BadInput(
                f"only root can submit tasks of another user, {options.user!r}; this process is of {self._user}. Nothing was "
                "submitted."
            )
        is_personal = not self.settings.is_shared and not self.settings.unsafe_allow_root_sqlite
        if options.user and options.user != self._user and is_personal:
            raise BadInput(
                f"in an SQLite store everything runs as its owner, {self._user}, and not as {options.user!r}. Nothing was "
                "submitted: on PostgreSQL a worker of root's runs tasks of others."
            )
        return read_text("user", options.user) or self._user

    def _parent(self) -> int | None:
        """The task that this code is part of, if it belongs to the same farm."""
        own = current.variables()
        task_id = own.get("AQUE_TASK_ID", "")
        if not task_id.isdecimal() or own.get("AQUE_BROKER", "") != self.settings.to_url():
            return None
        return int(task_id)

    def _inherited(self, parent_id: int) -> Inherited | None:
        """What children of this task have of it unless they say otherwise; it is read once. User, working directory and
        environment they have of the process that submits them."""
        if self._parents.get(parent_id) is None:
            with self.store.connect() as connection:
                self._parents = {parent_id: self.store.inherited(connection, parent_id)}
        return self._parents[parent_id]


def _beyond(wanted: Iterable[Mapping[str, int]], capacities: Mapping[str, int]) -> str | None:
    """What is wrong with the first of these that cannot be had of limits with these capacities; None if all can."""
    for name, n in sorted((name, n) for limits in wanted for name, n in limits.items()):
        if name not in capacities:
            return (
                f"there is no limit {name!r}. Nothing was submitted: `aque limits set {name} N` makes it, and `aque limits` "
                "lists those there are."
            )
        if n > capacities[name]:
            return (
                f"a task wants {n} of the limit {name!r}, which is {capacities[name]}. Nothing was submitted: "
                f"`aque limits set {name} {n}` raises it."
            )
    return None


def _environment(variables: Mapping[bytes, bytes]) -> bytes:
    """NAME=VALUE, each ended by NUL, in order of name: equal environments are stored once."""
    return _joined_environment(tuple(variables.items()))


@lru_cache(maxsize=16)
def _joined_environment(variables: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """Remembered, since all tasks of a graph have the same."""
    own = {*_OWN_VARIABLES, *dict(variables).get(b"AQUE_THREAD_VARIABLES", b"").split(b",")}
    kept = sorted(pair for pair in variables if pair[0] not in own and not _is_index(pair[0]))
    for name, value in kept:
        if not name or b"=" in name or b"\0" in name or b"\0" in value:
            raise BadInput(
                f"the environment variable {os.fsdecode(name)!r:.60} cannot be given to a command: a name must be without '=', "
                "and neither it nor the value may hold a NUL byte. Nothing was submitted."
            )
    return b"".join(name + b"=" + value + b"\0" for name, value in kept)


def _is_index(name: bytes) -> bool:
    """True for what says which pieces of a resource the task has that this process is part of."""
    return name.startswith(b"AQUE_") and name.endswith(b"_INDICES")


def _files(redirections: Redirections) -> Iterator[bytes]:
    return filter(None, (redirections.stdin, redirections.stdout, redirections.stderr))


class _Placed(dict[tuple[Requirement, tuple[bytes, ...]], Requirement]):
    """A requirement and its places -> the requirement with them: there are few, for many tasks."""

    def __missing__(self, key: tuple[Requirement, tuple[bytes, ...]]) -> Requirement:
        self[key] = replace(key[0], places=key[1])
        return self[key]


def _umask() -> int:
    """This process's umask, without the moment of another one that asking os.umask would cost other threads."""
    status = os.open("/proc/self/status", os.O_RDONLY)  # a third of the time of a file object, for each function
    try:
        _, found, rest = os.read(status, 4096).partition(b"\nUmask:")
    finally:
        os.close(status)
    return int(rest.split(None, 1)[0], 8) if found else 0o022
