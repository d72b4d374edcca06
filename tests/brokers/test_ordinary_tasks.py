"""Ordinary Celery tasks by messages, beside tasks of the table, on each broker."""

import random
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from uuid import uuid4

import aque
from tests.servers import wait_until
from tests.worker import ordinary, tasks
from tests.worker.brokers import Brokered
from tests.worker.farm import LIMIT_SECONDS
from tests.worker.test_reservations import WRITE, peak

LIMIT = LIMIT_SECONDS


def test_an_app_that_was_set_up_keeps_its_ordinary_tasks_and_their_results(on: Brokered) -> None:
    plain = [on.send("multiply", n, 2) for n in range(20)]
    ours = [tasks.add.delay(n, 2) for n in range(20)]
    assert [sent.get(timeout=LIMIT) for sent in plain] == [n * 2 for n in range(20)]
    assert [task.get(timeout=LIMIT) for task in ours] == [n + 2 for n in range(20)]
    assert tasks.whoami.delay().get(timeout=LIMIT)["attempt"] == 1
    ids = [on.send("current_task_id") for _ in range(6)]
    assert {sent.get(timeout=LIMIT) for sent in ids} == {None}


def test_a_task_of_the_app_with_aques_base_goes_through_the_table(on: Brokered) -> None:
    task = ordinary.through_the_table.delay(1)
    assert task.get(timeout=LIMIT) == 2
    assert on.farm.row(task)["name"] == ordinary.through_the_table.name


def test_a_message_with_the_name_of_an_aque_task_is_refused_and_harms_nothing(on: Brokered) -> None:
    before = on.farm.counts()
    on.client.send_task(tasks.echo.name, (1,))
    on.client.send_task("no.such.task", (1,))
    assert on.send("multiply", 2, 2).get(timeout=LIMIT) == 4  # behind them in the queue
    assert tasks.echo.delay(2).get(timeout=LIMIT) == 2
    assert on.farm.counts() == {**before, "success": before.get("success", 0) + 1}


def test_add_consumer_and_cancel_consumer_change_what_is_taken(on: Brokered) -> None:
    queue = f"render-{uuid4().hex[:8]}"
    first, plain = tasks.echo.apply_async((1,), queue=queue), on.send("multiply", 2, 2, queue=queue)
    assert tasks.echo.delay(0).get(timeout=LIMIT) == 0
    assert on.send("multiply", 0, 0).get(timeout=LIMIT) == 0
    assert (on.farm.state(first), plain.ready()) == ("ready", False)
    on.ask("add_consumer", queue=queue)
    assert (first.get(timeout=LIMIT), plain.get(timeout=LIMIT)) == (1, 4)
    assert queue in on.farm.live()[0].info.queues
    on.ask("cancel_consumer", queue=queue)
    wait_until(lambda: queue not in on.farm.live()[0].info.queues, LIMIT, "the table says so")
    second, plain = tasks.echo.apply_async((2,), queue=queue), on.send("multiply", 3, 3, queue=queue)
    assert tasks.echo.delay(0).get(timeout=LIMIT) == 0
    assert on.send("multiply", 0, 0).get(timeout=LIMIT) == 0
    assert (on.farm.state(second), plain.ready()) == ("ready", False)
    second.kill()


def test_what_was_sent_for_later_runs_then_and_holds_up_nothing(on: Brokered, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    at = datetime.now(UTC) + timedelta(seconds=2)
    on.send("note", str(path), "late", 0, eta=at)
    on.send("note", str(path), "never", 0, eta=at, expires=datetime.now(UTC) - timedelta(seconds=1))
    assert on.send("multiply", 2, 2).get(timeout=LIMIT) == 4
    wait_until(path.exists, LIMIT, "it has run")
    assert datetime.now(UTC) >= at - timedelta(seconds=0.1)  # Celery rounds it
    assert on.send("multiply", 3, 3).get(timeout=LIMIT) == 9
    assert path.read_text() == "late\n"


def test_ordinary_tasks_and_tasks_of_the_table_side_by_side_never_exceed_the_budget(
    on: Brokered, tmp_path: Path
) -> None:
    choose, path = random.Random(3), str(tmp_path / "log")
    plain = []
    with aque.graph() as job:
        for number in range(40):
            seconds, cpus = choose.uniform(0.01, 0.05), choose.choice(["0.5", "1", "2", "all"])
            if number % 2:
                tasks.reserve.apply_async((path, cpus, seconds), cpus=cpus)
            else:
                aque.shell(["sh", "-c", WRITE, "sh", path, cpus, f"{seconds:.3f}"], cpus=cpus)
    for number in range(40):
        plain.append(on.send("reserve_one", path, f"plain-{number}", choose.uniform(0.01, 0.05)))
    for sent in plain:
        sent.get(timeout=LIMIT)
    job.handle.get(timeout=LIMIT)
    lines = Path(path).read_text().splitlines()
    assert len(lines) == 160
    assert peak(lines, Fraction(4)) == 4
