"""Where a vCPU sits: one package, cores of one or two threads, APIC id = vCPU index."""

from __future__ import annotations

from base.lean_typing import NamedTuple

#: Bits of an APIC id that name a core (and thread) of the package: room for 32 vCPUs.
PACKAGE_SHIFT = 5
MAX_VCPUS = 1 << PACKAGE_SHIFT


class Topology(NamedTuple):
    """The guest's topology as one vCPU sees it. With ``smt`` vCPUs 2n and 2n + 1 share a core."""

    vcpu: int
    vcpu_count: int
    smt: bool

    @property
    def apic_id(self) -> int:
        """The (x2)APIC id of this vCPU."""
        return self.vcpu

    @property
    def smt_shift(self) -> int:
        """Bits of the APIC id that name a thread of a core; a single vCPU has no sibling, whatever ``smt`` says."""
        return 1 if self.smt and self.vcpu_count > 1 else 0

    @property
    def threads_per_core(self) -> int:
        """1 or 2."""
        return 1 << self.smt_shift

    @property
    def core_count(self) -> int:
        """Cores in the package; an odd last vCPU has a core of its own."""
        return (self.vcpu_count + self.threads_per_core - 1) >> self.smt_shift

    @property
    def core_id(self) -> int:
        """The core of this vCPU."""
        return self.vcpu >> self.smt_shift

    @property
    def logical_id_space(self) -> int:
        """The vCPU count rounded up to a power of two: what CPUID leaf 1 calls the maximum of addressable ids."""
        return 1 << (self.vcpu_count - 1).bit_length()
