"""The UART against what Linux's 8250 driver does with it."""

from __future__ import annotations

from tests.harness.uart import Uart
from vmm.devices.legacy.serial import (
    FCR_CLEAR_RECEIVE,
    FCR_ENABLE,
    IER,
    IER_RDI,
    IER_THRI,
    IIR_FCR,
    IIR_NONE,
    LCR,
    LCR_DLAB,
    LSR,
    LSR_DATA_READY,
    MCR,
    MCR_LOOP,
    MCR_OUT2,
    MSR,
    RBR_THR,
    SCR,
)


def linux_autoconfig(uart: Uart) -> str:
    """Identify the UART the way drivers/tty/serial/8250 does; returns the type's name."""
    scratch = uart.inb(IER)
    uart.outb(IER, 0)
    low = uart.inb(IER) & 0x0F
    uart.outb(IER, 0x0F)
    high = uart.inb(IER) & 0x0F
    uart.outb(IER, scratch)
    assert (low, high) == (0, 0x0F), "no UART: IER does not read back"
    save_mcr, save_lcr = uart.inb(MCR), uart.inb(LCR)
    uart.outb(MCR, MCR_LOOP | 0x0A)
    status = uart.inb(MSR) & 0xF0
    uart.outb(MCR, save_mcr)
    assert status == 0x90, "no UART: loopback test"
    uart.outb(LCR, 0xBF)
    uart.outb(IIR_FCR, 0)
    uart.outb(LCR, 0)
    uart.outb(IIR_FCR, FCR_ENABLE)
    kind = {0: "8250 or 16450", 1: "unknown", 2: "16550", 3: "16550A"}[uart.inb(IIR_FCR) >> 6]
    if kind == "8250 or 16450":
        kept = []
        for pattern in (0xA5, 0x5A):
            uart.outb(SCR, pattern)
            kept.append(uart.inb(SCR) == pattern)
        kind = "16450" if all(kept) else "8250"
    if kind == "16550A":
        kind = linux_autoconfig_16550a(uart)
    uart.outb(LCR, save_lcr)
    uart.outb(MCR, save_mcr)
    uart.outb(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVE | 4)
    uart.outb(IIR_FCR, 0)
    uart.inb(RBR_THR)
    uart.outb(IER, 0)
    return kind


def linux_autoconfig_16550a(uart: Uart) -> str:
    uart.outb(LCR, LCR_DLAB)
    if uart.inb(IIR_FCR) == 0:
        return "16C850 or 16650"
    uart.outb(LCR, 0xBF)
    if uart.inb(IIR_FCR) == 0:
        return "16650V2"
    uart.outb(LCR, 0)
    status1 = uart.inb(MCR)
    uart.outb(LCR, 0xE0)
    status2 = uart.inb(IIR_FCR)
    if not (status2 ^ status1) & MCR_LOOP:
        uart.outb(LCR, 0)
        uart.outb(MCR, status1 ^ MCR_LOOP)
        uart.outb(LCR, 0xE0)
        status2 = uart.inb(IIR_FCR)
        uart.outb(LCR, 0)
        uart.outb(MCR, status1)
        if (status2 ^ status1) & MCR_LOOP:
            return "NS16550A"
    uart.outb(LCR, 0)
    uart.outb(IIR_FCR, FCR_ENABLE | 0x20)
    status1 = uart.inb(IIR_FCR) >> 5
    uart.outb(IIR_FCR, FCR_ENABLE)
    uart.outb(LCR, LCR_DLAB)
    uart.outb(IIR_FCR, FCR_ENABLE | 0x20)
    status2 = uart.inb(IIR_FCR) >> 5
    uart.outb(IIR_FCR, FCR_ENABLE)
    uart.outb(LCR, 0)
    if status1 == 6 and status2 == 7:
        return "16750"
    saved = uart.inb(IER)
    uart.outb(IER, saved ^ 0x40)
    if uart.inb(IER) & 0x40:
        return "XScale"
    uart.outb(IER, saved)
    return "U6_16550A" if linux_size_fifo(uart) == 64 else "16550A"


