"""Aque's sides of the benchmarks: the same client and worker on a private PostgreSQL and on SQLite."""

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import psutil
from celery.result import ResultSet

import aque
from benchmarks import aque_tasks
from tests.servers import Guarded, PostgreSQL, private_directory, wait_until

#: No result takes this long unless something is broken.
RESULT_SECONDS = 120

#: A queue that the worker does not serve: what is submitted there costs nothing but its submission.
UNSERVED = "unserved"


@dataclass(frozen=True, slots=True)
class Idle:
    """What a worker costs that has nothing to do: it and every process below it."""

    #: Of one core, in percent.
    cpu_percent: float
    #: Shared pages count once over all the machine's processes (PSS).
    memory_mib: float
    processes: int


class AqueSide:
    """A private farm and a Celery worker with two CPUs on it (prefork, no events); the client is this process."""

    name = ""

    def __init__(self, children: int = 2) -> None:
        """`children` of the pool run functions; by default as many as the peer's worker has."""
        self.worker_options = ("-c", str(children), "--loglevel", "error")
        self.running = ExitStack()
        self.directory = Path()
        self.worker: Guarded | None = None
        self.app: Any = None

    def database(self) -> str:
        """The URL of a new, empty farm, which ends with `running`."""
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        raise NotImplementedError

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # closed again if anything below raises
            self.directory = private_directory("bench", None)
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self.running = stack
            url = self.database()
            environment = {
                **os.environ,
                "AQUE_BROKER": url,
                "AQUE_ALLOW_ROOT_TASKS": "1",
                "AQUE_STATE_DIR": str(self.directory),
                "AQUE_CPUS": "2",  # as many slots as the peer's worker has, also for commands
            }
            root = Path(__file__).resolve().parent.parent
            init = [str(Path(sys.executable).with_name("aque")), "init"]
            subprocess.run(init, env=environment, check=True, stdout=subprocess.DEVNULL)
            self.app = aque_tasks.aque_app(aque_broker=url, aque_state_dir=str(self.directory))
            stack.callback(self.app.close)
            self.worker = worker = Guarded(
                [sys.executable, "-m", "celery", "-A", "benchmarks.aque_tasks", "worker", *self.worker_options],
                directory=self.directory,
                cwd=root,
                env=environment,
            )
            stack.callback(lambda: worker.end(worker.ending, limit=20))
            first = self.task("noop").delay()
            wait_until(lambda: first.ready() or not worker.running(), what=f"no first result; log: {worker.log}")
            if not worker.running():
                raise RuntimeError(f"the worker of {self.name} did not start:\n{worker.log.read_text()[-2000:]}")
            self.running = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.running.close()

    def task(self, name: str) -> Any:
        return self.app.tasks[f"benchmarks.aque_tasks.{name}"]

    # -- beside the peer ----------------------------------------------------------------------------------------------

    def noops(self, n: int) -> float:
        return self._submit_and_wait(self.task("noop").delay, n, None)

    def commands(self, n: int) -> float:
        def submit() -> Any:
            return aque.shell(["/bin/true"], app=self.app)

        return self._submit_and_wait(submit, n, {"exit_code": 0, "stdout": "", "truncated": False})

    def _submit_and_wait(self, submit: Callable[[], Any], n: int, expected: Any) -> float:
        began = perf_counter()
        with aque.graph(app=self.app):
            handles = [submit() for _ in range(n)]
        results = ResultSet(handles, app=self.app).get(timeout=RESULT_SECONDS)
        seconds = perf_counter() - began
        assert results == [expected] * n, f"not {n} times {expected!r} but {results!r:.200}"
        return seconds

    def one_each(self, n: int) -> float:
        """As `noops`, but each task is a submission, that is a transaction, of its own."""
        noop = self.task("noop")
        began = perf_counter()
        handles = [noop.delay() for _ in range(n)]
        results = ResultSet(handles, app=self.app).get(timeout=RESULT_SECONDS)
        seconds = perf_counter() - began
        assert results == [None] * n, f"not {n} times None but {results!r:.200}"
        return seconds

    def chain(self, n: int) -> float:
        add_one = self.task("add_one")
        began = perf_counter()
        with aque.graph(app=self.app):
            last = add_one.delay(0)
            for _ in range(n - 1):
                last = add_one.delay(last)
        number = last.get(timeout=RESULT_SECONDS)
        seconds = perf_counter() - began
        assert number == n, f"the chain of {n} ended with {number}"
        return seconds

    def fan_in(self, n: int) -> float:
        noop, total = self.task("noop"), self.task("total")
        began = perf_counter()
        with aque.graph(app=self.app):
            last = total.delay([noop.delay() for _ in range(n)])
        number = last.get(timeout=RESULT_SECONDS)
        seconds = perf_counter() - began
        assert number == n, f"the fan-in of {n} counted {number}"
        return seconds

    def idle_latency(self, n: int) -> Sequence[float]:
        noop = self.task("noop")
        samples = []
        for _ in range(n):
            began = perf_counter()
            noop.delay().get(timeout=RESULT_SECONDS)
            samples.append(perf_counter() - began)
        return samples

    # -- alone --------------------------------------------------------------------------------------------------------

    def submit_graph(self, width: int, layers: int) -> tuple[float, int, int]:
        """Submit `layers` layers of `width` no-ops that nobody runs; (seconds, tasks, edges between them).

        A task waits for two of the layer before; in the second layer for four, so that there are twice as many edges as
        tasks although the first layer has none.
        """
        noop = self.task("noop")
        edges = 0
        began = perf_counter()
        with aque.graph(app=self.app):
            before = [noop.apply_async(queue=UNSERVED) for _ in range(width)]
            for layer in range(1, layers):
                each = 4 if layer == 1 else 2
                ring = before + before[:each]
                before = [noop.apply_async(depends_on=ring[i : i + each], queue=UNSERVED) for i in range(width)]
                edges += each * width
        return perf_counter() - began, width * layers, edges

    def idle(self, seconds: float) -> Idle:
        """What the worker costs while it has nothing to do; it has run tasks and commands before, so that it is complete."""
        assert self.worker is not None
        self.noops(50)
        self.commands(10)
        time.sleep(3)  # the end of the work is not idleness
        before, began = cpu_seconds(self.worker.tree()), perf_counter()
        time.sleep(seconds)
        tree = self.worker.tree()
        cpu_percent = 100 * (cpu_seconds(tree) - before) / (perf_counter() - began)
        return Idle(cpu_percent, sum(pss_bytes(process.pid) for process in tree) / 2**20, len(tree))


