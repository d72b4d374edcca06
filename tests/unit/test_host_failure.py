"""Which ends say something of the host, and not of the task."""

import errno

import pytest

from aque.attempt import host_failure
from aque.states import Reason
from aque.supervised import Ended
from aque.values import NO_REDIRECTIONS, ClaimedTask, Pattern


def task(pattern: Pattern = Pattern.SHELL, interpreter: str = "", cwd: bytes = b"/shots/a") -> ClaimedTask:
    return ClaimedTask(
        id=7, attempt=1, token=1, class_id=3, name="true", pattern=pattern, queue="celery", priority=0, function="",
        arguments=b"", inputs=(), argv=(b"true",), stdin=None, redirections=NO_REDIRECTIONS, login=False, cwd=cwd,
        umask=0o022, environment=b"", import_path=(), user="", interpreter=interpreter, parent_id=None, job_id=5,
        celery_id=None, max_attempts=1, time_limit_seconds=None, soft_time_limit_seconds=None, strict_lease=False,
        duration=0.0, io_bytes=0, dependents=0,
    )  # fmt: skip


def test_a_directory_that_cannot_be_entered_is_the_hosts() -> None:
    ended = Ended("cannot_enter_cwd", "a sentence", errno=errno.ENOENT)
    failure = host_failure(task(), Reason.CANNOT_ENTER_CWD, ended)
    assert failure is not None
    assert (failure.class_id, failure.job_id, failure.reason) == (3, 5, Reason.CANNOT_ENTER_CWD)
    assert failure.why == "cannot enter /shots/a: No such file or directory"


def test_a_user_who_cannot_be_become_is_the_hosts() -> None:
    ended = Ended("cannot_become_user", "cannot run 'true' as its user: there is no user 'x'. Nothing was started.")
    failure = host_failure(task(), Reason.CANNOT_BECOME_USER, ended)
    assert failure is not None and failure.why == "cannot run 'true' as its user: there is no user 'x'"


@pytest.mark.parametrize("reason", ["not_found", "cannot_execute"])
def test_an_interpreter_is_the_hosts_and_a_command_the_tasks(reason: Reason) -> None:
    ended = Ended(reason, "cannot find '/opt/python': there is no such file.")  # type: ignore[arg-type]
    failure = host_failure(task(Pattern.PYTHON, "/opt/python"), Reason(reason), ended)
    assert failure is not None and failure.why == "cannot find '/opt/python': there is no such file"
    assert host_failure(task(), Reason(reason), ended) is None
    assert host_failure(task(Pattern.PYTHON), Reason(reason), ended) is None


@pytest.mark.parametrize("reason", [Reason.EXIT, Reason.SIGNAL, Reason.CANNOT_OPEN, Reason.TIME_LIMIT])
def test_other_ends_are_the_tasks(reason: Reason) -> None:
    assert host_failure(task(), reason, Ended(str(reason))) is None  # type: ignore[arg-type]
    assert host_failure(task(Pattern.PYTHON, "/opt/python"), reason, Ended(str(reason))) is None  # type: ignore[arg-type]


def test_what_it_says_can_be_stored_as_text() -> None:
    ended = Ended("cannot_enter_cwd", "", errno=errno.EINVAL)
    failure = host_failure(task(cwd=b"/a\0b/\xff"), Reason.CANNOT_ENTER_CWD, ended)
    assert failure is not None and failure.why == r"cannot enter /a\x00b/\xff: Invalid argument"
