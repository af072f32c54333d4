"""What is under the devices: guest memory, and which worker runs which vCPU."""

from __future__ import annotations

from base.lean_typing import NamedTuple
from ipc.guest_memory import GuestMemory
from vmm.placement import Placement

_MIB = 1 << 20


class Vm(NamedTuple):
    """The machine without its devices. It has one KVM VM per worker, all over the same memory."""

    memory: GuestMemory
    placement: Placement

    @property
    def vcpu_count(self) -> int:
        """Number of vCPUs."""
        return sum(map(len, self.placement.groups))

    @property
    def mem_size_mib(self) -> int:
        """Guest RAM in MiB."""
        return self.memory.size // _MIB

    def __repr__(self) -> str:
        workers = len(self.placement.groups)
        return f"<Vm {self.vcpu_count} vCPU(s) in {workers} worker(s), {self.mem_size_mib} MiB>"
