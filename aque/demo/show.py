"""How the demo looks: a line of progress, the report, and figures about how it ran."""

import platform
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

from aque.demo.figures import CpuUse, Run
from aque.resources import format_cpus
from aque.states import COMPLETE_STATES, State

#: How often there is a new line of progress where no terminal is.
LINE_SECONDS = 2.0
#: Of lists.
WIDTH = 100


class Progress:
    """One line that changes, on a terminal; elsewhere a line now and then."""

    def __init__(self, budget: Fraction) -> None:
        self._budget = budget
        self._began = time.monotonic()
        self._is_terminal = sys.stdout.isatty()
        self._printed_at: float | None = None

    def show(self, states: Collection[State], cpus: Fraction) -> None:
        """The states of all tasks, and the CPUs that those that run have reserved."""
        done = sum(state in COMPLETE_STATES for state in states)
        running = sum(state is State.RUNNING for state in states)  # a claimed one waits in the worker's buffer
        seconds = time.monotonic() - self._began
        line = (
            f"{seconds:5.1f} s  {done} of {len(states)} done, {running} running, {len(states) - done - running} waiting; "
            f"{format_cpus(cpus)} of {format_cpus(self._budget)} CPUs reserved"
        )
        if self._is_terminal:
            width = shutil.get_terminal_size().columns
            print(f"\r\x1b[K{line[: width - 1]}", end="", flush=True)
        elif self._printed_at is None or done == len(states) or seconds - self._printed_at >= LINE_SECONDS:
            self._printed_at = seconds
            print(line, flush=True)

    def end(self) -> None:
        """Leave the line as it is."""
        if self._is_terminal:
            print(flush=True)


def print_report(report: Mapping[str, Any]) -> None:
    """What the last task of the graph has returned."""
    whole, archive, sealed = report["whole"], report["archive"], report["seal"]
    ratio = archive["unpacked_bytes"] / archive["packed_bytes"]
    print(f"\nThe standard library of Python {platform.python_version()}")
    for name in ("files", "lines", "functions", "classes"):
        print(f"  {whole[name]:>9,}  {name}")
    print(
        f"  {megabytes(whole['bytes']):>9}  in all, {megabytes(archive['packed_bytes'])} compressed ({ratio:.2f} : 1)"
    )
    _print_list("lines in the largest packages", [f"{name} {lines:,}" for lines, name in whole["largest"]])
    _print_list("files that import", [f"{name} {files}" for name, files in whole["imports"]])
    print("  the longest functions")
    for lines, name, place in whole["longest"]:
        print(f"  {lines:>9,}  lines  {name}  ({place})")
    print(f"  the SHA-256 checksum of its {sealed['checksums']} checksums\n             {sealed['sha256']}")
    print(f"  and of the file that was made wrong\n             {report['mistake']}")


def print_figures(states: Mapping[str, Counter[State]], path: Sequence[Run], use: CpuUse, budget: Fraction) -> None:
    """How it ran: states by kind of row, the longest path, the CPUs."""
    print("\nHow it ran")
    for kind, counts in states.items():
        found = ", ".join(f"{counts[state]} {state}" for state in State if counts[state])
        print(f"  {kind:<13}{counts.total():>4}: {found}")
    print(
        f"  CPUs         {use.average:.2f} of {format_cpus(budget)} reserved on average over {use.seconds:.1f} s, "
        f"{format_cpus(use.peak)} at most"
    )
    steps = [run for run in path if run.seconds]
    seconds = sum(run.seconds for run in steps)
    print(f"  longest path {seconds:.1f} s in {len(steps)} tasks, which no number of CPUs makes shorter:")
    for run in steps:
        print(f"    {run.seconds:8.2f} s  {run.name} ({run.id})")


def _print_list(title: str, items: Sequence[str]) -> None:
    print(f"  {title}")
    print(textwrap.fill(", ".join(items), WIDTH, initial_indent=" " * 13, subsequent_indent=" " * 13))


def megabytes(size: int) -> str:
    """12.3 MB"""
    return f"{size / 1e6:.1f} MB"
