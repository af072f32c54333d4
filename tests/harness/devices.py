"""Parts for device tests: a device page that can be read back, an interrupt line that counts, slots of a device."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from base.deferral import Deferral
from ipc.device_pages import DEVICE_PAGE_SIZE, FLAG_READ_LOCAL, FLAG_WRITE_POSTED, DevicePage, slots_of
from ipc.messages.records import Route
from vmm.devices.bus import Bus, Device
from vmm.devices.interrupts import InterruptLine


class Page:
    """A device page together with the view that a worker has of it."""

    def __init__(self) -> None:
        self.buffer = mmap.mmap(-1, DEVICE_PAGE_SIZE)
        self.page = DevicePage(self.buffer)
        self.slots = slots_of(self.buffer)

    def value(self, slot: int) -> int:
        return self.slots[slot] & 0xFFFF_FFFF

    def flags(self, slot: int) -> int:
        return self.slots[slot] >> 32

    def read_local(self, slot: int) -> bool:
        return bool(self.flags(slot) & FLAG_READ_LOCAL)

    def write_posted(self, slot: int) -> bool:
        return bool(self.flags(slot) & FLAG_WRITE_POSTED)

    def close(self) -> None:
        self.slots.release()
        self.page.close()
        self.buffer.close()


class CountingLine(InterruptLine):
    """An interrupt line on which a test asks whether an edge came since it last asked."""

    def __init__(self, gsi: int = 4) -> None:
        super().__init__(gsi)
        self.seen = 0
        #: Called at each edge, as the guest's handler could run on another CPU at that very moment.
        self.on_edge = lambda: None

    def trigger(self) -> None:
        super().trigger()
        self.on_edge()

    def edges(self) -> int:
        """Return how many edges came since the last call."""
        new, self.seen = self.triggers - self.seen, self.triggers
        return new

    def pending(self) -> int:
        """Return what the worker's irqfd would find in the eventfd now."""
        try:
            return os.eventfd_read(self.eventfd)
        except BlockingIOError:
            return 0


@contextmanager
def device_page() -> Iterator[Page]:
    page = Page()
    try:
        yield page
    finally:
        page.close()


class Recorder(Device):
    """Notes every access; reads give ``answer``."""

    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.accesses: list[tuple[str, int, int, int]] = []
        self.deferral: Deferral | None = None

    def read(self, offset: int, size: int) -> int:
        self.accesses.append(("read", offset, size, 0))
        return self.answer

    def write(self, offset: int, size: int, value: int) -> Deferral | None:
        self.accesses.append(("write", offset, size, value))
        return self.deferral


def worker_read(page: Page, bus: Bus, address: int, size: int) -> int:
    """Read the way a worker does: locally where the page allows it, else through the bus."""
    for window in bus.windows():
        if window.address <= address < window.address + window.length:
            slot = window.slot + address - window.address
            if page.read_local(slot):
                return page.value(slot) & (1 << 8 * size) - 1
    return bus.read(address, size)


def routes_at_once(routes: Sequence[Route]) -> Deferral:
    """Workers that have put a route into force as soon as they are told."""
    deferral = Deferral()
    deferral.complete()
    return deferral
