"""How far the times of tasks may be, and how those that are stored are shown. Pure."""

from datetime import UTC, datetime
from typing import Any

from aque.errors import BadInput

#: The longest time, in seconds, that can be asked for: 31 years. What is further breaks calendars and clocks.
FARTHEST_SECONDS = 1e9

_FIRST = datetime.min.replace(tzinfo=UTC)
_LAST = datetime(9999, 12, 31, tzinfo=UTC)


def read_seconds(what: str, value: Any) -> float:
    """From 0 to FARTHEST_SECONDS. Raises BadInput."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= FARTHEST_SECONDS:  # not NaN either
        raise BadInput(f"{what} must be a number of seconds, 0 or more and at most 1e9 (31 years), not {value!r:.60}.")
    return float(value)


def utc(when: float) -> datetime:
    """Of seconds since 1970; the first or last day of the calendar for what is beyond it."""
    try:
        return datetime.fromtimestamp(when, UTC)
    except (ValueError, OverflowError, OSError):
        return _LAST if when > 0 else _FIRST
