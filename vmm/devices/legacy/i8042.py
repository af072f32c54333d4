"""The i8042 keyboard controller: guest reset, and Ctrl-Alt-Del typed by the host. Source: IBM PS/2 technical reference.

A keyboard sits behind it that acknowledges commands and sends scan codes of set 2; there is no mouse, and the port for
one says so at once: a driver that got no answer would wait for half a second, several times.
"""

from __future__ import annotations

from base.deferral import Deferral
from base.lean_typing import Callable, NamedTuple
from ipc.schema import U8, Bytes, Flag, Int, RecordOf, Section
from vmm.devices.bus import Device, PublishedSlot
from vmm.devices.interrupts import InterruptLine
from vmm.errors import DeviceError

PORT_COUNT = 5
DATA = 0
STATUS_COMMAND = 4

STATUS_OUTPUT_FULL = 0x01
STATUS_SYSTEM = 0x04
STATUS_COMMAND_WRITTEN = 0x08
STATUS_KEYBOARD_ENABLED = 0x10

COMMAND_READ_CTR = 0x20
COMMAND_WRITE_CTR = 0x60
COMMAND_TEST_AUX = 0xA9
COMMAND_SELF_TEST = 0xAA
COMMAND_TEST_KEYBOARD = 0xAB
COMMAND_DISABLE_KEYBOARD = 0xAD
COMMAND_ENABLE_KEYBOARD = 0xAE
COMMAND_READ_OUTPUT_PORT = 0xD0
COMMAND_WRITE_OUTPUT_PORT = 0xD1
COMMAND_LOOP_KEYBOARD = 0xD2
COMMAND_LOOP_AUX = 0xD3
COMMAND_WRITE_AUX = 0xD4
COMMAND_RESET_CPU = 0xFE
SELF_TEST_PASSED = 0x55
AUX_CLOCK_STUCK = 0x01
#: Commands that are followed by an argument byte at the data port.
COMMANDS_WITH_ARGUMENT = frozenset(
    (COMMAND_WRITE_CTR, COMMAND_WRITE_OUTPUT_PORT, COMMAND_LOOP_KEYBOARD, COMMAND_LOOP_AUX, COMMAND_WRITE_AUX)
)

CTR_KEYBOARD_INTERRUPT = 0x01
CTR_SYSTEM = 0x04
CTR_KEYBOARD_DISABLED = 0x10
CTR_AUX_DISABLED = 0x20  # always set: there is no such port

KEYBOARD_RESET = 0xFF
KEYBOARD_IDENTIFY = 0xF2
KEYBOARD_ACKNOWLEDGE = 0xFA
KEYBOARD_SELF_TEST_PASSED = 0xAA
#: Keyboard commands that are followed by an argument byte.
KEYBOARD_WITH_ARGUMENT = frozenset((0xED, 0xF0, 0xF3))

# Scan code set 2.
KEY_CTRL = (0x14,)
KEY_ALT = (0x11,)
KEY_DELETE = (0xE0, 0x71)
BUFFER_SIZE = 16


class I8042State(NamedTuple):
    """``answer``: one of the controller itself, or -1; ``argument_of``: a command that waits for its argument, or 0."""

    buffer: bytes
    answer: int
    control: int
    output_port: int
    argument_of: int
    keyboard_argument: bool


_BYTE = Int(U8)
_AFTER_RESET = I8042State(
    b"",
    -1,
    CTR_SYSTEM | CTR_KEYBOARD_INTERRUPT | CTR_AUX_DISABLED,
    0x03,  # A20 gate open, CPU not in reset
    0,
    False,
)


