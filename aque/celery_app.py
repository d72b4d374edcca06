"""Aque for Celery people: `@aque.task`, `aque.shell`, `aque.graph`, `aque.setup(app)`, and the app of
`celery -A aque.celery_app worker`."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property
from typing import Any, overload

from celery import Celery, current_app, shared_task
from celery import Task as CeleryTask
from celery._state import get_current_task
from celery.local import Proxy
from celery.result import AsyncResult

import aque.transport  # noqa: F401  registers aque+sqlite and aque+postgresql with kombu
from aque import codec, control, machine
from aque.backend import Backend
from aque.bootstep import ConsumerStep, WorkerStep
from aque.errors import BadInput, NotSubmittable, UnknownTask
from aque.farm import farm_of
from aque.submitter import Options, Submitter
from aque.values import Condition, Dependency, TaskSpec

#: Options of a task that its decorator, and each call, may give; see `submitter.Options` for what they mean.
TASK_OPTIONS = (
    "queue",
    "priority",
    "cpus",
    "memory",
    "host",
    "platform",
    "resources",
    "limits",
    "tags",
    "requires_paths",
    "duration",
    "io_paths",
    "io",
    "time_limit",
    "soft_time_limit",
    "max_attempts",
    "requeue",
    "strict_lease",
    "interpreter",
    "user",
    "layer",
)
#: Options that say what a call waits for.
DEPENDENCY_OPTIONS = {"depends_on": Condition.OK, "after_any": Condition.ANY, "after_failed": Condition.FAILED}


class Handle(AsyncResult):
    """A submitted task: `.id` (its decimal id as text), `.get()`, `.state`, and everything else that Celery's AsyncResult
    has. As an argument of another task it stands for this one's result, and makes it a dependency."""

    @cached_property
    def number(self) -> int:
        """The id in the table, also where a caller brought another one."""
        if self.id.isdecimal():
            return int(self.id)
        store = farm_of(self.app).store
        with store.connect() as connection:
            found = store.ids_of(connection, [self.id])
        if self.id not in found:
            raise UnknownTask([self.id], "It cannot be used.")
        return found[self.id]

    def kill(
        self,
        signal: str | int = "TERM",
        *,
        grace_seconds: float | None = None,
        dependencies: bool = False,
        dependents: bool = False,
    ) -> None:
        """Withdraw the task if it waits, signal it if it runs; the options are those of `aque kill`."""
        control.kill(
            farm_of(self.app).store,
            [self.number],
            control.parse_signal(signal),
            grace_seconds=grace_seconds,
            dependencies=dependencies,
            dependents=dependents,
        )


codec.register_handle(Handle, lambda handle: handle.number)


class Graph:
    """Tasks that are submitted together, in one transaction; made by `aque.graph()`.

    It is a job: a row of its own, whose id every verb takes, and that is complete when all its tasks are.
    """

    def __init__(self, app: Celery, name: str) -> None:
        self._app = app
        self._name = name
        self._submitter = _submitter(app)
        self._specs: dict[int, TaskSpec] = {}
        self._ids: list[int] = []
        self._block = 16
        self.id = self.new_id()

    def new_id(self) -> int:
        """An id for the next task; reserved in blocks, so that a large graph asks the store rarely."""
        if not self._ids:
            self._ids = self._submitter.reserve(self._block)[::-1]
            self._block = min(self._block * 4, 4096)
        return self._ids.pop()

    def add(self, spec: TaskSpec) -> None:
        """Add a task to the job."""
        self._specs[spec.id] = spec

    def place(self) -> dict[str, Any]:
        """The next task's place in the job."""
        return {"job_id": self.id, "seq": len(self._specs)}

    def depend(self, task: Handle | int, *, on: Handle | int, condition: str = "ok") -> None:
        """Let a task of this graph wait for another, in or outside of it. `condition`: "ok", "any" or "failed"."""
        task_id = _id(task)
        if task_id not in self._specs:
            raise BadInput(f"task {task_id} is not part of this graph, so it cannot get a dependency any more.")
        spec = self._specs[task_id]
        edges = dict.fromkeys((*spec.dependencies, Dependency(_id(on), _condition(condition))))
        self._specs[task_id] = replace(spec, dependencies=tuple(edges))

    @property
    def handle(self) -> Handle:
        """The job as a task: `.get()` waits for all of it."""
        return Handle(str(self.id), app=self._app, backend=_backend(self._app))

    def submit(self) -> None:
        """Write everything; `aque.graph()` calls it at the end of its block."""
        members = tuple(Dependency(task_id, Condition.ANY) for task_id in self._specs)
        options = Options(name=self._name, dependencies=members, job_id=self.id)
        self._submitter.submit([*self._specs.values(), self._submitter.group(self.id, options)])


