"""Guest memory with virtqueues, and both sides of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ipc.guest_memory import GuestMemory
from ipc.messages.records import MemoryRegion
from virtio.abi import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1
from virtio.driver import Driver, lay_out
from virtio.queue import Queue, QueueConfig

MIB = 1 << 20
HIGH = 4 << 30
#: What every driver of the tests negotiates, if nothing else is said.
FEATURES = VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC
RINGS = 0x1000
TABLES = 0x2_0000
#: From here on nothing is laid out.
DATA = 0x8_0000


@contextmanager
def guest_memory(size: int = 2 * MIB) -> Iterator[GuestMemory]:
    """Guest memory in two regions of half the size, at 0 and at 4 GiB."""
    half = size // 2
    fd = os.memfd_create("guest")
    os.ftruncate(fd, size)
    memory = GuestMemory(fd, size, (MemoryRegion(0, half, 0), MemoryRegion(HIGH, half, half)))
    os.close(fd)
    try:
        yield memory
    finally:
        memory.close()


class Pair(NamedTuple):
    """Both sides of one queue."""

    memory: GuestMemory
    config: QueueConfig
    driver: Driver
    queue: Queue


def make_pair(memory: GuestMemory, size: int = 16, features: int = FEATURES, rings: int = RINGS) -> Pair:
    """Lay a queue out in the low region, with room for indirect tables."""
    config = QueueConfig(size)
    assert lay_out(config, rings) <= TABLES
    driver = Driver(memory, config, features, TABLES)
    return Pair(memory, config, driver, config.ready(memory, features))
