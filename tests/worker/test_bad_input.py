"""What cannot work is refused where it is given: a sentence, and nothing half done."""

import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from celery import group
from celery.exceptions import TimeoutError

import aque
from aque import settings
from aque.celery_app import app
from aque.errors import (
    AqueError,
    BadInput,
    BadReservation,
    BadStateDirectory,
    Cycle,
    StoreUnreachable,
    UnknownTask,
    WrongSchema,
)
from aque.store import open_store
from tests.servers import PostgreSQL, free_port
from tests.worker import tasks
from tests.worker.farm import LIMIT_SECONDS, ROOT, Farm

BAD: dict[str, tuple[Callable[[], Any], type[AqueError], str]] = {
    "reservation": (lambda: aque.shell(["true"], cpus="lots"), BadReservation, "'1.5'"),
    "reservation of nothing that exists": (lambda: tasks.add.apply_async((1, 2), cpus=-1), BadReservation, "-1"),
    "memory": (lambda: aque.shell(["true"], memory="much"), BadReservation, "'512M'"),
    "no command": (lambda: aque.shell([]), BadInput, "no command"),
    "empty command": (lambda: aque.shell([""]), BadInput, "no command"),
    "one text": (lambda: aque.shell("echo hello"), BadInput, "list of words"),
    "NUL": (lambda: aque.shell(["echo", "a\0b"]), BadInput, "NUL"),
    "stdin": (lambda: aque.shell(["cat"], stdin=bytes((8 << 20) + 1)), BadInput, "stdin_limit_bytes"),
    "option": (lambda: aque.shell(["true"], colour="red"), BadInput, "colour"),
    "hint": (lambda: tasks.add.apply_async((1, 2), hints={"weather": 1}), BadInput, "weather"),
    "priority": (lambda: aque.shell(["true"], priority=1 << 40), BadInput, "priority"),
    "priority as a text": (lambda: aque.shell(["true"], priority="high"), BadInput, "priority"),
    "duration": (lambda: aque.shell(["true"], duration=float("nan")), BadInput, "duration"),
    "countdown out of range": (lambda: aque.shell(["true"], countdown=1e12), BadInput, "31 years"),
    "eta out of range": (lambda: aque.shell(["true"], eta=datetime(9999, 1, 1)), BadInput, "31 years"),
    "expires out of range": (lambda: aque.shell(["true"], expires=float("inf")), BadInput, "31 years"),
    "time limit": (lambda: aque.shell(["true"], time_limit=-1), BadInput, "time_limit"),
    "attempts": (lambda: aque.shell(["true"], max_attempts=0), BadInput, "max_attempts"),
    "queue": (lambda: aque.shell(["true"], queue="a\0"), BadInput, "queue"),
    "queue of a wrong type": (lambda: aque.shell(["true"], queue=7), BadInput, "queue"),
    "unknown task": (lambda: aque.shell(["true"], depends_on=987654321), UnknownTask, "987654321"),
    "no task at all": (lambda: aque.shell(["true"], depends_on="soon"), BadInput, "handle or an id"),
    "id out of range": (lambda: aque.shell(["true"], depends_on=10**30), BadInput, "1000000000"),
    "an id of digits": (lambda: tasks.add.apply_async((1, 2), task_id="123"), BadInput, "task_id"),
    "signal": (lambda: aque.shell(["true"]).kill("NOSUCH"), BadInput, "NOSUCH"),
    "grace": (lambda: aque.shell(["true"]).kill(grace_seconds=-1), BadInput, "seconds, 0 or more"),
    "field": (lambda: list(aque.tasks(fields=["colour"])), BadInput, "colour"),
    "condition": (lambda: list(aque.tasks({"colour": 1})), BadInput, "colour"),
    "io_paths": (lambda: aque.shell(["true"], io_paths=7), BadInput, "io_paths"),
    "environment": (lambda: aque.shell(["true"], env={"A": "b\0c"}), BadInput, "NUL"),
    "variable without a name": (lambda: aque.shell(["true"], env={"A=B": "c"}), BadInput, "A=B"),
    "directory": (lambda: aque.shell(["true"], cwd="/a\0b"), BadInput, "NUL"),
}


