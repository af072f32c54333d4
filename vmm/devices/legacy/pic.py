"""The pair of 8259A interrupt controllers of a PC. Source: Intel's data sheets, of the 8259A and (ELCR) the 82371AB.

For guests that do not use the IOAPIC. The slave is cascaded into input 2 of the master. Devices give pulses: a request
is latched until it is acknowledged, also for inputs that the guest has set to level-triggered, where a pulse that
nobody waited for would be lost. Before a chip has been initialised (ICW1 to ICW4) it latches nothing and asks for
nothing, so that a guest which never touches it never hears of it. The 8080 mode is not there: ICW4 bit 0 is ignored.
"""

from __future__ import annotations

from base.deferral import Deferral
from base.lean_typing import Callable, NamedTuple
from ipc.schema import U8, Flag, Int, RecordOf, Section
from vmm.devices.bus import Device

#: Offsets of the ports in the device.
SLAVE = 2
ELCR = 4

INPUT_COUNT = 16
CASCADE = 2

ICW1 = 0x10
ICW1_IC4 = 0x01
ICW1_SINGLE = 0x02
ICW4_AUTO_EOI = 0x02
ICW4_SPECIAL_FULLY_NESTED = 0x10
OCW3 = 0x08
OCW3_POLL = 0x04
OCW3_READ_REGISTER = 0x02
OCW3_READ_ISR = 0x01
OCW3_SET_SPECIAL_MASK = 0x40
OCW3_SPECIAL_MASK = 0x20
# OCW2, bits 7 to 5: R, SL, EOI.
OCW2_ROTATE = 0x80
OCW2_SPECIFIC = 0x40
OCW2_EOI = 0x20

#: Inputs that can be level-triggered: not the timer, the keyboard, the cascade, the RTC, the coprocessor.
MASTER_ELCR_MASK = 0xF8
SLAVE_ELCR_MASK = 0xDE
SPURIOUS = 7
POLL_REQUEST = 0x80
_NONE = -1

# What the next write to the data port is.
_OPERATIONAL, _ICW2, _ICW3, _ICW4 = 0, 2, 3, 4


class PicChipState(NamedTuple):
    """One 8259: its registers, how it was initialised, and the initialisation word that it expects next (0: none)."""

    irr: int
    isr: int
    imr: int
    elcr: int
    base: int
    lowest: int
    expects: int
    ready: bool
    needs_icw4: bool
    single: bool
    auto_eoi: bool
    rotates: bool
    special_mask: bool
    special_fully_nested: bool
    reads_isr: bool
    poll: bool


class PicState(NamedTuple):
    """Both 8259s."""

    master: PicChipState
    slave: PicChipState


_BYTE = Int(U8)
_CHIP = RecordOf(
    PicChipState,
    irr=_BYTE,
    isr=_BYTE,
    imr=_BYTE,
    elcr=_BYTE,
    base=_BYTE,
    lowest=Int(7),
    expects=Int(_ICW4),
    ready=Flag(),
    needs_icw4=Flag(),
    single=Flag(),
    auto_eoi=Flag(),
    rotates=Flag(),
    special_mask=Flag(),
    special_fully_nested=Flag(),
    reads_isr=Flag(),
    poll=Flag(),
)


