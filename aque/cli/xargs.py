"""`aque xargs`: run a command on the words of standard input, as xargs does."""

import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from signal import SIGTERM
from typing import Any

import click

from aque import control
from aque.cli import captured, waiting, xargs_input
from aque.cli.exit_status import INTERRUPTED, sentence, stop_status, xargs_status
from aque.cli.farm import Farm, open_farm
from aque.cli.local_worker import LocalWorker
from aque.cli.options import check_strict, many_task_options, read
from aque.cli.show import as_json, complain, count
from aque.errors import BadInput
from aque.states import State
from aque.store import StoredResult
from aque.submitter import Submitter
from aque.values import Condition, Dependency, TaskSpec

#: xargs exits with 1 for what is wrong with its options or its input.
OWN_ERROR = 1
PROGRESS_SECONDS = 0.5


class XargsUsageError(click.UsageError):
    """A mistake in the options."""

    exit_code = OWN_ERROR


class Xargs(click.Command):
    """A verb whose mistakes in use are xargs's exit status 1, not 2."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise XargsUsageError(error.format_message(), error.ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BadInput as error:
            complain(str(error))
            return OWN_ERROR


@click.command(name="xargs", cls=Xargs, context_settings={"allow_interspersed_args": False})
@click.option("-n", "--max-args", metavar="N", type=click.IntRange(min=1), help="At most N words a command.")
@click.option(
    "-L", "--max-lines", metavar="N", type=click.IntRange(min=1), help="N lines that are not blank a command."
)
@click.option(
    "-P", "--max-procs", metavar="N", type=click.IntRange(min=0), help="N at once on each worker; 0: no limit."
)
@click.option("-0", "--null", is_flag=True, help="Words end in NUL; quotes and backslashes mean themselves.")
@click.option("-d", "--delimiter", metavar="C", help="Words end in this byte, or \\n, \\t, \\x1f, \\037.")
@click.option("-a", "--arg-file", metavar="FILE", default="-", help="Read words from a file.")
@click.option("-r", "--no-run-if-empty", is_flag=True, help="Without words, run nothing.")
@click.option("-t", "--verbose", is_flag=True, help="Print the commands on stderr.")
@click.option("--cpus", metavar="CPUS", help="Reserve CPUs for each command (default 1, or 1/N with -P N).")
@click.option("--no-wait", is_flag=True, help="Print the id of the job and leave.")
@many_task_options
@click.argument("words", metavar="[COMMAND [ARGUMENTS...]]", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...], **chosen: Any) -> int:
    """Run a command (echo) as often as it takes to pass it all words of standard input, as one job.

    Words are split and quoted as xargs has it. Prints what the commands write, in their order, each command's when it and
    those before it have ended. The commands run as far as there are CPUs, on all workers: 1 CPU each, or with -P N the Nth
    part of whichever worker runs them. The exit status is xargs's: 123 if a command failed, 124 if one exited with 255,
    125 if one was killed by a signal, 126 if it cannot be executed, 127 if there is no such command, 1 for mistakes in the
    options or the input; after 124 to 127 no further command is started.

    \b
    find . -name '*.tif' -print0 | aque xargs -0 -n1 tiffinfo
    seq 100 | aque xargs -n5 -P4 echo
    ls *.wav | aque xargs --no-wait -L1 --after @last flac -8
    """
    if chosen["no_wait"] and chosen["local"]:
        raise BadInput("--local starts a worker for as long as xargs waits: leave --no-wait out.")
    if chosen["cpus"] is not None and chosen["max_procs"] is not None:
        raise BadInput("-P and --cpus both say what a command reserves: choose one.")
    argvs: list[list[bytes]] = []
    broken = ""
    try:
        for argv in _commands([os.fsencode(word) for word in words] or [b"echo"], chosen):
            argvs.append(argv)
    except xargs_input.BadXargsInput as error:
        broken = str(error)  # what came before is run all the same
    if chosen["verbose"]:
        for argv in argvs:
            print(shlex.join(map(os.fsdecode, argv)), file=sys.stderr)
    status = _run(argvs, chosen) if argvs else 0
    if broken:
        complain(f"{broken}.")
        return status or OWN_ERROR
    return status


def _commands(initial: list[bytes], chosen: dict[str, Any]) -> Iterator[list[bytes]]:
    if chosen["max_args"] and chosen["max_lines"]:
        complain("-n and -L exclude each other: -n is used.")
        chosen["max_lines"] = None
    return xargs_input.commands(
        initial,
        _words(_read(chosen["arg_file"]), chosen),
        max_args=chosen["max_args"],
        max_lines=chosen["max_lines"],
        run_if_empty=not chosen["no_run_if_empty"],
    )


def _words(data: bytes, chosen: dict[str, Any]) -> Iterator[xargs_input.Word]:
    if chosen["delimiter"] is not None and not chosen["null"]:
        try:
            end = xargs_input.delimiter(os.fsencode(chosen["delimiter"]))
        except ValueError:
            raise BadInput(f"-d {chosen['delimiter']!r} is not one byte, nor an escape such as \\n or \\x1f.") from None
        return xargs_input.delimited_words(data, end)
    if chosen["null"]:
        return xargs_input.delimited_words(data, b"\0")
    if b"\0" in data:
        complain("the input holds a NUL, which ends its word here: did you mean -0?")
    return xargs_input.words(data)


def _read(path: str) -> bytes:
    if path == "-":
        return sys.stdin.buffer.read()
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}. Nothing was submitted.") from error


def _run(argvs: list[list[bytes]], chosen: dict[str, Any]) -> int:
    procs = chosen["max_procs"]
    cpus = chosen["cpus"] or ("1" if procs is None else f"1/{procs}" if procs else "0")
    with open_farm() as farm:
        specs = _submit(farm, argvs, {**chosen, "cpus": cpus})
        job = specs[0]
        line = as_json({"id": job.id, "name": job.name, "tasks": len(argvs)}) if chosen["as_json"] else str(job.id)
        print(line, file=sys.stdout if chosen["no_wait"] else sys.stderr, flush=True)
        if chosen["no_wait"]:
            return 0
        members = [spec.id for spec in specs[1:]]
        try:
            with waiting.someone_to_run(farm, specs, chosen["local"]) as worker:
                return _wait(farm, job.id, members, worker)
        except KeyboardInterrupt:
            complain(
                f"interrupted: job {job.id} goes on. `aque kill {job.id}` ends it, `aque wait {job.id}` waits for it."
            )
            return INTERRUPTED


def _submit(farm: Farm, argvs: list[list[bytes]], chosen: dict[str, Any]) -> list[TaskSpec]:
    """The job, and after it its members: one submission."""
    submitter = Submitter(farm.store, farm.settings)
    options = read(farm, chosen)
    job_id, *ids = sorted(submitter.reserve(len(argvs) + 1))
    member = replace(options, job_id=job_id)
    first = submitter.command(ids[0], argvs[0], replace(member, seq=1))
    # All but the words is the same: the environment is looked at once for all of them.
    specs = [first] + [
        replace(first, id=task_id, argv=tuple(argv), seq=seq)
        for seq, (task_id, argv) in enumerate(zip(ids[1:], argvs[1:], strict=True), start=2)
    ]
    everything = tuple(Dependency(task_id, Condition.ANY) for task_id in ids)
    job = submitter.group(job_id, replace(options, name=options.name or first.name, dependencies=everything))
    check_strict(submitter, chosen, [first])
    submitter.submit([job, *specs])
    return [job, *specs]


def _wait(farm: Farm, job_id: int, members: list[int], worker: LocalWorker | None) -> int:
    """Print what the commands write, in their order, and how they ended as an exit status."""
    found: dict[int, StoredResult] = {}
    withdrawn: set[int] = set()
    printed = 0
    progress = _Progress(farm, job_id, len(members))
    for done in waiting.until_ended(farm, members, local=worker, every=PROGRESS_SECONDS):
        ended = waiting.ends(farm, done)
        found |= {end.id: replace(end, value=None) for end in ended}  # a command's result holds what it wrote
        if not withdrawn and any(stop_status(end) for end in ended):
            # Not the job: its other members may still run, and end it.
            rest = [task_id for task_id in members if task_id not in found]
            withdrawn = set(control.kill(farm.store, rest, SIGTERM, waiting_only=True).cancelled)
        start = printed
        while printed < len(members) and members[printed] in found:
            printed += 1
        if printed > start:
            progress.clear()
            captured.copy(farm, members[start:printed])
            for task_id in members[start:printed]:
                if task_id not in withdrawn and (said := sentence(found[task_id])):
                    complain(said)
        progress.show(len(found))
    progress.clear()
    if withdrawn:
        complain(f"{count(len(withdrawn), 'command')} not started, as xargs has it.")
    return xargs_status([found[task_id] for task_id in members if task_id in found and task_id not in withdrawn])


class _Progress:
    """`37/100 done, 4 running`, on a terminal."""

    def __init__(self, farm: Farm, job_id: int, total: int) -> None:
        self._farm = farm
        self._job_id = job_id
        self._total = total
        self._is_terminal = sys.stderr.isatty()
        self._shown_at = 0.0

    def show(self, done: int) -> None:
        if not self._is_terminal or time.monotonic() - self._shown_at < PROGRESS_SECONDS:
            return
        with self._farm.store.connect() as connection:
            where = {"job_id": self._job_id, "state": str(State.RUNNING)}
            running = sum(1 for _ in self._farm.store.tasks(connection, where, ["id"]))
        print(f"\r\x1b[K{done}/{self._total} done, {running} running", end="", file=sys.stderr, flush=True)
        self._shown_at = time.monotonic()

    def clear(self) -> None:
        if self._shown_at:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown_at = 0.0
