"""What the tests of the transport share: the address of a bus, consumers in processes of their own, Celery workers."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from aque.store.engine import open_engine
from tests.servers import Guarded

Start = Callable[..., "Consumer"]


class Consumer:
    """A process that consumes a queue and writes a line for each message; see consumer.py."""

    def __init__(self, url: str, queue: str, *arguments: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("consumer.py")), url, queue, *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, "the consumer ended"
        return line

    def end(self) -> list[str]:
        """End it, and return what it wrote and was not read."""
        self.process.terminate()
        return self.process.communicate(timeout=30)[0].split("\n")[:-1]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start_consumer() -> Iterator[Start]:
    started: list[Consumer] = []

    def start(url: str, queue: str, *arguments: str) -> Consumer:
        consumer = Consumer(url, queue, *arguments)
        started.append(consumer)
        assert consumer.line() == "ready"
        return consumer

    yield start
    for consumer in started:
        consumer.kill()
        assert consumer.process.stdout is not None
        consumer.process.stdout.close()


@pytest.fixture
def bus_url(store_url: str) -> str:
    """An empty bus: the test runs once on each kind of database."""
    return f"aque+{store_url}"


@pytest.fixture
def engine(store_url: str) -> Iterator[sa.Engine]:
    engine = open_engine(store_url.replace("postgresql://", "postgresql+psycopg2://"))
    yield engine
    engine.dispose()


@pytest.fixture
def start_worker(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Guarded]]:
    """Starts `celery worker` on the app in app.py, in Celery's event loop or without it."""
    started: list[Guarded] = []

    def start(url: str, loop: str) -> Guarded:
        directory = tmp_path / f"worker{len(started)}"
        directory.mkdir()
        command = [sys.executable, "-m", "celery", "-A", "tests.transport.app", "worker", "-c", "1", "-n", "one@test"]
        root = Path(__file__).parents[2]
        env = {**environment, "TEST_BROKER": url, "TEST_LOOP": loop}
        started.append(Guarded([*command, "-l", "info"], directory=directory, env=env, cwd=root))
        return started[-1]

    yield start
    for worker in started:
        if worker.running():
            worker.end(signal.SIGKILL)
