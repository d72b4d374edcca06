"""Tasks for canvases, of both kinds: those that go through the table, and ordinary ones of the same app."""

import os
from typing import Any

from celery import Task, chain, chord, group, shared_task

import aque
from aque.celery_app import app as aque_app
from tests.worker.tasks import append


@aque.task
def add(left: int, right: int) -> int:
    return left + right


@aque.task
def total(numbers: list[int]) -> int:
    return sum(numbers)


@aque.task
def echo(*args: Any, **kwargs: Any) -> list[Any]:
    return [list(args), kwargs]


@aque.task
def same(value: Any) -> Any:
    return value


@aque.task
def plus(numbers: list[int], number: int) -> list[int]:
    return [*numbers, number]


@aque.task
def fail(text: str = "no") -> None:
    raise ValueError(text)


@aque.task
def fail_after(_: Any, text: str = "no") -> None:
    raise ValueError(text)


@aque.task
def note(path: str, line: str) -> None:
    append(path, line)


@aque.task
def note_value(value: Any, path: str) -> Any:
    note.run(path, repr(value))
    return value


@aque.task
def old_errback(task_id: str) -> str:
    return task_id


@aque.task
def new_errback(request: Any, exc: Exception, traceback: str | None) -> list[Any]:
    return [request.id, type(exc).__name__, str(exc), bool(traceback)]


@aque.task
def new_errback_to(request: Any, exc: Exception, traceback: str | None, path: str) -> None:
    note.run(path, f"{request.id} {type(exc).__name__} {exc}")


@aque.task(bind=True)
def replaced_by(self: Any, kind: str) -> Any:
    if kind == "task":
        raise self.replace(add.s(1, 2))
    if kind == "chain":
        raise self.replace(chain(add.s(1, 2), add.s(4), add.s(8)))
    if kind == "group":
        raise self.replace(group(add.s(i, i) for i in range(3)))
    if kind == "chord":
        raise self.replace(chord([add.s(1, 1), add.s(2, 2)], total.s()))
    if kind == "chain of group":
        raise self.replace(chain(add.s(1, 2), group(add.s(10), add.s(20))))
    if kind == "failing chain":
        raise self.replace(chain(fail.s("first"), add.s(1)))
    raise self.replace(fail.s("alone"))


@aque.task(bind=True)
def extends(self: Any, number: int) -> int:
    for more in range(number):
        self.add_to_chord(add.s(more, 100))
    return number


@aque.task(bind=True)
def stamps(self: Any) -> Any:
    return [self.request.stamped_headers, self.request.stamps, (self.request.headers or {}).get("trace")]


@aque.task
def submits(numbers: list[int]) -> str:
    """A canvas in a running task; the id of its last task."""
    return str(chord([add.s(n, n) for n in numbers])(total.s()).id)


@shared_task
def plain_add(left: int, right: int) -> int:
    return left + right


@shared_task(bind=True)
def plain_replaced(self: Any, number: int) -> Any:
    raise self.replace(chain(plain_add.s(number, 1), plain_add.s(1)))


def _unreachable_by_name() -> Any:
    @aque_app.task(name="canvas.nested_plain", base=Task)
    def nested(value: int) -> list[int]:
        return [value, os.getpid()]

    return nested


registered_only = _unreachable_by_name()


@aque.task
def submits_after(task_id: int) -> int:
    """A child that cannot run any more, and one with an error callback that is not needed."""
    same.apply_async((1,), depends_on=task_id)
    same.apply_async((2,), link_error=old_errback.s())
    return task_id
