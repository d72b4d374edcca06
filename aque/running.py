"""What a worker runs: an attempt, and what is reserved for it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from aque.resources import Capacity
from aque.values import ClaimedTask


class Running(Protocol):
    """What the scheduler needs of an attempt that runs."""

    @property
    def outlives_worker(self) -> bool:
        """It goes on while the worker's image is replaced."""

    @property
    def can_be_killed(self) -> bool:
        """`kill` will end it."""

    def kill(self, number: int, grace_seconds: float) -> None:
        """End it."""

    def signal(self, number: int) -> None:
        """Deliver a signal."""


@dataclass(slots=True)
class Entry:
    """A task that this worker runs, and what it has reserved for it."""

    task: ClaimedTask
    need: Capacity
    began: float
    attempt: Running | None = None
    kill_signal: int | None = None  #: it is being killed with this
    kill_grace: float = 0.0  #: then: the grace that it was told, in seconds
    kill_at: float = 0.0  #: then: when SIGKILL is due
    lent: Capacity | None = None  #: of `need`, what is free while it waits for other tasks
    waits: int = 0  #: so many of its threads and processes do
    returning: list[Callable[[], None]] = field(default_factory=list)  #: of these, those that would go on

    @property
    def held(self) -> Capacity:
        """What it has reserved just now."""
        return self.need if self.lent is None else self.need - self.lent
