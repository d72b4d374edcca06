"""An app with a schedule, for `celery beat`: every second a task of the table and an ordinary one."""

import os

from celery import Celery

import aque
from tests.worker.tasks import append

app = aque.setup(Celery("beaten", backend="rpc://"))
app.conf.beat_schedule = {
    "table": {"task": "tests.worker.beaten.tick", "schedule": 1.0, "args": ("table",), "options": {"priority": 3}},
    "ordinary": {"task": "tests.worker.beaten.ordinary_tick", "schedule": 1.0, "args": ("ordinary",)},
}


@app.task(base=aque.Task)  # type: ignore[untyped-decorator]
def tick(line: str) -> None:
    append(os.environ["TEST_TICKS"], line)


@app.task  # type: ignore[untyped-decorator]
def ordinary_tick(line: str) -> None:
    append(os.environ["TEST_TICKS"], line)
