"""Which CPUs and which pieces of a worker's resources each of its running tasks has. The ledger says whether something is free,
this says which. Pure.

    whole CPUs      are exclusive as long as there are enough that nobody has
    fractions       share a CPU with other fractions where they fit, on the least loaded first; else they take one that is free
    no CPU          is not bound

Somebody who asks while the worker has promised more CPUs than it has gets the least loaded ones.
"""

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from aque.errors import BadReservation
from aque.resources import Capacity

#: Who has something: a task and its attempt. An earlier attempt may still be dying when the next one begins.
Holder = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Assigned:
    """What one attempt has."""

    cpus: tuple[int, ...] = ()  #: to be bound to; empty: it is not bound
    indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  #: of its resources, by their names


NOTHING = Assigned()


class Assignments:
    """Of one worker; its methods may be called from any thread. Take after the reservation, release before it ends."""

    def __init__(self, cpus: Iterable[int], pieces: Mapping[str, Iterable[int]]) -> None:
        """`cpus`: those that tasks are bound to; none: they are not bound. `pieces`: name -> the numbers there are."""
        self._lock = threading.Lock()
        self._load = {cpu: Fraction(0) for cpu in sorted(cpus)}
        self._exclusive = dict.fromkeys(self._load, 0)  #: how many tasks have it as a whole one
        self._free = {name: sorted(numbers) for name, numbers in pieces.items()}
        self._pieces = {name: frozenset(numbers) for name, numbers in self._free.items()}
        self._held: dict[Holder, tuple[Capacity, Assigned]] = {}

    def take(self, holder: Holder, need: Capacity) -> Assigned:
        """Give `holder` what it has reserved. Raises BadReservation if there are not as many pieces: the ledger had to see to
        that."""
        if not need.resources and (not self._load or not need.cpus):
            return NOTHING
        with self._lock:
            for name, wanted in need.resources.items():
                if len(self._free.get(name, ())) < wanted:
                    raise BadReservation(f"{wanted} {name} are reserved, and no such number of them is free here.")
            indices = {name: tuple(self._free[name][:wanted]) for name, wanted in need.resources.items()}
            assigned = Assigned(self._choose(need.cpus), indices)
            self._add(holder, need, assigned)
            return assigned

    def release(self, holder: Holder) -> None:
        """Its processes are gone: others may have what it had. Nothing happens the second time."""
        with self._lock:
            held = self._held.pop(holder, None)
            if held is None:
                return
            need, assigned = held
            self._charge(need, assigned, -1)
            for name, numbers in assigned.indices.items():
                known = self._pieces.get(name, frozenset())
                self._free[name] = sorted({*self._free.get(name, ()), *known.intersection(numbers)})

    def export(self, holders: Iterable[Holder]) -> dict[Holder, tuple[Capacity, Assigned]]:
        """What `adopt` needs, of those of `holders` that have anything."""
        with self._lock:
            return {holder: self._held[holder] for holder in holders if holder in self._held}

    def adopt(self, exported: Mapping[Holder, tuple[Capacity, Assigned]]) -> None:
        """These have it already. CPUs and pieces that the worker has no more are theirs, too, and nobody's after them."""
        with self._lock:
            for holder, (need, assigned) in exported.items():
                self._add(holder, need, assigned)

    # Below: with the lock held

    def _add(self, holder: Holder, need: Capacity, assigned: Assigned) -> None:
        self._held[holder] = need, assigned
        self._charge(need, assigned, 1)
        for name, numbers in assigned.indices.items():
            if name in self._free:
                self._free[name] = [number for number in self._free[name] if number not in numbers]

    def _charge(self, need: Capacity, assigned: Assigned, sign: int) -> None:
        """The whole CPUs come first in `assigned.cpus`, the shared one last."""
        left = need.cpus
        for cpu in assigned.cpus:
            part = min(left, Fraction(1))
            left -= part
            if cpu in self._load:
                self._load[cpu] += sign * part
                self._exclusive[cpu] += sign * (part == 1)

    def _choose(self, wanted: Fraction) -> tuple[int, ...]:
        if not self._load or not wanted:
            return ()
        whole, part = min(math.floor(wanted), len(self._load)), wanted % 1
        by_load = sorted(self._load, key=lambda cpu: (self._load[cpu], cpu))
        chosen = by_load[:whole]
        if part and whole < len(self._load):
            rest = by_load[whole:]
            shared = [cpu for cpu in rest if self._load[cpu] and not self._exclusive[cpu]]
            fitting = [cpu for cpu in shared if self._load[cpu] + part <= 1]
            free = [cpu for cpu in rest if not self._load[cpu]]
            chosen.append((fitting or free or shared or rest)[0])
        return tuple(chosen)
