"""Celery's result backend over the table: `.get()`, `.state`, `GroupResult`. It reads; only workers write."""

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from celery.backends.base import BaseBackend as CeleryBackend
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.states import READY_STATES

from aque import codec
from aque.errors import UnknownTask
from aque.farm import farm_of
from aque.states import CELERY_STATE, COMPLETE_STATES, State
from aque.store import StoredResult
from aque.values import Pattern
from aque.waiter import Waiter
from aque.within import giving_way

_waiters = threading.local()


class Backend(CeleryBackend):
    """The table as Celery's results. Waiting is event-driven: a doorbell and one query, not a poll per result."""

    supports_native_join = True
    persistent = True

    def __init__(self, app: Any = None, url: str | None = None, **options: Any) -> None:
        super().__init__(app=app, url=url, **options)

    # -- reading ------------------------------------------------------------------------------------------------------

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        return self._metas([str(task_id)]).get(str(task_id)) or {
            "status": "PENDING",
            "result": None,
            "task_id": task_id,
        }

    def _metas(self, celery_ids: list[str]) -> dict[str, dict[str, Any]]:
        """What Celery calls the meta of each of these tasks that there is."""
        store = farm_of(self.app).store
        with store.connect() as connection:
            ids = store.ids_of(connection, celery_ids)
            found = store.stored_results(connection, ids.values())
            return {
                celery_id: self._meta(celery_id, found[i], store, connection)
                for celery_id, i in ids.items()
                if i in found
            }

    def _meta(self, celery_id: str, stored: StoredResult, store: Any, connection: Any) -> dict[str, Any]:
        result: Any = None
        if stored.state is State.SUCCESS:
            if stored.pattern is Pattern.SHELL:
                result = codec.decode_result(store.values(connection, [stored.id])[stored.id])
            else:
                result = codec.decode_result(stored.value)
        elif stored.state in COMPLETE_STATES:
            result = codec.exception(stored)
        return {
            "status": CELERY_STATE[stored.state],
            "result": result,
            "traceback": codec.decode_error(stored.error)["traceback"] or None,
            "task_id": celery_id,
            "name": stored.name,
            "children": [],
            "date_done": None if stored.finished_at is None else datetime.fromtimestamp(stored.finished_at, UTC),
        }

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
        for _ in giving_way(self._waiter(farm_of(self.app).store).looks(timeout)):
            if on_interval is not None:
                on_interval()
            meta = self._metas([result.id]).get(result.id)
            if meta is None:
                raise UnknownTask([result.id], "It cannot be waited for.")
            if meta["status"] in READY_STATES:
                result._maybe_set_cache(meta)
                return result.maybe_throw(propagate=propagate, callback=callback)
        raise CeleryTimeoutError(f"task {result.id} was not complete after {timeout} seconds.")

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
        store = farm_of(self.app).store
        with store.connect() as connection:
            ids = store.ids_of(connection, celery_ids)
            existing = store.existing(connection, ids.values())
        if unknown := [i for i in celery_ids if ids.get(i) not in existing]:
            raise UnknownTask(unknown, "They cannot be waited for.")
        by_id = {task_id: celery_id for celery_id, task_id in ids.items()}
        left = set(by_id)
        for done in giving_way(self._waiter(store).wait(by_id, timeout)):
            if on_interval is not None:
                on_interval()
            if done:
                left -= done.keys()
                metas = self._metas([by_id[i] for i in done])
                yield from (metas[by_id[i]] for i in done)
        if left:
            raise CeleryTimeoutError(f"{len(left)} of {len(by_id)} tasks were not complete after {timeout} seconds.")

    def _waiter(self, store: Any) -> Waiter:
        """One waiter per thread and store: its doorbell is worth keeping."""
        if getattr(_waiters, "store", None) is not store:
            _waiters.store, _waiters.waiter = store, Waiter(store)
        waiter: Waiter = _waiters.waiter
        return waiter

    # -- what only workers do -----------------------------------------------------------------------------------------

    def store_result(self, task_id: Any, result: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        """Nothing: the worker writes outcomes, in the transaction that releases dependents."""
        return result

    def process_cleanup(self) -> None:
        """Nothing is open in a pool child."""

    def as_uri(self, include_password: bool = False) -> str:
        """Shown in the worker's banner."""
        return "aque:table"
