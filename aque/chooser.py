"""The policy: which ready tasks a worker starts with what it has free. Pure: no clock, no database.

Order: priority (higher first), then expected duration (longest first), then id; first fit among those that fit.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from heapq import merge

from aque.resources import Capacity, CpuRequest, format_cpus, parse_resources
from aque.values import ClaimedTask, Pattern, ReadyTask, Requirement


@dataclass(frozen=True, slots=True)
class Place:
    """A worker as the choice sees it."""

    host: str
    platform: str
    queues: frozenset[str]
    whole: Capacity
    user: str = ""  #: whose tasks it runs; empty: whoever's, as itself
    switches_user: bool = False  #: it runs the tasks of other users as these
    draining: bool = False  #: it claims nothing, as a person asked
    tags: frozenset[str] = frozenset()
    missing_paths: Mapping[bytes, str] = field(
        default_factory=dict
    )  #: that tasks require, and that it has not: why not


def is_own(task: Requirement | ClaimedTask, place: Place) -> bool:
    """True if this worker runs such a task as itself."""
    return not place.user or task.user in ("", place.user)


def runs_in_pool(task: Requirement | ClaimedTask, place: Place) -> bool:
    """True for a Python task that a child of the worker's own pool runs: its own user's, under its own interpreter."""
    return task.pattern is Pattern.PYTHON and not task.interpreter and is_own(task, place)


def need(requirement: Requirement, place: Place) -> Capacity:
    """What a task with this requirement reserves on this worker."""
    cpus = CpuRequest.parse(requirement.cpus).share(place.whole.cpus)
    pooled = runs_in_pool(requirement, place)
    return Capacity(
        cpus,
        requirement.memory_bytes,
        python_slots=int(pooled),
        command_slots=int(not pooled and cpus == 0),
        resources=parse_resources(requirement.resources),
    )


def why_never(requirement: Requirement, place: Place) -> str | None:
    """Why this worker can never run tasks with this requirement, however idle it is; None if it can."""
    if requirement.queue not in place.queues:
        return f"queue {requirement.queue!r} is not served"
    if requirement.host and not matches_host(requirement.host, place.host):
        return f"host {place.host} is not one of {requirement.host}"
    if not is_own(requirement, place) and not place.switches_user:
        return f"user is {place.user}, who cannot run tasks of {requirement.user}"
    if requirement.platform and requirement.platform != place.platform:
        return f"platform is {place.platform}, not {requirement.platform}"
    for tag in filter(None, requirement.tags.split(",")):
        if (tag[1:] in place.tags) if tag.startswith("!") else (tag not in place.tags):
            return f"has tag {tag[1:]}" if tag.startswith("!") else f"has no tag {tag}"
    for path in requirement.requires_paths:
        if path in place.missing_paths:
            return f"{path.decode(errors='backslashreplace')} is required: {place.missing_paths[path]}"
    return place.whole.lacking(need(requirement, place))


def matches_host(globs: str, host: str) -> bool:
    """True if `host` matches one of the comma-separated globs, or there are only exclusions, and no `!glob` matches."""
    patterns = [glob.strip() for glob in globs.split(",") if glob.strip()]
    wanted = [glob for glob in patterns if not glob.startswith("!")]
    refused = [glob[1:] for glob in patterns if glob.startswith("!")]
    if any(fnmatchcase(host, glob) for glob in refused):
        return False
    return not wanted or any(fnmatchcase(host, glob) for glob in wanted)


def why_nowhere(requirement: Requirement, places: Sequence[Place]) -> str | None:
    """Why no worker of the farm can run it, as a sentence for people; None if one of them can."""
    if not places:
        return "no live worker"
    reasons = [why_never(requirement, place) for place in places]
    able = [place for place, reason in zip(places, reasons, strict=True) if reason is None]
    if any(not place.draining for place in able):
        return None
    if able:
        return (
            "the worker that could run it is draining"
            if len(able) == 1
            else "the workers that could run it are draining"
        )
    served = [place for place in places if requirement.queue in place.queues]
    if not served:
        return f"no worker serves queue {requirement.queue!r}"
    largest = max(served, key=lambda place: place.whole.cpus)
    wanted = need(requirement, largest).cpus
    if wanted > largest.whole.cpus:
        return f"unsatisfiable: needs {format_cpus(wanted)} cpus, largest worker has {format_cpus(largest.whole.cpus)}"
    return f"unsatisfiable: {next(r for p, r in zip(places, reasons, strict=True) if p in served and r)}"


def order(task: ReadyTask) -> tuple[int, float, int]:
    """Sort key: smaller starts first."""
    return -task.priority, -task.duration, task.id


def choose(
    ready: Iterable[Sequence[ReadyTask]], free: Capacity, needs: Mapping[int, Capacity], limit: int
) -> tuple[list[ReadyTask], Capacity]:
    """The tasks to start now, first fit in order, and what is free after them.

    `ready` holds one sequence per requirement class, each sorted by `order`; `needs` maps class ids to what one task of
    it reserves here. A class of which one task does not fit is passed over for the rest of the round: with less free,
    the next would not fit either.
    """
    chosen: list[ReadyTask] = []
    full: set[int] = set()
    for task in merge(*ready, key=order):
        if len(chosen) >= limit:
            break
        if task.class_id in full:
            continue
        if free.lacking(needs[task.class_id]) is not None:
            full.add(task.class_id)
            continue
        free = free - needs[task.class_id]
        chosen.append(task)
    return chosen, free


#: A task is short if its kind has run this fast; only short tasks are claimed ahead of a free place.
SHORT_SECONDS = 0.05
#: How much work, in seconds of the whole worker, the local buffer may hold.
BUFFER_SECONDS = 0.2
#: However short the tasks are, no more than this are claimed ahead: a lost worker gives them back late.
BUFFER_TASKS = 128


def ahead(
    ready: Iterable[Sequence[ReadyTask]],
    seconds: Callable[[str], float | None],
    buffered: int,
    places: int,
) -> list[ReadyTask]:
    """The tasks to claim into the local buffer, in order: short ones only, about BUFFER_SECONDS of work.

    `seconds` gives the measured run time of tasks with this name, or None; `places` is how many run at once here.
    """
    chosen: list[ReadyTask] = []
    budget = BUFFER_SECONDS * max(places, 1)
    for task in merge(*ready, key=order):
        expected = seconds(task.name)
        if expected is None or expected > SHORT_SECONDS:
            continue
        budget -= max(expected, BUFFER_SECONDS / BUFFER_TASKS)
        if budget < 0 or buffered + len(chosen) >= BUFFER_TASKS:
            break
        chosen.append(task)
    return chosen
