"""The Celery app of the workers under test; TEST_BROKER and TEST_LOOP ("hub" or "blocking") come from the test."""

import os
from typing import Any

from celery import Celery, signals

import aque.transport  # noqa: F401 (registers the scheme)

app = Celery("test", broker=os.environ.get("TEST_BROKER", "memory://"), backend="rpc://")
app.conf.update(
    worker_send_task_events=True, broker_connection_retry_on_startup=True, broker_connection_max_retries=None
)

if os.environ.get("TEST_LOOP") == "blocking":

    @signals.worker_init.connect  # type: ignore[untyped-decorator]
    def use_the_blocking_loop(sender: Any, **_: Any) -> None:
        sender.use_eventloop = False


@app.task  # type: ignore[untyped-decorator]
def add(left: int, right: int) -> int:
    return left + right
