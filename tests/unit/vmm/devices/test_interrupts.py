"""Interrupt lines: edges and batches, who else receives them, who gets which pin."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.devices import CountingLine
from vmm.devices.interrupts import DueInterrupts, InterruptAllocator, InterruptLine
from vmm.errors import DeviceError
from vmm.layout import COM1_GSI, FIRST_DEVICE_GSI, IOAPIC_PIN_COUNT, LAST_DEVICE_GSI


def pending(line: InterruptLine) -> int:
    """Take what the worker's irqfd would find."""
    try:
        return os.eventfd_read(line.eventfd)
    except BlockingIOError:
        return 0


@pytest.fixture
def due():
    return DueInterrupts()


@pytest.fixture
def allocator(due):
    allocator = InterruptAllocator(due)
    yield allocator
    allocator.close()


def test_edges_accumulate_in_the_eventfd_until_the_worker_takes_them():
    line = CountingLine(7)
    for _ in range(3):
        line.trigger()
    assert (line.gsi, line.triggers, line.pending(), line.pending()) == (7, 3, 3, 0)
    line.close()


def test_edges_of_a_batch_become_one_at_its_end(due, allocator):
    line, quiet = allocator.line(), allocator.line()
    due.begin_batch()
    for _ in range(3):
        line.trigger()
    assert pending(line) == 0
    assert line.save().pending
    due.end_batch()
    assert (pending(line), pending(quiet), line.triggers) == (1, 0, 3)
    due.begin_batch()
    due.end_batch()
    assert pending(line) == 0, "nothing was due"
    line.trigger()
    assert pending(line) == 1
    assert not line.save().pending


def test_a_batch_delivers_what_was_raised_in_the_order_in_which_it_was(due, allocator):
    lines = [allocator.line() for _ in range(4)]
    order: list[int] = []
    for line in lines:
        line.add_receiver(lambda gsi=line.gsi: order.append(gsi))
    due.begin_batch()
    for number in (2, 0, 2, 3, 0):
        lines[number].trigger()
    due.end_batch()
    assert order == [lines[number].gsi for number in (2, 0, 3)]


def test_what_is_raised_while_a_batch_is_delivered_is_delivered_at_once(due, allocator):
    first, second = allocator.line(), allocator.line()
    first.add_receiver(second.trigger)
    due.begin_batch()
    first.trigger()
    due.end_batch()
    assert (pending(first), pending(second)) == (1, 1)


def test_a_line_may_be_wired_to_other_interrupt_controllers_as_well(allocator):
    line = allocator.line()
    received: list[str] = []
    line.add_receiver(lambda: received.append("master"))
    line.add_receiver(lambda: received.append("other"))
    line.trigger()
    assert pending(line) == 1
    assert received == ["master", "other"]


def test_a_saturated_interrupt_does_not_block():
    """A taken-over worker holds the eventfd too and can fill its counter."""
    line = CountingLine()
    received: list[int] = []
    line.add_receiver(lambda: received.append(1))
    os.eventfd_write(line.eventfd, (1 << 64) - 2)
    line.trigger()
    assert line.triggers == 1
    assert received == [1]
    line.close()


def test_pins_are_given_out_from_the_lowest_free_one(allocator):
    com1 = allocator.line(COM1_GSI)
    assert com1.gsi == COM1_GSI
    given = [allocator.line() for _ in range(LAST_DEVICE_GSI - FIRST_DEVICE_GSI + 1)]
    assert [line.gsi for line in given] == list(range(FIRST_DEVICE_GSI, LAST_DEVICE_GSI + 1))
    assert list(allocator.lines) == [com1, *given]
    with pytest.raises(DeviceError, match="in use"):
        allocator.line()
    for taken in (COM1_GSI, given[3].gsi, IOAPIC_PIN_COUNT):
        with pytest.raises(DeviceError, match="no free interrupt line"):
            allocator.line(taken)
    allocator.free(given[3])
    assert given[3].gsi not in allocator.connected
    with pytest.raises(DeviceError, match="not given out"):
        allocator.free(given[3])
    again = allocator.line()
    assert again.gsi == given[3].gsi
    with pytest.raises(DeviceError, match="not given out"):
        allocator.free(given[3])  # the pin is another device's now
    assert again.eventfd >= 0


def test_a_line_that_is_freed_in_a_batch_is_not_delivered(due, allocator):
    line = allocator.line()
    received: list[int] = []
    line.add_receiver(lambda: received.append(1))
    due.begin_batch()
    line.trigger()
    allocator.free(line)
    due.end_batch()
    assert received == []


def test_no_descriptor_is_left():
    before = os.listdir("/proc/self/fd")
    allocator = InterruptAllocator(DueInterrupts())
    for _ in range(5):
        allocator.line()
    allocator.free(allocator.lines[2])
    allocator.close()
    assert os.listdir("/proc/self/fd") == before


@given(st.lists(st.one_of(st.integers(0, 5), st.sampled_from(["begin", "end"])), max_size=40))
def test_no_edge_is_lost_and_none_is_invented(steps):
    """Whatever is raised is delivered by the end of its batch, once for all its edges."""
    due = DueInterrupts()
    allocator = InterruptAllocator(due)
    lines = [allocator.line() for _ in range(6)]
    expected = [0] * 6
    held: set[int] | None = None
    for step in [*steps, "end"]:
        if step == "begin":
            due.begin_batch()
            held = held or set()
        elif step == "end":
            due.end_batch()
            for number in held or ():
                expected[number] += 1
            held = None
        else:
            lines[step].trigger()
            if held is None:
                expected[step] += 1
            else:
                held.add(step)
    assert [pending(line) for line in lines] == expected
    allocator.close()
