"""virtio-mmio (virtio 1.2, 4.2): a page of registers, a doorbell for each queue, one edge-triggered interrupt.

The register page is the truth: the guest reads it without an exit, since KVM shows it read-only (MemorySlot), and each
write is answered after the page was brought up to date. docs/formats/device-page.md.
"""

from __future__ import annotations

import os

from base.deferral import Deferral
from base.lean_typing import Callable, NamedTuple
from ipc.device_pages import REGISTER_PAGE_SIZE
from ipc.guest_memory import GuestMemory
from ipc.schema import U16, U32, U64, Int, RecordOf, Section, Text
from ipc.shared_event import raise_event
from virtio.device import VirtioDevice
from vmm.devices.bus import Device
from vmm.devices.interrupts import InterruptLine
from vmm.devices.transport import registers as common
from vmm.devices.transport.lifecycle import Guard, Transport
from vmm.devices.transport.registers import INTERRUPT_USED_BUFFER, REGISTERS_STATE, RegistersState
from vmm.devices.vms import Doorbell

MAGIC = 0x7472_6976  # "virt"
VERSION = 2
VENDOR = 0

MAGIC_VALUE_OFFSET = 0x000
VERSION_OFFSET = 0x004
DEVICE_ID_OFFSET = 0x008
VENDOR_ID_OFFSET = 0x00C
QUEUE_NOTIFY = 0x050
INTERRUPT_ACK = 0x064
#: Length and address of a shared memory region: there is none, which all ones say.
SHARED_MEMORY = (0x0B0, 0x0B4, 0x0B8, 0x0BC)
CONFIG_GENERATION = 0x0FC
CONFIG = 0x100
CONFIG_SIZE = REGISTER_PAGE_SIZE - CONFIG

#: Offset → register that the driver may write.
WRITABLE = {
    0x014: common.DEVICE_FEATURES_SELECT,
    0x020: common.DRIVER_FEATURES,
    0x024: common.DRIVER_FEATURES_SELECT,
    0x030: common.QUEUE_SELECT,
    0x038: common.QUEUE_SIZE,
    0x044: common.QUEUE_READY,
    INTERRUPT_ACK: common.INTERRUPT_ACKNOWLEDGE,
    0x070: common.STATUS,
    0x080: common.QUEUE_DESCRIPTOR_TABLE_LOW,
    0x084: common.QUEUE_DESCRIPTOR_TABLE_HIGH,
    0x090: common.QUEUE_AVAILABLE_RING_LOW,
    0x094: common.QUEUE_AVAILABLE_RING_HIGH,
    0x0A0: common.QUEUE_USED_RING_LOW,
    0x0A4: common.QUEUE_USED_RING_HIGH,
}
#: Index of a 32-bit word of the page → register that it shows.
SHOWN = {
    0x010 // 4: common.DEVICE_FEATURES,
    0x034 // 4: common.QUEUE_SIZE_MAX,
    0x044 // 4: common.QUEUE_READY,
    0x060 // 4: common.INTERRUPT_STATUS,
    0x070 // 4: common.STATUS,
    CONFIG_GENERATION // 4: common.CONFIG_GENERATION,
}


class MmioState(NamedTuple):
    """``kind`` is VIRTIO_ID_*, ``id`` the device's, ``address`` and ``gsi`` where the guest has found it."""

    kind: int
    id: str
    address: int
    gsi: int
    registers: RegistersState


class MmioResources(NamedTuple):
    """Where the guest finds a device; ``acknowledged`` is an eventfd that nobody reads, which may be everybody's."""

    address: int
    line: InterruptLine
    acknowledged: int


