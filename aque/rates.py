"""How often tasks of a name may start on this worker: Celery's `rate_limit`, as token buckets of one token. Pure: no clock."""

from collections.abc import Callable


class Rates:
    """The buckets of one worker. `now` is in seconds on a clock that never goes back."""

    def __init__(self, ordered: Callable[[str], float | None] = lambda name: None) -> None:
        """`ordered`: tasks of a name per second, as a person has ordered here; 0: as many as there are; None: what the tasks
        themselves say (`learn`)."""
        self._ordered = ordered
        self._own: dict[str, float] = {}
        self._next: dict[str, float] = {}  #: of a name: when the next may start

    def learn(self, name: str, rate: float) -> bool:
        """A task of this name says how often such tasks may start. True: that was not known."""
        is_new = self._own.get(name) != rate
        self._own[name] = rate
        return is_new

    def take(self, name: str, now: float) -> bool:
        """True if a task of this name may start now; then it is counted."""
        rate = self._rate(name)
        if rate <= 0:
            return True
        if self._next.get(name, now) > now:
            return False
        self._next[name] = now + 1 / rate
        return True

    def is_limited(self, name: str) -> bool:
        """True if tasks of this name must not start whenever they could."""
        return self._rate(name) > 0

    def exhausted(self, now: float) -> frozenset[str]:
        """Names of which none may start now."""
        return frozenset(name for name, at in self._next.items() if at > now and self.is_limited(name))

    def next_at(self, now: float) -> float | None:
        """When the next of the exhausted may start."""
        return min((self._next[name] for name in self.exhausted(now)), default=None)

    def _rate(self, name: str) -> float:
        ordered = self._ordered(name)
        return self._own.get(name, 0.0) if ordered is None else ordered
