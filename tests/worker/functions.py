"""Plain functions, and a class, that workers under test call by their names."""

from pathlib import Path
from typing import Any

import aque
from tests.worker.tasks import OwnError, add, append, wait_for


@aque.task
def length(items: list[Any]) -> int:
    return len(items)


@aque.task
def lines(path: str) -> int:
    """How many lines the file has."""
    return len(Path(path).read_text().splitlines())


def deepest(*depths: int) -> int:
    """Of what was combined, by how many steps at most."""
    return max(depths) + 1


def power(base: int, exponent: int = 2) -> int:
    return base**exponent


def start_and_wait(path: str, gate: str) -> str:
    """Write that it runs; return when the test says so."""
    append(path, "started")
    wait_for(gate)
    return "done"


def break_at(value: int, bad: int) -> int:
    if value == bad:
        raise OwnError(f"not {value}")
    return value


class Point:
    """What calling it returns is no JSON, but what its class method returns is."""

    def __init__(self, x: int) -> None:
        self.x = x

    @classmethod
    def moved(cls, x: int) -> int:
        return cls(x).x + 1

    def method(self) -> int:
        return self.x


@aque.task(cpus=2, priority=3)
def with_options(value: int) -> int:
    return value


@aque.task(bind=True)
def bound(self: Any, value: int) -> list[Any]:
    return [self.name, value]


unnamed = lambda: None  # noqa: E731


@aque.task
def factorial(n: int) -> int:
    """By a task for each factor, which waits for the next."""
    return n * int(factorial.delay(n - 1).get(disable_sync_subtasks=False)) if n > 1 else 1


@aque.task
def succeed_at(attempt: int) -> int:
    task = aque.current_task()
    assert task is not None
    if task.attempt < attempt:
        raise RuntimeError(f"attempt {task.attempt}")
    return task.attempt


def depth(levels: int) -> int:
    """By a task for each level, whose future the one above waits for."""
    return 1 + int(aque.Executor().submit(depth, levels - 1).result()) if levels else 0


@aque.task(bind=True)
def replaced(self: Any, value: int) -> Any:
    return self.replace(add.s(value, 1))


@aque.task
def write_error(request: Any, exc: BaseException, traceback: str, path: str) -> None:
    """An error callback."""
    append(path, f"{type(exc).__name__}: {exc}")


def third_time(path: str) -> int:
    """Records that it was called; 0, and from the third call on the number of calls."""
    append(path, "called")
    calls = lines(path)
    return calls if calls >= 3 else 0
