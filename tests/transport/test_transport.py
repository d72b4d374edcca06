"""The transport as Kombu sees it, on SQLite and PostgreSQL."""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from kombu import Connection, Exchange, Queue
from kombu.simple import SimpleQueue

from aque import transport
from aque.store import bus
from aque.store.engine import open_engine
from aque.transport import BusUnreachable
from tests.servers import PostgreSQL, wait_until
from tests.transport.conftest import Start

LIMIT = 20  # seconds; nothing here takes that long, except on a very busy machine


@pytest.fixture
def connection(bus_url: str) -> Iterator[Connection]:
    with Connection(bus_url) as connection:
        yield connection


def send(connection: Connection, queue: str, *bodies: Any, **options: Any) -> None:
    with connection.channel() as channel:
        producer = channel.Producer()
        for body in bodies:
            producer.publish(body, routing_key=queue, declare=[Queue(queue)], **options)


def receive(connection: Connection, queue: Queue, count: int, prefetch: int = 0) -> list[Any]:
    """The bodies of the next `count` messages, acknowledged."""
    bodies: list[Any] = []

    def take(body: Any, message: Any) -> None:
        bodies.append(body)
        message.ack()

    with connection.Consumer([queue], callbacks=[take], prefetch_count=prefetch):
        while len(bodies) < count:
            connection.drain_events(timeout=LIMIT)
    return bodies


def nothing_left(url: str) -> bool:
    """True if no message is in the bus, neither waiting nor owned."""
    engine = open_engine(transport.store_url(url.removeprefix("aque+")))
    with engine.connect() as database:
        count = database.scalar(sa.select(sa.func.count()).select_from(bus.message))
    engine.dispose()
    return count == 0


def database_connection(connection: Connection) -> Any:
    """The driver's connection that `connection` uses next."""
    with connection.transport.database() as database:
        return database.connection.driver_connection


# Several processes


def test_a_message_goes_from_one_process_to_another_once(
    bus_url: str, connection: Connection, start_consumer: Start
) -> None:
    consumer = start_consumer(bus_url, "work")
    send(connection, "work", "hello")
    assert consumer.line() == "hello"
    wait_until(lambda: nothing_left(bus_url))


def test_three_consumers_get_each_of_500_messages_exactly_once(
    bus_url: str, connection: Connection, start_consumer: Start
) -> None:
    consumers = [start_consumer(bus_url, "work") for _ in range(3)]
    send(connection, "work", *range(500))
    wait_until(lambda: nothing_left(bus_url))
    received = Counter(line for consumer in consumers for line in consumer.end())
    assert received == Counter(str(number) for number in range(500))


def test_messages_of_a_killed_consumer_go_to_another(
    bus_url: str, connection: Connection, start_consumer: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "SAFETY_POLL", 0.05)
    victim = start_consumer(bus_url, "work", "--hold")
    send(connection, "work", *range(8))
    assert [victim.line() for _ in range(8)] == [str(number) for number in range(8)]
    heir_is_ready, received = threading.Event(), []

    def inherit() -> None:
        with Connection(bus_url) as heir, heir.Consumer([Queue("work")], callbacks=[take]):
            heir_is_ready.set()
            while len(received) < 8:
                heir.drain_events(timeout=LIMIT)

    def take(body: Any, message: Any) -> None:
        received.append((body, message.delivery_info["redelivered"]))
        message.ack()

    thread = threading.Thread(target=inherit)
    thread.start()
    assert heir_is_ready.wait(LIMIT)
    assert received == []
    victim.kill()
    thread.join(LIMIT)
    assert received == [(number, True) for number in range(8)]


def test_a_restarted_consumer_gets_what_it_held_at_once(
    bus_url: str, connection: Connection, start_consumer: Start
) -> None:
    victim = start_consumer(bus_url, "work", "--hold")
    send(connection, "work", "one")
    assert victim.line() == "one"
    victim.kill()
    assert start_consumer(bus_url, "work").line() == "one again"


def test_a_child_that_outlives_its_killed_parent_does_not_keep_its_messages(
    bus_url: str, connection: Connection
) -> None:
    send(connection, "work", "one")
    ready, tell = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            held = Connection(bus_url).SimpleQueue("work").get(timeout=LIMIT)
            if os.fork() == 0:
                os.write(tell, b"%d\n" % os.getpid())
            threading.Event().wait(60)
            held.ack()
        finally:
            os._exit(1)
    child = int(os.read(ready, 100))
    try:
        os.kill(parent, 9)
        os.waitpid(parent, 0)
        assert receive(connection, Queue("work"), 1) == ["one"]
    finally:
        os.kill(child, 9)
        os.close(ready)
        os.close(tell)


def test_a_forked_child_uses_connections_of_its_own(bus_url: str, connection: Connection) -> None:
    received: list[Any] = []
    with connection.Consumer([Queue("work")], callbacks=[lambda body, message: received.append(body)], no_ack=True):
        of_parent = database_connection(connection)
        child = os.fork()
        if child == 0:
            try:
                assert database_connection(connection) is not of_parent
                send(connection, "work", "from the child")
                with connection.channel() as channel:
                    channel.Consumer([Queue("other")]).consume()
                connection.collect()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        connection.drain_events(timeout=LIMIT)
    assert received == ["from the child"]