class AquePostgreSQL(AqueSide):
    name = "Aque, PostgreSQL"

    def __init__(self, children: int = 2) -> None:
        super().__init__(children)
        self.server = PostgreSQL()

    def database(self) -> str:
        self.running.enter_context(self.server)
        return self.running.enter_context(self.server.database())

    def versions(self) -> dict[str, str]:
        settings = [str(self.server.execute(f"SHOW {name}")[0][0]) for name in ("server_version", "fsync")]
        return {"PostgreSQL": f"{settings[0].split()[0]} (fsync {settings[1]}, {file_system(self.server.directory)})"}


class AqueSQLite(AqueSide):
    name = "Aque, SQLite"

    def database(self) -> str:
        return f"sqlite:///{self.directory}/aque.db"

    def versions(self) -> dict[str, str]:
        return {"SQLite": f"{sqlite3.sqlite_version} ({file_system(self.directory)})"}


def cpu_seconds(tree: Sequence[psutil.Process]) -> float:
    """CPU that these processes have used, with what their own children had used that are gone by now."""
    used = 0.0
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used += times.user + times.system + times.children_user + times.children_system
    return used


def pss_bytes(pid: int) -> int:
    """Memory of a process, with its share of what it shares; 0 if it has just gone."""
    with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/smaps_rollup") as rollup:
        return sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss:"))
    return 0


def file_system(directory: Path) -> str:
    """The type of the file system that holds `directory`: on tmpfs, durability costs nothing and should say so."""
    mounts = [mount for mount in psutil.disk_partitions(all=True) if directory.is_relative_to(mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else "unknown file system"
