"""A Celery app all of whose tasks go through the table: its `send_task`, and its results, in place of Celery's."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from celery import Celery
from celery import Task as CeleryTask
from celery.result import AsyncResult

from aque import canvas
from aque.calls import goes_through_table
from aque.celery_options import is_broadcast
from aque.farm import RESULT_SCHEME, settings_of
from aque.handles import GroupHandle, Handle

logger = logging.getLogger(__name__)

#: As Celery finds it.
BACKEND = "aque.backend:Backend"


def install(app: Celery) -> None:
    """Let calls of this app's tasks that `calls.goes_through_table` become rows, whatever they come through: `delay`,
    `apply_async`, signatures, beat and `app.send_task` all end in that method."""
    send_message = app.send_task

    def send_task(
        name: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        countdown: float | None = None,
        eta: Any = None,
        task_id: str | None = None,
        *others: Any,
        task_type: CeleryTask | None = None,
        **options: Any,
    ) -> AsyncResult:
        """Celery's `send_task`; the options of Aque's tasks are taken too."""
        task = app._tasks.get(name) if task_type is None else task_type
        asked = {**options, "countdown": countdown, "eta": eta, "task_id": task_id}
        is_row = not others and goes_through_table(app, name if task is None else task)
        if is_row and not is_broadcast(app, name, asked, task, args or (), kwargs):
            return canvas.submit_call(app, name, args, kwargs, asked, task=task)
        return send_message(name, args, kwargs, countdown, eta, task_id, *others, task_type=task_type, **options)

    app.send_task = send_task


def take_results(app: Celery) -> None:
    """Let `app.backend`, `app.AsyncResult`, `app.GroupResult` and the results of the app's tasks be the table's."""
    app.backend_cls = BACKEND
    app._backend_cache = app._local.backend = None  # what Celery may have made before
    app.AsyncResult = app.subclass_with_self(Handle, name="AsyncResult", reverse="AsyncResult")
    app.GroupResult = app.subclass_with_self(GroupHandle, name="GroupResult", reverse="GroupResult")


def configure_results(app: Celery) -> None:
    """Let `app.conf` name the results that are used; those that are not are named in the log."""
    configured = app.conf.result_backend
    used = RESULT_SCHEME + settings_of(app).to_url()
    if configured and configured != used:
        scheme = str(configured).partition(":")[0]  # the rest may hold a password
        logger.warning(
            "results are kept in Aque's table: the result backend %s of the configuration is not used.", scheme
        )
    app.conf.result_backend = used
