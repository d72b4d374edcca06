"""Keep the processes that Python tasks start together, and leave none of them behind.

In a child of the pool: it is a subreaper, so that whatever loses its parents below it comes to it, and after an attempt it
kills what the attempt has left. In the worker: it is the next subreaper, and kills what a child that died has left.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from aque.processes import (
    HAS_LISTS,
    become_subreaper,
    children_of_all,
    descendants,
    end_descendants,
    is_over,
    leave_none,
    prctl,
    reaped,
    send_signal,
)

PR_SET_PDEATHSIG = 1
_NOBODY: frozenset[int] = frozenset()


class _Here:
    """What is known of this process."""

    is_pool_child = False


# -- in a child of the pool -------------------------------------------------------------------------------------------------


def enter() -> None:
    """From now on this process is a child of the pool whose attempts leave nothing behind.

    It no longer dies with the worker's thread that forked it, as Celery has it: that would free what it has started. The
    supervisors' server ends it when the worker ends.
    """
    become_subreaper()
    prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
    _Here.is_pool_child = True


def is_pool_child() -> bool:
    """True in a process that runs one attempt at a time, and nothing else."""
    return _Here.is_pool_child


def _has_children() -> bool:
    """1 us, where a look at the lists of children takes 12. A subreaper with a descendant has a child."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def present() -> frozenset[int]:
    """The descendants of this pool child; before an attempt: those that it is not to be blamed for."""
    return frozenset(descendants(os.getpid())) if _Here.is_pool_child and _has_children() else _NOBODY


def leave_nothing(spared: frozenset[int], grace_seconds: float = 0.0) -> None:
    """Kill every descendant of this pool child but those in `spared`; with a grace, those that have not ended by then."""
    if not _Here.is_pool_child or not _has_children():
        return

    def left() -> list[int]:
        return [pid for pid in descendants(os.getpid()) if pid not in spared]

    # A soft time limit is for the function, which is over.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        until = time.monotonic() + grace_seconds
        while time.monotonic() < until and not all(is_over(pid) or reaped(pid) for pid in left()):
            time.sleep(0.01)
        leave_none(left, reap=True)
        signal.sigtimedwait({signal.SIGUSR1}, 0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# -- in the worker ----------------------------------------------------------------------------------------------------------


def is_child(pid: int) -> bool:
    """True for a child of this process that has not ended."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def below(pid: int) -> list[int]:
    """What this pool child has started, parents first."""
    return descendants(pid) if is_child(pid) else []


def signal_all(pids: Iterable[int], number: int) -> None:
    """Those that there still are get the signal."""
    for pid in pids:
        send_signal(pid, number)


def end_below(pid: int) -> None:
    """Stop a pool child, and kill all that it has started."""
    if is_child(pid):
        end_descendants(pid)


def wait(pid: int) -> None:
    """Until this child has ended; it is not reaped."""
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


class Strangers:
    """Processes that came to this worker when a child of its pool, or a supervisor without a server, died. They are killed.

    A stranger is a child of the worker that is none of these: a process of the pool, a supervisor or their server (`others`),
    one that code in the worker itself has started. The latter are known by a look at the worker's children while all of the
    former live: nothing can have lost its parents then. A process that such code starts between two looks can be taken for
    a stranger, if its parent is the main thread and a pool child dies before the next look.
    """

    def __init__(self, others: Callable[[], Iterable[int]]) -> None:
        become_subreaper()
        self._others = others
        self._lock = threading.Lock()
        #: A process of the pool -> its pidfd, and whether it was dead at the last look and what it left was killed.
        self._pool: dict[int, int] = {}
        self._settled: set[int] = set()
        self._own: set[int] = set()
        #: Of `others`, those that were children of this process at the last look.
        self._near: set[int] = set()

    def watch(self, pid: int) -> None:
        """This process belongs to the pool."""
        with self._lock, suppress(OSError):
            if (before := self._pool.get(pid)) is not None:
                os.close(before)
            self._settled.discard(pid)
            self._pool[pid] = os.pidfd_open(pid)

    def look(self) -> None:
        """Note the worker's own children; or, if a process has died that may have left something, kill that.

        Does not wait: `end` does.
        """
        if not self._lock.acquire(blocking=False):
            return  # they are being killed just now
        try:
            near = set(self._children())
            others = set(self._others())
            dead = self._dead()
            if not dead and not any(map(is_over, self._near)):
                self._near = near & others
                self._own = near - others - self._pool.keys()
            else:
                self._kill(dead, 0.0)
        finally:
            self._lock.release()

    def end(self) -> None:
        """Kill all strangers, and wait until they are gone."""
        with self._lock:
            self._kill(self._dead(), float("inf"))

    def _kill(self, dead: set[int], patience_seconds: float) -> None:
        mine = self._own | self._pool.keys() | set(self._others()) | self._near

        def look() -> list[int]:
            strangers = [pid for pid in self._children() if pid not in mine]
            return strangers + [below for pid in strangers for below in descendants(pid)]

        leave_none(look, patience_seconds, reap=True)
        if not look():
            self._settled |= dead
            for pid in self._near:
                reaped(pid)  # a supervisor whose server died: nobody else would
            self._near = {pid for pid in self._near if not is_over(pid)}

    def _dead(self) -> set[int]:
        """Processes of the pool that have ended and whose remains have not been killed; the others that nobody waits for any
        more are forgotten."""
        dead = set()
        for pid, pidfd in list(self._pool.items()):
            try:
                ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            except ChildProcessError:
                if pid in self._settled:  # and the pool has reaped it
                    os.close(self._pool.pop(pid))
                    self._settled.discard(pid)
                    continue
                ended = True
            if ended and pid not in self._settled:
                dead.add(pid)
        return dead

    def _children(self) -> list[int]:
        """The children of the main thread: the kernel gives it the orphans. Those of other threads are the worker's own."""
        me = os.getpid()
        if not HAS_LISTS:
            return children_of_all().get(me, [])
        with open(f"/proc/self/task/{me}/children", "rb") as file:
            return [int(pid) for pid in file.read().split()]
