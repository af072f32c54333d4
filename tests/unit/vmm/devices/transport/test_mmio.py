"""virtio-mmio: the register page is the truth, after whatever was written."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.virtio_transport import ACK, DEVICE_STATUS, TestDevice, attached
from virtio.entropy import Entropy
from vmm.devices.transport.mmio import CONFIG, CONFIG_GENERATION, QUEUE_NOTIFY, SHOWN
from vmm.devices.vms import Doorbell
from vmm.layout import FIRST_DEVICE_GSI, VIRTIO_MMIO_ADDRESS


def page(made) -> bytes:
    """What a worker, and the guest, find in the memfd."""
    (slot,) = made.manager.memory_slots()
    assert slot.read_only
    return os.pread(slot.descriptor, 4096, slot.offset)


def test_what_a_driver_probes():
    with attached(TestDevice(2, b"\x11\x22\x33")) as made:
        assert [made.read(offset) for offset in (0, 4, 8, 12)] == [0x7472_6976, 2, 4, 0]
        assert made.read(CONFIG) == 0x332211
        assert made.read(CONFIG + 1, 1) == 0x22
        assert made.read(CONFIG + 2, 2) == 0x33
        assert [made.read(offset) for offset in (0xB0, 0xB4, 0xB8, 0xBC)] == [0xFFFF_FFFF] * 4
        assert made.transport.line.gsi == FIRST_DEVICE_GSI
        assert made.transport.address == VIRTIO_MMIO_ADDRESS


@settings(max_examples=100, deadline=None)
@given(
    accesses=st.lists(
        st.tuples(
            st.one_of(st.sampled_from([0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70]), st.integers(0, 4088)),
            st.sampled_from([1, 2, 4, 8]),
            st.one_of(st.sampled_from([0, 1, 3, 11, 15, 128]), st.integers(0, (1 << 64) - 1)),
        ),
        max_size=30,
    ),
    started=st.booleans(),
)
def test_the_page_shows_the_registers_whatever_is_written(accesses, started):
    with attached(TestDevice(2, bytes(12))) as made:
        if started:
            made.start()
        for offset, size, value in accesses:
            made.write(offset, value & (1 << 8 * size) - 1, size)
            shown = page(made)
            for index, register in SHOWN.items():
                word = int.from_bytes(shown[4 * index : 4 * index + 4], "little")
                assert word == made.transport.registers.read(register) == made.read(4 * index)
            assert shown[CONFIG : CONFIG + 12] == made.device.space[:12]


def test_doorbells_are_those_of_the_queues_and_of_acknowledgements():
    with attached(TestDevice(2)) as made:
        first, second = made.transport.kicks
        *bells, acknowledged = made.manager.doorbells()
        notify = VIRTIO_MMIO_ADDRESS + QUEUE_NOTIFY
        assert bells == [Doorbell(notify, 4, 0, first), Doorbell(notify, 4, 1, second)]
        assert acknowledged[:3] == (VIRTIO_MMIO_ADDRESS + ACK, 4, 1)
        made.write(QUEUE_NOTIFY, 1)  # one that KVM did not take
        made.write(QUEUE_NOTIFY, 2)  # there is no such queue
        assert os.eventfd_read(second) == 1
        with pytest.raises(BlockingIOError):
            os.eventfd_read(first)


def test_the_configuration_is_written_only_by_a_driver():
    with attached(TestDevice(1, bytes(8))) as made:
        made.write(CONFIG, 7, 1)
        assert made.read(CONFIG, 1) == 0
        made.write(DEVICE_STATUS, 1)
        made.write(DEVICE_STATUS, 3)
        made.write(CONFIG + 2, 7, 1)
        assert made.read(CONFIG, 8) == 7 << 16
        made.write(0xFFF, 1, 1)  # beyond what the device has
        assert made.read(0xFFF, 1) == 0
        made.write(DEVICE_STATUS, 3 | 128)
        made.write(CONFIG, 9, 1)
        assert made.read(CONFIG, 1) == 0


def test_a_change_is_read_under_another_generation_and_interrupts():
    with attached(TestDevice(1, bytes(8))) as made:
        made.start()
        before = made.read(CONFIG_GENERATION)
        made.device.space[:] = b"new size"
        made.transport.config_changed()
        assert made.read(CONFIG_GENERATION) == before + 2
        assert made.read(CONFIG, 8) == int.from_bytes(b"new size", "little")
        assert made.edges() == 1
        assert made.read(0x60) == 3
        made.write(ACK, 3)
        assert made.read(0x60) == 1


def test_a_state_is_where_it_goes_on():
    with attached(Entropy("rng")) as made:
        made.start()
        made.transport.pause()
        state = made.transport.save()
        assert (state.kind, state.id, state.gsi) == (4, "rng", FIRST_DEVICE_GSI)
        again = made.manager.attach_virtio(Entropy("rng"), made.memory, state.registers)
        assert again.save().registers == state.registers
        assert again.read(DEVICE_STATUS, 4) == 15
        assert again.device.activation is None
        assert again.resume() is None
        assert again.device.activation is not None
        assert again.save().registers == state.registers
        again.pause()
