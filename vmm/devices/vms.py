"""What devices need done in the VM of every worker. ``vmm.cells`` does it, and remembers what is in force.

Each of these completes when every worker has it: whoever asked waits for the Deferral, the event loop does not.
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from base.deferral import Deferral
    from ipc.messages.records import Route


class Doorbell(NamedTuple):
    """An address whose write signals an eventfd, within the kernel.

    ``length`` is that of the write in bytes; it must write ``match``, or anything if that is None.
    """

    address: int
    length: int
    match: int | None
    eventfd: int


class MemorySlot(NamedTuple):
    """Memory that the guest sees at ``guest_address``: ``size`` bytes from ``offset`` of a memfd.

    Writes exit if it is read-only.
    """

    guest_address: int
    size: int
    descriptor: int
    offset: int
    read_only: bool


class WorkerVms(Protocol):
    """All workers' VMs as one."""

    def set_routes(self, routes: Sequence[Route]) -> Deferral:
        """Put routes of interrupts into force, each in the VM of the worker that it leads to."""

    def add_doorbell(self, doorbell: Doorbell) -> Deferral:
        """Let a write of any vCPU signal the eventfd instead of exiting."""

    def remove_doorbell(self, doorbell: Doorbell) -> Deferral:
        """Let such writes exit again."""

    def map_memory(self, slot: MemorySlot) -> Deferral:
        """Show memory to the guest: register pages, pmem, RAM that is plugged in."""

    def unmap_memory(self, slot: MemorySlot) -> Deferral:
        """Take it away again."""
