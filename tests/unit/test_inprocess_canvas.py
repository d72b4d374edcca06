"""`aque.execute` of Celery's canvases, with the store and the broker out of reach."""

from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group

import aque
from aque.errors import BadInput
from tests.worker import canvas_tasks, functions
from tests.worker.tasks import OwnError, add, echo, fail, record, total


@pytest.fixture(autouse=True)
def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQUE_BROKER", "postgresql://nobody@127.0.0.1:1/none")


@pytest.mark.parametrize(
    ("work", "result"),
    [
        (add.s(1, 2) | add.s(3) | echo.s(), 6),
        (group(add.s(i, i) for i in range(4)), [0, 2, 4, 6]),
        (chord([add.s(i, i) for i in range(4)], total.s()), 12),
        (chain(group(add.s(1, 1), add.s(2, 2)), total.s(), group(add.s(1), add.s(2)), total.s()), 15),
        (group(chain(add.s(1, 1), group(add.s(1), add.s(2))), add.s(5, 5)), [[3, 4], 10]),
        (add.chunks([(1, 1), (2, 2), (3, 3)], 2), [[2, 4], [6]]),
        (add.starmap([(1, 1), (2, 2)]), [2, 4]),
        (group([]), []),
        (functions.replaced.s(4), 5),
    ],
    ids=["chain", "group", "chord", "layers", "nested", "chunks", "starmap", "empty", "replace"],
)
def test_a_canvas_has_the_result_that_it_has_on_the_farm(work: Any, result: Any) -> None:
    assert aque.execute(work) == result


@pytest.mark.parametrize(
    ("kind", "result"),
    [("task", 3), ("chain", 15), ("group", [0, 2, 4]), ("chord", 6), ("chain of group", [13, 23])],
)
def test_a_task_is_replaced_as_on_the_farm(kind: str, result: Any) -> None:
    assert aque.execute(canvas_tasks.replaced_by.s(kind)) == result
    assert aque.execute(chain(canvas_tasks.replaced_by.s(kind), echo.s())) == result
    assert aque.execute(chord([canvas_tasks.replaced_by.s(kind), echo.s(1)], echo.s())) == [result, 1]


def test_a_plain_task_is_replaced_too() -> None:
    assert aque.execute(chain(canvas_tasks.plain_replaced.s(1), add.s(10))) == 13


@pytest.mark.parametrize("kind", ["failing chain", "failing task"])
def test_a_replaced_task_fails_as_what_replaced_it_and_its_error_callback_hears_of_it(
    tmp_path: Path, kind: str
) -> None:
    with pytest.raises(ValueError, match=r"first|alone"):
        aque.execute(canvas_tasks.replaced_by.s(kind).set(link_error=functions.write_error.s(str(tmp_path / "error"))))
    assert (tmp_path / "error").read_text().startswith("ValueError: ")


def test_a_member_adds_to_its_chord() -> None:
    assert aque.execute(chord([canvas_tasks.extends.s(2), add.s(1, 1)], echo.s())) == [2, 2, 100, 101]
    with pytest.raises(BadInput, match="no member of a group"):
        aque.execute(canvas_tasks.extends.s(1))


def test_a_canvas_gets_arguments_and_may_be_long() -> None:
    assert aque.execute(chain(*[add.s(1)] * 1000), 0) == 1000


def test_what_a_step_raised_is_raised_and_nothing_after_it_runs(tmp_path: Path) -> None:
    with pytest.raises(OwnError, match="broken"):
        aque.execute(chain(add.s(1, 2), fail.si("OwnError", "broken"), record.si(str(tmp_path / "runs"))))
    assert not (tmp_path / "runs").exists()


def test_callbacks_run_for_what_succeeded_and_error_callbacks_for_what_failed(tmp_path: Path) -> None:
    good, bad = str(tmp_path / "good"), str(tmp_path / "bad")
    linked = add.s(1, 2).set(link=record.si(good), link_error=functions.write_error.s(bad))
    assert aque.execute(linked) == 3
    assert functions.lines.run(good) == 1
    assert not Path(bad).exists()
    with pytest.raises(OwnError):
        aque.execute(fail.s("OwnError", "broken").set(link=record.si(good), link_error=functions.write_error.s(bad)))
    assert functions.lines.run(good) == 1
    assert Path(bad).read_text() == "OwnError: broken\n"


def test_tasks_that_are_none_of_aque_s_run_here_too() -> None:
    app = Celery("plain", broker="amqp://nobody@127.0.0.1:1//", set_as_current=False)

    @app.task  # type: ignore[untyped-decorator]
    def double(value: int) -> int:
        return 2 * value

    assert aque.execute(double.s(2) | double.s()) == 8
