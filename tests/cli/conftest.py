"""The real `aque` on a store of its own: `aque` has no worker, `served` shares one between the tests of a module."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlalchemy import Connection

from aque import settings
from aque.store import Store, open_store
from tests.cli import starter
from tests.conftest import FOREIGN
from tests.servers import Guarded, wait_until

PROGRAMS = Path(sys.executable).parent
LIMIT_SECONDS = 60
#: Most runs of `aque`. Those of Celery, and those that `start`, are the program itself.
STARTER = starter.Starter()


@pytest.fixture(scope="session", autouse=True)
def _starter_ends() -> Iterator[None]:
    yield
    STARTER.end()


@dataclass(frozen=True)
class Done:
    """How a run of `aque` ended."""

    status: int
    out: str
    err: str
    raw: bytes = field(repr=False)

    @property
    def id(self) -> int:
        """Of the task that was submitted."""
        return int((self.out or self.err).split()[0])


@dataclass(frozen=True)
class Aque:
    """Runs `aque` in a directory with an environment."""

    environment: dict[str, str]
    cwd: Path

    def __call__(
        self, *words: str | bytes, given: bytes = b"", env: Mapping[str, str] | None = None, program: str = "aque"
    ) -> Done:
        environment = {**self.environment, **(env or {})}
        is_forked = program == "aque" and words and words[0] in starter.VERBS and "--local" not in words
        if is_forked and "PYTHONPATH" not in environment:  # which counts for a program that starts
            done = STARTER.run(words, given=given, cwd=self.cwd, env=environment, timeout=LIMIT_SECONDS)
        else:
            done = subprocess.run(
                [PROGRAMS / program, *words],
                input=given,
                capture_output=True,
                cwd=self.cwd,
                env=environment,
                timeout=LIMIT_SECONDS,
                check=False,
            )
        out, err = (part.decode(errors="surrogateescape") for part in (done.stdout, done.stderr))
        assert "Traceback" not in err, err
        return Done(done.returncode, out, err, done.stdout)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """`aque` in the background; the caller ends it."""
        return subprocess.Popen(
            [PROGRAMS / "aque", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.cwd,
            env=self.environment,
        )

    def submit(self, *words: str | bytes) -> int:
        done = self("submit", *words)
        assert done.status == 0, done.err
        return done.id

    @contextmanager
    def store(self) -> Iterator[tuple[Store, Connection]]:
        """The store itself: an `aque` takes a hundred times as long to say what is in it."""
        with closing(open_store(settings.load(self.environment))) as store, store.connect() as connection:
            yield store, connection

    def state(self, task_id: int) -> str:
        with self.store() as (store, connection):
            (task,) = store.tasks(connection, {"id": task_id}, ["state"])
        return str(task["state"])

    def count(self) -> int:
        """How many tasks there are."""
        with self.store() as (store, connection):
            return sum(store.counts(connection).values())

    def assert_sound(self) -> None:
        """As `aque doctor` has it."""
        if (Path(self.environment["AQUE_STATE_DIR"]) / "aque.db").exists():
            with self.store() as (store, connection):
                assert store.doctor(connection) == []


@pytest.fixture
def aque(bare: Aque, sqlite_template: Path) -> Aque:
    """A store without a worker, and without tasks; the doctor finds it sound after the test."""
    state = Path(bare.environment["AQUE_STATE_DIR"])
    state.mkdir(mode=0o700)
    shutil.copy(sqlite_template, state / "aque.db")
    return bare


@pytest.fixture
def bare(environment: dict[str, str], tmp_path: Path) -> Iterator[Aque]:
    """No store yet: the first use makes it."""
    here = tmp_path / "here"
    here.mkdir()
    runner = Aque(environment, here)
    yield runner
    runner.assert_sound()


@pytest.fixture(scope="module")
def farm_with_worker() -> Iterator[Aque]:
    """A store with a worker of four CPUs, for all tests of a module."""
    with tempfile.TemporaryDirectory(prefix="aque-") as directory:
        base = Path(directory)
        for name in ("run", "here"):
            (base / name).mkdir(mode=0o700)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)},
            "PATH": os.pathsep.join([str(PROGRAMS), os.environ.get("PATH", os.defpath)]),
            "AQUE_STATE_DIR": str(base / "state"),
            "XDG_CONFIG_HOME": str(base / "config"),
            "XDG_RUNTIME_DIR": str(base / "run"),
        }
        runner = Aque(environment, base / "here")
        worker = Guarded(
            [PROGRAMS / "aque", "worker", "--cpus", "4", "--concurrency", "2"],
            directory=base,
            env=environment,
            cwd=base / "here",
        )
        try:
            wait_until(lambda: runner("workers", "--json").out, what="a live worker")
            yield runner
        finally:
            stopped = worker.end(signal.SIGTERM)
            assert stopped, worker.log.read_text(errors="replace")[-4000:]


@pytest.fixture
def served(farm_with_worker: Aque) -> Iterator[Aque]:
    """The store that a worker serves; the doctor finds it sound after the test."""
    yield farm_with_worker
    farm_with_worker.assert_sound()
