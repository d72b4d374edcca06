"""The real `aque` on a store of its own: `aque` has no worker, `served` shares one between the tests of a module."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import FOREIGN
from tests.servers import Guarded, wait_until

PROGRAMS = Path(sys.executable).parent


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
        done = subprocess.run(
            [PROGRAMS / program, *words],
            input=given,
            capture_output=True,
            cwd=self.cwd,
            env={**self.environment, **(env or {})},
            timeout=60,
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

    def state(self, task_id: int) -> str:
        return self("status", str(task_id), "--csv", "state").out.split()[1]

    def assert_sound(self) -> None:
        doctor = self("doctor")
        assert doctor.status == 0, doctor.out + doctor.err
        assert doctor.out.splitlines()[-1] == "clean"


@pytest.fixture
def aque(environment: dict[str, str], tmp_path: Path) -> Iterator[Aque]:
    """A store without a worker; the doctor finds it sound after the test."""
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
