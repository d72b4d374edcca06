"""What can be asked for a task, as people write it, and how each of it is read and checked."""

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from aque import durations, hints
from aque.errors import BadInput
from aque.moments import FARTHEST_SECONDS, read_seconds
from aque.resources import CpuRequest, format_amounts, parse_limits, parse_memory, parse_resources
from aque.settings import Settings
from aque.values import Children, Dependency, Pattern, Requirement

_TAG = re.compile(r"!?[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Options:
    """What can be asked for any task, as people write it; `TaskSpec` holds it as the store does."""

    name: str = ""
    queue: str = ""  #: empty: the parent's, else the default queue
    priority: int | None = None  #: higher first; None: the parent's, else 0
    cpus: str | float = "1"  #: see `resources.CpuRequest`
    memory: str | int = 0  #: bytes, or with a suffix
    host: str = ""  #: comma-separated globs; `!glob` excludes; empty: the parent's
    platform: str = ""  #: as `sys.platform`; empty: the parent's
    resources: str | Mapping[str, int] = ""  #: a site's own, as in {"gpu": 1} or "gpu=1"
    limits: str | Mapping[str, int] = ""  #: tokens of farm-wide limits, as in {"nuke": 1} or "nuke=1"
    tags: str | tuple[str, ...] = ""  #: that the worker must have; `!tag` excludes; empty: the parent's
    requires_paths: tuple[str | bytes, ...] = ()  #: that the host must have; empty: the parent's
    duration: float | str = 0.0  #: expected seconds, or as in "2x" how many times the average of its priority
    io_paths: tuple[str | bytes, ...] = ()  #: that it reads or writes; of a command, if none: its words that are paths
    io: bool = True  #: False: without io_paths
    time_limit: float | None = None  #: seconds, then it is killed
    soft_time_limit: float | None = None  #: seconds, then it is asked to end
    countdown: float | None = None  #: seconds; not started before
    eta: datetime | None = None  #: in its place; one without a time zone is in UTC
    expires: float | datetime | None = None  #: seconds, or a time: not started by then, it is cancelled
    children: str = "wait"  #: see `values.Children`
    max_attempts: int = 1
    requeue: bool = True  #: False: if its worker dies, it is not run again
    strict_lease: bool = False  #: killed on its host when its worker's lease has ended there
    #: of a Python task: a program such as /usr/bin/python3; "worker": the worker's own, in a process of its own
    interpreter: str = ""
    user: str = ""  #: whose process it becomes; empty: the submitter's. Only root may name another
    layer: str = ""
    dependencies: tuple[Dependency, ...] = ()
    job_id: int | None = None
    parent_id: int | None = None
    seq: int = 0
    celery_id: str | None = None
    #: see `values.TaskSpec.extra`
    extra: Mapping[str, Any] = field(default_factory=dict)


def requirement_of(
    options: Options, pattern: Pattern, user: str, default_queue: str, inherited: Requirement | None
) -> Requirement:
    """What a task needs: what is asked for, else what its parent's is. Raises BadInput."""
    wanted = (
        options.queue or (inherited.queue if inherited else "") or default_queue,
        pattern,
        options.cpus,
        options.memory,
        options.host or (inherited.host if inherited else ""),
        options.platform or (inherited.platform if inherited else ""),
        user,
        options.interpreter,
        _hashable(options.resources),
        _hashable(options.limits),
        options.tags or (inherited.tags if inherited else ""),
        options.requires_paths or (inherited.requires_paths if inherited else ()),
    )
    try:
        return _requirement(*wanted)
    except TypeError:  # something that cannot be hashed, and that the check below has a sentence for
        return _requirement.__wrapped__(*wanted)


@lru_cache(maxsize=1024, typed=True)
def _requirement(
    queue: str,
    pattern: Pattern,
    cpus: str | float,
    memory: str | int,
    host: str,
    platform: str,
    user: str,
    interpreter: str,
    resources: str | tuple[tuple[str, int], ...],
    limits: str | tuple[tuple[str, int], ...],
    tags: str | tuple[str, ...],
    requires_paths: tuple[str | bytes, ...],
) -> Requirement:
    """The requirement, read and checked; remembered, since a graph of 100,000 tasks has few different ones."""
    return Requirement(
        queue=read_text("queue", queue),
        pattern=pattern,
        cpus=CpuRequest.parse(cpus).text,
        memory_bytes=parse_memory(memory),
        host=read_text("host", host),
        platform=read_text("platform", platform),
        user=user,
        interpreter=read_text("interpreter", interpreter),
        resources=format_amounts(parse_resources(_mapping(resources))),
        limits=format_amounts(_limits(_mapping(limits))),
        tags=",".join(_tags(tags)),
        requires_paths=tuple(sorted(set(_absolute(requires_paths)))),
    )


def parse_requirement(given: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a `values.Requirement` from texts, by the names of `Options`. Raises BadInput."""
    readers: dict[str, tuple[str, Callable[[str], Any]]] = {
        "queue": ("queue", lambda text: read_text("queue", text)),
        "cpus": ("cpus", lambda text: CpuRequest.parse(text).text),
        "memory": ("memory_bytes", parse_memory),
        "host": ("host", lambda text: read_text("host", text)),
        "platform": ("platform", lambda text: read_text("platform", text)),
        "resources": ("resources", lambda text: format_amounts(parse_resources(text))),
        "limits": ("limits", lambda text: format_amounts(_limits(text))),
        "tags": ("tags", lambda text: ",".join(_tags(text))),
    }
    return {readers[name][0]: readers[name][1](text) for name, text in given.items()}


def _mapping(amounts: Any) -> Any:
    """What `_hashable` was given."""
    is_pairs = isinstance(amounts, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in amounts)
    return dict(amounts) if is_pairs else amounts


def _hashable(amounts: Any) -> Any:
    return tuple(amounts.items()) if isinstance(amounts, Mapping) else amounts


def _limits(limits: str | Mapping[str, int]) -> dict[str, int]:
    found = parse_limits(limits)
    if mine := [name for name in found if name.startswith("user:")]:
        raise BadInput(f"the limit {mine[0]} is taken for every task of that user, and cannot be asked for.")
    return found


def _tags(tags: str | Iterable[str]) -> list[str]:
    """Sorted, each once. Raises BadInput."""
    if not isinstance(tags, (str, list, tuple, set, frozenset)):
        raise BadInput(f"tags must be a list of texts, or one with commas, not {tags!r:.60}. Nothing was submitted.")
    words = tags.split(",") if isinstance(tags, str) else list(tags)
    found = sorted({read_text("tag", word).strip() for word in words} - {""})
    if both := [tag for tag in found if f"!{tag}" in found]:
        raise BadInput(f"no worker has the tag {both[0]} and has it not. Nothing was submitted.")
    if bad := [tag for tag in found if not _TAG.fullmatch(tag)]:
        raise BadInput(f"a tag is letters, digits and _ . - after at most one !, not {bad[0]!r:.60}.")
    return found


def _absolute(paths: Iterable[str | bytes]) -> list[bytes]:
    found = _paths("requires_paths", paths)
    if b"" in found:
        raise BadInput("a path that is required cannot be empty. Nothing was submitted.")
    return [os.path.abspath(path) for path in found]


def read_path(what: str, path: str | bytes) -> bytes:
    try:
        encoded = os.fsencode(path)
    except TypeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise BadInput(f"{what} must be a path without a NUL byte, not {path!r:.60}. Nothing was submitted.")
    return encoded


def _paths(what: str, paths: Iterable[str | bytes]) -> tuple[bytes, ...]:
    if isinstance(paths, (str, bytes)) or not isinstance(paths, Iterable):
        raise BadInput(f"{what} must be a list of paths, not {paths!r:.60}. Nothing was submitted.")
    return tuple(read_path(what, path) for path in paths)


def read_io_paths(options: Options, cwd: bytes) -> tuple[bytes, ...]:
    """The paths that were given, absolute, each once."""
    if not options.io:
        return ()
    return tuple(dict.fromkeys(hints.absolute(path, cwd) for path in _paths("io_paths", options.io_paths)))


def read_text(what: str, value: str) -> str:
    if not isinstance(value, str) or "\0" in value or len(value) > 4096:
        raise BadInput(f"{what} must be a text without NUL of at most 4096 characters, not {value!r:.60}.")
    return value.encode(errors="backslashreplace").decode()


def read_integer(what: str, value: int, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadInput(f"{what} must be a whole number from {low} to {high}, not {value!r:.60}.")
    return value


def read_priority(wanted: int, settings: Settings, user: str) -> int:
    """A priority that this user may have. Raises BadInput."""
    priority = read_integer("priority", wanted, -(1 << 31), (1 << 31) - 1)
    highest = settings.max_user_priority
    if priority > highest and not settings.is_administrator(user):
        raise BadInput(
            f"a priority above {highest} needs an administrator (settings max_user_priority, administrators), and "
            f"{user} is none. Nothing was submitted."
        )
    return priority


def read_duration(value: float | str) -> tuple[float, float]:
    """Seconds, and how many times the average; one of them is 0."""
    return (0.0, durations.multiple(value)) if isinstance(value, str) else (read_seconds("duration", value), 0.0)


def read_not_before(countdown: float | None, eta: datetime | None) -> float | None:
    if countdown is not None and eta is not None:
        raise BadInput("a task has a countdown or an eta, not both. Nothing was submitted.")
    if countdown is not None and not isinstance(countdown, (int, float)):
        raise BadInput(f"countdown must be a number of seconds, not {countdown!r:.60}. Nothing was submitted.")
    if countdown is not None and countdown <= 0:
        return None
    return read_moment("eta", eta) if countdown is None else read_moment("countdown", countdown)


def read_moment(what: str, value: float | datetime | None) -> float | None:
    """Seconds since 1970 of a time, or of so many seconds from now. Raises BadInput, also for one that is further than
    FARTHEST_SECONDS."""
    if not isinstance(value, datetime):
        return None if value is None else time.time() + read_seconds(what, value)
    moment = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if moment - time.time() > FARTHEST_SECONDS:
        raise BadInput(f"{what} must be at most 1e9 seconds (31 years) from now, not {value}. Nothing was submitted.")
    return moment


def read_children(policy: str) -> Children:
    try:
        return Children(policy)
    except ValueError:
        raise BadInput(f"children must be wait, detach or cancel, not {policy!r:.60}. Nothing was submitted.") from None


def read_limit(what: str, value: float | None) -> float | None:
    seconds = None if value is None else read_seconds(what, value)
    if seconds == 0:
        raise BadInput(f"{what} must be more than 0 seconds. Nothing was submitted.")
    return seconds
