"""How long a task that is submitted is expected to take, by what the store says of past runs."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from aque import durations
from aque.durations import RunTime
from aque.store import Store
from aque.values import Pattern, TaskSpec

#: What has been read of run times is believed for so long.
KNOWN_SECONDS = 30.0


class Expectations:
    """Expected durations by what the store says; what was read is kept for a while."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._run_times: dict[str, tuple[float, RunTime | None]] = {}  #: with when it was read
        self._priorities: dict[int, tuple[float, float]] = {}  #: average seconds, with when it was read

    def of(self, connection: Any, specs: Sequence[TaskSpec]) -> dict[int, float]:
        """By id, for those without a duration of their own. Nothing is read if all of them have one, or are groups."""
        asked = [spec for spec in specs if not spec.duration and spec.requirement.pattern is not Pattern.GROUP]
        if not asked:
            return {}
        known = self._read(connection, {durations.key(spec.name) for spec in asked if not spec.relative_duration})
        return {
            spec.id: spec.relative_duration * self._average(connection, spec.priority, known)
            if spec.relative_duration
            else durations.expected(spec.name, spec.io_bytes, known)
            for spec in asked
        }

    def _read(self, connection: Any, names: set[str]) -> dict[str, RunTime]:
        names |= {durations.ALL, durations.SIZED}
        now = time.monotonic()
        kept = self._run_times
        if missing := [name for name in names if name not in kept or now - kept[name][0] > KNOWN_SECONDS]:
            if len(kept) > durations.NAMES:
                kept.clear()
                missing = list(names)
            found = self._store.run_times.read(connection, missing)
            kept.update({name: (now, found.get(name)) for name in missing})
        return {name: run_time for name in names if (run_time := kept[name][1]) is not None}

    def _average(self, connection: Any, priority: int, known: Mapping[str, RunTime]) -> float:
        now = time.monotonic()
        read, seconds = self._priorities.get(priority, (-math.inf, 0.0))
        if now - read > KNOWN_SECONDS:
            found = self._store.run_times.average_of_priority(connection, priority)
            if found is None:
                everything = known.get(durations.ALL)
                found = durations.UNKNOWN_SECONDS if everything is None else everything.seconds
            seconds = found
            self._priorities[priority] = (now, seconds)
        return seconds
