"""`python -m benchmarks.policies`: ways to treat big tasks among small ones, on a simulated farm; see docs/benchmarks.md."""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from fractions import Fraction
from typing import Literal

from aque.resources import Capacity
from benchmarks.farm_policies import UNKNOWN, Aque, Drain, HeadOfLine, Leased, Skip
from benchmarks.harness import RESULTS
from benchmarks.simulator import Policy, Run, Task, longest_first, makespan, simulate

#: What a policy is told of durations: the truth, the truth times a lognormal(1) factor, or nothing.
Hints = Literal["known", "noisy", "unknown"]

GIB = 1 << 30
WORKERS = 8
WHOLE = Capacity(Fraction(8), 32 * GIB, resources={"gpu": 1})
STREAM_SECONDS = 200.0
BIG_TASKS, BIG_SECONDS, SMALL_SECONDS = 20, 6.0, 4.0

#: The usual policies look after tasks that have waited so long, in seconds; Aque after its setting's default.
AGED_SECONDS = 5.0

#: Promised at load 1: at most so much of what skipping takes. The wait, whatever Aque is told of durations.
PROMISED = {"makespan": 1.02, "worst wait": 0.2}
WAIT = frozenset({"worst wait"})
#: Promised of random costs of files: against none.
PROMISED_CONTROL = 1.02


# -- workloads --------------------------------------------------------------------------------------------------------


def stream(load: float, seed: int) -> list[Task]:
    """1-CPU tasks that arrive by chance and take `load` of the farm's CPUs, and among them tasks of a whole worker."""
    small = Capacity(Fraction(1))
    return arriving(load, f"stream {load} {seed}", [("small", small)], [("big", Capacity(WHOLE.cpus))])


def mixture(load: float, seed: int) -> list[Task]:
    """As `stream`, of 0.25 to 2 CPUs and 1 to 4 GiB; some of the big ones want a GPU or memory, and not all the CPUs."""
    small = [
        (f"small {cpus} {gib}", Capacity(Fraction(cpus), gib * GIB)) for cpus in (0.25, 0.5, 1, 2) for gib in (1, 2, 4)
    ]
    big = [
        ("big cpus", Capacity(WHOLE.cpus)),
        ("big memory", Capacity(Fraction(1), 28 * GIB)),
        ("big gpu", Capacity(Fraction(4), 16 * GIB, resources={"gpu": 1})),
    ]
    return arriving(load, f"mixture {load} {seed}", small, big)


def arriving(
    load: float, seed: str, small: Sequence[tuple[str, Capacity]], big: Sequence[tuple[str, Capacity]]
) -> list[Task]:
    """Small tasks at random times with exponential durations, and BIG_TASKS others, for STREAM_SECONDS."""
    chance = random.Random(seed)
    arrivals = [
        (chance.uniform(0, STREAM_SECONDS), *big[number % len(big)], BIG_SECONDS) for number in range(BIG_TASKS)
    ]
    each = SMALL_SECONDS * float(sum(need.cpus for _, need in small)) / len(small)
    rate = load * WORKERS * float(WHOLE.cpus) / each
    now = 0.0
    while (now := now + chance.expovariate(rate)) < STREAM_SECONDS:
        arrivals.append((now, *chance.choice(small), chance.expovariate(1 / SMALL_SECONDS)))
    arrivals.sort(key=lambda arrival: arrival[0])
    return [Task(number, kind, need, now, seconds) for number, (now, kind, need, seconds) in enumerate(arrivals, 1)]


def told(tasks: Sequence[Task], hints: Hints, seed: int) -> list[Task]:
    """The tasks with what the policy is told of their durations."""
    chance = random.Random(f"hints {seed}")
    if hints == "known":
        return [replace(task, expected=task.seconds) for task in tasks]
    if hints == "noisy":
        return [replace(task, expected=task.seconds * chance.lognormvariate(0, 1)) for task in tasks]
    return list(tasks)


