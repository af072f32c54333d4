"""A microVM as the builder makes it, on stand-in workers."""

from __future__ import annotations

import os
from contextlib import suppress

from ipc.guest_memory import GuestMemory
from ipc.messages.records import MemoryRegion
from ipc.messages.worker import Resumed
from ipc.shared_memory import create_shared
from tests.harness.cells import (
    MEMORY_SIZE,
    Controller,
    StandInWorker,
    configure_message,
)
from vmm.cells.vms import WorkerVms
from vmm.devices.legacy.console import ConsoleOutput
from vmm.errors import VmmError
from vmm.machine.assembly import Assembly, Console
from vmm.placement import Placement

COM1 = 0x3F8
COMMAND = 0x64
RESET = 0xFE


class Machine:
    """A microVM as the builder makes it, on a stand-in worker, with its console on a pipe and the log in a file."""

    def __init__(self, directory, *behaviours) -> None:
        self.controller = Controller(str(directory), *behaviours)
        self.events = self.controller.events
        self.worker = self.controller.worker()
        descriptor = create_shared("guest-memory", MEMORY_SIZE)
        memory = GuestMemory(descriptor, MEMORY_SIZE, (MemoryRegion(0, MEMORY_SIZE, 0),))
        self.reader, writer = os.pipe()
        self.output = ConsoleOutput(writer, owned=True)
        placement = Placement("Split", ((0,),), "test")
        console = Console(self.output, -1)
        vms = WorkerVms([], placement.destination)
        vms.map_guest_memory(memory, track_dirty_pages=False)
        self.assembly = Assembly(self.events, "standin", memory, placement, vms, console=console)
        self.devices = self.assembly.devices
        self.vmm = self.assembly.vmm
        self.controller.greeted()
        self.assembly.prepare(configure_message())
        self.assembly.add_worker(self.worker)
        self.assembly.connect()
        os.close(descriptor)
        self.vmm.start_vcpus()

    def resume(self) -> None:
        """Resume a microVM that may end at once."""
        with suppress(VmmError):
            self.vmm.resume_vm()

    def ended(self) -> int:
        """Run until the microVM has stopped; returns its exit code."""
        self.controller.serve(lambda: self.vmm.shutdown_exit_code() is not None)
        code = self.vmm.shutdown_exit_code()
        assert code is not None
        return code

    def console(self) -> bytes:
        os.set_blocking(self.reader, False)
        try:
            return os.read(self.reader, 1 << 16)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        self.vmm.close()
        self.controller.close()
        if self.reader >= 0:
            os.close(self.reader)
            self.reader = -1


def when_resumed(action):
    """A worker whose vCPU does ``action`` when it is resumed for the first time."""

    def resume(worker: StandInWorker, sequence: int) -> None:
        worker.send(Resumed(), sequence)
        if not hasattr(worker, "resumed"):
            worker.resumed = True  # type: ignore[attr-defined]
            action(worker)

    return lambda worker: worker.serve_with(Resume=resume)
