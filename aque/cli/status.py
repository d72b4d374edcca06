"""`aque status`: list tasks, and say why they are not running."""

import csv
import os
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from io import StringIO
from signal import Signals
from typing import Any

import click

from aque import explain, observer
from aque.cli import ids
from aque.cli.farm import Farm, open_farm
from aque.cli.show import as_json, columns, count, escape, span, timestamp
from aque.errors import BadInput
from aque.machine import user_name
from aque.states import COMPLETE_STATES, READY_STATES, UNREADY_STATES, State

#: What `--json` prints, in this order; programs rely on it.
FIELDS = (
    "id", "name", "state", "reason", "attempt", "worker", "exit_code", "signal", "priority", "cpus", "memory",
    "depends_on", "parent_id", "job_id", "submitter", "submitted_at", "started_at", "finished_at", "duration", "io_bytes",
    "cpu_seconds", "max_rss_bytes", "read_bytes", "written_bytes", "not_before", "expires_at",
)  # fmt: skip
#: What `why` is made of.
_NOT_STARTED = READY_STATES | UNREADY_STATES
_FOR_WHY = ("id", "state", "unmet", "not_before")
#: What can be asked for besides.
_MORE = (
    "queue", "pattern", "host", "platform", "user", "interpreter", "resources", "limits", "tags", "requires_paths", "unmet",
    "layer", "seq", "lost", "progress", "celery_id", "places", "why",
)  # fmt: skip
_OF_AN_ATTEMPT = frozenset({"worker", "started_at", "cpu_seconds", "max_rss_bytes", "read_bytes", "written_bytes"})
_TABLE = (
    "id", "state", "reason", "exit_code", "signal", "cpus", "memory", "worker", "submitted_at", "started_at",
    "finished_at", "name",
)  # fmt: skip
LATELY_SECONDS = 3600
NEWEST = 50


@click.command(name="status")
@click.option(
    "--json", "as_lines_of_json", is_flag=True, help="One JSON object a line; all tasks unless told otherwise."
)
@click.option("--csv", "csv_fields", metavar="FIELDS", help="These fields as CSV; all tasks unless told otherwise.")
@click.option("--state", "states", metavar="STATES", help="Only tasks in these states, with commas.")
@click.option("--job", metavar="ID", help="Only the tasks of this job.")
@click.option(
    "--limit", metavar="N", type=click.IntRange(min=1), help=f"At most so many, the newest (tables: {NEWEST})."
)
@click.argument("words", metavar="[IDS...]", nargs=-1)
def command(
    words: tuple[str, ...],
    as_lines_of_json: bool,
    csv_fields: str | None,
    states: str | None,
    job: str | None,
    limit: int | None,
) -> int:
    """List tasks, and say why they are not running.

    Without ids: unfinished tasks, and yours that have finished in the last hour.

    \b
    aque status
    aque status 12,20-29
    aque status --state ready,running --limit 500
    aque status --job @last --json
    aque status --csv id,name,exit_code > tasks.csv
    """
    if as_lines_of_json and csv_fields:
        raise BadInput("--json and --csv exclude each other.")
    for_programs = as_lines_of_json or csv_fields is not None
    fields = FIELDS if as_lines_of_json else _csv_fields(csv_fields) if csv_fields is not None else _TABLE
    with open_farm() as farm:
        where = _where(farm, states, job)
        newest = limit if limit or for_programs else NEWEST
        needs_why = as_lines_of_json or not for_programs or "why" in fields
        wanted = [name for name in fields if name != "why"]
        asked = list(dict.fromkeys([*wanted, *_FOR_WHY])) if needs_why else wanted
        shown = ""
        if words:
            rows = _select(farm, ids.resolve(farm, words), where, asked)
        elif where or for_programs:
            with farm.store.connect() as connection:
                rows = list(farm.store.tasks(connection, where, asked, newest))
        else:
            rows = _recent(farm, asked, newest or NEWEST)
            shown = f"unfinished tasks, and {user_name()}'s that finished in the last hour"
        for row in rows:
            if row.get("state") in _NOT_STARTED:  # what an earlier attempt has left says nothing about now
                row.update(dict.fromkeys(_OF_AN_ATTEMPT & row.keys()))
        if needs_why:
            ready = _whys(farm, rows)
            for row in rows:
                row["why"] = ready.get(row["id"]) or _why(row)
        if as_lines_of_json:
            _print_json(rows)
        elif csv_fields is not None:
            _print_csv(rows, fields)
        else:
            _print_table(farm, rows, shown, newest if not words else None)
    return 0


def _why(row: dict[str, Any]) -> str | None:
    """Why a task that is not ready does not run, for people; None if there is nothing to say."""
    state = State(row["state"])
    if state is State.PENDING:
        when = row["not_before"]
        return explain.waits_for(row["unmet"], None if when is None else when.timestamp(), time.time())
    return "held" if state is State.HELD else None


