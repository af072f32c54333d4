"""A UART as a guest sees it: on a bus, with a device page that a worker answers from."""

from __future__ import annotations

from tests.harness.devices import CountingLine, Page, worker_read
from vmm.devices.bus import port_bus
from vmm.devices.legacy.serial import IIR_FCR, PORT_COUNT, Serial

COM1 = 0x3F8
FIFO_BITS = 0xC0


class Uart:
    """A UART on a bus with a device page. ``inb`` and ``outb`` go the way of a worker."""

    def __init__(self) -> None:
        self.page = Page()
        self.bus = port_bus(self.page.page)
        self.line = CountingLine()
        self.sent = bytearray()
        self.device = Serial(self.line, self.sent.append)
        self.device.attach(self.bus.insert(self.device, COM1, PORT_COUNT))
        self.posted = 0

    def inb(self, offset: int) -> int:
        return worker_read(self.page, self.bus, COM1 + offset, 1)

    def outb(self, offset: int, value: int) -> None:
        self.posted += self.page.write_posted(offset)
        assert self.bus.write(COM1 + offset, 1, value) is None

    def iir(self) -> int:
        return self.inb(IIR_FCR) & ~FIFO_BITS

    def close(self) -> None:
        self.line.close()
        self.page.close()
