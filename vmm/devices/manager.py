"""The machine's devices: what is attached where, with which interrupt."""

from __future__ import annotations

import mmap
import os

from base.lean_typing import TYPE_CHECKING, Callable
from ipc.device_pages import DEVICE_PAGE_SIZE, DevicePage
from ipc.schema import Saveable
from ipc.shared_memory import create_published
from vmm.devices.bus import Device, mmio_bus, port_bus
from vmm.devices.interrupts import DueInterrupts, InterruptAllocator, InterruptLine
from vmm.devices.legacy.boot_timer import BootTimer
from vmm.devices.legacy.exerciser import EXERCISER_MMIO, EXERCISER_PORT, MMIO_LENGTH, Exerciser, ExerciserPage
from vmm.devices.legacy.exerciser import PORT_COUNT as EXERCISER_PORT_COUNT
from vmm.devices.legacy.i8042 import I8042
from vmm.devices.legacy.i8042 import PORT_COUNT as I8042_PORT_COUNT
from vmm.devices.legacy.ioapic import IOAPIC_LENGTH, IOWIN, IoApic, SetRoutes
from vmm.devices.legacy.serial import Serial
from vmm.errors import DeviceError
from vmm.layout import (
    BOOT_TIMER_ADDRESS,
    BOOT_TIMER_SIZE,
    COM1_GSI,
    COM1_PORT,
    COM1_PORT_COUNT,
    I8042_DATA_PORT,
    I8042_GSI,
    IOAPIC_ADDRESS,
)

if TYPE_CHECKING:
    from vmm.devices.legacy.console import ConsoleOutput
    from vmm.observe.metrics import Metrics


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
        self.allocator = InterruptAllocator(due_interrupts)
        self.i8042 = I8042(self.allocator.line(I8042_GSI), reset)
        self.i8042.attach(self.ports.insert(self.i8042, I8042_DATA_PORT, I8042_PORT_COUNT))
        self.serial = Serial(self.allocator.line(COM1_GSI), transmit)
        self.serial.attach(self.ports.insert(self.serial, COM1_PORT, COM1_PORT_COUNT))
        self.ioapic = IoApic(self.allocator.connected, set_routes, log)
        (select,) = self.mmio.insert(self.ioapic, IOAPIC_ADDRESS, IOWIN)
        (window,) = self.mmio.insert(self.ioapic, IOAPIC_ADDRESS + IOWIN, IOAPIC_LENGTH - IOWIN, IOWIN)
        self.ioapic.attach(select, window)
        self.exerciser: Exerciser | None = None

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
        return (self.ioapic, self.serial, self.i8042, *self.interrupts)

    def close(self) -> None:
        """Release shared memory and eventfds."""
        self._page.close()
        self._page_buffer.close()
        os.close(self.page_descriptor)
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
