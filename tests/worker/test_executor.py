"""`aque.Executor` on real workers: the interface of concurrent.futures, with the farm behind it."""

import asyncio
import math
import operator
import os
import subprocess
import sys
from concurrent import futures
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import aque
from aque.errors import BadInput, NotSubmittable, RemoteError, StoreUnreachable, TaskCancelled, TaskKilled, TaskSkipped
from aque.futures import Collector, Future
from tests.servers import PostgreSQL, wait_until
from tests.worker import functions, tasks
from tests.worker.farm import LIMIT_SECONDS, ROOT, Farm

LIMIT = LIMIT_SECONDS


def wait_until_it_runs(path: Path) -> None:
    wait_until(path.exists, LIMIT, f"{path} is written")


# -- what can be called ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("called", "arguments", "result"),
    [
        (math.sqrt, [16], 4.0),
        (len, ["four"], 4),
        (functions.power, [3], 9),
        (functions.Point.moved, [1], 2),
        (int, ["7"], 7),
        ("os.path:basename", ["/a/b"], "b"),
        (partial(int, base=16), ["ff"], 255),
        (partial(functions.power, 2), [10], 1024),
        (tasks.add, [1, 2], 3),
        (functions.bound, [5], ["tests.worker.functions.bound", 5]),
    ],
)
def test_whatever_has_a_name_can_be_called(farm: Farm, called: Any, arguments: list[Any], result: Any) -> None:
    with aque.Executor() as executor:
        assert executor.submit(called, *arguments).result(LIMIT) == result


def test_what_no_worker_could_find_is_refused_where_it_is_submitted(farm: Farm) -> None:
    def local() -> None: ...

    before = farm.counts()
    with aque.Executor() as executor:
        for called, why in (
            (lambda: 1, "is a lambda"),
            (functions.unnamed, "is a lambda"),
            (local, "defined inside another function"),
            (functions.Point(1).method, "a worker would run something else"),
            ("text".upper, "has no name"),
            (operator.itemgetter(1), "has no name"),
            ("basename", "is not MODULE:FUNCTION"),
            (None, "has no name"),
        ):
            with pytest.raises(NotSubmittable, match=why):
                executor.submit(called)
        with pytest.raises(NotSubmittable, match="cannot be written as JSON"):
            executor.submit(len, object())
        with pytest.raises(NotSubmittable, match="cannot be written as JSON"):
            executor.map(str, [1, object()])
        with pytest.raises(TypeError, match="missing 1 required"):
            executor.submit(tasks.add, 1)
        assert executor.submit(len, "after").result(LIMIT) == 5
    assert sum(farm.counts().values()) == sum(before.values()) + 1


# -- options --------------------------------------------------------------------------------------------------------------


def test_options_are_the_executors_then_the_tasks(farm: Farm) -> None:
    with aque.Executor(cpus=0.5, layer="some") as executor:
        plain = executor.submit(functions.power, 2)
        more = executor.options(priority=7).submit(functions.power, 2)
        own = executor.options(priority=1).submit(functions.with_options, 1)
        of_task = aque.Executor().submit(functions.with_options, 1)
        shown = [
            (row["cpus"], row["priority"], row["layer"])
            for row in (farm.row(future.task_id) for future in (plain, more, own, of_task))
        ]
    assert shown[:3] == [("0.5", 0, "some"), ("0.5", 7, "some"), ("0.5", 1, "some")]
    assert shown[3][:2] == ("2", 3)
    with pytest.raises(BadInput, match="unknown task options cpu"):
        aque.Executor(cpu=1)


def test_futures_and_handles_are_dependencies_as_arguments_and_as_options(farm: Farm) -> None:
    with aque.Executor() as executor:
        one = executor.submit(functions.power, 3)
        two = executor.submit(operator.add, one, tasks.add.delay(1, 1))
        assert two.result(LIMIT) == 11
        after = executor.options(depends_on=[one, two]).submit(len, "abc")
        assert farm.row(after.task_id)["depends_on"] == [one.task_id, two.task_id]
        assert tasks.add.delay(two, 1).get(timeout=LIMIT) == 12
        assert one.handle.get(timeout=LIMIT) == 9


# -- ends -----------------------------------------------------------------------------------------------------------------


def test_a_future_raises_what_get_raises(farm: Farm) -> None:
    with aque.Executor() as executor:
        own = executor.submit(functions.break_at, 1, 1)
        assert isinstance(own.exception(LIMIT), tasks.OwnError)
        with pytest.raises(tasks.OwnError, match="not 1"):
            own.result()
        skipped = executor.submit(len, own)
        assert isinstance(skipped.exception(LIMIT), TaskSkipped)
        unstorable = executor.submit(functions.Point, 1)
        assert isinstance(unstorable.exception(LIMIT), RemoteError)


