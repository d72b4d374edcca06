"""`aque events`: print what happens to tasks, and see to the cursors of those who listen."""

import json
import sys
from dataclasses import asdict
from datetime import datetime

import click

from aque.cli.farm import Farm, open_farm
from aque.cli.show import as_json, columns, complain, count, escape
from aque.errors import BadInput
from aque.feed import GAP, KINDS, Event, Feed
from aque.moments import utc

NEWEST = 50
_EVERYTHING = "task.*"


@click.command(name="events")
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens from now on, until Ctrl-C.")
@click.option("--json", "as_lines_of_json", is_flag=True, help="One JSON object a line.")
@click.option("--cursor", metavar="NAME", help="Begin where this cursor is, and move it past what is printed.")
@click.option("--limit", metavar="N", type=click.IntRange(min=0), help=f"Begin with the newest N (default {NEWEST}).")
@click.option("--cursors", is_flag=True, help="List the cursors, and how many transitions each has yet to see.")
@click.option("--remove-cursor", metavar="NAME", help="Forget a cursor.")
@click.argument("kinds", metavar="[NAMES]...", nargs=-1)
def command(
    kinds: tuple[str, ...],
    follow: bool,
    as_lines_of_json: bool,
    cursor: str | None,
    limit: int | None,
    cursors: bool,
    remove_cursor: str | None,
) -> int:
    """Print what has happened to tasks, oldest first: task.started, task.success, task.error, task.killed, task.cancelled,
    task.skipped, task.retry, task.waiting; all of them unless some are named.

    A cursor is kept in the store: a later run with the same name goes on where this one has ended. The first run makes it.

    \b
    aque events
    aque events --follow task.error task.killed
    aque events --cursor nightly --json task.success
    aque events --cursors
    """
    for kind in kinds:
        if kind not in KINDS and kind != _EVERYTHING:
            raise BadInput(f"there is no event {kind!r}; there are: {', '.join(KINDS)}, and {_EVERYTHING} for all.")
    if cursor is not None and (not cursor or limit is not None):
        raise BadInput(
            "--cursor begins where the cursor of that name is: it needs a name, and --limit does not go with it."
        )
    wanted = frozenset(KINDS if not kinds or _EVERYTHING in kinds else (*kinds, GAP))
    with open_farm() as farm:
        if cursors:
            return _list_cursors(farm, as_lines_of_json)
        if remove_cursor is not None:
            return _remove_cursor(farm, remove_cursor)
        feed = Feed(farm.store, cursor)
        try:
            if cursor is not None:
                feed.open()
            else:
                feed.open(newest=limit if limit is not None else 0 if follow else NEWEST)
            _print(feed, wanted, follow, as_lines_of_json)
        finally:
            feed.close()
    return 0


def _print(feed: Feed, wanted: frozenset[str], follow: bool, as_lines_of_json: bool) -> None:
    if feed.cursor is not None and not feed.begin():
        complain(f"another process reads the cursor {feed.cursor}: waiting until it ends.")
        while not feed.begin():
            feed.wait(1.0)
    while events := feed.wait(None if follow else 0):
        for event in events:
            if event.kind in wanted:
                print(_json(event) if as_lines_of_json else _text(event))
        sys.stdout.flush()  # before the cursor moves: a broken pipe must not lose what nobody has read
        feed.done(events[-1].seq)


def _json(event: Event) -> str:
    return as_json({**asdict(event), "at": utc(event.at)})


def _text(event: Event) -> str:
    when = datetime.fromtimestamp(event.at).strftime("%H:%M:%S.%f")[:-3]
    if event.kind == GAP:
        return f"{when}  {GAP}  events before this were deleted, or not recorded"
    attempt = f"attempt {event.attempt}" if event.attempt > 1 else ""
    words = [when, event.kind.ljust(14), str(event.task_id).rjust(8), event.name, str(event.reason or ""), attempt]
    return escape("  ".join(word for word in words if word))


def _list_cursors(farm: Farm, as_lines_of_json: bool) -> int:
    with farm.store.connect() as connection:
        rows = farm.store.transitions.cursors(connection)
    if as_lines_of_json:
        for row in rows:
            print(json.dumps({"name": row.name, "position": row.position, "behind": row.behind, "holder": row.holder}))
    elif rows:
        table = [[row.name, str(row.position), str(row.behind), "yes" if row.holder else "no"] for row in rows]
        print("\n".join(columns(["cursor", "position", "behind", "read"], table, frozenset({"position", "behind"}))))
    else:
        print("there are no cursors: `aque events --cursor NAME` makes one.")
    return 0


def _remove_cursor(farm: Farm, name: str) -> int:
    with farm.store.connect() as connection:
        behind = [row.behind for row in farm.store.transitions.cursors(connection) if row.name == name]
        if not behind or not farm.store.transitions.delete_cursor(connection, name):
            raise BadInput(f"there is no cursor {name!r}. Nothing was removed: `aque events --cursors` lists them.")
    print(f"{escape(name)} is no cursor any more; {count(behind[0], 'transition')} had not been seen")
    return 0
