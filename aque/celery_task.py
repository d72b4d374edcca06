"""A Celery task that goes through the table instead of a message: how a call of it becomes a row."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery import Task as CeleryTask

from aque import canvas, replacing, within
from aque.backend import Backend
from aque.handles import Handle, backend_of
from aque.task_options import DEPENDENCY_OPTIONS, TASK_OPTIONS


class Task(CeleryTask):
    """A Celery task that goes through the table instead of a message."""

    abstract = True
    #: See `calls.is_ours`.
    goes_through_table = True
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
        strict: bool = False,
        **options: Any,
    ) -> Handle:
        """Submit a call. Options are Celery's and Aque's: `depends_on`, `after_any`, `after_failed`: handles or ids, one or
        several; `link`, `link_error`: signatures; `strict`: refuse what no live worker could ever run.

        Raises NotSubmittable for what no worker could load, BadInput for an option that cannot work; then nothing was
        submitted.
        """
        app = self._get_app()
        if app.conf.task_always_eager:
            return self.apply(args, kwargs, task_id=task_id, **_eager_options(options))
        return canvas.submit_call(
            app, self.name, args, kwargs, {**options, "task_id": task_id}, task=self, strict=strict
        )

    retry = within.retry
    update_state = within.update_state
    replace = replacing.replace
    add_to_chord = replacing.add_to_chord

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


def _eager_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What Celery's `apply`, which calls a task in this process, takes of the options of a call."""
    ours = {*TASK_OPTIONS, *DEPENDENCY_OPTIONS, "hints"} - {"priority", "queue", "expires"}
    return {name: value for name, value in options.items() if name not in ours}
