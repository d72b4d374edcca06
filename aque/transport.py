# mypy: disable-error-code="no-untyped-call"
"""Kombu transport `aque+sqlite:///FILE` and `aque+postgresql://USER@HOST/NAME`: Celery with no broker but the database.

It carries Celery's remote control, events and ordinary tasks. See docs/transport.md for what it promises.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from queue import Empty
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, virtual
from kombu.transport.base import to_rabbitmq_queue_arguments
from kombu.transport.virtual import exchange as exchange_types
from kombu.utils.json import dumps, loads

from aque.doorbell import Doorbell, ring, wait_readable
from aque.errors import BadSetting, StoreUnreachable
from aque.store import bus
from aque.store.engine import Connection, DatabaseError, Engine, driver_error, shown_url, transaction
from aque.version import __version__

TRANSPORT_ALIASES["aque"] = "aque.transport:Transport"


def _with_redis(transport: str) -> str:
    try:
        import_module("redis")
    except ImportError:
        raise BadSetting("a broker on Redis needs the package redis: pip install 'aque[redis]'.") from None
    return transport


# Kombu calls what is callable there when the first URL with that scheme is used. Its own transport fails to be imported with
# an AttributeError, which names neither the package nor the remedy.
for _scheme in ("redis", "rediss", "sentinel"):
    TRANSPORT_ALIASES[_scheme] = partial(_with_redis, TRANSPORT_ALIASES[_scheme])  # type: ignore[assignment]

#: A consumer looks this often even if no doorbell rings, and looks for what dead ones have left. Seconds.
SAFETY_POLL = 5.0

#: A connection that only publishes clears away what has expired this often: there may be no consumer to do it. Seconds.
SWEEP_BY_PUBLISHER = 60.0

#: How many messages are claimed, or acknowledged, in one statement at most.
BATCH = 64

#: Celery marks what may be lost in a crash of the broker (events, remote control) with delivery mode 1.
TRANSIENT = 1


class BusUnreachable(StoreUnreachable, ConnectionError):
    """The database that carries the messages does not answer; Celery connects again."""


def store_url(url: str) -> str:
    """The SQLAlchemy URL behind the part of a transport URL that follows `aque+`."""
    scheme, _, rest = url.partition("://")
    # SQLAlchemy 2.1 reads a bare postgresql:// as psycopg 3.
    return f"postgresql+psycopg2://{rest}" if scheme in ("postgresql", "postgres") else url


# Engines are shared by the connections of a process, and belong to it: see _forget_in_child.
_engines: dict[str, Engine] = {}
_engines_guard = threading.Lock()
_engines_of_parents: list[Engine] = []


def _engine(url: str) -> Engine:
    with _engines_guard:
        if url not in _engines:
            _engines[url] = bus.open_bus(store_url(url))
        return _engines[url]


def _forget_in_child() -> None:
    """In a forked child: leave the parent's database connections alone, and make new ones when needed."""
    global _engines_guard  # noqa: PLW0603 (another thread may have held it while this one forked)
    _engines_guard = threading.Lock()
    # Kept, since collecting them would close connections that the parent uses.
    _engines_of_parents.extend(_engines.values())
    _engines.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class _Exchange:
    """Routes in the database, where the bindings are; Kombu would put one copy after the other."""

    def deliver(self, message: dict[str, Any], exchange: str, routing_key: str, **kwargs: Any) -> None:
        self.channel._publish(self.type, exchange, routing_key, message)  # type: ignore[attr-defined]


class _Direct(_Exchange, exchange_types.DirectExchange):
    pass


class _Topic(_Exchange, exchange_types.TopicExchange):
    pass


class _Fanout(_Exchange, exchange_types.FanoutExchange):
    pass


class QoS(virtual.QoS):
    """Counts what a channel has delivered; what was not acknowledged waits in the database and nowhere else."""

    restore_at_shutdown = False

    def ack(self, delivery_tag: str) -> None:
        self.channel._acknowledge(int(delivery_tag))
        self._quick_ack(delivery_tag)
        self.channel.transport.room_for_more()

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if requeue:
            self.channel.transport.give_back([int(delivery_tag)], redelivered=True)
            self._quick_ack(delivery_tag)
        else:
            self.ack(delivery_tag)


