"""What happens to tasks, as it happens: transitions of one store in order, from a position on, woken by doorbells.

The order is that of the numbers of `aque_transition`, which is right for each task. A transaction may draw a number and commit
after one with a higher number: a missing number is waited for until every transaction that could bring it has ended
(`settled`), so that nothing is passed over, and nothing comes twice.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from aque import machine
from aque.doorbell import DONE, READY, Doorbell, wait_readable
from aque.errors import NotRecorded, StoreError
from aque.states import COMPLETE_STATES, Reason, State
from aque.store import SWITCHED_OFF, DatabaseError, Store, Transition
from aque.store.transitions import LEASE_SECONDS

logger = logging.getLogger(__name__)

#: So many transitions are read at a time.
BATCH = 500
#: A lost ring costs at most this many seconds.
SAFETY_SECONDS = 1.0
#: After a ring a look in vain is repeated, at first after so long, then with twice the pause: the start of a task has no ring
#: of its own (it would be a round trip for every worker), but follows soon after that of its submission.
FIRST_PAUSE = 0.005
#: How long a new reader waits for transactions that began before it: what they write counts as of before.
OPENING_SECONDS = 5.0
#: The position of a durable reader is written at least this often while it handles events.
MOVE_SECONDS = 0.5
#: While a number is missing a reader looks this often; a number that is missing for longer is worth a warning.
STALL_PAUSE = 0.1
STALL_SECONDS = 10.0

#: State that a task moved to -> what the event is called.
_KINDS: dict[str, str] = {
    State.RUNNING: "task.started",
    State.WAITING: "task.waiting",
    State.READY: "task.retry",
    State.PENDING: "task.retry",
    **{state: f"task.{state}" for state in COMPLETE_STATES},
}
#: Something is missing here: it has been deleted before this reader came, or has not been recorded.
GAP = "task.gap"
#: All that an event can be called.
KINDS = (*sorted(set(_KINDS.values())), GAP)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a task."""

    kind: str  #: "task.success" and so on, see KINDS
    task_id: int  #: 0 for a gap
    job_id: int  #: the task's own id if it was submitted alone
    name: str  #: of the task
    state: State | None  #: that it moved to; None for a gap
    reason: Reason | None
    attempt: int  #: that has started or ended, from 1; 0 before the first
    worker_id: int | None
    at: float  #: when it happened, seconds since 1970
    seq: int  #: its number: they rise, and not by one


def event_of(transition: Transition) -> Event:
    """The event of a transition."""
    if transition.state == SWITCHED_OFF:
        return Event(GAP, 0, 0, "", None, None, 0, None, transition.at, transition.id)
    return Event(
        _KINDS[transition.state],
        transition.task_id,
        transition.job_id,
        transition.name,
        State(transition.state),
        None if transition.reason is None else Reason(transition.reason),
        transition.attempt,
        transition.worker_id,
        transition.at,
        transition.id,
    )


def settled(numbers: Sequence[int], position: int, bound: int) -> int:
    """How many of these rising numbers can be handled after `position`: up to the first that misses one before it, unless
    all that it misses is at most `bound`, and so will never come."""
    for index, number in enumerate(numbers):
        if number != position + 1 and number - 1 > bound:
            return index
        position = number
    return len(numbers)


