"""The quickest rows of tests/faults/trees.py, on either database; `python -m tests.faults.trees` prints them all."""

from pathlib import Path

import pytest

from tests.faults import trees
from tests.faults.trees import Act, Trees
from tests.worker.farm import Farm


@pytest.mark.parametrize(
    ("made_store_url", "kind", "act", "expected", "given"),
    [
        ("sqlite", "command", trees.kill_supervisor, ("success", 2), {}),
        ("postgresql", "command", trees.kill_server_and_supervisor, ("success", 2), {}),
        ("sqlite", "function", trees.kill_server_and_worker, ("success", 2), {"other_worker": True}),
        ("postgresql", "function", trees.kill_worker, ("success", 2), {"other_worker": True}),
        ("sqlite", "function", trees.kill_leader, ("success", 2), {}),
        ("postgresql", "function", trees.nothing, ("error time_limit", 1), {"time_limit": 3.0}),  # it grows before
        ("sqlite", "function", trees.aque_kill, ("killed request", 1), {}),
        ("postgresql", "function", trees.let_it_end, ("success", 1), {"ends": True}),
    ],
    ids=[
        "supervisor",
        "server and supervisor",
        "server and worker",
        "worker",
        "pool child",
        "time limit",
        "aque kill",
        "end",
    ],
    indirect=["made_store_url"],
)
def test_nothing_of_a_tree_survives_its_attempt_and_the_next_one_starts_after_it(
    own_farm: Farm, tmp_path: Path, kind: str, act: Act, expected: tuple[str, int], given: dict[str, object]
) -> None:
    row = Trees(own_farm, tmp_path).run("", kind, act, expected, **given)  # type: ignore[arg-type]
    assert row.is_right, f"\n{trees.HEADER}\n{row}"
