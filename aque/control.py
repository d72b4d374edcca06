"""kill: withdraw what waits, signal what runs. The row first, so that it holds while workers are down; then the ring."""

from collections.abc import Iterable
from signal import Signals

from aque import doorbell
from aque.errors import BadInput
from aque.store import Killed, Store, again


def kill(store: Store, ids: Iterable[int], signal: int, *, waiting_only: bool = False) -> Killed:
    """Kill these tasks, and the members of those that are jobs; with `waiting_only`, what runs may go on.

    Raises UnknownTask, and then nothing was killed.
    """
    wanted = list(ids)

    def work() -> Killed:
        with store.begin() as connection:
            return store.kill(connection, wanted, signal, waiting_only)

    killed = again(work)
    with store.connect() as connection:
        doorbell.ring(connection, {doorbell.KILL, doorbell.READY, doorbell.DONE})
    return killed


def parse_signal(text: str | int) -> int:
    """The number of a signal given as a name, with or without SIG, or as a number. Raises BadInput."""
    name = str(text).upper()
    if name.isdecimal() and int(name) in {s.value for s in Signals}:
        return int(name)
    try:
        return Signals[name if name.startswith("SIG") else f"SIG{name}"].value
    except KeyError:
        raise BadInput(f"there is no signal {text!r}: write a name such as TERM or a number such as 15.") from None
