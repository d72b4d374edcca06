"""Aque for Celery people: `@aque.task`, `aque.shell`, `aque.graph`, `aque.setup(app)`, and the app of
`celery -A aque.celery_app worker`."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

import click
from celery import Celery, current_app, shared_task
from celery._state import get_current_task

import aque.transport  # noqa: F401  registers aque+sqlite and aque+postgresql with kombu
from aque import canvas, current, ingress, machine, whole_app
from aque.bootstep import ConsumerStep, WorkerStep
from aque.celery_task import Task
from aque.errors import AqueError, BadInput, NotSubmittable
from aque.farm import farm_of, settings_of
from aque.graphs import Graph, submit_or_add
from aque.handles import Handle, backend_of, open_graph, submitter_of
from aque.options import Options
from aque.task_options import TASK_OPTIONS, edges_of, known_options, meant


@contextmanager
def graph(name: str = "graph", app: Celery | None = None) -> Iterator[Graph]:
    """Submit everything that the block submits in one transaction at its end: all of it or, with an exception, nothing.

    Handles have their ids at once, so tasks of the block can depend on each other:

        with aque.graph("report") as job:
            parts = [count.delay(path) for path in paths]
            merge.delay(parts)
        job.handle.get()
    """
    if open_graph.get() is not None:
        raise BadInput(
            "a graph is open already in this context: graphs are not nested, their tasks can depend on each other."
        )
    opened = Graph(app or app_in_use(), name)
    token = open_graph.set(opened)
    try:
        yield opened
    finally:
        open_graph.reset(token)
    opened.submit()


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
    # Attributes of a site's own are Celery's way: refused is only what looks like a slip.
    unknown = [name for name in options if not hasattr(Task, name) and name not in TASK_OPTIONS]
    if slips := [name for name in unknown if meant([name])]:
        raise BadInput(f"there is no task option {slips[0]!r}{meant(slips[:1])}. The task was not made.")
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
    app = app or app_in_use()
    submitter = submitter_of(app)
    edges = edges_of({"depends_on": depends_on, "after_any": after_any, "after_failed": after_failed})
    job = open_graph.get()
    place: dict[str, Any] = {} if job is None else job.place()
    chosen = Options(**known_options({**(hints or {}), **options}), dependencies=tuple(edges), **place)
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
    submit_or_add(submitter, job, spec, strict)
    return Handle(str(new), app=app, backend=backend_of(app), task_name=spec.name)


def tasks(
    where: Mapping[str, Any] | None = None, fields: Sequence[str] | None = None, app: Celery | None = None
) -> Iterator[dict[str, Any]]:
    """Query the table: `aque.tasks({"state": "ready"}, ["id", "name"])`; see Store.tasks for the fields."""
    store = farm_of(app or app_in_use()).store
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
    variables = current.variables()
    return CurrentTask(variables) if variables.get("AQUE_TASK_ID", "").isdecimal() else None


# -- apps -----------------------------------------------------------------------------------------------------------------


def setup(app: Celery, tasks: str = "own") -> Celery:
    """Give an existing Celery app Aque: its workers run tasks of the table beside its own, on one budget of CPUs.

    tasks="own": `@app.task` keeps Celery's path; `@aque.task`, or `@app.task(base=aque.Task)`, goes through the table.
    tasks="all": every task of the app goes through the table, and results are the table's (`app.AsyncResult`, `app.backend`).

    It becomes the current app, as every app of Celery's does that was not made with `set_as_current=False`.
    Whatever else the app has configured stays, before this call or after it; without a broker it gets the farm's. Raises
    BadInput for another word, and for an app that was set up in the other way.
    """
    if not isinstance(app, Celery):
        raise BadInput(f"aque.setup takes a Celery app, not {app!r:.60}: aque.setup(Celery('name')).")
    if tasks not in ("own", "all"):
        raise BadInput(
            "aque.setup takes tasks='own' (what @aque.task decorates goes through the table) or tasks='all' (every task of the "
            f"app does), not {tasks!r:.60}."
        )
    app = app._get_current_object() if hasattr(app, "_get_current_object") else app
    before = getattr(app, "aque_tasks", None)
    if before is not None:
        if before != tasks:
            raise BadInput(
                f"this app was set up already, with tasks={before!r}, and cannot be with tasks={tasks!r} any more: set it up "
                "once, where it is made."
            )
        return app
    app.aque_tasks = tasks
    canvas.install()
    app.steps["worker"].add(WorkerStep)
    app.steps["consumer"].add(ConsumerStep)
    whole_app.install(app)
    if tasks == "all":
        whole_app.take_results(app)
    if app.configured:
        _configure(app)
    app.on_after_configure.connect(_configure, sender=app)  # anew whenever it is given another configuration
    ingress.register(app)
    # Tasks of `shared_task` and `aque.task` are this app's, in this thread (where the import of this module has made Aque's own
    # app the current one) and in all others; unless it was made with `set_as_current=False`.
    if app.set_as_current:
        app.set_current()
        app.set_default()
    return app


def _configure(sender: Celery, **_: Any) -> None:
    """Aque's defaults, where the app has configured nothing. Not by Celery's `add_defaults` alone: what that is given
    outweighs what `config_from_object` has read, and is forgotten with the next configuration."""
    conf = sender.conf

    def is_configured(name: str) -> bool:
        return bool(conf.value_set_for(name) and conf.get(name) is not None)

    try:
        defaults = _defaults(sender)
    except AqueError as error:
        _end_program(error)
        raise
    conf.add_defaults({name: value for name, value in defaults.items() if not is_configured(name)})
    if sender.aque_tasks == "all":
        whole_app.configure_results(sender)


def _end_program(error: AqueError) -> None:
    """End the program `celery` with this error: Celery's signals would swallow it, and the program would go on with a broker
    that nobody has named. Any other process goes on."""
    from celery.bin.base import CLIContext

    context = click.get_current_context(silent=True)
    if context is not None and context.find_object(CLIContext) is not None:
        click.echo(f"celery: {error}", err=True)
        raise SystemExit(error.exit_status)


def _defaults(app: Celery) -> dict[str, Any]:
    settings = settings_of(app)
    return {
        "broker_url": app.conf.broker_url or settings.celery_broker_url,  # Celery's test apps have one by default
        "broker_connection_retry_on_startup": True,
        "worker_concurrency": machine.usable_cpus(),
        "worker_lost_wait": 1.0,  # results of a child that is gone arrive at once or never
        "accept_content": ["json"],
        "task_default_queue": settings.default_queue,
    }


class App(Celery):
    """A Celery app all of whose tasks go through the table."""

    task_cls = Task

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.config_from_envvar("CELERY_CONFIG_MODULE", silent=True)
        setup(self, tasks="all")


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


def app_in_use() -> Celery:
    """The app that was set up last, or Aque's own."""
    current = current_app._get_current_object()
    return current if WorkerStep in current.steps["worker"] else app


__all__ = ["App", "Graph", "Handle", "Task", "app", "current_task", "graph", "setup", "shell", "task", "tasks"]
