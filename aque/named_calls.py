"""A call of a function by its name, as a task: what is called, with which options, and what it waits for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from celery import Celery
from celery import Task as CeleryTask
from celery.local import Proxy

from aque import codec, own_tasks
from aque.calls import function_of, spec_of_call
from aque.celery_options import own_options
from aque.errors import NotSubmittable
from aque.futures import Future
from aque.graphs import submit_or_add
from aque.handles import Handle, backend_of, open_graph, submitter_of
from aque.naming import name_of
from aque.options import Options
from aque.submitter import Submitter
from aque.task_options import DEPENDENCY_OPTIONS, edges_of, known_options
from aque.values import Dependency, TaskSpec


@dataclass(frozen=True, slots=True)
class NamedCall:
    """What is called, and with which options; the arguments come with each call."""

    function: str  #: "module:qualname", or "@name" of a task
    name: str
    options: Mapping[str, Any]
    task: CeleryTask | None = None
    args: tuple[Any, ...] = ()  #: of a partial: they come first
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, fn: Any, options: Mapping[str, Any]) -> "NamedCall":
        """Raises NotSubmittable."""
        args, kwargs = (), {}
        if isinstance(fn, partial):
            fn, args, kwargs = fn.func, fn.args, fn.keywords
        if isinstance(fn, Proxy):
            fn = fn._get_current_object()
        if isinstance(fn, str):
            module_name, _, qualname = fn.partition(":")
            if not module_name or not qualname:
                raise NotSubmittable(
                    f"{fn!r:.60} is not MODULE:FUNCTION: write for example os.path:getsize. Nothing was submitted."
                )
            return cls(fn, fn.replace(":", "."), options, None, args, kwargs)
        if isinstance(fn, CeleryTask):
            return cls(function_of(fn, fn.name), fn.name, options, fn, args, kwargs)
        function = name_of(fn)
        return cls(function, function.replace(":", "."), options, None, args, kwargs)

    def several(self, count: int) -> "NamedCall":
        """For lists of arguments: `count` of these calls as one task."""
        options = {**own_options(self.task), **self.options}
        if callable(paths_of := options.get("io_paths")):
            options["io_paths"] = lambda _, calls, args, kwargs: [
                path for own in calls for path in paths_of(*args, *own, **kwargs)
            ]
        several = partial(own_tasks.each, self.function, args=list(self.args), kwargs=dict(self.kwargs))
        return replace(NamedCall.of(several, options), name=f"{self.name} ({count} calls)")

    def spec(
        self, submitter: Submitter, task_id: int, args: Sequence[Any], kwargs: Mapping[str, Any], **place: Any
    ) -> TaskSpec:
        """A call as a task."""
        args, kwargs = (*self.args, *args), {**self.kwargs, **kwargs}
        if self.task is not None:
            waits_for = {name: _handles(self.options[name]) for name in DEPENDENCY_OPTIONS if name in self.options}
            options = {**self.options, **waits_for}
            return spec_of_call(
                self.task.app, submitter, task_id, self.name, self.task, args, kwargs, options, place=place
            )
        arguments, inputs = codec.encode_arguments(args, kwargs)
        chosen = options_with(self.options, inputs, args, kwargs, place)
        return submitter.function(task_id, self.function, self.name, arguments, inputs, chosen)

    def submit(self, app: Celery, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Handle:
        """Submit a call, or add it to the graph that is open."""
        submitter, job = submitter_of(app), open_graph.get()
        task_id = submitter.next_id() if job is None else job.new_id()
        place: dict[str, Any] = {} if job is None else job.place()
        submit_or_add(submitter, job, self.spec(submitter, task_id, args, kwargs, **place), strict=False)
        return Handle(str(task_id), app=app, backend=backend_of(app), task_name=self.name)


def options_with(
    given: Mapping[str, Any],
    inputs: Sequence[int],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    place: Mapping[str, Any],
) -> Options:
    """What a submitter takes of options as people write them, for a call with these arguments that needs the results `inputs`.
    Raises BadInput."""
    own = {name: value for name, value in given.items() if name not in DEPENDENCY_OPTIONS}
    if callable(own.get("io_paths")):
        own["io_paths"] = own["io_paths"](*args, **kwargs)
    edges = edges_of({name: _handles(given[name]) for name in DEPENDENCY_OPTIONS if name in given})
    edges += [Dependency(i) for i in inputs if Dependency(i) not in edges]
    return Options(**known_options(own), dependencies=tuple(edges), **place)


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of calls: those of `@aque.task`, and what they wait for. Raises BadInput."""
    known_options({name: value for name, value in options.items() if name not in DEPENDENCY_OPTIONS})
    return dict(options)


def _handles(tasks: Any) -> list[Any]:
    several = tasks if isinstance(tasks, (list, tuple, set, frozenset)) else [tasks]
    return [task.handle if isinstance(task, Future) else task for task in several]
