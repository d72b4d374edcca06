"""Celery's events about the tasks of the table: what a commit has made true, told once it is.

An attempt's end is held back until its outcome is in the table: only then is it known whether it was the task's end, is to be
repeated, or came from a worker that had lost its lease. Nothing here waits for the database or a broker.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from aque.states import Reason, State
from aque.store import Finished, Killed, Released
from aque.values import Outcome

#: Ends that are held back; some never come into the table (of a lost lease), and are dropped after so many others.
HELD = 10_000

Event = tuple[str, dict[str, Any]]


class Eventer(Protocol):
    """Who publishes; see `publisher.EventQueue`."""

    @property
    def enabled(self) -> bool:
        """Somebody wants events of tasks."""

    def send(self, kind: str, **fields: Any) -> None:
        """Queue an event."""

    def send_about(self, kind: str, ids: Iterable[int], **fields: Any) -> None:
        """Queue an event for each of these tasks, of which more is looked up before it is published."""


class Announcer:
    """Tells `eventer` what became of tasks."""

    def __init__(self, eventer: Eventer) -> None:
        self._eventer = eventer
        self._held: OrderedDict[tuple[int, int], tuple[str, Mapping[str, Any]]] = OrderedDict()

    @property
    def is_wanted(self) -> bool:
        """Somebody listens: else nothing need be prepared."""
        return self._eventer.enabled

    def hold(self, claim: tuple[int, int], uuid: str, details: Mapping[str, Any]) -> None:
        """The attempt of this claim (task, token) has ended; `details`: result, exception, traceback, signum."""
        self._held[claim] = uuid, details
        while len(self._held) > HELD:
            self._held.popitem(last=False)

    def written(self, outcomes: Sequence[Outcome], released: Released) -> None:
        """These outcomes are in the table, with what they, or the time, have set in motion."""
        if not self._eventer.enabled:
            self._held.clear()
            return
        if isinstance(released, Finished):
            self._ended(outcomes, released)
        self.released(released)

    def _ended(self, outcomes: Sequence[Outcome], finished: Finished) -> None:
        repeated = set(finished.repeated)
        self._eventer.send_about("task-waiting", finished.waiting)
        for outcome in outcomes:
            uuid, details = self._held.pop((outcome.id, outcome.token), (None, {}))
            for kind, fields in events(outcome, finished.ended.get(outcome.id), outcome.id in repeated, details):
                if uuid is None:
                    self._eventer.send_about(kind, [outcome.id], **fields)
                else:
                    self._eventer.send(kind, uuid=uuid, **fields)

    def released(self, released: Released) -> None:
        """What ended, or became ready, because something else did or because it was time."""
        for task_id, state in (released.groups | released.closed).items():
            for kind, fields in events_without_process(state):
                self._eventer.send_about(kind, [task_id], **fields)
        self._eventer.send_about("task-revoked", released.expired, **{**REVOKED, "expired": True})
        self._eventer.send_about("task-ready", [task.id for task in released.ready])
        self._eventer.send_about("task-skipped", released.skipped)
        self._eventer.send_about("task-revoked", released.skipped, **REVOKED)

    def killed(self, killed: Killed) -> None:
        """What a kill has ended at once; of what runs its worker tells."""
        self._eventer.send_about("task-revoked", killed.cancelled, **REVOKED)
        self.released(killed)


#: Of a task that never ran: Celery's fields. To Celery's monitors a state that they do not know, such as that of `task-killed`,
#: goes before REVOKED whatever comes last, unless the event names the state itself.
REVOKED = {"terminated": False, "signum": None, "expired": False, "state": "REVOKED"}


def events(outcome: Outcome, ended: State | None, is_repeated: bool, details: Mapping[str, Any]) -> list[Event]:
    """The events of an attempt's end, with their fields; `ended`: the state that the task has ended in, None if it has not.

    Celery's own come last: whoever knows only these is left with the state that `AsyncResult` shows.
    """
    error = {"exception": details.get("exception", ""), "traceback": details.get("traceback", "")}
    if outcome.replacement is not None:  # the row goes on as another task: nothing has ended
        return []
    if is_repeated and (outcome.state is State.READY or outcome.host_failure is not None):
        return [("task-rejected", {"requeue": True})]  # no fault of the task's: it did not fail
    if is_repeated:
        return [("task-retried", error)]
    if ended is State.SUCCESS:
        return [("task-succeeded", {"result": details.get("result", ""), "runtime": outcome.ran_seconds})]
    if ended is State.ERROR:
        return [("task-failed", error)]
    if ended is State.KILLED:
        signum = details.get("signum")
        killed = {**REVOKED, "terminated": True, "signum": signum}
        return [("task-killed", {"signum": signum}), ("task-revoked", killed)]
    if ended is not State.CANCELLED or outcome.reason is Reason.IGNORED:
        return []
    if outcome.reason is Reason.REJECTED:
        return [("task-rejected", {"requeue": False})]
    return [("task-revoked", {**REVOKED, "expired": outcome.reason is Reason.EXPIRED})]


def events_without_process(state: State) -> list[Event]:
    """The events of a job that has ended with its last member, or of a task with its last child."""
    if state is State.SUCCESS:
        return [("task-succeeded", {"result": "None", "runtime": 0.0})]
    if state is State.ERROR:
        return [("task-failed", {"exception": "a member or child failed", "traceback": ""})]
    return [("task-revoked", dict(REVOKED))]
