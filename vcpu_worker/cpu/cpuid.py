"""CPUID of a vCPU: what KVM supports, made consistent with the guest's topology and free of host particulars.

docs/cpu-templates.md, "Normalisation", says what becomes what. Sources: Intel SDM volume 2A, CPUID; AMD APM volume 3,
appendix E; Documentation/virt/kvm/x86/cpuid.rst for the leaves from 0x40000000.
"""

from __future__ import annotations

from base.lean_typing import Callable, Iterable, Sequence
from ipc.messages.records import CpuidEntry
from vcpu_worker.cpu.topology import PACKAGE_SHIFT, Topology
from vcpu_worker.kvm.abi import CPUID_FLAG_SIGNIFICANT_INDEX

VENDOR_INTEL = b"GenuineIntel"
VENDOR_AMD = b"AuthenticAMD"

# Leaf 1
_CLFLUSH_LINE = 8  # in units of 8 bytes
_ECX1_MONITOR = 1 << 3
_ECX1_VMX = 1 << 5
_ECX1_PDCM = 1 << 15
_ECX1_X2APIC = 1 << 21
_ECX1_TSC_DEADLINE = 1 << 24
_ECX1_HYPERVISOR = 1 << 31
_EDX1_HTT = 1 << 28
# Leaf 6 (Intel)
_EAX6_TURBO = 1 << 1
_ECX6_ENERGY_PERF_BIAS = 1 << 3
# Leaf 7, index 0
_EBX7_FDP_EXCPTN_ONLY = 1 << 6
_EBX7_ZERO_FCS_FDS = 1 << 13
_ECX7_WAITPKG = 1 << 5
_EDX7_ARCH_CAPABILITIES = 1 << 29
#: L1 and L2 caches and TLBs, as AMD describes them
_HOST_CACHE_LEAVES = (0x8000_0005, 0x8000_0006)
_SVM_LEAF = 0x8000_000A
# 0x80000001, 0x80000007 (AMD)
_ECX8_SVM = 1 << 2
_ECX8_TOPOLOGY_EXTENSIONS = 1 << 22
_EDX8_INVARIANT_TSC = 1 << 8
# KVM leaves
_KVM_SIGNATURE_LEAF = 0x4000_0000
_KVM_FEATURES_LEAF = 0x4000_0001
#: CLOCKSOURCE, NOP_IO_DELAY, CLOCKSOURCE2, PV_EOI, CLOCKSOURCE_STABLE. PV_EOI spares the exit that ends an interrupt:
#: a flag in the vCPU's own memory, which KVM keeps up only while that vCPU runs. The features that one KVM VM resolves
#: by itself among its vCPUs (PV_UNHALT, ASYNC_PF, PV_SCHED_YIELD, …) would be wrong in a guest whose vCPUs are spread
#: over several.
KVM_FEATURES = 0x0100_004B

_LEVEL_SMT = 1
_LEVEL_CORE = 2

_MASK32 = 0xFFFF_FFFF
_Key = tuple[int, int]
_Leaves = dict[_Key, CpuidEntry]


def vendor(entries: Iterable[CpuidEntry]) -> bytes:
    """Return the 12 bytes of the vendor string, empty if there is no leaf 0."""
    for entry in entries:
        if entry.leaf == 0:
            return b"".join(register.to_bytes(4, "little") for register in (entry.ebx, entry.edx, entry.ecx))
    return b""


def normalise(
    base: Iterable[CpuidEntry], topology: Topology, *, host: Sequence[CpuidEntry] | None = None
) -> list[CpuidEntry]:
    """Return the CPUID of one vCPU. Does not change its input.

    ``host`` is KVM_GET_SUPPORTED_CPUID, ``base`` the same with a CPU template's changes (without ``host``: without
    any). Vendor and cache data are the host's whatever the template says, since the guest's choice of code depends on
    the one and its tuning on the other.
    """
    leaves: _Leaves = {(entry.leaf, entry.subleaf): entry for entry in base}
    if host is not None:
        _host_data(leaves, host)
    maker = vendor(leaves.values())
    _feature_information(leaves, topology)
    _extended_topology(leaves, topology, 0xB)
    _kvm(leaves)
    _invariant_tsc(leaves)
    _no_nesting(leaves)
    if maker == VENDOR_INTEL:
        _intel(leaves, topology)
    elif maker == VENDOR_AMD:
        _amd(leaves, topology)
    return list(leaves.values())


