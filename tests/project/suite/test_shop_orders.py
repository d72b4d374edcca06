"""What becomes of orders."""

import pytest
from conftest import LIMIT, wait_until
from shop import celery_app
from shop.database import data, execute, journal
from shop.orders import (
    GatewayDown,
    OutOfStock,
    confirm,
    count_retries,
    forgettable,
    never_mind,
    pay,
    pay_by_hand,
    place,
    what_am_i,
)


@pytest.fixture(autouse=True)
def stock():
    execute("INSERT OR REPLACE INTO stock VALUES ('tea', 100)")


def state(order):
    rows = execute("SELECT state FROM orders WHERE id = ?", order)
    return rows[0][0] if rows else None


def lines(what, about):
    return [line for _, line in journal(what) if about in line]


def test_an_order_is_checked_paid_and_confirmed(order):
    assert place(order, "tea", 3).get(timeout=LIMIT) == {"order": order, "state": "confirmed"}
    assert state(order) == "confirmed"
    assert lines("mail", order) == [f"{order} thank you"]


def test_payment_is_tried_again_until_the_bank_answers(order):
    (data() / f"bank-{order}").write_text("2")
    before = len(lines("retry", "shop.orders.pay GatewayDown"))
    assert place(order, "tea", 1).get(timeout=LIMIT)["state"] == "confirmed"
    assert lines("paid", order) == [order]
    assert len(lines("retry", "shop.orders.pay GatewayDown")) == before + 2


def test_an_order_that_cannot_be_paid_is_given_up(order):
    (data() / f"bank-{order}").write_text("100")
    with pytest.raises(GatewayDown):
        place(order, "tea", 1).get(timeout=LIMIT)
    wait_until(lambda: state(order) == "GatewayDown")
    wait_until(lambda: lines("given up", order) == [f"{order} GatewayDown"])
    assert (data() / f"bank-{order}").read_text() == "96"  # one attempt and three retries
    assert lines("mail", order) == []


def test_an_order_without_stock_is_not_paid_and_the_error_is_the_shops_own(order):
    with pytest.raises(OutOfStock) as caught:
        place(order, "coffee", 1).get(timeout=LIMIT)
    assert str(caught.value) == "coffee"
    wait_until(lambda: lines("given up", order) == [f"{order} OutOfStock"])
    assert lines("paid", order) == []


def test_explicit_retries_count_and_end(order):
    (data() / f"bank-{order}").write_text("1")
    assert pay_by_hand.delay(order).get(timeout=LIMIT) == 1
    (data() / f"bank-{order}").write_text("100")
    with pytest.raises(GatewayDown):
        pay_by_hand.delay(order).get(timeout=LIMIT)
    assert (data() / f"bank-{order}").read_text() == "97"


def test_a_retry_may_change_its_arguments():
    before = len(journal("try"))
    assert count_retries.delay(2).get(timeout=LIMIT) == 2
    assert [about for _, about in journal("try")[before:]] == ["2", "1", "0"]


def test_hooks_of_a_base_class_are_called(order):
    sent = pay.delay(order)
    sent.get(timeout=LIMIT)
    wait_until(lambda: lines("success", sent.id))
    with pytest.raises(GatewayDown):
        (data() / f"bank-{order}").write_text("100")
        pay_by_hand.apply_async((order,)).get(timeout=LIMIT)
    wait_until(lambda: lines("failure", "shop.orders.pay_by_hand GatewayDown"))
    assert lines("return", "shop.orders.pay_by_hand FAILURE")
    assert lines("return", "shop.orders.pay SUCCESS")


def test_a_task_knows_its_request():
    sent = what_am_i.delay()
    found = sent.get(timeout=LIMIT)
    assert found == {
        "id": sent.id,
        "name": "shop.orders.what_am_i",
        "retries": 0,
        "queue": "shop",
        "trace": "suite",
        "is_eager": False,
    }


def test_an_id_of_the_callers_own_is_kept(order):
    sent = what_am_i.apply_async(task_id=f"order-{order}")
    assert sent.id == f"order-{order}"
    assert sent.get(timeout=LIMIT)["id"] == f"order-{order}"
    assert celery_app.AsyncResult(f"order-{order}").state == "SUCCESS"


def test_a_result_that_nobody_wants_is_not_kept(order):
    sent = forgettable.delay(order)
    wait_until(lambda: lines("forgettable", order))
    assert sent.get(timeout=LIMIT) is None
    assert celery_app.AsyncResult(sent.id).result is None


def test_a_task_may_say_that_nothing_comes_of_it(order):
    never_mind.delay()
    assert confirm.delay(order).get(timeout=LIMIT)["order"] == order


def test_an_order_waits_for_its_time_and_expires(order):
    late = confirm.apply_async((order, "late"), countdown=2, expires=1)
    later = confirm.apply_async((order, "later"), countdown=1)
    assert lines("mail", order) == []
    later.get(timeout=LIMIT)
    wait_until(lambda: late.state == "REVOKED")
    assert lines("mail", order) == [f"{order} later"]


def test_a_revoked_order_does_not_run(order):
    sent = confirm.apply_async((order,), countdown=2)
    sent.revoke()
    wait_until(lambda: sent.state == "REVOKED")
    assert lines("mail", order) == []


def test_beat_sweeps(beat):
    wait_until(lambda: len(journal("sweep")) >= 3)
    assert {about for _, about in journal("sweep")} == {"beat"}


def test_always_eager_calls_here(order):
    celery_app.conf.task_always_eager = True
    try:
        sent = what_am_i.delay()
        assert sent.result["is_eager"]
        assert place(order, "tea", 1).get()["state"] == "confirmed"
    finally:
        celery_app.conf.task_always_eager = False