# Exchanges


@pytest.mark.parametrize(
    ("kind", "sent_as", "arrives_at"),
    [
        ("fanout", "", ["a", "b", "c"]),
        ("direct", "task.b", ["b"]),
        ("topic", "task.b", ["b", "c"]),
        ("topic", "worker.b", ["c"]),
    ],
)
def test_exchanges_route_to_the_queues_bound_to_them(
    connection: Connection, kind: str, sent_as: str, arrives_at: list[str]
) -> None:
    exchange = Exchange("exchange", kind)
    keys = {"a": "task.a", "b": "task.b", "c": "#"}
    queues = {name: Queue(name, exchange, routing_key=key) for name, key in keys.items()}
    with connection.channel() as channel:
        for queue in queues.values():
            queue(channel).declare()
        channel.Producer().publish("hello", exchange=exchange, routing_key=sent_as)
        found = [name for name, queue in queues.items() if queue(channel).get(no_ack=True)]
    assert found == arrives_at


def test_a_new_listener_hears_the_next_event(bus_url: str, connection: Connection) -> None:
    exchange = Exchange("events", "topic")
    with connection.channel() as channel:
        events = channel.Producer(exchange=exchange)
        events.publish("nobody hears this", routing_key="task.sent")
        with Connection(bus_url) as other:
            queue = Queue("", exchange, routing_key="#", exclusive=True)
            heard: list[Any] = []
            with other.Consumer([queue], callbacks=[lambda body, message: heard.append(body)], no_ack=True):
                events.publish("this", routing_key="task.sent")
                other.drain_events(timeout=LIMIT)
    assert heard == ["this"]


def test_an_unbound_queue_gets_nothing_more(connection: Connection) -> None:
    exchange = Exchange("exchange", "direct")
    with connection.channel() as channel:
        queue = Queue("a", exchange, routing_key="key")(channel)
        queue.declare()
        queue.unbind_from(exchange, "key")
        channel.Producer().publish("hello", exchange=exchange, routing_key="key")
        assert queue.get() is None


# Queues


def test_higher_priorities_come_first(connection: Connection) -> None:
    for priority in (0, 9, 5, 9):
        send(connection, "work", priority, priority=priority)
    assert receive(connection, Queue("work"), 4) == [9, 9, 5, 0]


def test_messages_can_be_got_counted_purged_and_their_queue_deleted(connection: Connection) -> None:
    send(connection, "work", "one", "two", "three")
    with connection.channel() as channel:
        queue = Queue("work")(channel)
        message = queue.get()
        assert message.payload == "one"
        assert queue.queue_declare(passive=True).message_count == 2
        message.reject()
        assert queue.purge() == 2
        assert queue.get() is None
        queue.delete()
        with pytest.raises(connection.channel_errors):
            queue.queue_declare(passive=True)


def test_a_requeued_message_comes_again_and_says_so(connection: Connection) -> None:
    send(connection, "work", "one")
    with connection.channel() as channel:
        queue = Queue("work")(channel)
        message = queue.get()
        assert not message.delivery_info["redelivered"]
        message.requeue()
        assert queue.get(no_ack=True).delivery_info["redelivered"]
        assert queue.get() is None


def test_what_is_not_acknowledged_waits_again_when_its_channel_closes(connection: Connection) -> None:
    send(connection, "work", "one", "two")
    with connection.channel() as channel:
        assert Queue("work")(channel).get().payload == "one"
    assert sorted(receive(connection, Queue("work"), 2)) == ["one", "two"]


def test_an_acknowledgement_after_the_close_still_counts(bus_url: str, connection: Connection) -> None:
    send(connection, "work", "one")
    with Connection(bus_url) as other:
        message = other.SimpleQueue("work").get(timeout=LIMIT)
    message.ack()
    assert nothing_left(bus_url)


def test_no_more_is_delivered_than_the_prefetch_count_and_an_ack_of_another_thread_wakes(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "SAFETY_POLL", 3600)
    send(connection, "work", 1, 2, 3)
    held: list[Any] = []
    with connection.Consumer([Queue("work")], callbacks=[lambda body, message: held.append(message)], prefetch_count=2):
        connection.drain_events(timeout=LIMIT)
        connection.drain_events(timeout=LIMIT)
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.01)
        acknowledge = threading.Timer(0.05, held[0].ack)
        acknowledge.start()
        began = time.monotonic()
        connection.drain_events(timeout=LIMIT)
        assert time.monotonic() - began < LIMIT  # it was woken, and did not just look at the end of the time
        acknowledge.join()
    assert [message.payload for message in held] == [1, 2, 3]


def test_one_call_of_drain_events_delivers_one_message(connection: Connection) -> None:
    send(connection, "work", *range(3))
    received: list[Any] = []
    with connection.Consumer([Queue("work")], callbacks=[lambda body, message: received.append(body)], no_ack=True):
        connection.drain_events(timeout=LIMIT)
        assert received == [0]
    # What was claimed and not delivered is still there.
    assert receive(connection, Queue("work"), 2) == [1, 2]


