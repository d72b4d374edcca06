"""run: a claimed task as a Celery request, in a child of the pool or as a supervised command; its end as an Outcome.

Celery's own bookkeeping (`inspect active`, events, signals) sees every task of Aque as a request like any other.
"""

import json
import logging
import os
import threading
import time
from contextlib import suppress
from typing import Any, Protocol

import psutil
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery import Celery
from celery.signals import task_received
from celery.utils.saferepr import saferepr
from celery.worker import state as celery_state
from celery.worker.request import Request

from aque import child, codec
from aque.commands import Callbacks, Command, CommandRunner, Ended
from aque.commands import Running as RunningCommand
from aque.resources import format_cpus
from aque.settings import Settings
from aque.states import Reason, State
from aque.values import ClaimedTask, Outcome, Pattern

logger = logging.getLogger(__name__)

#: How long a child that ran into its time limit may take to die.
GONE_SECONDS = 10.0
#: Of the arguments, as events and `inspect` show them.
SHOWN = 1024
#: How a supervised command's end reads in the table.
_REASONS = {
    "signal": Reason.SIGNAL,
    "time_limit": Reason.TIME_LIMIT,
    "cannot_execute": Reason.CANNOT_EXECUTE,
    "not_found": Reason.NOT_FOUND,
    "cannot_enter_cwd": Reason.CANNOT_ENTER_CWD,
}


class Listener(Protocol):
    """Who hears what becomes of attempts; called from the pool's and the commands' threads."""

    def finished(self, outcome: Outcome) -> None:
        """The attempt is over and nothing of it runs."""

    def wrote(self, task: ClaimedTask, fd: int, offset: int, data: bytes) -> None:
        """A command wrote to its stdout (1) or stderr (2)."""


class _Row:
    """A row where Celery's Request expects a message."""

    content_type = "application/json"
    content_encoding = "utf-8"

    def __init__(self, task: ClaimedTask) -> None:
        self.body = task.arguments
        self.payload: tuple[Any, Any, dict[str, Any]] = _shown_arguments(task)
        uuid = task.celery_id or str(task.id)
        self.headers = {
            "id": uuid,
            "task": task.name,
            "ignore_result": True,
            "lang": "py",
            "retries": task.attempt - 1,
            "argsrepr": saferepr(self.payload[0], SHOWN),
            "kwargsrepr": saferepr(self.payload[1], SHOWN),
            "root_id": str(task.job_id),
            "parent_id": None if task.parent_id is None else str(task.parent_id),
            "timelimit": (task.time_limit_seconds, None),
        }
        self.delivery_info = {"routing_key": task.queue, "exchange": "", "redelivered": False}
        self.properties = {"priority": task.priority, "correlation_id": uuid}


class _Request(Request):
    """A Celery request whose acknowledgement, revocation and end belong to the table."""

    attempt: "Attempt"
    acknowledged = True

    def revoked(self) -> bool:
        """Never: a kill is in the row, and was looked up when the task was claimed."""
        return False

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Celery's `revoke(terminate=True)` has already written the row (see bootstep)."""

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """A lost broker connection is no reason to stop a task."""

    def acknowledge(self) -> None:
        """There is no message to acknowledge."""


