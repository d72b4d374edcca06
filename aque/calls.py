"""A call of a Celery task as a row: its function by name, its arguments, and Celery's options as Aque's."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from celery import Celery
from celery import Task as CeleryTask
from celery.local import Proxy

from aque import codec
from aque.errors import BadInput, NotSubmittable
from aque.handles import DEPENDENCY_OPTIONS, TASK_OPTIONS, edges_of, known_options
from aque.submitter import Options, Submitter
from aque.values import Condition, Dependency, TaskSpec

#: Options of Celery's calls that mean nothing for a row: there is no message to send, to route or to send again, and a row
#: has its place in the graph already.
WITHOUT_EFFECT = frozenset(
    {
        "add_to_parent", "chain", "chord", "compression", "confirm_timeout", "connection", "content_encoding", "content_type",
        "correlation_id", "delivery_mode", "exchange", "exchange_type", "group_id", "group_index", "immediate", "interval",
        "mandatory", "max_retries", "parent_id", "producer", "publisher", "replaced_task_nesting", "reply_to", "result_cls",
        "retry", "retry_policy", "root_id", "route_name", "router", "routing_key", "serializer",
    }
)  # fmt: skip


def is_ours(task: Any) -> bool:
    """True for a task that goes through the table: an `aque.Task`, or any task of an app that `take_all` has been told of."""
    return bool(getattr(task, "goes_through_table", False)) or takes_all(getattr(task, "app", None))


def takes_all(app: Any) -> bool:
    """True if all tasks of this app go through the table."""
    return bool(getattr(app, "aque_takes_all", False))


def take_all(app: Celery) -> None:
    """From now on all tasks of this app go through the table, also those that it knows by name only."""
    app.aque_takes_all = True


def spec_of_call(
    submitter: Submitter,
    task_id: int,
    name: str,
    task: CeleryTask | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    after: Mapping[int, Condition] | None = None,
    celery_id: str | None = None,
    place: Mapping[str, Any] | None = None,
) -> TaskSpec:
    """A call of the task with this name, None: not known in this process, as a row. `after`: edges; `place`: fields of
    `submitter.Options` that say where in a job it is.

    Raises NotSubmittable for what no worker could load, BadInput for an option that cannot work, TypeError for arguments that
    do not fit.
    """
    after = after or {}
    if task is not None and getattr(task, "typing", False) and hasattr(task, "__header__"):
        task.__header__(*args, **kwargs)  # the signature, checked as Celery does
    options = dict(options)
    waits_for = {option: options.pop(option) for option in DEPENDENCY_OPTIONS if option in options}
    hints = options.pop("hints", None) or {}
    extra = _extra(task, options)
    shown = options.pop("shadow", None) or name
    chosen = known_options({**hints, **{key: value for key, value in options.items() if key not in WITHOUT_EFFECT}})
    given = {option: value for option in TASK_OPTIONS if (value := getattr(task, option, None)) is not None} | chosen
    if callable(given.get("io_paths")):
        given["io_paths"] = given["io_paths"](*args, **kwargs)
    arguments, inputs = codec.encode_arguments(args, kwargs)
    edges = [*edges_of(waits_for), *(Dependency(i, condition) for i, condition in after.items())]
    edges += [Dependency(i) for i in inputs if i not in after and Dependency(i) not in edges]
    wanted = Options(**given, dependencies=tuple(edges), celery_id=celery_id, extra=extra, **(place or {}))
    return submitter.function(task_id, function_of(task, name), shown, arguments, inputs, wanted)


def _extra(task: CeleryTask | None, options: dict[str, Any]) -> dict[str, Any]:
    """What has no column, taken out of the options."""
    extra: dict[str, Any] = {}
    if headers := options.pop("headers", None):
        extra["headers"] = codec.plain("the headers", headers)
    if stamped := options.pop("stamped_headers", None):
        extra["stamped_headers"] = sorted(stamped)
        extra["stamps"] = codec.plain("the stamps", {stamp: options.pop(stamp, None) for stamp in stamped})
    ignored = options.pop("ignore_result", None)
    if getattr(task, "ignore_result", False) if ignored is None else ignored:
        extra["ignore_result"] = True
    if errbacks := options.pop("errbacks", None):
        extra["errbacks"] = codec.plain("an error callback", errbacks)
    return extra


def check_id(celery_id: Any) -> str | None:
    """An id that a caller brings. Raises BadInput."""
    if celery_id is not None and str(celery_id).isdecimal():
        raise BadInput("a task_id of digits only would be taken for an id of the table: bring another, or none.")
    return None if celery_id is None else str(celery_id)


# -- functions by name ------------------------------------------------------------------------------------------------------


def function_of(task: CeleryTask | None, name: str) -> str:
    """How a worker finds the task: "module:qualname", or for what is not found by that "@name", the name under which the
    worker's app must have it. Raises NotSubmittable for an Aque task that no worker could find."""
    if task is None or name.startswith("celery."):
        return f"@{name}"
    known = vars(task).get("aque_function")
    if known is None:
        try:
            known = function_name(task)
        except NotSubmittable:
            if getattr(task, "goes_through_table", False) and not takes_all(getattr(task, "app", None)):
                raise
            known = f"@{name}"
        vars(task)["aque_function"] = known
    return str(known)


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
