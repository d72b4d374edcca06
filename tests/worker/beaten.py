"""An app with a schedule, for `celery beat`: every second a task of the table and one of tests/worker/ordinary.py."""

import os

from celery import Celery

import aque
from tests.worker import tasks

app = aque.setup(Celery("beaten"))
app.conf.beat_schedule = {
    "table": {
        "task": tasks.record.name,
        "schedule": 1.0,
        "args": (os.environ.get("TEST_TICKS", "") + ".table",),
        "options": {"priority": 3},
    },
    "ordinary": {
        "task": "tests.worker.ordinary.note",
        "schedule": 1.0,
        "args": (os.environ.get("TEST_TICKS", "") + ".ordinary", "tick", 0),
    },
}
