"""The device's side of a split virtqueue, with EVENT_IDX and indirect descriptors: virtio 1.2, 2.7.

The reference: complete, and the form that every faster loop is compared with. Whatever the driver can change is read
once, copied, and checked then. The words that both sides race on (both indices, both event words, the flags) are
elements of 16-bit views, one load or store each. :meth:`Queue.publish` and :meth:`Queue.arm` hold the only two fences.
"""

from __future__ import annotations

from struct import Struct

from base.lean_typing import Callable, NamedTuple, Sequence
from ipc.errors import GuestMemoryError
from ipc.guest_memory import GuestMemory
from ipc.schema import U16, U64, Int, RecordOf
from ipc.shared_memory import fence_lock
from virtio.abi import (
    AVAILABLE_RING_ALIGNMENT,
    DESCRIPTOR_TABLE_ALIGNMENT,
    MAX_QUEUE_SIZE,
    USED_RING_ALIGNMENT,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTQ_AVAIL_F_NO_INTERRUPT,
    VIRTQ_DESC_SIZE,
    WORD_INDIRECT,
    WORD_LENGTH,
    WORD_NEXT,
    WORD_NEXT_SHIFT,
    WORD_WRITE,
    available_ring_size,
    descriptor_table_size,
    used_ring_size,
)
from virtio.errors import QueueError

#: More bytes a chain must not have; 2.7.5.2 allows one more, which the length in the used ring could not say.
MAX_CHAIN_BYTES = (1 << 32) - 1
# Words of the rings as 16-bit views.
FLAGS = 0
INDEX = 1
#: The first entry of the available ring; what follows the last one is used_event.
RING = 2

#: What says where a descriptor of a table leads to.
_LINKS = WORD_NEXT | WORD_INDIRECT
#: Number of descriptors → reads so many at once, as pairs of words.
_readers: dict[int, Callable[[memoryview, int], tuple[int, ...]]] = {}


class QueueState(NamedTuple):
    """A queue in use, as it is saved, or handed to another process: guest addresses, and where both sides stand."""

    size: int
    descriptor_table: int
    available_ring: int
    used_ring: int
    next_available: int
    next_used: int


QUEUE_STATE = RecordOf(
    QueueState,
    size=Int(MAX_QUEUE_SIZE, 1),
    descriptor_table=Int(U64),
    available_ring=Int(U64),
    used_ring=Int(U64),
    next_available=Int(U16),
    next_used=Int(U16),
)


class QueueConfig:
    """What the driver says about a queue before it uses it: its size, and the guest addresses of its three parts."""

    __slots__ = ("available_ring", "descriptor_table", "max_size", "size", "used_ring")

    def __init__(self, max_size: int) -> None:
        self.max_size = self.size = max_size
        self.descriptor_table = self.available_ring = self.used_ring = 0

    def ready(self, memory: GuestMemory, features: int) -> Queue:
        """Return the queue, fresh, for the negotiated ``features``. Raises QueueError: size, alignment, range."""
        self._check()
        return self._made(memory, features, 0, 0)

    def _check(self) -> None:
        size = self.size
        if not 0 < size <= min(self.max_size, MAX_QUEUE_SIZE) or size & (size - 1):
            raise QueueError(f"a queue of {size} entries: not a power of two, or more than {self.max_size}")
        for name, address, alignment in (
            ("descriptor table", self.descriptor_table, DESCRIPTOR_TABLE_ALIGNMENT),
            ("available ring", self.available_ring, AVAILABLE_RING_ALIGNMENT),
            ("used ring", self.used_ring, USED_RING_ALIGNMENT),
        ):
            if address % alignment:
                raise QueueError(f"the {name} at {address:#x} is not aligned to {alignment} bytes")

    def _made(self, memory: GuestMemory, features: int, next_available: int, next_used: int) -> Queue:
        state = QueueState(
            self.size, self.descriptor_table, self.available_ring, self.used_ring, next_available, next_used
        )
        try:
            return Queue(memory, features, state)
        except GuestMemoryError as error:
            raise QueueError(f"a part of the queue is outside guest memory: {error}") from None


