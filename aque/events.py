"""What happens to tasks, in any process that has the farm's URL: `aque.events.connect("task.success", handler)`.

    import aque

    @aque.events.connect("task.error", where={"name": "render"})
    def tell(event):                      # in a daemon thread of this process, from now on
        print(event.task_id, event.reason)

    @aque.events.connect("task.success", cursor="billing")
    def bill(event):                      # goes on where `billing` was, whichever process that was
        ...

    for event in aque.events.listen("task.*", timeout=10):
        print(event.kind, event.task_id)

Nothing is lost and what concerns one task comes in order: the source is a table of transitions and not the broker. With a
cursor an event counts as handled when all its handlers have returned, so that after a crash the last few come again.
Celery's own events are another thing: best effort, for Flower.
"""

import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any, Self, TypeVar, overload

import blinker
from celery import Celery, current_app

from aque.errors import BadInput
from aque.farm import farm_of
from aque.feed import GAP, KINDS, Event, Feed
from aque.store import Store

logger = logging.getLogger(__name__)

Handler = TypeVar("Handler", bound=Callable[[Event], Any])

#: All events.
EVERYTHING = "task.*"
#: A handler that raises on an event from a cursor gets it again after so long, then after twice as long, and so on.
FIRST_RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 60.0
_FIELDS = frozenset(field.name for field in fields(Event)) - {"kind", "seq", "at"}


@overload
def connect(
    name: str,
    handler: None = None,
    *,
    where: Mapping[str, Any] | None = None,
    cursor: str | None = None,
    app: Celery | None = None,
) -> Callable[[Handler], Handler]: ...


@overload
def connect(
    name: str,
    handler: Handler,
    *,
    where: Mapping[str, Any] | None = None,
    cursor: str | None = None,
    app: Celery | None = None,
) -> Handler: ...


def connect(
    name: str,
    handler: Any = None,
    *,
    where: Mapping[str, Any] | None = None,
    cursor: str | None = None,
    app: Celery | None = None,
) -> Any:
    """Call `handler(event)` for each event of this name: one of KINDS such as "task.success", or "task.*" for all.

    `where` says what its fields must be, as in `{"job_id": 12, "reason": ["time_limit", "exit"]}`.

    Without `cursor` it sees what happens from now on. If it raises, that is logged, and the next event is next. With a
    cursor, a name that means the same on the whole farm, it sees what has happened since the handlers of that cursor have
    last seen something, in whatever process: it is made by the first to connect. One that raises gets its event again, until
    it returns: nothing overtakes. Of several processes with the same cursor one is served at a time.

    Handlers run in a daemon thread of this process, one for each cursor and one for what has none; a forked child has none
    of them. Events begin to come with the first handler of a cursor: connect the others at once. Without `handler` it is a
    decorator. Raises BadInput, NotRecorded or a StoreError.
    """
    if handler is None:
        return lambda function: connect(name, function, where=where, cursor=cursor, app=app)
    _check_name(name)
    if not callable(handler):
        raise BadInput(f"an event's handler must be callable, not {handler!r}.")
    if cursor is not None and not cursor:
        raise BadInput("a cursor has a name: it cannot be empty.")
    receiver = _Receiver(handler, _condition(where))
    store = farm_of(app or current_app._get_current_object()).store
    with _lock:
        source = _sources.get((id(store), cursor))
        is_new = source is None
        if source is None:
            source = _Source(store, cursor)  # listens from here on
            _sources[id(store), cursor] = source
        source.add(name, receiver)
        if is_new:
            source.start()
    return handler


def disconnect(name: str, handler: Callable[[Event], Any], *, cursor: str | None = None) -> bool:
    """Undo `connect`; False: this handler was not connected so. It may be running just now for the last time."""
    _check_name(name)
    with _lock:
        found = [(key, source) for key, source in _sources.items() if key[1] == cursor and source.remove(name, handler)]
        idle = [key for key, source in found if not source.receivers]
        stopped = [_sources.pop(key) for key in idle]
    for source in stopped:
        source.stop()
    return bool(found)


def listen(
    names: str | Iterable[str] = EVERYTHING,
    *,
    where: Mapping[str, Any] | None = None,
    cursor: str | None = None,
    timeout: float | None = None,
    app: Celery | None = None,
) -> "Listening":
    """An iterator over events, from now on or from where `cursor` is; it ends when `timeout` seconds (None: never) have passed
    without one.

    An event from a cursor counts as handled when the next one is asked for: one at which the loop was left comes again.
    "task.gap" comes whatever the names. Raises as `connect`.
    """
    wanted = frozenset([names] if isinstance(names, str) else names)
    for name in wanted:
        _check_name(name)
    store = farm_of(app or current_app._get_current_object()).store
    return Listening(store, wanted, _condition(where), cursor, timeout)


