"""Which of Celery's events an attempt's end becomes, once it is in the table."""

from collections.abc import Iterable
from typing import Any

import pytest

from aque.announcer import Announcer
from aque.states import Reason, State
from aque.store import Finished
from aque.values import HostFailure, Outcome, ReadyTask


class Events(list[tuple[str, Any]]):
    """(kind, id as Celery has it)."""

    enabled = True

    def send(self, kind: str, **fields: Any) -> None:
        self.append((kind, fields["uuid"]))

    def send_about(self, kind: str, ids: Iterable[int], **fields: Any) -> None:
        self.extend((kind, i) for i in ids)


def told(outcome: Outcome, finished: Finished) -> list[tuple[str, Any]]:
    events = Events()
    announcer = Announcer(events)
    announcer.hold((outcome.id, outcome.token), "mine", {})
    announcer.written([outcome], finished)
    return list(events)


HOST = HostFailure(1, 1, Reason.CANNOT_ENTER_CWD, "cannot enter /gone")


@pytest.mark.parametrize(
    ("outcome", "finished", "kinds"),
    [
        (Outcome(1, 1, 9, State.SUCCESS), Finished(ended={1: State.SUCCESS}), ["task-succeeded"]),
        (Outcome(1, 1, 9, State.SUCCESS), Finished(waiting=[1]), ["task-waiting"]),
        (Outcome(1, 1, 9, State.ERROR), Finished(ended={1: State.ERROR}), ["task-failed"]),
        (Outcome(1, 1, 9, State.ERROR), Finished(repeated=[1]), ["task-retried"]),
        (Outcome(1, 1, 9, State.ERROR, host_failure=HOST), Finished(repeated=[1]), ["task-rejected"]),
        (Outcome(1, 1, 9, State.READY), Finished(repeated=[1]), ["task-rejected"]),
        (Outcome(1, 1, 9, State.READY), Finished(ended={1: State.ERROR}), ["task-failed"]),
        (Outcome(1, 1, 9, State.KILLED), Finished(ended={1: State.KILLED}), ["task-killed", "task-revoked"]),
        (Outcome(1, 1, 9, State.CANCELLED, Reason.REQUEST), Finished(ended={1: State.CANCELLED}), ["task-revoked"]),
        (Outcome(1, 1, 9, State.CANCELLED, Reason.REJECTED), Finished(ended={1: State.CANCELLED}), ["task-rejected"]),
        (Outcome(1, 1, 9, State.CANCELLED, Reason.IGNORED), Finished(ended={1: State.CANCELLED}), []),
        (Outcome(1, 1, 9, State.SUCCESS), Finished(refused=[1]), []),
    ],
)
def test_an_end_is_told_as_the_table_has_it(outcome: Outcome, finished: Finished, kinds: list[str]) -> None:
    assert [kind for kind, _ in told(outcome, finished)] == kinds


def test_what_an_end_has_set_in_motion_is_told_too() -> None:
    finished = Finished([ReadyTask(2, 1, 0, 0.0, "next")], [3], {4: State.SUCCESS}, ended={1: State.SUCCESS})
    assert told(Outcome(1, 1, 9, State.SUCCESS), finished) == [
        ("task-succeeded", "mine"),
        ("task-succeeded", 4),
        ("task-ready", 2),
        ("task-skipped", 3),
        ("task-revoked", 3),
    ]
