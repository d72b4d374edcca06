"""Results as Celery's AsyncResult has them: waiting, states, what `.get()` raises, ids that are not there."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult, ResultSet

import aque
from aque import codec
from aque.celery_app import app
from aque.doorbell import _open_bells
from aque.errors import CommandFailed, RemoteError, UnknownTask
from aque.farm import farm_of
from aque.store.tables import progress
from aque.waiter import WINDOW, Waiter
from tests.servers import wait_until
from tests.worker import raising, tasks
from tests.worker.farm import LIMIT_SECONDS as LIMIT
from tests.worker.farm import ROOT, Farm

NOWHERE = "a queue that nobody serves"


@contextmanager
def setting(monkeypatch: pytest.MonkeyPatch, **values: str) -> Iterator[None]:
    """This process has these settings for a while."""
    with monkeypatch.context() as changed:
        for name, value in values.items():
            changed.setenv(f"AQUE_{name.upper()}", value)
        # A farm is opened once for each address, whatever the settings are later.
        changed.setattr("aque.farm._open", {})
        yield


# -- from any process -----------------------------------------------------------------------------------------------------


def test_another_process_that_has_the_url_gets_the_result(farm: Farm) -> None:
    task = tasks.add.delay(3, 4)
    program = (
        "from celery.result import AsyncResult, ResultSet\n"
        "from aque.celery_app import app\n"
        f"result = AsyncResult({task.id!r}, app=app)\n"
        "print(result.get(timeout=60), result.state, ResultSet([result], app=app).join())\n"
    )
    words = [sys.executable, "-c", program]
    ended = subprocess.run(words, capture_output=True, text=True, env=farm.environment, cwd=ROOT, check=False)
    assert (ended.stdout, ended.stderr) == ("7 SUCCESS [7]\n", "")


def test_fifty_threads_that_wait_have_one_listener(farm: Farm, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    waited_for = [
        tasks.started.delay(str(tmp_path / "started"), str(gate)),
        *(tasks.add.delay(i, 1) for i in range(49)),
    ]
    got: list[Any] = [None] * len(waited_for)
    waiter = farm_of(app).waiter

    def wait(number: int) -> None:
        got[number] = waited_for[number].get(timeout=LIMIT)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(len(waited_for))]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    assert got[1:] == list(range(1, 50))
    mine = [bell for bell in _open_bells if bell is waiter._bell]
    assert len(mine) == 1
    assert len(_open_bells) <= 1 + len(before_bells)
    gate.touch()
    threads[0].join()
    assert got[0] == 1


#: Those of other waiters of this process: the farms of earlier tests keep theirs for ten seconds.
before_bells: list[Any] = []


@pytest.fixture(autouse=True)
def _bells_before() -> None:
    before_bells[:] = list(_open_bells)


def test_who_waits_for_something_short_does_not_wait_for_who_leads(farm: Farm, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    long = tasks.started.delay(str(tmp_path / "started"), str(gate))
    leader = threading.Thread(target=lambda: long.get(timeout=LIMIT))
    leader.start()
    assert [tasks.add.delay(i, 1).get(timeout=LIMIT) for i in range(20)] == list(range(1, 21))
    assert leader.is_alive()
    gate.touch()
    leader.join()


def test_when_the_thread_that_listens_has_its_result_another_one_listens(farm: Farm, tmp_path: Path) -> None:
    gates = [tmp_path / f"gate{i}" for i in range(2)]
    each = [tasks.started.delay(str(tmp_path / f"s{i}"), str(gate)) for i, gate in enumerate(gates)]
    threads = [threading.Thread(target=task.get, kwargs={"timeout": LIMIT}) for task in each]
    for thread in threads:
        thread.start()
    for gate, thread in zip(gates, threads, strict=True):
        gate.touch()
        thread.join()
    assert [task.state for task in each] == ["SUCCESS", "SUCCESS"]


def test_a_look_asks_for_a_window_of_what_many_threads_wait_for_at_once(own_farm: Farm) -> None:
    """Counted, not timed: waiting for many is one query, whatever their number, until whole windows have ended."""
    waiting = Waiter(own_farm.store, own_farm.store.completed)
    many = [tasks.add.apply_async((1, 1), queue=NOWHERE).number for _ in range(3)]
    asked: list[list[int]] = []

    def look(connection: Any, ids: Any) -> dict[int, Any]:
        asked.append(list(ids))
        return own_farm.store.completed(connection, ids)

    waiting._ended = look
    assert list(waiting.wait(many, 0)) == [{}]
    assert asked == [many]
    asked.clear()
    assert list(waiting.wait(range(10**6, 10**6 + 5 * WINDOW), 0)) == [{}]
    assert [len(ids) for ids in asked] == [WINDOW]
    waiting.close()


def test_a_listener_that_is_not_used_is_closed_after_a_while(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aque.waiter.IDLE_SECONDS", 0.05)
    waiter = farm_of(app).waiter
    waiter.close()
    assert tasks.add.delay(1, 2).get(timeout=LIMIT) == 3
    wait_until(lambda: waiter._bell is None, LIMIT, "the listener is closed")
    assert tasks.add.delay(1, 3).get(timeout=LIMIT) == 4


# -- Celery's ways of waiting ---------------------------------------------------------------------------------------------


def test_get_raises_celerys_timeout_error_and_the_task_goes_on(farm: Farm, tmp_path: Path) -> None:
    task = tasks.started.delay(str(tmp_path / "started"), str(tmp_path / "gate"))
    with pytest.raises(CeleryTimeoutError, match=task.id):
        task.get(timeout=0.1)
    with pytest.raises(CeleryTimeoutError):
        task.wait(timeout=0)
    (tmp_path / "gate").touch()
    assert task.wait(timeout=LIMIT) == 1


def test_get_calls_back_and_can_return_the_error_in_place_of_raising_it(farm: Farm) -> None:
    calls: list[Any] = []
    messages: list[dict[str, Any]] = []
    task = tasks.add.delay(1, 2)
    task.get(timeout=LIMIT, callback=lambda *call: calls.append(call), on_message=messages.append, interval=0.01)
    assert calls == [(task.id, 3)]
    assert [(message["task_id"], message["status"]) for message in messages] == [(task.id, "SUCCESS")]
    assert isinstance(tasks.fail.delay().get(timeout=LIMIT, propagate=False), ValueError)


def test_a_set_of_results_joins_in_order_and_iterates_as_they_come(farm: Farm) -> None:
    found = ResultSet([tasks.add.delay(i, 0) for i in range(20)], app=app)
    assert found.join(timeout=LIMIT) == list(range(20))
    assert found.get(timeout=LIMIT) == list(range(20))
    assert (found.completed_count(), found.successful(), found.failed()) == (20, True, False)
    assert sorted(meta["result"] for _, meta in found.iter_native()) == list(range(20))
    with pytest.raises(ValueError, match="it went wrong"):
        ResultSet([tasks.fail.delay()], app=app).get(timeout=LIMIT)


def test_then_calls_back_without_anybody_waiting(farm: Farm) -> None:
    called: list[Any] = []
    good, bad = tasks.add.delay(1, 2), tasks.fail.delay()
    for task in (good, bad):
        task.then(lambda result: called.append((result.id, result.state)))
    wait_until(lambda: len(called) == 2, LIMIT, "both were called")
    assert sorted(called) == sorted([(good.id, "SUCCESS"), (bad.id, "FAILURE")])


# -- what a result tells --------------------------------------------------------------------------------------------------


def test_a_result_tells_what_celerys_tells(farm: Farm) -> None:
    task = tasks.add.delay(1, right=2)
    assert task.get(timeout=LIMIT) == 3
    assert (task.status, task.result, task.info, task.traceback, task.children) == ("SUCCESS", 3, 3, None, [])
    assert (task.name, task.retries, task.ready(), task.successful(), task.failed()) == (
        "tests.worker.tasks.add", 0, True, True, False,
    )  # fmt: skip
    assert abs(task.date_done.timestamp() - time.time()) < LIMIT
    assert (task.args, task.worker) == (None, None)  # as in Celery, without result_extended


def test_an_extended_result_tells_arguments_worker_and_queue(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(app.conf, "result_extended", True)
    task = tasks.add.delay(1, right=2)
    task.get(timeout=LIMIT)
    assert (task.args, task.kwargs, task.worker, task.queue) == ([1], {"right": 2}, "one@test", "celery")


def test_collect_follows_the_children_of_a_task(farm: Farm) -> None:
    task = tasks.submit_one_more.delay()
    child = str(task.get(timeout=LIMIT))
    farm.wait_for_state(int(child), "success")
    found = AsyncResult(task.id, app=app)
    assert [one.id for one in found.children] == [child]
    assert [one.id for one, _ in found.collect(timeout=LIMIT)] == [task.id, child]


def test_a_running_task_has_the_state_that_it_has_told(farm: Farm, tmp_path: Path) -> None:
    task = tasks.started.delay(str(tmp_path / "started"), str(tmp_path / "gate"))
    farm.wait_for_state(task, "running")
    assert (task.state, task.info) == ("STARTED", None)
    row = {"task_id": task.number, "attempt": 1, "state": "HALFWAY", "meta": b'{"done": 5}'}
    with farm.store.begin() as connection:
        connection.execute(sa.insert(progress), row)
    assert (task.state, task.info) == ("HALFWAY", {"done": 5})
    (tmp_path / "gate").touch()
    assert (task.get(timeout=LIMIT), task.state) == (1, "SUCCESS")


def test_forget_takes_the_result_and_leaves_the_task(farm: Farm) -> None:
    task = tasks.add.delay(1, 2)
    task.get(timeout=LIMIT)
    task.forget()
    again = tasks.add.AsyncResult(task.id)
    assert (again.state, again.get(timeout=LIMIT)) == ("SUCCESS", None)


def test_forget_takes_nothing_that_another_task_still_needs(farm: Farm) -> None:
    task = tasks.add.delay(1, 2)
    task.get(timeout=LIMIT)
    dependent = tasks.add.apply_async((task, 10), queue=NOWHERE)
    task.forget()
    assert tasks.add.AsyncResult(task.id).get(timeout=LIMIT) == 3
    dependent.kill()


# -- ids that are not there -----------------------------------------------------------------------------------------------

UNKNOWN = ["999999999", "a-celery-id-that-nobody-has"]


@pytest.mark.parametrize("task_id", UNKNOWN)
def test_an_unknown_id_is_pending_and_cannot_be_waited_for(farm: Farm, task_id: str) -> None:
    unknown = AsyncResult(task_id, app=app)
    assert (unknown.state, unknown.ready(), unknown.exists()) == ("PENDING", False, False)
    with pytest.raises(UnknownTask):
        unknown.get(timeout=LIMIT)
    waiting = tasks.add.apply_async((1, 1), queue=NOWHERE)
    assert (waiting.state, waiting.exists()) == ("PENDING", True)
    waiting.kill()


@pytest.mark.parametrize("task_id", UNKNOWN)
def test_an_unknown_id_can_be_an_error_everywhere(farm: Farm, monkeypatch: pytest.MonkeyPatch, task_id: str) -> None:
    with setting(monkeypatch, unknown_result="raise"):
        with pytest.raises(UnknownTask):
            _ = AsyncResult(task_id, app=app).state
        with pytest.raises(UnknownTask):
            AsyncResult(task_id, app=app).get(timeout=LIMIT)


def test_an_unknown_id_can_be_waited_for_until_somebody_submits_it(
    farm: Farm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine = f"mine-{time.monotonic_ns()}"
    with setting(monkeypatch, unknown_result="wait"):
        with pytest.raises(CeleryTimeoutError):
            AsyncResult(mine, app=app).get(timeout=0.1)
        got: list[Any] = []
        known = tasks.add.delay(0, 1)
        both = ResultSet([AsyncResult(mine, app=app), known], app=app)
        waiting = threading.Thread(target=lambda: got.extend(both.get(timeout=LIMIT)))
        waiting.start()
        tasks.add.apply_async((1, 1), task_id=mine)
        waiting.join()
    assert got == [2, 1]


# -- what get raises ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["arguments", "demanding", "keeping", "inner", "os", "unicode", "odd text", "noted"])
def test_an_exception_comes_back_as_it_was(farm: Farm, kind: str) -> None:
    expected = raising.odd_error(kind)
    task = raising.raise_odd.delay(kind)
    with pytest.raises(type(expected)) as raised:
        task.get(timeout=LIMIT)
    assert (str(raised.value), raised.value.args) == (str(expected), expected.args)
    assert vars(raised.value) == vars(expected)
    assert "raise odd_error(kind)" in str(raised.value.__cause__) and "raise odd_error(kind)" in task.traceback


@pytest.mark.parametrize("kind", ["raising", "local", "group"])
def test_an_exception_that_cannot_be_made_again_is_described(farm: Farm, kind: str) -> None:
    raising.Raising.made = 1
    with pytest.raises(RemoteError) as raised:
        raising.raise_odd.delay(kind).get(timeout=LIMIT)
    expected = {"raising": "Raising: text", "local": "Local: text", "group": "ExceptionGroup: several"}[kind]
    assert expected in str(raised.value)


def test_of_an_exception_that_holds_what_is_not_json_the_text_remains(farm: Farm) -> None:
    with pytest.raises(raising.NotOnlyText, match=r"text.*object object at"):
        raising.raise_odd.delay("not only text").get(timeout=LIMIT)


def test_the_text_of_an_exception_is_cut(farm: Farm) -> None:
    task = raising.raise_odd.delay("huge")
    with pytest.raises(ValueError, match=r"^x+$") as raised:
        task.get(timeout=LIMIT)
    assert len(str(raised.value)) == codec.ERROR_TEXT_LIMIT


def test_the_module_of_an_exception_is_loaded_in_a_store_of_ones_own_alone(farm: Farm) -> None:
    task = raising.raise_from_afar.delay()
    farm.wait_for_state(task, "error")
    sys.modules.pop("tests.worker.far_errors", None)
    if farm.url.startswith("sqlite"):
        with pytest.raises(Exception, match="far") as raised:
            task.get(timeout=LIMIT)
        assert (type(raised.value).__name__, raised.value.args) == ("Far", ("far", 3))
    else:
        with pytest.raises(RemoteError, match=r"tests\.worker\.far_errors\.Far"):
            task.get(timeout=LIMIT)
        assert "tests.worker.far_errors" not in sys.modules
    assert "the cause" in task.traceback


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "os.system"), ("builtins", "builtins.eval"), ("sys", "sys.exit"), ("", "builtins.SystemExit")],
)
def test_what_is_stored_as_an_error_calls_nothing_but_exceptions(farm: Farm, module: str, name: str) -> None:
    task = tasks.fail.delay()
    farm.wait_for_state(task, "error")
    forged = json.dumps({"type": name, "module": module, "args": '["touch /tmp/x"]', "state": "{}", "message": "m"})
    with farm.store.begin() as connection:
        connection.execute(
            sa.text("UPDATE aque_result SET error = :forged WHERE task_id = :id"),
            {"forged": forged.encode(), "id": task.number},
        )
    with pytest.raises(RemoteError, match=name):
        tasks.fail.AsyncResult(task.id).get(timeout=LIMIT)


def test_exceptions_under_another_interpreter_come_back_as_well(farm: Farm) -> None:
    task = raising.raise_odd.apply_async(("keeping",), interpreter=sys.executable)
    with pytest.raises(raising.Keeping, match="text") as raised:
        task.get(timeout=LIMIT)
    assert raised.value.code == 7


def test_a_failed_command_says_how(farm: Farm) -> None:
    with pytest.raises(CommandFailed, match="status 3"):
        aque.shell(["sh", "-c", "exit 3"]).get(timeout=LIMIT)


def test_a_process_ends_whatever_it_has_begun_to_wait_for(own_farm: Farm) -> None:
    program = (
        "import aque; from aque.celery_app import app; from aque.farm import farm_of\n"
        "task = aque.shell(['true']); kept = farm_of(app).waiter.wait([task.number]); next(kept)\n"
    )
    subprocess.run([sys.executable, "-c", program], env=own_farm.environment, cwd=ROOT, timeout=LIMIT, check=True)
