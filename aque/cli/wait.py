"""`aque wait`: wait for tasks to end."""

import click

from aque.cli import ids, waiting
from aque.cli.exit_status import INTERRUPTED, TIMED_OUT, sentence
from aque.cli.farm import open_farm
from aque.cli.options import in_seconds
from aque.cli.show import complain, count


@click.command(name="wait")
@click.option("--timeout", metavar="TIME", callback=in_seconds, help="Wait no longer than this, then exit with 124.")
@click.option("-q", "--quiet", is_flag=True, help="Do not print how each ended.")
@click.argument("words", metavar="IDS...", nargs=-1, required=True)
def command(words: tuple[str, ...], timeout: float | None, quiet: bool) -> int:
    """Wait until tasks have ended, print how, and exit as they did.

    The exit status is the largest of theirs: a command's own, 128+n after signal n, 1 for a Python task's error, 124
    after a time limit (or --timeout), 125 for one that never ran, 126 and 127 for one that could not be started. A job's
    is the largest of its tasks'.

    \b
    aque wait 12,13,20-29
    aque wait --timeout 5m @last
    """
    with open_farm() as farm:
        wanted = ids.resolve(farm, words)
        waiting.hint_if_no_worker(farm, wanted)
        ended = 0
        try:
            for done in waiting.until_ended(farm, wanted, timeout=timeout):
                ended += len(done)
                for task_id, state in done.items():
                    if not quiet:
                        print(task_id, state, flush=True)
        except KeyboardInterrupt:
            complain(f"interrupted: {count(len(wanted) - ended, 'task')} not ended yet, nothing was done to them.")
            return INTERRUPTED
        if ended < len(wanted):
            complain(f"the time is over: {count(len(wanted) - ended, 'task')} not ended yet.")
            return TIMED_OUT
        if not quiet:
            for end in waiting.ends(farm, wanted):
                if why := sentence(end):
                    complain(why)
        return waiting.largest_status(farm, wanted)
