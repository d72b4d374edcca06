"""Run times in the table: what workers write, what submitters read, and what becomes a task's expected duration."""

from dataclasses import replace
from threading import Thread

import pytest

from aque import durations, settings
from aque.durations import ALL, SIZED, Runs, RunTime, Tally
from aque.options import Options
from aque.states import State
from aque.store import Store
from aque.submitter import Submitter
from aque.values import Pattern, Requirement, TaskSpec
from tests.store import farm


def record(store: Store, *runs: tuple[str, float, int]) -> None:
    """Runs as (name, seconds, io_bytes), as one worker would write them."""
    tally = Tally()
    for run in runs:
        tally.add(*run)
    with store.connect() as connection:
        store.run_times.record(connection, tally.take())


def averages(store: Store, *names: str) -> dict[str, RunTime]:
    with store.connect() as connection:
        return store.run_times.read(connection, names)


@pytest.fixture
def submitter(store: Store) -> Submitter:
    return Submitter(store, settings.load({}))


def submitted(submitter: Submitter, name: str, io_bytes: int = 0, **options: object) -> float:
    """The expected duration of a new task, as the table has it."""
    spec = submitter.command(submitter.next_id(), ["true"], Options(name=name, **options))  # type: ignore[arg-type]
    submitter.submit([replace(spec, io_bytes=io_bytes)])
    with submitter.store.connect() as connection:
        (row,) = submitter.store.tasks(connection, {"id": spec.id}, ["duration"])
    return float(row["duration"])


def test_averages_follow_the_runs_by_name_and_over_all(store: Store) -> None:
    record(store, ("frame_1", 10.0, 0))
    assert averages(store, "frame_0") == {"frame_0": RunTime(10.0, None), ALL: RunTime(10.0, None)}
    record(store, ("frame_2", 20.0, 1000), ("grade", 1.0, 0))
    found = averages(store, "frame_0", "grade", "unknown")
    assert found["frame_0"] == RunTime(pytest.approx(13.0), 1000.0)
    assert found["grade"] == RunTime(1.0, None)
    assert found[ALL].seconds == pytest.approx(10 + (1 - 0.7**2) * (10.5 - 10))
    assert found[SIZED] == RunTime(20.0, 1000.0)
    record(store, ("frame_3", 13.0, 2000))
    assert averages(store, "frame_0")["frame_0"] == RunTime(pytest.approx(13.0), pytest.approx(1300.0))
    assert "unknown" not in found


def test_workers_that_write_at_once_do_not_wait_for_each_other_in_a_circle(store: Store) -> None:
    failures: list[Exception] = []

    def write(order: int) -> None:
        try:
            for n in range(20):
                names = [f"name {letter}" for letter in "abcdefgh"][::order]
                record(store, *((name, float(n), 100) for name in names))
        except Exception as error:
            failures.append(error)

    threads = [Thread(target=write, args=(order,)) for order in (1, -1, 1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(averages(store, *(f"name {letter}" for letter in "abcdefgh"))) == 10


def test_a_farm_remembers_so_many_names_and_forgets_those_that_have_not_run_for_longest(store: Store) -> None:
    everything = Runs(ALL, 4000, 1.0, 0, None)
    with store.connect() as connection:
        for letter in "abc":
            named = [Runs(f"{letter}{n}", 1, 1.0, 0, None) for n in range(4000)]
            store.run_times.record(connection, [everything, *named])
        counted = "SELECT substr(name, 1, 1), count(*) FROM aque_run_time GROUP BY 1 ORDER BY 1"
        found = dict(tuple(row) for row in connection.exec_driver_sql(counted))
    assert found == {"": 1, "a": durations.NAMES - 8000, "b": 4000, "c": 4000}


def test_a_task_is_expected_to_take_what_past_runs_of_its_name_took(store: Store, submitter: Submitter) -> None:
    assert submitted(submitter, "sim") == 0.0
    record(store, ("frame_1", 40.0, 0))
    assert submitted(submitter, "frame_2") == 40.0


def test_what_a_person_says_goes_before_past_runs(store: Store, submitter: Submitter) -> None:
    record(store, ("frame_1", 40.0, 0))
    assert submitted(submitter, "frame_2", duration=7) == 7.0


def test_a_size_scales_past_runs_or_stands_for_them(store: Store, submitter: Submitter) -> None:
    record(store, ("copy", 10.0, 1000), ("sleep", 100.0, 0))
    assert submitted(submitter, "copy", 3000) == pytest.approx(30.0)
    assert submitted(submitter, "other", 500) == pytest.approx(5.0)  # not slowed by what has no size


def test_run_times_are_read_once_for_all_tasks_of_a_submission_and_kept_for_a_while(
    store: Store, submitter: Submitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, asked = store.run_times.read, []
    monkeypatch.setattr(
        store.run_times, "read", lambda connection, names: asked.append(set(names)) or read(connection, names)
    )
    specs = [submitter.command(i, ["true"], Options(name=f"frame_{i}")) for i in submitter.reserve(50)]
    submitter.submit(specs)
    assert asked == [{"frame_0", ALL, SIZED}]
    submitted(submitter, "frame_9")
    submitted(submitter, "told", duration=3)
    assert len(asked) == 1
    submitted(submitter, "grade")
    assert asked[1:] == [{"grade"}]


def test_nothing_is_read_for_tasks_that_say_how_long_they_take_and_for_jobs(
    store: Store, submitter: Submitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.run_times, "read", lambda *_: pytest.fail("it was read"))
    assert submitted(submitter, "told", duration=3) == 3.0
    submitter.submit([submitter.group(submitter.next_id(), Options())])


def test_a_multiple_is_of_the_average_of_its_priority(store: Store, submitter: Submitter) -> None:
    for seconds in (10, 30):
        submitted(submitter, "told", duration=seconds, priority=5)
    submitted(submitter, "told", duration=1000, priority=4)
    assert submitted(submitter, "untold", duration="2x", priority=5) == pytest.approx(40.0)


def test_without_such_tasks_a_multiple_is_of_the_average_run_and_without_runs_of_a_minute(
    store: Store, submitter: Submitter
) -> None:
    assert submitted(Submitter(store, settings.load({})), "untold", duration="0.5x") == pytest.approx(30.0)
    record(store, ("sim", 8.0, 0))
    assert submitted(submitter, "other", duration="3x", priority=1) == pytest.approx(24.0)


def test_tasks_of_long_ago_say_nothing_of_a_priority(store: Store, submitter: Submitter) -> None:
    submitted(submitter, "told", duration=10, priority=5)
    farm.ids(store, 10_000)
    farm.submit(store, [TaskSpec(farm.ids(store, 1)[0], "x", Requirement("celery", Pattern.SHELL), argv=(b"true",))])
    assert submitted(submitter, "untold", duration="1x", priority=5) == pytest.approx(60.0)


def test_the_longest_expected_is_looked_at_first(store: Store, submitter: Submitter) -> None:
    record(store, ("short", 1.0, 0), ("long", 90.0, 0))
    ids = submitter.reserve(3)
    names = ("short", "long", "unknown")
    states = submitter.submit(
        [submitter.command(i, ["true"], Options(name=name)) for i, name in zip(ids, names, strict=True)]
    )
    assert set(states.values()) == {State.READY}
    with store.connect() as connection:
        (row,) = store.candidates(connection, [], 10).values()
    assert [task.name for task in row] == ["long", "short", "unknown"]
