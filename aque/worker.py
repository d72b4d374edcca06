"""What Aque adds to one Celery worker, from its start to its stop, or to the restart of its image."""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from fractions import Fraction
from functools import partial
from typing import Any, NoReturn

from celery.platforms import EX_OK
from celery.utils.time import rate
from celery.worker import state as celery_state

from aque import machine, reload, restart
from aque.acks import Acks
from aque.announcer import Announcer
from aque.assignments import Assignments
from aque.attempt import Attempt
from aque.chooser import Place, runs_in_pool
from aque.cleaner import Cleaner
from aque.commands import CommandRunner
from aque.contain import Strangers
from aque.errors import AqueError, BadSetting
from aque.inprocess import InProcess
from aque.ledger import Ledger
from aque.pool import TaskPool
from aque.processes import lease_clock
from aque.publisher import EventQueue
from aque.reaper import Heartbeat
from aque.resources import Capacity, CpuRequest, format_amounts, parse_indices, parse_memory, parse_tags
from aque.runner import Runner
from aque.scheduler import Scheduler
from aque.settings import Settings
from aque.signals import WorkerSignals
from aque.store import Ages, DatabaseError, Store
from aque.taskserver import TaskServer
from aque.values import NO_KILLS, ClaimedTask, Outcome, WorkerInfo
from aque.version import __version__

logger = logging.getLogger(__name__)

#: Commands that reserve no CPU at all still cost a process each: so many per CPU of the worker run at once.
FREE_COMMANDS_PER_CPU = 16
#: At a restart, so long is tried to write what there is to write; the rest is handed over.
FLUSH_SECONDS = 10.0
#: Between two looks for events that are too old to be kept.
FORGET_SECONDS = 60.0


