"""How long tasks are expected to run: what was measured, by name, and what is told to the order of the ready tasks. Pure.

explicit > average of past successful runs of the same name, scaled by the size of the io_paths where both sizes are known
> size x the farm's seconds per byte > 0, unknown
"""

import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from aque.errors import BadInput

#: The row of all runs, and that of all runs with a known size: names that no task has, see `key`.
ALL, SIZED = "", "1"
#: How fast an average follows a single run.
SMOOTHING = 0.3
#: How many names a farm remembers; so many at most are collected between two writes.
NAMES = 10_000
#: "1x" is so long where nothing at all is known.
UNKNOWN_SECONDS = 60.0
LARGEST_MULTIPLE = 1000
_KEY_CHARACTERS = 200  #: an index entry has at most 2,700 bytes on PostgreSQL
_DIGITS = re.compile(r"[0-9]+")
_MULTIPLE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9})\s*x", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RunTime:
    """The averages of a name, as stored."""

    seconds: float
    io_bytes: float | None  #: size of the io_paths; None: of no run is it known


@dataclass(frozen=True, slots=True)
class Runs:
    """Successful runs of one name that are to be added to its averages."""

    name: str
    count: int
    seconds: float  #: of one, on average
    sized: int  #: of how many the size is known
    io_bytes: float | None  #: of one of these, on average

    @property
    def weight(self) -> float:
        """What the old average moves towards these: as if they had come one by one."""
        return 1 - (1 - SMOOTHING) ** self.count

    @property
    def io_weight(self) -> float:
        """The same for the size."""
        return 1 - (1 - SMOOTHING) ** self.sized


@lru_cache(maxsize=4096)
def key(name: str) -> str:
    """The name under which the run times of tasks are kept: frame_0012 and frame_0013 are one, frame_0."""
    return _DIGITS.sub("0", name)[:_KEY_CHARACTERS]


def expected(name: str, io_bytes: int, known: Mapping[str, RunTime]) -> float:
    """Expected seconds of a task without an explicit duration; 0: unknown. `known` is by `key`, with ALL and SIZED."""
    if (found := known.get(key(name))) is not None:
        return found.seconds * io_bytes / found.io_bytes if io_bytes and found.io_bytes else found.seconds
    sized = known.get(SIZED)
    return io_bytes * sized.seconds / sized.io_bytes if sized is not None and sized.io_bytes else 0.0


def multiple(text: str) -> float:
    """The number of "2x" or "0.5x". Raises BadInput."""
    match = _MULTIPLE.fullmatch(text.strip())
    if match is None or not 0 < float(match[1]) <= LARGEST_MULTIPLE:
        raise BadInput(
            f"cannot read the duration {text!r:.60}: write seconds, or how many times the average of its priority as in '2x', "
            f"more than 0 and at most {LARGEST_MULTIPLE}. Nothing was submitted."
        )
    return float(match[1])


class Tally:
    """Collects the successful runs of one worker until they are written. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, list[float]] = {}  #: count, seconds, sized, bytes

    def add(self, name: str, seconds: float, io_bytes: int) -> None:
        """A run of `seconds`; `io_bytes` 0: its size is not known."""
        kept = (ALL, SIZED, key(name)) if io_bytes else (ALL, key(name))
        with self._lock:
            for known in kept:
                if (sums := self._sums.get(known)) is None:
                    if len(self._sums) >= NAMES:
                        continue
                    sums = self._sums[known] = [0, 0.0, 0, 0.0]
                sums[0] += 1
                sums[1] += seconds
                sums[2] += io_bytes > 0
                sums[3] += io_bytes

    def put(self, runs: Iterable[Runs]) -> None:
        """Runs that were taken and not written, by the image before this one."""
        with self._lock:
            for one in runs:
                known = self._sums.setdefault(one.name, [0, 0.0, 0, 0.0])
                new = (one.count, one.count * one.seconds, one.sized, one.sized * (one.io_bytes or 0.0))
                known[:] = [before + more for before, more in zip(known, new, strict=True)]

    def take(self) -> list[Runs]:
        """What has been added since the last call."""
        with self._lock:
            sums, self._sums = self._sums, {}
        return [
            Runs(name, int(count), seconds / count, int(sized), total / sized if sized else None)
            for name, (count, seconds, sized, total) in sums.items()
        ]
