"""`aque kill`: end tasks, or withdraw them before they start."""

import click

from aque import control
from aque.cli import ids
from aque.cli.farm import open_farm


@click.command(name="kill")
@click.option("-s", "--signal", "wanted", metavar="SIG", default="TERM", help="The signal, by name or number (TERM).")
@click.argument("words", metavar="IDS...", nargs=-1, required=True)
def command(words: tuple[str, ...], wanted: str) -> int:
    """End tasks: those that have not started are cancelled, those that run are signalled.

    TERM, KILL, INT, QUIT, HUP and ABRT end a task with everything that it started; other signals are only delivered. A
    job's id stands for all of its tasks. Exits with 1 if there was nothing left to do.

    \b
    aque kill 12
    aque kill -s USR1 12,13
    aque kill @last
    """
    signal = control.parse_signal(wanted)
    with open_farm() as farm:
        killed = control.kill(farm.store, ids.resolve(farm, words, "Nothing was killed."), signal)
    done = {
        "cancelled": len(killed.cancelled),
        "signalled": len(killed.requested),
        "skipped": len(killed.skipped),
    }
    parts = [f"{number} {what}" for what, number in done.items() if number]
    for state in sorted(set(killed.untouched.values())):
        parts.append(f"{list(killed.untouched.values()).count(state)} already {state}, left as it is")
    print(", ".join(parts) or "nothing to do")
    return 0 if any(done.values()) else 1
