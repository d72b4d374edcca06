"""Canvases in real workers: what is passed on, what fails and who hears of it, what a task replaces itself by."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.canvas import _chain
from celery.result import AsyncResult, GroupResult

import aque
from aque.errors import TaskCancelled
from aque.handles import GroupHandle
from tests.servers import wait_until
from tests.worker import tasks
from tests.worker.canvas_tasks import (
    add,
    echo,
    extends,
    fail,
    fail_after,
    new_errback,
    new_errback_to,
    note,
    note_value,
    old_errback,
    plain_add,
    plain_replaced,
    registered_only,
    replaced_by,
    same,
    stamps,
    submits,
    submits_after,
    total,
)
from tests.worker.farm import LIMIT_SECONDS, ROOT, Farm

LIMIT = LIMIT_SECONDS


def values(farm: Farm, name: str) -> list[Any]:
    """Results of the tasks of this name that have succeeded, newest last."""
    with farm.store.connect() as connection:
        found = farm.store.tasks(connection, {"name": f"tests.worker.canvas_tasks.{name}", "state": "success"}, ["id"])
        ids = [row["id"] for row in found]
    return [AsyncResult(str(i), app=add.app).get(timeout=LIMIT) for i in ids]


def lines(path: Path) -> list[str]:
    """What tasks have noted there so far."""
    return path.read_text().splitlines() if path.exists() else []


# -- results ----------------------------------------------------------------------------------------------------------------


def test_results_are_passed_on_as_celery_does(farm: Farm) -> None:
    shapes: list[tuple[Any, Any]] = [
        (chain(add.s(1, 2), add.s(4), add.si(10, 20), echo.s(5, key=6)), [[30, 5], {"key": 6}]),
        (group(add.s(i, i) for i in range(3)), [0, 2, 4]),
        (chord([add.s(i, i) for i in range(4)], total.s()), 12),
        (chain(add.s(1, 1), group(add.s(1), add.s(2)), total.s(), group(same.s(), same.s())), [7, 7]),
        (chord([chain(add.s(1, 1), group(add.s(1), add.s(2))), add.s(5, 5)], same.s()), [[3, 4], 10]),
        (chord([], echo.s(1)), [[[], 1], {}]),
        (_chain([add.s(1, 1), chord([], same.s())]), []),
        (group([]), []),
        (group(same.s(1), group(same.s(2), group(same.s(3)))), [1, 2, 3]),
        (chord([chord([same.s(1), same.s(2)], total.s()), same.s(4)], chord([same.s()], total.s() | total.s())), None),
        (add.chunks(zip(range(5), range(5), strict=True), 2), [[0, 2], [4, 6], [8]]),
        (chain(plain_add.s(1, 2), add.s(4), plain_add.s(8)), 15),
    ]
    sent = [sig.apply_async() for sig, _ in shapes[:9]] + [sig.apply_async() for sig, _ in shapes[10:]]
    found = [result.get(timeout=LIMIT) for result in sent]
    assert found == [wanted for _, wanted in (*shapes[:9], *shapes[10:])]
    assert same.map([1, 2]).apply_async().get(timeout=LIMIT) == [1, 2]
    assert chain(add.s(1, 2), registered_only.s())().get(timeout=LIMIT)[0] == 3


def test_each_task_of_layered_groups_runs_once(farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    layers = [group(note_value.s(str(path)) for _ in range(4)) for _ in range(2)]
    result = chain(group(note_value.s(n, str(path)) for n in range(4)), *layers)()
    first = [0, 1, 2, 3]
    assert result.get(timeout=LIMIT) == [[first] * 4] * 4
    assert len(lines(path)) == 12


def test_long_and_wide_canvases(farm: Farm) -> None:
    long = chain(add.s(0, 1), *[add.s(1) for _ in range(999)])()
    wide = chord([add.s(n, n) for n in range(2000)])(total.s())
    assert wide.get(timeout=4 * LIMIT) == 2 * sum(range(2000))
    assert long.get(timeout=4 * LIMIT) == 1000
    assert wide.parent.completed_count() == 2000


def test_a_task_shared_by_two_branches_runs_once(farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    load, join = note_value.s("loaded", str(path)), echo.s()
    load.freeze()
    join.freeze()
    result = group(chain(load, echo.s("left"), join), chain(load, echo.s("right"), join))()
    (found, same_one) = result.get(timeout=LIMIT)
    assert found == same_one == [[[["loaded", "left"], {}], [["loaded", "right"], {}]], {}]
    assert lines(path) == ["'loaded'"]


def test_a_running_task_submits_canvases(farm: Farm) -> None:
    celery_id = submits.delay([1, 2, 3]).get(timeout=LIMIT)
    assert total.AsyncResult(celery_id).get(timeout=LIMIT) == 12


def test_children_that_are_not_needed_keep_no_parent_waiting(farm: Farm) -> None:
    broken = fail.delay()
    farm.wait_for_state(broken, "error")
    parent = submits_after.delay(broken.number)
    assert parent.get(timeout=LIMIT) == broken.number
    assert farm.state(parent) == "success"


def test_a_graph_with_canvases_gets_results_through_handles(farm: Farm) -> None:
    with aque.graph("sums") as job:
        parts = group(add.s(n, n) for n in range(3))()
        late = total.delay(parts)
    job.handle.get(timeout=LIMIT)
    assert late.get() == 6


# -- results of groups ------------------------------------------------------------------------------------------------------


def test_what_a_group_tells_of_its_members(farm: Farm, tmp_path: Path) -> None:
    gate, started = tmp_path / "gate", tmp_path / "started"
    result = group(same.s(1), tasks.started.s(str(started), str(gate)))()
    wait_until(lambda: result.completed_count() == 1, LIMIT, "the quick one is done")
    assert (result.ready(), result.waiting(), result.successful(), result.failed()) == (False, True, False, False)
    gate.touch()
    assert result.get(timeout=LIMIT) == result.join(timeout=LIMIT) == result.join_native(timeout=LIMIT)
    assert (result.ready(), result.successful(), len(result), result[0].get()) == (True, True, 2, 1)
    seen: dict[str, Any] = {}
    result.get(callback=seen.__setitem__)
    assert seen[result[0].id] == 1


def test_a_group_raises_what_a_member_has_raised(farm: Farm) -> None:
    result = group(same.s(1), fail.s("bad"))()
    with pytest.raises(ValueError, match="bad"):
        result.get(timeout=LIMIT)
    assert [type(value).__name__ for value in result.get(propagate=False)] == ["int", "ValueError"]
    assert (result.failed(), result.successful(), result.completed_count()) == (True, False, 1)


def test_a_group_is_restored_in_another_process(farm: Farm) -> None:
    result = group(chain(same.s(1), group(same.s(), same.s())), same.s(2)).apply_async(task_id="restored-group")
    result.save()
    program = (
        "from celery.result import GroupResult; from aque.celery_app import app; from aque.handles import GroupHandle\n"
        "print(GroupHandle.restore('restored-group', app=app).get(timeout=60))\n"
        "print(GroupResult.restore('restored-group', app=app).get(timeout=60), GroupResult.restore('none', app=app))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=farm.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    assert done.stdout.splitlines() == ["[[1, 1], 2]", "[[1, 1], 2] None"]
    assert isinstance(GroupResult.restore("restored-group", app=add.app), GroupHandle)


def test_revoking_a_group_withdraws_its_members_and_what_follows(farm: Farm) -> None:
    blocked = [add.s(1, 1).set(queue="nobody"), chain(same.s(1).set(queue="nobody"), same.s())]
    result = chord(blocked)(total.s())
    result.parent.revoke()
    assert [farm.state(member) for member in result.parent] == ["cancelled", "cancelled"]
    assert farm.state(result) == "skipped"
    single = same.apply_async((1,), queue="nobody")
    single.revoke()
    with pytest.raises(TaskCancelled):
        single.get(timeout=LIMIT)


def test_children_and_parents_of_a_result(farm: Farm) -> None:
    result = chain(add.s(1, 2), same.s(), total.si([4, 5]))()
    result.get(timeout=LIMIT)
    assert [node.get() for node in (result.parent, result.parent.parent)] == [3, 3]
    assert [child.id for child in result.parent.parent.children] == [result.parent.id]
    assert [value for _, value in result.parent.parent.collect()] == [3, 3, 9]


# -- failures ---------------------------------------------------------------------------------------------------------------


def test_what_follows_a_failure_is_skipped_and_raises_it(farm: Farm) -> None:
    broken = chain(add.s(1, 2), fail_after.s("in the middle"), same.s(), same.s())()
    with pytest.raises(ValueError, match="in the middle"):
        broken.get(timeout=LIMIT)
    assert farm.state(broken) == "skipped"
    assert broken.parent.parent.parent.get() == 3
    headless = chord([fail.s("in the header"), same.s(1)])(total.s())
    with pytest.raises(ValueError, match="in the header"):
        headless.get(timeout=LIMIT)


def test_a_group_raises_the_exception_of_the_step_of_a_chain_in_it_that_failed(farm: Farm) -> None:
    results = group(chain(same.s(1), same.s()), chain(fail.s("in a chain"), same.si(2)))()
    with pytest.raises(ValueError, match="in a chain"):
        results.get(timeout=LIMIT)
    one, error = results.get(timeout=LIMIT, propagate=False)
    assert (one, type(error)) == (1, ValueError)


def test_error_callbacks_of_both_styles(farm: Farm) -> None:
    failing = fail.apply_async(("loud",), link_error=[old_errback.s(), new_errback.s()], link=note.si("/nowhere", ""))
    (old, new) = ("old_errback", "new_errback")
    wait_until(lambda: failing.id in values(farm, old), LIMIT, "the old style")
    wait_until(lambda: [failing.id, "ValueError", "loud", True] in values(farm, new), LIMIT, "the new style")


def test_the_error_callback_of_a_chain_is_called_once_for_the_step_that_failed(farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    broken = chain(same.s(1), fail_after.s("second"), same.s()).on_error(new_errback_to.s(str(path))).apply_async()
    with pytest.raises(ValueError, match="second"):
        broken.get(timeout=LIMIT)
    wait_until(lambda: lines(path) != [], LIMIT, "the callback has run")
    farm.wait_for_state(broken, "skipped")
    assert lines(path) == [f"{broken.parent.id} ValueError second"]


def test_the_error_callback_of_a_body_is_told_that_its_header_failed(farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    result = chord([fail.s("part"), same.s(1)])(total.s().on_error(new_errback_to.s(str(path))))
    wait_until(lambda: lines(path) != [], LIMIT, "the callback has run")
    culprit = result.parent.results[0].id
    assert lines(path) == [f"{result.id} ChordError Dependency {culprit} raised ValueError('part')"]


def test_an_error_callback_may_be_a_canvas(farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    failing = fail.apply_async(link_error=chain(old_errback.s(), note_value.s(str(path))))
    wait_until(lambda: lines(path) != [], LIMIT, "the callback has run")
    assert lines(path) == [repr(failing.id)]


# -- a task about its own place ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "result"),
    [("task", 3), ("chain", 15), ("group", [0, 2, 4]), ("chord", 6), ("chain of group", [13, 23])],
)
def test_a_replaced_task_keeps_its_id_and_its_followers_get_what_replaced_it(
    farm: Farm, kind: str, result: Any
) -> None:
    alone = replaced_by.delay(kind)
    followed = chain(replaced_by.s(kind), same.s())()
    member = chord([replaced_by.s(kind), same.s(1)])(same.s())
    assert alone.get(timeout=LIMIT) == followed.get(timeout=LIMIT) == result
    assert member.get(timeout=LIMIT) == [result, 1]


def test_a_plain_task_is_replaced_too(farm: Farm) -> None:
    assert chain(plain_replaced.s(1), add.s(10))().get(timeout=LIMIT) == 13


def test_the_error_callback_of_a_replaced_task_hears_of_what_replaced_it(farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    chained = replaced_by.apply_async(("failing chain",), link_error=new_errback_to.s(str(path)))
    with pytest.raises(ValueError, match="first"):
        chained.get(timeout=LIMIT)
    wait_until(lambda: lines(path) != [], LIMIT, "the callback has run")
    assert [line.partition(" ")[2] for line in lines(path)] == ["ValueError first"]
    path.unlink()
    replaced_by.apply_async(("failing task",), link_error=new_errback_to.s(str(path)))
    wait_until(lambda: lines(path) != [], LIMIT, "the callback has run")
    assert [line.partition(" ")[2] for line in lines(path)] == ["ValueError alone"]


def test_a_member_adds_to_its_chord(farm: Farm) -> None:
    result = chord([extends.s(2), add.s(1, 1)])(same.s())
    assert result.get(timeout=LIMIT) == [2, 2, 100, 101]
    alone = extends.delay(1)
    with pytest.raises(Exception, match="no member of a group"):
        alone.get(timeout=LIMIT)


def test_stamps_and_headers_reach_the_task(farm: Farm) -> None:
    whole = group(stamps.s(), stamps.s())
    whole.stamp(color="red")
    ((names, values, trace), _) = whole.apply_async(headers={"trace": "x"}).get(timeout=LIMIT)
    assert (names, values, trace) == (["color"], {"color": "red"}, "x")


def test_a_canvas_without_a_task_of_ours_is_celerys(farm: Farm) -> None:
    app = Celery("elsewhere", broker="memory://", set_as_current=False)
    plain = app.task(plain_add.run, name="elsewhere.add")
    before = farm.counts()
    chain(plain.s(1, 2), plain.s(3))()
    assert farm.counts() == before
