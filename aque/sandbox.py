"""Run one Python task by name in an interpreter of its own: another Python (3.6 or newer), or another user's process.

The worker starts `INTERPRETER -c PROGRAM` in the task's directory and environment; the program reads this file and a request
from stdin, calls the function and writes one answer to descriptor 3. So the interpreter needs the standard library alone, and
no right to read where Aque is installed. Nothing of what a task makes is unpickled or imported by the worker: answers are JSON
of a bounded size.

A function is looked up as in the pool: "module:qualname", in the task's directory, what PYTHONPATH says, the directory of the
script that submitted it, and the interpreter's own packages.
"""

# Written for Python 3.6, whatever the worker runs: annotations are texts, which it does not evaluate.

import base64
import json
import os
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from datetime import date, datetime, time
from decimal import Decimal
from functools import lru_cache
from importlib.util import find_spec
from time import monotonic
from types import ModuleType
from typing import Any, NamedTuple
from uuid import UUID

#: Reads the length of this file's text, the text, and runs it with the rest of stdin as the request. The task's directory,
#: where a json.py may be, comes last on the path until `main` puts the path back.
PROGRAM = """\
import os, sys
found = list(sys.path)
sys.path.sort(key=lambda entry: entry == '' or os.path.exists(entry) and os.path.samefile(entry, '.'))
stdin = sys.stdin.buffer
space = {'__name__': 'aque_sandbox'}
exec(compile(stdin.read(int(stdin.readline())), 'aque/sandbox.py', 'exec'), space)
space['main'](stdin, found)
"""
RESULT_FD = 3
#: A traceback or message longer than this is cut: an error must always fit where a result would not.
ERROR_TEXT_LIMIT = 64 << 10
#: What an answer may be longer than a result: its other fields, and an error in place of the result.
ANSWER_BYTES = 6 * 2 * ERROR_TEXT_LIMIT + 4096


# -- the worker's side ------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """How a function ended: `reason` is empty for a success, else a Reason's value, and `error` has what was raised."""

    reason: "str"
    value: "bytes | None"  #: encoded
    error: "dict[str, str]"
    shown: "str"  #: of the value, for events
    seconds: "float"
    retry: "tuple[float, int] | None" = (
        None  #: it asks for another attempt, so many seconds later, unless so many have failed
    )


@lru_cache(maxsize=1)
def _source() -> "bytes":
    with open(__file__, "rb") as file:
        return file.read()


def request(
    function: "str",
    arguments: "bytes",
    results: "Mapping[int, bytes]",
    script_directory: "str",
    result_limit_bytes: "int",
) -> "bytes":
    """What the interpreter reads from stdin: this file, and what to do. `arguments` and `results` are JSON as stored."""
    wanted = {
        "function": function,
        "arguments": arguments.decode(),
        "results": {str(task_id): value.decode() for task_id, value in results.items()},
        "script_directory": script_directory,
        "result_limit_bytes": result_limit_bytes,
    }
    return b"%d\n%s%s" % (len(_source()), _source(), json.dumps(wanted).encode())


def answer(text: "bytes") -> "Answer":
    """What the interpreter wrote to descriptor 3. Raises ValueError for anything else: the function can write there, too."""
    try:
        return _answer(text)
    except (RecursionError, OverflowError) as error:
        raise ValueError("not an answer") from error


def _answer(text: "bytes") -> "Answer":
    found = json.loads(text.decode())
    if not isinstance(found, dict):
        raise ValueError("not an answer")
    reason, value, error, seconds = (found.get(name) for name in ("reason", "value", "error", "seconds"))
    retry = found.get("retry")
    known = reason in ("", "exception", "cannot_import", "not_storable") and (retry is None or _is_retry(retry))
    if (
        not known
        or not isinstance(seconds, (int, float))
        or not 0 <= seconds < 1e12
        or not isinstance(value, (str, type(None)))
        or not isinstance(error, dict)
    ):
        raise ValueError("not an answer")
    if value is not None:
        json.loads(value)  # it goes into the table as it is
    fields = {name: str(error.get(name, ""))[-ERROR_TEXT_LIMIT:] for name in ("type", "message", "traceback")}
    recipe = {name: str(error.get(name, "")) for name in ("module", "args", "state")}
    if all(0 < len(part) <= ERROR_TEXT_LIMIT for part in recipe.values()):
        fields.update(recipe)
    encoded = None if value is None else value.encode()
    wanted = None if retry is None else (float(retry[0]), int(retry[1]))
    return Answer(str(reason), encoded, fields, str(found.get("shown", ""))[:1024], float(seconds), wanted)