@pytest.fixture
def quiet_farm(own_farm: Farm) -> Farm:
    """Without a worker."""
    return own_farm


@pytest.mark.parametrize("case", sorted(BAD))
def test_it_is_refused_with_a_sentence_and_nothing_is_submitted(quiet_farm: Farm, case: str) -> None:
    call, kind, words = BAD[case]
    before = sum(quiet_farm.counts().values())
    with pytest.raises(kind) as raised:
        call()
    assert words in str(raised.value)
    assert sum(quiet_farm.counts().values()) == before + (case in {"signal", "grace"})


def test_a_cycle_is_refused_with_its_path_and_nothing_of_the_graph_is_submitted(quiet_farm: Farm) -> None:
    ids: list[str] = []
    with pytest.raises(Cycle) as raised, aque.graph() as job:
        first, second, third = (aque.shell(["true"]) for _ in range(3))
        job.depend(second, on=first)
        job.depend(third, on=second)
        job.depend(first, on=third)
        ids += [first.id, second.id, third.id]
    assert {str(step) for step in raised.value.path} == set(ids)
    assert quiet_farm.counts() == {}


def test_a_graph_with_an_unknown_dependency_is_refused_as_a_whole(quiet_farm: Farm) -> None:
    with pytest.raises(UnknownTask, match="987654321"), aque.graph():
        for _ in range(200):
            aque.shell(["true"])
        aque.shell(["true"], depends_on=987654321)
    assert quiet_farm.counts() == {}


def test_a_graph_inside_a_graph_and_a_dependency_of_a_stranger_are_refused(quiet_farm: Farm) -> None:
    outside = aque.shell(["true"])
    with pytest.raises(BadInput, match="not nested"), aque.graph(), aque.graph():
        pass
    with pytest.raises(BadInput, match="not part of this graph"), aque.graph() as job:
        job.depend(outside, on=aque.shell(["true"]))
    with pytest.raises(BadInput, match="condition"), aque.graph() as job:
        job.depend(aque.shell(["true"]), on=outside, condition="maybe")
    assert quiet_farm.counts() == {"ready": 1}


@pytest.mark.parametrize("what", ["task", "command", "named", "group", "job"])
def test_to_wait_for_a_task_of_a_graph_that_is_open_is_refused_with_where_it_ends(quiet_farm: Farm, what: str) -> None:
    earlier = aque.shell(["true"])
    with pytest.raises(BadInput, match="submitted at the end of `with"), aque.graph() as job:
        with pytest.raises(TimeoutError):
            earlier.get(timeout=0)  # what was submitted before may be waited for
        handle = {
            "task": lambda: tasks.add.delay(1, 2),
            "command": lambda: aque.shell(["true"]),
            "named": lambda: tasks.add.apply_async((1, 2), task_id="of my own"),
            "group": lambda: group(tasks.add.s(1, 2), tasks.add.s(3, 4)).apply_async(),
            "job": lambda: job.handle,
        }[what]()
        handle.get(timeout=0)
    assert quiet_farm.counts() == {"ready": 1}


def test_one_task_that_depends_on_another_in_two_ways_is_refused(quiet_farm: Farm) -> None:
    first = aque.shell(["true"])
    with pytest.raises(BadInput, match="one way only"):
        aque.shell(["true"], depends_on=first, after_any=first)


def test_a_chain_of_5000_in_one_graph_is_submitted(quiet_farm: Farm) -> None:
    with aque.graph():
        last = aque.shell(["true"])
        for _ in range(5_000):
            last = aque.shell(["true"], depends_on=last)
    assert quiet_farm.counts() == {"ready": 1, "pending": 5_001}


def test_a_database_that_does_not_answer_is_one_sentence_without_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("AQUE_BROKER", f"postgresql://someone:secret@127.0.0.1:{port}/nothing")
    ways: list[Callable[[], Any]] = [
        lambda: aque.shell(["true"]),
        lambda: tasks.add.delay(1, 2),
        lambda: list(aque.tasks()),
        app.AsyncResult("1").get,
        lambda: app.AsyncResult("1").state,
    ]
    for call in ways:
        with pytest.raises(StoreUnreachable, match=str(port)) as raised:
            call()
        assert "secret" not in str(raised.value)
        printed = "".join(traceback.format_exception(raised.value))
        assert "sqlalchemy" not in printed  # nothing but the way to the sentence, and what the driver has said
        assert printed.count("Traceback") == 1


