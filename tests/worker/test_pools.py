"""The pools that Celery has beside prefork, in real workers: what works in each, and what a worker says that does not."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aque
from aque.errors import BadInput, TaskError, TaskKilled
from tests.servers import wait_until
from tests.worker import tasks
from tests.worker.farm import LIMIT_SECONDS, PROGRAMS, ROOT, Farm

LIMIT = LIMIT_SECONDS
#: At most these wait for each other in a test.
CHILDREN = 3


@pytest.fixture(scope="module", params=["threads", "solo"])
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def served_farm(pool: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    directory = tmp_path_factory.mktemp("farm")
    with Farm(f"sqlite:///{directory / 'aque.db'}", directory) as farm:
        farm.start_worker("-P", pool, "-c", str(CHILDREN), cpus=4, memory="1G", lease_seconds=2)
        yield farm


def held(farm: Farm, tmp_path: Path) -> tuple[Any, Path]:
    """A function that runs until there is a file; and that file."""
    path, gate = tmp_path / "held", tmp_path / "gate"
    task = tasks.hold.delay(str(path), str(gate))
    wait_until(path.exists, LIMIT, "it runs")
    farm.wait_for_state(task, "running")
    return task, gate


def test_functions_and_commands_have_their_results(farm: Farm) -> None:
    numbers = [tasks.add.delay(i, 1) for i in range(20)]
    command = aque.shell(["echo", "hello"])
    assert [number.get(timeout=LIMIT) for number in numbers] == list(range(1, 21))
    assert command.get(timeout=LIMIT)["stdout"] == "hello\n"
    assert tasks.total.delay([tasks.add.delay(1, 2), 3]).get(timeout=LIMIT) == 6


def test_whatever_a_function_raises_is_its_outcome_and_the_worker_goes_on(farm: Farm) -> None:
    with pytest.raises(ValueError, match="went wrong"):
        tasks.fail.delay().get(timeout=LIMIT)
    for status in (0, 3, -9):
        with pytest.raises(TaskError):
            tasks.exit_with.delay(status).get(timeout=LIMIT)
    with pytest.raises(TaskError):
        tasks.interrupt.delay().get(timeout=LIMIT)
    assert tasks.add.delay(1, 1).get(timeout=LIMIT) == 2


def test_a_function_knows_its_task_whatever_runs_beside_it(farm: Farm, tmp_path: Path, pool: str) -> None:
    if pool == "solo":
        task = tasks.submit_one_more.delay()
        children = {task.number: task.get(timeout=LIMIT)}
    else:
        one, other = str(tmp_path / "one"), str(tmp_path / "other")
        pair = [tasks.meet.delay(one, other), tasks.meet.delay(other, one)]
        answers = [task.get(timeout=LIMIT) for task in pair]
        assert [answer["id"] for answer in answers] == [task.number for task in pair]
        assert [answer["variable"] for answer in answers] == [None, None]
        children = {answer["id"]: answer["child"] for answer in answers}
    for parent, child in children.items():
        assert farm.row(child)["parent_id"] == parent
        farm.wait_for_state(child, "success")


def test_a_function_that_waits_for_its_child_has_a_thread_in_its_place_and_in_solo_an_error(
    farm: Farm, pool: str
) -> None:
    waiting = [tasks.through_child.delay(i) for i in range(2 * CHILDREN)]
    if pool == "threads":
        assert [task.get(timeout=LIMIT) for task in waiting] == list(range(1, 2 * CHILDREN + 1))
    else:
        with pytest.raises(BadInput, match="a worker whose pool cannot grow"):
            waiting[0].get(timeout=LIMIT)


def test_a_function_may_ask_for_another_attempt(farm: Farm) -> None:
    assert tasks.third_time.delay().get(timeout=LIMIT) == 2


def test_a_kill_of_a_function_says_that_it_goes_on_and_changes_nothing(farm: Farm, tmp_path: Path) -> None:
    task, gate = held(farm, tmp_path)
    worker = farm.workers[0]
    task.kill()
    task.kill("USR1")  # which would be for the whole worker
    sentence = f"task {task.id} cannot be ended: it runs in the worker's own process"
    wait_until(lambda: sentence in worker.log(), LIMIT, "the log says so")
    gate.touch()
    assert task.get(timeout=LIMIT)
    assert farm.state(task) == "success"
    assert worker.log().count(sentence) == 1


def test_aque_kill_says_that_a_function_goes_on(farm: Farm, tmp_path: Path) -> None:
    task, gate = held(farm, tmp_path)
    said = subprocess.run(
        [PROGRAMS / "aque", "kill", task.id], env=farm.environment, capture_output=True, text=True, check=True
    )
    assert f"task {task.id} is a function in the process of {farm.workers[0].name}" in said.stderr
    gate.touch()
    assert task.get(timeout=LIMIT)


def test_revoke_answers_that_the_function_goes_on(farm: Farm, tmp_path: Path) -> None:
    task, gate = held(farm, tmp_path)
    worker = farm.workers[0]
    client = farm.client()
    worker.wait_until_it_answers(client)  # also while a function of the pool solo runs
    (answer,) = client.control.revoke(
        task.id, terminate=True, reply=True, timeout=LIMIT, destination=[worker.name], limit=1
    )
    assert "goes on" in answer[worker.name]["error"]
    gate.touch()
    assert task.get(timeout=LIMIT)


def test_commands_are_killed_and_the_lease_is_renewed_while_a_function_runs(farm: Farm, tmp_path: Path) -> None:
    task, gate = held(farm, tmp_path)
    command = aque.shell(["sleep", "1000"])
    farm.wait_for_state(command, "running")
    command.kill()
    with pytest.raises(TaskKilled):
        command.get(timeout=LIMIT)
    (row,) = farm.live()
    wait_until(
        lambda: farm.live()[0].info.id == row.info.id and farm.live()[0].seen_at > row.seen_at, LIMIT, "it is renewed"
    )
    gate.touch()
    assert task.get(timeout=LIMIT)
    assert farm.row(task)["attempt"] == 1


def test_a_time_limit_is_said_not_to_hold(farm: Farm) -> None:
    task = tasks.nap.apply_async((0.3,), time_limit=0.1)
    assert task.get(timeout=LIMIT) == 0.3
    assert f"task {task.id} has a time limit, which the pool" in farm.workers[0].log()


def test_the_worker_says_at_its_start_and_in_the_table_what_it_cannot_do(farm: Farm) -> None:
    assert "they cannot be killed and have no time limits" in farm.workers[0].log()
    (row,) = farm.live()
    assert "no kills, no time limits" in row.info.containment
    shown = subprocess.run(
        [PROGRAMS / "aque", "workers"], env=farm.environment, capture_output=True, text=True, check=True
    )
    assert "no kills, no time limits" in shown.stdout


def test_solo_runs_functions_in_the_main_thread(farm: Farm, tmp_path: Path, pool: str) -> None:
    task, gate = held(farm, tmp_path)
    gate.touch()
    assert (task.get(timeout=LIMIT) == "MainThread") is (pool == "solo")


def test_a_restart_waits_for_functions_and_lets_commands_go_on(
    own_sqlite_farm: Farm, tmp_path: Path, pool: str
) -> None:
    worker = own_sqlite_farm.start_worker("-P", pool, drain_seconds=0.5)
    command = aque.shell(["sh", "-c", 'until [ -e "$1" ]; do sleep 0.05; done', "sh", str(tmp_path / "end")])
    own_sqlite_farm.wait_for_state(command, "running")
    task, gate = held(own_sqlite_farm, tmp_path)
    worker.deliver(signal.SIGHUP)
    wait_until(lambda: "cannot be ended" in worker.log(), LIMIT, "it has waited long enough")
    gate.touch()
    assert task.get(timeout=LIMIT)
    wait_until(lambda: "restarted: 1 commands go on" in worker.log(), LIMIT, "the new image is there")
    (tmp_path / "end").touch()
    assert command.get(timeout=LIMIT)["exit_code"] == 0
    assert tasks.add.delay(1, 1).get(timeout=LIMIT) == 2
    assert [own_sqlite_farm.row(done)["attempt"] for done in (task, command)] == [1, 1]


def test_stopping_waits_for_a_function_that_ends_in_time(own_sqlite_farm: Farm, tmp_path: Path, pool: str) -> None:
    worker = own_sqlite_farm.start_worker("-P", pool, drain_seconds=LIMIT)
    task, gate = held(own_sqlite_farm, tmp_path)
    worker.deliver(signal.SIGTERM)
    wait_until(lambda: "shutdown" in worker.log(), LIMIT, "it has heard")
    gate.touch()
    wait_until(lambda: not worker.running(), LIMIT, "it has ended")
    assert own_sqlite_farm.state(task) == "success"


def test_a_worker_ends_without_a_function_that_does_not_and_the_task_runs_again(
    own_sqlite_farm: Farm, tmp_path: Path, pool: str
) -> None:
    worker = own_sqlite_farm.start_worker("-P", pool, drain_seconds=0.5)
    task, gate = held(own_sqlite_farm, tmp_path)
    worker.stop()
    assert "cannot be ended" in worker.log()
    gate.touch()
    own_sqlite_farm.start_worker("-P", "prefork", "-c", "1", name="two")
    assert task.get(timeout=LIMIT)
    assert own_sqlite_farm.row(task)["attempt"] == 2


@pytest.fixture
def own_sqlite_farm(tmp_path: Path) -> Iterator[Farm]:
    with Farm(f"sqlite:///{tmp_path / 'aque.db'}", tmp_path) as farm, farm.entered():
        yield farm
        assert farm.findings() == []


# -- refused, and prefork by its other name -------------------------------------------------------------------------------


def refused(farm: Farm, *words: str, **env: str) -> str:
    """What a worker that does not start prints."""
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "aque.celery_app", "worker", *words],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={**farm.environment, **env},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not farm.live()
    return done.stderr


def test_other_pools_and_autoscale_are_refused_with_a_sentence(own_sqlite_farm: Farm) -> None:
    task = tasks.add.delay(1, 1)
    said = refused(own_sqlite_farm, "-P", "custom", CELERY_CUSTOM_WORKER_POOL="tests.worker.green:TaskPool")
    assert "cannot run functions in the pool tests.worker.green:TaskPool: start the worker with -P prefork" in said
    assert "--autoscale does not go with Aque" in refused(own_sqlite_farm, "--autoscale", "4,1")
    assert own_sqlite_farm.row(task)["attempt"] == 0


def test_children_are_replaced_after_their_number_of_tasks(own_sqlite_farm: Farm) -> None:
    worker = own_sqlite_farm.start_worker("-P", "processes", "-c", "2", "--max-tasks-per-child", "5", cpus=2)
    pids = [task.get(timeout=LIMIT) for task in [tasks.pid.delay() for _ in range(40)]]
    assert max(pids.count(pid) for pid in set(pids)) <= 5
    assert worker.pid not in pids
    wait_until(lambda: len(worker.pool_children()) == 2, LIMIT, "there are two again, by their name")


def test_output_of_a_function_is_its_traceback_or_where_to_look_and_on_stderr(own_sqlite_farm: Farm) -> None:
    own_sqlite_farm.start_worker("-c", "1", cpus=1)
    good, bad = tasks.add.delay(1, 2), tasks.add.delay(1, "two")
    good.get(timeout=LIMIT)
    bad.get(timeout=LIMIT, propagate=False)

    def output(*words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "aque.cli.main", "output", *words],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            env=own_sqlite_farm.environment,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    status, stdout, stderr = output(good.id)
    assert (status, stdout, len(stderr.splitlines())) == (0, "", 1)
    assert "goes to its worker's log" in stderr
    for words in ([bad.id], ["-w", bad.id]):
        status, stdout, stderr = output(*words)
        assert (status, stdout) == (0, "")
        assert stderr.startswith(f"aque: task {bad.id} failed: TypeError")
        assert "Traceback (most recent call last)" in stderr
