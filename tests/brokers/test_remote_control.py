"""Celery's remote control with tasks of the table and ordinary ones: each command, on each broker.

`python -m tests.faults.control` prints the same as a table.
"""

from pathlib import Path
from uuid import uuid4

import pytest
from celery.exceptions import TaskRevokedError

import aque
from aque.errors import TaskCancelled, TaskKilled
from tests.faults.control import CHECKS, names
from tests.servers import wait_until
from tests.worker import tasks
from tests.worker.brokers import Brokered
from tests.worker.farm import LIMIT_SECONDS, processes_with

LIMIT = LIMIT_SECONDS


def test_revoke_by_nobody_in_particular_withdraws_what_waits_and_lets_run_what_runs(
    on: Brokered, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    running = tasks.started.delay(str(tmp_path / "started"), str(gate))
    waiting = tasks.echo.apply_async((1,), depends_on=running)
    on.farm.wait_for_state(running, "running")
    on.client.control.revoke([running.id, waiting.id])
    with pytest.raises(TaskCancelled) as raised:
        waiting.get(timeout=LIMIT)
    assert isinstance(raised.value, TaskRevokedError)
    assert on.farm.state(running) == "running"
    gate.touch()
    assert running.get(timeout=LIMIT) == 1


def test_revoke_with_terminate_kills_functions_and_commands_and_leaves_no_process(on: Brokered, tmp_path: Path) -> None:
    mark, up = f"TEST_MARK={uuid4().hex}", tmp_path / "up"
    function = tasks.started.delay(str(tmp_path / "started"), str(tmp_path / "never"))
    command = aque.shell(["sh", "-c", f'export {mark}; setsid sleep 1000 & touch "$1"; wait', "sh", str(up)])
    for task in (function, command):
        on.farm.wait_for_state(task, "running")
    wait_until(up.exists, LIMIT, "the command is up")
    on.client.control.revoke([function.id, command.id], terminate=True, signal="SIGKILL")
    for task in (function, command):
        with pytest.raises(TaskKilled) as raised:
            task.get(timeout=LIMIT)
        assert isinstance(raised.value, TaskRevokedError)
    assert processes_with(mark) == []


def test_revoke_knows_a_task_by_the_id_that_its_caller_brought(on: Brokered, tmp_path: Path) -> None:
    mine = str(uuid4())
    tasks.started.apply_async((str(tmp_path / "started"), str(tmp_path / "never")), task_id=mine)
    on.farm.wait_for_state(mine, "running")
    on.client.control.revoke(mine, terminate=True)
    on.farm.wait_for_state(mine, "killed")


def test_an_ordinary_task_that_was_revoked_does_not_run(on: Brokered, tmp_path: Path) -> None:
    path, gate = tmp_path / "ran", tmp_path / "gate"
    full = [on.send("wait", str(tmp_path / "full"), str(gate)) for _ in range(3)]
    wait_until(lambda: len(on.ask("active")) == 3, LIMIT, "the pool is full")
    waiting = on.send("wait", str(path), str(gate))
    on.ask("revoke", task_id=[waiting.id])
    gate.touch()
    for task in full:
        task.get(timeout=LIMIT)
    assert on.send("multiply", 2, 2).get(timeout=LIMIT) == 4
    assert not path.exists()


@pytest.mark.parametrize("command", names())
def test_control(on: Brokered, tmp_path: Path, command: str) -> None:
    CHECKS[command](on, tmp_path)
