"""Celery's events of tasks of the table, as a monitor on the broker hears them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import aque
from tests.worker import tasks
from tests.worker.brokers import Brokered, Monitor, served
from tests.worker.farm import LIMIT_SECONDS

LIMIT = LIMIT_SECONDS


@pytest.fixture
def monitor(on: Brokered) -> Iterator[Monitor]:
    hearing = Monitor(on.client)
    yield hearing
    hearing.end()


def test_a_success_is_received_started_and_succeeded_with_what_a_monitor_shows(on: Brokered, monitor: Monitor) -> None:
    task = tasks.add.delay(1, right=2)
    assert monitor.wait_for(task, "task-succeeded") == ["task-received", "task-started", "task-succeeded"]
    received, succeeded = monitor.event(task, "task-received"), monitor.event(task, "task-succeeded")
    assert (received["name"], received["args"], received["kwargs"]) == (tasks.add.name, "[1]", "{'right': 2}")
    assert (received["retries"], received["root_id"], received["parent_id"]) == (0, task.id, None)
    assert (succeeded["result"], succeeded["hostname"]) == ("3", on.worker.name)
    assert succeeded["runtime"] >= 0


def test_failures_tell_their_exception_and_repeats_are_no_failures(on: Brokered, monitor: Monitor) -> None:
    once, twice = tasks.fail.delay(text="oh"), tasks.fail.apply_async(("KeyError", "no"), max_attempts=2)
    command = aque.shell(["false"])
    for task in (once, twice, command):
        monitor.wait_for(task, "task-failed")
    assert monitor.event(once, "task-failed")["exception"] == "builtins.ValueError oh"
    assert "ValueError" in monitor.event(once, "task-failed")["traceback"]
    one_attempt = ["task-received", "task-started"]
    assert monitor.of(twice) == [*one_attempt, "task-retried", *one_attempt, "task-failed"]
    assert monitor.of(command) == [*one_attempt, "task-failed"]


def test_a_graph_tells_what_became_ready_and_what_was_skipped(on: Brokered, monitor: Monitor) -> None:
    with aque.graph("tale") as job:
        first = tasks.fail.delay()
        skipped = tasks.echo.apply_async((1,), depends_on=first)
        cleanup = tasks.echo.apply_async((2,), after_any=first)
    monitor.wait_for(cleanup, "task-succeeded")
    monitor.wait_for(skipped, "task-revoked")
    assert monitor.of(skipped) == ["task-skipped", "task-revoked"]
    assert monitor.event(skipped, "task-skipped")["name"] == tasks.echo.name
    # Another tick may start it before the event of its release is published.
    assert sorted(monitor.of(cleanup)) == ["task-ready", "task-received", "task-started", "task-succeeded"]
    monitor.wait_for(job.handle, "task-failed")


def test_a_kill_is_told_and_so_is_a_withdrawal(on: Brokered, monitor: Monitor, tmp_path: Path) -> None:
    running = tasks.started.delay(str(tmp_path / "started"), str(tmp_path / "never"))
    waiting = tasks.echo.apply_async((1,), after_any=running)
    on.farm.wait_for_state(running, "running")
    on.client.control.revoke(waiting.id)
    assert monitor.wait_for(waiting, "task-revoked") == ["task-revoked"]
    on.client.control.revoke(running.id, terminate=True, signal="KILL")
    monitor.wait_for(running, "task-revoked")
    assert monitor.of(running)[-2:] == ["task-killed", "task-revoked"]
    revoked = monitor.event(running, "task-revoked")
    assert (revoked["terminated"], revoked["signum"]) == (True, 9)


def test_ordinary_tasks_have_their_events_beside_them(on: Brokered, monitor: Monitor) -> None:
    ours, plain = tasks.add.delay(1, 1), on.send("multiply", 2, 2)
    assert (ours.get(timeout=LIMIT), plain.get(timeout=LIMIT)) == (2, 4)
    for task in (ours, plain):
        assert monitor.wait_for(task, "task-succeeded") == ["task-received", "task-started", "task-succeeded"]


def test_a_monitor_of_celerys_ends_with_the_states_of_results(on: Brokered, monitor: Monitor, tmp_path: Path) -> None:
    """`celery.events.state`, which Flower shows: Aque's own events leave Celery's names."""
    # One by one, it might fail before what is skipped for it is there, and no worker would tell of that.
    with aque.graph():
        good, bad = tasks.echo.delay(1), aque.shell(["false"])
        skipped = tasks.echo.apply_async((1,), depends_on=bad)
        running = tasks.started.apply_async((str(tmp_path / "started"), str(tmp_path / "gate")), after_any=bad)
    ends = ((good, "task-succeeded"), (bad, "task-failed"), (skipped, "task-revoked"), (running, "task-started"))
    for task, kind in ends:
        monitor.wait_for(task, kind)
    state = on.client.events.State()
    for event in list(monitor.events):
        state.event(dict(event))
    assert {task.id: state.tasks[task.id].state for task, _ in ends} == {task.id: task.state for task, _ in ends}
    assert state.tasks[skipped.id].name == tasks.echo.name
    (tmp_path / "gate").touch()
    running.get(timeout=LIMIT)


def test_arguments_can_be_hidden_from_events_and_inspect(tmp_path: Path) -> None:
    with served("aque+sqlite", tmp_path, event_arguments="no") as on:
        monitor = Monitor(on.client)
        gate = tmp_path / "gate"
        function = tasks.started.delay(str(tmp_path / "secret"), str(gate))
        command = aque.shell(["sh", "-c", 'until [ -e "$1" ]; do sleep 0.05; done', "sh", str(gate)])
        for task in (function, command):
            on.farm.wait_for_state(task, "running")
        shown = on.ask("active")
        assert {(request["args"], request["kwargs"]) for request in shown} == {("[hidden]", "[hidden]")}
        gate.touch()
        for task in (function, command):
            monitor.wait_for(task, "task-succeeded")
            received = monitor.event(task, "task-received")
            assert (received["args"], received["kwargs"]) == ("[hidden]", "[hidden]")
        monitor.end()
