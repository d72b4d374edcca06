"""The name by which a worker finds what it is to call. What has none is refused here, where it is submitted."""

import importlib
import sys
from types import MethodType
from typing import Any

from celery import Task as CeleryTask
from celery.local import Proxy

from aque.errors import NotSubmittable


def name_of(called: Any) -> str:
    """ "module:qualname" of a function, a class, a builtin, or a Celery task. Raises NotSubmittable with the fix."""
    if isinstance(called, Proxy):
        called = called._get_current_object()
    is_task = isinstance(called, CeleryTask)
    function = getattr(called.run, "__wrapped__", called.run) if is_task else called
    module_name, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not callable(called) or not isinstance(module_name, str) or not isinstance(qualname, str):
        raise NotSubmittable(
            f"{called!r:.60} has no name by which a worker could find it. Nothing was submitted: give a function or a class "
            "from the top of a module."
        )
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
        found = find(f"{module_name}:{qualname}")
    except (ImportError, AttributeError) as error:
        raise NotSubmittable(
            f"{module_name}:{qualname} cannot be found by name: {error}. Nothing was submitted."
        ) from error
    if is_task:
        is_same = found is called.run or (isinstance(found, CeleryTask) and found.name == called.name)
        if not is_same:
            raise NotSubmittable(
                f"{module_name}:{qualname} is not the task {called.name}: a worker would run something else. Nothing was "
                "submitted: define the task with its decorator, under its own name, at the top of a module."
            )
    elif found is not called and not (isinstance(called, MethodType) and found == called):
        raise NotSubmittable(
            f"{module_name}:{qualname} is not {called!r:.60}: a worker would run something else. Nothing was submitted: "
            "define a function at the top of a module, under its own name."
        )
    return f"{module_name}:{qualname}"


def find(name: str) -> Any:
    """What "module:qualname" names. Raises ImportError or AttributeError."""
    module_name, _, qualname = name.partition(":")
    found: Any = importlib.import_module(module_name)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found._get_current_object() if isinstance(found, Proxy) else found
