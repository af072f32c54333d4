"""The driver's side of a split virtqueue: for tests, fuzzers and benchmarks, without a guest.

It works in the same guest memory as the device, in this process or another, and keeps the rules of virtio 1.2, 2.7,
unless it is told to break them: the rings are public.
"""

from __future__ import annotations

from base.lean_typing import NamedTuple, Sequence
from ipc.guest_memory import GuestMemory
from ipc.schema import U16
from ipc.shared_memory import fence
from virtio.abi import (
    DESCRIPTOR_TABLE_ALIGNMENT,
    VIRTIO_F_EVENT_IDX,
    VIRTQ_AVAIL_F_NO_INTERRUPT,
    VIRTQ_DESC,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    VIRTQ_DESC_SIZE,
    VIRTQ_USED_F_NO_NOTIFY,
    WORD_LENGTH,
    available_ring_size,
    descriptor_table_size,
    used_ring_size,
)
from virtio.errors import DriverError
from virtio.queue import FLAGS, INDEX, RING, QueueConfig


class Buffer(NamedTuple):
    """``length`` bytes at a guest ``address``; the device writes to it, or reads it."""

    address: int
    length: int
    writable: bool = False


class Used(NamedTuple):
    """A chain that came back, and how many bytes the device says that it has written."""

    head: int
    written: int


def lay_out(config: QueueConfig, address: int) -> int:
    """Place the three parts of a queue from ``address`` on; return the address behind them, aligned as a table is."""
    step = DESCRIPTOR_TABLE_ALIGNMENT
    config.descriptor_table = -(-address // step) * step
    config.available_ring = config.descriptor_table + descriptor_table_size(config.size)
    config.used_ring = -(-(config.available_ring + available_ring_size(config.size)) // step) * step
    return -(-(config.used_ring + used_ring_size(config.size)) // step) * step


class Driver:
    """One queue, as a driver uses it. ``tables`` is the guest address of a room for indirect tables, one of
    ``queue size`` descriptors for each head; 0: none are used.

    A chain is written once (:meth:`write_chain`), and may then be offered any number of times.
    """

    def __init__(self, memory: GuestMemory, config: QueueConfig, features: int, tables: int = 0) -> None:
        """Clear the rings. Raises GuestMemoryError."""
        size = config.size
        self.memory = memory
        self.size = size
        self.event_idx = bool(features & VIRTIO_F_EVENT_IDX)
        self.tables = tables
        self.table = config.descriptor_table
        self.available = memory.window(config.available_ring, available_ring_size(size)).cast("H")
        used = memory.window(config.used_ring, used_ring_size(size))
        self.used = used.cast("H")
        self.used_elements = used[4 : 4 + 8 * size].cast("Q")
        memory.write(config.available_ring, bytes(available_ring_size(size)))
        memory.write(config.used_ring, bytes(used_ring_size(size)))
        self.next_available = self.next_used = self._published = 0
        self._free = list(range(size - 1, -1, -1))
        #: Head → its descriptors in the table.
        self._chains: dict[int, list[int]] = {}
        self._offered: set[int] = set()

    def table_of(self, head: int) -> int:
        """Return the guest address of the indirect table of a head."""
        return self.tables + VIRTQ_DESC_SIZE * self.size * head

    def write_descriptor(self, address: int, buffer: Buffer, flags: int, following: int) -> None:
        """Write one descriptor at a guest address."""
        flags |= VIRTQ_DESC_F_WRITE if buffer.writable else 0
        self.memory.write(address, VIRTQ_DESC.pack(buffer.address, buffer.length, flags, following))

    def write_chain(self, buffers: Sequence[Buffer], *, indirect: bool = False) -> int:
        """Write a chain; return its head. Raises DriverError when there are too few free descriptors."""
        count = 1 if indirect else len(buffers)
        if not buffers or len(buffers) > self.size or count > len(self._free):
            raise DriverError(f"a chain of {len(buffers)} buffers, with {len(self._free)} descriptors free")
        places = [self._free.pop() for _ in range(count)]
        head = places[0]
        last = len(buffers) - 1
        for number, buffer in enumerate(buffers):
            flags = VIRTQ_DESC_F_NEXT if number < last else 0
            if indirect:
                following = number + 1 if number < last else 0
                self.write_descriptor(self.table_of(head) + VIRTQ_DESC_SIZE * number, buffer, flags, following)
            else:
                following = places[number + 1] if number < last else 0
                self.write_descriptor(self.table + VIRTQ_DESC_SIZE * places[number], buffer, flags, following)
        if indirect:
            table = Buffer(self.table_of(head), VIRTQ_DESC_SIZE * len(buffers))
            self.write_descriptor(self.table + VIRTQ_DESC_SIZE * head, table, VIRTQ_DESC_F_INDIRECT, 0)
        self._chains[head] = places
        return head

    def free(self, head: int) -> None:
        """Forget a chain that the device does not have."""
        if head in self._offered or head not in self._chains:
            raise DriverError(f"the chain {head} is not there, or the device has it")
        self._free += reversed(self._chains.pop(head))

    def offer(self, head: int) -> None:
        """Put a chain into the available ring; the device sees it after publish()."""
        if head in self._offered or head not in self._chains:
            raise DriverError(f"the chain {head} is not there, or the device has it")
        self._offered.add(head)
        self.available[RING + (self.next_available & self.size - 1)] = head
        self.next_available = self.next_available + 1 & U16

    def add(self, buffers: Sequence[Buffer], *, indirect: bool = False) -> int:
        """Write a chain and offer it; return its head. Raises DriverError."""
        head = self.write_chain(buffers, indirect=indirect)
        self.offer(head)
        return head

    def publish(self) -> bool:
        """Show the device what was offered, and tell whether it wants to be notified."""
        old, new = self._published, self.next_available
        if old == new:
            return False
        self._published = self.available[INDEX] = new
        fence()
        if self.event_idx:
            return (new - self.used[RING + 4 * self.size] - 1 & U16) < (new - old & U16)
        return not self.used[FLAGS] & VIRTQ_USED_F_NO_NOTIFY

    def take_used(self) -> list[Used]:
        """Return the chains that have come back. Raises DriverError if they are not what the device had."""
        index = self.used[INDEX]
        if index - self.next_used & U16 > len(self._offered):
            raise DriverError("the device gave more chains back than it had")
        found = []
        while self.next_used != index:
            element = self.used_elements[self.next_used & self.size - 1]
            head = element & WORD_LENGTH
            if head not in self._offered:
                raise DriverError(f"the device gave the chain {head} back, which it did not have")
            self._offered.remove(head)
            self.next_used = self.next_used + 1 & U16
            found.append(Used(head, element >> 32))
        return found

    def arm(self) -> bool:
        """Ask for an interrupt with the next chain that comes back. True: there is one already."""
        if self.event_idx:
            self.available[RING + self.size] = self.next_used  # used_event
        else:
            self.available[FLAGS] = 0
        fence()
        return self.used[INDEX] != self.next_used

    def disarm(self) -> None:
        """Say that no interrupts are wanted; with EVENT_IDX they come once in 2^16 chains."""
        if self.event_idx:
            self.available[RING + self.size] = self.next_used - 1 & U16
        else:
            self.available[FLAGS] = VIRTQ_AVAIL_F_NO_INTERRUPT
