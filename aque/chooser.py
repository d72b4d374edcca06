"""The policy: which ready tasks a worker starts with what it has free, and for which it keeps room. Pure: no clock, no
database.

Order: priority (higher first), fewest CPUs running for the user, IO cost here, expected duration (longest first), id; first
fit among those that fit.
"""

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from heapq import heapify, heappop, heapreplace

from aque.backfill import Hold, is_overtaken, may_fill, smallest
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
            return f"has the tag {tag[1:]}, which it must not" if tag.startswith("!") else f"has no tag {tag}"
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
    cpus = {need(requirement, place).cpus - place.whole.cpus for place in served}
    if min(cpus) > 0:  # whatever else it asks for
        largest = max(served, key=lambda place: place.whole.cpus)
        wanted = format_cpus(need(requirement, largest).cpus)
        return f"unsatisfiable: needs {wanted} cpus, largest worker has {format_cpus(largest.whole.cpus)}"
    said = sorted({why for place, why in zip(places, reasons, strict=True) if place in served and why})
    if len(said) == 1:
        return f"unsatisfiable: {said[0]}"
    return (
        f"unsatisfiable: no worker has all that it asks for ({'; '.join(said[:3])}{'; ...' if len(said) > 3 else ''})"
    )


def weight(cpus: Fraction) -> Fraction:
    """What a running task with so many CPUs counts for its user: its CPUs, and a little for being there."""
    return cpus + Fraction(1, 1000)


def order(task: ReadyTask) -> tuple[int, float, int]:
    """Sort key within a requirement class: smaller starts first."""
    return -task.priority, -task.duration, task.id


@dataclass(frozen=True, slots=True)
class Class:
    """A requirement class as this worker sees it now: what one task of it takes, and what speaks for it here."""

    need: Capacity
    user: str = ""
    cost: int = 0  #: of its files here, see `hints.Cost`: smaller starts first
    limits: Mapping[str, int] = field(default_factory=dict)  #: tokens of farm-wide limits


@dataclass(frozen=True, slots=True)
class Blocked:
    """The best task of a class of which one does not start now, and why."""

    task: ReadyTask
    why: str
    lacks_capacity: bool = False  #: of this worker, and nothing else


@dataclass(frozen=True, slots=True)
class Choice:
    """What to start, in order; what is free after that; what has to wait, one entry a class; and whether the choice ended where
    nobody knew what is next."""

    start: list[ReadyTask]
    free: Capacity
    blocked: list[Blocked]
    is_cut: bool = False


def choose(
    ready: Mapping[int, Sequence[ReadyTask]],
    classes: Mapping[int, Class],
    free: Capacity,
    limit: int,
    *,
    now: float = 0.0,
    tokens: Mapping[str, int] | None = None,
    usage: Mapping[str, Fraction] | None = None,
    hold: Hold | None = None,
    seconds: Callable[[str], float | None] = lambda name: None,
    cut: Container[int] = (),
) -> Choice:
    """The tasks to start now: first fit in order of priority, fewest CPUs running for the user, IO cost here, expected
    duration (longest first), id.

    `ready` holds the tasks of each class sorted by `order`; `tokens` what is free of farm-wide limits (a name that is not in
    it bounds nothing); `usage` the CPUs that run for each user (None: users do not count). A class of which one task does not
    fit is passed over for the rest of the round: with less free, the next would not fit either. While this worker has a
    `hold`, tasks of no higher priority may only fill what does not delay that one; `seconds` gives the measured run time of
    tasks with a name whose duration nobody has told. `cut` holds the classes of which there are
    more tasks than were read: when the last of one has been chosen, the choice ends, because the next might go before all
    others.
    """
    left = dict(tokens or {})
    used = defaultdict(Fraction, usage or {})
    spare = Capacity() if hold is None else hold.forecast.spare
    queues: dict[str, list[_Head]] = {}
    for class_id, tasks in ready.items():
        if tasks:
            user = classes[class_id].user if usage is not None else ""
            queues.setdefault(user, []).append(_Head(classes[class_id], iter(tasks), hold))
    for queue in queues.values():
        heapify(queue)
    start: list[ReadyTask] = []
    blocked: list[Blocked] = []
    is_cut = False
    while queues and len(start) < limit:
        several = len(queues) > 1
        user = min(queues, key=lambda user: queues[user][0].key_for(used[user])) if several else next(iter(queues))
        head = queues[user][0]
        task, kind = head.task, head.of
        if why := _why_not(kind, free, left):
            blocked.append(Blocked(task, why, lacks_capacity=why_no_token(kind.limits, left) is None))
            heappop(queues[user])
        else:
            way: str | None = "ahead"
            if hold is not None and task.id != hold.task_id and task.priority <= hold.priority:
                expected = task.duration or seconds(task.name) or 0.0
                way = may_fill(kind.need, expected, spare, hold.forecast.at, now)
            if way is not None:
                if way == "room":
                    spare = spare - kind.need
                start.append(task)
                free = free - kind.need
                if usage is not None:
                    used[user] += weight(kind.need.cpus)
                for name, number in kind.limits.items():
                    if name in left:
                        left[name] -= number
            elif head.is_first_refusal():
                assert hold is not None
                blocked.append(Blocked(task, f"room is kept for task {hold.task_id}"))
            if head.advance():
                heapreplace(queues[user], head)
            elif task.class_id in cut and way is not None:
                is_cut = True
                break
            else:
                heappop(queues[user])
        if not queues[user]:
            del queues[user]
    return Choice(start, free, blocked, is_cut)


