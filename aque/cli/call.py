"""`aque call`: run a Python function."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from importlib import import_module
from typing import Any

import click
from click.core import ParameterSource

from aque.cli import waiting
from aque.cli.exit_status import exit_status, sentence
from aque.cli.farm import Farm, open_farm
from aque.cli.options import check_strict, read, task_options
from aque.cli.pattern_tasks import pattern_spec
from aque.cli.show import complain
from aque.cli.submit import print_id
from aque.errors import BadInput, NotSubmittable
from aque.resources import format_amounts, parse_limits, parse_resources
from aque.states import State
from aque.submitter import Submitter
from aque.values import TaskSpec


@click.command(name="call", context_settings={"allow_interspersed_args": False})
@task_options
@click.option(
    "--interpreter", metavar="FILE", default="", help="Run it under this Python (3.6 or newer), not the worker's."
)
@click.option("--pattern", metavar="NAME", help="Give the arguments to this pattern, in place of a function.")
@click.option("--wait", is_flag=True, help="Wait, and print the result as JSON.")
@click.argument("words", metavar="MODULE:FUNCTION [JSON...]", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...], **chosen: Any) -> int:
    """Run a Python function, which a worker imports by its name, and print the id of the task.

    The arguments are JSON: one list of them, one object with them by name, or each as a word of its own. Functions are
    looked for in the current directory first. What the function's decorator says (cpus, memory, interpreter, ...) holds unless
    an option here says otherwise.

    \b
    aque call --wait math:sqrt 2
    aque call --wait shutil:disk_usage '"/tmp"'
    aque call report:build '{"title": "May", "pages": [1, 2]}'
    aque call --cpus all --after @last simulate:run '[1000, 0.5]'
    aque call --interpreter /opt/tool/bin/python tool.render:frame 7
    aque call --pattern nuke '{"script": "comp.nk", "first": 1, "last": 24}'
    """
    with open_farm() as farm:
        submitter = Submitter(farm.store, farm.settings)
        spec = (
            _of_pattern(farm, submitter, words, chosen) if chosen["pattern"] else _call(farm, submitter, words, chosen)
        )
        check_strict(submitter, chosen, [spec])
        state = submitter.submit([spec])[spec.id]
        waits = chosen["wait"] or chosen["local"]
        print_id(spec, state, chosen["as_json"], waits)
        return _wait(farm, spec, chosen["local"]) if waits else 0


def _call(farm: Farm, submitter: Submitter, words: tuple[str, ...], chosen: dict[str, Any]) -> TaskSpec:
    function, *arguments = words or ("",)
    args, kwargs = _arguments(arguments)
    module_name, colon, path = function.partition(":")
    if not colon or not module_name or not path:
        raise BadInput(
            f"{function!r} is not MODULE:FUNCTION: write for example os.path:getsize. Nothing was submitted."
        )
    context = click.get_current_context()
    unnamed: dict[str, Any] = {}
    if not chosen["interpreter"]:  # another one may have modules that are not here
        own = _options_of(_function(function), args, kwargs)
        if chosen["io"] or chosen["no_io"]:  # what the caller says of its paths replaces all that the task says
            own = {name: value for name, value in own.items() if name not in ("io", "no_io")}
        unnamed = {name: own[name] for name in _UNNAMED if name in own}
        chosen |= {
            name: value
            for name, value in own.items()
            if name in chosen and context.get_parameter_source(name) is ParameterSource.DEFAULT
        }
    encoded = _encode(args, kwargs)
    options = replace(read(farm, chosen), **unnamed)
    (task_id,) = submitter.reserve(1)
    return submitter.function(task_id, function, function.replace(":", "."), encoded, [], options)


def _of_pattern(farm: Farm, submitter: Submitter, words: tuple[str, ...], chosen: dict[str, Any]) -> TaskSpec:
    args, kwargs = _arguments(words)
    (task_id,) = submitter.reserve(1)
    return pattern_spec(farm, submitter, task_id, chosen, args, kwargs)


def _wait(farm: Farm, spec: TaskSpec, local: bool) -> int:
    try:
        with waiting.someone_to_run(farm, [spec], local) as worker:
            for _ in waiting.until_ended(farm, [spec.id], local=worker):
                pass
            (end,) = waiting.ends(farm, [spec.id])
    except KeyboardInterrupt:
        return waiting.interrupted(spec.id, local)
    if end.state is State.SUCCESS:
        with farm.store.connect() as connection:
            print(farm.store.values(connection, [spec.id])[spec.id].decode(), flush=True)
    elif said := sentence(end):
        complain(said)
    return exit_status(end)


#: Options of a task that the command line has no name for: what the task says of them holds.
_UNNAMED = ("countdown", "eta", "expires", "children", "layer", "extra")
_AMOUNTS = {"resources": parse_resources, "limits": parse_limits}


def _options_of(found: Any, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The options with which a function was made a task, by their names on the command line (those that it has none for, by
    those of `options.Options`), for a call with these arguments; none of any other function."""
    if "aque.celery_app" not in sys.modules:  # so it is not a task of Aque
        return {}
    from celery import Task

    from aque.celery_options import read_time
    from aque.task_options import TASK_OPTIONS, parse_rate

    if not isinstance(found, Task):
        return {}
    given = {name: value for name in TASK_OPTIONS if (value := getattr(found, name, None)) is not None}
    if "io" in given:
        given["no_io"] = not given.pop("io")
    if "io_paths" in given:
        given["io"] = given.pop("io_paths")
    if given.get("no_io"):
        given.pop("io", None)
    if callable(given.get("io")):
        try:
            given["io"] = given["io"](*args, **kwargs)
        except Exception as error:
            raise BadInput(
                f"the task's io_paths cannot be told: {type(error).__name__}: {error}. Nothing was submitted: correct that "
                "function, or give --no-io."
            ) from error
    for name, option in (("resources", "resource"), ("limits", "limit")):
        if name in given:
            given[option] = tuple(format_amounts(_AMOUNTS[name](given.pop(name))).split(","))
    for name, option in (("tags", "tag"), ("requires_paths", "requires")):
        if name in given:
            value = given.pop(name)
            given[option] = tuple(value.split(",")) if isinstance(value, str) else tuple(value)
    if "requeue" in given:
        given["no_requeue"] = not given.pop("requeue")
    if isinstance(given.get("expires"), str):
        given["expires"] = read_time("expires", given["expires"])
    if limit := found.rate_limit:
        given["extra"] = {"rate_limit": parse_rate(limit)}
    return given


