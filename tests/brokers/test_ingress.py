"""`aque.submit`: tasks of producers that have only the broker."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from aque.errors import BadInput
from aque.ingress import user_for
from aque.settings import Settings
from tests.servers import PostgreSQL, wait_until
from tests.worker import tasks
from tests.worker.brokers import APP, Brokered
from tests.worker.farm import LIMIT_SECONDS, Farm

LIMIT = LIMIT_SECONDS


def submit(on: Brokered, *args: Any, task_id: str | None = None, **kwargs: Any) -> int:
    """As a producer without Aque does it: the client of these tests knows no database."""
    options = {} if task_id is None else {"task_id": task_id}
    return int(on.client.send_task("aque.submit", args, kwargs, **options).get(timeout=LIMIT))


def test_a_message_becomes_a_task_and_its_answer_is_the_id(on: Brokered) -> None:
    command = submit(
        on, ["sh", "-c", 'echo "$GREETING"'], env={"GREETING": "hello"}, name="greet", priority=3, cpus=0.5
    )
    row = on.farm.wait_for_state(command, "success")
    assert (row["name"], row["priority"], row["cpus"], on.farm.output(command)) == ("greet", 3, "0.5", b"hello\n")
    assert on.farm.row(command)["submitter"] == row["user"]


def test_a_task_can_be_named_as_celery_names_it_or_as_module_and_function(on: Brokered) -> None:
    for name in (tasks.total.name, "tests.worker.tasks:total", f"{APP}.through_the_table"):
        argument = [[1, 2, 3]] if "total" in name else [5]
        assert tasks.total.AsyncResult(str(submit(on, task=name, args=argument))).get(timeout=LIMIT) == 6


def test_a_message_that_comes_again_makes_one_task(on: Brokered) -> None:
    message = str(uuid4())
    assert len({submit(on, command=["true"], task_id=message) for _ in range(3)}) == 1


def test_tasks_of_messages_can_depend_on_each_other_and_wait_for_a_time(on: Brokered) -> None:
    first = submit(on, command=["false"])
    second = submit(on, command=["true"], after_failed=first)
    third = submit(on, command=["true"], depends_on=[first])
    later = submit(on, command=["true"], eta=(datetime.now(UTC) + timedelta(hours=1)).isoformat())
    on.farm.wait_for_state(second, "success")
    on.farm.wait_for_state(third, "skipped")
    assert on.farm.state(later) == "pending"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, "either a command or the name of a task"),
        ({"command": "echo hello"}, "a command is a list of words"),
        ({"command": ["true"], "user": "root"}, "takes no user"),
        ({"command": ["true"], "colour": "red"}, "unknown task options colour"),
        ({"task": "nothing"}, "there is no task 'nothing'"),
        ({"command": ["true"], "depends_on": [10**12]}, str(10**12)),
    ],
)
def test_a_message_that_cannot_be_a_task_is_answered_with_a_sentence(
    on: Brokered, asked: dict[str, Any], sentence: str
) -> None:
    before = on.farm.counts()
    with pytest.raises(Exception, match=sentence):
        submit(on, **asked)
    assert on.farm.counts() == before


def test_a_full_worker_takes_messages_at_once(on: Brokered, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    full = [tasks.started.delay(str(tmp_path / "started"), str(gate)) for _ in range(3)]
    for task in full:
        on.farm.wait_for_state(task, "running")
    assert on.farm.state(submit(on, task=tasks.echo.name, args=[1])) in ("ready", "claimed")
    gate.touch()


@pytest.mark.parametrize(
    ("ingress_user", "worker_user", "switches_user", "user"),
    [
        ("", "", False, ""),  # a personal store: its owner's
        ("maria", "", False, ""),
        ("", "render", False, ""),
        ("maria", "root", True, "maria"),
    ],
)
def test_tasks_of_messages_are_of_the_user_that_the_site_says(
    ingress_user: str, worker_user: str, switches_user: bool, user: str
) -> None:
    assert user_for(Settings(ingress_user=ingress_user), worker_user, switches_user) == user


def test_a_worker_of_roots_refuses_them_unless_it_was_told_as_whom() -> None:
    with pytest.raises(BadInput, match="AQUE_INGRESS_USER"):
        user_for(Settings(), "root", True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run tasks of others")
def test_a_worker_of_roots_runs_them_as_that_user_with_nothing_of_its_own_environment(
    postgresql_server: PostgreSQL, tmp_path: Path
) -> None:
    with (
        postgresql_server.database() as url,
        Farm(url, tmp_path, min_uid=1, allow_root_tasks=False) as farm,
        farm.entered(),
    ):
        worker = farm.start_worker("-c", "1", app=APP, env={"SECRET": "of the worker"}, ingress_user="nobody")
        client = farm.client()
        worker.wait_until_it_answers(client)
        sent = client.send_task("aque.submit", kwargs={"command": ["sh", "-c", "id -un; env"], "cwd": "/"})
        task_id = sent.get(timeout=LIMIT)
        row = farm.wait_for_state(task_id, "success")
        printed = farm.output(task_id).decode()
        assert printed.startswith("nobody\n") and "SECRET" not in printed
        assert (row["user"], row["submitter"]) == ("nobody", "nobody")
        too_high = client.send_task("aque.submit", kwargs={"command": ["true"], "priority": 1000})
        with pytest.raises(Exception, match="needs an administrator"):
            too_high.get(timeout=LIMIT)


def test_an_outage_of_the_store_delays_a_message_and_loses_none(
    own_postgresql: PostgreSQL, own_redis: Any, tmp_path: Path
) -> None:
    with Farm(own_postgresql.url, tmp_path, celery_broker=own_redis.url) as farm, farm.entered():
        worker = farm.start_worker("-c", "1", app=APP, ingress_user="root")
        client = farm.client()
        worker.wait_until_it_answers(client)
        own_postgresql.stop("immediate")
        sent = client.send_task("aque.submit", kwargs={"command": ["true"]})
        wait_until(lambda: "is tried again later" in worker.log(), LIMIT, "the worker has tried")
        own_postgresql.start()
        farm.store.close()  # this process's connections are gone, too
        farm.wait_for_state(sent.get(timeout=LIMIT), "success")
