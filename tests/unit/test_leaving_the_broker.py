"""What a worker with Aque changes in the way in which Celery's consumer talks to its broker."""

from types import SimpleNamespace
from typing import Any

import pytest

from aque import bootstep


class Hanging:
    """RabbitMQ's client when nobody answers: it waits for as long as it is let, on the clock of the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.waited: list[float | None] = []
        monkeypatch.setattr(bootstep, "time", SimpleNamespace(monotonic=lambda: self.now))

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
    ask = bootstep._Patience(hanging.drain_events, 5.0)
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
    bootstep._restore_prefetch_from_the_loop(consumer)
    consumer._restore_prefetch_count_after_connection_restart("acknowledged")  # by whichever thread acknowledges
    assert asked == []
    call, args = loop.pop()
    call(*args)
    assert asked == [("acknowledged",)]
