"""Runs of `aque` that start as forks of a process which has imported what they need: the imports are nine tenths of a run.

Each has its own environment, directory, streams and exit status. What differs from the program: the modules are there.
"""

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

#: Verbs that import neither Celery nor what depends on the environment.
VERBS = (
    "submit",
    "xargs",
    "status",
    "explain",
    "output",
    "wait",
    "events",
    "workers",
    "doctor",
    "kill",
    "set",
    "limits",
)
PROGRAM = Path(sys.executable).with_name("aque")
ROOT = Path(__file__).parents[2]


class Starter:
    """Starts the process with the first run; it ends with this one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._address = ""

    def run(
        self, words: Sequence[str | bytes], *, given: bytes, cwd: Path, env: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[bytes]:
        """`aque WORDS`, as `subprocess.run` would."""
        if self._process is None:
            self._start()
        argv = [os.fsdecode(word) for word in words]
        asked = json.dumps({"argv": argv, "cwd": str(cwd), "env": dict(env)}).encode()
        with (
            tempfile.TemporaryFile() as stdin,
            tempfile.TemporaryFile() as stdout,
            tempfile.TemporaryFile() as stderr,
            socket.socket(socket.AF_UNIX) as connection,
        ):
            stdin.write(given)
            stdin.seek(0)
            connection.connect(self._address)
            socket.send_fds(connection, [len(asked).to_bytes(4, "big")], [f.fileno() for f in (stdin, stdout, stderr)])
            connection.sendall(asked)
            connection.settimeout(timeout)
            with connection.makefile("r") as answers:
                pid = int(answers.readline())
                try:
                    status = int(answers.readline())
                except TimeoutError:
                    os.kill(pid, signal.SIGKILL)
                    raise subprocess.TimeoutExpired(["aque", *argv], timeout) from None
            stdout.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess(["aque", *argv], status, stdout.read(), stderr.read())

    def _start(self) -> None:
        directory = tempfile.mkdtemp(prefix="aque-", dir="/tmp")
        self._address = f"{directory}/starter"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._address)
        listener.listen()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.starter", str(listener.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            cwd=ROOT,
        )
        listener.close()

    def end(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None
            os.unlink(self._address)
            os.rmdir(os.path.dirname(self._address))


def serve(listener: socket.socket) -> None:
    """Until nobody holds the other end of stdin."""
    for verb in VERBS:
        import_module(f"aque.cli.{verb}")
    import_module("psycopg2")
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            handle(connection)
            return
        connection.close()


def handle(connection: socket.socket) -> None:
    """One run, in a child of this process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, streams, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as asking:
        asked = json.loads(asking.read(int.from_bytes(length, "big")))
    child = os.fork()
    if child == 0:
        connection.close()
        become(asked, streams)
        return
    connection.sendall(f"{child}\n".encode())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall(f"{status}\n".encode())
    os._exit(0)


def become(asked: dict[str, object], streams: Sequence[int]) -> None:
    """What the interpreter has done when it calls the program's `main`."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(str(asked["cwd"]))
    os.environ.clear()
    os.environ.update(asked["env"])  # type: ignore[arg-type, call-overload]
    sys.argv = [str(PROGRAM), *asked["argv"]]  # type: ignore[misc]
    sys.path[0] = str(PROGRAM.parent)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        was = getattr(sys, name)
        line_buffering = name == "stderr"
        opened = open(was.fileno(), mode, encoding=was.encoding, errors=was.errors, closefd=False)  # noqa: SIM115
        opened.reconfigure(line_buffering=line_buffering)
        setattr(sys, name, opened)
        setattr(sys, f"__{name}__", opened)
    from aque.cli.main import main

    sys.exit(main())


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
