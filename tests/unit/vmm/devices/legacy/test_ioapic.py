"""The I/O APIC: register file, translation to MSI, when routes are set, and who waits for that."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.deferral import Deferral
from ipc.messages.records import Route
from tests.harness.devices import device_page
from vmm.devices.bus import mmio_bus
from vmm.devices.legacy.ioapic import IOAPIC_LENGTH, IoApic, msi_of_entry

BASE = 0xFEC0_0000
SELECT = BASE
WINDOW = BASE + 0x10
MASKED = 1 << 16
LEVEL = 1 << 15
LOGICAL = 1 << 11
READ_ONLY = 1 << 12 | 1 << 14


class Workers:
    """Takes routes the way a worker does: answers at once, or when the test says so."""

    def __init__(self) -> None:
        self.at_once = True
        self.set: list[tuple[Route, ...]] = []
        self.waiting: list = []

    def set_routes(self, routes) -> Deferral:
        self.set.append(tuple(routes))
        deferral = Deferral()
        if self.at_once:
            deferral.complete()
        else:
            self.waiting.append(deferral.complete)
        return deferral


class Machine:
    def __init__(self, page, connected=(1, 4)) -> None:
        self.workers = Workers()
        self.log: list[str] = []
        self.device = IoApic(connected, self.workers.set_routes, self.log.append)
        self.bus = mmio_bus(page.page)
        (self.slot,) = self.bus.insert(self.device, BASE, IOAPIC_LENGTH)

    def read(self, index: int) -> int:
        assert self.bus.write(SELECT, 4, index) is None
        return self.bus.read(WINDOW, 4)

    def write(self, index: int, value: int) -> Deferral | None:
        assert self.bus.write(SELECT, 4, index) is None
        return self.bus.write(WINDOW, 4, value)

    def entry(self, pin: int) -> int:
        return self.read(0x10 + 2 * pin) | self.read(0x11 + 2 * pin) << 32

    def set_entry(self, pin: int, entry: int) -> None:
        """In Linux's order: the half with the mask bit last."""
        self.write(0x11 + 2 * pin, entry >> 32)
        self.write(0x10 + 2 * pin, entry & 0xFFFF_FFFF)


@pytest.fixture
def machine():
    with device_page() as page:
        yield Machine(page)


def test_registers_after_reset(machine):
    assert machine.bus.read(SELECT, 4) == 0
    assert [machine.read(index) for index in (0, 1, 2)] == [0, 0x0017_0011, 0]
    assert [machine.entry(pin) for pin in range(24)] == [MASKED] * 24


def test_identification_can_be_written_and_the_others_cannot(machine):
    for index in (0, 1, 2, 3, 0x0F):
        machine.write(index, 0xFFFF_FFFF)
    assert [machine.read(index) for index in (0, 1, 2)] == [0x0F00_0000, 0x0017_0011, 0x0F00_0000]


def test_registers_beyond_the_last_pin_are_empty(machine):
    for index in (3, 0x0F, 0x40, 0xFF):
        machine.write(index, 0x1234)
        assert machine.read(index) == 0
    assert machine.workers.set == []


def test_only_the_low_byte_selects(machine):
    machine.bus.write(SELECT, 4, 0xFFFF_FF01)
    assert machine.bus.read(SELECT, 4) == 1
    assert machine.bus.read(WINDOW, 4) == 0x0017_0011


@given(
    pin=st.integers(0, 23),
    entry=st.integers(0, (1 << 64) - 1),
    access=st.tuples(st.integers(0, IOAPIC_LENGTH - 1), st.sampled_from([1, 2, 4, 8])),
)
def test_entries_read_back_but_for_the_read_only_bits(pin, entry, access):
    with device_page() as page:
        machine = Machine(page)
        machine.set_entry(pin, entry)
        assert machine.entry(pin) == entry & ~READ_ONLY
        assert [machine.entry(other) for other in range(24) if other != pin] == [MASKED] * 23
        offset, size = access
        machine.bus.write(BASE + offset, size, entry)
        assert 0 <= machine.bus.read(BASE + offset, size) < 1 << 8 * size


