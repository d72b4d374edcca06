"""Celery's remote control of tasks: `revoke` and `terminate` write the row that `aque kill` writes."""

import logging
from typing import Any

from celery.worker.control import Panel

from aque import control
from aque.errors import UnknownTask
from aque.worker import AqueWorker

logger = logging.getLogger(__name__)

_celery_revoke = Panel.data["revoke"]


def _revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **options: Any) -> Any:
    """Celery's `revoke`: for tasks of the table it writes the row that `aque kill` writes; others go Celery's way."""
    aque: AqueWorker | None = getattr(state.consumer.controller, "aque", None)
    names = [str(i) for i in (task_id if isinstance(task_id, (list, tuple, set)) else [task_id])]
    if aque is None:
        return _celery_revoke(state, task_id, terminate, signal, **options)
    with aque.store.connect() as connection:
        ids = aque.store.ids_of(connection, names)
        known = aque.store.stored_results(connection, ids.values())
    ours = [i for i in ids.values() if i in known]
    if ours:
        try:
            control.kill(aque.store, ours, control.parse_signal(signal or "TERM"), waiting_only=not terminate)
        except UnknownTask as error:
            logger.warning("revoke: %s", error)
    theirs = [name for name in names if ids.get(name) not in known]
    if theirs:
        return _celery_revoke(state, theirs, terminate, signal, **options)
    if terminate and (on := aque.unkillable(ours)):
        which = ", ".join(map(str, on))
        return {"error": f"what runs in the worker's own process cannot be ended, and goes on: {which}"}
    return {"ok": f"tasks {', '.join(map(str, ours))} flagged as revoked"}


def _terminate(state: Any, signal: Any, task_id: Any, **options: Any) -> Any:
    """Celery's `terminate` is `revoke` with a signal."""
    return _revoke(state, task_id, terminate=True, signal=signal, **options)


Panel.data["revoke"] = _revoke
Panel.data["terminate"] = _terminate
