"""What a task asks for and what a worker has: CPUs and memory, exact.

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
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

from aque.errors import BadReservation

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DECIMAL = re.compile(r"\d{1,9}(\.\d{1,9})?|\.\d{1,9}")
_SHARE = re.compile(r"(\d{0,9})/(\d{1,9})")
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


@dataclass(frozen=True, slots=True)
class Capacity:
    """An amount of everything that can be reserved: a worker's whole, what is free of it, or one task's need.

    `python_slots` are children of Celery's pool; `command_slots` bound commands that reserve no CPU.
    """

    cpus: Fraction = Fraction(0)
    memory_bytes: int = 0
    python_slots: int = 0
    command_slots: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.cpus + other.cpus,
            self.memory_bytes + other.memory_bytes,
            self.python_slots + other.python_slots,
            self.command_slots + other.command_slots,
        )

    def __sub__(self, other: Self) -> Self:
        return type(self)(
            self.cpus - other.cpus,
            self.memory_bytes - other.memory_bytes,
            self.python_slots - other.python_slots,
            self.command_slots - other.command_slots,
        )

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
        return None


def format_cpus(cpus: Fraction) -> str:
    """Up to three decimals for people: 1.5, 0.333, 16."""
    return f"{float(cpus):.3f}".rstrip("0").rstrip(".")
