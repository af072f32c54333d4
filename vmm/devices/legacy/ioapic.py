"""The I/O APIC in user space: 24 pins, each turned into an MSI route of the workers' VMs.

Source: Intel 82093AA data sheet. The pins are edge-triggered for every device of ours; a level entry is treated as
edge and reported once.
"""

from __future__ import annotations

from base.deferral import Deferral
from base.lean_typing import TYPE_CHECKING, Callable, NamedTuple, Sequence
from ipc.messages.records import Route
from ipc.schema import U8, U64, Int, ListOf, RecordOf, Section
from vmm.devices.bus import Device, PublishedSlot
from vmm.layout import IOAPIC_PIN_COUNT

if TYPE_CHECKING:
    from collections.abc import Collection

IOAPIC_LENGTH = 0x1000
IOREGSEL = 0x00
IOWIN = 0x10
INDEX_ID = 0
INDEX_VERSION = 1
INDEX_ARBITRATION = 2
INDEX_REDIRECTION = 0x10
VERSION = 0x11 | (IOAPIC_PIN_COUNT - 1) << 16

ENTRY_VECTOR = 0xFF
ENTRY_DELIVERY_MODE = 0x700
ENTRY_DESTINATION_LOGICAL = 1 << 11
ENTRY_READ_ONLY = 1 << 12 | 1 << 14  # delivery status, remote IRR
ENTRY_LEVEL = 1 << 15
ENTRY_MASKED = 1 << 16
ENTRY_DESTINATION_SHIFT = 56
MSI_ADDRESS_BASE = 0xFEE0_0000
MSI_ADDRESS_LOGICAL = 1 << 2

#: Hand routes to the workers (vmm.devices.vms.WorkerVms).
SetRoutes = Callable[[Sequence[Route]], Deferral]


def msi_of_entry(gsi: int, entry: int) -> Route:
    """Translate a redirection table entry into an MSI route."""
    logical = MSI_ADDRESS_LOGICAL if entry & ENTRY_DESTINATION_LOGICAL else 0
    address = MSI_ADDRESS_BASE | (entry >> ENTRY_DESTINATION_SHIFT & 0xFF) << 12 | logical
    return Route(gsi, address, entry & (ENTRY_VECTOR | ENTRY_DELIVERY_MODE), bool(entry & ENTRY_MASKED))


class IoApicState(NamedTuple):
    """The registers; ``entries`` is the redirection table, 64 bits a pin."""

    select: int
    id: int
    entries: tuple[int, ...]


_AFTER_RESET = IoApicState(0, 0, (ENTRY_MASKED,) * IOAPIC_PIN_COUNT)


class IoApic(Device):
    """Only pins in ``connected`` (those that have a device at that moment) ever get a route."""

    SECTION = Section(
        "ioapic",
        1,
        RecordOf(
            IoApicState,
            select=Int(U8),
            id=Int(15),
            entries=ListOf(Int(U64), IOAPIC_PIN_COUNT, IOAPIC_PIN_COUNT),
        ),
    )
    instance = ""

    def __init__(
        self,
        connected: Collection[int],
        set_routes: SetRoutes,
        log: Callable[[str], None],
        state: IoApicState = _AFTER_RESET,
    ) -> None:
        self._entries = list(state.entries)
        self._connected = connected
        self._set_routes = set_routes
        self._log = log
        self._select = state.select
        self._id = state.id
        self._level_reported = False
        #: Called when an entry was changed.
        self.on_change: Callable[[], None] = lambda: None

    def is_masked(self, pin: int) -> bool:
        """Tell whether an edge on this pin would lead to nothing."""
        return bool(self._entries[pin] & ENTRY_MASKED)

    def save(self) -> IoApicState:
        """Return the registers."""
        return IoApicState(self._select, self._id, tuple(self._entries))

    def read(self, offset: int, size: int) -> int:
        """Read IOREGSEL or the register that it selects."""
        if offset == IOREGSEL:
            return self._select
        if offset != IOWIN:
            return 0
        index = self._select
        if index in (INDEX_ID, INDEX_ARBITRATION):
            return self._id << 24
        if index == INDEX_VERSION:
            return VERSION
        pin, high = divmod(index - INDEX_REDIRECTION, 2)
        if not 0 <= pin < IOAPIC_PIN_COUNT:
            return 0
        return self._entries[pin] >> (32 if high else 0) & 0xFFFF_FFFF

    def attach(self, select: PublishedSlot, window: PublishedSlot) -> None:
        """Take the slots of the windows that hold IOREGSEL and IOWIN.

        Writes of both are posted, as a bus does it with writes to memory: what must know that one has arrived reads
        IOWIN, which waits for all that was posted before. So does every later access to a device behind it, where a
        changed route parks the ring.
        """
        select.publish(write_posted=True, write_lazy=True)
        window.publish(write_posted=True, write_lazy=True)

    def write(self, offset: int, size: int, value: int) -> Deferral | None:
        """Write IOREGSEL or the selected register; a changed route defers the write until it is in force."""
        value &= 0xFFFF_FFFF
        if offset == IOREGSEL:
            self._select = value & 0xFF
            return None
        if offset != IOWIN:
            return None
        if self._select == INDEX_ID:
            self._id = value >> 24 & 0xF
            return None
        pin, high = divmod(self._select - INDEX_REDIRECTION, 2)
        if not 0 <= pin < IOAPIC_PIN_COUNT:
            return None
        return self._write_entry(pin, high, value)

    def _write_entry(self, pin: int, high: int, value: int) -> Deferral | None:
        before = self._entries[pin]
        if high:
            after = before & 0xFFFF_FFFF | value << 32
        else:
            after = before & ~0xFFFF_FFFF | value & ~ENTRY_READ_ONLY
        self._entries[pin] = after
        self.on_change()
        if pin not in self._connected or after == before:
            return None
        if after & before & ENTRY_MASKED:
            return None  # no route is in force for a masked pin, before or after
        if after & ENTRY_LEVEL and not after & ENTRY_MASKED and not self._level_reported:
            self._level_reported = True
            self._log(f"The guest set pin {pin} of the IOAPIC to level-triggered; it is treated as edge-triggered.")
        deferral = self._set_routes((msi_of_entry(pin, after),))
        return None if deferral.done else deferral
