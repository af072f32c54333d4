"""A device cell without a machine: one block device in a process of its own, as bench/block_pair.py starts it.

``python -m bench.block_cell LOOP ENGINE LOOK_US FILE MEMORY KICK CALL``; the last three are descriptors that are
inherited. LOOP is flat or native. Prints "ready" when it serves, until it is killed.
"""

from __future__ import annotations

import gc
import os
import sys

from base import native_loops
from base.event_manager import EDGE_TRIGGERED, IN, EventManager, EventOps
from ipc.guest_memory import GuestMemory
from ipc.messages.records import MemoryRegion
from virtio.block.backing_file import open_backing_file
from virtio.block.configuration import BlockSettings
from virtio.block.device import Block
from virtio.block.engines import make_engine
from virtio.device import Activation
from virtio.driver import lay_out
from virtio.queue import QueueConfig

QUEUE_SIZE = 256
RINGS = 0x1000


class Line:
    """The interrupt's eventfd."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def used(self, _queue: int) -> None:
        """Interrupt the driver."""
        os.eventfd_write(self._fd, 1)

    def config_changed(self) -> None:
        """Nothing changes here."""

    def needs_reset(self, reason: str) -> None:
        """The benchmark is wrong."""
        sys.exit(reason)


class Kicked(Block):
    """The device, with the descriptor that its driver notifies it by."""

    kick = -1

    def init(self, ops: EventOps) -> None:
        """Watch it: edge-triggered, and never read."""
        super().init(ops)
        ops.watch(self.kick, IN | EDGE_TRIGGERED, lambda _: self.notified(0))


def queue_config() -> QueueConfig:
    """Return where the queue lies."""
    config = QueueConfig(QUEUE_SIZE)
    lay_out(config, RINGS)
    return config


def main() -> None:
    """Serve."""
    loop, engine, look_us, path = sys.argv[1:5]
    descriptor, kick, call = map(int, sys.argv[5:8])
    if loop == "native" and native_loops.load() is None:
        sys.exit("the C extension is not built")
    size = os.fstat(descriptor).st_size
    memory = GuestMemory(descriptor, size, (MemoryRegion(0, size, 0),))
    settings = BlockSettings(look_ns=int(look_us) * 1000)
    device = Kicked("drive", make_engine(engine, open_backing_file(path, read_only=False)), settings)
    device.kick = kick
    events = EventManager()
    events.add_subscriber(device)
    features = device.features()
    device.activate(Activation(memory, (queue_config().ready(memory, features),), features, Line(call)))
    gc.freeze()
    gc.disable()
    print("ready", flush=True)
    while True:
        events.run(-1)


if __name__ == "__main__":
    main()
