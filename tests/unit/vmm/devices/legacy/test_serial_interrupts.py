"""The UART's interrupts: no order of guest accesses and host input loses one."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.harness.uart import FIFO_BITS, Uart
from vmm.devices.legacy.serial import (
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
)


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
