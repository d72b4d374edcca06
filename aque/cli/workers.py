"""`aque workers`: list workers, drain them."""

import time
from fractions import Fraction

import click

from aque import control
from aque.cli.farm import open_farm
from aque.cli.show import as_json, columns, count, escape, span
from aque.moments import utc
from aque.resources import format_cpus, format_memory, parse_resources
from aque.store import WorkerRow


@click.group(name="workers", invoke_without_command=True)
@click.option("--json", "as_lines_of_json", is_flag=True, help="Print one JSON object a line.")
@click.option("--all", "everyone", is_flag=True, help="Also those that have stopped or were lost.")
@click.pass_context
def command(context: click.Context, as_lines_of_json: bool, everyone: bool) -> int:
    """List the workers that are alive, what they have, and how much of it is reserved.

    \b
    aque workers
    aque workers --all --json
    aque workers drain celery@node7
    """
    return 0 if context.invoked_subcommand else _list(as_lines_of_json, everyone)


@command.command(name="drain")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
def drain(names: tuple[str, ...]) -> int:
    """Let workers claim nothing more. What they run goes on, and they stay registered, until `undrain` or their end.

    Ordinary Celery tasks, which come as messages, still reach them.

    \b
    aque workers drain celery@node7
    """
    return _drain(names, True)


@command.command(name="undrain")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
def undrain(names: tuple[str, ...]) -> int:
    """Let drained workers claim again.

    \b
    aque workers undrain celery@node7
    """
    return _drain(names, False)


def _drain(names: tuple[str, ...], wanted: bool) -> int:
    with open_farm() as farm:
        changed = control.drain(farm.store, names, wanted)
        with farm.store.connect() as connection:
            rows = [row for row in farm.store.live_workers(connection) if row.info.id in changed]
            running = farm.store.running(connection)
    for row in rows:
        number, _ = running.get(row.info.id, (0, Fraction(0)))
        what = "drains, it claims nothing more" if wanted else "claims again"
        print(f"{escape(row.info.name)} {what}; it runs {count(number, 'task')}")
    return 0


def _list(as_lines_of_json: bool, everyone: bool) -> int:
    with open_farm() as farm, farm.store.connect() as connection:
        rows = [row for row in farm.store.workers(connection) if everyone or row.is_live]
        running = farm.store.running(connection)
    if as_lines_of_json:
        for row in rows:
            number, cpus = running.get(row.info.id, (0, Fraction(0)))
            print(as_json(_values(row, number, cpus)))
        return 0
    if not rows:
        print("no worker is running: start one with `aque worker`.")
        return 0
    header = ["name", "state", "host", "pid", "cpus", "memory", "running", "reserved", "queues"]
    header += ["resources", "tags", "runs as", "kept together by", "age", "seen"]
    table = []
    now = time.time()
    for row in rows:
        number, cpus = running.get(row.info.id, (0, Fraction(0)))
        table.append(
            [
                row.info.name,
                _state(row),
                row.info.host,
                str(row.info.pid),
                format_cpus(Fraction(row.info.cpus)),
                _memory(row.info.memory_bytes),
                str(number),
                f"{format_cpus(cpus)} cpus",
                ",".join(row.info.queues),
                row.info.resources,
                ",".join(row.info.tags),
                "tasks' users" if row.info.switches_user else row.info.user,
                row.info.containment,
                span(now - row.started_at),
                f"{span(now - row.seen_at)} ago",
            ]
        )
    first, *lines = columns(header, table, frozenset({"pid", "cpus", "memory", "running", "reserved", "age", "seen"}))
    print(first)
    for row, line in zip(rows, lines, strict=True):
        print(line)
        for sentence in row.avoids if row.is_live else ():
            print(escape(f"  avoids {sentence}"))
    return 0


def _state(row: WorkerRow) -> str:
    """A worker whose lease has run out is lost, whether or not another one has noticed."""
    if row.is_live and row.draining:
        return "draining"
    return "lost" if row.state == "live" and not row.is_live else row.state


def _memory(memory_bytes: int) -> str:
    """In whole units, where a machine's memory is an odd number of bytes."""
    for suffix, size in (("G", 1 << 30), ("M", 1 << 20)):
        if memory_bytes >= 10 * size:
            return f"{memory_bytes // size}{suffix}"
    return format_memory(memory_bytes)


def _values(row: WorkerRow, number: int, cpus: Fraction) -> dict[str, object]:
    return {
        "id": row.info.id,
        "name": row.info.name,
        "state": _state(row),
        "host": row.info.host,
        "pid": row.info.pid,
        "cpus": row.info.cpus,
        "memory": row.info.memory_bytes,
        "python_slots": row.info.python_slots,
        "running": number,
        "reserved_cpus": str(cpus),
        "resources": parse_resources(row.info.resources),
        "tags": row.info.tags,
        "queues": row.info.queues,
        "platform": row.info.platform,
        "version": row.info.version,
        "user": row.info.user,
        "switches_user": row.info.switches_user,
        "containment": row.info.containment,
        "avoids": row.avoids if row.is_live else (),
        "started_at": utc(row.started_at),
        "seen_at": utc(row.seen_at),
    }
