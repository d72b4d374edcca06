"""One attempt of a task, in a child of the pool or as a supervised command, from its start to its Outcome."""

import errno
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.worker import state as celery_state

from aque import child, codec, contain, sandbox
from aque.assignments import NOTHING, Assignments
from aque.celery_request import RowRequest
from aque.commands import Callbacks, CommandRunner
from aque.commands import Running as RunningCommand
from aque.settings import Settings
from aque.states import Reason, State
from aque.supervised import Command, Ended, OtherUser
from aque.taskserver import TaskServer
from aque.values import (
    OWN_INTERPRETER,
    Again,
    ClaimedTask,
    Condition,
    Dependency,
    HostFailure,
    Outcome,
    Pattern,
    Replacement,
    Usage,
)

logger = logging.getLogger(__name__)


#: Of what is wrong with a host, in characters.
WHY_SHOWN = 1024
#: How a supervised command's end reads in the table.
_REASONS = {
    "signal": Reason.SIGNAL,
    "time_limit": Reason.TIME_LIMIT,
    "cannot_execute": Reason.CANNOT_EXECUTE,
    "not_found": Reason.NOT_FOUND,
    "cannot_enter_cwd": Reason.CANNOT_ENTER_CWD,
    "cannot_become_user": Reason.CANNOT_BECOME_USER,
    "cannot_open": Reason.CANNOT_OPEN,
}


class Listener(Protocol):
    """Who hears what becomes of attempts; called from the pool's and the commands' threads."""

    def finished(self, outcome: Outcome) -> None:
        """The attempt is over and nothing of it runs."""

    def wrote(self, task: ClaimedTask, fd: int, offset: int, data: bytes) -> None:
        """A command wrote to its stdout (1) or stderr (2)."""


class Announcer(Protocol):
    """Who tells Celery's monitors what became of attempts; see `announcer`."""

    @property
    def is_wanted(self) -> bool:
        """Somebody listens."""

    def hold(self, claim: tuple[int, int], uuid: str, details: Mapping[str, Any]) -> None:
        """An attempt has ended."""


class Surroundings(Protocol):
    """What an attempt has of its worker; see `runner.Runner`."""

    pool: Any
    runs_functions_itself: bool
    commands: CommandRunner
    announcer: Announcer
    settings: Settings
    listener: Listener
    rlimits: tuple[tuple[int, int, int], ...]
    end_strangers: Callable[[], None]
    assignments: Assignments
    line: TaskServer
    lease_until: float
    strict: "set[Attempt]"

    def request(self, task: ClaimedTask) -> RowRequest:
        """The task as Celery sees it."""


