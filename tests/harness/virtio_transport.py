"""A virtio-mmio device of the manager, and a driver that writes its registers as a guest would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from base.counters import Counters
from base.deferral import Deferral
from base.event_manager import EventOps
from ipc.guest_memory import GuestMemory
from tests.harness.devices import routes_at_once
from tests.harness.virtqueues import RINGS, guest_memory
from virtio.abi import VIRTIO_F_VERSION_1, VIRTIO_ID_ENTROPY
from virtio.device import Activation, VirtioDevice
from virtio.driver import Driver, lay_out
from virtio.entropy import Entropy
from virtio.queue import QueueConfig
from vmm.devices.manager import DeviceManager
from vmm.devices.transport.mmio import MmioTransport

DEVICE_STATUS, FEATURES, FEATURES_SELECT, ACK = 0x70, 0x20, 0x24, 0x64


class TestDevice(VirtioDevice):
    """Does what a test says: ``fails`` names the call that raises, ``later`` the calls that take effect later."""

    __test__ = False
    kind = VIRTIO_ID_ENTROPY
    SECTION = Entropy.SECTION

    def __init__(self, queues: int = 1, config: bytes = b"") -> None:
        super().__init__("test", (256,) * queues, Counters(""))
        self.space = bytearray(config)
        self.calls: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.later: dict[str, Deferral] = {}
        self.served: list[int] = []

    def _called(self, name: str) -> Deferral | None:
        self.calls.append(name)
        if name in self.fails:
            raise self.fails[name]
        return self.later.get(name)

    def features(self) -> int:
        return VIRTIO_F_VERSION_1

    def config(self) -> bytes:
        return bytes(self.space)

    def write_config(self, offset: int, data: bytes) -> None:
        self._called("write_config")
        self.space[offset : offset + len(data)] = data[: max(0, len(self.space) - offset)]

    def activate(self, activation: Activation) -> Deferral | None:
        begun = self._called("activate")
        self.activation = activation
        return begun

    def stop(self) -> Deferral | None:
        begun = self._called("stop")
        self.activation = None
        return begun

    def reset(self) -> None:
        self._called("reset")

    def close(self) -> None:
        self._called("close")

    def init(self, ops: EventOps) -> None:
        self.loop = ops

    def serve(self, queue: int) -> None:
        self._called("serve")
        self.served.append(queue)


class Attached:
    """A manager with one device, and what it has logged."""

    def __init__(self, device: VirtioDevice, memory: GuestMemory) -> None:
        self.log: list[str] = []
        self.memory = memory
        self.device: Any = device
        self.manager = DeviceManager(
            transmit=lambda _: None, reset=lambda: None, set_routes=routes_at_once, log=self.log.append
        )
        self.transport: MmioTransport = self.manager.attach_virtio(device, memory)

    def write(self, offset: int, value: int, size: int = 4) -> Deferral | None:
        return self.manager.mmio.write(self.transport.address + offset, size, value)

    def read(self, offset: int, size: int = 4) -> int:
        return self.manager.mmio.read(self.transport.address + offset, size)

    def negotiate(self) -> None:
        """Up to FEATURES_OK."""
        for status in (0, 1, 3):
            self.write(DEVICE_STATUS, status)
        for half in (0, 1):
            self.write(FEATURES_SELECT, half)
            self.write(FEATURES, VIRTIO_F_VERSION_1 >> 32 * half & 0xFFFF_FFFF)
        self.write(DEVICE_STATUS, 11)
        assert self.read(DEVICE_STATUS) == 11

    def set_queue(self, number: int = 0, size: int = 8) -> QueueConfig:
        config = QueueConfig(256)
        config.size = size
        lay_out(config, RINGS + 0x1000 * number)
        Driver(self.memory, config, VIRTIO_F_VERSION_1)
        self.write(0x30, number)
        self.write(0x38, size)
        for offset, address in (
            (0x80, config.descriptor_table),
            (0x90, config.available_ring),
            (0xA0, config.used_ring),
        ):
            self.write(offset, address & 0xFFFF_FFFF)
            self.write(offset + 4, address >> 32)
        self.write(0x44, 1)
        return config

    def start(self) -> Deferral | None:
        """The whole way to DRIVER_OK."""
        self.negotiate()
        for number in range(len(self.device.queue_sizes)):
            self.set_queue(number)
        return self.write(DEVICE_STATUS, 15)

    def edges(self) -> int:
        return self.transport.line.triggers


@contextmanager
def attached(device: VirtioDevice | None = None) -> Iterator[Attached]:
    with guest_memory() as memory:
        made = Attached(device or TestDevice(), memory)
        try:
            yield made
        finally:
            made.manager.close()