_graph: ContextVar[Graph | None] = ContextVar("_graph", default=None)


@contextmanager
def graph(name: str = "graph", app: Celery | None = None) -> Iterator[Graph]:
    """Submit everything that the block submits in one transaction at its end: all of it or, with an exception, nothing.

    Handles have their ids at once, so tasks of the block can depend on each other:

        with aque.graph("report") as job:
            parts = [count.delay(path) for path in paths]
            merge.delay(parts)
        job.handle.get()
    """
    if _graph.get() is not None:
        raise BadInput(
            "a graph is open already in this context: graphs are not nested, their tasks can depend on each other."
        )
    opened = Graph(app or _app(), name)
    token = _graph.set(opened)
    try:
        yield opened
    finally:
        _graph.reset(token)
    opened.submit()


class Task(CeleryTask):
    """A Celery task that goes through the table instead of a message."""

    abstract = True
    Strategy = "aque.celery_app:refuse_message"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Celery makes a class of each decorated function, with the options as its attributes: a function among them would
        # become a method, and get the task in place of its first argument.
        if "_decorated" in vars(cls) and inspect.isfunction(vars(cls).get("io_paths")):
            cls.io_paths = staticmethod(vars(cls)["io_paths"])

    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        task_id: str | None = None,
        *,
        depends_on: Any = (),
        after_any: Any = (),
        after_failed: Any = (),
        hints: Mapping[str, Any] | None = None,
        strict: bool = False,
        **options: Any,
    ) -> Handle:
        """Submit a call. `depends_on`, `after_any`, `after_failed`: handles or ids, one or several. `strict`: refuse what no
        live worker could ever run.

        Raises NotSubmittable for what no worker could load, BadInput for an option that cannot work; then nothing was
        submitted.
        """
        app = self._get_app()
        if app.conf.task_always_eager:
            return self.apply(args, kwargs, task_id=task_id)
        submitter = _submitter(app)
        if self.typing:
            self.__header__(*(args or ()), **(kwargs or {}))  # the signature, checked as Celery does
        if task_id is not None and str(task_id).isdecimal():
            raise BadInput("a task_id of digits only would be taken for an id of the table: bring another, or none.")
        function = self._function
        arguments, inputs = codec.encode_arguments(args or (), kwargs or {})
        given = {name: getattr(self, name) for name in TASK_OPTIONS if getattr(self, name, None) is not None}
        given |= _known({**(hints or {}), **options})
        if callable(given.get("io_paths")):
            given["io_paths"] = given["io_paths"](*(args or ()), **(kwargs or {}))
        edges = _edges({"depends_on": depends_on, "after_any": after_any, "after_failed": after_failed})
        edges += [Dependency(i) for i in inputs if Dependency(i) not in edges]
        job = _graph.get()
        place: dict[str, Any] = {} if job is None else job.place()
        chosen = Options(**given, dependencies=tuple(edges), celery_id=task_id, **place)
        new = job.new_id() if job is not None else submitter.next_id()
        spec = submitter.function(new, function, self.name, arguments, inputs, chosen)
        _submit(submitter, job, spec, strict)
        handle = Handle(task_id or str(new), app=app, backend=_backend(app), task_name=self.name)
        handle.number = new
        return handle

    def retry(self, *args: Any, exc: Exception | None = None, **options: Any) -> Any:
        """Ends the attempt with `exc`: an attempt is repeated as often as `max_attempts` says, without being asked."""
        raise exc or BadInput("self.retry() is not supported yet: give the task max_attempts, and raise an exception.")

    @cached_property
    def _function(self) -> str:
        return function_name(self)

    @property
    def backend(self) -> Backend:
        """Results of this task are in the table, whatever the app's backend for other tasks is."""
        return _backend(self._get_app())

    def AsyncResult(self, task_id: str, **kwargs: Any) -> Handle:
        """The task with this id."""
        app = self._get_app()
        return Handle(str(task_id), app=app, backend=_backend(app), task_name=self.name, **kwargs)


