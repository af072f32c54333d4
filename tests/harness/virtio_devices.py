"""A virtio device with a driver, a loop and a record of what the transport is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from base.event_manager import EventManager
from ipc.guest_memory import GuestMemory
from tests.harness.event_loop import run_until
from tests.harness.virtqueues import RINGS, TABLES, guest_memory
from virtio.abi import VIRTIO_BLK_F_RO
from virtio.device import Activation, VirtioDevice
from virtio.driver import Buffer, Driver, Used, lay_out
from virtio.queue import Queue, QueueConfig, restore_queue

#: Between the rings of one queue and those of the next.
RINGS_STEP = 0x4000


class Notifications:
    """What a device says to its transport."""

    def __init__(self) -> None:
        self.used_count = 0
        self.config_count = 0
        self.resets: list[str] = []

    def used(self, queue: int) -> None:
        assert queue >= 0
        self.used_count += 1

    def config_changed(self) -> None:
        self.config_count += 1

    def needs_reset(self, reason: str) -> None:
        self.resets.append(reason)


class Bench:
    """One device, its driver's queues, and the loop that it lives in."""

    def __init__(
        self, device: VirtioDevice, memory: GuestMemory, features: int | None = None, size: int | None = None
    ) -> None:
        self.device = device
        self.memory = memory
        self.notify = Notifications()
        self.events = EventManager()
        self.number = self.events.add_subscriber(device)
        self.features = device.features() & ~VIRTIO_BLK_F_RO if features is None else features
        self.configs: list[QueueConfig] = []
        self.drivers: list[Driver] = []
        for index, largest in enumerate(device.queue_sizes):
            config = QueueConfig(largest)
            config.size = largest if size is None else size
            assert lay_out(config, RINGS + RINGS_STEP * index) <= TABLES
            self.configs.append(config)
            tables = TABLES if index == 0 else 0
            self.drivers.append(Driver(memory, config, self.features, tables))
        self.driver = self.drivers[0]
        self.queues: tuple[Queue, ...] = tuple(config.ready(memory, self.features) for config in self.configs)

    def activate(self) -> None:
        """Begin, or go on."""
        assert self.device.activate(Activation(self.memory, self.queues, self.features, self.notify)) is None

    def stop(self) -> None:
        """Stop, and wait until that is done."""
        deferral = self.device.stop()
        if deferral is not None:
            run_until(self.events, lambda: deferral.done)

    def restart(self) -> None:
        """Stop, and go on with queues that are made of their state."""
        self.stop()
        self.queues = tuple(
            restore_queue(self.memory, self.features, queue.state(), config.max_size)
            for queue, config in zip(self.queues, self.configs, strict=True)
        )
        self.activate()

    def kick(self) -> None:
        """Publish what was added, and notify the device if it wants to know."""
        if self.driver.publish():
            self.device.notified(0)

    def request(self, buffers: list[Buffer], *, indirect: bool = False) -> Used:
        """Add one chain, wait until it comes back, and forget it."""
        head = self.driver.add(buffers, indirect=indirect)
        self.driver.arm()
        self.kick()
        found: list[Used] = []

        def done() -> bool:
            found.extend(self.driver.take_used())
            return bool(found)

        run_until(self.events, done)
        assert [used.head for used in found] == [head]
        self.driver.free(head)
        return found[0]

    def settle(self) -> list[Used]:
        """Run until every chain that was offered has come back; return them."""
        found: list[Used] = []

        def done() -> bool:
            found.extend(self.driver.take_used())
            return not self.driver._offered

        self.kick()
        run_until(self.events, done)
        return found

    def close(self) -> None:
        self.stop()
        self.device.close()
        self.events.remove_subscriber(self.number)
        self.events.close()


@contextmanager
def bench(device: VirtioDevice, *, features: int | None = None, size: int | None = None) -> Iterator[Bench]:
    """A device that is active."""
    with guest_memory() as memory:
        made = Bench(device, memory, features, size)
        made.activate()
        try:
            yield made
        finally:
            made.close()