def _function(text: str) -> Any:
    """What the text names. Raises NotSubmittable unless it can be imported and called here."""
    module_name, _, path = text.partition(":")
    # First, and also for the task: a worker that is started here finds the same.
    sys.path.insert(0, os.getcwd())
    try:
        with redirect_stdout(sys.stderr):  # stdout is for the id
            found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        raise NotSubmittable(
            f"cannot import {module_name}: {error.msg}. Nothing was submitted: go to the directory that holds it, or set "
            "PYTHONPATH."
        ) from error
    except (Exception, SystemExit) as error:
        raise NotSubmittable(
            f"cannot import {module_name}: {type(error).__name__}: {error}. Nothing was submitted."
        ) from error
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise NotSubmittable(f"{module_name} has no function {path!r}. Nothing was submitted.") from None
    if not callable(found):
        raise NotSubmittable(f"{text} is of type {type(found).__name__}, not a function. Nothing was submitted.")
    return found


def _arguments(words: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """One list: by position; one object: by name; else one word each."""
    values = [_value(word) for word in words]
    if len(values) == 1 and isinstance(values[0], list):
        return values[0], {}
    if len(values) == 1 and isinstance(values[0], dict):
        return [], values[0]
    return values, {}


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except (ValueError, RecursionError):
        raise BadInput(
            f"the argument {word!r} is not JSON. Nothing was submitted: a text needs its quotes, as in '\"{word:.40}\"'."
        ) from None


def _encode(args: list[Any], kwargs: dict[str, Any]) -> bytes:
    from kombu.utils import json as kombu_json

    try:
        encoded: str = kombu_json.dumps([args, kwargs], allow_nan=False)  # type: ignore[no-untyped-call]
        return encoded.encode()
    except (ValueError, RecursionError) as error:
        raise NotSubmittable(f"the arguments cannot be written as JSON: {error}. Nothing was submitted.") from error
