"""The port and MMIO buses: which device answers which address."""

from __future__ import annotations

from _bisect import bisect_right

from base.deferral import Deferral
from base.lean_typing import NamedTuple
from ipc.device_pages import FLAG_READ_LOCAL, FLAG_WRITE_LAZY, FLAG_WRITE_POSTED, FLAG_WRITE_SHARED, DevicePage
from ipc.errors import LayoutError
from ipc.messages.records import Window
from vmm.errors import DeviceError

PIO_SPACE = 1 << 16
ALL_ONES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}


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


class PublishedSlot:
    """A device's handle on one slot of the device page."""

    __slots__ = ("_page", "_slot")

    def __init__(self, page: DevicePage, slot: int) -> None:
        self._page: DevicePage | None = page
        self._slot = slot

    def withdraw(self) -> None:
        """Publish nothing any more: the device is asked for every access, until the workers know that it is gone."""
        self.publish()
        self._page = None

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
        if self._page is not None:
            self._page.publish(self._slot, value, flags)


class _Range(NamedTuple):
    start: int
    end: int
    origin: int
    device: Device
    slots: list[PublishedSlot]
    first_slot: int


class Bus:
    """Non-overlapping windows of one address space, in which a window has one slot of the device page."""

    def __init__(self, page: DevicePage, limit: int) -> None:
        self._page = page
        self._limit = limit
        self._ranges: list[_Range] = []
        self._starts: list[int] = []
        #: Slots, (first, count), of windows that were removed and that a worker may still know.
        self._removed: list[tuple[int, int]] = []

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
        slots = [PublishedSlot(self._page, first + number) for number in range(count)]
        self._ranges.insert(position, _Range(address, end, address - offset, device, slots, first))
        self._starts.insert(position, address)
        return slots

    def remove(self, device: Device) -> None:
        """Detach all windows of a device: it is not called any more. Raises DeviceError if it has none here.

        Its slots stay reserved until :meth:`free_removed`, for a worker goes on looking at them until it is told.
        """
        gone = [each for each in self._ranges if each.device is device]
        if not gone:
            raise DeviceError("a device that is not attached cannot be removed")
        for each in gone:
            self._forget(each)
            for slot in each.slots:
                slot.withdraw()
            self._removed.append((each.first_slot, len(each.slots)))

    def has(self, device: Device) -> bool:
        """Tell whether a device has a window here."""
        return any(each.device is device for each in self._ranges)

    def _forget(self, window: _Range) -> None:
        position = self._ranges.index(window)
        del self._ranges[position]
        del self._starts[position]

    def free_removed(self) -> None:
        """All workers have the windows as they are now: what was removed before may be given out again."""
        for first, count in self._removed:
            self._page.free(first, count)
        self._removed.clear()

    def _slot_count(self, length: int) -> int:
        return 1

    def windows(self) -> tuple[Window, ...]:
        """Return what the workers must know of this bus."""
        return tuple(Window(each.start, each.end - each.start, each.first_slot) for each in self._ranges)

    def _find(self, address: int, size: int) -> _Range | None:
        position = bisect_right(self._starts, address)
        if not position:
            return None
        found = self._ranges[position - 1]
        return found if address + size <= found.end else None

    def read(self, address: int, size: int) -> int:
        """Read from whichever device sits there; 0 where none does, as in Firecracker."""
        found = self._find(address, size)
        if found is None:
            return 0
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

    def _forget(self, window: _Range) -> None:
        super()._forget(window)
        for port in range(window.start, window.end):
            del self._ports[port]

    def _slot_count(self, length: int) -> int:
        return length

    def read(self, address: int, size: int) -> int:
        """Read from whichever device sits there; 0 where none does, as in Firecracker."""
        found = self._ports.get(address)
        if found is None:
            return 0
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
