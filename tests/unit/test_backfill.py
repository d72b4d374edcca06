"""Room for a task that does not fit: when there will be enough, who keeps it, what may run until then."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aque.backfill import Busy, Forecast, Load, expected_end, forecast, is_overtaken, keeper, may_fill, smallest
from aque.resources import Capacity


def cpus(number: int, memory: int = 0, gpus: int = 0) -> Capacity:
    return Capacity(Fraction(number), memory, resources={"gpu": gpus} if gpus else {})


def test_a_task_fits_when_enough_of_what_runs_has_ended_and_the_rest_is_spare() -> None:
    running = [Busy(cpus(2), 30.0), Busy(cpus(3), 10.0), Busy(cpus(2), 20.0)]
    assert forecast(cpus(1), cpus(1), running, 5.0) == Forecast(5.0, cpus(0))
    assert forecast(cpus(5), cpus(1), running, 5.0) == Forecast(20.0, cpus(1))
    assert forecast(cpus(8), cpus(1), running, 5.0) == Forecast(30.0, cpus(0))
    assert forecast(cpus(9), cpus(1), running, 5.0) == Forecast(math.inf, Capacity())


def test_where_nobody_knows_an_end_there_is_spare_room_but_no_time() -> None:
    running = [Busy(cpus(4)), Busy(cpus(2), 9.0)]
    assert forecast(cpus(5), cpus(2), running, 0.0) == Forecast(math.inf, cpus(3))


def test_every_kind_of_resource_is_waited_for() -> None:
    running = [Busy(cpus(1, memory=8), 10.0), Busy(cpus(1, gpus=1), 20.0)]
    assert forecast(cpus(1, memory=9, gpus=1), cpus(4, memory=2), running, 0.0) == Forecast(20.0, cpus(5, memory=1))


@given(st.lists(st.tuples(st.integers(1, 8), st.floats(1, 100)), max_size=8), st.integers(0, 8), st.integers(1, 64))
def test_at_the_forecast_the_task_fits_and_a_moment_before_it_did_not(
    running: list[tuple[int, float]], free: int, need: int
) -> None:
    found = forecast(cpus(need), cpus(free), [Busy(cpus(n), end) for n, end in running], 0.0)
    if math.isinf(found.at):
        assert free + sum(n for n, _ in running) < need
        return
    assert free + sum(n for n, end in running if end <= found.at) >= need
    assert found.at == 0.0 or free + sum(n for n, end in running if end < found.at) < need


@pytest.mark.parametrize(
    ("started", "seconds", "now", "end"),
    [(100.0, 0.0, 150.0, math.inf), (100.0, 60.0, 150.0, 160.0), (100.0, 60.0, 170.0, 170.0)],
)
def test_a_late_task_is_expected_to_end_at_any_moment(started: float, seconds: float, now: float, end: float) -> None:
    assert expected_end(started, seconds, now) == end


def test_who_can_free_up_soonest_keeps_room_and_of_those_who_do_not_know_the_emptiest() -> None:
    early = Load(1, cpus(4), cpus(0), [Busy(cpus(4), 10.0)])
    late = Load(2, cpus(4), cpus(3), [Busy(cpus(4), 20.0)])
    unknown = [Load(3, cpus(4), cpus(1), [Busy(cpus(4))]), Load(4, cpus(4), cpus(2), [Busy(cpus(4))])]
    assert keeper([late, *unknown, early], 0.0) == 1
    assert keeper(unknown, 0.0) == 4
    assert keeper([], 0.0) is None


def test_only_a_task_of_known_length_fills_time_and_only_a_known_time() -> None:
    assert may_fill(cpus(1), 5.0, cpus(0), at=10.0, now=5.0) == "time"
    assert may_fill(cpus(1), 5.1, cpus(0), at=10.0, now=5.0) is None
    assert may_fill(cpus(1), 0.0, cpus(0), at=10.0, now=5.0) is None
    assert may_fill(cpus(1), 5.0, cpus(0), at=math.inf, now=5.0) is None
    assert may_fill(cpus(1), 0.0, cpus(1), at=math.inf, now=5.0) == "room"


def test_a_task_is_overtaken_where_smaller_ones_take_what_it_lacks() -> None:
    assert is_overtaken(cpus(8), cpus(3), smallest([cpus(1)]))
    assert not is_overtaken(cpus(8), cpus(3), smallest([cpus(8)]))
    assert not is_overtaken(cpus(1, gpus=1), cpus(3), smallest([cpus(1)]))  # they take CPUs, of which there are enough
    assert is_overtaken(cpus(1, gpus=2), cpus(3, gpus=1), smallest([cpus(1, gpus=1)]))
