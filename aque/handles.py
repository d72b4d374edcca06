"""The handle that stands for a submitted task, and what every way to submit one needs: options, dependencies, ids."""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from celery import Celery
from celery.result import AsyncResult

from aque import codec, control
from aque.backend import Backend
from aque.errors import BadInput, UnknownTask
from aque.farm import farm_of
from aque.submitter import Submitter
from aque.values import Condition, Dependency

#: Options of a task that its decorator, and each call, may give; see `submitter.Options` for what they mean.
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


class Handle(AsyncResult):
    """A submitted task: `.id` (its decimal id as text), `.get()`, `.state`, and everything else that Celery's AsyncResult
    has. As an argument of another task it stands for this one's result, and makes it a dependency."""

    @cached_property
    def number(self) -> int:
        """The id in the table, also where a caller brought another one."""
        if self.id.isdecimal():
            return int(self.id)
        store = farm_of(self.app).store
        with store.connect() as connection:
            found = store.ids_of(connection, [self.id])
        if self.id not in found:
            raise UnknownTask([self.id], "It cannot be used.")
        return found[self.id]

    def kill(
        self,
        signal: str | int = "TERM",
        *,
        grace_seconds: float | None = None,
        dependencies: bool = False,
        dependents: bool = False,
    ) -> None:
        """Withdraw the task if it waits, signal it if it runs; the options are those of `aque kill`."""
        control.kill(
            farm_of(self.app).store,
            [self.number],
            control.parse_signal(signal),
            grace_seconds=grace_seconds,
            dependencies=dependencies,
            dependents=dependents,
        )


codec.register_handle(Handle, lambda handle: handle.number)


@dataclass(frozen=True, slots=True)
class StandIn:
    """What takes the place of the farm, see `aque.execute`."""

    submitter: Submitter
    backend: Backend


#: Of the tasks that are submitted in this context; None: the farm.
stand_in: ContextVar[StandIn | None] = ContextVar("stand_in", default=None)

_submitters: dict[int, Submitter] = {}
_backends: dict[int, Backend] = {}


def submitter_of(app: Celery) -> Submitter:
    if (instead := stand_in.get()) is not None:
        return instead.submitter
    farm = farm_of(app)
    key = id(farm.store)  # the store stays open as long as the process
    if key not in _submitters:
        _submitters[key] = Submitter(farm.store, farm.settings)
    return _submitters[key]


def backend_of(app: Celery) -> Backend:
    if (instead := stand_in.get()) is not None:
        return instead.backend
    if id(app) not in _backends:
        _backends[id(app)] = Backend(app=app)
    return _backends[id(app)]


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Only options that mean something here; others would be silently lost."""
    known = {**options}
    known_names = (*TASK_OPTIONS, *DEPENDENCY_OPTIONS)
    if unknown := set(known) - {*TASK_OPTIONS, "name"}:
        raise BadInput(f"unknown task options {', '.join(sorted(unknown))}; there are {', '.join(known_names)}.")
    for name in ("io_paths", "requires_paths", "tags"):
        if isinstance(known.get(name), list):
            known[name] = tuple(known[name])
    return known


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