def _host_data(leaves: _Leaves, host: Iterable[CpuidEntry]) -> None:
    for entry in host:
        if (entry.leaf, entry.subleaf) == (0, 0):
            vendor_of_host = {"ebx": entry.ebx, "ecx": entry.ecx, "edx": entry.edx}
            leaves[0, 0] = leaves.get((0, 0), entry)._replace(**vendor_of_host)
        elif entry.leaf in _HOST_CACHE_LEAVES:
            leaves[entry.leaf, entry.subleaf] = entry


def _change(leaves: _Leaves, key: _Key, change: Callable[[CpuidEntry], CpuidEntry]) -> None:
    entry = leaves.get(key)
    if entry is not None:
        leaves[key] = change(entry)


def _of_function(leaves: _Leaves, function: int) -> list[_Key]:
    return [key for key in leaves if key[0] == function]


def _feature_information(leaves: _Leaves, topology: Topology) -> None:
    def change(entry: CpuidEntry) -> CpuidEntry:
        ebx = entry.ebx & 0xFF | _CLFLUSH_LINE << 8 | topology.logical_id_space << 16 | topology.apic_id << 24
        ecx = (
            entry.ecx & ~(_ECX1_PDCM | _ECX1_MONITOR | _ECX1_VMX) | _ECX1_X2APIC | _ECX1_TSC_DEADLINE | _ECX1_HYPERVISOR
        )
        edx = entry.edx | _EDX1_HTT if topology.vcpu_count > 1 else entry.edx & ~_EDX1_HTT
        return entry._replace(ebx=ebx, ecx=ecx, edx=edx)

    _change(leaves, (1, 0), change)


def _extended_topology(leaves: _Leaves, topology: Topology, function: int) -> None:
    """Leaf 0xB (and Intel's 0x1F): a thread level, a core level, and the level that ends the list."""
    for key in _of_function(leaves, function):
        del leaves[key]
    levels = (
        (topology.smt_shift, topology.threads_per_core, _LEVEL_SMT),
        (PACKAGE_SHIFT, topology.vcpu_count, _LEVEL_CORE),
        (0, 0, 0),
    )
    for index, (shift, count, kind) in enumerate(levels):
        leaves[function, index] = CpuidEntry(
            function, index, CPUID_FLAG_SIGNIFICANT_INDEX, shift, count, kind << 8 | index, topology.apic_id
        )


def _kvm(leaves: _Leaves) -> None:
    _change(leaves, (_KVM_SIGNATURE_LEAF, 0), lambda entry: entry._replace(eax=_KVM_FEATURES_LEAF))
    _change(leaves, (_KVM_FEATURES_LEAF, 0), lambda entry: entry._replace(eax=entry.eax & KVM_FEATURES, edx=0))
    for key in [key for key in leaves if _KVM_FEATURES_LEAF < key[0] < 0x4001_0000]:
        del leaves[key]


def _invariant_tsc(leaves: _Leaves) -> None:
    """Without it Linux does not settle on the TSC, and a kvm-clock read is slower. KVM needs an invariant host TSC."""
    _change(leaves, (0x8000_0007, 0), lambda entry: entry._replace(edx=entry.edx | _EDX8_INVARIANT_TSC))


def _no_nesting(leaves: _Leaves) -> None:
    """No VMX (leaf 1) and no SVM: a guest that is spread over several KVM VMs cannot run virtual machines.

    Each VM would follow only its own vCPU's changes of their page tables.
    """
    _change(leaves, (0x8000_0001, 0), lambda entry: entry._replace(ecx=entry.ecx & ~_ECX8_SVM))
    _change(leaves, (_SVM_LEAF, 0), lambda entry: entry._replace(eax=0, ebx=0, ecx=0, edx=0))


