"""Runs the same work on several sides in one run, in turns, and prints the ratios.

Only ratios from one run mean something: the machine, its load and its temperature are the same for every side, and each
round goes through the sides in the opposite order of the round before.
"""

import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self

import psutil

RESULTS = Path(__file__).parent / "results"

#: One measurement may take this long; then it counts as failed and the run goes on.
MEASUREMENT_SECONDS = 120

PACKAGES = ("aque", "celery", "kombu", "billiard", "redis", "sqlalchemy", "psycopg2-binary")


class Side(Protocol):
    """One contender. Entering it starts its servers and its worker with two slots; leaving it stops them all.

    Each measurement starts its clock before the first submit, stops it when this process knows the last result, and
    returns seconds; a wrong result raises.
    """

    name: str

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

    def versions(self) -> dict[str, str]:
        """What this side runs on apart from Python packages: its servers."""

    def noops(self, n: int) -> float:
        """`n` Python tasks that do nothing, submitted one by one, then all results."""

    def chain(self, n: int) -> float:
        """`n` tasks, each adds one to the result of the one before."""

    def fan_in(self, n: int) -> float:
        """`n` no-ops and one task that gets the list of their results."""

    def commands(self, n: int) -> float:
        """`n` runs of /bin/true with their output captured."""

    def idle_latency(self, n: int) -> Sequence[float]:
        """Seconds from submit to result of a no-op, `n` times, one at a time."""


@dataclass(frozen=True, slots=True)
class Measure:
    method: str
    title: str
    size: int
    #: Highest ratio to the peer that we promise.
    target: float


MEASURES = (
    Measure("noops", "no-op tasks", 5000, 0.40),
    Measure("chain", "chain with an integer", 500, 0.50),
    Measure("fan_in", "fan-in", 2000, 0.25),
    Measure("commands", "/bin/true, captured", 2000, 1.50),
    Measure("idle_latency", "idle submit -> result", 200, 1.00),
)


class OutOfTime(Exception):
    """A measurement was ended because its time was up."""


