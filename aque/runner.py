"""run: a claimed task as an attempt, with what is reserved for it, its environment and its user."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from celery import Celery
from celery.signals import task_received
from celery.worker import state as celery_state

from aque import identity, machine
from aque.assignments import Assigned, Assignments
from aque.attempt import Announcer, Attempt, Listener
from aque.celery_request import Row, RowRequest
from aque.chooser import Place, is_own, runs_in_pool
from aque.commands import CommandRunner
from aque.inprocess import InProcess
from aque.resources import Capacity, format_cpus
from aque.settings import Settings
from aque.supervised import OtherUser
from aque.taskserver import TaskServer
from aque.values import ClaimedTask, Pattern


class Runner:
    """Starts attempts. `pool` is one of `aque.pool` or `aque.inprocess`, `eventer` takes Celery's events without ever blocking;
    `end_strangers` kills what processes that died have left to this one, see `contain.Strangers`."""

    def __init__(
        self,
        app: Celery,
        hostname: str,
        pool: Any,
        commands: CommandRunner,
        eventer: Any,
        announcer: Announcer,
        settings: Settings,
        place: Place,
        listener: Listener,
        end_strangers: Callable[[], None],
        assignments: Assignments,
        line: TaskServer,
    ) -> None:
        self.app = app
        self.hostname = hostname
        self.pool = pool
        self.runs_functions_itself = isinstance(pool, InProcess)
        self.commands = commands
        self.eventer = eventer
        self.announcer = announcer
        #: (soft, hard) in seconds, by the names of tasks: for those that have none of their own, see `panel`.
        self.time_limits: dict[str, tuple[float | None, float | None]] = {}
        self.settings = settings
        self.place = place
        self.listener = listener
        self.rlimits = machine.parse_rlimits(settings.rlimits)
        self.end_strangers = end_strangers
        self.assignments = assignments
        self.line = line
        #: A moment of `processes.lease_clock`: so long the table holds this worker's tasks for it.
        self.lease_until = 0.0
        #: What must not outlive the lease.
        self.strict: set[Attempt] = set()
        #: The modules of the functions that were started, and when first (seconds since 1970).
        self.modules: dict[str, float] = {}
        #: Celery's Request wants a task object; what it is asked for (events on, no late acknowledgement) is the same for all.
        self.proxy_task = app.tasks["celery.backend_cleanup"]

    def renew(self, until: float) -> None:
        """The worker's lease holds until this moment of `processes.lease_clock`."""
        self.lease_until = until
        for attempt in list(self.strict):
            attempt.renew(until)

    def start(self, task: ClaimedTask, need: Capacity) -> Attempt:
        """Start an attempt with `need` reserved; whatever goes wrong becomes its outcome."""
        task = self._limited(task)
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
                    retries=task.failed,
                    eta=None,
                    expires=None,
                )
            attempt.assigned = self.assignments.take((task.id, task.attempt), need)
            attempt.address = self.line.open(task)
            variables = self._variables(task, need, attempt.assigned) | {"AQUE_WORKER": attempt.address}
            if why := identity.refusal(task, self.place, self.settings):
                attempt.refuse(why)
            elif runs_in_pool(task, self.place):
                self.modules.setdefault(task.function.partition(":")[0], time.time())
                attempt.start_function(variables)
            else:
                user, environment = self._other_user(task, variables)
                start = attempt.start_command if task.pattern is Pattern.SHELL else attempt.start_sandboxed
                start(environment, user)
        except Exception as error:
            attempt.fail(error)
        return attempt

    def request(self, task: ClaimedTask) -> RowRequest:
        """The task as Celery sees it."""
        return RowRequest(
            Row(task, self.settings.event_arguments),
            app=self.app,
            hostname=self.hostname,
            eventer=self.eventer,
            task=self.proxy_task,
            decoded=False,
        )

    def _limited(self, task: ClaimedTask) -> ClaimedTask:
        """With the time limits that remote control has set for its name, where it has none of its own."""
        if task.name not in self.time_limits:
            return task
        soft, hard = self.time_limits[task.name]
        own_soft, own_hard = task.soft_time_limit_seconds, task.time_limit_seconds
        return replace(
            task,
            soft_time_limit_seconds=soft if own_soft is None else own_soft,
            time_limit_seconds=hard if own_hard is None else own_hard,
        )

    def _other_user(self, task: ClaimedTask, variables: dict[str, str]) -> tuple[OtherUser | None, dict[bytes, bytes]]:
        """The user that a task's process becomes (None: none), and its environment."""
        settings = self.settings
        if is_own(task, self.place):
            return None, identity.environment(task.environment, variables)
        environment = identity.environment(
            task.environment, variables, allow=settings.environment_allow, deny=settings.environment_deny
        )
        return OtherUser(task.user, settings.min_uid, settings.allow_root_tasks), environment

    def adopt(self, task: ClaimedTask, began: float, killed: int | None) -> Attempt:
        """An attempt that runs since `began` (monotonic), and that is being killed by the signal `killed`, if any."""
        attempt = Attempt(self, task)
        attempt.resume(began, killed)
        if task.strict_lease:
            self.strict.add(attempt)
        celery_state.task_reserved(attempt.request)
        return attempt

    def _variables(self, task: ClaimedTask, need: Capacity, assigned: Assigned) -> dict[str, str]:
        threads = identity.thread_variables(need.cpus, task.environment) if self.settings.set_threads else {}
        variables = threads | {
            "AQUE_TASK_ID": str(task.id),
            "AQUE_TID": str(task.id),
            "AQUE_ATTEMPT": str(task.attempt),
            "AQUE_CPUS": format_cpus(need.cpus),
            **identity.index_variables(assigned),
            "AQUE_BROKER": self.settings.to_url() if is_own(task, self.place) else self.settings.to_url_of_others(),
        }
        if task.parent_id is not None:
            variables["AQUE_PARENT_ID"] = str(task.parent_id)
        return variables
