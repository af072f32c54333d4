"""The supervisor forks cells here, and nowhere else: each from the same template, with what its role is to have."""

from __future__ import annotations

import os

from base import faults, timeline
from base.lean_std import socket
from ipc import descriptors
from ipc.launch_plan import ROLE_VCPU, Assignment
from jailer import cell
from jailer.cell_output import LogPipe
from jailer.cell_record import Cell, Setup
from jailer.filters import of_cell
from jailer.steps import process


class Spawner:
    """Forks workers. ``cells`` are all cells by pid, shared with the supervisor; ``channel`` is the controller's."""

    def __init__(self, setup: Setup, cells: dict[int, Cell], channel: socket.socket) -> None:
        self._setup = setup
        self._plan = setup.plan
        self.cells = cells
        self._channel = channel
        #: The worker that was forked without being asked for, and the controller's end of its descriptor channel.
        self._ahead: tuple[Assignment, Cell, socket.socket] | None = None

    def fork_ahead(self) -> None:
        """Fork the first worker before the controller can ask: its VM is made while the controller starts."""
        assignment = self._setup.roles.ahead
        if assignment is None or self._setup.kvm_fd < 0:
            return
        try:
            self._ahead = (assignment, *self.fork(assignment))
        except OSError:
            pass  # the controller's request will meet the same, and be told

    def take_ahead(self, request: Assignment) -> tuple[Cell, socket.socket] | None:
        """Return what :meth:`fork` would return, if that worker was forked ahead."""
        if not self._is_ahead(request):
            return None
        assert self._ahead is not None
        (_, record, ours), self._ahead = self._ahead, None
        return record, ours

    def _is_ahead(self, request: Assignment) -> bool:
        """Is the worker that was forked ahead the one that is asked for?"""
        return self._ahead is not None and self._ahead[0] == request

    def forget_ahead(self, record: Cell) -> bool:
        """A cell has ended: was it the one forked ahead? The controller does not know of it; it asks for another."""
        if self._ahead is None or record is not self._ahead[1]:
            return False
        self._ahead[2].close()
        self._ahead = None
        return True

    def refuse(self, request: Assignment) -> str:
        """Say why this worker may not be forked although the plan allows it, or nothing."""
        if not self._workers(request.worker) or self._is_ahead(request):
            return ""
        return self._refuse_replacement(request)

    def _refuse_replacement(self, request: Assignment) -> str:
        """Say why a second worker with this number may not be forked, or nothing.

        It may while one is being replaced, for the same vCPUs, one at a time: so there is never more than one cell
        beyond the plan, however often that happens.
        """
        workers = [record for record in self.cells.values() if record.role == ROLE_VCPU]
        if len({record.index for record in workers}) < len(workers):
            return "a worker is being replaced already"
        if any(record.index == request.worker and record.assignment != request for record in workers):
            return f"worker {request.worker} exists already, for other vCPUs"
        return ""

    def _workers(self, index: int) -> int:
        """Count the workers with this number: there are two of it while one is being replaced."""
        return sum(record.role == ROLE_VCPU and record.index == index for record in self.cells.values())

    def fork(self, assignment: Assignment) -> tuple[Cell, socket.socket]:
        """Fork a worker; return its record and the controller's end of its descriptor channel. Raises OSError."""
        ours, theirs = descriptors.channel_pair()
        theirs.setblocking(False)  # a worker cannot do it: FIONBIO is not for it
        seal, cell_seal = descriptors.channel_pair()
        output = LogPipe(self._plan)
        faults.visit("supervisor.spawn.prepared")
        try:
            pid = os.fork()
        except OSError:
            for each in (ours, theirs, seal, cell_seal, output):
                each.close()
            raise
        if pid == 0:
            timeline.enter(2 + assignment.worker)
            output.become_standard_error()
            ours.close()
            seal.close()
            self._become_worker(assignment, theirs, cell_seal)
        cell.count_faults()
        faults.visit("supervisor.spawn.forked")
        theirs.close()
        cell_seal.close()
        record = Cell(ROLE_VCPU, assignment.worker, pid, os.pidfd_open(pid), seal)
        record.output = output.take(f"{record.name}: ")
        record.assignment = assignment
        self.cells[pid] = record
        return record, ours

    def _become_worker(self, assignment: Assignment, channel: socket.socket, seal: socket.socket) -> None:
        """In the child: let go of everything of the supervisor, then be the worker; does not return."""
        index = assignment.worker
        setup = self._setup
        filters, limits = of_cell(setup.filters, ROLE_VCPU), setup.worker_limits(assignment)
        context = cell.CellContext(self._plan, ROLE_VCPU, index, seal, filters, limits, setup.landlock)

        def prepare() -> tuple[int, ...]:
            setup.worker_cgroups.join(index)
            self._abandon()
            process.keep_only((channel.fileno(), seal.fileno(), setup.kvm_fd, setup.landlock.descriptor(ROLE_VCPU)))
            cell.reset_signals()
            return ()

        def role(sealed: cell.Seal) -> int:
            return setup.roles.vcpu(setup.plan, assignment, channel, setup.kvm_fd, sealed)

        cell.run(context, prepare, role)

    def _abandon(self) -> None:
        """In a child: make sure that no object of the supervisor closes a descriptor of the cell later."""
        self._channel.detach()
        for record in self.cells.values():
            if record.seal is not None:
                record.seal.detach()
        self.cells.clear()
        if self._ahead is not None:
            self._ahead[2].detach()