def _why_not(kind: Class, free: Capacity, tokens: Mapping[str, int]) -> str | None:
    return free.lacking(kind.need) or why_no_token(kind.limits, tokens)


def why_no_token(wanted: Mapping[str, int], tokens: Mapping[str, int]) -> str | None:
    """The first limit of which `wanted` wants more tokens than are free, as a sentence part; None if there are enough."""
    for name, number in wanted.items():
        if tokens.get(name, number) < number:
            return f"limit {name}: needs {number}, {tokens[name]} of it free"
    return None


class _Head:
    """The tasks of a class that are left, by the best of them."""

    __slots__ = ("_held", "_key", "_refused", "_tasks", "of", "task")

    def __init__(self, of: Class, tasks: Iterator[ReadyTask], hold: Hold | None) -> None:
        self.of = of
        self._tasks = tasks
        self._held = None if hold is None else hold.task_id
        self._refused = False
        self.advance()

    def advance(self) -> bool:
        """Go on to the next task; False: there is none."""
        task = next(self._tasks, None)
        if task is not None:
            self.task = task
            self._key = (-task.priority, task.id != self._held, self.of.cost, -task.duration, task.id)
        return task is not None

    def key_for(self, used: Fraction) -> tuple[int, bool, Fraction, int, float, int]:
        """The whole order, for a user who has so many CPUs running."""
        priority, is_other, cost, duration, task_id = self._key
        return priority, is_other, used, cost, duration, task_id

    def is_first_refusal(self) -> bool:
        """True once."""
        first, self._refused = not self._refused, True
        return first

    def __lt__(self, other: "_Head") -> bool:
        return self._key < other._key


def starving(
    ready: Mapping[int, Sequence[ReadyTask]],
    classes: Mapping[int, Class],
    choice: Choice,
    running: Callable[[], Iterable[Capacity]],
    now: float,
    reserve_after: float,
) -> list[ReadyTask]:
    """The tasks for which room should be kept, one a class: those that have waited longer than `reserve_after` seconds while
    smaller ones can take what they wait for; the highest priority first, then the oldest. `running`: what runs here; it is
    asked only if somebody has waited so long."""
    aged: list[ReadyTask] = []
    for blocked in choice.blocked:
        if blocked.lacks_capacity:
            best = blocked.task
            equals = (task for task in ready[best.class_id] if task.priority == best.priority)
            oldest = min(equals, key=lambda task: (task.ready_at, task.id))
            if now - oldest.ready_at >= reserve_after:
                aged.append(oldest)
    if not aged:
        return []
    least = smallest([classes[class_id].need for class_id, tasks in ready.items() if tasks] + list(running()))
    found = [task for task in aged if is_overtaken(classes[task.class_id].need, choice.free, least)]
    return sorted(found, key=lambda task: (-task.priority, task.ready_at, task.id))


def at_home(tasks: Sequence[ReadyTask], host: str, now: float, wait: float) -> tuple[list[ReadyTask], float | None]:
    """Of tasks with files, those that need not wait (any more) for the host on which what they waited for has ended, and when
    the next of the others need not (None: there are none)."""
    here, until = [], None
    for task in tasks:
        due = task.ready_at + wait
        if task.near_host in ("", host) or due <= now:
            here.append(task)
        else:
            until = due if until is None else min(until, due)
    return here, until


#: A task is short if its kind has run this fast; only short tasks are claimed ahead of a free place.
SHORT_SECONDS = 0.05
#: How much work, in seconds of the whole worker, the local buffer may hold.
BUFFER_SECONDS = 0.2
#: What everything fits into.
_EVERYTHING = Capacity(Fraction(1 << 40), 1 << 62, 1 << 40, 1 << 40)
#: However short the tasks are, no more than this are claimed ahead: a lost worker gives them back late.
BUFFER_TASKS = 128


def ahead(
    ready: Mapping[int, Sequence[ReadyTask]],
    classes: Mapping[int, Class],
    tokens: Mapping[str, int],
    usage: Mapping[str, Fraction] | None,
    seconds: Callable[[str], float | None],
    buffered: int,
    places: int,
) -> list[ReadyTask]:
    """The tasks to claim into the local buffer, in the order of `choose`: about BUFFER_SECONDS of work, up to the first task
    that is not known to be short, or that takes tokens. What is buffered starts before anybody looks again: it must not go
    before what has a better right to the place.

    `seconds` gives the measured run time of tasks with this name, or None; `places` is how many run at once here.
    """
    if buffered >= BUFFER_TASKS or not any(seconds(row[0].name) is not None for row in ready.values() if row):
        return []
    names = {name for class_id in ready for name in classes[class_id].need.resources}
    everything = replace(_EVERYTHING, resources=dict.fromkeys(names, 1 << 40))
    in_order = choose(ready, classes, everything, BUFFER_TASKS - buffered, tokens=tokens, usage=usage).start
    chosen: list[ReadyTask] = []
    budget = BUFFER_SECONDS * max(places, 1)
    for task in in_order:
        expected = seconds(task.name)
        if expected is None or expected > SHORT_SECONDS or classes[task.class_id].limits:
            break
        budget -= max(expected, BUFFER_SECONDS / BUFFER_TASKS)
        if budget < 0 or buffered + len(chosen) >= BUFFER_TASKS:
            break
        chosen.append(task)
    return chosen
