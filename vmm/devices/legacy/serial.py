"""A 16550A UART at COM1, as a guest sees it. Source: TI PC16550D data sheet (registers, interrupt priorities).

The transmitter is infinitely fast: LSR always says that it is empty. That makes LSR and MSR predictable, so that
the worker answers them by itself from the device page, and lets transmitted bytes be posted.
"""

from __future__ import annotations

from base.deferral import Deferral
from base.lean_typing import Callable, NamedTuple
from ipc.schema import U8, U16, Bytes, Flag, Int, RecordOf, Section
from vmm.devices.bus import Device, PublishedSlot
from vmm.devices.interrupts import InterruptLine

PORT_COUNT = 8

# Register offsets; DLL and DLM replace RBR/THR and IER while LCR.DLAB is set.
RBR_THR = 0
IER = 1
IIR_FCR = 2
LCR = 3
MCR = 4
LSR = 5
MSR = 6
SCR = 7

IER_RDI = 0x01
IER_THRI = 0x02
IER_MASK = 0x0F
IIR_NONE = 0x01
IIR_THRI = 0x02
IIR_RDI = 0x04
IIR_FIFO_ENABLED = 0xC0
FCR_ENABLE = 0x01
FCR_CLEAR_RECEIVE = 0x02
LCR_DLAB = 0x80
MCR_OUT2 = 0x08
MCR_LOOP = 0x10
MCR_MASK = 0x1F
LSR_DATA_READY = 0x01
LSR_TRANSMITTER_EMPTY = 0x60  # THRE and TEMT
MSR_CTS_DSR_DCD = 0xB0

#: Bytes that wait for the guest; the source of the input is not read while it is full.
RECEIVE_FIFO_SIZE = 64


class SerialState(NamedTuple):
    """The registers, and what the guest has not read yet. ``looped``: some of that it has sent itself."""

    receive: bytes
    ier: int
    fcr: int
    lcr: int
    mcr: int
    scr: int
    divisor: int
    thr_empty_pending: bool
    looped: bool


