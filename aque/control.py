"""What people ask of tasks, workers and limits. The row first, so that it holds while workers are down; then the ring."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from signal import Signals, valid_signals
from typing import Any

from aque import doorbell
from aque.errors import BadInput, UnknownTask
from aque.machine import user_name
from aque.resources import parse_limits
from aque.settings import Settings
from aque.states import COMPLETE_STATES, READY_STATES, UNREADY_STATES, State
from aque.store import Killed, LimitRow, Store, again


class _Undone(Exception):
    """Takes the transaction of a dry run back; carries what it did."""

    def __init__(self, killed: Killed) -> None:
        super().__init__()
        self.killed = killed


def kill(
    store: Store,
    ids: Iterable[int],
    signal: int,
    *,
    grace_seconds: float | None = None,
    waiting_only: bool = False,
    dependencies: bool = False,
    dependents: bool = False,
    dry_run: bool = False,
) -> Killed:
    """Kill these tasks, and the members of those that are jobs; with `waiting_only`, what runs may go on.

    `dependencies`: also what they depend on, but not what others still need. `dependents`: also what depends on them. With
    either also the children of all of these. What runs has `grace_seconds` to end (None: the worker's setting) until it gets
    SIGKILL; a later kill can shorten them. A `dry_run` does it all and takes it back.

    Raises UnknownTask or BadInput, and then nothing was killed.
    """
    if grace_seconds is not None and not 0 <= grace_seconds < float("inf"):
        raise BadInput(f"the grace of a kill must be seconds, 0 or more, not {grace_seconds!r}. Nothing was killed.")
    wanted = list(ids)

    def work() -> Killed:
        with store.begin() as connection:
            killed = store.kill(
                connection,
                wanted,
                signal,
                grace_seconds=grace_seconds,
                waiting_only=waiting_only,
                dependencies=dependencies,
                dependents=dependents,
            )
            if dry_run:
                raise _Undone(killed)
            return killed

    try:
        killed = again(work)
    except _Undone as undone:
        return undone.killed
    with store.connect() as connection:
        doorbell.ring(connection, {doorbell.KILL, doorbell.READY, doorbell.DONE})
    return killed


@dataclass(frozen=True, slots=True)
class Changed:
    """What a change did; jobs are not among these, only their members."""

    ids: list[int]
    left: dict[int, State]  #: members of jobs that have ended, or that a worker has


class _NewClass(Exception):
    """A class that was not seen before the transaction began."""


def change(
    store: Store,
    settings: Settings,
    ids: Collection[int],
    *,
    priority: int | None = None,
    duration: float | None = None,
    requirement: Mapping[str, Any] | None = None,
) -> Changed:
    """Change these tasks, and the members of those that are jobs, in one transaction: their priority, their expected
    `duration` in seconds, and fields of their `values.Requirement`, checked before. None: left as it is.

    What has ended is not changed, nor what a worker has if its requirement were: of a job such members are left, a task that is
    named is an error. Raises UnknownTask or BadInput, and then nothing was changed.
    """
    if priority is not None:
        _check_priority(settings, priority)
    wanted = sorted(set(ids))
    fields = dict(requirement or {})

    def work() -> Changed:
        with store.connect() as connection:
            _check_limits(store.limits.capacities(connection) if fields.get("limits") else {}, fields.get("limits", ""))
            classes = _new_classes(store, connection, wanted, fields)
        with store.begin() as connection:
            found = store.changes.find(connection, wanted, lock=True)
            if missing := set(wanted) - {task.id for task in found}:
                raise UnknownTask(sorted(missing), "Nothing was changed.")
            named, jobs = set(wanted), [task.id for task in found if task.class_id is None]
            changed: dict[int, int] = {}
            left: dict[int, State] = {}
            for task in found:
                if task.class_id is None:
                    continue
                _check_owner(settings, task.id, task.submitter)
                if why_not := _why_fixed(task.state, fields):
                    if task.id in named:
                        raise BadInput(f"task {task.id} {why_not}. Nothing was changed.")
                    left[task.id] = task.state
                else:
                    changed[task.id] = task.class_id
            if priority is not None:
                store.changes.set_priority(connection, [*changed, *jobs], priority)
            if duration is not None:
                store.changes.set_duration(connection, changed, duration)
            if fields and changed:
                if set(changed.values()) - classes.keys():
                    raise _NewClass
                store.changes.set_classes(connection, {i: classes[class_id] for i, class_id in changed.items()})
            return Changed(list(changed), left)

    while True:
        try:
            done = again(work)
            break
        except _NewClass:  # somebody has changed them, too, meanwhile
            continue
    with store.connect() as connection:
        doorbell.ring(connection, {doorbell.READY})
    return done


def _new_classes(store: Store, connection: Any, ids: Collection[int], fields: Mapping[str, Any]) -> dict[int, int]:
    """For each requirement class of these tasks the one that it becomes."""
    if not fields:
        return {}
    found = {task.class_id for task in store.changes.find(connection, ids, lock=False)}
    old = store.requirements(connection, (class_id for class_id in found if class_id is not None))
    new = {class_id: replace(wanted, **fields) for class_id, wanted in old.items()}
    numbers = store.requirement_ids(connection, new.values())
    return {class_id: numbers[wanted] for class_id, wanted in new.items()}


def _why_fixed(state: State, fields: Mapping[str, Any]) -> str | None:
    """Why a task in this state cannot be changed so, as a sentence part; None if it can."""
    if state in COMPLETE_STATES:
        return f"has ended as {state}"
    if fields and state not in READY_STATES | UNREADY_STATES:
        return f"is {state}: a worker has it, and {', '.join(sorted(fields))} can be set of what waits only"
    return None


def _check_priority(settings: Settings, priority: int) -> None:
    user = user_name()
    if priority > settings.max_user_priority and not settings.is_administrator(user):
        raise BadInput(
            f"a priority above {settings.max_user_priority} needs an administrator (settings max_user_priority, "
            f"administrators), and {user} is none. Nothing was changed."
        )


def _check_limits(capacities: Mapping[str, int], wanted: str) -> None:
    for name, n in parse_limits(wanted).items():
        if n > capacities.get(name, 0):
            there = f"is {capacities[name]}" if name in capacities else "there is not"
            raise BadInput(
                f"no task can have {n} of the limit {name!r}, which {there}. Nothing was changed: `aque limits set {name} {n}` "
                "makes room."
            )


def _check_owner(settings: Settings, task_id: int, submitter: str) -> None:
    user = user_name()
    if submitter != user and not settings.is_administrator(user):
        raise BadInput(
            f"task {task_id} is {submitter}'s: only {submitter} and administrators (setting administrators) change it, and "
            f"{user} is neither. Nothing was changed."
        )


def drain(store: Store, names: Iterable[str], wanted: bool) -> list[int]:
    """Let the live workers of these names claim nothing more (not `wanted`: claim again), while what they run goes on; their
    ids. Raises BadInput, and then nothing was changed."""
    listed = list(names)
    with store.begin() as connection:
        live = [row.info for row in store.live_workers(connection) if row.is_live]
        if unknown := [name for name in listed if name not in {info.name for info in live}]:
            known = ", ".join(sorted({info.name for info in live})) or "none"
            raise BadInput(
                f"there is no live worker {unknown[0]!r}; there are: {known}. Nothing was changed: write a name as "
                "`aque workers` shows it."
            )
        changed = store.set_draining(connection, [info.id for info in live if info.name in listed], wanted)
    with store.connect() as connection:
        doorbell.ring(connection, {doorbell.KILL, doorbell.READY})
    return changed


def set_limit(store: Store, name: str, capacity: int) -> LimitRow:
    """Let the tasks of the farm hold at most `capacity` tokens of this limit together; how that limit now stands. Raises
    BadInput, and then nothing was changed."""

    def work() -> LimitRow:
        with store.begin() as connection:
            store.limits.set(connection, name, capacity)
            (row,) = [row for row in store.limits.rows(connection) if row.name == name]
            return row

    row = again(work)
    _ring_ready(store)
    return row


def remove_limit(store: Store, name: str) -> None:
    """Let nothing bound the tasks that ask for this limit. Raises BadInput if there is none."""

    def work() -> bool:
        with store.begin() as connection:
            return store.limits.remove(connection, name)

    if not again(work):
        raise BadInput(f"there is no limit {name!r}. Nothing was changed: `aque limits` lists those there are.")
    _ring_ready(store)


def _ring_ready(store: Store) -> None:
    with store.connect() as connection:
        doorbell.ring(connection, {doorbell.READY})


def parse_signal(text: str | int) -> int:
    """The number of a signal given as a name, with or without SIG, or as a number. Raises BadInput."""
    name = str(text).upper()
    if name.isdecimal() and int(name) in valid_signals():
        return int(name)
    try:
        return Signals[name if name.startswith("SIG") else f"SIG{name}"].value
    except KeyError:
        raise BadInput(f"there is no signal {text!r}: write a name such as TERM or a number such as 15.") from None
