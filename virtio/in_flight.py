"""Which chains a device has begun, in shared memory that outlives its process: docs/formats/in-flight.md.

What a device answers in order needs no table: all that was taken and is not in the used ring is done once more. A
device that answers out of order keeps one for each queue. For every head there is a word: 0, or the order in which it
was taken; one word more says up to where the used ring has been taken out of the table. Every change is one store, in
an order that x86 keeps, so that wherever a process ends, another one reads from guest memory and table what is to be
done: nothing is lost, and nothing is answered twice.
"""

from __future__ import annotations

from base.lean_typing import NamedTuple, Sequence
from ipc.guest_memory import GuestMemory
from ipc.schema import U16, U32
from ipc.shared_memory import PAGE_SIZE
from virtio.errors import QueueError
from virtio.queue import INDEX, RING, Chain, Queue, QueueState

#: Words of a table beside those of the heads.
_SETTLED = 0
_HEADS = 1


def table_words(queue_size: int) -> int:
    """Return how many words the table of a queue takes."""
    return _HEADS + queue_size


def region_size(queue_sizes: Sequence[int]) -> int:
    """Return the bytes of shared memory that the tables of these queues take, in whole pages."""
    size = 8 * sum(table_words(each) for each in queue_sizes)
    return -(-size // PAGE_SIZE) * PAGE_SIZE


def tables_of(region: memoryview, queue_sizes: Sequence[int]) -> list[memoryview]:
    """Return the table of each queue, as words. Who has them releases them before the region is unmapped."""
    tables, start = [], 0
    with region.cast("Q") as words:
        for each in queue_sizes:
            end = start + table_words(each)
            tables.append(words[start:end])
            start = end
    return tables


class Recovered(NamedTuple):
    """Where a queue stands whose process has ended, and the heads that it had begun, in their order."""

    next_available: int
    next_used: int
    again: tuple[int, ...]


def recover(memory: GuestMemory, state: QueueState, table: memoryview | None) -> Recovered:
    """Read from guest memory and table where a queue stands. Raises QueueError, GuestMemoryError.

    Neither side of the ring is believed: what is read is bounded by the queue's size.
    """
    size = state.size
    used = memory.window(state.used_ring, 4 + 8 * size)
    next_used = used.cast("H")[INDEX]
    if table is None:
        return Recovered(next_used, next_used, ())
    if len(table) < table_words(size):
        raise QueueError(f"a queue of {size} entries is larger than its table of heads in flight")
    settled = table[_SETTLED]
    count = next_used - settled & U16
    if count > size:
        raise QueueError(f"{count} chains were given back by a device that had begun {size} at the most")
    elements = used[4:].cast("Q")
    for position in range(settled, settled + count):
        head = elements[position & size - 1] & U32
        if head < size:
            table[_HEADS + head] = 0
    table[_SETTLED] = next_used
    begun = sorted([(table[_HEADS + head], head) for head in range(size) if table[_HEADS + head]])
    again = tuple([head for _, head in begun])
    return Recovered(next_used + len(again) & U16, next_used, again)


class TrackedQueue(Queue):
    """A queue whose chains may be given back in any order, and outlive the process that has taken them.

    Those that another process had begun are taken first, once more.
    """

    __slots__ = ("_again", "_last", "_order", "_repeated", "_in_flight", "_unsettled")

    def __init__(
        self, memory: GuestMemory, features: int, state: QueueState, table: memoryview, again: Sequence[int] = ()
    ) -> None:
        """Raises GuestMemoryError."""
        super().__init__(memory, features, state)
        heads = range(_HEADS, _HEADS + state.size)
        if not again:
            for word in heads:
                table[word] = 0
            table[_SETTLED] = state.next_used
        self._in_flight = table
        #: What another process had begun and is still to be taken.
        self._again = list(again)
        self._order = max([table[word] for word in heads])
        #: The head that was taken last, and whether it is one of those.
        self._last = 0
        self._repeated = False
        #: Given back, and not shown to the driver yet.
        self._unsettled: list[int] = []

    def pop(self) -> Chain | None:
        """As Queue.pop(); the head is in the table before anybody begins with it."""
        if self._again:
            self._repeated = True
            self._last = self._again.pop(0)
            return self.chain(self._last)
        if not self.waiting():
            return None
        head = self.available[RING + (self.next_available & self.mask)]
        if head >= self.size:
            raise QueueError(f"descriptor {head} of a table of {self.size}")
        if self._in_flight[_HEADS + head]:
            raise QueueError(f"the chain {head} is made available while it is in flight")
        self._repeated = False
        self._last = head
        self._order += 1
        self._in_flight[_HEADS + head] = self._order
        self.next_available = self.next_available + 1 & U16
        return self.chain(head)

    def undo_pop(self) -> None:
        """As Queue.undo_pop()."""
        if self._repeated:
            self._again.insert(0, self._last)
        else:
            self._in_flight[_HEADS + self._last] = 0
            super().undo_pop()

    def add_used(self, chain: Chain, written: int) -> None:
        """As Queue.add_used()."""
        super().add_used(chain, written)
        self._unsettled.append(chain.head)

    def publish(self) -> bool:
        """As Queue.publish(); what the driver was shown leaves the table afterwards."""
        wanted = super().publish()
        if self._unsettled:
            for head in self._unsettled:
                self._in_flight[_HEADS + head] = 0
            self._in_flight[_SETTLED] = self.next_used
            self._unsettled.clear()
        return wanted
