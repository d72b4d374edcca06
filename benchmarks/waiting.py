"""`make bench BENCH=waiting`: what it costs to wait: 1,000 results that ten processes wait for, beside Celery with Redis.

Two phases: nothing ends, since no worker serves the queue; then a worker with one child runs the tasks, each of which sleeps
for 50 ms. Counted are the queries (commands, for Redis) of the clients, their CPU, and that of the server. See
docs/benchmarks.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from celery import Celery

from benchmarks.__main__ import forget_settings
from benchmarks.aque_side import cpu_seconds
from tests.servers import Guarded, MissingBinary, PostgreSQL, Redis, private_directory, wait_until

ROOT = Path(__file__).resolve().parent.parent
#: How the processes that are started learn what they belong to.
REDIS_VARIABLE = "BENCHMARK_WAITING_REDIS"
NAP_SECONDS = 0.05


def app_here() -> Celery:
    """The app of the side that this process belongs to, with its one task."""
    url = os.environ.get(REDIS_VARIABLE)
    if url:
        app = Celery("waiting", broker=url, backend=url)
        app.task(name="nap")(nap)
        return app
    import aque

    app = aque.App("waiting")
    app.task(name="nap")(nap)
    return app


def nap() -> None:
    time.sleep(NAP_SECONDS)


if "celery" in Path(sys.argv[0]).parts or REDIS_VARIABLE in os.environ:
    app = app_here()


@dataclass(frozen=True, slots=True)
class Cost:
    """Of all clients together, and of the server, for a second of waiting."""

    queries: float
    client_cpu_percent: float  #: of one core
    server_cpu_percent: float
    ended: float  #: tasks that the clients heard of

    def line(self, side: str, phase: str) -> str:
        return (
            f"{phase:22} {side:18} {self.queries:8.1f} queries/s   clients {self.client_cpu_percent:6.2f} %   "
            f"server {self.server_cpu_percent:6.2f} %   {self.ended:5.1f} results/s"
        )


# -- a client -----------------------------------------------------------------------------------------------------------------


def client(ids: Sequence[str]) -> None:
    """Wait for these results; on SIGUSR1 say how many queries that has cost so far, and how many results have come."""
    import signal

    from celery.result import ResultSet

    counted = {"queries": 0, "ended": 0}
    if REDIS_VARIABLE not in os.environ:
        import sqlalchemy as sa

        @sa.event.listens_for(sa.Engine, "before_cursor_execute")
        def count(*_: Any) -> None:
            counted["queries"] += 1

    def say(*_: Any) -> None:
        os.write(1, (json.dumps(counted) + "\n").encode())

    def one_more(*_: Any) -> None:
        counted["ended"] += 1

    signal.signal(signal.SIGUSR1, say)
    waiting = app_here()
    results = ResultSet([waiting.AsyncResult(task_id) for task_id in ids], app=waiting)
    say()
    for _ in results.iter_native():
        one_more()


class Client:
    """One of the processes that wait."""

    def __init__(self, ids: Sequence[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.waiting", "--wait-for", *ids],
            env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._line()

    def _line(self) -> dict[str, int]:
        assert self.process.stdout is not None
        found: dict[str, int] = json.loads(self.process.stdout.readline())
        return found

    def counted(self) -> dict[str, int]:
        self.process.send_signal(10)  # SIGUSR1
        return self._line()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


# -- the sides ----------------------------------------------------------------------------------------------------------------


class Side:
    """A store or broker of its own; `environment` makes processes belong to it."""

    name = ""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self.environment = dict(os.environ)
        self.directory = directory

    def server(self) -> list[psutil.Process]:
        """The processes of the server."""
        return []

    def commands(self) -> int | None:
        """How many commands the server has had, where that is counted there."""
        return None


class OnPostgreSQL(Side):
    name = "Aque, PostgreSQL"

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        super().__init__(stack, directory)
        self._server = stack.enter_context(PostgreSQL())
        self.environment |= aque_environment(stack.enter_context(self._server.database()), directory)

    def server(self) -> list[psutil.Process]:
        pid = int((self._server.directory / "data" / "postmaster.pid").read_text().split()[0])
        postmaster = psutil.Process(pid)
        return [postmaster, *postmaster.children(recursive=True)]


class OnSQLite(Side):
    name = "Aque, SQLite"

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        super().__init__(stack, directory)
        self.environment |= aque_environment(f"sqlite:///{directory}/aque.db", directory)


class OnRedis(Side):
    name = "Celery+Redis"

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        super().__init__(stack, directory)
        self._server = stack.enter_context(Redis())
        self.environment |= {REDIS_VARIABLE: self._server.url}
        import redis

        self._connection = redis.Redis.from_url(self._server.url)

    def server(self) -> list[psutil.Process]:
        return [psutil.Process(int(self._connection.info("server")["process_id"]))]

    def commands(self) -> int:
        return int(self._connection.info("stats")["total_commands_processed"])


def aque_environment(url: str, directory: Path) -> dict[str, str]:
    environment = {"AQUE_BROKER": url, "AQUE_STATE_DIR": str(directory), "AQUE_ALLOW_ROOT_TASKS": "1", "AQUE_CPUS": "1"}
    init = [str(Path(sys.executable).with_name("aque")), "init"]
    subprocess.run(init, env={**os.environ, **environment}, check=True, stdout=subprocess.DEVNULL)
    return environment


SUBMIT = """
import sys
from benchmarks.waiting import app_here
app = app_here()
for _ in range(int(sys.argv[1])):
    print(app.tasks["nap"].delay().id)
