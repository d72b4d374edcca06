"""Arguments, results and errors as JSON bytes: kombu's JSON, so datetimes, UUIDs, Decimals and bytes survive.

A task handle among the arguments becomes a reference to its result, and the task a dependency.
"""

import builtins
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from kombu.utils import json as _kombu_json

from aque.errors import (
    CommandFailed,
    NotSubmittable,
    RemoteError,
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


@dataclass(frozen=True, slots=True)
class Reference:
    """The result of another task, among decoded arguments."""

    task_id: int


def register_handle(handle_class: type, task_id: Callable[[Any], int]) -> None:
    """Let objects of this class stand for the results of their tasks among arguments."""

    def encode(handle: Any) -> int:
        referred = _references.get()
        if referred is None:
            raise TypeError("a task handle can be an argument of a task, not a part of a result")
        referred.append(task_id(handle))
        return referred[-1]

    kombu_json.register_type(handle_class, "aque.result", encode, Reference)


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
    if isinstance(value, list):
        return [_resolve(item, values) for item in value]
    if isinstance(value, dict):
        return {key: _resolve(item, values) for key, item in value.items()}
    return value


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


def encode_error(kind: str, message: str, traceback: str = "") -> bytes:
    """JSON object of an exception: its type as "module.qualname", its text, its traceback."""
    fields = {"type": kind, "message": message[:ERROR_TEXT_LIMIT], "traceback": traceback[-ERROR_TEXT_LIMIT:]}
    return json.dumps(fields).encode()


def jsonable(value: Any) -> Any:
    """The same as plain JSON has it; a text where it cannot."""
    try:
        return json.loads(kombu_json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        return {"unreadable": f"{type(value).__name__}: {error}"}


def decode_error(text: bytes | None) -> dict[str, str]:
    """The fields that `encode_error` wrote; empty texts where there are none."""
    found = json.loads(text) if text else {}
    return {name: str(found.get(name, "")) for name in ("type", "message", "traceback")}


def decode_result(text: bytes | None) -> Any:
    """A stored result; None where nothing is stored."""
    return None if text is None else kombu_json.loads(text)


#: Why a task was cancelled that nobody has withdrawn.
_WITHDRAWN = {
    Reason.EXPIRED: "was not started in time.",
    Reason.IGNORED: "said that nothing is to come of it.",
    Reason.REJECTED: "was rejected by its own code.",
}


def exception(stored: StoredResult) -> Exception:
    """What `.get()` raises for a task that did not succeed: the exception that it raised, if that class is loaded here
    and can be made from its text, else a TaskError with the id, the reason and the text."""
    fields = decode_error(stored.error)
    what = f"task {stored.id} ({stored.name})"
    details = (stored.id, None if stored.reason is None else str(stored.reason))
    if stored.state is State.SKIPPED:
        return TaskSkipped(f"{what} was skipped: a dependency made it impossible.", *details)
    if stored.state is State.CANCELLED and stored.reason in _WITHDRAWN:
        return TaskCancelled(f"{what} {_WITHDRAWN[stored.reason]} {fields['message']}".strip(), *details)
    if stored.state is State.CANCELLED:
        return TaskCancelled(f"{what} was cancelled before it ran.", *details)
    if stored.state is State.KILLED:
        return TaskKilled(f"{what} was killed by signal {stored.signal}.", *details)
    if stored.reason is Reason.WORKER_LOST:
        return TaskLost(f"{what} was given up: the workers that ran it died. {fields['message']}".strip(), *details)
    if stored.reason is Reason.CHILD:
        return RemoteError(f"{what} has succeeded itself; tasks that it has submitted have not.", *details)
    if stored.reason is Reason.EXIT and stored.pattern is Pattern.SHELL:
        return CommandFailed(f"{what} exited with status {stored.exit_code}.", *details)
    if stored.reason is Reason.SIGNAL and stored.pattern is Pattern.SHELL:
        return CommandFailed(f"{what} was ended by signal {stored.signal}.", *details)
    if stored.reason is Reason.EXCEPTION and (found := _loaded_exception(fields["type"])):
        try:
            return found(fields["message"])
        except Exception:  # its constructor wants something else: the text is what matters
            pass
    text = f"{fields['type']}: {fields['message']}" if fields["type"] else fields["message"]
    kind: type[TaskError] = CommandFailed if stored.pattern is Pattern.SHELL else RemoteError
    return kind(f"{what} failed: {text or stored.reason or stored.state}", *details)


def _loaded_exception(kind: str) -> type[Exception] | None:
    """The exception class of this name, if its module is loaded already: what a task stored must not import anything."""
    module_name, _, name = kind.rpartition(".")
    module = builtins if module_name in ("", "builtins") else sys.modules.get(module_name)
    found = getattr(module, name, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else None
