"""The driver's side of a virtqueue: it refuses what a driver must not do, and what a device must not have done."""

from __future__ import annotations

import pytest

from tests.harness.virtqueues import DATA, guest_memory, make_pair
from virtio.driver import Buffer, lay_out
from virtio.errors import DriverError
from virtio.queue import QueueConfig


@pytest.fixture
def pair():
    with guest_memory() as memory:
        yield make_pair(memory)


def test_parts_of_a_queue_are_aligned_and_apart():
    for size in (1, 2, 256, 1 << 15):
        config = QueueConfig(size)
        end = lay_out(config, 0x1001)
        assert (config.descriptor_table, end % 16) == (0x1010, 0)
        assert config.available_ring == config.descriptor_table + 16 * size
        assert config.used_ring % 4 == 0
        assert config.available_ring + 6 + 2 * size <= config.used_ring
        assert config.used_ring + 6 + 8 * size <= end


def test_descriptors_are_finite(pair):
    heads = [pair.driver.write_chain([Buffer(DATA, 1)] * 4) for _ in range(4)]
    with pytest.raises(DriverError):
        pair.driver.write_chain([Buffer(DATA, 1)])
    pair.driver.free(heads[2])
    pair.driver.write_chain([Buffer(DATA, 1)] * 4)
    for buffers in ([], [Buffer(DATA, 1)] * 17):
        with pytest.raises(DriverError):
            pair.driver.write_chain(buffers, indirect=True)


def test_what_the_device_has_is_not_touched(pair):
    head = pair.driver.add([Buffer(DATA, 1)])
    for what in (pair.driver.free, pair.driver.offer):
        with pytest.raises(DriverError):
            what(head)
    pair.driver.publish()
    pair.queue.add_used(pair.queue.pop(), 0)
    pair.queue.publish()
    pair.driver.take_used()
    pair.driver.free(head)
    with pytest.raises(DriverError):
        pair.driver.free(head)


def test_a_device_that_breaks_the_rules_is_found(pair):
    pair.driver.add([Buffer(DATA, 1)])
    pair.driver.publish()
    pair.queue.used[1] = 2
    with pytest.raises(DriverError, match="more chains back"):
        pair.driver.take_used()
    pair.queue.used_elements[0] = 5
    pair.queue.used[1] = 1
    with pytest.raises(DriverError, match="did not have"):
        pair.driver.take_used()


def test_the_last_kick_that_was_asked_for_is_not_lost(pair):
    """Whatever the order of arming and publishing: a chain is seen by arm(), or the driver is told to kick."""
    for device_first in (True, False):
        if device_first:
            assert not pair.queue.arm()
        head = pair.driver.add([Buffer(DATA, 1)])
        kick = pair.driver.publish()
        if not device_first:
            assert pair.queue.arm()
        assert kick is device_first
        pair.queue.add_used(pair.queue.pop(), 0)
        assert pair.queue.publish() is not pair.driver.arm() or device_first
        pair.driver.take_used()
        pair.driver.free(head)