def _is_retry(found: "Any") -> "bool":
    return (
        isinstance(found, list)
        and len(found) == 2
        and all(isinstance(number, (int, float)) and 0 <= number <= 1e9 for number in found)
    )


# -- the interpreter's side -------------------------------------------------------------------------------------------


def main(stdin: "Any", path: "list[str]") -> "None":
    """Read a request, call the function, answer. Functions are looked for on `path`, but Aque's own on the present one."""
    os.set_inheritable(RESULT_FD, False)
    wanted = json.loads(stdin.read().decode())
    if wanted["function"].startswith("aque."):
        with suppress(Exception):  # it comes up again where it is told
            __import__(wanted["function"].partition(":")[0])
    sys.path[:] = path
    began = monotonic()
    found = _call(wanted)
    found["seconds"] = monotonic() - began
    text = json.dumps(found).encode()
    while text:
        text = text[os.write(RESULT_FD, text) :]
    os.close(RESULT_FD)


def _call(wanted: "dict[str, Any]") -> "dict[str, Any]":
    if wanted["script_directory"] and wanted["script_directory"] not in sys.path:
        sys.path.insert(1, wanted["script_directory"])
    try:
        target = _load(wanted["function"])
    except Exception as error:
        looked = ":".join(entry or os.getcwd() for entry in sys.path)
        text = f"cannot load {wanted['function']}: {type(error).__name__}: {error}. {sys.executable} looked in {looked}"
        return _error("cannot_import", "ImportError", text)
    try:
        results = {int(task_id): decode(value) for task_id, value in wanted["results"].items()}
        args, kwargs = decode(wanted["arguments"], results)
    except Exception as error:
        return _error("exception", type(error).__name__, f"cannot decode the arguments: {error}")
    try:
        value = target(*args, **kwargs)
    except SystemExit as error:
        return _error("exception", "builtins.SystemExit", str(error.code), traceback.format_exc())
    except BaseException as raised:
        retry: Any = getattr(sys.modules.get("aque.patterns"), "Retry", ())
        asks: Any = raised if isinstance(raised, retry) else None
        told = raised if asks is None else asks.error
        kind = f"{type(told).__module__}.{type(told).__qualname__}"
        found = _error("exception", kind, _text(told), traceback.format_exc())
        found["error"].update(_recipe(told))
        if asks is not None:
            found["retry"] = [asks.countdown, asks.max_retries]
        return found
    try:
        encoded = None if value is None else encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        text = f"the result, of type {type(value).__name__}, cannot be written as JSON: {error}"
        return _error("not_storable", "ValueError", text)
    if encoded is not None and len(encoded) > wanted["result_limit_bytes"]:
        text = (
            f"the result has {len(encoded)} bytes as JSON, at most {wanted['result_limit_bytes']} are stored (setting "
            "result_limit_bytes): write it to a file and return the path"
        )
        return _error("not_storable", "ValueError", text)
    return {"reason": "", "value": encoded, "error": {}, "shown": _repr(value)}


def _load(function: "str") -> "Any":
    module_name, _, qualname = function.partition(":")
    if "aque" not in sys.modules and find_spec("aque") is None:
        sys.modules["aque"] = _Stub("aque")
    __import__(module_name)
    target = sys.modules[module_name]
    for part in qualname.split("."):
        target = getattr(target, part)
    if not callable(target):
        raise TypeError(f"it is no function but a {type(target).__name__}")
    return target


class _Stub(ModuleType):
    """Stands for Aque where it is not installed, so that a module with `@aque.task` can be imported: its functions stay
    functions."""

    @staticmethod
    def task(*args: "Any", **_options: "Any") -> "Any":
        return args[0] if args else lambda function: function

    def __getattr__(self, name: "str") -> "Any":
        raise AttributeError(f"aque.{name} cannot be used here: Aque is not installed for {sys.executable}")


