"""A farm of the tests' own: a store, an environment, and real workers in processes of their own.

with Farm("sqlite:////directory/aque.db", directory) as farm:
    worker = farm.start_worker("--concurrency", "2", cpus=2)
    with farm.entered():                  # this process submits to it
        aque.shell(["true"]).get()
    worker.stop()
"""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import psutil
from celery import Celery

from aque import control, settings
from aque.states import COMPLETE_STATES, State
from aque.store import WorkerRow, open_store, schema
from aque.store.engine import open_engine
from tests.conftest import FOREIGN
from tests.servers import Guarded, wait_until

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
#: How long anything of a test may take; nothing on an idle machine needs a tenth of it.
LIMIT_SECONDS = 60.0
#: What a test sees of a worker's log when it fails.
LOG_LINES = 80

#: Short, so that tests of what happens afterwards are; a test may ask for others.
SETTINGS = {
    "lease_seconds": 3,
    "poll_seconds": 0.5,
    "kill_grace_seconds": 0.5,
    "drain_seconds": 5,
    "allow_root_tasks": True,
}


class Farm:
    """A store with its tables, and the workers that were started on it; leaving it stops them."""

    def __init__(self, url: str, directory: Path, **chosen: Any) -> None:
        self.url = url
        self.directory = directory
        self.workers: list[Worker] = []
        self.mark = uuid4().hex  # in the environment of every process of this farm
        # A socket's path has at most 108 bytes, and the directory's (or TMPDIR's) may use them up.
        base = tempfile.gettempdir()
        self.runtime = tempfile.mkdtemp(prefix="aque-", dir=base if len(base) < 50 else "/tmp")
        self.settings = {
            "AQUE_BROKER": url,
            "AQUE_STATE_DIR": str(directory / "state"),
            "XDG_CONFIG_HOME": str(directory / "config"),
            "XDG_RUNTIME_DIR": self.runtime,
            "TEST_FARM": self.mark,
            **{f"AQUE_{name.upper()}": str(value) for name, value in {**SETTINGS, **chosen}.items()},
        }
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)},
            "PATH": os.pathsep.join([str(PROGRAMS), os.environ.get("PATH", os.defpath)]),
            **self.settings,
        }
        configured = settings.load(self.settings)
        self.bus_url = configured.celery_broker_url
        engine = open_engine(configured.store_url)
        schema.upgrade(engine)
        engine.dispose()
        self.store = open_store(configured)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop every worker, and see that nothing of the farm is left."""
        try:
            running = [worker for worker in self.workers if worker.running()]
            with ThreadPoolExecutor(len(running) or 1) as together:
                obeyed = list(together.map(Worker.end, running))
            deaf = [worker.name for worker, did in zip(running, obeyed, strict=True) if not did]
            assert not deaf, f"workers that had to be killed: {deaf}"
            self.wait_until_nothing_is_left()
        finally:
            for process in self.processes():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.store.close()
            shutil.rmtree(self.runtime, ignore_errors=True)

    @contextmanager
    def entered(self) -> Iterator[Self]:
        """This process belongs to the farm: what it submits goes there."""
        before = {name: os.environ.get(name) for name in self.settings}
        os.environ.update(self.settings)
        try:
            yield self
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    # -- workers ------------------------------------------------------------------------------------------------------

    def start_worker(
        self,
        *words: str,
        name: str = "one",
        app: str = "aque.celery_app",
        before: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        wait: bool = True,
        **chosen: Any,
    ) -> "Worker":
        """`celery -A APP worker WORDS` with these settings; returns when it claims. `before`: words before the command."""
        directory = self.directory / f"worker-{len(self.workers)}-{name}"
        directory.mkdir()
        hostname = f"{name}@test"
        command = [*before, sys.executable, "-m", "celery", "-A", app, "worker", "-n", hostname, "-l", "info", *words]
        environment = {
            **self.environment,
            **{f"AQUE_{setting.upper()}": str(value) for setting, value in chosen.items()},
            **(env or {}),
        }
        worker = Worker(self, hostname, Guarded(command, directory=directory, env=environment, cwd=cwd))
        self.workers.append(worker)
        if wait:
            worker.wait_until_it_claims()
        return worker

    def start_program(self, *words: str, env: Mapping[str, str] | None = None) -> Guarded:
        """Another program of the farm; the caller ends it."""
        directory = Path(tempfile.mkdtemp(prefix="program-", dir=self.directory))
        return Guarded(words, directory=directory, env={**self.environment, **(env or {})}, cwd=ROOT)

    def live(self) -> list[WorkerRow]:
        with self.store.connect() as connection:
            return [row for row in self.store.workers(connection) if row.is_live]

    def processes(self) -> list[psutil.Process]:
        """Every process that was started with the farm's environment, or by one that was; what this process has started
        itself, such as a guard, is its own affair."""
        found = []
        for process in processes_with(f"TEST_FARM={self.mark}"):
            with suppress(psutil.NoSuchProcess):
                if process.ppid() != os.getpid():
                    found.append(process)
        return found

    def wait_until_nothing_is_left(self) -> None:
        """No process of the farm, a few moments after the last worker has ended."""
        with suppress(AssertionError):
            wait_until(lambda: not self.processes(), LIMIT_SECONDS)
        left = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                left.append((process.pid, process.ppid(), " ".join(process.cmdline())[:200]))
        assert not left, f"left behind, as (pid, parent, command): {left}"

    def log(self) -> str:
        """The ends of the workers' logs."""
        return "\n".join(
            f"--- {worker.name}\n" + "\n".join(worker.log().splitlines()[-LOG_LINES:]) for worker in self.workers
        )

    # -- questions ----------------------------------------------------------------------------------------------------

    def client(self, url: str = "") -> Celery:
        """A Celery app that only sends and asks, on the broker of the farm."""
        return Celery("client", broker=url or self.bus_url, backend="rpc://", set_as_current=False)

    def row(self, task: Any) -> dict[str, Any]:
        """Everything that `aque status` could show of a task."""
        wanted = getattr(task, "id", task)
        with self.store.connect() as connection:
            (task_id,) = self.store.ids_of(connection, [str(wanted)]).values()
            (row,) = self.store.tasks(connection, {"id": task_id})
        return row

    def state(self, task: Any) -> str:
        return str(self.row(task)["state"])

    def wait_for_state(self, task: Any, *states: str) -> dict[str, Any]:
        """The row of a task once it is in one of these states."""
        wait_until(lambda: self.state(task) in states, LIMIT_SECONDS, f"task {task} is {' or '.join(states)}")
        return self.row(task)

    def counts(self) -> dict[str, int]:
        with self.store.connect() as connection:
            return {str(state): count for state, count in self.store.counts(connection).items()}

    def output(self, task: Any, fd: int = 1) -> bytes:
        """All that was captured of a stream of the latest attempt."""
        task_id = int(self.row(task)["id"])
        with self.store.connect() as connection:
            return self.store.outputs(connection, [task_id]).get((task_id, fd), b"")

    def attempts(self, task: Any) -> list[tuple[int, str, str | None]]:
        """(attempt, how it ended, why) of the attempts that another one followed."""
        task_id = int(self.row(task)["id"])
        with self.store.connect() as connection:
            rows = connection.exec_driver_sql(
                f"SELECT attempt, state, reason FROM aque_attempt WHERE task_id = {task_id} ORDER BY attempt"
            )
            return [tuple(row) for row in rows]

    def kill_everything(self) -> None:
        """Whatever is not complete."""
        unfinished = [str(state) for state in State if state not in COMPLETE_STATES]
        with self.store.connect() as connection:
            left = [row["id"] for row in self.store.tasks(connection, {"state": unfinished}, ["id"])]
        if left:
            control.kill(self.store, left, signal.SIGKILL)
            for task_id in left:
                self.wait_for_state(task_id, *map(str, COMPLETE_STATES))

    def findings(self) -> list[Any]:
        """What the doctor says; empty for a sound store."""
        with self.store.connect() as connection:
            return list(self.store.doctor(connection))


