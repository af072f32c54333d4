"""What is in force in the VM of every worker: the one record of it, and how it is changed (``vmm.devices.vms``).

A start, a restart and a replacement read :meth:`WorkerVms.everything`; nobody else keeps a copy. What one VM alone may
have (irqfds: one eventfd serves one VM) is noted with the worker that has it, and moves by :meth:`bound_to`.
"""

from __future__ import annotations

import os

from base.deferral import Deferral
from base.lean_typing import Callable, Iterable, NamedTuple, Sequence
from ipc.guest_memory import GuestMemory
from ipc.messages import descriptors as sent
from ipc.messages.descriptors import DoorbellEvent, MemoryObject
from ipc.messages.records import Route, Window
from ipc.messages.vm import (
    MAX_AT_ONCE,
    MAX_DOORBELLS,
    MAX_INTERRUPTS_AT_ONCE,
    MAX_MEMORY_SLOTS,
    AddDoorbell,
    AddInterrupts,
    MapMemory,
    RemoveDoorbell,
    SetWindows,
    UnmapMemory,
)
from vmm.cells.descriptors import VmChange
from vmm.cells.worker import Worker
from vmm.devices.routing import InterruptRouter, PlacedRoute
from vmm.devices.vms import Doorbell, MemorySlot
from vmm.errors import DeviceError
from vmm.layout import FIRST_GHOST_GSI


class IpiPath:
    """A path within the kernel: what is sent to one vCPU with one vector raises ``gsi`` in the VM of its owner."""

    __slots__ = ("eventfd", "gsi", "open", "sources", "waiting")

    def __init__(self, gsi: int) -> None:
        self.gsi = gsi
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.open = False
        #: Workers whose end was opened or is being opened.
        self.sources: set[int] = set()
        self.waiting: list[Callable[[], None]] = []


class OpenPath(NamedTuple):
    """A path to a vCPU whose interrupts another worker's VM is to raise from now on."""

    vcpu: int
    vector: int
    gsi: int
    eventfd: int


class BoundInterrupts(NamedTuple):
    """What is bound in the VM of one worker alone."""

    routes: tuple[Route, ...]
    paths: tuple[OpenPath, ...]


