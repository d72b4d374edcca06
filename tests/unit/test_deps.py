"""The graph: order, cycles, what waits and what an outcome makes impossible; checked against a slow, obvious answer."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aque.deps import group_end, in_order, is_impossible, is_satisfied, needed, starts
from aque.errors import BadGraph, Cycle
from aque.states import COMPLETE_STATES, State
from aque.values import Condition, Dependency

Graph = dict[int, list[Dependency]]
LONG = 100_000


@st.composite
def acyclic(draw: st.DrawFn, outside: int = 0) -> Graph:
    """Tasks in a random order, each after some of those before it (and after some of the ids -1, -2, ... outside)."""
    count = draw(st.integers(1, 30))
    ids = draw(st.permutations(range(1, count + 1)))
    graph: Graph = {}
    for position, task in enumerate(ids):
        known = [*ids[:position], *range(-outside, 0)]
        upstream = draw(st.lists(st.sampled_from(known), unique=True, max_size=5)) if known else []
        graph[task] = [Dependency(u, draw(st.sampled_from(Condition))) for u in upstream]
    return {task: graph[task] for task in draw(st.permutations(ids))}


@given(acyclic(outside=2))
def test_every_task_comes_once_and_after_its_dependencies(graph: Graph) -> None:
    order = in_order(graph)
    assert sorted(order) == sorted(graph)
    position = {task: index for index, task in enumerate(order)}
    for task, dependencies in graph.items():
        assert all(position[d.upstream] < position[task] for d in dependencies if d.upstream in graph)


@given(acyclic(), st.data())
def test_one_edge_backwards_is_found_as_a_cycle_with_its_path(graph: Graph, data: st.DataObject) -> None:
    order = in_order(graph)
    last = data.draw(st.sampled_from(order))
    chain = [last]
    while graph[chain[-1]] and data.draw(st.booleans()):
        chain.append(data.draw(st.sampled_from(graph[chain[-1]])).upstream)
    graph[chain[-1]] = [*graph[chain[-1]], Dependency(last)]
    with pytest.raises(Cycle) as raised:
        in_order(graph)
    path = raised.value.path
    assert path[0] == path[-1]
    assert len(path) >= 2
    for task, upstream in pairwise(path):
        assert upstream in {d.upstream for d in graph[task]}
    assert " -> ".join(map(str, path)) in str(raised.value) or len(path) > 12


def test_a_task_that_waits_for_itself_is_a_cycle() -> None:
    with pytest.raises(Cycle, match="7 -> 7") as raised:
        in_order({7: [Dependency(7)]})
    assert isinstance(raised.value, BadGraph)


def test_a_chain_of_100000_needs_no_recursion() -> None:
    graph = {task: [Dependency(task - 1)] if task else [] for task in range(LONG)}
    assert in_order(dict(reversed(graph.items()))) == list(range(LONG))
    assert starts(graph, [], {})[LONG - 1].state is State.PENDING
    skipped = starts({**graph, 0: [Dependency(-1)]}, [], {-1: State.ERROR})
    assert {start.state for start in skipped.values()} == {State.SKIPPED}


def test_a_cycle_of_100000_needs_no_recursion_and_its_message_stays_short() -> None:
    with pytest.raises(Cycle) as raised:
        in_order({task: [Dependency((task - 1) % LONG)] for task in range(LONG)})
    assert len(raised.value.path) == LONG + 1
    assert len(str(raised.value)) < 500


def test_100000_tasks_of_which_one_waits_for_all_others_need_no_recursion() -> None:
    graph: Graph = {task: [] for task in range(1, LONG)}
    graph[0] = [Dependency(task) for task in graph]
    assert in_order(graph)[-1] == 0
    assert starts(graph, [], {})[0].unmet == LONG - 1


@pytest.mark.parametrize("condition", Condition)
@pytest.mark.parametrize("state", State)
def test_a_condition_is_open_until_its_task_is_complete_and_then_met_or_impossible(
    condition: Condition, state: State
) -> None:
    met, impossible = is_satisfied(condition, state), is_impossible(condition, state)
    assert (met or impossible) == (state in COMPLETE_STATES)
    assert not (met and impossible)


@pytest.mark.parametrize("state", sorted(COMPLETE_STATES))
def test_of_a_complete_task_exactly_one_of_ok_and_failed_is_met_and_any_always(state: State) -> None:
    assert is_satisfied(Condition.ANY, state)
    assert is_satisfied(Condition.OK, state) == (state is State.SUCCESS)
    assert is_satisfied(Condition.FAILED, state) == (state is not State.SUCCESS)
    assert is_satisfied(Condition.ERROR, state) == (state is State.ERROR)


@given(acyclic(outside=3), st.fixed_dictionaries({i: st.sampled_from(State) for i in (-1, -2, -3)}), st.data())
def test_first_states_are_what_the_dependencies_say(
    graph: Graph, outside: dict[int, State], data: st.DataObject
) -> None:
    groups = data.draw(st.sets(st.sampled_from(sorted(graph))))
    found = starts(graph, groups, outside)
    assert list(found) == in_order(graph)
    states = {**outside, **{task: start.state for task, start in found.items()}}
    for task, start in found.items():
        known = [(d.condition, states[d.upstream]) for d in graph[task]]
        open_edges = sum(not is_satisfied(condition, state) for condition, state in known)
        assert start.unmet == open_edges
        if any(is_impossible(condition, state) for condition, state in known):
            assert start.state is State.SKIPPED
        elif open_edges:
            assert start.state is State.PENDING
        else:
            assert start.state in ({State.SUCCESS, State.ERROR} if task in groups else {State.READY})


def test_a_group_succeeds_if_all_of_its_members_have() -> None:
    assert group_end([]) is State.SUCCESS
    assert group_end([State.SUCCESS, State.SUCCESS]) is State.SUCCESS
    for state in COMPLETE_STATES - {State.SUCCESS}:
        assert group_end([State.SUCCESS, state]) is State.ERROR


def test_what_tasks_need_is_found_through_all_that_needs_it_in_turn() -> None:
    needs = [(1, 2), (2, 3), (4, 3), (5, 4), (3, 6)]
    assert needed([3], needs, without=()) == {1, 2, 4, 5}
    assert needed([3], needs, without={4}) == {1, 2}
    assert needed([2, 4], needs, without=()) == {1, 5}
    assert needed([1], needs, without=()) == set()
    assert needed([1], [(1, 2), (2, 1)], without=()) == {1, 2}  # of a graph that is not one, too, it ends
