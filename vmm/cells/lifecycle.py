"""The life cycle of a worker as a table. Sans-IO: vmm.cells.worker feeds events, obeys, and arms the timers."""

from __future__ import annotations

from base.lean_typing import Enum, NamedTuple
from vmm.errors import StateError

SECOND_NS = 1_000_000_000


class WorkerState(Enum):
    """Where a worker is in its life, as the controller knows it."""

    ABSENT = "absent"
    SPAWNED = "spawned"
    GREETED = "greeted"
    CONFIGURED = "configured"
    STARTED = "started"
    RUNNING = "running"
    PAUSED = "paused"
    SAVED = "saved"
    REPLACED = "replaced"
    FINISHING = "finishing"
    FAILED = "failed"
    ENDED = "ended"


class WorkerEvent(Enum):
    """What can happen to a worker."""

    SPAWN = "spawn"
    HELLO = "hello"
    CONFIGURED = "configured"
    START = "start"  # it was told to run
    RESUMED = "resumed"
    PAUSED = "paused"
    SAVED = "saved"  # the complete state of its vCPUs was read
    LOADED = "loaded"  # it has got the state of another worker's vCPUs
    REPLACED = "replaced"  # another worker runs its vCPUs from now on
    FINISH = "finish"
    VCPU_EXITED = "vcpu-exited"
    BREACH = "breach"
    EXPIRED = "expired"  # the deadline of its state has passed
    DIED = "died"


_S = WorkerState
_E = WorkerEvent

#: (state, event) → next state. What is not listed cannot happen and is a breach of the protocol.
TRANSITIONS: dict[tuple[WorkerState, WorkerEvent], WorkerState] = {
    (_S.ABSENT, _E.SPAWN): _S.SPAWNED,
    (_S.SPAWNED, _E.HELLO): _S.GREETED,
    (_S.GREETED, _E.CONFIGURED): _S.CONFIGURED,
    (_S.CONFIGURED, _E.LOADED): _S.PAUSED,
    (_S.CONFIGURED, _E.START): _S.STARTED,
    (_S.CONFIGURED, _E.PAUSED): _S.PAUSED,
    (_S.STARTED, _E.START): _S.STARTED,
    (_S.STARTED, _E.RESUMED): _S.RUNNING,
    (_S.STARTED, _E.PAUSED): _S.PAUSED,
    (_S.RUNNING, _E.START): _S.RUNNING,
    (_S.RUNNING, _E.RESUMED): _S.RUNNING,
    (_S.RUNNING, _E.PAUSED): _S.PAUSED,
    (_S.PAUSED, _E.START): _S.PAUSED,
    (_S.PAUSED, _E.RESUMED): _S.RUNNING,
    (_S.PAUSED, _E.PAUSED): _S.PAUSED,
    (_S.PAUSED, _E.SAVED): _S.SAVED,
    # A replacement that was rolled back: the worker goes on.
    (_S.SAVED, _E.PAUSED): _S.PAUSED,
    (_S.SAVED, _E.REPLACED): _S.REPLACED,
    (_S.STARTED, _E.VCPU_EXITED): _S.FAILED,
    (_S.RUNNING, _E.VCPU_EXITED): _S.FAILED,
    (_S.PAUSED, _E.VCPU_EXITED): _S.FAILED,
    (_S.FINISHING, _E.VCPU_EXITED): _S.FINISHING,
    (_S.FAILED, _E.VCPU_EXITED): _S.FAILED,
    (_S.ENDED, _E.SPAWN): _S.SPAWNED,
}
#: States of a worker whose process exists.
ALIVE = frozenset(WorkerState) - {_S.ABSENT, _S.ENDED}
#: States in which its vCPUs run, or may.
MAY_RUN = frozenset((_S.STARTED, _S.RUNNING))
for _state in ALIVE:
    TRANSITIONS.setdefault((_state, _E.FINISH), _S.FINISHING)
    TRANSITIONS.setdefault((_state, _E.BREACH), _S.FAILED)
    TRANSITIONS.setdefault((_state, _E.DIED), _S.ENDED)


class Deadline(NamedTuple):
    """How long a worker may stay in a state. Then it is killed, and takes that state's transition for EXPIRED."""

    nanoseconds: int
    text: str


#: States that somebody waits to be left. In the others a worker may stay for ever; an operation that wants something
#: of it has deadlines of its own (vmm.operations.tables). The supervisor gives the controller 0.6 s in all to end.
DEADLINES: dict[WorkerState, Deadline] = {
    _S.SPAWNED: Deadline(30 * SECOND_NS, "did not report"),
    _S.REPLACED: Deadline(400_000_000, "did not end after it was replaced"),
    _S.FINISHING: Deadline(400_000_000, "did not end"),
    _S.FAILED: Deadline(400_000_000, "did not end although it was killed"),
}
TRANSITIONS.update({(state, _E.EXPIRED): state for state in DEADLINES})
TRANSITIONS[_S.SPAWNED, _E.EXPIRED] = _S.FAILED


def next_state(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """Return the state after ``event``. Raises StateError if the table does not allow it."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise StateError(f"a worker that is {state.value} cannot take the event {event.value}") from None
