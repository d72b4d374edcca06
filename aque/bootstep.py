"""Wires Aque into a Celery worker.

Two steps: one in the worker, which runs whether or not there is a broker, holds the scheduler; one in the consumer, which
comes and goes with the broker's connection, joins it to Celery's queues, events and ordinary tasks.
"""

import atexit
import logging
import os
import signal
import socket
import sys
from fractions import Fraction
from functools import partial
from typing import Any, NoReturn

from billiard.process import current_process
from celery import bootsteps
from celery.concurrency import get_implementation
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.platforms import EX_OK, strargv
from celery.signals import worker_init, worker_process_init
from celery.worker import state as celery_state
from celery.worker.consumer.tasks import Tasks
from celery.worker.control import Panel

from aque import control, machine, reload, restart, title
from aque.chooser import Place
from aque.commands import CommandRunner
from aque.contain import Strangers
from aque.errors import AqueError, BadSetting, UnknownTask
from aque.events import EventQueue
from aque.farm import settings_of
from aque.ledger import Ledger
from aque.pool import TaskPool
from aque.reaper import Heartbeat
from aque.resources import Capacity, CpuRequest, parse_memory
from aque.runner import Attempt, Runner
from aque.scheduler import Scheduler
from aque.settings import Settings
from aque.signals import WorkerSignals
from aque.store import Store, open_store, unchecked_store
from aque.supervisor import lease_clock
from aque.values import ClaimedTask, WorkerInfo
from aque.version import __version__

logger = logging.getLogger(__name__)

#: Commands that reserve no CPU at all still cost a process each: so many per CPU of the worker run at once.
FREE_COMMANDS_PER_CPU = 16
#: At a restart, so long is tried to write what there is to write; the rest is handed over.
FLUSH_SECONDS = 10.0


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
        self.commands = commands
        self.strangers = strangers
        self.signals = signals
        self.is_described = worker_id is None
        self.hostname: str = worker.hostname
        self.queues = frozenset(worker.app.amqp.queues.consume_from)
        self.whole = _whole(settings, worker.pool)
        is_personal = not settings.is_shared and not settings.unsafe_allow_root_sqlite
        self.user = "" if is_personal else machine.user_name()
        self.switches_user = not is_personal and os.geteuid() == 0
        self.ledger = Ledger(self.whole)
        self.eventer = EventQueue(worker.app, worker.hostname)
        self.heartbeat: Heartbeat | None = None
        place = Place(socket.gethostname(), sys.platform, self.queues, self.whole, self.user, self.switches_user)
        if strangers is not None:
            worker.pool.tell_children(commands.watch, strangers.watch)
        self.runner = Runner(
            worker.app,
            worker.hostname,
            worker.pool,
            commands,
            self.eventer,
            settings,
            place,
            self,
            (lambda: None) if strangers is None else strangers.end,
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
            is_urgent=lambda: signals.is_urgent or celery_state.should_terminate not in (None, False),
        )
        self.worker_id = self.scheduler.worker_id
        self.reloader: reload.Watch | None = None
        if worker.app.conf.get("aque_reload"):
            self.reloader = reload.Watch(
                restart.began, lambda: dict(self.runner.modules), lambda: os.kill(os.getpid(), signal.SIGHUP)
            )
        self.finished = self.scheduler.finished
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
        self.scheduler.start()
        self.heartbeat.start()
        if self.reloader is not None:
            self.reloader.start()

    def _take_over(self, handed_over: dict[str, Any]) -> None:
        attempts: dict[int, Attempt] = {}
        self.runner.lease_until = handed_over["lease_until"]

        def attempt_of(task: ClaimedTask, began: float, killed: int | None) -> Attempt:
            attempts[task.id] = self.runner.adopt(task, began, killed)
            return attempts[task.id]

        self.scheduler.adopt(handed_over["scheduler"], attempt_of)
        callbacks = {task_id: attempt.command_callbacks for task_id, attempt in attempts.items()}
        for task_id, command in self.commands.adopt(handed_over["commands"], callbacks).items():
            attempts[task_id].take_over(command)
        logger.info("restarted: %d commands go on", len(attempts))

    def hand_over(self) -> NoReturn:
        """Replace this process's image, and leave all that runs to the new one. Nothing but commands may run."""
        restart.run_exit_functions()  # they can take a second: commands are claimed meanwhile
        self.commands.freeze()
        self.scheduler.freeze(FLUSH_SECONDS)
        if self.heartbeat is not None:
            self.heartbeat.stop()
        self.eventer.stop(1.0)
        attempts = self.scheduler.attempts()
        commands = self.commands.export({a.command: i for i, a in attempts.items() if a.command is not None})
        state = {
            "commands": commands,
            "scheduler": self.scheduler.export(commands["running"]),
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
        if not self.is_described and not self.ledger.is_over_budget:
            self.store.describe(connection, self._info(self.worker_id))
            self.is_described = True

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
            containment="subreaper",
        )

    def lost(self) -> int:
        """Others have this worker's tasks: kill them here, and go on as a new worker."""
        worker_id = self.register(self.scheduler.is_drained)
        self.scheduler.lost(worker_id)
        return worker_id

    def serve(self, queues: frozenset[str]) -> None:
        """Claim from these queues from now on."""
        if queues != self.queues:
            self.queues = queues
            self.scheduler.serve(queues)

    def stop(self, drain_seconds: float) -> None:
        """Finish or give back everything, and leave the table."""
        self._stop_watching()
        clean = self.scheduler.stop(drain_seconds)
        if self.heartbeat is not None:
            self.heartbeat.stop()
        self.commands.stop()
        self.eventer.stop(1.0)
        try:
            if clean:
                with self.store.connect() as connection:
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


