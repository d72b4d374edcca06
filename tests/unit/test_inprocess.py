"""`aque.execute`: graphs in this process, with the store out of reach."""

import operator
import os
import traceback
from pathlib import Path
from typing import Any

import pytest

import aque
from aque.errors import BadInput, CommandFailed, TaskSkipped, UnknownTask
from tests.worker import functions, tasks


@pytest.fixture(autouse=True)
def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQUE_BROKER", "postgresql://nobody@127.0.0.1:1/none")


def test_a_signature_runs_here() -> None:
    assert aque.execute(tasks.add.s(1), 2) == 3
    assert aque.execute(tasks.add.si(1, 2)) == 3


def test_what_a_function_submits_runs_in_order_and_results_stand_for_its_handles() -> None:
    def build(n: int) -> dict[str, Any]:
        with aque.graph() as job:
            total = aque.reduce(operator.add, [tasks.add.delay(i, i) for i in range(n)])
            listed = aque.shell(["sh", "-c", "cat; echo $X"], stdin=b"in\n", env={"X": "y"}, depends_on=total)
            seen = tasks.echo.delay([listed, total])
        return {"seen": seen, "both": (total, aque.barrier([total])), "job": job.handle, "n": n}

    command = {"exit_code": 0, "stdout": "in\ny\n", "truncated": False}
    assert aque.execute(build, 10) == {"seen": [command, 90], "both": (90, None), "job": None, "n": 10}


def test_a_result_that_is_asked_for_in_the_course_of_it_is_there() -> None:
    def work() -> int:
        first = tasks.add.delay(1, 2)
        with aque.graph() as job:
            second = tasks.add.delay(first, first)
        job.handle.get()
        return int(second.get()) + int(first.get())

    assert aque.execute(work) == 9


def test_a_task_can_submit_and_wait_for_its_children() -> None:
    assert aque.execute(functions.factorial.s(5)) == 120


def test_everything_runs_once_also_what_nobody_asks_for(tmp_path: Path) -> None:
    def work() -> None:
        one = tasks.record.delay(str(tmp_path / "runs"))
        one.get()
        tasks.record.delay(str(tmp_path / "runs"))

    assert aque.execute(work) is None
    assert functions.lines.run(str(tmp_path / "runs")) == 2


def test_what_a_task_raised_is_raised_with_its_traceback() -> None:
    with pytest.raises(tasks.OwnError) as raised:
        aque.execute(lambda: tasks.echo.delay(tasks.fail.delay("OwnError", "broken")))
    assert str(raised.value) == "broken"
    assert "in fail" in "".join(traceback.format_tb(raised.tb))


def test_a_failed_task_makes_others_impossible_and_others_possible() -> None:
    def work() -> list[Any]:
        bad = tasks.fail.delay()
        skipped = tasks.echo.delay(bad)
        with pytest.raises(ValueError, match="it went wrong"):
            skipped.get()
        return [
            skipped.state,
            tasks.echo.apply_async([1], after_failed=bad),
            tasks.echo.apply_async([2], after_any=skipped),
            aque.barrier([bad]).state,
        ]

    assert aque.execute(work) == ["REVOKED", 1, 2, "FAILURE"]
    with pytest.raises(TaskSkipped):
        aque.execute(lambda: tasks.echo.apply_async([1], after_failed=tasks.echo.delay(2)))


def test_an_error_that_nobody_has_asked_for_is_raised() -> None:
    def work() -> int:
        tasks.fail.delay()
        return 1

    with pytest.raises(ValueError, match="it went wrong"):
        aque.execute(work)


def test_a_command_fails_as_on_the_farm(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="exited with status 3"):
        aque.execute(aque.shell, ["sh", "-c", "exit 3"])
    with pytest.raises(CommandFailed, match="ended by signal 9"):
        aque.execute(aque.shell, ["sh", "-c", "kill -9 $$"])
    with pytest.raises(CommandFailed, match="No such file"):
        aque.execute(aque.shell, ["/no/such/program"])
    with pytest.raises(CommandFailed, match="timed out"):
        aque.execute(aque.shell, ["sleep", "60"], time_limit=0.05)
    aque.execute(aque.shell, ["sh", "-c", "cat; pwd"], cwd=str(tmp_path), stdin=os.devnull, stdout="out")
    assert (tmp_path / "out").read_text() == f"{tmp_path}\n"


def test_results_must_be_json_and_attempts_are_repeated_as_on_the_farm(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        aque.execute(tasks.return_what_cannot_be_stored.s("object"))
    assert aque.execute(functions.succeed_at.s(3).set(max_attempts=3)) == 3
    with pytest.raises(RuntimeError, match="attempt 2"):
        aque.execute(functions.succeed_at.s(3).set(max_attempts=2))


def test_a_task_knows_itself() -> None:
    before = dict(os.environ)
    assert aque.execute(tasks.whoami.s())["attempt"] == 1
    assert dict(os.environ) == before


def test_what_cannot_work_here_says_so() -> None:
    with pytest.raises(UnknownTask):
        aque.execute(lambda: tasks.echo.apply_async([1], depends_on=12))
    with pytest.raises(BadInput, match="an executor needs the farm"):
        aque.execute(lambda: aque.Executor().submit(len, ""))
    with pytest.raises(BadInput, match="this process cannot run it"):
        aque.execute(tasks.echo.s(1).set(interpreter="/opt/tool/python"))


def test_a_long_chain_needs_no_recursion() -> None:
    def work() -> Any:
        with aque.graph():
            last = tasks.add.delay(0, 1)
            for _ in range(2000):
                last = tasks.add.delay(last, 1)
        return last

    assert aque.execute(work) == 2001
