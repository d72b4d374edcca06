"""Which CPUs and which pieces of a resource each task has: nobody has another's."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aque.assignments import NOTHING, Assigned, Assignments
from aque.errors import BadReservation
from aque.resources import Capacity


def cpus(amount: str | int, **resources: int) -> Capacity:
    return Capacity(Fraction(amount), resources=resources)


def test_whole_tasks_have_cpus_of_their_own() -> None:
    assignments = Assignments(range(4), {})
    assert [assignments.take((n, 1), cpus(1)).cpus for n in range(4)] == [(0,), (1,), (2,), (3,)]
    assignments.release((2, 1))
    assert assignments.take((9, 1), cpus(1)).cpus == (2,)


def test_a_task_is_bound_to_as_many_cpus_as_it_reserves_rounded_up() -> None:
    assignments = Assignments(range(8), {})
    assert assignments.take((1, 1), cpus(3)).cpus == (0, 1, 2)
    assert assignments.take((2, 1), cpus("3/2")).cpus == (3, 4)
    assert assignments.take((3, 1), cpus("1/2")).cpus == (4,)  # what the one before has left of it
    assert assignments.take((4, 1), cpus(3)).cpus == (5, 6, 7)


def test_fractions_share_a_cpu_while_they_fit_so_that_whole_tasks_find_free_ones() -> None:
    assignments = Assignments(range(3), {})
    halves = [assignments.take((n, 1), cpus("1/2")).cpus for n in range(4)]
    assert halves == [(0,), (0,), (1,), (1,)]
    assert assignments.take((9, 1), cpus(1)).cpus == (2,)


def test_of_the_shared_cpus_the_least_loaded_is_first() -> None:
    assignments = Assignments(range(2), {})
    for n in range(4):
        assignments.take((n, 1), cpus("1/2"))
    assignments.release((2, 1))
    assignments.release((3, 1))
    assignments.release((1, 1))
    assignments.take((5, 1), cpus("3/4"))
    assert assignments.take((6, 1), cpus("1/4")).cpus == (0,)  # 1/2 and not 3/4


def test_who_reserves_no_cpu_is_not_bound_and_neither_is_anybody_without_pinning() -> None:
    assert Assignments(range(2), {}).take((1, 1), cpus(0)) == NOTHING
    assert Assignments((), {}).take((1, 1), cpus(2)) == NOTHING


def test_who_reserves_more_than_there_is_gets_all_of_it() -> None:
    assert Assignments([2, 5], {}).take((1, 1), cpus(7)).cpus == (2, 5)


def test_pieces_are_handed_out_by_their_numbers_and_come_back() -> None:
    assignments = Assignments((), {"gpu": (1, 3), "nuke": (0, 1, 2)})
    assert assignments.take((1, 1), cpus(1, gpu=1, nuke=2)).indices == {"gpu": (1,), "nuke": (0, 1)}
    assert assignments.take((2, 1), cpus(1, gpu=1)).indices == {"gpu": (3,)}
    with pytest.raises(BadReservation, match="1 gpu"):
        assignments.take((3, 1), cpus(1, gpu=1))
    assignments.release((1, 1))
    assignments.release((1, 1))
    assert assignments.take((3, 1), cpus(1, gpu=1)).indices == {"gpu": (1,)}


def test_the_attempt_that_is_dying_keeps_what_it_has_when_the_next_one_begins() -> None:
    assignments = Assignments((), {"gpu": (0, 1)})
    assert assignments.take((7, 1), cpus(1, gpu=1)).indices == {"gpu": (0,)}
    assert assignments.take((7, 2), cpus(1, gpu=1)).indices == {"gpu": (1,)}
    assignments.release((7, 1))
    assert assignments.take((8, 1), cpus(1, gpu=1)).indices == {"gpu": (0,)}


def test_what_is_handed_over_keeps_what_it_has_and_nobody_else_gets_it() -> None:
    before = Assignments(range(4), {"gpu": (0, 1)})
    kept = before.take((1, 1), cpus(2, gpu=1))
    before.take((2, 1), cpus(1, gpu=1))
    after = Assignments(range(4), {"gpu": (0, 1)})
    after.adopt(before.export([(1, 1), (99, 1)]))
    assert kept == Assigned((0, 1), {"gpu": (0,)})
    assert after.take((3, 1), cpus(2, gpu=1)) == Assigned((2, 3), {"gpu": (1,)})
    after.release((1, 1))
    assert after.take((4, 1), cpus(2, gpu=1)) == Assigned((0, 1), {"gpu": (0,)})


def test_pieces_that_the_worker_has_no_more_are_not_handed_out_again() -> None:
    before = Assignments((), {"gpu": (0, 5)})
    before.take((1, 1), cpus(1, gpu=2))
    after = Assignments((), {"gpu": (5, 6)})
    after.adopt(before.export([(1, 1)]))
    assert after.take((2, 1), cpus(1, gpu=1)).indices == {"gpu": (6,)}
    after.release((1, 1))
    assert after.take((3, 1), cpus(1, gpu=1)).indices == {"gpu": (5,)}
    with pytest.raises(BadReservation):
        after.take((4, 1), cpus(1, gpu=1))


@given(st.lists(st.fractions(0, 5, max_denominator=12), max_size=12), st.integers(1, 6))
def test_who_gets_cpus_gets_as_many_different_ones_as_it_asked_for(wanted: list[Fraction], count: int) -> None:
    assignments = Assignments(range(count), {})
    for n, amount in enumerate(wanted):
        found = assignments.take((n, 1), Capacity(amount)).cpus
        assert len(found) == len(set(found)) == min(math.ceil(amount), count)


class AnyOrder(RuleBasedStateMachine):
    """Takes and releases in any order, never more than the ledger would allow."""

    @initialize(count=st.integers(1, 6), pieces=st.sets(st.integers(0, 20), min_size=1, max_size=5))
    def begin(self, count: int, pieces: set[int]) -> None:
        self.count, self.pieces = count, pieces
        self.assignments = Assignments(range(count), {"gpu": sorted(pieces)})
        self.held: dict[tuple[int, int], tuple[Capacity, Assigned]] = {}
        self.number = 0

    @rule(
        amount=st.sampled_from(["0", "1/4", "1/3", "1/2", "1", "3/2", "2", "3"]).map(Fraction), gpus=st.integers(0, 2)
    )
    def take(self, amount: Fraction, gpus: int) -> None:
        free = self.count - sum(need.cpus for need, _ in self.held.values())
        left = len(self.pieces) - sum(need.resources.get("gpu", 0) for need, _ in self.held.values())
        if amount > free or gpus > left:
            return
        idle = set(range(self.count)) - {cpu for _, assigned in self.held.values() for cpu in assigned.cpus}
        need = Capacity(amount, resources={"gpu": gpus} if gpus else {})
        self.number += 1
        found = self.assignments.take((self.number, 1), need)
        if amount.denominator == 1 and len(idle) >= amount:
            assert set(found.cpus) <= idle  # a choice that shares with nobody exists: it is taken
        self.held[self.number, 1] = need, found

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.held)))
        self.assignments.release(holder)
        del self.held[holder]

    @precondition(lambda self: self.held)
    @rule()
    def restart(self) -> None:
        exported = self.assignments.export(self.held)
        self.assignments = Assignments(range(self.count), {"gpu": sorted(self.pieces)})
        self.assignments.adopt(exported)

    @invariant()
    def no_piece_is_held_twice(self) -> None:
        held = [n for _, assigned in getattr(self, "held", {}).values() for n in assigned.indices.get("gpu", ())]
        assert len(held) == len(set(held))
        assert set(held) <= getattr(self, "pieces", set())


TestAnyOrder = AnyOrder.TestCase