# -- comparison -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contender:
    title: str
    make: Callable[[], Policy]
    hints: Hints = "unknown"
    promises: frozenset[str] = frozenset()  #: of PROMISED, at load 1, on the stream


CONTENDERS = (
    Contender("skip what does not fit", Skip),
    Contender("strict: nothing overtakes", HeadOfLine),
    Contender("every worker drains", lambda: Drain(AGED_SECONDS)),
    Contender("one reservation", lambda: Leased(AGED_SECONDS, backfill=False)),
    Contender("one reservation, EASY, known", lambda: Leased(AGED_SECONDS, backfill=True), "known"),
    Contender("as before, longest first", lambda: Leased(AGED_SECONDS, True, longest_first), "known"),
    Contender("one reservation, EASY, noisy", lambda: Leased(AGED_SECONDS, backfill=True), "noisy"),
    Contender("one reservation, EASY, unknown", lambda: Leased(AGED_SECONDS, backfill=True)),
    Contender("Aque, known", Aque, "known", frozenset(PROMISED)),
    Contender("Aque, noisy", Aque, "noisy", WAIT),
    Contender("Aque, learnt from past runs", lambda: Aque(learns=True), "unknown", WAIT),
    Contender("Aque, unknown", Aque, "unknown", WAIT),
    Contender("Aque, known, but keeps no room", lambda: Aque(UNKNOWN), "known"),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """One run, or the means over several; seconds."""

    makespan: float
    worst: float  #: wait of a big task
    big: float  #: mean wait of the big tasks
    small: float  #: mean wait of the small tasks

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Figures":
        big = [run.wait for run in runs if run.task.kind.startswith("big")]
        small = [run.wait for run in runs if not run.task.kind.startswith("big")]
        return cls(makespan(runs), max(big), statistics.mean(big), statistics.mean(small))

    @classmethod
    def mean(cls, figures: Sequence["Figures"]) -> "Figures":
        columns = zip(*(asdict(one).values() for one in figures), strict=True)
        return cls(*map(statistics.mean, columns))


@dataclass(frozen=True, slots=True)
class Line:
    """A contender on a workload: each seed's figures, and those of skipping."""

    workload: str
    load: float
    contender: Contender
    seeds: Sequence[Figures]
    skipping: Sequence[Figures]

    def ratios(self) -> tuple[float, float, float]:
        """Makespan, worst and mean wait of big tasks, of their means over those of skipping."""
        ours, theirs = Figures.mean(self.seeds), Figures.mean(self.skipping)
        return ours.makespan / theirs.makespan, ours.worst / theirs.worst, ours.big / theirs.big

    def promises(self) -> frozenset[str]:
        return self.contender.promises if (self.workload, self.load) == ("stream", 1.0) else frozenset()

    def missed(self) -> list[str]:
        whole, worst, _ = self.ratios()
        return [
            f"{self.contender.title}: MISSED, {what} {value:.3f}x of skipping, promised <= {PROMISED[what]:g}x"
            for what, value in (("makespan", whole), ("worst wait", worst))
            if what in self.promises() and value > PROMISED[what]
        ]

    def text(self) -> str:
        mean, (whole, worst, big) = Figures.mean(self.seeds), self.ratios()
        single = [ours.makespan / theirs.makespan for ours, theirs in zip(self.seeds, self.skipping, strict=True)]
        verdict = "" if not self.promises() else "  MISSED" if self.missed() else "  as promised"
        return (
            f"{self.contender.title:32} {whole:6.3f}  {f'{min(single):.3f}..{max(single):.3f}':>12}"
            f" {mean.worst:8.1f} {worst:6.3f} {mean.big:8.1f} {big:6.3f} {mean.small:8.2f}{verdict}"
        )


HEAD = f"{'':32} {'makespan':>8} {'single seeds':>12} {'worst s':>8} {'ratio':>5} {'mean s':>8} {'ratio':>6} {'small s':>8}"


def compare(
    workload: str, tasks_of: Callable[[float, int], list[Task]], load: float, seeds: Sequence[int]
) -> list[Line]:
    """All contenders with the same tasks."""
    lines: list[Line] = []
    for contender in CONTENDERS:
        figures = []
        for seed in seeds:
            tasks = told(tasks_of(load, seed), contender.hints, seed)
            figures.append(Figures.of(simulate([WHOLE] * WORKERS, tasks, contender.make(), seed)))
        line = Line(workload, load, contender, figures, lines[0].seeds if lines else figures)
        print(line.text(), flush=True)
        lines.append(line)
    return lines


# -- the control of IO hints ------------------------------------------------------------------------------------------

PLACES = 4


@dataclass(frozen=True, slots=True)
class Control:
    """What costs of files that mean nothing do to the makespan: mean over seeds with them, over that without."""

    title: str
    ratio: float

    def text(self) -> str:
        return f"{self.title:48} {self.ratio:6.4f}  <= {PROMISED_CONTROL:g}" + ("  MISSED" if self.missed() else "")

    def missed(self) -> bool:
        return self.ratio > PROMISED_CONTROL


def batch(seed: int, count: int) -> list[Task]:
    """Tasks as those of `benchmarks.packing`, all there at once, each with files in one of PLACES places."""
    chance = random.Random(f"batch {seed}")
    tasks = []
    for number in range(count):
        cpus, place = chance.choice((0.25, 0.5, 1, 2)), chance.randrange(PLACES)
        seconds = chance.randint(100, 1000) / 1000
        tasks.append(Task(number, f"{cpus} {place}", Capacity(Fraction(cpus)), 0.0, seconds, seconds))
    return tasks


def control(workers: Sequence[Capacity], count: int, seeds: Sequence[int]) -> Control:
    def whole(seed: int, is_random: bool) -> float:
        def cost(worker: int, kind: str) -> int:
            place = kind.split()[1]
            return random.Random(f"cost {seed} {worker} {place}").randrange(4) if is_random else 0

        return makespan(simulate(workers, batch(seed, count), Aque(cost=cost), seed))

    ratio = sum(whole(seed, True) for seed in seeds) / sum(whole(seed, False) for seed in seeds)
    title = f"{count} tasks on {len(workers)} x {workers[0].cpus} CPUs, {len(seeds)} seeds"
    return Control(title, ratio)


# -- all of it --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison. A missed promise is printed, and no failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each policy and load (default: 3)")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.85, 1.0, 1.15], help="(default: 0.85 1 1.15)")
    options = parser.parse_args(arguments)
    seeds = range(1, options.seeds + 1)
    lines: list[Line] = []
    for load in options.loads:
        print(
            f"stream: load {load:g}, {BIG_TASKS} tasks of a whole worker; {WORKERS} workers of {WHOLE.cpus} CPUs\n{HEAD}"
        )
        lines += compare("stream", stream, load, seeds)
        print()
    print(f"mixture: load 1, small tasks of 12 kinds, big ones of CPUs, memory or a GPU\n{HEAD}")
    lines += compare("mixture", mixture, 1.0, seeds)
    print("\nrandom costs of files: makespan over that without")
    controls = [
        control([Capacity(Fraction(2))], 60, range(1, 20 * options.seeds + 1)),
        control([Capacity(Fraction(8))] * 8, 2000, seeds),
    ]
    print("\n".join(each.text() for each in controls))
    print("".join(f"\n{sentence}" for line in lines for sentence in line.missed()))
    write(lines, controls)
    return 0


def write(lines: Sequence[Line], controls: Sequence[Control]) -> None:
    found = {
        "seeds": len(lines[0].seeds),
        "lines": [
            {
                "workload": line.workload,
                "load": line.load,
                "policy": line.contender.title,
                "seeds": [asdict(figures) for figures in line.seeds],
                "ratios": dict(zip(("makespan", "worst", "big"), line.ratios(), strict=True)),
                "missed": line.missed(),
            }
            for line in lines
        ],
        "random_costs": [asdict(each) for each in controls],
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"policies-{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nwritten to {file}")


if __name__ == "__main__":
    sys.exit(main())
