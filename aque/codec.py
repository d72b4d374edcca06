"""Arguments, results and errors as JSON bytes: kombu's JSON, so datetimes, UUIDs, Decimals and bytes survive.

A task handle among the arguments becomes a reference to its result, and the task a dependency.
"""

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from celery.app.task import Context
from celery.exceptions import ChordError, TaskRevokedError
from kombu.utils import json as _kombu_json

from aque.errors import (
    CommandFailed,
    NotSubmittable,
    RemoteError,
    RemoteTraceback,
    TaskCancelled,
    TaskError,
    TaskKilled,
    TaskLost,
    TaskSkipped,
)
from aque.states import Reason, State
from aque.store import StoredResult
from aque.values import Pattern

#: kombu's JSON has no types of its own.
kombu_json: Any = _kombu_json

#: A traceback or message longer than this is cut: an error must always fit where a result would not.
ERROR_TEXT_LIMIT = 64 << 10

_references: ContextVar[list[int] | None] = ContextVar("_references", default=None)


class RevokedTask(TaskCancelled, TaskRevokedError):  # type: ignore[misc]
    """TaskCancelled, also for programs that expect Celery's exception."""


class TerminatedTask(TaskKilled, TaskRevokedError):  # type: ignore[misc]
    """TaskKilled, also for programs that expect Celery's exception."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The result of another task, among arguments."""

    task_id: int


@dataclass(frozen=True, slots=True)
class Failure:
    """What Celery tells an error callback of the task that failed: one of its arguments, among others."""

    task_id: int  #: whose failure; a group's is that of its member
    part: str  #: "request", "exception" or "traceback"
    id: str = ""  #: of the task that was linked, as Celery knows it
    name: str = ""


def register_handle(handle_class: type, task_id: Callable[[Any], int]) -> None:
    """Let objects of this class stand for the results of their tasks among arguments."""

    def encode(handle: Any) -> int:
        referred = _references.get()
        if referred is None:
            raise TypeError("a task handle can be an argument of a task, not a part of a result")
        referred.append(task_id(handle))
        return referred[-1]

    kombu_json.register_type(handle_class, "aque.result", encode, Reference)


def _encode_reference(reference: Any) -> Any:
    referred = _references.get()
    if referred is None:
        raise TypeError("what refers to another task can be an argument, not a part of a result")
    referred.append(reference.task_id)
    if isinstance(reference, Failure):
        return [reference.task_id, reference.part, reference.id, reference.name]
    return reference.task_id


kombu_json.register_type(Reference, "aque.result", _encode_reference, Reference)
kombu_json.register_type(Failure, "aque.failure", _encode_reference, lambda fields: Failure(*fields))