def test_futures_work_with_all_that_concurrent_futures_has(farm: Farm, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    called: list[futures.Future[Any]] = []
    with aque.Executor() as executor:
        slow = executor.submit(functions.start_and_wait, str(tmp_path / "slow"), str(gate))
        quick = executor.submit(len, "ab")
        slow.add_done_callback(called.append)
        assert futures.wait([slow, quick], LIMIT, futures.FIRST_COMPLETED).done == {quick}
        with pytest.raises(futures.TimeoutError):
            slow.result(0.01)
        assert (slow.done(), quick.done(), quick.result()) == (False, True, 2)
        in_order = futures.as_completed([slow, quick], LIMIT)
        assert next(in_order) is quick
        gate.touch()
        assert next(in_order) is slow
        wait_until(lambda: called == [slow])


def test_futures_can_be_awaited(farm: Farm) -> None:
    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        numbers = [loop.run_in_executor(executor, functions.power, n) for n in range(5)]
        wrapped = asyncio.wrap_future(executor.submit(functions.break_at, 2, 2))
        return await asyncio.gather(*numbers, wrapped, return_exceptions=True)

    with aque.Executor() as executor:
        *squares, error = asyncio.run(main())
    assert squares == [0, 1, 4, 9, 16]
    assert isinstance(error, tasks.OwnError)


def test_a_task_that_waits_for_a_future_holds_no_place(farm: Farm) -> None:
    with aque.Executor() as executor:  # deeper than the worker has pool children
        assert executor.submit(functions.depth, 6).result(LIMIT) == 6


# -- cancel ---------------------------------------------------------------------------------------------------------------


def test_what_has_not_started_can_be_cancelled_and_what_runs_cannot(farm: Farm, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with aque.Executor() as executor:
        running = executor.submit(functions.start_and_wait, str(tmp_path / "it"), str(gate))
        waiting = executor.submit(functions.length, [running])
        wait_until_it_runs(tmp_path / "it")
        assert wait_until(running.running, LIMIT)
        assert not running.cancel()
        assert not waiting.running()
        assert waiting.cancel()
        assert (waiting.cancelled(), waiting.done(), waiting.cancel()) == (True, True, True)
        assert futures.wait([waiting], LIMIT).done == {waiting}
        with pytest.raises(futures.CancelledError):
            waiting.result(LIMIT)
        assert farm.state(waiting.task_id) == "cancelled"
        gate.touch()
        assert running.result(LIMIT) == "done"
        assert not running.cancel()


def test_what_somebody_else_kills_says_so(farm: Farm, tmp_path: Path) -> None:
    with aque.Executor() as executor:
        running = executor.submit(functions.start_and_wait, str(tmp_path / "it"), str(tmp_path / "never"))
        waiting = executor.submit(functions.length, [running])
        wait_until_it_runs(tmp_path / "it")
        waiting.handle.kill()
        running.handle.kill()
        assert isinstance(waiting.exception(LIMIT), TaskCancelled)
        assert isinstance(running.exception(LIMIT), TaskKilled)
        assert not waiting.cancelled()


# -- map ------------------------------------------------------------------------------------------------------------------


def test_map_returns_results_in_order_and_stops_with_the_shortest(farm: Farm) -> None:
    with aque.Executor() as executor:
        assert list(executor.map(functions.power, range(20), [3] * 30)) == [n**3 for n in range(20)]
        assert list(executor.map(functions.power, range(20), chunksize=7)) == [n**2 for n in range(20)]
        assert list(executor.map(functions.power, [])) == []
        assert list(executor.map(partial(functions.power, exponent=3), range(5), chunksize=2)) == [0, 1, 8, 27, 64]
        with pytest.raises(ValueError, match="chunksize"):
            executor.map(functions.power, [1], chunksize=0)


def test_a_map_is_one_job(farm: Farm) -> None:
    with aque.Executor() as executor, farm.store.connect() as connection:
        results = executor.map(functions.power, range(5))
        job = max(farm.store.tasks(connection, {"pattern": "group"}, ["id", "name"]), key=operator.itemgetter("id"))
        members = list(farm.store.tasks(connection, {"job_id": job["id"]}, ["id"]))
        assert (job["name"], len(members)) == ("tests.worker.functions.power", 6)
        assert list(results) == [0, 1, 4, 9, 16]


def test_results_of_a_map_come_before_it_has_ended(farm: Farm, tmp_path: Path) -> None:
    paths, gates = [str(tmp_path / name) for name in "ab"], [tmp_path / "open", tmp_path / "gate"]
    gates[0].touch()
    with aque.Executor() as executor:
        results = executor.map(functions.start_and_wait, paths, map(str, gates))
        assert next(results) == "done"
        gates[1].touch()
        assert list(results) == ["done"]


def test_an_error_or_a_timeout_in_a_map_withdraws_what_has_not_started(farm: Farm, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with aque.Executor() as executor:
        held = executor.submit(functions.start_and_wait, str(tmp_path / "held"), str(gate))
        before = farm.counts().get("cancelled", 0)
        waiting = executor.options(depends_on=held)
        results = waiting.map(functions.power, range(5), timeout=0.1)
        with pytest.raises(futures.TimeoutError):
            list(results)
        # The job of the map ends with its members.
        assert wait_until(lambda: farm.counts().get("cancelled", 0) == before + 5, LIMIT)
        gate.touch()
        results = executor.map(functions.break_at, [1, 2, 3], [2] * 3)
        assert next(results) == 1
        with pytest.raises(tasks.OwnError, match="not 2"):
            next(results)


# -- shutdown -------------------------------------------------------------------------------------------------------------


def test_shutdown_waits_for_what_was_submitted_and_takes_nothing_more(farm: Farm) -> None:
    with aque.Executor() as executor:
        other = executor.options(priority=1)
        expected = [executor.submit(functions.power, n) for n in range(5)]
    assert all(future.done() for future in expected)
    for closed in (executor, other):
        with pytest.raises(RuntimeError, match="after shutdown"):
            closed.submit(len, "")
        with pytest.raises(RuntimeError, match="after shutdown"):
            closed.map(len, [""])


def test_shutdown_can_cancel_what_has_not_started(farm: Farm, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    executor = aque.Executor()
    running = executor.submit(functions.start_and_wait, str(tmp_path / "it"), str(gate))
    wait_until_it_runs(tmp_path / "it")
    waiting = executor.submit(functions.length, [running])
    executor.shutdown(wait=False, cancel_futures=True)
    assert (waiting.cancelled(), running.done()) == (True, False)
    gate.touch()
    assert running.result(LIMIT) == "done"


def test_the_thread_ends_a_moment_after_the_last_future(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aque.futures.LINGER_SECONDS", 0.01)
    executor = aque.Executor()
    for _ in range(3):
        assert executor.submit(len, "ab").result(LIMIT) == 2
        wait_until(lambda: threads_of(executor) is None, LIMIT)


def threads_of(executor: aque.Executor) -> Any:
    collector: Collector = executor._collector
    return collector._thread


def test_an_interpreter_ends_while_its_tasks_go_on(farm: Farm, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    program = (
        "import aque, sys; from tests.worker import functions\n"
        f"print(aque.Executor().submit(functions.start_and_wait, {str(tmp_path / 'it')!r}, {str(gate)!r}).task_id)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    assert ended.stderr == ""
    gate.touch()
    assert farm.wait_for_state(ended.stdout.strip(), "success", "error", "cancelled")["state"] == "success"


# -- many, and trouble ----------------------------------------------------------------------------------------------------


def test_every_future_has_its_turn_however_many_wait_before_it(
    farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aque.waiter.WINDOW", 2)
    gate = tmp_path / "gate"
    with aque.Executor() as executor:
        held = executor.submit(functions.start_and_wait, str(tmp_path / "it"), str(gate))
        waiting = [executor.submit(functions.power, n) for n in [held] * 6]
        assert executor.submit(len, "ab").result(LIMIT) == 2
        assert not held.done()
        executor.shutdown(wait=False, cancel_futures=True)
        assert all(future.cancelled() for future in waiting)
        gate.touch()


def test_futures_outlast_a_database_that_goes_away(own_postgresql: PostgreSQL, tmp_path: Path) -> None:
    with own_postgresql.database() as url, Farm(url, tmp_path) as farm, farm.entered():
        future = aque.Executor().submit(functions.power, 3)
        own_postgresql.stop("immediate")
        own_postgresql.start()
        wait_until(lambda: is_killed(future), LIMIT)
        assert isinstance(future.exception(LIMIT), TaskCancelled)


def is_killed(future: Future) -> bool:
    """Also by a client whose connections broke when the database went away."""
    with suppress(StoreUnreachable):
        future.handle.kill()
        return True
    return False
