"""The buses: who answers which address, what is published, who comes and goes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.deferral import Deferral
from ipc.device_pages import SLOT_COUNT
from tests.harness.devices import Recorder, device_page
from vmm.devices.bus import ALL_ONES, PIO_SPACE, mmio_bus, port_bus
from vmm.errors import DeviceError


@pytest.fixture
def page():
    with device_page() as page:
        yield page


@pytest.mark.parametrize(("address", "length"), [(0x100, 8), (0x107, 1), (0xF9, 8), (0x0, 0x1000), (0x102, 2)])
def test_windows_must_not_overlap(page, address, length):
    bus = mmio_bus(page.page)
    bus.insert(Recorder(), 0x100, 8)
    with pytest.raises(DeviceError, match="overlaps"):
        bus.insert(Recorder(), address, length)
    assert len(bus.windows()) == 1


def test_adjacent_windows_are_allowed_in_any_order(page):
    bus = port_bus(page.page)
    devices = {0x70: Recorder(1), 0x60: Recorder(2), 0x68: Recorder(3)}
    for address, device in devices.items():
        bus.insert(device, address, 8)
    assert [window.address for window in bus.windows()] == [0x60, 0x68, 0x70]
    assert [bus.read(address, 1) for address in (0x60, 0x67, 0x68, 0x6F, 0x70, 0x77)] == [2, 2, 3, 3, 1, 1]


@pytest.mark.parametrize(("address", "length"), [(-1, 4), (0, 0), (8, -8), (PIO_SPACE - 7, 8), (PIO_SPACE, 1)])
def test_windows_stay_in_the_port_space(page, address, length):
    bus = port_bus(page.page)
    with pytest.raises(DeviceError, match="outside"):
        bus.insert(Recorder(), address, length)
    bus.insert(Recorder(), PIO_SPACE - 8, 8)


def test_mmio_windows_stay_in_the_physical_address_space(page):
    bus = mmio_bus(page.page)
    bus.insert(Recorder(), (1 << 52) - 0x1000, 0x1000)
    with pytest.raises(DeviceError, match="outside"):
        bus.insert(Recorder(), 1 << 52, 1)


def test_a_port_window_has_a_slot_per_port_and_an_mmio_window_one(page):
    ports = port_bus(page.page)
    mmio = mmio_bus(page.page)
    first = ports.insert(Recorder(), 0x3F8, 8)
    (second,) = mmio.insert(Recorder(), 0xC000_0000, 0x1000)
    assert [tuple(window) for window in ports.windows()] == [(0x3F8, 8, 0)]
    assert [tuple(window) for window in mmio.windows()] == [(0xC000_0000, 0x1000, 8)]
    first[5].publish(0x1_2345_6789, read_local=True)
    second.publish(write_posted=True)
    assert (page.value(5), page.read_local(5), page.write_posted(5)) == (0x2345_6789, True, False)
    assert (page.value(8), page.read_local(8), page.write_posted(8)) == (0, False, True)
    first[5].publish()
    assert page.flags(5) == 0
    assert all(page.slots[slot] == 0 for slot in range(5))


def test_a_full_device_page_is_a_device_error_and_changes_nothing(page):
    bus = port_bus(page.page)
    bus.insert(Recorder(), 0, SLOT_COUNT - 3)
    with pytest.raises(DeviceError, match="no room"):
        bus.insert(Recorder(), 0x1000, 4)
    assert len(bus.windows()) == 1
    assert bus.read(0x1000, 1) == 0


@given(address=st.integers(0, (1 << 64) - 1), size=st.sampled_from([1, 2, 4, 8]), value=st.integers(0, (1 << 64) - 1))
def test_unknown_addresses_read_zeros_and_drop_writes(address, size, value):
    with device_page() as page:
        device = Recorder()
        for bus in (port_bus(page.page), mmio_bus(page.page)):
            bus.insert(device, 0x8000, 0x10)
            if not 0x8000 - size < address < 0x8010:
                assert bus.read(address, size) == 0
                assert bus.write(address, size, value & ALL_ONES[size]) is None
        assert device.accesses == []


def test_an_mmio_access_that_leaves_its_window_reaches_nobody(page):
    bus = mmio_bus(page.page)
    low, high = Recorder(0x11), Recorder(0x22)
    bus.insert(low, 0x1000, 0x10)
    bus.insert(high, 0x1010, 0x10)
    assert bus.read(0x100E, 4) == 0
    assert bus.write(0x100E, 4, 1) is None
    assert bus.read(0xFFE, 4) == 0
    assert low.accesses == high.accesses == []


def test_a_port_access_belongs_to_the_device_of_its_first_port(page):
    """As for the worker, which finds the slot of the first port and posts or answers by it."""
    bus = port_bus(page.page)
    low, high = Recorder(0x1234_5678), Recorder()
    bus.insert(low, 0x60, 5)
    bus.insert(high, 0x65, 3)
    assert bus.read(0x64, 4) == 0x1234_5678
    bus.write(0x64, 2, 0xFFFE)
    assert low.accesses == [("read", 4, 4, 0), ("write", 4, 2, 0xFFFE)]
    assert high.accesses == []
    assert bus.read(0x5F, 4) == 0


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_answers_are_cut_to_the_size_of_the_access(page, size):
    for bus in (port_bus(page.page), mmio_bus(page.page)):
        bus.insert(Recorder((1 << 70) - 2), 0, 0x10)
        assert bus.read(0, size) == ALL_ONES[size] - 1


def test_registers_of_one_device_may_have_windows_of_their_own(page):
    for bus in (port_bus(page.page), mmio_bus(page.page)):
        device = Recorder()
        bus.insert(device, 0x100, 0x10)
        bus.insert(device, 0x110, 0x10, 0x10)
        bus.read(0x10F, 1)
        bus.write(0x110, 1, 2)
        assert device.accesses == [("read", 0x0F, 1, 0), ("write", 0x10, 1, 2)]


def test_a_deferral_is_handed_through(page):
    bus = port_bus(page.page)
    device = Recorder()
    device.deferral = Deferral()
    bus.insert(device, 0, 4)
    assert bus.write(0, 1, 0) is device.deferral
    called = []
    device.deferral.then(lambda: called.append(1))
    device.deferral.complete()
    assert called == [1]
    assert device.deferral.done


def test_a_removed_device_is_not_called_any_more(page):
    for bus, base in ((port_bus(page.page), 0x300), (mmio_bus(page.page), 0xC000_0000)):
        gone, stays = Recorder(1), Recorder(2)
        slots = bus.insert(gone, base, 4)
        bus.insert(stays, base + 4, 4)
        slots += bus.insert(gone, base + 8, 4, 4)
        for slot in slots:
            slot.publish(0x55, read_local=True)
        before = [window.slot for window in bus.windows()]
        bus.remove(gone)
        assert [window.address for window in bus.windows()] == [base + 4]
        assert bus.read(base, 1) == 0
        assert bus.write(base, 1, 1) is None
        assert bus.read(base + 4, 1) == 2
        assert gone.accesses == []
        # A worker that still knows the windows asks for every access.
        assert page.flags(before[0]) == page.flags(before[2]) == 0
        slots[0].publish(1, read_local=True)
        assert page.flags(before[0]) == 0, "a device that is gone publishes nothing"
        with pytest.raises(DeviceError, match="not attached"):
            bus.remove(gone)


def test_slots_of_a_removed_device_are_used_again_once_the_workers_know(page):
    bus = port_bus(page.page)
    for _ in range(SLOT_COUNT):  # a guest that moves a window again and again
        device = Recorder()
        bus.insert(device, 0x100, 8)
        bus.remove(device)
        bus.free_removed()
    first, second = Recorder(), Recorder()
    bus.insert(first, 0x100, SLOT_COUNT - 8)
    bus.remove(first)
    with pytest.raises(DeviceError, match="no room"):
        bus.insert(second, 0x100, SLOT_COUNT - 8)
    bus.free_removed()
    (slot, *_) = bus.insert(second, 0x100, SLOT_COUNT - 8)
    slot.publish(7, read_local=True)
    assert page.value(bus.windows()[0].slot) == 7


def test_a_window_may_move(page):
    bus = mmio_bus(page.page)
    device = Recorder(5)
    bus.insert(device, 0x1000, 0x1000)
    bus.remove(device)
    bus.insert(device, 0x8000, 0x1000)
    assert bus.read(0x1000, 4) == 0
    assert bus.read(0x8004, 4) == 5
    assert device.accesses == [("read", 4, 4, 0)]
