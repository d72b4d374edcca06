"""A Celery task that goes through the table instead of a message: how a call of it becomes a row."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from celery import Task as CeleryTask
from celery.local import Proxy
from celery.utils.time import rate

from aque import codec, within
from aque.backend import Backend
from aque.errors import BadInput, NotSubmittable
from aque.graphs import open_graph, submit_or_add
from aque.handles import TASK_OPTIONS, Handle, backend_of, edges_of, known_options, submitter_of
from aque.submitter import Options
from aque.values import Dependency


class Task(CeleryTask):
    """A Celery task that goes through the table instead of a message."""

    abstract = True
    Strategy = "aque.celery_task:refuse_message"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Celery makes a class of each decorated function, with the options as its attributes: a function among them would
        # become a method, and get the task in place of its first argument.
        if "_decorated" in vars(cls) and inspect.isfunction(vars(cls).get("io_paths")):
            cls.io_paths = staticmethod(vars(cls)["io_paths"])

    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        task_id: str | None = None,
        *,
        depends_on: Any = (),
        after_any: Any = (),
        after_failed: Any = (),
        hints: Mapping[str, Any] | None = None,
        strict: bool = False,
        **options: Any,
    ) -> Handle:
        """Submit a call. `depends_on`, `after_any`, `after_failed`: handles or ids, one or several. `strict`: refuse what no
        live worker could ever run.

        Raises NotSubmittable for what no worker could load, BadInput for an option that cannot work; then nothing was
        submitted.
        """
        for of_messages in ("producer", "headers"):  # which `celery beat` gives
            options.pop(of_messages, None)
        app = self._get_app()
        if app.conf.task_always_eager:
            return self.apply(args, kwargs, task_id=task_id)
        submitter = submitter_of(app)
        if self.typing:
            self.__header__(*(args or ()), **(kwargs or {}))  # the signature, checked as Celery does
        if task_id is not None and str(task_id).isdecimal():
            raise BadInput("a task_id of digits only would be taken for an id of the table: bring another, or none.")
        function = self._function
        arguments, inputs = codec.encode_arguments(args or (), kwargs or {})
        given = {name: getattr(self, name) for name in TASK_OPTIONS if getattr(self, name, None) is not None}
        given |= known_options({**(hints or {}), **options})
        if callable(given.get("io_paths")):
            given["io_paths"] = given["io_paths"](*(args or ()), **(kwargs or {}))
        edges = edges_of({"depends_on": depends_on, "after_any": after_any, "after_failed": after_failed})
        edges += [Dependency(i) for i in inputs if Dependency(i) not in edges]
        job = open_graph.get()
        place: dict[str, Any] = {} if job is None else job.place()
        extra = {"rate_limit": rate(self.rate_limit)} if self.rate_limit else {}
        chosen = Options(**given, dependencies=tuple(edges), celery_id=task_id, extra=extra, **place)
        new = job.new_id() if job is not None else submitter.next_id()
        spec = submitter.function(new, function, self.name, arguments, inputs, chosen)
        submit_or_add(submitter, job, spec, strict)
        handle = Handle(task_id or str(new), app=app, backend=backend_of(app), task_name=self.name)
        if task_id is None:
            handle.number = new
        return handle

    retry = within.retry
    update_state = within.update_state

    @cached_property
    def _function(self) -> str:
        return function_name(self)

    @property
    def backend(self) -> Backend:
        """Results of this task are in the table, whatever the app's backend for other tasks is."""
        return backend_of(self._get_app())

    def AsyncResult(self, task_id: str, **kwargs: Any) -> Handle:
        """The task with this id."""
        app = self._get_app()
        return Handle(str(task_id), app=app, backend=backend_of(app), task_name=self.name, **kwargs)


def refuse_message(task: Any, app: Any, consumer: Any, **_: Any) -> Callable[..., None]:
    """Celery's strategy for Aque tasks that come as a message: nobody who owns a row sent it."""

    def strategy(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **_: Any) -> None:
        consumer.on_unknown_task(body, message, f"{task.name} runs from the table only")

    return strategy


def function_name(called: CeleryTask) -> str:
    """ "module:qualname" by which a worker finds the task. Raises NotSubmittable with the fix."""
    function = getattr(called.run, "__wrapped__", called.run)
    module_name, qualname = function.__module__, function.__qualname__
    if "<" in qualname:
        kind = "a lambda" if "<lambda>" in qualname else "defined inside another function"
        raise NotSubmittable(
            f"{qualname} is {kind}: a worker could not find it by name. Nothing was submitted: define it at the top of a "
            "module."
        )
    if module_name == "__main__":
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        if spec is None:
            raise NotSubmittable(
                f"{qualname} is defined in the script that runs: a worker could not import it. Nothing was submitted: move it "
                "into a module, or start the script with `python -m`."
            )
        module_name = spec.name
    try:
        found: Any = importlib.import_module(module_name)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise NotSubmittable(
            f"{module_name}:{qualname} cannot be found by name: {error}. Nothing was submitted."
        ) from error
    if isinstance(found, Proxy):
        found = found._get_current_object()
    is_this_task = isinstance(found, CeleryTask) and found.name == called.name
    if not is_this_task and found is not called.run:
        raise NotSubmittable(
            f"{module_name}:{qualname} is not the task {called.name}: a worker would run something else. Nothing was "
            "submitted: "
            "define the task with its decorator, under its own name, at the top of a module."
        )
    return f"{module_name}:{qualname}"
