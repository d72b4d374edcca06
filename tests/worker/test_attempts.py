"""What a task may ask of its own attempt: another one, children, the results of others, to be known how far it is."""

import os
import signal
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import aque
from aque.errors import BadInput, RemoteError, TaskCancelled
from tests.servers import wait_until
from tests.worker import celery_tasks as tasks
from tests.worker.farm import LIMIT_SECONDS, ROOT, Farm

LIMIT = LIMIT_SECONDS


# -- another attempt ------------------------------------------------------------------------------------------------------


def test_a_task_that_asks_for_another_attempt_gets_it_under_its_id(farm: Farm) -> None:
    task = tasks.fail_first.delay(2)
    assert task.get(timeout=LIMIT) == 2
    row = farm.row(task)
    assert (row["state"], row["attempt"]) == ("success", 3)
    assert [(n, state) for n, state, _ in farm.attempts(task)] == [(1, "retry"), (2, "retry")]


def test_another_attempt_waits_for_its_time(farm: Farm) -> None:
    task = tasks.fail_first.delay(1, 0.5)
    assert task.get(timeout=LIMIT) == 1
    with farm.store.connect() as connection:
        ended, started = connection.exec_driver_sql(
            "SELECT a.finished_at, t.started_at FROM aque_attempt a JOIN aque_task t ON t.id = a.task_id "
            f"WHERE t.id = {task.number}"
        ).one()
    assert started - ended >= 0.3  # it counts from the end of the attempt, and the history has when that was written


def test_another_attempt_may_have_other_arguments(farm: Farm) -> None:
    assert tasks.count_down.delay(3).get(timeout=LIMIT) == "3 [0]"


def test_another_attempt_may_have_another_queue_and_priority(farm: Farm) -> None:
    task = tasks.move.delay(priority=7)
    assert task.get(timeout=LIMIT) == 1 and farm.row(task)["priority"] == 7
    task = tasks.move.delay(queue="nobodys", priority=-1)
    wait_until(lambda: farm.row(task)["queue"] == "nobodys", LIMIT)
    row = farm.row(task)
    assert (row["state"], row["priority"], row["attempt"]) == ("ready", -1, 1)
    task.kill()


def test_what_another_attempt_cannot_have_is_refused(farm: Farm) -> None:
    task = tasks.move.delay(expires=60)
    with pytest.raises(BadInput, match=r"self\.retry cannot change expires"):
        task.get(timeout=LIMIT)


def test_a_task_that_has_asked_too_often_ends_with_what_it_raised(farm: Farm) -> None:
    task = tasks.never.delay()
    with pytest.raises(KeyError, match="lost"):
        task.get(timeout=LIMIT)
    assert farm.row(task)["attempt"] == 3


def test_celery_retries_by_itself_what_it_was_told_to(farm: Farm, tmp_path: Path) -> None:
    assert tasks.flaky.delay(str(tmp_path / "file")).get(timeout=LIMIT) == 3


def test_a_task_may_ask_and_go_on(farm: Farm) -> None:
    assert tasks.go_on.delay().get(timeout=LIMIT) == 1


def test_a_task_that_waits_for_its_next_attempt_can_be_withdrawn(farm: Farm) -> None:
    task = tasks.fail_first.delay(1, 3600)
    wait_until(lambda: farm.state(task) == "pending" and farm.row(task)["attempt"] == 1, LIMIT)
    task.kill()
    assert farm.wait_for_state(task, "cancelled")["reason"] == "request"


def test_of_what_a_task_ignores_or_rejects_nothing_comes(farm: Farm, tmp_path: Path) -> None:
    for task, reason in ((tasks.ignore.delay(), "ignored"), (tasks.reject.delay(str(tmp_path / "file")), "rejected")):
        after = tasks.value.apply_async((1,), depends_on=task)
        with pytest.raises(TaskCancelled):
            task.get(timeout=LIMIT)
        assert farm.row(task)["reason"] == reason
        assert farm.wait_for_state(after, "skipped", "success")["state"] == "skipped"


def test_what_is_rejected_and_requeued_runs_again(farm: Farm, tmp_path: Path) -> None:
    task = tasks.reject.delay(str(tmp_path / "file"), requeue=True)
    assert task.get(timeout=LIMIT) == 3


# -- times ----------------------------------------------------------------------------------------------------------------


def test_a_task_does_not_start_before_its_time(farm: Farm) -> None:
    at = datetime.now(UTC) + timedelta(seconds=0.7)
    task, other = tasks.value.apply_async((1,), eta=at), tasks.value.delay(2)
    assert farm.state(task) == "pending"
    assert (other.get(timeout=LIMIT), task.get(timeout=LIMIT)) == (2, 1)
    assert farm.row(task)["started_at"] >= at