class Serial(Device):
    """``transmit`` gets every byte that the guest sends; ``receive`` feeds bytes to the guest."""

    SECTION = Section(
        "serial",
        1,
        RecordOf(
            SerialState,
            receive=Bytes(RECEIVE_FIFO_SIZE),
            ier=Int(IER_MASK),
            fcr=Int(U8),
            lcr=Int(U8),
            mcr=Int(MCR_MASK),
            scr=Int(U8),
            divisor=Int(U16),
            thr_empty_pending=Flag(),
            looped=Flag(),
        ),
    )
    instance = ""

    def __init__(
        self, interrupt: InterruptLine, transmit: Callable[[int], None], state: SerialState | None = None
    ) -> None:
        self._interrupt = interrupt
        self._transmit = transmit
        self._slots: list[PublishedSlot] = []
        state = state or SerialState(b"", 0, 0, 0x03, MCR_OUT2, 0, 12, False, False)
        self._receive = bytearray(state.receive)
        self._ier = state.ier
        self._fcr = state.fcr
        self._lcr = state.lcr
        self._mcr = state.mcr
        self._scr = state.scr
        self._divisor = state.divisor
        self._thr_empty_pending = state.thr_empty_pending
        #: Bytes of a loopback are among those in the FIFO.
        self._looped = state.looped
        #: A write of THR transmits: neither loopback nor the divisor.
        self._transmits = True
        self.read_count = 0
        self.write_count = 0
        #: Called when the guest has emptied the receive FIFO.
        self.on_room: Callable[[], None] | None = None
        #: Called when the guest sets the receiver up anew, with the input that it has not read. To be fed again after a
        #: while: a driver that probes the UART clears the FIFOs several times in a row, and would eat what was typed
        #: ahead.
        self.on_cleared: Callable[[bytes], None] | None = None
        self._publish()

    def attach(self, slots: list[PublishedSlot]) -> None:
        """Take the slots of the eight ports and publish the state of the registers."""
        assert len(slots) == PORT_COUNT
        self._slots = slots
        self._publish()

    def _publish(self) -> None:
        self._transmits = not self._lcr & LCR_DLAB and not self._mcr & MCR_LOOP
        if not self._slots:
            return
        slots = self._slots
        slots[LSR].publish(self._line_status(), read_local=True)
        slots[MSR].publish(self._modem_status(), read_local=True)
        # Writes of these are synchronous, so what is published is what was written last.
        slots[IER].publish(self._ier_or_divisor(), read_local=True)
        slots[LCR].publish(self._lcr, read_local=True)
        slots[MCR].publish(self._mcr, read_local=True)
        slots[SCR].publish(self._scr, read_local=True)
        # Writes of THR change nothing that a read returns unless they loop back or set the divisor. Nobody waits for
        # one to be transmitted unless it is to be told of that by an interrupt.
        slots[RBR_THR].publish(
            write_posted=self._transmits, write_lazy=not self._ier & IER_THRI, write_shared=self._transmits
        )

    def _line_status(self) -> int:
        return LSR_TRANSMITTER_EMPTY | (LSR_DATA_READY if self._receive else 0)

    def _ier_or_divisor(self) -> int:
        return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier

    def _modem_status(self) -> int:
        if not self._mcr & MCR_LOOP:
            return MSR_CTS_DSR_DCD
        # DTR → DSR, RTS → CTS, OUT1 → RI, OUT2 → DCD
        mcr = self._mcr
        return (mcr & 1) << 5 | (mcr & 2) << 3 | (mcr & 4) << 4 | (mcr & 8) << 4

    def save(self) -> SerialState:
        """Return the registers and what the guest has not read."""
        return SerialState(
            bytes(self._receive),
            self._ier,
            self._fcr,
            self._lcr,
            self._mcr,
            self._scr,
            self._divisor,
            self._thr_empty_pending,
            self._looped,
        )

    def room(self) -> int:
        """Return how many bytes :meth:`receive` takes now: none while the receiver is looped back to ourselves."""
        return 0 if self._mcr & MCR_LOOP else RECEIVE_FIFO_SIZE - len(self._receive)

    def receive(self, data: bytes) -> None:
        """Feed input to the guest; at most :meth:`room` bytes, the rest is dropped."""
        self._queue(data[: self.room()])

    def _queue(self, data: bytes) -> None:
        self._receive += data
        self._publish()  # before the edge: the guest's handler looks at LSR at once
        if self._receive and self._ier & IER_RDI:
            self._interrupt.trigger()

    def _pending(self) -> int:
        if self._receive and self._ier & IER_RDI:
            return IIR_RDI
        if self._thr_empty_pending and self._ier & IER_THRI:
            return IIR_THRI
        return IIR_NONE

    def read(self, offset: int, size: int) -> int:
        """Read a register; accesses wider than a byte read one register."""
        self.read_count += 1
        if offset == RBR_THR:
            return self._divisor & 0xFF if self._lcr & LCR_DLAB else self._take()
        if offset == IER:
            return self._ier_or_divisor()
        if offset == IIR_FCR:
            pending = self._pending()
            if pending == IIR_THRI:
                self._thr_empty_pending = False
            return pending | (IIR_FIFO_ENABLED if self._fcr & FCR_ENABLE else 0)
        if offset == LCR:
            return self._lcr
        if offset == MCR:
            return self._mcr
        if offset == LSR:
            return self._line_status()
        return self._modem_status() if offset == MSR else self._scr

    def _take(self) -> int:
        if not self._receive:
            return 0
        value = self._receive.pop(0)
        self._publish()
        if self._receive and self._ier & IER_RDI:
            self._interrupt.trigger()  # edge-triggered: the next byte needs an edge of its own
        elif not self._receive:
            self._looped = False
            if self.on_room is not None:
                self.on_room()
        return value

    def write(self, offset: int, size: int, value: int) -> Deferral | None:
        """Write a register; of a wider access the low byte counts."""
        value &= 0xFF
        self.write_count += 1
        if offset == RBR_THR:
            if self._transmits:
                self._transmit(value)
                self._thr_emptied()
            else:
                self._write_data(value)
        elif offset == IER:
            self._write_ier(value)
        elif offset == IIR_FCR:
            self._write_fcr(value)
        elif offset == LCR:
            self._lcr = value
            self._publish()
        elif offset == MCR:
            self._write_mcr(value & MCR_MASK)
        elif offset == SCR:
            self._scr = value
            self._publish()
        return None

    def _write_fcr(self, value: int) -> None:
        # Switching the FIFOs on or off clears them; the other bits count only together with the enable bit.
        clear = (value ^ self._fcr) & FCR_ENABLE or (value & FCR_ENABLE and value & FCR_CLEAR_RECEIVE)
        self._fcr = value
        if clear:
            unread = b"" if self._looped else bytes(self._receive)
            self._receive.clear()
            self._looped = False
            self._publish()
            self._give_back(unread)

    def _write_mcr(self, value: int) -> None:
        loop_ended = self._mcr & ~value & MCR_LOOP
        self._mcr = value
        self._publish()
        if loop_ended:
            self._give_back(b"")  # what came meanwhile has waited

    def _give_back(self, unread: bytes) -> None:
        if self.on_cleared is not None:
            self.on_cleared(unread)

    def _write_data(self, value: int) -> None:
        """Write THR where that does not transmit: it is the divisor, or loops back."""
        if self._lcr & LCR_DLAB:
            self._divisor = self._divisor & 0xFF00 | value
            return
        if len(self._receive) < RECEIVE_FIFO_SIZE:
            self._looped = True
            self._queue(bytes((value,)))
        self._thr_emptied()

    def _thr_emptied(self) -> None:
        self._thr_empty_pending = True
        if self._ier & IER_THRI:
            self._interrupt.trigger()

    def _write_ier(self, value: int) -> None:
        if self._lcr & LCR_DLAB:
            self._divisor = self._divisor & 0xFF | value << 8
            self._publish()
            return
        newly_enabled = value & ~self._ier
        self._ier = value & IER_MASK
        self._publish()
        if newly_enabled & IER_THRI:
            # The transmitter is empty, and enabling the interrupt in that state raises it.
            self._thr_empty_pending = True
        if self._pending() != IIR_NONE:
            self._interrupt.trigger()
