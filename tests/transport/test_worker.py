"""A real `celery worker` on the transport, in Celery's event loop ("hub") and without it ("blocking")."""

import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from celery import Celery

from aque.transport import BusUnreachable
from tests.servers import Guarded, PostgreSQL, wait_until

LIMIT = 30  # seconds

Worker = Callable[[str, str], Guarded]


class Client:
    """A Celery app that only sends."""

    def __init__(self, url: str) -> None:
        self.app = Celery("client", broker=url, backend="rpc://")

    def wait_for_ping(self) -> None:
        wait_until(self._ping, LIMIT, "the worker answers a ping")

    def _ping(self) -> Any:
        with suppress(BusUnreachable):
            return self.app.control.inspect(timeout=1, limit=1).ping()

    def add(self, left: int, right: int) -> Any:
        return self.app.send_task("tests.transport.app.add", (left, right)).get(timeout=LIMIT)


@pytest.fixture(params=["hub", "blocking"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_worker_runs_tasks_and_answers_remote_control_and_sends_events(
    bus_url: str, start_worker: Worker, loop: str
) -> None:
    worker = start_worker(bus_url, loop)
    client = Client(bus_url)
    client.wait_for_ping()
    events: list[str] = []
    with client.app.connection() as connection:
        receiver = client.app.events.Receiver(connection, handlers={"*": lambda event: events.append(event["type"])})
        with receiver.consumer_context() as (listening, _, _):
            assert client.add(1, 2) == 3
            while "task-succeeded" not in events:
                listening.drain_events(timeout=LIMIT)
    assert {"task-received", "task-started"} <= set(events)
    assert client.app.control.inspect(timeout=LIMIT, limit=1).registered() == {"one@test": ["tests.transport.app.add"]}
    assert [client.add(number, 1) for number in range(50)] == list(range(1, 51))
    assert worker.end(signal.SIGTERM)
    assert "Unrecoverable" not in worker.log.read_text()


def test_a_worker_survives_that_postgresql_ends_its_connections_and_restarts(
    own_postgresql: PostgreSQL, start_worker: Worker, loop: str
) -> None:
    url = f"aque+{own_postgresql.url}"
    worker = start_worker(url, loop)
    Client(url).wait_for_ping()
    own_postgresql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    client = Client(url)
    client.wait_for_ping()
    assert client.add(1, 2) == 3
    own_postgresql.restart("immediate")
    client = Client(url)
    client.wait_for_ping()
    assert client.add(3, 4) == 7
    assert worker.running()