class Feed:
    """The events of one store, for one reader. Not for several threads at once, but for `wake`; `close` it after use.

    Without `cursor` it begins with what happens from `open` on. A cursor is a position in the store: it is made where a feed
    without one would begin, and from then on goes on where `done` has put it, in whichever process. At any time it has one
    reader; others wait until that one has closed, was killed on the same host, or has gone without a word for LEASE_SECONDS.
    """

    def __init__(self, store: Store, cursor: str | None = None) -> None:
        self._store = store
        self.cursor = cursor
        pid = os.getpid()
        self._me = f"{machine.host_id()} {pid} {machine.process_started(pid)} {token_hex(8)}"
        self._bell: Doorbell | None = None
        self._waker = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._position: int | None = None  #: None: it is not this reader's turn
        self._bound = 0
        self._writers: frozenset[str] | None = None  #: that may bring the missing number; None: none is missing
        self._missing = (0, 0.0)  #: the first number beyond all that is waited for, and since when
        self._handled = 0
        self._moved = (0, 0.0)  #: where the cursor is, and since when
        self._keeper: _Keeper | None = None

    def open(self, newest: int | None = None) -> None:
        """Begin. With `newest` with the last so many that there are, without a cursor. Raises StoreError, NotRecorded."""
        with self._store.connect() as connection:
            transitions = self._store.transitions
            if not transitions.are_recorded(connection):
                raise NotRecorded(
                    "this farm does not record what happens to tasks. Nothing is listened to: an administrator switches it "
                    "on with `aque init --events`."
                )
            self._listen()
            if newest is not None:
                self._position = max(transitions.last(connection) - newest, transitions.deleted_up_to(connection))
            elif self.cursor is None:
                self._position = self._now(connection)
            else:
                if transitions.find_cursor(connection, self.cursor) is None:
                    transitions.add_cursor(connection, self.cursor, self._now(connection))
                self._keeper = _Keeper(self._store, self.cursor, self._me)

    def _now(self, connection: Any) -> int:
        """The position before all that is committed after this returns."""
        last = self._store.transitions.last(connection)
        writers = self._store.transitions.writers(connection)
        end = time.monotonic() + OPENING_SECONDS
        while writers and time.monotonic() < end:
            time.sleep(FIRST_PAUSE)
            writers &= self._store.transitions.writers(connection)
        return last

    def begin(self) -> bool:
        """True if it is this reader's turn: `wait` without a timeout would show all that there is. Raises StoreError."""
        with self._store.connect() as connection:
            return self._position is not None or self._take(connection)

    def wait(self, timeout: float | None = None) -> list[Event]:
        """The next events, in order; blocks up to `timeout` seconds (None: for ever) for the first, then an empty list. Empty
        also after `wake`. While the store is away it waits, and goes on where it was."""
        end = None if timeout is None else time.monotonic() + timeout
        pause = FIRST_PAUSE
        is_away = False
        while True:
            try:
                with self._store.connect() as connection:
                    self._listen()
                    events = self._read(connection)
                    if not events:
                        self._move(connection)
                is_away = False
            except (StoreError, DatabaseError, ConnectionResetError) as error:
                if not is_away:
                    logger.warning("events wait for the store: %s", error)
                is_away, events, pause = True, [], SAFETY_SECONDS
                self._hang_up()
            if events:
                return events
            left = SAFETY_SECONDS if end is None else end - time.monotonic()
            if left <= 0:
                return []
            try:
                rung, woken = self._sleep(min(pause, left))
            except ConnectionResetError:
                self._hang_up()
                continue
            if woken:
                return []
            pause = FIRST_PAUSE if rung else min(pause * 2, STALL_PAUSE if self._writers else SAFETY_SECONDS)

    def wake(self) -> None:
        """Let `wait` return, from another thread."""
        with suppress(OSError):
            os.eventfd_write(self._waker, 1)

    def done(self, seq: int, *, now: bool = False) -> bool:
        """All events up to this one have been handled. A cursor's place is written now and then, or with `now` at once.

        False: somebody else is the reader of the cursor by now; the next events are those after where that one has come to.
        """
        self._handled = max(self._handled, seq)
        if now or time.monotonic() - self._moved[1] > MOVE_SECONDS:
            try:
                with self._store.connect() as connection:
                    return self._move(connection)
            except (StoreError, DatabaseError) as error:
                logger.warning("the cursor %s is not moved now: %s", self.cursor, error)
        return True

    def close(self) -> None:
        """Stop listening, and leave the cursor to others; may be called twice."""
        if self._keeper is not None:
            self._keeper.stop()
            self._keeper = None
            with suppress(StoreError, DatabaseError), self._store.connect() as connection:
                self._move(connection)
                self._store.transitions.release_cursor(connection, str(self.cursor), self._me)
        self._position = None
        self._hang_up()
        if self._waker >= 0:
            os.close(self._waker)
            self._waker = -1

    # -- inside -------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if self._bell is None:
            self._bell = Doorbell(self._store.engine, [DONE, READY])

    def _hang_up(self) -> None:
        if self._bell is not None:
            self._bell.close()
            self._bell = None

    def _sleep(self, seconds: float) -> tuple[bool, bool]:
        """Sleep until something rings or somebody wakes us, at most so long: (rung, woken)."""
        rung: set[str] = set()
        if self._bell is None:
            wait_readable([self._waker], seconds)
        elif not (rung := self._bell.drain()):
            wait_readable([self._bell.fileno(), self._waker], seconds)
            rung = self._bell.drain()
        try:
            os.eventfd_read(self._waker)
        except BlockingIOError:
            return bool(rung), False
        return False, True

    def _read(self, connection: Any) -> list[Event]:
        if self._keeper is not None and self._keeper.is_lost:
            self._lose()
        if self._position is None and not self._take(connection):
            return []
        assert self._position is not None
        found = self._store.transitions.after(connection, self._position, BATCH)
        ready = settled([t.id for t in found], self._position, self._bound)
        if found and not ready and self._will_never_come(connection, found[-1].id):
            if (deleted := self._store.transitions.deleted_up_to(connection)) > self._position:
                return [self._gap(deleted)]
            found = self._store.transitions.after(connection, self._position, BATCH)
            ready = settled([t.id for t in found], self._position, self._bound)
        if not ready:
            return []
        self._writers = None
        events = [event_of(t) for t in found[:ready]]
        self._position = events[-1].seq
        for event in events:
            if event.kind == GAP:
                logger.error("events after number %s were not recorded for a while", event.seq)
        return events

    def _will_never_come(self, connection: Any, highest: int) -> bool:
        """A number is missing below `highest`, which can be read. True once every transaction that could bring it has ended,
        so that the next look shows it or it was rolled back."""
        current = self._store.transitions.writers(connection)
        if self._writers is None:
            self._writers, self._missing = current, (highest, time.monotonic())
        else:
            self._writers &= current
        highest, since = self._missing
        if self._writers:
            if time.monotonic() - since > STALL_SECONDS:
                logger.warning("events wait for transactions that are open for more than %.0f s", STALL_SECONDS)
                self._missing = (highest, time.monotonic())
            return False
        self._bound = highest
        self._writers = None
        return True

    def _gap(self, deleted: int) -> Event:
        assert self._position is not None
        logger.error("events %s to %s were deleted before they were read", self._position + 1, deleted)
        self._position = deleted
        return Event(GAP, 0, 0, "", None, None, 0, None, time.time(), deleted)

    def _move(self, connection: Any) -> bool:
        """Write what has been handled; False: it is not this reader's turn any more."""
        if self.cursor is None or self._position is None or self._handled <= self._moved[0]:
            return True
        is_mine = self._store.transitions.move_cursor(connection, self.cursor, self._me, self._handled)
        self._moved = (self._handled, time.monotonic())
        if not is_mine:
            self._lose()
        return is_mine

    def _take(self, connection: Any) -> bool:
        """True if it is this reader's turn now."""
        assert self.cursor is not None and self._keeper is not None
        transitions = self._store.transitions
        self._position = transitions.take_cursor(connection, self.cursor, self._me)
        if self._position is None:
            row = transitions.find_cursor(connection, self.cursor)
            if row is None:  # a person has removed it meanwhile: as if it had been made just now
                transitions.add_cursor(connection, self.cursor, self._now(connection))
            gone = row.holder if row and row.holder and _is_gone(row.holder) else ""
            self._position = transitions.take_cursor(connection, self.cursor, self._me, gone)
        if self._position is None:
            return False
        self._handled, self._moved = self._position, (self._position, time.monotonic())
        self._writers = None
        self._keeper.hold()
        return True

    def _lose(self) -> None:
        logger.warning("another reader has the cursor %s: this one waits for its turn", self.cursor)
        self._position = None
        if self._keeper is not None:
            self._keeper.let_go()


def _is_gone(holder: str) -> bool:
    """True for a reader that has been killed on this host: nobody need wait for the end of its lease."""
    host_id, pid, started, _ = holder.rsplit(" ", 3)
    return host_id == machine.host_id() and not machine.is_alive(int(pid), float(started))


class _Keeper:
    """Keeps a cursor this reader's while a handler takes its time: a thread and connection of its own."""

    def __init__(self, store: Store, cursor: str, me: str) -> None:
        self._store, self._cursor, self._me = store, cursor, me
        self._holds = False
        self.is_lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="aque-cursor", daemon=True)
        self._thread.start()

    def hold(self) -> None:
        """It is ours now."""
        self.is_lost = False
        self._holds = True

    def let_go(self) -> None:
        """It is not."""
        self.is_lost = False
        self._holds = False

    def stop(self) -> None:
        """Renew nothing more."""
        self._stop.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._stop.wait(LEASE_SECONDS / 3):
            if not self._holds:
                continue
            # While the store is away nobody else can become the reader either.
            with suppress(StoreError, DatabaseError), self._store.connect() as connection:
                self.is_lost = self._holds and not self._store.transitions.renew_cursor(
                    connection, self._cursor, self._me
                )
