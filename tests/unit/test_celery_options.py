"""What Celery's options of a call mean for a row: routes, times, limits, and those without effect."""

import inspect
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from celery import Celery
from celery.app.amqp import AMQP
from kombu import Exchange, Producer, Queue
from kombu.common import Broadcast

import aque
from aque.celery_options import is_broadcast, options_of
from aque.errors import BadInput


def app_with(**conf: Any) -> Celery:
    app = Celery("options", broker="memory://", set_as_current=False)
    app.conf.update(conf)
    return app


def asked(
    app: Celery, options: Mapping[str, Any] | None = None, name: str = "shop.pay", task: Any = None
) -> dict[str, Any]:
    return options_of(app, name, options or {}, task)


def by_name(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **_: Any) -> Any:
    """A router, as people write them."""
    return {"queue": "letters", "priority": 7} if name.startswith("mail.") else None


# -- the queue ------------------------------------------------------------------------------------------------------------


def test_without_a_route_it_is_the_default_queue() -> None:
    assert asked(app_with())["queue"] == "celery"
    assert asked(app_with(task_default_queue="shop"))["queue"] == "shop"


@pytest.mark.parametrize(
    "routes",
    [
        {"shop.pay": "money"},
        {"shop.pay": {"queue": "money"}},
        {"shop.*": {"queue": "money"}},
        ([(re.compile(r"shop\.(pay|refund)"), {"queue": "money"}), ("*", {"queue": "rest"})],),
        ({"mail.*": "letters"}, {"shop.*": "money"}),
    ],
)
def test_task_routes_name_the_queue_in_every_form_that_celery_has(routes: Any) -> None:
    assert asked(app_with(task_routes=routes))["queue"] == "money"


def test_a_route_may_say_more_than_the_queue_and_the_call_outweighs_it() -> None:
    app = app_with(task_routes=(by_name, {"shop.*": {"queue": "money", "time_limit": 60}}))
    assert asked(app, name="mail.send") == {"queue": "letters", "priority": 7}
    assert asked(app, {"priority": 1}, "mail.send") == {"queue": "letters", "priority": 1}
    assert asked(app)["time_limit"] == 60
    assert asked(app, {"queue": "now"})["queue"] == "now"


def test_the_tasks_own_queue_counts_unless_the_call_names_one() -> None:
    app = app_with(task_annotations={"options.annotated": {"queue": "noted"}})

    @app.task(name="options.annotated")  # type: ignore[untyped-decorator]
    def annotated() -> None: ...

    assert asked(app, task=annotated, name=annotated.name)["queue"] == "noted"
    assert asked(app, {"queue": "now"}, annotated.name, annotated)["queue"] == "now"


def test_an_exchange_and_a_routing_key_lead_to_the_queue_that_is_bound_to_them() -> None:
    media = Exchange("media", type="direct")
    news = Exchange("news", type="topic")
    queues = [
        Queue("videos", media, routing_key="video"),
        Queue("images", media, routing_key="image"),
        Queue("europe", news, routing_key="europe.#"),
        Queue("sports", news, routing_key="*.sports"),
    ]
    app = app_with(task_queues=queues)
    assert asked(app, {"exchange": "media", "routing_key": "image"})["queue"] == "images"
    assert asked(app, {"exchange": news, "routing_key": "europe.france.weather"})["queue"] == "europe"
    assert asked(app, {"exchange": "news", "routing_key": "asia.sports"})["queue"] == "sports"
    with pytest.raises(BadInput, match="europe and sports"):
        asked(app, {"exchange": "news", "routing_key": "europe.sports"})
    with pytest.raises(BadInput, match="no queue of task_queues"):
        asked(app, {"exchange": "media", "routing_key": "sound"})


def test_a_queue_that_the_app_does_not_know_is_fine_unless_it_says_otherwise_and_is_not_added_to_those_it_serves() -> (
    None
):
    app = app_with()
    assert asked(app, {"queue": "elsewhere"})["queue"] == "elsewhere"
    assert list(app.amqp.queues) == ["celery"]
    with pytest.raises(BadInput, match="'elsewhere'"):
        asked(app_with(task_create_missing_queues=False), {"queue": "elsewhere"})


def test_a_broadcast_has_no_queue() -> None:
    app = app_with(task_queues=[Queue("celery"), Broadcast("all")])
    assert asked(app, {"queue": "all"})["queue"] is None
    assert is_broadcast(app, "t", {"queue": "all"})
    assert not is_broadcast(app, "t", {})
    assert not is_broadcast(app_with(), "t", {})


# -- times, limits, priorities --------------------------------------------------------------------------------------------


