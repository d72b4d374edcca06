"""Restart: exec the worker's program anew in the same process, and tell the new image what goes on.

The pid stays, and so do the children (the supervisors' server) and the pidfds by which supervisors watch the worker. The
commands' sockets stay open. What the new image has to know of them is in a file in memory; an environment variable, which
is removed as soon as this module is imported, names its descriptor.
"""

import atexit
import logging
import marshal
import os
import pickle
import signal
import sys
import time
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from aque import launch, protocol, server, supervisor, title
from aque.assignments import Assigned
from aque.durations import Runs
from aque.resources import Capacity
from aque.store import Kill
from aque.supervised import Command, OtherUser
from aque.values import ClaimedTask, Outcome, Redirections, Usage

logger = logging.getLogger(__name__)

VARIABLE = "AQUE_HANDOVER"
#: Held back from just before the exec until the new image has handlers for them: their default would end the worker, and
#: with it all commands. What comes meanwhile is delivered then.
SIGNALS = frozenset({signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})
#: How long supervisors may take to kill what the new image cannot take over.
DROP_SECONDS = 10.0


def _format() -> str:
    """Changes with everything that a state is made of, and with what the server and the supervisors, which go on, say and
    hear: another version of Aque may be installed when the image changes."""
    parts = (ClaimedTask, Redirections, Outcome, Usage, Runs, Kill, Capacity, Assigned, Command, OtherUser)
    spoken = [zlib.crc32(Path(module.__file__ or "").read_bytes()) for module in (protocol, supervisor, server, launch)]
    return f"3 {spoken} " + " ".join(
        f"{part.__module__}.{part.__name__}({','.join(field.name for field in fields(part))})" for part in parts
    )


@dataclass(frozen=True, slots=True)
class Handover:
    """What the image before this one has left."""

    worker_id: int
    store_url: str
    #: The supervisors' server; 0: there was none.
    server: int
    descriptors: tuple[int, ...]
    format: str
    body: bytes

    def state(self) -> dict[str, Any] | None:
        """What was exported; None if another version of Aque wrote it. Then what runs is killed, and is gone afterwards:
        the worker still owns it, and gives it back."""
        if self.format == _format():
            state: dict[str, Any] = pickle.loads(self.body)  # our own memory: nobody else has had it
            return state
        logger.warning(
            "Aque is of another version since this restart: the commands that run are killed and given back."
        )
        for descriptor in self.descriptors:
            os.close(descriptor)
        self._wait_for_server()
        return None

    def _wait_for_server(self) -> None:
        """The server ends when all supervisors have, and each of those when its tree is gone."""
        deadline = time.monotonic() + DROP_SECONDS
        with suppress(ChildProcessError):
            while self.server and not os.waitpid(self.server, os.WNOHANG)[0] and time.monotonic() < deadline:
                time.sleep(0.01)


def _take() -> Handover | None:
    named = os.environ.pop(VARIABLE, "")
    pid, _, number = named.partition(":")
    if pid != str(os.getpid()):
        return None  # there is none, or it was for the process that started this one
    title.set_comm(title.WORKER)
    with open(int(number), "rb") as file:
        file.seek(0)
        taken = Handover(**marshal.load(file))
    for descriptor in taken.descriptors:
        os.set_inheritable(descriptor, False)
    return taken


#: None in a process that was started, and not exec'ed by the image before it.
handover = _take()
#: When this image began (seconds since 1970): files that have changed since are not the ones that it has imported.
began = time.time()
#: The environment that this image was started with. What Celery and the app set later is for them to set again.
_environment = dict(os.environ)


def obstacle() -> str | None:
    """Why there can be no new image, as a sentence; None if nothing speaks against it."""
    if os.access(sys.executable, os.X_OK):
        return None
    return f"{sys.executable}, which runs this worker, cannot be executed any more."


def hold_signals() -> None:
    """Let the signals wait, for this thread: the mask survives the exec, and so does what is pending."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def deliver_signals() -> None:
    """The handlers are there: deliver what has waited. Before the pool forks, since children inherit the mask."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def run_exit_functions() -> None:
    """What this process would do at its end: what the app, or a library, has asked for."""
    atexit._run_exitfuncs()


def replace_image(
    worker_id: int, store_url: str, server: int, descriptors: Iterable[int], state: dict[str, Any]
) -> NoReturn:
    """Exec this process's own command line; `descriptors` stay open. Call it with the signals held. OSError: it goes on."""
    left = {
        "worker_id": worker_id,
        "store_url": store_url,
        "server": server,
        "descriptors": tuple(descriptors),
        "format": _format(),
        "body": pickle.dumps(state),
    }
    memory = os.memfd_create("aque-handover", 0)
    with open(memory, "wb", closefd=False) as file:
        marshal.dump(left, file)
    for descriptor in left["descriptors"]:  # type: ignore[attr-defined]
        os.set_inheritable(descriptor, True)
    environment = {**_environment, VARIABLE: f"{os.getpid()}:{memory}"}
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    # orig_argv and not argv: it has `-m celery` and the interpreter's own options.
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
