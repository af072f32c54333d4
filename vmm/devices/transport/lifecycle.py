"""What every transport does with a device: activate, stop, reset, interrupt, save. Its registers say when.

While a device is being activated or stopped, which may take effect later, further writes wait and are executed after
it, in their order: a vCPU has one under way at most.
"""

from __future__ import annotations

from base.deferral import Deferral
from base.lean_std import deque
from base.lean_typing import Any, Callable
from ipc.guest_memory import GuestMemory
from virtio.device import Activation, VirtioDevice
from virtio.errors import QueueError, VirtioError
from virtio.queue import Queue, QueueState, restore_queue
from vmm.devices.transport.registers import (
    ACTIVATE,
    INTERRUPT_CONFIGURATION_CHANGE,
    RESET,
    Registers,
    RegistersState,
)

#: Calls a device: (what to call, what to tell of a failure) → (whether it succeeded, what it returned).
Guard = Callable[[Callable[[], Any], Callable[[str], None]], tuple[bool, Any]]


class Transport:
    """Base of the transports; to the device it is the DriverNotifier. ``log`` gets why a device needs a reset."""

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        *,
        guard: Guard,
        log: Callable[[str], None],
        state: RegistersState | None = None,
    ) -> None:
        self.device = device
        self.registers = Registers(device.features(), device.queue_sizes, state)
        #: How often the device could not go on.
        self.needs_reset_count = 0
        self._memory = memory
        self._guard = guard
        self._log = log
        self._queues: tuple[Queue | None, ...] = ()
        #: The device was activated and not stopped since.
        self._running = False
        self._busy = False
        self._waiting: deque[tuple[int, int, Deferral]] = deque()

    # ------------------------------------------------------------ for the maps of addresses

    def publish(self) -> None:
        """The registers have changed: let the driver see it."""
        raise NotImplementedError

    def publish_config(self) -> None:
        """The configuration space may have changed: let the driver see it."""
        raise NotImplementedError

    def interrupt(self, queue: int | None) -> None:
        """Interrupt the driver: for a queue, or for a change of the configuration."""
        raise NotImplementedError

    def call(self, call: Callable[[], Any]) -> tuple[bool, Any]:
        """Call the device; if that fails it needs a reset."""
        return self._guard(call, self.needs_reset)

    def write_register(self, register: int, value: int) -> Deferral | None:
        """Execute a write of the driver. The vCPU waits for the Deferral."""
        if self._busy:
            deferral = Deferral()
            self._waiting.append((register, value, deferral))
            return deferral
        return self._write(register, value)

    def _write(self, register: int, value: int) -> Deferral | None:
        follows = self.registers.write(register, value)
        if follows == ACTIVATE:
            return self._after(self._activate(), self._activated)
        if follows == RESET:
            return self._after(self._stop(), self._reset)
        self.publish()
        return None

    def _after(self, begun: Deferral | None, then: Callable[[], None]) -> Deferral | None:
        """Call ``then`` when what was begun is done; returns what a vCPU waits for, if it has to."""
        if begun is None or begun.done:
            then()
            return None
        self._busy = True
        waits = Deferral()

        def done() -> None:
            self._busy = False
            then()
            waits.complete()
            self._next()

        begun.then(done)
        return waits

    def _next(self) -> None:
        """Execute the writes that have waited."""
        while self._waiting and not self._busy:
            register, value, deferral = self._waiting.popleft()
            executed = self._write(register, value)
            if executed is None:
                deferral.complete()
            else:
                executed.then(deferral.complete)

    # ------------------------------------------------------------ the device's life

    def _activate(self) -> Deferral | None:
        """Make the queues and let the device begin with them, or go on."""
        self.publish()  # an interrupt may come before this write is answered
        try:
            self._queues = self._make_queues()
        except VirtioError as error:
            self.needs_reset(str(error))
            return None
        return self._start()

    def _start(self) -> Deferral | None:
        activation = Activation(self._memory, self._queues, self.registers.driver_features, self)
        self._running = True
        fine, begun = self.call(lambda: self.device.activate(activation))
        return begun if fine else None

    def _activated(self) -> None:
        self.publish()
        if (
            self.registers.interrupt_status & INTERRUPT_CONFIGURATION_CHANGE
        ):  # it has changed before anybody could be told
            self.interrupt(None)

    def _make_queues(self) -> tuple[Queue | None, ...]:
        registers = self.registers
        if len(registers.queues) != len(self.device.queue_sizes) or registers.driver_features & ~registers.features:
            raise QueueError("the state of a device with other queues or features")
        return tuple(
            [
                restore_queue(
                    self._memory,
                    registers.driver_features,
                    QueueState(
                        config.size, config.descriptor_table, config.available_ring, config.used_ring, *position
                    ),
                    config.max_size,
                )
                if ready
                else None
                for config, ready, position in zip(registers.queues, registers.ready, registers.positions, strict=True)
            ]
        )

    def _stop(self) -> Deferral | None:
        fine, begun = self.call(self.device.stop)
        if not fine:
            return None
        self._running = self._running and begun is not None and not begun.done
        if not self._running:
            return None
        assert begun is not None
        stopped = Deferral()

        def done() -> None:
            self._running = False
            stopped.complete()

        begun.then(done)
        return stopped

    def _reset(self) -> None:
        """The device was stopped, or could not be: then it may still write to memory, and the reset has failed."""
        if self._running or not self.call(self.device.reset)[0]:
            self.registers.failed()
        else:
            self._queues = ()
            self.registers.reset()
            self.publish_config()
        self.publish()

    def pause(self) -> Deferral | None:
        """Let the device stop, as it is; done when nothing is in flight. The guest stands still."""
        return self._stop() if self._running else None

    def resume(self) -> Deferral | None:
        """Let the device go on with its queues, after :meth:`pause`, or after it was made from a state."""
        if not self.registers.active or self._running:
            return None
        if not self._queues:
            return self._after(self._activate(), self._activated)
        return self._start()

    def notified(self, queue: int) -> None:
        """The driver has made chains available: for a device that runs in this process."""
        if self._running:
            self.call(lambda: self.device.notified(queue))

    # ------------------------------------------------------------ what the device says (DriverNotifier)

    def used(self, queue: int) -> None:
        """Chains came back in a queue, and the driver wants to know."""
        self.interrupt(queue)

    def config_changed(self) -> None:
        """The configuration space has changed."""
        self.publish_config()
        now = self.registers.config_changed()
        self.publish()
        if now:
            self.interrupt(None)

    def needs_reset(self, reason: str) -> None:
        """The device cannot go on: told once until the reset."""
        if not self.registers.needs_reset():
            return
        self.needs_reset_count += 1
        self._log(f"The virtio device {self.device.id} needs a reset: {reason}")
        self.publish()
        if self.registers.active:
            self.interrupt(None)

    # ------------------------------------------------------------ state

    def save_registers(self) -> RegistersState:
        """Return the state; only while the guest stands still and the device is stopped, or runs in this process."""
        for number, queue in enumerate(self._queues):
            if queue is not None:
                self.registers.positions[number] = (queue.next_available, queue.next_used)
        return self.registers.save()
