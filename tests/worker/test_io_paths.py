"""io_paths and io in the Python interface; see tests/store/test_io_hints.py for what becomes of them."""

import os
from pathlib import Path
from typing import Any

import pytest

import aque
from aque.errors import BadInput
from tests.worker import io_tasks
from tests.worker.farm import Farm


def places(handle: Any) -> list[str]:
    (row,) = aque.tasks({"id": handle.number}, ["places"])
    return [os.fsdecode(path) for path in row["places"]]


def test_a_task_can_tell_from_its_arguments_what_it_reads(own_farm: Farm) -> None:
    assert places(io_tasks.convert.delay("/shots/a")) == ["/shots/a"]
    assert places(io_tasks.convert.delay("/shots/b", beside="/shots/a")) == ["/shots/a", "/shots/b"]
    with aque.graph():
        handles = [io_tasks.convert.delay(f"/shots/{n}") for n in range(3)]
    assert [places(handle) for handle in handles] == [["/shots/0"], ["/shots/1"], ["/shots/2"]]


def test_a_list_is_every_call_s_and_a_call_can_give_its_own_or_none(own_farm: Farm) -> None:
    assert places(io_tasks.render.delay()) == ["/shots/always"]
    assert places(io_tasks.render.apply_async(io_paths=["/shots/x"])) == ["/shots/x"]
    assert places(io_tasks.render.apply_async(hints={"io_paths": ["/shots/y"]})) == ["/shots/y"]
    assert places(io_tasks.render.apply_async(io=False)) == []


def test_a_task_of_a_class_tells_with_a_method(own_farm: Farm) -> None:
    class Convert(aque.celery_app.Task):
        name = "convert"

        def io_paths(self, path: str) -> list[str]:
            return [f"{path}.{self.name}"]

    assert Convert().io_paths("x") == ["x.convert"]


def test_what_is_no_list_of_paths_is_refused(own_farm: Farm) -> None:
    with pytest.raises(BadInput, match="io_paths must be a list of paths, not 7"):
        io_tasks.render.apply_async(io_paths=lambda: 7)
    with pytest.raises(BadInput, match="io_paths"):
        aque.shell(["true"], io_paths=lambda: ["/x"])


def test_a_command_has_the_paths_among_its_words_unless_it_says_otherwise(own_farm: Farm, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    words = ["gzip", str(tmp_path / "f")]
    assert places(aque.shell(words)) == [str(tmp_path)]
    assert places(aque.shell(words, io=False)) == []
    assert places(aque.shell(words, io_paths=["/shots"])) == ["/shots"]
    assert places(aque.shell(["gzip", "f"], cwd=str(tmp_path))) == [str(tmp_path)]


def test_a_call_of_an_executor_tells_its_paths_and_a_chunk_those_of_its_calls(own_farm: Farm) -> None:
    executor = aque.Executor()
    assert places(executor.submit(io_tasks.convert, "/shots/a").handle) == ["/shots/a"]
    executor.map(io_tasks.convert, ["/shots/b", "/shots/c"], chunksize=2)
    rows = {row["name"]: row["places"] for row in aque.tasks({"pattern": "python"}, ["name", "places"])}
    assert list(map(os.fsdecode, rows["tests.worker.io_tasks.convert (2 calls)"])) == ["/shots/b", "/shots/c"]
    executor.shutdown(cancel_futures=True)
