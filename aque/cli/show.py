"""How things look on a terminal: nothing that a task's name could do to it, columns, times, and sentences on stderr."""

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any


def complain(text: str) -> None:
    """One sentence for the person, on stderr."""
    sys.stdout.flush()
    print(f"aque: {escape(text)}", file=sys.stderr, flush=True)


def escape(text: str) -> str:
    """The text with everything that does not print (control characters, escapes, lone surrogates) as `\\x1b` and the like."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[str] = frozenset()) -> list[str]:
    """Aligned lines, those of the columns named in `right` to the right; a column that is empty throughout is left out."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    table = [[escape(row[i]) for i in kept] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if header[i] in right else cell.ljust(width)
            for i, cell, width in zip(kept, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def span(seconds: float) -> str:
    """A length of time in at most six characters: 0.4s 12s 5m03s 2h10m 3d04h."""
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    for unit, smaller, size, below in (("m", "s", 60, 3600), ("h", "m", 3600, 86400), ("d", "h", 86400, None)):
        if below is None or whole < below:
            rest = whole % size // {"s": 1, "m": 60, "h": 3600}[smaller]
            return f"{whole // size}{unit}{rest:02}{smaller}"
    raise AssertionError


def size(size_bytes: int) -> str:
    """`17 bytes`, `3.1 KiB`, `20.0 GiB`."""
    if size_bytes < 1024:
        return count(size_bytes, "byte")
    shown, unit = size_bytes / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if shown < 1023.95:
            break
        shown, unit = shown / 1024, larger
    return f"{shown:.1f} {unit}"


def count(number: int, noun: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def as_json(values: dict[str, Any]) -> str:
    """One line of JSON; times as ISO 8601 in UTC."""
    return json.dumps(values, default=timestamp)


def timestamp(when: datetime) -> str:
    """2026-01-31T23:59:59.123456Z"""
    return when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
