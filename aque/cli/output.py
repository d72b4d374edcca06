"""`aque output`: print what tasks wrote."""

import json
import sys
from contextlib import suppress

import click

from aque.cli import captured, ids, waiting
from aque.cli.exit_status import INTERRUPTED, sentence
from aque.cli.farm import Farm, batches, open_farm
from aque.cli.show import complain, escape
from aque.errors import BadInput
from aque.states import COMPLETE_STATES, State
from aque.store import StoredResult


@click.command(name="output")
@click.option("-w", "--watch", is_flag=True, help="Go on until the tasks have ended.")
@click.option("--tag", is_flag=True, help="Begin each line with the id of its task and a tab.")
@click.option("--stderr", "only_stderr", is_flag=True, help="Print only what went to stderr, on stdout.")
@click.option("--attempt", metavar="N", type=click.IntRange(min=1), help="Of this attempt; else of the latest.")
@click.argument("words", metavar="IDS...", nargs=-1, required=True)
def command(words: tuple[str, ...], watch: bool, tag: bool, only_stderr: bool, attempt: int | None) -> int:
    """Print what tasks wrote, byte for byte: their stdout on stdout, their stderr on stderr.

    Of several tasks one after another, with --watch as they write it; a job's id stands for all of its tasks.

    \b
    aque output 12
    aque output -w @last
    aque output -w --tag 12,13
    aque output --stderr --attempt 1 12
    """
    if watch and attempt:
        raise BadInput("--watch follows the latest attempt: leave --attempt out.")
    both = {captured.STDOUT: captured.STDOUT, captured.STDERR: captured.STDERR}
    streams = {captured.STDERR: captured.STDOUT} if only_stderr else both
    printer = captured.TaggedPrinter(streams) if tag else captured.Printer(streams)
    with open_farm() as farm:
        wanted = farm.members(ids.resolve(farm, words))
        if watch:
            return _follow(farm, wanted, list(streams), printer)
        if not only_stderr and attempt is None and not tag:
            captured.copy(farm, wanted)
            _tell_of_functions(farm, wanted)
            return 0
        attempts = {row["id"]: attempt or row["attempt"] for row in farm.rows(wanted, ["id", "attempt"])}
        for task_id in wanted:
            for fd in streams:
                for data in captured.pieces(farm, task_id, attempts[task_id], fd):
                    printer.write((task_id, attempts[task_id], fd), data)
            printer.end(task_id)
        return 0


def _follow(farm: Farm, wanted: list[int], streams: list[int], printer: captured.Printer) -> int:
    waiting.hint_if_no_worker(farm, wanted)
    tail = captured.Tail(farm, wanted, streams)
    try:
        for done in waiting.until_ended(farm, wanted, every=waiting.LIVE_SECONDS):
            for stream, data in tail.read():
                printer.write(stream, data)
            tail.drop(done)
            for task_id in done:
                printer.end(task_id)
    except KeyboardInterrupt:
        return INTERRUPTED
    _tell_of_functions(farm, wanted)
    return 0


def _tell_of_functions(farm: Farm, wanted: list[int]) -> None:
    """On stderr: where to look for what is not captured of functions in a worker's pool; of those that failed the traceback."""
    rows = farm.rows(wanted, ["id", "state", "pattern", "interpreter", "attempt"])
    pooled = {
        row["id"]: State(row["state"])
        for row in rows
        if row["pattern"] == "python" and not row["interpreter"] and row["attempt"]
    }
    with farm.store.connect() as connection:
        for batch in batches(pooled):
            for task_id, _, _ in farm.store.output_sizes(connection, batch):  # those of other users are captured
                pooled.pop(task_id, None)
    for end in waiting.ends(farm, [i for i, state in pooled.items() if state is State.ERROR]):
        if said := sentence(end):
            complain(said)
        for line in _traceback(end).splitlines():
            print(escape(line), file=sys.stderr)
    if ended_well := [i for i, state in pooled.items() if state not in COMPLETE_STATES or state is State.SUCCESS]:
        shown = ", ".join(map(str, ended_well[:10])) + (", ..." if len(ended_well) > 10 else "")
        complain(
            f"what a Python function prints goes to its worker's log, and is not captured (task {shown}); `.get()` in Python "
            "returns its result."
        )


def _traceback(end: StoredResult) -> str:
    with suppress(ValueError):
        stored = json.loads(end.error or b"null")
        if isinstance(stored, dict):
            return str(stored.get("traceback") or "")
    return ""
