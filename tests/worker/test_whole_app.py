"""`aque.setup(app, tasks="all")`: every call of an existing app's tasks is a row, and its results are the table's."""

import importlib
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery, chain, group

import aque
from aque.backend import Backend
from aque.errors import BadInput, RemoteError
from aque.handles import Handle
from tests.servers import wait_until
from tests.worker import tasks
from tests.worker.brokers import BROKERS, Monitor, of_the_run
from tests.worker.farm import LIMIT_SECONDS as LIMIT
from tests.worker.farm import Farm

APP = "tests.worker.whole"


@pytest.fixture(scope="module", params=BROKERS)
def whole_farm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    directory = tmp_path_factory.mktemp("whole")
    with of_the_run(request, request.param, directory) as chosen, Farm(directory=directory, **chosen) as farm:
        farm.start_worker("-c", "2", "-E", app=APP, cpus=2)
        yield farm


@pytest.fixture
def farm(whole_farm: Farm) -> Iterator[Farm]:
    with whole_farm.entered():
        yield whole_farm
    whole_farm.kill_everything()
    assert whole_farm.findings() == []


@pytest.fixture
def whole(farm: Farm) -> Iterator[ModuleType]:
    """The app's module; other tests have their own idea of the current app afterwards."""
    from aque.celery_app import app as before

    module = importlib.import_module(APP)
    module.app.set_current()
    # Read with the first farm, and there are others.
    module.app.conf.update(broker_url=farm.bus_url, result_backend=f"aque+{farm.url}")
    module.app._pool = None
    for made in ("amqp", "events"):  # they remember the kind of broker
        vars(module.app).pop(made, None)
    yield module
    before.set_current()
    before.set_default()


def test_tasks_of_every_kind_run_from_the_table(farm: Farm, whole: ModuleType) -> None:
    sent = [whole.add.delay(1, 2), whole.named.delay("n"), whole.shared.delay(3), whole.as_class.delay(4)]
    assert [one.get(timeout=LIMIT) for one in sent] == [3, "n", 4, 40]
    assert [farm.state(one) for one in sent] == ["success"] * 4
    assert whole.named.s("s").apply_async().get(timeout=LIMIT) == "s"


def test_a_task_is_sent_by_its_name_whether_this_process_knows_it_or_not(farm: Farm, whole: ModuleType) -> None:
    assert whole.app.send_task("its.own.name", ("x",)).get(timeout=LIMIT) == "x"
    stranger = aque.setup(Celery("stranger", set_as_current=False), tasks="all")
    assert stranger.send_task("its.own.name", kwargs={"value": 5}).get(timeout=LIMIT) == 5
    with pytest.raises(RemoteError, match=r"its\.own\.nam.*its\.own\.name"):
        stranger.send_task("its.own.nam", (1,)).get(timeout=LIMIT)


def test_routes_lead_to_queues(farm: Farm, whole: ModuleType) -> None:
    waiting = whole.routed.delay()
    assert farm.row(waiting)["queue"] == "special"
    assert whole.routed.apply_async(queue="celery").get(timeout=LIMIT) == "celery"
    client = farm.client()
    farm.workers[0].wait_until_it_answers(client)
    client.control.add_consumer("special", reply=True, timeout=LIMIT, limit=1)
    assert waiting.get(timeout=LIMIT) == "special"


def test_a_broadcast_keeps_celerys_way_and_has_no_place_in_a_canvas(
    farm: Farm, whole: ModuleType, tmp_path: Path
) -> None:
    before = farm.counts()
    farm.workers[0].wait_until_it_answers(farm.client())  # what was told to everybody before is not for who comes later
    whole.told.delay(str(tmp_path / "told"))
    wait_until((tmp_path / "told").exists, LIMIT, "the worker was told")
    assert farm.counts() == before
    with pytest.raises(BadInput, match="every worker"):
        chain(whole.add.s(1, 1), whole.told.si("nowhere")).delay()
    assert farm.counts() == before


def test_canvases_of_an_apps_tasks_are_graphs(farm: Farm, whole: ModuleType) -> None:
    sent = chain(group(whole.add.s(n, n) for n in range(3)), whole.named.s()).delay()
    assert sent.get(timeout=LIMIT) == [0, 2, 4]
    assert farm.row(sent)["depends_on"]


def test_what_celery_has_built_in_runs(farm: Farm, whole: ModuleType) -> None:
    assert whole.shared.map([1, 2]).delay().get(timeout=LIMIT) == [2, 3]
    assert whole.add.starmap([(1, 2), (3, 4)]).delay().get(timeout=LIMIT) == [3, 7]
    assert whole.add.chunks([(1, 2), (3, 4)], 1).delay().get(timeout=LIMIT) == [[3], [7]]
    assert whole.app.tasks["celery.backend_cleanup"].delay().get(timeout=LIMIT) is None