def refuse_message(task: Any, app: Any, consumer: Any, **_: Any) -> Callable[..., None]:
    """Celery's strategy for Aque tasks that come as a message: nobody who owns a row sent it."""

    def strategy(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **_: Any) -> None:
        consumer.on_unknown_task(body, message, f"{task.name} runs from the table only")

    return strategy


@overload
def task(function: Callable[..., Any], /) -> Task: ...


@overload
def task(**options: Any) -> Callable[[Callable[..., Any]], Task]: ...


def task(*args: Any, **options: Any) -> Any:
    """Make a function a task that goes through the table: `@aque.task` or `@aque.task(cpus=0.5, memory="1G")`.

    Takes Celery's options and `queue priority cpus memory resources limits tags host platform requires_paths duration io_paths
    io time_limit soft_time_limit max_attempts requeue layer`. `io_paths` may be a function that gets a call's arguments and
    returns the list.
    The function must be found by its name in its module: workers import it. The task belongs to the current Celery app.
    """
    for function in args:
        if getattr(function, "__name__", "") == "<lambda>":
            raise NotSubmittable("a lambda cannot be a task, a worker could not find it by name: define a function.")
    options.setdefault("base", Task)
    return shared_task(*args, **options)


def shell(
    argv: Sequence[str | bytes],
    *,
    stdin: bytes | str | os.PathLike[str] | None = None,
    stdout: str | os.PathLike[str] | None = None,
    stderr: str | os.PathLike[str] | None = None,
    login: bool = False,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    depends_on: Any = (),
    after_any: Any = (),
    after_failed: Any = (),
    hints: Mapping[str, Any] | None = None,
    strict: bool = False,
    app: Celery | None = None,
    **options: Any,
) -> Handle:
    """Submit a command, executed without a shell: `aque.shell(["gzip", "file"], cpus=0.5)`.

    `env` and `cwd` are this process's unless given. `stdin` is bytes, stored with the task, or the path of a file; `stdout` and
    `stderr` are paths, else what it writes is captured. Files are opened on the worker, as the task's user, below `cwd`.
    `login` runs it in the user's login shell. Its result is {"exit_code", "stdout", "truncated"}; `.get()` of one that failed
    raises CommandFailed. `strict` refuses what no live worker could ever run.
    """
    if isinstance(argv, (str, bytes)):
        raise BadInput(f"argv must be a list of words, not one text: ['sh', '-c', {argv!r}] runs it in a shell.")
    app = app or _app()
    submitter = _submitter(app)
    edges = _edges({"depends_on": depends_on, "after_any": after_any, "after_failed": after_failed})
    job = _graph.get()
    place: dict[str, Any] = {} if job is None else job.place()
    chosen = Options(**_known({**(hints or {}), **options}), dependencies=tuple(edges), **place)
    new = job.new_id() if job is not None else submitter.next_id()
    variables = None if env is None else {os.fsencode(k): os.fsencode(v) for k, v in env.items()}
    stored = stdin if isinstance(stdin, (bytes, bytearray, memoryview, type(None))) else None
    files = (None if isinstance(stdin, (bytes, bytearray, memoryview)) else stdin, stdout, stderr)
    spec = submitter.command(
        new,
        argv,
        chosen,
        stdin=None if stored is None else bytes(stored),
        redirections=submitter.redirections(*files),
        login=login,
        cwd=cwd,
        env=variables,
    )
    _submit(submitter, job, spec, strict)
    return Handle(str(new), app=app, backend=_backend(app), task_name=spec.name)


