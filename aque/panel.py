"""Celery's remote control, where it concerns tasks of the table or what Aque adds to a worker.

Each command is Celery's own with Aque's part before or after it: ordinary tasks, and workers without Aque, get exactly what
Celery documents. See docs/brokers.md for what each means for a task of the table.
"""

import logging
import os
import signal as signals
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from celery.utils.functional import maybe_list
from celery.worker.control import Panel

from aque import control
from aque.celery_request import HIDDEN, shown_arguments
from aque.errors import AqueError, UnknownTask
from aque.moments import utc
from aque.pool import TaskPool
from aque.resources import format_cpus
from aque.store import Scheduled, scheduled, stamped
from aque.worker import AqueWorker

logger = logging.getLogger(__name__)

#: `inspect scheduled` shows so many tasks of the table, the earliest: there may be a million.
SHOWN_SCHEDULED = 200

_celery = dict(Panel.data)


def _instead_of(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """In place of Celery's command, and of its alias; what help says of it stays Celery's."""

    def register(command: Callable[..., Any]) -> Callable[..., Any]:
        Panel.data[name] = command
        if alias := Panel.meta[name].alias:
            Panel.data[alias] = command
        return command

    return register


def _aque(state: Any) -> AqueWorker | None:
    return getattr(state.consumer.controller, "aque", None)


# -- ending tasks ---------------------------------------------------------------------------------------------------------


@_instead_of("revoke")
def _revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **options: Any) -> Any:
    """For tasks of the table it writes the row that `aque kill` writes; others go Celery's way."""
    aque = _aque(state)
    names = [str(i) for i in maybe_list(task_id) or []]
    if aque is None:
        return _celery["revoke"](state, names, terminate, signal, **options)
    try:
        with aque.store.connect() as connection:
            ids = aque.store.ids_of(connection, names)
            known = aque.store.stored_results(connection, ids.values())
        _kill(aque, [i for i in ids.values() if i in known], terminate, signal)
    except AqueError as error:
        # Ordinary tasks are revoked all the same, and who asked is told of the others.
        _celery["revoke"](state, names, terminate, signal, **options)
        return {"error": f"tasks of the table were not revoked: {error}"}
    if terminate and (on := aque.unkillable(i for i in ids.values() if i in known)):
        which = ", ".join(map(str, on))
        return {"error": f"what runs in the worker's own process cannot be ended, and goes on: {which}"}
    if theirs := [name for name in names if ids.get(name) not in known]:
        return _celery["revoke"](state, theirs, terminate, signal, **options)
    return {"ok": f"tasks {', '.join(names)} flagged as revoked"}


def _kill(aque: AqueWorker, ids: Iterable[int], terminate: bool, signal: Any) -> None:
    if not (ours := list(ids)):
        return
    try:
        killed = control.kill(aque.store, ours, control.parse_signal(signal or "TERM"), waiting_only=not terminate)
    except UnknownTask as error:  # removed a moment ago
        logger.warning("revoke: %s", error)
        return
    aque.announcer.killed(killed)


@_instead_of("terminate")
def _terminate(state: Any, signal: Any, task_id: Any, **options: Any) -> Any:
    """Celery's `terminate` is `revoke` with a signal."""
    return _revoke(state, task_id, terminate=True, signal=signal, **options)


@_instead_of("revoke_by_stamped_headers")
def _revoke_by_stamped_headers(
    state: Any, headers: Any, terminate: bool = False, signal: Any = None, **options: Any
) -> Any:
    """Of the table, those that bear a stamp now: Celery remembers stamps for tasks that come later, too."""
    wanted = dict(pair.split("=", 1) for pair in headers) if isinstance(headers, (list, tuple)) else dict(headers)
    answer = _celery["revoke_by_stamped_headers"](state, wanted, terminate, signal, **options)
    if (aque := _aque(state)) is None:
        return answer
    stamps = {header: {str(value) for value in maybe_list(values)} for header, values in wanted.items()}
    try:
        with aque.store.connect() as connection:
            found = list(stamped(connection, stamps))
        _kill(aque, found, terminate, signal)
    except AqueError as error:
        return {"error": f"tasks of the table were not revoked: {error}"}
    return {"ok": f"{answer.get('ok', '')}; of the table: {len(found)} tasks"}


# -- questions ------------------------------------------------------------------------------------------------------------


@_instead_of("reserved")
def _reserved(state: Any, **options: Any) -> Any:
    """Celery's: received and not started. Of the table: claimed and not started."""
    found = _celery["reserved"](state, **options)
    if (aque := _aque(state)) is not None:
        found += [aque.runner.request(task).info() for task in aque.scheduler.buffered()]
    return found


@_instead_of("scheduled")
def _scheduled(state: Any, **options: Any) -> Any:
    """Celery's: received with an eta. Of the table: what waits there for a time, in a queue that this worker serves."""
    found = _celery["scheduled"](state, **options)
    if (aque := _aque(state)) is not None:
        with aque.store.connect() as connection:
            waiting = scheduled(connection, aque.queues, SHOWN_SCHEDULED)
        found += [_scheduled_info(aque, task) for task in waiting]
    return found