def test_results_are_the_tables_whatever_backend_is_configured(farm: Farm, whole: ModuleType) -> None:
    app = whole.app
    assert isinstance(app.backend, Backend)
    assert app.conf.result_backend.startswith(f"aque+{farm.url.partition(':')[0]}:")
    sent = whole.add.delay(2, 2)
    sent.get(timeout=LIMIT)
    for found in (app.AsyncResult(sent.id), whole.add.AsyncResult(sent.id), pickle.loads(pickle.dumps(sent))):
        assert isinstance(found, Handle)
        assert (found.state, found.result) == ("SUCCESS", 4)
    both = group(whole.add.s(1, 1), whole.add.s(2, 2)).delay()
    assert app.GroupResult.restore(both.id).get(timeout=LIMIT) == [2, 4]


def test_that_another_backend_is_not_used_is_said(farm: Farm, caplog: pytest.LogCaptureFixture) -> None:
    app = aque.setup(Celery("said", backend="redis://user:secret@host/0", set_as_current=False), tasks="all")
    with caplog.at_level(logging.WARNING):
        assert app.conf.result_backend.startswith(f"aque+{farm.url.partition(':')[0]}:")
    assert "result backend redis of the configuration is not used" in caplog.text
    assert "secret" not in caplog.text


def test_models_are_arguments_and_results_as_celery_has_them(farm: Farm, whole: ModuleType) -> None:
    assert whole.mirrored.delay(whole.Point(x=1, y=2)).get(timeout=LIMIT) == {"x": -1, "y": -2}
    assert whole.mirrored.delay({"x": 3, "y": 4}).get(timeout=LIMIT) == {"x": -3, "y": -4}
    both = chain(whole.mirrored.s(whole.Point(x=5, y=6)), whole.mirrored.s()).delay()
    assert both.get(timeout=LIMIT) == {"x": 5, "y": 6}
    with pytest.raises(RemoteError, match="ValidationError"):
        whole.mirrored.delay({"x": "far"}).get(timeout=LIMIT)


def test_signals_tell_of_a_call_and_may_add_headers(farm: Farm, whole: ModuleType, monkeypatch: Any) -> None:
    monkeypatch.setenv("TEST_WHO", "me")
    whole.heard.clear()
    sent = whole.headers.apply_async(headers={"why": "because"})
    assert whole.heard == [("before", f"{APP}.headers"), ("after", sent.id)]
    assert sent.get(timeout=LIMIT) == {"who": "me", "why": "because"}
    assert chain(whole.headers.si(), whole.headers.si()).delay().get(timeout=LIMIT)["who"] == "me"


def test_task_sent_is_an_event(farm: Farm, whole: ModuleType) -> None:
    monitor = Monitor(farm.client())
    sent = whole.add.delay(1, 1)
    monitor.wait_for(sent, "task-sent")
    event = monitor.event(sent, "task-sent")
    assert (event["name"], event["queue"]) == (f"{APP}.add", "celery")
    monitor.end()


def test_a_task_that_calls_another_ends_when_its_function_does(farm: Farm, whole: ModuleType) -> None:
    other = whole.calls_another.delay(4).get(timeout=LIMIT)
    assert whole.app.AsyncResult(other).get(timeout=LIMIT) == 8


def test_an_id_of_ones_own_is_kept_and_one_of_digits_refused(farm: Farm, whole: ModuleType) -> None:
    mine = str(uuid4())
    assert whole.add.apply_async((1, 1), task_id=mine).id == mine
    assert whole.app.AsyncResult(mine).get(timeout=LIMIT) == 2
    with pytest.raises(BadInput, match="digits"):
        whole.add.apply_async((1, 1), task_id="12")


def test_arguments_are_checked_before_anything_is_submitted(farm: Farm, whole: ModuleType) -> None:
    before = farm.counts()
    with pytest.raises(TypeError, match="right"):
        whole.add.delay(1)
    with pytest.raises(BadInput, match="JSON"):
        whole.named.delay(object())
    assert farm.counts() == before


def test_always_eager_is_celerys_own(farm: Farm, whole: ModuleType) -> None:
    before = farm.counts()
    whole.app.conf.task_always_eager = True
    try:
        assert whole.add.delay(1, 1).get() == 2
        assert chain(whole.add.s(1, 1), whole.add.s(2)).delay().get() == 4
    finally:
        whole.app.conf.task_always_eager = False
    assert farm.counts() == before


def test_tasks_that_are_aques_own_are_sent_by_name_too_and_others_keep_their_way(farm: Farm) -> None:
    app = aque.setup(Celery("own", broker="memory://", set_as_current=False))

    app.finalize()
    sent = app.send_task(tasks.echo.name, (1,))
    assert isinstance(sent, Handle)
    assert sent.get(timeout=LIMIT) == 1
    before = farm.counts()
    app.send_task("another", (1,))
    assert farm.counts() == before
