"""A Celery app of a few lines, as people have them, with Aque added."""

import os
import subprocess
import time
from typing import Any

from celery import Celery
from celery.signals import celeryd_init

import aque
from tests.worker.tasks import append, wait_for

app = aque.setup(Celery("ordinary", backend=os.environ.get("TEST_BACKEND", "rpc://"), include=["tests.worker.tasks"]))
if seconds := os.environ.get("TEST_VISIBILITY_SECONDS"):  # after so long Redis gives a message to another worker
    app.conf.broker_transport_options = {"visibility_timeout": float(seconds)}
app.conf.worker_pool_restarts = bool(os.environ.get("TEST_POOL_RESTARTS"))


@app.task  # type: ignore[untyped-decorator]
def multiply(left: int, right: int) -> int:
    return left * right


@app.task  # type: ignore[untyped-decorator]
def reserve_one(path: str, name: str, seconds: float) -> None:
    append(path, f"start {name} 1")
    time.sleep(seconds)
    append(path, f"end {name} 1")


@app.task  # type: ignore[untyped-decorator]
def current_task_id() -> int | None:
    task = aque.current_task()
    return None if task is None else task.id


@app.task  # type: ignore[untyped-decorator]
def wait(path: str, gate: str) -> None:
    append(path, "once")
    wait_for(gate)


@app.task(acks_late=True, ignore_result=True)  # type: ignore[untyped-decorator]
def note(path: str, line: str, seconds: float) -> None:
    """Its message is gone when it has run; it has no result, which would wait for the broker."""
    time.sleep(seconds)
    append(path, line)


@app.task(base=aque.Task)  # type: ignore[untyped-decorator]
def through_the_table(value: int) -> int:
    return value + 1


@app.task  # type: ignore[untyped-decorator]
def start_a_daemon(seconds: str) -> None:
    subprocess.Popen(["setsid", "sleep", seconds])


@celeryd_init.connect  # type: ignore[untyped-decorator]
def start_a_helper(**_: Any) -> None:
    """What the app needs beside its worker, if a test says so."""
    if seconds := os.environ.get("TEST_HELPER"):
        subprocess.Popen(["sleep", seconds])
