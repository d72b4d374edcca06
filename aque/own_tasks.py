"""Functions of Aque's own that tasks run: what stands for several calls, or for a plain value, where a task is needed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from celery import current_app

from aque.naming import find


def each(
    function: str, calls: Iterable[Sequence[Any]], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> list[Any]:
    """The results of these calls of "module:qualname", or of a task as "@name"; each is given by its arguments, which come
    after `args`. The first exception ends them all."""
    called = current_app.tasks[function[1:]] if function.startswith("@") else find(function)
    return [called(*args, *own, **(kwargs or {})) for own in calls]


def same(value: Any) -> Any:
    """`value`: a task for what is no task."""
    return value
