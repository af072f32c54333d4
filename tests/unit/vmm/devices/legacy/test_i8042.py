"""The keyboard controller as Linux's i8042 and atkbd drivers use it, and as a hostile guest does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.devices import CountingLine, Page, worker_read
from vmm.devices.bus import port_bus
from vmm.devices.legacy.i8042 import BUFFER_SIZE, I8042, PORT_COUNT
from vmm.errors import DeviceError

DATA = 0x60
STATUS = 0x64
OUTPUT_FULL = 0x01
INPUT_FULL = 0x02
AUX_DATA = 0x20

CTR_KEYBOARD_INTERRUPT = 0x01
CTR_KEYBOARD_DISABLED = 0x10
CTR_AUX_DISABLED = 0x20
CTR_TRANSLATE = 0x40

# Commands as Linux writes them: how many parameters and results they have, and the byte.
READ_CTR = 0x0120
WRITE_CTR = 0x1060
SELF_TEST = 0x01AA
KEYBOARD_TEST = 0x01AB
KEYBOARD_LOOP = 0x11D2
AUX_LOOP = 0x11D3
AUX_TEST = 0x01A9
AUX_DISABLE = 0x00A7
AUX_ENABLE = 0x00A8

CTRL_ALT_DEL = [0x14, 0x11, 0xE0, 0x71]


class Machine:
    """The controller on a bus with a device page, and the accesses of Linux's driver."""

    def __init__(self) -> None:
        self.page = Page()
        self.bus = port_bus(self.page.page)
        self.line = CountingLine(1)
        self.resets = 0
        self.device = I8042(self.line, self._reset)
        self.device.attach(self.bus.insert(self.device, DATA, PORT_COUNT))

    def _reset(self) -> None:
        self.resets += 1

    def inb(self, port: int) -> int:
        return worker_read(self.page, self.bus, port, 1)

    def outb(self, port: int, value: int) -> None:
        assert not self.page.write_posted(port - DATA), "writes have answers: they are never posted"
        assert self.bus.write(port, 1, value) is None

    def command(self, command: int, parameter: int = 0) -> int | None:
        """Carry out a command as i8042_command does. None: the driver gives up after waiting half a second."""
        self.outb(STATUS, command & 0xFF)
        if command >> 12:
            assert not self.inb(STATUS) & INPUT_FULL
            self.outb(DATA, parameter)
        result = parameter
        if command >> 8 & 0xF:
            if not self.inb(STATUS) & OUTPUT_FULL:
                return None
            if command == AUX_LOOP and not self.inb(STATUS) & AUX_DATA:
                return -1
            result = self.inb(DATA)
        return result

    def flush(self) -> list[int]:
        flushed = []
        while self.inb(STATUS) & OUTPUT_FULL:
            flushed.append(self.inb(DATA))
            assert len(flushed) <= 17, "Linux gives up here: no controller found"
        return flushed

    def interrupts(self) -> list[int]:
        """Serve interrupts as i8042_interrupt does: one byte for each edge."""
        got = []
        while self.line.pending():
            if self.inb(STATUS) & OUTPUT_FULL:
                got.append(self.inb(DATA))
        return got

    def close(self) -> None:
        self.line.close()
        self.page.close()


@pytest.fixture
def machine():
    machine = Machine()
    yield machine
    machine.close()


def linux_probe(machine: Machine) -> None:
    """Find the controller and set the keyboard port up: i8042_controller_check, _selftest, _init, _setup_kbd."""
    machine.flush()
    assert machine.command(SELF_TEST) == 0x55
    first, second = machine.command(READ_CTR), machine.command(READ_CTR)
    assert first is not None
    assert first == second
    assert not first & CTR_TRANSLATE, "scan codes are of set 2: nothing translates them"
    assert machine.inb(STATUS) & 0x10, "Linux warns of a keylock otherwise"
    control = first | CTR_KEYBOARD_DISABLED
    control &= ~CTR_KEYBOARD_INTERRUPT
    machine.command(WRITE_CTR, control)
    machine.flush()
    assert linux_check_aux(machine) is False
    control &= ~CTR_KEYBOARD_DISABLED
    control |= CTR_KEYBOARD_INTERRUPT
    machine.line.pending()
    machine.command(WRITE_CTR, control)


def linux_check_aux(machine: Machine) -> bool:
    """Look for a mouse port without waiting for an answer that does not come."""
    machine.flush()
    looped = machine.command(AUX_LOOP, 0x5A)
    assert looped is not None, "half a second lost"
    if looped == 0x5A:
        return True
    tested = machine.command(AUX_TEST)
    assert tested is not None, "half a second lost"
    return tested in (0, 0xFA, 0xFF)


def linux_keyboard(machine: Machine, *data: int) -> list[int]:
    """Send bytes to the keyboard, serving interrupts after each; returns what came."""
    got = []
    for byte in data:
        machine.outb(DATA, byte)
        got += machine.interrupts()
    return got


def test_linux_finds_the_controller_a_keyboard_and_no_mouse(machine):
    linux_probe(machine)
    assert machine.interrupts() == []
    assert linux_keyboard(machine, 0xF2) == [0xFA, 0xAB, 0x83]
    assert linux_keyboard(machine, 0xF5) == [0xFA]
    assert linux_keyboard(machine, 0xED, 0x00) == [0xFA, 0xFA]
    assert linux_keyboard(machine, 0xF3, 0x00) == [0xFA, 0xFA]
    assert linux_keyboard(machine, 0xF4) == [0xFA]
    assert linux_keyboard(machine, 0xFF) == [0xFA, 0xAA]
    assert machine.device.error_count == 0


