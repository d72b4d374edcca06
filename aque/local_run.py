"""`aque.execute`: what is submitted, run in this process, without a worker and without a store."""

import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from types import TracebackType
from typing import Any

from celery import Celery
from celery.canvas import Signature
from celery.result import AsyncResult, ResultSet
from celery.states import FAILURE, SUCCESS

from aque import canvas, child, codec, deps
from aque.backend import Backend
from aque.celery_app import app_in_use
from aque.errors import BadInput, CommandFailed, TaskCancelled, TaskSkipped, UnknownTask
from aque.farm import settings_of
from aque.handles import StandIn, open_graph, stand_in
from aque.settings import Settings
from aque.states import CELERY_STATE, Reason, State
from aque.submitter import Submitter
from aque.values import OWN_INTERPRETER, Condition, Dependency, Pattern, Replacement, TaskSpec
from aque.within import Replaced

#: The first id: higher than any in a store, so that none is taken for a task there.
FIRST_ID = 9 * 10**17
#: Of a command's stdout, as its result has it.
STDOUT_LIMIT = 64 << 10


def execute(work: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run in this process what `work` submits, and return its result; for tests and debuggers.

    `work` is a signature or a canvas of tasks, which gets the arguments, or a function, which is called with them and submits
    what it likes: calls, commands, graphs, reductions, patterns. If it returns handles, one or several in a list, tuple or
    dictionary, their results are returned in their place; anything else as it is.

    All that is submitted runs, one after the other, each task after what it waits for; `.get()` of a handle in the course of it
    runs what that needs. Arguments and results go through JSON, and what a failure makes impossible is skipped, as on the farm.
    Raises what the task of a returned handle has raised, or what it was skipped for, else what any task has raised that
    nobody has asked for. Nothing is reserved or limited, functions have no time limit, and everything runs as this user, at
    once, whatever its options say of that.
    """
    app: Celery = work.app if isinstance(work, Signature) else app_in_use()
    run = _Run(app)
    with run.entered():
        # Not its apply_async, which makes messages of what has no Aque task in it.
        found = canvas.submit(work, args, kwargs, app=app) if isinstance(work, Signature) else work(*args, **kwargs)
        run.finish()
        value = _with_results(run, found)
        run.raise_untold()
        return value


def _with_results(run: "_Run", found: Any) -> Any:
    """The results in place of handles. Raises what a task has raised, with its own traceback."""
    if isinstance(found, AsyncResult):
        return run.result(found.id)
    if isinstance(found, ResultSet):
        return [_with_results(run, member) for member in found.results]
    if isinstance(found, (list, tuple)):
        return type(found)(_with_results(run, item) for item in found)
    if isinstance(found, dict):
        return {key: _with_results(run, value) for key, value in found.items()}
    return found


@dataclass(slots=True)
class _Ended:
    """How a task has ended."""

    state: State
    value: bytes = b"null"  #: encoded
    error: BaseException | None = None
    trace: str | None = None
    frames: TracebackType | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.frames = None if self.error is None else self.error.__traceback__

    def failure(self) -> BaseException | None:
        """What was raised, with the traceback that it had: Celery's results replace it when they raise it."""
        return None if self.error is None else self.error.with_traceback(self.frames)


class _Run:
    """What has been submitted, and what has become of it."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._settings = settings_of(app)
        self._specs: dict[int, TaskSpec] = {}
        self._numbers: dict[str, int] = {}  #: by Celery's id
        self._began: set[int] = set()
        self._ended: dict[int, _Ended] = {}
        self._running: dict[str, TaskSpec] = {}  #: by their ids in Celery
        self._told: set[int] = set()  #: somebody has asked how these ended

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What is submitted comes here."""
        token = stand_in.set(StandIn(_Drafts(self, self._settings), _Results(self, self._app), self._running))
        outer = open_graph.set(None)
        try:
            yield
        finally:
            open_graph.reset(outer)
            stand_in.reset(token)

    def add(self, specs: Sequence[TaskSpec]) -> dict[int, State]:
        new = {spec.id: spec for spec in specs}
        deps.in_order({spec.id: spec.dependencies for spec in specs})  # raises Cycle
        upstream = {d.upstream for spec in specs for d in spec.dependencies}
        if unknown := [i for i in upstream if i not in self._specs and i not in new]:
            raise UnknownTask(unknown)
        self._specs.update(new)
        self._numbers.update((spec.celery_id or str(spec.id), spec.id) for spec in specs)
        return dict.fromkeys(new, State.PENDING)

    def finish(self) -> None:
        """Run all that is left, also what it submits."""
        while left := self._specs.keys() - self._began:
            self._run(left)

    def end_of(self, celery_id: str) -> _Ended | None:
        """How this task ends, run now if need be; None if there is no such task."""
        if (task_id := self._numbers.get(celery_id)) is None:
            return None
        needed = self._needed([task_id])
        if stuck := (needed & self._began) - self._ended.keys():
            raise BadInput(f"task {celery_id} is waited for by task {min(stuck)}, which it waits for itself.")
        self._run(needed - self._began)
        self._told.add(task_id)
        return self._ended[task_id]

    def _needed(self, ids: Iterable[int]) -> set[int]:
        """Those of these tasks that have not ended, and what they wait for."""
        needed: set[int] = set()
        look = list(ids)
        while look:
            if (found := look.pop()) not in needed and found not in self._ended:
                needed.add(found)
                look += [d.upstream for d in self._specs[found].dependencies]
        return needed

    def join(self, new: int, member: int) -> None:
        """Make a task a member of the group that another is a member of. Raises BadInput if that is in none."""
        for spec in self._specs.values():
            if spec.requirement.pattern is Pattern.GROUP and member in spec.inputs and spec.id not in self._ended:
                more = (*spec.dependencies, Dependency(new, Condition.ANY))
                self._specs[spec.id] = replace(spec, inputs=(*spec.inputs, new), dependencies=more)
                return
        raise BadInput(f"task {member} is no member of a group that is still open. Nothing was submitted.")

    def raise_untold(self) -> None:
        """Raise what a task has raised, unless somebody has asked for it, or for what waited for it."""
        told = {id(self._cause(task_id)) for task_id in self._told}
        for ended in self._ended.values():
            if (failure := ended.failure()) is not None and id(failure) not in told:
                raise failure

    def result(self, celery_id: str) -> Any:
        """A task's result. Raises what it has raised, or what something has that it waited for."""
        if (ended := self.end_of(celery_id)) is None:
            raise UnknownTask([celery_id], "It is none of those that were submitted.")
        if ended.state is State.SUCCESS:
            return codec.decode_result(ended.value)
        raise self._failure(self._numbers[celery_id])

    def meta(self, celery_id: str) -> dict[str, Any] | None:
        """How a task ends, as Celery's results have it."""
        if (ended := self.end_of(celery_id)) is None:
            return None
        task_id = self._numbers[celery_id]
        succeeded = ended.state is State.SUCCESS
        return {
            "status": CELERY_STATE[ended.state],
            "result": codec.decode_result(ended.value) if succeeded else self._failure(task_id),
            "traceback": ended.trace,
            "task_id": celery_id,
            "name": self._specs[task_id].name,
            "children": [],
        }

    def _failure(self, task_id: int) -> BaseException:
        """What to raise for a task that did not succeed."""
        if (cause := self._cause(task_id)) is not None:
            return cause
        name = self._specs[task_id].name
        if self._ended[task_id].state is State.CANCELLED:
            return TaskCancelled(f"task {task_id} ({name}) has withdrawn itself.", task_id)
        return TaskSkipped(f"task {task_id} ({name}) was skipped: a dependency made it impossible.", task_id)

    def _cause(self, task_id: int) -> BaseException | None:
        """What this task has raised, or what something has that it waited for."""
        seen, look = {task_id}, [task_id]
        while look:
            found = look.pop(0)
            if (error := self._ended[found].failure()) is not None:
                return error
            if self._ended[found].state is not State.SUCCESS:
                new = [d.upstream for d in self._specs[found].dependencies if d.upstream not in seen]
                seen.update(new)
                look += new
        return None

    # -- running ------------------------------------------------------------------------------------------------------

    def _run(self, ids: Iterable[int]) -> None:
        graph = {task_id: self._specs[task_id].dependencies for task_id in sorted(ids)}
        for task_id in deps.in_order(graph):
            if task_id not in self._began:  # one before it may have asked for it
                self._began.add(task_id)
                self._ended[task_id] = self._end(task_id)

    def _end(self, task_id: int) -> _Ended:
        # What it has come to wait for since the run was ordered: of a task that was replaced, or joined its group.
        self._run(self._needed(d.upstream for d in self._specs[task_id].dependencies) - self._began)
        spec = self._specs[task_id]
        upstream = [(d.condition, self._ended[d.upstream].state) for d in spec.dependencies]
        if any(deps.is_impossible(condition, state) for condition, state in upstream):
            return _Ended(State.SKIPPED)
        if spec.requirement.pattern is Pattern.GROUP:
            values = [self._ended[member].value for member in spec.inputs]
            return _Ended(
                deps.group_end(state for _, state in upstream), b"[%s]" % b",".join(values) if values else b"null"
            )
        run = self._command if spec.requirement.pattern is Pattern.SHELL else self._function
        for attempt in range(1, spec.max_attempts + 1):
            try:
                ended = run(
                    spec, {"AQUE_TASK_ID": str(spec.id), "AQUE_TID": str(spec.id), "AQUE_ATTEMPT": str(attempt)}
                )
            except Replaced as replaced:
                self._specs[spec.id] = _replaced(spec, replaced.replacement)
                return self._end(spec.id)
            if ended.state is not State.ERROR:
                break
        return ended

    def _function(self, spec: TaskSpec, variables: Mapping[str, str]) -> _Ended:
        try:
            if spec.requirement.interpreter not in ("", OWN_INTERPRETER):
                raise BadInput(f"{spec.name} is for {spec.requirement.interpreter}: this process cannot run it.")
            task = child.load(spec.function, self._app)
            args, kwargs = codec.decode_arguments(spec.arguments, {i: self._input(i) for i in spec.inputs})
        except Exception as error:
            return _Ended(State.ERROR, error=error)
        celery_id = spec.celery_id or str(spec.id)
        self._running[celery_id] = spec
        try:
            with _variables({**variables, "AQUE_CPUS": "1"}):
                result = task.apply(args, kwargs, task_id=celery_id, throw=False)
        finally:
            del self._running[celery_id]
        if isinstance(result.result, Replaced):
            raise result.result
        if result.state == SUCCESS:
            try:
                return _Ended(
                    State.SUCCESS, codec.encode_result(result.result, self._settings.result_limit_bytes) or b"null"
                )
            except ValueError as error:
                return _Ended(State.ERROR, error=error)
        if result.state == FAILURE:
            return _Ended(State.ERROR, error=result.result, trace=result.traceback)
        return _Ended(State.CANCELLED)  # it raised Ignore or Reject

    def _input(self, task_id: int) -> bytes:
        """What those that wait for a task get of it."""
        ended = self._ended[task_id]
        if ended.error is None or ended.value != b"null":
            return ended.value
        error = ended.error
        return codec.encode_error(f"{type(error).__module__}.{type(error).__qualname__}", str(error), ended.trace or "")

    def _command(self, spec: TaskSpec, variables: Mapping[str, str]) -> _Ended:
        environment = dict(pair.split(b"=", 1) for pair in spec.environment.split(b"\0") if pair)
        environment |= {os.fsencode(name): os.fsencode(value) for name, value in variables.items()}
        files = spec.redirections
        try:
            with ExitStack() as opened:
                stdin, stdout, stderr = (
                    None if path is None else opened.enter_context(open(os.path.join(spec.cwd, path), mode))
                    for path, mode in ((files.stdin, "rb"), (files.stdout, "wb"), (files.stderr, "wb"))
                )
                done = subprocess.run(
                    spec.argv,
                    cwd=spec.cwd,
                    env=environment,
                    umask=spec.umask,
                    stdin=stdin if spec.stdin is None else None,
                    input=spec.stdin if spec.stdin is not None or stdin is not None else b"",
                    stdout=stdout or subprocess.PIPE,
                    stderr=stderr,
                    timeout=spec.time_limit_seconds,
                    check=False,
                )
        except (OSError, subprocess.TimeoutExpired) as error:
            return _Ended(State.ERROR, error=CommandFailed(f"task {spec.id} ({spec.name}) failed: {error}", spec.id))
        written = done.stdout or b""
        code = done.returncode
        end = {
            "exit_code": None if code < 0 else code,
            "stdout": written[:STDOUT_LIMIT].decode(errors="backslashreplace"),
            "truncated": len(written) > STDOUT_LIMIT,
        }
        if code == 0:
            return _Ended(State.SUCCESS, json.dumps(end).encode())
        how = f"was ended by signal {-code}" if code < 0 else f"exited with status {code}"
        reason = Reason.SIGNAL if code < 0 else Reason.EXIT
        failed = CommandFailed(f"task {spec.id} ({spec.name}) {how}.", spec.id, str(reason))
        return _Ended(State.ERROR, json.dumps(end).encode(), failed)


def _replaced(spec: TaskSpec, new: Replacement) -> TaskSpec:
    """A row that another task has taken over."""
    known = {d.upstream for d in spec.dependencies}
    more = tuple(d for d in new.dependencies if d.upstream not in known)
    return replace(
        spec,
        name=new.name,
        function=new.function,
        arguments=new.arguments,
        inputs=new.inputs,
        dependencies=(*spec.dependencies, *more),
    )


@contextmanager
def _variables(wanted: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Drafts(Submitter):
    """Makes rows as any submitter does, and gives them to a run in place of a store."""

    def __init__(self, run: _Run, settings: Settings) -> None:
        nowhere: Any = None  # nothing below asks the store
        super().__init__(nowhere, settings)
        self._run = run
        self._next = count(FIRST_ID)

    def reserve(self, count: int) -> list[int]:
        return [next(self._next) for _ in range(count)]

    def next_id(self) -> int:
        return next(self._next)

    def submit(self, specs: Sequence[TaskSpec], joins: tuple[int, int] | None = None) -> dict[int, State]:
        if joins is not None:
            self._run.join(*joins)
        return self._run.add(specs)

    def class_of(self, spec: TaskSpec) -> int:
        """Any: nothing is claimed here."""
        return 0

    def check_possible(self, specs: Iterable[TaskSpec]) -> None:
        """This process runs everything."""

    def _parent(self) -> int | None:
        """None: what a child inherits has no effect here, and is in the store."""
        return None


class _Results(Backend):
    """The ends of a run's tasks as Celery's results: to ask for one is to run it."""

    def __init__(self, run: _Run, app: Celery) -> None:
        super().__init__(app=app)
        self._run = run

    def _metas(self, celery_ids: list[str]) -> dict[str, dict[str, Any]]:
        return {celery_id: meta for celery_id in celery_ids if (meta := self._run.meta(celery_id)) is not None}

    def wait_for_pending(self, result: Any, *_: Any, callback: Any = None, propagate: bool = True, **__: Any) -> Any:
        if (meta := self._run.meta(result.id)) is None:
            raise UnknownTask([result.id], "It cannot be waited for.")
        result._maybe_set_cache(meta)
        return result.maybe_throw(propagate=propagate, callback=callback)

    def _wait(self, celery_ids: list[str], *_: Any) -> Iterator[dict[str, Any]]:
        metas = self._metas(celery_ids)
        if unknown := [celery_id for celery_id in celery_ids if celery_id not in metas]:
            raise UnknownTask(unknown, "They cannot be waited for.")
        yield from metas.values()
