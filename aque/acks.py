"""Acknowledgements of ordinary Celery tasks: one thread sends them, so that no broker can hold up the pool.

Celery sends them from whichever thread has the news: in a worker without the event hub that is the one that reads the pool's
results, for tasks of the table too. A broker that hangs would stop it for as long.
"""

import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

logger = logging.getLogger(__name__)


class Acks:
    """Stands for the consumer's `call_soon_ack`. Bounded by what the broker hands out unacknowledged."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="aque-acks", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def soon(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """Call it soon, in order; at once after `stop`: then nothing is left that could be held up."""
        prepared = partial(call, *args, **kwargs)
        if self._stopped:
            self._call(prepared)
        else:
            self._queue.put(prepared)
        return prepared

    def stop(self, timeout: float) -> None:
        """Send what there is to send, for at most `timeout` seconds."""
        self._stopped = True
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            self._call(call)

    def _call(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # the connection is gone: the broker delivers the message again
            logger.warning("a message was not acknowledged: %s", error)
