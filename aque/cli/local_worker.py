"""`--local`: a worker for the life of one command."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from aque.errors import AqueError

#: A local worker gives back what it still runs (others' tasks: ours have ended by then) after this long.
DRAIN_SECONDS = "5"
#: And is killed after that long.
STOP_SECONDS = 15.0


class LocalWorker:
    """A worker process of ours."""

    def __init__(self, queues: Iterable[str]) -> None:
        self._log = tempfile.TemporaryFile(prefix="aque-worker-")  # noqa: SIM115 - `stop` closes it
        command = [sys.executable, "-m", "aque.cli.main", "worker", "--to-end", "--loglevel", "WARNING"]
        command += ["--name", f"local-{os.getpid()}@%h", "--queues", ",".join(dict.fromkeys(queues))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={"AQUE_DRAIN_SECONDS": DRAIN_SECONDS, **os.environ},
            # Ctrl-C is for us, not for it: Celery would wait for what runs.
            start_new_session=True,
        )

    def has_ended(self) -> bool:
        """True if it has ended by itself, which it does when it finds nothing left that it could run."""
        return self._process.poll() is not None

    def failure(self) -> AqueError:
        """Why the tasks cannot end: for a worker that has ended too early."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4000))
        lines = self._log.read().decode(errors="backslashreplace").split("\n")
        last = [line.strip() for line in lines if line.strip()][-3:]
        status = self._process.returncode
        if status == 0:
            return AqueError(
                "the local worker has ended, since it can run nothing of what is left: what waits asks for more, or for other, "
                "than this machine has, or for a limit that is used up. It stays submitted: `aque status` lists it with what "
                "it asks for, `aque kill` withdraws it."
            )
        return AqueError(f"the local worker ended with status {status}. Its last words: {' | '.join(last) or 'none'}")

    def stop(self) -> None:
        """End it, and be sure of it."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._process.kill()
            self._process.wait()
        self._log.close()


@contextmanager
def local_worker(queues: Iterable[str]) -> Iterator[LocalWorker]:
    """A worker on these queues, stopped at the end of the block, also if this process is told to terminate."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        worker = LocalWorker(queues)
        try:
            yield worker
        finally:
            worker.stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