def _whys(farm: Farm, rows: Sequence[dict[str, Any]]) -> dict[int, str | None]:
    """Why the ready ones among these tasks do not run."""
    ready = [row["id"] for row in rows if row["state"] in READY_STATES]
    return observer.whys(farm.store, farm.settings, ready) if ready else {}


def _where(farm: Farm, states: str | None, job: str | None) -> dict[str, Any]:
    where: dict[str, Any] = {}
    if states is not None:
        where["state"] = [word.strip() for word in states.split(",")]
        for word in where["state"]:
            if word not in set(State):
                raise BadInput(f"there is no state {word!r}; there are: {', '.join(State)}.")
    if job is not None:
        where["job_id"] = ids.resolve(farm, [job])
    return where


def _csv_fields(text: str) -> tuple[str, ...]:
    fields = tuple(word.strip() for word in text.split(","))
    known = (*FIELDS, *_MORE)
    for name in fields:
        if name not in known:
            raise BadInput(f"there is no field {name!r}; there are: {', '.join(known)}.")
    return fields


def _select(farm: Farm, wanted: list[int], where: dict[str, Any], asked: list[str]) -> list[dict[str, Any]]:
    """Tasks by id, in the order in which they were named."""
    fields = list(dict.fromkeys([*asked, "id", *where]))
    found = {row["id"]: row for row in farm.rows(wanted, fields)}
    rows = [found[task_id] for task_id in wanted if task_id in found]
    return [row for row in rows if all(row[name] in allowed for name, allowed in where.items())]


def _recent(farm: Farm, asked: list[str], newest: int) -> list[dict[str, Any]]:
    """What a person most likely wants to see."""
    fields = list(dict.fromkeys([*asked, "id", "finished_at"]))
    complete = [str(state) for state in COMPLETE_STATES]
    unfinished = [str(state) for state in State if state not in COMPLETE_STATES]
    since = datetime.fromtimestamp(time.time() - LATELY_SECONDS, UTC)
    with farm.store.connect() as connection:
        rows = list(farm.store.tasks(connection, {"state": unfinished}, fields, newest))
        mine = farm.store.tasks(connection, {"state": complete, "submitter": user_name()}, fields, newest)
        rows += [row for row in mine if row["finished_at"] is None or row["finished_at"] >= since]
    return sorted({row["id"]: row for row in rows}.values(), key=lambda row: int(row["id"]))[-newest:]


def _print_json(rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        print(as_json({name: row[name] for name in (*FIELDS, "why")}))


def _print_csv(rows: Iterable[dict[str, Any]], fields: Sequence[str]) -> None:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(fields)
    for row in rows:
        writer.writerow([_csv_value(row[name]) for name in fields])
    sys.stdout.write(text.getvalue())


def _csv_value(value: Any) -> str:
    if isinstance(value, tuple):  # of paths
        return " ".join(escape(os.fsdecode(path)) for path in value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, datetime):
        return timestamp(value)
    return "" if value is None else escape(str(value))


def _print_table(farm: Farm, rows: Sequence[dict[str, Any]], shown: str, newest: int | None) -> None:
    with farm.store.connect() as connection:
        counts = farm.store.counts(connection)
    total = ", ".join(f"{counts[state]} {state}" for state in State if state in counts)
    print(f"{count(sum(counts.values()), 'task')}{': ' if total else ''}{total}")
    if shown:
        more = f", the newest {newest}" if newest is not None and len(rows) >= newest else ""
        print(f"shown: {shown}{more}")
    elif newest is not None and len(rows) >= newest:
        print(f"shown: the newest {newest} (--limit shows more)")
    if not rows:
        return
    now = datetime.now(UTC)
    header = ["id", "state", "reason", "exit", "cpus", "worker", "age", "ran", "name", "why"]
    table = [
        [
            str(row["id"]),
            row["state"],
            row["reason"] or "",
            _exit(row),
            row["cpus"] or "",
            row["worker"] or "",
            span((now - row["submitted_at"]).total_seconds()),
            _ran(row, now),
            row["name"] if len(row["name"]) <= 40 else row["name"][:39] + "…",
            row["why"] or "",
        ]
        for row in rows
    ]
    print("\n".join(columns(header, table, frozenset({"id", "exit", "cpus", "age", "ran"}))))


def _exit(row: dict[str, Any]) -> str:
    if row["signal"] is None:
        return "" if row["exit_code"] is None else str(row["exit_code"])
    try:
        return Signals(row["signal"]).name.removeprefix("SIG")
    except ValueError:
        return f"signal {row['signal']}"


def _ran(row: dict[str, Any], now: datetime) -> str:
    if row["started_at"] is None:
        return ""
    return span(((row["finished_at"] or now) - row["started_at"]).total_seconds())
