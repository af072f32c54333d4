"""/dev/kvm: what this host's KVM can do, and making a VM."""

from __future__ import annotations

import time

from ipc.messages.records import CpuidEntry
from vcpu_worker.errors import CapabilityError, KvmError
from vcpu_worker.kvm import abi
from vcpu_worker.kvm.ioctl import ioctl_buffer, ioctl_integer

EINTR = 4
E2BIG = 7

#: What a VM with split irqchip and its vCPUs cannot do without, in the order in which a missing one is named.
REQUIRED_CAPABILITIES: tuple[tuple[str, int], ...] = (
    ("KVM_CAP_USER_MEMORY", abi.KVM_CAP_USER_MEMORY),
    ("KVM_CAP_IRQCHIP", abi.KVM_CAP_IRQCHIP),
    ("KVM_CAP_SPLIT_IRQCHIP", abi.KVM_CAP_SPLIT_IRQCHIP),
    ("KVM_CAP_X2APIC_API", abi.KVM_CAP_X2APIC_API),
    ("KVM_CAP_IRQ_ROUTING", abi.KVM_CAP_IRQ_ROUTING),
    ("KVM_CAP_IRQFD", abi.KVM_CAP_IRQFD),
    ("KVM_CAP_IOEVENTFD", abi.KVM_CAP_IOEVENTFD),
    ("KVM_CAP_SIGNAL_MSI", abi.KVM_CAP_SIGNAL_MSI),
    ("KVM_CAP_READONLY_MEM", abi.KVM_CAP_READONLY_MEM),
    ("KVM_CAP_SET_TSS_ADDR", abi.KVM_CAP_SET_TSS_ADDR),
    ("KVM_CAP_SET_IDENTITY_MAP_ADDR", abi.KVM_CAP_SET_IDENTITY_MAP_ADDR),
    ("KVM_CAP_EXT_CPUID", abi.KVM_CAP_EXT_CPUID),
    ("KVM_CAP_MP_STATE", abi.KVM_CAP_MP_STATE),
    ("KVM_CAP_VCPU_EVENTS", abi.KVM_CAP_VCPU_EVENTS),
    ("KVM_CAP_DEBUGREGS", abi.KVM_CAP_DEBUGREGS),
    ("KVM_CAP_XSAVE", abi.KVM_CAP_XSAVE),
    ("KVM_CAP_XCRS", abi.KVM_CAP_XCRS),
    ("KVM_CAP_ADJUST_CLOCK", abi.KVM_CAP_ADJUST_CLOCK),
    ("KVM_CAP_TSC_DEADLINE_TIMER", abi.KVM_CAP_TSC_DEADLINE_TIMER),
    ("KVM_CAP_IMMEDIATE_EXIT", abi.KVM_CAP_IMMEDIATE_EXIT),
)

_CREATE_VM_ATTEMPTS = 5
_CREATE_VM_FIRST_PAUSE = 1e-6


class KvmSystem:
    """The open /dev/kvm. The descriptor stays the caller's."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def api_version(self) -> int:
        """Return KVM_GET_API_VERSION."""
        return ioctl_integer(self.descriptor, abi.KVM_GET_API_VERSION)

    def extension(self, capability: int) -> int:
        """Return KVM_CHECK_EXTENSION of one capability: 0 when the host has it not."""
        return ioctl_integer(self.descriptor, abi.KVM_CHECK_EXTENSION, capability)

    def vcpu_mmap_size(self) -> int:
        """Return the size in bytes of a vCPU's shared mapping."""
        return ioctl_integer(self.descriptor, abi.KVM_GET_VCPU_MMAP_SIZE)

    def max_vcpus(self) -> int:
        """Return how many vCPUs one VM may have."""
        return self.extension(abi.KVM_CAP_MAX_VCPUS) or self.extension(abi.KVM_CAP_NR_VCPUS) or 4

    def max_memslots(self) -> int:
        """Return how many memory slots one VM may have."""
        return self.extension(abi.KVM_CAP_NR_MEMSLOTS) or 32

    def check_version(self) -> None:
        """Raise CapabilityError if this KVM speaks another API."""
        version = self.api_version()
        if version != abi.API_VERSION:
            raise CapabilityError(f"KVM API version is {version}, {abi.API_VERSION} is necessary")

    def missing_capabilities(self) -> list[int]:
        """Return those of the required capabilities that this KVM lacks."""
        return [capability for _, capability in REQUIRED_CAPABILITIES if not self.extension(capability)]

    def supported_cpuid(self) -> list[CpuidEntry]:
        """Return KVM_GET_SUPPORTED_CPUID: what the host can give to a guest."""
        capacity = abi.MAX_CPUID_ENTRIES
        buffer = bytearray(abi.CPUID2_HEADER.size + capacity * abi.CPUID_ENTRY2.size)
        abi.CPUID2_HEADER.pack_into(buffer, 0, capacity, 0)
        ioctl_buffer(self.descriptor, abi.KVM_GET_SUPPORTED_CPUID, buffer)
        return unpack_cpuid(buffer)

    def msr_index_list(self) -> list[int]:
        """Return the indices of the MSRs that make up a vCPU's state on this host."""
        capacity = 0
        while True:
            buffer = bytearray(abi.MSR_LIST_HEADER.size + 4 * capacity)
            abi.MSR_LIST_HEADER.pack_into(buffer, 0, capacity)
            try:
                ioctl_buffer(self.descriptor, abi.KVM_GET_MSR_INDEX_LIST, buffer)
            except KvmError as error:
                (needed,) = abi.MSR_LIST_HEADER.unpack_from(buffer)
                if error.errno != E2BIG or needed <= capacity:
                    raise
                capacity = needed
                continue
            (count,) = abi.MSR_LIST_HEADER.unpack_from(buffer)
            return list(memoryview(buffer)[4 : 4 + 4 * count].cast("I"))

    def create_vm(self) -> int:
        """Return the descriptor of a new VM. A signal (EINTR) is no reason to fail: tried five times."""
        pause = _CREATE_VM_FIRST_PAUSE
        for attempt in range(1, _CREATE_VM_ATTEMPTS + 1):
            try:
                return ioctl_integer(self.descriptor, abi.KVM_CREATE_VM)
            except KvmError as error:
                if error.errno != EINTR or attempt == _CREATE_VM_ATTEMPTS:
                    raise
            time.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable")


def describe_missing(capabilities: list[int]) -> str:
    """Say which capabilities are missing: numbers as Firecracker gives them, with the kernel's names of ours."""
    names = {number: f" ({name})" for name, number in REQUIRED_CAPABILITIES}
    listed = ", ".join(f"{number:#x}{names.get(number, '')}" for number in capabilities)
    return f"Kvm error: Missing KVM capabilities: {listed}"


def unpack_cpuid(buffer: bytearray) -> list[CpuidEntry]:
    """Return the entries of a ``struct kvm_cpuid2`` that the kernel filled."""
    count, _ = abi.CPUID2_HEADER.unpack_from(buffer)
    entry = abi.CPUID_ENTRY2
    offset = abi.CPUID2_HEADER.size
    return [CpuidEntry._make(entry.unpack_from(buffer, offset + number * entry.size)) for number in range(count)]


def pack_cpuid(entries: list[CpuidEntry]) -> bytearray:
    """Return a ``struct kvm_cpuid2`` that holds ``entries``."""
    buffer = bytearray(abi.CPUID2_HEADER.pack(len(entries), 0))
    for entry in entries:
        buffer += abi.CPUID_ENTRY2.pack(*entry)
    return buffer
