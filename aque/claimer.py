"""claim: look at what is ready, choose what fits here, take it."""

import time
from bisect import insort
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from aque import chooser
from aque.backfill import Hold, forecast
from aque.backoff import NOTHING_AVOIDED
from aque.classes import LOOK_SECONDS, Classes
from aque.rates import Rates
from aque.resources import Capacity
from aque.roomkeeper import RoomKeeper, Running
from aque.settings import Settings
from aque.states import State
from aque.store import Store
from aque.values import ClaimedTask, ReadyTask, Requirement

#: Ready tasks read in a look, about, and of a requirement class at least and at most. (200 classes of 256 tasks each took
#: 400 ms to read, of 4 each 6 ms.)
ROWS = 512
FEWEST, MOST = 4, 256
#: What runs for each user is read so often at most.
USAGE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Picked:
    """What a look found: tasks to start, short tasks to claim ahead, whether there is more than that, and in how many seconds
    something that waits for a time need not wait any more (None: nothing does); and whether something was left out because its
    files have yet to be looked at."""

    start: list[ReadyTask]
    ahead: list[ReadyTask]
    more: bool
    again_in: float | None = None
    is_undecided: bool = False


class Claimer:
    """Chooses for one worker. `seconds` gives the measured run time of tasks with a name, or None."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        classes: Classes,
        seconds: Callable[[str], float | None],
        rates: Rates | None = None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._classes = classes
        self._seconds = seconds
        self._keeper = RoomKeeper(store, settings)
        self._window = ROWS // 64  #: tasks read of a class; the first look does not know how many classes there are
        self._usage: dict[str, Fraction] = {}
        self._usage_read_at = 0.0
        self._waiting_priority: int | None = None  #: the highest of what the last look left; None: nothing
        self._is_contended = False  #: several users had something ready at the last look
        #: What this host could not start lately; whoever looks sets it before.
        self.avoided = NOTHING_AVOIDED
        self._rates = Rates() if rates is None else rates

    @property
    def is_holding(self) -> bool:
        """True while this worker keeps room for a task: nothing is claimed ahead of it."""
        return self._keeper.is_holding

    def look(self, connection: Any, worker_id: int, free: Capacity, running: Running, buffered: int) -> Picked:
        """Read what is ready, outside of any transaction, and choose: nothing is claimed yet. `running` tells what runs here,
        if that is asked."""
        now = self._store.now(connection)
        spent = self._rates.exhausted(time.monotonic())
        found = self._store.candidates(connection, self._classes.unfit, self._window, self.avoided, spent)
        cut = {class_id for class_id, row in found.items() if len(row) >= self._window}
        self._window = min(max(ROWS // max(len(found), 1), FEWEST), MOST)
        requirements = self._store.requirements(connection, found)
        self._classes.forget_others(requirements)
        classes = self._classes.as_seen(connection, requirements)
        if self._classes.is_about_to_know:
            return Picked([], [], True, LOOK_SECONDS, True)
        ready: dict[int, list[ReadyTask]] = {}
        due: list[float] = []
        for class_id in classes:
            here, until = self._at_home(found[class_id], requirements[class_id], now)
            ready[class_id] = here
            due += [] if until is None else [until]
        tokens = self._classes.free_tokens(connection, classes.values())
        choice = self._choose(connection, worker_id, ready, classes, cut, tokens, free, running, now)
        start, held_back = self._at_their_rates(choice.start)
        chosen = {task.id for task in start}
        rest = {class_id: [task for task in row if task.id not in chosen] for class_id, row in ready.items()}
        self._waiting_priority = max((row[0].priority for row in rest.values() if row), default=None)
        ahead: list[ReadyTask] = []
        if not self.is_holding:
            usage = self._usage if self._is_contended else None
            slots = self._classes.place.whole.python_slots
            ahead = chooser.ahead(rest, classes, tokens, usage, self._seconds, buffered, slots)
            ahead = [task for task in ahead if not self._rates.is_limited(task.name)]
        more = bool(cut) or sum(map(len, rest.values())) > len(ahead)
        due += [now] if choice.is_cut or held_back else []
        if (next_at := self._rates.next_at(time.monotonic())) is not None:
            due.append(now + max(0.0, next_at - time.monotonic()))
        is_undecided = self._classes.is_undecided
        return Picked(start, ahead, more, min(due) - now if due else None, is_undecided)

    def _at_their_rates(self, tasks: Sequence[ReadyTask]) -> tuple[list[ReadyTask], bool]:
        """Those that may start now, and whether there are others."""
        now = time.monotonic()
        start = [task for task in tasks if self._rates.take(task.name, now)]
        return start, len(start) < len(tasks)

    def _choose(
        self,
        connection: Any,
        worker_id: int,
        ready: dict[int, list[ReadyTask]],
        classes: dict[int, chooser.Class],
        cut: Container[int],
        tokens: Mapping[str, int],
        free: Capacity,
        running: Running,
        now: float,
    ) -> chooser.Choice:
        usage = self._read_usage(connection, classes)

        def choose(hold: Hold | None) -> chooser.Choice:
            return chooser.choose(
                ready,
                classes,
                free,
                MOST,
                now=now,
                tokens=tokens,
                usage=usage,
                hold=hold,
                seconds=self._seconds,
                cut=cut,
            )

        hold = self._hold(connection, worker_id, ready, classes, tokens, free, running, now)
        choice = choose(hold)
        if choice.blocked:
            starving = chooser.starving(
                ready,
                classes,
                choice,
                lambda: [busy.need for busy in running()],
                now,
                self._settings.reserve_after_seconds,
            )
            if hold is not None:
                starving = [task for task in starving if task.priority > hold.priority]
            if another := self._keeper.consider(connection, worker_id, starving, free, running, now):
                choice = choose(another)
        if usage is not None:
            for task in choice.start:  # until it is read again
                kind = classes[task.class_id]
                usage[kind.user] = usage.get(kind.user, Fraction(0)) + chooser.weight(kind.need.cpus)
        return choice

    def _hold(
        self,
        connection: Any,
        worker_id: int,
        ready: dict[int, list[ReadyTask]],
        classes: dict[int, chooser.Class],
        tokens: Mapping[str, int],
        free: Capacity,
        running: Running,
        now: float,
    ) -> Hold | None:
        """What this worker keeps room for, if it could start here as soon as there is room; `ready` then holds it."""
        task = self._keeper.kept(connection, worker_id)
        if task is None:
            return None
        kind = classes.get(task.class_id)
        is_avoided = self.avoided.includes(task.class_id, task.job_id, task.id)
        if kind is None or is_avoided or chooser.why_no_token(kind.limits, tokens):
            self._keeper.give_up(connection, worker_id)
            return None
        row = ready.setdefault(task.class_id, [])
        if task.id not in {one.id for one in row}:  # longer ones of its class stand before all that was read
            insort(row, task, key=chooser.order)
        return Hold(task.id, task.priority, forecast(kind.need, free, running(), now))

    def _read_usage(self, connection: Any, classes: dict[int, chooser.Class]) -> dict[str, Fraction] | None:
        """The CPUs that run for each user, if several have something ready and share the farm."""
        self._is_contended = self._settings.is_fair and len({kind.user for kind in classes.values()}) > 1
        if not self._is_contended:
            return None
        if time.monotonic() - self._usage_read_at > USAGE_SECONDS:
            self._usage = self._store.usage(connection)
            self._usage_read_at = time.monotonic()
        return self._usage

    def choose_released(self, connection: Any, released: Sequence[ReadyTask], free: Capacity) -> list[ReadyTask]:
        """Of tasks that this very transaction has released, those that fit here and that no higher priority waits before: a
        chain needs no second look. Nothing is asked of the database but their classes."""
        if self.is_holding or self._is_contended:
            return []
        least = self._waiting_priority
        released = [task for task in released if not self.avoided.includes(task.class_id, task.job_id, task.id)]
        requirements = self._store.requirements(connection, {task.class_id for task in released})
        seen = self._classes.known(requirements)
        classes = {class_id: kind for class_id, kind in seen.items() if not kind.limits}
        rows: dict[int, list[ReadyTask]] = {}
        for task in sorted(released, key=chooser.order):
            if task.class_id in classes and (least is None or task.priority >= least):
                rows.setdefault(task.class_id, []).append(task)
        return self._at_their_rates(chooser.choose(rows, classes, free, MOST).start)[0]

    def claim(
        self, connection: Any, tasks: Sequence[ReadyTask], worker_id: int, token: int, state: State
    ) -> list[ClaimedTask]:
        """Take those that nobody else has taken, or changed, meanwhile."""
        limits = {task.id: self._classes.limits(task.class_id) for task in tasks}
        got = self._store.claim(connection, [task.id for task in tasks], worker_id, token, state, limits=limits)
        chosen = {task.id: task.class_id for task in tasks}
        news: set[str] = set()  # names that have said only now how often they may start
        changed = [task for task in got if task.class_id != chosen[task.id] or self._is_too_often(task, news)]
        if (
            changed
        ):  # it needs something else now, for which nothing was reserved; or says only now how often it may start
            self._store.give_back(connection, [(task.id, task.token) for task in changed])
        return [task for task in got if task not in changed]

    def _is_too_often(self, task: ClaimedTask, news: set[str]) -> bool:
        rate = task.extra.get("rate_limit")
        if rate is not None and self._rates.learn(task.name, rate):
            news.add(task.name)
        return task.name in news and not self._rates.take(task.name, time.monotonic())

    def _at_home(
        self, tasks: list[ReadyTask], requirement: Requirement, now: float
    ) -> tuple[list[ReadyTask], float | None]:
        if not requirement.places:
            return tasks, None
        return chooser.at_home(tasks, self._classes.place.host, now, self._settings.locality_wait_seconds)
