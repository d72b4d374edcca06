"""`aque workers`: list workers."""

import time
from datetime import UTC, datetime
from fractions import Fraction

import click

from aque.cli.farm import open_farm
from aque.cli.show import as_json, columns, span
from aque.resources import format_cpus, format_memory
from aque.store import WorkerRow


@click.command(name="workers")
@click.option("--json", "as_lines_of_json", is_flag=True, help="Print one JSON object a line.")
@click.option("--all", "everyone", is_flag=True, help="Also those that have stopped or were lost.")
def command(as_lines_of_json: bool, everyone: bool) -> int:
    """List the workers that are alive, what they have, and how much of it is reserved.

    \b
    aque workers
    aque workers --all --json
    """
    with open_farm() as farm, farm.store.connect() as connection:
        rows = [row for row in farm.store.workers(connection) if everyone or row.is_live]
        running = farm.store.running(connection)
    if as_lines_of_json:
        for row in rows:
            count, cpus = running.get(row.info.id, (0, Fraction(0)))
            print(as_json(_values(row, count, cpus)))
        return 0
    if not rows:
        print("no worker is running: start one with `aque worker`.")
        return 0
    header = ["name", "state", "host", "pid", "cpus", "memory", "running", "reserved", "queues", "age", "seen"]
    table = []
    now = time.time()
    for row in rows:
        count, cpus = running.get(row.info.id, (0, Fraction(0)))
        table.append(
            [
                row.info.name,
                _state(row),
                row.info.host,
                str(row.info.pid),
                format_cpus(Fraction(row.info.cpus)),
                _memory(row.info.memory_bytes),
                str(count),
                f"{format_cpus(cpus)} cpus",
                ",".join(row.info.queues),
                span(now - row.started_at),
                f"{span(now - row.seen_at)} ago",
            ]
        )
    print("\n".join(columns(header, table, frozenset({"pid", "cpus", "memory", "running", "reserved", "age", "seen"}))))
    return 0


def _state(row: WorkerRow) -> str:
    """A worker whose lease has run out is lost, whether or not another one has noticed."""
    return "lost" if row.state == "live" and not row.is_live else row.state


def _memory(memory_bytes: int) -> str:
    """In whole units, where a machine's memory is an odd number of bytes."""
    for suffix, size in (("G", 1 << 30), ("M", 1 << 20)):
        if memory_bytes >= 10 * size:
            return f"{memory_bytes // size}{suffix}"
    return format_memory(memory_bytes)


def _values(row: WorkerRow, count: int, cpus: Fraction) -> dict[str, object]:
    return {
        "id": row.info.id,
        "name": row.info.name,
        "state": _state(row),
        "host": row.info.host,
        "pid": row.info.pid,
        "cpus": row.info.cpus,
        "memory": row.info.memory_bytes,
        "python_slots": row.info.python_slots,
        "running": count,
        "reserved_cpus": str(cpus),
        "queues": row.info.queues,
        "platform": row.info.platform,
        "version": row.info.version,
        "started_at": datetime.fromtimestamp(row.started_at, UTC),
        "seen_at": datetime.fromtimestamp(row.seen_at, UTC),
    }
