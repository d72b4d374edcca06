"""wait: for tasks to complete, woken by the doorbell; many tasks cost one query, not one each."""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from aque.doorbell import DONE, Doorbell
from aque.states import State
from aque.store import Store

#: A lost ring costs at most this many seconds.
SAFETY_SECONDS = 1.0
#: After a look in vain rings are ignored for a moment, at most this long; it doubles from look to look.
LONGEST_PAUSE = 0.05
VAIN_SECONDS = 0.00025
#: Only so many tasks are asked for at once: of 100,000 that are waited for, few can have ended since the last look.
WINDOW = 1000


class Waiter:
    """Waits for tasks of one store. Not for several threads at once; `close` it after use."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._bell: Doorbell | None = None

    def wait(self, ids: Iterable[int], timeout: float | None = None) -> Iterator[dict[int, State]]:
        """Yield the tasks that have completed since the last time, until none is left or `timeout` seconds are over.

        May yield an empty dictionary now and then, so that the caller can look at something else.
        """
        left = dict.fromkeys(ids)
        for _ in self.looks(timeout, lambda: len(left)):
            done: dict[int, State] = {}
            with self._store.connect() as connection:
                window = list(islice(left, WINDOW))
                while window:
                    found = self._store.completed(connection, window)
                    done |= found
                    for task_id in found:
                        del left[task_id]
                    # All of a window ended: so may have many of the next.
                    window = list(islice(left, WINDOW)) if len(found) == len(window) else []
            yield done
            if not left:
                return

    def looks(self, timeout: float | None, waiting: Callable[[], int] = lambda: 1) -> Iterator[None]:
        """One item for every time that it is worth to look: now, and whenever a task may have completed; the last one when
        `timeout` seconds are over. `waiting` tells how many tasks are waited for."""
        end = None if timeout is None else time.monotonic() + timeout
        self._listen()
        vain = 0
        while True:
            began = time.monotonic()
            yield
            now = time.monotonic()
            if end is not None and now >= end:
                return
            # A look costs the database something. With many to wait for, spend at most a third of the time on looking; with
            # one, do not look at once for every ring of somebody else's task.
            vain += 1
            pause = 2 * (now - began) if waiting() > 1 else VAIN_SECONDS * (2 ** min(vain, 10) - 2)
            self._sleep(min(pause, LONGEST_PAUSE), end)

    def _listen(self) -> None:
        if self._bell is None:
            with self._store.connect():  # raises StoreUnreachable where the doorbell raises the database's own errors
                self._bell = Doorbell(self._store.engine, [DONE])

    def _sleep(self, pause: float, end: float | None) -> None:
        if pause > 0:
            time.sleep(pause)
        wait = SAFETY_SECONDS if end is None else max(0.0, min(SAFETY_SECONDS, end - time.monotonic()))
        assert self._bell is not None
        try:
            self._bell.wait(wait)
        except ConnectionResetError:
            self._bell.close()
            self._bell = None
            self._listen()

    def close(self) -> None:
        """Stop listening."""
        if self._bell is not None:
            self._bell.close()
            self._bell = None
