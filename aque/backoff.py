"""What a worker does not claim for a while, because its host could not start the like of it. Pure: no clock, no database.

A directory that is not mounted here, a user that is not known here, is no fault of the task: another host may have them. A
task that was refused is left to others for a while; so is a job of which three tasks were refused, as a whole, and a
requirement class of which tasks of three jobs were. When that time is over, the next one is a probe: it is refused, and the
time is twice as long; or it succeeds, and all is as before.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from aque.words import listed

#: So many refused tasks of a job, or jobs of a requirement class, stand for all of it.
ENOUGH = 3
#: The longest back-off, in first ones.
LONGEST = 16
#: Of what is avoided so many sentences are said, and how many more there are.
SENTENCES = 10


@dataclass(frozen=True, slots=True)
class Avoided:
    """What is not claimed now. The tasks of avoided jobs are not listed again."""

    tasks: frozenset[int] = frozenset()
    jobs: frozenset[int] = frozenset()
    classes: frozenset[int] = frozenset()

    def includes(self, class_id: int, job_id: int, task_id: int) -> bool:
        """True if this task is not to be claimed."""
        return class_id in self.classes or job_id in self.jobs or task_id in self.tasks


NOTHING_AVOIDED = Avoided()


@dataclass(slots=True)
class _Wait:
    until: float
    seconds: float  #: how long it is in all
    why: str


@dataclass(slots=True)
class _Kin:
    """What was refused of a job (tasks) or of a class (jobs) since something of it has succeeded."""

    refused: set[int]
    wait: _Wait | None = None


class Backoff:
    """The back-offs of one worker. `now` is in seconds on a clock that never goes back; it may differ from wall time."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: the first back-off; each that follows is twice as long, up to `LONGEST` times."""
        self._seconds = seconds
        self._tasks: dict[int, tuple[int, int, _Wait]] = {}  #: with job and class; the last refused comes last
        self._jobs: dict[int, _Kin] = {}
        self._classes: dict[int, _Kin] = {}
        self._known = NOTHING_AVOIDED
        self._known_until = math.inf

    def refused(self, class_id: int, job_id: int, task_id: int, why: str, now: float) -> None:
        """A task could not be started here: `why`, as a sentence part. What ran beside it when a back-off began, and is
        refused after it, makes it no longer."""
        self._forget(now)
        _, _, wait = self._tasks.pop(task_id, (0, 0, None))
        self._tasks[task_id] = job_id, class_id, self._extended(wait, why, now)
        for group, key, member in ((self._jobs, job_id, task_id), (self._classes, class_id, job_id)):
            kin = group.setdefault(key, _Kin(set()))
            kin.refused.add(member)
            if kin.wait is not None or len(kin.refused) >= ENOUGH:
                kin.wait = self._extended(kin.wait, why, now)
        self._known_until = -math.inf

    def succeeded(self, class_id: int, job_id: int) -> None:
        """A task has succeeded here: its job and its class can run here. Tasks that were refused themselves still wait."""
        for group, key in ((self._jobs, job_id), (self._classes, class_id)):
            if key in group:
                del group[key]
                self._known_until = -math.inf

    def avoided(self, now: float) -> Avoided:
        """What is not to be claimed now; the same object as long as nothing has changed."""
        if now >= self._known_until:
            jobs = frozenset(i for i, kin in self._jobs.items() if _holds(kin.wait, now))
            classes = frozenset(i for i, kin in self._classes.items() if _holds(kin.wait, now))
            tasks = {i for i, (job, _, wait) in self._tasks.items() if job not in jobs and _holds(wait, now)}
            found = Avoided(frozenset(tasks), jobs, classes)
            self._known = self._known if found == self._known else found
            self._known_until = min((wait.until for wait in self._waits() if wait.until > now), default=math.inf)
        return self._known

    def next_change(self, now: float) -> float | None:
        """When the next back-off ends; None: there is none."""
        self.avoided(now)
        return None if self._known_until == math.inf else self._known_until

    def sentences(self, now: float, wall: float) -> tuple[str, ...]:
        """What is avoided, why, and until when, for people; the widest first. `wall` is `now` in seconds since 1970."""
        avoided = self.avoided(now)
        lines: dict[tuple[str, str, str], set[int]] = {}

        def add(what: str, wait: _Wait, ids: Iterable[int]) -> None:
            until = f"{datetime.fromtimestamp(wall + wait.until - now, UTC):%H:%M} UTC"
            lines.setdefault((what, wait.why, until), set()).update(ids)

        for class_id in sorted(avoided.classes):
            kin = self._classes[class_id]
            if kin.wait is not None:
                add("all that needs the same as ", kin.wait, kin.refused)
        hidden = {job for class_id in avoided.classes for job in self._classes[class_id].refused}
        for job_id in sorted(avoided.jobs - hidden):
            wait = self._jobs[job_id].wait
            if wait is not None:
                add("", wait, [job_id])
        for task_id in sorted(avoided.tasks):
            job_id, _, wait = self._tasks[task_id]
            if job_id not in hidden:
                add("task", wait, [task_id])
        found = [_sentence(what, sorted(ids), why, until) for (what, why, until), ids in lines.items()]
        more = len(found) - SENTENCES
        return (*found[:SENTENCES], *([f"and {more} more"] if more > 0 else []))

    def _waits(self) -> list[_Wait]:
        kins = [*self._jobs.values(), *self._classes.values()]
        return [wait for _, _, wait in self._tasks.values()] + [kin.wait for kin in kins if kin.wait is not None]

    def _extended(self, wait: _Wait | None, why: str, now: float) -> _Wait:
        if wait is None:
            return _Wait(now + self._seconds, self._seconds, why)
        if _holds(wait, now):
            return wait
        seconds = min(2 * wait.seconds, LONGEST * self._seconds)
        return _Wait(now + seconds, seconds, why)

    def _forget(self, now: float) -> None:
        """What was refused so long ago that even the longest back-off is over again: others have run it meanwhile."""
        while self._tasks:
            task_id, (job_id, class_id, wait) = next(iter(self._tasks.items()))
            if now < wait.until + LONGEST * self._seconds:
                return
            del self._tasks[task_id]
            for group, key, member in ((self._jobs, job_id, task_id), (self._classes, class_id, job_id)):
                kin = group.get(key)
                if kin is None or (group is self._classes and job_id in self._jobs):
                    continue
                kin.refused.discard(member)
                if not kin.refused:
                    del group[key]


def _holds(wait: _Wait | None, now: float) -> bool:
    return wait is not None and now < wait.until


def _sentence(what: str, ids: list[int], why: str, until: str) -> str:
    noun, prefix = ("task", "") if what == "task" else ("job", what)
    return f"{prefix}{noun}{'s' if len(ids) > 1 else ''} {listed(ids)}: {why} (until {until})"
