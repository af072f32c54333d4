"""A device to exercise the exit paths: every guest write carries a counter, and the device checks the sequence.

Attached only with ``--exerciser``; used by the bare-metal guests of the tests and benchmarks. It has one register of
each kind (posted, synchronous, answered by the worker; port, string and MMIO), and a single counter over all of
them, so that a lost, repeated or reordered exit shows.
"""

from __future__ import annotations

from base.deferral import Deferral
from base.lean_typing import Callable
from vmm.devices.bus import ALL_ONES, Device, PublishedSlot

EXERCISER_PORT = 0x620
PORT_COUNT = 16
EXERCISER_MMIO = 0xEEBF_E000
MMIO_LENGTH = 0x1000

# Port registers.
COUNT_POSTED = 0x0  # 4 bytes: must be the last count + 1
COUNT_SYNCHRONOUS = 0x4  # 4 bytes: the same counter
LAST_COUNT = 0x8  # 4 bytes, read: the last count (low bits for smaller reads)
LOCAL = 0xC  # read: LOCAL_VALUE, answered by the worker
STRING = 0xD  # rep outsb / insb: bytes that must continue the pattern 0, 1, … 255, 0 …
END = 0xF  # write: end the microVM; exit code 0 if every count was right, else 1
# MMIO registers: the first page is posted, the second synchronous.
MMIO_COUNT = 0x0
MMIO_LAST = 0x8

LOCAL_VALUE = 0x5A5A_5A5A
MAX_REPORTED = 8


class Exerciser(Device):
    """The port half; :class:`ExerciserPage` are the MMIO halves on the same counter."""

    def __init__(self, log: Callable[[str], None], end: Callable[[int], None]) -> None:
        self._log = log
        self._end = end
        self._count_mask = ALL_ONES[4]
        self._string_out = 0
        self._string_in = 0
        self.count = 0
        self.errors = 0

    def attach(self, slots: list[PublishedSlot]) -> None:
        """Take the slots of the ports."""
        for port in range(4):
            slots[COUNT_POSTED + port].publish(write_posted=True)
        slots[LOCAL].publish(LOCAL_VALUE, read_local=True)

    def check(self, value: int, size: int) -> None:
        """Count one write; ``value`` are the low ``size`` bytes of the guest's counter."""
        expected = self.count + 1 & ALL_ONES[size]
        if value & ALL_ONES[size] != expected:
            self.errors += 1
            if self.errors <= MAX_REPORTED:
                self._log(f"Exerciser: count {value:#x} instead of {expected:#x}")
        self.count += 1

    def read(self, offset: int, size: int) -> int:
        """Read a register."""
        if offset == LOCAL:
            return LOCAL_VALUE
        if offset == STRING:
            self._string_in = self._string_in + 1 & 0xFF
            return self._string_in - 1 & 0xFF
        return self.count & ALL_ONES[size] if offset == LAST_COUNT else ALL_ONES[size]

    def write(self, offset: int, size: int, value: int) -> Deferral | None:
        """Write a register."""
        if offset in (COUNT_POSTED, COUNT_SYNCHRONOUS):
            self.check(value, size)
        elif offset == STRING:
            if value & 0xFF != self._string_out:
                self.errors += 1
                if self.errors <= MAX_REPORTED:
                    self._log(f"Exerciser: string byte {value & 0xFF:#x} instead of {self._string_out:#x}")
            self._string_out = (value & 0xFF) + 1 & 0xFF
        elif offset == END:
            self._log(f"Exerciser: {self.count} counts, {self.errors} errors, guest says {value}")
            self._end(1 if self.errors or value else 0)
        return None


class ExerciserPage(Device):
    """One MMIO page on the counter of an :class:`Exerciser`."""

    def __init__(self, exerciser: Exerciser) -> None:
        self._exerciser = exerciser

    def read(self, offset: int, size: int) -> int:
        """Read the last count at MMIO_LAST."""
        return self._exerciser.count if offset == MMIO_LAST else ALL_ONES[size]

    def write(self, offset: int, size: int, value: int) -> Deferral | None:
        """Write the next count at MMIO_COUNT."""
        if offset == MMIO_COUNT:
            self._exerciser.check(value, size)
        return None