def test_a_database_without_tables_and_one_of_another_version_are_refused(fresh_postgresql_url: str) -> None:
    configured = settings.load({"AQUE_BROKER": fresh_postgresql_url})
    with pytest.raises(WrongSchema, match="aque init"):
        open_store(configured)
    with psycopg2.connect(fresh_postgresql_url) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE aque_schema_version (version_num varchar(32)); ")
        cursor.execute("INSERT INTO aque_schema_version VALUES ('9999')")
    with pytest.raises(WrongSchema, match="newer"):
        open_store(configured)


@pytest.mark.parametrize(
    ("app_name", "setting", "status", "words"),
    [
        (
            "aque.celery_app",
            "AQUE_BROKER=redis://127.0.0.1:1",
            2,
            "AQUE_BROKER cannot be redis://...: write sqlite:////",
        ),
        ("aque.celery_app", "AQUE_BROKER=postgresql://a:secret@127.0.0.1:1/b", 69, "cannot use the store postgresql"),
        ("aque.celery_app", "AQUE_RLIMITS=all", 2, "rlimits cannot be 'all'"),
        ("aque.celery_app", "AQUE_CELERY_BROKER=pigeon://loft", 2, "No such transport: pigeon"),
        ("tests.worker.ordinary", "AQUE_STATE_DIR=/proc/aque", 69, "cannot create the state directory /proc/aque"),
    ],
)
def test_a_worker_that_cannot_use_its_farm_ends_with_the_sentence_alone(
    environment: dict[str, str], app_name: str, setting: str, status: int, words: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", app_name, "worker", "-c", "1"],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        env=environment | dict([setting.split("=")]),
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stdout + done.stderr


def test_a_broker_on_redis_without_its_package_is_a_sentence_where_the_broker_is_used_and_nowhere_else(
    environment: dict[str, str],
) -> None:
    script = """if True:
        import sys

        sys.modules["redis"] = None  # as where it is not installed
        import aque
        from tests.worker.ordinary import app, multiply

        print("submitted", aque.shell(["true"]).id)
        try:
            multiply.delay(1, 2)
        except aque.errors.BadSetting as error:
            print("refused:", error)
        app.worker_main(["worker", "-c", "1"])
    """
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        env=environment | {"AQUE_CELERY_BROKER": "redis://127.0.0.1:1"},
        cwd=ROOT,
        check=False,
    )
    needs = "a broker on Redis needs the package redis: pip install 'aque[redis]'."
    assert done.stdout.splitlines() == ["submitted 1", f"refused: {needs}"], done.stderr
    assert done.stderr.splitlines()[-1] == f"celery worker: {needs}"
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize("state_dir", ["/proc/aque", "/dev/null/aque"])
def test_a_state_directory_that_cannot_be_made_is_named(state_dir: str) -> None:
    with pytest.raises(BadStateDirectory, match="AQUE_STATE_DIR") as raised:
        open_store(settings.load({"AQUE_STATE_DIR": state_dir}))
    assert state_dir in str(raised.value)


def test_a_file_that_is_no_database_is_refused_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "aque.db").write_bytes(b"this is no database at all" * 100)
    with pytest.raises(AqueError, match=r"aque\.db"):
        open_store(settings.load({"AQUE_STATE_DIR": str(tmp_path)}))


def test_a_process_that_stayed_connected_submits_again_after_the_database_was_restarted(
    own_postgresql: PostgreSQL, tmp_path: Path
) -> None:
    with Farm(own_postgresql.url, tmp_path) as farm, farm.entered():
        aque.shell(["true"])
        own_postgresql.restart("fast")
        with suppress(StoreUnreachable):  # it may find out with the first one
            aque.shell(["true"])
        aque.shell(["true"])
        farm.store.close()
        assert farm.counts()["ready"] >= 2
