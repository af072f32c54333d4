"""The UART's registers, FIFOs and loopback, against the PC16550D data sheet."""

from __future__ import annotations

import pytest

from tests.harness.devices import worker_read
from tests.harness.uart import COM1, FIFO_BITS
from vmm.devices.legacy.serial import (
    FCR_CLEAR_RECEIVE,
    FCR_ENABLE,
    IER,
    IIR_FCR,
    IIR_NONE,
    LCR,
    LCR_DLAB,
    LSR,
    LSR_DATA_READY,
    LSR_TRANSMITTER_EMPTY,
    MCR,
    MCR_LOOP,
    MCR_OUT2,
    MSR,
    PORT_COUNT,
    RBR_THR,
    RECEIVE_FIFO_SIZE,
    SCR,
)


def test_registers_after_reset(uart):
    expected = {RBR_THR: 0, IER: 0, IIR_FCR: IIR_NONE, LSR: LSR_TRANSMITTER_EMPTY, MSR: 0xB0, SCR: 0}
    assert {offset: uart.inb(offset) for offset in expected} == expected
    assert uart.line.edges() == 0


@pytest.mark.parametrize(("offset", "kept"), [(IER, 0x0F), (LCR, 0xFF), (MCR, 0x1F), (SCR, 0xFF)])
def test_registers_that_read_back(uart, offset, kept):
    """Bits 4-7 of IER and 5-7 of MCR are always zero (tables II); all others keep what was written."""
    for value in [*range(256), 0]:
        uart.outb(offset, value)
        assert uart.inb(offset) == value & kept


def test_line_and_modem_status_cannot_be_written(uart):
    before = uart.inb(LSR), uart.inb(MSR)
    uart.outb(LSR, 0xFF)
    uart.outb(MSR, 0x00)
    assert (uart.inb(LSR), uart.inb(MSR)) == before


def test_the_divisor_hides_behind_dlab(uart):
    uart.outb(IER, 0x05)
    uart.outb(LCR, LCR_DLAB | 3)
    uart.outb(RBR_THR, 0x34)
    uart.outb(IER, 0x12)
    assert (uart.inb(RBR_THR), uart.inb(IER)) == (0x34, 0x12)
    uart.outb(LCR, 3)
    assert uart.inb(IER) == 0x05
    assert uart.sent == b""
    uart.outb(LCR, LCR_DLAB)
    assert (uart.inb(RBR_THR), uart.inb(IER)) == (0x34, 0x12)


def test_transmitted_bytes_come_out_in_order_whatever_the_access_size(uart):
    uart.bus.write(COM1, 1, 0x41)
    uart.bus.write(COM1, 2, 0x7742)
    uart.bus.write(COM1, 4, 0x7777_7743)
    assert uart.sent == b"ABC"


def test_received_bytes_come_in_order(uart):
    uart.device.receive(b"xyz")
    assert uart.inb(LSR) == LSR_TRANSMITTER_EMPTY | LSR_DATA_READY
    assert bytes(uart.inb(RBR_THR) for _ in range(3)) == b"xyz"
    assert uart.inb(LSR) == LSR_TRANSMITTER_EMPTY
    assert uart.inb(RBR_THR) == 0


def test_fifo_control(uart):
    """FCR: switching FIFOs on or off empties them; other bits count only together with bit 0."""
    assert uart.inb(IIR_FCR) == IIR_NONE
    uart.device.receive(b"a")
    uart.outb(IIR_FCR, FCR_CLEAR_RECEIVE)
    assert uart.inb(LSR) & LSR_DATA_READY
    uart.outb(IIR_FCR, FCR_ENABLE)
    assert not uart.inb(LSR) & LSR_DATA_READY
    assert uart.inb(IIR_FCR) == FIFO_BITS | IIR_NONE
    uart.device.receive(b"b")
    uart.outb(IIR_FCR, FCR_ENABLE)
    assert uart.inb(LSR) & LSR_DATA_READY
    uart.outb(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVE)
    assert not uart.inb(LSR) & LSR_DATA_READY
    uart.device.receive(b"c")
    uart.outb(IIR_FCR, 0)
    assert uart.inb(LSR) == LSR_TRANSMITTER_EMPTY
    assert uart.inb(IIR_FCR) == IIR_NONE


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("offset", range(PORT_COUNT))
def test_a_read_of_any_size_is_the_same_from_the_page_and_from_the_device(uart, offset, size):
    uart.device.receive(b"\x81")
    value = worker_read(uart.page, uart.bus, COM1 + offset, size)
    if uart.page.read_local(offset):
        assert value == uart.device.read(offset, size) == uart.bus.read(COM1 + offset, size)


def test_loopback_of_the_modem_lines(uart):
    """DTR → DSR, RTS → CTS, OUT1 → RI, OUT2 → DCD (data sheet, 8.7 note on loopback)."""
    for mcr, msr in [(0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80), (0x0F, 0xF0), (0x00, 0x00)]:
        uart.outb(MCR, MCR_LOOP | mcr)
        assert uart.inb(MSR) == msr
    uart.outb(MCR, MCR_OUT2)
    assert uart.inb(MSR) == 0xB0


def test_loopback_of_data_is_bounded_and_stays_inside(uart):
    uart.outb(MCR, MCR_LOOP)
    for value in range(200):
        uart.outb(RBR_THR, value)
    got = []
    while uart.inb(LSR) & LSR_DATA_READY:
        got.append(uart.inb(RBR_THR))
    assert got == list(range(RECEIVE_FIFO_SIZE))
    assert uart.sent == b""
    assert uart.posted == 0


def test_input_waits_while_the_receiver_is_looped_back(uart):
    asked = []
    uart.device.on_cleared = lambda unread: asked.append((unread, uart.device.room()))
    uart.outb(MCR, MCR_LOOP)
    assert uart.device.room() == 0
    uart.device.receive(b"lost")
    assert not uart.inb(LSR) & LSR_DATA_READY
    uart.outb(MCR, MCR_LOOP | 0xF)
    assert asked == []
    uart.outb(MCR, MCR_OUT2)
    assert asked == [(b"", RECEIVE_FIFO_SIZE)]