class Listening:
    """What `listen` returns: an iterator, to be closed after use (or used in a `with` block)."""

    def __init__(
        self,
        store: Store,
        names: Collection[str],
        condition: "_Condition",
        cursor: str | None,
        timeout: float | None,
    ) -> None:
        self._names = names
        self._condition = condition
        self._timeout = timeout
        self._events: deque[Event] = deque()
        self._handled = 0
        self._feed: Feed | None = Feed(store, cursor)
        try:
            self._feed.open()
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        if self._feed is None:
            raise StopIteration
        while True:
            if self._handled and not self._feed.done(self._handled):
                self._events.clear()  # they are another's by now
            while self._events:
                event = self._events.popleft()
                self._handled = event.seq
                if event.kind == GAP or (
                    (event.kind in self._names or EVERYTHING in self._names) and self._condition.holds(event)
                ):
                    return event
            if self._handled:
                self._feed.done(self._handled)
            self._handled = 0
            self._events.extend(self._feed.wait(self._timeout))
            if not self._events:
                self.close()
                raise StopIteration

    def close(self) -> None:
        """Stop listening; the event at hand was not handled."""
        if self._feed is not None:
            self._feed.close()
            self._feed = None
        self._events.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_feed", None) is not None:
            self.close()


def _check_name(name: str) -> None:
    if name != EVERYTHING and name not in KINDS:
        raise BadInput(f"there is no event {name!r}; there are: {', '.join(KINDS)}, and {EVERYTHING} for all.")


class _Condition:
    """What the fields of an event must be."""

    def __init__(self, allowed: Mapping[str, frozenset[Any]]) -> None:
        self._allowed = allowed

    def holds(self, event: Event) -> bool:
        return all(getattr(event, name) in values for name, values in self._allowed.items())


def _condition(where: Mapping[str, Any] | None) -> _Condition:
    for name in where or {}:
        if name not in _FIELDS:
            raise BadInput(f"events have no field {name!r} to choose by; there are: {', '.join(sorted(_FIELDS))}.")
    return _Condition(
        {
            name: frozenset(value if isinstance(value, (list, tuple, set, frozenset)) else [value])
            for name, value in (where or {}).items()
        }
    )


class _Receiver:
    """A handler, as blinker calls it."""

    def __init__(self, handler: Callable[[Event], Any], condition: _Condition) -> None:
        self.handler = handler
        self._condition = condition

    def __call__(self, event: Event) -> None:
        if self._condition.holds(event):
            self.handler(event)


class _Source:
    """Reads one feed in a thread of its own, and sends what it reads as blinker signals."""

    def __init__(self, store: Store, cursor: str | None) -> None:
        self._signals = blinker.Namespace()
        self.receivers: list[tuple[str, _Receiver]] = []
        self._feed = Feed(store, cursor)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="aque-listen", daemon=True)
        try:
            self._feed.open()
        except BaseException:
            self._feed.close()
            raise

    def start(self) -> None:
        self._thread.start()

    def add(self, name: str, receiver: _Receiver) -> None:
        self.receivers.append((name, receiver))
        # Not weakly, as blinker does unless told: a lambda or a method would be gone at once.
        self._signals.signal(name).connect(receiver, weak=False)

    def remove(self, name: str, handler: Callable[[Event], Any]) -> bool:
        for entry in self.receivers:
            if entry[0] == name and entry[1].handler == handler:
                self.receivers.remove(entry)
                self._signals.signal(name).disconnect(entry[1])
                return True
        return False

    def stop(self) -> None:
        """No event is delivered any more, but for one that is being handled."""
        self._stopping.set()
        self._feed.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(5)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                for event in self._feed.wait():
                    if not self._deliver(event) or not self._feed.done(event.seq):
                        break
        except Exception:
            logger.exception("events are not delivered any more")
        finally:
            self._feed.close()

    def _deliver(self, event: Event) -> bool:
        """Call every handler; with a cursor until each has returned. False: it was stopped before that."""
        pause = FIRST_RETRY_SECONDS
        left = self._receivers_for(event)
        while left and not self._stopping.is_set():
            left = [receiver for receiver in left if not self._call(receiver, event)]
            if not left or self._feed.cursor is None:
                break
            self._feed.done(event.seq - 1, now=True)
            self._stopping.wait(pause)
            pause = min(2 * pause, LONGEST_RETRY_SECONDS)
            connected = self._receivers_for(event)
            left = [receiver for receiver in left if receiver in connected]
        return not self._stopping.is_set() or not left

    def _receivers_for(self, event: Event) -> list[Callable[[Event], Any]]:
        with _lock:  # who connects and disconnects
            return [
                receiver
                for name in (event.kind, EVERYTHING)
                for receiver in self._signals.signal(name).receivers_for(event)
            ]

    def _call(self, receiver: Callable[[Event], Any], event: Event) -> bool:
        try:
            receiver(event)
        except Exception:
            again = "" if self._feed.cursor is None else "; it will get it again"
            logger.exception(
                "the handler %r failed on %s of task %s%s",
                getattr(receiver, "handler", receiver), event.kind, event.task_id, again,
            )  # fmt: skip
            return False
        return True


_lock = threading.RLock()
_sources: dict[tuple[int, str | None], _Source] = {}


def _stop_all() -> None:
    """Others need not wait for the cursors of a process that ends."""
    with _lock:
        stopped = list(_sources.values())
        _sources.clear()
    for source in stopped:
        source.stop()


def _forget_in_child() -> None:
    global _lock  # noqa: PLW0603  another thread of the parent may have held it at the fork
    _lock = threading.RLock()
    _sources.clear()


atexit.register(_stop_all)
os.register_at_fork(after_in_child=_forget_in_child)

__all__ = ["EVERYTHING", "KINDS", "Event", "Listening", "connect", "disconnect", "listen"]
