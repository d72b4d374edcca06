"""What a task asks for and what a worker has: CPUs, memory, and resources of a site's own; exact.

A CPU request is symbolic until a worker resolves it, because a share is a share of *that* worker:
    "1.5", 1.5, 2    CPUs
    "1/4", "/4"      a quarter of the worker
    "25%"            the same
    "all"            the whole worker
    "0"              no reservation
Amounts are rationals: N tasks of "1/N" fit exactly N times on every machine, which floats and rounded
thousandths of a CPU both get wrong.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Self

from aque.errors import BadReservation

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DECIMAL = re.compile(r"\d{1,9}(\.\d{1,9})?|\.\d{1,9}")
_SHARE = re.compile(r"(\d{0,9})/(\d{1,9})")
#: NAME=2, or NAME=[0,2-3] for those with these numbers.
_RESOURCE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]{0,63})\s*=\s*(?:(\d{1,6})|\[([\d,\s-]{1,1000})\])\s*(?:,|$)")
_LIMIT = re.compile(r"([A-Za-z0-9_.:/@+-]{1,200})(?:=(\d{1,6}))?")
#: Tokens of one limit: each is a row.
LARGEST_LIMIT = 10_000
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CpuRequest:
    """A number of CPUs, or a share of the worker. `text` is the request as a person writes it."""

    text: str
    amount: Fraction
    is_share: bool

    @classmethod
    def parse(cls, value: str | float | Fraction) -> Self:
        """Read a request; raises BadReservation with an example of each form."""
        text = "all" if value == "all" else str(value).strip()
        if text == "all":
            return cls(text, Fraction(1), True)
        if isinstance(value, Fraction):  # a number of CPUs; its text "1/4" would read as a share
            text = str(float(value)) if Fraction(str(float(value))) == value else ""
        if match := _SHARE.fullmatch(text):
            numerator, denominator = int(match[1] or 1), int(match[2])
            if 0 < numerator <= denominator:
                return cls(text, Fraction(numerator, denominator), True)
        elif text.endswith("%") and _DECIMAL.fullmatch(text[:-1]):
            share = Fraction(text[:-1]) / 100
            if share <= 1:
                return cls(text, share, True)
        elif _DECIMAL.fullmatch(text):
            return cls(text, Fraction(text), False)
        raise BadReservation(
            f"cannot read CPU reservation {value!r}: write a number of CPUs such as '1.5', a share of the machine such as "
            "'1/4' or '25%', 'all' for the whole machine, or 0."
        )

    def share(self, machine_cpus: Fraction) -> Fraction:
        """CPUs to reserve on a worker with `machine_cpus` CPUs, exact: N tasks of "1/N" fit together, N+1 do not."""
        return self.amount * machine_cpus if self.is_share else self.amount


def parse_memory(value: str | int) -> int:
    """Bytes from a number or a text with a binary suffix: 512M, 1.5G, 2GiB. Raises BadReservation."""
    match = _MEMORY.fullmatch(str(value).strip())
    if match is None or isinstance(value, bool):
        raise BadReservation(
            f"cannot read memory {value!r}: write bytes, or a number with K, M, G or T such as '512M'."
        )
    parsed = int(Fraction(match[1]) * _SUFFIXES[match[2].upper()])
    if parsed >= 1 << 62:
        raise BadReservation(f"memory {value!r} is more than any machine has.")
    return parsed


def format_memory(memory_bytes: int) -> str:
    """The shortest text that `parse_memory` reads back as the same number."""
    for suffix in ("T", "G", "M", "K"):
        if memory_bytes and memory_bytes % _SUFFIXES[suffix] == 0:
            return f"{memory_bytes // _SUFFIXES[suffix]}{suffix}"
    return str(memory_bytes)


def parse_indices(text: str) -> dict[str, tuple[int, ...]]:
    """The resources of a worker: name -> the numbers of the pieces there are, from `gpu=2` (0 and 1) or `gpu=[1,3-4]`, with
    commas between several. Raises BadReservation."""
    found: dict[str, tuple[int, ...]] = {}
    position = 0
    while position < len(text):
        match = _RESOURCE.match(text, position)
        numbers = match and (_numbers(match[3]) if match[2] is None else tuple(range(int(match[2]))))
        if match is None or not numbers or match[1] in found or match[1].lower() in _NOT_RESOURCES:
            raise BadReservation(
                f"cannot read the resources {text!r}: write names and how many there are, as in 'gpu=2,nuke=4', or their "
                "numbers, as in 'gpu=[1,3]'; each name once, and none for CPUs or memory."
            )
        found[match[1]] = numbers
        position = match.end()
    return found


def _numbers(text: str) -> tuple[int, ...]:
    """0,2-3 as numbers; empty for what cannot be read."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()) or int(last) - int(first) > 10_000:
            return ()
        found += range(int(first), int(last) + 1)
    return tuple(found) if len(set(found)) == len(found) else ()


