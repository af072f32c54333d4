"""The proof that a paused microVM is at rest: no interrupt is on its way between its workers.

What a saved state leaves out may hold nothing: the ghosts of all workers, the messages between workers and controller,
the exit rings. So it is looked at when the state is saved, and what was found is part of the saved state.
"""

from __future__ import annotations

from base.lean_typing import Sequence
from ipc.messages.ghosts import ReadRest, RestRead
from vmm.cells.worker import Worker
from vmm.errors import WorkerError
from vmm.snapshot.state_file import WorkerAtRest


def read_rest(workers: Sequence[Worker], open_exits: Sequence[int]) -> tuple[WorkerAtRest, ...]:
    """Ask all workers what they hold. Raises WorkerError when it is anything at all.

    ``open_exits`` has one number per worker. One without ghosts has nothing to hold, and is not asked.
    """
    asked = [(worker, worker.submit(ReadRest()) if worker.assignment.ghosts else 0) for worker in workers]
    rest = []
    for (worker, sequence), exits in zip(asked, open_exits, strict=True):
        read = worker.collect(sequence, RestRead) if sequence else RestRead(0, ())
        rest.append(at_rest(worker, read, exits))
    for each in rest:
        if text := complaint(each):
            raise WorkerError(text)
    return tuple(rest)


def at_rest(worker: Worker, read: RestRead, open_exits: int) -> WorkerAtRest:
    """Return what a worker told of itself; one that leaves something out is not believed any more."""
    if {ghost.vcpu for ghost in read.ghosts} != set(worker.assignment.ghosts):
        worker.breach("it does not tell of all its ghosts")
    return WorkerAtRest(worker.index, read.open_events, open_exits, read.ghosts)


def complaint(worker: WorkerAtRest) -> str:
    """Say why the microVM is not at rest, or nothing."""
    text = unrest(worker)
    return f"The microVM is not at rest: worker vcpu {worker.worker} holds {text}." if text else ""


def unrest(worker: WorkerAtRest) -> str:
    """Say what a worker holds that is in no vCPU's state; empty: nothing."""
    found = [
        f"{count} {what}"
        for count, what in ((worker.open_events, "open events"), (worker.open_exits, "open exits"))
        if count
    ]
    for ghost in worker.ghosts:
        count = ghost.requested + ghost.in_service + ghost.nmis
        if count:
            found.append(f"{count} interrupts in the ghost of vCPU {ghost.vcpu}")
    return ", ".join(found)
