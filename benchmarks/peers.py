"""The peer: the same work on plain Celery, with Redis as its broker and for its results, at Celery's default settings.

The module is also the app that the peer's worker loads: `celery -A benchmarks.peers worker`.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Self

from celery import Celery, chain, chord, group

from tests.servers import Guarded, Redis, private_directory, wait_until

#: How the peer's worker learns the address of its Redis.
URL_VARIABLE = "BENCHMARK_REDIS_URL"

#: No result takes this long unless something is broken.
RESULT_SECONDS = 120


def peer_app(url: str) -> Celery:
    """A Celery app with the tasks of the benchmark, everything else as Celery comes."""
    # Not the current app, no shared tasks: the other side of the comparison has an app in the same process.
    app = Celery("peers", broker=url, backend=url, set_as_current=False)

    @app.task(name="noop", shared=False)
    def noop() -> None:
        pass

    @app.task(name="add_one", shared=False)
    def add_one(number: int) -> int:
        return number + 1

    @app.task(name="total", shared=False)
    def total(values: list[None]) -> int:
        return len(values)

    @app.task(name="run_true", shared=False)
    def run_true() -> tuple[int, str]:
        ended = subprocess.run(["/bin/true"], capture_output=True, check=False)
        return ended.returncode, ended.stdout.decode()

    return app


app = peer_app(os.environ.get(URL_VARIABLE, ""))


class CeleryRedis:
    """A private Redis and `celery worker -c 2` on it (prefork, default prefetch, no events); the client is this process."""

    name = "Celery+Redis"

    def __init__(self) -> None:
        self.redis = Redis()
        self.app: Any = None
        self.worker: Guarded | None = None
        self.directory = Path()

    def __enter__(self) -> Self:
        self.redis.__enter__()
        self.directory = private_directory("peer", None)
        try:
            self.app = peer_app(self.redis.url)
            self.worker = Guarded(
                [sys.executable, "-m", "celery", "-A", "benchmarks.peers", "worker", "-c", "2", "--loglevel", "error"],
                directory=self.directory,
                cwd=Path(__file__).resolve().parent.parent,
                env={**os.environ, URL_VARIABLE: self.redis.url},
            )
            wait_until(self.worker_answers, what=f"the peer's worker did not start; its log: {self.worker.log}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.app is not None:
                self.app.close()
            if self.worker is not None:
                self.worker.end(self.worker.ending, limit=20)
            shutil.rmtree(self.directory, ignore_errors=True)
        finally:
            self.redis.__exit__()

    def worker_answers(self) -> bool:
        return bool(self.app.control.ping(timeout=1))

    def versions(self) -> dict[str, str]:
        ended = subprocess.run([self.redis.binary or "", "--version"], capture_output=True, text=True, check=False)
        return {"redis-server": ended.stdout.partition("v=")[2].partition(" ")[0]}

    def noops(self, n: int) -> float:
        return self._submit_and_wait("noop", n)

    def commands(self, n: int) -> float:
        return self._submit_and_wait("run_true", n)

    def _submit_and_wait(self, name: str, n: int) -> float:
        task = self.app.tasks[name]
        began = perf_counter()
        results = [task.apply_async() for _ in range(n)]
        for result in results:
            result.get(timeout=RESULT_SECONDS)
        return perf_counter() - began

    def chain(self, n: int) -> float:
        add_one = self.app.tasks["add_one"]
        began = perf_counter()
        number = chain(add_one.s(0), *[add_one.s() for _ in range(n - 1)]).apply_async().get(timeout=RESULT_SECONDS)
        seconds = perf_counter() - began
        assert number == n, f"the chain of {n} ended with {number}"
        return seconds

    def fan_in(self, n: int) -> float:
        noop, total = self.app.tasks["noop"], self.app.tasks["total"]
        began = perf_counter()
        header = group((noop.s() for _ in range(n)), app=self.app)
        number = chord(header, total.s(), app=self.app).apply_async().get(timeout=RESULT_SECONDS)
        seconds = perf_counter() - began
        assert number == n, f"the fan-in of {n} counted {number}"
        return seconds

    def idle_latency(self, n: int) -> Sequence[float]:
        return [self._submit_and_wait("noop", 1) for _ in range(n)]
