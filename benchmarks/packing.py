"""`python -m benchmarks.packing`: how well tasks of many sizes fill two CPUs, beside Ray and Dask; see docs/benchmarks.md."""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from celery.result import ResultSet

import aque
from aque.resources import Capacity
from benchmarks import packing_peers, simulator
from benchmarks.__main__ import entered, forget_settings
from benchmarks.aque_side import AquePostgreSQL, AqueSide, AqueSQLite
from benchmarks.farm_policies import Skip
from benchmarks.harness import RESULTS, describe_machine, describe_versions

CPUS = 2
TASKS = 60
SEEDS = (1, 2, 3)
#: Promised of Aque if it is told the durations: makespan over the lower bound, with each seed.
PROMISED = 1.06

#: Where the peers are installed; Aque itself needs neither.
PEERS = Path(__file__).resolve().parent.parent / ".venv-peers"
PEER_PACKAGES = ("ray==2.60.0", "distributed==2026.8.0")
PEER_SECONDS = 180

#: Waits, and says when it began and ended, by the wall clock. The shell's own clock: a `date` would cost a process.
COMMAND = ("bash", "-c", 'echo "$EPOCHREALTIME"; sleep "$1"; echo "$EPOCHREALTIME"', "nap")

#: The smallest request: so many tasks may run at once.
AT_ONCE = round(CPUS / packing_peers.SMALLEST)


@dataclass(frozen=True, slots=True)
class Task:
    cpus: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """One run of the tasks of one seed, times in seconds."""

    seed: int
    bound: float  #: nobody can be faster
    makespan: float  #: first start to last end
    from_submission: float  #: to last end
    peak: float  #: most CPUs in use at once

    @property
    def ratio(self) -> float:
        return self.makespan / self.bound


@dataclass(slots=True)
class Row:
    """One contender, and how to run tasks: returns when the submission began, and each task's start and end."""

    title: str
    run: Callable[[Sequence[Task]], tuple[float, Sequence[tuple[float, float]]]]
    is_ours: bool = False
    promised: float | None = None
    results: list[Result] | None = None
    error: str = ""

    def measure(self, seed: int) -> None:
        """One that failed is not tried again."""
        tasks = tasks_of(seed)
        if self.error:
            return
        try:
            submitted, spans = self.run(tasks)
            result = judged(seed, tasks, submitted, spans)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            return
        self.results = [*(self.results or ()), result]

    def worst(self) -> float:
        return max(result.ratio for result in self.results or ())

    def broken(self) -> str:
        """The promise that was not kept, as a sentence; empty if all were."""
        if self.is_ours and any(result.peak > CPUS for result in self.results or ()):
            return f"{self.title}: OVER BUDGET, {max(r.peak for r in self.results or ()):g} of {CPUS} CPUs"
        if self.promised is not None and self.results and self.worst() > self.promised:
            return f"{self.title}: MISSED, {self.worst():.3f}, promised <= {self.promised:g}"
        return ""

    def line(self) -> str:
        if self.error or not self.results:
            return f"{self.title:44} failed: {self.error}"
        ratios = " ".join(f"{result.ratio:6.3f}" for result in self.results)
        mean = statistics.mean(result.ratio for result in self.results)
        whole = statistics.mean(result.from_submission / result.bound for result in self.results)
        peak = max(result.peak for result in self.results)
        verdict = "  MISSED" if self.broken() else ""
        promised = "" if self.promised is None else f"  <= {self.promised:g}{verdict}"
        return f"{self.title:44} {ratios} {mean:7.3f} {whole:10.3f} {peak:6.2f}{promised}"


def tasks_of(seed: int) -> list[Task]:
    chance = random.Random(seed)
    return [Task(chance.choice((0.25, 0.5, 1, 2)), chance.randint(100, 1000) / 1000) for _ in range(TASKS)]


def lower_bound(tasks: Sequence[Task]) -> float:
    """Seconds that no order can beat on `CPUS` CPUs."""
    work = sum(task.cpus * task.seconds for task in tasks)
    return max(work / CPUS, *(task.seconds for task in tasks))


