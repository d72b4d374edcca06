"""The handles that stand for submitted tasks and groups: Celery's results, over the table."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from celery import Celery, current_app
from celery.result import AsyncResult, EagerResult, GroupResult, assert_will_not_block
from celery.states import PROPAGATE_STATES, READY_STATES, SUCCESS
from vine import barrier

from aque import codec, control
from aque.backend import Backend
from aque.errors import BadInput, TaskSkipped, UnknownTask
from aque.farm import farm_of
from aque.store import Tree
from aque.submitter import Submitter
from aque.values import TaskSpec

if TYPE_CHECKING:
    from aque.graphs import Graph

#: In this context; what it has is submitted at its end.
open_graph: ContextVar["Graph | None"] = ContextVar("open_graph", default=None)


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

    def then(self, callback: Callable[..., Any], on_error: Callable[..., Any] | None = None, weak: bool = False) -> Any:
        """Call back with this result when the task has ended, however it did, as in Celery: in a thread of the backend, or in
        whoever asks for the result before that. `on_error`: for what the callback raises."""
        made = super().then(callback, on_error, weak)
        if not isinstance(callback, barrier):  # of a ResultSet, which wants to know when others ask
            self.backend.watch(self)
        return made

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

    def revoke(
        self,
        connection: Any = None,
        terminate: bool = False,
        signal: Any = None,
        wait: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Withdraw the task if it waits; with `terminate` also signal it if it runs. It is written to the row, and so holds
        while no worker is up; nobody has to answer, so that there is nothing to `wait` for."""
        _revoke(self.app, [self.number], terminate, signal)

    def get(self, *args: Any, propagate: bool = True, follow_parents: bool = True, **options: Any) -> Any:
        """As Celery's. For a step of a chain that was skipped the exception of the step that has failed is raised, and for
        a task that a graph has replaced that of the task in it. BadInput within the `with aque.graph()` that submits it."""
        _refuse_unsubmitted([self.id])
        try:
            value = super().get(*args, propagate=propagate, follow_parents=False, **options)
            is_skipped = isinstance(value, TaskSkipped) and (self.parent is not None or self._has_run())
            return (backend_of(self.app).cause(self.id) or value) if is_skipped else value
        except TaskSkipped:
            if propagate and ((follow_parents and self.parent is not None) or self._has_run()):
                self._maybe_reraise_parent_error()
            raise

    wait = get

    def _has_run(self) -> bool:
        store = farm_of(self.app).store
        with store.connect() as connection:
            return any(row["attempt"] for row in store.tasks(connection, {"id": self.number}, ["attempt"]))

    def _maybe_reraise_parent_error(self) -> None:
        if (cause := backend_of(self.app).cause(self.id)) is not None:
            raise cause

    @property
    def children(self) -> list[Any]:
        """What gets this task's result, and what it has submitted while it ran."""
        store = farm_of(self.app).store
        with store.connect() as connection:
            found = store.groups.followers(connection, self.number)
        return [Handle(i, app=self.app, backend=self.backend) for i in found]

    def as_tuple(self) -> Any:
        """As Celery's, for a chain of any length."""
        steps: list[Any] = [self]
        while steps[-1].parent is not None:
            steps.append(steps[-1].parent)
        found: Any = None
        for step in reversed(steps):
            nodes = [node.as_tuple() for node in step.results] if isinstance(step, GroupResult) else None
            found = ((step.id, found), nodes)
        return found


