"""What a running task asks of its worker: the task's end of the worker's line, see `taskserver`.

A task knows its worker from AQUE_WORKER: the name of a socket and a key that is this attempt's alone.
"""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from aque import current
from aque.errors import BadInput

#: A line that a worker does not answer for so long is dead. Waiting for CPUs is not bounded.
ANSWER_SECONDS = 30.0
#: A worker that restarts is back within a few seconds; one that has ended ends its tasks.
RESTART_SECONDS = 10.0


@contextmanager
def blocked(address: str | None) -> Iterator[None]:
    """The task waits for others meanwhile: its CPUs, and its place in the pool, are free until the end of the block, which
    waits until it has them again. `address` is its worker's, None: this is no task, or of a worker that does not listen,
    and nothing happens.

    Raises BadInput if its worker lets no more tasks wait like that.
    """
    line = None if address is None else _connect(address)
    if line is None:
        yield
        return
    with line:
        if refusal := _ask(line, {"key": _key(address), "do": "block"}):
            raise BadInput(refusal)
        try:
            yield
        finally:
            line.settimeout(None)
            question = {"key": _key(address), "do": "unblock"}
            if _ask(line, question) is None and (again := _connect_again(address)) is not None:
                with again:  # the worker has restarted
                    _ask(again, question)


def tell(address: str | None, state: str, meta: Any) -> bool:
    """Record what the task tells of itself: a state of its own naming, and anything that JSON has. False: nobody
    listens. Raises TypeError or ValueError."""
    line = None if address is None else _connect(address)
    if line is None:
        return False
    with line:
        _ask(line, {"key": _key(address), "do": "tell", "state": state, "meta": meta})
    return True


def _key(address: str | None) -> str:
    return (address or "").rpartition(":")[2]


def _connect(address: str) -> socket.socket | None:
    line = socket.socket(socket.AF_UNIX)
    line.settimeout(ANSWER_SECONDS)
    try:
        line.connect("\0" + address.rpartition(":")[0])
    except OSError:  # the worker has ended, or restarted
        line.close()
        return None
    return line


def _connect_again(address: str | None) -> socket.socket | None:
    until = time.monotonic() + RESTART_SECONDS
    while (line := _connect(address or "")) is None and time.monotonic() < until:
        time.sleep(0.2)
    if line is not None:
        line.settimeout(None)
    return line


def _ask(line: socket.socket, question: dict[str, Any]) -> str | None:
    """The answer: empty if all is well. None: the line is broken, the worker has gone."""
    answer = b""
    with suppress(OSError):
        line.sendall(json.dumps(question, allow_nan=False).encode() + b"\n")
        while not answer.endswith(b"\n"):
            piece = line.recv(4096)
            if not piece:
                break
            answer += piece
    return answer.decode(errors="replace").strip() if answer.endswith(b"\n") else None


def own_address() -> str | None:
    """Of the worker of the task that this code is part of."""
    return current.variables().get("AQUE_WORKER")