class Attempt:
    """One attempt of a task, from its start to its outcome."""

    def __init__(self, runner: Surroundings, task: ClaimedTask) -> None:
        self.task = task
        self.assigned = NOTHING
        self.address = ""  #: by which it reaches this worker, see `taskserver`
        self.killed: int | None = None
        self._runner = runner
        self._began = time.monotonic()
        self._over = self._timed_out = self._said = False
        self._ending = threading.Lock()  # a time limit must not signal what its child does next
        self._timers: list[threading.Timer] = []
        self._command: RunningCommand | None = None
        self._next_byte = {1: 0, 2: 0}  #: of its output, by descriptor
        self._usage: Usage | None = None
        self.request = runner.request(task)

    @property
    def outlives_worker(self) -> bool:
        """A command goes on under its supervisor while the worker's image is replaced; a pool child ends with the pool."""
        return self._command is not None

    @property
    def command(self) -> RunningCommand | None:
        """The supervised command, for an attempt that is one."""
        return self._command

    @property
    def can_be_killed(self) -> bool:
        """False for a function that runs in the worker's own process."""
        return self._command is not None or not self._runner.runs_functions_itself

    def kill(self, number: int, grace_seconds: float) -> None:
        """End the attempt: `number` first, SIGKILL after the grace. Its outcome will be `killed`. What cannot be killed goes
        on to an outcome of its own."""
        if not self.can_be_killed:
            self._say_that_it_goes_on()
            return
        pid = None if self._command is not None else self.request.worker_pid
        if self.killed is not None and pid and not contain.is_child(pid):
            return  # the signal before this one has ended it, and the pool is about to notice
        self.killed = number
        if self._command is not None:
            self._command.kill(number, grace_seconds)
        elif pid:
            self._kill_child(pid, number)

    def _kill_child(self, pid: int, number: int) -> None:
        """Signal the child and all that it has started; for SIGKILL nothing of them is left. The caller sees to the grace."""
        if number == signal.SIGKILL:
            # It waits for processes to die, and one may hang in the kernel.
            threading.Thread(target=self._end_child, args=(pid,), name="aque-kill", daemon=True).start()
        else:
            below = contain.below(pid)  # before the child can end, and they be someone else's
            self._runner.pool.terminate_job(pid, number)
            contain.signal_all(below, number)

    def _say_that_it_goes_on(self) -> None:
        if not self._said:
            self._said = True
            logger.warning(
                "task %d cannot be ended: it runs in the worker's own process, in its pool %s, and goes on until it returns. "
                "A worker with -P prefork can kill its tasks.",
                self.task.id,
                self._runner.pool.name,
            )

    def _end_child(self, pid: int) -> None:
        contain.end_below(pid)
        self._runner.pool.terminate_job(pid, signal.SIGKILL)  # so that the pool knows why

    def renew(self, until: float) -> None:
        """The worker's lease holds until this moment of the lease's clock."""
        if self._command is not None:
            self._command.renew(until)

    def signal(self, number: int) -> None:
        """Deliver a signal, no more."""
        if self._command is not None:
            self._command.signal(number)
        elif not self.can_be_killed:
            self._say_that_it_goes_on()  # the process is the worker's: it is no business of others
        elif pid := self.request.worker_pid:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    # -- a command ----------------------------------------------------------------------------------------------------

    def start_command(self, environment: dict[bytes, bytes], user: OtherUser | None) -> None:
        """Hand the command to a supervisor."""
        task = self.task
        files = (task.redirections.stdin, task.redirections.stdout, task.redirections.stderr)
        self._supervise(
            Command(task.argv, environment, task.cwd, task.stdin, redirections=files, login=task.login), user
        )

    def start_sandboxed(self, environment: dict[bytes, bytes], user: OtherUser | None) -> None:
        """Hand the function to an interpreter of its own, under a supervisor."""
        task, limit = self.task, self._runner.settings.result_limit_bytes
        interpreter = os.fsencode(sys.executable if task.interpreter in ("", OWN_INTERPRETER) else task.interpreter)
        script_directory = task.import_path[0] if task.import_path else ""
        asked = sandbox.request(task.function, task.arguments, task.results, script_directory, limit)
        self._supervise(
            Command(
                (interpreter, b"-c", sandbox.PROGRAM.encode()),
                environment,
                task.cwd,
                asked,
                result_limit_bytes=2 * limit + sandbox.ANSWER_BYTES,  # a text within a text has its quotes escaped
            ),
            user,
        )

    def _supervise(self, command: Command, user: OtherUser | None) -> None:
        task, settings = self.task, self._runner.settings
        if task.strict_lease:
            self._runner.strict.add(self)
        self._command = self._runner.commands.run(
            replace(
                command,
                cpus=self.assigned.cpus,
                user=user,
                umask=task.umask,
                no_new_privileges=settings.no_new_privileges,
                rlimits=self._runner.rlimits,
                output_limit_bytes=settings.output_limit_bytes,
                time_limit_seconds=task.time_limit_seconds,
                soft_time_limit_seconds=task.soft_time_limit_seconds,
                lease_until=self._runner.lease_until if task.strict_lease else None,
                # A strict lease ends a grace early: a grace as long as the lease would leave nothing of it.
                kill_grace_seconds=min(settings.kill_grace_seconds, settings.lease_seconds / 3)
                if task.strict_lease
                else settings.kill_grace_seconds,
            ),
            *self.command_callbacks,
        )

    @property
    def command_callbacks(self) -> Callbacks:
        """Who hears of the command."""
        return self._on_command_started, self._on_command_output, self._on_command_ended

    def resume(self, began: float, killed: int | None) -> None:
        """It runs since then already, and is being killed by this signal, if any."""
        self._began, self.killed = began, killed

    def take_over(self, command: RunningCommand) -> None:
        """Go on with a command that the image before this one has started."""
        self._command = command
        self._next_byte = dict(command.written)
        if command.pid is not None and not self._over:
            self.request.on_accepted(command.pid, self._began)

    def _on_command_started(self, pid: int) -> None:
        self.request.on_accepted(pid, time.monotonic())

    def _on_command_output(self, fd: int, offset: int, data: bytes) -> None:
        self._mark_gap(fd, offset)
        self._runner.listener.wrote(self.task, fd, offset, data)
        self._next_byte[fd] = offset + len(data)

    def _mark_gap(self, fd: int, offset: int) -> None:
        """Where bytes were dropped, a line in their place says so."""
        if dropped := offset - self._next_byte[fd]:
            mark = f"\n[aque: {dropped} bytes are cut out here]\n".encode()
            self._runner.listener.wrote(self.task, fd, self._next_byte[fd], mark)

    def _on_command_ended(self, ended: Ended) -> None:
        self._mark_gap(1, ended.stdout_bytes)
        self._mark_gap(2, ended.stderr_bytes)
        if ended.max_rss_bytes:  # else nothing was started, or its supervisor is gone
            self._usage = Usage(ended.cpu_seconds, ended.max_rss_bytes, ended.read_bytes, ended.written_bytes)
        if ended.reason == "lost":
            self._end_when_gone(lambda: self._end(State.READY, Reason.WORKER_LOST))
        elif ended.reason == "lease":
            self._end(State.READY, Reason.WORKER_LOST)
        elif self.killed is not None:
            self._end(State.KILLED, Reason.REQUEST, ended.exit_code, ended.signal or self.killed, cut=ended.truncated)
        elif self.task.pattern is Pattern.PYTHON and ended.reason in ("exit", "signal"):
            self._on_answer(ended)
        elif ended.reason == "exit" and ended.exit_code == 0:
            self._end(State.SUCCESS, exit_code=0, shown="exit status 0", cut=ended.truncated)
        else:
            reason = _REASONS.get(ended.reason, Reason.EXIT)
            message = ended.message or f"exit status {ended.exit_code}"
            stored = None if reason in (Reason.EXIT, Reason.SIGNAL) else codec.encode_error("", message)
            failure = host_failure(self.task, reason, ended)
            self._end(
                State.ERROR, reason, ended.exit_code, ended.signal,
                error=stored, shown=message, cut=ended.truncated, host_failure=failure,
            )  # fmt: skip

    def _on_answer(self, ended: Ended) -> None:
        """The interpreter of a function has ended by itself."""
        try:
            answer = sandbox.answer(ended.result or b"")
            if answer.value is not None and len(answer.value) > self._runner.settings.result_limit_bytes:
                raise ValueError("more than it was told")
        except ValueError:
            how = ended.message or f"it exited with status {ended.exit_code}"
            text = f"the interpreter gave no answer: {how}; what it wrote may say more."
            reason = Reason.SIGNAL if ended.signal else Reason.EXIT
            stored = codec.encode_error("", text)
            self._end(State.ERROR, reason, ended.exit_code, ended.signal, error=stored, shown=text, cut=ended.truncated)
            return
        if not answer.reason:
            self._end(
                State.SUCCESS, value=answer.value, shown=answer.shown, seconds=answer.seconds, cut=ended.truncated
            )
        else:
            stored = codec.encode_error(**answer.error)
            again = None
            if answer.retry is not None and self.task.failed < answer.retry[1]:
                again = Again(answer.retry[0], None, True)
            self._end(
                State.ERROR,
                Reason(answer.reason),
                error=stored,
                seconds=answer.seconds,
                cut=ended.truncated,
                again=again,
            )

    # -- a function ---------------------------------------------------------------------------------------------------

    def start_function(self, variables: dict[str, str]) -> None:
        """Hand the function to a child of the pool."""
        task, settings = self.task, self._runner.settings
        here = self._runner.runs_functions_itself
        if here and (task.time_limit_seconds is not None or task.soft_time_limit_seconds is not None):
            logger.warning("task %d has a time limit, which the pool %s cannot hold", task.id, self._runner.pool.name)
        self._runner.pool.apply_async(
            child.run_in_thread if here else child.run,
            args=(
                task.function,
                self.request.id,
                self._request_dict(),
                task.arguments,
                dict(task.results),
                variables,
                task.import_path,
                settings.result_limit_bytes,
                *(() if here else (settings.kill_grace_seconds,)),
                self.assigned.cpus,
            ),
            accept_callback=self._on_accepted,
            callback=self._on_result,
            error_callback=self._on_pool_error,
            correlation_id=self.request.id,
        )

    def _request_dict(self) -> dict[str, Any]:
        """What the function sees as `self.request`."""
        task = self.task
        return {
            **self.request.request_dict,
            "headers": dict(task.extra.get("headers") or {}),  # else Celery takes for them whatever it does not know
            "aque_id": task.id,
            "aque_attempt": task.attempt,
            "aque_ignores": bool(task.extra.get("ignore_result")) and not task.dependents,
            "aque_worker": self.address,
            "aque_errbacks": task.extra.get("errbacks"),  # for `self.replace`; not Celery's name, or it would call them
        }

    def _on_accepted(self, pid: int, accepted: float) -> None:
        self.request.on_accepted(pid, accepted)
        if self.killed is not None:  # killed between start and acceptance
            self._kill_child(pid, self.killed)
        if self._runner.runs_functions_itself:
            return
        # Not the pool's own limits: it looks once a second, kills the child alone, and 0.1 s after the first signal.
        if (seconds := self.task.soft_time_limit_seconds) is not None:
            self._after(seconds, lambda: contain.signal_all([pid], signal.SIGUSR1))
        if (seconds := self.task.time_limit_seconds) is not None:
            self._after(seconds, lambda: self._time_out(pid))

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        """Unless the attempt has ended by then."""

        def call() -> None:
            with self._ending:
                if not self._over:
                    act()

        timer = threading.Timer(seconds, call)
        timer.daemon, timer.name = True, "aque-time-limit"
        with self._ending:
            if not self._over:
                self._timers.append(timer)
                timer.start()

    def _time_out(self, pid: int) -> None:
        if self.killed is None:
            self._timed_out = True
            self._kill_child(pid, signal.SIGTERM)
            final = threading.Timer(self._runner.settings.kill_grace_seconds, self._end_if_running, args=(pid,))
            final.daemon, final.name = True, "aque-time-limit"
            final.start()

    def _time_out_by_pool(self) -> None:
        """The limit of the worker itself (`--time-limit`): the pool tells of it, and kills the child alone after that."""
        self._timed_out = True
        pid = self.request.worker_pid

        def end() -> None:
            if pid:
                self._end_child(pid)
                contain.wait(pid)
            self._end_when_gone(lambda: self._end(State.ERROR, Reason.TIME_LIMIT, error=self._time_limit_error()))

        threading.Thread(target=end, name="aque-time-limit", daemon=True).start()

    def _end_if_running(self, pid: int) -> None:
        if not self._over:
            self._end_child(pid)

    def _on_result(self, result: child.ChildResult) -> None:
        how, what, seconds, used = result
        self._usage = None if used is None else Usage(*used)
        if self._timed_out:  # it caught the signal, and went on
            self._end(State.ERROR, Reason.TIME_LIMIT, error=self._time_limit_error(), seconds=seconds)
        elif how == "success":
            self._end(State.SUCCESS, value=what[0], shown=what[1], seconds=seconds)
        elif how == "again":
            *wanted, error = what
            again = Again(*wanted)
            self._end(State.ERROR, Reason.EXCEPTION, error=error, seconds=seconds, again=again)
        elif how == "withdrawn":
            reason, text = what
            self._end(State.CANCELLED, Reason(reason), error=codec.encode_error("", text), seconds=seconds)
        elif how == "replaced":
            name, function, arguments, inputs, pairs, class_id = what
            edges = tuple(Dependency(upstream, Condition(condition)) for upstream, condition in pairs)
            new = Replacement(name, function, arguments, tuple(inputs), edges, class_id)
            self._end(State.PENDING, seconds=seconds, replacement=new)
        else:
            reason, error = what
            self._end(State.ERROR, Reason(reason), error=error, seconds=seconds)

    def _time_limit_error(self) -> bytes:
        return codec.encode_exception(TimeLimitExceeded(self.task.time_limit_seconds))

    def _end_when_gone(self, end: Callable[[], None]) -> None:
        """A process that kept the attempt's others together has died: kill what it left before anything is recorded."""

        def wait() -> None:
            self._runner.end_strangers()
            end()

        threading.Thread(target=wait, name="aque-orphans", daemon=True).start()

    def _on_pool_error(self, info: Any) -> None:
        """The child died under the task, or could not even send its result."""
        error = getattr(info.exception, "exc", None) or info.exception
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        stored = codec.encode_error(kind, str(error), str(info.traceback or ""))
        if self._timed_out:
            self._end_when_gone(lambda: self._end(State.ERROR, Reason.TIME_LIMIT, error=self._time_limit_error()))
        elif self.killed is not None:
            number = error.args[0] if isinstance(error, Terminated) and error.args else 0
            number = number if number > 0 else self.killed
            self._end_when_gone(lambda: self._end(State.KILLED, Reason.REQUEST, signal=number))
        elif isinstance(error, TimeLimitExceeded):
            self._time_out_by_pool()
        elif isinstance(error, (Terminated, SystemExit, WorkerLostError)) and not self._runner.runs_functions_itself:
            self._end_when_gone(lambda: self._end(State.READY, Reason.WORKER_LOST, error=stored))
        else:
            self._end(State.ERROR, Reason.EXCEPTION, error=stored)

    def fail(self, error: Exception) -> None:
        """The attempt could not even be started."""
        logger.error("task %s could not be started: %s", self.task.id, error)
        self._end(State.ERROR, Reason.EXCEPTION, error=codec.encode_exception(error))

    def refuse(self, why: str) -> None:
        """This worker must not start it."""
        failure = _host_failure(self.task, Reason.CANNOT_BECOME_USER, why.partition(". ")[0])
        error = codec.encode_error("", why)
        self._end(State.ERROR, Reason.CANNOT_BECOME_USER, error=error, shown=why, host_failure=failure)

    def _end(
        self,
        state: State,
        reason: Reason | None = None,
        exit_code: int | None = None,
        signal: int | None = None,
        *,
        value: bytes | None = None,
        error: bytes | None = None,
        shown: str = "",
        seconds: float | None = None,
        cut: bool = False,
        host_failure: HostFailure | None = None,
        again: Again | None = None,
        replacement: Replacement | None = None,
    ) -> None:
        with self._ending:
            if self._over:
                return
            self._over = True
        for timer in self._timers:
            timer.cancel()
        self._runner.strict.discard(self)
        task, now = self.task, time.monotonic()
        ran = now - self._began if seconds is None else seconds
        celery_state.task_ready(self.request, successful=state is State.SUCCESS)
        outcome = Outcome(
            task.id,
            task.attempt,
            task.token,
            state,
            reason,
            exit_code,
            signal,
            ran,
            value,
            error,
            cut,
            now,
            self._usage,
            host_failure,
            again,
            replacement,
        )
        # Before its reservation ends: the next one may need them.
        self._runner.assignments.release((task.id, task.attempt))
        self._runner.line.close(task)
        if self._runner.announcer.is_wanted:
            self._runner.announcer.hold((task.id, task.token), self.request.id, self._details(error, shown))
        self._runner.listener.finished(outcome)

    def _details(self, error: bytes | None, shown: str) -> dict[str, Any]:
        """What events tell of the end."""
        if error is None:
            return {"result": shown, "exception": shown, "signum": self.killed}
        fields = codec.decode_error(error)
        exception = f"{fields['type']} {fields['message']}".strip() or shown
        return {"exception": exception, "traceback": fields["traceback"], "signum": self.killed}


def host_failure(task: ClaimedTask, reason: Reason, ended: Ended) -> HostFailure | None:
    """What it says of the host that the task could not be started; None if it says something of the task.

    A command that is not found stays the task's error, as in a shell; an interpreter that was named for a function is the
    host's.
    """
    if reason is Reason.CANNOT_ENTER_CWD:
        cwd = task.cwd.decode(errors="backslashreplace")
        return _host_failure(task, reason, f"cannot enter {cwd}: {os.strerror(ended.errno or errno.EINVAL)}")
    if reason is Reason.CANNOT_BECOME_USER:
        return _host_failure(task, reason, ended.message.removesuffix(". Nothing was started."))
    is_function = task.pattern is Pattern.PYTHON and task.interpreter
    if is_function and reason in (Reason.NOT_FOUND, Reason.CANNOT_EXECUTE):
        return _host_failure(task, reason, ended.message.removesuffix("."))
    return None


def _host_failure(task: ClaimedTask, reason: Reason, why: str) -> HostFailure:
    # Databases store no NUL bytes and no lone surrogates as text.
    text = why[:WHY_SHOWN].replace("\0", "\\x00").encode(errors="backslashreplace").decode()
    return HostFailure(task.class_id, task.job_id, reason, text)
