"""What the controller asks the supervisor for over its channel, and what the supervisor tells it.

What may be asked for is in the plan.
"""

from __future__ import annotations

import os

from base import faults, threads
from base.errno_text import errno_text
from base.lean_std import signal, socket
from base.lean_typing import Any, Callable
from ipc import descriptors
from ipc.channel import PairChannel
from ipc.errors import IpcError
from ipc.launch_plan import ENDPOINT_BOUND, ROLE_DEVICE, ROLE_VCPU, Assignment
from ipc.messages.records import Failed
from ipc.messages.supervisor import (
    SUPERVISOR,
    CreateMemory,
    MemoryCreated,
    SignalCell,
    Signalled,
    Spawn,
    Spawned,
)
from jailer.cell_record import Cell, Setup
from jailer.ending import Ending
from jailer.plan import cell_kind, refuse_assignment
from jailer.spawner import Spawner

#: A controller that floods its channel must not keep the supervisor from its signals.
MAX_MESSAGES_PER_TURN = 16
#: How long the controller may take to end in order after it closed its channel itself.
CLOSING_GRACE_S = 5.0
_CELL_SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT)


class Requests:
    """The supervisor's end of the controller's channel: read until the controller closes it or breaks its rules."""

    def __init__(
        self, setup: Setup, controller: Cell, channel: socket.socket, spawner: Spawner, ending: Ending
    ) -> None:
        self._setup = setup
        self._plan = setup.plan
        self._log = setup.log
        self._controller = controller
        channel.setblocking(False)
        self._channel: PairChannel | None = PairChannel(channel, SUPERVISOR, setup.plan.epoch)
        self._cells = spawner.cells
        self._spawner = spawner
        self._ending = ending
        self._handlers: dict[type[Any], Callable[[Any, int], None]] = {
            Spawn: self._spawn,
            SignalCell: self._signal_cell,
            CreateMemory: self._create_memory,
        }

    def fileno(self) -> int:
        """Return the descriptor to poll for reading, -1 once the channel is closed."""
        return -1 if self._channel is None else self._channel.fileno()

    def serve(self) -> None:
        """Answer what was asked for, as much as fits in one turn."""
        assert self._channel is not None
        try:
            for _ in range(MAX_MESSAGES_PER_TURN):
                envelope, owned = self._channel.receive()
                owned.close()
                if envelope is None:
                    continue
                handler = self._handlers.get(type(envelope.message))
                if handler is None:
                    self.send(Failed("supervisor.request", "not a request"), envelope.sequence)
                else:
                    handler(envelope.message, envelope.sequence)
        except BlockingIOError:
            return
        except IpcError as error:
            # The channel's end is the controller's: it is closing down, or it broke the protocol.
            self._channel.close()
            self._channel = None
            if "closed" not in str(error):
                self._log.error(f"{self._controller.name} (pid {self._controller.pid}): {error}; killed")
                self._controller.wall = self._controller.wall or "protocol"
                self._controller.kill()
            else:
                self._ending.expect_within(CLOSING_GRACE_S)

    def send(self, message: Any, reply_to: int = 0, fds: tuple[int, ...] = ()) -> bool:
        """Send to the controller; a controller that does not read is ended. Returns whether it was sent."""
        if self._channel is None:
            return False
        try:
            self._channel.send(message, reply_to, fds)
        except IpcError as error:
            if not self._ending.ended:
                self._log.error(f"{self._controller.name} (pid {self._controller.pid}) does not read: {error}; killed")
                self._controller.kill()
            return False
        return True

    def _signal_cell(self, request: SignalCell, sequence: int) -> None:
        record = self._cells.get(request.pid)
        named = record is not None and (record.role, record.index) == (request.role, request.worker)
        if request.signal not in _CELL_SIGNALS or record is None or not named or record is self._controller:
            self.send(Failed("supervisor.signal", "no such cell, or not a signal that may be sent"), sequence)
            return
        if request.signal == signal.SIGKILL:
            record.killed = True
        try:
            signal.pidfd_send_signal(record.pidfd, request.signal)
        except ProcessLookupError:
            pass  # ended, its notice follows
        self.send(Signalled(), sequence)

    def _create_memory(self, request: CreateMemory, sequence: int) -> None:
        if request.size > self._plan.max_memory_bytes:
            text = f"the plan allows {self._plan.max_memory_bytes} bytes of guest memory, not {request.size}"
            self.send(Failed("supervisor.plan", text), sequence)
            return
        try:
            descriptor = self._setup.memory.make(request.size)
        except OSError as error:
            text = f"Invalid Memory Configuration: Cannot create mmap region: {errno_text(error)}"
            self.send(Failed("supervisor.memory", text), sequence)
            return
        faults.visit("supervisor.memory")
        self.send(MemoryCreated(request.size), sequence, (descriptor,))
        os.close(descriptor)

    def _spawn(self, request: Spawn, sequence: int) -> None:
        assignment = Assignment(*request)
        refusal = self._refuse_spawn(assignment)
        if refusal is not None:
            self.send(refusal, sequence)
            return
        faults.visit("supervisor.spawn.requested")
        try:
            record, ours = self._spawner.take_ahead(assignment) or self._spawner.fork(assignment)
        except OSError as error:
            text = f"cannot fork {cell_kind(request.role)}: {threads.explain(error)}"
            self.send(Failed("supervisor.fork", text), sequence)
            return
        try:
            descriptors.send(ours, ENDPOINT_BOUND)
        except IpcError:
            pass  # it has ended already, which is told as any other end
        self.send(Spawned(request.worker, record.pid, request.role), sequence, (record.pidfd, ours.fileno()))
        ours.close()
        faults.visit("supervisor.spawn.answered")

    def _refuse_spawn(self, request: Assignment) -> Failed | None:
        if refusal := refuse_assignment(self._plan, request):
            return Failed("supervisor.plan", refusal)
        if refusal := self._spawner.refuse(request):
            return Failed("supervisor.exists", refusal)
        if self._ending.exit_code is not None:
            return Failed("supervisor.ending", "the microVM is ending")
        if request.role == ROLE_DEVICE and self._setup.roles.device is None:
            return Failed("supervisor.role", "there are no device cells")
        if request.role == ROLE_VCPU and self._setup.kvm_fd < 0:
            return Failed("supervisor.kvm", f"Error creating KVM object: {self._setup.kvm_error}")
        return None