def tasks(
    where: Mapping[str, Any] | None = None, fields: Sequence[str] | None = None, app: Celery | None = None
) -> Iterator[dict[str, Any]]:
    """Query the table: `aque.tasks({"state": "ready"}, ["id", "name"])`; see Store.tasks for the fields."""
    store = farm_of(app or _app()).store
    with store.connect() as connection:
        yield from store.tasks(connection, where, fields)


class CurrentTask:
    """The task that this code runs in."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        parent = environ.get("AQUE_PARENT_ID")
        self.id = int(environ["AQUE_TASK_ID"])
        self.attempt = int(environ["AQUE_ATTEMPT"])
        self.cpus = float(environ["AQUE_CPUS"])
        self.parent_id = None if parent is None else int(parent)
        self.request = getattr(get_current_task(), "request", None)


def current_task() -> CurrentTask | None:
    """The task that this code runs in, in a Python task or below a command; None outside."""
    return CurrentTask(os.environ) if os.environ.get("AQUE_TASK_ID", "").isdecimal() else None


# -- apps -----------------------------------------------------------------------------------------------------------------


def setup(app: Celery) -> Celery:
    """Give an existing Celery app Aque: its workers run tasks of the table beside its own, on one budget of CPUs.

    `@app.task` keeps Celery's path; `@aque.task`, or `@app.task(base=aque.Task)`, goes through the table. What the app
    has configured stays; without a broker it gets the farm's.
    """
    app.steps["worker"].add(WorkerStep)
    app.steps["consumer"].add(ConsumerStep)
    app.add_defaults(lambda: _defaults(app))
    app.set_default()
    return app


def _defaults(app: Celery) -> dict[str, Any]:
    settings = machine.settings_here()
    return {
        "broker_url": settings.celery_broker_url,
        "broker_connection_retry_on_startup": True,
        "worker_concurrency": machine.usable_cpus(),
        "worker_lost_wait": 1.0,  # results of a child that is gone arrive at once or never
        "accept_content": ["json"],
    }


class App(Celery):
    """A Celery app all of whose tasks go through the table."""

    task_cls = Task

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.config_from_envvar("CELERY_CONFIG_MODULE", silent=True)
        setup(self)
        self.add_defaults(
            lambda: {
                "result_backend": "aque.backend:Backend",
                "task_default_queue": machine.settings_here().default_queue,
            }
        )


app = App("aque")


def run_worker(
    *,
    cpus: str | None,
    memory: str | None,
    resources: str | None,
    tags: str | None,
    pin: bool,
    queues: list[str] | None,
    concurrency: int | None,
    name: str | None,
    until: str | None,
    reload: bool,
    loglevel: str,
    celery_args: list[str],
) -> int:
    """`aque worker`: Celery's worker with this module's app; its exit status."""
    chosen = {"aque_cpus": cpus, "aque_memory": memory, "aque_resources": resources, "aque_tags": tags, "aque_pin": pin}
    chosen |= {"aque_until": until, "aque_reload": reload}
    app.conf.update({key: value for key, value in chosen.items() if value})
    arguments = ["worker", "--loglevel", loglevel]
    if queues:
        arguments += ["-Q", ",".join(queues)]
    if concurrency:
        arguments += ["-c", str(concurrency)]
    if name:
        arguments += ["-n", name]
    try:
        app.worker_main([*arguments, *celery_args])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def function_name(called: CeleryTask) -> str:
    """ "module:qualname" by which a worker finds the task. Raises NotSubmittable with the fix."""
    function = getattr(called.run, "__wrapped__", called.run)
    module_name, qualname = function.__module__, function.__qualname__
    if "<" in qualname:
        kind = "a lambda" if "<lambda>" in qualname else "defined inside another function"
        raise NotSubmittable(
            f"{qualname} is {kind}: a worker could not find it by name. Nothing was submitted: define it at the top of a "
            "module."
        )
    if module_name == "__main__":
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        if spec is None:
            raise NotSubmittable(
                f"{qualname} is defined in the script that runs: a worker could not import it. Nothing was submitted: move it "
                "into a module, or start the script with `python -m`."
            )
        module_name = spec.name
    try:
        found: Any = importlib.import_module(module_name)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise NotSubmittable(
            f"{module_name}:{qualname} cannot be found by name: {error}. Nothing was submitted."
        ) from error
    if isinstance(found, Proxy):
        found = found._get_current_object()
    is_this_task = isinstance(found, CeleryTask) and found.name == called.name
    if not is_this_task and found is not called.run:
        raise NotSubmittable(
            f"{module_name}:{qualname} is not the task {called.name}: a worker would run something else. Nothing was "
            "submitted: "
            "define the task with its decorator, under its own name, at the top of a module."
        )
    return f"{module_name}:{qualname}"


def _app() -> Celery:
    """The app that was set up last, or Aque's own."""
    current = current_app._get_current_object()
    return current if WorkerStep in current.steps["worker"] else app


