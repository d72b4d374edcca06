"""The tasks that the shapes are made of, as a Celery project has them: plain Celery's, or with the one line that gives them
to Aque (SHAPES_ON=aque). Each run writes its task's name to the file SHAPES_RUNS, with one write."""

import os
from typing import Any

from celery import Celery

import aque
from tests.worker.tasks import append

RUNS = os.environ.get("SHAPES_RUNS", os.devnull)

app = Celery("shapes", broker=os.environ.get("SHAPES_BROKER"), backend=os.environ.get("SHAPES_BROKER"))
app.conf.result_extended = True
if os.environ.get("SHAPES_ON") == "aque":
    aque.setup(app, tasks="all")


@app.task  # type: ignore[untyped-decorator]
def add(left: int, right: int) -> int:
    append(RUNS, "add")
    return left + right


@app.task  # type: ignore[untyped-decorator]
def identity(value: Any) -> Any:
    append(RUNS, "identity")
    return value


@app.task  # type: ignore[untyped-decorator]
def double(value: int) -> int:
    append(RUNS, "double")
    return 2 * value


@app.task  # type: ignore[untyped-decorator]
def total(numbers: list[int]) -> int:
    append(RUNS, "total")
    return sum(numbers)


@app.task  # type: ignore[untyped-decorator]
def power(base: int, exponent: int) -> int:
    append(RUNS, "power")
    return int(base**exponent)


@app.task  # type: ignore[untyped-decorator]
def fail(*_: Any) -> None:
    append(RUNS, "fail")
    raise ValueError("on purpose")


@app.task(ignore_result=True)  # type: ignore[untyped-decorator]
def without_result(value: int) -> int:
    append(RUNS, "without_result")
    return value


@app.task(bind=True, default_retry_delay=0.1)  # type: ignore[untyped-decorator]
def second_time(self: Any, value: int) -> int:
    append(RUNS, "second_time")
    if self.request.retries == 0:
        raise self.retry()
    return value


@app.task(bind=True)  # type: ignore[untyped-decorator]
def stamps(self: Any) -> Any:
    append(RUNS, "stamps")
    return self.request.stamps


# -- callbacks: what they got is in the name that they write --------------------------------------------------------------


@app.task  # type: ignore[untyped-decorator]
def record(*values: Any) -> None:
    append(RUNS, f"record {list(values)}")


@app.task  # type: ignore[untyped-decorator]
def with_error(request: Any, error: Any, _traceback: Any) -> None:
    """Celery's newer kind of error callback."""
    append(RUNS, f"with_error {type(error).__name__}")


@app.task  # type: ignore[untyped-decorator]
def with_id(task_id: str) -> None:
    """Celery's older kind: it gets the id of what has failed, and asks for the rest."""
    append(RUNS, f"with_id {type(app.AsyncResult(task_id).result).__name__}")


# -- tasks that become something else -------------------------------------------------------------------------------------


@app.task(bind=True)  # type: ignore[untyped-decorator]
def replaced_by_task(self: Any, value: int) -> Any:
    append(RUNS, "replaced_by_task")
    return self.replace(double.s(value))


@app.task(bind=True)  # type: ignore[untyped-decorator]
def replaced_by_chain(self: Any, value: int) -> Any:
    append(RUNS, "replaced_by_chain")
    return self.replace(double.s(value) | double.s())


@app.task(bind=True)  # type: ignore[untyped-decorator]
def replaced_by_group(self: Any, values: list[int]) -> Any:
    from celery import group

    append(RUNS, "replaced_by_group")
    return self.replace(group(double.s(value) for value in values))


@app.task(bind=True)  # type: ignore[untyped-decorator]
def adds_to_chord(self: Any, value: int) -> int:
    append(RUNS, "adds_to_chord")
    self.add_to_chord(double.s(value))
    return value
