"""One device of the cell: what it has beside itself, and the guard around everything that calls it.

Whatever a device raises ends here: what its driver did wrong is a VirtioError, which the device deals with; anything
else is told to the driver as a device that needs a reset, and to the log, and the other devices go on.
"""

from __future__ import annotations

import mmap
import os

from base import faults
from base.deferral import Deferral
from base.event_manager import EDGE_TRIGGERED, IN, EventManager, EventOps, Events, Timer
from base.lean_typing import Any, Callable, Sequence
from ipc.errors import GuestMemoryError
from ipc.guest_memory import GuestMemory
from ipc.messages.device import MAX_REASON, Activate, ConfigChanged, DeviceQueue, NeedsReset, QueuePosition
from ipc.shared_memory import map_shared
from virtio.device import Activation, VirtioDevice
from virtio.errors import VirtioError
from virtio.in_flight import TrackedQueue, recover, region_size, tables_of
from virtio.queue import Queue, QueueState, restore_queue


class DeviceDescriptors:
    """What a device gets: its interrupt, a kick for each queue, the memfd of its table of heads in flight, or -1."""

    __slots__ = ("in_flight", "interrupt", "kicks")

    def __init__(self, interrupt: int, kicks: Sequence[int], in_flight: int) -> None:
        self.interrupt = interrupt
        self.kicks = tuple(kicks)
        self.in_flight = in_flight


