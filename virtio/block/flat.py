"""The common request in one loop: what plain Python can do fastest.

It is recognised by comparing whole 64-bit words: an indirect table of three descriptors in order, a header of 16 bytes,
one buffer of whole sectors, a status of one byte. No object is made for a descriptor, one ``unpack_from`` reads the
table; everything that is not this goes to the structured path, which also says what is wrong. It is for an engine that
is done at once; docs/adr/flat-block-loop.md has the figures.
"""

from __future__ import annotations

import os
from struct import Struct
from time import monotonic_ns

from base.lean_typing import Callable, Protocol
from ipc.errors import GuestMemoryError
from ipc.guest_memory import GuestMemory
from ipc.schema import U16
from virtio.abi import (
    SECTOR_SHIFT,
    SECTOR_SIZE,
    VIRTIO_BLK_REQ_SIZE,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    VIRTQ_DESC_SIZE,
    WORD_NEXT,
    WORD_NEXT_SHIFT,
)
from virtio.block.engine import Engine
from virtio.block.tally import Tally
from virtio.device import Activation
from virtio.errors import QueueError
from virtio.queue import INDEX, RING, Queue

#: addr, len, flags of a descriptor.
_read_descriptor = Struct("<QIH2x").unpack_from
_TABLE_SIZE = 3 * VIRTQ_DESC_SIZE
#: Of a table of three: the header's descriptor as two words; addr, len, and flags with next, of the data's; addr, len,
#: flags of the status'.
_read_table = Struct("<QQ QII QIH2x").unpack_from
#: type, sector.
_read_header = Struct("<I4xQ").unpack_from

_HEADER = VIRTIO_BLK_REQ_SIZE | WORD_NEXT | 1 << WORD_NEXT_SHIFT
# The data's flags and next.
_DATA_IN = VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_WRITE | 2 << 16
_DATA_OUT = VIRTQ_DESC_F_NEXT | 2 << 16
_PART_OF_SECTOR = SECTOR_SIZE - 1
_NEVER = -1


class Drive(Protocol):
    """What the loop has to know of a block device."""

    activation: Activation | None
    engine: Engine
    read_only: bool
    sectors: int
    reads: Tally
    writes: Tally

    def serve_head(self, queue: Queue, number: int, head: int) -> None:
        """Serve a chain that is not the common request. Raises VirtioError."""


def flat_loop(device: Drive, queue: Queue, number: int) -> Callable[[int], int]:
    """Return a function that serves at most so many chains of a queue that wait, and returns how many it has served.

    It raises VirtioError. What it works with are variables of the functions around it: a batch of one pays for each
    that it would have to load.
    """
    activation = device.activation
    assert activation is not None
    notify_used, available, size = activation.notify.used, queue.available, queue.size
    batch, publish, clock = _batch(device, queue, number), queue.publish, monotonic_ns
    count_reads, count_writes = device.reads.add, device.writes.add

    def serve(budget: int) -> int:
        first = queue.next_available
        count = available[INDEX] - first & U16
        if not count:
            return 0
        if count > size:
            raise QueueError(f"{count} chains were made available in a queue of {size}")
        count = min(count, budget)
        begun = clock()
        to_used = queue.next_used - first
        reads, read_bytes, writes, written_bytes = batch(first, count, to_used)
        queue.next_available = first + count & U16
        queue.next_used = first + count + to_used & U16
        if publish():
            notify_used(number)
        elapsed = clock() - begun
        if reads:
            count_reads(reads, read_bytes, elapsed)
        if writes:
            count_writes(writes, written_bytes, elapsed)
        return count

    return serve


def _low_end(memory: GuestMemory) -> int:
    """Return up to where an address is its own offset; beyond, GuestMemory says where it is, or that it is nowhere."""
    start, end, shift = memory.spans[0]
    return end if start == shift == 0 else 0


def _batch(device: Drive, queue: Queue, number: int) -> Callable[[int, int, int], tuple[int, int, int, int]]:  # noqa: PLR0915
    """Return a function that serves the chains from position ``first`` on, and returns what to count."""
    assert device.activation is not None
    memory = device.activation.memory
    view, translate, mark_dirty, serve_head = memory.view, memory.translate, memory.mark_dirty, device.serve_head
    preadv, pwritev, fd, sectors = os.preadv, os.pwritev, device.engine.file.fd, device.sectors
    available, used_elements, mask, size = queue.available, queue.used_elements, queue.mask, queue.size
    descriptors = translate(queue.state().descriptor_table, VIRTQ_DESC_SIZE * size)
    table_size = _TABLE_SIZE if queue.indirect else _NEVER
    data_out = _NEVER if device.read_only else _DATA_OUT
    low_end = _low_end(memory)
    last_table, last_header = low_end - _TABLE_SIZE, low_end - VIRTIO_BLK_REQ_SIZE

    def batch(first: int, count: int, to_used: int) -> tuple[int, int, int, int]:
        tracks_dirty = memory.tracks_dirty
        reads = read_bytes = writes = written_bytes = 0
        for position in range(first, first + count):
            head = available[RING + (position & mask)]
            try:
                table, length, flags = _read_descriptor(view, descriptors + VIRTQ_DESC_SIZE * (head & mask))
                if length == table_size and flags == VIRTQ_DESC_F_INDIRECT and head < size:
                    table = table if table <= last_table else translate(table, _TABLE_SIZE)
                    header, header_word, data, length, shape, status, one, flags = _read_table(view, table)
                    if header_word == _HEADER and one == 1 and flags == VIRTQ_DESC_F_WRITE and length:
                        header = header if header <= last_header else translate(header, VIRTIO_BLK_REQ_SIZE)
                        kind, sector = _read_header(view, header)
                        if not length & _PART_OF_SECTOR and sector + (length >> SECTOR_SHIFT) <= sectors:
                            end = data + length
                            if end > low_end:
                                data = translate(data, length)
                                end = data + length
                            if status >= low_end:
                                status = translate(status, 1)
                            element = 0
                            if kind == VIRTIO_BLK_T_IN and shape == _DATA_IN:
                                if preadv(fd, (view[data:end],), sector << SECTOR_SHIFT) == length:
                                    element = head | length + 1 << 32
                                    reads += 1
                                    read_bytes += length
                            elif kind == VIRTIO_BLK_T_OUT and shape == data_out:  # noqa: SIM102  (two questions)
                                if pwritev(fd, (view[data:end],), sector << SECTOR_SHIFT) == length:
                                    element = head | 1 << 32
                                    writes += 1
                                    written_bytes += length
                            if element:
                                view[status] = VIRTIO_BLK_S_OK
                                used_elements[position + to_used & mask] = element
                                if tracks_dirty:
                                    mark_dirty(data, length)
                                    mark_dirty(status, 1)
                                continue
            except (IndexError, GuestMemoryError, OSError):
                pass  # the structured path says what it was
            queue.next_available = position + 1 & U16
            queue.next_used = position + to_used & U16
            serve_head(queue, number, head)
        return reads, read_bytes, writes, written_bytes

    return batch
