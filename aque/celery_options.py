"""What a Celery call asks for, in the words of a row: its queue, times, priority, limits, headers and stamps."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from celery import Celery
from celery import Task as CeleryTask
from celery.app.routes import Router
from celery.exceptions import QueueNotFound
from celery.local import Proxy
from celery.utils.time import maybe_iso8601
from kombu.entity import Exchange, Queue

from aque import codec
from aque.errors import BadInput
from aque.task_options import DEPENDENCY_OPTIONS, TASK_OPTIONS, known_options, parse_rate

#: Celery's options of a task and of a call that a row has its own place for, under other names or none.
TRANSLATED = frozenset(
    {"countdown", "eta", "expires", "headers", "ignore_result", "priority", "shadow", "soft_time_limit", "time_limit"}
)
#: Where a message goes: `routed` reads them.
ROUTING = frozenset({"exchange", "exchange_type", "queue", "route_name", "router", "routing_key", "task_type"})
#: These have no effect; docs/celery.md says why. They are about a message, which a row is not, or about its place in a canvas:
#: a row's is in its edges, its parent and its own count of retries.
NO_EFFECT = frozenset(
    {
        "add_to_parent", "app_id", "argsrepr", "chain", "chord", "cluster_id", "compression", "confirm_timeout", "connection",
        "content_encoding", "content_type", "correlation_id", "declare", "delivery_mode", "errbacks", "event_dispatcher",
        "expiration", "group_id", "group_index", "immediate", "interval", "kwargsrepr", "link", "link_error", "mandatory",
        "max_retries", "message_id", "origin", "parent_id", "producer", "publisher", "replaced_task_nesting", "reply_to",
        "result_cls", "retries", "retry", "retry_policy", "root_id", "serializer", "stamped_headers", "strict", "task_id",
        "timeout", "timestamp", "type", "user_id",
    }
)  # fmt: skip


class _Known(Mapping[str, Queue]):
    """The queues of an app for its router, which would add one to them that it does not know: a worker in the same process
    would serve it from then on."""

    def __init__(self, app: Celery) -> None:
        self._queues = app.amqp.queues

    def __getitem__(self, name: str) -> Queue:
        if name in self._queues or name in self._queues.aliases:
            return self._queues[name]
        if not self._queues.create_missing:
            raise KeyError(name)
        return Queue(name, Exchange(name), routing_key=name)  # type: ignore[no-untyped-call]

    def __iter__(self) -> Any:
        return iter(self._queues)

    def __len__(self) -> int:
        return len(self._queues)


def routed(
    app: Celery, name: str, options: Mapping[str, Any], task: Any = None, args: Any = (), kwargs: Any = None
) -> dict[str, Any]:
    """Options of a call with what its route adds: by `queue`, or `exchange` and `routing_key`, the app's `task_routes` and its
    default queue, as Celery's router has them. `queue` is the name of one.

    None in its place: it is a broadcast, which every worker would get; one row cannot be that. Raises BadInput.
    """
    asked = {key: value for key, value in options.items() if value is not None}
    if not app.amqp.routes and ROUTING.isdisjoint(asked):  # the usual case: nothing for a router to decide
        return {**asked, "queue": _one_of(app.amqp.default_queue)}
    router = options.get("router") or Router(app.amqp.routes, _Known(app), app=app)
    try:
        route = dict(router.route(asked, options.get("route_name") or name, args, kwargs or {}, task))
    except QueueNotFound as error:
        raise BadInput(
            f"{error}. Nothing was submitted: add it there, or allow others (task_create_missing_queues)."
        ) from None
    queue: Any = route.get("queue")
    exchange, key = route.get("exchange"), route.get("routing_key")
    if isinstance(queue, str):
        queue = app.amqp.queues[queue]
    if exchange and key:  # as Celery's publisher: both of them, or the queue
        queue = _bound(app, str(getattr(exchange, "name", exchange)), str(key))
    return {**route, "queue": _one_of(queue)}


def _one_of(queue: Queue) -> str | None:
    """The name of a queue whose messages go to one worker each; None for a broadcast."""
    return None if queue.exchange is not None and queue.exchange.type == "fanout" else str(queue.name)


def _bound(app: Celery, exchange: str, routing_key: str) -> Queue:
    """The queue to which a broker would bring a message for this exchange and key."""
    found = [
        queue for queue in app.amqp.queues.values() if queue.exchange.name == exchange and _binds(queue, routing_key)
    ]
    if len(found) != 1:
        names = " and ".join(queue.name for queue in found) or "no queue of task_queues"
        raise BadInput(
            f"exchange {exchange!r} with routing key {routing_key!r} leads to {names}, and a task is in one queue. Nothing was "
            "submitted: name its queue."
        )
    return found[0]


def _binds(queue: Queue, routing_key: str) -> bool:
    if queue.exchange.type == "topic":
        words = (
            re.escape(queue.routing_key or "")
            .replace(r"\*", r"[^.]+")
            .replace(r"\.\#", r"(\..*)?")
            .replace(r"\#", ".*")
        )
        return re.fullmatch(words, routing_key) is not None
    return queue.exchange.type == "fanout" or queue.routing_key == routing_key


def is_broadcast(
    app: Celery, name: str, options: Mapping[str, Any], task: Any = None, args: Any = (), kwargs: Any = None
) -> bool:
    """True if a call goes to a queue that brings it to every worker."""
    if not any(queue.exchange is not None and queue.exchange.type == "fanout" for queue in app.amqp.queues.values()):
        return False
    return routed(app, name, {**celery_options(task), **options}, task, args, kwargs)["queue"] is None


def options_of(
    app: Celery,
    name: str,
    options: Mapping[str, Any],
    task: CeleryTask | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Keyword arguments of `options.Options` for a call with these of Celery's options, and of Aque's; see `routed` for when
    its `queue` is None.

    `task`: the registered task, whose own options count where the call has none; of a plain Celery task only those that its
    decorator was given (its class may have attributes of the same names that mean something else). Dependencies, the id and
    the place in a graph are the caller's business. Raises BadInput for options that neither has, and for what is wrong.
    """
    known = {*TRANSLATED, *ROUTING, *NO_EFFECT, *DEPENDENCY_OPTIONS, "hints"}
    stamps = {stamp: options.get(stamp) for stamp in options.get("stamped_headers") or ()}
    mine = {key: value for key, value in options.items() if key not in known and key not in stamps}
    given = {**own_options(task), **known_options({**(options.get("hints") or {}), **mine})}
    asked = routed(app, name, {**celery_options(task), **options}, task, args, kwargs)
    given["queue"] = asked["queue"]
    for key in ("priority", "time_limit", "soft_time_limit", "countdown"):
        if asked.get(key):  # 0 and None alike: none
            given[key] = asked[key]
        elif key in options:
            given.pop(key, None)
    if "countdown" in given:
        given["countdown"] = max(0.0, given["countdown"])
    elif asked.get("eta"):
        given["eta"] = read_time("eta", asked["eta"])
    if (expires := asked.get("expires")) is not None:
        given["expires"] = max(0.0, expires) if isinstance(expires, (int, float)) else read_time("expires", expires)
    if asked.get("shadow"):
        given["name"] = asked["shadow"]
    extra: dict[str, Any] = {}
    if asked.get("headers"):
        extra["headers"] = codec.plain("the headers", asked["headers"])
    if stamps:
        extra |= {"stamped_headers": sorted(stamps), "stamps": codec.plain("the stamps", stamps)}
    if asked.get("ignore_result"):
        extra["ignore_result"] = True
    if limit := getattr(task, "rate_limit", None):
        extra["rate_limit"] = parse_rate(limit)
    return {**given, "extra": extra} if extra else given


def own_options(task: Any) -> dict[str, Any]:
    """Aque's options that a task has of its own."""
    if task is None:
        return {}
    if isinstance(task, Proxy):
        task = task._get_current_object()
    if getattr(task, "goes_through_table", False):
        found = {option: getattr(task, option, None) for option in TASK_OPTIONS}
    else:
        decorated = vars(type(task)) if "_decorated" in vars(type(task)) else {}
        found = {option: decorated.get(option) for option in TASK_OPTIONS if option not in TRANSLATED}
    return known_options({option: value for option, value in found.items() if value is not None})


def celery_options(task: Any) -> dict[str, Any]:
    """Celery's options that a task has of its own: its attributes, with those of `task_annotations` and the settings that they
    come from."""
    if task is None:
        return {}
    found = dict(task._get_exec_options())
    found["ignore_result"] = task.ignore_result
    return {option: value for option, value in found.items() if value is not None}


def read_time(what: str, value: Any) -> datetime:
    """A time, as a datetime or in ISO 8601. Raises BadInput."""
    try:
        found = maybe_iso8601(value)
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, datetime):
        raise BadInput(
            f"{what} must be a time, as a datetime or in ISO 8601, not {value!r:.60}. Nothing was submitted."
        )
    return found
