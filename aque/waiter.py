"""wait: for tasks to complete, woken by the doorbell; all that one process waits for costs one listener and one query.

Whichever of the waiting threads comes first listens, and looks on behalf of the others; when it has what it wanted, the
next one takes over. So a process needs no thread for it, and one thread alone waits as fast as it can.
"""

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Generic, TypeVar

from aque.doorbell import DONE, Doorbell
from aque.errors import StoreUnreachable
from aque.store import Store

T = TypeVar("T")

#: A lost ring costs at most this many seconds.
SAFETY_SECONDS = 1.0
#: Who has looked in vain ignores rings for a moment, which doubles from look to look, up to this many seconds, or, after a
#: long wait, up to that share of it, at most LATE_SECONDS: so late may one hear of a task that took minutes.
LONGEST_PAUSE = 0.05
VAIN_SECONDS = 0.00025
LATE_SHARE = 0.02
LATE_SECONDS = 0.25
#: Only so many tasks are asked for at once: of 100,000 that are waited for, few can have ended since the last look.
WINDOW = 1000
#: A listener that nobody reads is closed after so long: rings would fill its socket, and then PostgreSQL's queue.
IDLE_SECONDS = 10.0


class _Wait(Generic[T]):
    """What one caller waits for."""

    def __init__(self, ids: Iterable[int], wake: threading.Condition) -> None:
        self.left = ids if isinstance(ids, dict) else dict.fromkeys(ids)
        self.done: dict[int, T] = {}
        self.wake = wake
        self.began = time.monotonic()
        self.look_at = self.began  #: not before
        self.rung = False  #: since the last look
        self.follows = False  #: its thread sleeps until the leader has something for it, or leaves
        self._vain = 0

    def window(self) -> list[int]:
        return list(islice(self.left, WINDOW))

    def turn(self, window: list[int]) -> None:
        """What has not ended of this window goes behind all others: each has its turn."""
        if len(self.left) > WINDOW:
            for task_id in window:
                if task_id in self.left:
                    self.left[task_id] = self.left.pop(task_id)

    def take(self, found: Mapping[int, T]) -> None:
        for task_id in found.keys() & self.left.keys():
            self.done[task_id] = found[task_id]
            del self.left[task_id]

    def pace(self, took_seconds: float, was_in_vain: bool) -> None:
        """Say when to look again: a look costs the database something. With many to wait for, spend at most a third of the
        time on looking, and let about one look in three find something; with one, do not look at once for every ring of
        somebody else's task."""
        self._vain = self._vain + 1 if was_in_vain else max(0, self._vain - 2)
        now = time.monotonic()
        longest = max(LONGEST_PAUSE, min(LATE_SECONDS, LATE_SHARE * (now - self.began)))
        pause = VAIN_SECONDS * (2 ** min(self._vain, 12) - 2) if self._vain else 0.0
        if len(self.left) > 1:
            pause = max(pause, 2 * took_seconds)
        self.look_at = now + min(pause, longest)