class WorkerStep(bootsteps.StartStopStep):
    """The scheduler: started after the pool, before there is any broker."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        worker.aque = None
        super().__init__(worker, **options)

    def start(self, worker: Any) -> None:
        settings = settings_of(worker.app)
        handover = restart.handover
        if handover is None:
            store = open_store(settings)
        elif handover.store_url == settings.store_url:
            store = unchecked_store(settings)  # it may be away just now: all the more reason to keep what runs
        else:
            raise BadSetting(
                "the store was changed while the worker ran: stop it and start it, a restart is not enough."
            )
        worker.aque = AqueWorker(
            worker,
            settings,
            store,
            worker.aque_commands,
            worker.aque_strangers,
            worker.aque_signals,
            None if handover is None else handover.worker_id,
        )
        if handover is not None:
            worker.aque.scheduler.reconcile()
        worker.aque.start(worker.aque_handed_over)
        # Celery closes the pool before it stops this step, and a closed pool silently drops what it is given: let it be
        # closed when it is stopped, which is after the drain.
        worker.pool.close = worker.aque.leave_pool

    def stop(self, worker: Any) -> None:
        aque: AqueWorker | None = worker.aque
        if aque is None:
            return
        if aque.signals.restart_wanted:
            aque.settle()
        if aque.signals.restart_wanted:
            # Commands are looked after until Celery has stopped all that is its own, see `_run`. The pid file stays.
            worker.aque_kept, worker.aque = aque, None
            worker.aque_pidlock, worker.pidlock = worker.pidlock, None
        else:
            aque.stop(aque.settings.drain_seconds)
            worker.aque = None

    def terminate(self, worker: Any) -> None:
        if worker.aque is not None:
            worker.aque.stop(0.0)
            worker.aque = None


class ConsumerStep(bootsteps.StartStopStep):
    """Joins the scheduler to Celery's consumer, anew after every reconnection."""

    requires = (Tasks,)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._handle: Any = None

    def start(self, consumer: Any) -> None:
        aque: AqueWorker | None = consumer.controller.aque
        if aque is None:
            return
        if self._handle is None:
            self._handle = consumer.on_task_request
            consumer.on_task_request = lambda request: aque.charge(request, self._handle)
            for name in ("add_task_queue", "cancel_task_queue"):
                setattr(consumer, name, self._then_serve(getattr(consumer, name), consumer, aque))
        _look_up_from_waiting(consumer.connection)
        consumer.update_strategies()  # they have closed over the handler that was there before
        aque.eventer.dispatcher = consumer.event_dispatcher
        self._serve(consumer, aque)

    def _serve(self, consumer: Any, aque: AqueWorker) -> None:
        if consumer.task_consumer is not None:
            aque.serve(frozenset(queue.name for queue in consumer.task_consumer.queues))

    def _then_serve(self, method: Any, consumer: Any, aque: AqueWorker) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            self._serve(consumer, aque)
            return result

        return call


def _whole(settings: Settings, pool: Any) -> Capacity:
    """All that this worker may reserve."""
    usable = Fraction(machine.usable_cpus())
    cpus = CpuRequest.parse(settings.cpus).share(usable) if settings.cpus else usable
    if cpus <= 0:
        raise BadSetting(f"cpus must be more than 0, not {settings.cpus!r}.")
    memory = parse_memory(settings.memory) if settings.memory else machine.total_memory_bytes()
    return Capacity(cpus, memory, pool.limit, max(FREE_COMMANDS_PER_CPU, int(FREE_COMMANDS_PER_CPU * cpus)))


