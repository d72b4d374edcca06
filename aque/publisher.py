"""Celery events: a bounded queue and one thread that publishes, so that no broker can hold up a task."""

import logging
import threading
import time
from collections import deque
from typing import Any

from celery import Celery

logger = logging.getLogger(__name__)

#: Events that wait for the broker; the oldest are dropped, since a late event about a task misleads.
QUEUE_LIMIT = 20_000
#: Events of one message; Celery and Flower read lists of them.
BATCH = 100


class EventQueue:
    """Stands where Celery's requests expect an event dispatcher. `send` never blocks and never raises."""

    def __init__(self, app: Celery, hostname: str) -> None:
        self._app = app
        self._hostname = hostname
        self._queue: deque[tuple[str, dict[str, Any]]] = deque(maxlen=QUEUE_LIMIT)
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
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
                        while self._queue:
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
            dispatcher.send(kind, **fields)
        dispatcher.flush()
