"""Celery's result backend over the table: `.get()`, `.state`, `GroupResult`. It reads; only workers write."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

from celery.app.backends import BACKEND_ALIASES
from celery.backends.base import BaseBackend as CeleryBackend
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult

from aque import codec
from aque.errors import StoreError, UnknownTask
from aque.farm import farm_of
from aque.moments import utc
from aque.states import ACTIVE_STATES, CELERY_STATE, COMPLETE_STATES, State
from aque.store import Call, Store, StoredResult, Tree
from aque.values import Pattern
from aque.within import giving_way

#: So that a `result_backend` can be `aque+` and the URL of a store.
BACKEND_ALIASES["aque"] = "aque.backend:Backend"

#: Ids that are not in the table, and that are waited for nevertheless, are looked for so often.
UNKNOWN_SECONDS = 0.25
#: Results that come to be watched while others are, are watched at the latest after so long.
WATCH_SECONDS = 0.25

logger = logging.getLogger(__name__)


class Backend(CeleryBackend):
    """The table as Celery's results. Waiting is event-driven: a doorbell and one query, not a poll per result."""

    supports_native_join = True
    persistent = True

    def __init__(self, app: Any = None, url: str | None = None, **options: Any) -> None:
        super().__init__(app=app, url=url, **options)
        self._watched: dict[str, list[AsyncResult]] = {}
        self._watching = False
        self._watch_lock = threading.Lock()

    # -- reading ------------------------------------------------------------------------------------------------------

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        found = self._metas([str(task_id)]).get(str(task_id))
        if found is None and farm_of(self.app).settings.unknown_result == "raise":
            raise UnknownTask([task_id], "It has no state.")
        return found or {"status": "PENDING", "result": None, "task_id": task_id}

    def _metas(self, celery_ids: list[str]) -> dict[str, dict[str, Any]]:
        """What Celery calls the meta of each of these tasks that there is."""
        store = farm_of(self.app).store
        with store.connect() as connection:
            ids = store.ids_of(connection, celery_ids)
            found = store.stored_results(connection, ids.values())
            by_id = self._metas_of(connection, store, {i: name for name, i in ids.items()}, found)
        return {celery_id: by_id[i] for celery_id, i in ids.items() if i in by_id}

    def _metas_of(
        self, connection: Any, store: Store, names: Mapping[int, str], found: Mapping[int, StoredResult]
    ) -> dict[int, dict[str, Any]]:
        """The metas of what has been `found`; `names` are Celery's ids."""
        active = [i for i, stored in found.items() if stored.state in ACTIVE_STATES]
        parents = [i for i, stored in found.items() if stored.has_children]
        told = store.told(connection, active) if active else {}
        children = store.children_of(connection, parents) if parents else {}
        calls = store.calls(connection, found) if self.app.conf.result_extended else {}
        metas = {}
        for i, stored in found.items():
            meta = self._meta(names[i], stored, store, connection)
            if i in told:
                meta["status"], meta["result"] = told[i][0], codec.decode_result(told[i][1])
            meta["children"] = [
                AsyncResult(name or str(child), backend=self, app=self.app) for child, name in children.get(i, ())
            ]
            if i in calls:
                meta |= _extended(calls[i])
            metas[i] = meta
        return metas

    def _meta(self, celery_id: str, stored: StoredResult, store: Store, connection: Any) -> dict[str, Any]:
        result: Any = None
        if stored.state is State.SUCCESS:
            if stored.pattern in (Pattern.SHELL, Pattern.GROUP):
                result = codec.decode_result(store.values(connection, [stored.id])[stored.id])
            else:
                result = codec.decode_result(stored.value)
        elif stored.state in COMPLETE_STATES:
            is_failed_group = stored.pattern is Pattern.GROUP and stored.state is State.ERROR
            cause = self._cause(stored.id, store, connection) if is_failed_group else None
            # In a store of one's own an exception's module is imported; where others write, only what is loaded counts.
            result = cause or codec.exception(stored, may_import=not farm_of(self.app).settings.is_shared)
        return {
            "status": CELERY_STATE[stored.state],
            "result": result,
            "traceback": codec.decode_error(stored.error)["traceback"] or None,
            "task_id": celery_id,
            "name": stored.name,
            "retries": stored.failed - (stored.state is State.ERROR and stored.failed > 0),
            "parent_id": None if stored.parent_id is None else str(stored.parent_id),
            "date_done": None if stored.finished_at is None else utc(stored.finished_at),
        }

    def task_result_exists(self, task_id: str) -> bool:
        """True for an id that is in the table, whatever has become of the task."""
        return str(task_id) in self._metas([str(task_id)])

    def _forget(self, task_id: str) -> None:
        """The result goes once nothing that has not ended needs it; the task stays, and its state."""
        store = farm_of(self.app).store
        with store.connect() as connection:
            ids = store.ids_of(connection, [str(task_id)])
        store.retention.forget(ids.values())

    def states(self, celery_ids: list[str]) -> list[str]:
        """Celery's states of these tasks, PENDING of one that there is not; one query for all."""
        if not celery_ids:
            return []
        store = farm_of(self.app).store
        with store.connect() as connection:
            ids = store.ids_of(connection, celery_ids)
            done = store.completed(connection, ids.values())
        return [CELERY_STATE[done[ids[i]]] if ids.get(i) in done else "PENDING" for i in celery_ids]

    def cause(self, celery_id: str) -> Exception | None:
        """The exception of the task whose end made this one end badly; None if there is none."""
        store = farm_of(self.app).store
        with store.connect() as connection:
            ids = store.ids_of(connection, [celery_id])
            return self._cause(ids[celery_id], store, connection) if celery_id in ids else None

    def _cause(self, task_id: int, store: Any, connection: Any) -> Exception | None:
        found = store.groups.cause(connection, task_id)
        stored = store.stored_results(connection, [found]).get(found) if found is not None else None
        return None if stored is None else codec.exception(stored, may_import=not farm_of(self.app).settings.is_shared)

    # -- groups -------------------------------------------------------------------------------------------------------

    def group_tree(self, celery_id: str) -> Tree | None:
        """A group and its members by their ids; None if there is no such group."""
        store = farm_of(self.app).store
        with store.connect() as connection:
            ids = store.ids_of(connection, [celery_id])
            return store.groups.tree(connection, ids[celery_id]) if celery_id in ids else None

    def restore_group(self, group_id: Any, cache: bool = True) -> Any:
        """The group with this id as Celery's GroupResult; None if there is none."""
        tree = self.group_tree(str(group_id))
        return None if tree is None else self._restored(tree)

    def _restored(self, tree: Tree) -> Any:
        group_id, members = tree
        results = [
            AsyncResult(member, app=self.app, backend=self) if isinstance(member, str) else self._restored(member)
            for member in members
        ]
        return self.app.GroupResult(group_id, results)

    def save_group(self, group_id: Any, result: Any) -> Any:
        """Nothing: the table has it."""
        return result

    def delete_group(self, group_id: Any) -> None:
        """Nothing: rows stay until their retention ends."""

    # -- waiting ------------------------------------------------------------------------------------------------------

    def wait_for_pending(
        self,
        result: Any,
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_message: Callable[..., Any] | None = None,
        on_interval: Callable[[], Any] | None = None,
        callback: Callable[..., Any] | None = None,
        propagate: bool = True,
    ) -> Any:
        """Block until the task of `result` is complete; raises Celery's TimeoutError, UnknownTask, or what the task did."""
        self._ensure_not_eager()
        (meta,) = self._wait([result.id], timeout, on_interval)
        if on_message is not None:
            on_message(meta)
        result._maybe_set_cache(meta)
        return result.maybe_throw(propagate=propagate, callback=callback)

    def iter_native(
        self,
        result: Any,
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_message: Callable[..., Any] | None = None,
        on_interval: Callable[[], Any] | None = None,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """(id, meta) of each task of a ResultSet as it completes."""
        self._ensure_not_eager()
        for meta in self._wait([node.id for node in result.results], timeout, on_interval):
            if on_message is not None:
                on_message(meta)
            yield meta["task_id"], meta

    def _wait(
        self, celery_ids: list[str], timeout: float | None, on_interval: Callable[[], Any] | None
    ) -> Iterator[dict[str, Any]]:
        """The metas of these tasks as they end. Raises Celery's TimeoutError, or UnknownTask as the settings say."""
        if not celery_ids:
            return
        farm = farm_of(self.app)
        store = farm.store
        end = None if timeout is None else time.monotonic() + timeout
        unknown, names = celery_ids, dict[int, str]()
        while True:
            with store.connect() as connection:
                ids = store.ids_of(connection, unknown)
                existing = store.existing(connection, ids.values()) if ids else set()
            unknown = [i for i in unknown if ids.get(i) not in existing]
            names |= {task_id: name for name, task_id in ids.items() if task_id in existing}
            if unknown and farm.settings.unknown_result != "wait":
                raise UnknownTask(unknown, f"{'It' if len(unknown) == 1 else 'They'} cannot be waited for.")
            left = None if end is None else max(0.0, end - time.monotonic())
            step = left if not unknown else UNKNOWN_SECONDS if left is None else min(left, UNKNOWN_SECONDS)
            if unknown and not names:
                time.sleep(step or 0)
            # An exception keeps all that it has passed, and what waits also listens: not until it is forgotten.
            with closing(farm.waiter.wait(list(names), step)) as ends:
                for done in giving_way(ends):
                    if on_interval is not None:
                        on_interval()
                    if done:
                        with store.connect() as connection:
                            metas = self._metas_of(connection, store, names, done)
                        for task_id in done:
                            del names[task_id]
                        yield from metas.values()
            if not names and not unknown:
                return
            if end is not None and time.monotonic() >= end:
                n = len(names) + len(unknown)
                what = f"task {celery_ids[0]} was" if len(celery_ids) == 1 else f"{n} of {len(celery_ids)} tasks were"
                raise CeleryTimeoutError(f"{what} not complete after {timeout} seconds.")

    def watch(self, result: AsyncResult) -> None:
        """Let `result` know when its task has ended, from a thread: one for all that are watched, as long as there are any."""
        with self._watch_lock:
            self._watched.setdefault(str(result.id), []).append(result)
            if self._watching:
                return
            self._watching = True
        threading.Thread(target=self._watch, name="aque-results", daemon=True).start()

    def _watch(self) -> None:
        while True:
            with self._watch_lock:
                ids = list(self._watched)
                if not ids:
                    self._watching = False
                    return
            try:
                for meta in self._wait(ids, WATCH_SECONDS, None):
                    self._tell(meta)
            except CeleryTimeoutError:
                pass  # others may have come to be watched
            except UnknownTask as error:
                with self._watch_lock:
                    for task_id in error.ids:
                        self._watched.pop(str(task_id), None)
            except StoreError:
                time.sleep(WATCH_SECONDS)
            except Exception:
                logger.exception("watching results failed")
                time.sleep(WATCH_SECONDS)

    def _tell(self, meta: dict[str, Any]) -> None:
        with self._watch_lock:
            results = self._watched.pop(meta["task_id"], ())
        for result in results:
            try:
                result._maybe_set_cache(dict(meta))  # which calls back
            except Exception:
                logger.exception("a callback of task %s failed", meta["task_id"])

    # -- what only workers do -----------------------------------------------------------------------------------------

    def store_result(self, task_id: Any, result: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        """Nothing: the worker writes outcomes, in the transaction that releases dependents."""
        return result

    def process_cleanup(self) -> None:
        """Nothing is open in a pool child."""

    def as_uri(self, include_password: bool = False) -> str:
        """Shown in the worker's banner."""
        return "aque:table"


def _extended(call: Call) -> dict[str, Any]:
    """What Celery's `result_extended` adds."""
    args, kwargs = None, None
    if call.arguments is not None:
        try:
            args, kwargs = codec.decode_arguments(call.arguments, {})
        except Exception:  # they cannot be read here: a type that is not known. The rest can.
            pass
    return {"args": args, "kwargs": kwargs, "queue": call.queue, "worker": call.worker}
