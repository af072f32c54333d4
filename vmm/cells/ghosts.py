"""Forwards what reaches the ghosts of one worker to the worker that runs the real vCPU.

An interrupt is forwarded within the kernel from its second time on: for each vCPU and vector there is one eventfd,
which the stubs of every worker's ghost signal (ioeventfd) and which raises the interrupt in the owner's VM (irqfd).
All of it is driven by callbacks: nothing here waits, so that exits go on being served.
"""

from __future__ import annotations

from base.lean_typing import Any, Callable, Sequence
from ipc.launch_plan import MAX_IPI_PATHS
from ipc.messages import descriptors
from ipc.messages.ghosts import (
    GHOST_INIT,
    GHOST_INTERRUPT,
    GHOST_STARTUP,
    VCPU_STARTING,
    GhostEvent,
    GhostEventDone,
    InitVcpu,
    OpenIpiSource,
    OpenIpiTarget,
    PlaceStub,
    RaiseInterrupt,
    StartVcpu,
)
from ipc.messages.records import Failed
from ipc.shared_event import raise_event
from vmm.cells.vms import IpiPath, WorkerVms
from vmm.cells.worker import Worker
from vmm.errors import VmmError
from vmm.placement import Placement

#: A Linux guest uses four per vCPU. A guest that uses more has them forwarded by messages.
MAX_PATHS = MAX_IPI_PATHS


class GhostForwarder:
    """One per microVM. ``failed`` is called with a text when a worker cannot do what it must."""

    def __init__(
        self, placement: Placement, workers: Sequence[Worker], vms: WorkerVms, failed: Callable[[str], None]
    ) -> None:
        self._placement = placement
        self._workers = workers
        self._vms = vms
        self._failed = failed
        #: How many events came, by kind.
        self.events: dict[int, int] = {}

    def handle(self, worker: Worker, event: GhostEvent) -> None:
        """Carry out an event of a worker, then tell it so."""
        kind, vcpu, vector = event
        self.events[kind] = self.events.get(kind, 0) + 1
        own = vcpu in worker.assignment.vcpus
        if own != (kind == VCPU_STARTING) or not (own or vcpu in worker.assignment.ghosts):
            worker.breach(f"a ghost event of vCPU {vcpu}, which is not its")
            return

        def done(_reply: Any = None) -> None:
            self._submit(worker, GhostEventDone(kind, vcpu, vector), lambda reply: None)

        owner = self._workers[self._placement.owner(vcpu)]
        if kind == VCPU_STARTING:
            self._place_stubs(worker, vcpu, done)
        elif kind == GHOST_STARTUP:
            self._submit(owner, StartVcpu(vcpu, vector), done)
        elif kind == GHOST_INIT:
            self._submit(owner, InitVcpu(vcpu), done)
        elif kind == GHOST_INTERRUPT and ((vcpu, vector) in self._vms.paths or len(self._vms.paths) < MAX_PATHS):
            self._by_path(worker, owner, vcpu, vector, done)
        else:
            self._submit(owner, RaiseInterrupt(vcpu, vector), done)

    def _place_stubs(self, owner: Worker, vcpu: int, done: Callable[[], None]) -> None:
        """A vCPU is about to run for the first time: nothing that is sent to it may be lost from now on."""
        others = [worker for worker in self._workers if worker is not owner]
        left = len(others)

        def placed(_reply: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                done()

        for worker in others:
            self._submit(worker, PlaceStub(vcpu), placed)

    # ------------------------------------------------------------ paths within the kernel

    def _by_path(self, source: Worker, owner: Worker, vcpu: int, vector: int, done: Callable[[], None]) -> None:
        path = self._vms.paths.get((vcpu, vector))
        if path is None:
            path = self._vms.add_path(vcpu, vector, owner.index)
            raise_event(path.eventfd)
            self._open_target(path, owner, vcpu, vector)
        else:
            raise_event(path.eventfd)  # raised at once or, if the owner is not ready yet, as soon as it is

        def open_source() -> None:
            if source.index in path.sources:
                done()
                return
            path.sources.add(source.index)
            source.send_descriptor(descriptors.IpiPath(vcpu, vector), path.eventfd)
            self._submit(source, OpenIpiSource(vcpu, vector), lambda reply: done())

        if path.open:
            open_source()
        else:
            path.waiting.append(open_source)

    def _open_target(self, path: IpiPath, owner: Worker, vcpu: int, vector: int) -> None:
        def opened(_reply: Any) -> None:
            path.open = True
            waiting, path.waiting = path.waiting, []
            for each in waiting:
                each()

        owner.send_descriptor(descriptors.IpiPath(vcpu, vector), path.eventfd)
        self._submit(owner, OpenIpiTarget(vcpu, vector, path.gsi), opened)

    def _submit(self, worker: Worker, message: Any, callback: Callable[[Any], None]) -> None:
        def answered(reply: Any) -> None:
            if isinstance(reply, Failed):
                self._failed(f"The worker of vCPU {worker.index} could not forward an interrupt: {reply.text}")
            else:
                callback(reply)

        try:
            worker.submit(message, answered)
        except VmmError:
            pass  # the worker's end is reported by itself
