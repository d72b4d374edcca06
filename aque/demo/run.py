"""The demo from start to end: submit, watch, report, and check what is reported."""

import hashlib
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import aque
from aque.demo import figures
from aque.demo.graph import LEFT_OUT, Library, Submitted, library, submit
from aque.demo.private_farm import PrivateFarm, private_farm
from aque.errors import AqueError
from aque.resources import CpuRequest, format_cpus
from aque.states import ACTIVE_STATES, COMPLETE_STATES, State

#: A demo that takes longer than this is stuck.
LIMIT_SECONDS = 300.0
#: How often the rows are looked at; how often a line is printed where there is no terminal.
LOOK_SECONDS = 0.2
LINE_SECONDS = 3.0
FIELDS = ("id", "name", "pattern", "state", "reason", "cpus", "started_at", "finished_at", "depends_on")

Row = dict[str, Any]


@dataclass
class Checks:
    """What the demo holds to be true about itself; each is printed, and any that does not hold fails it."""

    failed: list[str] = field(default_factory=list)

    def __call__(self, holds: bool, what: str) -> None:
        print(f"  {'ok    ' if holds else 'WRONG '} {what}")
        if not holds:
            self.failed.append(what)


def main() -> int:
    """See `aque.demo.main`."""
    checks = Checks()
    with private_farm() as farm:
        try:
            _watch_and_report(farm, checks)
        except AqueError:
            _print_log(farm)
            raise
        if checks.failed:
            _print_log(farm)
    print("\nleft behind")
    checks(farm.stopped_with == 0, f"the worker has stopped, with status {farm.stopped_with}")
    checks(not farm.directory.exists(), f"{farm.directory} is gone")
    if checks.failed:
        raise AqueError(f"the demo found something wrong: {'; '.join(checks.failed)}.")
    return 0


def _watch_and_report(farm: PrivateFarm, checks: Checks) -> None:
    what = library()
    size = _megabytes(what.size(what.files))
    print(f"A report about the standard library of Python {platform.python_version()}: {len(what.files)} files, {size}")
    print(f"in {what.directory}, without {', '.join(LEFT_OUT)}.")
    if what.left:
        print(f"{what.left} more files are left out, to be done soon.")
    print(f"A worker of its own runs it, on a store in {farm.directory}.\n", flush=True)

    began = time.monotonic()
    submitted = submit(farm, what)
    _say(f"submitted: jobs {', '.join(f'{name} ({i})' for name, i in submitted.jobs.items())}")
    budget = _budget(farm)
    rows = _wait(farm, budget, began)
    jobs = {row["id"]: row for row in rows if row["pattern"] == "group"}
    tasks = {row["id"]: row for row in rows if row["pattern"] != "group"}
    if tasks[submitted.report.task_id_number]["state"] != State.SUCCESS:
        raise AqueError("\n".join(["the report could not be made:", *_unexpected(tasks, submitted)]))

    _print_report(submitted.report.get(timeout=10))
    runs = {row["id"]: _run(row, budget) for row in rows}
    _print_figures(tasks, jobs, runs, budget)
    print("\nchecked")
    _check_states(checks, tasks, jobs, submitted)
    _check_runs(checks, runs, budget, submitted)
    _check_report(checks, what, submitted.report.get(timeout=10))
    doctor = farm.aque("doctor", statuses=(0, 1)).splitlines()
    checks(doctor[-1] == "clean", f"aque doctor: {doctor[-1]}")


# -- while it runs --------------------------------------------------------------------------------------------------------


def _budget(farm: PrivateFarm) -> Fraction:
    """The CPUs that the worker may reserve, once it is there."""
    while not (found := farm.aque("workers", "--json").splitlines()):
        farm.check_worker()
        time.sleep(LOOK_SECONDS)
    ...


def _print_log(farm: PrivateFarm) -> None:
    print("\nthe end of the worker's log:", file=sys.stderr)
    for line in farm.log_tail():
        print(f"  {line}", file=sys.stderr)