class GroupHandle(GroupResult):
    """The results of a group, of which there is a row: as an argument of a task it stands for the list of them."""

    def __init__(self, id: Any = None, results: Any = None, parent: Any = None, **options: Any) -> None:
        super().__init__(id, results, parent=parent, **{"ready_barrier": barrier(), **options})

    @cached_property
    def number(self) -> int:
        """The id of the group in the table."""
        return Handle(self.id, app=self.app, backend=self.backend).number

    @property
    def backend(self) -> Backend:
        """The table, whatever the app's backend for other tasks is."""
        return backend_of(self.app)

    @property
    def supports_native_join(self) -> bool:
        """One query, however many members."""
        return not self._is_eager

    @property
    def _is_eager(self) -> bool:
        """Its members have run in this process, and the table knows nothing of them."""
        return any(isinstance(result, EagerResult) for result in self.results)

    def as_tuple(self) -> Any:
        """As Celery's, for a chain of any length."""
        return Handle.as_tuple(self)

    def _states(self) -> list[str]:
        """Celery's states of the members, and of the members of groups among them."""
        leaves: list[str] = []
        eager: list[str] = []
        look: list[Any] = list(self.results)
        while look:
            one = look.pop()
            if isinstance(one, GroupResult):
                look += one.results
            elif isinstance(one, EagerResult):
                eager.append(one.state)
            else:
                leaves.append(one.id)
        return eager + self.backend.states(leaves)

    def ready(self) -> bool:
        """True if all have ended, well or badly."""
        return all(state in READY_STATES for state in self._states())

    def waiting(self) -> bool:
        return not self.ready()

    def successful(self) -> bool:
        return all(state == SUCCESS for state in self._states())

    def failed(self) -> bool:
        """True if one has failed; unlike Celery's also if one was skipped, killed or withdrawn."""
        return any(state in PROPAGATE_STATES for state in self._states())

    def completed_count(self) -> int:
        return sum(state == SUCCESS for state in self._states())

    def join(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float = 0.5,
        callback: Any = None,
        no_ack: bool = True,
        on_message: Any = None,
        disable_sync_subtasks: bool = True,
        on_interval: Any = None,
    ) -> list[Any]:
        """The results in order; of a failed member its exception is raised, or with propagate=False in its place."""
        _refuse_unsubmitted([self.id, *(result.id for result in self.results)])
        if self._is_eager:
            found: list[Any] = super().join(timeout=timeout, propagate=propagate, callback=callback)
            return found
        if disable_sync_subtasks:
            assert_will_not_block()
        values: dict[str, Any] = {}
        ends_of_chains = {result.id for result in self.results if result.parent is not None}
        for task_id, meta in self.backend.iter_native(self, timeout, on_message=on_message, on_interval=on_interval):
            value = meta["result"]
            if (
                isinstance(value, TaskSkipped) and task_id in ends_of_chains
            ):  # as `Handle.get`: that of the step that failed
                value = self.backend.cause(task_id) or value
            if propagate and meta["status"] in PROPAGATE_STATES:
                raise value
            values[task_id] = value
        if callback:
            for result in self.results:
                callback(result.id, values[result.id])
            return []
        return [values[result.id] for result in self.results]

    join_native = join
    get = join

    def revoke(
        self,
        connection: Any = None,
        terminate: bool = False,
        signal: Any = None,
        wait: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Withdraw all that waits of the group, and what waits for it; with `terminate` also signal what runs."""
        if self.results and not self._is_eager:
            _revoke(self.app, [self.number], terminate, signal)

    def save(self, backend: Any = None) -> None:
        """Nothing: the table has it."""

    def delete(self, backend: Any = None) -> None:
        """Nothing: the rows stay until their retention ends."""

    @classmethod
    def restore(cls, id: str, backend: Any = None, app: Celery | None = None) -> "GroupHandle | None":
        """The group with this id, in any process; None if there is none."""
        app = app or (cls.app if isinstance(cls.app, Celery) else current_app._get_current_object())
        tree = backend_of(app).group_tree(str(id))
        return None if tree is None else _group_handle(app, tree)


def _refuse_unsubmitted(celery_ids: list[str]) -> None:
    graph = open_graph.get()
    if graph is not None and (inside := next((i for i in celery_ids if graph.has(i)), None)):
        raise BadInput(
            f"task {inside} cannot be waited for yet: its graph is submitted at the end of `with aque.graph()`. Wait after "
            "that, or give the handle to another task of the graph, as an argument."
        )


def _group_handle(app: Celery, tree: Tree) -> GroupHandle:
    group_id, members = tree
    backend = backend_of(app)
    results = [
        Handle(member, app=app, backend=backend) if isinstance(member, str) else _group_handle(app, member)
        for member in members
    ]
    return GroupHandle(group_id, results, app=app)


def _revoke(app: Celery, ids: list[int], terminate: bool, signal: Any) -> None:
    control.kill(farm_of(app).store, ids, control.parse_signal(signal or "TERM"), waiting_only=not terminate)


codec.register_handle(Handle, lambda handle: handle.number)
codec.register_handle(GroupHandle, lambda group: group.number)


@dataclass(frozen=True, slots=True)
class StandIn:
    """What takes the place of the farm, see `aque.execute`."""

    submitter: Submitter
    backend: Backend
    running: Mapping[str, TaskSpec]  #: the tasks that run just now, by their ids in Celery


#: Of the tasks that are submitted in this context; None: the farm.
stand_in: ContextVar[StandIn | None] = ContextVar("stand_in", default=None)

_submitters: WeakKeyDictionary[Celery, Submitter] = WeakKeyDictionary()


def submitter_of(app: Celery) -> Submitter:
    if (instead := stand_in.get()) is not None:
        return instead.submitter
    farm = farm_of(app)
    found = _submitters.get(app)
    if found is None or found.store is not farm.store:
        found = _submitters[app] = Submitter(farm.store, farm.settings)
    return found


def backend_of(app: Celery) -> Backend:
    if (instead := stand_in.get()) is not None:
        return instead.backend
    # Not in a dictionary by app: a backend refers to its app, which would never end.
    found: Backend | None = vars(app).get("aque_backend")
    if found is None:
        found = vars(app)["aque_backend"] = Backend(app=app)
    return found
