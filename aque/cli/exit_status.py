"""The end of a task as an exit status and as a sentence, the way shells, `env` and `timeout` have them. Pure."""

import json
from collections.abc import Sequence
from signal import Signals
from typing import Any

from aque.states import Reason, State
from aque.store import StoredResult

TIMED_OUT = 124
NEVER_RAN = 125
CANNOT_EXECUTE = 126
NOT_FOUND = 127
SIGNALLED = 128
INTERRUPTED = 130

_BY_REASON = {
    Reason.TIME_LIMIT: TIMED_OUT,
    Reason.CANNOT_EXECUTE: CANNOT_EXECUTE,
    Reason.CANNOT_ENTER_CWD: CANNOT_EXECUTE,
    Reason.CANNOT_OPEN: CANNOT_EXECUTE,
    Reason.CANNOT_BECOME_USER: CANNOT_EXECUTE,
    Reason.NOT_FOUND: NOT_FOUND,
}
_NOT_STARTED = _BY_REASON.keys() - {Reason.TIME_LIMIT}

#: It ran, and said itself that nothing is to come of it: what it raised.
_WITHDRAWN = {Reason.IGNORED: "Ignore", Reason.REJECTED: "Reject"}


def exit_status(end: StoredResult) -> int:
    """The exit status that stands for the end of this task."""
    if end.state is State.SUCCESS:
        return 0
    if end.state is State.CANCELLED and end.reason in _WITHDRAWN:
        return 1
    if end.state in (State.CANCELLED, State.SKIPPED):
        return NEVER_RAN
    if end.reason in _BY_REASON:
        return _BY_REASON[end.reason]
    if end.signal is not None:
        return SIGNALLED + end.signal
    if end.state is State.KILLED:
        return end.exit_code or SIGNALLED + Signals.SIGTERM
    return end.exit_code or 1


def xargs_status(ends: Sequence[StoredResult]) -> int:
    """What xargs exits with after these commands, in their order: the first that stops it decides, else whether any failed."""
    stopping = [status for status in map(stop_status, ends) if status]
    if stopping:
        return stopping[0]
    return 123 if any(end.state is not State.SUCCESS for end in ends) else 0


def stop_status(end: StoredResult) -> int:
    """The status with which xargs stops after a command that ended so; 0 if it goes on.

    126 and 127 only for a command that could not be started: one that exits with 127 itself has failed like any other.
    """
    if end.state is State.SUCCESS:
        return 0
    if end.state is State.ERROR:
        if end.reason in _NOT_STARTED:
            return _BY_REASON[end.reason]
        if end.signal is None and end.exit_code is not None and end.reason is not Reason.TIME_LIMIT:
            return 124 if end.exit_code == 255 else 0
    return 125


def sentence(end: StoredResult) -> str | None:
    """Why the task did not succeed, for people; None if it did, or if it is a command that has said so itself."""
    said = ""
    if end.state is State.SUCCESS or (end.reason is Reason.EXIT and end.error is None):
        return None
    if end.state is State.CANCELLED and end.reason in _WITHDRAWN:
        said = f"was withdrawn by itself: it raised {_WITHDRAWN[end.reason]}"
    elif end.state is State.CANCELLED and end.reason is Reason.EXPIRED:
        said = "was cancelled: it was not started in time"
    elif end.state is State.CANCELLED:
        said = "was cancelled before it ran"
    elif end.state is State.SKIPPED:
        said = "was skipped: what it depends on did not end as it needs"
    elif end.state is State.KILLED:
        said = f"was killed{_by(end.signal)}"
    elif end.reason is Reason.SIGNAL and end.error is None:
        said = f"was ended{_by(end.signal)}"
    elif end.reason is Reason.TIME_LIMIT:
        said = "was ended by its time limit"
    elif end.reason is Reason.WORKER_LOST:
        said = "was given up: the processes that ran it died too often"
    elif end.reason is Reason.DEPENDENCY:
        said = "failed: not all of its members succeeded"
    if said:
        return f"task {end.id} {said}."
    detail = error_text(end.error) or str(end.reason or end.state)
    return f"task {end.id} failed: {detail}"


def error_text(stored: bytes | None) -> str:
    """A stored error in a line, `ValueError: bad`; "" if there is none."""
    try:
        error: Any = json.loads(stored or b"null")
    except ValueError:
        return ""
    if not isinstance(error, dict):
        return ""
    kind = str(error.get("type") or "").removeprefix("builtins.")
    message = str(error.get("message") or "").strip().partition("\n")[0]
    return message if kind in ("", "CommandFailed") else f"{kind}: {message}"


def _by(signal: int | None) -> str:
    if signal is None:
        return ""
    try:
        return f" by {Signals(signal).name}"
    except ValueError:
        return f" by signal {signal}"
