"""The machine's devices: what is attached where, with which interrupt."""

from __future__ import annotations

import mmap
import os

from base.lean_typing import TYPE_CHECKING, Any, Callable, Sequence, TypeVar
from ipc.device_pages import DEVICE_PAGE_SIZE, DevicePage, RegisterPages
from ipc.guest_memory import GuestMemory
from ipc.schema import Saveable
from ipc.shared_memory import create_published
from vmm.boot.acpi import VirtioMmioDevice
from vmm.devices.bus import Device, mmio_bus, port_bus
from vmm.devices.interrupts import DueInterrupts, InterruptAllocator, InterruptLine
from vmm.devices.legacy.boot_timer import BootTimer
from vmm.devices.legacy.exerciser import EXERCISER_MMIO, EXERCISER_PORT, MMIO_LENGTH, Exerciser, ExerciserPage
from vmm.devices.legacy.exerciser import PORT_COUNT as EXERCISER_PORT_COUNT
from vmm.devices.legacy.external_interrupt import ExternalInterrupt
from vmm.devices.legacy.host_timer import HostTimer
from vmm.devices.legacy.i8042 import I8042
from vmm.devices.legacy.i8042 import PORT_COUNT as I8042_PORT_COUNT
from vmm.devices.legacy.ioapic import IOAPIC_LENGTH, IOWIN, IoApic, SetRoutes
from vmm.devices.legacy.pic import CASCADE, ELCR, INPUT_COUNT, SLAVE, Pic
from vmm.devices.legacy.pit import LISTENING, MASKED, SPEAKER, WAITING, Pit
from vmm.devices.legacy.serial import Serial
from vmm.devices.vms import Doorbell, MemorySlot
from vmm.errors import DeviceError
from vmm.layout import (
    BOOT_TIMER_ADDRESS,
    BOOT_TIMER_SIZE,
    COM1_GSI,
    COM1_PORT,
    COM1_PORT_COUNT,
    ELCR_PORT,
    I8042_DATA_PORT,
    I8042_GSI,
    IOAPIC_ADDRESS,
    MAX_VIRTIO_MMIO_DEVICES,
    PIC_MASTER_PORT,
    PIC_PORT_COUNT,
    PIC_SLAVE_PORT,
    PIT_GSI,
    PIT_PORT,
    PIT_PORT_COUNT,
    SPEAKER_PORT,
    VIRTIO_MMIO_ADDRESS,
    VIRTIO_MMIO_SIZE,
)

if TYPE_CHECKING:
    from virtio.device import VirtioDevice
    from vmm.devices.legacy.console import ConsoleOutput
    from vmm.devices.transport.mmio import MmioTransport
    from vmm.devices.transport.registers import RegistersState
    from vmm.observe.metrics import Metrics


AnyDevice = TypeVar("AnyDevice", bound="VirtioDevice")


def in_attach_order(devices: Sequence[AnyDevice]) -> list[AnyDevice]:
    """Return devices in the order in which they get their windows and interrupt lines, and with them the guest's names.

    It is Firecracker's. Those of one kind stay in theirs (the root drive first).
    """
    if not devices:
        return []
    from virtio.abi import (  # what a machine without devices does not load is carried (jailer.carried)
        VIRTIO_ID_BALLOON,
        VIRTIO_ID_BLOCK,
        VIRTIO_ID_ENTROPY,
        VIRTIO_ID_MEM,
        VIRTIO_ID_NET,
        VIRTIO_ID_PMEM,
        VIRTIO_ID_VSOCK,
    )

    order = (
        VIRTIO_ID_BALLOON, VIRTIO_ID_BLOCK, VIRTIO_ID_NET, VIRTIO_ID_PMEM, VIRTIO_ID_VSOCK, VIRTIO_ID_ENTROPY,
        VIRTIO_ID_MEM,
    )  # fmt: skip
    return sorted(devices, key=lambda device: order.index(device.kind))


