"""A ring with its shared memory and eventfds, for tests."""

from __future__ import annotations

import mmap
import os
import random
from typing import NamedTuple

from hypothesis import strategies as st

from ipc import exit_ring
from ipc.exit_ring import RING_SIZE, STRING_DATA_SIZE, Entry, ExitRingConsumer, ExitRingProducer
from ipc.shared_memory import create_shared, map_shared

U64 = (1 << 64) - 1
READS = (
    exit_ring.KIND_PIO_READ,
    exit_ring.KIND_MMIO_READ,
    exit_ring.KIND_PIO_STRING_READ,
    exit_ring.KIND_ACKNOWLEDGE,
)
STRINGS = (exit_ring.KIND_PIO_STRING_READ, exit_ring.KIND_PIO_STRING_WRITE)
PORTS = (exit_ring.KIND_PIO_READ, exit_ring.KIND_PIO_WRITE, exit_ring.KIND_ACKNOWLEDGE, *STRINGS)
WRITES = (exit_ring.KIND_PIO_WRITE, exit_ring.KIND_MMIO_WRITE)


class Access(NamedTuple):
    """One access as the producer makes it and the consumer must see it."""

    kind: int
    address: int
    size: int
    data: int
    synchronous: bool
    elements: int

    @property
    def length(self) -> int:
        """Bytes in the string area."""
        return self.elements * self.size if self.kind in STRINGS else 0


def seen(entry: Entry) -> Access:
    """Return what the consumer sees."""
    return Access(entry.kind, entry.address, entry.size, entry.data, bool(entry.flags), entry.count)


def random_access(chooser: random.Random) -> Access:
    """Return a legal access."""
    kind = chooser.randint(1, 7)
    size = chooser.choice((1, 2, 4) if kind in PORTS else (1, 2, 4, 8))
    address = chooser.getrandbits(16 if kind in PORTS else 64)
    data = 0 if kind in READS or kind in STRINGS else chooser.getrandbits(8 * size)
    count = chooser.randint(1, exit_ring.STRING_DATA_SIZE // size) if kind in STRINGS else 1
    return Access(kind, address, size, data, kind not in WRITES or chooser.random() < 0.2, count)


@st.composite
def accesses(draw) -> Access:
    """Legal accesses."""
    kind = draw(st.integers(1, 7))
    size = draw(st.sampled_from((1, 2, 4) if kind in PORTS else (1, 2, 4, 8)))
    address = draw(st.integers(0, 0xFFFF if kind in PORTS else U64))
    data = draw(st.integers(0, (1 << 8 * size) - 1)) if kind in WRITES else 0
    count = draw(st.integers(1, STRING_DATA_SIZE // size)) if kind in STRINGS else 1
    return Access(kind, address, size, data, kind not in WRITES or draw(st.booleans()), count)


def perform(producer: ExitRingProducer, access: Access, lazy: bool = False) -> int | None:
    """Make the access; return the answer of a synchronous one."""
    if not access.synchronous:
        producer.post(access.kind, access.address, access.size, access.data, int(lazy))
        return None
    answer = producer.call(access.kind, access.address, access.size, access.data, access.elements)
    producer.applied()
    return answer


class Ring:
    """Ring memory, both eventfds, and fresh ends on demand."""

    def __init__(self) -> None:
        self.descriptor = create_shared("exit-ring", RING_SIZE)
        self.buffer: mmap.mmap = map_shared(self.descriptor, RING_SIZE)
        exit_ring.initialise(self.buffer)
        self.doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.completion = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def producer(self) -> ExitRingProducer:
        """Return a producer on a mapping of its own, as another process has it."""
        return ExitRingProducer(map_shared(self.descriptor, RING_SIZE), self.doorbell, self.completion)

    def consumer(self) -> ExitRingConsumer:
        """Return a consumer."""
        return ExitRingConsumer(self.buffer, self.completion)

    def word(self, index: int) -> int:
        """Read a header word."""
        return int.from_bytes(self.buffer[index * 8 : index * 8 + 8], "little")

    def set_word(self, index: int, value: int) -> None:
        """Scribble over a header word."""
        self.buffer[index * 8 : index * 8 + 8] = value.to_bytes(8, "little")

    def rung(self) -> int:
        """Return how often the doorbell rang since the last look."""
        try:
            return os.eventfd_read(self.doorbell)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Close what was opened."""
        for descriptor in (self.descriptor, self.doorbell, self.completion):
            os.close(descriptor)


def check_bounds(access: Access) -> None:
    """What the consumer promises to its caller, whoever the producer is."""
    assert access.kind in range(1, 8)
    if access.kind in PORTS:
        assert access.size in (1, 2, 4)
        assert access.address <= 0xFFFF
    else:
        assert access.size in (1, 2, 4, 8)
        assert access.address <= U64
    assert access.data < 1 << 8 * access.size
    assert access.synchronous or access.kind in WRITES
    if access.kind in STRINGS:
        assert 1 <= access.length <= STRING_DATA_SIZE
    else:
        assert access.elements == 1


def consume_from(ring: Ring, consumer: ExitRingConsumer, limit: int) -> int:
    """Execute entries until there is none; return their number."""
    for executed in range(limit):
        entry = consumer.take()
        if entry is None:
            return executed
        check_bounds(seen(entry))
        assert entry.sequence == consumer.done + 1
        consumer.complete(0)
    return limit