def _look_up_from_waiting(connection: Any) -> None:
    """Celery's loop waits 2 s for messages before it looks whether it should stop: let it look four times as often."""
    drain_events = connection.drain_events
    connection.drain_events = lambda timeout=None: drain_events(timeout=None if timeout is None else min(timeout, 0.5))


def _end_worker() -> None:
    celery_state.should_stop = EX_OK


def _run(worker: Any, start: Any) -> None:
    """Celery's `start`, which returns when the worker has stopped; then the restart, if there is to be one."""
    start()
    aque: AqueWorker | None = worker.aque_kept
    if aque is None:
        return
    restart.hold_signals()
    if aque.signals.leave():
        if worker.aque_pidlock:
            atexit.unregister(worker.aque_pidlock.release)
        aque.hand_over()
    restart.deliver_signals()
    aque.stop(aque.settings.drain_seconds)
    if worker.aque_pidlock:
        worker.aque_pidlock.release()


def _install_signals(worker: Any, install: Any) -> None:
    """Celery's handlers, then ours over them; then what a restart has held back."""
    install(worker)
    worker.aque_signals.install()
    if restart.handover is not None:
        restart.deliver_signals()


@worker_process_init.connect
def _name_child(sender: Any, **_: Any) -> None:
    if _is_named:
        title.show(title.CHILD, f"{sender}: {current_process().name}")


_is_named = False


def _name(worker: Any) -> None:
    global _is_named  # noqa: PLW0603  for the children, which inherit it
    if not _is_named:
        _is_named = True
        title.name_children()
    worker.set_process_status = lambda info: title.show(title.WORKER, f"{worker.hostname} {info} ({strargv(sys.argv)})")


@worker_init.connect
def _prepare(sender: Any, **_: Any) -> None:
    """Before the pool forks: the loop that goes on without a broker, and the server of the supervisors."""
    if WorkerStep not in sender.app.steps["worker"]:
        return
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # functions beside the worker, as `python -m` finds them
    pool = get_implementation(sender.pool_cls) if isinstance(sender.pool_cls, str) else sender.pool_cls
    if pool is PreforkPool:
        sender.pool_cls = TaskPool
    if issubclass(pool, PreforkPool):
        # In the hub's loop the thread that waits for the broker is the one that reads the pool's results: while the broker
        # is away nothing would finish (measured: 8 -> 8 finished tasks in 5 s, against 12 -> 50).
        sender.use_eventloop = False
        # The ledger bounds what the pool has. Its own bound would block the thread that reports an end, and that is about to
        # free the place, when the next task is started from there.
        sender.pool_putlocks = False
    _name(sender)
    sender.aque_kept = sender.aque_pidlock = None
    sender.aque_signals = WorkerSignals(
        lambda: sender.aque and sender.aque.scheduler.drain(),
        lambda: sender.aque and sender.aque.scheduler.commands_only(),
        lambda: reload.problem_since(restart.began),
    )
    sender.install_platform_tweaks = partial(_install_signals, install=sender.install_platform_tweaks)
    sender.start = partial(_run, sender, sender.start)
    sender.aque_commands = CommandRunner()
    sender.aque_strangers = Strangers(sender.aque_commands.pids) if sender.pool_cls is TaskPool else None
    sender.aque_handed_over = None if restart.handover is None else restart.handover.state()
    if sender.aque_handed_over is None:
        sender.aque_commands.start()


_celery_revoke = Panel.data["revoke"]


def _revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **options: Any) -> Any:
    """Celery's `revoke`: for tasks of the table it writes the row that `aque kill` writes; others go Celery's way."""
    aque: AqueWorker | None = getattr(state.consumer.controller, "aque", None)
    names = [str(i) for i in (task_id if isinstance(task_id, (list, tuple, set)) else [task_id])]
    if aque is None:
        return _celery_revoke(state, task_id, terminate, signal, **options)
    with aque.store.connect() as connection:
        ids = aque.store.ids_of(connection, names)
        known = aque.store.stored_results(connection, ids.values())
    ours = [i for i in ids.values() if i in known]
    if ours:
        try:
            control.kill(aque.store, ours, control.parse_signal(signal or "TERM"), waiting_only=not terminate)
        except UnknownTask as error:
            logger.warning("revoke: %s", error)
    theirs = [name for name in names if ids.get(name) not in known]
    if theirs:
        return _celery_revoke(state, theirs, terminate, signal, **options)
    return {"ok": f"tasks {', '.join(map(str, ours))} flagged as revoked"}


def _terminate(state: Any, signal: Any, task_id: Any, **options: Any) -> Any:
    """Celery's `terminate` is `revoke` with a signal."""
    return _revoke(state, task_id, terminate=True, signal=signal, **options)


Panel.data["revoke"] = _revoke
Panel.data["terminate"] = _terminate