def _cache_sharing(entry: CpuidEntry, topology: Topology) -> int:
    """EAX of a cache leaf with bits 14–25: how many APIC ids share this cache, minus one (L1, L2: a core)."""
    level = entry.eax >> 5 & 7
    sharing = topology.threads_per_core if level < 3 else topology.vcpu_count
    return entry.eax & ~(0xFFF << 14) | (sharing - 1) << 14


# ---------------------------------------------------------------- Intel


def _intel(leaves: _Leaves, topology: Topology) -> None:
    for key in _of_function(leaves, 4):
        entry = leaves[key]
        if entry.eax & 0x1F:
            eax = _cache_sharing(entry, topology) & ~(0x3F << 26) | (topology.core_count - 1) << 26
            leaves[key] = entry._replace(eax=eax & _MASK32)
    _change(
        leaves,
        (6, 0),
        lambda entry: entry._replace(eax=entry.eax & ~_EAX6_TURBO, ecx=entry.ecx & ~_ECX6_ENERGY_PERF_BIAS),
    )
    _change(
        leaves,
        (7, 0),
        lambda entry: entry._replace(
            ebx=entry.ebx | _EBX7_FDP_EXCPTN_ONLY | _EBX7_ZERO_FCS_FDS, ecx=entry.ecx & ~_ECX7_WAITPKG
        ),
    )
    _change(leaves, (0xA, 0), lambda entry: entry._replace(eax=0, ebx=0, ecx=0, edx=0))
    if _of_function(leaves, 0x1F):
        _extended_topology(leaves, topology, 0x1F)
    brand = _brand(leaves)
    if brand.strip(b"\0"):
        _set_brand(leaves, intel_brand(brand))


def intel_brand(host_brand: bytes) -> bytes:
    """Return the guest's brand string: the host's nominal frequency is kept, its model name is not."""
    words = host_brand.rstrip(b"\0 ").split(b" ")
    frequency = words[-1]
    if len(words) > 1 and words[-2] == b"@" and frequency.endswith(b"Hz"):
        return b"Intel(R) Xeon(R) Processor @ " + frequency
    return b"Intel(R) Xeon(R) Processor"


# ---------------------------------------------------------------- AMD


def _amd(leaves: _Leaves, topology: Topology) -> None:
    _change(leaves, (7, 0), lambda entry: entry._replace(edx=entry.edx & ~_EDX7_ARCH_CAPABILITIES))
    _change(leaves, (0x8000_0001, 0), lambda entry: entry._replace(ecx=entry.ecx | _ECX8_TOPOLOGY_EXTENSIONS))
    _change(
        leaves,
        (0x8000_0008, 0),
        lambda entry: entry._replace(ecx=entry.ecx & ~0xFFFF | topology.vcpu_count - 1 | PACKAGE_SHIFT << 12),
    )
    for key in _of_function(leaves, 0x8000_001D):
        entry = leaves[key]
        if entry.eax & 0x1F:
            leaves[key] = entry._replace(eax=_cache_sharing(entry, topology))
    _change(
        leaves,
        (0x8000_001E, 0),
        lambda entry: entry._replace(
            eax=topology.apic_id, ebx=topology.core_id | (topology.threads_per_core - 1) << 8, ecx=0, edx=0
        ),
    )
    _set_brand(leaves, b"AMD EPYC")


# ---------------------------------------------------------------- brand string, 0x80000002–4


def _brand(leaves: _Leaves) -> bytes:
    brand = b""
    for function in (0x8000_0002, 0x8000_0003, 0x8000_0004):
        entry = leaves.get((function, 0))
        if entry is not None:
            brand += b"".join(register.to_bytes(4, "little") for register in entry[3:7])
    return brand


def _set_brand(leaves: _Leaves, brand: bytes) -> None:
    padded = brand[:47].ljust(48, b"\0")
    for number, function in enumerate((0x8000_0002, 0x8000_0003, 0x8000_0004)):
        part = padded[16 * number : 16 * number + 16]
        registers = [int.from_bytes(part[offset : offset + 4], "little") for offset in (0, 4, 8, 12)]
        leaves[function, 0] = CpuidEntry(function, 0, 0, *registers)
