"""`aque.events` in a process of its own: handlers and iterators, on a farm with a real worker."""

import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

import aque
from aque import events
from aque.errors import BadInput, TaskError
from aque.events import Event
from aque.states import Reason
from tests.servers import wait_until
from tests.worker.farm import LIMIT_SECONDS, Farm


class Seen:
    """A handler that keeps what it gets."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, task: Any) -> list[str]:
        return [event.kind for event in self.events if event.task_id == int(task.id)]

    def wait_for(self, task: Any, *kinds: str) -> None:
        wait_until(lambda: self.of(task) == list(kinds), LIMIT_SECONDS, f"{self.of(task)} is {kinds}")


@pytest.fixture
def connect(farm: Farm) -> Iterator[Any]:
    """`aque.events.connect`, undone after the test."""
    connected: list[tuple[str, Any, str | None]] = []

    def connect(name: str, handler: Any, **options: Any) -> Any:
        connected.append((name, handler, options.get("cursor")))
        return aque.events.connect(name, handler, **options)

    yield connect
    for name, handler, cursor in connected:
        events.disconnect(name, handler, cursor=cursor)
    assert [t.name for t in threading.enumerate() if t.name in ("aque-listen", "aque-cursor")] == []


def run(*argv: str, **options: Any) -> Any:
    handle = aque.shell(list(argv), **options)
    with suppress(TaskError):
        handle.get(timeout=LIMIT_SECONDS)
    return handle


def test_a_handler_sees_tasks_start_and_end(farm: Farm, connect: Any) -> None:
    everything, errors = Seen(), Seen()
    connect("task.*", everything)
    connect("task.error", errors)
    good, bad = run("true"), run("sh", "-c", "exit 3", name="bad")
    everything.wait_for(good, "task.started", "task.success")
    everything.wait_for(bad, "task.started", "task.error")
    errors.wait_for(bad, "task.error")
    (event,) = errors.events
    assert (event.name, event.reason, event.attempt) == ("bad", Reason.EXIT, 1)
    assert event.at == pytest.approx(farm.row(bad)["finished_at"].timestamp())


def test_every_way_that_a_task_can_go_is_told(farm: Farm, connect: Any) -> None:
    seen = Seen()
    connect("task.*", seen)
    repeated = run("false", max_attempts=2)
    killed = aque.shell(["sleep", "60"])
    farm.wait_for_state(killed, "running")
    cancelled = aque.shell(["true"], depends_on=killed)
    cancelled.kill()
    skipped = aque.shell(["true"], depends_on=killed)
    killed.kill()
    seen.wait_for(repeated, "task.started", "task.retry", "task.started", "task.error")
    seen.wait_for(killed, "task.started", "task.killed")
    seen.wait_for(cancelled, "task.cancelled")
    seen.wait_for(skipped, "task.skipped")


def test_a_handler_may_choose_by_fields(farm: Farm, connect: Any) -> None:
    everything, chosen = Seen(), Seen()
    connect("task.success", everything)
    connect("task.success", chosen, where={"name": ["this", "that"]})
    this, other = run("true", name="this"), run("true", name="other")
    everything.wait_for(other, "task.success")
    chosen.wait_for(this, "task.success")
    assert [event.name for event in chosen.events] == ["this"]


def test_a_handler_that_raises_holds_up_nobody(farm: Farm, connect: Any, caplog: Any) -> None:
    seen = Seen()

    def broken(event: Event) -> None:
        raise RuntimeError("no")

    connect("task.success", broken)
    connect("task.success", seen)
    first, second = run("true"), run("true")
    seen.wait_for(first, "task.success")
    seen.wait_for(second, "task.success")
    assert "the handler" in caplog.text and "RuntimeError: no" in caplog.text


def test_a_handler_is_kept_and_disconnected(farm: Farm, connect: Any) -> None:
    seen: list[int] = []
    last = Seen()
    connect("task.success", last)
    connect("task.success", handler := (lambda event: seen.append(event.task_id)))
    first = run("true")
    wait_until(lambda: seen == [int(first.id)], LIMIT_SECONDS)
    assert events.disconnect("task.success", handler) and not events.disconnect("task.success", handler)
    last.wait_for(run("true"), "task.success")
    assert seen == [int(first.id)]


def test_with_a_cursor_a_handler_that_raises_gets_its_event_again_and_nothing_overtakes(
    farm: Farm, connect: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(events, "FIRST_RETRY_SECONDS", 0.05)
    calls: dict[int, int] = defaultdict(int)
    order: list[int] = []
    beside = Seen()

    def reluctant(event: Event) -> None:
        calls[event.task_id] += 1
        if calls[event.task_id] < 3:
            raise RuntimeError("not yet")
        order.append(event.task_id)

    connect("task.success", reluctant, cursor="reluctant")
    connect("task.success", beside, cursor="reluctant")
    first, second = run("true"), run("true")
    wait_until(lambda: len(order) == 2, LIMIT_SECONDS)
    assert order == [int(first.id), int(second.id)] and set(calls.values()) == {3}
    assert beside.of(first) == beside.of(second) == ["task.success"]  # who has returned is not called again


def test_a_cursor_goes_on_in_another_process_after_kill_9(farm: Farm) -> None:
    program = (
        "import sys, aque\n"
        "for event in aque.events.listen('task.success', cursor='billing'):\n"
        "    print(event.task_id, flush=True)\n"
        "    if sys.stdin.readline() != 'next\\n': break\n"
    )

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", program],
            env=farm.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    with aque.events.listen("task.success", cursor="billing"):
        pass  # the cursor is there
    first = start()
    tasks = [run("true")]
    try:
        assert line(first) == tasks[0].id
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    tasks += [run("true"), run("true")]
    second = start()
    try:
        for task in tasks:  # the one that had been shown was not handled to its end
            assert line(second) == task.id
            assert second.stdin is not None
            second.stdin.write("next\n")
            second.stdin.flush()
    finally:
        second.kill()
        second.communicate()


def test_an_iterator_ends_when_nothing_happens(farm: Farm) -> None:
    with aque.events.listen(["task.success", "task.error"], timeout=1.5) as listening:
        good, bad = run("true"), run("false")
        seen = [(event.task_id, event.kind) for event in listening]
    assert seen == [(int(good.id), "task.success"), (int(bad.id), "task.error")]
    assert list(listening) == []


def test_mistakes_are_sentences(farm: Farm) -> None:
    with pytest.raises(BadInput, match=r"there is no event 'task\.finished'; there are: task\.cancelled"):
        aque.events.connect("task.finished", print)
    with pytest.raises(BadInput, match="no field 'user'"):
        aque.events.listen(where={"user": "ann"})
    with pytest.raises(BadInput, match="must be callable"):
        aque.events.connect("task.success", 3)  # type: ignore[call-overload]
