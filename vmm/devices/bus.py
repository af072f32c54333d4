"""The port and MMIO buses: which device answers which address, and how an access may be deferred."""

from __future__ import annotations

import os
import select
from _bisect import bisect_right

from base.lean_typing import Callable, NamedTuple
from ipc.device_pages import FLAG_READ_LOCAL, FLAG_WRITE_LAZY, FLAG_WRITE_POSTED, FLAG_WRITE_SHARED, DevicePage
from ipc.errors import LayoutError
from ipc.messages.records import Window
from vmm.errors import DeviceError
from vmm.snapshot.state_file import InterruptState

PIO_SPACE = 1 << 16
ALL_ONES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}


class Deferral:
    """A write that takes effect later: the vCPU that made it waits until :meth:`complete`."""

    __slots__ = ("_then", "done")

    def __init__(self) -> None:
        self.done = False
        self._then: Callable[[], None] | None = None

    def complete(self) -> None:
        """The write is in force. Called once."""
        assert not self.done
        self.done = True
        if self._then is not None:
            self._then()

    def then(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` on completion."""
        assert not self.done
        assert self._then is None
        self._then = callback


class Device:
    """What the buses call. Offsets are relative to the device's window; sizes are 1, 2, 4 or 8 bytes.

    The arguments come from the guest; a device answers anything and raises nothing. ``offset`` lies in the window; a
    port access may run over its end. ``value`` fits ``size``.
    """

    def read(self, offset: int, size: int) -> int:
        """Return the value of a read; it is cut to ``size`` bytes."""
        raise NotImplementedError

    def write(self, offset: int, size: int, value: int) -> Deferral | None:
        """Execute a write; a Deferral makes the vCPU wait for it."""
        raise NotImplementedError


class InterruptLine:
    """An edge-triggered interrupt: an eventfd that the worker binds to a GSI (irqfd).

    While exits are executed in a batch the line is held: edges of one batch become one, at its end. (A UART whose
    transmitter is infinitely fast would interrupt for every byte.)
    """

    __slots__ = ("_due", "_held", "eventfd", "gsi", "triggers")

    def __init__(self, gsi: int) -> None:
        self.gsi = gsi
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.triggers = 0
        self._held = False
        self._due = False

    def hold(self) -> None:
        """Keep edges back until :meth:`release`."""
        self._held = True

    def release(self) -> None:
        """Deliver an edge that was kept back."""
        self._held = False
        if self._due:
            self._due = False
            self._deliver()

    def trigger(self) -> None:
        """Raise the interrupt. An event that came while the GSI was masked is delivered when it is unmasked."""
        self.triggers += 1
        if self._held:
            self._due = True
        else:
            self._deliver()

    def _deliver(self) -> None:
        try:
            os.eventfd_write(self.eventfd, 1)
        except BlockingIOError:
            pass  # saturated: it is pending anyway

    def save_state(self) -> InterruptState:
        """Return whether an edge waits; nothing is taken away."""
        poll = select.poll()
        poll.register(self.eventfd, select.POLLIN)
        return InterruptState(self.gsi, self._due or bool(poll.poll(0)))

    def close(self) -> None:
        """Close the eventfd."""
        os.close(self.eventfd)


class PublishedSlot:
    """A device's handle on one slot of the device page."""

    __slots__ = ("_page", "_slot")

    def __init__(self, page: DevicePage, slot: int) -> None:
        self._page = page
        self._slot = slot

    def publish(
        self,
        value: int = 0,
        *,
        read_local: bool = False,
        write_posted: bool = False,
        write_lazy: bool = False,
        write_shared: bool = False,
    ) -> None:
        """Publish the value for local reads and what the worker may do without asking.

        ``write_lazy``: a posted write that may wait about a millisecond before it is executed. ``write_shared``: a
        posted write, on a port, that needs no more with several vCPUs than to be executed in the order of time.
        """
        flags = (
            (FLAG_READ_LOCAL if read_local else 0)
            | (FLAG_WRITE_POSTED if write_posted else 0)
            | (FLAG_WRITE_LAZY if write_lazy else 0)
            | (FLAG_WRITE_SHARED if write_shared else 0)
        )
        self._page.publish(self._slot, value, flags)


class _Range(NamedTuple):
    start: int
    end: int
    origin: int
    device: Device
    slot: int


class Bus:
    """Non-overlapping windows of one address space, in which a window has one slot of the device page."""

    def __init__(self, page: DevicePage, limit: int) -> None:
        self._page = page
        self._limit = limit
        self._ranges: list[_Range] = []
        self._starts: list[int] = []

    def insert(self, device: Device, address: int, length: int, offset: int = 0) -> list[PublishedSlot]:
        """Attach a device; return its slots of the device page.

        ``offset`` is the device's offset at ``address``: registers that the worker treats differently have windows
        of their own. Raises DeviceError if the window overlaps another one or leaves the address space, or the page
        is full.
        """
        end = address + length
        if length <= 0 or address < 0 or end > self._limit:
            raise DeviceError(f"window {address:#x}+{length:#x} is outside of its address space")
        position = bisect_right(self._starts, address)
        before = self._ranges[position - 1] if position else None
        after = self._ranges[position] if position < len(self._ranges) else None
        if (before is not None and before.end > address) or (after is not None and after.start < end):
            raise DeviceError(f"window {address:#x}+{length:#x} overlaps another device")
        count = self._slot_count(length)
        try:
            first = self._page.allocate(count)
        except LayoutError as error:
            raise DeviceError(f"window {address:#x}+{length:#x} cannot be attached: {error}") from None
        self._ranges.insert(position, _Range(address, end, address - offset, device, first))
        self._starts.insert(position, address)
        return [PublishedSlot(self._page, first + number) for number in range(count)]

    def _slot_count(self, length: int) -> int:
        return 1

    def windows(self) -> tuple[Window, ...]:
        """Return what the workers must know of this bus."""
        return tuple(Window(each.start, each.end - each.start, each.slot) for each in self._ranges)

    def _find(self, address: int, size: int) -> _Range | None:
        position = bisect_right(self._starts, address)
        if not position:
            return None
        found = self._ranges[position - 1]
        return found if address + size <= found.end else None

    def read(self, address: int, size: int) -> int:
        """Read from whichever device sits there; all ones where none does."""
        found = self._find(address, size)
        if found is None:
            return ALL_ONES[size]
        return found.device.read(address - found.origin, size) & ALL_ONES[size]

    def write(self, address: int, size: int, value: int) -> Deferral | None:
        """Write to whichever device sits there; dropped where none does. ``value`` fits ``size``."""
        found = self._find(address, size)
        if found is None:
            return None
        return found.device.write(address - found.origin, size, value)


class PortBus(Bus):
    """The port I/O space: a slot per port, and every port known by name, for posted UART bytes take this way.

    A wide access belongs to the device of its first port, as for the worker, which looks up that port's slot.
    """

    def __init__(self, page: DevicePage) -> None:
        super().__init__(page, PIO_SPACE)
        self._ports: dict[int, tuple[Device, int]] = {}

    def insert(self, device: Device, address: int, length: int, offset: int = 0) -> list[PublishedSlot]:
        """Attach a device; return one slot per port. Raises DeviceError."""
        slots = super().insert(device, address, length, offset)
        self._ports.update({address + number: (device, offset + number) for number in range(length)})
        return slots

    def _slot_count(self, length: int) -> int:
        return length

    def read(self, address: int, size: int) -> int:
        """Read from whichever device sits there; all ones where none does."""
        found = self._ports.get(address)
        if found is None:
            return ALL_ONES[size]
        device, offset = found
        return device.read(offset, size) & ALL_ONES[size]

    def write(self, address: int, size: int, value: int) -> Deferral | None:
        """Write to whichever device sits there; dropped where none does. ``value`` fits ``size``."""
        found = self._ports.get(address)
        if found is None:
            return None
        device, offset = found
        return device.write(offset, size, value)


def port_bus(page: DevicePage) -> Bus:
    """Return an empty port I/O bus (65,536 ports, a slot per port)."""
    return PortBus(page)


def mmio_bus(page: DevicePage) -> Bus:
    """Return an empty MMIO bus (a slot per window)."""
    return Bus(page, 1 << 52)
