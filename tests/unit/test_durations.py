"""Expected durations: what past runs say of tasks that nobody has said anything of."""

import pytest

from aque.durations import ALL, SIZED, Runs, RunTime, Tally, expected, key, multiple
from aque.errors import BadInput


def test_names_that_differ_in_their_numbers_are_one() -> None:
    assert key("frame_0012") == key("frame_7") == "frame_0"
    assert key("render") == "render"


def test_no_task_has_the_name_of_the_averages_over_all() -> None:
    assert {ALL, SIZED}.isdisjoint(key(name) for name in ("1", "0", "11", "render"))


def test_past_runs_of_the_same_name_say_how_long_it_will_take() -> None:
    known = {"frame_0": RunTime(40.0, None), ALL: RunTime(1.0, None)}
    assert expected("frame_13", 0, known) == 40.0
    assert expected("frame_13", 5000, known) == 40.0  # the size of the past runs is not known


def test_they_are_scaled_by_the_size_where_both_sizes_are_known() -> None:
    assert expected("copy", 3000, {"copy": RunTime(10.0, 1000.0)}) == 30.0
    assert expected("copy", 0, {"copy": RunTime(10.0, 1000.0)}) == 10.0


def test_a_new_name_takes_as_long_as_the_farm_takes_for_so_many_bytes() -> None:
    known = {ALL: RunTime(100.0, 5.0), SIZED: RunTime(8.0, 4000.0)}
    assert expected("new", 1000, known) == 2.0
    assert expected("new", 0, known) == 0.0
    assert expected("new", 1000, {}) == 0.0


@pytest.mark.parametrize(("text", "found"), [("2x", 2.0), (" 0.5X", 0.5), (".25x", 0.25), ("1000x", 1000.0)])
def test_a_multiple_is_read(text: str, found: float) -> None:
    assert multiple(text) == found


@pytest.mark.parametrize("text", ["", "x", "0x", "0.0x", "1000.1x", "-1x", "2", "2 xx", "1e3x", "nanx", "infx", "٢x"])
def test_what_is_no_multiple_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadInput, match="2x"):
        multiple(text)


def test_runs_are_collected_by_name_and_over_all() -> None:
    tally = Tally()
    tally.add("frame_1", 2.0, 0)
    tally.add("frame_2", 4.0, 600)
    assert sorted(tally.take(), key=lambda runs: runs.name) == [
        Runs(ALL, 2, 3.0, 1, 600.0),
        Runs(SIZED, 1, 4.0, 1, 600.0),
        Runs("frame_0", 2, 3.0, 1, 600.0),
    ]
    assert tally.take() == []


def test_what_was_taken_can_be_put_back_among_what_has_come_since() -> None:
    whole, parts = Tally(), Tally()
    for tally in (whole, parts):
        tally.add("a", 1.0, 0)
        tally.add("b", 2.0, 100)
    taken = parts.take()
    for tally in (whole, parts):
        tally.add("a", 3.0, 50)
    parts.put(taken)
    assert sorted(parts.take(), key=str) == sorted(whole.take(), key=str)


def test_many_runs_weigh_as_if_they_had_come_one_by_one() -> None:
    average = 10.0
    for _ in range(5):
        average += 0.3 * (2.0 - average)
    batch = Runs("x", 5, 2.0, 0, None)
    assert 10.0 + batch.weight * (2.0 - 10.0) == pytest.approx(average)
    assert Runs("x", 5, 2.0, 1, 7.0).io_weight == pytest.approx(0.3)
