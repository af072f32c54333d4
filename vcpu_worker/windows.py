"""Which accesses belong to a device, and where in the device page it says how they are answered.

The tables are read by the run loops, without a lock, while the control thread changes them: what is in the windows
before and after a change is never missing meanwhile.
"""

from __future__ import annotations

from base.lean_typing import Sequence
from ipc.messages.records import Window
from vcpu_worker.errors import ConfigurationError
from vcpu_worker.kvm import abi

#: What :meth:`Windows.find_mmio` returns where there is no device.
NO_DEVICE = -1
PORT_COUNT = 1 << 16
#: A guest can touch any address: no table grows with that.
_CACHE_LIMIT = 4096


class Windows:
    """Those of one worker, the same for all of its vCPUs."""

    __slots__ = ("_mmio", "byte_inputs", "mmio_slots", "port_slots")

    def __init__(self) -> None:
        #: Port → its slot of the device page.
        self.port_slots: dict[int, int] = {}
        #: The word at RUN_IO_DIRECTION (direction, size, port) of a one-byte IN → slot.
        self.byte_inputs: dict[int, int] = {}
        #: Addresses that were looked for → slot or NO_DEVICE.
        self.mmio_slots: dict[int, int] = {}
        self._mmio: tuple[Window, ...] = ()

    def set(self, ports: Sequence[Window], mmio: Sequence[Window], slot_count: int) -> None:
        """Replace all windows, for a device page of so many slots. Raises ConfigurationError; then nothing changed."""
        port_slots: dict[int, int] = {}
        for window in ports:
            if window.address + window.length > PORT_COUNT or window.slot + window.length > slot_count:
                raise ConfigurationError(f"port window {window.address:#x}+{window.length} is out of range")
            for offset in range(window.length):
                if port_slots.setdefault(window.address + offset, window.slot + offset) != window.slot + offset:
                    raise ConfigurationError(f"port {window.address + offset:#x} belongs to two windows")
        last = -1
        for window in sorted(mmio):
            if window.address <= last or window.slot >= slot_count:
                raise ConfigurationError(f"MMIO window {window.address:#x}+{window.length} overlaps or has no slot")
            last = window.address + window.length - 1
        _replace(self.port_slots, port_slots)
        inputs = {port << 16 | 1 << 8 | abi.EXIT_IO_IN: slot for port, slot in port_slots.items()}
        _replace(self.byte_inputs, inputs)
        self._mmio = tuple(mmio)
        self.mmio_slots.clear()

    def find_mmio(self, address: int) -> int:
        """Return the slot of the window that holds ``address``, or NO_DEVICE."""
        slot = self.mmio_slots.get(address)
        if slot is not None:
            return slot
        windows = self._mmio
        slot = NO_DEVICE
        for window in windows:
            if window.address <= address < window.address + window.length:
                slot = window.slot
                break
        if len(self.mmio_slots) >= _CACHE_LIMIT:
            self.mmio_slots.clear()
        self.mmio_slots[address] = slot
        if self._mmio is not windows:  # they have changed since, and the table was emptied before this came into it
            self.mmio_slots.clear()
        return slot


def _replace(table: dict[int, int], new: dict[int, int]) -> None:
    """Make ``table``, which others read meanwhile, equal to ``new``."""
    table.update(new)
    for key in [key for key in table if key not in new]:
        del table[key]
