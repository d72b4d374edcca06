"""What a child of the process pool, or a thread, does with one Python task: import the function, run it, encode its end.

Only plain bytes and texts go back to the worker: it never unpickles or imports what a task made.
"""

import difflib
import os
import resource
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import monotonic
from types import FunctionType
from typing import Any

from celery import Celery, Task, current_app
from celery._state import get_current_task
from celery.app.trace import build_tracer
from celery.exceptions import Ignore, Reject
from celery.result import allow_join_result

from aque import codec, contain, current, naming
from aque.patterns import Retry
from aque.states import Reason
from aque.within import Replaced, TryAgain, adopt

#: How it ended, then what of it, then seconds:
#: "success", (encoded result or None, its repr for events); "error", (reason, encoded error);
#: "again", (the fields of a `values.Again`, encoded error); "withdrawn", (reason, text);
#: "replaced", (the fields of a `values.Replacement`, its dependencies as pairs).
Answer = tuple[str, Any, float]
#: The fields of `values.Usage`; None in a pool of threads, which share one process.
Used = tuple[float, int, int, int] | None
ChildResult = tuple[str, Any, float, Used]


class CannotImport(Exception):
    """The function cannot be loaded by its name in this process."""


def load(function: str, app: Celery) -> Task:
    """The Celery task behind "module:qualname", where a plain function becomes one, or "@name", as which the app knows it.
    Raises CannotImport."""
    loaded: dict[str, Task] = vars(app).setdefault("aque_loaded", {})  # the app's own: they refer to it
    if (found := loaded.get(function)) is not None:
        return found
    if function.startswith("@"):
        target = _registered(function[1:], app)
    else:
        target = _imported(function, app)
    if target.__trace__ is None:
        target.__trace__ = build_tracer(target.name, target, app.loader, app=app)
    adopt(target)
    loaded[function] = target
    return target


def _registered(name: str, app: Celery) -> Task:
    app.finalize(auto=True)
    app.loader.import_default_modules()
    if (found := app.tasks.get(name)) is not None:
        return found
    near = difflib.get_close_matches(name, app.tasks.keys(), 3)
    hint = f" (it has {len(app.tasks)}; like it: {', '.join(near)})" if near else ""
    raise CannotImport(f"there is no task {name} in the worker's app{hint}: it must import the module that defines it")


def _imported(function: str, app: Celery) -> Task:
    try:
        target = naming.find(function)
    except Exception as error:
        raise CannotImport(f"cannot load {function}: {type(error).__name__}: {error}") from error
    if not callable(target):
        raise CannotImport(f"cannot load {function}: it is no function but a {type(target).__name__}")
    if isinstance(target, Task):
        return target
    return app._task_from_fun(_plain(target), name=function.replace(":", "."), ignore_result=True)


def _plain(target: Callable[..., Any]) -> Callable[..., Any]:
    """Celery makes tasks of plain functions only: this is one for a builtin, a class or any other callable."""
    if isinstance(target, FunctionType):
        return target

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return target(*args, **kwargs)
        except Retry as wanted:
            raise get_current_task().retry(
                exc=wanted.error, countdown=wanted.countdown, max_retries=wanted.max_retries
            ) from wanted

    call.__doc__ = f"Calls {target!r}."
    return call


def run(
    function: str,
    uuid: str,
    request: dict[str, Any],
    arguments: bytes,
    results: Mapping[int, bytes],
    variables: Mapping[str, str],
    import_path: tuple[str, ...],
    result_limit_bytes: int,
    kill_grace_seconds: float,
    cpus: tuple[int, ...],
) -> ChildResult:
    """Run one attempt, bound to `cpus` (none: not bound); never raises for anything that the task did. No process of the
    attempt outlives it: a signal that ends this child reached the others too, and leaves them the grace."""
    own = {name: os.environ[name] for name in variables if not name.startswith("AQUE_") and name in os.environ}
    os.environ.update(variables)
    before, grace_seconds = contain.present(), kill_grace_seconds
    affinity = os.sched_getaffinity(0) if cpus else set()
    meter = _Meter() if contain.is_pool_child() else None
    try:
        if cpus:
            os.sched_setaffinity(0, cpus)
        answer = _run(function, uuid, request, arguments, results, import_path, result_limit_bytes)
        grace_seconds = 0.0
    finally:
        contain.leave_nothing(before, grace_seconds)
        if cpus:
            os.sched_setaffinity(0, affinity)
        for name in variables:
            if name != "AQUE_BROKER":  # the others are this task's alone
                os.environ.pop(name, None)
        os.environ.update(own)
    return (*answer, None if meter is None else meter.used())


