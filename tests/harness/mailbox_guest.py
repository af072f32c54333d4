"""Drivers of virtio devices in a running machine: rings by this process, registers by the guest mailbox.S.

What the device has done is seen in guest memory, which this process maps, too: also of a machine that was killed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Self

from ipc.guest_memory import GuestMemory
from tests.harness.jail import descriptors, wait_for
from virtio import abi
from virtio.driver import Buffer, Driver, Used, lay_out
from virtio.queue import QueueConfig
from vmm.layout import VIRTIO_MMIO_ADDRESS, VIRTIO_MMIO_SIZE, ram_regions

MAILBOX = 0x81000
ANSWER = 0x81010
REPEAT = 0x81040
INTERRUPTS = 0x81080
WRITE, REPEATS, END, READ = 1, 2, 3, 4
VECTOR = 0x50
FIRST_GSI = 5
IOAPIC = 0xFEC00000
#: Each window has so much of guest memory for rings, tables and buffers, from ROOM on.
ROOM = 0x400000
ROOM_SIZE = 0x800000
TABLES = 0x40000
BUFFERS = 0x200000
QUEUE_SIZE = 64
NO_STATUS = 0xEE


class Interrupts(NamedTuple):
    """What the guest has counted for a window."""

    all: int
    config_changes: int


class Repeated(NamedTuple):
    """What the guest has counted while it repeated requests."""

    chains: int
    kicks: int
    waits: int


class MailboxGuest:
    """The guest of the controller with this pid."""

    def __init__(self, controller: int, size: int = 64 << 20) -> None:
        self.memory = GuestMemory(_guest_memory(controller), size, ram_regions(size))
        self._number = self._word(MAILBOX)

    def _word(self, address: int) -> int:
        return int.from_bytes(self.memory.read(address, 4), "little")

    def post(self, operation: int, address: int = 0, value: int = 0) -> None:
        """Ask for an operation; do not wait."""
        self._number += 1
        self.memory.write(MAILBOX + 4, struct.pack("<3I", operation, address, value))
        self.memory.write(MAILBOX, struct.pack("<I", self._number))

    @property
    def answered(self) -> bool:
        """Whether the last operation is done."""
        return self._word(ANSWER) == self._number

    def ask(self, operation: int, address: int = 0, value: int = 0) -> int:
        """Have an operation done; return what was read."""
        self.post(operation, address, value)
        wait_for(lambda: self.answered, "the guest's answer")
        return self._word(ANSWER + 4)

    def read(self, address: int) -> int:
        """Read 32 bits of a register."""
        return self.ask(READ, address)

    def write(self, address: int, value: int) -> None:
        """Write 32 bits to a register."""
        self.ask(WRITE, address, value)

    def interrupts(self, window: int) -> Interrupts:
        """Return how often a window has interrupted."""
        return Interrupts(*struct.unpack("<2I", self.memory.read(INTERRUPTS + 8 * window, 8)))

    def end(self) -> None:
        """End the machine, by the guest."""
        self.post(END)

    def close(self) -> None:
        """Give its memory back."""
        self.memory.close()


def _guest_memory(controller: int) -> int:
    def found() -> int | None:
        for number, target in descriptors(controller).items():
            if target.startswith("/memfd:guest-memory"):
                with suppress(FileNotFoundError):
                    return os.open(f"/proc/{controller}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        return None

    fd: int = wait_for(found, "guest memory")
    return fd


class MmioDriver:
    """The driver of the device in one window."""

    def __init__(self, guest: MailboxGuest, window: int = 0) -> None:
        self.guest = guest
        self.window = window
        self.base = VIRTIO_MMIO_ADDRESS + VIRTIO_MMIO_SIZE * window
        self.room = ROOM + ROOM_SIZE * window
        self.features = 0
        self.queues: list[Driver] = []
        self.configs: list[QueueConfig] = []

    def read(self, offset: int) -> int:
        """Read a register."""
        return self.guest.read(self.base + offset)

    def write(self, offset: int, value: int) -> None:
        """Write a register."""
        self.guest.write(self.base + offset, value)

    def offered(self) -> int:
        """Return the features that the device offers."""
        words = []
        for half in (0, 1):
            self.write(0x14, half)
            words.append(self.read(0x10))
        return words[0] | words[1] << 32

    def config(self, offset: int = 0) -> int:
        """Read 64 bits of the configuration space."""
        return self.read(0x100 + offset) | self.read(0x104 + offset) << 32

    def begin(self, without: int = 0, queues: int = 1) -> Self:
        """Reset the device and set it up: with all features but some, interrupts, and so many queues."""
        gsi, guest = FIRST_GSI + self.window, self.guest
        for register, value in ((0x10 + 2 * gsi + 1, 0), (0x10 + 2 * gsi, VECTOR + self.window)):
            guest.write(IOAPIC, register)
            guest.write(IOAPIC + 0x10, value)
        for status in (0, 1, 3):
            self.write(0x70, status)
        self.features = self.offered() & ~without
        for half in (0, 1):
            self.write(0x24, half)
            self.write(0x20, self.features >> 32 * half & 0xFFFF_FFFF)
        self.write(0x70, 11)
        assert self.read(0x70) == 11, "the features were refused"
        self.queues, self.configs = [], []
        for queue in range(queues):
            self._set_up(queue)
        self.write(0x70, 15)
        assert self.read(0x70) == 15, "the device could not be activated"
        return self

    def _set_up(self, queue: int) -> None:
        self.write(0x30, queue)
        config = QueueConfig(self.read(0x34))
        config.size = QUEUE_SIZE
        lay_out(config, self.room + 0x4000 * queue)
        self.configs.append(config)
        tables = self.room + TABLES + 16 * QUEUE_SIZE * QUEUE_SIZE * queue
        self.queues.append(Driver(self.guest.memory, config, self.features, tables))
        self.write(0x38, QUEUE_SIZE)
        for offset, address in (
            (0x80, config.descriptor_table), (0x90, config.available_ring), (0xA0, config.used_ring),
        ):  # fmt: skip
            self.write(offset, address)
            self.write(offset + 4, 0)
        self.write(0x44, 1)

    def publish(self, queue: int = 0) -> None:
        """Let the device see what was offered."""
        if self.queues[queue].publish():
            self.write(0x50, queue)

    def take(self, count: int, queue: int = 0) -> list[Used]:
        """Wait until so many chains have come back."""
        found: list[Used] = []

        def done() -> bool:
            found.extend(self.queues[queue].take_used())
            return len(found) >= count

        wait_for(done, lambda: f"{count} chains, {len(found)} came back")
        return found

    def repeat(self, count: int, until: Callable[[Repeated], bool] | None = None) -> Repeated:
        """Let the guest offer every chain again that comes back in queue 0, of those that were offered here.

        It ends after ``count`` chains, or when ``until`` says so. Nothing can be asked for after that but a reset.
        """
        config, memory, queue = self.configs[0], self.guest.memory, self.queues[0]
        seen = queue.next_used
        memory.write(
            REPEAT, struct.pack("<10I", config.available_ring, config.used_ring, config.size, count, *[0] * 4, seen, 0)
        )
        self.publish()
        self.guest.post(REPEATS)
        wait_for(
            lambda: self.guest.answered or (until is not None and until(self.repeated())), "repeated requests", 120
        )
        return self.repeated()

    def repeated(self) -> Repeated:
        """Return what the guest has counted."""
        return Repeated(*struct.unpack("<3I", self.guest.memory.read(REPEAT + 20, 12)))


class BlockDriver(MmioDriver):
    """The driver of a block device. Request ``slot`` has its own header, status and 64 KiB buffer."""

    @property
    def sectors(self) -> int:
        """How large the device says that it is."""
        return self.config()

    def buffer(self, slot: int = 0) -> int:
        """Return the guest address of a slot's data."""
        return self.room + BUFFERS + 0x10000 * slot

    def _header(self, slot: int) -> int:
        return self.room + BUFFERS - 0x10000 + 0x20 * slot

    def write_request(self, type: int, sector: int, length: int, slot: int = 0, queue: int = 0) -> int:
        """Write the chain of a request with ``length`` bytes of data; return its head."""
        header, memory = self._header(slot), self.guest.memory
        memory.write(header, abi.VIRTIO_BLK_REQ.pack(type, 0, sector))
        memory.write(header + 16, bytes([NO_STATUS]))
        writable = type in (abi.VIRTIO_BLK_T_IN, abi.VIRTIO_BLK_T_GET_ID)
        data = [Buffer(self.buffer(slot), length, writable)] if length else []
        chain = [Buffer(header, 16), *data, Buffer(header + 16, 1, True)]
        return self.queues[queue].write_chain(chain, indirect=True)

    def status(self, slot: int = 0) -> int:
        """Return the status of a slot's request."""
        return self.guest.memory.read(self._header(slot) + 16, 1)[0]

    def ask(self, type: int, sector: int, length: int, queue: int = 0) -> int:
        """Do one request; return its status."""
        head = self.write_request(type, sector, length, queue=queue)
        self.queues[queue].offer(head)
        self.publish(queue)
        self.take(1, queue)
        self.queues[queue].free(head)
        return self.status()

    def read_sectors(self, sector: int, count: int = 1, queue: int = 0) -> bytes:
        """Read; the request must succeed."""
        status = self.ask(abi.VIRTIO_BLK_T_IN, sector, count << 9, queue)
        assert status == abi.VIRTIO_BLK_S_OK, f"read of sector {sector}: status {status}"
        return self.guest.memory.read(self.buffer(), count << 9)

    def write_sectors(self, sector: int, data: bytes, queue: int = 0) -> int:
        """Write; return the status."""
        self.guest.memory.write(self.buffer(), data)
        return self.ask(abi.VIRTIO_BLK_T_OUT, sector, len(data), queue)

    def flush(self) -> int:
        """Have everything written on stable storage; return the status."""
        return self.ask(abi.VIRTIO_BLK_T_FLUSH, 0, 0)

    def identity(self) -> bytes:
        """Return the answer to GET_ID."""
        assert self.ask(abi.VIRTIO_BLK_T_GET_ID, 0, abi.VIRTIO_BLK_ID_SIZE) == abi.VIRTIO_BLK_S_OK
        return self.guest.memory.read(self.buffer(), abi.VIRTIO_BLK_ID_SIZE)

    def zero(self, type: int, segments: Sequence[tuple[int, int, int]]) -> int:
        """DISCARD or WRITE_ZEROES of (sector, count, flags); return the status."""
        data = b"".join(abi.VIRTIO_BLK_SEGMENT.pack(*each) for each in segments)
        self.guest.memory.write(self.buffer(), data)
        return self.ask(type, 0, len(data))