class AqueWorker:
    """What Aque adds to one Celery worker, from start to stop."""

    def __init__(
        self,
        worker: Any,
        settings: Settings,
        store: Store,
        commands: CommandRunner,
        strangers: Strangers | None,
        signals: WorkerSignals,
        worker_id: int | None,
    ) -> None:
        """`worker_id`: of the image before this one; None: this is a new worker."""
        self.settings = settings
        self.store = store
        store.worker_host = socket.gethostname()
        self.commands = commands
        self.strangers = strangers
        self.signals = signals
        self.is_described = worker_id is None
        self._forget_events_at = 0.0
        self._avoids_shown: tuple[tuple[str, ...], dict[bytes, str]] | None = None
        self.hostname: str = worker.hostname
        self.queues = frozenset(worker.app.amqp.queues.consume_from)
        self.whole = whole_of(settings, worker.pool.limit)
        is_personal = not settings.is_shared and not settings.unsafe_allow_root_sqlite
        if is_personal and (why := store.why_not_personal()):
            raise BadSetting(
                f"an SQLite store is for its owner's own tasks, and {why}. Nothing was started: run the worker as the owner, "
                "make file and directory the owner's alone (chmod go-w), or use PostgreSQL."
            )
        self.user = "" if is_personal else machine.user_name()
        self.switches_user = not is_personal and os.geteuid() == 0
        self.ledger = Ledger(self.whole)
        self.eventer = EventQueue(worker.app, worker.hostname, self._described)
        self.announcer = Announcer(self.eventer)
        self.acks = Acks()
        self.heartbeat: Heartbeat | None = None
        self.cleaner: Cleaner | None = None
        self.ages = ages(settings, worker.app)
        self.tags = parse_tags(settings.tags)
        place = Place(
            socket.gethostname(),
            sys.platform,
            self.queues,
            self.whole,
            self.user,
            self.switches_user,
            tags=frozenset(self.tags),
        )
        self._pool = worker.pool
        self._lent: set[tuple[int, int]] = set()
        self.line = TaskServer(self)
        if isinstance(self._pool, TaskPool):
            self._pool.follow(self._grown, self._when_slot_is_free)
            self._pool.tell_children(commands.watch, *(() if strangers is None else (strangers.watch,)))
        elif isinstance(self._pool, InProcess):
            logger.warning(
                "functions run in this worker's own process (pool %s): they cannot be killed and have no time limits, share "
                "one environment, and what they leave running stays; commands are as in any other pool",
                self._pool.name,
            )
        self.runner = Runner(
            worker.app,
            worker.hostname,
            worker.pool,
            commands,
            self.eventer,
            self.announcer,
            settings,
            place,
            self,
            (lambda: None) if strangers is None else strangers.end,
            Assignments(os.sched_getaffinity(0) if settings.pin else (), parse_indices(settings.resources)),
            self.line,
        )
        self.scheduler = Scheduler(
            store,
            settings,
            self.register() if worker_id is None else worker_id,
            self.ledger,
            place,
            self.runner.start,
            until=worker.app.conf.get("aque_until"),
            on_end=_end_worker,
            on_news=self.tell,
            on_written=self.announcer.written,
            ordered_rate=partial(_ordered_rate, worker.app),
            is_urgent=lambda: signals.is_urgent or celery_state.should_terminate not in (None, False),
        )
        self.worker_id = self.scheduler.worker_id
        self.reloader: reload.Watch | None = None
        if worker.app.conf.get("aque_reload"):
            self.reloader = reload.Watch(
                restart.began, lambda: dict(self.runner.modules), lambda: os.kill(os.getpid(), signal.SIGHUP)
            )
        self.wrote = self.scheduler.wrote

    def start(self, handed_over: dict[str, Any] | None) -> None:
        """Claim and run from now on; first take over what the image before this one has `handed_over`, if anything."""
        if handed_over is not None:
            self._take_over(handed_over)
        self.heartbeat = Heartbeat(
            self.store,
            self.worker_id,
            self.settings.lease_seconds,
            self.settings.max_lost,
            self.lost,
            self.renewed,
            (lambda: None) if self.strangers is None else self.strangers.look,
        )
        self.eventer.start()
        self.acks.start()
        self.line.start()
        self.scheduler.start()
        self.heartbeat.start()
        self.cleaner = Cleaner(self.store, self.worker_id, self.ages)
        self.cleaner.start()
        if self.reloader is not None:
            self.reloader.start()

    def _take_over(self, handed_over: dict[str, Any]) -> None:
        attempts: dict[int, Attempt] = {}
        self.runner.lease_until = handed_over["lease_until"]

        def attempt_of(task: ClaimedTask, began: float, killed: int | None) -> Attempt:
            attempts[task.id] = self.runner.adopt(task, began, killed)
            return attempts[task.id]

        self.runner.assignments.adopt(handed_over["assignments"])
        self.scheduler.run_times.put(handed_over["run_times"])
        self.scheduler.adopt(handed_over["scheduler"], attempt_of)
        callbacks = {task_id: attempt.command_callbacks for task_id, attempt in attempts.items()}
        for task_id, command in self.commands.adopt(handed_over["commands"], callbacks).items():
            attempts[task_id].take_over(command)
        self.line.adopt(handed_over["line"], {task_id: attempt.task for task_id, attempt in attempts.items()})
        logger.info("restarted: %d commands go on", len(attempts))

    def hand_over(self) -> NoReturn:
        """Replace this process's image, and leave all that runs to the new one. Nothing but commands may run."""
        restart.run_exit_functions()  # they can take a second: commands are claimed meanwhile
        self.commands.freeze()
        self.scheduler.freeze(FLUSH_SECONDS)
        if self.heartbeat is not None:
            self.heartbeat.stop()
        if self.cleaner is not None:
            self.cleaner.stop()
        self.line.stop()
        self.eventer.stop(1.0)
        self.acks.stop(1.0)
        attempts = self.scheduler.attempts()
        line = self.line.export()
        commands = self.commands.export({a.command: i for i, a in attempts.items() if a.command is not None})
        scheduler = self.scheduler.export(commands["running"])
        state = {
            "commands": commands,
            "scheduler": scheduler,
            "line": line,
            "run_times": self.scheduler.run_times.take(),
            "assignments": self.runner.assignments.export((task.id, task.attempt) for task, *_ in scheduler["running"]),
            "lease_until": self.runner.lease_until,
        }
        self.store.close()
        restart.replace_image(
            self.worker_id, self.settings.store_url, commands["server"], self.commands.descriptors(commands), state
        )

    def renewed(self, connection: Any, until: float) -> None:
        """The lease holds until this moment of `lease_clock`. After a restart: write what has changed about this worker. While
        it runs more than it may now, its row keeps the larger numbers, which are what its tasks have reserved."""
        self.runner.renew(until)
        if isinstance(self._pool, TaskPool):
            with self.scheduler.lending:
                self._pool.trim()
        self._write_run_times(connection)
        self._show_avoided(connection)
        if not self.is_described and not self.ledger.is_over_budget:
            self.store.describe(connection, self._info(self.worker_id))
            self.is_described = True
        self._forget_old_events(connection)

    def _forget_old_events(self, connection: Any) -> None:
        """What has happened to tasks longer ago than anybody may want to hear of; once a minute."""
        seconds = self.settings.event_retention_seconds
        if seconds and time.monotonic() >= self._forget_events_at:
            self._forget_events_at = time.monotonic() + FORGET_SECONDS
            self.store.transitions.delete_older(connection, self.store.now(connection) - seconds)

    def _write_run_times(self, connection: Any) -> None:
        runs = self.scheduler.run_times.take()
        try:
            self.store.run_times.record(connection, runs)
        except DatabaseError as error:  # of an average they will not be missed: nothing else must wait for them
            logger.warning("the run times of %d names were not written: %s", len(runs), str(error).splitlines()[0])

    def _show_avoided(self, connection: Any) -> None:
        """Write what is not claimed for a while, if that has changed; the image before this one may have left something."""
        shown = self.scheduler.avoids(), self.scheduler.missing_paths
        if shown != self._avoids_shown:
            self.store.refusals.set_avoids(connection, self.worker_id, *shown)
            self._avoids_shown = shown

    def register(self, draining: bool = False) -> int:
        """A new incarnation of this worker in the table; its id."""
        pid = os.getpid()
        before = lease_clock()
        with self.store.begin() as connection:
            same = [
                row for row in self.store.live_workers(connection) if row.info.name == self.hostname and row.is_live
            ]
            if any(row.info.pid != pid for row in same):
                logger.warning(
                    "there is a live worker named %s: two on one machine reserve its CPUs twice, and answer to one name "
                    "(give one another name with -n, and each its share with --cpus)",
                    self.hostname,
                )
            (worker_id,) = self.store.reserve_ids(connection, 1)
            self.store.register(connection, self._info(worker_id), draining)
        self.worker_id = worker_id
        self._avoids_shown = (), {}
        self.runner.lease_until = before + self.settings.lease_seconds
        return worker_id

    def _info(self, worker_id: int) -> WorkerInfo:
        pid = os.getpid()
        return WorkerInfo(
            id=worker_id,
            name=self.hostname,
            host=socket.gethostname(),
            pid=pid,
            pid_started=machine.process_started(pid) or 0.0,
            boot_id=machine.host_id(),
            cpus=str(self.whole.cpus),
            memory_bytes=self.whole.memory_bytes,
            python_slots=self.whole.python_slots,
            command_slots=self.whole.command_slots,
            queues=tuple(sorted(self.queues)),
            platform=sys.platform,
            version=__version__,
            lease_seconds=self.settings.lease_seconds,
            user=self.user,
            switches_user=self.switches_user,
            containment="; ".join(
                [self.commands.containment, *([NO_KILLS] if self.runner.runs_functions_itself else [])]
            ),
            resources=format_amounts(self.whole.resources),
            tags=self.tags,
        )

    def tell(self) -> None:
        """The worker's row should say something else: let the heartbeat write it now."""
        if self.heartbeat is not None:
            self.heartbeat.soon()

    def _described(self, ids: Sequence[int]) -> dict[int, dict[str, Any]]:
        """What every event says of a task; called by the thread that publishes."""
        fields = ["id", "celery_id", "name", "job_id", "parent_id"]
        with self.store.connect() as connection:
            rows = list(self.store.tasks(connection, {"id": list(ids)}, fields))
        return {
            row["id"]: {
                "uuid": row["celery_id"] or str(row["id"]),
                "name": row["name"],
                "root_id": str(row["job_id"]),
                "parent_id": None if row["parent_id"] is None else str(row["parent_id"]),
            }
            for row in rows
        }

    # -- a pool that grows and shrinks --------------------------------------------------------------------------------

    def _grown(self, n: int) -> None:
        """The pool has so many children more."""
        self.ledger.enlarge(Capacity(Fraction(0), 0, python_slots=n))
        self._resized()
        self.scheduler.look()

    def _when_slot_is_free(self, remove: Callable[[], None]) -> None:
        """Call `remove` when a child of the pool has nothing to do, and never will have again."""
        slot = Capacity(Fraction(0), 0, python_slots=1)

        def begin() -> None:
            remove()
            self.ledger.write_off(slot)
            self._resized()

        self.ledger.in_turn(slot, begin)

    def _resized(self) -> None:
        self.whole = self.ledger.whole
        self.is_described = False
        self.tell()

    def lost(self) -> int:
        """Others have this worker's tasks: kill them here, and go on as a new worker."""
        worker_id = self.register(self.scheduler.is_drained)
        self.scheduler.lost(worker_id)
        if self.cleaner is not None:
            self.cleaner.worker_id = worker_id
        return worker_id

    def serve(self, queues: frozenset[str]) -> None:
        """Claim from these queues from now on."""
        if queues != self.queues:
            self.queues = queues
            self.scheduler.serve(queues)

    def unkillable(self, ids: Iterable[int]) -> list[int]:
        """Those of these tasks that run here and that a kill does not end."""
        attempts = self.scheduler.attempts()
        return [task_id for task_id in ids if task_id in attempts and not attempts[task_id].can_be_killed]

    def stop(self, drain_seconds: float) -> None:
        """Finish or give back everything, and leave the table."""
        self._stop_watching()
        clean = self.scheduler.stop(drain_seconds)
        if isinstance(self._pool, InProcess) and not clean:
            self._pool.abandon()
        self.line.stop()
        if self.heartbeat is not None:
            self.heartbeat.stop()
        if self.cleaner is not None:
            self.cleaner.stop()
        self.commands.stop()
        self.eventer.stop(1.0)
        self.acks.stop(1.0)
        try:
            if clean:
                with self.store.connect() as connection:
                    self._write_run_times(connection)
                    self.store.unregister(connection, self.worker_id)
        except AqueError as error:
            logger.error("this worker could not sign off: %s", error)
        self.store.close()

    def leave_pool(self) -> None:
        """Give nothing more to the pool."""
        if self.signals.restart_wanted:
            self.scheduler.commands_only()
        else:
            self.scheduler.drain()

    def settle(self) -> None:
        """Before a restart: finish or give back the Python tasks. Returns early if it is to be a stop after all."""
        self._stop_watching()
        self.scheduler.settle(
            self.settings.drain_seconds, lambda: self.signals.is_urgent or not self.signals.restart_wanted
        )

    def _stop_watching(self) -> None:
        if self.reloader is not None:
            self.reloader.stop()
            self.reloader = None

    # -- what running tasks ask, see `taskserver` -----------------------------------------------------------------------

    def block(self, task: ClaimedTask) -> str | None:
        """The task waits for others: what it reserves is free meanwhile, and the pool gets a child in its place."""
        if not runs_in_pool(task, self.runner.place):
            self.scheduler.block(task)
            return None
        if not hasattr(self._pool, "lend"):
            return (
                f"task {task.id} would wait for another task inside of a worker whose pool cannot grow: it might wait for "
                "ever. Use the prefork pool, or submit what needs the result as a task of its own."
            )
        if self._pool.lent >= self.settings.most_blocked:
            return (
                f"{self._pool.lent} tasks of this worker wait for other tasks already (setting most_blocked): task {task.id} "
                "would wait for ever if they all need this one. Submit what needs the result as a task of its own."
            )
        with self.scheduler.lending:
            if (task.id, task.token) not in self._lent:
                self._lent.add((task.id, task.token))
                self._pool.lend()
            if not self.scheduler.block(task):
                self._take_back(task.id, task.token)
        return None

    def unblock(self, task: ClaimedTask, granted: Callable[[], None]) -> None:
        """The task would go on."""
        with self.scheduler.lending:
            self.scheduler.unblock(task, granted, lambda: self._take_back(task.id, task.token))

    def _take_back(self, task_id: int, token: int) -> None:
        with self.scheduler.lending:
            if (task_id, token) in self._lent:
                self._lent.discard((task_id, token))
                self._pool.take_back()

    def finished(self, outcome: Outcome) -> None:
        """An attempt is over."""
        self._take_back(outcome.id, outcome.token)
        self.scheduler.finished(outcome)

    def told(self, task: ClaimedTask, state: str, meta: bytes) -> None:
        """The task tells of itself."""
        self.scheduler.told(task, state, meta)

    # -- ordinary Celery tasks ----------------------------------------------------------------------------------------

    def charge(self, request: Any, handle: Any) -> None:
        """Run an ordinary Celery request when a CPU and a pool child are free, and hold both while it runs."""
        need = Capacity(min(Fraction(1), self.whole.cpus), 0, python_slots=1)
        charged = [True]

        def release() -> None:
            if charged:
                charged.clear()
                self.ledger.release(need)
                self.scheduler.look()

        def followed(method: Any, is_end: Any = lambda *args, **kwargs: True) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                try:
                    return method(*args, **kwargs)
                finally:
                    if is_end(*args, **kwargs):
                        release()

            return call

        request.on_success = followed(request.on_success)
        request.on_failure = followed(request.on_failure)
        request.on_timeout = followed(request.on_timeout, lambda soft, timeout: not soft)

        def start() -> None:
            try:
                handle(request)
            except Exception:
                logger.exception("an ordinary task could not be started: %s", request.id)
                release()
            if request._already_revoked:  # while it waited for its turn: it was dropped, and nothing will call back
                release()

        self.ledger.in_turn(need, start)