class WorkerVms:
    """``workers`` are those that were configured, by everybody's list; before there are any, a change is only noted.

    ``owner`` maps an APIC id to a worker's index, or returns -1 for one that no vCPU has.
    """

    def __init__(self, workers: list[Worker], owner: Callable[[int], int]) -> None:
        self.workers = workers
        #: What was changed since a worker that is to replace another one was told everything.
        self._since: list[VmChange] | None = None
        self._memory: dict[int, VmChange] = {}
        self._slots: dict[MemorySlot, int] = {}
        self._doorbells: dict[Doorbell, int] = {}
        self._interrupts: dict[int, int] = {}
        self._windows: tuple[Sequence[Window], Sequence[Window]] = ((), ())
        self._routes: dict[int, PlacedRoute] = {}
        self._router = InterruptRouter(workers, owner, self._routes)
        #: (vCPU, vector) → path; opened by vmm.cells.ghosts.
        self.paths: dict[tuple[int, int], IpiPath] = {}
        self._next_gsi: dict[int, int] = {}

    # ------------------------------------------------------------ changes

    def set_routes(self, routes: Sequence[Route]) -> Deferral:
        """Put routes into force, each in the VM of the worker that runs the destination vCPU."""
        deferral = Deferral()
        self._router.set_routes(routes, deferral.complete)
        return deferral

    def set_windows(self, ports: Sequence[Window], mmio: Sequence[Window]) -> Deferral:
        """These are the windows of all devices from now on."""
        self._windows = (tuple(ports), tuple(mmio))
        return self._change(*_windows(*self._windows))

    def add_interrupts(self, interrupts: Iterable[tuple[int, int]]) -> Deferral:
        """These eventfds, (GSI, eventfd), belong to the GSIs from now on."""
        added = dict(interrupts)
        self._interrupts.update(added)
        return self._change(*_interrupts(added))

    def map_guest_memory(self, memory: GuestMemory, *, track_dirty_pages: bool) -> tuple[VmChange, ...]:
        """Show the guest its RAM; before there are workers. Returns what :meth:`everything` begins with."""
        for region in memory.regions:
            slot = self._free_slot()
            message = MapMemory(slot, *region, own=False, read_only=False, track_dirty_pages=track_dirty_pages)
            object_behind = () if self._memory else ((sent.GuestMemory(memory.size), memory.descriptor),)
            self._memory[slot] = VmChange(message, object_behind)
        return tuple(self._memory.values())

    def map_memory(self, slot: MemorySlot) -> Deferral:
        """Show other memory to the guest. Raises DeviceError if there is no slot left."""
        number = self._slots[slot] = self._free_slot()
        size = os.fstat(slot.descriptor).st_size
        message = MapMemory(
            number, slot.guest_address, slot.size, slot.offset, own=True, read_only=slot.read_only,
            track_dirty_pages=False,
        )  # fmt: skip
        change = self._memory[number] = VmChange(message, ((MemoryObject(number, size), slot.descriptor),))
        return self._change(change)

    def unmap_memory(self, slot: MemorySlot) -> Deferral:
        """Take it away again."""
        number = self._slots.pop(slot)
        del self._memory[number]
        return self._change(VmChange(UnmapMemory(number)))

    def _free_slot(self) -> int:
        for number in range(MAX_MEMORY_SLOTS):
            if number not in self._memory:
                return number
        raise DeviceError(f"all {MAX_MEMORY_SLOTS} memory slots are in use")

    def add_doorbell(self, doorbell: Doorbell) -> Deferral:
        """Let a write of any vCPU signal the eventfd instead of exiting. Raises DeviceError if there are too many."""
        used = set(self._doorbells.values())
        number = next((each for each in range(MAX_DOORBELLS) if each not in used), -1)
        if number < 0:
            raise DeviceError(f"all {MAX_DOORBELLS} doorbells are in use")
        self._doorbells[doorbell] = number
        return self._change(_doorbell(number, doorbell))

    def remove_doorbell(self, doorbell: Doorbell) -> Deferral:
        """Let such writes exit again."""
        return self._change(VmChange(RemoveDoorbell(self._doorbells.pop(doorbell))))

    def _change(self, *changes: VmChange) -> Deferral:
        if self._since is not None:
            self._since += changes
        deferral = Deferral()
        left = len(changes) * len(self.workers)
        if not left:
            deferral.complete()

        def done() -> None:
            nonlocal left
            left -= 1
            if not left:
                deferral.complete()

        for change in changes:
            for worker in self.workers:
                worker.change(change, done)
        return deferral

    # ------------------------------------------------------------ for a worker that is made

    def everything(self) -> tuple[VmChange, ...]:
        """Return what every worker's VM has, in the order in which it is to be told."""
        return (
            *self._memory.values(),
            *_windows(*self._windows),
            *_interrupts(self._interrupts),
            *[_doorbell(number, doorbell) for doorbell, number in self._doorbells.items()],
        )

    def bound_to(self, index: int, vcpus: Sequence[int]) -> BoundInterrupts:
        """Return what is bound in the VM of the worker with this index, which runs these vCPUs."""
        return BoundInterrupts(
            tuple([each.route for _, each in sorted(self._routes.items()) if each.worker == index]),
            tuple(
                [
                    OpenPath(vcpu, vector, path.gsi, path.eventfd)
                    for (vcpu, vector), path in self.paths.items()
                    if vcpu in vcpus
                ]
            ),
        )

    def for_successor(self) -> tuple[VmChange, ...]:
        """As :meth:`everything`, for a worker that is to replace another one; :meth:`since` tells the rest."""
        self._since = []
        return self.everything()

    def since(self) -> tuple[VmChange, ...]:
        """Return what was changed since :meth:`for_successor`. The guest stands still: nothing is changed any more."""
        changes, self._since = self._since, None
        return tuple(changes or ())

    def forget_sources(self, index: int) -> None:
        """Another worker has this index now: what its ghosts signal is opened when they do it for the first time."""
        for path in self.paths.values():
            path.sources.discard(index)

    # ------------------------------------------------------------ paths within the kernel

    def add_path(self, vcpu: int, vector: int, owner: int) -> IpiPath:
        """Note a path to a vCPU that the worker with index ``owner`` runs."""
        gsi = self._next_gsi.get(owner, FIRST_GHOST_GSI)
        self._next_gsi[owner] = gsi + 1
        path = self.paths[vcpu, vector] = IpiPath(gsi)
        return path

    def close(self) -> None:
        """Close the eventfds of the paths; what devices gave stays theirs."""
        for path in self.paths.values():
            os.close(path.eventfd)
        self.paths.clear()


def _windows(ports: Sequence[Window], mmio: Sequence[Window]) -> list[VmChange]:
    starts = range(0, max(len(ports), len(mmio), 1), MAX_AT_ONCE)
    return [
        VmChange(
            SetWindows(
                tuple(ports[start : start + MAX_AT_ONCE]), tuple(mmio[start : start + MAX_AT_ONCE]), start == starts[-1]
            )
        )
        for start in starts
    ]


def _interrupts(interrupts: dict[int, int]) -> list[VmChange]:
    gsis = sorted(interrupts)
    parts = [gsis[start : start + MAX_INTERRUPTS_AT_ONCE] for start in range(0, len(gsis), MAX_INTERRUPTS_AT_ONCE)]
    return [
        VmChange(AddInterrupts(tuple(part)), tuple([(sent.Interrupt(gsi), interrupts[gsi]) for gsi in part]))
        for part in parts
    ]


def _doorbell(number: int, doorbell: Doorbell) -> VmChange:
    address, length, match, eventfd = doorbell
    message = AddDoorbell(number, address, length, match is None, match or 0)
    return VmChange(message, ((DoorbellEvent(number), eventfd),))
