"""Groups in the table: the value of their row, whose fault their failure is, what joins them, how far a kill of one reaches."""

import json
from dataclasses import replace
from signal import SIGTERM
from typing import Any

import pytest
from farm import GROUP, SPEC, after, claim, finish, ids, outcome, run, states, submit, worker

from aque.errors import BadInput
from aque.states import State
from aque.store import Store
from aque.values import Condition, Dependency, Pattern, Replacement, Requirement, TaskSpec

FUNCTION = replace(SPEC, requirement=Requirement("celery", Pattern.PYTHON), argv=(), function="module:function")


def group(group_id: int, *members: int, **fields: Any) -> TaskSpec:
    edges = tuple(Dependency(i, Condition.ANY) for i in dict.fromkeys(members))
    return replace(SPEC, id=group_id, requirement=GROUP, argv=(), dependencies=edges, inputs=members, **fields)


def member(task_id: int, group_id: int) -> TaskSpec:
    return replace(FUNCTION, id=task_id, job_id=group_id)


def succeed(store: Store, worker_id: int, **values: bytes) -> None:
    for task_id, value in values.items():
        (task,) = claim(store, [int(task_id[1:])], worker_id)
        finish(store, replace(outcome(task), value=value))


def test_the_value_of_a_group_is_the_list_of_its_members_in_its_own_order(store: Store) -> None:
    outer, inner, a, b, c = ids(store, 5)
    submit(store, [member(i, inner) for i in (a, b, c)] + [group(inner, c, a), group(outer, b, inner, a, b)])
    succeed(store, worker(store), **{f"t{b}": b'"b"', f"t{a}": b'{"a":1}', f"t{c}": b"3"})
    with store.connect() as connection:
        found = store.values(connection, [outer, inner])
    assert json.loads(found[inner]) == [3, {"a": 1}]
    assert json.loads(found[outer]) == ["b", [3, {"a": 1}], {"a": 1}, "b"]


def test_a_member_without_a_result_is_null_and_a_job_has_no_value(store: Store) -> None:
    canvas, job, a = ids(store, 3)
    submit(store, [member(a, canvas), group(canvas, a), replace(group(job, a), inputs=())])
    run(store, worker(store), a)
    with store.connect() as connection:
        assert store.values(connection, [canvas, job]) == {canvas: b"[null]", job: b"null"}


def test_the_failure_of_a_group_is_that_of_the_task_that_caused_it(store: Store) -> None:
    outer, inner, first, last, fine = ids(store, 5)
    chain = [replace(member(first, inner), name="first"), replace(after(last, first, spec=FUNCTION), job_id=inner)]
    submit(store, [*chain, member(fine, outer), group(inner, last), group(outer, fine, inner)])
    (task,) = claim(store, [first], worker(store, "one"))
    finish(store, replace(outcome(task, State.ERROR), error=b'{"type":"ValueError","message":"no"}'))
    run(store, worker(store, "two"), fine)
    assert states(store)[last] == "skipped"
    with store.connect() as connection:
        found = {i: json.loads(value) for i, value in store.values(connection, [outer, last, first]).items()}
        assert store.groups.cause(connection, outer) == first
    for failure in found.values():
        assert (failure["type"], failure["message"], failure["cause"]) == ("ValueError", "no", str(first))


def test_a_group_is_known_by_the_ids_of_its_members(store: Store) -> None:
    outer, inner, a, b = ids(store, 4)
    submit(
        store,
        [
            replace(member(a, inner), celery_id="first"),
            member(b, outer),
            group(inner, a, celery_id="within"),
            group(outer, b, inner),
        ],
    )
    with store.connect() as connection:
        assert store.groups.tree(connection, outer) == (str(outer), [str(b), ("within", ["first"])])
        assert store.groups.tree(connection, a) is None


def test_what_joins_a_group_is_waited_for_and_comes_last(store: Store) -> None:
    whole, a, new = ids(store, 3)
    submit(store, [member(a, whole), group(whole, a)])
    at_work = worker(store)
    (running,) = claim(store, [a], at_work)
    with store.connect() as connection:
        store.intern(connection, [FUNCTION])
    with store.begin() as connection:
        state = store.submit(connection, [member(new, whole)])[new]
        store.groups.join(connection, new, state, a)
    finish(store, replace(outcome(running), value=b"1"))
    assert states(store)[whole] == "pending"
    succeed(store, at_work, **{f"t{new}": b"2"})
    with store.connect() as connection:
        assert store.values(connection, [whole])[whole] == b"[1,2]"
    with store.begin() as connection, pytest.raises(BadInput, match="no member of a group that is still open"):
        store.groups.join(connection, new, State.READY, a)


def test_a_kill_of_a_group_takes_the_members_of_the_groups_in_it(store: Store) -> None:
    outer, inner, a, b = ids(store, 4)
    submit(store, [member(a, inner), member(b, outer), group(inner, a, job_id=outer), group(outer, b, inner)])
    with store.begin() as connection:
        store.kill(connection, [outer], SIGTERM)
    assert set(states(store).values()) == {"cancelled"}


def test_a_task_whose_replacement_has_failed_already_ends_with_it(store: Store) -> None:
    replaced, step, follower = ids(store, 3)
    submit(store, [replace(FUNCTION, id=replaced), replace(FUNCTION, id=step), after(follower, replaced)])
    at_work = worker(store)
    (running,) = claim(store, [replaced], at_work)
    run(store, at_work, step, state=State.ERROR)
    place = Replacement("next", "module:next", b"[[],{}]", (), (Dependency(step),))
    finish(store, replace(outcome(running, State.PENDING), replacement=place))
    assert {states(store)[i] for i in (replaced, follower)} == {"skipped"}
