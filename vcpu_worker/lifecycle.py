"""What a worker may be told in which state, as a table. Sans-IO: vcpu_worker.commands asks it before it obeys."""

from __future__ import annotations

from base.lean_typing import Enum
from vcpu_worker.errors import StateError


class State(Enum):
    """Where a worker is, as it knows it itself; Pong tells it."""

    CREATED = "created"
    CONFIGURING = "configuring"
    AWAITING_STATE = "awaiting-state"  # it is to go on for another worker
    PAUSED = "paused"
    RUNNING = "running"
    PAUSING = "pausing"
    HANDED_OVER = "handed-over"  # another worker may be going on for it: it must not run
    FINISHING = "finishing"
    FAILED = "failed"


class Event(Enum):
    """A command, or what has become of one."""

    CONFIGURE = "configure"
    CONFIGURED = "configured"
    CONFIGURED_TO_GO_ON = "configured to go on for another worker"
    RESUME = "resume"
    PAUSE = "pause"
    PARKED = "parked"
    PARK_GHOSTS = "park ghosts"
    SAVE = "save"
    LOAD = "load"
    HAND_OVER = "hand over"
    ROLL_BACK = "roll back"
    TAKE_OVER = "take over"
    FINISH = "finish"
    FAIL = "fail"


_S = State
_E = Event

#: (state, event) → next state. What is not listed is refused, and nothing changes.
TRANSITIONS: dict[tuple[State, Event], State] = {
    (_S.CREATED, _E.CONFIGURE): _S.CONFIGURING,
    (_S.CONFIGURING, _E.CONFIGURED): _S.PAUSED,
    (_S.CONFIGURING, _E.CONFIGURED_TO_GO_ON): _S.AWAITING_STATE,
    (_S.PAUSED, _E.RESUME): _S.RUNNING,
    (_S.RUNNING, _E.RESUME): _S.RUNNING,
    (_S.PAUSING, _E.RESUME): _S.PAUSING,  # it runs on as soon as it has parked
    (_S.RUNNING, _E.PAUSE): _S.PAUSING,
    (_S.PAUSING, _E.PAUSE): _S.PAUSING,
    (_S.PAUSED, _E.PAUSE): _S.PAUSED,
    (_S.PAUSING, _E.PARKED): _S.PAUSED,
    (_S.PAUSED, _E.PARK_GHOSTS): _S.PAUSED,
    (_S.PAUSED, _E.SAVE): _S.PAUSED,
    (_S.HANDED_OVER, _E.SAVE): _S.HANDED_OVER,
    (_S.PAUSED, _E.HAND_OVER): _S.HANDED_OVER,
    (_S.HANDED_OVER, _E.HAND_OVER): _S.HANDED_OVER,
    # What was never handed over is rolled back easily: the command to hand over may have come too late.
    (_S.HANDED_OVER, _E.ROLL_BACK): _S.PAUSED,
    (_S.PAUSED, _E.ROLL_BACK): _S.PAUSED,
    (_S.PAUSING, _E.ROLL_BACK): _S.PAUSING,
    (_S.RUNNING, _E.ROLL_BACK): _S.RUNNING,
    (_S.AWAITING_STATE, _E.LOAD): _S.AWAITING_STATE,
    (_S.AWAITING_STATE, _E.TAKE_OVER): _S.PAUSED,
}
for _state in State:
    TRANSITIONS[_state, _E.FINISH] = _S.FINISHING
    TRANSITIONS[_state, _E.FAIL] = _S.FAILED


def next_state(state: State, event: Event) -> State:
    """Return the state after ``event``. Raises StateError if it is refused."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise StateError(f"the worker is {state.value}: it cannot {event.value}") from None