#: What a resource cannot be called: it is asked for otherwise.
_NOT_RESOURCES = frozenset({"cpus", "cpu", "memory"})
_TAG = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def parse_tags(text: str) -> tuple[str, ...]:
    """Tags with commas between them, sorted, each once. Raises BadReservation."""
    found = tuple(sorted({word.strip() for word in text.split(",")} - {""}))
    if bad := [tag for tag in found if not _TAG.fullmatch(tag)]:
        raise BadReservation(f"a tag is up to 64 letters, digits and _ . -, not {bad[0]!r:.60}.")
    return found


def parse_resources(value: str | Mapping[str, int]) -> dict[str, int]:
    """The resources that a task wants: name -> how many, from `gpu=1,nuke=2` or a mapping. Raises BadReservation."""
    found = _amounts(value, "resources", "gpu=1,nuke=2", re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,63})(?:=(\d{1,6}))?"))
    if wrong := [name for name in found if name.lower() in _NOT_RESOURCES]:
        raise BadReservation(f"{wrong[0]} is no resource of a site's own: reserve it with the option for it.")
    return found


def parse_limits(value: str | Mapping[str, int]) -> dict[str, int]:
    """The tokens of farm-wide limits that a task wants: name -> how many, from `nuke,licence=2` or a mapping. Raises
    BadReservation."""
    return _amounts(value, "limits", "nuke=1", _LIMIT)


def _amounts(value: str | Mapping[str, int], what: str, example: str, pattern: re.Pattern[str]) -> dict[str, int]:
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
    elif isinstance(value, Mapping) and not any(isinstance(n, bool) for n in value.values()):
        parts = [f"{name}={number}" for name, number in value.items()]
    else:
        parts = [""]
    found: dict[str, int] = {}
    for part in parts:
        match = pattern.fullmatch(part)
        if match is None or match[1] in found or match[2] == "0":
            raise BadReservation(
                f"cannot read the {what} {value!r}: write names and whole numbers from 1 to 999999, as in {example!r}; each "
                "name once."
            )
        found[match[1]] = int(match[2] or 1)
    return found


def format_amounts(amounts: Mapping[str, int]) -> str:
    """The text that `parse_resources` and `parse_limits` read back; equal amounts have equal texts."""
    return ",".join(f"{name}={number}" for name, number in sorted(amounts.items()))


_NOTHING: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True)
class Capacity:
    """An amount of everything that can be reserved: a worker's whole, what is free of it, or one task's need.

    `python_slots` are children of Celery's pool; `command_slots` bound commands that reserve no CPU; `resources` are a site's
    own, such as GPUs.
    """

    cpus: Fraction = Fraction(0)
    memory_bytes: int = 0
    python_slots: int = 0
    command_slots: int = 0
    resources: Mapping[str, int] = field(default_factory=lambda: _NOTHING)

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.cpus + other.cpus,
            self.memory_bytes + other.memory_bytes,
            self.python_slots + other.python_slots,
            self.command_slots + other.command_slots,
            _sum(self.resources, other.resources, 1),
        )

    def __sub__(self, other: Self) -> Self:
        return type(self)(
            self.cpus - other.cpus,
            self.memory_bytes - other.memory_bytes,
            self.python_slots - other.python_slots,
            self.command_slots - other.command_slots,
            _sum(self.resources, other.resources, -1),
        )

    @property
    def is_overdrawn(self) -> bool:
        """True for what is left of a worker that has promised more than it has."""
        return any(amount < 0 for _, amount in self.amounts())

    def without_debts(self) -> Self:
        """This, with 0 for what is negative."""
        return type(self)(
            max(self.cpus, Fraction(0)),
            max(self.memory_bytes, 0),
            max(self.python_slots, 0),
            max(self.command_slots, 0),
            {name: n for name, n in self.resources.items() if n > 0} if self.resources else _NOTHING,
        )

    def amounts(self) -> Iterator[tuple[str, Fraction | int]]:
        """Each thing by its name, and how much of it."""
        yield "cpus", self.cpus
        yield "memory", self.memory_bytes
        yield "python slots", self.python_slots
        yield "command slots", self.command_slots
        yield from self.resources.items()

    def lacking(self, need: Self) -> str | None:
        """The first thing of which `need` wants more than this, as a sentence part; None if it fits."""
        if need.cpus > self.cpus:
            return f"needs {format_cpus(need.cpus)} cpus, there are {format_cpus(self.cpus)}"
        if need.memory_bytes > self.memory_bytes:
            return f"needs {format_memory(need.memory_bytes)} memory, there is {format_memory(self.memory_bytes)}"
        if need.python_slots > self.python_slots:
            return "no free Python slot"
        if need.command_slots > self.command_slots:
            return "no free command slot"
        for name, wanted in need.resources.items():
            if wanted > (there := self.resources.get(name, 0)):
                return f"needs {wanted} {name}, there {'is' if there == 1 else 'are'} {there or 'none'}"
        return None


def _sum(left: Mapping[str, int], right: Mapping[str, int], sign: int) -> Mapping[str, int]:
    if not right:
        return left
    amounts = {name: left.get(name, 0) + sign * right.get(name, 0) for name in {**left, **right}}
    return {name: number for name, number in amounts.items() if number}


def format_cpus(cpus: Fraction) -> str:
    """Up to three decimals for people: 1.5, 0.333, 16."""
    return f"{float(cpus):.3f}".rstrip("0").rstrip(".")
