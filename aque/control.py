"""What people ask of tasks, workers and limits. The row first, so that it holds while workers are down; then the ring."""

from collections.abc import Iterable
from signal import Signals, valid_signals

from aque import doorbell
from aque.errors import BadInput
from aque.store import Killed, LimitRow, Store, again


class _Undone(Exception):
    """Takes the transaction of a dry run back; carries what it did."""

    def __init__(self, killed: Killed) -> None:
        super().__init__()
        self.killed = killed


def kill(
    store: Store,
    ids: Iterable[int],
    signal: int,
    *,
    grace_seconds: float | None = None,
    waiting_only: bool = False,
    dependencies: bool = False,
    dependents: bool = False,
    dry_run: bool = False,
) -> Killed:
    """Kill these tasks, and the members of those that are jobs; with `waiting_only`, what runs may go on.

    `dependencies`: also what they depend on, but not what others still need. `dependents`: also what depends on them. With
    either also the children of all of these. What runs has `grace_seconds` to end (None: the worker's setting) until it gets
    SIGKILL; a later kill can shorten them. A `dry_run` does it all and takes it back.

    Raises UnknownTask or BadInput, and then nothing was killed.
    """
    if grace_seconds is not None and not 0 <= grace_seconds < float("inf"):
        raise BadInput(f"the grace of a kill must be seconds, 0 or more, not {grace_seconds!r}. Nothing was killed.")
    wanted = list(ids)

    def work() -> Killed:
        with store.begin() as connection:
            killed = store.kill(
                connection,
                wanted,
                signal,
                grace_seconds=grace_seconds,
                waiting_only=waiting_only,
                dependencies=dependencies,
                dependents=dependents,
            )
            if dry_run:
                raise _Undone(killed)
            return killed

    try:
        killed = again(work)
    except _Undone as undone:
        return undone.killed
    with store.connect() as connection:
        doorbell.ring(connection, {doorbell.KILL, doorbell.READY, doorbell.DONE})
    return killed


def drain(store: Store, names: Iterable[str], wanted: bool) -> list[int]:
    """Let the live workers of these names claim nothing more (not `wanted`: claim again), while what they run goes on; their
    ids. Raises BadInput, and then nothing was changed."""
    listed = list(names)
    with store.begin() as connection:
        live = [row.info for row in store.live_workers(connection) if row.is_live]
        if unknown := [name for name in listed if name not in {info.name for info in live}]:
            known = ", ".join(sorted({info.name for info in live})) or "none"
            raise BadInput(
                f"there is no live worker {unknown[0]!r}; there are: {known}. Nothing was changed: write a name as "
                "`aque workers` shows it."
            )
        changed = store.set_draining(connection, [info.id for info in live if info.name in listed], wanted)
    with store.connect() as connection:
        doorbell.ring(connection, {doorbell.KILL, doorbell.READY})
    return changed


def set_limit(store: Store, name: str, capacity: int) -> LimitRow:
    """Let the tasks of the farm hold at most `capacity` tokens of this limit together; how that limit now stands. Raises
    BadInput, and then nothing was changed."""

    def work() -> LimitRow:
        with store.begin() as connection:
            store.limits.set(connection, name, capacity)
            (row,) = [row for row in store.limits.rows(connection) if row.name == name]
            return row

    row = again(work)
    _ring_ready(store)
    return row


def remove_limit(store: Store, name: str) -> None:
    """Let nothing bound the tasks that ask for this limit. Raises BadInput if there is none."""

    def work() -> bool:
        with store.begin() as connection:
            return store.limits.remove(connection, name)

    if not again(work):
        raise BadInput(f"there is no limit {name!r}. Nothing was changed: `aque limits` lists those there are.")
    _ring_ready(store)


def _ring_ready(store: Store) -> None:
    with store.connect() as connection:
        doorbell.ring(connection, {doorbell.READY})


def parse_signal(text: str | int) -> int:
    """The number of a signal given as a name, with or without SIG, or as a number. Raises BadInput."""
    name = str(text).upper()
    if name.isdecimal() and int(name) in valid_signals():
        return int(name)
    try:
        return Signals[name if name.startswith("SIG") else f"SIG{name}"].value
    except KeyError:
        raise BadInput(f"there is no signal {text!r}: write a name such as TERM or a number such as 15.") from None