class Channel(virtual.Channel):
    """Queues, bindings, publishing and consuming, each one statement."""

    QoS = QoS
    supports_fanout = True
    do_restore = False
    exchange_types = {"direct": _Direct, "topic": _Topic, "fanout": _Fanout}  # noqa: RUF012 (as Kombu declares it)

    def __init__(self, connection: "Transport", **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        #: As `connection`, which Kombu clears when the channel closes; acknowledgements come later than that.
        self.transport = connection
        self._no_ack: set[str] = set()
        #: Claimed, and not delivered yet.
        self._claimed: deque[tuple[str, bus.Message]] = deque()

    # Queues and bindings

    def prepare_queue_arguments(self, arguments: Any, **options: Any) -> Any:
        # Else `expires` and `message_ttl` would be dropped: Celery's event and reply queues would stay for ever.
        return to_rabbitmq_queue_arguments(arguments, **options)

    def _new_queue(self, queue: str, arguments: dict[str, Any] | None = None, **kwargs: Any) -> None:
        expires, ttl = ((arguments or {}).get(key) for key in ("x-expires", "x-message-ttl"))
        with self.transport.database() as connection:
            bus.declare_queue(
                connection, queue, None if expires is None else expires / 1000, None if ttl is None else ttl / 1000
            )

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:
        with self.transport.database() as connection:
            return bus.has_queue(connection, queue)

    def queue_bind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", arguments: Any = None, **kwargs: Any
    ) -> None:
        # Always, unlike Kombu: the queue may have expired since this connection bound it.
        exchange = exchange or "amq.direct"
        self.state.binding_declare(queue, exchange, routing_key or "", arguments)
        key, pattern, _ = self.typeof(exchange).prepare_bind(queue, exchange, routing_key or "", arguments)
        with self.transport.database() as connection:
            bus.bind(connection, exchange, key, pattern or "", queue)

    def queue_unbind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", arguments: Any = None, **kwargs: Any
    ) -> None:
        exchange = exchange or "amq.direct"
        self.state.binding_delete(queue, exchange, routing_key or "")
        with self.transport.database() as connection:
            bus.unbind(connection, exchange, routing_key or "", queue)

    def get_table(self, exchange: str) -> list[tuple[str, str, str]]:
        with self.transport.database() as connection:
            return bus.bindings(connection, exchange)

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: Any) -> None:
        if if_empty and self._size(queue):
            return
        self.state.queue_bindings_delete(queue)
        with self.transport.database() as connection, transaction(connection):
            bus.delete_queues(connection, [queue])

    def _size(self, queue: str) -> int:
        with self.transport.database() as connection:
            return bus.count_waiting(connection, queue)

    def _purge(self, queue: str) -> int:
        with self.transport.database() as connection:
            return bus.purge(connection, queue)

    # Publishing

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        self._publish("direct", "", queue, message)

    def _publish(self, exchange_type: str, exchange: str, routing_key: str, message: dict[str, Any]) -> None:
        properties = message["properties"]
        lifetime = properties.get("expiration")
        with self.transport.database() as connection:
            queues = bus.publish(
                connection,
                exchange_type,
                exchange,
                routing_key or "",
                self._get_message_priority(message),
                dumps(message),
                None if lifetime is None else int(lifetime) / 1000,
                durable=properties.get("delivery_mode") != TRANSIENT,
            )
            ring(connection, [bus.bell_name(queue) for queue in queues])
        self.transport.sweep_as_publisher()

    # Consuming

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[..., Any], consumer_tag: str, **kwargs: Any
    ) -> None:
        super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)
        (self._no_ack.add if no_ack else self._no_ack.discard)(queue)
        self.transport.start_consuming(queue)

    def basic_cancel(self, consumer_tag: str) -> None:
        queue = self._tag_to_queue.get(consumer_tag)
        super().basic_cancel(consumer_tag)
        if queue is not None and queue not in self._active_queues:
            undelivered = [message.id for name, message in self._claimed if name == queue]
            self._claimed = deque(item for item in self._claimed if item[0] != queue)
            self.transport.stop_consuming(queue, undelivered)

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        transport = self.transport
        owner = transport.owner()
        with transport.database() as connection:
            bus.touch_queue(connection, queue)
            found = bus.claim(connection, queue, owner, 1)
        if not found:
            raise Empty()
        return _payload(found[0])

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        message = super().basic_get(queue, no_ack=no_ack, **kwargs)
        if message is not None and no_ack:
            self._acknowledge(int(message.delivery_tag))
        return message

    def claim(self, look: set[str]) -> None:
        """Claim what waits in those of this channel's queues that are in `look`, and remove from it what is empty."""
        for queue in [queue for queue in self._active_queues if queue in look]:
            room = BATCH
            if queue not in self._no_ack and self.qos.prefetch_count:
                ahead = sum(name not in self._no_ack for name, _ in self._claimed)
                room = min(room, self.qos.can_consume_max_estimate() - ahead)
            if room <= 0:
                continue  # stays in `look` until an acknowledgement makes room
            owner = self.transport.owner()
            with self.transport.database() as connection:
                found = bus.claim(connection, queue, owner, room)
            self._claimed.extend((queue, message) for message in found)
            if len(found) < room:
                look.discard(queue)

    def has_room(self, look: Collection[str]) -> bool:
        """True if `claim(look)` would ask the database."""
        return any(queue in look and (queue in self._no_ack or self.qos.can_consume()) for queue in self._active_queues)

    def deliver_one(self) -> bool:
        """Hand the next claimed message to its consumer; False if there is none."""
        if not self._claimed:
            return False
        queue, message = self._claimed.popleft()
        if queue in self._no_ack:
            self.transport.acknowledge_later(message.id)
        self.connection._deliver(_payload(message), queue)
        return True

    def _acknowledge(self, id: int) -> None:
        self.transport.acknowledge_later(id)
        self.transport.acknowledge_now_unless_ticking()

    def close(self) -> None:
        if not self.closed:
            transport = self.transport
            self.qos._flush()
            mine = [int(tag) for tag in self.qos._delivered]
            super().close()
            transport.flush_acknowledgements()
            transport.give_back(mine, redelivered=True)


