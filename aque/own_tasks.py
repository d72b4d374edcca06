"""Functions of Aque's own that tasks run: what stands for several calls, or for a plain value, where a task is needed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aque.naming import find


def each(
    function: str, calls: Iterable[Sequence[Any]], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> list[Any]:
    """The results of these calls of "module:qualname", given by their arguments, which come after `args`; the first
    exception ends them all."""
    called = find(function)
    return [called(*args, *own, **(kwargs or {})) for own in calls]


def same(value: Any) -> Any:
    """`value`: a task for what is no task."""
    return value
