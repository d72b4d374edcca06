"""The simulated farm of the benchmarks is right: schedules computed by hand, and rules that no policy can break."""

from collections.abc import Sequence
from fractions import Fraction

import pytest

from aque.resources import Capacity
from benchmarks.farm_policies import UNKNOWN, Aque, Drain, HeadOfLine, Leased, Skip
from benchmarks.simulator import Farm, Policy, Run, Task, Worker, check, longest_first, simulate

ONE, TWO = Capacity(Fraction(1)), Capacity(Fraction(2))
#: Only where there is memory.
HERE = Capacity(Fraction(1), memory_bytes=1)
WORKER = Capacity(Fraction(2), memory_bytes=2)

#: Two tasks fill the worker, a big one arrives, and then three more small ones: name, need, arrival and duration in seconds.
SCENE = (
    ("a", HERE, 0.0, 4.0),
    ("b", HERE, 0.0, 2.0),
    ("big", TWO, 1.0, 1.0),
    ("c", ONE, 1.5, 3.0),
    ("d", ONE, 1.5, 9.0),
    ("e", ONE, 1.5, 2.0),
)


def starts(policy: Policy, workers: Sequence[Capacity] = (WORKER,), *, known: bool = False) -> dict[str, float]:
    """When each task of the scene starts; whether the policy is told the durations."""
    tasks = [
        Task(number, _kind(need), need, at, length, length if known else 0.0)
        for number, (_, need, at, length) in enumerate(SCENE)
    ]
    return {SCENE[run.task.id][0]: run.began for run in simulate(workers, tasks, policy)}


def _kind(need: Capacity) -> str:
    return "big" if need is TWO else "here" if need is HERE else "small"


def test_skipping_lets_the_big_task_wait_until_the_small_ones_are_over() -> None:
    assert starts(Skip()) == {"a": 0, "b": 0, "c": 2, "d": 4, "e": 5, "big": 13}


def test_strictly_nothing_overtakes_the_big_task() -> None:
    assert starts(HeadOfLine()) == {"a": 0, "b": 0, "big": 4, "c": 5, "d": 5, "e": 8}


def test_a_draining_worker_stops_for_the_big_task_once_that_has_waited_long_enough() -> None:
    assert starts(Drain(after=2)) == {"a": 0, "b": 0, "c": 2, "big": 5, "d": 6, "e": 6}


def test_a_reservation_stops_one_worker_and_the_others_go_on() -> None:
    assert starts(Leased(0, backfill=False)) == {"a": 0, "b": 0, "big": 4, "c": 5, "d": 5, "e": 8}
    two = starts(Leased(0, backfill=False), [WORKER, ONE])
    assert two == {"a": 0, "b": 0, "c": 1.5, "big": 4, "d": 4.5, "e": 5}


def test_beside_a_reservation_runs_what_is_known_to_end_in_time() -> None:
    assert starts(Leased(0, backfill=True), known=True) == {"a": 0, "b": 0, "e": 2, "big": 4, "c": 5, "d": 5}
    assert starts(Leased(0, backfill=True)) == starts(Leased(0, backfill=False))


def test_beside_a_reservation_runs_what_needs_other_things() -> None:
    """The memory is reserved, and not the CPUs that are left beside it."""
    worker = Capacity(Fraction(4), memory_bytes=2)
    needs = [HERE, HERE, Capacity(Fraction(1), memory_bytes=2), HERE, ONE]
    tasks = [
        Task(0, "here", needs[0], 0.0, 4.0),
        Task(1, "here", needs[1], 0.0, 2.0),
        Task(2, "big", needs[2], 1.0, 1.0),
        Task(3, "here", needs[3], 1.5, 9.0),
        Task(4, "small", needs[4], 1.5, 9.0),
    ]
    for policy in (Leased(0, backfill=True), Aque(0)):
        began = {run.task.id: run.began for run in simulate([worker], tasks, policy)}
        assert began == {0: 0, 1: 0, 2: 4, 3: 5, 4: 1.5}


def test_who_holds_no_reservation_takes_the_task_over_if_it_fits_there_first() -> None:
    tasks = [
        Task(0, "here", HERE, 0.0, 9.0, 9.0),
        Task(1, "huge", Capacity(Fraction(3)), 0.0, 10.0, 2.0),  # on the large worker, for longer than was said
        Task(2, "big", TWO, 1.0, 1.0, 1.0),
    ]
    runs = simulate([WORKER, Capacity(Fraction(3))], tasks, Leased(0, backfill=False, order=longest_first))
    assert {run.task.id: (run.worker, run.began) for run in runs} == {0: (0, 0.0), 1: (1, 0.0), 2: (0, 9.0)}


