"""The UART against the PC16550D data sheet and against what Linux's 8250 driver does with it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.harness.devices import CountingLine, Page, worker_read
from vmm.devices.bus import port_bus
from vmm.devices.legacy.serial import (
    FCR_CLEAR_RECEIVE,
    FCR_ENABLE,
    IER,
    IER_RDI,
    IER_THRI,
    IIR_FCR,
    IIR_NONE,
    IIR_RDI,
    IIR_THRI,
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
    Serial,
)

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


@pytest.fixture
def uart():
    uart = Uart()
    yield uart
    uart.close()


# ---------------------------------------------------------------- registers


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


# ---------------------------------------------------------------- loopback


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


# ---------------------------------------------------------------- what Linux does


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


# ---------------------------------------------------------------- interrupts


def test_priority_and_reset_of_interrupts(uart):
    """Table IV: received data before transmitter empty; reading IIR resets only the latter, and only if it is shown."""
    uart.outb(IER, IER_RDI | IER_THRI)
    uart.device.receive(b"q")
    assert [uart.iir(), uart.iir()] == [IIR_RDI, IIR_RDI]
    uart.inb(RBR_THR)
    assert [uart.iir(), uart.iir()] == [IIR_THRI, IIR_NONE]
    uart.outb(RBR_THR, 1)
    assert [uart.iir(), uart.iir()] == [IIR_THRI, IIR_NONE]


def test_disabled_interrupts_are_neither_shown_nor_raised(uart):
    uart.device.receive(b"q")
    uart.outb(RBR_THR, 1)
    assert uart.iir() == IIR_NONE
    assert uart.line.edges() == 0
    uart.outb(IER, IER_RDI)
    assert (uart.iir(), uart.line.edges()) == (IIR_RDI, 1)
    uart.outb(IER, 0)
    uart.inb(RBR_THR)
    uart.outb(IER, IER_RDI)
    assert (uart.iir(), uart.line.edges()) == (IIR_NONE, 0)


def test_an_edge_comes_after_the_state_that_it_announces(uart):
    """The guest's handler may run on another CPU at once, and reads LSR from the page."""
    seen = []
    uart.outb(IER, IER_RDI)
    uart.line.on_edge = lambda: seen.append(uart.inb(LSR) & LSR_DATA_READY)
    uart.device.receive(b"ab")
    uart.inb(RBR_THR)
    assert seen == [1, 1]


