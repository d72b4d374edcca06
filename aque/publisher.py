"""Celery events: a bounded queue and one thread that publishes, so that no broker can hold up a task."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from celery import Celery
from celery.events.event import group_from

from aque.errors import StoreError

logger = logging.getLogger(__name__)

#: Events that wait for the broker; the oldest are dropped, since a late event about a task misleads.
QUEUE_LIMIT = 20_000
#: Events of one message; Celery and Flower read lists of them.
BATCH = 100
HEARTBEAT, OFFLINE = "worker-heartbeat", "worker-offline"

#: The fields (uuid, name, ...) of these tasks that every event has, by id; those that there are not are left out.
Describe = Callable[[Sequence[int]], Mapping[int, Mapping[str, Any]]]


class AlwaysEnabled:
    """The queue as Celery's own requests want it: their strategies ask once whether there are events, and never again."""

    enabled = True

    def __init__(self, queue: "EventQueue") -> None:
        self.send = queue.send


class EventQueue:
    """Stands where Celery's requests expect an event dispatcher. `send` never blocks and never raises."""

    def __init__(self, app: Celery, hostname: str, describe: Describe) -> None:
        self._app = app
        self._describe = describe
        self._hostname = hostname
        self._queue: deque[tuple[str, dict[str, Any]]] = deque(maxlen=QUEUE_LIMIT)
        self._heartbeat: dict[str, Any] | None = None
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        #: The worker stops.
        self.is_leaving = False
        #: The consumer's own, while there is one: it knows whether somebody wants task events (`enable_events`).
        self.dispatcher: Any = None

    @property
    def enabled(self) -> bool:
        """True if somebody wants task events. Without `-E` Celery's dispatcher sends the worker's own only."""
        dispatcher = self.dispatcher
        if dispatcher is None:
            return bool(self._app.conf.worker_send_task_events)
        return bool(dispatcher.enabled and (not dispatcher.groups or "task" in dispatcher.groups))

    def start(self) -> None:
        """Start the thread that publishes."""
        self._thread = threading.Thread(target=self._run, name="aque-events", daemon=True)
        self._thread.start()

    def send(self, kind: str, **fields: Any) -> None:
        """Queue an event such as "task-started"; dropped unless somebody has enabled events."""
        if self.enabled:
            self._queue.append((kind, {"timestamp": time.time(), **fields}))
            self._wake.set()

    def send_of_worker(self, kind: str, retry: bool = False, **fields: Any) -> None:
        """Stands for the `send` of the consumer's dispatcher: Celery's heartbeats hold its lock while they try to reach the
        broker, without end, and a worker that stops or connects again waits for that lock. `retry` is Celery's.

        Of heartbeats only the latest waits, and that a worker went offline is told of one that stops: how it was while the
        broker was away is of no use to anybody.
        """
        dispatcher = self.dispatcher
        if dispatcher is None or not dispatcher.enabled or (kind == OFFLINE and not self.is_leaving):
            return
        if dispatcher.groups and group_from(kind) not in dispatcher.groups:
            return
        event = {"timestamp": time.time(), **fields}
        self._heartbeat = event if kind == HEARTBEAT else None
        if kind != HEARTBEAT:
            self._queue.append((kind, event))
        self._wake.set()

    def send_about(self, kind: str, ids: Iterable[int], **fields: Any) -> None:
        """Queue an event for each of these tasks. What else is told of them is looked up by the thread that publishes."""
        if self.enabled and (listed := list(ids)):
            for start in range(0, len(listed), BATCH):
                some = listed[start : start + BATCH]
                self._queue.append((kind, {"ids": some, "timestamp": time.time(), **fields}))
            self._wake.set()

    def stop(self, timeout: float) -> None:
        """Publish what is queued, for at most `timeout` seconds."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        pause = 0.1
        while not (self._closing and not self._queue):
            try:
                with self._app.connection_for_write() as connection:
                    dispatcher = self._app.events.Dispatcher(
                        connection,
                        hostname=self._hostname,
                        buffer_while_offline=False,
                        buffer_group={"task"},
                        buffer_limit=BATCH,
                    )
                    while True:
                        self._wake.wait()
                        self._wake.clear()
                        while self._queue or self._heartbeat:
                            connection.connect()  # if that fails, nothing has been taken from the queue yet
                            self._publish(dispatcher)
                            pause = 0.1
                        if self._closing:
                            return
            except Exception as error:
                if self._closing:
                    return
                logger.warning("events are not published, the broker is away: %s", error)
                time.sleep(pause)
                pause = min(pause * 2, 10.0)
                self._wake.set()

    def _publish(self, dispatcher: Any) -> None:
        for _ in range(min(len(self._queue), BATCH)):
            kind, fields = self._queue.popleft()
            if (ids := fields.pop("ids", None)) is None:
                dispatcher.send(kind, **fields)
            else:
                for about in self._look_up(ids):
                    dispatcher.send(kind, **about, **fields)
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is not None:
            dispatcher.send(HEARTBEAT, **heartbeat)
        dispatcher.flush()

    def _look_up(self, ids: Sequence[int]) -> Iterable[Mapping[str, Any]]:
        try:
            return self._describe(ids).values()
        except StoreError as error:
            logger.warning("%d events are not published, the store is away: %s", len(ids), error)
            return []