def _scheduled_info(aque: AqueWorker, task: Scheduled) -> dict[str, Any]:
    args, kwargs, _ = shown_arguments(task.pattern, task.argv, task.arguments)
    if not aque.settings.event_arguments:
        args = kwargs = HIDDEN
    request = {
        "id": task.celery_id or str(task.id),
        "name": task.name,
        "args": args,
        "kwargs": kwargs,
        "type": task.name,
        "hostname": aque.hostname,
        "time_start": None,
        "acknowledged": True,
        "delivery_info": {"exchange": "", "routing_key": task.queue, "priority": task.priority, "redelivered": False},
        "worker_pid": None,
    }
    return {
        "eta": utc(task.not_before).isoformat(),
        "priority": task.priority,
        "request": request,
    }


@_instead_of("query_task")
def _query_task(state: Any, ids: Any, **options: Any) -> Any:
    """What this worker has of these; a task that was submitted with an id of its own is found by either."""
    names = [str(i) for i in maybe_list(ids) or []]
    found = _celery["query_task"](state, names, **options)
    if (aque := _aque(state)) is not None:
        for task in aque.scheduler.buffered():
            found |= {
                name: ("reserved", aque.runner.request(task).info())
                for name in {str(task.id), task.celery_id} & {*names}
            }
        for task in aque.scheduler.running():
            if task.celery_id and str(task.id) in names:
                found |= {str(task.id): answer for answer in _celery["query_task"](state, [task.celery_id]).values()}
    return found


@_instead_of("stats")
def _stats(state: Any, **options: Any) -> Any:
    """With what this worker can reserve, and how much of it is free."""
    found = _celery["stats"](state, **options)
    if (aque := _aque(state)) is not None:
        whole, free = aque.ledger.whole, aque.ledger.free
        found["aque"] = {
            "worker_id": aque.worker_id,
            "store": aque.store.dialect,
            "user": aque.user or "the worker's own",
            "cpus": {"whole": format_cpus(whole.cpus), "free": format_cpus(free.cpus)},
            "memory_bytes": {"whole": whole.memory_bytes, "free": free.memory_bytes},
            "python_slots": {"whole": whole.python_slots, "free": free.python_slots},
            "resources": {"whole": dict(whole.resources), "free": dict(free.resources)},
            "running": len(aque.scheduler.running()),
            "claimed": len(aque.scheduler.buffered()),
            "draining": aque.scheduler.is_drained,
        }
    return found


# -- limits ---------------------------------------------------------------------------------------------------------------


@_instead_of("rate_limit")
def _rate_limit(state: Any, task_name: Any, rate_limit: Any, **options: Any) -> Any:
    """The scheduler reads the task's `rate_limit`: it is only told to look again."""
    answer = _celery["rate_limit"](state, task_name, rate_limit, **options)
    if (aque := _aque(state)) is not None:
        aque.scheduler.look()
    return answer


@_instead_of("time_limit")
def _time_limit(state: Any, task_name: Any = None, hard: Any = None, soft: Any = None, **options: Any) -> Any:
    """For attempts that start from now on; a task that was submitted with limits of its own keeps them. A task of the table
    need not be registered with the worker's app: its module may be one that only the pool's children import."""
    aque = _aque(state)
    if aque is not None and any(limit is not None and not float(limit) > 0 for limit in (soft, hard)):
        return {"error": f"time limits are more than 0 seconds, not soft={soft} hard={hard}: nothing was changed"}
    answer = _celery["time_limit"](state, task_name, hard, soft, **options)
    if aque is not None:
        aque.runner.time_limits[str(task_name)] = (
            None if soft is None else float(soft),
            None if hard is None else float(hard),
        )
        if "error" in answer:
            return {"ok": f"time limits set for tasks of the table; no task {task_name} is registered with this worker"}
    return answer


# -- the pool -------------------------------------------------------------------------------------------------------------


def _resize(command: str, state: Any, n: Any, options: Mapping[str, Any]) -> Any:
    aque = _aque(state)
    if aque is not None and not isinstance(state.consumer.pool, TaskPool):
        pool = type(state.consumer.pool).__module__.rpartition(".")[2]
        return {"error": f"{command} works with the prefork pool, this one is {pool}: nothing was changed"}
    return _celery[command](state, int(n), **options)


@_instead_of("pool_grow")
def _pool_grow(state: Any, n: Any = 1, **options: Any) -> Any:
    """So many Python tasks more at a time, as far as there are CPUs for them."""
    return _resize("pool_grow", state, n, options)


@_instead_of("pool_shrink")
def _pool_shrink(state: Any, n: Any = 1, **options: Any) -> Any:
    """As children get free: nothing that runs is ended."""
    return _resize("pool_shrink", state, n, options)


@_instead_of("pool_restart")
def _pool_restart(state: Any, modules: Any = None, reload: bool = False, reloader: Any = None, **options: Any) -> Any:
    """Where Celery replaces the pool under whatever it runs, the worker restarts in place, as with SIGHUP."""
    if _aque(state) is None or not state.app.conf.worker_pool_restarts:
        return _celery["pool_restart"](state, modules, reload, reloader, **options)
    os.kill(os.getpid(), signals.SIGHUP)
    return {"ok": "the worker restarts in place: commands go on, Python tasks end first"}
