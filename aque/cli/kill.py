"""`aque kill`: end tasks, or withdraw them before they start."""

import sys
from collections import Counter
from collections.abc import Collection

import click

from aque import control
from aque.cli import ids
from aque.cli.farm import open_farm
from aque.cli.options import in_seconds
from aque.cli.show import count
from aque.states import COMPLETE_STATES
from aque.store import Killed, Store
from aque.values import NO_KILLS, Pattern

#: So many ids are listed one by one.
FEW = 20


@click.command(name="kill")
@click.option("-s", "--signal", "wanted", metavar="SIG", default="TERM", help="The signal, by name or number (TERM).")
@click.option(
    "--grace", metavar="TIME", callback=in_seconds, help="From the signal to SIGKILL; else what the worker is set to."
)
@click.option("-r", "--dependencies", is_flag=True, help="Also what they depend on, unless others still need it.")
@click.option("--dependents", is_flag=True, help="Also what depends on them.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@click.argument("words", metavar="IDS...", nargs=-1, required=True)
def command(
    words: tuple[str, ...], wanted: str, grace: float | None, dependencies: bool, dependents: bool, dry_run: bool
) -> int:
    """End tasks: those that have not started are cancelled, those that run are signalled.

    TERM, KILL, INT, QUIT, HUP and ABRT end a task with everything that it started; other signals are only delivered. A
    job's id stands for all of its tasks. With -r or --dependents the tasks' children go too. Exits with 1 if there was
    nothing left to do.

    \b
    aque kill 12
    aque kill -s USR1 12,13
    aque kill -r --dry-run 12
    aque kill --grace 2s @last
    """
    signal = control.parse_signal(wanted)
    with open_farm() as farm:
        killed = control.kill(
            farm.store,
            ids.resolve(farm, words, "Nothing was killed."),
            signal,
            grace_seconds=grace,
            dependencies=dependencies,
            dependents=dependents,
            dry_run=dry_run,
        )
        unkillable = _unkillable(farm.store, killed.requested)
    print("\n".join(_planned(killed)) if dry_run else ", ".join(_done(killed)) or "nothing to do")
    for task_id, worker in unkillable:
        print(
            f"task {task_id} is a function in the process of {worker}, which cannot end it: it goes on", file=sys.stderr
        )
    return 0 if killed.cancelled or killed.requested or killed.skipped else 1


def _unkillable(store: Store, ids: Collection[int]) -> list[tuple[int, str]]:
    """Those of these running tasks that go on whatever is asked of them, each with its worker; of many only the first."""
    with store.connect() as connection:
        workers = {
            row.info.name for row in store.workers(connection) if row.is_live and NO_KILLS in row.info.containment
        }
        if not workers:
            return []
        wanted = {"id": sorted(ids)[:FEW], "pattern": str(Pattern.PYTHON), "interpreter": ""}
        rows = list(store.tasks(connection, wanted, ["id", "worker"]))
    return [(row["id"], row["worker"]) for row in rows if row["worker"] in workers]


def _done(killed: Killed) -> list[str]:
    done = {
        "cancelled": killed.cancelled,
        "signalled": killed.requested,
        "skipped": killed.skipped,
        "spared, others need it": killed.spared,
    }
    parts = [f"{len(found)} {what}" for what, found in done.items() if found]
    for state, number in sorted(Counter(killed.untouched.values()).items()):
        already = "already " if state in COMPLETE_STATES else ""
        parts.append(f"{number} {already}{state}, left as it is")
    return parts


def _planned(killed: Killed) -> list[str]:
    plan = {
        "would cancel": killed.cancelled,
        "would signal": killed.requested,
        "would skip": killed.skipped,
        "would spare, because others need it,": killed.spared,
        "would leave as it is": killed.untouched,
    }
    return [f"{what} {_named(found)}" for what, found in plan.items() if found] or ["nothing to do"]


def _named(found: Collection[int]) -> str:
    return count(len(found), "task") + (f": {', '.join(map(str, sorted(found)))}" if len(found) <= FEW else "")
