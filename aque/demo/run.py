"""The demo from start to end: submit, watch, report, and check what is reported."""

import hashlib
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import aque
from aque.demo import figures, show
from aque.demo.figures import Run
from aque.demo.graph import LEFT_OUT, Library, Submitted, library, submit
from aque.demo.private_farm import PrivateFarm, private_farm
from aque.errors import AqueError
from aque.resources import CpuRequest, format_cpus
from aque.states import COMPLETE_STATES, Reason, State

#: A demo that takes longer than this is stuck.
LIMIT_SECONDS = 300.0
#: How often the rows are looked at.
LOOK_SECONDS = 0.25
FIELDS = ("id", "name", "pattern", "state", "reason", "cpus", "started_at", "finished_at", "depends_on")

Row = dict[str, Any]


@dataclass
class Checks:
    """What must hold: each is printed, and the demo fails if any does not."""

    failed: list[str] = field(default_factory=list)

    def __call__(self, holds: bool, what: str) -> None:
        print(f"  {'ok   ' if holds else 'WRONG'}  {what}")
        if not holds:
            self.failed.append(what)


def main() -> int:
    """See `aque.demo.main`."""
    checks = Checks()
    with private_farm() as farm:
        try:
            _run(farm, checks)
        except AqueError:
            _print_log(farm)
            raise
        if checks.failed:
            _print_log(farm)
    checks(farm.stopped_with == 0, f"the worker has stopped, with status {farm.stopped_with}")
    checks(not farm.directory.exists(), f"{farm.directory} is gone")
    if checks.failed:
        raise AqueError(f"the demo found something wrong: {'; '.join(checks.failed)}.")
    return 0


def _run(farm: PrivateFarm, checks: Checks) -> None:
    what = library()
    print(
        f"A report about {len(what.files)} files, {show.megabytes(what.size(what.files))}: the standard library of Python "
        f"{platform.python_version()} in\n{what.directory}, without {', '.join(LEFT_OUT)}"
        f"{f' and {what.left} more files' if what.left else ''}.\n"
        f"A worker on a store of its own in {farm.directory} makes it, with the `aque xargs` jobs and the graph of\n"
        "Python tasks of aque/demo/graph.py.\n",
        flush=True,
    )
    submitted = submit(farm, what)
    budget = _budget(farm)
    rows = _watch(farm, budget)
    groups = {row["id"]: row for row in rows if row["pattern"] == "group"}
    tasks = {row["id"]: row for row in rows if row["pattern"] != "group"}
    if tasks[submitted.report.number]["state"] != State.SUCCESS:
        raise AqueError("\n  ".join(["the report could not be made:", *_unexpected(tasks, submitted)]))
    report = submitted.report.get(timeout=10)
    runs = {row["id"]: _run_of(row, budget) for row in rows}
    use = figures.cpu_use(runs.values())
    kinds = {"jobs": groups, "commands": _of(tasks, "shell"), "Python tasks": _of(tasks, "python")}
    states = {kind: Counter(State(row["state"]) for row in some.values()) for kind, some in kinds.items()}
    show.print_report(report)
    show.print_figures(states, figures.longest_path(runs), use, budget)

    print("\nChecked")
    _check_states(checks, tasks, groups, submitted)
    late = figures.out_of_order(runs)
    checks(not late, "no task started before those that it depends on had ended" + _pairs(late))
    over = f", but {format_cpus(use.peak)} by tasks {use.at_peak}" if use.peak > budget else ""
    checks(not over, f"never more than {format_cpus(budget)} CPUs were reserved{over}")
    whole = runs[submitted.verify.number]
    beside = [run.id for run in runs.values() if run.cpus and run.id != whole.id and _overlap(run, whole)]
    checks(not beside, f"the task that needs the whole machine had it to itself{f', but for {beside}' * bool(beside)}")
    _check_report(checks, what, report)
    doctor = farm.aque("doctor", statuses=(0, 1)).splitlines()
    checks(doctor[-1:] == ["clean"], f"aque doctor: {doctor[-1] if doctor else ''}")


# -- while it runs --------------------------------------------------------------------------------------------------------


def _budget(farm: PrivateFarm) -> Fraction:
    """The CPUs that the worker may reserve, as soon as it is there."""
    end = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < end:
        for line in farm.aque("workers", "--json").splitlines():
            return Fraction(json.loads(line)["cpus"])
        farm.check_worker()
        time.sleep(LOOK_SECONDS)
    raise AqueError(f"the worker was not there after {LIMIT_SECONDS:.0f} seconds.")


