"""The life cycle of a worker: the table is complete where a worker can be anything, and closed everywhere else."""

from __future__ import annotations

import random

import pytest

from vmm.cells.lifecycle import ALIVE, DEADLINES, TRANSITIONS, WorkerEvent, WorkerState, next_state
from vmm.errors import StateError

E, S = WorkerEvent, WorkerState


@pytest.mark.parametrize("state", [state for state in WorkerState if state in ALIVE])
def test_a_living_worker_can_be_finished_break_the_protocol_and_die_at_any_time(state):
    assert next_state(state, E.FINISH) is S.FINISHING
    assert next_state(state, E.BREACH) is S.FAILED
    assert next_state(state, E.DIED) is S.ENDED


@pytest.mark.parametrize("state", [S.ABSENT, S.ENDED])
def test_a_worker_that_does_not_exist_can_only_be_spawned(state):
    for event in WorkerEvent:
        if event is E.SPAWN:
            assert next_state(state, event) is S.SPAWNED
        else:
            with pytest.raises(StateError, match=state.value):
                next_state(state, event)


def test_alive_is_everything_between_spawn_and_end():
    assert set(WorkerState) - ALIVE == {S.ABSENT, S.ENDED}


def test_every_state_can_be_reached_and_left():
    reached = {S.ABSENT}
    for _ in WorkerState:
        reached |= {after for (before, _), after in TRANSITIONS.items() if before in reached}
    assert reached == set(WorkerState)
    assert {before for before, _ in TRANSITIONS} == set(WorkerState)


@pytest.mark.parametrize(
    ("event", "allowed"),
    [
        (E.HELLO, {S.SPAWNED}),
        (E.CONFIGURED, {S.GREETED}),
        (E.RESUMED, {S.STARTED, S.PAUSED, S.RUNNING}),
        (E.PAUSED, {S.CONFIGURED, S.STARTED, S.PAUSED, S.RUNNING, S.SAVED}),
        (E.SAVED, {S.PAUSED}),
        (E.LOADED, {S.CONFIGURED}),
        (E.VCPU_EXITED, {S.STARTED, S.PAUSED, S.RUNNING, S.FINISHING, S.FAILED}),
    ],
)
def test_what_a_worker_says_is_possible_only_where_it_makes_sense(event, allowed):
    """No transition out of nowhere: a hostile worker cannot talk itself into a state."""
    assert {state for state, other in TRANSITIONS if other is event} == allowed


def test_a_failed_worker_never_runs_again():
    state = {S.FAILED}
    for _ in WorkerState:
        state |= {after for (before, event), after in TRANSITIONS.items() if before in state and event is not E.SPAWN}
    assert state == {S.FAILED, S.FINISHING, S.ENDED}


def test_a_replaced_worker_never_runs_again():
    state = {S.REPLACED}
    for _ in WorkerState:
        state |= {after for (before, event), after in TRANSITIONS.items() if before in state and event is not E.SPAWN}
    assert state == {S.REPLACED, S.FINISHING, S.FAILED, S.ENDED}


def test_every_state_that_somebody_waits_for_has_a_deadline():
    assert set(DEADLINES) == {S.SPAWNED, S.REPLACED, S.FINISHING, S.FAILED}
    for state in WorkerState:
        assert ((state, E.EXPIRED) in TRANSITIONS) is (state in DEADLINES)
        if state in DEADLINES:
            assert next_state(state, E.EXPIRED) is (S.FAILED if state is S.SPAWNED else state)


def test_a_random_walk_never_leaves_the_table(seed):
    source = random.Random(seed)
    state = S.ABSENT
    greeted = False
    for _ in range(20_000):
        event = source.choice(list(WorkerEvent))
        try:
            after = next_state(state, event)
        except StateError:
            assert (state, event) not in TRANSITIONS
            continue
        if after is S.SPAWNED:
            greeted = False
        greeted |= event is E.HELLO
        assert greeted or after not in (S.GREETED, S.CONFIGURED, S.STARTED, S.RUNNING, S.PAUSED, S.SAVED)
        state = after
