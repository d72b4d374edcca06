"""A worker's connection to Celery's broker, where Celery would wait for it too long: it looks up from waiting, asks from one
thread only, and takes leave in bounded time."""

import logging
import time
from functools import partial
from typing import Any

from celery.utils.threads import bound_open_broker_sockets
from celery.worker import state as celery_state

logger = logging.getLogger(__name__)

#: So long a stopping worker waits for a broker's answers, for all of one connection together.
CLOSE_SECONDS = 5.0


def look_up_from_waiting(connection: Any) -> None:
    """Celery's loop waits 2 s for messages before it looks whether it should stop, and once more when it has seen that: let
    it look ten times as often, and wait no more then."""
    drain_events = connection.drain_events

    def drain(timeout: float | None = None) -> Any:
        flags = celery_state.should_stop, celery_state.should_terminate  # when set, an exit status: it may be 0
        stops = any(flag is not None and flag is not False for flag in flags)
        return drain_events(timeout=None if timeout is None else min(timeout, 0.01 if stops else 0.2))

    connection.drain_events = drain


def restore_prefetch_from_the_loop(consumer: Any) -> None:
    """After a reconnection Celery raises the prefetch count again with each acknowledgement: a question to the broker, asked by
    the thread that reads the pool's results, while the loop reads from the same connection. Who reads the other's answer leaves
    it waiting for ever: the pool without results, the loop deaf to remote control and to signals. Let the loop ask."""
    restore = consumer._restore_prefetch_count_after_connection_restart
    consumer._restore_prefetch_count_after_connection_restart = partial(consumer.call_soon, restore)


def bound_closing(connection: Any) -> None:
    """A broker that hangs answers nothing, and Celery's warm shutdown would wait for that without end."""
    bound_open_broker_sockets(connection, CLOSE_SECONDS)
    client = getattr(connection, "_connection", None)  # not the property, which would connect
    if connection.transport.driver_type == "amqp" and client is not None:
        client.drain_events = _Patience(client.drain_events, CLOSE_SECONDS)


class _Patience:
    """RabbitMQ's client asks a dozen questions when it closes its channels. They have `seconds` together: who has not answered
    the first will not answer the others, and acknowledgements can be sent all the while."""

    def __init__(self, drain_events: Any, seconds: float) -> None:
        self._drain_events = drain_events
        self._left = seconds

    def __call__(self, timeout: float | None = None) -> Any:
        if timeout is not None:
            return self._drain_events(timeout=timeout)
        began = time.monotonic()
        try:
            return self._drain_events(timeout=self._left)
        finally:
            self._left = max(0.0, self._left - (time.monotonic() - began))


def survive_closing(connection: Any) -> None:
    """Celery closes a lost connection before it makes a new one, and kombu's Redis, which then wants to give back the messages
    that are not acknowledged, fails with an AttributeError that would end the worker with all that runs."""
    close = connection.close

    def close_or_leave() -> None:
        try:
            close()
        except Exception as error:
            logger.warning("a connection to the broker could not be closed in order: %s", error)

    connection.close = close_or_leave
