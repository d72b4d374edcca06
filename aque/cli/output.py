"""`aque output`: print what tasks wrote."""

import click

from aque.cli import captured, ids, waiting
from aque.cli.exit_status import INTERRUPTED
from aque.cli.farm import Farm, open_farm
from aque.errors import BadInput


@click.command(name="output")
@click.option("-w", "--watch", is_flag=True, help="Go on until the tasks have ended.")
@click.option("--stderr", "only_stderr", is_flag=True, help="Print only what went to stderr, on stdout.")
@click.option("--attempt", metavar="N", type=click.IntRange(min=1), help="Of this attempt; else of the latest.")
@click.argument("words", metavar="IDS...", nargs=-1, required=True)
def command(words: tuple[str, ...], watch: bool, only_stderr: bool, attempt: int | None) -> int:
    """Print what tasks wrote, byte for byte: their stdout on stdout, their stderr on stderr.

    Of several tasks one after another; a job's id stands for all of its tasks.

    \b
    aque output 12
    aque output -w @last
    aque output --stderr --attempt 1 12
    """
    if watch and attempt:
        raise BadInput("--watch follows the latest attempt: leave --attempt out.")
    with open_farm() as farm:
        wanted = farm.members(ids.resolve(farm, words))
        if watch:
            return _follow(farm, wanted, only_stderr)
        if not only_stderr and attempt is None:
            captured.copy(farm, wanted)
            return 0
        for row in list(farm.rows(wanted, ["id", "attempt"])):
            for fd in (captured.STDERR,) if only_stderr else (captured.STDOUT, captured.STDERR):
                for data in captured.pieces(farm, row["id"], attempt or row["attempt"], fd):
                    captured.write(captured.STDOUT if only_stderr else fd, data)
        return 0


def _follow(farm: Farm, wanted: list[int], only_stderr: bool) -> int:
    waiting.hint_if_no_worker(farm, wanted)
    try:
        for task_id in wanted:
            tail = captured.Tail(
                farm, task_id, [captured.STDERR] if only_stderr else [captured.STDOUT, captured.STDERR]
            )
            for _ in waiting.until_ended(farm, [task_id], every=waiting.LIVE_SECONDS):
                for fd, data in tail.read():
                    captured.write(captured.STDOUT if only_stderr else fd, data)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
