"""What is changed in the worker's VM: memory slots, windows of devices, interrupts, doorbells (``ipc.messages.vm``)."""

from __future__ import annotations

import mmap
import os

from base.lean_typing import Any
from ipc.device_pages import SLOT_COUNT
from ipc.guest_mapping import GuestMapping
from ipc.messages.records import Window
from ipc.messages.vm import (
    AddDoorbell,
    AddInterrupts,
    MapMemory,
    RemoveDoorbell,
    SetWindows,
    UnmapMemory,
    VmChanged,
)
from vcpu_worker.descriptor_set import DescriptorSet
from vcpu_worker.errors import ConfigurationError, WorkerError
from vcpu_worker.kvm import abi
from vcpu_worker.machine import Machine
from vcpu_worker.replies import Command, Reply


class VmChanges:
    """Serves the commands; they may come at any time, before Configure as well. All is for the control thread."""

    def __init__(self, machine: Machine, descriptors: DescriptorSet) -> None:
        self._machine = machine
        self._descriptors = descriptors
        #: The guest memory, once something of it is shown.
        self._memory: GuestMapping | None = None
        #: What is shown in a slot. A mapping lasts as long as the slot.
        self._slots: dict[int, GuestMapping] = {}
        self._ports: list[Window] = []
        self._mmio: list[Window] = []
        self._doorbells: dict[int, tuple[AddDoorbell, int]] = {}
        self.commands: dict[type[Any], Command] = {
            MapMemory: self._map_memory,
            UnmapMemory: self._unmap_memory,
            SetWindows: self._set_windows,
            AddInterrupts: self._add_interrupts,
            AddDoorbell: self._add_doorbell,
            RemoveDoorbell: self._remove_doorbell,
        }

    @property
    def has_memory(self) -> bool:
        """Is anything shown to the guest?"""
        return bool(self._slots)

    @property
    def mapped_bytes(self) -> int:
        """Size of the mappings of what the guest is shown."""
        return sum({id(mapping): mapping.size for mapping in self._slots.values()}.values())

    # ------------------------------------------------------------ memory

    def _map_memory(self, command: MapMemory, reply: Reply) -> None:
        self._descriptors.receive()
        if command.slot in self._slots:
            raise ConfigurationError(f"memory slot {command.slot} is in use")
        mapping = self._own_object(command) if command.own else self._guest_memory()
        if (
            command.offset + command.size > mapping.size
            or (command.guest_address | command.size | command.offset) % mmap.PAGESIZE
        ):
            what = "its object" if command.own else "the guest memory"
            raise ConfigurationError(f"memory region at {command.guest_address:#x} does not fit {what}")
        flags = (abi.MEM_LOG_DIRTY_PAGES if command.track_dirty_pages else 0) | (
            abi.MEM_READONLY if command.read_only else 0
        )
        address = mapping.address + command.offset
        self._machine.vm.set_memory_region(command.slot, command.guest_address, command.size, address, flags)
        self._slots[command.slot] = mapping
        reply(VmChanged())

    def _guest_memory(self) -> GuestMapping:
        if self._memory is None:
            self._memory = _mapped(*self._descriptors.guest_memory(), writable=True)
        return self._memory

    def _own_object(self, command: MapMemory) -> GuestMapping:
        return _mapped(*self._descriptors.memory_object(command.slot), writable=not command.read_only)

    def _unmap_memory(self, command: UnmapMemory, reply: Reply) -> None:
        if command.slot not in self._slots:
            raise ConfigurationError(f"memory slot {command.slot} is not in use")
        self._machine.vm.set_memory_region(command.slot, 0, 0, 0)
        del self._slots[command.slot]
        reply(VmChanged())

    # ------------------------------------------------------------ windows and interrupts

    def _set_windows(self, command: SetWindows, reply: Reply) -> None:
        self._ports += command.ports
        self._mmio += command.mmio
        if command.last:
            ports, mmio, self._ports, self._mmio = self._ports, self._mmio, [], []
            self._machine.windows.set(ports, mmio, SLOT_COUNT)
        reply(VmChanged())

    def _add_interrupts(self, command: AddInterrupts, reply: Reply) -> None:
        self._descriptors.receive()
        for gsi in command.gsis:
            self._machine.add_interrupt(gsi, self._descriptors.interrupt(gsi))
        reply(VmChanged())

    # ------------------------------------------------------------ doorbells

    def _add_doorbell(self, command: AddDoorbell, reply: Reply) -> None:
        self._descriptors.receive()
        eventfd = self._descriptors.doorbell(command.doorbell)
        try:
            if command.doorbell in self._doorbells:
                raise ConfigurationError(f"doorbell {command.doorbell} is in use")
            self._assign(command, eventfd)
        except WorkerError:
            os.close(eventfd)
            raise
        self._doorbells[command.doorbell] = (command, eventfd)
        reply(VmChanged())

    def _remove_doorbell(self, command: RemoveDoorbell, reply: Reply) -> None:
        if command.doorbell not in self._doorbells:
            raise ConfigurationError(f"doorbell {command.doorbell} is not in use")
        added, eventfd = self._doorbells[command.doorbell]
        self._assign(added, eventfd, remove=True)
        del self._doorbells[command.doorbell]
        os.close(eventfd)
        reply(VmChanged())

    def _assign(self, doorbell: AddDoorbell, eventfd: int, *, remove: bool = False) -> None:
        match = None if doorbell.any_value else doorbell.match
        self._machine.vm.assign_ioeventfd(eventfd, doorbell.address, doorbell.length, match, remove=remove)


def _mapped(descriptor: int, size: int, *, writable: bool) -> GuestMapping:
    """Map all of an object; its descriptor is closed."""
    try:
        return GuestMapping(descriptor, size, writable=writable)
    except OSError as error:
        raise ConfigurationError(f"cannot map memory of {size} bytes: {error}") from None
    finally:
        os.close(descriptor)