@dataclass(slots=True)
class Series:
    """What one side measured of one measure: a list of samples for each round."""

    rounds: list[list[float]] = field(default_factory=list)
    error: str = ""

    def medians(self) -> list[float]:
        return [statistics.median(samples) for samples in self.rounds]

    def median(self) -> float:
        return statistics.median(self.medians())

    def percentile(self, percent: int) -> float:
        """Of all samples of all rounds."""
        samples = sorted(sample for samples in self.rounds for sample in samples)
        return samples[min(len(samples) * percent // 100, len(samples) - 1)]


@dataclass(slots=True)
class Run:
    """One run of everything; `series` by method, then by name of the side."""

    peer: str
    sizes: dict[str, int]
    machine: dict[str, Any]
    versions: dict[str, str]
    series: dict[str, dict[str, Series]]
    loads: list[float] = field(default_factory=list)

    def ratio(self, method: str, side: str) -> tuple[float, float, float] | None:
        """This side's median over the peer's, and the lowest and highest ratio of a single round."""
        ours, peers = self.series[method][side], self.series[method].get(self.peer, Series())
        if not ours.rounds or not peers.rounds:
            return None
        single = [ours / peer for ours, peer in zip(ours.medians(), peers.medians(), strict=False)]
        return ours.median() / peers.median(), min(single), max(single)

    def failed(self) -> bool:
        return any(series.error for sides in self.series.values() for series in sides.values())

    def table(self) -> str:
        lines = [f"{'':22} {'n':>6}  {'':22} {'median':>10} {'each':>9} {'ratio':>6}  {'rounds':>12}  promised"]
        for measure in MEASURES:
            title, size = measure.title, f"{self.sizes[measure.method]:,}"
            for side, series in self.series.get(measure.method, {}).items():
                lines.append(f"{title:22} {size:>6}  {side:22} {self._cells(measure, side, series)}".rstrip())
                title = size = ""
        machine, loads = self.machine, self.loads
        lines.append("")
        lines.append(
            f"{machine['cpus']} CPUs ({machine['model']}), {machine['memory_gib']} GiB; "
            f"load before each round: {', '.join(f'{load:.1f}' for load in loads)}"
        )
        lines.append("; ".join(f"{name} {version}" for name, version in self.versions.items()))
        if loads and loads[0] > 0.5 * machine["cpus"]:
            lines.append("The machine was busy with something else when this began: do not quote these ratios.")
        return "\n".join(lines)

    def _cells(self, measure: Measure, side: str, series: Series) -> str:
        if not series.rounds:
            return f"failed: {series.error}" if series.error else "not measured: out of time"
        median = series.median()
        if measure.method == "idle_latency":
            cells = f"{median * 1e3:7.2f} ms {'p99 ' + format(series.percentile(99) * 1e3, '.1f'):>9}"
        else:
            cells = f"{median:8.2f} s {median / self.sizes[measure.method] * 1e3:6.2f} ms"
        if side != self.peer and (ratio := self.ratio(measure.method, side)):
            middle, low, high = ratio
            verdict = "" if middle <= measure.target else "  MISSED"
            cells += f" {middle:6.2f}  {f'{low:.2f}..{high:.2f}':>12}  <= {measure.target:.2f}{verdict}"
        return cells + (f"  later failed: {series.error}" if series.error else "")

    def as_json(self) -> dict[str, Any]:
        measures = []
        for measure in MEASURES:
            sides = {
                side: {
                    "rounds": series.rounds,
                    "median": series.median() if series.rounds else None,
                    "ratio": self.ratio(measure.method, side),
                    "error": series.error or None,
                }
                for side, series in self.series.get(measure.method, {}).items()
            }
            measures.append(
                {
                    "measure": measure.method,
                    "size": self.sizes[measure.method],
                    "promised_ratio": measure.target,
                    "sides": sides,
                }
            )
        return {
            "peer": self.peer,
            "machine": self.machine,
            "versions": self.versions,
            "load_before_each_round": self.loads,
            "measures": measures,
        }


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the main thread after `seconds`, and again each second, should a retry loop swallow the first."""

    def alarm(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"not done in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def describe_machine() -> dict[str, Any]:
    cpu_info = Path("/proc/cpuinfo").read_text(errors="replace") if os.path.exists("/proc/cpuinfo") else ""
    models = [line.partition(":")[2].strip() for line in cpu_info.splitlines() if line.startswith("model name")]
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "model": models[0] if models else platform.machine(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(),
    }


def describe_versions(sides: Sequence[Side]) -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    for side in sides:
        versions.update(side.versions())
    return versions


def measure_all(
    sides: Sequence[Side], peer: str, measures: Sequence[Measure], *, rounds: int, scale: float, limit_seconds: float
) -> Run:
    """Go through the measures in rounds until all are done or the next round would not end within `limit_seconds`."""
    deadline = time.monotonic() + limit_seconds
    sizes = {measure.method: max(1, round(measure.size * scale)) for measure in MEASURES}
    series = {measure.method: {side.name: Series() for side in sides} for measure in measures}
    run = Run(peer, sizes, describe_machine(), describe_versions(sides), series)
    for side in sides:  # children forked, modules imported, connections open
        with time_limit(MEASUREMENT_SECONDS):
            side.noops(50)
            side.commands(10)
    for number in range(rounds):
        began = time.monotonic()
        run.loads.append(os.getloadavg()[0])
        for measure in measures:
            for side in sides if number % 2 == 0 else sides[::-1]:
                measure_once(run, measure, side, min(MEASUREMENT_SECONDS, deadline - time.monotonic()))
        if number + 1 < rounds and time.monotonic() + (time.monotonic() - began) > deadline:
            print(f"stopped after round {number + 1}: another one would not end within {limit_seconds:.0f} s")
            break
    return run


def measure_once(run: Run, measure: Measure, side: Side, limit_seconds: float) -> None:
    """One measurement; one that fails is not tried again in later rounds, and the others go on."""
    series = run.series[measure.method][side.name]
    if series.error:
        return
    try:
        with time_limit(limit_seconds):
            measured = getattr(side, measure.method)(run.sizes[measure.method])
    except Exception as error:
        series.error = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    else:
        series.rounds.append([measured] if isinstance(measured, float) else list(measured))
        if sys.stderr.isatty():
            print(f"{measure.title}, {side.name}: {statistics.median(series.rounds[-1]):.4f} s", file=sys.stderr)
