"""Tasks that ask something of their own attempt: another one, children, the results of others."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from celery.exceptions import Ignore, Reject

import aque


@aque.task(bind=True, max_retries=5)
def fail_first(self: Any, times: int, countdown: float = 0) -> int:
    """Asks for another attempt so many times; how many there were before the last."""
    if self.request.retries < times:
        raise self.retry(countdown=countdown, exc=ValueError("not yet"))
    return int(self.request.retries)


@aque.task(bind=True)
def move(self: Any, **options: Any) -> int:
    """Asks once for another attempt with these options."""
    if self.request.retries == 0:
        raise self.retry(countdown=0, **options)
    return int(self.request.retries)


@aque.task(bind=True, max_retries=None)
def count_down(self: Any, left: int) -> str:
    """Another attempt with other arguments."""
    if left:
        self.retry((left - 1,), countdown=0)
    return f"{self.request.retries} {self.request.args}"


@aque.task(bind=True, max_retries=2)
def never(self: Any) -> None:
    raise self.retry(countdown=0, exc=KeyError("lost"))


@aque.task(autoretry_for=(OSError,), retry_backoff=False, retry_jitter=False, default_retry_delay=0, max_retries=3)
def flaky(path: str) -> int:
    """Fails twice; `path` counts."""
    with open(path, "a") as file:
        file.write(".")
    if (n := os.path.getsize(path)) < 3:
        raise OSError("a disk")
    return n


@aque.task(bind=True)
def go_on(self: Any) -> int:
    """Asks for another attempt and goes on."""
    if self.request.retries == 0:
        self.retry(countdown=0, throw=False)
    return int(self.request.retries)


@aque.task
def ignore() -> None:
    raise Ignore("nothing of it")


@aque.task
def reject(path: str, requeue: bool = False) -> int:
    with open(path, "a") as file:
        file.write(".")
    if not requeue or os.path.getsize(path) < 3:
        raise Reject("not this", requeue=requeue)
    return os.path.getsize(path)


@aque.task
def value(x: Any = 1) -> Any:
    return x


@aque.task
def held(gate: str, x: int = 1) -> int:
    while not Path(gate).exists():
        time.sleep(0.01)
    return x


@aque.task
def fail() -> None:
    raise ValueError("a child")


@aque.task(children="wait")
def parent(*calls: tuple[str, list[Any]], then: str = "") -> int:
    """Submits tasks of this module, as (name, arguments), and returns at once."""
    for name, args in calls:
        globals()[name].delay(*args)
    if then:
        raise RuntimeError(then)
    return len(calls)


@aque.task(children="detach")
def detaching(gate: str) -> int:
    held.delay(gate)
    return 1


@aque.task(children="cancel")
def cancelling(gate: str) -> None:
    held.delay(gate)
    held.delay(gate)


@aque.task
def recurse(depth: int, queue: str | None = None) -> int:
    """Waits for a task like itself, `depth` deep."""
    return 0 if depth == 0 else 1 + int(recurse.apply_async((depth - 1,), queue=queue or "celery").get(timeout=120))


@aque.task(bind=True)
def tell(self: Any, gate: str) -> None:
    self.update_state(state="HALFWAY", meta={"current": 1, "total": 2})
    while not Path(gate).exists():
        time.sleep(0.01)


@aque.task(ignore_result=True)
def ignored() -> int:
    return 7


@aque.task(rate_limit="10/s")
def rare() -> float:
    return time.time()


@aque.task
def inherits() -> list[Any]:
    """What a child of this task is given: [priority, queue, host, parent]."""
    child = value.delay()
    (row,) = aque.tasks({"id": child.number}, ["priority", "queue", "host", "parent_id"])
    return list(row.values())


@aque.task
def mark(number: int, path: str) -> int:
    """Says in a file that it has run."""
    with open(path, "a") as file:
        file.write(f"{number}\n")
    return number


@aque.task
def add_up(numbers: list[int], path: str) -> int:
    """The body of a chord; says in a file that it has run."""
    with open(path, "a") as file:
        file.write("body\n")
    return sum(numbers)


@aque.task
def gather(count: int) -> int:
    """Waits for so many children at once, each in a thread of its own."""
    children = [value.delay(n) for n in range(count)]
    with ThreadPoolExecutor(count) as together:
        return sum(together.map(lambda child: child.get(timeout=60), children))


@aque.task(bind=True)
def tell_nonsense(self: Any) -> int:
    self.update_state(state="odd \ud800 \0 state", meta={"what": "\ud800\0"})
    return 1


@aque.task(bind=True)
def replace_by_the_impossible(self: Any) -> None:
    self.replace(value.s(1).set(depends_on=[999_999_999]))


@aque.task(bind=True)
def replace_by_what_it_waited_for(self: Any, upstream: int) -> None:
    self.replace(value.s(5).set(depends_on=[upstream]))


@aque.task(bind=True)
def headers(self: Any) -> dict[str, Any]:
    return dict(self.request.headers or {})