def peak(tasks: Sequence[Task], spans: Sequence[tuple[float, float]]) -> float:
    """The most CPUs in use at once; at one moment, ends go before starts."""
    changes = []
    for task, (began, ended) in zip(tasks, spans, strict=True):
        changes += [(began, task.cpus), (ended, -task.cpus)]
    used = highest = 0.0
    for _, cpus in sorted(changes):
        used += cpus
        highest = max(highest, used)
    return highest


def judged(seed: int, tasks: Sequence[Task], submitted: float, spans: Sequence[tuple[float, float]]) -> Result:
    for task, (began, ended) in zip(tasks, spans, strict=True):
        assert ended - began >= task.seconds - 0.001, f"a task of {task.seconds} s took {ended - began} s"
    last = max(ended for _, ended in spans)
    first = min(began for began, _ in spans)
    return Result(seed, lower_bound(tasks), last - first, last - submitted, peak(tasks, spans))


# -- contenders -------------------------------------------------------------------------------------------------------


def first_fit(order: simulator.Order, tasks: Sequence[Task]) -> tuple[float, list[tuple[float, float]]]:
    """No contender: what the order alone gives, if starting a task took no time."""
    simulated = [
        simulator.Task(number, str(task.cpus), Capacity(Fraction(task.cpus)), 0.0, task.seconds, task.seconds)
        for number, task in enumerate(tasks)
    ]
    runs = simulator.simulate([Capacity(Fraction(CPUS))], simulated, Skip(order))
    spans = {run.task.id: (run.began, run.ended) for run in runs}
    return 0.0, [spans[number] for number in range(len(tasks))]


def functions(side: AqueSide, hints: bool, tasks: Sequence[Task]) -> tuple[float, list[tuple[float, float]]]:
    nap = side.task("nap")
    submitted = time.monotonic()
    with aque.graph(app=side.app):
        handles = [
            nap.apply_async((task.seconds,), cpus=task.cpus, **({"duration": task.seconds} if hints else {}))
            for task in tasks
        ]
    spans = ResultSet(handles, app=side.app).get(timeout=PEER_SECONDS)
    return submitted, [(began, ended) for began, ended in spans]


def commands(side: AqueSide, hints: bool, tasks: Sequence[Task]) -> tuple[float, list[tuple[float, float]]]:
    offset = time.time() - time.monotonic()
    submitted = time.monotonic()
    with aque.graph(app=side.app):
        handles = [
            aque.shell(
                [*COMMAND, str(task.seconds)],
                cpus=task.cpus,
                app=side.app,
                **({"duration": task.seconds} if hints else {}),
            )
            for task in tasks
        ]
    results = ResultSet(handles, app=side.app).get(timeout=PEER_SECONDS)
    assert abs(time.time() - time.monotonic() - offset) < 0.001, "somebody has set the clock meanwhile"
    spans = [[float(word) - offset for word in result["stdout"].split()] for result in results]
    return submitted, [(began, ended) for began, ended in spans]