_Channel = Channel  # inside Transport that name is its attribute


def _payload(message: bus.Message) -> dict[str, Any]:
    """The message as Kombu wants it; its delivery tag is its id in the database."""
    payload: dict[str, Any] = loads(message.body)
    payload["properties"]["delivery_tag"] = str(message.id)
    payload["properties"]["delivery_info"]["redelivered"] = message.redelivered
    return payload


class Transport(virtual.Transport):
    """One connection: a doorbell, an owner of messages, and channels. Database connections come from a shared pool."""

    Channel = Channel
    can_parse_url = True
    # Not "sql": Celery switches events off for that.
    driver_type = "aque"
    driver_name = "aque"
    implements = virtual.Transport.implements.extend(
        asynchronous=True, exchange_type=frozenset(["direct", "topic", "fanout"])
    )
    connection_errors: Any = (*virtual.Transport.connection_errors, BusUnreachable)

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        self._url: str = client.hostname
        self._bell: Doorbell | None = None
        self._owner = 0
        #: Queues that may have messages for us.
        self._look: set[str] = set()
        self._upkeep_due = 0.0
        self._sweep_due = time.monotonic() + SWEEP_BY_PUBLISHER
        self._done: deque[int] = deque()
        #: Wakes a blocked `drain_events`, or Celery's event loop, from another thread.
        self._nudge = -1
        self._loop: Any = None
        self._loop_thread = 0
        self._loop_timer: Any = None
        self._turn = 0
        self._closing = False

    def driver_version(self) -> str:
        return __version__

    # The database

    @contextmanager
    def database(self) -> Iterator[Connection]:
        """A database connection of this process; BusUnreachable if there is none to be had."""
        with self._reaching(), bus.connected(_engine(self._url)) as connection:
            yield connection

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except DatabaseError as error:
            if not bus.is_gone(error):
                raise
            reason = str(error.orig).strip().partition("\n")[0]
            raise BusUnreachable(f"cannot use the message bus {self._shown_url()}: {reason}") from driver_error(error)
        except ConnectionResetError as error:
            raise BusUnreachable(f"lost the message bus {self._shown_url()}: {error}") from error

    def _shown_url(self) -> str:
        return "aque+" + shown_url(self._url)

    def establish_connection(self) -> Any:
        with self.database() as connection:
            bus.create_tables(connection)
        return super().establish_connection()

    def close_connection(self, connection: Any) -> None:
        self._leave_event_loop()
        self._closing = True  # so that channels do one by one nothing of what follows for all at once
        try:
            if self._is_consuming():
                with suppress(BusUnreachable), self.database() as database:
                    self._settle(database, self._done)
                    with transaction(database):
                        bus.let_go_of_queues(database, [self._owner])
                        freed = bus.free(database, [self._owner])
                    ring(database, [bus.bell_name(queue) for queue in freed])
        finally:
            self._forget_consuming()
            super().close_connection(connection)
            self._closing = False

    def _collect(self, connection: Any) -> None:
        """Kombu calls this in a forked child instead of close_connection: the messages are the parent's."""
        self._leave_event_loop()
        self._closing = True
        self._forget_consuming()
        super().close_connection(connection)

    # Owning and being woken

    def owner(self) -> int:
        """The number under which this connection claims messages; opens the doorbell, whose end is the owner's end."""
        if not self._is_consuming():
            self._forget_consuming()  # of a parent process, if this one was forked
            with self._reaching():
                engine = _engine(self._url)
                bell = Doorbell(engine)
                self._owner = bus.become_owner(engine, None if engine.dialect.name == "sqlite" else bell.connection)
            self._bell, self._nudge = bell, os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._upkeep_due = 0.0
        return self._owner

    def _is_consuming(self) -> bool:
        return self._bell is not None and self._bell.fileno() >= 0

    def _forget_consuming(self) -> None:
        if self._bell is None:
            return
        bell, self._bell = self._bell, None
        os.close(self._nudge)
        self._nudge = -1
        if bell.fileno() >= 0:
            bus.retire(_engine(self._url), self._owner)
            bell.close()
        self._owner = 0

    def start_consuming(self, queue: str) -> None:
        """Listen for `queue`, keep it from expiring, and look into it at once."""
        self._replace_broken_bell(queue)
        owner = self.owner()
        assert self._bell is not None
        with self._reaching():
            self._bell.listen([bus.bell_name(queue)])
        with self.database() as connection:
            bus.hold_queue(connection, queue, owner)
        self._look.add(queue)
        self._wake()

    def _replace_broken_bell(self, queue: str) -> None:
        """Where `queue` is the only one that is consumed, nobody needs to hear that the line broke while idle.

        Kombu keeps the connections of `inspect` and its like for the next call, which may come days later.
        """
        if self._bell is None or self._loop is not None or self._active_queues() - {queue}:
            return
        try:
            self._bell.drain()
        except ConnectionResetError:
            self._forget_consuming()

    def stop_consuming(self, queue: str, undelivered: Collection[int]) -> None:
        """Let go of `queue`, and of the messages in it that were claimed but not delivered."""
        self._look.discard(queue)
        if self._closing or not self._is_consuming():
            return
        self.flush_acknowledgements()
        self.give_back(undelivered, redelivered=False)
        with self.database() as connection:
            bus.let_go_of_queues(connection, [self._owner], queue)

    def room_for_more(self) -> None:
        """An acknowledgement made room: wake the consuming thread if messages wait for that."""
        if self._look:
            self._wake()

    def _wake(self) -> None:
        with suppress(BlockingIOError, OSError):
            os.eventfd_write(self._nudge, 1)

    # Acknowledging

    def acknowledge_later(self, id: int) -> None:
        self._done.append(id)
        if len(self._done) >= BATCH:
            self.flush_acknowledgements()

    def acknowledge_now_unless_ticking(self) -> None:
        """In the event loop acknowledgements wait for the end of its turn, where many go in one statement."""
        if self._loop is None or threading.get_ident() != self._loop_thread:
            self.flush_acknowledgements()

    def flush_acknowledgements(self) -> None:
        if self._done and not self._closing:
            with self.database() as connection:
                self._settle(connection, self._done)

    def _settle(self, connection: Connection, done: deque[int]) -> None:
        ids: list[int] = []
        with suppress(IndexError):
            while True:
                ids.append(done.popleft())
        if not ids:
            return
        try:
            bus.acknowledge(connection, self._owner, ids)
        except BaseException:
            done.extendleft(ids)
            raise

    def give_back(self, ids: Collection[int], redelivered: bool) -> None:
        """Let claimed messages wait again, for whoever takes them first."""
        if ids and self._owner and not self._closing:
            with self.database() as connection:
                queues = bus.give_back(connection, self._owner, ids, redelivered)
                ring(connection, [bus.bell_name(queue) for queue in queues])

    # Upkeep

    def _do_upkeep(self) -> None:
        """Every SAFETY_POLL: look into every queue, and free what the dead have left."""
        self._upkeep_due = time.monotonic() + SAFETY_POLL
        self._look |= self._active_queues()
        with self.database() as connection:
            self._sweep(connection)

    def sweep_as_publisher(self) -> None:
        if time.monotonic() >= self._sweep_due:
            self._sweep_due = time.monotonic() + SWEEP_BY_PUBLISHER
            with self.database() as connection:
                self._sweep(connection)

    def _sweep(self, connection: Connection) -> None:
        if gone := bus.dead(connection, bus.owners(connection)):
            with transaction(connection):
                bus.let_go_of_queues(connection, gone)
                freed = bus.free(connection, gone)
            ring(connection, [bus.bell_name(queue) for queue in freed])
        if bus.has_expired(connection):
            with transaction(connection):
                if names := bus.expired_queues(connection):
                    bus.delete_queues(connection, names)
                bus.delete_expired_messages(connection)

    def _open_channels(self) -> "list[_Channel]":
        return [channel for channel in self.channels if channel is not None and not channel.closed]

    def _active_queues(self) -> set[str]:
        return {queue for channel in self._open_channels() for queue in channel._active_queues}

    # Delivering

    def _claim_what_rang(self) -> None:
        self.owner()
        assert self._bell is not None
        if time.monotonic() >= self._upkeep_due:
            self._do_upkeep()
        with self._reaching():
            rang = self._bell.drain()
        with suppress(BlockingIOError):
            os.eventfd_read(self._nudge)
        channels = self._open_channels()
        if rang:
            self._look |= {queue for queue in self._active_queues() if bus.bell_name(queue) in rang}
        if self._look:
            for channel in channels:
                channel.claim(self._look)

    def _deliver_one(self) -> bool:
        """Deliver a message of the channel whose turn it is; remote control must not wait for a flood of tasks."""
        channels = self._open_channels()
        for i in range(len(channels)):
            turn = (self._turn + i) % len(channels)
            if channels[turn]._claimed:
                self._turn = turn + 1
                return channels[turn].deliver_one()
        return False

    def drain_events(self, connection: Any, timeout: float | None = None, **kwargs: Any) -> None:
        """Deliver one message; wait for it up to `timeout` seconds (None: for ever), then raise TimeoutError.

        One, because Kombu's callers count calls: a reply to `inspect` is one of as many as workers were asked.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            self._claim_what_rang()
            if self._deliver_one():
                return
            self.flush_acknowledgements()
            now = time.monotonic()
            if end is not None and now >= end:
                raise TimeoutError
            until = self._upkeep_due if end is None else min(end, self._upkeep_due)
            assert self._bell is not None
            wait_readable([self._bell.fileno(), self._nudge], until - now)

    # Celery's event loop

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        self._leave_event_loop()
        self.owner()
        assert self._bell is not None
        self._loop, self._loop_thread = loop, threading.get_ident()
        loop.add_reader(self._bell.fileno(), self._deliver_all)
        loop.add_reader(self._nudge, self._deliver_all)
        loop.on_tick.add(self._on_tick)
        self._loop_timer = loop.call_repeatedly(SAFETY_POLL, self._wake)

    def _leave_event_loop(self) -> None:
        if self._loop is None:
            return
        loop, self._loop = self._loop, None
        self._loop_timer.cancel()
        loop.on_tick.discard(self._on_tick)
        if self._is_consuming():
            assert self._bell is not None
            loop.remove(self._bell.fileno())
            loop.remove(self._nudge)

    def _deliver_all(self, *args: Any) -> None:
        self._claim_what_rang()
        while self._loop is not None and self._deliver_one():
            pass

    def _on_tick(self) -> None:
        """Before the loop blocks: acknowledge. Delivers nothing: the pool's own tick, which makes the loop watch the
        pipes that a new task is written to, may have run already, and the task would wait for the next turn."""
        self._loop_thread = threading.get_ident()
        self.flush_acknowledgements()
        if self._look and any(channel.has_room(self._look) for channel in self._open_channels()):
            self._wake()
