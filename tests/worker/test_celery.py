"""Aque inside Celery: ordinary tasks, remote control, events, Flower and brokers, in real workers."""

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery

import aque
from aque.errors import TaskCancelled, TaskKilled
from tests.servers import PostgreSQL, Redis, free_port, text_of, wait_until
from tests.worker import tasks
from tests.worker.conftest import ON_EVERY_BROKER
from tests.worker.farm import LIMIT_SECONDS, ROOT, Farm, processes_with

LIMIT = LIMIT_SECONDS
ORDINARY = "tests.worker.ordinary"


def celery(farm: Farm, *words: str, app: str = "aque.celery_app") -> str:
    """What a run of `celery` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", app, *words],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=farm.environment,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def client(farm: Farm) -> Celery:
    """Asks the shared worker, which answers."""
    asking = farm.client()
    farm.workers[0].wait_until_it_answers(asking)
    return asking


def run_until(gate: Path, started: Path) -> tuple[Any, Any]:
    """A function and a command that run until there is a gate."""
    function = tasks.started.delay(str(started), str(gate))
    command = aque.shell(["sh", "-c", 'until [ -e "$1" ]; do sleep 0.02; done', "sh", str(gate)])
    return function, command


# -- remote control -------------------------------------------------------------------------------------------------------


@ON_EVERY_BROKER
def test_inspect_active_shows_running_functions_and_commands(farm: Farm, client: Celery, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    function, command = run_until(gate, tmp_path / "started")
    worker = farm.workers[0]

    def active() -> dict[str, Any]:
        return {request["id"]: request for request in worker.ask(client, "active").get(worker.name, [])}

    wait_until(lambda: {function.id, command.id} <= active().keys(), LIMIT, "both are shown")
    shown = active()
    assert shown[function.id]["name"] == tasks.started.name
    assert shown[function.id]["worker_pid"] == int(text_of(tmp_path / "started", LIMIT).split()[-1])
    assert shown[command.id]["args"][0] == "sh"
    gate.touch()
    function.get(timeout=LIMIT)
    command.get(timeout=LIMIT)
    wait_until(lambda: not {function.id, command.id} & active().keys(), LIMIT, "neither is shown")


def test_celery_inspect_on_the_command_line_shows_a_running_task(farm: Farm, client: Celery, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    function, command = run_until(gate, tmp_path / "started")
    for task in (function, command):
        farm.wait_for_state(task, "running")
    shown = json.loads(celery(farm, "inspect", "active", "--json"))
    assert {function.id, command.id} <= {request["id"] for request in shown["one@test"]}
    gate.touch()
    command.get(timeout=LIMIT)


def test_revoke_withdraws_what_waits_and_lets_run_what_runs(farm: Farm, client: Celery, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    running = tasks.started.delay(str(tmp_path / "started"), str(gate))
    waiting = tasks.echo.apply_async((1,), depends_on=running)
    farm.wait_for_state(running, "running")
    client.control.revoke([running.id, waiting.id])
    with pytest.raises(TaskCancelled):
        waiting.get(timeout=LIMIT)
    assert farm.state(running) == "running"
    gate.touch()
    assert running.get(timeout=LIMIT) == 1


@ON_EVERY_BROKER
def test_revoke_with_terminate_kills_functions_and_commands_and_leaves_no_process(
    farm: Farm, client: Celery, tmp_path: Path
) -> None:
    mark, up = f"TEST_MARK={uuid4().hex}", tmp_path / "up"
    function = tasks.started.delay(str(tmp_path / "started"), str(tmp_path / "never"))
    command = aque.shell(["sh", "-c", f'export {mark}; setsid sleep 1000 & touch "$1"; wait', "sh", str(up)])
    for task in (function, command):
        farm.wait_for_state(task, "running")
    wait_until(up.exists, LIMIT, "the command is up")
    client.control.revoke([function.id, command.id], terminate=True, signal="SIGKILL")
    for task in (function, command):
        with pytest.raises(TaskKilled):
            task.get(timeout=LIMIT)
    assert processes_with(mark) == []


def test_terminate_on_the_command_line_kills_a_running_task(farm: Farm, client: Celery) -> None:
    command = aque.shell(["sleep", "1000"])
    farm.wait_for_state(command, "running")
    celery(farm, "control", "terminate", "KILL", command.id)
    row = farm.wait_for_state(command, "killed")
    assert row["signal"] == signal.SIGKILL


@ON_EVERY_BROKER
def test_revoke_knows_a_task_by_the_id_that_its_caller_brought(farm: Farm, client: Celery, tmp_path: Path) -> None:
    mine = str(uuid4())
    tasks.started.apply_async((str(tmp_path / "started"), str(tmp_path / "never")), task_id=mine)
    farm.wait_for_state(mine, "running")
    client.control.revoke(mine, terminate=True)
    farm.wait_for_state(mine, "killed")


@ON_EVERY_BROKER
def test_add_consumer_and_cancel_consumer_change_what_is_claimed(farm: Farm, client: Celery) -> None:
    worker, queue = farm.workers[0], f"render-{uuid4().hex[:8]}"
    first = tasks.echo.apply_async((1,), queue=queue)
    assert tasks.echo.delay(0).get(timeout=LIMIT) == 0
    assert farm.state(first) == "ready"
    client.control.add_consumer(queue, destination=[worker.name], reply=True, timeout=10, limit=1)
    assert first.get(timeout=LIMIT) == 1
    assert queue in farm.live()[0].info.queues
    client.control.cancel_consumer(queue, destination=[worker.name], reply=True, timeout=10, limit=1)
    wait_until(lambda: queue not in farm.live()[0].info.queues, LIMIT, "the table says so")
    second = tasks.echo.apply_async((2,), queue=queue)
    assert tasks.echo.delay(0).get(timeout=LIMIT) == 0
    assert farm.state(second) == "ready"
    second.kill()


def test_a_worker_serves_the_queues_that_it_was_started_with(own_farm: Farm) -> None:
    elsewhere = tasks.echo.delay(1)
    here = tasks.echo.apply_async((2,), queue="special")
    own_farm.start_worker("-c", "1", "-Q", "special,other")
    assert here.get(timeout=LIMIT) == 2
    assert own_farm.state(elsewhere) == "ready"
    elsewhere.kill()


# -- events ---------------------------------------------------------------------------------------------------------------


@ON_EVERY_BROKER
def test_celery_events_shows_the_life_of_functions_and_commands(farm: Farm, client: Celery) -> None:
    watcher = farm.start_program(sys.executable, "-u", "-m", "celery", "-A", "aque.celery_app", "events", "--dump")
    try:
        client.control.enable_events(reply=True, timeout=10, limit=1)

        def seen(task: Any, *kinds: str) -> bool:
            lines = watcher.log.read_text().splitlines()
            return all(any(kind in line and task.id in line for line in lines) for kind in kinds)

        def run_and_see() -> bool:  # the watcher listens from some moment on, and nobody says when
            function, command, broken = tasks.add.delay(1, 1), aque.shell(["true"]), aque.shell(["false"])
            function.get(timeout=LIMIT)
            command.get(timeout=LIMIT)
            farm.wait_for_state(broken, "error")
            with suppress(AssertionError):
                ends = [(function, "task succeeded"), (command, "task succeeded"), (broken, "task failed")]
                return wait_until(
                    lambda: all(seen(t, "task received", "task started", end) for t, end in ends), 2, "events"
                )
            return False

        wait_until(run_and_see, LIMIT, "all events are there")
    finally:
        watcher.end(signal.SIGKILL)


@ON_EVERY_BROKER
def test_flower_shows_a_running_task(farm: Farm, client: Celery, tmp_path: Path) -> None:
    pytest.importorskip("flower")
    gate, port = tmp_path / "gate", free_port()
    words = ["-A", "aque.celery_app", "flower", "--address=127.0.0.1", f"--port={port}"]
    flower = farm.start_program(sys.executable, "-m", "celery", *words, env={"FLOWER_UNAUTHENTICATED_API": "true"})
    try:

        def shown() -> dict[str, Any]:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api/tasks", timeout=5) as answer:
                return dict(json.load(answer))
            return {}

        def run_and_see() -> bool:  # Flower hears only what happens after it has asked for events
            assert flower.running(), flower.log.read_text()
            function, command = run_until(gate, tmp_path / "started")
            with suppress(AssertionError):
                return wait_until(
                    lambda: all(shown().get(task.id, {}).get("state") == "STARTED" for task in (function, command)), 2
                )
            for task in (function, command):
                task.kill()
            return False

        wait_until(run_and_see, LIMIT, "Flower shows both")
    finally:
        gate.touch()
        flower.end(signal.SIGKILL)


# -- setup(app) -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["rpc", "file"])
def test_an_app_that_was_set_up_keeps_its_ordinary_tasks_and_their_results(
    own_farm: Farm, tmp_path: Path, backend: str
) -> None:
    (tmp_path / "results").mkdir()
    url = "rpc://" if backend == "rpc" else f"file://{tmp_path / 'results'}"
    worker = own_farm.start_worker("-c", "2", app=ORDINARY, cpus=2, env={"TEST_BACKEND": url})
    client = Celery("client", broker=own_farm.bus_url, backend=url, set_as_current=False)
    worker.wait_until_it_answers(client)
    plain = [client.send_task(f"{ORDINARY}.multiply", (n, 2)) for n in range(20)]
    ours = [tasks.add.delay(n, 2) for n in range(20)]
    assert [sent.get(timeout=LIMIT) for sent in plain] == [n * 2 for n in range(20)]
    assert [task.get(timeout=LIMIT) for task in ours] == [n + 2 for n in range(20)]
    assert tasks.whoami.delay().get(timeout=LIMIT)["attempt"] == 1
    ids = [client.send_task(f"{ORDINARY}.current_task_id") for _ in range(6)]
    assert {sent.get(timeout=LIMIT) for sent in ids} == {None}


def test_a_task_of_the_app_with_aques_base_goes_through_the_table(own_farm: Farm) -> None:
    from tests.worker import ordinary

    own_farm.start_worker("-c", "1", app=ORDINARY)
    task = ordinary.through_the_table.delay(1)
    assert task.get(timeout=LIMIT) == 2
    assert own_farm.row(task)["name"] == f"{ORDINARY}.through_the_table"


@ON_EVERY_BROKER
def test_a_message_with_the_name_of_an_aque_task_is_refused_and_harms_nothing(farm: Farm, client: Celery) -> None:
    before = farm.counts()
    client.send_task(tasks.echo.name, (1,))
    client.send_task("no.such.task", (1,))
    assert tasks.echo.delay(2).get(timeout=LIMIT) == 2
    assert farm.counts() == {**before, "success": before.get("success", 0) + 1}


# -- brokers --------------------------------------------------------------------------------------------------------------


def keep_running(farm: Farm, seconds_of_silence: int, *, trouble: Callable[[], None]) -> None:
    """Functions and commands start and finish, before the broker's trouble and during it."""

    def some() -> None:
        many = [tasks.add.delay(n, 1) for n in range(10)] + [aque.shell(["true"]) for _ in range(10)]
        for task in many:
            task.get(timeout=LIMIT)

    some()
    trouble()
    for _ in range(seconds_of_silence):
        some()


