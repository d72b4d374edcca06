"""Times, lengths of time and numbers of tasks, in words."""

from collections.abc import Sequence

from aque.moments import utc

#: Of many ids so many are written out.
IDS_SHOWN = 5


def clock(when: float) -> str:
    """A moment of the last hours or the next, as 10:42:10 UTC."""
    return f"{utc(when):%H:%M:%S} UTC"


def moment(when: float, now: float) -> str:
    """The same; of another day than the next with its date, as 2026-11-24 10:42:10 UTC."""
    return f"{utc(when):%Y-%m-%d} {clock(when)}" if when > now + 86400 else clock(when)


def lasting(seconds: float) -> str:
    """A length of time: 0.4 s, 38 s, 5 min, 2.5 h, 3 d."""
    if seconds < 100:
        return f"{max(seconds, 0):.0f} s" if seconds >= 10 else f"{max(seconds, 0):.1f} s"
    for unit, size, below in (("min", 60, 6000), ("h", 3600, 172_800)):
        if seconds < below:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.3g} d"


def at(when: float, now: float) -> str:
    """A moment to come: at 10:42:10 UTC (in 38 s); what is late is expected any moment."""
    return "any moment" if when <= now else f"at {clock(when)} (in {lasting(when - now)})"


def counted(number: int, noun: str) -> str:
    """1 task, 2 tasks."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(ids: Sequence[int]) -> str:
    """The first ids, and how many more: 1, 2, 3, 4, 5 and 2 more."""
    more = f" and {len(ids) - IDS_SHOWN} more" if len(ids) > IDS_SHOWN else ""
    return ", ".join(map(str, ids[:IDS_SHOWN])) + more


def listed_tasks(ids: Sequence[int]) -> str:
    """The same: task 1; tasks 1, 2."""
    return f"{'task' if len(ids) == 1 else 'tasks'} {listed(ids)}"