def test_its_time_and_its_dependencies_both_count(farm: Farm, tmp_path: Path) -> None:
    before = tasks.held.delay(str(tmp_path / "gate"))
    task = tasks.value.apply_async((1,), countdown=0.3, depends_on=before)
    marker = tasks.value.apply_async((1,), countdown=0.6)
    marker.get(timeout=LIMIT)  # its time has come, too
    assert farm.state(task) == "pending"
    (tmp_path / "gate").touch()
    assert task.get(timeout=LIMIT) == 1


def test_what_was_not_started_in_time_is_cancelled(farm: Farm) -> None:
    task = tasks.value.apply_async((1,), countdown=3600, expires=0.3)
    with pytest.raises(TaskCancelled, match="not started in time"):
        task.get(timeout=LIMIT)
    assert farm.row(task)["reason"] == "expired"


def test_a_task_that_was_started_in_time_may_take_its_time(farm: Farm, tmp_path: Path) -> None:
    task = tasks.held.apply_async((str(tmp_path / "gate"),), expires=LIMIT)
    farm.wait_for_state(task, "running")
    tasks.value.apply_async((1,), countdown=0.2).get(timeout=LIMIT)
    (tmp_path / "gate").touch()
    assert task.get(timeout=LIMIT) == 1


# -- children -------------------------------------------------------------------------------------------------------------


def test_a_task_waits_for_its_children_without_a_process(farm: Farm, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    task = tasks.parent.delay(("held", [gate]), ("value", [1]))
    after = tasks.value.apply_async((5,), depends_on=task)
    farm.wait_for_state(task, "waiting")
    assert (task.state, farm.state(after)) == ("STARTED", "pending")
    (tmp_path / "gate").touch()
    assert (task.get(timeout=LIMIT), after.get(timeout=LIMIT)) == (2, 5)


def test_a_child_that_fails_fails_its_parent(farm: Farm) -> None:
    task = tasks.parent.delay(("fail", []), ("value", [1]))
    with pytest.raises(RemoteError, match="that it has submitted"):
        task.get(timeout=LIMIT)
    assert farm.row(task)["reason"] == "child"


def test_children_may_be_nothing_to_their_parent(farm: Farm, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    task = tasks.detaching.delay(gate)
    assert task.get(timeout=LIMIT) == 1
    assert farm.counts().get("running", 0) + farm.counts().get("ready", 0) == 1
    (tmp_path / "gate").touch()


def test_children_may_end_with_their_parent(farm: Farm, tmp_path: Path) -> None:
    task = tasks.cancelling.delay(str(tmp_path / "never"))
    task.get(timeout=LIMIT)
    children = [row["id"] for row in aque.tasks({"parent_id": task.number}, ["id"])]
    assert len(children) == 2
    for child in children:
        assert farm.wait_for_state(child, "cancelled", "killed")["reason"] == "request"


def test_a_kill_of_a_task_that_waits_takes_the_tree(farm: Farm, tmp_path: Path) -> None:
    gate = str(tmp_path / "never")
    task = tasks.parent.delay(("parent", [["held", [gate]], ["held", [gate]]]), ("held", [gate]))
    farm.wait_for_state(task, "waiting")
    below = [row["id"] for row in aque.tasks({"parent_id": task.number}, ["id"])]
    wait_until(lambda: any(farm.state(i) == "waiting" for i in below), LIMIT)
    below += [row["id"] for row in aque.tasks({"parent_id": below}, ["id"])]
    assert len(below) == 4
    task.kill()
    assert farm.wait_for_state(task, "killed")["reason"] == "request"
    for child in below:
        farm.wait_for_state(child, "killed", "cancelled")


def test_a_child_is_what_its_parent_is_unless_it_says_otherwise(farm: Farm) -> None:
    task = tasks.inherits.apply_async(priority=7, host="*")
    assert task.get(timeout=LIMIT) == [7, "celery", "*", task.number]


# -- waiting inside -------------------------------------------------------------------------------------------------------


def test_a_task_that_waits_for_others_holds_no_place(own_farm: Farm) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=1)
    assert tasks.recurse.delay(20).get(timeout=LIMIT) == 20
    wait_until(lambda: len(worker.pool_children()) == 1, LIMIT, "children too many have ended")
    assert tasks.value.delay(3).get(timeout=LIMIT) == 3


def test_a_task_that_waits_for_others_can_be_killed(own_farm: Farm) -> None:
    own_farm.start_worker("-c", "1", cpus=1)
    task = tasks.recurse.apply_async((1,), {"queue": "nobody"})
    wait_until(lambda: [*aque.tasks({"parent_id": task.number}, ["id"])], LIMIT)
    task.kill()
    own_farm.wait_for_state(task, "killed")
    assert tasks.value.delay(3).get(timeout=LIMIT) == 3


def test_too_many_that_wait_get_an_error_in_place_of_a_deadlock(own_farm: Farm) -> None:
    own_farm.start_worker("-c", "1", cpus=1, most_blocked=2)
    with pytest.raises(BadInput, match="most_blocked"):
        tasks.recurse.delay(3).get(timeout=LIMIT)
    assert tasks.recurse.delay(2).get(timeout=LIMIT) == 2


def test_many_threads_of_a_task_may_wait_at_once(own_farm: Farm) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=1)
    for _ in range(3):
        assert tasks.gather.delay(4).get(timeout=LIMIT) == 6
    # All CPUs are there again, and as many children as before.
    assert aque.shell(["true"], cpus="all").get(timeout=LIMIT)["exit_code"] == 0
    wait_until(lambda: len(worker.pool_children()) == 1, LIMIT)