def plain(what: str, value: Any) -> Any:
    """The same in the types that JSON has, others marked as kombu marks them. Raises NotSubmittable, which names `what`."""
    try:
        return json.loads(kombu_json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise NotSubmittable(f"{what} cannot be written as JSON: {error}. Nothing was submitted.") from error


def encode_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[bytes, tuple[int, ...]]:
    """JSON of [args, kwargs], and the tasks whose results they name. Raises NotSubmittable."""
    referred: list[int] = []
    token = _references.set(referred)
    try:
        text = kombu_json.dumps([list(args), dict(kwargs)], allow_nan=False)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise NotSubmittable(
            f"the arguments cannot be written as JSON: {error}. Nothing was submitted: pass numbers, texts, lists, "
            "dictionaries, dates, bytes or task handles, or the path of a file with the data."
        ) from error
    finally:
        _references.reset(token)
    return text.encode(), tuple(dict.fromkeys(referred))


def decode_arguments(text: bytes, results: Mapping[int, bytes]) -> tuple[list[Any], dict[str, Any]]:
    """What `encode_arguments` was given, with each reference replaced by that task's result."""
    args, kwargs = kombu_json.loads(text)
    if results:
        values = {task_id: kombu_json.loads(value) for task_id, value in results.items()}
        args, kwargs = _resolve(args, values), _resolve(kwargs, values)
    return args, kwargs


def _resolve(value: Any, values: Mapping[int, Any]) -> Any:
    if isinstance(value, Reference):
        return values[value.task_id]
    if isinstance(value, Failure):
        return _failure(value, values[value.task_id] or {})
    if isinstance(value, list):
        return [_resolve(item, values) for item in value]
    if isinstance(value, dict):
        return {key: _resolve(item, values) for key, item in value.items()}
    return value


def _failure(asked: Failure, fields: Mapping[str, Any]) -> Any:
    """An argument of an error callback, from what `Store.values` says of a task that did not succeed."""
    if asked.part == "traceback":
        return fields.get("traceback") or None
    kind, message = str(fields.get("type", "")), str(fields.get("message", ""))
    raised: Exception | None = None
    if found := _exception_class(kind, str(fields.get("module", "")), may_import=False):
        raised = _made(found, {name: str(fields.get(name, "")) for name in ("message", "args", "state")})
    shown = f"{kind}: {message}" if kind else message or str(fields.get("reason") or fields.get("state") or "unknown")
    failed = raised or RemoteError(shown)
    cause = str(fields.get("cause") or asked.id)
    if cause != asked.id:  # the task that was linked never ran: what it waited for has failed
        error = ChordError(f"Dependency {cause} raised {failed!r}")
        error.__cause__ = failed
        failed = error
    if asked.part == "exception":
        return failed
    return Context(id=asked.id, task=asked.name, errbacks=[], exc=failed)


def encode_result(value: Any, limit_bytes: int) -> bytes | None:
    """JSON of a result; None for None, which needs no storage. Raises ValueError with a sentence."""
    if value is None:
        return None
    try:
        encoded: bytes = kombu_json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError, OverflowError, RecursionError, UnicodeEncodeError) as error:
        raise ValueError(f"the result, of type {type(value).__name__}, cannot be written as JSON: {error}") from error
    if len(encoded) > limit_bytes:
        raise ValueError(
            f"the result has {len(encoded)} bytes as JSON, at most {limit_bytes} are stored (setting result_limit_bytes): "
            "write it to a file and return the path"
        )
    return encoded


def encode_error(type: str, message: str, traceback: str = "", **recipe: str) -> bytes:
    """JSON object of an exception: its type as "module.qualname", its text, its traceback; see `recipe_of` for the rest."""
    fields = {"type": type, "message": message[:ERROR_TEXT_LIMIT], "traceback": traceback[-ERROR_TEXT_LIMIT:]}
    return json.dumps({**fields, **recipe}).encode()


def encode_exception(error: BaseException, traceback: str = "") -> bytes:
    """The same of an exception at hand. Never raises."""
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    return encode_error(kind, text_of(error), traceback, **recipe_of(error))


def text_of(error: BaseException) -> str:
    """The text of an exception, whatever it does to that."""
    try:
        return str(error)
    except Exception:
        return f"(its text cannot be shown: {type(error).__name__}.__str__ raised)"


def recipe_of(error: BaseException) -> dict[str, str]:
    """What an equal exception can be made from elsewhere: `module`, and as JSON `args` of its class and `state`, the attributes
    that it has beside them, as pickle would have them. Empty if they are not JSON, or too long: then its text must do."""
    try:
        made: Any = error.__reduce__()
        if made[0] is not type(error):
            return {}
        state = made[2] if len(made) > 2 and made[2] else {}
        args, attributes = kombu_json.dumps(list(made[1]), allow_nan=False), kombu_json.dumps(state, allow_nan=False)
    except Exception:
        return {}
    if len(args) + len(attributes) > ERROR_TEXT_LIMIT:
        return {}
    return {"module": type(error).__module__, "args": args, "state": attributes}