class MmioTransport(Transport, Device):
    """One device at a guest address; ``page`` is its register page."""

    SECTION = Section(
        "virtio-mmio",
        1,
        RecordOf(MmioState, kind=Int(U16), id=Text(64), address=Int(U64), gsi=Int(U32), registers=REGISTERS_STATE),
    )

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        page: memoryview,
        resources: MmioResources,
        *,
        guard: Guard,
        log: Callable[[str], None],
        state: RegistersState | None = None,
    ) -> None:
        super().__init__(device, memory, guard=guard, log=log, state=state)
        self.address, self.line, self._acknowledged = resources
        self._bytes = page
        self._words = page.cast("I")
        self._config = page[CONFIG:].cast("Q")
        #: One of each queue: a write of its number to QueueNotify counts there.
        self.kicks = tuple([os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in device.queue_sizes])
        words = self._words
        words[MAGIC_VALUE_OFFSET // 4] = MAGIC
        words[VERSION_OFFSET // 4] = VERSION
        words[DEVICE_ID_OFFSET // 4] = device.kind
        words[VENDOR_ID_OFFSET // 4] = VENDOR
        for offset in SHARED_MEMORY:
            words[offset // 4] = U32
        self._show_config()
        self.publish()

    def doorbells(self) -> tuple[Doorbell, ...]:
        """Return what KVM is to answer by itself: notifications, and acknowledgements of used buffers alone."""
        notify = self.address + QUEUE_NOTIFY
        return (
            *[Doorbell(notify, 4, queue, kick) for queue, kick in enumerate(self.kicks)],
            Doorbell(self.address + INTERRUPT_ACK, 4, INTERRUPT_USED_BUFFER, self._acknowledged),
        )

    # ------------------------------------------------------------ the bus

    def read(self, offset: int, size: int) -> int:
        """Read the page, where it is not mapped."""
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> Deferral | None:
        """Write to a register, 32 bits, or to the configuration space; all else is ignored."""
        if offset >= CONFIG:
            self._write_config(offset - CONFIG, value.to_bytes(size, "little"))
        elif size == 4:
            if offset == QUEUE_NOTIFY:
                self._notify(value)
            elif (register := WRITABLE.get(offset)) is not None:
                return self.write_register(register, value)
        return None

    def _notify(self, queue: int) -> None:
        """A notification that KVM did not take."""
        if queue < len(self.kicks):
            raise_event(self.kicks[queue])

    def _write_config(self, offset: int, data: bytes) -> None:
        if self.registers.takes_config():
            self.call(lambda: self.device.write_config(offset, data))
            self._show_config()

    # ------------------------------------------------------------ the page

    def publish(self) -> None:
        """Bring the page up to date; each word by one store."""
        words, read = self._words, self.registers.read
        for index, register in SHOWN.items():
            words[index] = read(register)

    def publish_config(self) -> None:
        """Show the configuration space as it is now.

        The generation changes before and after, so that a driver that has read any part of it in between reads again.
        One that has read all of it meanwhile has the interrupt that follows.
        """
        for step in (self._show_config, lambda: None):
            self.registers.next_generation()
            self._words[CONFIG_GENERATION // 4] = self.registers.config_generation
            step()

    def _show_config(self) -> None:
        fine, config = self.call(self.device.config)
        if not fine:
            return
        shown = self._config
        padded = config[:CONFIG_SIZE] + bytes(-len(config) % 8)
        for index, word in enumerate(memoryview(padded).cast("Q")):
            if shown[index] != word:
                shown[index] = word

    def interrupt(self, queue: int | None) -> None:
        """There is one interrupt for everything; the status in the page says what it is for."""
        self.line.trigger()

    # ------------------------------------------------------------ state

    @property
    def instance(self) -> str:
        """The address: ids are given once for each kind of device only."""
        return f"{self.address:x}"

    def save(self) -> MmioState:
        """Return what the transport is made of again; the device saves itself."""
        return MmioState(self.device.kind, self.device.id, self.address, self.line.gsi, self.save_registers())

    def close(self) -> None:
        """Release the page and the eventfds; line and device stay whose they are."""
        for view in (self._config, self._words):
            view.release()
        for kick in self.kicks:
            os.close(kick)
