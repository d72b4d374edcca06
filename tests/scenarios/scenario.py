"""Scenarios as data: a farm, its tasks, and what must be true of when and where they start.

what = "of equal priority the longest expected task starts first"
real = true                     also on real workers; times are then the tasks' own
fair = true                     users share the farm
reserve_after = 10              seconds
[limits]
nuke = 2
[[worker]]                      name cpus memory resources tags host python_slots
[[task]]                        name, and of its requirement: cpus memory resources limits tags host user
                                priority; seconds (it runs), duration (what is told of that: as long unless given);
                                count, arrives (a moment), every (seconds between those of one entry), after (names);
                                cost = {WORKER = N}: what its files cost there
[expect]
order = ["a", "b"]              none starts before the one to its left; of several of a name the first counts
starts_by = {a = 10}            moments at which the last of a name has started
starts_after = {a = 3}          none of that name has started before
on = {a = ["w"]}                the workers on which all of a name have run
at_once = {a = 2}               so many of a name run at once at most, and at some moment
users = {ann = [0.4, 0.6]}      of the first half of all starts, the part that is this user's
ends_by = 20                    the moment of the last end
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Worker:
    name: str
    cpus: float = 1
    memory: str = "8G"
    resources: str = ""
    tags: tuple[str, ...] = ()
    host: str = "here"
    python_slots: int = 4


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    number: int
    name: str
    seconds: float
    duration: float
    arrives: float
    priority: int
    after: tuple[str, ...]
    cost: Mapping[str, int]
    needs: Mapping[str, Any]  #: options of `options.Options`, and user


@dataclass(frozen=True, slots=True)
class Run:
    """A task on a worker, from when to when, in seconds since the first arrival."""

    task: Task
    worker: str
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    what: str
    workers: tuple[Worker, ...]
    tasks: tuple[Task, ...]
    expect: Mapping[str, Any]
    limits: Mapping[str, int] = field(default_factory=dict)
    is_real: bool = False
    is_fair: bool = False
    reserve_after: float = 10.0


def load(path: Path) -> Scenario:
    raw = tomllib.loads(path.read_text())
    tasks: list[Task] = []
    for entry in raw["task"]:
        given = dict(entry)
        name, count, every = given.pop("name"), given.pop("count", 1), given.pop("every", 0.0)
        seconds, arrives = given.pop("seconds"), given.pop("arrives", 0.0)
        own = {
            "duration": given.pop("duration", seconds),
            "priority": given.pop("priority", 0),
            "after": tuple(given.pop("after", ())),
            "cost": given.pop("cost", {}),
        }
        for number in range(count):
            tasks.append(Task(len(tasks) + 1, name, seconds, arrives=arrives + number * every, needs=given, **own))
    known = {"what", "real", "fair", "reserve_after", "limits", "worker", "task", "expect"}
    assert not raw.keys() - known, f"{path.name}: unknown {raw.keys() - known}"
    return Scenario(
        path.stem,
        raw["what"],
        tuple(Worker(**{**worker, "tags": tuple(worker.get("tags", ()))}) for worker in raw["worker"]),
        tuple(tasks),
        raw["expect"],
        raw.get("limits", {}),
        raw.get("real", False),
        raw.get("fair", False),
        raw.get("reserve_after", 10.0),
    )


def load_all() -> list[Scenario]:
    return [load(path) for path in sorted(HERE.glob("*.toml"))]


def check(scenario: Scenario, runs: Sequence[Run], slack: float = 0.0) -> None:
    """Assert all that is expected; `slack` seconds are what a real machine may be late."""
    expect = scenario.expect
    unknown = expect.keys() - {"order", "starts_by", "starts_after", "on", "at_once", "users", "ends_by"}
    assert expect and not unknown, f"{scenario.name}: what is expected? {unknown}"
    assert sorted(run.task.number for run in runs) == [task.number for task in scenario.tasks], "not all ran once"
    began: dict[str, list[float]] = {}
    for run in sorted(runs, key=lambda run: run.began):
        began.setdefault(run.task.name, []).append(run.began)
    order = [began[name][0] for name in expect.get("order", ())]
    assert order == sorted(order), dict(zip(expect["order"], order, strict=True))
    for name, moment in expect.get("starts_by", {}).items():
        assert began[name][-1] <= moment + slack, f"{name} starts at {began[name][-1]}, not by {moment}"
    for name, moment in expect.get("starts_after", {}).items():
        assert began[name][0] >= moment, f"{name} starts at {began[name][0]}, not after {moment}"
    for name, workers in expect.get("on", {}).items():
        assert {run.worker for run in runs if run.task.name == name} == set(workers), f"where {name} runs"
    for name, most in expect.get("at_once", {}).items():
        assert peak([run for run in runs if run.task.name == name]) == most, f"how many of {name} run at once"
    for user, (least, most) in expect.get("users", {}).items():
        half = sorted(runs, key=lambda run: run.began)[: len(runs) // 2]
        part = sum(run.task.needs.get("user") == user for run in half) / len(half)
        assert least <= part <= most, f"{user} has {part} of the first half"
    if "ends_by" in expect:
        assert max(run.ended for run in runs) <= expect["ends_by"] + slack


def peak(runs: Sequence[Run]) -> int:
    """How many of these run at once at most; at one moment ends go before starts."""
    changes = sorted([(run.ended, -1) for run in runs] + [(run.began, 1) for run in runs])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