def run_in_thread(
    function: str,
    uuid: str,
    request: dict[str, Any],
    arguments: bytes,
    results: Mapping[int, bytes],
    variables: Mapping[str, str],
    import_path: tuple[str, ...],
    result_limit_bytes: int,
    cpus: tuple[int, ...],
) -> ChildResult:
    """`run` for a thread of the worker's own process. That others share the process is all the difference: its environment is
    left alone, what the function starts is not known from what others start, and nothing is measured."""
    affinity = os.sched_getaffinity(0) if cpus else set()  # of the thread
    try:
        if cpus:
            os.sched_setaffinity(0, cpus)
        with current.in_thread(variables):
            answer = _run(function, uuid, request, arguments, results, import_path, result_limit_bytes)
    except SystemExit as error:
        exited = codec.encode_error("builtins.SystemExit", str(error.code), traceback.format_exc())
        answer = _error(Reason.EXCEPTION, exited, 0.0)
    finally:
        if cpus:
            os.sched_setaffinity(0, affinity)
    return (*answer, None)


class _Meter:
    """What this process, and the children that it has waited for, use from now on."""

    def __init__(self) -> None:
        with suppress(OSError), open("/proc/self/clear_refs", "wb", buffering=0) as file:
            file.write(b"5")  # the largest size so far is the present one from now on
        self._before = _used()

    def used(self) -> tuple[float, int, int, int]:
        """CPU seconds, this process's largest size in bytes, bytes read and written."""
        cpu_seconds, read, written = (now - then for now, then in zip(_used(), self._before, strict=True))
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return cpu_seconds, size * 1024, int(read) * 512, int(written) * 512


def _used() -> tuple[float, int, int]:
    """CPU seconds, and blocks of 512 bytes read and written."""
    mine, below = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = mine.ru_utime + mine.ru_stime + below.ru_utime + below.ru_stime
    return cpu_seconds, mine.ru_inblock + below.ru_inblock, mine.ru_oublock + below.ru_oublock


def _run(
    function: str,
    uuid: str,
    request: dict[str, Any],
    arguments: bytes,
    results: Mapping[int, bytes],
    import_path: tuple[str, ...],
    result_limit_bytes: int,
) -> Answer:
    began = monotonic()
    try:
        task = load(function, current_app._get_current_object())
    except CannotImport as error:
        text = str(error)
        if not function.startswith("@"):
            text += f". The worker imports from its own path only; the submitter's was {':'.join(import_path)}"
        return _error(Reason.CANNOT_IMPORT, codec.encode_error("ImportError", text), monotonic() - began)
    try:
        args, kwargs = codec.decode_arguments(arguments, results)
    except Exception as error:
        encoded = codec.encode_error(type(error).__name__, f"cannot decode the arguments: {error}")
        return _error(Reason.EXCEPTION, encoded, monotonic() - began)
    asks: list[TryAgain] = []
    request.update(args=args, kwargs=kwargs, is_eager=False, aque_asks=asks)
    try:
        with allow_join_result():  # who waits in a task holds no place: see `within.giving_way`
            value, info, _, shown = task.__trace__(uuid, args, kwargs, request)
    except SystemExit as error:  # the task's own doing: the child, which others need, goes on
        if isinstance(error.code, int) and -256 < error.code < 0:
            raise  # a signal's doing: billiard's handler exits with -(256 - signal)
        exited = codec.encode_error("builtins.SystemExit", str(error.code), traceback.format_exc())
        return _error(Reason.EXCEPTION, exited, monotonic() - began)
    seconds = monotonic() - began
    if info is not None:
        return _not_succeeded(info, value, seconds)
    if asks:  # self.retry(throw=False), and it went on
        return _again(asks[-1], "", seconds)
    try:
        keeps = not request["aque_ignores"]
        return "success", (codec.encode_result(value, result_limit_bytes) if keeps else None, shown), seconds
    except ValueError as error:
        return _error(Reason.NOT_STORABLE, codec.encode_error("ValueError", str(error)), seconds)


def _not_succeeded(info: Any, value: Any, seconds: float) -> Answer:
    """What Celery's tracer says of a task that has raised something."""
    raised = info.retval
    trace = str(getattr(value, "traceback", None) or "".join(traceback.format_exception(raised)))
    if isinstance(raised, Replaced):
        new = raised.replacement
        pairs = [(d.upstream, str(d.condition)) for d in new.dependencies]
        return "replaced", (new.name, new.function, new.arguments, new.inputs, pairs, new.class_id), seconds
    if isinstance(raised, TryAgain):
        return _again(raised, trace, seconds)
    if isinstance(raised, Reject) and raised.requeue:
        return "again", (0.0, None, False, None, None, codec.encode_error("", "rejected and requeued", trace)), seconds
    if isinstance(raised, Reject):
        return "withdrawn", (str(Reason.REJECTED), codec.text_of(raised)), seconds
    if isinstance(raised, Ignore):
        return "withdrawn", (str(Reason.IGNORED), codec.text_of(raised)), seconds
    return _error(Reason.EXCEPTION, codec.encode_exception(raised, trace), seconds)


def _again(again: TryAgain, trace: str, seconds: float) -> Answer:
    if isinstance(again.exc, BaseException):
        error = codec.encode_exception(again.exc, trace)
    else:
        error = codec.encode_error("", codec.text_of(again), trace)
    return "again", (again.after_seconds, again.arguments, True, again.priority, again.class_id, error), seconds


def _error(reason: Reason, error: bytes, seconds: float) -> Answer:
    return "error", (str(reason), error), seconds