def test_times_are_read_as_celery_reads_them() -> None:
    app = app_with()
    assert asked(app, {"eta": "2030-01-02T03:04:05"})["eta"] == datetime(2030, 1, 2, 3, 4, 5)
    assert asked(app, {"eta": datetime(2030, 1, 1, tzinfo=UTC)})["eta"].tzinfo is UTC
    assert asked(app, {"countdown": -3})["countdown"] == 0
    assert asked(app, {"expires": -3})["expires"] == 0
    assert "countdown" not in asked(app, {"countdown": None})
    with pytest.raises(BadInput, match="'tomorrow'"):
        asked(app, {"eta": "tomorrow"})


def test_a_task_s_limits_count_unless_the_call_clears_them() -> None:
    app = app_with(task_time_limit=30)

    @app.task(name="options.limited", soft_time_limit=20)  # type: ignore[untyped-decorator]
    def limited() -> None: ...

    found = asked(app, task=limited, name=limited.name)
    assert (found["time_limit"], found["soft_time_limit"]) == (30, 20)
    assert "time_limit" not in asked(app, {"time_limit": None}, limited.name, limited)
    assert asked(app, {"time_limit": 5}, limited.name, limited)["time_limit"] == 5


def test_what_has_no_column_is_kept_beside() -> None:
    found = asked(app_with(), {"headers": {"a": 1}, "stamped_headers": ["who"], "who": "me", "ignore_result": True})
    assert found["extra"] == {
        "headers": {"a": 1},
        "stamped_headers": ["who"],
        "stamps": {"who": "me"},
        "ignore_result": True,
    }


# -- Aque's own, and those without effect ---------------------------------------------------------------------------------


def test_aques_options_may_be_given_to_the_call_and_to_the_decorator_but_are_not_taken_from_a_class() -> None:
    app = app_with()

    class Base(app.Task):  # type: ignore[name-defined,misc]
        tags = ("something", "of", "the", "projects", "own")

    @app.task(base=Base, name="options.mine", cpus=0.5)  # type: ignore[untyped-decorator]
    def mine() -> None: ...

    assert asked(app, {"memory": "1G"}, mine.name, mine) == {"queue": "celery", "cpus": 0.5, "memory": "1G"}


def test_every_option_that_celery_and_kombu_have_is_accepted() -> None:
    app, seen = app_with(), set()
    for function in (Celery.send_task, AMQP.as_task_v2, Producer.publish, app.amqp.send_task_message):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is not parameter.VAR_KEYWORD:
                seen.add(name)
    others = {
        "self",
        "name",
        "args",
        "kwargs",
        "body",
        "create_sent_event",
        "message",
        "now",
        "timezone",
        "callbacks",
        "errbacks",
    }
    values = dict.fromkeys(seen - others)
    assert {"acks_late", "compression", "link", "retry_policy"} - set(values) == {"acks_late"}
    assert asked(app, values) == {"queue": "celery"}


def test_an_option_that_nobody_knows_is_refused() -> None:
    with pytest.raises(BadInput, match="prioritiy"):
        asked(app_with(), {"prioritiy": 3})


# -- setup ----------------------------------------------------------------------------------------------------------------


def test_what_the_app_has_configured_stays_however_it_has_and_whenever(
    environment: dict[str, str], monkeypatch: Any
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    here = {"broker_url": "memory://here", "worker_concurrency": 7, "task_default_queue": "mine"}
    before = Celery("before", set_as_current=False)
    before.config_from_object(here)
    after = Celery("after", set_as_current=False)
    aque.setup(before)
    aque.setup(after)
    after.config_from_object(here)
    for app in (before, after):
        assert {name: app.conf[name] for name in here} == here
    none = aque.setup(Celery("none", set_as_current=False))
    assert none.conf.broker_url.startswith("aque+sqlite:")
    none.config_from_object({"task_default_queue": "mine", "broker_url": None})
    assert none.conf.broker_url.startswith("aque+sqlite:")


def test_setup_says_what_it_does_not_take() -> None:
    with pytest.raises(BadInput, match=r"tasks='own'.* or tasks='all'.*'every'"):
        aque.setup(app_with(), tasks="every")
    with pytest.raises(BadInput, match="takes a Celery app, not 'shop'"):
        aque.setup("shop")  # type: ignore[arg-type]


def test_an_app_can_be_set_up_again_in_the_same_way_only() -> None:
    app = app_with()
    assert aque.setup(aque.setup(app, tasks="all"), tasks="all") is app
    with pytest.raises(BadInput, match="set up already, with tasks='all'"):
        aque.setup(app)
