"""The policy: never more than there is, in order, and a reason for everything that does not start."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aque import chooser
from aque.backfill import Forecast, Hold
from aque.chooser import Class, Place
from aque.resources import Capacity, CpuRequest
from aque.values import Pattern, ReadyTask, Requirement

GIB = 1 << 30
PLACE = Place("render07", "linux", frozenset({"celery"}), Capacity(Fraction(8), 16 * GIB, 4, 128))

cpu_texts = st.one_of(
    st.sampled_from(["all", "0", "1", "2", "0.25", "1.5", "/2", "50%"]), st.integers(1, 40).map(lambda n: f"1/{n}")
)
requirements = st.builds(
    Requirement,
    queue=st.just("celery"),
    pattern=st.sampled_from([Pattern.SHELL, Pattern.PYTHON]),
    cpus=cpu_texts,
    memory_bytes=st.integers(0, 20).map(lambda n: n * GIB),
)
places = st.builds(
    Place,
    host=st.just("render07"),
    platform=st.just("linux"),
    queues=st.just(frozenset({"celery"})),
    whole=st.builds(
        Capacity,
        st.one_of(st.integers(1, 256).map(Fraction), st.fractions(Fraction(1, 10), 64, max_denominator=10)),
        st.integers(0, 64).map(lambda n: n * GIB),
        st.integers(1, 64),
        st.integers(1, 1024),
    ),
)


Ready = dict[int, list[ReadyTask]]


def rows_of(tasks: Iterable[ReadyTask]) -> Ready:
    """Tasks by class, each class in order, as a worker reads them."""
    rows: Ready = {}
    for task in sorted(tasks, key=chooser.order):
        rows.setdefault(task.class_id, []).append(task)
    return rows


@st.composite
def ready_tasks(draw: st.DrawFn) -> tuple[Ready, dict[int, Requirement]]:
    """Ready tasks by class, and the classes."""
    classes = dict(enumerate(draw(st.lists(requirements, min_size=1, max_size=6)), start=1))
    tasks = [
        ReadyTask(
            task_id,
            draw(st.sampled_from(sorted(classes))),
            draw(st.integers(-3, 3)),
            draw(st.sampled_from([0.0, 1.0, 60.0])),
            "name",
        )
        for task_id in range(1, draw(st.integers(0, 40)) + 1)
    ]
    return rows_of(tasks), classes


def as_seen(classes: dict[int, Requirement], place: Place) -> dict[int, Class]:
    return {class_id: Class(chooser.need(requirement, place)) for class_id, requirement in classes.items()}


def total(needs: Sequence[Capacity]) -> Capacity:
    used = Capacity()
    for need in needs:
        used = used + need
    return used


@given(ready_tasks(), places, st.integers(0, 50))
def test_a_worker_never_promises_more_than_it_has_and_leaves_nothing_out_that_fits(
    ready: tuple[Ready, dict[int, Requirement]], place: Place, limit: int
) -> None:
    rows, requirements = ready
    classes = as_seen(requirements, place)
    choice = chooser.choose(rows, classes, place.whole, limit)
    used = total([classes[task.class_id].need for task in choice.start])
    assert used + choice.free == place.whole
    assert not choice.free.is_overdrawn
    assert len({task.id for task in choice.start}) == len(choice.start) <= limit
    assert choice.start == sorted(choice.start, key=chooser.order)
    if len(choice.start) < limit:
        left = {task.class_id for row in rows.values() for task in row if task not in choice.start}
        assert all(choice.free.lacking(classes[class_id].need) is not None for class_id in left)
        assert {blocked.task.class_id for blocked in choice.blocked} == left


@given(ready_tasks(), places)
def test_a_task_waits_only_if_it_did_not_fit_beside_those_before_it(
    ready: tuple[Ready, dict[int, Requirement]], place: Place
) -> None:
    rows, requirements = ready
    classes = as_seen(requirements, place)
    choice = chooser.choose(rows, classes, place.whole, 1000)
    free = place.whole
    for task in sorted((task for row in rows.values() for task in row), key=chooser.order):
        fits = free.lacking(classes[task.class_id].need) is None
        assert fits == (task in choice.start)
        if fits:
            free = free - classes[task.class_id].need


@given(st.integers(1, 1000), st.integers(1, 512), st.integers(1, 3))
def test_n_tasks_of_one_nth_fit_exactly_n_times(n: int, cpus: int, divisor: int) -> None:
    place = Place("here", "linux", frozenset({"celery"}), Capacity(Fraction(cpus, divisor), GIB, 1001, 0))
    need = chooser.need(Requirement("celery", Pattern.PYTHON, f"1/{n}"), place)
    row = [ReadyTask(task_id, 1, 0, 0.0, "name") for task_id in range(1, n + 3)]
    choice = chooser.choose({1: row}, {1: Class(need)}, place.whole, 2000)
    assert ([task.id for task in choice.start], choice.free.cpus) == (list(range(1, n + 1)), 0)


@given(requirements, places)
def test_what_a_worker_can_never_run_says_why_and_everything_else_runs_on_it_when_it_is_idle(
    requirement: Requirement, place: Place
) -> None:
    need = chooser.need(requirement, place)
    reason = chooser.why_never(requirement, place)
    choice = chooser.choose({1: [ReadyTask(1, 1, 0, 0.0, "name")]}, {1: Class(need)}, place.whole, 1)
    assert bool(choice.start) == (reason is None)
    assert (chooser.why_nowhere(requirement, [place]) is None) == (reason is None)


def test_order_is_priority_then_expected_duration_then_id() -> None:
    tasks = [
        ReadyTask(1, 1, 0, 0.0, "a"),
        ReadyTask(2, 1, 0, 0.0, "a"),
        ReadyTask(3, 1, 0, 60.0, "a"),
        ReadyTask(4, 1, -1, 900.0, "a"),
        ReadyTask(5, 1, 7, 0.0, "a"),
    ]
    assert [task.id for task in sorted(tasks, key=chooser.order)] == [5, 3, 1, 2, 4]


def test_a_task_that_does_not_fit_does_not_hold_up_smaller_ones_of_another_class() -> None:
    classes = {1: cpus(4), 2: cpus(1)}
    rows = rows_of([ReadyTask(1, 1, 9, 0.0, "large"), *(ReadyTask(n, 2, 0, 0.0, "small") for n in range(2, 9))])
    choice = chooser.choose(rows, classes, Capacity(Fraction(3)), 64)
    assert [task.id for task in choice.start] == [2, 3, 4]
    assert [(b.task.id, b.why) for b in choice.blocked] == [
        (1, "needs 4 cpus, there are 3"),
        (5, "needs 1 cpus, there are 0"),
    ]


def test_where_not_all_of_a_class_was_read_nothing_starts_that_might_stand_behind_the_rest() -> None:
    classes = {1: cpus(1), 2: cpus(1)}
    rows = rows_of([ReadyTask(1, 1, 5, 0.0, ""), ReadyTask(2, 1, 5, 0.0, ""), ReadyTask(3, 2, 0, 0.0, "")])
    everything = chooser.choose(rows, classes, Capacity(Fraction(4)), 64)
    assert (started(everything), everything.is_cut) == ([1, 2, 3], False)
    first = chooser.choose(rows, classes, Capacity(Fraction(4)), 64, cut={1})
    assert (started(first), first.is_cut) == ([1, 2], True)
    full = chooser.choose(rows, classes, Capacity(Fraction(1)), 64, cut={1})
    assert (started(full), full.is_cut) == ([1], False)
    beside = Hold(9, 5, Forecast(0.0, Capacity()))
    refused = chooser.choose(rows, classes, Capacity(Fraction(4)), 64, cut={1}, hold=beside)
    assert (started(refused), refused.is_cut) == ([], False)


def cpus(number: int | str | Fraction, **more: Any) -> Class:
    return Class(Capacity(Fraction(number)), **more)


def started(choice: chooser.Choice) -> list[int]:
    return [task.id for task in choice.start]


# -- users, files, limits ----------------------------------------------------------------------------------------------


def test_of_equal_priorities_the_user_with_the_fewest_cpus_running_is_next() -> None:
    classes = {1: cpus(1, user="anna"), 2: cpus(1, user="bob")}
    rows = rows_of(
        [ReadyTask(n, 1, 0, 0.0, "") for n in range(1, 7)] + [ReadyTask(n, 2, 0, 0.0, "") for n in (7, 8, 9)]
    )
    running = {"anna": Fraction(2)}
    assert started(chooser.choose(rows, classes, Capacity(Fraction(6)), 64, usage=running)) == [7, 8, 1, 9, 2, 3]
    assert started(chooser.choose(rows, classes, Capacity(Fraction(6)), 64)) == [1, 2, 3, 4, 5, 6]
    urgent = rows_of([ReadyTask(1, 1, 1, 0.0, ""), ReadyTask(7, 2, 0, 0.0, "")])
    assert started(chooser.choose(urgent, classes, Capacity(Fraction(1)), 64, usage=running)) == [1]


def test_of_equal_priorities_tasks_whose_files_are_cheaper_here_start_first_whatever_their_length() -> None:
    classes = {1: cpus(1, cost=2), 2: cpus(1, cost=0), 3: cpus(1, cost=1)}
    tasks = [
        ReadyTask(1, 1, 0, 90.0, ""),
        ReadyTask(2, 2, 0, 1.0, ""),
        ReadyTask(3, 2, 0, 5.0, ""),
        ReadyTask(4, 3, 0, 0.0, ""),
    ]
    everything = Capacity(Fraction(4))
    assert started(chooser.choose(rows_of(tasks), classes, everything, 64)) == [3, 2, 4, 1]
    urgent = [ReadyTask(5, 1, 1, 0.0, ""), *tasks]
    assert started(chooser.choose(rows_of(urgent), classes, everything, 64)) == [5, 3, 2, 4]


def test_no_more_start_than_a_limit_has_free_and_others_go_on() -> None:
    classes = {
        1: cpus(0, limits={"nuke": 2}),
        2: cpus(0, limits={"nuke": 1}),
        3: cpus(0),
        4: cpus(0, limits={"unset": 9}),
    }
    rows = rows_of([ReadyTask(n, n % 4 + 1, 0, 0.0, "") for n in range(16)])
    choice = chooser.choose(rows, classes, Capacity(), 64, tokens={"nuke": 5})
    taken = sum(classes[task.class_id].limits.get("nuke", 0) for task in choice.start)
    assert taken == 5
    assert {task.class_id for task in choice.start} >= {3, 4}
    assert {blocked.why for blocked in choice.blocked} == {
        "limit nuke: needs 2, 0 of it free",
        "limit nuke: needs 1, 0 of it free",
    }
    assert not any(blocked.lacks_capacity for blocked in choice.blocked)
    large = chooser.choose(
        rows_of([ReadyTask(1, 5, 0, 0.0, "")]), {5: cpus(9, limits={"nuke": 1})}, Capacity(), 9, tokens={"nuke": 0}
    )
    assert not large.blocked[0].lacks_capacity  # nobody shall keep room for what could not start even then


def test_a_task_with_files_waits_a_moment_for_the_host_where_its_input_was_made() -> None:
    tasks = [
        ReadyTask(1, 1, 0, 0.0, "", ready_at=100.0, near_host="far"),
        ReadyTask(2, 1, 0, 0.0, "", ready_at=98.5, near_host="far"),
        ReadyTask(3, 1, 0, 0.0, "", ready_at=97.0, near_host="far"),
        ReadyTask(4, 1, 0, 0.0, "", ready_at=100.0, near_host="here"),
        ReadyTask(5, 1, 0, 0.0, "", ready_at=100.0),
    ]
    here, until = chooser.at_home(tasks, "here", 100.0, 3.0)
    assert ([task.id for task in here], until) == ([3, 4, 5], 101.5)
    elsewhere, until = chooser.at_home(tasks, "far", 100.0, 3.0)
    assert ([task.id for task in elsewhere], until) == ([1, 2, 3, 5], 103.0)


# -- room for what would starve ----------------------------------------------------------------------------------------

BIG = ReadyTask(1, 1, 0, 0.0, "big", ready_at=0.0)
BIG_AND_SMALL = {1: cpus(8), 2: cpus(1)}


def held(at: float, spare: int, priority: int = 0) -> Hold:
    return Hold(BIG.id, priority, Forecast(at, Capacity(Fraction(spare))))


def test_who_waits_long_while_smaller_ones_start_is_starving_and_nobody_else() -> None:
    small = [ReadyTask(n, 2, 0, 1.0, "small", ready_at=0.0) for n in range(2, 9)]
    rows = rows_of([BIG, *small])
    choice = chooser.choose(rows, BIG_AND_SMALL, Capacity(Fraction(3)), 64)

    def starving(now: float, among: Ready = rows) -> list[int]:
        return [task.id for task in chooser.starving(among, BIG_AND_SMALL, choice, list, now, 10.0)]

    assert starving(9.9) == []
    assert starving(10.0) == [1]  # not the small ones that wait too: none is smaller than they
    only_big = chooser.choose({1: [BIG]}, BIG_AND_SMALL, Capacity(Fraction(3)), 64)
    needs = lambda: [Capacity(Fraction(1))] * 5  # noqa: E731
    assert chooser.starving({1: [BIG]}, BIG_AND_SMALL, only_big, needs, 10.0, 10.0) == [BIG]
    assert chooser.starving({1: [BIG]}, BIG_AND_SMALL, only_big, list, 10.0, 10.0) == []


def test_the_highest_priority_then_the_oldest_gets_room_first() -> None:
    classes = {1: cpus(8), 2: cpus(7), 3: cpus(6), 4: cpus(1)}
    tasks = [
        ReadyTask(1, 1, 0, 9.0, "", ready_at=3.0),
        ReadyTask(2, 2, 0, 0.0, "", ready_at=1.0),
        ReadyTask(3, 3, 5, 0.0, "", ready_at=4.0),
        ReadyTask(4, 1, 0, 0.0, "", ready_at=2.0),
        ReadyTask(5, 4, 0, 0.0, "", ready_at=9.0),
    ]
    choice = chooser.choose(rows_of(tasks), classes, Capacity(Fraction(1)), 64)
    assert [task.id for task in chooser.starving(rows_of(tasks), classes, choice, list, 100.0, 10.0)] == [3, 2, 4]


def test_beside_a_hold_starts_only_what_has_ended_by_then_or_fits_beside_it() -> None:
    small = [
        ReadyTask(2, 2, 0, 30.0, ""),
        ReadyTask(3, 2, 0, 5.0, ""),
        ReadyTask(4, 2, 0, 0.0, ""),
        ReadyTask(5, 2, 0, 9.0, ""),
    ]
    rows = rows_of([BIG, *small])
    free = Capacity(Fraction(4))
    in_time = chooser.choose(rows, BIG_AND_SMALL, free, 64, now=100.0, hold=held(109.0, 0))
    assert started(in_time) == [5, 3]
    assert [b.task.id for b in in_time.blocked if b.why == "room is kept for task 1"] == [2]  # its class's best, once
    assert started(chooser.choose(rows, BIG_AND_SMALL, free, 64, now=100.0, hold=held(105.0, 1))) == [2, 3]
    assert started(chooser.choose(rows, BIG_AND_SMALL, free, 64, now=100.0, hold=held(math.inf, 2))) == [2, 5]


def test_a_higher_priority_does_not_care_for_a_hold_and_the_held_task_is_the_first_of_its_own() -> None:
    urgent = ReadyTask(9, 2, 1, 900.0, "")
    rows = rows_of([BIG, urgent, ReadyTask(2, 2, 0, 900.0, "")])
    assert started(chooser.choose(rows, BIG_AND_SMALL, Capacity(Fraction(4)), 64, hold=held(5.0, 0))) == [9]
    assert started(chooser.choose(rows, BIG_AND_SMALL, Capacity(Fraction(9)), 64, hold=held(0.0, 1))) == [9, 1]


@given(ready_tasks(), places, st.floats(0, 100), st.integers(0, 8))
def test_with_a_hold_no_worker_promises_more_than_it_has(
    ready: tuple[Ready, dict[int, Requirement]], place: Place, at: float, spare: int
) -> None:
    rows, requirements = ready
    classes = as_seen(requirements, place)
    choice = chooser.choose(rows, classes, place.whole, 1000, hold=Hold(1, 0, Forecast(at, Capacity(Fraction(spare)))))
    assert total([classes[task.class_id].need for task in choice.start]) + choice.free == place.whole
    assert not choice.free.is_overdrawn


@pytest.mark.parametrize(
    ("globs", "host", "matches"),
    [
        ("", "a", True),
        ("render*", "render07", True),
        ("render*", "gate", False),
        ("a,b", "b", True),
        ("!gate", "render07", True),
        ("!gate", "gate", False),
        ("render*,!render07", "render07", False),
        (" render* , !x ", "render07", True),
        ("render0[1-3]", "render02", True),
        (",", "a", True),
    ],
)
def test_hosts_are_globs_and_an_exclusion_wins(globs: str, host: str, matches: bool) -> None:
    assert chooser.matches_host(globs, host) is matches


@pytest.mark.parametrize(
    ("requirement", "sentence"),
    [
        (Requirement("other", Pattern.SHELL), "queue 'other' is not served"),
        (Requirement("celery", Pattern.SHELL, host="gate"), "host render07 is not one of gate"),
        (Requirement("celery", Pattern.SHELL, platform="darwin"), "platform is linux, not darwin"),
        (Requirement("celery", Pattern.SHELL, tags="ssd"), "has no tag ssd"),
        (Requirement("celery", Pattern.SHELL, tags="!old"), "has the tag old, which it must not"),
        (Requirement("celery", Pattern.SHELL, user="ann"), "user is bob, who cannot run tasks of ann"),
        (
            Requirement("celery", Pattern.SHELL, requires_paths=(b"/there", b"/shots")),
            "/shots is required: not mounted",
        ),
        (Requirement("celery", Pattern.SHELL, cpus="9"), "needs 9 cpus, there are 8"),
        (Requirement("celery", Pattern.SHELL, memory_bytes=17 * GIB), "needs 17G memory, there is 16G"),
    ],
)
def test_a_worker_says_why_it_can_never_run_a_task(requirement: Requirement, sentence: str) -> None:
    place = replace(PLACE, user="bob", tags=frozenset({"old"}), missing_paths={b"/shots": "not mounted"})
    assert chooser.why_never(requirement, place) == sentence


def test_a_worker_that_switches_users_runs_tasks_of_others() -> None:
    wanted = Requirement("celery", Pattern.SHELL, user="ann")
    assert chooser.why_never(wanted, replace(PLACE, user="root", switches_user=True)) is None


def test_a_farm_says_why_no_worker_can_run_a_task() -> None:
    small = Place("small", "linux", frozenset({"celery"}), Capacity(Fraction(2), GIB, 2, 32))
    needs_9 = Requirement("celery", Pattern.SHELL, cpus="9")
    assert chooser.why_nowhere(needs_9, []) == "no live worker"
    assert chooser.why_nowhere(needs_9, [small, PLACE]) == "unsatisfiable: needs 9 cpus, largest worker has 8"
    assert chooser.why_nowhere(Requirement("x", Pattern.SHELL), [PLACE]) == "no worker serves queue 'x'"
    assert chooser.why_nowhere(Requirement("celery", Pattern.SHELL, cpus="8"), [small, PLACE]) is None
    mac = Requirement("celery", Pattern.SHELL, platform="darwin")
    assert chooser.why_nowhere(mac, [small, PLACE]) == "unsatisfiable: platform is linux, not darwin"
    both = chooser.why_nowhere(
        Requirement("celery", Pattern.SHELL, cpus="4", tags="ssd"), [replace(small, tags=frozenset({"ssd"})), PLACE]
    )
    assert both == "unsatisfiable: no worker has all that it asks for (has no tag ssd; needs 4 cpus, there are 2)"


def test_a_python_task_takes_a_child_of_the_pool_and_a_free_command_a_place_of_its_own() -> None:
    assert chooser.need(Requirement("celery", Pattern.PYTHON, "0"), PLACE) == Capacity(python_slots=1)
    assert chooser.need(Requirement("celery", Pattern.SHELL, "0"), PLACE) == Capacity(command_slots=1)
    assert chooser.need(Requirement("celery", Pattern.SHELL, "/4"), PLACE) == Capacity(Fraction(2))


@given(st.lists(st.floats(0, 0.2), max_size=300), st.integers(0, 200), st.integers(1, 64))
def test_only_short_tasks_and_no_more_than_a_moment_of_work_are_claimed_ahead(
    seconds: list[float], buffered: int, places: int
) -> None:
    row = [ReadyTask(n, 1, 0, 0.0, str(n)) for n in range(len(seconds))]
    chosen = chooser.ahead({1: row}, {1: cpus(1)}, {}, None, lambda name: seconds[int(name)], buffered, places)
    assert all(seconds[task.id] <= chooser.SHORT_SECONDS for task in chosen)
    assert sum(seconds[task.id] for task in chosen) <= chooser.BUFFER_SECONDS * places
    assert len(chosen) + buffered <= max(chooser.BUFFER_TASKS, buffered)


def test_nothing_is_claimed_ahead_whose_run_time_nobody_knows() -> None:
    row = [ReadyTask(n, 1, 0, 0.0, "new") for n in range(5)]
    assert chooser.ahead({1: row}, {1: cpus(1)}, {}, None, lambda name: None, 0, 4) == []


def test_nothing_is_claimed_ahead_of_what_has_a_better_right_to_the_place() -> None:
    short = [ReadyTask(n, 1, 0, 0.0, "short") for n in range(10, 20)]
    classes = {
        1: cpus(1),
        2: cpus(1),
        3: cpus(1, limits={"nuke": 1}),
        4: Class(Capacity(Fraction(1), resources={"gpu": 1})),
    }
    seconds = {"short": 0.01}.get

    def ahead(*tasks: ReadyTask, tokens: int = 1) -> int:
        return len(chooser.ahead(rows_of([*short, *tasks]), classes, {"nuke": tokens}, None, seconds, 0, 1))

    assert ahead() == 10
    assert ahead(ReadyTask(1, 2, 10, 0.0, "unknown")) == ahead(ReadyTask(1, 1, 0, 5.0, "long")) == 0
    assert ahead(ReadyTask(1, 4, 10, 0.0, "unknown")) == 0
    assert ahead(ReadyTask(1, 3, 10, 0.0, "short")) == 0
    assert ahead(ReadyTask(1, 3, 10, 0.0, "short"), tokens=0) == 10  # that one cannot start now anyway
    assert ahead(ReadyTask(15, 2, 0, 0.0, "unknown")) == 5


def test_what_is_claimed_ahead_is_shared_among_users_too() -> None:
    classes = {1: cpus(1, user="anna"), 2: cpus(1, user="bob")}
    rows = rows_of(
        [ReadyTask(n, 1, 0, 0.0, "") for n in range(50)] + [ReadyTask(n, 2, 0, 0.0, "") for n in range(50, 60)]
    )
    chosen = chooser.ahead(rows, classes, {}, {"anna": Fraction(2)}, lambda name: 0.01, 0, 1)
    assert [task.class_id for task in chosen[:9]] == [2, 2, 1, 2, 1, 2, 1, 2, 1]


@given(st.integers(1, 1000))
def test_a_share_as_it_is_written_is_what_the_worker_reserves(n: int) -> None:
    need = chooser.need(Requirement("celery", Pattern.SHELL, f"1/{n}"), PLACE)
    assert need.cpus == CpuRequest.parse(f"/{n}").share(PLACE.whole.cpus) == Fraction(8, n)


def test_a_draining_worker_does_not_count_as_able_to_run() -> None:
    wanted = Requirement("celery", Pattern.SHELL)
    draining = replace(PLACE, draining=True)
    assert chooser.why_nowhere(wanted, [draining]) == "the worker that could run it is draining"
    assert chooser.why_nowhere(wanted, [draining, draining]) == "the workers that could run it are draining"
    assert chooser.why_nowhere(wanted, [draining, PLACE]) is None
    assert chooser.why_nowhere(Requirement("x", Pattern.SHELL), [draining]) == "no worker serves queue 'x'"
