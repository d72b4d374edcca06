"""Aque inside Celery, in real workers of their own. What Celery's messages carry is in tests/brokers."""

from collections.abc import Callable
from pathlib import Path

from celery import Celery

import aque
from tests.conftest import ON_POSTGRESQL, ON_SQLITE
from tests.servers import PostgreSQL, Redis, free_port, wait_until
from tests.worker import tasks
from tests.worker.farm import LIMIT_SECONDS, Farm

LIMIT = LIMIT_SECONDS
ORDINARY = "tests.worker.ordinary"


@ON_POSTGRESQL
def test_a_worker_serves_the_queues_that_it_was_started_with(own_farm: Farm) -> None:
    elsewhere = tasks.echo.delay(1)
    here = tasks.echo.apply_async((2,), queue="special")
    own_farm.start_worker("-c", "1", "-Q", "special,other")
    assert here.get(timeout=LIMIT) == 2
    assert own_farm.state(elsewhere) == "ready"
    elsewhere.kill()


# -- setup(app) -----------------------------------------------------------------------------------------------------------


@ON_SQLITE
def test_an_app_that_was_set_up_keeps_its_result_backend(own_farm: Farm, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    url = f"file://{tmp_path / 'results'}"
    worker = own_farm.start_worker("-c", "1", app=ORDINARY, env={"TEST_BACKEND": url})
    client = Celery("client", broker=own_farm.bus_url, backend=url, set_as_current=False)
    worker.wait_until_it_answers(client)
    plain, ours = client.send_task(f"{ORDINARY}.multiply", (3, 2)), tasks.add.delay(3, 2)
    assert (plain.get(timeout=LIMIT), ours.get(timeout=LIMIT)) == (6, 5)
    assert [file.name for file in (tmp_path / "results").iterdir()] == [f"celery-task-meta-{plain.id}"]


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


@ON_POSTGRESQL
def test_a_worker_whose_broker_is_away_when_it_starts_runs_tasks(own_farm: Farm) -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    worker = own_farm.start_worker("-c", "1", celery_broker=nowhere)
    assert tasks.add.delay(1, 1).get(timeout=LIMIT) == 2
    assert aque.shell(["true"]).get(timeout=LIMIT)["exit_code"] == 0
    worker.stop()
