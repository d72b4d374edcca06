"""Why a task is not running: every reason there is, in words and as facts. Pure: what the table says at one moment comes in,
and workers are asked with the functions by which they choose (`aque.chooser`, `aque.backfill`).
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

from aque import chooser
from aque.backfill import Busy, Hold, expected_end, forecast, may_fill
from aque.chooser import Choice, Class, Place
from aque.resources import Capacity, parse_limits
from aque.states import COMPLETE_STATES, State
from aque.values import Condition, Pattern, ReadyTask, Requirement
from aque.words import at, clock, counted, lasting, listed, listed_tasks, moment


@dataclass(frozen=True, slots=True)
class Subject:
    """A task as its row says. Times are in seconds since 1970."""

    id: int
    name: str
    state: State
    reason: str | None
    pattern: Pattern
    class_id: int | None  #: None: a group
    rank: int  #: the priority, with what age adds
    duration: float  #: expected seconds; 0: unknown
    unmet: int
    attempt: int
    job_id: int
    submitter: str
    near_host: str
    exit_code: int | None
    signal: int | None
    ready_at: float | None
    started_at: float | None
    finished_at: float | None
    worker: str | None  #: of the latest attempt, by name
    not_before: float | None = None  #: counts as one of `unmet`; None: no time to wait for (any more)


@dataclass(frozen=True, slots=True)
class Link:
    """A dependency, with what it is of the task waited for that matters."""

    downstream: int
    upstream: int
    condition: Condition
    is_satisfied: bool
    name: str
    state: State
    reason: str | None
    exit_code: int | None
    signal: int | None
    duration: float
    started_at: float | None

    @property
    def is_open(self) -> bool:
        """True while it has to be waited for."""
        return not self.is_satisfied and self.state not in COMPLETE_STATES

    @property
    def is_broken(self) -> bool:
        """True if it has made what waits for it impossible."""
        return not self.is_satisfied and self.state in COMPLETE_STATES


@dataclass(frozen=True, slots=True)
class Limit:
    """A farm-wide limit."""

    capacity: int
    free: int
    holders: tuple[int, ...] = ()  #: the tasks that have tokens of it


@dataclass(frozen=True, slots=True)
class Refusal:
    """A host could not start a task."""

    host: str
    message: str  #: a sentence part


@dataclass(frozen=True, slots=True)
class Worker:
    """A live worker, with what the table says that it runs."""

    id: int
    name: str
    place: Place
    running: Sequence[Busy] = ()
    avoids: Sequence[str] = ()  #: sentences, see `aque.backoff`

    @property
    def free(self) -> Capacity:
        """What is not reserved of it."""
        left = self.place.whole
        for busy in self.running:
            left = left - busy.need
        return left


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that keeps a task from running, or says what has become of it."""

    kind: str
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class View:
    """A task and one worker: the first thing that keeps the worker from starting it."""

    worker: str
    host: str
    kind: str
    text: str
    expected_at: float | None = None  #: when there should be room, in seconds since 1970; None: nobody knows


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that there is to say of a task."""

    subject: Subject
    reasons: Sequence[Reason]
    workers: Sequence[View] = ()


@dataclass(frozen=True)
class Situation:
    """The farm at one moment, as far as ready tasks are concerned. `ready` holds the best tasks of each class, as a worker
    reads them; `cut` the classes of which there are more."""

    now: float
    workers: Sequence[Worker] = ()
    requirements: Mapping[int, Requirement] = field(default_factory=dict)
    ready: Mapping[int, Sequence[ReadyTask]] = field(default_factory=dict)
    cut: Collection[int] = ()
    limits: Mapping[str, Limit] = field(default_factory=dict)
    kept: Mapping[int, int] = field(default_factory=dict)  #: worker -> the task for which it keeps room
    subjects: Mapping[int, Subject] = field(default_factory=dict)  #: those explained, and those for which room is kept
    refusals: Mapping[int, Sequence[Refusal]] = field(default_factory=dict)  #: by task
    usage: Mapping[str, Fraction] | None = None  #: CPUs that run for each user; None: users do not count
    locality_wait_seconds: float = 0.0

    @cached_property
    def places(self) -> list[Place]:
        """The workers as the choice sees them."""
        return [worker.place for worker in self.workers]

    @cached_property
    def _is_fair(self) -> bool:
        users = {self.requirements[class_id].user for class_id, tasks in self.ready.items() if tasks}
        return self.usage is not None and len(users) > 1

    @cached_property
    def _choices(self) -> dict[int, Choice]:
        return {worker.id: self._choose(worker) for worker in self.workers if not worker.place.draining}

    @cached_property
    def _nowhere(self) -> dict[int, str | None]:
        return {class_id: chooser.why_nowhere(wanted, self.places) for class_id, wanted in self.requirements.items()}

    @cached_property
    def _able(self) -> dict[int, list[Worker]]:
        """The workers that could run a class and may claim."""
        return {
            class_id: [w for w in self.workers if not w.place.draining and chooser.why_never(wanted, w.place) is None]
            for class_id, wanted in self.requirements.items()
        }

    @cached_property
    def _short(self) -> dict[int, list[Reason]]:
        return {class_id: self._short_of(wanted) for class_id, wanted in self.requirements.items()}

    @cached_property
    def _holds(self) -> dict[int, Hold]:
        return {worker.id: hold for worker in self.workers if (hold := self._hold(worker)) is not None}

    def tokens(self, requirement: Requirement) -> dict[str, int]:
        """The tokens of farm-wide limits that such a task takes."""
        wanted = {name: n for name, n in parse_limits(requirement.limits).items() if name in self.limits}
        mine = f"user:{requirement.user}"
        return wanted | ({mine: 1} if mine in self.limits else {})

    def _hold(self, worker: Worker) -> Hold | None:
        """What this worker keeps room for."""
        subject = self.subjects.get(self.kept.get(worker.id, 0))
        if subject is None or subject.class_id is None:
            return None
        need = chooser.need(self.requirements[subject.class_id], worker.place)
        return Hold(subject.id, subject.rank, forecast(need, worker.free, worker.running, self.now))

    @cached_property
    def _holders(self) -> dict[int, Worker]:
        return {self.kept[worker.id]: worker for worker in self.workers if worker.id in self.kept}

    def holder(self, task_id: int) -> Worker | None:
        """The worker that keeps room for this task."""
        return self._holders.get(task_id)

    def _choose(self, worker: Worker) -> Choice:
        """What this worker would start now, as far as the table knows."""
        classes = {
            class_id: Class(chooser.need(wanted, worker.place), wanted.user, limits=self.tokens(wanted))
            for class_id, wanted in self.requirements.items()
            if chooser.why_never(wanted, worker.place) is None
        }
        ready = {class_id: tasks for class_id, tasks in self.ready.items() if class_id in classes}
        return chooser.choose(
            ready,
            classes,
            worker.free.without_debts(),
            sum(map(len, ready.values())),
            now=self.now,
            tokens={name: limit.free for name, limit in self.limits.items()},
            usage=self.usage if self._is_fair else None,
            hold=self._holds.get(worker.id),
        )

    # -- the parts of an explanation ----------------------------------------------------------------------------------

    def nowhere(self, subject: Subject) -> Reason | None:
        """No worker that there is could ever run it."""
        if subject.class_id is None:
            return None
        why = self._nowhere[subject.class_id]
        if why == "no live worker":
            return Reason("no_worker", "no live worker: start one with `aque worker`")
        if why is None:
            return None
        kind = "draining" if why.endswith(("is draining", "are draining")) else "unsatisfiable"
        return Reason(kind, why)

    def short_of(self, subject: Subject) -> list[Reason]:
        """The farm-wide limits of which it wants more than is free."""
        return [] if subject.class_id is None else self._short[subject.class_id]

    def _short_of(self, requirement: Requirement) -> list[Reason]:
        found = []
        for name, wanted in self.tokens(requirement).items():
            limit = self.limits[name]
            if limit.free < wanted:
                held = f" (held by {listed_tasks(limit.holders)})" if limit.holders else ""
                facts = {"limit": name, "needs": wanted, "free": limit.free, "capacity": limit.capacity}
                text = f"limit {name}: needs {wanted}, {limit.free} of {limit.capacity} free{held}"
                if wanted > limit.capacity:
                    text = f"limit {name}: needs {wanted}, and is {limit.capacity}: until it is raised it cannot start"
                found.append(Reason("limit", text, {**facts, "holders": list(limit.holders)}))
        return found

    def of_files(self, subject: Subject) -> Reason | None:
        """Limits of file systems that are used up. Which of them it needs only a worker knows, by its mounts."""
        if subject.class_id is None or not self.requirements[subject.class_id].places:
            return None
        full = {name: limit for name, limit in self.limits.items() if name.startswith("io:") and limit.free < 1}
        if not full:
            return None
        names = ", ".join(f"{name} (0 of {limit.capacity} free)" for name, limit in full.items())
        return Reason("io_limit", f"if its files are there, it waits for them: {names}", {"limits": list(full)})

    def kept_for(self, subject: Subject) -> Reason | None:
        """A worker keeps room for it."""
        worker = self.holder(subject.id)
        hold = None if worker is None else self._holds.get(worker.id)
        if worker is None or hold is None:
            return None
        when = f", expects to have it {at(hold.forecast.at, self.now)}" if math.isfinite(hold.forecast.at) else ""
        unknown = "" if when else ", and cannot say when it has it: what runs there has no known duration"
        return Reason(
            "room_kept",
            f"worker {worker.name} keeps room for it{when}{unknown}",
            {"worker": worker.name, "expected_at": _finite(hold.forecast.at)},
        )

    def place_in_order(self, subject: Subject) -> Reason | None:
        """How many ready tasks go before it, of those that some worker that could run it could run too."""
        if subject.class_id is None:
            return None
        able = [worker.place for worker in self._able[subject.class_id]]
        mine = self._key(subject.class_id, subject.rank, subject.duration, subject.id)
        before, is_exact = 0, not self._is_fair
        for class_id, tasks in self.ready.items():
            wanted = self.requirements[class_id]
            if all(chooser.why_never(wanted, place) is not None for place in able):
                continue
            ahead = sum(self._key(class_id, t.priority, t.duration, t.id) < mine for t in tasks)
            before += ahead
            is_exact &= not wanted.places and not (class_id in self.cut and ahead == len(tasks))
        about = "" if is_exact else "about "
        text = f"{about}{counted(before, 'ready task')} {'goes' if before == 1 else 'go'} before it"
        return Reason(
            "order", text if before else "no ready task goes before it", {"ahead": before, "is_exact": is_exact}
        )

    def _key(self, class_id: int, rank: int, duration: float, task_id: int) -> tuple[float, Fraction, float, int]:
        """The order of the choice, without what only a worker knows of files."""
        used = Fraction(0)
        if self._is_fair and self.usage is not None:
            used = self.usage.get(self.requirements[class_id].user, Fraction(0))
        return -rank, used, -duration, task_id

    def view(self, subject: Subject, worker: Worker) -> View:
        """The first thing that keeps this worker from starting it."""
        assert subject.class_id is not None
        kind, text, expected_at = self._view(subject, worker, self.requirements[subject.class_id])
        return View(worker.name, worker.place.host, kind, text, expected_at)

    def _view(self, subject: Subject, worker: Worker, wanted: Requirement) -> tuple[str, str, float | None]:
        place, now = worker.place, self.now
        if never := chooser.why_never(wanted, place):
            return "never", never, None
        if place.draining:
            return "draining", "draining: it claims nothing", None
        if refused := self._refused(subject, worker):
            return "refused", refused, None
        home = (subject.ready_at or now) + self.locality_wait_seconds
        if wanted.places and subject.near_host not in ("", place.host) and home > now:
            return (
                "not_home",
                f"leaves it to {subject.near_host}, where its input was made, until {at(home, now)}",
                home,
            )
        need, hold = chooser.need(wanted, place), self._holds.get(worker.id)
        if hold is not None and hold.task_id != subject.id and subject.rank <= hold.priority:
            ahead = hold.forecast
            if may_fill(need, subject.duration, ahead.spare, ahead.at, now) is None:
                when = f", which should start {at(ahead.at, now)}" if math.isfinite(ahead.at) else ""
                return "room_kept", f"keeps room for task {hold.task_id}{when}", None
        expects = forecast(need, worker.free, worker.running, now)
        if lacking := worker.free.without_debts().lacking(need):
            when = f": expects room {at(expects.at, now)}" if math.isfinite(expects.at) else ""
            return "no_room", f"{_free_words(lacking)}{when}", _finite(expects.at)
        if self.short_of(subject):
            return "limit", "has room, a limit is used up", None
        if self.of_files(subject):
            return "io_limit", "has room, if its files are not on a file system that is used up", None
        for number, task in enumerate(self._choices[worker.id].start):
            if task.id == subject.id:
                return "starts", "has room: it is next" if number == 0 else "has room for it and those before it", now
        return "turn", "has room, which those before it take", None

    def _refused(self, subject: Subject, worker: Worker) -> str | None:
        host = worker.place.host
        own = [refusal.message for refusal in self.refusals.get(subject.id, ()) if refusal.host == host]
        for sentence in worker.avoids:
            about, _, rest = sentence.partition(": ")
            ids = {int(number) for number in re.findall(r"\d+", about.partition(" and ")[0])}  # " and 3 more"
            said = [message for message in own if rest.startswith(message)]
            if said or (subject.job_id if "job" in about else subject.id) in ids:
                return f"its host could not start {'it' if said else 'others of it'}: {rest}"
        # Without a back-off, the next time that its turn comes there it is tried again.
        return None

    # -- whole explanations -------------------------------------------------------------------------------------------

    def why(self, subject: Subject) -> str | None:
        """In a few words, as `aque status` has it, why it does not run; None if there is nothing to say."""
        if subject.state is State.PENDING:
            return waits_for(subject.unmet, subject.not_before, self.now)
        if subject.state is State.HELD:
            return "held"
        if subject.state is not State.READY:
            return None
        if nowhere := self.nowhere(subject):
            return nowhere.text if nowhere.kind != "no_worker" else "no live worker"
        if short := self.short_of(subject):
            facts = short[0].facts
            if facts["needs"] > facts["capacity"]:
                return short[0].text
            return f"limit {facts['limit']}: {facts['free']} of {facts['capacity']} free"
        if worker := self.holder(subject.id):
            return f"{worker.name} keeps room for it"
        if refusals := self.refusals.get(subject.id):
            hosts = ", ".join(refusal.host for refusal in reversed(refusals))
            return f"refused by {hosts}: {refusals[-1].message}"
        assert subject.class_id is not None
        able = self._able[subject.class_id]
        holds = [hold for w in able if (hold := self._holds.get(w.id)) and hold.priority >= subject.rank]
        if holds and len(holds) == len(able):
            return f"room is kept for {listed_tasks([hold.task_id for hold in holds])}"
        return "waits for its turn"

    def explain(self, subject: Subject, links: Sequence[Link] = (), chain: Sequence[Link] = ()) -> Explanation:
        """All that there is to say of a task. `links` are its dependencies; `chain` leads from a task that was skipped to the
        first failure: see `blame`."""
        state = subject.state
        if state in COMPLETE_STATES:
            return Explanation(subject, [_ended(subject, self.now), *_because(chain)])
        if state in (State.RUNNING, State.WAITING, State.CLAIMED):
            return Explanation(subject, [self._active(subject)])
        if state is State.HELD:
            held = [Reason("held", "held: a person keeps it from starting")]
            return Explanation(subject, [*held, *self._dependencies(links), *self._time(subject)])
        if state is not State.READY:
            reasons = [*self._dependencies(links), *self._time(subject)]
            creating = Reason("creating", "what it belongs to is not complete yet")
            return Explanation(subject, reasons or [creating])
        if nowhere := self.nowhere(subject):
            return Explanation(subject, [nowhere], [self.view(subject, worker) for worker in self.workers])
        found = [
            *self.short_of(subject),
            self.of_files(subject),
            self.kept_for(subject) or self.place_in_order(subject),
        ]
        views = [self.view(subject, worker) for worker in self.workers]
        return Explanation(subject, [reason for reason in found if reason is not None], views)

    def _active(self, subject: Subject) -> Reason:
        where = f" on {subject.worker}" if subject.worker else ""
        if subject.state is State.CLAIMED:
            text = f"claimed{where}, starts when a place there is free"
            return Reason("claimed", text, {"worker": subject.worker})
        if subject.state is State.WAITING:
            return Reason("waiting", f"its process{where} has ended, its children have not", {"worker": subject.worker})
        started = subject.started_at if subject.started_at is not None else self.now
        end = expected_end(started, subject.duration, self.now)
        late = 0 < subject.duration < self.now - started
        overdue = f"longer than the {lasting(subject.duration)} that were expected, " if late else ""
        expects = f"{overdue}expected to end {at(end, self.now)}" if math.isfinite(end) else "its duration is not known"
        text = f"running{where} since {clock(started)} ({lasting(self.now - started)}), {expects}"
        return Reason("running", text, {"worker": subject.worker, "started_at": started, "expected_at": _finite(end)})

    def _dependencies(self, links: Sequence[Link]) -> list[Reason]:
        """What it still waits for."""
        left = [link for link in links if link.is_open]
        if not left:
            return []
        failed = [link for link in links if link.state in COMPLETE_STATES and link.state is not State.SUCCESS]
        known = {link: seconds for link in left if (seconds := self._remaining(link)) is not None}
        slowest = max(known, key=lambda link: (known[link], -link.upstream)) if known else None
        text = f"waits for {len(left)} of {counted(len(links), 'task')}: {listed([link.upstream for link in left])}"
        if slowest is not None:
            text += f"; the slowest is {self._named(slowest, known[slowest])}"
        if failed:
            text += f"; without success has ended: {listed_tasks([link.upstream for link in failed])}"
        facts = {
            "left": len(left),
            "of": len(links),
            "ids": [link.upstream for link in left],
            "failed": [link.upstream for link in failed],
            "slowest": None if slowest is None else slowest.upstream,
            "slowest_seconds": None if slowest is None else known[slowest],
        }
        return [Reason("dependencies", text, facts)]

    def _time(self, subject: Subject) -> list[Reason]:
        """The time that it waits for."""
        when = subject.not_before
        if when is None:
            return []
        left = f" (in {lasting(when - self.now)})" if when > self.now else ""
        return [Reason("time", f"waits for its time, {moment(when, self.now)}{left}", {"not_before": when})]

    def _remaining(self, task: Subject | Link) -> float | None:
        """The seconds that it is expected to run yet; None: nobody knows."""
        if task.state is State.RUNNING and task.started_at is not None:
            return _finite(expected_end(task.started_at, task.duration, self.now) - self.now)
        return task.duration or None

    def explain_job(self, subject: Subject, members: Sequence[Subject]) -> Explanation:
        """A job: its members by what is to be said of them, the most frequent first, and the slowest of those that are left."""
        ended = [_ended(subject, self.now)] if subject.state in COMPLETE_STATES else []
        groups: dict[str, list[int]] = {}
        for member in members:
            groups.setdefault(_outcome(member) or self.why(member) or str(member.state), []).append(member.id)
        reasons = [
            Reason(
                "members",
                f"{counted(len(ids), 'task')}: {what} ({listed(ids)})",
                {"what": what, "n": len(ids), "ids": ids},
            )
            for what, ids in sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
        ]
        left = [member for member in members if member.state not in COMPLETE_STATES]
        known = {m: seconds for m in left if (seconds := self._remaining(m)) is not None}
        if known:
            slowest = max(known, key=lambda member: (known[member], -member.id))
            facts = {"slowest": slowest.id, "slowest_seconds": known[slowest]}
            reasons.append(Reason("slowest", f"the slowest is {self._named(slowest, known[slowest])}", facts))
        return Explanation(subject, [*ended, *reasons])

    def _named(self, task: Subject | Link, seconds: float) -> str:
        number = task.id if isinstance(task, Subject) else task.upstream
        return f"task {number} ({task.name}, {task.state}), expected to take {lasting(seconds)} more"


def blame(task_id: int, links: Mapping[int, Sequence[Link]]) -> list[Link]:
    """Why a task was skipped: the links from it to the first failure, each the one that made the task before impossible."""
    chain: list[Link] = []
    while broken := [link for link in links.get(task_id, ()) if link.is_broken]:
        link = min(broken, key=lambda link: (link.state is State.SKIPPED, link.upstream))
        chain.append(link)
        task_id = link.upstream
    return chain


def _because(chain: Sequence[Link]) -> list[Reason]:
    if not chain:
        return []
    first, last = chain[0], chain[-1]
    wanted = {Condition.OK: "to succeed", Condition.FAILED: "to fail", Condition.ANY: "to end"}[first.condition]
    text = f"it needed task {first.upstream} ({first.name}) {wanted}, which ended as {_outcome(first)}"
    if last is not first:
        text += f"; that began with task {last.upstream} ({last.name}): {_outcome(last)}"
    facts = [
        {"id": link.upstream, "name": link.name, "state": str(link.state), "reason": link.reason} for link in chain
    ]
    return [Reason("dependency", text, {"chain": facts})]


def _ended(subject: Subject, now: float) -> Reason:
    when = subject.finished_at
    text = f"ended as {_outcome(subject)}" + ("" if when is None else f" at {clock(when)}, {lasting(now - when)} ago")
    facts = {"reason": subject.reason, "exit_code": subject.exit_code, "signal": subject.signal, "finished_at": when}
    return Reason("ended", text, facts)


def _outcome(task: Subject | Link) -> str:
    """How a task has ended; empty if it has not."""
    if task.state not in COMPLETE_STATES:
        return ""
    if task.state is State.SUCCESS or task.reason is None:
        return str(task.state)
    if task.reason == "exit" and task.exit_code is not None:
        return f"{task.state}: exit {task.exit_code}"
    if task.reason == "signal" and task.signal is not None:
        return f"{task.state}: signal {task.signal}"
    return f"{task.state}: {task.reason}"


def waits_for(unmet: int, not_before: float | None, now: float) -> str | None:
    """In a few words what a pending task waits for, which has so many dependencies left, its time among them; None: nothing."""
    tasks = unmet - (not_before is not None)
    waits = [counted(tasks, "task")] if tasks > 0 else []
    if not_before is not None:
        waits.append(f"its time, {moment(not_before, now)}")
    return f"waits for {' and '.join(waits)}" if waits else None


def _free_words(lacking: str) -> str:
    """What `Capacity.lacking` says of what is free."""
    return re.sub(r"there (?:is|are) (.+)", lambda m: f"{m[1]} {'is' if m[1] == '1' else 'are'} free", lacking)


def _finite(when: float) -> float | None:
    return when if math.isfinite(when) else None
