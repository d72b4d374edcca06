"""The scheduler of one worker: a thread and its tick. One transaction finishes, releases and claims; then it rings.

It is driven by events (a doorbell, a finish, a kill), never by a fixed sleep; a safety poll bounds a lost doorbell. It
never touches the broker. Finishes arrive from the pool's and the commands' threads and start the next buffered task at
once, without waiting for the tick.
"""

import json
import logging
import os
import random
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from typing import Any, Literal

from aque import chooser, claimer, doorbell, durations, finisher
from aque.backfill import Busy, expected_end
from aque.backoff import Backoff
from aque.batch import Batch, Unwritten
from aque.classes import Classes
from aque.errors import StoreError
from aque.ledger import Ledger
from aque.mounts import Mounts
from aque.rates import Rates
from aque.resources import Capacity
from aque.running import Entry, Running
from aque.settings import Settings
from aque.states import ENDING_SIGNALS, Reason, State
from aque.store import (
    DatabaseError,
    Finished,
    Kill,
    Released,
    Store,
    can_run_again,
    is_data_error,
    one_statement,
    transaction,
)
from aque.values import ClaimedTask, Outcome, ReadyTask

logger = logging.getLogger(__name__)

#: What was claimed ahead and has not started for so long goes back.
BUFFER_SECONDS = 1.0
#: What was chosen and could not be had is looked at again after so long.
RETRY_SECONDS = 0.05
#: With a well filled buffer, the table is looked at so rarely.
LOOK_SECONDS = 0.05
#: How fast a measured run time follows the latest runs; how many names are remembered.
SMOOTHING = 0.3
NAMES = 10_000
#: Results kept in memory for dependents that start at once: how many, and how large each may be.
RECENT_RESULTS = 1000
RECENT_BYTES = 1000
#: Longest pause between two tries while the database is away.
LONGEST_PAUSE = 5.0

Until = Literal["one", "end"]


