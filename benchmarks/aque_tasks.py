"""The functions of Aque's side of the benchmarks, and the app that its worker loads: `celery -A benchmarks.aque_tasks worker`.

They do what the tasks in `benchmarks/peers.py` and `benchmarks/packing_peers.py` do. A captured command is no function here:
Aque runs commands itself.
"""

import time
from typing import Any

import aque


def noop() -> None:
    pass


def add_one(number: int) -> int:
    return number + 1


def total(values: list[None]) -> int:
    return len(values)


def nap(seconds: float) -> tuple[float, float]:
    """Sleep; when it began and ended, by the monotonic clock of the machine."""
    began = time.monotonic()
    time.sleep(seconds)
    return began, time.monotonic()


def aque_app(**settings: Any) -> aque.App:
    """An app with these tasks; `settings` are Aque's, as Celery's configuration names them (`aque_broker=...`)."""
    # One process submits to two farms: each needs an app of its own, which no task of the other side finds by itself.
    app = aque.App("benchmarks", set_as_current=False)
    app.conf.update(settings)
    for function in (noop, add_one, total, nap):
        app.task(shared=False)(function)
    return app


app = aque_app()  # the worker's: its farm comes from its environment