def linux_size_fifo(uart: Uart) -> int:
    old_lcr = uart.inb(LCR)
    uart.outb(LCR, 0)
    old_fcr, old_mcr = uart.inb(IIR_FCR), uart.inb(MCR)
    uart.outb(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVE | 4)
    uart.outb(MCR, MCR_LOOP)
    uart.outb(LCR, LCR_DLAB)
    old_divisor = uart.inb(RBR_THR), uart.inb(IER)
    uart.outb(RBR_THR, 1)
    uart.outb(IER, 0)
    uart.outb(LCR, 3)
    for value in range(256):
        uart.outb(RBR_THR, value)
    count = 0
    while uart.inb(LSR) & LSR_DATA_READY and count < 256:
        assert uart.inb(RBR_THR) == count
        count += 1
    uart.outb(IIR_FCR, old_fcr)
    uart.outb(MCR, old_mcr)
    uart.outb(LCR, LCR_DLAB)
    uart.outb(RBR_THR, old_divisor[0])
    uart.outb(IER, old_divisor[1])
    uart.outb(LCR, old_lcr)
    return count


def linux_startup(uart: Uart) -> set[str]:
    """Open the port as serial8250_do_startup does; returns the bugs that the driver believes to have found."""
    bugs = set()
    uart.outb(IIR_FCR, FCR_ENABLE)
    uart.outb(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVE | 4)
    uart.outb(IIR_FCR, 0)
    for offset in (LSR, RBR_THR, IIR_FCR, MSR):
        uart.inb(offset)
    assert uart.inb(LSR) != 0xFF
    uart.outb(LCR, 3)
    # Does the transmitter's interrupt come again when it is enabled again?
    assert uart.inb(LSR) & 0x20
    uart.outb(IER, IER_THRI)
    first = uart.inb(IIR_FCR)
    uart.outb(IER, 0)
    uart.outb(IER, IER_THRI)
    again = uart.inb(IIR_FCR)
    uart.outb(IER, 0)
    if not first & IIR_NONE and again & IIR_NONE:
        bugs.add("THRE")
    # Does enabling the interrupt raise it at all?
    uart.outb(MCR, MCR_OUT2 | 3)
    uart.line.edges()
    uart.outb(IER, IER_THRI)
    lsr, iir = uart.inb(LSR), uart.inb(IIR_FCR)
    if not uart.line.edges():
        bugs.add("no edge")
    uart.outb(IER, 0)
    if lsr & 0x40 and iir & IIR_NONE:
        bugs.add("TXEN")
    uart.outb(IER, IER_RDI | 0x04)
    uart.outb(IIR_FCR, FCR_ENABLE | 0x80)
    return bugs


def test_linux_identifies_the_uart_and_opens_it_without_workarounds(uart):
    assert linux_autoconfig(uart) == "U6_16550A"
    assert linux_startup(uart) == set()
    assert uart.sent == b""


def test_what_was_typed_before_linux_opened_the_uart_is_not_lost(uart):
    waiting = bytearray(b"typed ahead" * 10)

    def feed() -> None:
        part = bytes(waiting[: uart.device.room()])
        del waiting[: len(part)]
        uart.device.receive(part)

    def cleared(unread: bytes) -> None:
        waiting[:0] = unread

    uart.device.on_room = feed
    uart.device.on_cleared = cleared
    feed()
    assert linux_autoconfig(uart) == "U6_16550A"
    feed()
    assert linux_startup(uart) == set()
    feed()
    got = bytearray()
    while uart.inb(LSR) & LSR_DATA_READY:
        got.append(uart.inb(RBR_THR))
    assert got == b"typed ahead" * 10


def test_bytes_of_a_loopback_are_not_given_back_as_input(uart):
    given_back: list[bytes] = []
    uart.device.on_cleared = given_back.append
    uart.outb(IIR_FCR, FCR_ENABLE)
    uart.outb(MCR, MCR_LOOP)
    uart.outb(RBR_THR, 0x55)
    uart.outb(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVE)
    uart.outb(MCR, 0)
    uart.device.receive(b"typed")
    uart.outb(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVE)
    assert given_back == [b"", b"", b"", b"typed"]
