"""Celery's pools `threads` and `solo`, whose functions run in the worker's own process.

Nothing outside of a function can end it there. What Celery's own lack: whatever a function does, somebody hears of its end;
and a function of the pool `solo` does not keep Celery's consumer from its work.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.concurrency import solo, thread

logger = logging.getLogger(__name__)


class InProcess:
    """What the two have in common."""

    name: str
    limit: int
    #: Celery's flag that forbids a task to wait for others is one for the process: threads would set it for each other.
    task_join_will_block = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        #: Nobody waits any more for what runs: it has been given back, or cannot be.
        self.is_abandoned = False
        self._calls = 0
        self._idle = threading.Condition()

    @property
    def is_busy(self) -> bool:
        """A function runs, or is about to."""
        return self._calls > 0

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """Nothing: the process is the worker's. Celery asks for it when an ordinary task is revoked while it runs."""
        logger.warning("a function that runs in the worker's own process cannot be ended: it goes on")

    def wait(self) -> None:
        """Until nothing runs, or it has been abandoned."""
        with self._idle:
            self._idle.wait_for(lambda: not self._calls or self.is_abandoned)

    def abandon(self) -> None:
        """Let nobody wait for what runs."""
        with self._idle:
            self.is_abandoned = True
            self._idle.notify_all()

    def _called(
        self, target: Callable[..., Any], args: Any, kwargs: Any, callbacks: dict[str, Any]
    ) -> Callable[[], None]:
        """What the pool's thread has to do."""
        with self._idle:
            self._calls += 1

        def call() -> None:
            try:
                _call(target, args or (), kwargs or {}, **callbacks)
            except Exception:
                logger.exception("the end of a function was not understood")
            finally:
                with self._idle:
                    self._calls -= 1
                    self._idle.notify_all()

        return call


class ThreadPool(InProcess, thread.TaskPool):
    """A thread for each function that runs at a time."""

    name = "threads"
    #: So many functions wait for other tasks, and as many more may run in their place.
    lent = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Celery's current app is each thread's own.
        enter = None if self.app is None else self.app.set_current
        self.executor = ThreadPoolExecutor(self.limit, "aque-python", enter)

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Any = None,
        kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        error_callback: Any = None,
        **_: Any,
    ) -> Any:
        """Run it in one of the threads."""
        callbacks = {"callback": callback, "accept_callback": accept_callback, "error_callback": error_callback}
        future: Future[None] = self.executor.submit(self._called(target, args, kwargs, callbacks))
        return thread.ApplyResult(future)

    def lend(self) -> None:
        """A function waits for other tasks: there is a thread more in its place."""
        self.lent += 1
        self.executor._max_workers += 1

    def take_back(self) -> None:
        """It waits no longer. Its thread's stand-in stays, and has nothing to do: the ledger bounds what runs."""
        self.lent -= 1
        self.executor._max_workers -= 1

    def on_stop(self) -> None:
        """Wait for what runs, unless it was abandoned."""
        self.wait()
        self.executor.shutdown(wait=not self.is_abandoned, cancel_futures=True)

    def on_terminate(self) -> None:
        """End the threads that do nothing."""
        self.executor.shutdown(wait=False, cancel_futures=True)


class SoloPool(InProcess, solo.TaskPool):
    """One function at a time, in the thread that has started the worker: for libraries that want the main thread."""

    name = "solo"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._work: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self.on_apply = self._on_apply

    def _on_apply(
        self,
        target: Callable[..., Any],
        args: Any = None,
        kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        error_callback: Any = None,
        **_: Any,
    ) -> None:
        callbacks = {"callback": callback, "accept_callback": accept_callback, "error_callback": error_callback}
        self._work.put(self._called(target, args, kwargs, callbacks))

    def serve(self, start: Callable[[], None]) -> None:
        """Run the worker, which `start` does in a thread beside this one, and its functions in this one."""
        if self.app is not None:
            self.app.set_current()

        def run() -> None:
            try:
                start()
            finally:
                self._work.put(None)

        beside = threading.Thread(target=run, name="aque-consumer", daemon=True)
        beside.start()
        while (work := self._work.get()) is not None:
            work()
        beside.join()

    def do(self, work: Callable[[], object]) -> None:
        """Have the thread that serves do this, and wait for it. Before anything else runs."""
        done: Future[object] = Future()

        def call() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        self._work.put(call)
        done.result()

    def on_stop(self) -> None:
        """Wait for what runs, unless it was abandoned."""
        self.wait()


def _call(
    target: Callable[..., Any],
    args: Any,
    kwargs: Any,
    callback: Callable[[Any], object] | None,
    accept_callback: Callable[[int, float], object] | None,
    error_callback: Callable[[Any], object] | None,
) -> None:
    if accept_callback is not None:
        accept_callback(os.getpid(), time.monotonic())
    try:
        value = target(*args, **kwargs)
    except BaseException:  # the thread is the pool's: it goes on
        if error_callback is not None:
            error_callback(ExceptionInfo())
    else:
        if callback is not None:
            callback(value)


def in_process(pool: type) -> type:
    """The pool in place of Celery's own `threads` or `solo`; any other as it is."""
    return {thread.TaskPool: ThreadPool, solo.TaskPool: SoloPool}.get(pool, pool)
