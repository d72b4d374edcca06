"""A farm of the demo's own: a store in a temporary directory and a worker on it. Nothing of it stays."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from aque.errors import AqueError

#: Variables that would lead to somebody's real farm or broker, and those that describe a task we may run in.
FOREIGN = ("AQUE_", "CELERY_")
#: A worker that is stopped early gives back what it still runs after this long, and is killed after that long.
DRAIN_SECONDS = "2"
STOP_SECONDS = 20.0
#: So much of the worker's log is shown when the demo fails.
LOG_LINES = 30
#: The command line with this interpreter, wherever `aque` is installed; -P: and not what lies in the working directory.
AQUE = (sys.executable, "-P", "-m", "aque.cli.main")


class PrivateFarm:
    """Where the demo happens: a directory, and the processes in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "worker.log"
        self.stopped_with: int | None = None  #: the worker's exit status
        temporary = directory / "tmp"  # for what a worker that is killed cannot remove itself
        temporary.mkdir()
        with self.log.open("wb") as log:
            self._worker = subprocess.Popen(
                [*AQUE, "worker", "--loglevel", "WARNING"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env={**os.environ, "TMPDIR": str(temporary)},
                start_new_session=True,  # Ctrl-C is for the demo, which then stops its worker
            )

    def aque(self, *words: str, cwd: Path | None = None, given: bytes = b"", statuses: tuple[int, ...] = (0,)) -> str:
        """Run `aque` as a person would; what it printed. Raises AqueError if it fails."""
        done = subprocess.run([*AQUE, *words], input=given, capture_output=True, cwd=cwd, check=False)
        if done.returncode not in statuses:
            said = (done.stderr or done.stdout).decode(errors="backslashreplace").strip()
            raise AqueError(f"`aque {words[0]}` exited with status {done.returncode}: {said}")
        return done.stdout.decode()

    def check_worker(self) -> None:
        """Raises AqueError if the worker has ended."""
        if (status := self._worker.poll()) is not None:
            raise AqueError(f"the worker has ended with status {status}, before its work was done.")

    def log_tail(self) -> list[str]:
        """The end of what the worker has said."""
        return self.log.read_text(errors="backslashreplace").splitlines()[-LOG_LINES:]

    def stop(self) -> None:
        """End the worker, with everything that it has started."""
        if self.stopped_with is not None:
            return
        try:
            self._worker.terminate()
            self.stopped_with = self._worker.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if self.stopped_with != 0:  # it does not stop, was killed, or this is Ctrl-C for the second time
                with suppress(ProcessLookupError):
                    os.killpg(self._worker.pid, signal.SIGKILL)
                self.stopped_with = self._worker.wait()


@contextmanager
def private_farm() -> Iterator[PrivateFarm]:
    """A farm for the length of the block, which this process and its children take for the only one.

    However the block ends (an error, Ctrl-C, SIGTERM), the worker is stopped, the directory removed and the environment
    as before.
    """
    before = dict(os.environ)
    handlers = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    directory = Path(tempfile.mkdtemp(prefix="aque-demo-"))
    try:
        for name in [name for name in os.environ if name.startswith(FOREIGN)]:
            del os.environ[name]
        os.environ["AQUE_STATE_DIR"] = str(directory / "state")
        os.environ["AQUE_DRAIN_SECONDS"] = DRAIN_SECONDS
        os.environ["XDG_CONFIG_HOME"] = str(directory / "config")  # whose aque.toml may name another farm
        farm = PrivateFarm(directory)
        try:
            yield farm
        finally:
            farm.stop()
    finally:
        _remove(directory)
        os.environ.clear()
        os.environ.update(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _remove(directory: Path) -> None:
    """All of it, though what a killed worker has left may still write there for a moment."""
    for _ in range(50):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.05)


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