class Attempt:
    """One attempt of a task, from its start to its outcome."""

    def __init__(self, runner: "Runner", task: ClaimedTask) -> None:
        self.task = task
        self.killed: int | None = None
        self._runner = runner
        self._began = time.monotonic()
        self._over = self._ending = False
        self._command: RunningCommand | None = None
        self.request = _Request(
            _Row(task),
            app=runner.app,
            hostname=runner.hostname,
            eventer=runner.eventer,
            task=runner.proxy_task,
            decoded=False,
        )
        self.request.attempt = self

    @property
    def outlives_worker(self) -> bool:
        """A command goes on under its supervisor while the worker's image is replaced; a pool child ends with the pool."""
        return self._command is not None

    @property
    def command(self) -> RunningCommand | None:
        """The supervised command, for an attempt that is one."""
        return self._command

    def kill(self, number: int, grace_seconds: float) -> None:
        """End the attempt: `number` first, SIGKILL after the grace. Its outcome will be `killed`."""
        self.killed = number
        if self._command is not None:
            self._command.kill(number, grace_seconds)
        elif pid := self.request.worker_pid:
            self._runner.pool.terminate_job(pid, number)

    def signal(self, number: int) -> None:
        """Deliver a signal, no more."""
        if self._command is not None:
            self._command.signal(number)
        elif pid := self.request.worker_pid:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    # -- a command ----------------------------------------------------------------------------------------------------

    def start_command(self, environment: dict[bytes, bytes]) -> None:
        """Hand the command to a supervisor."""
        task, settings = self.task, self._runner.settings
        self._command = self._runner.commands.run(
            Command(
                argv=task.argv,
                env=environment,
                cwd=task.cwd,
                stdin=task.stdin,
                umask=task.umask,
                output_limit_bytes=settings.output_limit_bytes,
                time_limit_seconds=task.time_limit_seconds,
                kill_grace_seconds=settings.kill_grace_seconds,
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
        if command.pid is not None and not self._over:
            self.request.on_accepted(command.pid, self._began)

    def _on_command_started(self, pid: int) -> None:
        self.request.on_accepted(pid, time.monotonic())

    def _on_command_output(self, fd: int, offset: int, data: bytes) -> None:
        self._runner.listener.wrote(self.task, fd, offset, data)

    def _on_command_ended(self, ended: Ended) -> None:
        limit = self._runner.settings.output_limit_bytes
        for fd, cut, total in (
            (1, ended.stdout_truncated, ended.stdout_bytes),
            (2, ended.stderr_truncated, ended.stderr_bytes),
        ):
            if cut:
                mark = f"\n[aque: cut here, {limit} of {total} bytes kept]\n".encode()
                self._runner.listener.wrote(self.task, fd, limit, mark)
        if ended.reason == "lost":
            self._end(State.READY, Reason.WORKER_LOST)
        elif self.killed is not None:
            self._end(State.KILLED, Reason.REQUEST, ended.exit_code, ended.signal or self.killed)
        elif ended.reason == "exit" and ended.exit_code == 0:
            self._end(State.SUCCESS, exit_code=0, shown="exit status 0")
        else:
            reason = _REASONS.get(ended.reason, Reason.EXIT)
            message = ended.message or f"exit status {ended.exit_code}"
            stored = None if reason in (Reason.EXIT, Reason.SIGNAL) else codec.encode_error("", message)
            self._end(State.ERROR, reason, ended.exit_code, ended.signal, error=stored, shown=message)

    # -- a function ---------------------------------------------------------------------------------------------------

    def start_function(self, variables: dict[str, str]) -> None:
        """Hand the function to a child of the pool."""
        task, settings = self.task, self._runner.settings
        self._runner.pool.apply_async(
            child.run,
            args=(
                task.function,
                self.request.id,
                self.request.request_dict,
                task.arguments,
                dict(task.results),
                variables,
                task.import_path,
                settings.result_limit_bytes,
            ),
            accept_callback=self._on_accepted,
            timeout_callback=self._on_timeout,
            callback=self._on_result,
            error_callback=self._on_pool_error,
            timeout=task.time_limit_seconds,
            correlation_id=self.request.id,
        )

    def _on_accepted(self, pid: int, accepted: float) -> None:
        self.request.on_accepted(pid, accepted)
        if self.killed is not None:  # killed between start and acceptance
            self._runner.pool.terminate_job(pid, self.killed)

    def _on_result(self, result: child.ChildResult) -> None:
        succeeded, first, second, seconds = result
        if succeeded:
            self._end(State.SUCCESS, value=first, shown=second, seconds=seconds)
        else:
            self._end(State.ERROR, Reason(first), error=second, seconds=seconds)

    def _on_timeout(self, soft: bool, timeout: float) -> None:
        if not soft:
            self._end_when_gone(_error(TimeLimitExceeded(timeout)))

    def _end_when_gone(self, stored: bytes) -> None:
        """The pool reports a time limit before it kills the child: wait until nothing of the attempt runs."""
        if self._ending:
            return
        self._ending = True

        def wait() -> None:
            pid = self.request.worker_pid
            with suppress(psutil.Error):
                psutil.Process(pid).wait(GONE_SECONDS)
            self._end(State.ERROR, Reason.TIME_LIMIT, error=stored)

        threading.Thread(target=wait, name="aque-time-limit", daemon=True).start()

    def _on_pool_error(self, info: Any) -> None:
        """The child died under the task, or could not even send its result."""
        error = getattr(info.exception, "exc", None) or info.exception
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        stored = codec.encode_error(kind, str(error), str(info.traceback or ""))
        if self.killed is not None:
            number = error.args[0] if isinstance(error, Terminated) and error.args else 0
            self._end(State.KILLED, Reason.REQUEST, signal=number if number > 0 else self.killed)
        elif isinstance(error, TimeLimitExceeded):
            self._end_when_gone(stored)
        elif isinstance(error, (Terminated, SystemExit, WorkerLostError)):
            self._end(State.READY, Reason.WORKER_LOST, error=stored)
        else:
            self._end(State.ERROR, Reason.EXCEPTION, error=stored)

    def fail(self, error: Exception) -> None:
        """The attempt could not even be started."""
        logger.error("task %s could not be started: %s", self.task.id, error)
        self._end(State.ERROR, Reason.EXCEPTION, error=_error(error))

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
    ) -> None:
        if self._over:  # a time limit is reported twice: when it is over, and when the child is gone
            return
        self._over = True
        task, now = self.task, time.monotonic()
        ran = now - self._began if seconds is None else seconds
        celery_state.task_ready(self.request, successful=state is State.SUCCESS)
        outcome = Outcome(
            task.id, task.attempt, task.token, state, reason, exit_code, signal, ran, value, error, ended=now
        )
        self._runner.listener.finished(outcome)
        if self._runner.eventer.enabled:
            self._send_event(state, error, shown, ran)

    def _send_event(self, state: State, error: bytes | None, shown: str, ran: float) -> None:
        send = self.request.send_event
        if state is State.SUCCESS:
            send("task-succeeded", result=shown, runtime=ran)
        elif state is State.KILLED:
            send("task-revoked", terminated=True, signum=self.killed, expired=False)
        elif state is State.ERROR:
            fields = codec.decode_error(error)
            send(
                "task-failed",
                exception=f"{fields['type']} {fields['message']}".strip() or shown,
                traceback=fields["traceback"],
            )


class Runner:
    """Starts attempts. `pool` is Celery's process pool, `eventer` takes Celery's events without ever blocking."""

    def __init__(
        self,
        app: Celery,
        hostname: str,
        pool: Any,
        commands: CommandRunner,
        eventer: Any,
        settings: Settings,
        listener: Listener,
    ) -> None:
        self.app = app
        self.hostname = hostname
        self.pool = pool
        self.commands = commands
        self.eventer = eventer
        self.settings = settings
        self.listener = listener
        #: The modules of the functions that were started, and when first (seconds since 1970).
        self.modules: dict[str, float] = {}
        #: Celery's Request wants a task object; what it is asked for (events on, no late acknowledgement) is the same for all.
        self.proxy_task = app.tasks["celery.backend_cleanup"]

    def start(self, task: ClaimedTask, cpus: Any) -> Attempt:
        """Start an attempt with `cpus` reserved; whatever goes wrong becomes its outcome."""
        attempt = Attempt(self, task)
        try:
            if task_received.receivers:
                task_received.send(sender=self, request=attempt.request)
            celery_state.task_reserved(attempt.request)
            if self.eventer.enabled:
                request = attempt.request
                request.send_event(
                    "task-received",
                    name=request.name,
                    args=request.argsrepr,
                    kwargs=request.kwargsrepr,
                    root_id=request.root_id,
                    parent_id=request.parent_id,
                    retries=task.attempt - 1,
                    eta=None,
                    expires=None,
                )
            variables = self._variables(task, format_cpus(cpus))
            if task.pattern is Pattern.SHELL:
                environment = dict(pair.split(b"=", 1) for pair in task.environment.split(b"\0") if b"=" in pair)
                environment.update((name.encode(), value.encode()) for name, value in variables.items())
                attempt.start_command(environment)
            else:
                self.modules.setdefault(task.function.partition(":")[0], time.time())
                attempt.start_function(variables)
        except Exception as error:
            attempt.fail(error)
        return attempt

    def adopt(self, task: ClaimedTask, began: float, killed: int | None) -> Attempt:
        """An attempt that runs since `began` (monotonic), and that is being killed by the signal `killed`, if any."""
        attempt = Attempt(self, task)
        attempt.resume(began, killed)
        celery_state.task_reserved(attempt.request)
        return attempt

    def _variables(self, task: ClaimedTask, cpus: str) -> dict[str, str]:
        variables = {
            "AQUE_TASK_ID": str(task.id),
            "AQUE_TID": str(task.id),
            "AQUE_ATTEMPT": str(task.attempt),
            "AQUE_CPUS": cpus,
            "AQUE_BROKER": self.settings.to_url(),
        }
        if task.parent_id is not None:
            variables["AQUE_PARENT_ID"] = str(task.parent_id)
        return variables


def _error(error: BaseException) -> bytes:
    return codec.encode_error(f"{type(error).__module__}.{type(error).__qualname__}", str(error))


def _shown_arguments(task: ClaimedTask) -> tuple[Any, Any, dict[str, Any]]:
    """(args, kwargs, embedded) for Celery's eyes: decoded without kombu's types, which only the child needs."""
    if task.pattern is Pattern.SHELL:
        return [word.decode(errors="backslashreplace") for word in task.argv[:64]], {}, {}
    try:
        args, kwargs = json.loads(task.arguments)
    except Exception:  # the child will say what is wrong with them
        return [], {}, {}
    return args, kwargs, {}