class PicChip:
    """One 8259A without its pins. Inputs are numbered 0 to 7; -1 stands for none."""

    __slots__ = (
        "auto_eoi",
        "base",
        "elcr",
        "expects",
        "imr",
        "irr",
        "is_master",
        "isr",
        "lowest",
        "needs_icw4",
        "poll",
        "ready",
        "reads_isr",
        "rotates",
        "single",
        "special_fully_nested",
        "special_mask",
    )

    def __init__(self, *, is_master: bool) -> None:
        self.is_master = is_master
        self.irr = self.isr = self.imr = 0
        self.elcr = 0
        self.base = 0
        #: The input of lowest priority; the one after it has the highest.
        self.lowest = 7
        self.expects = _OPERATIONAL
        self.ready = False
        self.needs_icw4 = self.single = False
        self.auto_eoi = self.rotates = False
        self.special_mask = self.special_fully_nested = False
        self.reads_isr = self.poll = False

    def _first(self, inputs: int) -> int:
        """Return the input of the highest priority among those whose bits are set."""
        for distance in range(1, 9):
            number = self.lowest + distance & 7
            if inputs >> number & 1:
                return number
        return _NONE

    def _rank(self, number: int) -> int:
        """Return 0 for the highest priority to 7 for the lowest."""
        return number - self.lowest - 1 & 7

    def request(self) -> int:
        """Return the input that the chip asks to serve now."""
        asks = self.irr & ~self.imr
        if not asks or not self.ready:
            return _NONE
        number = self._first(asks)
        in_service = self.isr
        if self.special_mask:
            in_service &= ~self.imr
        if self.special_fully_nested and self.is_master:
            in_service &= ~(1 << CASCADE)  # the slave sorts out its own priorities
        serving = self._first(in_service)
        return number if serving == _NONE or self._rank(number) < self._rank(serving) else _NONE

    def acknowledge(self) -> int:
        """Answer INTA: return the input that is served from now on, or SPURIOUS where none asks any more."""
        number = self.request()
        if number == _NONE:
            return SPURIOUS
        self.irr &= ~(1 << number)
        if not self.auto_eoi:
            self.isr |= 1 << number
        elif self.rotates:
            self.lowest = number
        return number

    def read(self, data: bool) -> int:
        """Read the command port or the data port."""
        if self.poll:
            self.poll = False
            asks = self.request() != _NONE
            return POLL_REQUEST | self.acknowledge() if asks else 0
        if data:
            return self.imr
        return self.isr if self.reads_isr else self.irr

    def write_command(self, value: int) -> None:
        """Write ICW1, OCW2 or OCW3."""
        if value & ICW1:
            self._initialise(value)
        elif value & OCW3:
            if value & OCW3_SET_SPECIAL_MASK:
                self.special_mask = bool(value & OCW3_SPECIAL_MASK)
            if value & OCW3_READ_REGISTER:
                self.reads_isr = bool(value & OCW3_READ_ISR)
            self.poll = bool(value & OCW3_POLL)
        else:
            self._ocw2(value)

    def _initialise(self, value: int) -> None:
        self.irr = self.isr = self.imr = 0
        self.lowest = 7
        self.special_mask = self.reads_isr = self.poll = False
        self.needs_icw4 = bool(value & ICW1_IC4)
        self.single = bool(value & ICW1_SINGLE)
        if not self.needs_icw4:
            self.auto_eoi = self.special_fully_nested = False
        self.ready = False
        self.expects = _ICW2

    def _ocw2(self, value: int) -> None:
        level = value & 7
        rotate, specific = bool(value & OCW2_ROTATE), bool(value & OCW2_SPECIFIC)
        if value & OCW2_EOI:
            ended = level if specific else self._first(self.isr & ~self.imr if self.special_mask else self.isr)
            if ended == _NONE:
                return
            self.isr &= ~(1 << ended)
            if rotate:
                self.lowest = ended
        elif specific:
            if rotate:
                self.lowest = level
        else:
            self.rotates = rotate

    def write_data(self, value: int) -> None:
        """Write OCW1, or the initialisation word that is due."""
        expected = self.expects
        if expected == _OPERATIONAL:
            self.imr = value
            return
        if expected == _ICW2:
            self.base = value & 0xF8
            self.expects = _ICW4 if self.single else _ICW3
        elif expected == _ICW3:
            self.expects = _ICW4  # where the slave is: wired
        else:
            self.auto_eoi = bool(value & ICW4_AUTO_EOI)
            self.special_fully_nested = bool(value & ICW4_SPECIAL_FULLY_NESTED)
            self.expects = _OPERATIONAL
        if self.expects == _ICW4 and not self.needs_icw4:
            self.expects = _OPERATIONAL
        self.ready = self.expects == _OPERATIONAL

    def save(self) -> PicChipState:
        """Return the registers."""
        return PicChipState(*[getattr(self, name) for name in PicChipState._fields])

    def restore(self, state: PicChipState) -> None:
        """Become what was saved."""
        for name, value in zip(PicChipState._fields, state, strict=True):
            setattr(self, name, value)


