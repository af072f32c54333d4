"""The manager of a machine's devices: who sits where, batches, what comes and goes."""

from __future__ import annotations

import os

import pytest

from ipc.device_pages import SLOT_COUNT
from tests.harness.devices import Recorder, routes_at_once
from tests.harness.virtio_transport import TestDevice
from tests.harness.virtqueues import guest_memory
from vmm.devices.interrupts import InterruptLine
from vmm.devices.manager import DeviceManager, in_attach_order
from vmm.errors import DeviceError
from vmm.layout import COM1_GSI, COM1_PORT, FIRST_DEVICE_GSI, I8042_GSI, MAX_VIRTIO_MMIO_DEVICES

MMIO_ADDRESS = 0xC000_1000


@pytest.fixture
def devices():
    routes: list[int] = []

    def set_routes(asked):
        routes.extend(route.gsi for route in asked)
        return routes_at_once(asked)

    manager = DeviceManager(transmit=lambda _: None, reset=lambda: None, set_routes=set_routes, log=print)
    manager.routed = routes  # type: ignore[attr-defined]
    yield manager
    manager.close()


def pending(line: InterruptLine) -> int:
    try:
        return os.eventfd_read(line.eventfd)
    except BlockingIOError:
        return 0


def write_ioapic(devices: DeviceManager, pin: int, value: int) -> None:
    devices.ioapic.write(0, 4, 0x10 + 2 * pin)
    devices.ioapic.write(0x10, 4, value)


def test_legacy_devices_have_the_lines_that_guests_expect(devices):
    gsis = [line.gsi for line in devices.interrupts]
    assert {I8042_GSI, COM1_GSI} <= set(gsis)
    assert gsis == sorted(gsis)
    assert {line.gsi for line in devices.interrupts} == {
        int(unit.instance) for unit in devices.units if unit.SECTION.name == "interrupt"
    }


def test_interrupts_of_a_batch_come_at_its_end(devices):
    (com1,) = [line for line in devices.interrupts if line.gsi == COM1_GSI]
    pending(com1)
    devices.begin_batch()
    for _ in range(3):
        devices.ports.write(COM1_PORT + 1, 1, 0)
        devices.ports.write(COM1_PORT + 1, 1, 2)  # transmitter empty
    assert pending(com1) == 0
    devices.end_batch()
    assert pending(com1) == 1


def test_a_device_comes_and_goes(devices):
    """With port and MMIO windows and a line; the IOAPIC routes its pin while the device is there, and only then."""
    device, line = Recorder(7), devices.allocator.line()
    assert line.gsi == FIRST_DEVICE_GSI
    devices.ports.insert(device, 0x700, 4)
    devices.mmio.insert(device, MMIO_ADDRESS, 0x1000)
    write_ioapic(devices, line.gsi, 0x31)
    assert devices.routed == [line.gsi]
    write_ioapic(devices, line.gsi, 1 << 16)
    devices.remove(device, line)
    assert devices.ports.read(0x700, 1) == devices.ports.read(0x7F0, 1)  # as where nobody ever was
    assert devices.mmio.read(MMIO_ADDRESS, 4) == devices.mmio.read(MMIO_ADDRESS + 0x8000, 4)
    assert device.accesses == []
    assert line not in devices.interrupts
    devices.routed.clear()
    write_ioapic(devices, line.gsi, 0x31)
    assert devices.routed == []
    with pytest.raises(DeviceError, match="not attached"):
        devices.remove(device)


def test_devices_may_come_and_go_for_ever(devices):
    for _ in range(SLOT_COUNT):
        device, line = Recorder(), devices.allocator.line()
        devices.mmio.insert(device, MMIO_ADDRESS, 0x1000)
        devices.remove(device, line)
        devices.mmio.free_removed()
    assert devices.allocator.line().gsi == FIRST_DEVICE_GSI


def test_no_descriptor_is_left():
    before = os.listdir("/proc/self/fd")
    manager = DeviceManager(transmit=lambda _: None, reset=lambda: None, set_routes=routes_at_once, log=print)
    manager.allocator.line()
    manager.close()
    assert os.listdir("/proc/self/fd") == before


def test_virtio_devices_have_consecutive_windows_and_lines(devices):
    with guest_memory() as memory:
        made = [devices.attach_virtio(TestDevice(2), memory) for _ in range(MAX_VIRTIO_MMIO_DEVICES)]
        places = [(MMIO_ADDRESS + number * 0x1000, 0x1000, FIRST_DEVICE_GSI + number) for number in range(17)]
        assert list(devices.virtio_mmio_devices()) == places
        assert [devices.mmio.read(address + 8, 4) for address, _, _ in places] == [4] * 17
        (slot,) = devices.memory_slots()
        assert (slot.guest_address, slot.size, slot.read_only) == (MMIO_ADDRESS, 17 * 0x1000, True)
        assert len({bell[:3] for bell in devices.doorbells()}) == 17 * 3
        assert {each.eventfd for each in devices.doorbells()} > {kick for each in made for kick in each.kicks}
        with pytest.raises(DeviceError, match="Could not allocate GSI: The requested resource is not available"):
            devices.attach_virtio(TestDevice(), memory)
        assert {unit.instance for unit in devices.units if unit.SECTION.name == "virtio-mmio"} == {
            f"{address:x}" for address, _, _ in places
        }


def test_without_virtio_devices_there_is_nothing_of_them(devices):
    assert devices.memory_slots() == devices.doorbells() == devices.virtio_mmio_devices() == ()


def test_devices_are_attached_in_the_order_that_gives_the_guests_names():
    kinds = [27, 4, 2, 24, 19, 1, 5, 2]
    made = [TestDevice() for _ in kinds]
    for number, (device, kind) in enumerate(zip(made, kinds, strict=True)):
        device.kind, device.id = kind, str(number)
    ordered = in_attach_order(made)
    assert [device.kind for device in ordered] == [5, 2, 2, 1, 27, 19, 4, 24]
    assert [device.id for device in ordered if device.kind == 2] == ["2", "7"]
