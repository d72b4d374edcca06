"""The life cycle: one table of moves, and the sets that everything else asks."""

import pytest
from celery import states as celery_states
from hypothesis import given
from hypothesis import strategies as st

from aque import states
from aque.states import (
    ACTIVE_STATES,
    CELERY_STATE,
    COMPLETE_STATES,
    MOVES,
    READY_STATES,
    UNREADY_STATES,
    Event,
    Reason,
    State,
)


def test_every_state_is_in_exactly_one_set() -> None:
    sets = [READY_STATES, UNREADY_STATES, ACTIVE_STATES, COMPLETE_STATES]
    assert sorted(state for group in sets for state in group) == sorted(State)


def test_every_state_can_be_reached_from_the_two_in_which_tasks_enter() -> None:
    reached = {State.CREATING, State.PENDING, State.READY}
    while more := {target for (source, _), target in MOVES.items() if source in reached} - reached:
        reached |= more
    assert reached == set(State)


def test_every_event_happens_somewhere() -> None:
    assert {event for _, event in MOVES} == set(Event)


@pytest.mark.parametrize("state", sorted(COMPLETE_STATES))
def test_only_a_retry_leaves_a_complete_state(state: State) -> None:
    assert {event for source, event in MOVES if source is state} == {Event.RETRY}
    assert MOVES[state, Event.RETRY] is State.PENDING


@pytest.mark.parametrize("state", sorted(set(State) - COMPLETE_STATES))
def test_every_other_state_has_a_way_to_a_complete_one(state: State) -> None:
    reached = {state}
    while more := {target for (source, _), target in MOVES.items() if source in reached} - reached:
        reached |= more
    assert reached & COMPLETE_STATES


def test_a_task_is_started_only_from_where_it_may_be_claimed() -> None:
    assert states.sources(Event.START) == {State.READY, State.CLAIMED}
    assert states.sources(Event.CLAIM) == READY_STATES


def test_what_a_worker_loses_or_gives_back_may_be_claimed_again() -> None:
    for event in (Event.LOSE, Event.GIVE_BACK, Event.REPEAT):
        assert {MOVES[source, event] for source in states.sources(event)} == {State.READY}
        assert states.sources(event) <= ACTIVE_STATES


def test_a_person_kills_what_runs_and_withdraws_what_does_not() -> None:
    assert states.sources(Event.KILL) == {State.RUNNING, State.WAITING}
    assert states.sources(Event.CANCEL) == {State.CLAIMED} | READY_STATES | UNREADY_STATES


@given(st.lists(st.sampled_from(Event), max_size=60))
def test_no_story_leaves_the_table_and_the_complete_states_hold(story: list[Event]) -> None:
    state = State.PENDING
    for event in story:
        following = MOVES.get((state, event))
        if following is None:
            continue
        assert state not in COMPLETE_STATES or event is Event.RETRY
        state = following


def test_celery_is_told_ready_exactly_of_what_is_complete() -> None:
    assert set(CELERY_STATE) == set(State)
    assert set(CELERY_STATE.values()) <= celery_states.ALL_STATES
    assert {state for state in State if CELERY_STATE[state] in celery_states.READY_STATES} == COMPLETE_STATES


def test_the_diagram_has_a_line_for_every_move() -> None:
    lines = states.diagram().splitlines()
    assert len(lines) == 1 + len(MOVES)
    assert "    ready --> running: start" in lines


def test_the_values_are_the_words_of_the_command_line() -> None:
    assert {str(state) for state in State} == {
        *("creating", "pending", "held", "ready", "claimed", "running", "waiting"),
        *("success", "error", "killed", "cancelled", "skipped"),
    }
    assert all(str(reason) == reason.name.lower() for reason in Reason)
