"""Futures of tasks, and the one thread that settles them as their tasks end: one listener and batched queries for all."""

import logging
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent import futures
from contextlib import closing
from signal import SIGTERM
from typing import Any

from celery import Celery

from aque import codec, control
from aque.errors import StoreUnreachable
from aque.farm import farm_of
from aque.handles import Handle, backend_of
from aque.states import ACTIVE_STATES, State
from aque.store import Store, StoredResult
from aque.waiter import Waiter
from aque.within import giving_way

logger = logging.getLogger(__name__)

#: So long the thread waits for another future before it ends, and with it its connection.
LINGER_SECONDS = 2.0
#: Between attempts to reach a database that is away.
AWAY_SECONDS = 1.0


class Future(futures.Future[Any]):
    """The future of a task on the farm, as `concurrent.futures` has them.

    Among the arguments of another task it stands for this one's result, and makes it a dependency.
    """

    def __init__(self, task_id: int, collector: "Collector") -> None:
        super().__init__()
        self.task_id = task_id
        self.withdrawn = False  #: `cancel` asks the store to withdraw it
        self._collector = collector

    @property
    def handle(self) -> Handle:
        """The task, for everything that a future has not: its state, its progress, a kill while it runs."""
        return self._collector.handle(self.task_id)

    def result(self, timeout: float | None = None) -> Any:
        """What the call returned; raises what `.get()` of its handle would. A task that waits here holds no CPUs meanwhile."""
        self._wait(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What `result` would raise; None after a success."""
        self._wait(timeout)
        return super().exception(0)

    def _wait(self, timeout: float | None) -> None:
        if not self.done():
            for _ in giving_way(_looks_at(self, timeout)):
                pass

    def cancel(self) -> bool:
        """Withdraw the task if no worker has it yet, for all who wait for it; False if one has, or it has ended. Asks the
        store."""
        if self.done():
            return self.cancelled()
        return bool(self._collector.withdraw([self]))

    def running(self) -> bool:
        """True if a worker runs the task, as the store has it just now: each call asks."""
        return not self.done() and self._collector.state(self.task_id) in ACTIVE_STATES

    def settle(self, stored: StoredResult) -> None:
        """Its task has ended like this."""
        if stored.state is State.CANCELLED and self.withdrawn:
            self.confirm_cancelled()
            return
        try:
            if stored.state is State.SUCCESS:
                self.set_result(codec.decode_result(stored.value))
                return
            error = codec.exception(stored)
        except Exception as found:
            error = found
        self.set_exception(error)

    def confirm_cancelled(self) -> None:
        """Let all who wait know that it was cancelled."""
        super().cancel()
        self.set_running_or_notify_cancel()


def _looks_at(future: Future, timeout: float | None) -> Iterator[None]:
    """For `giving_way`: a look that has been had already, then the wait."""
    yield
    futures.wait([future], timeout)


codec.register_handle(Future, lambda future: future.task_id)


class Collector:
    """Settles futures as their tasks end, in a thread that lives while there are any.

    The thread is a daemon: what runs on the farm holds up no interpreter's exit.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._changed = threading.Condition()
        self._pending: dict[int, Future] = {}
        self._asked: dict[int, None] = {}  #: of these the thread waits for the ends
        self._thread: threading.Thread | None = None

    def add(self, new: Iterable[Future]) -> None:
        """Settle these, too. Before their tasks are written: one may end at once."""
        with self._changed:
            for future in new:
                self._pending[future.task_id] = future
                self._asked[future.task_id] = None
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="aque-futures", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def forget(self, unsent: Iterable[Future]) -> None:
        """These were not submitted after all."""
        for future in unsent:
            self._take(future.task_id)

    def pending(self) -> list[Future]:
        """Those whose tasks have not ended, as far as is known."""
        with self._changed:
            return list(self._pending.values())

    def withdraw(self, unwanted: Collection[Future]) -> list[Future]:
        """Cancel those of these whose tasks no worker has yet; which they were."""
        for future in unwanted:
            future.withdrawn = True
        withdrawn = set()
        if unwanted:
            ids = [future.task_id for future in unwanted]
            withdrawn = set(control.kill(self._store, ids, SIGTERM, waiting_only=True).cancelled)
        cancelled = []
        for future in unwanted:
            if future.task_id not in withdrawn:
                future.withdrawn = False
                continue
            cancelled.append(future)
            if self._take(future.task_id) is None:
                futures.Future.cancel(future)  # the thread has it, and confirms it
            else:
                future.confirm_cancelled()
        return cancelled

    def state(self, task_id: int) -> State | None:
        """Of a task in the store, just now."""
        with self._store.connect() as connection:
            stored = self._store.stored_results(connection, [task_id]).get(task_id)
        return None if stored is None else stored.state

    def handle(self, task_id: int) -> Handle:
        return Handle(str(task_id), app=self._app, backend=backend_of(self._app))

    @property
    def _store(self) -> Store:
        return farm_of(self._app).store

    def _take(self, task_id: int) -> Future | None:
        """Who takes a future out is who settles it."""
        with self._changed:
            self._asked.pop(task_id, None)
            return self._pending.pop(task_id, None)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                try:
                    self._collect()
                    return
                except StoreUnreachable as error:  # the tasks go on without the database, and so does the wait for them
                    logger.warning("cannot look for the ends of tasks, and try again: %s", error)
                    time.sleep(AWAY_SECONDS)
        except BaseException as error:
            with self._changed:
                self._thread = None
                left, self._pending = self._pending, {}
            for future in left.values():
                future.set_exception(error)
            raise

    def _collect(self) -> None:
        with closing(Waiter(self._store, self._store.ended_results)) as waiter:
            while self._is_wanted():
                for done in waiter.wait(self._asked):  # those that are added meanwhile, too
                    for task_id, stored in done.items():
                        if (future := self._take(task_id)) is not None:
                            future.settle(stored)

    def _is_wanted(self) -> bool:
        """Wait a moment for a future; False if there is none, and then this is not the thread any more."""
        with self._changed:
            if not self._pending:
                self._changed.wait(LINGER_SECONDS)
            if not self._pending:
                self._thread = None
            self._asked = dict.fromkeys(self._pending)
            return bool(self._pending)