def test_tasks_start_and_finish_with_redis_while_it_hangs_and_while_it_is_gone(
    own_redis: Redis, postgresql_server: PostgreSQL, tmp_path: Path
) -> None:
    with (
        postgresql_server.database() as url,
        Farm(url, tmp_path, celery_broker=own_redis.url) as farm,
        farm.entered(),
    ):
        worker = farm.start_worker("-c", "2", "-E", app=ORDINARY, cpus=2)
        client, notes = farm.client(own_redis.url), tmp_path / "notes"
        worker.wait_until_it_answers(client)

        def hang_amid_ordinary_tasks() -> None:
            """Some have ended, some run: their events and acknowledgements are under way."""
            for n in range(6):
                client.send_task(f"{ORDINARY}.note", (str(notes), str(n), 0.3))
            wait_until(notes.exists, LIMIT, "the first has run")
            own_redis.pause()

        keep_running(farm, 3, trouble=hang_amid_ordinary_tasks)
        own_redis.resume()
        wait_until(lambda: len(set(notes.read_text().split())) == 6, LIMIT, "the ordinary tasks have run")
        worker.wait_until_it_answers(client)
        keep_running(farm, 3, trouble=lambda: own_redis.stop("kill"))
        own_redis.start()
        client = farm.client(own_redis.url)
        worker.wait_until_it_answers(client)
        command = aque.shell(["sleep", "1000"])
        farm.wait_for_state(command, "running")
        client.control.revoke(command.id, terminate=True)
        farm.wait_for_state(command, "killed")
        assert farm.findings() == []


def test_a_worker_whose_broker_is_away_when_it_starts_runs_tasks(own_farm: Farm) -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    worker = own_farm.start_worker("-c", "1", celery_broker=nowhere)
    assert tasks.add.delay(1, 1).get(timeout=LIMIT) == 2
    assert aque.shell(["true"]).get(timeout=LIMIT)["exit_code"] == 0
    worker.stop()
