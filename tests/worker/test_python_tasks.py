"""Python tasks in real workers: results, dependencies, errors, limits, kills, and children of the pool that die."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from celery.exceptions import TimeoutError as CeleryTimeoutError

import aque
from aque.errors import (
    BadInput,
    NotSubmittable,
    RemoteError,
    TaskCancelled,
    TaskError,
    TaskKilled,
    TaskLost,
    TaskSkipped,
    UnknownTask,
)
from tests.servers import wait_until
from tests.worker import tasks
from tests.worker.farm import LIMIT_SECONDS, Farm, processes_named

LIMIT = LIMIT_SECONDS


def pids(path: Path) -> list[int]:
    """Of the attempts that `tasks.started` wrote down, in order."""
    return [int(line.split()[-1]) for line in path.read_text().splitlines()] if path.exists() else []


def is_gone(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


# -- results and dependencies ---------------------------------------------------------------------------------------------


def test_a_task_returns_its_result(farm: Farm) -> None:
    result = tasks.add.delay(2, 3)
    assert result.get(timeout=LIMIT) == 5
    assert (result.state, result.successful()) == ("SUCCESS", True)
    row = farm.row(result)
    assert (row["state"], row["attempt"], row["name"]) == ("success", 1, "tests.worker.tasks.add")
    assert row["submitted_at"] <= row["started_at"] <= row["finished_at"]


@pytest.mark.parametrize(
    "value", [None, False, 0, "", [], {"a": [1, {"b": None}]}, "\x00 \ud800 ü", 2**80, b"\xff\x00", 1.5]
)
def test_a_result_arrives_as_it_was_returned(farm: Farm, value: Any) -> None:
    assert tasks.echo.delay(value).get(timeout=LIMIT) == value


def test_a_handle_among_the_arguments_is_replaced_by_the_result_wherever_it_stands(farm: Farm) -> None:
    two, three = tasks.add.delay(1, 1), tasks.add.delay(1, 2)
    nested = tasks.echo.delay({"numbers": [two, {"deeper": three}], "plain": 1})
    assert nested.get(timeout=LIMIT) == {"numbers": [2, {"deeper": 3}], "plain": 1}
    assert tasks.add.delay(left=two, right=three).get(timeout=LIMIT) == 5
    assert farm.row(nested)["depends_on"] == [two.number, three.number]


def test_a_task_gets_the_end_and_the_output_of_a_command_that_it_depends_on(farm: Farm) -> None:
    command = aque.shell(["echo", "hello"])
    assert tasks.echo.delay(command).get(timeout=LIMIT) == {"exit_code": 0, "stdout": "hello\n", "truncated": False}


def test_a_chain_passes_its_results_on(farm: Farm) -> None:
    last = tasks.echo.delay(0)
    for _ in range(50):
        last = tasks.add.delay(last, 1)
    assert last.get(timeout=LIMIT) == 50


def test_a_task_gets_the_results_of_many(farm: Farm) -> None:
    with aque.graph("fan-in") as job:
        parts = [tasks.echo.delay(number) for number in range(300)]
        whole = tasks.total.delay(parts)
    assert whole.get(timeout=LIMIT) == sum(range(300))
    job.handle.get(timeout=LIMIT)
    assert farm.row(job.id)["state"] == "success"


def test_a_shared_dependency_runs_once(farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "runs"
    shared = tasks.record.delay(str(path))
    users = [tasks.echo.apply_async((n,), depends_on=shared) for n in range(20)]
    assert [user.get(timeout=LIMIT) for user in users] == list(range(20))
    assert path.read_text().split() == [shared.id]


def test_conditions_decide_what_runs_after_a_failure(farm: Farm) -> None:
    broken = tasks.fail.delay()
    needs_it = tasks.echo.apply_async((1,), depends_on=broken)
    below = tasks.echo.apply_async((1,), depends_on=needs_it)
    instead = tasks.echo.apply_async(("instead",), after_failed=broken)
    anyway = tasks.echo.apply_async(("anyway",), after_any=[broken, below])
    assert instead.get(timeout=LIMIT) == "instead"
    assert anyway.get(timeout=LIMIT) == "anyway"
    for skipped in (needs_it, below):
        with pytest.raises(TaskSkipped):
            skipped.get(timeout=LIMIT)
    assert farm.row(below)["reason"] == "dependency"


def test_an_exception_inside_a_graph_submits_nothing(farm: Farm) -> None:
    with pytest.raises(ZeroDivisionError), aque.graph():
        inside = tasks.echo.delay(1)
        raise ZeroDivisionError
    with pytest.raises(UnknownTask):
        inside.get(timeout=LIMIT)


def test_get_gives_up_after_its_timeout_and_the_task_goes_on(farm: Farm, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    task = tasks.started.delay(str(tmp_path / "started"), str(gate))
    with pytest.raises(CeleryTimeoutError):
        task.get(timeout=0.05)
    gate.touch()
    assert task.get(timeout=LIMIT) == 1


def test_get_of_a_task_that_does_not_exist_says_so_at_once(farm: Farm) -> None:
    with pytest.raises(UnknownTask, match="999999999"):
        tasks.echo.AsyncResult("999999999").get(timeout=LIMIT)


def test_a_task_under_an_id_of_the_callers_is_known_by_it(farm: Farm) -> None:
    mine = f"mine-{time.monotonic_ns()}"
    first = tasks.add.apply_async((1, 1), task_id=mine)
    assert first.get(timeout=LIMIT) == 2
    assert tasks.add.AsyncResult(mine).get(timeout=LIMIT) == 2
    assert tasks.add.delay(first, 1).get(timeout=LIMIT) == 3
    assert tasks.add.apply_async((4, 1), depends_on=first).get(timeout=LIMIT) == 5


def test_a_handle_under_an_id_of_the_callers_can_be_killed(farm: Farm, tmp_path: Path) -> None:
    mine = tasks.started.apply_async(
        (str(tmp_path / "started"), str(tmp_path / "never")), task_id=f"mine-{time.monotonic_ns()}"
    )
    mine.kill()
    farm.wait_for_state(mine, "killed", "cancelled")


# -- what a task sees -----------------------------------------------------------------------------------------------------


def test_a_task_knows_its_id_attempt_cpus_and_farm(farm: Farm) -> None:
    task = tasks.environment.apply_async(cpus="1/8")
    seen = task.get(timeout=LIMIT)
    assert (seen["AQUE_TASK_ID"], seen["AQUE_TID"]) == (task.id, task.id)
    assert (seen["AQUE_ATTEMPT"], seen["AQUE_CPUS"], seen["AQUE_BROKER"]) == ("1", "0.5", farm.url)


def test_a_task_is_the_parent_of_what_it_submits_and_of_nothing_else(farm: Farm) -> None:
    parents = [tasks.submit_one_more.delay() for _ in range(6)]
    children = [parent.get(timeout=LIMIT) for parent in parents]
    for parent, child in zip(parents, children, strict=True):
        seen = tasks.whoami.AsyncResult(str(child)).get(timeout=LIMIT)
        assert (seen["id"], seen["parent_id"]) == (child, parent.number)
    strangers = [tasks.whoami.delay() for _ in range(12)]
    assert {stranger.get(timeout=LIMIT)["parent_id"] for stranger in strangers} == {None}


# -- errors ---------------------------------------------------------------------------------------------------------------


def test_get_raises_what_the_task_raised(farm: Farm) -> None:
    task = tasks.fail.delay("OwnError", "a text\x00 with ü")
    with pytest.raises(tasks.OwnError, match="a text\x00 with ü"):
        task.get(timeout=LIMIT)
    assert (task.state, farm.row(task)["reason"]) == ("FAILURE", "exception")
    assert task.traceback.rstrip().endswith("OwnError: a text\x00 with ü")
    assert 'tests/worker/tasks.py", line' in task.traceback
    with pytest.raises(KeyError):
        tasks.fail.delay("KeyError").get(timeout=LIMIT)


@pytest.mark.parametrize("kind", ["DemandingError", "SilentError"])
def test_an_exception_that_cannot_be_made_again_keeps_its_name(farm: Farm, kind: str) -> None:
    with pytest.raises((RemoteError, tasks.DemandingError, tasks.SilentError)) as raised:
        tasks.fail.delay(kind, "/some/path").get(timeout=LIMIT)
    if isinstance(raised.value, RemoteError):
        assert kind in str(raised.value)


def test_a_task_that_fails_is_repeated_as_often_as_it_may(farm: Farm) -> None:
    task = tasks.fail.apply_async(max_attempts=3)
    with pytest.raises(ValueError, match="it went wrong"):
        task.get(timeout=LIMIT)
    assert farm.row(task)["attempt"] == 3
    assert farm.attempts(task) == [(1, "error", "exception"), (2, "error", "exception")]


def test_a_task_that_exits_ends_in_error_and_is_not_taken_for_a_lost_one(farm: Farm) -> None:
    task = tasks.exit_with.delay(3)
    with pytest.raises(TaskError):
        task.get(timeout=LIMIT)
    row = farm.row(task)
    assert (row["state"], row["reason"], row["attempt"], row["lost"]) == ("error", "exception", 1, 0)


@pytest.mark.parametrize("kind", ["object", "nan", "infinity", "set of objects", "function", "bytes key", "deep"])
def test_a_result_that_cannot_be_written_ends_the_task_in_error(farm: Farm, kind: str) -> None:
    task = tasks.return_what_cannot_be_stored.delay(kind)
    with pytest.raises(RemoteError, match="cannot be written as JSON"):
        task.get(timeout=LIMIT)
    assert farm.row(task)["reason"] == "not_storable"
    assert tasks.add.delay(1, 1).get(timeout=LIMIT) == 2


def test_a_result_of_64_megabytes_ends_the_task_in_error_among_good_ones(farm: Farm) -> None:
    before = [tasks.echo.delay(number) for number in range(10)]
    large = tasks.return_what_cannot_be_stored.delay("large", 64 << 20)
    after = [tasks.echo.delay(number) for number in range(10)]
    with pytest.raises(RemoteError, match="result_limit_bytes"):
        large.get(timeout=LIMIT)
    assert farm.row(large)["reason"] == "not_storable"
    assert [good.get(timeout=LIMIT) for good in before + after] == [*range(10), *range(10)]


def test_a_function_that_the_worker_cannot_import_is_named_with_the_path(
    farm: Farm, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "only_here.py").write_text("import aque\n\n@aque.task\ndef hello():\n    return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here  # type: ignore[import-not-found]

    task = only_here.hello.delay()
    with pytest.raises(RemoteError, match="only_here") as raised:
        task.get(timeout=LIMIT)
    assert str(tmp_path) in str(raised.value)
    assert farm.row(task)["reason"] == "cannot_import"


def _closure() -> Callable[[], int]:
    def inner() -> int:
        return 1

    return inner


@pytest.mark.parametrize(
    ("function", "what"),
    [(lambda: 1, "a lambda"), (_closure(), "defined inside another function")],
    ids=["lambda", "closure"],
)
def test_a_function_that_no_worker_could_find_is_refused_at_submit(farm: Farm, function: Any, what: str) -> None:
    before = farm.counts()
    with pytest.raises(NotSubmittable, match=what):
        aque.task(function, name=f"refused {what}").delay()
    assert farm.counts() == before


@pytest.mark.parametrize(
    "argument",
    [object(), {1, object()}, float("nan"), lambda: 1, tasks._nested(100_000), open(os.devnull)],  # noqa: SIM115
    ids=["object", "set", "nan", "lambda", "deep", "file"],
)
def test_an_argument_that_cannot_be_written_is_refused_at_submit(farm: Farm, argument: Any) -> None:
    before = farm.counts()
    with pytest.raises(NotSubmittable, match="Nothing was submitted"):
        tasks.echo.delay(argument)
    assert farm.counts() == before


def test_a_call_that_does_not_match_the_signature_is_refused_at_submit(farm: Farm) -> None:
    before = farm.counts()
    with pytest.raises(TypeError):
        tasks.add.delay(1)
    with pytest.raises(BadInput, match="cuontdown"):
        tasks.add.apply_async((1, 1), cuontdown=5)
    assert farm.counts() == before


# -- limits and kills -----------------------------------------------------------------------------------------------------


def test_a_task_that_runs_longer_than_its_time_limit_is_ended(farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "started"
    task = tasks.started.apply_async((str(path), str(tmp_path / "never")), time_limit=0.5)
    with pytest.raises(TimeLimitExceeded):
        task.get(timeout=LIMIT)
    assert farm.row(task)["reason"] == "time_limit"
    wait_until(lambda: all(map(is_gone, pids(path))), what="its process is gone")
    assert tasks.add.delay(1, 1).get(timeout=LIMIT) == 2


def test_a_time_limit_that_is_not_reached_changes_nothing(farm: Farm) -> None:
    assert tasks.add.apply_async((1, 1), time_limit=100).get(timeout=LIMIT) == 2


def test_a_running_task_is_killed(farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "started"
    task = tasks.started.delay(str(path), str(tmp_path / "never"))
    wait_until(lambda: pids(path), LIMIT, "it runs")
    task.kill()
    with pytest.raises(TaskKilled):
        task.get(timeout=LIMIT)
    row = farm.row(task)
    assert (row["state"], row["reason"], row["signal"], row["attempt"]) == ("killed", "request", signal.SIGTERM, 1)
    assert task.state == "REVOKED"
    wait_until(lambda: is_gone(pids(path)[0]), what="its process is gone")


def test_a_running_task_that_ignores_the_signal_is_killed_after_the_grace(farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "started"
    task = tasks.deaf_to_term.delay(str(path))
    wait_until(lambda: pids(path), LIMIT, "it runs")
    task.kill()
    with pytest.raises(TaskKilled):
        task.get(timeout=LIMIT)
    wait_until(lambda: is_gone(pids(path)[0]), what="its process is gone")


def test_a_killed_task_is_not_repeated_however_many_attempts_it_has(farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "started"
    task = tasks.started.apply_async((str(path), str(tmp_path / "never")), max_attempts=5)
    wait_until(lambda: pids(path), LIMIT, "it runs")
    task.kill("KILL")
    with pytest.raises(TaskKilled):
        task.get(timeout=LIMIT)
    assert (len(pids(path)), farm.row(task)["signal"]) == (1, signal.SIGKILL)


def test_a_waiting_task_is_withdrawn_and_what_needs_it_is_skipped(farm: Farm, tmp_path: Path) -> None:
    gate, path = tmp_path / "gate", tmp_path / "runs"
    first = tasks.started.delay(str(tmp_path / "started"), str(gate))
    second = tasks.record.apply_async((str(path),), depends_on=first)
    third = tasks.record.apply_async((str(path),), depends_on=second)
    second.kill()
    with pytest.raises(TaskCancelled):
        second.get(timeout=LIMIT)
    with pytest.raises(TaskSkipped):
        third.get(timeout=LIMIT)
    gate.touch()
    assert first.get(timeout=LIMIT) == 1
    assert not path.exists()
    assert farm.row(second)["attempt"] == 0


def test_a_kill_of_a_job_takes_its_members_with_it(farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "started"
    with aque.graph() as job:
        running = tasks.started.delay(str(path), str(tmp_path / "never"))
        waiting = tasks.echo.apply_async((1,), depends_on=running)
    wait_until(lambda: pids(path), LIMIT, "it runs")
    job.handle.kill()
    assert farm.wait_for_state(running, "killed")
    assert farm.wait_for_state(waiting, "cancelled", "skipped")
    assert farm.wait_for_state(job.id, "error", "killed", "cancelled")


def test_at_its_soft_time_limit_a_function_gets_an_exception_and_may_end_as_it_likes(
    farm: Farm, tmp_path: Path
) -> None:
    task = tasks.work_until_told.apply_async((str(tmp_path / "a"),), soft_time_limit=0.3)
    assert task.get(timeout=LIMIT) == "told"
    task = tasks.work_until_told.apply_async((str(tmp_path / "b"), False), soft_time_limit=0.3)
    with pytest.raises(SoftTimeLimitExceeded):
        task.get(timeout=LIMIT)
    assert (farm.row(task)["state"], farm.row(task)["reason"]) == ("error", "exception")


def test_after_the_soft_time_limit_the_hard_one_is_still_in_force(farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "started"
    task = tasks.work_until_told.apply_async((str(path), True, True), soft_time_limit=0.2, time_limit=0.6)
    assert farm.wait_for_state(task, "error")["reason"] == "time_limit"
    assert all(map(is_gone, pids(path)))


def test_a_limit_that_is_not_reached_is_not_the_next_tasks(farm: Farm) -> None:
    quick = [tasks.add.apply_async((n, 0), soft_time_limit=1, time_limit=1.2) for n in range(6)]
    assert [task.get(timeout=LIMIT) for task in quick] == list(range(6))
    slow = [tasks.nap.delay(1.5) for _ in range(3)]  # in the same children, over both limits of those before
    assert [task.get(timeout=LIMIT) for task in slow] == [1.5] * 3


# -- what they start ------------------------------------------------------------------------------------------------------


def test_nothing_that_a_function_started_lives_when_its_result_is_there(farm: Farm) -> None:
    seconds = f"9{random.randrange(10**9)}"
    tasks.leave_behind.delay(seconds).get(timeout=LIMIT)
    assert processes_named(seconds) == []


def test_what_an_ordinary_task_started_before_is_spared(own_farm: Farm) -> None:
    own_farm.start_worker("-c", "1", app="tests.worker.ordinary")
    before, during = (f"9{random.randrange(10**9)}" for _ in range(2))
    own_farm.client().send_task("tests.worker.ordinary.start_a_daemon", (before,)).get(timeout=LIMIT)
    tasks.leave_behind.delay(during).get(timeout=LIMIT)
    assert processes_named(during) == []
    (daemon,) = processes_named(before)
    daemon.kill()


def test_what_the_workers_own_code_started_survives_its_pool_children(own_farm: Farm, tmp_path: Path) -> None:
    seconds = f"9{random.randrange(10**9)}"
    own_farm.start_worker("-c", "1", app="tests.worker.ordinary", env={"TEST_HELPER": seconds})
    path, gate = tmp_path / "started", tmp_path / "gate"
    task = tasks.started.delay(str(path), str(gate))
    wait_until(lambda: pids(path), LIMIT, "it runs")
    os.kill(pids(path)[0], signal.SIGKILL)
    gate.touch()
    assert task.get(timeout=LIMIT) == 2
    (helper,) = processes_named(seconds)
    helper.kill()


# -- children of the pool that die ------------------------------------------------------------------------------------------


def test_an_attempt_whose_process_died_is_lost_and_repeated(farm: Farm, tmp_path: Path) -> None:
    path, gate = tmp_path / "started", tmp_path / "gate"
    task = tasks.started.delay(str(path), str(gate))
    wait_until(lambda: pids(path), LIMIT, "it runs")
    os.kill(pids(path)[0], signal.SIGKILL)
    wait_until(lambda: len(pids(path)) == 2, LIMIT, "it runs again")
    gate.touch()
    assert task.get(timeout=LIMIT) == 2
    assert farm.attempts(task) == [(1, "lost", "worker_lost")]
    row = farm.row(task)
    assert (row["state"], row["attempt"], row["lost"], row["reason"]) == ("success", 2, 1, None)


def test_three_lost_attempts_end_the_task(farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "started"
    task = tasks.started.delay(str(path), str(tmp_path / "never"))
    for count in (1, 2, 3):
        wait_until(lambda count=count: len(pids(path)) == count, LIMIT, f"attempt {count} runs")  # type: ignore[misc]
        os.kill(pids(path)[-1], signal.SIGKILL)
    with pytest.raises(TaskLost):
        task.get(timeout=LIMIT)
    row = farm.row(task)
    assert (row["state"], row["reason"], row["attempt"], row["lost"]) == ("error", "worker_lost", 3, 3)
    assert tasks.add.delay(1, 1).get(timeout=LIMIT) == 2


def test_lost_attempts_do_not_count_as_failed_ones(farm: Farm, tmp_path: Path) -> None:
    path, gate = tmp_path / "started", tmp_path / "gate"
    task = tasks.started.apply_async((str(path), str(gate)), max_attempts=1)
    wait_until(lambda: pids(path), LIMIT, "it runs")
    os.kill(pids(path)[0], signal.SIGKILL)
    gate.touch()
    assert task.get(timeout=LIMIT) == 2


def test_a_task_that_may_not_be_requeued_ends_with_its_first_lost_attempt(farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "started"
    task = tasks.started.apply_async((str(path), str(tmp_path / "never")), requeue=False, max_attempts=3)
    wait_until(lambda: pids(path), LIMIT, "it runs")
    os.kill(pids(path)[0], signal.SIGKILL)
    with pytest.raises(TaskLost):
        task.get(timeout=LIMIT)
    row = farm.row(task)
    assert (row["state"], row["reason"], row["attempt"], row["lost"]) == ("error", "worker_lost", 1, 1)


def test_a_strict_lease_is_refused_for_a_function(farm: Farm) -> None:
    before = farm.counts()
    with pytest.raises(BadInput, match="strict_lease is for commands"):
        tasks.add.apply_async((1, 1), strict_lease=True)
    assert farm.counts() == before


def test_how_many_lost_attempts_end_a_task_is_a_setting(own_farm: Farm, tmp_path: Path) -> None:
    own_farm.start_worker("-c", "1", max_lost=1)
    path = tmp_path / "started"
    task = tasks.started.delay(str(path), str(tmp_path / "never"))
    wait_until(lambda: pids(path), LIMIT, "it runs")
    os.kill(pids(path)[0], signal.SIGKILL)
    wait_until(lambda: own_farm.row(task)["lost"] == 1, LIMIT, "its attempt is lost")
    assert own_farm.row(task)["state"] == "error"


def test_a_kill_that_comes_as_a_task_ends_harms_no_other_task(own_farm: Farm) -> None:
    own_farm.start_worker("-c", "2", cpus=2)
    for _ in range(25):
        raced = [tasks.echo.delay(n) for n in range(4)]
        for task in raced:
            task.kill("KILL")
        for task in raced:
            own_farm.wait_for_state(task, "success", "killed", "cancelled")
    assert tasks.add.delay(1, 1).get(timeout=LIMIT) == 2


def test_idle_children_that_die_are_replaced(own_farm: Farm) -> None:
    worker = own_farm.start_worker("-c", "3", cpus=3)
    assert tasks.add.delay(1, 1).get(timeout=LIMIT) == 2
    for child in worker.pool_children():
        child.kill()
    assert [tasks.add.delay(n, 1).get(timeout=LIMIT) for n in range(10)] == list(range(1, 11))
