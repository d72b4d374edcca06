"""Celery's process pool, with children that keep together what they start, and locks that end with their holder.

The children of Celery's blocking pool share one pipe for tasks and one for results, and take turns by semaphores. A child that
is killed while it waits for a task (the kernel's memory killer, `kill -9`, a TERM to the whole process group) has the
semaphore, and nobody could ever take a task again. A record lock is released by the kernel with its holder.
"""

import fcntl
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

from billiard.common import restart_state
from billiard.exceptions import RestartFreqExceeded
from billiard.pool import EX_FAILURE, EX_OK, Pool, Supervisor, Worker
from celery.concurrency import prefork
from celery.utils import timer2

from aque import contain


class ProcessLock:
    """A lock between processes that the kernel releases when its holder dies. Not between threads of one process."""

    def __init__(self) -> None:
        self._file = os.memfd_create("aque-lock", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._file).atexit = False

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Wait for the lock; without `block`, False if it is not free."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX if block else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Let the next one have it."""
        fcntl.lockf(self._file, fcntl.LOCK_UN)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class _Child(Worker):
    def after_fork(self) -> None:
        super().after_fork()
        contain.enter()  # after Celery's part, which has the child die with the worker's thread

    def _make_protected_receive(self, conn: Any) -> Any:
        receive = super()._make_protected_receive(conn)

        def receive_or_end() -> Any:
            try:
                return receive()
            except SystemExit as end:
                # That it should end is no failure, which the log would tell of.
                raise SystemExit(EX_OK if end.code == EX_FAILURE else end.code) from None

        return receive_or_end

    def _do_exit(self, pid: int, exitcode: int | None, exc: Exception | None = None) -> NoReturn:
        """As billiard's, which announces its end and then waits for a TERM: up to a second, if nobody listens any more."""
        try:
            if self.on_exit is not None:
                self.on_exit(pid, (EX_FAILURE if exc else EX_OK) if exitcode is None else exitcode)
        finally:
            os._exit((EX_FAILURE if exc else EX_OK) if exitcode is None else exitcode)


class _Supervisor(Supervisor):
    """Replaces children that have ended, as often as billiard's; but ends when it is told to, and not up to 0.8 s later."""

    def __init__(self, pool: Any) -> None:
        self._over = threading.Event()
        super().__init__(pool)

    def close(self) -> None:
        super().close()
        self._over.set()

    def terminate(self) -> None:
        super().terminate()
        self._over.set()

    def body(self) -> None:
        pool, usual = self.pool, self.pool.restart_state
        try:
            if self._over.wait(0.8):
                return
            pool.restart_state = restart_state(10 * pool._processes, 1)
            for _ in range(10):  # children that cannot start end the worker soon
                pool._maintain_pool()
                if self._over.wait(0.1):
                    return
            pool.restart_state = usual
            while not self._over.wait(0.8):
                pool._maintain_pool()
        except RestartFreqExceeded:
            pool.close()
            pool.join()
            raise


