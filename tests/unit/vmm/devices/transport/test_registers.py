"""The registers of a transport, whatever a driver writes to them, in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.records import values_of
from virtio.abi import (
    STATUS_ACKNOWLEDGE,
    STATUS_DEVICE_NEEDS_RESET,
    STATUS_DRIVER,
    STATUS_DRIVER_OK,
    STATUS_FAILED,
    STATUS_FEATURES_OK,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_VERSION_1,
)
from vmm.devices.transport import registers as names
from vmm.devices.transport.registers import ACTIVATE, NEXT_STATUS, NOTHING, REGISTERS_STATE, RESET, Registers

OFFERED = VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX
SIZES = (256, 64)
STEPS = (STATUS_ACKNOWLEDGE, STATUS_DRIVER, STATUS_FEATURES_OK, STATUS_DRIVER_OK)
OF_A_QUEUE = range(names.QUEUE_SIZE, names.QUEUE_USED_RING_HIGH + 1)


def advance(registers: Registers, last: int, features: int = OFFERED) -> int:
    """Go through the initialisation up to a status bit; returns what followed last."""
    follows = NOTHING
    for bit in STEPS:
        if bit == STATUS_FEATURES_OK:
            for half in (0, 1):
                registers.write(names.DRIVER_FEATURES_SELECT, half)
                registers.write(names.DRIVER_FEATURES, features >> 32 * half & 0xFFFF_FFFF)
        follows = registers.write(names.STATUS, registers.status | bit)
        if bit == last:
            break
    return follows


def made(last: int = 0) -> Registers:
    registers = Registers(OFFERED, SIZES)
    if last:
        advance(registers, last)
    return registers


WRITES = st.lists(
    st.tuples(
        st.integers(0, names.REGISTER_COUNT),
        st.one_of(st.sampled_from([0, 1, 2, 3, 7, 11, 15, 64, 128]), st.integers(0, (1 << 32) - 1)),
    ),
    max_size=40,
)


@given(writes=WRITES, last=st.sampled_from([0, *STEPS]))
def test_any_sequence_keeps_the_rules(writes, last):
    registers = made(last)
    for register, value in writes:
        before = registers.save()
        follows = registers.write(register, value)
        after = registers.save()
        assert REGISTERS_STATE.check(after, "after a write") == after
        if follows == RESET:
            assert (register, value) == (names.STATUS, 0)
            assert after == before, "a reset takes effect when the device has stopped"
            registers.reset()
            continue
        # No bit is ever cleared, and one is set at a time: the next one, or FAILED.
        new = after.status & ~before.status
        assert before.status & ~after.status == 0
        assert new in (0, STATUS_FAILED, NEXT_STATUS.get(before.status))
        assert (follows == ACTIVATE) == bool(new & STATUS_DRIVER_OK)
        if after.queues != before.queues:
            assert before.status & STATUS_FEATURES_OK
            assert not before.status & STATUS_DRIVER_OK
        if after.driver_features != before.driver_features:
            assert before.status == STATUS_ACKNOWLEDGE | STATUS_DRIVER
        if new == STATUS_FEATURES_OK:
            assert after.driver_features & VIRTIO_F_VERSION_1
            assert not after.driver_features & ~OFFERED
        for number in range(names.REGISTER_COUNT):
            assert 0 <= registers.read(number) < 1 << 32


@given(writes=WRITES)
def test_a_reset_leaves_nothing_but_the_generation(writes):
    registers = made()
    for register, value in writes:
        registers.write(register, value)
    registers.next_generation()
    registers.reset()
    assert registers.save() == made().save()._replace(config_generation=1)


@given(data=st.data())
def test_what_is_made_of_a_state_saves_it(data):
    state = data.draw(values_of(REGISTERS_STATE))
    assert Registers(OFFERED, SIZES, state).save() == state


def test_the_whole_way():
    registers = made()
    assert advance(registers, STATUS_DRIVER_OK) == ACTIVATE
    assert registers.driver_features == OFFERED
    assert registers.read(names.STATUS) == 15
    assert registers.read(names.INTERRUPT_STATUS) == names.INTERRUPT_USED_BUFFER


def test_what_is_offered_is_read_in_halves():
    registers = made()
    for half, expected in ((0, OFFERED & 0xFFFF_FFFF), (1, 1), (2, 0), (1 << 31, 0)):
        registers.write(names.DEVICE_FEATURES_SELECT, half)
        assert registers.read(names.DEVICE_FEATURES) == expected


@pytest.mark.parametrize("features", [0, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1 | 1, OFFERED | 1 << 63])
def test_features_that_cannot_be_leave_features_ok_unset(features):
    registers = made()
    advance(registers, STATUS_FEATURES_OK, features)
    assert registers.read(names.STATUS) == STATUS_ACKNOWLEDGE | STATUS_DRIVER


@pytest.mark.parametrize("last", [0, *STEPS])
def test_registers_of_a_queue_can_be_written_in_one_step_only(last):
    registers = made(last)
    registers.write(names.QUEUE_SELECT, 1)
    before = registers.save().queues
    for register in OF_A_QUEUE:
        registers.write(register, 1)
    first, second = registers.save().queues
    assert first == before[0]
    if last == STATUS_FEATURES_OK:
        assert second == (1, True, 1 << 32 | 1, 1 << 32 | 1, 1 << 32 | 1, 0, 0)
    else:
        assert second == before[1]


def test_a_queue_that_does_not_exist():
    registers = made(STATUS_FEATURES_OK)
    registers.write(names.QUEUE_SELECT, len(SIZES))
    before = registers.save()
    for register in OF_A_QUEUE:
        registers.write(register, 1)
    assert registers.save() == before
    assert registers.read(names.QUEUE_SIZE_MAX) == registers.read(names.QUEUE_READY) == 0


def test_failed_can_always_be_said_and_nothing_follows_it():
    for last in (0, *STEPS):
        registers = made(last)
        status = registers.status
        registers.write(names.STATUS, status | STATUS_FAILED)
        assert registers.status == status | STATUS_FAILED
        for bit in STEPS:
            registers.write(names.STATUS, registers.status | bit)
        assert registers.status == status | STATUS_FAILED
        assert not registers.takes_config()


def test_needs_reset_is_said_once_and_tells_an_active_driver():
    registers = made(STATUS_DRIVER)
    assert registers.needs_reset()
    assert registers.interrupt_status == 0
    registers.reset()
    advance(registers, STATUS_DRIVER_OK)
    assert registers.needs_reset()
    assert not registers.needs_reset()
    assert registers.status == 15 | STATUS_DEVICE_NEEDS_RESET
    assert registers.read(names.INTERRUPT_STATUS) == 3
    assert not registers.takes_config()


def test_only_changes_of_the_configuration_are_acknowledged():
    registers = made(STATUS_DRIVER_OK)
    assert registers.config_changed()
    registers.write(names.INTERRUPT_ACKNOWLEDGE, 1)
    assert registers.interrupt_status == 3
    registers.write(names.INTERRUPT_ACKNOWLEDGE, 2)
    assert registers.interrupt_status == 1


def test_a_change_before_driver_ok_waits_for_it():
    registers = made(STATUS_DRIVER)
    assert not registers.config_changed()
    registers.write(names.INTERRUPT_ACKNOWLEDGE, 3)
    advance(registers, STATUS_DRIVER_OK)
    assert registers.interrupt_status & names.INTERRUPT_CONFIGURATION_CHANGE