def _watch(farm: PrivateFarm, budget: Fraction) -> list[Row]:
    """The rows of all tasks and jobs, when all have ended; meanwhile show how far they are."""
    progress = show.Progress(budget)
    end = time.monotonic() + LIMIT_SECONDS
    while True:
        rows = list(aque.tasks(None, ["id", "pattern", "state", "cpus"]))
        states = [State(row["state"]) for row in rows if row["pattern"] != "group"]
        running = [row for row in rows if row["state"] == State.RUNNING]
        progress.show(states, sum((_cpus(row, budget) for row in running), Fraction(0)))
        if all(State(row["state"]) in COMPLETE_STATES for row in rows):
            break
        farm.check_worker()
        if time.monotonic() > end:
            raise AqueError(f"the tasks were not done after {LIMIT_SECONDS:.0f} seconds.")
        time.sleep(LOOK_SECONDS)
    progress.end()
    return list(aque.tasks(None, FIELDS))


# -- what the rows say ----------------------------------------------------------------------------------------------------


def _cpus(row: Row, budget: Fraction) -> Fraction:
    return CpuRequest.parse(row["cpus"]).share(budget) if row["cpus"] else Fraction(0)


def _run_of(row: Row, budget: Fraction) -> Run:
    ended = row["finished_at"].timestamp()
    began = row["started_at"].timestamp() if row["started_at"] else ended
    return Run(row["id"], row["name"], _cpus(row, budget), began, ended, tuple(row["depends_on"]))


def _of(tasks: dict[int, Row], pattern: str) -> dict[int, Row]:
    return {i: row for i, row in tasks.items() if row["pattern"] == pattern}


def _overlap(one: Run, other: Run) -> bool:
    return one.began < other.ended and other.began < one.ended


def _unexpected(tasks: dict[int, Row], submitted: Submitted) -> list[str]:
    """Those that did not succeed though nobody made them fail."""
    made = submitted.broken.number
    return [
        " ".join(filter(None, (f"task {i} ({row['name']}):", row["state"], row["reason"])))
        for i, row in tasks.items()
        if row["state"] != State.SUCCESS and i != made
    ]


# -- checks ---------------------------------------------------------------------------------------------------------------


def _check_states(checks: Checks, tasks: dict[int, Row], groups: dict[int, Row], submitted: Submitted) -> None:
    broken = tasks[submitted.broken.number]
    wrong = _unexpected(tasks, submitted)
    checks(not wrong, f"{len(tasks) - 1} tasks succeeded{''.join(f'; {text}' for text in wrong)}")
    checks(
        (broken["state"], broken["reason"]) == (State.ERROR, Reason.EXCEPTION),
        f"one was made to fail: {broken['name']} ({broken['id']}), {broken['state']}, {broken['reason']}; after_failed then "
        f"ran {_shown(tasks, submitted.explain.number)}, after_any {_shown(tasks, submitted.tidy.number)}",
    )
    ends = {name: State(groups[job]["state"]) for name, job in submitted.jobs.items()}
    checks(
        ends == {"compress": State.SUCCESS, "checksum": State.SUCCESS, "report": State.ERROR},
        f"the jobs know it: {', '.join(f'{name} {end}' for name, end in ends.items())} (one of its tasks failed)",
    )


def _shown(tasks: dict[int, Row], task_id: int) -> str:
    return f"{tasks[task_id]['name']} ({task_id})"


def _pairs(late: Sequence[tuple[Run, Run]]) -> str:
    return "".join(f"; {run.name} ({run.id}) before {upstream.name} ({upstream.id})" for run, upstream in late[:5])


def _check_report(checks: Checks, what: Library, report: dict[str, Any]) -> None:
    """Some of it, found once more by this process in another way."""
    paths = [what.directory / file for file in what.files]
    lines = 0
    for path in paths:
        with path.open("rb") as file:
            lines += sum(1 for _ in file)
    found = report["whole"]["lines"]
    checks(found == lines, f"counted again here: {lines:,} lines{'' if found == lines else f', not {found:,}'}")
    size = sum(path.stat().st_size for path in paths)
    sizes = {size, report["whole"]["bytes"], report["archive"]["unpacked_bytes"]}
    checks(sizes == {size}, f"counted again here: {size:,} bytes, in the files and in what was unpacked")
    sums = sorted(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {file}" for path, file in zip(paths, what.files, strict=True)
    )
    again = hashlib.sha256("\n".join(sums).encode()).hexdigest()
    checks(again == report["seal"]["sha256"], f"computed again here: the checksum of checksums, {again[:16]}...")


def _print_log(farm: PrivateFarm) -> None:
    sys.stdout.flush()
    print("the end of the worker's log:", file=sys.stderr)
    for line in farm.log_tail():
        print(f"  {line}", file=sys.stderr)