class DeviceManager:
    """Owns the device page, the buses, the interrupt lines and the devices."""

    def __init__(
        self,
        *,
        transmit: Callable[[int], None],
        reset: Callable[[], None],
        set_routes: SetRoutes,
        log: Callable[[str], None],
    ) -> None:
        self.page_descriptor: int
        self._page_buffer: mmap.mmap
        self.page_descriptor, self._page_buffer = create_published("device-page", DEVICE_PAGE_SIZE)
        self._page = DevicePage(self._page_buffer)
        self._log = log
        self.ports = port_bus(self._page)
        self.mmio = mmio_bus(self._page)
        due_interrupts = DueInterrupts()
        #: Around each batch of exits: edges of a batch become one, at its end.
        self.begin_batch = due_interrupts.begin_batch
        self.end_batch = due_interrupts.end_batch
        #: The guest has initialised the 8259s: only then lines lead there.
        self._pic_in_use = False
        self.allocator = InterruptAllocator(due_interrupts, self._wire)
        self.external_interrupt = ExternalInterrupt()
        self.timer = HostTimer()
        self._attach_pic_and_pit()
        self.pic.settle = due_interrupts.deliver
        self.i8042 = I8042(self.allocator.line(I8042_GSI), reset)
        # Port 0x61, in the middle of its ports, is the PIT's.
        data = self.ports.insert(self.i8042, I8042_DATA_PORT, SPEAKER_PORT - I8042_DATA_PORT)
        speaker = self.ports.insert(self.pit, SPEAKER_PORT, 1, SPEAKER)
        behind = SPEAKER_PORT + 1 - I8042_DATA_PORT
        rest = self.ports.insert(self.i8042, I8042_DATA_PORT + behind, I8042_PORT_COUNT - behind, behind)
        self.i8042.attach([*data, *speaker, *rest])
        self.serial = Serial(self.allocator.line(COM1_GSI), transmit)
        self.serial.attach(self.ports.insert(self.serial, COM1_PORT, COM1_PORT_COUNT))
        self.ioapic = IoApic(self.allocator.connected, set_routes, log)
        self.ioapic.on_change = self.pit.update
        (select,) = self.mmio.insert(self.ioapic, IOAPIC_ADDRESS, IOWIN)
        (window,) = self.mmio.insert(self.ioapic, IOAPIC_ADDRESS + IOWIN, IOAPIC_LENGTH - IOWIN, IOWIN)
        self.ioapic.attach(select, window)
        self.exerciser: Exerciser | None = None
        #: The virtio devices, in the order in which they were attached.
        self.virtio: list[MmioTransport] = []
        self._register_pages: RegisterPages | None = None
        #: Where KVM counts acknowledgements that nobody has to hear of.
        self._acknowledged = -1

    def _attach_pic_and_pit(self) -> None:
        self._timer_line = self.allocator.line(PIT_GSI)
        self.pit = Pit(self._timer_edge, self._timer_reach, self.timer.set)
        self.timer.fired = self.pit.fire
        self.pic = Pic(self.external_interrupt.raised, self._pic_changed)
        self.external_interrupt.connect(self.pic)
        for port, offset in ((PIC_MASTER_PORT, 0), (PIC_SLAVE_PORT, SLAVE), (ELCR_PORT, ELCR)):
            for slot in self.ports.insert(self.pic, port, PIC_PORT_COUNT, offset):
                # Whatever asks the chips (a read, an INTA cycle) comes through a ring, behind what was posted.
                slot.publish(write_posted=True, write_shared=True)
        self.ports.insert(self.pit, PIT_PORT, PIT_PORT_COUNT)

    def _wire(self, line: InterruptLine) -> None:
        """Connect a line with its input of the 8259s. The timer's edges go there by themselves; one is no input."""
        number = line.gsi
        if self._pic_in_use and number < INPUT_COUNT and number not in (PIT_GSI, CASCADE):
            line.add_receiver(lambda: self.pic.pulse(number))

    def _pic_changed(self) -> None:
        """The guest has accessed the 8259s."""
        if not self._pic_in_use and self.pic.master.ready:
            self._pic_in_use = True
            for line in self.interrupts:
                self._wire(line)
        self.pit.update()

    def _timer_edge(self) -> None:
        """Counter 0 interrupts: where it is masked the edge is lost, for ticks that are past are of no use."""
        if not self.ioapic.is_masked(PIT_GSI):
            self._timer_line.trigger()
        self.pic.pulse(PIT_GSI)

    def _timer_reach(self) -> int:
        if not self.ioapic.is_masked(PIT_GSI):
            return LISTENING
        if self.pic.is_masked(PIT_GSI):
            return MASKED
        return WAITING if self.pic.is_waiting(PIT_GSI) else LISTENING

    def attach_boot_timer(self, start_us: int, start_cpu_us: int) -> None:
        """Attach the boot timer page; times as in BootTimer."""
        timer = BootTimer(start_us, start_cpu_us, self._log)
        (slot,) = self.mmio.insert(timer, BOOT_TIMER_ADDRESS, BOOT_TIMER_SIZE)
        slot.publish(write_posted=True)

    def attach_exerciser(self, end: Callable[[int], None]) -> None:
        """Attach the test device; ``end`` gets the exit code that the guest asks for."""
        exerciser = self.exerciser = Exerciser(self._log, end)
        exerciser.attach(self.ports.insert(exerciser, EXERCISER_PORT, EXERCISER_PORT_COUNT))
        page = ExerciserPage(exerciser)
        (posted,) = self.mmio.insert(page, EXERCISER_MMIO, MMIO_LENGTH)
        posted.publish(write_posted=True)
        self.mmio.insert(page, EXERCISER_MMIO + MMIO_LENGTH, MMIO_LENGTH)

    # ------------------------------------------------------------ virtio devices

    def attach_virtio(
        self, device: VirtioDevice, memory: GuestMemory, state: RegistersState | None = None
    ) -> MmioTransport:
        """Give a device the next virtio-mmio window and interrupt line. Before the workers are told what there is.

        Raises DeviceError if there are none left.
        """
        from vmm.devices.transport.mmio import MmioResources, MmioTransport

        number = len(self.virtio)
        if number >= MAX_VIRTIO_MMIO_DEVICES:
            raise DeviceError("Could not allocate GSI: The requested resource is not available.")
        if self._register_pages is None:
            self._register_pages = RegisterPages(MAX_VIRTIO_MMIO_DEVICES)
            self._acknowledged = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        transport = MmioTransport(
            device,
            memory,
            self._register_pages.page(number),
            MmioResources(VIRTIO_MMIO_ADDRESS + number * VIRTIO_MMIO_SIZE, self.allocator.line(), self._acknowledged),
            guard=self.guarded,
            log=self._log,
            state=state,
        )
        self.mmio.insert(transport, transport.address, VIRTIO_MMIO_SIZE)
        self.virtio.append(transport)
        return transport

    def guarded(self, call: Callable[[], Any], failed: Callable[[str], None]) -> tuple[bool, Any]:
        """Call a virtio device: the one place where its errors end. ``failed`` is told why it cannot go on.

        Returns whether it succeeded, and what it returned. An error that is not the driver's fault is logged with its
        type and place.
        """
        from virtio.errors import VirtioError

        try:
            return True, call()
        except VirtioError as error:
            failed(str(error))
        except Exception as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "?"
            self._log(f"A virtio device failed at {place}: {type(error).__name__}: {error}")
            failed(f"internal error: {type(error).__name__}")
        return False, None

    def virtio_mmio_devices(self) -> tuple[VirtioMmioDevice, ...]:
        """Return what the guest is told of its virtio devices, in order."""
        return tuple([VirtioMmioDevice(each.address, VIRTIO_MMIO_SIZE, each.line.gsi) for each in self.virtio])

    def memory_slots(self) -> tuple[MemorySlot, ...]:
        """Return the memory beside RAM that the guest sees: the register pages, in one read-only slot."""
        if self._register_pages is None:
            return ()
        size = len(self.virtio) * VIRTIO_MMIO_SIZE
        return (MemorySlot(VIRTIO_MMIO_ADDRESS, size, self._register_pages.descriptor, 0, True),)

    def doorbells(self) -> tuple[Doorbell, ...]:
        """Return the writes that KVM answers by itself."""
        return tuple([doorbell for each in self.virtio for doorbell in each.doorbells()])

    # ------------------------------------------------------------ all devices

    @property
    def interrupts(self) -> tuple[InterruptLine, ...]:
        """Return the interrupt lines that are in use, in the order of their GSIs."""
        return self.allocator.lines

    def remove(self, device: Device, line: InterruptLine | None = None) -> None:
        """Detach a device that the guest has let go, and its interrupt line. Raises DeviceError if it is not attached.

        Until the workers have the windows that are left they ask us for every access to its addresses, where nothing
        sits any more; ``free_removed`` of the buses comes after that.
        """
        buses = [bus for bus in (self.ports, self.mmio) if bus.has(device)]
        if not buses:
            raise DeviceError("a device that is not attached cannot be removed")
        for bus in buses:
            bus.remove(device)
        if line is not None:
            self.allocator.free(line)

    @property
    def units(self) -> tuple[Saveable, ...]:
        """Every part that has a state to save. Only between batches of exits, while all vCPUs are parked."""
        virtio: list[Saveable] = [unit for each in self.virtio for unit in (each, each.device)]
        return (self.ioapic, self.serial, self.i8042, self.pic, self.pit, *self.interrupts, *virtio)

    def close(self) -> None:
        """Release shared memory and eventfds. No vCPU runs any more; virtio devices are stopped and closed, too."""
        for transport in self.virtio:
            transport.pause()
            transport.close()
            transport.device.close()
        if self._register_pages is not None:
            self._register_pages.close()
            os.close(self._acknowledged)
        self._page.close()
        self._page_buffer.close()
        os.close(self.page_descriptor)
        self.external_interrupt.close()
        self.allocator.close()


def read_devices(metrics: Metrics, i8042: I8042, serial: Serial, console: ConsoleOutput | None) -> None:
    """Take over what the legacy devices have counted. Reads that the worker answers by itself are not among it."""
    keyboard = metrics["i8042"]
    keyboard.store("error_count", i8042.error_count)
    keyboard.store("read_count", i8042.read_count)
    keyboard.store("write_count", i8042.write_count)
    keyboard.store("reset_count", i8042.reset_count)
    uart = metrics["uart"]
    uart.store("read_count", serial.read_count)
    uart.store("write_count", serial.write_count)
    if console is not None:
        uart.store("flush_count", console.flush_count)
        uart.store("missed_write_count", console.lost_bytes)
        uart.store("rate_limiter_dropped_bytes", console.rate_limiter_dropped_bytes)
