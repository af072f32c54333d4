"""The flat loop in C: the same as :mod:`virtio.block.flat`, without the interpreter lock.

Optional (base.native_loops); docs/adr/block-loop-in-c.md has the reasons and the figures.
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, Callable, NamedTuple
from virtio.block.flat import Drive, flat_loop
from virtio.block.tally import Sums
from virtio.errors import QueueError
from virtio.queue import Queue

if TYPE_CHECKING:
    from types import ModuleType


class NativeLoop(NamedTuple):
    """``serve`` and ``arm`` as those of the flat loop and the queue; ``take``: reads and writes since the last time."""

    serve: Callable[[int], int]
    arm: Callable[[], bool]
    take: Callable[[], tuple[Sums, Sums]]


def native_loop(loops: ModuleType, device: Drive, queue: Queue, number: int) -> NativeLoop:
    """Return the loop of a queue, until guest memory's regions, the file or the size of the drive change.

    While dirty pages are tracked the flat loop serves: it knows how to mark them.
    """
    activation = device.activation
    assert activation is not None
    memory, file, state = activation.memory, device.engine.file, queue.state()
    rings = (state.descriptor_table, state.available_ring, state.used_ring, queue.size)
    drive = (file.fd, device.sectors, device.read_only)
    # A view of its own: the one that GuestMemory has can be released.
    loop = loops.BlockLoop(memory.view[:], memory.spans, queue, *rings, queue.event_idx, queue.indirect, *drive)
    begin: Callable[[int], int] = loop.serve
    go_on: Callable[[], int] = loop.go_on
    wanted: int = loops.WANTED
    broken: int = loops.BROKEN
    notify_used, serve_head, flat = activation.notify.used, device.serve_head, flat_loop(device, queue, number)

    def serve(budget: int) -> int:
        if memory.tracks_dirty:
            return flat(budget)
        result = begin(budget)
        while result < 0:
            if result == broken:
                raise QueueError(f"more than {queue.size} chains were made available in a queue of that size")
            serve_head(queue, number, -1 - result)
            result = go_on()
        if result >= wanted:
            notify_used(number)
            return result - wanted
        return result

    return NativeLoop(serve, loop.arm, loop.take)
