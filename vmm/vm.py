"""What is under the devices: guest memory, which worker runs which vCPU, and the host's KVM."""

from __future__ import annotations

from ipc.typed import NamedTuple
from vmm.memory import GuestMemory
from vmm.placement import Placement

_MIB = 1 << 20


class Kvm(NamedTuple):
    """The host's KVM as a worker found it; the controller itself has no descriptor of it.

    ``vcpu_mmap_size`` is in bytes; the limits are those of one VM, and each worker has a VM of its own.
    """

    api_version: int
    vcpu_mmap_size: int
    max_vcpus: int
    max_memslots: int


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