class Scheduler:
    """Claims, starts and finishes tasks for one worker.

    `start_task` starts an attempt, with what is reserved for it, and never raises; `on_end` is called when an `until` is
    reached, `on_news` when the worker's row should tell something else of what it avoids, `on_written` after each commit that
    has written outcomes or released something (it must not wait for anything); once `is_urgent` is true, whatever runs is
    killed and given back.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        worker_id: int,
        ledger: Ledger,
        place: chooser.Place,
        start_task: Callable[[ClaimedTask, Capacity], Running],
        *,
        until: Until | None,
        on_end: Callable[[], None],
        is_urgent: Callable[[], bool],
        ordered_rate: Callable[[str], float | None] = lambda name: None,
        on_news: Callable[[], None] = lambda: None,
        on_written: Callable[[list[Outcome], Released], None] = lambda outcomes, released: None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._ledger = ledger
        self._start_task = start_task
        self._until = until
        self._on_end = on_end
        self._is_urgent = is_urgent
        self._on_news = on_news
        self._on_written = on_written
        self._mounts = Mounts(place.host, self.look)
        self._classes = Classes(store, settings, place, self._mounts)
        self._claimer = claimer.Claimer(store, settings, self._classes, self._seconds, Rates(ordered_rate))
        self._backoff = Backoff(settings.back_off_seconds)
        self._lock = threading.Lock()
        #: Held while a task starts to lend or has it back: what the pool has in place of it must agree. Taken before `_lock`.
        self.lending = threading.RLock()
        self._worker_id = self.worker_id = worker_id
        self._running: dict[int, Entry] = {}
        self._buffer: deque[ClaimedTask] = deque()
        self._buffered_at = 0.0
        self._claim_ahead = True  #: something has finished since the buffer was given back
        self._looked_at = 0.0
        self._polled_at = 0.0
        self._look_times = True  #: something may be due, or expire
        self._times_at: float | None = None  #: when it will (monotonic)
        self._look_at: float | None = None  #: something that waits for a time is due then (monotonic)
        self._unwritten = Unwritten()
        self._output_taken = threading.Condition(self._lock)
        self._run_seconds: dict[str, float] = {}
        self.run_times = durations.Tally()  #: of what succeeded, for the table
        self._recent: dict[int, bytes] = {}
        self._look_ready = True  #: something may be there to claim
        self._look_kills = True
        self._waiting = False  #: at the last look there was more than fitted
        self._started_any = False
        self._draining = False  #: for good: this worker stops
        self._drained = False  #: as a person asked, who may want it to go on
        self._commands_only = False  #: a restart is under way
        #: (id, token) of tasks killed only because this worker stops or is lost: to be given back
        self._abandoned: set[tuple[int, int]] = set()
        self._stopped = threading.Event()
        self._reconcile = False
        self._one_by_one = False
        self._finish_only = False  #: after a failure: what claiming cannot do must not keep finishing from the table
        self._is_woken = False  #: the thread is about to look, or does not sleep
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Not when the thread ends: others may still wake it, and the number could be someone else's file by then.
        weakref.finalize(self, os.close, self._wake_fd).atexit = False
        self._bell: doorbell.Doorbell | None = None
        self._connection: Any = None
        self._thread = threading.Thread(target=self._run, name="aque-scheduler", daemon=True)

    # -- from other threads -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Claim and run from now on."""
        self._thread.start()

    def finished(self, outcome: Outcome) -> None:
        """An attempt is over. Its reservation is free at once; the row is written by the next tick."""
        with self._lock:
            entry = self._running.get(outcome.id)
            if entry is None or entry.task.token != outcome.token:
                return
            del self._running[outcome.id]
            claim = (outcome.id, outcome.token)
            if claim in self._abandoned and outcome.state is State.KILLED:
                self._unwritten.batch.returned.append(claim)
            else:
                self._unwritten.batch.outcomes.append(outcome)
                if not entry.task.dependents and not self._classes.limits(entry.task.class_id):
                    self._unwritten.batch.lone.add(outcome.id)
            self._abandoned.discard(claim)
            self._claim_ahead = True
            if outcome.state is State.SUCCESS:
                self._measure(entry.task.name, outcome.ran_seconds)
                self.run_times.add(entry.task.name, outcome.ran_seconds, entry.task.io_bytes)
                self._backoff.succeeded(entry.task.class_id, entry.task.job_id)
            self._look_ready = self._look_ready or self._waiting
            held = entry.held
        self._ledger.release(held)
        self._start_buffered()
        self._wake()

    def wrote(self, task: ClaimedTask, fd: int, offset: int, data: bytes) -> None:
        """A command wrote something: kept for the next tick that writes output."""
        with self._lock:
            piece = (task.id, task.attempt, fd, offset, data)
            is_due_earlier = self._unwritten.add_output(piece, time.monotonic())
        if is_due_earlier:
            self._wake()
        with self._output_taken:
            if self._unwritten.is_flooded:
                self._output_taken.wait(1.0)

    # -- a task that waits for others -----------------------------------------------------------------------------------

    def block(self, task: ClaimedTask) -> bool:
        """One more thread or process of the task waits for others: what it lends is free. False: it runs here no more."""
        with self._lock:
            entry = self._running.get(task.id)
            if entry is None or entry.task.token != task.token:
                return False
            entry.waits += 1
            if entry.lent is not None:
                return True
            entry.lent = lent = Capacity(entry.need.cpus, 0, entry.need.python_slots)
            self._unwritten.batch.blocked[task.id, task.token] = True
            self._look_ready = self._claim_ahead = True
        self._ledger.release(lent)
        self._wake()
        return True

    def unblock(self, task: ClaimedTask, granted: Callable[[], None], is_back: Callable[[], None]) -> None:
        """A thread or process of the task would go on. `granted` is called when it may: when what the task has lent is its own
        again, in its turn, and then `is_back` before; at once while others of the task wait on, since what it has lent is lent
        for their sake."""
        with self._lock:
            entry = self._running.get(task.id)
            lent = entry.lent if entry is not None and entry.task.token == task.token else None
            if entry is not None and lent is not None:
                entry.waits -= 1
                if entry.waits <= 0:
                    entry.returning.append(granted)
                    if len(entry.returning) > 1:
                        return  # one stands in the line for all of them
        if entry is None or lent is None or entry.waits > 0:
            granted()
            return

        def go_on() -> None:
            with self.lending:
                with self._lock:
                    runs = self._running.get(task.id) is entry
                    waiting, entry.returning = entry.returning, []
                    keeps = runs and entry.waits <= 0
                    if keeps:
                        entry.lent = None
                        self._unwritten.batch.blocked[task.id, task.token] = False
                if keeps:
                    is_back()
            if keeps:
                self._wake()
            else:  # it was killed meanwhile, or another of its threads waits again
                self._ledger.release(lent)
            for grant in waiting:
                grant()

        self._ledger.in_turn(lent, go_on)

    def told(self, task: ClaimedTask, state: str, meta: bytes) -> None:
        """The task tells of itself."""
        with self._lock:
            self._unwritten.batch.told[task.id, task.token] = (state, meta)
        self._wake()

    def serve(self, queues: Iterable[str]) -> None:
        """Claim from these queues from now on."""
        names = frozenset(queues)
        self._classes.serve(names)
        with self._store.connect() as connection:
            self._store.set_queues(connection, self._worker_id, names)
        self.look()

    def look(self) -> None:
        """Something may be ready, or somebody may have killed something."""
        self._look_ready = self._look_kills = True
        self._wake()

    def lost(self, new_worker_id: int) -> None:
        """The lease is gone: others may run what this worker has. Kill it all. What had been taken over is refused by its
        token; what was claimed since under the old name goes back."""
        with self._lock:
            self._worker_id = new_worker_id
            self._unwritten.batch.returned += [(task.id, task.token) for task in self._buffer]
            self._buffer.clear()
            entries = list(self._running.values())
            self._abandoned |= {(e.task.id, e.task.token) for e in entries if e.kill_signal is None}
        logger.error(
            "lost_lease: this worker was declared lost: its %d running tasks are killed, their outcomes dropped",
            len(entries),
        )
        for entry in entries:
            self._kill(entry, 9, self._settings.kill_grace_seconds)
        self.look()

    def running(self) -> list[ClaimedTask]:
        """What runs now."""
        with self._lock:
            return [entry.task for entry in self._running.values()]

    def buffered(self) -> list[ClaimedTask]:
        """What is claimed and has not started."""
        with self._lock:
            return list(self._buffer)

    @property
    def is_drained(self) -> bool:
        """True while a person wants this worker to claim nothing."""
        return self._drained

    def drain(self) -> None:
        """Claim nothing more, and give back what has not started."""
        self._draining = True
        self._wake()

    # -- a new image of this process (see aque.restart) -----------------------------------------------------------------

    def commands_only(self) -> None:
        """Claim nothing more but commands, which can be handed over, and give back what has not started."""
        self._classes.commands_only()
        self._commands_only = True
        self.look()

    def settle(self, drain_seconds: float, is_enough: Callable[[], bool]) -> None:
        """Wait for what cannot be handed over; after `drain_seconds` kill it and give it back, without counting it as failed
        or lost. Commands are claimed meanwhile. Returns early once `is_enough`."""
        self.commands_only()
        if not self._wait_until_idle(drain_seconds, is_enough, handed_over=False) and not is_enough():
            self._abandon(self._left(handed_over=False))
            self._wait_until_idle(10.0, is_enough, handed_over=False)

    def freeze(self, seconds: float) -> None:
        """Drain, write what there is to write, for at most `seconds` while the store fails, and end the thread."""
        self.drain()
        self._stopped.set()
        self._wake()
        self._thread.join(seconds)

    def attempts(self) -> dict[int, Any]:
        """The attempts that run, by task."""
        with self._lock:
            return {task_id: entry.attempt for task_id, entry in self._running.items() if entry.attempt is not None}

    def export(self, handed_over: Container[int]) -> dict[str, Any]:
        """What `adopt` needs in the new image: those tasks that are `handed_over`, and what could not be written. Call it
        after `freeze`."""
        with self._lock:
            self._unwritten.failed(time.monotonic())
            return {
                "running": [
                    (
                        entry.task,
                        entry.need,
                        entry.began,
                        entry.kill_signal,
                        entry.kill_grace,
                        entry.kill_at,
                        entry.lent,
                        entry.waits + len(entry.returning),
                    )
                    for entry in self._running.values()
                    if entry.task.id in handed_over
                ],
                "abandoned": self._abandoned,
                "batch": {name: getattr(self._unwritten.batch, name) for name in Batch.__slots__},
                "run_seconds": self._run_seconds,
                "started_any": self._started_any,
            }

    def adopt(self, exported: dict[str, Any], attempt_of: Callable[[ClaimedTask, float, int | None], Running]) -> None:
        """Go on with what the image before this one has exported; before `start`. `attempt_of` gets the task, since when it
        runs and the signal by which it is being killed."""
        for task, need, began, kill_signal, kill_grace, kill_at, lent, waits in exported["running"]:
            attempt = attempt_of(task, began, kill_signal)
            entry = Entry(task, need, began, attempt, kill_signal, kill_grace, kill_at, lent, waits)
            self._ledger.adopt(entry.held)
            self._running[task.id] = entry
        self._abandoned = exported["abandoned"]
        self._unwritten.adopt(Batch(**exported["batch"]), time.monotonic())
        self._run_seconds = exported["run_seconds"]
        self._started_any = exported["started_any"]

    def reconcile(self) -> None:
        """Give back what the table says that this worker has and that it does not know of; before `start`."""
        self._reconcile = True

    # -- the end --------------------------------------------------------------------------------------------------------

    def stop(self, drain_seconds: float) -> bool:
        """Drain; after `drain_seconds`, or at once if that is urgent, kill what still runs and give it back, without counting
        it as failed or lost. False: something could not be ended or written; it is left to the reapers."""
        self.drain()
        self._wait_until_idle(drain_seconds, self._is_urgent)
        self._draining = True
        self._abandon(self._left())
        idle = self._wait_until_idle(10.0, self._is_nothing_killed)
        self._stopped.set()
        self._wake()
        self._thread.join(10)
        with self._lock:
            return idle and not self._unwritten.batch and not self._thread.is_alive()

    def _left(self, handed_over: bool = True) -> list[Entry]:
        """What runs; unless `handed_over`, without what a new image could take over."""
        with self._lock:
            return [
                entry
                for entry in self._running.values()
                if handed_over or entry.attempt is None or not entry.attempt.outlives_worker
            ]

    def _is_nothing_killed(self) -> bool:
        """All that is left is what nobody can end."""
        return not any(entry.attempt is None or entry.attempt.can_be_killed for entry in self._left())

    def _wait_until_idle(self, seconds: float, is_enough: Callable[[], bool], handed_over: bool = True) -> bool:
        deadline = time.monotonic() + seconds
        while self._left(handed_over):
            if time.monotonic() >= deadline or is_enough() or not self._thread.is_alive():
                return False
            self._stopped.wait(0.02)
        return True

    def _abandon(self, entries: Iterable[Entry]) -> None:
        """Kill these, to be given back; what a person has killed ends as killed."""
        left = [entry for entry in entries if entry.kill_signal is None]
        with self._lock:
            self._abandoned |= {(entry.task.id, entry.task.token) for entry in left}
        for entry in left:
            if entry.attempt is None or entry.attempt.can_be_killed:
                logger.warning("task %d did not end in time: it is killed and given back", entry.task.id)
            self._kill(entry, 9, self._settings.kill_grace_seconds)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = 0.0
        while True:
            try:
                self._wait(pause)
                self._tick()
                pause = 0.0
            except Exception as error:
                if can_run_again(error):
                    self._reconcile = self._finish_only = True
                    continue  # rolled back for the sake of another transaction; the connection is sound
                if isinstance(error, (StoreError, DatabaseError)):
                    logger.error("the store failed, running tasks go on: %s", str(error).splitlines()[0])
                elif not isinstance(error, ConnectionResetError):
                    logger.exception("the scheduler's tick failed")
                self._disconnect()
                self._reconcile = True  # a commit may have happened all the same
                self._finish_only = True
                pause = min(LONGEST_PAUSE, 2 * pause or 0.05)
            if self._stopped.is_set():
                with self._lock:
                    left = bool(self._unwritten.batch)
                if not left or pause > 1.0:
                    break
        self._mounts.close()
        self._disconnect()

    def _wait(self, pause: float) -> None:
        """Until something happens, or a poll is due; after a failure `pause` seconds."""
        if pause:
            time.sleep(pause * random.uniform(0.5, 1.0))
            self._connect()
            self._look_ready = self._look_kills = True
            return
        self._connect()
        with self._lock:
            now = time.monotonic()
            due = [self._settings.poll_seconds * random.uniform(0.8, 1.2)]
            due += [entry.kill_at - now for entry in self._running.values() if entry.kill_signal is not None]
            if (output_at := self._unwritten.output_due_at) is not None:
                due.append(output_at - now)
            if self._buffer:
                due.append(self._buffered_at + BUFFER_SECONDS - now)
            if self._look_at is not None:
                due.append(self._look_at - now)
            if self._times_at is not None:
                due.append(self._times_at - now)
            if (change := self._backoff.next_change(now)) is not None:
                due.append(change - now)
        assert self._bell is not None
        doorbell.wait_readable([self._wake_fd, self._bell.fileno()], max(min(due), 0.0))
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            pass
        self._is_woken = False  # not before: who comes in between has left its news already
        rung = self._bell.drain()
        now = time.monotonic()
        polled = now - self._polled_at >= self._settings.poll_seconds * 0.8
        if polled:  # however busy this thread is: a ring that was lost concerns a busy worker too
            self._polled_at = now
        self._look_times = (
            self._look_times
            or polled
            or doorbell.TIME in rung
            or (self._times_at is not None and now >= self._times_at)
        )
        if self._look_at is not None and now >= self._look_at:
            self._look_at, self._look_ready = None, True
        self._look_ready = self._look_ready or doorbell.READY in rung or polled
        self._look_kills = self._look_kills or doorbell.KILL in rung or polled
        self._reconcile = self._reconcile or polled

    def _tick(self) -> None:
        connection = self._connection
        if self._reconcile:
            self._give_back_unknown(connection)
        if self._look_kills:
            self._look_kills = False
            orders = self._store.orders(connection, self._worker_id)
            self._obey_drain(orders.draining)
            self._carry_out_kills(orders.kills)
        self._escalate_kills()
        if self._look_times:
            self._advance(connection)
        if self._is_urgent():
            self._draining = True
            self._abandon(self._left())
        if self._draining or self._drained or self._commands_only or self._is_buffer_stale():
            self._return_buffer()
        self._avoid()
        picked = self._look(connection)
        if self._claimer.is_holding:  # what was claimed ahead might take the room that is kept
            self._return_buffer()
        # Read before the batch is taken: what ends after that is free here, and not yet in the table.
        free = self._ledger.free
        batch = self._take_batch()
        if batch or picked.start or picked.ahead:
            self._write(connection, batch, picked, free)
        if self._finish_only:
            self._finish_only = False
            self._wake()
        if self._until is not None:
            self._check_end(connection, picked)

    def _advance(self, connection: Any) -> None:
        """Release what has waited for its time, cancel what was not started in time; know when the next is due."""
        self._look_times = False
        seconds = self._store.next_time(connection)
        if seconds == 0:
            with transaction(connection):
                released = self._store.advance(connection)
            ended = {doorbell.DONE} if released.expired or released.groups else set()
            doorbell.ring(connection, {doorbell.READY} | ended)
            self._look_ready = True
            self._on_written([], released)
            seconds = self._store.next_time(connection)
        self._times_at = None if seconds is None else time.monotonic() + seconds

    def _look(self, connection: Any) -> claimer.Picked:
        """Choose, and reserve for what was chosen; nothing if there is no reason to look."""
        with self._lock:
            buffered = len(self._buffer)
            done = self._until == "one" and self._started_any
            full = buffered > chooser.BUFFER_TASKS // 2
            early = full and time.monotonic() - self._looked_at < LOOK_SECONDS
            idle = self._draining or self._drained or done
            # What this host could not start decides what is looked for: that is written first.
            undecided = any(outcome.host_failure for outcome in self._unwritten.batch.outcomes)
            blocked = self._finish_only or self._ledger.is_over_budget or undecided
            if not self._look_ready or idle or blocked or early:
                return claimer.Picked([], [], self._waiting)
            self._look_ready = False
            self._looked_at = time.monotonic()
            ahead = self._claim_ahead and not full and self._until != "one" and not self._commands_only
        missing = self._classes.missing_paths
        picked = self._claimer.look(
            connection, self._worker_id, self._ledger.free, lambda: self._busy(connection), buffered
        )
        if self._classes.missing_paths != missing:
            self._on_news()
        self._look_at = None if picked.again_in is None else time.monotonic() + picked.again_in
        self._waiting = picked.more or bool(picked.ahead)
        start = picked.start[:1] if self._until == "one" else picked.start
        return claimer.Picked(self._reserve(start), picked.ahead if ahead else [], self._waiting)

    def _busy(self, connection: Any) -> list[Busy]:
        """What runs, and when it is expected to end; ordinary tasks of Celery are one entry."""
        now, ran = self._store.now(connection), time.monotonic()
        with self._lock:
            entries = list(self._running.values())
            other = self._ledger.whole - self._ledger.free
        busy = []
        for entry in entries:
            other = other - entry.held
            expected = entry.task.duration or self._seconds(entry.task.name) or 0.0
            busy.append(Busy(entry.held, expected_end(now - (ran - entry.began), expected, now)))
        return [*busy, Busy(other)]

    def _reserve(self, tasks: list[ReadyTask]) -> list[ReadyTask]:
        return [task for task in tasks if self._ledger.try_reserve(self._classes.need(task.class_id))]

    def _take_batch(self) -> Batch:
        with self._lock:
            batch = self._unwritten.take(time.monotonic(), all_output=self._stopped.is_set())
            self._output_taken.notify_all()
        return batch

    def _write(self, connection: Any, batch: Batch, picked: claimer.Picked, free: Capacity) -> None:
        """The transaction, and then everything that must not happen before it has committed. `free` is what is free once
        the batch has been written."""
        token = secrets.randbits(62)
        reserved = list(picked.start)
        try:
            claims_ahead = bool(picked.ahead)
            if batch.is_lone_success() and not reserved and not claims_ahead and self._finish_alone(connection, batch):
                return
            with one_statement(connection) if not batch and not claims_ahead else transaction(connection):
                self._store.append_output(connection, batch.output)
                self._store.start(connection, batch.started)
                self._store.signal_delivered(connection, batch.delivered)
                self._store.set_blocked(connection, batch.blocked)
                self._store.tell(connection, batch.told)
                returned = self._store.give_back(connection, batch.returned)
                finished = finisher.finish(
                    self._store,
                    connection,
                    batch.outcomes,
                    self._settings.max_lost,
                    self._one_by_one,
                    self._settings.is_shared,
                )
                idle = self._draining or self._drained or self._until == "one"
                if finished.ready and not idle and not self._finish_only:
                    reserved += self._reserve(self._claimer.choose_released(connection, finished.ready, free))
                started = self._claimer.claim(connection, reserved, self._worker_id, token, State.RUNNING)
                buffered = self._claimer.claim(connection, picked.ahead, self._worker_id, token + 1, State.CLAIMED)
        except Exception as error:
            for task in reserved:
                self._ledger.release(self._classes.need(task.class_id))
            with self._lock:
                self._unwritten.failed(time.monotonic())
            # Whatever one outcome cannot be recorded for, the others can: a task must not stop its worker.
            self._one_by_one = is_data_error(error) or not isinstance(error, (StoreError, DatabaseError))
            raise
        self._one_by_one = False
        self._unwritten.written()
        self._remember([o for o in batch.outcomes if finished.ended.get(o.id) is State.SUCCESS])
        self._back_off([o for o in batch.outcomes if o.host_failure], finished.elsewhere)
        if batch.outcomes:  # before what was released starts: that it was ready is told first
            self._on_written(batch.outcomes, finished)
        self._after_commit(connection, finished, reserved, started, buffered, bool(returned))

    def _finish_alone(self, connection: Any, batch: Batch) -> bool:
        """Record a lone success, without the two round trips of a transaction. False: nothing was written."""
        if self._one_by_one or not self._store.finish_alone(connection, batch.outcomes[0]):
            return False
        self._unwritten.written()
        self._remember(batch.outcomes)
        doorbell.ring(connection, {doorbell.DONE})
        self._on_written(batch.outcomes, Finished(ended={batch.outcomes[0].id: State.SUCCESS}))
        return True

    def _after_commit(
        self,
        connection: Any,
        finished: Finished,
        reserved: list[ReadyTask],
        started: list[ClaimedTask],
        buffered: list[ClaimedTask],
        returned: bool,
    ) -> None:
        got = {task.id for task in started}
        if len(got) < len(reserved):  # others were faster, or are about to leave the tokens that they hold locked
            self._look_at = time.monotonic() + RETRY_SECONDS
        for task in reserved:
            if task.id not in got:
                self._ledger.release(self._classes.need(task.class_id))
        if finished.refused:
            logger.warning("lost_lease: the outcomes of tasks %s were refused, others have them", finished.refused[:20])
        rings = set()
        if finished.ended or finished.skipped or finished.groups:
            rings.add(doorbell.DONE)
        if finished.signalled:
            rings.add(doorbell.KILL)
        if finished.repeated:
            self._look_times = True
            self._wake()
        if returned or finished.repeated or finished.freed or any(task.id not in got for task in finished.ready):
            rings.add(doorbell.READY)
            self._look_ready = True
        try:
            self._start_all(connection, started)
            if buffered:
                buffered = self._with_inputs(connection, buffered)
                with self._lock:
                    self._buffer.extend(buffered)
                    self._buffered_at = time.monotonic()
                self._start_buffered()
        finally:
            if rings:
                doorbell.ring(connection, rings)

    def _remember(self, outcomes: list[Outcome]) -> None:
        """Keep small results of functions for a moment: the next of a chain wants the one before."""
        if len(self._recent) > RECENT_RESULTS:
            self._recent.clear()
        for outcome in outcomes:
            if outcome.state is State.SUCCESS and outcome.value is not None and len(outcome.value) <= RECENT_BYTES:
                self._recent[outcome.id] = outcome.value

    def _start_all(self, connection: Any, tasks: list[ClaimedTask]) -> None:
        self._started_any = self._started_any or bool(tasks)
        for task in self._with_inputs(connection, tasks, reserved=True):
            entry = Entry(task, self._classes.need(task.class_id), time.monotonic())
            with self._lock:
                self._running[task.id] = entry
            self._begin(entry)

    def _with_inputs(self, connection: Any, tasks: list[ClaimedTask], reserved: bool = False) -> list[ClaimedTask]:
        """The tasks with the results that their arguments name; one with too many bytes of them ends here."""
        wanted = {upstream for task in tasks for upstream in task.inputs}
        if not wanted:
            return tasks
        values = {upstream: self._recent[upstream] for upstream in wanted if upstream in self._recent}
        try:
            if missing := wanted - values.keys():
                values |= self._store.values(connection, missing)
        except Exception:  # none of them has started: they go back when the connection does
            for task in tasks if reserved else ():
                self._ledger.release(self._classes.need(task.class_id))
            raise
        complete = []
        for task in tasks:
            results = {upstream: values.get(upstream, b"null") for upstream in task.inputs}
            if sum(map(len, results.values())) > self._settings.inputs_limit_bytes:
                with self._lock:
                    self._unwritten.batch.outcomes.append(
                        Outcome(task.id, task.attempt, task.token, State.ERROR, Reason.INPUTS_TOO_LARGE)
                    )
                if reserved:
                    self._ledger.release(self._classes.need(task.class_id))
                self._wake()
            else:
                complete.append(replace(task, results=results))
        return complete

    def _begin(self, entry: Entry) -> None:
        """Start a task that is in `_running`; one that was killed meanwhile is killed as soon as it has started."""
        task = entry.task
        try:
            attempt = self._start_task(task, entry.need)
        except Exception as error:
            logger.exception("task %d could not be started", task.id)
            stored = json.dumps({"type": type(error).__name__, "message": str(error)[:1000]}).encode()
            self.finished(Outcome(task.id, task.attempt, task.token, State.ERROR, Reason.EXCEPTION, error=stored))
            return
        with self._lock:
            entry.attempt = attempt
            number = entry.kill_signal
        if number is not None:
            attempt.kill(number, entry.kill_grace)

    def _start_buffered(self) -> None:
        """Start what was claimed ahead, as far as it fits."""
        while True:
            with self._lock:
                if not self._buffer or self._draining or self._drained or self._claimer.is_holding:
                    return
                need = self._classes.need(self._buffer[0].class_id)
                if not self._ledger.try_reserve(need):
                    return
                task = self._buffer.popleft()
                self._buffered_at = time.monotonic()
                self._look_ready = self._look_ready or self._waiting
                entry = Entry(task, need, time.monotonic())
                self._running[task.id] = entry
                self._unwritten.batch.started.append((task.id, task.token, entry.began))
            self._begin(entry)

    def _is_buffer_stale(self) -> bool:
        """Nothing of the buffer has started for a while: something long holds the places, and others may be idle."""
        with self._lock:
            return bool(self._buffer) and time.monotonic() - self._buffered_at >= BUFFER_SECONDS

    def _return_buffer(self) -> None:
        """Give back what was claimed ahead; until something finishes here, nothing more is."""
        with self._lock:
            self._claim_ahead = False
            self._unwritten.batch.returned += [(task.id, task.token) for task in self._buffer]
            self._buffer.clear()

    # -- kills, and other orders --------------------------------------------------------------------------------------

    def _obey_drain(self, wanted: bool) -> None:
        """Claim nothing while a person wants it so: what the table refuses to give need not be asked for."""
        with self._lock:
            if wanted == self._drained:
                return
            self._drained = wanted
            if not wanted:
                self._look_ready = self._claim_ahead = True
        logger.warning(
            "this worker %s, as a person asked", "is drained: it claims nothing" if wanted else "claims again"
        )

    def _carry_out_kills(self, kills: list[Kill]) -> None:
        for kill in kills:
            with self._lock:
                entry = self._running.get(kill.id)
                is_running = entry is not None and entry.task.token == kill.token
                if not is_running:
                    self._settle_kill(kill)
            if entry is None or not is_running:
                continue
            if kill.signal in ENDING_SIGNALS:
                grace = self._settings.kill_grace_seconds if kill.grace_seconds is None else kill.grace_seconds
                if entry.kill_signal != kill.signal or grace < entry.kill_grace:
                    self._kill(entry, kill.signal, grace)
            elif entry.attempt is not None:
                entry.attempt.signal(kill.signal)
                with self._lock:
                    self._unwritten.batch.delivered.append(kill)

    def _settle_kill(self, kill: Kill) -> None:
        """A kill of a task that does not run here now; the lock is held."""
        claim = (kill.id, kill.token)
        if claim in {(o.id, o.token) for o in self._unwritten.batch.outcomes}:
            return  # it has ended by itself
        if kill.signal not in ENDING_SIGNALS:
            self._unwritten.batch.delivered.append(kill)  # to nobody: there is no process yet
            return
        # It ran, and is on its way back; or it is in the buffer, or was never heard of after a commit in doubt.
        state = State.KILLED if claim in self._unwritten.batch.returned else State.CANCELLED
        self._buffer = deque(task for task in self._buffer if task.id != kill.id)
        self._unwritten.batch.returned = [returned for returned in self._unwritten.batch.returned if returned != claim]
        self._unwritten.batch.outcomes.append(Outcome(kill.id, kill.attempt, kill.token, state, Reason.REQUEST))

    def _kill(self, entry: Entry, number: int, grace: float) -> None:
        """End a task. One that is being killed already keeps the grace that ends first."""
        kill_at = time.monotonic() + grace
        with self._lock:
            if entry.kill_signal is not None:
                grace, kill_at = min(grace, entry.kill_grace), min(kill_at, entry.kill_at)
            entry.kill_signal, entry.kill_grace, entry.kill_at = number, grace, kill_at
            attempt = entry.attempt
        if attempt is not None:
            attempt.kill(number, grace)

    def _escalate_kills(self) -> None:
        now = time.monotonic()
        with self._lock:
            due = [e for e in self._running.values() if e.kill_signal is not None and e.kill_at <= now and e.attempt]
            for entry in due:
                entry.kill_at = now + 1.0
        for entry in due:
            if entry.attempt is not None:
                entry.attempt.kill(9, 0.0)

    # -- what this host cannot start -----------------------------------------------------------------------------------

    @property
    def missing_paths(self) -> dict[bytes, str]:
        """Paths that ready tasks require and that this host has not, as of the last look: why not."""
        return self._classes.missing_paths

    def avoids(self) -> tuple[str, ...]:
        """What is not claimed for a while, as sentences."""
        with self._lock:
            return self._backoff.sentences(time.monotonic(), time.time())

    def _back_off(self, refused: list[Outcome], elsewhere: Container[int]) -> None:
        """Of what this host could not start, leave what went back for other hosts, and what is like it, alone for a while.
        Then look at what has waited for this decision."""
        now = time.monotonic()
        for outcome in refused:
            if (failure := outcome.host_failure) is not None and outcome.id in elsewhere:
                logger.warning(
                    "task %d could not be started here, and is left to other hosts: %s", outcome.id, failure.why
                )
                with self._lock:
                    self._backoff.refused(failure.class_id, failure.job_id, outcome.id, failure.why, now)
        if refused:
            self._wake()

    def _avoid(self) -> None:
        """Before a look: tell the claimer what to leave alone, and give back what of it was claimed ahead. When a back-off
        has ended there is a reason to look."""
        with self._lock:
            avoided = self._backoff.avoided(time.monotonic())
            if avoided is self._claimer.avoided:
                return
            self._claimer.avoided = avoided
            self._look_ready = True
            self._on_news()
            kept = deque(task for task in self._buffer if not avoided.includes(task.class_id, task.job_id, task.id))
            kept_ids = {task.id for task in kept}
            self._unwritten.batch.returned += [
                (task.id, task.token) for task in self._buffer if task.id not in kept_ids
            ]
            self._buffer = kept

    # -- measured run times -------------------------------------------------------------------------------------------

    def _seconds(self, name: str) -> float | None:
        return self._run_seconds.get(name)

    def _measure(self, name: str, seconds: float) -> None:
        before = self._run_seconds.get(name)
        if before is None and len(self._run_seconds) >= NAMES:
            self._run_seconds.clear()
        self._run_seconds[name] = seconds if before is None else before + SMOOTHING * (seconds - before)

    # -- the connection, and what a broken one leaves -------------------------------------------------------------------

    def _connect(self) -> None:
        if self._connection is None:
            with self._store.connect():
                pass  # raises StoreUnreachable with a sentence
            self._connection = self._store.engine.connect()
            self._bell = doorbell.Doorbell(self._store.engine, [doorbell.READY, doorbell.KILL, doorbell.TIME])
            self._look_ready = self._look_kills = True

    def _disconnect(self) -> None:
        bell, self._bell = self._bell, None
        connection, self._connection = self._connection, None
        if bell is not None:
            bell.close()
        if connection is not None:
            try:
                connection.invalidate()
                connection.close()
            except Exception as error:
                logger.debug("closing a broken connection: %s", error)

    def _give_back_unknown(self, connection: Any) -> None:
        """After a commit in doubt: the table may say that this worker has tasks of which it never heard."""
        with self._lock:
            known = {(e.task.id, e.task.token) for e in self._running.values()} | {
                (t.id, t.token) for t in self._buffer
            }
            known |= {(o.id, o.token) for o in self._unwritten.batch.outcomes} | set(self._unwritten.batch.returned)
        held = self._store.claims_of(connection, self._worker_id)
        unknown = [claim for claim in held if claim not in known]
        if unknown:
            with transaction(connection):
                self._store.give_back(connection, unknown)
            doorbell.ring(connection, {doorbell.READY})
            self._look_ready = True
        self._reconcile = False

    # -- a worker that ends by itself ---------------------------------------------------------------------------------

    def _check_end(self, connection: Any, picked: claimer.Picked) -> None:
        """`one`: after the first task; `end`: when nothing is left that this worker could run or wait for."""
        with self._lock:
            busy = bool(self._running or self._buffer or self._unwritten.batch)
        if busy or picked.start or picked.ahead or self._draining:
            return
        if self._until == "one":
            over = self._started_any
        else:
            left = self._claimer.look(connection, self._worker_id, self._ledger.whole, list, 0)
            waits = left.is_undecided or left.again_in is not None
            waits = waits or self._look_times or self._times_at is not None
            over = not left.start and not waits and not self._store.is_anything_active(connection)
        if over:
            self._draining = True
            self._on_end()

    def _wake(self) -> None:
        """After the news is there. Once is enough: each write lets another thread have the interpreter."""
        if not self._is_woken:
            self._is_woken = True
            os.eventfd_write(self._wake_fd, 1)
