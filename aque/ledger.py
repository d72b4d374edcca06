"""The ledger of one worker: what is reserved and what is free. Never more than the whole, whoever asks at once."""

import threading
from collections import deque
from collections.abc import Callable

from aque.resources import Capacity


class Ledger:
    """Thread-safe reservations, and a line for those who must have their turn: ordinary Celery tasks."""

    def __init__(self, whole: Capacity) -> None:
        self.whole = whole
        self._free = whole
        self._lock = threading.Lock()
        self._line: deque[tuple[Capacity, Callable[[], None]]] = deque()

    @property
    def free(self) -> Capacity:
        """What is free now, less what the first in line waits for: later ones must not overtake it for ever."""
        with self._lock:
            return self._free_behind_line()

    def _free_behind_line(self) -> Capacity:
        if not self._line:
            return self._free
        return (self._free - self._line[0][0]).without_debts()

    @property
    def is_over_budget(self) -> bool:
        """More is reserved than there is: after a restart with fewer CPUs, until enough has ended."""
        with self._lock:
            return self._free.is_overdrawn

    def adopt(self, need: Capacity) -> None:
        """Reserve `need` for what runs already, whether or not it is free."""
        with self._lock:
            self._free = self._free - need

    def enlarge(self, more: Capacity) -> None:
        """There is so much more from now on."""
        with self._lock:
            self.whole = self.whole + more
        self.release(more)

    def write_off(self, reserved: Capacity) -> None:
        """What is reserved here is not there any more."""
        with self._lock:
            self.whole = self.whole - reserved

    def try_reserve(self, need: Capacity) -> bool:
        """Reserve `need` if it is free."""
        with self._lock:
            if self._free_behind_line().lacking(need) is not None:
                return False
            self._free = self._free - need
            return True

    def release(self, need: Capacity) -> None:
        """Give a reservation back; starts what waited in line for it."""
        with self._lock:
            self._free = self._free + need
            starts = self._serve()
        for start in starts:
            start()

    def in_turn(self, need: Capacity, start: Callable[[], None]) -> None:
        """Call `start` with `need` reserved: now, or as soon as it is free and those before have been served."""
        with self._lock:
            self._line.append((need, start))
            starts = self._serve()
        for begin in starts:
            begin()

    def _serve(self) -> list[Callable[[], None]]:
        starts = []
        while self._line and self._free.lacking(self._line[0][0]) is None:
            need, start = self._line.popleft()
            self._free = self._free - need
            starts.append(start)
        return starts