def test_aque_starts_the_longest_first_and_keeps_room_for_the_big_task() -> None:
    assert starts(Aque(UNKNOWN), known=True) == {"a": 0, "b": 0, "d": 2, "c": 4, "e": 7, "big": 11}
    assert starts(Aque(0), known=True) == {"a": 0, "b": 0, "e": 2, "big": 4, "c": 5, "d": 5}
    assert starts(Aque(after=1), known=True) == starts(Aque(0), known=True)  # `b` ends when it has waited long enough
    assert starts(Aque(0)) == {"a": 0, "b": 0, "big": 4, "c": 5, "d": 5, "e": 8}
    assert starts(Aque(after=5), known=True) == starts(Aque(UNKNOWN), known=True)


def test_aque_starts_what_costs_less_to_read_here_before_what_is_longer() -> None:
    tasks = [Task(0, "dear", ONE, 0.0, 5.0, 5.0), Task(1, "cheap", ONE, 0.0, 1.0, 1.0)]
    policy = Aque(cost=lambda worker, kind: int(kind == "dear"))
    assert [run.task.id for run in simulate([ONE], tasks, policy)] == [1, 0]


def test_aque_takes_its_own_past_runs_for_durations_that_nobody_told() -> None:
    tasks = [
        Task(0, "small", ONE, 0.0, 2.0),
        Task(1, "long", HERE, 2.0, 8.0, 8.0),
        Task(2, "big", TWO, 3.0, 1.0),
        Task(3, "small", ONE, 4.0, 2.0),
    ]
    for learns, big, small in ((True, 10, 4), (False, 10, 11)):
        began = {run.task.id: run.began for run in simulate([WORKER], tasks, Aque(0, learns=learns))}
        assert (began[2], began[3]) == (big, small)


class After(Skip):
    """Starts nothing before 2.5 s, when nobody rings."""

    def start(self, farm: Farm, worker: Worker, now: float) -> Sequence[Task]:
        return super().start(farm, worker, now) if now >= 2.5 else []


def test_a_worker_that_nobody_rings_looks_at_its_next_poll() -> None:
    (run,) = simulate([ONE], [Task(0, "small", ONE, 0.0, 1.0)], After(), poll_seconds=1.0)
    assert 2.5 <= run.began < 3.5


class Greedy(Policy):
    """Starts everything, whether it fits or not."""

    def start(self, farm: Farm, worker: Worker, now: float) -> Sequence[Task]:
        return list(farm.in_order(set()))


class Lazy(Policy):
    """Starts nothing."""

    def start(self, farm: Farm, worker: Worker, now: float) -> Sequence[Task]:
        return []


def test_a_policy_that_promises_too_much_or_leaves_tasks_behind_is_found_out() -> None:
    tasks = [Task(number, "small", ONE, 0.0, 1.0) for number in range(3)]
    with pytest.raises(AssertionError, match="does not fit worker 0"):
        simulate([TWO], tasks, Greedy())
    with pytest.raises(AssertionError, match="3 tasks never start"):
        simulate([TWO], tasks, Lazy())


def test_the_record_alone_shows_an_overfull_worker_a_lost_task_and_one_before_its_time() -> None:
    tasks = [Task(0, "small", ONE, 1.0, 1.0), Task(1, "small", ONE, 1.0, 1.0)]
    check([ONE], tasks, [Run(tasks[0], 0, 1.0, 2.0), Run(tasks[1], 0, 2.0, 3.0)])
    with pytest.raises(AssertionError, match="over its budget"):
        check([ONE], tasks, [Run(tasks[0], 0, 1.0, 2.0), Run(tasks[1], 0, 1.9, 2.9)])
    with pytest.raises(AssertionError, match="ran once"):
        check([ONE], tasks, [Run(tasks[0], 0, 1.0, 2.0)])
    with pytest.raises(AssertionError, match="before it arrived"):
        check([ONE], tasks, [Run(tasks[0], 0, 0.5, 1.5), Run(tasks[1], 0, 2.0, 3.0)])