def ages(settings: Settings, app: Any) -> Ages:
    """How long what is kept. Celery's `result_expires` counts where the app sets it: its default of a day does not."""
    expires = app.conf.result_expires if app.conf.value_set_for("result_expires") else 0
    celery_seconds = expires.total_seconds() if isinstance(expires, timedelta) else float(expires or 0)
    return Ages(
        settings.output_retention_seconds,
        settings.result_retention_seconds or max(0.0, celery_seconds),
        settings.task_retention_seconds,
        settings.output_quota_bytes,
    )


def whole_of(settings: Settings, python_slots: int) -> Capacity:
    """All that a worker with these settings may reserve. Raises BadSetting or BadReservation."""
    usable = Fraction(machine.usable_cpus())
    cpus = CpuRequest.parse(settings.cpus).share(usable) if settings.cpus else usable
    if cpus <= 0:
        raise BadSetting(f"cpus must be more than 0, not {settings.cpus!r}.")
    memory = parse_memory(settings.memory) if settings.memory else machine.total_memory_bytes()
    commands = max(FREE_COMMANDS_PER_CPU, int(FREE_COMMANDS_PER_CPU * cpus))
    resources = {name: len(numbers) for name, numbers in parse_indices(settings.resources).items()}
    return Capacity(cpus, memory, python_slots, commands, resources)


def _ordered_rate(app: Any, name: str) -> float | None:
    """Of a task that the app has registered: so many may start a second, as it says or remote control has set; 0: any
    number. None: it is not registered here."""
    task = app.tasks.get(name)
    return None if task is None else rate(task.rate_limit or 0)


def _end_worker() -> None:
    celery_state.should_stop = EX_OK
