"""The life cycle of a worker as a table. Sans-IO: the shell in vmm.workers feeds events and obeys."""

from __future__ import annotations

from ipc.typed import Enum
from vmm.errors import StateError


class WorkerState(Enum):
    """Where a worker is in its life, as the controller knows it."""

    ABSENT = "absent"
    SPAWNED = "spawned"
    GREETED = "greeted"
    CONFIGURED = "configured"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHING = "finishing"
    FAILED = "failed"
    ENDED = "ended"


class WorkerEvent(Enum):
    """What can happen to a worker."""

    SPAWN = "spawn"
    HELLO = "hello"
    CONFIGURED = "configured"
    RESUMED = "resumed"
    PAUSED = "paused"
    FINISH = "finish"
    VCPU_EXITED = "vcpu-exited"
    BREACH = "breach"
    DIED = "died"


_S = WorkerState
_E = WorkerEvent

#: (state, event) → next state. What is not listed cannot happen and is a breach of the protocol.
TRANSITIONS: dict[tuple[WorkerState, WorkerEvent], WorkerState] = {
    (_S.ABSENT, _E.SPAWN): _S.SPAWNED,
    (_S.SPAWNED, _E.HELLO): _S.GREETED,
    (_S.GREETED, _E.CONFIGURED): _S.CONFIGURED,
    (_S.CONFIGURED, _E.RESUMED): _S.RUNNING,
    (_S.PAUSED, _E.RESUMED): _S.RUNNING,
    (_S.RUNNING, _E.RESUMED): _S.RUNNING,
    (_S.RUNNING, _E.PAUSED): _S.PAUSED,
    (_S.CONFIGURED, _E.PAUSED): _S.PAUSED,
    (_S.PAUSED, _E.PAUSED): _S.PAUSED,
    (_S.CONFIGURED, _E.VCPU_EXITED): _S.FAILED,
    (_S.RUNNING, _E.VCPU_EXITED): _S.FAILED,
    (_S.PAUSED, _E.VCPU_EXITED): _S.FAILED,
    (_S.FINISHING, _E.VCPU_EXITED): _S.FINISHING,
    (_S.FAILED, _E.VCPU_EXITED): _S.FAILED,
    (_S.FINISHING, _E.DIED): _S.ENDED,
    (_S.FAILED, _E.DIED): _S.ENDED,
    (_S.ENDED, _E.SPAWN): _S.SPAWNED,
}
#: States of a worker whose process exists.
ALIVE = frozenset(WorkerState) - {_S.ABSENT, _S.ENDED}
for _state in ALIVE:
    TRANSITIONS.setdefault((_state, _E.FINISH), _S.FINISHING)
    TRANSITIONS.setdefault((_state, _E.BREACH), _S.FAILED)
    TRANSITIONS.setdefault((_state, _E.DIED), _S.ENDED)


def next_state(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """Return the state after ``event``. Raises StateError if the table does not allow it."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise StateError(f"a worker that is {state.value} cannot take the event {event.value}") from None
