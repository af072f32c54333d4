"""The supervisor forks cells here, and nowhere else: each from the same template, with what its role is to have."""

from __future__ import annotations

import errno
import os

from base import faults, timeline
from base.lean_std import socket
from ipc import descriptors
from ipc.launch_plan import MAX_WORKERS, ROLE_DEVICE, ROLE_VCPU, Assignment, cell_name
from jailer import cell, walls
from jailer.cell_output import LogPipe
from jailer.cell_record import Cell, Setup
from jailer.filters import of_cell
from jailer.plan import cell_kind
from jailer.steps import identity, process


class Spawner:
    """Forks workers and device cells.

    ``cells`` are all cells by pid, shared with the supervisor; ``channel`` is the controller's.
    """

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
        """Say why this cell may not be forked although the plan allows it, or nothing.

        A second one with its number may while one is being replaced, for the same vCPUs, one at a time: so there is
        never more than one cell of each role beyond the plan, however often that happens.
        """
        alike = [record for record in self.cells.values() if record.role == request.role]
        numbers = [record.index for record in alike]
        if request.worker not in numbers or self._is_ahead(request):
            return ""
        if len(set(numbers)) < len(numbers):
            return f"{cell_kind(request.role)} is being replaced already"
        if any(record.index == request.worker and record.assignment != request for record in alike):
            return f"{cell_name(request.role, request.worker)} exists already, for other vCPUs"
        return ""

    def fork(self, assignment: Assignment) -> tuple[Cell, socket.socket]:
        """Fork a cell; return its record and the controller's end of its descriptor channel. Raises OSError."""
        uid = self._free_uid(assignment)
        ours, theirs = descriptors.channel_pair()
        theirs.setblocking(False)  # the cell cannot do it: FIONBIO is not for it
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
            timeline.enter(2 + assignment.worker + (MAX_WORKERS if assignment.role == ROLE_DEVICE else 0))
            self._become(assignment, uid, theirs, cell_seal, output)
        cell.count_faults()
        faults.visit("supervisor.spawn.forked")
        theirs.close()
        cell_seal.close()
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            for each in (ours, seal, output):  # at the end of its seal channel the cell ends
                each.close()
            raise
        record = Cell(assignment.role, assignment.worker, pid, pidfd, seal)
        record.output = output.take(f"{record.name}: ")
        record.assignment = assignment
        record.uid = uid
        self.cells[pid] = record
        return record, ours

    def _free_uid(self, assignment: Assignment) -> int:
        """Return a user that no cell is, 0 if cells have the controller's: one whom this cell replaces has the other.

        Raises OSError if both are taken.
        """
        peers = self._plan.peers(assignment.role, assignment.worker)
        taken = {record.uid for record in self.cells.values()}
        free = [uid for uid in peers if uid not in taken]
        if peers and not free:
            raise OSError(errno.EUSERS, os.strerror(errno.EUSERS))
        return free[0] if free else 0

    def _become(
        self, assignment: Assignment, uid: int, channel: socket.socket, seal: socket.socket, output: LogPipe
    ) -> None:
        """In the child: let go of everything of the supervisor, then be the cell; does not return."""
        index, role = assignment.worker, assignment.role
        setup = self._setup
        filters, limits = of_cell(setup.filters, role), setup.limits(assignment)
        context = cell.CellContext(self._plan, role, index, seal, filters, limits, setup.landlock)
        own = [channel.fileno(), seal.fileno(), setup.landlock.descriptor(role)]
        if role == ROLE_VCPU:
            own.append(setup.kvm_fd)

        def prepare() -> tuple[int, ...]:
            output.become_standard_error()
            if role == ROLE_VCPU:
                setup.worker_cgroups.join(index)
            self._abandon()
            process.keep_only(own)
            cell.reset_signals()
            if uid:
                identity.become(uid, uid)
                if context.has(walls.CAPABILITIES):
                    identity.clear_capabilities()
            return ()

        def run(sealed: cell.Seal) -> int:
            if role == ROLE_VCPU:
                return setup.roles.vcpu(setup.plan, assignment, channel, setup.kvm_fd, sealed)
            assert setup.roles.device is not None
            return setup.roles.device(setup.plan, assignment, channel, sealed)

        cell.run(context, prepare, run)

    def _abandon(self) -> None:
        """In a child: make sure that no object of the supervisor closes a descriptor of the cell later."""
        self._channel.detach()
        for record in self.cells.values():
            if record.seal is not None:
                record.seal.detach()
        self.cells.clear()
        if self._ahead is not None:
            self._ahead[2].detach()
