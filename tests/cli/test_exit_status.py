"""The end of a task as an exit status."""

import pytest

from aque.cli.exit_status import error_text, exit_status, sentence, xargs_status
from aque.states import Reason, State
from aque.store import StoredResult
from aque.values import Pattern


def end(state, reason=None, exit_code=None, signal=None, error=None):
    return StoredResult(7, "x", state, reason, exit_code, signal, Pattern.SHELL, None, None, error)


OK = end(State.SUCCESS, exit_code=0)
FAILED = end(State.ERROR, Reason.EXIT, 3)


@pytest.mark.parametrize(
    ("ended", "status"),
    [
        (OK, 0),
        (FAILED, 3),
        (end(State.ERROR, Reason.SIGNAL, signal=11), 139),
        (end(State.KILLED, Reason.REQUEST, signal=9), 137),
        (end(State.KILLED, Reason.REQUEST, exit_code=5), 5),
        (end(State.KILLED, Reason.REQUEST), 143),
        (end(State.ERROR, Reason.TIME_LIMIT, signal=15), 124),
        (end(State.ERROR, Reason.EXCEPTION), 1),
        (end(State.ERROR, Reason.WORKER_LOST), 1),
        (end(State.SKIPPED, Reason.DEPENDENCY), 125),
        (end(State.CANCELLED, Reason.REQUEST), 125),
        (end(State.CANCELLED, Reason.EXPIRED), 125),
        (end(State.CANCELLED, Reason.IGNORED), 1),
        (end(State.CANCELLED, Reason.REJECTED), 1),
        (end(State.ERROR, Reason.CANNOT_EXECUTE), 126),
        (end(State.ERROR, Reason.CANNOT_ENTER_CWD), 126),
        (end(State.ERROR, Reason.CANNOT_OPEN), 126),
        (end(State.ERROR, Reason.CANNOT_BECOME_USER), 126),
        (end(State.ERROR, Reason.NOT_FOUND), 127),
    ],
)
def test_an_exit_status_is_what_shells_env_and_timeout_make_of_such_an_end(ended, status):
    assert exit_status(ended) == status


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ([OK, OK], 0),
        ([OK, FAILED], 123),
        ([end(State.ERROR, Reason.EXIT, 127)], 123),
        ([FAILED, end(State.ERROR, Reason.EXIT, 255)], 124),
        ([end(State.ERROR, Reason.SIGNAL, signal=9), end(State.ERROR, Reason.EXIT, 255)], 125),
        ([FAILED, end(State.ERROR, Reason.NOT_FOUND)], 127),
        ([end(State.ERROR, Reason.CANNOT_EXECUTE), end(State.ERROR, Reason.NOT_FOUND)], 126),
        ([end(State.CANCELLED, Reason.REQUEST)], 125),
        ([end(State.ERROR, Reason.TIME_LIMIT, exit_code=0)], 125),
        ([], 0),
    ],
)
def test_xargs_exits_as_gnu_xargs_would_after_the_first_command_that_stops_it(ends, status):
    assert xargs_status(ends) == status


def test_what_a_command_has_said_itself_is_not_said_again():
    assert sentence(OK) is None
    assert sentence(FAILED) is None


def test_an_error_is_told_by_its_last_line():
    stored = b'{"type": "ValueError", "message": "bad", "traceback": "Traceback:\\n  File x\\nValueError: bad\\n"}'
    assert error_text(stored) == "ValueError: bad"
    assert error_text(b'{"type": "builtins.KeyError", "message": "k", "traceback": ""}') == "KeyError: k"
    assert sentence(end(State.ERROR, Reason.EXCEPTION, error=stored)) == "task 7 failed: ValueError: bad"


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (Reason.REQUEST, "was cancelled before it ran"),
        (Reason.EXPIRED, "was cancelled: it was not started in time"),
        (Reason.IGNORED, "was withdrawn by itself: it raised Ignore"),
        (Reason.REJECTED, "was withdrawn by itself: it raised Reject"),
    ],
)
def test_what_was_cancelled_says_whether_it_ran(reason, said):
    assert sentence(end(State.CANCELLED, reason)) == f"task 7 {said}."


@pytest.mark.parametrize("stored", [None, b"", b"no json", b"[]", b'"text"', b"\xff"])
def test_an_odd_stored_error_is_no_error_of_ours(stored):
    assert error_text(stored) == ""


@pytest.mark.parametrize("words", [("status",), ("inspect", "ping"), ("report",)])
def test_celery_s_program_says_that_the_store_cannot_be_read(aque, words):
    done = aque("-A", "aque.celery_app", *words, env={"AQUE_BROKER": "nonsense://x"}, program="celery")
    assert done.status == 2 and "AQUE_BROKER cannot be nonsense://" in done.err and "amqp" not in done.out + done.err