def peer(
    name: str, key: Callable[[Task], tuple[float, ...]], versions: dict[str, str], tasks: Sequence[Task]
) -> tuple[float, list[tuple[float, float]]]:
    """One run of Ray or Dask, in the order of `key`."""
    order = sorted(range(len(tasks)), key=lambda number: key(tasks[number]))
    wanted = {"cpus": CPUS, "tasks": [(tasks[number].cpus, tasks[number].seconds) for number in order]}
    # In namespaces of its own: there is no network but the loopback, and what it has started ends with it.
    alone = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    inside = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", str(PEERS / "bin/python"), packing_peers.__file__]
    ended = subprocess.run(
        [*alone, *inside, name],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        timeout=PEER_SECONDS,
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(f"{name} failed: {ended.stderr.strip()[-200:]}")
    answer = json.loads(ended.stdout)
    versions[name] = answer["version"]
    spans = dict(zip(order, answer["spans"], strict=True))
    return answer["submitted"], [tuple(spans[number]) for number in range(len(tasks))]


def install_peers() -> str:
    """Make the peers' environment if there is none yet; the reason why there cannot be one, or empty."""
    if missing := [name for name in ("unshare", "ip") if shutil.which(name) is None]:
        return f"{' and '.join(missing)} not installed (Debian: util-linux, iproute2)"
    stamp = PEERS / "installed"
    if stamp.exists() and stamp.read_text().split() == list(PEER_PACKAGES):
        return ""
    print(f"installing {' and '.join(PEER_PACKAGES)} into {PEERS}", file=sys.stderr)
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", PEERS], check=True)
        pip = [PEERS / "bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        subprocess.run([*pip, *PEER_PACKAGES], check=True)
    except subprocess.CalledProcessError as error:
        return f"not installed: {error}"
    stamp.write_text("\n".join(PEER_PACKAGES) + "\n")
    return ""


def given(task: Task) -> tuple[float, ...]:
    return ()


def longest(task: Task) -> tuple[float, ...]:
    return (-task.seconds,)


def widest(task: Task) -> tuple[float, ...]:
    return (-task.cpus, -task.seconds)


def our_rows(side: AqueSide) -> Iterator[Row]:
    for what, run in (("commands", commands), ("functions", functions)):
        yield Row(f"{side.name}, {what}, durations given", partial(run, side, True), True, PROMISED)
        yield Row(f"{side.name}, {what}", partial(run, side, False), True)


def peer_rows(versions: dict[str, str]) -> Iterator[Row]:
    for name in ("ray", "dask"):
        for order, key in (
            ("in this order", given),
            ("longest first", longest),
            ("widest, then longest first", widest),
        ):
            yield Row(f"{name.capitalize()}, {order}", partial(peer, name, key, versions))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if something could not be measured, or Aque has reserved more than there is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing", description=__doc__)
    parser.add_argument(
        "--seeds", type=int, default=len(SEEDS), help="how many of the three sets of tasks (default: 3)"
    )
    parser.add_argument("--only", choices=("aque", "peers"), help="one side alone")
    options = parser.parse_args(arguments)
    seeds = SEEDS[: options.seeds]
    forget_settings()
    versions: dict[str, str] = {}
    load = os.getloadavg()[0]
    rows = [
        Row("(first fit in no time, longest first)", partial(first_fit, simulator.longest_first)),
        Row("(first fit in no time, in this order)", partial(first_fit, simulator.as_given)),
    ]
    with ExitStack() as stack:
        if options.only != "peers":
            makers = (partial(AqueSQLite, AT_ONCE), partial(AquePostgreSQL, AT_ONCE))
            sides = list(entered(stack, makers))
            versions |= describe_versions(sides)
            for side in sides:
                side.commands(2 * AT_ONCE)  # supervisors are warm, as are the children of the pool
                side.noops(50)
                rows += our_rows(side)
        if options.only != "aque":
            if reason := install_peers():
                print(f"Ray and Dask are left out: {reason}", file=sys.stderr)
            else:
                rows += peer_rows(versions)
        for seed in seeds:
            for row in rows:
                row.measure(seed)
                if sys.stderr.isatty() and row.results:
                    print(f"seed {seed}, {row.title}: {row.results[-1].ratio:.3f}", file=sys.stderr)
    print(table(rows, seeds))
    print(f"\n{describe_machine()['cpus']} CPUs; load before: {load:.1f}")
    print("; ".join(f"{name} {version}" for name, version in versions.items()))
    if load > 0.5 * CPUS:
        print("The machine was busy with something else when this began: do not quote these figures.")
    print("\n".join(filter(None, (row.broken() for row in rows))))
    write(rows, versions, load)
    over = any(result.peak > CPUS for row in rows if row.is_ours for result in row.results or ())
    return int(over or any(row.error for row in rows))


def table(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    bounds = ", ".join(f"{lower_bound(tasks_of(seed)):.2f} s" for seed in seeds)
    heads = " ".join(f"seed {seed}" for seed in seeds)
    return "\n".join(
        [
            f"{TASKS} tasks of 0.25 to 2 CPUs and 0.1 to 1 s on {CPUS} CPUs; makespan over the lower bound ({bounds})",
            f"{'':44} {heads}    mean  submitted   peak  promised",
            *(row.line() for row in rows),
        ]
    )


def write(rows: Sequence[Row], versions: dict[str, str], load: float) -> None:
    found: dict[str, Any] = {
        "machine": describe_machine(),
        "versions": versions,
        "load_before": load,
        "rows": [
            {
                "title": row.title,
                "promised": row.promised,
                "error": row.error or None,
                "results": [{**asdict(result), "ratio": result.ratio} for result in row.results or ()],
            }
            for row in rows
        ],
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"packing-{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nwritten to {file}")


if __name__ == "__main__":
    sys.exit(main())