def _error(reason: "str", kind: "str", message: "str", trace: "str" = "") -> "dict[str, Any]":
    fields = {"type": kind, "message": message[:ERROR_TEXT_LIMIT], "traceback": trace[-ERROR_TEXT_LIMIT:]}
    return {"reason": reason, "error": fields}


def _recipe(error: "BaseException") -> "dict[str, str]":
    """As `codec.recipe_of`."""
    try:
        made = error.__reduce__()
        if made[0] is not type(error):
            return {}
        args, state = encode(list(made[1])), encode(made[2] if len(made) > 2 and made[2] else {})
    except Exception:
        return {}
    if len(args) + len(state) > ERROR_TEXT_LIMIT:
        return {}
    return {"module": type(error).__module__, "args": args, "state": state}


def _text(error: "BaseException") -> "str":
    try:
        return str(error)
    except Exception as other:
        return f"(its text cannot be shown: {type(error).__name__}.__str__ raised {type(other).__name__})"


def _repr(value: "Any") -> "str":
    try:
        return repr(value)[:1024]
    except Exception:
        return f"(a {type(value).__name__})"


# -- the JSON of kombu, in which arguments and results are stored --------------------------------------------------------


def encode(value: "Any") -> "str":
    """JSON text; dates, times, UUIDs, Decimals and bytes as kombu writes them. Raises TypeError or ValueError."""
    return json.dumps(value, default=_encode_other, allow_nan=False)


def _encode_other(value: "Any") -> "Any":
    kind: str
    text: Any
    if isinstance(value, datetime):
        kind, text = "datetime", value.isoformat()
    elif isinstance(value, date):
        kind, text = "date", value.isoformat()
    elif isinstance(value, time):
        kind, text = "time", value.isoformat()
    elif isinstance(value, Decimal):
        kind, text = "decimal", str(value)
    elif isinstance(value, UUID):
        kind, text = "uuid", {"hex": value.hex}
    elif isinstance(value, bytes):
        kind, text = "base64", base64.b64encode(value).decode()
    else:
        raise TypeError(f"an object of type {type(value).__name__} has no form in JSON")
    return {"__type__": kind, "__value__": text}


def decode(text: "str", results: "Mapping[int, Any] | None" = None) -> "Any":
    """What `encode`, or kombu, was given; a task's result from `results` in place of a reference to it."""

    def replace(found: "dict[str, Any]") -> "Any":
        if set(found) != {"__type__", "__value__"}:
            return found
        kind, value = found["__type__"], found["__value__"]
        if kind == "aque.result":
            return (results or {})[value]
        if kind not in _DECODERS:
            raise ValueError(f"there is no type {kind!r}")
        return _DECODERS[kind](value)

    return json.loads(text, object_hook=replace)


def _datetime(text: "str") -> "datetime":
    if hasattr(datetime, "fromisoformat"):
        return datetime.fromisoformat(text)
    # Python 3.6: with or without microseconds and an offset, whose colon strptime does not know.
    if len(text) > 6 and text[-6] in "+-" and text[-3] == ":":
        text = text[:-3] + text[-2:]
        form = "%Y-%m-%dT%H:%M:%S.%f%z" if "." in text else "%Y-%m-%dT%H:%M:%S%z"
    else:
        form = "%Y-%m-%dT%H:%M:%S.%f" if "." in text else "%Y-%m-%dT%H:%M:%S"
    return datetime.strptime(text, form)


_DECODERS: "dict[str, Any]" = {
    "datetime": _datetime,
    "date": lambda text: _datetime(text if "T" in text else text + "T00:00:00").date(),
    "time": lambda text: _datetime("2000-01-01T" + text).timetz(),
    "decimal": Decimal,
    "uuid": lambda fields: UUID(**fields),
    "bytes": lambda text: text.encode(),
    "base64": base64.b64decode,
}

__all__ = ["ANSWER_BYTES", "PROGRAM", "Answer", "answer", "main", "request"]
