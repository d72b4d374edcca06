"""Options of calls, as people write them: their names, what is no option, and what a call waits for."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from celery.utils.time import rate

from aque.errors import BadInput, UnknownTask
from aque.handles import Handle
from aque.values import Condition, Dependency

#: Options of a task that its decorator, and each call, may give; see `options.Options` for what they mean.
TASK_OPTIONS = (
    "queue",
    "priority",
    "cpus",
    "memory",
    "host",
    "platform",
    "resources",
    "limits",
    "tags",
    "requires_paths",
    "duration",
    "io_paths",
    "io",
    "time_limit",
    "soft_time_limit",
    "countdown",
    "eta",
    "expires",
    "children",
    "max_attempts",
    "requeue",
    "strict_lease",
    "interpreter",
    "user",
    "layer",
)
#: Options that say what a call waits for.
DEPENDENCY_OPTIONS = {"depends_on": Condition.OK, "after_any": Condition.ANY, "after_failed": Condition.FAILED}


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Only options that mean something here; others would be silently lost."""
    known = {**options}
    known_names = (*TASK_OPTIONS, *DEPENDENCY_OPTIONS)
    if unknown := set(known) - {*TASK_OPTIONS, "name"}:
        raise BadInput(
            f"unknown task options {', '.join(sorted(unknown))}{meant(unknown)}; beside Celery's there are "
            f"{', '.join(known_names)}. Nothing was submitted."
        )
    for name in ("io_paths", "requires_paths", "tags"):
        if isinstance(known.get(name), list):
            known[name] = tuple(known[name])
    return known


def parse_rate(text: Any) -> float:
    """Tasks a second, of Celery's "10/m". Raises BadInput."""
    try:
        return float(rate(text))
    except (ValueError, KeyError, TypeError):
        raise BadInput(
            f"rate_limit must be a number of tasks a second, or as in '10/m' or '100/h', not {text!r:.60}. Nothing was "
            "submitted."
        ) from None


def meant(unknown: Iterable[str]) -> str:
    """What these options may have been meant to be, as a part of a sentence."""
    near = [match for name in sorted(unknown) for match in get_close_matches(name, TASK_OPTIONS, 1, 0.7)]
    return f" (did you mean {', '.join(near)}?)" if near else ""


def edges_of(given: Mapping[str, Any]) -> list[Dependency]:
    edges = []
    for name, upstream in given.items():
        several = upstream if isinstance(upstream, (list, tuple, set, frozenset)) else [upstream]
        edges += [Dependency(id_of(one), DEPENDENCY_OPTIONS[name]) for one in several]
    return edges


def id_of(task: Handle | int | str) -> int:
    text = str(task.number) if isinstance(task, Handle) else str(task)
    if not text.isdecimal():
        raise BadInput(f"a dependency must be a task handle or an id, not {task!r:.60}.")
    if len(text) > LONGEST_ID:
        raise UnknownTask([text])
    return int(text)


#: A bigint has 19 digits; no sequence gets there.
LONGEST_ID = 18


def condition_of(text: str) -> Condition:
    try:
        return Condition(text)
    except ValueError:
        raise BadInput(f"there is no condition {text!r}: a dependency is ok, any or failed.") from None
