"""All workers of a controller: forked ahead, forked for a microVM, successors; and who of them has died."""

from __future__ import annotations

import time

import zmq

from base import threads
from base.event_manager import EventManager
from base.lean_typing import TYPE_CHECKING, Any, Callable, Sequence
from ipc.launch_plan import FORKED_AHEAD, ROLE_DEVICE, LaunchPlan
from ipc.messages.supervisor import CellEnded
from vmm.cells.descriptors import VmChange
from vmm.cells.lifecycle import DEADLINES, WorkerState
from vmm.cells.supervisor import SupervisorClient
from vmm.cells.worker import Worker
from vmm.errors import WorkerError
from vmm.placement import Placement

if TYPE_CHECKING:
    from vmm.cells.device_cell import DeviceCell

#: How long a start waits for a worker that has not said HELLO yet: it can also do so while the kernel is loaded.
WELCOME_NS = 1_000_000


class WorkerPool:
    """Owns the workers and their ZeroMQ context, over all microVMs of a controller (it restarts), one at a time.

    :meth:`fork_ahead` asks for the first worker when the controller starts, so that InstanceStart finds it waiting. One
    that died meanwhile is replaced.
    """

    def __init__(self, plan: LaunchPlan, events: EventManager, supervisor: SupervisorClient) -> None:
        self._plan = plan
        self._events = events
        self._supervisor = supervisor
        self._context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self._workers: dict[int, Worker] = {}
        #: Those that are to replace one of the others, or have.
        self._successors: list[Worker] = []
        #: Device cells are the machine's (vmm.cells.device_pool): it hears of their ends.
        self.on_device_cell_ended: Callable[[CellEnded], None] = lambda notice: None
        supervisor.on_cell_ended = self._cell_ended

    def _cell_ended(self, notice: CellEnded) -> None:
        if notice.role == ROLE_DEVICE:
            self.on_device_cell_ended(notice)
            return
        for worker in [*self._workers.values(), *self._successors]:
            if worker.index == notice.worker:
                worker.cell_ended(notice)

    def bind(self) -> None:
        """Make the endpoint of worker 0. That starts ZeroMQ's threads, which have to exist when the filter goes on.

        Raises WorkerError, ThreadError.
        """
        with threads.MadeByLibrary(threads.ZEROMQ_THREADS):
            self._worker(FORKED_AHEAD.worker).bind()

    def fork_ahead(self) -> None:
        """Ask for worker 0 without waiting for it."""
        self._worker(FORKED_AHEAD.worker).spawn(FORKED_AHEAD)

    def _make(self, index: int) -> Worker:
        return Worker(index, self._plan, self._context, self._events, self._supervisor)

    def _worker(self, index: int) -> Worker:
        worker = self._workers.get(index)
        if worker is None:
            worker = self._workers[index] = self._make(index)
        return worker

    def device_cell(self, index: int) -> DeviceCell:
        """Return a device cell, not spawned yet."""
        from vmm.cells.device_cell import DeviceCell

        return DeviceCell(index, self._plan, self._context, self._events, self._supervisor)

    def make_successor(self, index: int) -> Worker:
        """Return a worker, not spawned yet, that is to take the place of another one."""
        self._successors = [worker for worker in self._successors if worker.alive]
        worker = self._make(index)
        self._successors.append(worker)
        return worker

    # ------------------------------------------------------------ the workers of a microVM

    def spawn(self, placement: Placement) -> None:
        """Ask for all workers at once. One that was forked ahead is welcomed if it fits, else replaced.

        Raises WorkerError or SupervisorError.
        """
        count = len(placement.groups)
        if count > self._plan.max_workers:
            raise WorkerError(f"{count} workers are needed, the launch plan allows {self._plan.max_workers}.")
        workers = [self._worker(index) for index in range(count)]
        ahead = [worker for worker in workers if worker.alive]
        unfit = [worker for worker in ahead if worker.assignment != placement.assignment(worker.index)]
        for worker in unfit:
            worker.wait_greeted()  # one that is only starting could not be asked to end in order
            worker.finish()
        for worker in workers:
            if not worker.alive:
                worker.spawn(placement.assignment(worker.index))
        for worker in unfit:
            if not worker.wait_ended(DEADLINES[WorkerState.SPAWNED].nanoseconds):
                raise WorkerError(f"The worker of vCPU {worker.index} cannot be replaced: it does not end.")
            worker.spawn(placement.assignment(worker.index))
        self._welcome([worker for worker in ahead if worker not in unfit])

    def _welcome(self, workers: Sequence[Worker]) -> None:
        """Welcome the workers forked ahead, which say HELLO about now: they go on while the kernel is loaded."""

        def welcomed() -> bool:
            return all(worker.handshake_is_over() for worker in workers)

        self._events.run_until(welcomed, time.monotonic_ns() + WELCOME_NS)

    def tell(self, changes: Sequence[VmChange]) -> None:
        """Say to the workers that were welcomed what their VMs have; the others are told when they are configured."""
        for worker in self._workers.values():
            if worker.handshake_is_over() and not worker.handshake_refusal():
                worker.tell(changes)

    def greeted(self, placement: Placement) -> list[Worker]:
        """Return all workers, ready to be configured. Raises WorkerError or SupervisorError."""
        workers = [self._worker(index) for index in range(len(placement.groups))]
        for worker in workers:
            if not worker.alive:  # it died while the kernel was loaded
                worker.spawn(placement.assignment(worker.index))
        vcpu_count = sum(map(len, placement.groups))
        for worker in workers:
            worker.wait_greeted()
            if worker.kvm.max_vcpus < vcpu_count:
                raise WorkerError(f"This host's KVM allows {worker.kvm.max_vcpus} vCPUs, not {vcpu_count}.")
        return workers

    # ------------------------------------------------------------ end

    def end(self) -> None:
        """End all workers that are there, in order."""
        end_workers([*self._workers.values(), *self._successors])

    def close(self) -> None:
        """End workers that were never used and the ZeroMQ context."""
        self.end()
        for worker in [*self._workers.values(), *self._successors]:
            worker.close()
        self._context.destroy(linger=0)


def end_workers(workers: Sequence[Worker]) -> None:
    """Ask all workers to finish, then wait for each; what does not end is killed."""
    for worker in workers:
        worker.finish()
    for worker in workers:
        worker.wait_ended()