class UartMachine(RuleBasedStateMachine):
    """Any order of guest accesses and host input, against a model of the few rules that matter.

    The interrupt is edge-triggered: a condition that becomes enabled and pending without an edge is a lost interrupt.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uart = Uart()
        self.received: list[int] = []
        self.sent = bytearray()
        self.ier = self.lcr = self.fcr = 0
        self.lcr = 3
        self.mcr = MCR_OUT2
        self.transmitter_pending = False
        #: Interrupt conditions that were enabled and pending before the step.
        self.before: set[str] = set()
        #: Whether the step brought a new reason for an interrupt that was pending already.
        self.edge_due = False

    def teardown(self) -> None:
        self.uart.close()

    def conditions(self) -> set[str]:
        active = set()
        if self.received and self.ier & IER_RDI:
            active.add("received")
        if self.transmitter_pending and self.ier & IER_THRI:
            active.add("transmitter")
        return active

    @property
    def dlab(self) -> bool:
        return bool(self.lcr & LCR_DLAB)

    @property
    def loop(self) -> bool:
        return bool(self.mcr & MCR_LOOP)

    @rule(data=st.binary(min_size=1, max_size=100))
    def host_types(self, data: bytes) -> None:
        room = 0 if self.loop else RECEIVE_FIFO_SIZE - len(self.received)
        assert self.uart.device.room() == room
        self.uart.device.receive(data)
        self.received += data[:room]
        self.edge_due = bool(data[:room]) and "received" in self.conditions()

    @rule(value=st.integers(0, 255))
    def write_thr(self, value: int) -> None:
        posted = self.uart.page.write_posted(RBR_THR)
        assert posted == (not self.dlab and not self.loop)
        self.uart.outb(RBR_THR, value)
        if self.dlab:
            return
        if self.loop:
            if len(self.received) < RECEIVE_FIFO_SIZE:
                self.received.append(value)
        else:
            self.sent.append(value)
        self.transmitter_pending = True
        self.edge_due = "transmitter" in self.conditions()

    @precondition(lambda self: not self.lcr & LCR_DLAB)
    @rule()
    def read_rbr(self) -> None:
        assert self.uart.inb(RBR_THR) == (self.received.pop(0) if self.received else 0)
        self.edge_due = "received" in self.conditions()  # a driver may take one byte per interrupt

    @rule(value=st.integers(0, 255))
    def write_ier(self, value: int) -> None:
        self.uart.outb(IER, value)
        if not self.dlab:
            if value & ~self.ier & IER_THRI:
                self.transmitter_pending = True
            self.ier = value & 0x0F

    @rule()
    def read_iir(self) -> None:
        iir = self.uart.inb(IIR_FCR)
        assert iir & FIFO_BITS == (FIFO_BITS if self.fcr & FCR_ENABLE else 0)
        active = self.conditions()
        if "received" in active:
            assert iir & 0x0F == IIR_RDI
        elif "transmitter" in active:
            assert iir & 0x0F == IIR_THRI
            self.transmitter_pending = False
        else:
            assert iir & 0x0F == IIR_NONE

    @rule(value=st.integers(0, 255))
    def write_fcr(self, value: int) -> None:
        self.uart.outb(IIR_FCR, value)
        if (value ^ self.fcr) & FCR_ENABLE or value & 3 == 3:
            self.received.clear()
        self.fcr = value

    @rule(value=st.sampled_from([0, 3, LCR_DLAB, LCR_DLAB | 3, 0xBF]))
    def write_lcr(self, value: int) -> None:
        self.uart.outb(LCR, value)
        self.lcr = value

    @rule(value=st.integers(0, 255))
    def write_mcr(self, value: int) -> None:
        self.uart.outb(MCR, value)
        self.mcr = value & 0x1F

    @rule(offset=st.sampled_from([LSR, MSR, SCR]), value=st.integers(0, 255))
    def write_others(self, offset: int, value: int) -> None:
        self.uart.outb(offset, value)

    @invariant()
    def nothing_is_lost(self) -> None:
        active = self.conditions()
        edges = self.uart.line.edges()
        if active - self.before or self.edge_due:
            assert edges, f"no edge for {active - self.before or active}"
        if edges:
            assert active, "an edge for nothing"
        self.before = active
        self.edge_due = False

    @invariant()
    def published_is_what_the_device_would_answer(self) -> None:
        device, page = self.uart.device, self.uart.page
        for offset in (IER, LCR, MCR, LSR, MSR, SCR):
            assert page.read_local(offset)
            assert page.value(offset) == device.read(offset, 1)
        for offset in (RBR_THR, IIR_FCR):  # reading these has effects
            assert not page.read_local(offset)
        assert page.value(LSR) == LSR_TRANSMITTER_EMPTY | (LSR_DATA_READY if self.received else 0)
        assert [page.write_posted(offset) for offset in range(1, PORT_COUNT)] == [False] * (PORT_COUNT - 1)
        assert self.uart.sent == self.sent


TestUartMachine = UartMachine.TestCase
TestUartMachine.settings = settings(max_examples=150, stateful_step_count=60)


# ---------------------------------------------------------------- a driver that only acts on edges


class EdgeDriver:
    """Linux's interrupt handler: called for an edge, serves until IIR says that nothing is pending."""

    def __init__(self, uart: Uart, to_send: bytes) -> None:
        self.uart = uart
        self.to_send = bytearray(to_send)
        self.got = bytearray()

    def start_tx(self):
        self.uart.outb(IER, IER_RDI | IER_THRI)
        yield

    def handle(self):
        """Yield between any two accesses, so that the host can act in between."""
        uart = self.uart
        while True:
            iir = uart.inb(IIR_FCR)
            yield
            if iir & IIR_NONE:
                return
            lsr = uart.inb(LSR)
            yield
            while lsr & LSR_DATA_READY:
                self.got.append(uart.inb(RBR_THR))
                yield
                lsr = uart.inb(LSR)
                yield
            if lsr & 0x20 and uart.inb(IER) & IER_THRI:
                for _ in range(16):
                    if self.to_send:
                        uart.outb(RBR_THR, self.to_send.pop(0))
                        yield
                if not self.to_send:
                    uart.outb(IER, IER_RDI)
                    yield


@given(choices=st.randoms(use_true_random=False), incoming=st.binary(max_size=300), outgoing=st.binary(max_size=100))
@settings(max_examples=60)
def test_an_edge_driven_driver_never_gets_stuck(choices: random.Random, incoming: bytes, outgoing: bytes):
    uart = Uart()
    driver = EdgeDriver(uart, outgoing)
    waiting = bytearray(incoming)
    uart.outb(IER, IER_RDI)
    uart.line.edges()
    uart.line.pending()

    def host() -> None:
        if waiting and choices.random() < 0.3:
            count = min(uart.device.room(), choices.randint(1, 20))
            uart.device.receive(bytes(waiting[:count]))
            del waiting[:count]

    running = driver.start_tx()
    for _ in range(100_000):
        host()
        if next(running, running) is running:  # the handler returned
            if uart.line.pending():
                running = driver.handle()
            elif not waiting:
                break
    assert driver.got == incoming
    assert uart.sent == outgoing
    assert not driver.to_send
    uart.close()
