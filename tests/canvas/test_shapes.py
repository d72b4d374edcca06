"""The quick ones of the canvas shapes are right on Aque. `python -m tests.canvas.shapes` runs all, beside plain Celery."""

from pathlib import Path

import pytest

from tests.canvas.shapes import SHAPES, Found, on_aque, run_on


def test_there_are_thirty_and_more() -> None:
    assert len(SHAPES) >= 30


def test_quick_shapes_are_right(store_url: str, tmp_path: Path) -> None:
    names = [name for name, shape in SHAPES.items() if shape.is_quick]
    with on_aque(store_url, tmp_path) as environment:
        found = list(run_on(environment, names))
    assert [(one.name, one.outcome(), one.runs) for one in found if not one.is_right()] == []
    assert [one.name for one in found] == names


@pytest.mark.parametrize("name", ["chain", "chord"])
def test_a_wrong_result_and_one_run_too_many_are_seen(name: str) -> None:
    right = SHAPES[name]
    assert Found(name, right.result, runs=dict(right.runs)).is_right()
    assert not Found(name, 0, runs=dict(right.runs)).is_right()
    assert not Found(name, right.result, runs={**right.runs, "add": 9}).is_right()
    assert not Found(name, right.result, error="timeout", runs=dict(right.runs)).is_right()
