"""What the rows of finished tasks say about how they ran. Pure: rows in, figures out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Run:
    """A task that has ended. Times are seconds since 1970; a job, which does not run itself, has `began` = `ended`."""

    id: int
    name: str
    cpus: Fraction
    began: float
    ended: float
    depends_on: tuple[int, ...] = ()

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True, slots=True)
class CpuUse:
    """CPUs reserved between the first start and the last end: the average over time, and the most at any moment."""

    seconds: float
    average: float
    peak: Fraction
    at_peak: tuple[int, ...]  #: the tasks that ran then


def cpu_use(runs: Iterable[Run]) -> CpuUse:
    """What `runs` reserved together. A task that ends in the moment another starts has given its CPUs to that one."""
    listed = [run for run in runs if run.seconds > 0]
    if not listed:
        return CpuUse(0.0, 0.0, Fraction(0), ())
    moments = [(run.ended, 0, run) for run in listed] + [(run.began, 1, run) for run in listed]
    moments.sort(key=lambda moment: moment[:2])
    used, peak = Fraction(0), Fraction(0)
    running: set[int] = set()
    at_peak: tuple[int, ...] = ()
    for _, starts, run in moments:
        if starts:
            used += run.cpus
            running.add(run.id)
        else:
            used -= run.cpus
            running.discard(run.id)
        if used > peak:
            peak, at_peak = used, tuple(sorted(running))
    whole = max(run.ended for run in listed) - min(run.began for run in listed)
    return CpuUse(whole, sum(float(run.cpus) * run.seconds for run in listed) / whole, peak, at_peak)


def longest_path(runs: Mapping[int, Run]) -> list[Run]:
    """The chain of dependencies that took the most running time, first to last: no number of CPUs makes it shorter."""
    before: dict[int, int | None] = {}
    total: dict[int, float] = {}
    for run in in_order(runs):
        ways = [upstream for upstream in run.depends_on if upstream in runs]
        before[run.id] = max(ways, key=lambda i: total[i], default=None)
        total[run.id] = run.seconds + max((total[i] for i in ways), default=0.0)
    path: list[Run] = []
    step: int | None = max(total, key=lambda i: total[i], default=None)
    while step is not None:
        path.append(runs[step])
        step = before[step]
    return path[::-1]


def in_order(runs: Mapping[int, Run]) -> list[Run]:
    """Every task after those that it depends on."""
    ordered: list[Run] = []
    left = {i: {upstream for upstream in run.depends_on if upstream in runs} for i, run in runs.items()}
    dependents: dict[int, list[int]] = {}
    for i, upstreams in left.items():
        for upstream in upstreams:
            dependents.setdefault(upstream, []).append(i)
    free = [i for i, upstreams in left.items() if not upstreams]
    while free:
        done = free.pop()
        ordered.append(runs[done])
        for i in dependents.get(done, ()):
            left[i].discard(done)
            if not left[i]:
                free.append(i)
    return ordered


def out_of_order(runs: Mapping[int, Run]) -> Sequence[tuple[Run, Run]]:
    """Pairs of (task, dependency) in which the task started before its dependency had ended; there should be none."""
    return [
        (run, runs[upstream])
        for run in runs.values()
        for upstream in run.depends_on
        if upstream in runs and run.began < runs[upstream].ended
    ]