def test_an_argument_of_the_keyboard_is_no_command(machine):
    linux_probe(machine)
    assert linux_keyboard(machine, 0xF3, 0xFF) == [0xFA, 0xFA]


def test_the_mouse_port_stays_disabled(machine):
    machine.command(AUX_ENABLE)
    control = machine.command(READ_CTR)
    assert control is not None and control & CTR_AUX_DISABLED
    machine.command(WRITE_CTR, control & ~CTR_AUX_DISABLED)
    assert (machine.command(READ_CTR) or 0) & CTR_AUX_DISABLED
    machine.outb(STATUS, 0xD4)
    machine.outb(DATA, 0xFF)
    assert machine.flush() == []


@pytest.mark.parametrize(("command", "parameter", "answer"), [(KEYBOARD_TEST, 0, 0), (KEYBOARD_LOOP, 0x42, 0x42)])
def test_other_commands(machine, command, parameter, answer):
    assert machine.command(command, parameter) == answer


def test_ctrl_alt_del_by_interrupts(machine):
    linux_probe(machine)
    machine.device.send_ctrl_alt_del()
    assert machine.interrupts() == CTRL_ALT_DEL
    assert machine.line.pending() == 0


def test_an_edge_comes_after_the_state_that_it_announces(machine):
    """The guest's handler may run on another CPU at once; Linux drops an interrupt without data for good."""
    seen = []
    machine.line.on_edge = lambda: seen.append(machine.inb(STATUS) & OUTPUT_FULL)
    machine.device.send_ctrl_alt_del()
    machine.outb(STATUS, 0x20)
    machine.inb(DATA)
    assert seen == [1, 1, 1]


def test_what_was_typed_while_interrupts_were_disabled_is_announced_later(machine):
    control = machine.command(READ_CTR)
    assert control is not None
    machine.command(WRITE_CTR, control & ~CTR_KEYBOARD_INTERRUPT)
    machine.line.pending()
    machine.device.send_ctrl_alt_del()
    assert machine.line.pending() == 0
    machine.command(WRITE_CTR, control)
    assert machine.interrupts() == CTRL_ALT_DEL


def test_a_controller_command_does_not_lose_keys(machine):
    machine.device.send_ctrl_alt_del()
    assert machine.command(SELF_TEST) == 0x55
    assert machine.flush() == CTRL_ALT_DEL


def test_the_buffer_is_bounded(machine):
    for _ in range(BUFFER_SIZE // 4):
        machine.device.send_ctrl_alt_del()
    with pytest.raises(DeviceError, match="buffer full"):
        machine.device.send_ctrl_alt_del()
    assert machine.device.error_count == 1
    for _ in range(1000):
        machine.outb(DATA, 0xF2)
        machine.outb(STATUS, 0x20)
    assert len(machine.flush()) == BUFFER_SIZE + 1
    machine.device.send_ctrl_alt_del()
    assert machine.flush() == CTRL_ALT_DEL


def test_reset_by_command(machine):
    machine.outb(STATUS, 0xFE)
    assert (machine.resets, machine.device.reset_count) == (1, 1)


def test_reset_by_output_port(machine):
    assert machine.command(0x01D0) == 0x03
    machine.command(0x10D1, 0x03)
    assert machine.resets == 0
    machine.command(0x10D1, 0x02)
    assert (machine.resets, machine.device.reset_count) == (1, 1)


def test_nothing_else_resets(machine):
    for value in range(256):
        if value not in (0xFE, 0xD1):
            machine.outb(STATUS, value)
            machine.outb(DATA, 0xFE)
    for value in range(256):
        machine.outb(DATA, value)
    assert machine.resets == 0


def test_the_ports_between_are_empty(machine):
    for port in (0x61, 0x62, 0x63):
        assert machine.inb(port) == 0
        machine.outb(port, 0xFE)
    assert machine.resets == 0


_ACCESSES = st.one_of(
    st.tuples(st.just("in"), st.sampled_from(range(PORT_COUNT)), st.sampled_from([1, 2, 4])),
    st.tuples(st.just("out"), st.sampled_from([0, 4, 2]), st.integers(0, 255)),
    st.tuples(st.just("type"), st.just(0), st.just(0)),
)


@given(st.lists(_ACCESSES, max_size=80))
@settings(max_examples=300)
def test_the_published_status_is_what_the_device_would_answer(accesses):
    """After any accesses; and whenever data becomes available with interrupts enabled there is an edge."""
    machine = Machine()
    full_and_enabled = False
    for kind, where, what in accesses:
        if kind == "in":
            value = worker_read(machine.page, machine.bus, DATA + where, what)
            assert where != 4 or value == machine.device.read(4, what)
        elif kind == "out":
            machine.outb(DATA + where, what)
        else:
            try:
                machine.device.send_ctrl_alt_del()
            except DeviceError:
                assert machine.inb(STATUS) & OUTPUT_FULL
        assert machine.page.read_local(4)
        assert machine.page.value(4) == machine.device.read(4, 1)
        assert not any(machine.page.flags(slot) for slot in range(4))
        now = bool(machine.inb(STATUS) & OUTPUT_FULL and machine.device._control & CTR_KEYBOARD_INTERRUPT)
        if now and not full_and_enabled:
            assert machine.line.edges(), f"no edge after {kind} {where} {what}"
        machine.line.edges()
        full_and_enabled = now
    machine.close()
