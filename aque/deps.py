"""The graph: insertion order, cycles, what each task waits for, and what an outcome makes impossible."""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from aque.errors import Cycle
from aque.states import COMPLETE_STATES, State
from aque.values import Condition, Dependency


def is_satisfied(condition: Condition, state: State) -> bool:
    """True if an upstream task in this state lets the dependent start. Of a complete upstream task exactly one of
    `ok` and `failed` is satisfied; skipped and cancelled count as failed, and not as `error`."""
    if state not in COMPLETE_STATES:
        return False
    if condition is Condition.ERROR:
        return state is State.ERROR
    return condition is Condition.ANY or (condition is Condition.OK) == (state is State.SUCCESS)


def is_impossible(condition: Condition, state: State) -> bool:
    """True if the dependent can never start because of this upstream task."""
    return state in COMPLETE_STATES and not is_satisfied(condition, state)


def in_order(graph: Mapping[int, Sequence[Dependency]]) -> list[int]:
    """The tasks of `graph` (task -> its dependencies), each after its dependencies inside the graph.

    Dependencies on tasks outside of `graph` are passed over. Raises Cycle with the path of one cycle.
    No recursion: a chain may be as long as memory allows.
    """
    waiting = {task: sum(1 for d in dependencies if d.upstream in graph) for task, dependencies in graph.items()}
    downstream: dict[int, list[int]] = {}
    for task, dependencies in graph.items():
        for dependency in dependencies:
            if dependency.upstream in graph:
                downstream.setdefault(dependency.upstream, []).append(task)
    free = deque(task for task, count in waiting.items() if count == 0)
    order: list[int] = []
    while free:
        task = free.popleft()
        order.append(task)
        for dependent in downstream.get(task, ()):
            waiting[dependent] -= 1
            if waiting[dependent] == 0:
                free.append(dependent)
    if len(order) < len(graph):
        raise Cycle(_one_cycle(graph, set(graph).difference(order)))
    return order


def _one_cycle(graph: Mapping[int, Sequence[Dependency]], stuck: set[int]) -> list[int]:
    """A cycle among `stuck`: each of them waits for another of them, so walking upstream must meet itself."""
    seen: dict[int, int] = {}
    path: list[int] = []
    task = min(stuck)
    while task not in seen:
        seen[task] = len(path)
        path.append(task)
        task = min(d.upstream for d in graph[task] if d.upstream in stuck)
    return [*path[seen[task] :], task]


@dataclass(frozen=True, slots=True)
class Start:
    """How a task enters the table: its first state and how many of its dependencies are left."""

    state: State
    unmet: int


def starts(
    graph: Mapping[int, Sequence[Dependency]],
    groups: Iterable[int],
    outside: Mapping[int, State],
    timed: Iterable[int] = (),
) -> dict[int, Start]:
    """The first state of every task in `graph`, in insertion order.

    `outside` holds the states of the tasks that the graph depends on and does not contain; one that has already failed
    makes its dependents `skipped` here and now, and so on down the graph. `groups` are the tasks that need no worker:
    with nothing left to wait for they are complete at once. `timed` are those that wait for a time too, which counts as one
    dependency.
    """
    group_ids, timed_ids = set(groups), set(timed)
    states: dict[int, State] = dict(outside)
    result: dict[int, Start] = {}
    for task in in_order(graph):
        known = [(d.condition, states[d.upstream]) for d in graph[task]]
        unmet = sum(1 for condition, state in known if not is_satisfied(condition, state)) + (task in timed_ids)
        if any(is_impossible(condition, state) for condition, state in known):
            state = State.SKIPPED
        elif unmet:
            state = State.PENDING
        elif task in group_ids:
            state = group_end(state for _, state in known)
        else:
            state = State.READY
        states[task] = state
        result[task] = Start(state, unmet)
    return result


def group_end(members: Iterable[State]) -> State:
    """How a group ends whose members have ended: success if all of them succeeded."""
    return State.SUCCESS if all(state is State.SUCCESS for state in members) else State.ERROR


def needed(by: Iterable[int], needs: Iterable[tuple[int, int]], without: Collection[int]) -> set[int]:
    """What the tasks `by` need, and what that needs, and so on: `needs` holds pairs (needed task, task that needs it).
    Nothing in `without` counts, nor what is needed only because of that."""
    upstream: dict[int, list[int]] = {}
    for needed_task, task in needs:
        upstream.setdefault(task, []).append(needed_task)
    found: set[int] = set()
    look = list(by)
    while look:
        new = {i for i in upstream.get(look.pop(), ()) if i not in found and i not in without}
        found |= new
        look += new
    return found