def test_a_simple_queue_works(connection: Connection) -> None:
    with SimpleQueue(connection, "simple") as queue:
        queue.put({"key": "värde"})
        message = queue.get(timeout=LIMIT)
        assert message.payload == {"key": "värde"}
        message.ack()
        assert queue.qsize() == 0


# Expiry


@pytest.fixture
def upkeep_at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[Connection], None]:
    """Runs the upkeep of a connection now."""

    def upkeep(connection: Connection) -> None:
        with connection.transport.database() as database:
            connection.transport._sweep(database)

    return upkeep


def test_a_queue_that_nobody_uses_vanishes_with_its_messages(
    bus_url: str, connection: Connection, upkeep_at_once: Callable[[Connection], None]
) -> None:
    with connection.channel() as channel:
        queue = Queue("brief", Exchange("exchange", "fanout"), expires=0.02)(channel)
        queue.declare()
        channel.Producer().publish("hello", exchange="exchange")

        def is_gone() -> bool:
            upkeep_at_once(connection)
            return not channel._has_queue("brief")

        wait_until(is_gone)
        assert channel.get_table("exchange") == []
    assert nothing_left(bus_url)


def test_a_queue_with_a_consumer_does_not_expire(
    bus_url: str, connection: Connection, upkeep_at_once: Callable[[Connection], None]
) -> None:
    with Connection(bus_url) as other, connection.channel() as channel:
        with connection.Consumer([Queue("held", expires=0.001)]):
            Queue("brief", expires=0.02)(channel).declare()

            def brief_is_gone() -> bool:
                upkeep_at_once(other)
                return not channel._has_queue("brief")

            other.connect()
            wait_until(brief_is_gone)
            assert channel._has_queue("held")

        def held_is_gone() -> bool:
            upkeep_at_once(other)
            return not channel._has_queue("held")

        wait_until(held_is_gone)


def test_messages_vanish_when_their_time_is_over(
    bus_url: str, connection: Connection, upkeep_at_once: Callable[[Connection], None]
) -> None:
    with connection.channel() as channel:
        queues = [Queue("brief", message_ttl=0.001)(channel), Queue("work")(channel)]
        for queue in queues:
            queue.declare()
        channel.Producer().publish("one", routing_key="brief")
        channel.Producer().publish("two", routing_key="work", expiration=0.001)

        def is_gone() -> bool:
            upkeep_at_once(connection)
            return nothing_left(bus_url)

        wait_until(is_gone)
        assert [queue.get() for queue in queues] == [None, None]


# Failures


def test_a_lost_ring_costs_a_safety_poll_and_no_message(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, bus_url: str
) -> None:
    monkeypatch.setattr(transport, "SAFETY_POLL", 0.2)
    monkeypatch.setattr(transport.Doorbell, "drain", lambda _: set())
    with connection.channel() as channel:
        late = threading.Timer(0.05, channel.Producer().publish, ["late"], {"routing_key": "work"})
        late.start()
        assert receive(connection, Queue("work"), 1) == ["late"]
        late.join()


def consume_through(connection: Connection, breaking: Callable[[], None]) -> list[Any]:
    """Start to consume, break something, reconnect as Celery does, and get a message that is sent afterwards."""
    received: list[Any] = []
    consumer = connection.Consumer(
        [Queue("work")], callbacks=[lambda body, message: received.append(body)], no_ack=True
    )
    consumer.consume()
    breaking()
    with pytest.raises(connection.connection_errors):
        connection.drain_events(timeout=LIMIT)
    connection.close()
    connection.ensure_connection(interval_start=0.05, interval_step=0, timeout=LIMIT)
    connection.ensure(connection, lambda: send(connection, "work", "after"), max_retries=3, interval_start=0)()
    with connection.Consumer([Queue("work")], callbacks=[lambda body, message: received.append(body)], no_ack=True):
        connection.drain_events(timeout=LIMIT)
    return received


def test_terminated_backends_are_a_connection_error_and_reconnecting_works(own_postgresql: PostgreSQL) -> None:
    def terminate() -> None:
        own_postgresql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )

    with Connection(f"aque+{own_postgresql.url}") as connection:
        assert consume_through(connection, terminate) == ["after"]


def test_a_restarted_server_is_a_connection_error_and_reconnecting_works(own_postgresql: PostgreSQL) -> None:
    with Connection(f"aque+{own_postgresql.url}") as connection:
        assert consume_through(connection, own_postgresql.restart) == ["after"]


def test_an_unreachable_server_is_named_without_its_password() -> None:
    with Connection("aque+postgresql://user:secret@127.0.0.1:1/bus") as connection:
        with pytest.raises(BusUnreachable, match=r"aque\+postgresql://user:\*\*\*@127.0.0.1:1/bus") as caught:
            connection.connect()
        assert "secret" not in str(caught.value)
        assert "secret" not in connection.as_uri()