class GuardedOps(EventOps):
    """The loop as a device sees it: what it is called for is guarded."""

    __slots__ = ("_guard",)

    def __init__(self, ops: EventOps, guard: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
        super().__init__(ops._manager, ops._subscription)
        self._guard = guard

    def watch(self, fd: int, event_set: int, handler: Callable[[int], None]) -> None:
        """As EventOps.watch()."""
        super().watch(fd, event_set, self._guard(handler))

    def add_timer(self, deadline_ns: int, callback: Callable[[], None]) -> Timer:
        """As EventOps.add_timer()."""
        return super().add_timer(deadline_ns, self._guard(callback))

    def soon(self, callback: Callable[[], None]) -> None:
        """As EventOps.soon()."""
        super().soon(self._guard(callback))


class AttachedDevice:
    """A device in its cell: a subscriber of the loop, and the device's DriverNotifier.

    ``send`` takes an event for the controller. The descriptors are taken over. Raises LayoutError when the table of
    heads in flight cannot be mapped.
    """

    def __init__(
        self,
        number: int,
        device: VirtioDevice,
        descriptors: DeviceDescriptors,
        events: EventManager,
        send: Callable[[Any], None],
    ) -> None:
        self.number = number
        self.device = device
        self._descriptors = descriptors
        self._send = send
        self._region: mmap.mmap | None = None
        self._tables: list[memoryview] = []
        if descriptors.in_flight >= 0:
            self._region = map_shared(descriptors.in_flight, region_size(device.queue_sizes))
            with memoryview(self._region) as region:
                self._tables = tables_of(region, device.queue_sizes)
            os.close(descriptors.in_flight)
        self._queues: tuple[Queue | None, ...] = ()
        #: The driver was told that nothing goes on without a reset.
        self._told = False
        #: ConfigChanged was sent and is not taken yet; there was another change since.
        self._config_sent = self._config_again = False
        self._kick = self._notified_with_faults if faults.is_armed("device.kick") else device.notified
        if faults.is_armed("device.used"):
            self.used = self._used_with_faults  # type: ignore[method-assign]
        events.add_subscriber(self)

    @property
    def active(self) -> bool:
        """Has it been activated and not stopped since?"""
        return bool(self._queues)

    # ------------------------------------------------------------ the loop

    def init(self, ops: EventOps) -> None:
        """Subscriber: hear the kicks. Edge-triggered: the count says nothing, and is never read."""
        self.device.init(GuardedOps(ops, self._guarded))
        for queue, kick in enumerate(self._descriptors.kicks):
            ops.watch(kick, IN | EDGE_TRIGGERED, self._kicked(queue))

    def process(self, events: Events, ops: EventOps) -> None:
        """Subscriber: nothing is watched through this."""

    def _kicked(self, queue: int) -> Callable[[int], None]:
        def kicked(_: int) -> None:
            try:
                self._kick(queue)
            except Exception as error:  # no exception of a device leaves it
                self._failed(error)

        return kicked

    def _notified_with_faults(self, queue: int) -> None:
        faults.visit("device.kick")
        self.device.notified(queue)

    def _guarded(self, callback: Callable[..., None]) -> Callable[..., None]:
        def guarded(*arguments: Any) -> None:
            try:
                callback(*arguments)
            except Exception as error:  # no exception of a device leaves it
                self._failed(error)

        return guarded

    def _failed(self, error: Exception) -> None:
        """A device has raised what it should not: say where."""
        if isinstance(error, MemoryError):
            raise error  # the cell's limit is reached: it ends, and another one goes on
        if isinstance(error, VirtioError | GuestMemoryError):
            self.needs_reset(str(error))
            return
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "?"
        text = f"The device {self.device.id} failed at {place}: {type(error).__name__}: {error}"[:1000]
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))
        self.needs_reset(f"internal error: {type(error).__name__}")

    # ------------------------------------------------------------ its life

    def activate(self, message: Activate, memory: GuestMemory) -> int:
        """Begin with the queues, or go on; return how many chains are served once more."""
        device = self.device
        self._told = False
        again = 0
        try:
            device.activation = None  # of a device that has failed
            made = [self._queue(number, state, memory, message) for number, state in enumerate(message.queues)]
            self._queues = tuple([queue for queue, _ in made])
            again = sum(count for _, count in made)
            device.activate(Activation(memory, self._queues, message.features, self))
        except Exception as error:
            self._failed(error)
        if message.recover:
            self.used(0)  # whether the driver heard of what was given back is not known
        return again

    def _queue(
        self, number: int, state: DeviceQueue | None, memory: GuestMemory, message: Activate
    ) -> tuple[Queue | None, int]:
        """Return a queue, and how many chains of it are served once more. Raises VirtioError, GuestMemoryError."""
        if state is None:
            return None, 0
        largest = self.device.queue_sizes[number]
        table = self._tables[number] if self._tables else None
        stands = QueueState(*state)
        again: tuple[int, ...] = ()
        restore_queue(memory, message.features, stands, largest)  # checks it
        if message.recover:
            next_available, next_used, again = recover(memory, stands, table)
            stands = stands._replace(next_available=next_available, next_used=next_used)
        if table is None:
            return restore_queue(memory, message.features, stands, largest), 0
        return TrackedQueue(memory, message.features, stands, table, again), len(again)

    def stop(self) -> Deferral | None:
        """Let the device stop; done when nothing is in flight."""
        try:
            return self.device.stop()
        except Exception as error:
            self._failed(error)
            self.device.activation = None
            return None

    def stopped(self) -> tuple[QueuePosition | None, ...]:
        """Nothing is in flight: return where the queues stand."""
        queues, self._queues = self._queues, ()
        return tuple([None if each is None else QueuePosition(each.next_available, each.next_used) for each in queues])

    def reset(self) -> None:
        """Forget what the driver has said."""
        try:
            self.device.reset()
        except Exception as error:
            self._failed(error)

    # ------------------------------------------------------------ DriverNotifier

    def used(self, queue: int) -> None:
        """Interrupt the driver."""
        try:
            os.eventfd_write(self._descriptors.interrupt, 1)
        except BlockingIOError:
            pass  # the counter is at its maximum: it is signalled

    def _used_with_faults(self, queue: int) -> None:
        faults.visit("device.used")
        AttachedDevice.used(self, queue)

    def config_changed(self) -> None:
        """Tell the controller; if it has not taken the last change yet, afterwards."""
        if self._config_sent:
            self._config_again = True
        else:
            self._config_sent = True
            self._send(ConfigChanged(self.number, self.device.config()))

    def config_taken(self) -> None:
        """The last change has reached the driver."""
        self._config_sent = False
        if self._config_again:
            self._config_again = False
            self.config_changed()

    def needs_reset(self, reason: str) -> None:
        """Tell the controller, once for each activation."""
        if not self._told and self._queues:
            self._told = True
            self._send(NeedsReset(self.number, reason[:MAX_REASON]))
