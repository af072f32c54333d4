"""INTR from the 8259s to the worker of vCPU 0: told once, answered truly; what is wired to them, when a timer runs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.event_manager import EventManager
from ipc.exit_ring import ACKNOWLEDGED, ACKNOWLEDGED_MORE
from tests.harness.devices import routes_at_once
from vmm.devices.legacy.external_interrupt import ExternalInterrupt
from vmm.devices.legacy.pic import Pic
from vmm.devices.manager import DeviceManager
from vmm.layout import IOAPIC_ADDRESS

PIC_WORDS = ((0x20, 0x11), (0x21, 0x20), (0x21, 0x04), (0x21, 0x01), (0xA0, 0x11), (0xA1, 0x28), (0xA1, 2), (0xA1, 1))
PIT_WORDS = ((0x43, 0x34), (0x40, 0x10), (0x40, 0x00))  # 16 ticks: as often as is allowed
EOI = (0x20, 0x20)


def told(line: ExternalInterrupt) -> int:
    """What the worker finds in the eventfd."""
    try:
        return os.eventfd_read(line.eventfd)
    except BlockingIOError:
        return 0


@pytest.fixture
def machine() -> Iterator[DeviceManager]:
    devices = DeviceManager(transmit=lambda _: None, reset=lambda: None, set_routes=routes_at_once, log=print)
    try:
        yield devices
    finally:
        devices.close()


def write(devices: DeviceManager, *accesses: tuple[int, int]) -> None:
    for port, value in accesses:
        assert devices.ports.write(port, 1, value) is None


def ioapic(devices: DeviceManager, pin: int, low: int) -> None:
    devices.mmio.write(IOAPIC_ADDRESS, 4, 0x10 + 2 * pin)
    devices.mmio.write(IOAPIC_ADDRESS + 0x10, 4, low)


# ---------------------------------------------------------------- the line


def test_the_worker_is_told_once_until_it_has_asked(machine):
    line = machine.external_interrupt
    write(machine, *PIC_WORDS)
    machine.pic.pulse(4)
    assert told(line) == 1
    write(machine, (0x21, 0x10), (0x21, 0x00), (0x21, 0x10))
    machine.pic.pulse(1)
    assert told(line) == 0
    assert line.acknowledge() == ACKNOWLEDGED | 0x21
    write(machine, (0x21, 0x00))
    assert told(line) == 0  # still in service
    write(machine, EOI)
    assert told(line) == 1
    assert line.acknowledge() == ACKNOWLEDGED | 0x24


def test_an_answer_says_whether_the_line_stays_high(machine):
    """With automatic end of interrupt the next one follows at once; nobody is told of what the answer says."""
    line = machine.external_interrupt
    write(machine, *PIC_WORDS[:3], (0x21, 0x03))
    machine.pic.pulse(4)
    machine.pic.pulse(1)
    assert told(line) == 1
    assert line.acknowledge() == ACKNOWLEDGED | ACKNOWLEDGED_MORE | 0x21
    assert line.acknowledge() == ACKNOWLEDGED | 0x24
    assert (line.acknowledge(), told(line)) == (0, 0)


def test_who_asks_in_vain_is_told_the_next_time(machine):
    line = machine.external_interrupt
    write(machine, *PIC_WORDS)
    machine.pic.pulse(4)
    assert told(line) == 1
    write(machine, (0x21, 0x10))
    assert line.acknowledge() == 0
    assert machine.pic.master.isr == 0
    write(machine, (0x21, 0x00))
    assert told(line) == 1


def test_a_worker_that_fills_the_counter_stops_nobody(machine):
    write(machine, *PIC_WORDS)
    os.eventfd_write(machine.external_interrupt.eventfd, (1 << 64) - 2)
    machine.pic.pulse(4)
    assert machine.external_interrupt.acknowledge() == ACKNOWLEDGED | 0x24


@given(st.lists(st.one_of(st.integers(0, 15).map(lambda each: each or 1), st.just("ask"), st.just("end")), max_size=40))
def test_no_request_is_left_that_the_worker_does_not_know_of(steps):
    """After any order of pulses, INTA cycles (asked for or not) and ends: what waits was told, or is in the answer."""
    line = ExternalInterrupt()
    pic = Pic(line.raised, lambda: None)
    line.connect(pic)
    for offset, base, wiring in ((0, 0x20, 4), (2, 0x28, 2)):
        pic.write(offset, 1, 0x11)
        for value in (base, wiring, 1):
            pic.write(offset + 1, 1, value)
    knows = False
    for step in steps:
        if step == "ask":
            told(line)
            answer = line.acknowledge()
            knows = bool(answer & ACKNOWLEDGED_MORE)
            assert bool(answer) or not knows
        elif step == "end":
            pic.write(2, 1, 0x20)
            pic.write(0, 1, 0x20)
        else:
            pic.pulse(step)
        knows = bool(told(line)) or knows
        assert knows or not pic.output
    line.close()


# ---------------------------------------------------------------- what is wired


def test_devices_raise_both_kinds_of_interrupt_controllers(machine):
    write(machine, *PIC_WORDS)
    machine.i8042.send_ctrl_alt_del()
    assert machine.external_interrupt.acknowledge() == ACKNOWLEDGED | 0x21
    write(machine, EOI, (0x3F9, 2))
    assert machine.external_interrupt.acknowledge() == ACKNOWLEDGED | 0x24
    assert [line.triggers for line in machine.interrupts] == [0, 1, 1]


def test_lines_of_devices_are_wired_as_they_are_given_out(machine):
    """Those from 16 on are pins of the IOAPIC alone."""
    write(machine, *PIC_WORDS)
    lines = {line.gsi: line for line in (machine.allocator.line() for _ in range(19))}
    assert set(lines) == set(range(5, 24))
    for line in lines.values():
        line.trigger()
    assert (machine.pic.master.irr, machine.pic.slave.irr) == (0xE4, 0xFF)


def test_edges_of_a_batch_are_one_for_the_8259_too(machine):
    write(machine, *PIC_WORDS[:3], (0x21, 0x03))
    machine.begin_batch()
    write(machine, (0x3F9, 2), (0x3F8, 65), (0x3F8, 66))
    assert not machine.pic.output
    machine.end_batch()
    assert machine.external_interrupt.acknowledge() == ACKNOWLEDGED | 0x24


def test_edges_of_a_batch_are_there_when_the_guest_looks(machine):
    """A device that raised its line before the guest reads requests, or is interrupted, is among them."""
    write(machine, *PIC_WORDS)
    machine.begin_batch()
    machine.pic.pulse(6)
    write(machine, (0x3F9, 2))
    assert machine.ports.read(0x20, 1) == 0x50
    write(machine, (0x3F9, 0))
    machine.i8042.send_ctrl_alt_del()
    assert machine.external_interrupt.acknowledge() == ACKNOWLEDGED | 0x21
    write(machine, EOI)
    assert machine.external_interrupt.acknowledge() == ACKNOWLEDGED | 0x24
    machine.end_batch()


def test_a_guest_that_never_initialised_them_hears_nothing(machine):
    assert not any(line._receivers for line in machine.interrupts)  # an edge costs what it did without the chips
    machine.i8042.send_ctrl_alt_del()
    write(machine, (0x3F9, 2), *PIT_WORDS)
    assert (told(machine.external_interrupt), machine.pic.master.irr) == (0, 0)


# ---------------------------------------------------------------- the timer


def test_no_timer_runs_while_nobody_listens(machine):
    """Neither before the chips are set up, nor masked everywhere, nor while a tick waits for its acknowledgement."""
    timer = machine.timer
    write(machine, *PIT_WORDS)
    assert timer.deadline_ns is None
    write(machine, *PIC_WORDS[:4], (0x21, 0xFF))
    assert timer.deadline_ns is None
    ioapic(machine, 0, 0x30)
    assert timer.deadline_ns is not None
    ioapic(machine, 0, 0x1_0030)
    assert timer.deadline_ns is None
    write(machine, (0x21, 0xFE))
    assert timer.deadline_ns is not None
    machine.pic.pulse(0)
    machine.pit.update()
    assert timer.deadline_ns is None
    machine.external_interrupt.acknowledge()
    assert timer.deadline_ns is not None
    write(machine, (0x43, 0x30))
    assert timer.deadline_ns is None


def run(events: EventManager, devices: DeviceManager, times: int) -> None:
    """Run the loop until the timer has fired so often."""
    fired = devices.timer.fired
    count = 0

    def counted() -> None:
        nonlocal count
        count += 1
        fired()

    devices.timer.fired = counted
    assert events.run_until(lambda: count >= times, None)
    devices.timer.fired = fired


def test_ticks_reach_the_8259_and_the_ioapic(machine):
    events = EventManager()
    events.add_subscriber(machine.timer)
    write(machine, *PIC_WORDS, (0x21, 0xFE), *PIT_WORDS)
    for _ in range(3):
        run(events, machine, 1)
        assert machine.external_interrupt.acknowledge() == ACKNOWLEDGED | 0x20
        assert machine.interrupts[0].triggers == 0  # masked there
        write(machine, EOI)
    ioapic(machine, 0, 0x30)
    write(machine, (0x21, 0xFF))
    run(events, machine, 3)
    assert machine.interrupts[0].triggers >= 2
    assert not machine.pic.output
    events.close()
