"""Wires Aque into a Celery worker.

Two steps: one in the worker, which runs whether or not there is a broker, holds the scheduler; one in the consumer, which
comes and goes with the broker's connection, joins it to Celery's queues, events and ordinary tasks.

A worker is a program (`celery worker`), whose process is its own, or it is embedded: in a thread of a process, such as a
test's, that is somebody else's. There it leaves alone what belongs to the process: signals, the process's name, `sys.path`,
children that it has not started, and orphans.
"""

import atexit
import logging
import os
import sys
from functools import partial
from typing import Any, NoReturn

from billiard.process import current_process
from celery import bootsteps
from celery.concurrency import get_implementation
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.platforms import EX_OK, strargv
from celery.signals import celeryd_init, worker_init, worker_process_init
from celery.worker.consumer.tasks import Tasks

import aque.panel  # noqa: F401  in place of Celery's revoke and terminate
from aque import broker_connection, reload, restart, title
from aque.commands import CommandRunner
from aque.contain import Strangers
from aque.errors import AqueError, BadSetting
from aque.farm import farm_of, settings_of
from aque.inprocess import InProcess, SoloPool, in_process
from aque.pool import TaskPool
from aque.publisher import AlwaysEnabled
from aque.signals import WorkerSignals
from aque.store import open_store, unchecked_store
from aque.worker import AqueWorker, whole_of

logger = logging.getLogger(__name__)

#: So long an embedded worker waits for the supervisors' server to end, which it does at once.
SERVER_SECONDS = 5.0


class WorkerStep(bootsteps.StartStopStep):
    """The scheduler: started after the pool, before there is any broker."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        worker.aque = None
        _refuse(worker)
        if not _is_program(worker):
            # What is wrong with the settings or the store is raised here to whoever starts it: its thread could only log it.
            whole_of(farm_of(worker.app).settings, worker.concurrency)
        super().__init__(worker, **options)

    def start(self, worker: Any) -> None:
        try:
            self._start(worker)
        except AqueError as error:
            if not _is_program(worker):
                raise
            logger.critical("%s", error)  # the sentence says it all; Celery would print a traceback of its own loop
            raise SystemExit(error.exit_status) from None

    def _start(self, worker: Any) -> None:
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
            broker_connection.restore_prefetch_from_the_loop(consumer)
        consumer.call_soon_ack = aque.acks.soon
        broker_connection.look_up_from_waiting(consumer.connection)
        broker_connection.survive_closing(consumer.connection)
        aque.eventer.dispatcher = dispatcher = consumer.event_dispatcher
        if dispatcher:
            dispatcher.send = aque.eventer.send_of_worker
        # Strategies close over the handler that was there before, and over who sends the events of ordinary tasks: in the
        # thread that reads the pool's results, which a broker that hangs must not hold up.
        consumer.event_dispatcher = AlwaysEnabled(aque.eventer) if dispatcher else dispatcher
        consumer.update_strategies()
        consumer.event_dispatcher = dispatcher
        self._serve(consumer, aque)

    def close(self, consumer: Any) -> None:
        """The worker stops: called before any step of Celery takes leave of the broker."""
        if (aque := consumer.controller.aque) is not None:
            aque.eventer.is_leaving = True
        for connected in (consumer, consumer.event_dispatcher):
            if connection := getattr(connected, "connection", None):
                broker_connection.bound_closing(connection)

    def _serve(self, consumer: Any, aque: AqueWorker) -> None:
        if consumer.task_consumer is not None:
            aque.serve(frozenset(queue.name for queue in consumer.task_consumer.queues))

    def _then_serve(self, method: Any, consumer: Any, aque: AqueWorker) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            self._serve(consumer, aque)
            return result

        return call


def _is_program(worker: Any) -> bool:
    """False for an embedded worker."""
    return hasattr(worker, "install_platform_tweaks")


def _refuse(worker: Any) -> None:
    """Raise BadSetting for what cannot work; a program ends with the sentence. Celery's signals would swallow the exception."""
    why = _why_not(worker)
    if why is None:
        return
    error = BadSetting(f"{why} Nothing was started.")
    if _is_program(worker):
        _leave(error)
    raise error


def _leave(error: AqueError) -> NoReturn:
    print(f"celery worker: {error}", file=sys.stderr)
    raise SystemExit(error.exit_status)


