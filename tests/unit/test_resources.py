"""Reservations: exact, whatever the machine, and texts that are read as people mean them."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aque.errors import BadInput, BadReservation
from aque.resources import (
    Capacity,
    CpuRequest,
    format_amounts,
    format_cpus,
    format_memory,
    parse_indices,
    parse_limits,
    parse_memory,
    parse_resources,
    parse_tags,
)

machines = st.one_of(
    st.integers(1, 4096).map(Fraction),
    st.fractions(Fraction(1, 1000), 4096, max_denominator=1000),
)
amounts = st.fractions(0, 100, max_denominator=100)
own = st.dictionaries(st.sampled_from(["gpu", "nuke", "licence"]), st.integers(1, 9))
capacities = st.builds(Capacity, amounts, st.integers(0, 1 << 40), st.integers(0, 64), st.integers(0, 64), own)


@given(st.integers(1, 5000), machines)
def test_exactly_n_tasks_of_one_nth_fit_every_machine(n: int, machine: Fraction) -> None:
    share = CpuRequest.parse(f"1/{n}").share(machine)
    assert n * share == machine
    assert (n + 1) * share > machine


@given(st.integers(1, 300), machines)
def test_exactly_n_tasks_of_one_nth_fit_the_capacity_one_by_one(n: int, machine: Fraction) -> None:
    need, free = Capacity(CpuRequest.parse(f"/{n}").share(machine)), Capacity(machine)
    for _ in range(n):
        assert free.lacking(need) is None
        free = free - need
    assert free == Capacity()
    assert free.lacking(need) is not None


@given(st.integers(1, 100), machines)
def test_a_percentage_is_the_share_that_it_says(percent: int, machine: Fraction) -> None:
    assert CpuRequest.parse(f"{percent}%").share(machine) * 100 == percent * machine


@given(machines)
def test_all_is_the_whole_machine_and_nothing_is_nothing(machine: Fraction) -> None:
    assert CpuRequest.parse("all").share(machine) == machine
    assert CpuRequest.parse("0").share(machine) == 0
    assert CpuRequest.parse("100%").share(machine) == machine
    assert CpuRequest.parse("1/1").share(machine) == machine


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("1.5", "3/2"),
        (1.5, "3/2"),
        (2, "2"),
        (".5", "1/2"),
        (" 1 ", "1"),
        (0, "0"),
        (0.1, "1/10"),
        (Fraction(1, 4), "1/4"),
    ],
)
def test_a_number_of_cpus_is_the_same_on_every_machine(text: Any, cpus: str) -> None:
    for machine in (Fraction(1), Fraction(7, 3), Fraction(1000)):
        assert CpuRequest.parse(text).share(machine) == Fraction(cpus)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "x",
            "-1",
            "1,5",
            "1/0",
            "0/4",
            "5/4",
            "101%",
            "%",
            "nan",
            "inf",
            "1e3",
            "all of it",
            "1.",
            "1/2/3",
            "1/-2",
        ),
        *("½", "1 2", "1.0000000001", "10000000000", "1/10000000000"),
        *(None, True, [], b"1", float("nan"), Fraction(1, 3)),
    ],
)
def test_anything_else_is_refused_with_a_sentence_that_shows_how_to_write_it(text: Any) -> None:
    with pytest.raises(BadReservation, match="'1/4' or '25%'"):
        CpuRequest.parse(text)
    assert issubclass(BadReservation, BadInput)


@given(st.text(max_size=12))
def test_no_text_gives_anything_but_a_request_or_that_sentence(text: str) -> None:
    try:
        request = CpuRequest.parse(text)
    except BadReservation:
        return
    assert request.amount >= 0
    assert CpuRequest.parse(request.text) == request
    assert not request.is_share or request.amount <= 1


@given(capacities, capacities)
def test_what_was_reserved_and_given_back_is_what_there_was(whole: Capacity, need: Capacity) -> None:
    assert whole + need - need == whole
    assert (whole + need).lacking(need) is None


@given(capacities, capacities)
def test_what_does_not_fit_lacks_something_that_can_be_named(free: Capacity, need: Capacity) -> None:
    left = free - need
    fits = min(left.cpus, left.memory_bytes, left.python_slots, left.command_slots, *left.resources.values()) >= 0
    lacking = free.lacking(need)
    assert left.is_overdrawn == (not fits)
    assert not left.without_debts().is_overdrawn
    assert (lacking is None) == fits
    assert lacking is None or lacking.strip()


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), (512, 512), ("512M", 512 << 20), ("1.5G", 3 << 29), ("2GiB", 2 << 30), ("1 kb", 1024), ("3T", 3 << 40)],
)
def test_memory_is_read_as_people_write_it(text: Any, count: int) -> None:
    assert parse_memory(text) == count


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5.5", "1P", "G", "1e9", None, True, [], "9" * 40, "nan"])
def test_memory_that_cannot_be_read_is_refused(text: Any) -> None:
    with pytest.raises(BadReservation):
        parse_memory(text)


@given(st.integers(0, (1 << 62) - 1))
def test_memory_is_shown_so_that_it_is_read_back_the_same(count: int) -> None:
    assert parse_memory(format_memory(count)) == count


@pytest.mark.parametrize(("cpus", "text"), [("3/2", "1.5"), ("1/3", "0.333"), ("16", "16"), ("0", "0"), ("100", "100")])
def test_cpus_are_shown_short(cpus: str, text: str) -> None:
    assert format_cpus(Fraction(cpus)) == text


@pytest.mark.parametrize(
    ("free", "need", "sentence"),
    [
        ({"gpu": 2}, {"gpu": 2}, None),
        ({"gpu": 2}, {"gpu": 3}, "needs 3 gpu, there are 2"),
        ({"gpu": 1}, {"gpu": 2}, "needs 2 gpu, there is 1"),
        ({}, {"gpu": 1}, "needs 1 gpu, there are none"),
    ],
)
def test_what_a_site_has_of_its_own_is_counted_too(
    free: dict[str, int], need: dict[str, int], sentence: str | None
) -> None:
    assert Capacity(resources=free).lacking(Capacity(resources=need)) == sentence


def test_debts_of_every_kind_can_be_left_out() -> None:
    left = Capacity(Fraction(-1), -1, -1, -1, {"gpu": -1, "nuke": 1, "licence": 0})
    assert left.without_debts() == Capacity(resources={"nuke": 1})


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", {}),
        ("gpu=2", {"gpu": (0, 1)}),
        ("gpu=[1,3]", {"gpu": (1, 3)}),
        ("gpu=[0-2, 5],nuke=1", {"gpu": (0, 1, 2, 5), "nuke": (0,)}),
    ],
)
def test_a_worker_has_so_many_pieces_or_those_with_these_numbers(
    text: str, numbers: dict[str, tuple[int, ...]]
) -> None:
    assert parse_indices(text) == numbers


@pytest.mark.parametrize(
    "text",
    [
        "gpu",
        "gpu=",
        "gpu=0",
        "gpu=x",
        "gpu=[]",
        "gpu=[1,1]",
        "gpu=[3-1]",
        "gpu=[1-]",
        "gpu=[0-20000]",
        "gpu=1,gpu=2",
        "CPUs=1",
        "a b=1",
    ],
)
def test_pieces_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(BadReservation, match="gpu=2,nuke=4"):
        parse_indices(text)


@pytest.mark.parametrize(
    ("value", "amounts"),
    [("", {}), ("gpu", {"gpu": 1}), (" nuke=2 , gpu=1", {"nuke": 2, "gpu": 1}), ({"gpu": 3}, {"gpu": 3}), ({}, {})],
)
def test_amounts_are_read_from_text_and_from_mappings_and_shown_so_that_they_are_read_back(
    value: Any, amounts: dict[str, int]
) -> None:
    assert parse_resources(value) == parse_limits(value) == amounts
    assert parse_resources(format_amounts(amounts)) == amounts


@pytest.mark.parametrize(
    "value", ["gpu=0", "gpu=-1", "gpu=1.5", "gpu,gpu", "gpu=1000000", {"gpu": 0}, {"gpu": True}, 3, None]
)
def test_amounts_that_cannot_be_read_are_refused(value: Any) -> None:
    for parse in (parse_resources, parse_limits):
        with pytest.raises(BadReservation):
            parse(value)


def test_cpus_and_memory_are_no_resources_of_a_sites_own() -> None:
    for name in ("cpus", "CPU", "memory"):
        with pytest.raises(BadReservation, match="reserve it with the option"):
            parse_resources({name: 1})


def test_tags_are_sorted_and_each_is_there_once() -> None:
    assert parse_tags(" b, a,b,") == ("a", "b")
    with pytest.raises(BadReservation, match="64 letters"):
        parse_tags("a b")
