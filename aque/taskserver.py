"""The worker's end of the line to the tasks that it runs: they wait for other tasks without holding their CPUs, and tell of
their progress.

A socket in Linux's abstract namespace, which processes of other users reach too; who knows the key of an attempt speaks for
it. One JSON object a line, answered by one line: empty, or why not. A connection that waits for its answer is a task that
waits for its CPUs.
"""

import errno
import json
import logging
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from aque.values import ClaimedTask

logger = logging.getLogger(__name__)

#: What a task tells of itself must fit into this.
LONGEST_LINE = 1 << 20
LONGEST_STATE = 100
#: So many lines may be open that have not shown the key of a task: anybody on this machine can connect.
MOST_STRANGERS = 32
#: When there are no descriptors left.
PAUSE_SECONDS = 0.1


class Listener(Protocol):
    """Who hears what the tasks ask; called from the server's thread."""

    def block(self, task: ClaimedTask) -> str | None:
        """The task waits for others from now on; a sentence if it must not."""

    def unblock(self, task: ClaimedTask, granted: Callable[[], None]) -> None:
        """It would go on: call `granted` when it has its CPUs again."""

    def told(self, task: ClaimedTask, state: str, meta: bytes) -> None:
        """It tells of itself; `meta` is JSON."""


class TaskServer:
    """Answers the tasks of one worker, in a thread of its own."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._tasks: dict[str, ClaimedTask] = {}
        self._keys: dict[tuple[int, int], str] = {}
        self._name = f"aque-{secrets.token_hex(8)}"
        self._received: dict[socket.socket, bytes] = {}
        self._strangers: dict[socket.socket, None] = {}  #: lines that have not shown a key yet, oldest first
        self._blocked: dict[socket.socket, ClaimedTask] = {}  #: lines whose task waits for others
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="aque-tasks", daemon=True)

    def start(self) -> None:
        """Answer from now on."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._socket.bind("\0" + self._name)
        self._socket.listen(128)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._thread.start()

    def export(self) -> dict[str, Any]:
        """What `adopt` needs in a new image of this process; after `stop`."""
        return {"name": self._name, "keys": dict(self._keys)}

    def adopt(self, exported: dict[str, Any], tasks: Mapping[int, ClaimedTask]) -> None:
        """Be where the image before this one was, for these tasks of its; before `start`."""
        self._name = exported["name"]
        for (task_id, attempt), key in exported["keys"].items():
            if task_id in tasks:
                self._tasks[key] = tasks[task_id]
                self._keys[task_id, attempt] = key

    def stop(self) -> None:
        """Close the line. Tasks that wait ask the new image of this process, if there is one."""
        self._stopping = True
        with suppress(OSError), socket.socket(socket.AF_UNIX) as knock:
            knock.connect("\0" + self._name)
        if self._thread.is_alive():
            self._thread.join(5)

    def open(self, task: ClaimedTask) -> str:
        """The address by which an attempt reaches this worker."""
        key = secrets.token_hex(16)
        self._tasks[key] = task
        self._keys[task.id, task.attempt] = key
        return f"{self._name}:{key}"

    def close(self, task: ClaimedTask) -> None:
        """The attempt has ended: nobody speaks for it any more."""
        self._tasks.pop(self._keys.pop((task.id, task.attempt), ""), None)

    def _run(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select():
                line: Any = key.fileobj
                if line is self._socket:
                    self._accept()
                else:
                    self._read(line)
        self._blocked.clear()
        for line in list(self._received):
            self._drop(line)
        self._selector.close()
        self._socket.close()

    def _accept(self) -> None:
        try:
            line, _ = self._socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(PAUSE_SECONDS)  # who knocks goes on knocking
            return
        line.setblocking(False)
        self._received[line] = b""
        self._strangers[line] = None
        self._selector.register(line, selectors.EVENT_READ)
        if len(self._strangers) > MOST_STRANGERS:
            self._drop(next(iter(self._strangers)))

    def _read(self, line: socket.socket) -> None:
        try:
            piece = line.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        received = self._received[line] + piece
        if not piece or len(received) > LONGEST_LINE:
            self._drop(line)
            return
        *questions, self._received[line] = received.split(b"\n")
        for question in questions:
            try:
                self._answer(line, json.loads(question))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                logger.debug("a line is closed that said what makes no sense: %s", error)
                self._drop(line)
                return
            except Exception:
                logger.exception("a task asked something that could not be answered")
                self._drop(line)
                return

    def _answer(self, line: socket.socket, question: dict[str, Any]) -> None:
        def say(text: str = "") -> None:
            with suppress(OSError):  # who asked has gone
                line.send(text.encode() + b"\n")

        task = self._tasks.get(question["key"])
        if task is None:
            say()  # it has ended, or is about to
            return
        self._strangers.pop(line, None)
        if question["do"] == "block":
            refusal = self._listener.block(task)
            if refusal is None:
                self._blocked[line] = task
            say(refusal or "")
        elif question["do"] == "unblock":
            self._blocked.pop(line, None)
            self._listener.unblock(task, say)
        else:
            # Databases store no NUL bytes and no lone surrogates as text.
            state = str(question["state"])[:LONGEST_STATE].replace("\0", "\\x00")
            meta = json.dumps(question["meta"]).encode()
            self._listener.told(task, state.encode(errors="backslashreplace").decode(), meta)
            say()

    def _drop(self, line: socket.socket) -> None:
        with suppress(KeyError):
            self._selector.unregister(line)
        self._received.pop(line, None)
        self._strangers.pop(line, None)
        if (task := self._blocked.pop(line, None)) is not None:  # whoever waited there has ended, or gone on
            self._listener.unblock(task, lambda: None)
        line.close()