class _Timer(timer2.Timer):
    """Celery's thread for timers; but ends when it is told to, and not up to a second later."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._over = threading.Event()
        super().__init__(*args, **kwargs)

    def _next_entry(self) -> None:
        """Run what is due, or wait: what is returned would be slept."""
        delay = None if self._over.is_set() else super()._next_entry()
        if delay:
            self._over.wait(delay)

    def stop(self) -> None:
        self._over.set()
        with self.not_empty:
            self.not_empty.notify_all()
        super().stop()


#: A task of which no child has said that it has it, though it is not on its way to one any more, is lost after so many looks at
#: least so many seconds apart, if a child has died.
LOOKS = 4
LOOK_SECONDS = 0.5

_maintaining = threading.Lock()


class _Pool(Pool):
    Worker = _Child
    Supervisor = _Supervisor

    def _setup_queues(self) -> None:
        super()._setup_queues()
        self._inqueue._rlock = ProcessLock()
        self._outqueue._wlock = ProcessLock()
        self._has_died = False
        self._looked_at = 0.0
        self._untold: dict[int, int] = {}  #: by job, in how many looks it was with nobody

    def _maintain_pool(self) -> None:
        with _maintaining:  # the pool's own thread does it now and then
            super()._maintain_pool()
            self._find_lost(time.monotonic())

    def _join_exited_workers(self, shutdown: bool = False) -> Any:
        gone = super()._join_exited_workers(shutdown)
        self._has_died = self._has_died or bool(gone)
        return gone

    def _find_lost(self, now: float) -> None:
        """A child that is killed between taking a task and saying so takes it along, and billiard waits for it for ever. It
        is killed so by whoever means the task before, which it has just ended, or by chance."""
        if not self._has_died or now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        is_on_its_way = not self._taskqueue.empty() or self._inqueue._reader.poll()
        jobs = {} if is_on_its_way else {i: job for i, job in list(self._cache.items()) if not job.accepted()}
        self._untold = {i: self._untold.get(i, 0) + 1 for i in jobs}
        for i, looks in self._untold.items():
            if looks == LOOKS:
                self.mark_as_worker_lost(jobs[i], None)
        self._has_died = is_on_its_way or bool(self._untold)


class TaskPool(prefork.TaskPool):
    """Celery's prefork pool of such children, on such locks."""

    BlockingPool: Any = _Pool
    Timer: Any = _Timer
    #: So many children have a function that waits for other tasks: as many more are there in their place.
    lent = 0
    _spare = 0  #: children that were in their place, and are kept for the next
    _was_spare = 0  #: at the last `trim`
    _leaving = 0  #: children that are to end as soon as one has nothing to do

    def on_start(self) -> None:
        """Start the children."""
        self.follow(lambda n: None, lambda remove: remove())
        super().on_start()
        self.grow, self.shrink = self._add, self._remove

    def follow(self, on_grown: Callable[[int], None], when_free: Callable[[Callable[[], None]], None]) -> None:
        """`on_grown` is told of new children; `when_free` is given what removes one, to call it when one has nothing to do."""
        self._on_grown, self._when_free = on_grown, when_free

    def _add(self, n: int = 1) -> None:
        if n < 1:
            raise ValueError(f"a pool grows by 1 child or more, not {n}. Nothing was changed.")
        self._pool.grow(n)
        self.limit += n
        self._on_grown(n)

    def _remove(self, n: int = 1) -> None:
        """Celery's own way is to signal a child that seems idle, which may have taken a task a moment ago."""
        if not 0 < n < self.num_processes:
            raise ValueError(
                f"the pool has {self.num_processes} children, and keeps at least one: it cannot shrink by {n}. "
                "Nothing was changed."
            )
        self._leaving += n
        for _ in range(n):
            self._when_free(self._remove_one)

    def _remove_one(self) -> None:
        self._leaving -= 1
        self.limit -= 1
        self._end_one()

    def _end_one(self) -> None:
        """One child ends as soon as it has nothing to do: whichever takes this message."""
        self._pool._processes -= 1
        self._pool._taskqueue.put(([None], None))

    @property
    def num_processes(self) -> int:
        """Children, without those that are about to end and those that are lent."""
        return int(self._pool._processes) - self._leaving - self.lent - self._spare

    def lend(self) -> None:
        """The function of a child waits for other tasks: there is another child in its place when this returns."""
        self.lent += 1
        if self._spare:
            self._spare -= 1
        else:
            self._pool.grow(1)
            self._pool.maintain_pool()

    def take_back(self) -> None:
        """It waits no longer: one child too many is kept for the next, since one that ends would be missed a moment later."""
        self.lent -= 1
        self._spare += 1

    def trim(self) -> None:
        """End the children that have been too many since the last time. Under the same lock as `lend` and `take_back`."""
        unused, self._was_spare = min(self._spare, self._was_spare), self._spare
        for _ in range(unused):
            self._spare -= 1
            self._end_one()
        self._was_spare = min(self._was_spare, self._spare)

    def tell_children(self, *listeners: Callable[[int], None]) -> None:
        """Call the listeners with the pid of each child that there is and will be."""

        def tell(process: Any) -> None:
            for listener in listeners:
                listener(process.pid)

        self._pool.on_process_up = tell
        for process in list(self._pool._pool):
            tell(process)

    def on_stop(self) -> None:
        """Let the children end. The pool's own clean-up at the exit of the process has nothing left to do after that, and
        takes a second."""
        pool = self._pool
        super().on_stop()
        if pool is not None:
            pool._terminate.cancel()

    def on_terminate(self) -> None:
        """End the children. The pool forgets those that have ended by then, with a descriptor of each."""
        pool = self._pool
        super().on_terminate()
        for process in [] if pool is None else list(pool._pool):
            process.join()
