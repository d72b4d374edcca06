"""The policy: never more than there is, in order, and a reason for everything that does not start."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aque import chooser
from aque.chooser import Place
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


@st.composite
def ready_tasks(draw: st.DrawFn) -> tuple[list[list[ReadyTask]], dict[int, Requirement]]:
    """Rows of ready tasks, one per requirement class and each in order, and the classes."""
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
    rows = [sorted((t for t in tasks if t.class_id == class_id), key=chooser.order) for class_id in classes]
    return rows, classes


def total(needs: Sequence[Capacity]) -> Capacity:
    used = Capacity()
    for need in needs:
        used = used + need
    return used


@given(ready_tasks(), places, st.integers(0, 50))
def test_a_worker_never_promises_more_than_it_has_and_leaves_nothing_out_that_fits(
    ready: tuple[list[list[ReadyTask]], dict[int, Requirement]], place: Place, limit: int
) -> None:
    rows, classes = ready
    needs = {class_id: chooser.need(requirement, place) for class_id, requirement in classes.items()}
    chosen, free = chooser.choose(rows, place.whole, needs, limit)
    used = total([needs[task.class_id] for task in chosen])
    assert used + free == place.whole
    assert min(free.cpus, free.memory_bytes, free.python_slots, free.command_slots) >= 0
    assert len({task.id for task in chosen}) == len(chosen) <= limit
    assert chosen == sorted(chosen, key=chooser.order)
    if len(chosen) < limit:
        passed_over = {task.class_id for row in rows for task in row} if rows else set()
        left = {task.class_id for row in rows for task in row if task not in chosen} & passed_over
        assert all(free.lacking(needs[class_id]) is not None for class_id in left)


@given(ready_tasks(), places)
def test_a_task_waits_only_if_it_did_not_fit_beside_those_before_it(
    ready: tuple[list[list[ReadyTask]], dict[int, Requirement]], place: Place
) -> None:
    rows, classes = ready
    needs = {class_id: chooser.need(requirement, place) for class_id, requirement in classes.items()}
    chosen, _ = chooser.choose(rows, place.whole, needs, 1000)
    free = place.whole
    for task in sorted((task for row in rows for task in row), key=chooser.order):
        fits = free.lacking(needs[task.class_id]) is None
        assert fits == (task in chosen)
        if fits:
            free = free - needs[task.class_id]


@given(st.integers(1, 250), st.integers(1, 512), st.integers(1, 3))
def test_n_tasks_of_one_nth_fit_exactly_n_times(n: int, cpus: int, divisor: int) -> None:
    place = Place("here", "linux", frozenset({"celery"}), Capacity(Fraction(cpus, divisor), GIB, 1000, 0))
    need = chooser.need(Requirement("celery", Pattern.PYTHON, f"1/{n}"), place)
    row = [ReadyTask(task_id, 1, 0, 0.0, "name") for task_id in range(1, n + 3)]
    chosen, free = chooser.choose([row], place.whole, {1: need}, 1000)
    assert ([task.id for task in chosen], free.cpus) == (list(range(1, n + 1)), 0)


@given(requirements, places)
def test_what_a_worker_can_never_run_says_why_and_everything_else_runs_on_it_when_it_is_idle(
    requirement: Requirement, place: Place
) -> None:
    need = chooser.need(requirement, place)
    reason = chooser.why_never(requirement, place)
    chosen, _ = chooser.choose([[ReadyTask(1, 1, 0, 0.0, "name")]], place.whole, {1: need}, 1)
    assert bool(chosen) == (reason is None)
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
    needs = {1: Capacity(Fraction(4)), 2: Capacity(Fraction(1))}
    rows = [[ReadyTask(1, 1, 9, 0.0, "large")], [ReadyTask(n, 2, 0, 0.0, "small") for n in range(2, 9)]]
    chosen, _ = chooser.choose(rows, Capacity(Fraction(3)), needs, 64)
    assert [task.id for task in chosen] == [2, 3, 4]


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
        (Requirement("celery", Pattern.SHELL, cpus="9"), "needs 9 cpus, there are 8"),
        (Requirement("celery", Pattern.SHELL, memory_bytes=17 * GIB), "needs 17G memory, there is 16G"),
    ],
)
def test_a_worker_says_why_it_can_never_run_a_task(requirement: Requirement, sentence: str) -> None:
    assert chooser.why_never(requirement, PLACE) == sentence


def test_a_farm_says_why_no_worker_can_run_a_task() -> None:
    small = Place("small", "linux", frozenset({"celery"}), Capacity(Fraction(2), GIB, 2, 32))
    needs_9 = Requirement("celery", Pattern.SHELL, cpus="9")
    assert chooser.why_nowhere(needs_9, []) == "no live worker"
    assert chooser.why_nowhere(needs_9, [small, PLACE]) == "unsatisfiable: needs 9 cpus, largest worker has 8"
    assert chooser.why_nowhere(Requirement("x", Pattern.SHELL), [PLACE]) == "no worker serves queue 'x'"
    assert chooser.why_nowhere(Requirement("celery", Pattern.SHELL, cpus="8"), [small, PLACE]) is None


def test_a_python_task_takes_a_child_of_the_pool_and_a_free_command_a_place_of_its_own() -> None:
    assert chooser.need(Requirement("celery", Pattern.PYTHON, "0"), PLACE) == Capacity(python_slots=1)
    assert chooser.need(Requirement("celery", Pattern.SHELL, "0"), PLACE) == Capacity(command_slots=1)
    assert chooser.need(Requirement("celery", Pattern.SHELL, "/4"), PLACE) == Capacity(Fraction(2))


@given(st.lists(st.floats(0, 0.2), max_size=300), st.integers(0, 200), st.integers(1, 64))
def test_only_short_tasks_and_no_more_than_a_moment_of_work_are_claimed_ahead(
    seconds: list[float], buffered: int, places: int
) -> None:
    row = [ReadyTask(n, 1, 0, 0.0, str(n)) for n in range(len(seconds))]
    chosen = chooser.ahead([row], lambda name: seconds[int(name)], buffered, places)
    assert all(seconds[task.id] <= chooser.SHORT_SECONDS for task in chosen)
    assert sum(seconds[task.id] for task in chosen) <= chooser.BUFFER_SECONDS * places
    assert len(chosen) + buffered <= max(chooser.BUFFER_TASKS, buffered)


def test_nothing_is_claimed_ahead_whose_run_time_nobody_knows() -> None:
    row = [ReadyTask(n, 1, 0, 0.0, "new") for n in range(5)]
    assert chooser.ahead([row], lambda name: None, 0, 4) == []


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
