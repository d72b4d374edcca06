"""What becomes of parcels and reports."""

import pytest
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from conftest import LIMIT, wait_until
from shop import celery_app
from shop.database import data, journal
from shop.reports import average, close_books, order_another, queue_of_reports, slow_report, week
from shop.shipping import drive_carefully, drive_for_ever, load_truck, pack, print_label, ship


def test_parcels_are_packed_one_by_one_and_sent_together():
    before = len(journal("sent"))
    assert sorted(ship({"kettle": 3, "pot": 4, "cup": 1}).get(timeout=LIMIT)) == ["8 by mail", "8 by pigeon"]
    assert [about for _, about in journal("sent")[before:]] == ["8"]
    assert (data() / "packed-pot").read_text() == "4"


def test_labels_are_printed_no_faster_than_the_printer_can():
    sent = [print_label.delay(n) for n in range(5)]
    assert sorted(one.get(timeout=LIMIT) for one in sent) == [0, 1, 2, 3, 4]
    times = sorted(at for at, _ in journal("label"))
    assert times[-1] - times[0] > 0.7  # 1 s for four after the first, less what starting differs


def test_a_truck_says_how_far_it_is():
    sent = load_truck.delay(4, "gate")
    wait_until(lambda: sent.state == "PROGRESS" and sent.info["loaded"] == 2)
    assert celery_app.AsyncResult(sent.id).info == {"loaded": 2, "of": 4}
    (data() / "gate").touch()
    assert sent.get(timeout=LIMIT) == 4
    assert sent.state == "SUCCESS"


def test_a_driver_is_asked_to_turn_back():
    assert drive_carefully.delay().get(timeout=LIMIT) == "turned back"


def test_a_driver_who_does_not_is_stopped():
    with pytest.raises(TimeLimitExceeded):
        drive_for_ever.delay().get(timeout=LIMIT)


def test_a_time_limit_may_be_in_the_configuration():
    with pytest.raises(SoftTimeLimitExceeded):
        slow_report.delay().get(timeout=LIMIT)


def test_many_calls_in_one():
    assert pack.starmap([("a", 1), ("b", 2)]).delay().get(timeout=LIMIT) == [1, 2]
    assert pack.chunks([("c", 1), ("d", 2), ("e", 3)], 2).delay().get(timeout=LIMIT) == [[1, 2], [3]]


def test_a_week_of_reports_can_be_asked_for_later():
    sent = week()
    sent.save()
    again = celery_app.GroupResult.restore(sent.id)
    assert again.get(timeout=LIMIT) == [f"report-day-{n}" for n in range(7)]
    assert again.successful()
    assert (data() / "report-day-3").read_text().startswith("day-3: ")


def test_reports_have_a_queue_of_their_own():
    assert queue_of_reports.delay().get(timeout=LIMIT) == "reports"
    assert queue_of_reports.apply_async(queue="shop").get(timeout=LIMIT) == "shop"


def test_a_task_may_call_another():
    report = order_another.delay("holiday").get(timeout=LIMIT)
    assert celery_app.AsyncResult(report).get(timeout=LIMIT) == "report-holiday"


def test_a_task_is_called_by_its_name():
    assert celery_app.send_task("books.close", (2026,), {"final": True}).get(timeout=LIMIT) == "2026 closed"
    assert close_books.delay(2027).get(timeout=LIMIT) == "2027 open"


def test_a_task_may_be_a_class():
    assert average.delay([1, 2, 6]).get(timeout=LIMIT) == 3.0


def test_arguments_are_checked_where_the_call_is_made():
    with pytest.raises(TypeError):
        pack.delay("too few")
