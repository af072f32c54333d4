"""Controller → worker: what is changed in the worker's VM, at its start as well as at any time later.

They are carried out in the order in which they come. Before Configure they say what the VM begins with; so that nobody
waits for each of them, a sender may have a few under way. SetRoutes is answered by RoutesSet, all others by VmChanged.
"""

from __future__ import annotations

from base.lean_typing import NamedTuple
from ipc.device_pages import SLOT_COUNT
from ipc.launch_plan import MAX_MEMORY_BYTES
from ipc.messages.records import MAX_GSI, ROUTE_FIELD, WORKER, Route, Window
from ipc.schema import U64, Flag, Int, ListOf, RecordOf

#: Windows, and routes, that one message may bring; there may be more messages.
MAX_AT_ONCE = 64
#: Interrupts that one message may bring: their eventfds have to fit into the socket, all at once.
MAX_INTERRUPTS_AT_ONCE = 16
#: Those from 256 on are the worker's own (vcpu_worker.ghosts.stub).
MAX_MEMORY_SLOTS = 256
MAX_DOORBELLS = 1024


class SetRoutes(NamedTuple):
    """Set these routes; other GSIs keep theirs."""

    routes: tuple[Route, ...]


class RoutesSet(NamedTuple):
    """The routes are in force."""


class AddInterrupts(NamedTuple):
    """Take the eventfds of these GSIs, which were sent (Interrupt); they are bound when a route is set.

    One that had an eventfd loses it.
    """

    gsis: tuple[int, ...]


class SetWindows(NamedTuple):
    """These windows, with those of the messages before that were not the ``last``, replace the ones in force."""

    ports: tuple[Window, ...]
    mmio: tuple[Window, ...]
    last: bool


class MapMemory(NamedTuple):
    """Show ``size`` bytes at ``guest_address``: those from ``offset`` of the guest memory (GuestMemory) or, ``own``, of
    an object that was sent for this slot (MemoryObject). Writes to what is ``read_only`` exit."""

    slot: int
    guest_address: int
    size: int
    offset: int
    own: bool
    read_only: bool
    track_dirty_pages: bool


class UnmapMemory(NamedTuple):
    """Take the memory of a slot away."""

    slot: int


class AddDoorbell(NamedTuple):
    """Let a write of ``length`` bytes to ``address`` signal the eventfd that was sent (DoorbellEvent) and not exit.

    Only of the value ``match``, or, ``any_value``, of any.
    """

    doorbell: int
    address: int
    length: int
    any_value: bool
    match: int


class RemoveDoorbell(NamedTuple):
    """Let such writes exit again."""

    doorbell: int


class VmChanged(NamedTuple):
    """The change is in force."""


_WINDOW = RecordOf(Window, address=Int(U64), length=Int(1 << 40, 1), slot=Int(SLOT_COUNT - 1))
SLOT_FIELD = Int(MAX_MEMORY_SLOTS - 1)
DOORBELL_FIELD = Int(MAX_DOORBELLS - 1)
WORKER.register(6, SetRoutes, routes=ListOf(ROUTE_FIELD, MAX_AT_ONCE))
WORKER.register(7, RoutesSet)
WORKER.register(64, AddInterrupts, gsis=ListOf(Int(MAX_GSI - 1), MAX_INTERRUPTS_AT_ONCE))
WORKER.register(65, SetWindows, ports=ListOf(_WINDOW, MAX_AT_ONCE), mmio=ListOf(_WINDOW, MAX_AT_ONCE), last=Flag())
WORKER.register(
    66,
    MapMemory,
    slot=SLOT_FIELD,
    guest_address=Int(U64),
    size=Int(MAX_MEMORY_BYTES, 1),
    offset=Int(MAX_MEMORY_BYTES),
    own=Flag(),
    read_only=Flag(),
    track_dirty_pages=Flag(),
)
WORKER.register(67, UnmapMemory, slot=SLOT_FIELD)
WORKER.register(
    68, AddDoorbell, doorbell=DOORBELL_FIELD, address=Int(U64), length=Int(8, 1), any_value=Flag(), match=Int(U64)
)
WORKER.register(69, RemoveDoorbell, doorbell=DOORBELL_FIELD)
WORKER.register(70, VmChanged)
