"""A call of a Celery task as a row: its function by name, its arguments, and Celery's options as Aque's."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from celery import Celery
from celery import Task as CeleryTask
from celery.local import Proxy

from aque import codec
from aque.celery_options import options_of
from aque.errors import BadInput, NotSubmittable
from aque.handles import DEPENDENCY_OPTIONS, edges_of
from aque.submitter import Options, Submitter
from aque.values import Children, Condition, Dependency, TaskSpec


def spec_of_call(
    app: Celery,
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
    errbacks: Sequence[Mapping[str, Any]] = (),
) -> TaskSpec:
    """A call of the task with this name, None: not known in this process, as a row. `after`: edges; `place`: fields of
    `submitter.Options` that say where in a job it is; `errbacks`: what `self.replace` has to know of.

    Raises NotSubmittable for what no worker could load, BadInput for an option that cannot work, TypeError for arguments that
    do not fit.
    """
    after = after or {}
    if task is not None and getattr(task, "typing", False) and hasattr(task, "__header__"):
        task.__header__(*args, **kwargs)  # the signature, checked as Celery does
    given = options_of(app, name, options, task, args, kwargs)
    if given.get("queue") is None:
        raise BadInput(f"{name} is sent to all workers, and a part of a graph is one task. Nothing was submitted.")
    if callable(given.get("io_paths")):
        given["io_paths"] = given["io_paths"](*args, **kwargs)
    arguments, inputs = codec.encode_arguments(args, kwargs)
    edges = edges_of({condition: options.get(condition) or () for condition in DEPENDENCY_OPTIONS})
    edges += [Dependency(i, condition) for i, condition in after.items()]
    edges += [Dependency(i) for i in inputs if i not in after and Dependency(i) not in edges]
    extra = {key: codec.plain(f"the {key}", value) for key, value in given.pop("extra", {}).items()}
    if not getattr(task, "is_aque", False):
        given = {"children": Children.DETACH, **given}  # as Celery's: it ends when its function does
    if errbacks:
        extra["errbacks"] = codec.plain("an error callback", list(errbacks))
    wanted = Options(**given, dependencies=tuple(edges), celery_id=celery_id, extra=extra, **(place or {}))
    return submitter.function(task_id, function_of(task, name), name, arguments, inputs, wanted)


def check_id(celery_id: Any) -> str | None:
    """An id that a caller brings. Raises BadInput."""
    if celery_id is not None and str(celery_id).isdecimal():
        raise BadInput("a task_id of digits only would be taken for an id of the table: bring another, or none.")
    return None if celery_id is None else str(celery_id)


# -- functions by name ------------------------------------------------------------------------------------------------------


def function_of(task: CeleryTask | None, name: str) -> str:
    """How a worker finds the task: "module:qualname" where that is what its name says, else "@name", which is the task of this
    name in the worker's app, as for Celery's messages. Raises NotSubmittable for an `aque.Task` that no worker could find."""
    if task is None or name.startswith("celery."):
        return f"@{name}"
    cached: str | None = vars(task).get("_aque_function")
    if cached is None:
        try:
            cached = function_name(task)
        except NotSubmittable:
            if getattr(task, "is_aque", False):
                raise
            cached = ""
        if cached.replace(":", ".") != name and not getattr(task, "is_aque", False):
            cached = f"@{name}"
        task._aque_function = cached
    return cached


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