@celeryd_init.connect
def _check_broker(instance: Any, **_: Any) -> None:
    """Of a program, before Celery looks at the URL, which would be a traceback: whether there is a transport for it."""
    if WorkerStep in instance.app.steps["worker"]:
        try:
            instance.app.connection_for_read()  # connects to nothing
        except BadSetting as error:
            _leave(error)
        except KeyError as error:  # kombu's, with a sentence
            _leave(
                BadSetting(
                    f"{error.args[0]}. Nothing was started: check AQUE_CELERY_BROKER, or the broker_url of the app."
                )
            )


def _why_not(worker: Any) -> str | None:
    if not issubclass(worker.pool_cls, PreforkPool | InProcess):
        name = f"{worker.pool_cls.__module__}:{worker.pool_cls.__qualname__}"
        return (
            f"Aque cannot run functions in the pool {name}: start the worker with -P prefork, which can do everything, threads "
            "or solo."
        )
    if worker.options.get("autoscale"):
        return (
            "--autoscale does not go with Aque, whose reservations need to know how many children there are: give the largest "
            "number with -c. Children that have nothing to do use no CPU."
        )
    return None


def _run(worker: Any, start: Any) -> None:
    """Celery's `start`, which returns when the worker has stopped; then the restart, if there is to be one."""
    if not _is_program(worker):
        worker.aque_commands.start()
    try:
        if isinstance(worker.pool, SoloPool):
            worker.pool.serve(partial(_run_to_the_end, worker, start))
        else:
            _run_to_the_end(worker, start)
    finally:
        if not _is_program(worker):
            worker.aque_commands.stop()  # if the worker has started, this was done
            worker.aque_commands.join(SERVER_SECONDS)
            if started := getattr(worker, "_on_started", None):
                started.set()  # Celery's `start_worker` would wait for ever for a worker that could not start
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


def _run_to_the_end(worker: Any, start: Any) -> None:
    start()
    pool = worker.pool
    if isinstance(pool, InProcess) and pool.is_abandoned and pool.is_busy:
        logger.error("a function still runs in the process of this worker, which ends without waiting for it")
        if _is_program(worker):
            # Python waits for threads at its exit. With the process the function ends, and its task is free for others.
            os._exit(worker.exitcode or EX_OK)


def _install_signals(worker: Any, install: Any) -> None:
    """Celery's handlers, then ours over them; then what a restart has held back. All in the main thread."""

    def install_all() -> None:
        install(worker)
        worker.aque_signals.install()
        if restart.handover is not None:
            restart.deliver_signals()

    if isinstance(worker.pool, SoloPool):
        worker.pool.do(install_all)
    else:
        install_all()


@worker_process_init.connect
def _name_child(sender: Any, **_: Any) -> None:
    if current_process().name != "MainProcess":  # the pool `solo` says so of the worker itself
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
    pool = get_implementation(sender.pool_cls) if isinstance(sender.pool_cls, str) else sender.pool_cls
    pool = sender.pool_cls = TaskPool if pool is PreforkPool else in_process(pool)
    if issubclass(pool, PreforkPool | InProcess):
        # In the hub's loop the thread that waits for the broker is the one that reads the pool's results: while the broker
        # is away nothing would finish (measured: 8 -> 8 finished tasks in 5 s, against 12 -> 50).
        sender.use_eventloop = False
        # The ledger bounds what the pool has. Its own bound would block the thread that reports an end, and that is about to
        # free the place, when the next task is started from there.
        sender.pool_putlocks = False
        sender.timer_cls = sender.timer_cls or TaskPool.Timer
    sender.aque_kept = sender.aque_pidlock = sender.aque_handed_over = sender.aque_strangers = None
    sender.aque_signals = WorkerSignals(
        lambda: sender.aque and sender.aque.scheduler.drain(),
        lambda: sender.aque and sender.aque.scheduler.commands_only(),
        lambda: restart.obstacle() or reload.problem_since(restart.began),
    )
    sender.aque_commands = CommandRunner()
    sender.start = partial(_run, sender, sender.start)
    if _is_program(sender):
        _prepare_program(sender)


def _prepare_program(worker: Any) -> None:
    """Make the process the worker's. None of this may be done to a process in which a worker is embedded."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # functions beside the worker, as `python -m` finds them
    _name(worker)
    worker.install_platform_tweaks = partial(_install_signals, install=worker.install_platform_tweaks)
    if worker.pool_cls is TaskPool:
        worker.aque_strangers = Strangers(worker.aque_commands.pids)
    if restart.handover is not None:
        worker.aque_handed_over = restart.handover.state()
    if worker.aque_handed_over is None and _why_not(worker) is None:
        worker.aque_commands.start()
