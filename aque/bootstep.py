"""Wires Aque into a Celery worker.

Two steps: one in the worker, which runs whether or not there is a broker, holds the scheduler; one in the consumer, which
comes and goes with the broker's connection, joins it to Celery's queues, events and ordinary tasks.
"""

import logging
import os
import socket
import sys
from fractions import Fraction
from typing import Any

from celery import bootsteps
from celery.concurrency import get_implementation
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.platforms import EX_OK
from celery.signals import worker_init
from celery.worker import state as celery_state
from celery.worker.consumer.tasks import Tasks
from celery.worker.control import Panel

from aque import control, machine
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
from aque.runner import Runner
from aque.scheduler import Scheduler
from aque.settings import Settings
from aque.store import Store, open_store
from aque.supervisor import lease_clock
from aque.values import WorkerInfo
from aque.version import __version__

logger = logging.getLogger(__name__)

#: Commands that reserve no CPU at all still cost a process each: so many per CPU of the worker run at once.
FREE_COMMANDS_PER_CPU = 16


class AqueWorker:
    """What Aque adds to one Celery worker, from start to stop."""

    def __init__(
        self, worker: Any, settings: Settings, store: Store, commands: CommandRunner, strangers: Strangers | None
    ) -> None:
        self.settings = settings
        self.store = store
        self.commands = commands
        self.strangers = strangers
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
        self.runner = runner = Runner(
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
            self.register(),
            self.ledger,
            place,
            runner.start,
            until=worker.app.conf.get("aque_until"),
            on_end=_end_worker,
            is_urgent=lambda: celery_state.should_terminate not in (None, False),
        )
        self.finished = self.scheduler.finished
        self.wrote = self.scheduler.wrote

    def start(self, worker_id: int) -> None:
        """Claim and run from now on."""
        self.heartbeat = Heartbeat(
            self.store,
            worker_id,
            self.settings.lease_seconds,
            self.settings.max_lost,
            self.lost,
            self.runner.renew,
            (lambda: None) if self.strangers is None else self.strangers.look,
        )
        self.eventer.start()
        self.scheduler.start()
        self.heartbeat.start()

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
            self.store.register(
                connection,
                WorkerInfo(
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
                ),
                draining,
            )
        self.worker_id = worker_id
        self.runner.lease_until = before + self.settings.lease_seconds
        return worker_id

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
        store = open_store(settings)
        worker.aque = AqueWorker(worker, settings, store, worker.aque_commands, worker.aque_strangers)
        worker.aque.start(worker.aque.worker_id)
        # Celery closes the pool before it stops this step, and a closed pool silently drops what it is given: let it be
        # closed when it is stopped, which is after the drain.
        worker.pool.close = worker.aque.scheduler.drain

    def stop(self, worker: Any) -> None:
        if worker.aque is not None:
            worker.aque.stop(worker.aque.settings.drain_seconds)
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
    sender.aque_commands = CommandRunner()
    sender.aque_commands.start()
    sender.aque_strangers = Strangers(sender.aque_commands.pids) if sender.pool_cls is TaskPool else None


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