class I8042(Device):
    """Two registers: data at offset 0, status and command at offset 4; the ports between are empty."""

    SECTION = Section(
        "i8042",
        1,
        RecordOf(
            I8042State,
            buffer=Bytes(BUFFER_SIZE),
            answer=Int(U8, -1),
            control=_BYTE,
            output_port=_BYTE,
            argument_of=_BYTE,
            keyboard_argument=Flag(),
        ),
    )
    instance = ""

    def __init__(self, interrupt: InterruptLine, reset: Callable[[], None], state: I8042State = _AFTER_RESET) -> None:
        self._interrupt = interrupt
        self._reset = reset
        #: What the keyboard has sent and the guest has not read.
        self._buffer = bytearray(state.buffer)
        #: An answer of the controller itself, read before the keyboard's bytes; -1 if there is none.
        self._answer = state.answer
        self._control = state.control
        self._output_port = state.output_port
        self._argument_of = state.argument_of
        self._keyboard_argument = state.keyboard_argument
        self._status_slot: PublishedSlot | None = None
        self.error_count = 0
        self.read_count = 0
        self.write_count = 0
        self.reset_count = 0

    def attach(self, slots: list[PublishedSlot]) -> None:
        """Take the slots of the ports; the status register is answered by the worker."""
        self._status_slot = slots[STATUS_COMMAND]
        self._publish()

    def save(self) -> I8042State:
        """Return the registers and what the guest has not read."""
        return I8042State(
            bytes(self._buffer),
            self._answer,
            self._control,
            self._output_port,
            self._argument_of,
            self._keyboard_argument,
        )

    def _has_output(self) -> bool:
        return self._answer >= 0 or bool(self._buffer)

    def _status(self) -> int:
        status = STATUS_SYSTEM | STATUS_KEYBOARD_ENABLED
        if self._has_output():
            status |= STATUS_OUTPUT_FULL
        if self._argument_of:
            status |= STATUS_COMMAND_WRITTEN
        return status

    def _publish(self) -> None:
        if self._status_slot is not None:
            self._status_slot.publish(self._status(), read_local=True)

    def _push(self, *codes: int) -> None:
        if len(self._buffer) + len(codes) > BUFFER_SIZE:
            self.error_count += 1
            return
        self._buffer += bytes(codes)
        self._announce()

    def _announce(self) -> None:
        """Raise the interrupt if data waits. The state comes first: the guest's handler looks at the status at once."""
        self._publish()
        if self._has_output() and self._control & CTR_KEYBOARD_INTERRUPT:
            self._interrupt.trigger()

    def send_ctrl_alt_del(self) -> None:
        """Type Ctrl-Alt-Del. Raises DeviceError if the guest has not read what was typed before."""
        codes = KEY_CTRL + KEY_ALT + KEY_DELETE
        if len(self._buffer) + len(codes) > BUFFER_SIZE:
            self.error_count += 1
            raise DeviceError("i8042 internal buffer full.")
        self._push(*codes)

    def read(self, offset: int, size: int) -> int:
        """Read data (takes a byte from the buffer) or status."""
        self.read_count += 1
        if offset == STATUS_COMMAND:
            return self._status()
        if offset != DATA or not self._has_output():
            return 0
        if self._answer >= 0:
            value, self._answer = self._answer, -1
        else:
            value = self._buffer.pop(0)
        self._announce()  # edge-triggered: the next byte needs an edge of its own
        return value

    def write(self, offset: int, size: int, value: int) -> Deferral | None:
        """Write data (an argument, or a command to the keyboard) or a controller command."""
        value &= 0xFF
        self.write_count += 1
        if offset == STATUS_COMMAND:
            self._command(value)
        elif offset == DATA:
            self._data(value)
        self._publish()
        return None

    def _command(self, command: int) -> None:
        self._argument_of = 0
        if command == COMMAND_RESET_CPU:
            self.reset_count += 1
            self._reset()
        elif command == COMMAND_READ_CTR:
            self._reply(self._control)
        elif command in COMMANDS_WITH_ARGUMENT:
            self._argument_of = command
        elif command == COMMAND_READ_OUTPUT_PORT:
            self._reply(self._output_port)
        elif command == COMMAND_SELF_TEST:
            self._reply(SELF_TEST_PASSED)
        elif command == COMMAND_TEST_KEYBOARD:
            self._reply(0)
        elif command == COMMAND_TEST_AUX:
            self._reply(AUX_CLOCK_STUCK)
        elif command == COMMAND_DISABLE_KEYBOARD:
            self._control |= CTR_KEYBOARD_DISABLED
        elif command == COMMAND_ENABLE_KEYBOARD:
            self._control &= ~CTR_KEYBOARD_DISABLED

    def _reply(self, value: int) -> None:
        """Answer as the controller; an older answer that nobody read is gone."""
        self._answer = value
        self._announce()

    def _data(self, value: int) -> None:
        argument_of, self._argument_of = self._argument_of, 0
        if argument_of == COMMAND_WRITE_CTR:
            newly_enabled = value & ~self._control & CTR_KEYBOARD_INTERRUPT
            self._control = value | CTR_AUX_DISABLED
            if newly_enabled:
                self._announce()
        elif argument_of in (COMMAND_LOOP_KEYBOARD, COMMAND_LOOP_AUX):
            self._reply(value)  # for AUX without the status bit of its data: that says that the port is missing
        elif argument_of == COMMAND_WRITE_AUX:
            pass  # nobody there
        elif argument_of == COMMAND_WRITE_OUTPUT_PORT:
            self._output_port = value
            if not value & 1:
                self.reset_count += 1
                self._reset()
        elif self._keyboard_argument:
            self._keyboard_argument = False
            self._push(KEYBOARD_ACKNOWLEDGE)
        elif value == KEYBOARD_RESET:
            self._push(KEYBOARD_ACKNOWLEDGE, KEYBOARD_SELF_TEST_PASSED)
        elif value == KEYBOARD_IDENTIFY:
            self._push(KEYBOARD_ACKNOWLEDGE, 0xAB, 0x83)
        else:
            self._keyboard_argument = value in KEYBOARD_WITH_ARGUMENT
            self._push(KEYBOARD_ACKNOWLEDGE)