class Pic(Device):
    """Both chips. The bus reaches the master at offset 0, the slave at 2, the ELCRs at 4.

    ``on_output`` is told when INT, the line to the processor, rises; ``on_mask`` after everything that may have
    changed which inputs are masked or waited for.
    """

    SECTION = Section("pic", 1, RecordOf(PicState, master=_CHIP, slave=_CHIP))
    instance = ""

    def __init__(
        self, on_output: Callable[[], None], on_mask: Callable[[], None], state: PicState | None = None
    ) -> None:
        self.master = PicChip(is_master=True)
        self.slave = PicChip(is_master=False)
        if state is not None:
            self.master.restore(state.master)
            self.slave.restore(state.slave)
        self._on_output = on_output
        self._on_mask = on_mask
        self.output = self.master.request() != _NONE
        if self.output:
            on_output()  # whoever has the line now does not know
        #: Brings edges that are kept back until the end of a batch; called before somebody looks at requests.
        self.settle: Callable[[], None] = lambda: None

    def pulse(self, number: int) -> None:
        """An edge on one of the 16 inputs."""
        chip = self.master if number < 8 else self.slave
        if chip.ready:
            bit = 1 << (number & 7)
            chip.irr |= bit
            if number == CASCADE or not chip.imr & bit:
                self._update()

    def is_masked(self, number: int) -> bool:
        """Tell whether a pulse on this input of the master would lead to nothing."""
        return not self.master.ready or bool(self.master.imr >> number & 1)

    def is_waiting(self, number: int) -> bool:
        """Tell whether an earlier pulse on this input of the master was not acknowledged yet."""
        return bool(self.master.irr >> number & 1)

    def acknowledge(self) -> int:
        """Carry out the INTA cycle: return the vector. Without a request it is that of input 7, as on the chip."""
        master, slave = self.master, self.slave
        number = master.acknowledge()
        if number == CASCADE and not master.single:
            vector = slave.base | slave.acknowledge()
        else:
            vector = master.base | number
        self._update()
        self._on_mask()
        return vector

    def read(self, offset: int, size: int) -> int:
        """Read a register; a poll acknowledges."""
        self.settle()
        if offset >= ELCR:
            return (self.master if offset == ELCR else self.slave).elcr
        chip = self.master if offset < SLAVE else self.slave
        polled = chip.poll
        value = chip.read(bool(offset & 1))
        if polled:
            self._update()
            self._on_mask()
        return value

    def write(self, offset: int, size: int, value: int) -> Deferral | None:
        """Write a register; of a wider access the low byte counts."""
        value &= 0xFF
        if offset >= ELCR:
            if offset == ELCR:
                self.master.elcr = value & MASTER_ELCR_MASK
            else:
                self.slave.elcr = value & SLAVE_ELCR_MASK
            return None
        chip = self.master if offset < SLAVE else self.slave
        if offset & 1:
            chip.write_data(value)
        else:
            chip.write_command(value)
        self._update()
        self._on_mask()
        return None

    def _update(self) -> None:
        """Let the slave's request reach the master, and the master's the processor."""
        master = self.master
        if not master.single:
            if master.ready and self.slave.request() != _NONE:
                master.irr |= 1 << CASCADE
            else:
                master.irr &= ~(1 << CASCADE)
        before = self.output
        self.output = master.request() != _NONE
        if self.output and not before:
            self._on_output()

    def save(self) -> PicState:
        """Return the registers of both chips."""
        return PicState(self.master.save(), self.slave.save())
