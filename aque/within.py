"""What a Python task may do about its own attempt: ask for another one, leave its place to a graph, tell of its progress.

Aque's task class has these as methods; a plain Celery task that runs from the table gets them here (`adopt`), in place of
Celery's own, which would send a message.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from types import MethodType
from typing import Any, TypeVar

from celery import Task
from celery._state import get_current_task
from celery.exceptions import Ignore, Retry
from celery.utils.serialization import raise_with_context

from aque import codec, taskclient
from aque.errors import BadInput
from aque.farm import farm_of, settings_of
from aque.machine import user_name
from aque.moments import read_seconds
from aque.options import read_priority, read_text
from aque.values import Replacement

Item = TypeVar("Item")


class Replaced(Ignore):
    """Raised in a task: a graph takes its place, whose last task is `replacement`."""

    def __init__(self, replacement: Replacement) -> None:
        super().__init__(f"replaced by {replacement.name}")
        self.replacement = replacement


class TryAgain(Retry):
    """Raised in a task: it asks for another attempt after so many seconds, with `arguments`, a priority and a requirement
    class (None: the same)."""

    def __init__(
        self,
        exc: BaseException | None,
        when: Any,
        after_seconds: float,
        arguments: bytes | None,
        priority: int | None = None,
        class_id: int | None = None,
        sig: Any = None,
    ) -> None:
        super().__init__(exc=exc, when=when, sig=sig)
        self.after_seconds = after_seconds
        self.arguments = arguments
        self.priority = priority
        self.class_id = class_id


def is_from_table(task: Task) -> bool:
    """True in an attempt of this task that was claimed from the table, and not called, eager or sent in a message."""
    return getattr(task.request, "aque_id", None) is not None


def retry(
    task: Task,
    args: Any = None,
    kwargs: Any = None,
    exc: Exception | None = None,
    throw: bool = True,
    eta: datetime | None = None,
    countdown: float | None = None,
    max_retries: int | None = None,
    **options: Any,
) -> Any:
    """Celery's `self.retry`, as an outcome of the attempt: the row waits for its time and runs again, under its id.

    Of other options there are `queue` and `priority`, which the row has from then on. Raises BadInput for any other, and for a
    time that is further than `moments.FARTHEST_SECONDS`.
    """
    request = task.request
    if not is_from_table(task):
        return Task.retry(task, args, kwargs, exc, throw, eta, countdown, max_retries, **options)
    changed = {name: value for name, value in options.items() if value is not None}
    if without_effect := sorted(changed.keys() - {"queue", "priority"}):
        raise BadInput(
            f"self.retry cannot change {', '.join(without_effect)}: of a call's options it takes countdown, eta, queue and "
            "priority. The task is not tried again."
        )
    retries = request.retries + 1
    if max_retries is None:
        max_retries = task.max_retries
    else:
        task.override_max_retries = max_retries
    if max_retries is not None and retries > max_retries:
        if exc is not None:
            raise_with_context(exc)
        raise task.MaxRetriesExceededError(
            f"Can't retry {task.name}[{request.id}] args:{request.args} kwargs:{request.kwargs}",
            task_args=request.args,
            task_kwargs=request.kwargs,
        )
    if eta is None and countdown is None:
        countdown = task.default_retry_delay
    arguments = None
    if args is not None or kwargs is not None:
        new = task.signature_from_request(request, args, kwargs)
        arguments, _ = codec.encode_arguments(new.args, new.kwargs)
    after_seconds = read_seconds("the time to a retry", _seconds_until(eta) if eta else max(0.0, countdown or 0.0))
    again = TryAgain(exc, eta or countdown, after_seconds, arguments, *_changed(task, **changed))
    if throw:
        raise again
    request.aque_asks.append(again)
    return again


def _changed(task: Task, priority: Any = None, queue: Any = None) -> tuple[int | None, int | None]:
    """The priority, and the requirement class with this queue; None: as before."""
    if priority is not None:
        priority = read_priority(priority, settings_of(task.app), user_name())
    if queue is None:
        return priority, None
    queue = read_text("queue", getattr(queue, "name", queue))
    store = farm_of(task.app).store
    with store.connect() as connection:
        before = store.inherited(connection, task.request.aque_id)
        if before is None or before.requirement.queue == queue:
            return priority, None
        requirement = replace(before.requirement, queue=queue)
        return priority, store.requirement_ids(connection, [requirement])[requirement]


def _seconds_until(eta: datetime) -> float:
    moment = eta if eta.tzinfo else eta.replace(tzinfo=UTC)
    return max(0.0, moment.timestamp() - time.time())


def update_state(
    task: Task, task_id: str | None = None, state: str | None = None, meta: Any = None, **options: Any
) -> None:
    """Celery's `self.update_state`: who asks for the task sees `state` and `meta` while it runs. Of another task than this
    one nothing is recorded."""
    request = task.request
    if is_from_table(task) and task_id in (None, request.id):
        taskclient.tell(request.aque_worker, str(state or "PROGRESS"), codec.jsonable(meta))
    elif not is_from_table(task):
        Task.update_state(task, task_id, state, meta, **options)


#: What a plain Celery task gets in place of its own methods of the same names; `replacing` adds its own.
WAYS: list[Callable[..., Any]] = [retry, update_state]


def adopt(task: Task) -> None:
    """Give a plain Celery task these ways, for when it runs from the table."""
    if "aque_adopted" in vars(task):
        return
    task.aque_adopted = True
    for method in WAYS:
        setattr(task, method.__name__, MethodType(method, task))


def giving_way(looks: Iterable[Item]) -> Iterator[Item]:
    """The same items, of a generator that waits for other tasks between them: if this is a task, it holds no CPUs while it
    waits. See `taskclient.blocked`."""
    with ExitStack() as until_the_end:
        for number, look in enumerate(looks):
            yield look
            if number == 0:
                until_the_end.enter_context(taskclient.blocked(_address()))


def _address() -> str | None:
    """Of the worker of the task that this code runs in."""
    task = get_current_task()
    return getattr(getattr(task, "request", None), "aque_worker", None) or taskclient.own_address()
