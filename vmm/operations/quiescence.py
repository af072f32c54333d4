"""The proof that a paused microVM is quiescent: no interrupt is on its way between its workers.

What a saved state leaves out may hold nothing: the ghosts of all workers, the messages between workers and controller,
the exit rings. So it is looked at when the state is saved, and what was found is part of the saved state.
"""

from __future__ import annotations

from base.lean_typing import NamedTuple, Sequence
from ipc.launch_plan import MAX_VCPUS
from ipc.messages.ghosts import QuiescenceRead, QuiescentGhost, ReadQuiescence
from ipc.schema import U32, Flag, Int, ListOf, RecordOf, Section
from vmm.cells.worker import Worker
from vmm.errors import WorkerError


class QuiescentWorker(NamedTuple):
    """What one worker held beside its vCPUs: the proof that nothing else has to be saved.

    ``open_events`` between it and the controller, ``open_exits``: its rings that were not executed to the end.
    """

    worker: int
    open_events: int
    open_exits: int
    ghosts: tuple[QuiescentGhost, ...]


_VCPU = Int(MAX_VCPUS - 1)
#: One a worker. What may be held is nothing: anything else is no honest state.
SECTION = Section(
    "quiescence",
    1,
    RecordOf(
        QuiescentWorker,
        worker=_VCPU,
        open_events=Int(0),
        open_exits=Int(0),
        ghosts=ListOf(
            RecordOf(
                QuiescentGhost,
                vcpu=_VCPU,
                stub=Flag(),
                mp_state=Int(U32),
                requested=Int(0),
                in_service=Int(0),
                nmis=Int(0),
            ),
            MAX_VCPUS,
        ),
    ),
)


def read_quiescence(workers: Sequence[Worker], open_exits: Sequence[int]) -> tuple[QuiescentWorker, ...]:
    """Ask all workers what they hold. Raises WorkerError when it is anything at all.

    ``open_exits`` has one number per worker. One without ghosts has nothing to hold, and is not asked.
    """
    asked = [(worker, worker.submit(ReadQuiescence()) if worker.assignment.ghosts else 0) for worker in workers]
    found = []
    for (worker, sequence), exits in zip(asked, open_exits, strict=True):
        read = worker.collect(sequence, QuiescenceRead) if sequence else QuiescenceRead(0, ())
        found.append(quiescence_of(worker, read, exits))
    for each in found:
        if text := not_quiescent(each):
            raise WorkerError(text)
    return tuple(found)


def quiescence_of(worker: Worker, read: QuiescenceRead, open_exits: int) -> QuiescentWorker:
    """Return what a worker told of itself; one that leaves something out is not believed any more."""
    if {ghost.vcpu for ghost in read.ghosts} != set(worker.assignment.ghosts):
        worker.breach("it does not tell of all its ghosts")
    return QuiescentWorker(worker.index, read.open_events, open_exits, read.ghosts)


def not_quiescent(worker: QuiescentWorker) -> str:
    """Say why the microVM is not quiescent, or nothing."""
    text = busy_with(worker)
    return f"The microVM is not at rest: worker vcpu {worker.worker} holds {text}." if text else ""


def busy_with(worker: QuiescentWorker) -> str:
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
