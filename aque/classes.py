"""The requirement classes as this worker sees them now: what fits, what their files cost here, which limits they take."""

import logging
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from aque import chooser
from aque.chooser import Place
from aque.errors import BadInput
from aque.hints import Cost, io_capacity, limit_of, parse_io_limits
from aque.mounts import Mounts
from aque.resources import Capacity, parse_limits
from aque.settings import Settings
from aque.store import Store, transaction
from aque.values import Requirement

logger = logging.getLogger(__name__)

#: A look at files takes a millisecond or two. So long nothing starts that the class in question might go before.
LOOK_SECONDS = 0.05
#: Classes kept in memory; then all are looked at anew.
CLASSES_KEPT = 4096
#: The limits that there are, are read so often: one that is set for a user counts so much later at most.
LIMITS_SECONDS = 2.0


class Classes:
    """What one worker knows of requirement classes. Nothing here waits for a file system."""

    def __init__(self, store: Store, settings: Settings, place: Place, mounts: Mounts) -> None:
        self._store = store
        self._place = place
        self._mounts = mounts
        self._io_limits = parse_io_limits(settings.io_limits)
        self._needs: dict[int, Capacity] = {}
        self._never: dict[int, bool] = {}
        self._limits: dict[int, Mapping[str, int]] = {}
        self._capacities: dict[str, int] = {}
        self._capacities_read_at = -LIMITS_SECONDS
        self._sources: set[str] = set()  #: whose limit is as this worker's settings want it
        self._missing: dict[int, Mapping[bytes, str]] = {}
        self._asked_at: dict[
            int, float
        ] = {}  #: classes whose files have yet to be looked at, and since when (monotonic)

    @property
    def place(self) -> Place:
        """This worker."""
        return self._place

    def serve(self, queues: frozenset[str]) -> None:
        """It claims from these queues from now on."""
        self._place = replace(self._place, queues=queues)
        self._never = {}  # after the place: who looks meanwhile, in another thread, fills the old one

    def commands_only(self) -> None:
        """It claims nothing more that needs a child of the pool."""
        self._place = replace(self._place, whole=replace(self._place.whole, python_slots=0))
        self._never = {}

    @property
    def missing_paths(self) -> dict[bytes, str]:
        """Paths that tasks require and that this host has not, as of the last looks at their classes: why not."""
        return {path: why for missing in list(self._missing.values()) for path, why in missing.items()}

    def forget_others(self, class_ids: Collection[int]) -> None:
        """Only these classes have ready tasks."""
        self._missing = {class_id: missing for class_id, missing in self._missing.items() if class_id in class_ids}
        self._asked_at = {class_id: since for class_id, since in self._asked_at.items() if class_id in class_ids}

    @property
    def unfit(self) -> list[int]:
        """Those that it can never run, as far as they were seen."""
        return [class_id for class_id, never in self._never.items() if never]

    def need(self, class_id: int) -> Capacity:
        """What a task of this class reserves here."""
        return self._needs[class_id]

    def limits(self, class_id: int) -> Mapping[str, int]:
        """The tokens that a task of this class must hold, as of the last look: also for its user and its files."""
        return self._limits.get(class_id, {})

    def as_seen(self, connection: Any, requirements: Mapping[int, Requirement]) -> dict[int, chooser.Class]:
        """Those of these classes that this worker can run just now. One whose files it has not looked at yet is left out: when
        that has been done, the worker looks again."""
        if len(self._never) > CLASSES_KEPT:
            self._never, self._limits = {}, {}  # not the needs: what was claimed ahead has yet to reserve them
        if time.monotonic() - self._capacities_read_at > LIMITS_SECONDS:
            self._capacities = self._store.limits.capacities(connection)
            self._capacities_read_at = time.monotonic()
        return self._those_that_can(connection, requirements)

    def known(self, requirements: Mapping[int, Requirement]) -> dict[int, chooser.Class]:
        """The same, without a question to the database: who is within a transaction leaves out what needs one."""
        return self._those_that_can(None, requirements)

    def _those_that_can(self, connection: Any, requirements: Mapping[int, Requirement]) -> dict[int, chooser.Class]:
        found = {}
        for class_id, requirement in requirements.items():
            try:
                seen = self._seen(connection, class_id, requirement)
            except BadInput as error:  # in a shared store anybody can write a row; it must not stop the others' tasks
                logger.error("tasks of requirement %d are not claimed: %s", class_id, error)
                self._never[class_id] = True
            else:
                if seen is not None:
                    found[class_id] = seen
        return found

    def _seen(self, connection: Any, class_id: int, requirement: Requirement) -> chooser.Class | None:
        never = self._never
        if class_id not in never:
            place = self._place
            self._needs[class_id] = chooser.need(requirement, place)
            never[class_id] = chooser.why_never(requirement, place) is not None
        if never[class_id]:
            return None
        if requirement.requires_paths:
            missing = self._mounts.missing(requirement.requires_paths)
            self._missing[class_id] = missing or {}
            if missing is None or missing:
                self._is_known(class_id, missing is not None)
                return None
        limits = parse_limits(requirement.limits) if requirement.limits else {}
        if (of_user := f"user:{requirement.user}") in self._capacities:
            limits[of_user] = 1
        cost = Cost.CACHED
        if requirement.places:
            seen = self._mounts.seen(requirement.places)
            if seen is None:
                self._is_known(class_id, False)
                return None
            cost = seen.cost
            for source in seen.sources:
                if (capacity := io_capacity(source, self._io_limits)) is not None:
                    is_set = source in self._sources and limit_of(source) in self._capacities
                    if not is_set and not self._set_limit(connection, source, capacity):
                        return None
                    limits.setdefault(limit_of(source), 1)
        self._is_known(class_id, True)
        self._limits[class_id] = limits
        return chooser.Class(self._needs[class_id], requirement.user, cost, limits)

    def _is_known(self, class_id: int, known: bool) -> None:
        if not known:
            self._asked_at.setdefault(class_id, time.monotonic())
        elif self._asked_at:
            self._asked_at.pop(class_id, None)

    @property
    def is_undecided(self) -> bool:
        """True if a class is left out whose files have yet to be looked at."""
        return bool(self._asked_at)

    @property
    def is_about_to_know(self) -> bool:
        """True if that is a matter of milliseconds: all of them were asked for just now. Where one takes longer, a stream of
        others must not hold everything up."""
        return bool(self._asked_at) and time.monotonic() - min(self._asked_at.values()) < LOOK_SECONDS

    def _set_limit(self, connection: Any, source: str, capacity: int) -> bool:
        """Let the limit of a file system be as this worker's settings say; False: not now, within a transaction."""
        if connection is None:
            return False
        name = limit_of(source)
        self._capacities = self._store.limits.capacities(connection)
        if self._capacities.get(name) != capacity:
            with transaction(connection):
                self._store.limits.set(connection, name, capacity)
            self._capacities[name] = capacity
        self._sources.add(source)
        return True

    def free_tokens(self, connection: Any, classes: Iterable[chooser.Class]) -> dict[str, int]:
        """What is to be had of the limits of these classes; nothing is asked if they have none."""
        return self._store.limits.free(connection, {name for kind in classes for name in kind.limits})
