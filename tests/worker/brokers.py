"""The four ways in which Celery's messages travel, each with a farm and a client of its own.

with served("rabbitmq", directory) as brokered:
    brokered.worker, brokered.client        # a worker of tests.worker.ordinary, and who asks it
    brokered.stop(); brokered.start()       # the broker, where it is a server

Tests share the servers of the run: `of_the_run`.
"""

import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tests.servers import PostgreSQL, RabbitMQ, Redis, Server, wait_until
from tests.worker.farm import LIMIT_SECONDS, Farm, Worker

BROKERS = ("aque+sqlite", "aque+postgresql", "rabbitmq", "redis")
APP = "tests.worker.ordinary"


@dataclass
class Brokered:
    """A farm with one worker of four CPUs and three pool children."""

    name: str
    farm: Farm
    client: Celery
    words: tuple[str, ...] = ("-E",)  #: of the worker's command line
    env: Mapping[str, str] = field(default_factory=dict)  #: the worker's
    server: Server | None = None  #: of the broker, if it is the farm's own; None: a file, or shared with others

    @property
    def worker(self) -> Worker:
        return self.farm.workers[-1]

    def start_worker(self) -> None:
        """Also another one, when the one before has ended; returns when it answers."""
        self.farm.start_worker("-c", "3", *self.words, app=APP, cpus=4, env=self.env)
        self.worker.wait_until_it_answers(self.client)

    def ask(self, command: str, timeout: float = 60, **arguments: Any) -> Any:
        """The worker's answer to a command of remote control."""
        answers = self.client.control.broadcast(
            command, arguments, destination=[self.worker.name], reply=True, timeout=timeout, limit=1
        )
        assert answers, f"no answer to {command}"
        return answers[0][self.worker.name]

    def send(self, name: str, *args: Any, **options: Any) -> Any:
        """An ordinary Celery task of the app."""
        return self.client.send_task(f"{APP}.{name}", args, **options)

    def kill_everything(self) -> None:
        """Whatever has not ended, in the table and of ordinary tasks: a test that failed must not be the next one's trouble."""
        self.farm.kill_everything()
        if not self.worker.running():
            return

        def left() -> list[str]:
            return [request["id"] for question in ("active", "reserved") for request in self.ask(question)]

        with suppress(AssertionError):  # a task that has just ended is active for another moment
            wait_until(lambda: not left(), 2)
            return
        self.ask("revoke", task_id=left(), terminate=True, signal="SIGKILL")
        wait_until(lambda: not left(), LIMIT_SECONDS, "nothing runs or waits")


@contextmanager
def working(farm: Farm, name: str, **options: Any) -> Iterator[Brokered]:
    """The farm with a worker; `options` are fields of `Brokered`."""
    client = farm.client()
    try:
        on = Brokered(name, farm, client, **options)
        on.start_worker()
        yield on
    finally:
        client.close()


@contextmanager
def served(
    name: str, directory: Path, *, words: tuple[str, ...] = ("-E",), env: Mapping[str, str] | None = None, **chosen: Any
) -> Iterator[Brokered]:
    """A farm whose messages travel by a broker of its own, of that name; this process belongs to it."""
    with ExitStack() as stack:
        server: Server | None = None
        url = f"sqlite:///{directory / 'aque.db'}"
        if name == "aque+postgresql":
            server = stack.enter_context(PostgreSQL())
            url = server.url
        elif name == "rabbitmq":
            server = stack.enter_context(RabbitMQ())
            chosen["celery_broker"] = server.url
        elif name == "redis":
            server = stack.enter_context(Redis(durable=True))
            chosen["celery_broker"] = server.url
            # What a worker had when Redis went away is for another one after Celery's visibility timeout: an hour by default.
            env = {"TEST_VISIBILITY_SECONDS": "5", **(env or {})}
        farm = stack.enter_context(Farm(url, directory, **chosen))
        stack.enter_context(farm.entered())
        yield stack.enter_context(working(farm, name, words=words, env=env or {}, server=server))


@contextmanager
def of_the_run(request: pytest.FixtureRequest, name: str, directory: Path) -> Iterator[dict[str, str]]:
    """The arguments of a new farm, with its tables, whose messages travel by the broker of that name, on the servers that all
    tests share."""
    if name == "aque+postgresql":
        server = request.getfixturevalue("postgresql_server")
        with server.database(request.getfixturevalue("postgresql_template")) as url:
            yield {"url": url}
        return
    file = directory / "aque.db"
    shutil.copy(request.getfixturevalue("sqlite_template"), file)
    broker = {} if name == "aque+sqlite" else {"celery_broker": request.getfixturevalue(f"{name}_server").fresh_url()}
    yield {"url": f"sqlite:///{file}", **broker}


class Monitor:
    """Hears every event from the moment that it is made."""

    def __init__(self, client: Celery) -> None:
        self.events: list[dict[str, Any]] = []
        self._app = client
        self._listens = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        assert self._listens.wait(LIMIT_SECONDS)
        # Redis subscribes with the first look only.
        wait_until(lambda: client.control.heartbeat() or self.events, LIMIT_SECONDS, "it hears something")

    def _listen(self) -> None:
        with self._app.connection() as connection:
            receiver = self._app.events.Receiver(connection, handlers={"*": self.events.append})
            with receiver.consumer_context() as (listening, _, _):
                self._listens.set()
                while not self._over:
                    with suppress(TimeoutError):
                        listening.drain_events(timeout=0.2)

    def of(self, task: Any) -> list[str]:
        """The kinds of a task's events, in order."""
        return [event["type"] for event in list(self.events) if event.get("uuid") == task.id]

    def event(self, task: Any, kind: str) -> dict[str, Any]:
        return next(event for event in self.events if event.get("uuid") == task.id and event["type"] == kind)

    def wait_for(self, task: Any, kind: str) -> list[str]:
        wait_until(lambda: kind in self.of(task), LIMIT_SECONDS, f"{kind} of {task}; there are {self.of(task)}")
        return self.of(task)

    def end(self) -> None:
        self._over = True
        self._thread.join()
