"""`celery inspect`, `control` and `events` on the command line, and Flower, on each broker."""

import json
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import aque
from tests.servers import free_port, wait_until
from tests.worker import tasks
from tests.worker.brokers import Brokered
from tests.worker.farm import LIMIT_SECONDS, ROOT

LIMIT = LIMIT_SECONDS


def celery(on: Brokered, *words: str) -> str:
    """What a run of `celery` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "aque.celery_app", *words],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=on.farm.environment,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_until(gate: Path, started: Path) -> tuple[Any, Any]:
    """A function and a command that run until there is a gate."""
    function = tasks.started.delay(str(started), str(gate))
    command = aque.shell(["sh", "-c", 'until [ -e "$1" ]; do sleep 0.02; done', "sh", str(gate)])
    return function, command


def test_inspect_active_shows_running_tasks_and_control_terminate_kills_one(on: Brokered, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    function, command = run_until(gate, tmp_path / "started")
    for task in (function, command):
        on.farm.wait_for_state(task, "running")
    shown = json.loads(celery(on, "inspect", "active", "--json", "--timeout", str(LIMIT), "-d", on.worker.name))
    assert {function.id, command.id} <= {request["id"] for request in shown[on.worker.name]}
    celery(on, "control", "terminate", "KILL", command.id, "--timeout", str(LIMIT), "-d", on.worker.name)
    assert on.farm.wait_for_state(command, "killed")["signal"] == signal.SIGKILL
    gate.touch()
    assert function.get(timeout=LIMIT) == 1


def test_events_shows_the_life_of_functions_commands_and_ordinary_tasks(on: Brokered) -> None:
    words = ["-m", "celery", "-A", "aque.celery_app", "events", "--dump"]
    watcher = on.farm.start_program(sys.executable, "-u", *words)
    try:

        def seen(task: Any, *kinds: str) -> bool:
            lines = watcher.log.read_text().splitlines()
            return all(any(kind in line and task.id in line for line in lines) for kind in kinds)

        def one_is_seen() -> bool:  # the watcher listens from some moment on, and nobody says when
            probe = tasks.echo.delay(0)
            probe.get(timeout=LIMIT)
            with suppress(AssertionError):
                return wait_until(lambda: seen(probe, "task succeeded"), 0.5)
            return False

        wait_until(one_is_seen, LIMIT, "it listens")
        function, command, broken = tasks.add.delay(1, 1), aque.shell(["true"]), aque.shell(["false"])
        plain = on.send("multiply", 2, 2)
        ends = [(task, "task succeeded") for task in (function, command, plain)] + [(broken, "task failed")]
        wait_until(
            lambda: all(seen(task, "task received", "task started", end) for task, end in ends), LIMIT, "all is shown"
        )
    finally:
        watcher.end(signal.SIGKILL)


def test_flower_shows_running_tasks(on: Brokered, tmp_path: Path) -> None:
    pytest.importorskip("flower")
    gate, port = tmp_path / "gate", free_port()
    words = ["-A", "aque.celery_app", "flower", "--address=127.0.0.1", f"--port={port}"]
    flower = on.farm.start_program(sys.executable, "-m", "celery", *words, env={"FLOWER_UNAUTHENTICATED_API": "true"})
    try:

        def states() -> dict[str, str]:
            """By id, as far as Flower has heard of them."""
            assert flower.running(), flower.log.read_text()
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api/tasks", timeout=5) as answer:
                return {key: task["state"] for key, task in json.load(answer).items()}
            return {}

        def one_is_seen() -> bool:  # Flower hears only what happens after it has asked for events
            probe = tasks.echo.delay(0)
            probe.get(timeout=LIMIT)
            with suppress(AssertionError):
                return wait_until(lambda: probe.id in states(), 0.5)
            return False

        wait_until(one_is_seen, LIMIT, "Flower listens")
        function, command = run_until(gate, tmp_path / "started")
        plain = on.send("wait", str(tmp_path / "plain"), str(gate))
        wait_until(
            lambda: all(states().get(task.id) == "STARTED" for task in (function, command, plain)),
            LIMIT,
            "it shows them",
        )
        gate.touch()
        for task in (function, command, plain):
            task.get(timeout=LIMIT)
    finally:
        gate.touch()
        flower.end(signal.SIGKILL)