def test_a_command_that_waits_for_a_task_holds_no_cpu_across_a_restart(own_farm: Farm, tmp_path: Path) -> None:
    worker = own_farm.start_worker("-c", "1", cpus=1)
    gate = tmp_path / "gate"
    program = (
        "from tests.worker import celery_tasks as t\n"
        f"children = [t.held.delay({str(gate)!r}, n) for n in (1, 2)]\n"
        "print(sum(child.get(timeout=60) for child in children))"
    )
    task = aque.shell([sys.executable, "-c", program], cwd=str(ROOT))
    wait_until(lambda: "running" in [row["state"] for row in aque.tasks({"parent_id": task.number})], LIMIT)
    restarted = worker.log().count("celery_tasks.held")
    os.kill(worker.pid, signal.SIGHUP)
    wait_until(lambda: worker.log().count("restarting:") == 1, LIMIT)
    gate.touch()
    assert task.get(timeout=LIMIT)["stdout"] == "3\n", restarted
    assert aque.shell(["true"], cpus="all").get(timeout=LIMIT)["exit_code"] == 0


def test_a_line_that_breaks_gives_back_what_was_lent(own_farm: Farm, tmp_path: Path) -> None:
    own_farm.start_worker("-c", "1", cpus=1)
    code = 'from tests.worker import celery_tasks as t; t.held.apply_async(("x",), queue="nobody").get()'
    program = f"{sys.executable} -c '{code}'"
    gate = tmp_path / "gate"
    script = f"timeout 3 {program}; until [ -e {gate} ]; do sleep 0.05; done"
    task = aque.shell(["sh", "-c", script], cwd=str(ROOT), cpus=1, children="detach")
    with own_farm.store.connect() as connection:

        def blocked() -> bool:
            found = connection.exec_driver_sql(f"SELECT blocked FROM aque_task WHERE id = {task.number}").scalar_one()
            return bool(found)

        wait_until(blocked, LIMIT, "it has lent its CPU")
        wait_until(lambda: not blocked(), LIMIT, "it has it again")
    gate.touch()
    task.get(timeout=LIMIT)


# -- the rest -------------------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_ends_the_task_and_not_its_worker(farm: Farm) -> None:
    assert tasks.tell_nonsense.delay().get(timeout=LIMIT) == 1
    impossible = tasks.replace_by_the_impossible.delay()
    assert farm.wait_for_state(impossible, "error", "success", "skipped")["state"] == "error"
    before = tasks.value.delay(1)
    assert tasks.replace_by_what_it_waited_for.apply_async((before.number,), depends_on=before).get(timeout=LIMIT) == 5


def test_a_rate_limit_spreads_the_starts_of_a_name(farm: Farm) -> None:
    started = sorted(task.get(timeout=LIMIT) for task in [tasks.rare.delay() for _ in range(6)])
    assert started[-1] - started[0] >= 0.25  # ten a second, and each may start a little late


def test_a_task_sees_the_headers_of_its_call(farm: Farm) -> None:
    assert tasks.headers.apply_async(headers={"trace": "x-1"}).get(timeout=LIMIT) == {"trace": "x-1"}


def test_a_call_that_is_repeated_under_its_celery_id_is_the_same_task(farm: Farm) -> None:
    first = tasks.value.apply_async((1,), task_id="once")
    again = tasks.value.apply_async((1,), task_id="once")
    assert again.number == first.number
    with pytest.raises(BadInput, match="is not the same"):
        tasks.value.apply_async((2,), task_id="once")
    with pytest.raises(BadInput, match="digits only"):
        tasks.value.apply_async((2,), task_id="123")