def jsonable(value: Any) -> Any:
    """The same as plain JSON has it; a text where it cannot."""
    try:
        return json.loads(kombu_json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        return {"unreadable": f"{type(value).__name__}: {error}"}


def decode_error(text: bytes | None) -> dict[str, str]:
    """The fields that `encode_error` wrote; empty texts where there are none."""
    found = json.loads(text) if text else {}
    return {name: str(found.get(name, "")) for name in ("type", "message", "traceback", "module", "args", "state")}


def decode_result(text: bytes | None) -> Any:
    """A stored result; None where nothing is stored."""
    return None if text is None else kombu_json.loads(text)


#: Why a task was cancelled that nobody has withdrawn.
_WITHDRAWN = {
    Reason.EXPIRED: "was not started in time.",
    Reason.IGNORED: "said that nothing is to come of it.",
    Reason.REJECTED: "was rejected by its own code.",
}


def exception(stored: StoredResult, may_import: bool = False) -> Exception:
    """What `.get()` raises for a task that did not succeed: an exception equal to the one that it raised, if that class is
    known here, with the traceback as its cause; else a TaskError with the id, the reason and the text.

    `may_import`: load the module of the class for that. What a task stored says which, and a module may do anything when it
    is loaded: only for who believes all that could write it.
    """
    fields = decode_error(stored.error)
    what = f"task {stored.id} ({stored.name})"
    details = (stored.id, None if stored.reason is None else str(stored.reason))
    if stored.state is State.SKIPPED:
        return TaskSkipped(f"{what} was skipped: a dependency made it impossible.", *details)
    if stored.state is State.CANCELLED and stored.reason in _WITHDRAWN:
        return RevokedTask(f"{what} {_WITHDRAWN[stored.reason]} {fields['message']}".strip(), *details)
    if stored.state is State.CANCELLED:
        return RevokedTask(f"{what} was cancelled before it ran.", *details)
    if stored.state is State.KILLED:
        return TerminatedTask(f"{what} was killed by signal {stored.signal}.", *details)
    if stored.reason is Reason.WORKER_LOST:
        return TaskLost(f"{what} was given up: the workers that ran it died. {fields['message']}".strip(), *details)
    if stored.reason is Reason.CHILD:
        return RemoteError(f"{what} has succeeded itself; tasks that it has submitted have not.", *details)
    if stored.reason is Reason.EXIT and stored.pattern is Pattern.SHELL:
        return CommandFailed(f"{what} exited with status {stored.exit_code}.", *details)
    if stored.reason is Reason.SIGNAL and stored.pattern is Pattern.SHELL:
        return CommandFailed(f"{what} was ended by signal {stored.signal}.", *details)
    if (
        (stored.reason is Reason.EXCEPTION or (stored.reason is Reason.TIME_LIMIT and stored.pattern is Pattern.PYTHON))
        and (found := _exception_class(fields["type"], fields["module"], may_import))
        and (made := _made(found, fields))
    ):
        if fields["traceback"]:
            made.__cause__ = RemoteTraceback(fields["traceback"])
        return made
    text = f"{fields['type']}: {fields['message']}" if fields["type"] else fields["message"]
    kind: type[TaskError] = CommandFailed if stored.pattern is Pattern.SHELL else RemoteError
    return kind(f"{what} failed: {text or stored.reason or stored.state}", *details)


def _made(kind: type[Exception], fields: Mapping[str, str]) -> Exception | None:
    """An exception of this class as `recipe_of` describes it, or from its text alone; None if it cannot be made."""
    try:
        args = kombu_json.loads(fields["args"]) if fields["args"] else [fields["message"]]
        state = kombu_json.loads(fields["state"]) if fields["state"] else {}
    except Exception:  # a type that is not known here
        args, state = [fields["message"]], {}
    try:
        made = kind(*args)
    except Exception:
        if not state:
            return None  # its constructor wants something that is not known
        try:  # all that it has is known: it needs no constructor
            made = kind.__new__(kind, *args)
        except Exception:
            return None
    if type(made) is not kind:
        return None
    if isinstance(state, dict):
        made.__dict__.update(state)
    return made


def _exception_class(kind: str, module_name: str, may_import: bool) -> type[Exception] | None:
    """The exception class of this name, "module.qualname"; `module_name` is empty where that is not known apart."""
    if not module_name:
        module_name = kind.rpartition(".")[0] or "builtins"
    found: Any = sys.modules.get(module_name)
    if found is None and may_import:
        try:
            found = importlib.import_module(module_name)
        except (Exception, SystemExit):  # not here, or not to be loaded: its name must do
            return None
    for name in kind.removeprefix(f"{module_name}.").split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else None
