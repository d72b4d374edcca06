"""Kills that reach along the graph and drained workers, with real workers: what people ask is done, and at once."""

import time
from pathlib import Path

import pytest

import aque
from aque import control
from aque.errors import TaskKilled
from tests.servers import wait_until
from tests.worker import tasks
from tests.worker.farm import LIMIT_SECONDS, Farm

LIMIT = LIMIT_SECONDS
#: Longer than any test: what happens in a test happens because of a ring, or because of a grace of the kill's own.
NEVER = 1000


def deaf(path: Path) -> list[str]:
    return ["sh", "-c", 'trap "" TERM; touch "$1"; while :; do sleep 0.05; done', "sh", str(path)]


def drain(farm: Farm, name: str, wanted: bool = True) -> None:
    assert len(control.drain(farm.store, [name], wanted)) == 1


@pytest.mark.parametrize("kind", ["command", "function"])
def test_a_kill_brings_a_grace_of_its_own_and_a_later_one_shortens_it(
    own_farm: Farm, tmp_path: Path, kind: str
) -> None:
    own_farm.start_worker("-c", "1", cpus=2, kill_grace_seconds=NEVER, poll_seconds=NEVER)
    path = tmp_path / "up"
    task = aque.shell(deaf(path)) if kind == "command" else tasks.deaf_to_term.delay(str(path))
    wait_until(path.exists, LIMIT, "it runs")
    task.kill(grace_seconds=NEVER)
    task.kill(grace_seconds=0.2)
    with pytest.raises(TaskKilled):
        task.get(timeout=LIMIT)


def test_what_was_killed_while_no_worker_ran_never_starts(own_farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "runs"
    first = tasks.record.delay(str(path))
    second = tasks.record.apply_async((str(path),), depends_on=first)
    second.kill(dependencies=True)
    own_farm.start_worker("-c", "1", cpus=1)
    assert tasks.add.delay(1, 1).get(timeout=LIMIT) == 2
    assert [own_farm.state(task) for task in (first, second)] == ["cancelled", "cancelled"]
    assert not path.exists()


def test_a_recursive_kill_ends_a_running_dependency_and_spares_what_another_task_waits_for(
    own_farm: Farm, tmp_path: Path
) -> None:
    own_farm.start_worker("-c", "2", cpus=2)
    gate = tmp_path / "gate"
    shared = tasks.started.delay(str(tmp_path / "shared"), str(gate))
    mine = tasks.started.delay(str(tmp_path / "mine"), str(tmp_path / "never"))
    wanted = tasks.echo.apply_async((1,), depends_on=[shared, mine])
    other = tasks.echo.apply_async((2,), depends_on=shared)
    wait_until(lambda: (tmp_path / "shared").exists() and (tmp_path / "mine").exists(), LIMIT, "both run")
    wanted.kill(dependencies=True)
    with pytest.raises(TaskKilled):
        mine.get(timeout=LIMIT)
    assert own_farm.state(wanted) == "cancelled"
    gate.touch()
    assert other.get(timeout=LIMIT) == 2


def test_a_drained_worker_claims_nothing_runs_on_and_claims_again_at_once(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "2", cpus=2, poll_seconds=NEVER)
    up, gate = tmp_path / "up", tmp_path / "gate"
    running = tasks.started.delay(str(up), str(gate))
    wait_until(up.exists, LIMIT, "it runs")
    drain(own_farm, worker.name)
    wait_until(lambda: "is drained" in worker.log(), LIMIT, "the worker has heard of it")
    waiting = tasks.echo.apply_async((3,), depends_on=running)
    ready = tasks.echo.delay(4)
    gate.touch()
    assert running.get(timeout=LIMIT) == 1
    assert [own_farm.state(task) for task in (waiting, ready)] == ["ready", "ready"]
    assert worker.is_registered()
    began = time.monotonic()
    drain(own_farm, worker.name, False)
    assert (waiting.get(timeout=LIMIT), ready.get(timeout=LIMIT)) == (3, 4)
    assert time.monotonic() - began < LIMIT / 2


def test_what_a_drained_worker_has_claimed_ahead_goes_to_others(own_farm: Farm, tmp_path: Path) -> None:
    busy = own_farm.start_worker("-c", "1", name="busy", cpus=1)
    for number in range(5):  # from now on tasks of this name are known to be short
        assert tasks.started.delay(str(tmp_path / "warm-up")).get(timeout=LIMIT) == 1, number
    gate = tmp_path / "gate"
    long = tasks.started.apply_async((str(tmp_path / "long"), str(gate)), priority=10)
    short = [tasks.started.delay(str(tmp_path / f"short-{n}")) for n in range(20)]
    wait_until((tmp_path / "long").exists, LIMIT, "the long one runs")
    drain(own_farm, busy.name)
    own_farm.start_worker("-c", "1", name="idle", cpus=1)
    assert [task.get(timeout=LIMIT) for task in short] == [1] * 20
    assert {own_farm.row(task)["worker"] for task in short} == {"idle@test"}
    assert own_farm.state(long) == "running"
    gate.touch()
    assert long.get(timeout=LIMIT) == 1


def test_a_worker_that_was_declared_lost_is_still_drained_under_its_new_id(own_farm: Farm) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=1)
    drain(own_farm, worker.name)
    wait_until(lambda: "is drained" in worker.log(), LIMIT, "the worker has heard of it")
    with own_farm.store.begin() as connection:
        (row,) = [row for row in own_farm.store.live_workers(connection) if row.info.name == worker.name]
        while own_farm.store.reap(connection, row, 3) is None:
            (row,) = [row for row in own_farm.store.live_workers(connection) if row.info.name == worker.name]
    (again,) = wait_until(own_farm.live, LIMIT, "it goes on under a new id")
    assert (again.info.id != row.info.id, again.draining) == (True, True)
    drain(own_farm, worker.name, False)
    assert tasks.add.delay(1, 2).get(timeout=LIMIT) == 3


def test_the_result_of_a_command_has_all_of_the_many_pieces_in_which_it_was_written(farm: Farm) -> None:
    text = 'for i in $(seq 100); do echo "$i"; sleep 0.005; done'
    result = aque.shell(["sh", "-c", text]).get(timeout=LIMIT)
    assert result["stdout"].split() == [str(n) for n in range(1, 101)]