@pytest.mark.parametrize(
    ("entry", "address", "data"),
    [
        (0x0000_0000_0000_0030, 0xFEE0_0000, 0x30),
        (0x0300_0000_0000_0031, 0xFEE0_3000, 0x31),
        (0xFF00_0000_0000_0000 | LOGICAL | 0xEF, 0xFEEF_F004, 0xEF),
        (0x0100_0000_0000_0000 | 1 << 8 | LOGICAL | 0x22, 0xFEE0_1004, 0x122),
        (4 << 8, 0xFEE0_0000, 0x400),
        (LEVEL | 1 << 13 | 0x33, 0xFEE0_0000, 0x33),
    ],
    ids=["fixed", "destination", "logical", "lowest-priority", "nmi", "level becomes edge"],
)
def test_translation_of_an_entry(entry, address, data):
    """MSI: bits 12-19 of the address are the destination, bit 2 its mode; data is vector and delivery mode."""
    assert msi_of_entry(7, entry) == Route(7, address, data, False)
    assert msi_of_entry(7, entry | MASKED) == Route(7, address, data, True)


def test_routes_are_set_when_a_pin_is_unmasked_changed_and_masked(machine):
    machine.set_entry(4, MASKED | 0x30)
    assert machine.workers.set == [], "nothing is in force for a masked pin"
    machine.set_entry(4, 0x30)
    assert machine.workers.set == [(Route(4, 0xFEE0_0000, 0x30, False),)]
    machine.set_entry(4, 0x30)
    assert len(machine.workers.set) == 1, "nothing changed"
    machine.set_entry(4, 0x0200_0000_0000_0031)
    assert machine.workers.set[1:] == [
        (Route(4, 0xFEE0_2000, 0x30, False),),
        (Route(4, 0xFEE0_2000, 0x31, False),),
    ]
    machine.write(0x10 + 8, MASKED | 0x31)
    assert machine.workers.set[3:] == [(Route(4, 0xFEE0_2000, 0x31, True),)]
    machine.write(0x11 + 8, 0)
    assert len(machine.workers.set) == 4


def test_pins_without_a_device_never_get_a_route(machine):
    for pin in range(24):
        machine.set_entry(pin, 0x40 + pin)
    assert [routes[0].gsi for routes in machine.workers.set] == [1, 4]
    assert [routes[-1].data for routes in machine.workers.set] == [0x41, 0x44]


def test_the_vcpu_does_not_wait_if_the_route_is_in_force_at_once(machine):
    machine.workers.at_once = True
    assert machine.write(0x10 + 2, 0x31) is None


def test_the_vcpu_waits_until_the_route_is_in_force(machine):
    machine.workers.at_once = False
    deferral = machine.write(0x10 + 2, 0x31)
    assert deferral is not None
    went_on = []
    deferral.then(lambda: went_on.append(1))
    assert went_on == []
    machine.workers.waiting.pop()()
    assert went_on == [1]
    assert deferral.done


def test_two_cpus_may_wait_at_once_and_go_on_in_any_order(machine):
    machine.workers.at_once = False
    went_on = []
    for pin in (1, 4):
        deferral = machine.write(0x10 + 2 * pin, 0x30 + pin)
        assert deferral is not None
        deferral.then(lambda pin=pin: went_on.append(pin))
    for done in reversed(machine.workers.waiting):
        done()
    assert went_on == [4, 1]


def test_a_level_entry_is_reported_once_and_served_as_edge(machine):
    machine.set_entry(4, MASKED | LEVEL | 0x30)
    assert machine.log == []
    machine.set_entry(4, LEVEL | 0x30)
    machine.set_entry(4, LEVEL | 0x31)
    machine.set_entry(1, LEVEL | 0x32)
    assert len(machine.log) == 1
    assert "pin 4" in machine.log[0]
    assert machine.workers.set[-1] == (Route(1, 0xFEE0_0000, 0x32, False),)
    assert machine.entry(4) & LEVEL, "the guest reads back what it wrote"


def test_writes_are_posted_and_reads_wait_for_them():
    with device_page() as page:
        log: list[str] = []
        device = IoApic((1, 4), Workers().set_routes, log.append)
        bus = mmio_bus(page.page)
        (select,) = bus.insert(device, SELECT, 0x10)
        (window,) = bus.insert(device, WINDOW, IOAPIC_LENGTH - 0x10, 0x10)
        device.attach(select, window)
        for window_of in bus.windows():
            assert page.write_posted(window_of.slot)
            assert not page.read_local(window_of.slot)
