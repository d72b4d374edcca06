"""Farms and tasks as data (`*.toml`): under a fake clock, and the small ones on real workers, every other one on SQLite."""

import itertools
from datetime import datetime
from pathlib import Path

import pytest

import aque
from tests.scenarios.fake_farm import FakeFarm
from tests.scenarios.scenario import Run, Scenario, check, load_all
from tests.worker.farm import Farm

SCENARIOS = load_all()
REAL = [scenario for scenario in SCENARIOS if scenario.is_real]
#: What claims, starts and ends may add to a task of a real farm, on a busy machine.
SLACK_SECONDS = 20.0


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_the_policy_does_what_the_scenario_expects(scenario: Scenario) -> None:
    check(scenario, FakeFarm(scenario).run())


@pytest.mark.parametrize(
    ("scenario", "made_store_url"),
    list(zip(REAL, itertools.cycle(["sqlite", "postgresql"]), strict=False)),
    ids=lambda value: getattr(value, "name", value),
    indirect=["made_store_url"],
)
def test_real_workers_do_what_the_scenario_expects(scenario: Scenario, made_store_url: str, tmp_path: Path) -> None:
    with Farm(made_store_url, tmp_path, reserve_after_seconds=scenario.reserve_after) as farm, farm.entered():
        submitted: dict[int, aque.Handle] = {}
        with aque.graph():  # all is there before anybody looks
            for task in scenario.tasks:
                after = [submitted[other.number] for other in scenario.tasks if other.name in task.after]
                submitted[task.number] = aque.shell(
                    ["sleep", str(task.seconds)],
                    name=task.name,
                    duration=task.duration,
                    priority=task.priority,
                    depends_on=after,
                    **task.needs,
                )
        for worker in scenario.workers:
            settings = {"memory": worker.memory, "resources": worker.resources, "tags": ",".join(worker.tags)}
            farm.start_worker(
                "-c", str(worker.python_slots), name=worker.name, cpus=worker.cpus, wait=False, **settings
            )
        runs = []
        for task in scenario.tasks:
            row = farm.wait_for_state(submitted[task.number], "success", "error")
            assert row["state"] == "success", row
            runs.append(
                (task, row["worker"].partition("@")[0], seconds(row["started_at"]), seconds(row["finished_at"]))
            )
        first = min(began for _, _, began, _ in runs)
        check(
            scenario,
            [Run(task, worker, began - first, ended - first) for task, worker, began, ended in runs],
            SLACK_SECONDS,
        )
        assert farm.findings() == []


def seconds(when: datetime) -> float:
    return when.timestamp()


def test_a_scenario_that_is_not_met_fails() -> None:
    (scenario,) = [scenario for scenario in SCENARIOS if scenario.name == "priority"]
    runs = [Run(task, "one", float(task.number), task.number + 1.0) for task in scenario.tasks]
    with pytest.raises(AssertionError):
        check(scenario, runs)