class Waiter(Generic[T]):
    """Waits for tasks of one store, for any number of threads of one process. `close` it after use, or leave it.

    `look` is the query: those of some tasks that have ended, and what it tells about them.
    """

    def __init__(self, store: Store, look: Callable[[Any, Iterable[int]], Mapping[int, T]]) -> None:
        self._store = store
        self._ended = look
        # Reentrant: the garbage collector may end a wait that nobody goes on with, in whichever thread it runs.
        self._lock = threading.RLock()
        self._waits: list[_Wait[T]] = []
        self._leader: _Wait[T] | None = None
        self._bell: Doorbell | None = None
        self._used_at = 0.0
        self._timer: threading.Timer | None = None
        self._is_given_up = False

    def wait(self, ids: Iterable[int], timeout: float | None = None) -> Generator[dict[int, T], None, None]:
        """Yield the tasks that have completed since the last time, until none is left or `timeout` seconds are over.

        `ids` may be a dictionary to which others add meanwhile; what has ended is taken out of it.
        Yields an empty dictionary now and then, at least once a second, so that the caller can look at something else.
        Raises StoreUnreachable.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._waiting(ids) as wait:
            self._look([wait])  # by itself: what has ended already needs no other thread
            while True:
                with self._lock:
                    done, wait.done = wait.done, {}
                yield done
                if not wait.left and not wait.done:
                    return
                if end is not None and time.monotonic() >= end:
                    return
                self._step(wait, end)

    @contextmanager
    def _waiting(self, ids: Iterable[int]) -> Iterator[_Wait[T]]:
        wait: _Wait[T] = _Wait(ids, threading.Condition(self._lock))
        with self._lock:
            self._listen()  # before the first look: what ends after it rings
            self._waits.append(wait)
            if self._leader is not None:
                self._leader.wake.notify()
        try:
            yield wait
        finally:
            with self._lock:
                self._waits.remove(wait)
                self._used_at = time.monotonic()
                if not self._waits:
                    self._rest()

    def _step(self, wait: _Wait[T], end: float | None) -> None:
        """Until something of `wait` is done, `end` has come, or a second is over."""
        until = time.monotonic() + SAFETY_SECONDS
        until = until if end is None else min(until, end)
        try:
            with self._lock:
                wait.follows = True
                while self._leader is not None and not wait.done and time.monotonic() < until:
                    wait.wake.wait(until - time.monotonic())
                wait.follows = False
                if wait.done or self._leader is not None:
                    return
                self._leader = wait
            self._lead(wait, until)
        finally:
            with self._lock:
                if self._leader is wait:
                    self._leader = None
                    if heir := next((w for w in self._waits if w.follows and not w.done), None):
                        heir.wake.notify()

    def _lead(self, wait: _Wait[T], until: float) -> None:
        while not wait.done:
            now = time.monotonic()
            if now >= until:
                self._look([w for w in self._open() if w is wait or w.look_at <= now])
                return
            waits = self._open()
            if due := [w for w in waits if w.rung and w.look_at <= now]:
                self._look(due)
            elif any(w.look_at <= now for w in waits):
                if self._hear(min([until, *(w.look_at for w in waits if w.rung)])):
                    for w in self._open():
                        w.rung = True
            else:  # whatever rings meanwhile can be heard later
                self._sleep(wait, min([until, *(w.look_at for w in waits)]))

    def _open(self) -> list[_Wait[T]]:
        with self._lock:
            return [wait for wait in self._waits if wait.left]

    def _sleep(self, leader: _Wait[T], moment: float) -> None:
        """Until then, or until another begins to wait."""
        with self._lock:
            leader.wake.wait(max(0.0, moment - time.monotonic()))

    def _look(self, waits: list[_Wait[T]]) -> None:
        """One query for all of them, or more as long as whole windows have ended."""
        began = time.monotonic()
        for wait in waits:
            wait.rung = False
        asked, before = set(waits), {wait: len(wait.left) for wait in waits}
        with self._store.connect() as connection:
            while asked:
                with self._lock:
                    windows = {wait: wait.window() for wait in asked}
                wanted = list(dict.fromkeys(task_id for window in windows.values() for task_id in window))
                found = self._ended(connection, wanted) if wanted else {}
                with self._lock:
                    for wait in asked:
                        wait.take(found)
                        wait.turn(windows[wait])
                        if wait.done:
                            wait.wake.notify()
                # All of a window ended: so may have many of the next.
                asked = {w for w in asked if w.left and all(task_id in found for task_id in windows[w])}
        took = time.monotonic() - began
        for wait in waits:
            wait.pace(took, len(wait.left) == before[wait])

    # -- listening ----------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if self._bell is None:
            try:
                with (
                    self._store.connect()
                ):  # raises StoreUnreachable where the doorbell raises the database's own errors
                    self._bell = Doorbell(self._store.engine, [DONE])
            except ConnectionResetError as error:  # the server went away just now
                raise StoreUnreachable(f"cannot wait: {error}. The tasks go on.") from error

    def _hear(self, until: float) -> bool:
        """Wait for a ring; False: none came until then."""
        with self._lock:
            self._listen()
            bell = self._bell
        assert bell is not None
        try:
            return bool(bell.wait(max(0.0, until - time.monotonic())))
        except ConnectionResetError:
            self.close()
            with self._store.connect():  # raises StoreUnreachable if it stays away
                return True

    def _rest(self) -> None:
        """Nobody waits now."""
        if self._is_given_up:
            self.close()
        # At the interpreter's exit the garbage collector ends waits that nobody has gone on with, and the start of a thread
        # would wait for ever: none runs any more.
        elif self._timer is None and not sys.is_finalizing():
            self._close_later(IDLE_SECONDS)

    def _close_later(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._close_if_idle)
        self._timer.daemon, self._timer.name = True, "aque-waiter"
        self._timer.start()

    def _close_if_idle(self) -> None:
        with self._lock:
            self._timer = None
            if self._waits:
                return
            rest = self._used_at + IDLE_SECONDS - time.monotonic()
            if rest > 0:
                self._close_later(rest)
            elif self._bell is not None:
                self._bell.close()
                self._bell = None

    def give_up(self) -> None:
        """Stop listening once nobody waits: the store is not used any more."""
        with self._lock:
            self._is_given_up = True
            if not self._waits:
                self.close()

    def close(self) -> None:
        """Stop listening; another wait listens anew."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._bell is not None:
                self._bell.close()
                self._bell = None