"""


def measured(side: Side, clients: Sequence[Client], seconds: float) -> Cost:
    """What the clients and the server do for so many seconds."""
    processes = [psutil.Process(each.process.pid) for each in clients]
    before = [each.counted() for each in clients], cpu_seconds(processes), cpu_of(side.server()), side.commands()
    began = time.perf_counter()
    time.sleep(seconds)
    took = time.perf_counter() - began
    after = [each.counted() for each in clients], cpu_seconds(processes), cpu_of(side.server()), side.commands()

    def rate(name: str) -> float:
        return (sum(each[name] for each in after[0]) - sum(each[name] for each in before[0])) / took

    on_server = None if after[3] is None or before[3] is None else (after[3] - before[3]) / took
    return Cost(
        rate("queries") if on_server is None else on_server,
        100 * (after[1] - before[1]) / took,
        100 * (after[2] - before[2]) / took,
        rate("ended"),
    )


def cpu_of(processes: Sequence[psutil.Process]) -> float:
    """Without what their children had used: those that live are among them, those that are gone are not of now."""
    used = 0.0
    for process in processes:
        times = process.cpu_times()
        used += times.user + times.system
    return used


@contextmanager
def waited_for(side: Side, results: int, clients: int) -> Iterator[list[Client]]:
    """So many results, shared out among so many clients that wait."""
    submitted = subprocess.run(
        [sys.executable, "-c", SUBMIT, str(results)],
        env=side.environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    ids = submitted.stdout.split()
    found: list[Client] = []
    try:
        found += [Client(ids[number::clients], side.environment) for number in range(clients)]
        yield found
    finally:
        for each in found:
            each.end()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each side and print a line for each of its phases."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.waiting", description=__doc__)
    parser.add_argument("--results", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--only", choices=["postgresql", "sqlite", "redis"], action="append")
    parser.add_argument("--seconds", type=float, default=15, help="of each phase (default: 15)")
    parser.add_argument("--wait-for", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.wait_for:
        client(options.wait_for)
        return 0
    forget_settings()
    print(f"{options.results} results, {options.clients} clients, load {os.getloadavg()[0]:.1f}", flush=True)
    kinds = {"postgresql": OnPostgreSQL, "sqlite": OnSQLite, "redis": OnRedis}
    for kind in [kind for name, kind in kinds.items() if name in (options.only or kinds)]:
        with ExitStack() as stack:
            directory = private_directory("waiting", None)
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            try:
                side = kind(stack, directory)
            except MissingBinary as missing:
                print(f"one side is left out: {missing}", file=sys.stderr)
                continue
            clients = stack.enter_context(waited_for(side, options.results, options.clients))
            time.sleep(3)  # they have begun
            print(measured(side, clients, options.seconds).line(side.name, "nothing ends"), flush=True)
            command = ["-m", "celery", "-A", "benchmarks.waiting", "worker", "-c", "1", "--loglevel", "error"]
            worker = Guarded([sys.executable, *command], directory=directory, cwd=ROOT, env=side.environment)
            stack.callback(lambda worker=worker: worker.end(worker.ending, limit=20))
            wait_until(
                lambda clients=clients: sum(each.counted()["ended"] for each in clients) > 0,
                what=f"no result: {worker.log}",
            )
            time.sleep(2)
            print(measured(side, clients, options.seconds).line(side.name, "20 tasks/s end"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
