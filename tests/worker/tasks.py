"""What the workers under test run. They import it from the directory that they are started in."""

import math
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded

import aque


class OwnError(Exception):
    """An exception of the project, as the submitter knows it too."""


class DemandingError(Exception):
    """One that cannot be made from its text."""

    def __init__(self, code: int, path: str) -> None:
        super().__init__(f"{path} failed with {code}")


class SilentError(Exception):
    """One whose text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def append(path: str, line: str) -> None:
    """Add a line with a single write, so that lines of many processes never mix."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


def wait_for(path: str, limit: float = 120) -> None:
    """Until there is such a file: the test decides when that is."""
    deadline = time.monotonic() + limit
    while not Path(path).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.01)


@aque.task
def add(left: int, right: int) -> int:
    return left + right


@aque.task
def echo(value: Any) -> Any:
    return value


@aque.task
def total(numbers: list[int]) -> int:
    return sum(numbers)


@aque.task
def fail(kind: str = "ValueError", text: str = "it went wrong") -> None:
    known = {"ValueError": ValueError, "KeyError": KeyError, "OwnError": OwnError, "SilentError": SilentError}
    if kind == "DemandingError":
        raise DemandingError(7, text)
    raise known[kind](text)


@aque.task
def exit_with(status: int) -> None:
    raise SystemExit(status)


@aque.task
def return_what_cannot_be_stored(kind: str, size: int = 0) -> Any:
    return {
        "object": object(),
        "nan": math.nan,
        "infinity": [1, math.inf],
        "set of objects": {object()},
        "function": len,
        "bytes key": {b"\xff": 1, (1, 2): 2},
        "deep": _nested(100_000),
        "large": "x" * size,
    }[kind]


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@aque.task
def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("AQUE_")}


@aque.task
def whoami() -> dict[str, Any]:
    task = aque.current_task()
    assert task is not None
    return {"id": task.id, "attempt": task.attempt, "cpus": task.cpus, "parent_id": task.parent_id}


@aque.task
def submit_one_more() -> int:
    return int(whoami.delay().id)


@aque.task
def started(path: str, gate: str = "") -> int:
    """Tell who runs this, then wait until the gate is open."""
    append(path, f"{os.environ['AQUE_ATTEMPT']} {os.getpid()}")
    if gate:
        wait_for(gate)
    return int(os.environ["AQUE_ATTEMPT"])


@aque.task
def deaf_to_term(path: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    append(path, str(os.getpid()))
    wait_for(path + ".never")


@aque.task
def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@aque.task
def reserve(path: str, cpus: str, seconds: float) -> None:
    """Write down when it runs and what it has reserved."""
    append(path, f"start {os.environ['AQUE_TASK_ID']} {cpus}")
    time.sleep(seconds)
    append(path, f"end {os.environ['AQUE_TASK_ID']} {cpus}")


@aque.task
def record(path: str) -> None:
    """Write its id, once for each time that it runs."""
    append(path, os.environ["AQUE_TASK_ID"])


@aque.task
def leave_behind(seconds: str) -> list[int]:
    """Start a process in a session of its own, and a daemon without parents and environment; return at once."""
    subprocess.Popen(["setsid", "sleep", seconds])
    subprocess.run(["sh", "-c", 'env -i setsid /bin/sleep "$0" & exit', seconds], check=True)
    return [os.getpid()]


@aque.task
def work_until_told(path: str, tidies: bool = True, deaf: bool = False) -> str:
    """Run into its soft time limit; say how that was."""
    append(path, f"{os.environ['AQUE_ATTEMPT']} {os.getpid()}")
    try:
        wait_for(path + ".never")
    except SoftTimeLimitExceeded:
        if not tidies:
            raise
        if deaf:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            wait_for(path + ".never")
    return "told"


@aque.task
def use(seconds: float, mib: int, written_mib: int, path: str = os.devnull) -> None:
    """Burn CPU time, hold memory for a moment, write to a disk."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
    held = bytearray(mib << 20)
    held[::4096] = b"x" * len(held[::4096])
    if written_mib:
        with open(path, "wb") as file:
            file.write(bytes(written_mib << 20))
            file.flush()
            os.fsync(file.fileno())


@aque.task
def affinity() -> list[int]:
    return sorted(os.sched_getaffinity(0))


@aque.task
def variable(name: str) -> str | None:
    return os.environ.get(name)


@aque.task
def gpu_then_wait(path: str, gate: str) -> str:
    """Which GPU it has, in a file before the gate opens, and then as its result."""
    Path(path + ".new").write_text(os.environ["AQUE_GPU_INDICES"])
    Path(path + ".new").rename(path)
    wait_for(gate)
    return os.environ["AQUE_GPU_INDICES"]


@aque.task
def hold(path: str, gate: str) -> str:
    """Leave a file that names this thread, then wait until the gate is open."""
    Path(path).write_text(threading.current_thread().name)
    wait_for(gate)
    return threading.current_thread().name


@aque.task
def meet(path: str, other: str) -> dict[str, Any]:
    """While another one of these runs: who this is, to itself, to its environment and to its child."""
    Path(path).touch()
    wait_for(other)
    task, child = aque.current_task(), whoami.delay()
    Path(path + ".asked").touch()
    wait_for(other + ".asked")
    assert task is not None
    return {"id": task.id, "child": child.number, "variable": os.environ.get("AQUE_TASK_ID")}


@aque.task
def pid() -> int:
    return os.getpid()


@aque.task
def interrupt() -> None:
    raise KeyboardInterrupt


@aque.task
def through_child(value: int) -> int:
    """What a child returns, for which this waits."""
    return int(add.delay(value, 1).get(timeout=60))


@aque.task(max_retries=2, default_retry_delay=0, bind=True)
def third_time(self: Any) -> int:
    """Ask for another attempt until this is the third."""
    if self.request.retries < 2:
        self.retry()
    return int(self.request.retries)
