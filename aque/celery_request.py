"""A row as a Celery request: what Celery's bookkeeping (`inspect active`, events, signals) sees of a task of Aque's."""

import json
from collections.abc import Sequence
from typing import Any

from celery.utils.saferepr import saferepr
from celery.worker.request import Request

from aque.values import ClaimedTask, Pattern

#: Of the arguments, as events and `inspect` show them.
SHOWN = 1024
#: What stands for arguments that nobody is to see, see setting event_arguments.
HIDDEN = "[hidden]"


class Row:
    """A row where Celery's Request expects a message."""

    content_type = "application/json"
    content_encoding = "utf-8"

    def __init__(self, task: ClaimedTask, shows_arguments: bool) -> None:
        self.body = task.arguments
        self.payload: tuple[Any, Any, dict[str, Any]] = (
            shown_arguments(task.pattern, task.argv, task.arguments) if shows_arguments else (HIDDEN, HIDDEN, {})
        )
        uuid = task.celery_id or str(task.id)
        self.headers = {
            **(task.extra.get("headers") or {}),
            "id": uuid,
            "task": task.name,
            # The child must not touch any backend; see `attempt.Attempt._request_dict` for the task's wish.
            "ignore_result": True,
            "lang": "py",
            "retries": task.failed,
            "stamps": task.extra.get("stamps") or {},
            "stamped_headers": task.extra.get("stamped_headers") or [],
            "argsrepr": saferepr(self.payload[0], SHOWN) if shows_arguments else HIDDEN,
            "kwargsrepr": saferepr(self.payload[1], SHOWN) if shows_arguments else HIDDEN,
            "root_id": str(task.job_id),
            "parent_id": None if task.parent_id is None else str(task.parent_id),
            "timelimit": (task.time_limit_seconds, task.soft_time_limit_seconds),
        }
        self.delivery_info = {"routing_key": task.queue, "exchange": "", "redelivered": False}
        self.properties = {"priority": task.priority, "correlation_id": uuid}


class RowRequest(Request):
    """A Celery request whose acknowledgement, revocation and end belong to the table."""

    acknowledged = True

    def send_event(self, kind: str, **fields: Any) -> None:
        """Name the state: to Celery's monitors one that they do not know, of `task-ready`, goes before STARTED."""
        if kind == "task-started":
            fields["state"] = "STARTED"
        super().send_event(kind, **fields)

    def revoked(self) -> bool:
        """Never: a kill is in the row, and was looked up when the task was claimed."""
        return False

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Celery's `revoke(terminate=True)` has already written the row (see `aque.panel`)."""

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """A lost broker connection is no reason to stop a task."""

    def acknowledge(self) -> None:
        """There is no message to acknowledge."""


def shown_arguments(pattern: Pattern, argv: Sequence[bytes], arguments: bytes) -> tuple[Any, Any, dict[str, Any]]:
    """(args, kwargs, embedded) for Celery's eyes: decoded without kombu's types, which only the child needs."""
    if pattern is Pattern.SHELL:
        return [word.decode(errors="backslashreplace") for word in argv[:64]], {}, {}
    try:
        args, kwargs = json.loads(arguments)
    except Exception:  # the child will say what is wrong with them
        return [], {}, {}
    return args, kwargs, {}