class Worker:
    """A real worker process on a farm."""

    def __init__(self, farm: Farm, name: str, process: Guarded) -> None:
        self.farm = farm
        self.name = name
        self.process = process

    @property
    def pid(self) -> int:
        """Of the worker itself, also where another program (`unshare`) started it."""
        for process in self.process.tree():
            with suppress(psutil.NoSuchProcess):
                if "unshare" not in process.name():
                    return process.pid
        return self.process.pid

    def log(self) -> str:
        return self.process.log.read_text(errors="replace")

    def running(self) -> bool:
        return self.process.running()

    def is_registered(self) -> bool:
        return any(row.info.name == self.name for row in self.farm.live())

    def wait_until_it_claims(self) -> None:
        wait_until(lambda: self.is_registered() or not self.running(), LIMIT_SECONDS, f"{self.name} claims")
        assert self.running(), self.log()

    def wait_until_it_answers(self, client: Celery) -> None:
        """Remote control reaches it."""
        wait_until(lambda: self.name in self.ask(client, "ping"), LIMIT_SECONDS, f"{self.name} answers")

    def ask(self, client: Celery, question: str) -> dict[str, Any]:
        """`celery inspect QUESTION` of this worker: its answer by its name, or nothing."""
        inspector = client.control.inspect([self.name], timeout=3, limit=1)
        try:
            return getattr(inspector, question)() or {}
        except Exception:  # the broker is away, or was: each of its libraries has errors of its own
            client.close()
            return {}

    def pool_children(self) -> list[psutil.Process]:
        """The processes that run Python tasks."""
        found = []
        for child in psutil.Process(self.pid).children():
            with suppress(psutil.NoSuchProcess):
                if child.name() == "aque-python":
                    found.append(child)
        return found

    def deliver(self, number: signal.Signals) -> None:
        """Only the worker itself gets it, none of its children."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9 of the worker alone, as when the machine is out of memory."""
        os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: not self.running(), what=f"{self.name} is gone")

    def end(self, number: signal.Signals = signal.SIGTERM) -> bool:
        """Signal it and wait until it and its children are gone; False if something had to be killed."""
        if self.pid != self.process.pid:  # unshare would not hand the signal on
            os.kill(self.pid, number)
            wait_until(lambda: not self.running(), what=f"{self.name} is gone")
        return self.process.end(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self.end(number), f"{self.name} or a child of it had to be killed\n{self.log()}"


def processes_with(variable: str) -> list[psutil.Process]:
    """The processes that have this NAME=VALUE in the environment that they were started with."""
    wanted = variable.encode()
    found = []
    for process in psutil.process_iter():
        try:
            variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            if wanted in variables and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.NoSuchProcess):
            continue
    return found


def processes_named(word: str) -> list[psutil.Process]:
    """The living processes with this word on their command line: an environment can be dropped, this cannot."""
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.NoSuchProcess):
            if word.encode() in Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0"):
                found.append(process)
    return found
