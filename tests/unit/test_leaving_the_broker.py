"""What a worker with Aque changes in the way in which Celery's consumer talks to its broker."""

from types import SimpleNamespace
from typing import Any

import pytest

from aque import broker_connection
from aque.publisher import EventQueue


class Hanging:
    """RabbitMQ's client when nobody answers: it waits for as long as it is let, on the clock of the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.waited: list[float | None] = []
        monkeypatch.setattr(broker_connection, "time", SimpleNamespace(monotonic=lambda: self.now))

    def drain_events(self, timeout: float | None = None) -> None:
        self.waited.append(timeout)
        assert timeout is not None, "it would wait for ever"
        self.now += timeout
        raise TimeoutError


@pytest.mark.parametrize("timeout", [None, 0.2])
def test_a_broker_that_hangs_has_so_long_for_all_answers_together(
    monkeypatch: pytest.MonkeyPatch, timeout: float | None
) -> None:
    hanging = Hanging(monkeypatch)
    ask = broker_connection._Patience(hanging.drain_events, 5.0)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            ask(timeout=timeout)
    assert hanging.waited == ([5.0, 0.0, 0.0] if timeout is None else [0.2, 0.2, 0.2])


def test_after_a_reconnection_only_the_loop_asks_for_more_messages() -> None:
    asked: list[Any] = []
    loop: list[Any] = []
    consumer = SimpleNamespace(
        _restore_prefetch_count_after_connection_restart=lambda *said: asked.append(said),
        call_soon=lambda call, *args: loop.append((call, args)),
    )
    broker_connection.restore_prefetch_from_the_loop(consumer)
    consumer._restore_prefetch_count_after_connection_restart("acknowledged")  # by whichever thread acknowledges
    assert asked == []
    call, args = loop.pop()
    call(*args)
    assert asked == [("acknowledged",)]


def queued(groups: set[str] | None = None, enabled: bool = True) -> EventQueue:
    """The events of a worker whose consumer has this dispatcher."""
    queue = EventQueue(None, "one@test", lambda ids: {})  # type: ignore[arg-type]  # the thread is not started
    queue.dispatcher = SimpleNamespace(enabled=enabled, groups=groups or set())
    return queue


def published(queue: EventQueue) -> list[tuple[str, dict[str, Any]]]:
    """What the queue's thread would send, without the times."""
    events: list[tuple[str, dict[str, Any]]] = []

    def send(kind: str, *, timestamp: float, **fields: Any) -> None:
        events.append((kind, fields))

    queue._publish(SimpleNamespace(send=send, flush=lambda: None))
    return events


def test_while_the_broker_is_away_only_the_latest_heartbeat_waits() -> None:
    queue = queued(groups={"worker"})
    for n in range(3):
        queue.send_of_worker("worker-heartbeat", retry=True, active=n)
    queue.send_of_worker("worker-offline", retry=False, active=9)  # it only connects again
    assert published(queue) == [("worker-heartbeat", {"active": 2})]


def test_the_last_event_of_a_worker_that_stops_is_that_it_is_offline() -> None:
    queue = queued()
    queue.send_of_worker("worker-heartbeat", active=1)
    queue.is_leaving = True
    queue.send_of_worker("worker-offline", active=0)
    assert published(queue) == [("worker-offline", {"active": 0})]


@pytest.mark.parametrize("queue", [queued(groups={"task"}), queued(enabled=False)], ids=["of tasks only", "none"])
def test_events_of_the_worker_that_nobody_wants_are_not_published(queue: EventQueue) -> None:
    queue.is_leaving = True
    queue.send_of_worker("worker-heartbeat", active=1)
    queue.send_of_worker("worker-offline", active=0)
    assert published(queue) == []
