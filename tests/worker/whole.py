"""A Celery app all of whose tasks go through the table, with what projects have: names, routes, signals, models, classes."""

import os
from typing import Any

from celery import Celery, shared_task
from celery.signals import after_task_publish, before_task_publish, task_prerun
from kombu import Queue
from kombu.common import Broadcast
from pydantic import BaseModel

import aque
from tests.worker.tasks import append

app = Celery("whole", backend="redis://not.used/0")
everybody = Broadcast("everybody")
app.conf.update(
    task_queues=[Queue("celery"), Queue("special"), everybody],
    task_routes={
        "tests.worker.whole.routed": "special",
        # Celery does not declare the exchange, and on Redis the message would go nowhere: github.com/celery/celery/issues/2638
        "tests.worker.whole.told": {"queue": "everybody", "declare": [everybody.exchange]},
    },
    task_send_sent_event=True,
)
aque.setup(app, tasks="all")

#: What signals in this process have told.
heard: list[tuple[str, str]] = []


class Point(BaseModel):
    """A model."""

    x: int
    y: int


@app.task  # type: ignore[untyped-decorator]
def add(left: int, right: int) -> int:
    return left + right


@app.task(name="its.own.name")  # type: ignore[untyped-decorator]
def named(value: Any) -> Any:
    return value


@shared_task
def shared(value: int) -> int:
    return value + 1


@app.task(bind=True)  # type: ignore[untyped-decorator]
def routed(self: Any) -> Any:
    return self.request.delivery_info["routing_key"]


@app.task  # type: ignore[untyped-decorator]
def told(path: str) -> None:
    append(path, "told")


@app.task(pydantic=True)  # type: ignore[untyped-decorator]
def mirrored(point: Point) -> Point:
    return Point(x=-point.x, y=-point.y)


@app.task(bind=True)  # type: ignore[untyped-decorator]
def headers(self: Any) -> Any:
    return self.request.headers


@app.task  # type: ignore[untyped-decorator]
def calls_another(value: int) -> str:
    return str(add.delay(value, value).id)


class Class(app.Task):  # type: ignore[name-defined,misc]
    """A task as a class."""

    name = "a.class"

    def run(self, value: int) -> int:
        return value * 10


as_class = app.register_task(Class())


@before_task_publish.connect  # type: ignore[untyped-decorator]
def before(sender: str, headers: dict[str, Any], body: Any, **_: Any) -> None:
    if sender.startswith("tests.worker.whole."):
        headers["who"] = os.environ.get("TEST_WHO", "")
        heard.append(("before", sender))


@after_task_publish.connect  # type: ignore[untyped-decorator]
def after(sender: str, headers: dict[str, Any], **_: Any) -> None:
    heard.append(("after", headers["id"]))


@task_prerun.connect  # type: ignore[untyped-decorator]
def prerun(**_: Any) -> None:
    """One that listens in the worker must harm nothing."""
