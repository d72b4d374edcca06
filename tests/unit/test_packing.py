"""What the packing benchmark says of a run: the bound that nobody beats, the peak, and a promise that was broken."""

import pytest

from benchmarks.packing import Result, Row, Task, judged, lower_bound, peak


def test_nobody_beats_the_work_on_all_cpus_or_the_longest_task() -> None:
    assert lower_bound([Task(2, 1.0), Task(0.5, 2.0), Task(1, 1.0)]) == 2.0
    assert lower_bound([Task(2, 1.0), Task(0.25, 9.0)]) == 9.0


def test_the_peak_is_what_ran_at_once_and_who_starts_when_another_ends_was_not_beside_it() -> None:
    tasks = [Task(1, 1.0), Task(1, 1.0), Task(0.5, 1.0)]
    assert peak(tasks, [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]) == 1
    assert peak(tasks, [(0.0, 1.0), (0.9, 1.9), (0.95, 3.0)]) == 2.5


def test_a_run_is_judged_from_its_first_start_and_from_its_submission() -> None:
    result = judged(1, [Task(2, 1.0), Task(2, 1.0)], 9.0, [(10.0, 11.0), (11.5, 12.5)])
    assert result == Result(seed=1, bound=2.0, makespan=2.5, from_submission=3.5, peak=2)
    with pytest.raises(AssertionError, match=r"a task of 1\.0 s took 0\.5 s"):
        judged(1, [Task(2, 1.0)], 0.0, [(0.0, 0.5)])


def test_over_budget_and_a_missed_promise_are_said_and_what_fails_is_not_tried_again() -> None:
    def row(span: tuple[float, float], promised: float | None = None) -> Row:
        return Row(
            "ours",
            lambda tasks: (0.0, [(span[0] * n, span[0] * n + span[1]) for n in range(len(tasks))]),
            True,
            promised,
        )

    over = row((0.0, 1.0))
    over.measure(1)
    assert "OVER BUDGET" in over.broken()
    slow = row((1.0, 1.0), 1.06)
    slow.measure(1)
    assert "MISSED" in slow.broken() and "MISSED" in slow.line()
    wrong = row((1.0, 0.0))
    wrong.measure(1)
    wrong.measure(2)
    assert not wrong.results and "failed: AssertionError" in wrong.line()
