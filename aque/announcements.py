"""What Celery tells of a call where it is made: signals, which may add headers to it, and the event `task-sent`."""

import atexit
import os
from collections.abc import Mapping, Sequence
from typing import Any

from celery import Celery, signals
from celery.utils.nodenames import anon_nodename

from aque.publisher import EventQueue

#: So long the end of a process waits for the events that it has not sent yet.
EVENTS_SECONDS = 1.0


def is_heard() -> bool:
    """True if somebody listens for calls being made."""
    return any(signal.receivers for signal in (signals.before_task_publish, signals.after_task_publish))


def is_wanted(app: Celery) -> bool:
    """True if anything is to be told of calls of this app's tasks."""
    return is_heard() or _sends_events(app)


def _sends_events(app: Celery) -> bool:
    """As Celery's own publisher, which reads the setting once."""
    known: dict[str, Any] = vars(app.amqp)
    if "aque_sends_events" not in known:
        known["aque_sends_events"] = bool(app.conf.task_send_sent_event)
    return bool(known["aque_sends_events"])


class Announcement:
    """What is told of one call: `before` it is written, and `after` it was."""

    def __init__(
        self,
        app: Celery,
        uuid: str,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        given: Mapping[str, Any],
    ) -> None:
        """`given`: see `celery_options.options_of`."""
        self._app, self._name, self._queue = app, name, given["queue"]
        extra = given.get("extra", {})
        stamped = {"stamped_headers": extra["stamped_headers"], **extra["stamps"]} if "stamps" in extra else {}
        timed = {key: given.get(key) for key in ("countdown", "eta", "expires", "time_limit", "soft_time_limit")}
        self._message = app.amqp.as_task_v2(
            uuid, name, list(args), dict(kwargs), **timed, shadow=given.get("name"), create_sent_event=True, **stamped
        )
        self._custom: dict[str, Any] = dict(extra.get("headers", {}))
        self._headers: dict[str, Any] = {**self._message.headers, **self._custom}

    @property
    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Those of the call, as who was told has left them."""
        args, kwargs, _ = self._message.body
        return args, kwargs

    def before(self) -> dict[str, Any]:
        """Tell that the call is about to be made; the headers of the caller, and those that were added."""
        before = dict(self._headers)
        signals.before_task_publish.send(
            sender=self._name,
            body=self._message.body,
            exchange="",
            routing_key=self._queue,
            declare=[],
            headers=self._headers,
            properties=self._message.properties,
            retry_policy={},
        )
        missing = object()
        return self._custom | {key: v for key, v in self._headers.items() if before.get(key, missing) != v}

    def after(self) -> None:
        """Tell that the call was made."""
        told = {"exchange": "", "routing_key": self._queue}
        signals.after_task_publish.send(sender=self._name, body=self._message.body, headers=self._headers, **told)
        if _sends_events(self._app):
            _events_of(self._app).send("task-sent", **self._message.sent_event, queue=self._queue, **told)


class _SentEvents(EventQueue):
    """Sends what it is given: whoever set `task_send_sent_event` wants it."""

    enabled = True


def _events_of(app: Celery) -> _SentEvents:
    """A process's own, and of each broker that the app has had: threads do not outlive a fork."""
    known: dict[tuple[int, str], _SentEvents] = vars(app).setdefault("aque_sent_events", {})
    key = (os.getpid(), str(app.conf.broker_write_url))
    if key not in known:
        queue = known[key] = _SentEvents(app, anon_nodename(), lambda ids: {})
        queue.start()
        atexit.register(queue.stop, EVENTS_SECONDS)
    return known[key]