def restore_queue(memory: GuestMemory, features: int, state: QueueState, max_size: int) -> Queue:
    """Return the queue that :meth:`Queue.state` was of, or that stood so in another process. Raises QueueError."""
    config = QueueConfig(max_size)
    config.size, config.descriptor_table, config.available_ring, config.used_ring = state[:4]
    config._check()
    if state.next_available - state.next_used & U16 > state.size:
        raise QueueError("more chains in flight than the queue holds")
    return config._made(memory, features, state.next_available, state.next_used)


class Chain:
    """The buffers of one head, in order: (offset into ``GuestMemory.view``, length), checked and never empty."""

    __slots__ = ("head", "readable", "writable")

    def __init__(self, head: int, readable: list[tuple[int, int]], writable: list[tuple[int, int]]) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable


class Queue:
    """A ring in use. Made by :meth:`QueueConfig.ready` or :func:`restore_queue`, which check what they are told.

    The views are for the loops of devices: ``descriptors`` (two words each), ``available`` and ``used`` (16 bits),
    ``used_elements`` (id | len << 32). A loop that moves ``next_available`` and ``next_used`` itself has both right
    when it calls a method.
    """

    __slots__ = (
        "_signalled", "_state", "_used_offset", "available", "descriptors", "event_idx", "indirect", "mask", "memory",
        "next_available", "next_used", "size", "used", "used_elements",
    )  # fmt: skip

    def __init__(self, memory: GuestMemory, features: int, state: QueueState) -> None:
        """Take the views, once. Raises GuestMemoryError."""
        size = state.size
        self.memory = memory
        self.size = size
        self.mask = size - 1
        self.event_idx = bool(features & VIRTIO_F_EVENT_IDX)
        self.indirect = bool(features & VIRTIO_F_INDIRECT_DESC)
        self.descriptors = memory.window(state.descriptor_table, descriptor_table_size(size)).cast("Q")
        self.available = memory.window(state.available_ring, available_ring_size(size)).cast("H")
        used = memory.window(state.used_ring, used_ring_size(size))
        self._used_offset = memory.translate(state.used_ring, used_ring_size(size))
        self.used = used.cast("H")
        self.used_elements = used[4 : 4 + 8 * size].cast("Q")
        #: Counts modulo 2^16: the next entry of the available ring that is read, of the used ring that is written.
        self.next_available = state.next_available
        self.next_used = self._signalled = state.next_used
        self._state = state

    def waiting(self) -> int:
        """Return how many chains wait. Raises QueueError if they are more than the queue holds."""
        count = self.available[INDEX] - self.next_available & U16
        if count > self.size:
            raise QueueError(f"{count} chains were made available in a queue of {self.size}")
        return count

    def pop(self) -> Chain | None:
        """Take the next chain; None if there is none. Raises QueueError."""
        next_available = self.next_available
        count = self.available[INDEX] - next_available & U16
        if not count:
            return None
        if count > self.size:
            raise QueueError(f"{count} chains were made available in a queue of {self.size}")
        head = self.available[RING + (next_available & self.mask)]
        self.next_available = next_available + 1 & U16
        return self.chain(head)

    def undo_pop(self) -> None:
        """Give the chain that was taken last back: it was not begun (no room, no tokens)."""
        self.next_available = self.next_available - 1 & U16

    def chain(self, head: int) -> Chain:
        """Return the chain of a head that was taken. Raises QueueError."""
        words = iter(self._words(head))
        spans = self.memory.spans
        first_start, first_end, first_shift = spans[0]
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        total = 0
        for address, word in zip(words, words, strict=True):
            length = word & WORD_LENGTH
            if not length:
                continue
            if first_start <= address and address + length <= first_end:
                offset = address + first_shift
            else:
                for start, end, shift in spans:
                    if start <= address and address + length <= end:
                        offset = address + shift
                        break
                else:
                    raise QueueError(f"{length} bytes at {address:#x} are not in one region of guest memory")
            if word & WORD_WRITE:
                writable.append((offset, length))
            elif writable:
                raise QueueError("a device-readable buffer after a device-writable one")
            else:
                readable.append((offset, length))
            total += length
        if not 0 < total <= MAX_CHAIN_BYTES:
            raise QueueError(f"a chain of {total} bytes")
        return Chain(head, readable, writable)

    def _words(self, head: int) -> Sequence[int]:
        """Return the descriptors of a chain in order, two words each; each word is read once. Raises QueueError."""
        descriptors, size = self.descriptors, self.size
        found: list[int] = []
        index = head
        for room in range(size, 0, -1):
            if index >= size:
                raise QueueError(f"descriptor {index} of a table of {size}")
            address, word = descriptors[2 * index], descriptors[2 * index + 1]
            if word & WORD_INDIRECT:  # the last of a chain may be one, after others
                table = self._table(address, word, room)
                return [*found, *table] if found else table
            found.append(address)
            found.append(word)
            if not word & WORD_NEXT:
                return found
            index = word >> WORD_NEXT_SHIFT
        raise QueueError("a chain that loops, or is longer than its queue")

    def _table(self, address: int, word: int, room: int) -> Sequence[int]:
        """Copy an indirect table and return its descriptors in chain order, at most ``room``. Raises QueueError."""
        length = word & WORD_LENGTH
        count = length // VIRTQ_DESC_SIZE
        if not self.indirect or word & WORD_NEXT or length % VIRTQ_DESC_SIZE or not 0 < count <= self.size:
            raise QueueError(f"an indirect descriptor of {length} bytes that breaks the rules")
        read = _readers.get(count)
        if read is None:
            read = _readers[count] = Struct(f"<{2 * count}Q").unpack_from
        try:
            words = read(self.memory.view, self.memory.translate(address, length))
        except GuestMemoryError as error:
            raise QueueError(f"an indirect table outside guest memory: {error}") from None
        # Drivers fill tables in order: then nothing has to be moved.
        following = 0
        for rest in words[1::2]:
            following += 1
            if rest & _LINKS != WORD_NEXT or rest >> WORD_NEXT_SHIFT != following:
                break
        if not rest & _LINKS and following == count <= room:
            return words
        return _in_order(words, min(count, room))

    def add_used(self, chain: Chain, written: int) -> None:
        """Give a chain back, with ``written`` bytes in its writable buffers; the driver sees it after publish()."""
        self.used_elements[self.next_used & self.mask] = chain.head | written << 32
        self.next_used = self.next_used + 1 & U16
        memory = self.memory
        if memory.tracks_dirty:
            for offset, length in chain.writable:
                memory.mark_dirty(offset, length)

    def publish(self) -> bool:
        """Show the driver what was given back, and tell whether it wants to know: one decision for the whole batch."""
        old, new = self._signalled, self.next_used
        if old == new:
            return False
        self._signalled = self.used[INDEX] = new
        with fence_lock:
            pass
        if self.memory.tracks_dirty:
            self.memory.mark_dirty(self._used_offset, used_ring_size(self.size))
        if self.event_idx:
            return (new - self.available[RING + self.size] - 1 & U16) < (new - old & U16)
        return not self.available[FLAGS] & VIRTQ_AVAIL_F_NO_INTERRUPT

    def arm(self) -> bool:
        """Ask to be notified of the next chain. True: there is one already, go on. (Without EVENT_IDX it always is.)"""
        if self.event_idx:
            self.used[RING + 4 * self.size] = self.next_available  # avail_event
            with fence_lock:
                pass
        return self.available[INDEX] != self.next_available

    def state(self) -> QueueState:
        """Return what :func:`restore_queue` makes the queue of."""
        return self._state._replace(next_available=self.next_available, next_used=self.next_used)


def _in_order(words: tuple[int, ...], room: int) -> list[int]:
    """Return the descriptors of an indirect table in chain order, at most ``room``. Raises QueueError."""
    found: list[int] = []
    index = 0
    for _ in range(room):
        if 2 * index >= len(words):
            raise QueueError(f"descriptor {index} of an indirect table of {len(words) // 2}")
        rest = words[2 * index + 1]
        if rest & WORD_INDIRECT:
            raise QueueError("an indirect descriptor in an indirect table")
        found.append(words[2 * index])
        found.append(rest)
        if not rest & WORD_NEXT:
            return found
        index = rest >> WORD_NEXT_SHIFT
    raise QueueError("an indirect table that loops, or a chain longer than its queue")
