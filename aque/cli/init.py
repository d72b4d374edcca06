"""`aque init`: create or upgrade the tables of the store."""

import click

from aque.cli.show import count
from aque.machine import settings_here
from aque.store import Store, again, schema
from aque.store.engine import open_engine


@click.command(name="init")
@click.option("--reset", is_flag=True, help="Remove all tables, with all tasks, first.")
@click.option("--yes", is_flag=True, help="Do not ask before removing them.")
@click.option(
    "--events/--no-events",
    "events",
    default=None,
    help="Record what happens to tasks, for `aque events` and `aque.events`; or do not.",
)
def command(reset: bool, yes: bool, events: bool | None) -> int:
    """Create the tables of the store that AQUE_BROKER names, or upgrade them to this version of Aque.

    Safe to run again. The embedded store needs it only after an upgrade of Aque.

    \b
    AQUE_BROKER=postgresql://aque@db/aque aque init
    aque init --reset
    aque init --no-events
    """
    engine = open_engine(settings_here().store_url)
    where = engine.url.render_as_string(hide_password=True)
    if reset:
        there = _what_is_there(Store(engine))
        if there and not yes:
            click.confirm(f"{where} holds {there}. Remove all of it?", abort=True)
        schema.drop(engine)
        if there:
            print(f"removed {there}")
    before = schema.upgrade(engine)
    if before == schema.HEAD:
        print(f"{where} is up to date, version {schema.HEAD}")
    else:
        print(
            f"{where}: " + (f"upgraded from {before} to" if before else "created tables of version") + f" {schema.HEAD}"
        )
    if events is not None:
        _record(Store(engine), events)
    engine.dispose()
    return 0


def _record(store: Store, wanted: bool) -> None:
    """Switch the recording of transitions."""
    with store.connect() as connection:
        changed = again(lambda: store.transitions.record(connection, wanted))
    print(f"what happens to tasks is {'' if wanted else 'not '}recorded{'' if changed else ', as before'}")


def _what_is_there(store: Store) -> str:
    """What a reset would remove, for people; "" if there are no tables."""
    with store.connect() as connection:
        version = schema.version(connection)
        if version != schema.HEAD:
            return "" if version is None else f"tables of version {version}"
        tasks = sum(store.counts(connection).values())
        live = sum(worker.is_live for worker in store.workers(connection))
    return f"{count(tasks, 'task')} and {count(live, 'live worker')}"