_submitters: dict[int, Submitter] = {}
_backends: dict[int, Backend] = {}


def _submitter(app: Celery) -> Submitter:
    farm = farm_of(app)
    key = id(farm.store)  # the store stays open as long as the process
    if key not in _submitters:
        _submitters[key] = Submitter(farm.store, farm.settings)
    return _submitters[key]


def _backend(app: Celery) -> Backend:
    if id(app) not in _backends:
        _backends[id(app)] = Backend(app=app)
    return _backends[id(app)]


def _submit(submitter: Submitter, job: Graph | None, spec: TaskSpec, strict: bool) -> None:
    if strict:
        submitter.check_possible([spec])
    if job is not None:
        job.add(spec)
    else:
        submitter.submit([spec])


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    """Only options that mean something here; others would be silently lost."""
    known = {**options}
    known_names = (*TASK_OPTIONS, *DEPENDENCY_OPTIONS)
    if unknown := set(known) - {*TASK_OPTIONS, "name"}:
        raise BadInput(f"unknown task options {', '.join(sorted(unknown))}; there are {', '.join(known_names)}.")
    for name in ("io_paths", "requires_paths", "tags"):
        if isinstance(known.get(name), list):
            known[name] = tuple(known[name])
    return known


def _edges(given: Mapping[str, Any]) -> list[Dependency]:
    edges = []
    for name, upstream in given.items():
        several = upstream if isinstance(upstream, (list, tuple, set, frozenset)) else [upstream]
        edges += [Dependency(_id(one), DEPENDENCY_OPTIONS[name]) for one in several]
    return edges


def _id(task: Handle | int | str) -> int:
    text = str(task.number) if isinstance(task, Handle) else str(task)
    if not text.isdecimal():
        raise BadInput(f"a dependency must be a task handle or an id, not {task!r:.60}.")
    if len(text) > LONGEST_ID:
        raise UnknownTask([text])
    return int(text)


#: A bigint has 19 digits; no sequence gets there.
LONGEST_ID = 18


def _condition(text: str) -> Condition:
    try:
        return Condition(text)
    except ValueError:
        raise BadInput(f"there is no condition {text!r}: a dependency is ok, any or failed.") from None


__all__ = ["App", "Graph", "Handle", "Task", "app", "current_task", "graph", "setup", "shell", "task", "tasks"]
