"""The controller's side of the supervisor protocol: ask for what the plan allows, hear of cells that ended."""

from __future__ import annotations

import errno
import select
import time

from base.errno_text import errno_text
from base.event_manager import EventManager, EventOps, Events
from base.lean_std import socket
from base.lean_typing import Any, Callable, TypeVar
from ipc.channel import PairChannel
from ipc.descriptors import OwnedDescriptors
from ipc.errors import IpcError, MessageError
from ipc.launch_plan import MAX_MEMORY_BYTES, ROLE_VCPU, Assignment
from ipc.messages.records import Failed
from ipc.messages.supervisor import (
    SUPERVISOR,
    CellEnded,
    CreateMemory,
    MemoryCreated,
    Shutdown,
    SignalCell,
    SignalNoticed,
    Spawn,
    Spawned,
)
from vmm.errors import SupervisorError
from vmm.observe.logger import LOG

REQUEST_TIMEOUT_NS = 30_000_000_000
#: A reply brings two descriptors at the most (pidfd and descriptor channel).
MAX_REPLY_DESCRIPTORS = 2

Reply = TypeVar("Reply")


class SupervisorClient:
    """Requests block the caller in a nested event loop; notices go to callbacks (``on_…``)."""

    def __init__(self, pair: socket.socket, epoch: int, events: EventManager) -> None:
        pair.setblocking(False)
        self._channel = PairChannel(pair, SUPERVISOR, epoch)
        self._events = events
        self._replies: dict[int, tuple[Any, OwnedDescriptors]] = {}
        self._awaited: set[int] = set()
        #: Who is called when the reply to a request is here.
        self._callbacks: dict[int, Callable[[], None]] = {}
        self.closed = False
        self.on_cell_ended: Callable[[CellEnded], None] = lambda notice: None
        self.on_shutdown: Callable[[Shutdown], None] = lambda notice: None
        self.on_signal: Callable[[SignalNoticed], None] = lambda notice: None
        self.on_closed: Callable[[], None] = lambda: None

    def init(self, ops: EventOps) -> None:
        """Subscriber: watch the channel."""
        ops.add(self._channel.fileno(), select.EPOLLIN)

    def process(self, events: Events, ops: EventOps) -> None:
        """Subscriber: read everything that came."""
        try:
            while True:
                envelope, owned = self._channel.receive(MAX_REPLY_DESCRIPTORS)
                if envelope is None:
                    continue
                if envelope.reply_to in self._awaited:
                    self._replies[envelope.reply_to] = (envelope.message, owned)
                    callback = self._callbacks.pop(envelope.reply_to, None)
                    if callback is not None:
                        callback()
                    continue
                owned.close()
                if isinstance(envelope.message, CellEnded):
                    self.on_cell_ended(envelope.message)
                elif isinstance(envelope.message, Shutdown):
                    self.on_shutdown(envelope.message)
                elif isinstance(envelope.message, SignalNoticed):
                    self.on_signal(envelope.message)
        except BlockingIOError:
            return
        except IpcError:
            if not self.closed:  # a handler may have run the loop, and the inner one have seen the end
                self.closed = True
                ops.remove(self._channel.fileno())
                self.on_closed()

    def submit(self, message: Any) -> int:
        """Send a request without waiting; :meth:`collect` waits for its reply. Raises SupervisorError."""
        try:
            sequence = self._channel.send(message)
        except MessageError as error:  # names records of ours, which nobody knows: for the log
            raise SupervisorError(internal_error("a request to the supervisor", error)) from None
        except IpcError as error:
            raise SupervisorError(f"The supervisor cannot be asked: {error}") from None
        self._awaited.add(sequence)
        return sequence

    def when_ready(self, sequence: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` when the reply to a submitted request, which is not here yet, has come."""
        self._callbacks[sequence] = callback

    def ready(self, sequence: int) -> bool:
        """True when the reply to a submitted request is here (or never will be)."""
        return sequence in self._replies or self.closed

    def collect(self, sequence: int, expected: type[Reply]) -> tuple[Reply, OwnedDescriptors]:
        """Wait for the reply to a submitted request. Raises SupervisorError."""
        if not self.ready(sequence):
            self._events.run_until(lambda: self.ready(sequence), time.monotonic_ns() + REQUEST_TIMEOUT_NS)
        self._awaited.discard(sequence)
        reply, owned = self._replies.pop(sequence, (None, OwnedDescriptors()))
        if isinstance(reply, expected):
            return reply, owned
        owned.close()
        if isinstance(reply, Failed):
            raise SupervisorError(reply.text)
        raise SupervisorError("The supervisor is gone." if self.closed else "The supervisor does not answer.")

    def abandon(self, sequence: int) -> None:
        """Drop the reply to a submitted request, whether it is here or comes later."""
        self._awaited.discard(sequence)
        self._callbacks.pop(sequence, None)
        _, owned = self._replies.pop(sequence, (None, OwnedDescriptors()))
        owned.close()

    def submit_spawn(self, assignment: Assignment) -> int:
        """Ask for a worker or a device cell; returns the number for :meth:`collect_spawn`."""
        return self.submit(Spawn(*assignment))

    def collect_spawn(self, sequence: int) -> tuple[Spawned, OwnedDescriptors]:
        """Wait for a spawn; the descriptors are the pidfd and our end of the descriptor channel."""
        spawned, owned = self.collect(sequence, Spawned)
        if len(owned) != MAX_REPLY_DESCRIPTORS:
            owned.close()
            raise SupervisorError("The supervisor did not hand over the descriptors of the cell.")
        return spawned, owned

    def create_memory(self, size: int) -> int:
        """Return the descriptor of a new guest memory of ``size`` bytes. Raises SupervisorError."""
        if size > MAX_MEMORY_BYTES:  # more than any guest has addresses for
            text = errno_text(errno.ENOMEM)
            raise SupervisorError(f"Invalid Memory Configuration: Cannot create mmap region: {text}")
        _, owned = self.collect(self.submit(CreateMemory(size)), MemoryCreated)
        with owned:
            if len(owned) != 1:
                raise SupervisorError("The supervisor did not hand over the guest memory.")
            return owned.take()

    def signal(self, worker: int, pid: int, number: int, role: str = ROLE_VCPU) -> bool:
        """Have a signal sent to a worker or device cell; does not wait. False if the supervisor is gone."""
        try:
            self._channel.send(SignalCell(worker, pid, number, role))
        except IpcError:
            return False  # the end of the channel is noticed where it is read
        return True

    def close(self) -> None:
        """Close the channel; the supervisor takes that as the controller's end."""
        for _, owned in self._replies.values():
            owned.close()
        self._replies.clear()
        self._channel.close()


def internal_error(what: str, error: Exception) -> str:
    """Log in our own terms what cannot be sent, and return what a client is told: nothing of it is its fault."""
    LOG.error(f"Internal error: {what} breaks its own schema: {error}")
    return f"Internal error: {what} cannot be sent. The log says more."
