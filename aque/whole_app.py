"""A Celery app all of whose tasks go through the table: its `send_task`, and its results, in place of Celery's."""

import atexit
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery import Celery, signals
from celery import Task as CeleryTask
from celery.result import AsyncResult
from celery.utils.nodenames import anon_nodename

from aque import canvas, codec
from aque.calls import function_of
from aque.celery_options import options_of
from aque.errors import BadInput
from aque.graphs import open_graph, submit_or_add
from aque.handles import Handle, edges_of, goes_through_table, submitter_of
from aque.publisher import EventQueue
from aque.submitter import Options
from aque.values import Children, Dependency

logger = logging.getLogger(__name__)

#: As Celery's `result_backend` names it.
BACKEND = "aque.backend:Backend"
#: So long the end of a process waits for the events that it has not sent yet.
EVENTS_SECONDS = 1.0


def install(app: Celery) -> None:
    """Let calls of this app's tasks that `handles.goes_through_table` become rows, whatever they come through: `delay`,
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
        if not others and goes_through_table(app, name if task is None else task):
            asked = {**options, "countdown": countdown, "eta": eta, "task_type": task}
            if options.get("link") or options.get("link_error"):
                return canvas.submit_call(app, name, args, kwargs, {**asked, "task_id": task_id}, task=task)
            if sent := _submit(app, name, args or (), kwargs or {}, task, task_id, asked):
                return sent
        timed = {"countdown": countdown, "eta": eta, "task_id": task_id}
        return send_message(name, args, kwargs, *timed.values(), *others, task_type=task_type, **options)

    app.send_task = send_task


def take_results(app: Celery) -> None:
    """Let `app.backend`, `app.AsyncResult`, `app.GroupResult` and the results of the app's tasks be the table's."""
    app.backend_cls = BACKEND
    app._backend_cache = app._local.backend = None  # what Celery may have made before
    app.AsyncResult = app.subclass_with_self(Handle, name="AsyncResult", reverse="AsyncResult")


def configure_results(app: Celery) -> None:
    """Let `app.conf` name the results that are used; those that are not are named in the log."""
    configured = app.conf.result_backend
    if configured and configured != BACKEND:
        scheme = str(configured).partition(":")[0]  # the rest may hold a password
        logger.warning(
            "results are kept in Aque's table: the result backend %s of the configuration is not used.", scheme
        )
    app.conf.result_backend = BACKEND


def _submit(
    app: Celery,
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    task: CeleryTask | None,
    task_id: str | None,
    options: dict[str, Any],
) -> AsyncResult | None:
    """The call as a row, in the graph that is open, if one is; None, and nothing done, for a broadcast."""
    if task_id is not None and str(task_id).isdecimal():
        raise BadInput("a task_id of digits only would be taken for an id of the table: bring another, or none.")
    given = options_of(app, name, options, task, args, kwargs)
    if given["queue"] is None:
        return None
    submitter, job = submitter_of(app), open_graph.get()
    new = job.new_id() if job is not None else submitter.next_id()
    uuid = task_id or str(new)
    announced = _Announcement(app, uuid, name, args, kwargs, given, options)
    announced.before()
    arguments, inputs = codec.encode_arguments(*announced.body[:2])
    edges = edges_of(
        {condition: options.get(condition, ()) for condition in ("depends_on", "after_any", "after_failed")}
    )
    edges += [Dependency(i) for i in inputs if Dependency(i) not in edges]
    if announced.headers:
        given["extra"] = {**given.get("extra", {}), "headers": announced.headers}
    # As Celery's: a task ends when its function does, whatever it has called.
    given = {"children": Children.DETACH, **given, **({} if job is None else job.place())}
    chosen = Options(**given, dependencies=tuple(edges), celery_id=task_id)
    spec = submitter.function(new, function_of(task, name), name, arguments, inputs, chosen)
    submit_or_add(submitter, job, spec, bool(options.get("strict")))
    announced.after()
    result_class: Callable[..., AsyncResult] = options.get("result_cls") or app.AsyncResult
    result = result_class(uuid)
    if isinstance(result, Handle):
        result.number = new
    result.ignored = bool(given.get("extra", {}).get("ignore_result"))
    return result


class _Announcement:
    """What Celery tells of a call where it is made: signals, which may add headers, and the event `task-sent`."""

    def __init__(
        self,
        app: Celery,
        uuid: str,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        given: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        self._app, self._name, self._queue = app, name, given["queue"]
        self._sends_event = bool(app.conf.task_send_sent_event)
        heard = (signals.before_task_publish, signals.after_task_publish, signals.task_sent)
        self._is_heard = any(signal.receivers for signal in heard)
        self.body: tuple[Any, ...] = (args, kwargs)
        self._all_headers: dict[str, Any] = {}
        #: of the caller and of who heard the signal
        self.headers: dict[str, Any] = dict(options.get("headers") or {})
        if self._is_heard or self._sends_event:
            extra = given.get("extra", {})
            stamped = {"stamped_headers": extra["stamped_headers"], **extra["stamps"]} if "stamps" in extra else {}
            timed = {key: given.get(key) for key in ("countdown", "eta", "expires", "time_limit", "soft_time_limit")}
            self._message = app.amqp.as_task_v2(
                uuid, name, args, kwargs, **timed, shadow=options.get("shadow"), create_sent_event=True, **stamped
            )
            self.body = self._message.body
            self._all_headers = {**self._message.headers, **self.headers}

    def before(self) -> None:
        if not self._is_heard:
            return
        before = dict(self._all_headers)
        signals.before_task_publish.send(
            sender=self._name,
            body=self.body,
            exchange="",
            routing_key=self._queue,
            declare=[],
            headers=self._all_headers,
            properties=self._message.properties,
            retry_policy={},
        )
        missing = object()
        added = {key: value for key, value in self._all_headers.items() if before.get(key, missing) != value}
        self.headers |= added

    def after(self) -> None:
        if self._is_heard:
            signals.after_task_publish.send(
                sender=self._name, body=self.body, headers=self._all_headers, exchange="", routing_key=self._queue
            )
        if self._sends_event:
            _events_of(self._app).send(
                "task-sent", **self._message.sent_event, queue=self._queue, exchange="", routing_key=self._queue
            )


class _SentEvents(EventQueue):
    """Sends what it is given: whoever set `task_send_sent_event` wants it."""

    enabled = True


_sent_events: dict[tuple[int, int], _SentEvents] = {}


def _events_of(app: Celery) -> _SentEvents:
    """A process's own: threads do not outlive a fork."""
    key = (os.getpid(), id(app))
    if key not in _sent_events:
        queue = _sent_events[key] = _SentEvents(app, anon_nodename())
        queue.start()
        atexit.register(queue.stop, EVENTS_SECONDS)
    return _sent_events[key]
