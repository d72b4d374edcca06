"""What a child of the process pool, or a thread, does with one Python task: import the function, run it, encode its end.

Only plain bytes and texts go back to the worker: it never unpickles or imports what a task made.
"""

import importlib
import os
import resource
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import monotonic
from types import FunctionType
from typing import Any

from celery import Celery, Task, current_app
from celery.app.trace import build_tracer
from celery.local import Proxy

from aque import codec, contain, current
from aque.states import Reason

#: (True, encoded result or None, its repr for events, seconds), or (False, reason, encoded error, seconds).
Answer = tuple[bool, Any, Any, float]
#: The fields of `values.Usage`; None in a pool of threads, which share one process.
Used = tuple[float, int, int, int] | None
ChildResult = tuple[bool, Any, Any, float, Used]


class CannotImport(Exception):
    """The function cannot be loaded by its name in this process."""


def load(function: str, app: Celery) -> Task:
    """The Celery task behind "module:qualname"; a plain function becomes one. Raises CannotImport."""
    loaded: dict[str, Task] = vars(app).setdefault("aque_loaded", {})  # the app's own: they refer to it
    if (found := loaded.get(function)) is not None:
        return found
    module_name, _, qualname = function.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
        for part in qualname.split("."):
            target = getattr(target, part)
    except Exception as error:
        raise CannotImport(f"cannot load {function}: {type(error).__name__}: {error}") from error
    if isinstance(target, Proxy):
        target = target._get_current_object()
    if not callable(target):
        raise CannotImport(f"cannot load {function}: it is no function but a {type(target).__name__}")
    if not isinstance(target, Task):
        target = app._task_from_fun(_plain(target), name=function.replace(":", "."), ignore_result=True)
    if target.__trace__ is None:
        target.__trace__ = build_tracer(target.name, target, app.loader, app=app)
    loaded[function] = target
    return target


def _plain(target: Callable[..., Any]) -> Callable[..., Any]:
    """Celery makes tasks of plain functions only: this is one for a builtin, a class or any other callable."""
    if isinstance(target, FunctionType):
        return target

    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

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
        answer = False, str(Reason.EXCEPTION), exited, 0.0
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
        text = f"{error}. The worker imports from its own path only; the submitter's was {':'.join(import_path)}"
        return False, str(Reason.CANNOT_IMPORT), codec.encode_error("ImportError", text), monotonic() - began
    try:
        args, kwargs = codec.decode_arguments(arguments, results)
    except Exception as error:
        encoded = codec.encode_error(type(error).__name__, f"cannot decode the arguments: {error}")
        return False, str(Reason.EXCEPTION), encoded, monotonic() - began
    request.update(args=args, kwargs=kwargs, is_eager=False)
    try:
        value, info, _, shown = task.__trace__(uuid, args, kwargs, request)
    except SystemExit as error:  # the task's own doing: the child, which others need, goes on
        if isinstance(error.code, int) and -256 < error.code < 0:
            raise  # a signal's doing: billiard's handler exits with -(256 - signal)
        exited = codec.encode_error("builtins.SystemExit", str(error.code), traceback.format_exc())
        return False, str(Reason.EXCEPTION), exited, monotonic() - began
    seconds = monotonic() - began
    if info is not None:
        raised = info.retval
        trace = getattr(value, "traceback", None) or "".join(traceback.format_exception(raised))
        kind = f"{type(raised).__module__}.{type(raised).__qualname__}"
        return False, str(Reason.EXCEPTION), codec.encode_error(kind, _text(raised), str(trace)), seconds
    try:
        return True, codec.encode_result(value, result_limit_bytes), shown, seconds
    except ValueError as error:
        return False, str(Reason.NOT_STORABLE), codec.encode_error("ValueError", str(error)), seconds


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return f"(its text cannot be shown: {type(error).__name__}.__str__ raised)"
