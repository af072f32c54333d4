"""CPUID normalisation: topology, features and host particulars, for both vendors and any vCPU."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.messages.records import CpuidEntry
from vcpu_worker.cpu import cpuid
from vcpu_worker.cpu.topology import MAX_VCPUS, Topology

ONES = 0xFFFF_FFFF


def entry(leaf: int, subleaf: int = 0, *, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0) -> CpuidEntry:
    return CpuidEntry(leaf, subleaf, 0, eax, ebx, ecx, edx)


def vendor_entry(vendor: bytes) -> CpuidEntry:
    first, second, third = (int.from_bytes(vendor[offset : offset + 4], "little") for offset in (0, 4, 8))
    return CpuidEntry(0, 0, 0, 0x1F, first, third, second)


def text_entries(text: bytes) -> list[CpuidEntry]:
    words = [int.from_bytes(text.ljust(48, b"\0")[offset : offset + 4], "little") for offset in range(0, 48, 4)]
    return [CpuidEntry(0x8000_0002 + number, 0, 0, *words[4 * number : 4 * number + 4]) for number in range(3)]


COMMON = [
    entry(1, eax=0xA10F11, ebx=ONES, ecx=1 << 15 | 1 << 5 | 1 << 3 | 1, edx=1 << 28 | 1),
    entry(0xB, 0, eax=7, edx=99),
    entry(0xB, 1, eax=7, edx=99),
    entry(0xB, 2, eax=7, edx=99),
    entry(0x4000_0000, eax=0x4000_0010, ebx=0x4B4D564B, ecx=0x564B4D56, edx=0x4D),
    entry(0x4000_0001, eax=0x0100_7EFB, edx=1),
    entry(0x4000_0010, eax=123),
    entry(0x8000_0007, edx=0),
]
INTEL_CACHES = (1 | 1 << 5 | 0xFFF << 14 | 0x3F << 26, 3 | 3 << 5 | 0xFFF << 14 | 0x3F << 26)
INTEL = [
    vendor_entry(b"GenuineIntel"),
    *COMMON,
    entry(4, 0, eax=INTEL_CACHES[0]),
    entry(4, 1, eax=INTEL_CACHES[1]),
    entry(4, 2, eax=0),
    entry(6, eax=0x77, ecx=9),
    entry(7, 0, ebx=1, ecx=ONES, edx=ONES),
    entry(0xA, eax=ONES, ebx=ONES, ecx=ONES, edx=ONES),
    entry(0x1F, 0, eax=5),
    entry(0x1F, 5, eax=5),
    *text_entries(b"Intel(R) Xeon(R) Platinum 8275CL CPU @ 3.00GHz"),
]
AMD = [
    vendor_entry(b"AuthenticAMD"),
    *COMMON,
    entry(7, 0, ebx=1, ecx=ONES, edx=ONES),
    entry(0x8000_0001, ecx=1 | 1 << 2),
    entry(0x8000_000A, eax=1, ebx=8, edx=ONES),
    entry(0x8000_0008, eax=0x3030, ecx=0xF_7001),
    entry(0x8000_001D, 0, eax=0x121 | 0xFFF << 14),
    entry(0x8000_001D, 3, eax=0x4163 | 0xFFF << 14),
    entry(0x8000_001D, 4),
    entry(0x8000_001E, eax=9, ebx=9, ecx=9, edx=9),
    *text_entries(b"AMD EPYC 7B13 64-Core Processor"),
]

topologies = st.integers(1, MAX_VCPUS).flatmap(
    lambda count: st.builds(Topology, st.integers(0, count - 1), st.just(count), st.booleans())
)
entries = st.builds(
    CpuidEntry,
    st.one_of(st.sampled_from([0, 1, 4, 6, 7, 0xA, 0xB, 0xD, 0x1F]), st.integers(0x8000_0000, 0x8000_0021)),
    st.integers(0, 5),
    st.integers(0, 7),
    *[st.integers(0, ONES)] * 4,
)


def by_leaf(result: list[CpuidEntry]) -> dict[tuple[int, int], CpuidEntry]:
    found = {(each.leaf, each.subleaf): each for each in result}
    assert len(found) == len(result), "an entry twice"
    return found


@given(st.lists(entries, max_size=40), topologies, st.sampled_from([b"GenuineIntel", b"AuthenticAMD", b"HygonGenuine"]))
def test_any_input_gives_entries_that_the_kernel_can_take(supported, topology, vendor):
    supported = [vendor_entry(vendor), *supported[1:]]
    before = list(supported)
    result = cpuid.normalise(supported, topology)
    assert supported == before
    assert len(by_leaf(result)) <= 256
    for each in result:
        assert all(0 <= value <= ONES for value in each)


@given(topologies, st.sampled_from([INTEL, AMD]))
def test_topology_leaves(topology, supported):
    leaves = by_leaf(cpuid.normalise(supported, topology))
    one = leaves[1, 0]
    assert one.ebx >> 24 == topology.vcpu
    assert (one.ebx >> 16 & 0xFF) >= topology.vcpu_count
    assert one.ebx >> 8 & 0xFF == 8
    assert bool(one.edx >> 28 & 1) == (topology.vcpu_count > 1)
    threads, cores, end = leaves[0xB, 0], leaves[0xB, 1], leaves[0xB, 2]
    siblings = 2 if topology.smt and topology.vcpu_count > 1 else 1
    assert (threads.eax, threads.ebx, threads.ecx) == (siblings - 1, siblings, 0x100)
    assert (cores.eax, cores.ebx, cores.ecx) == (5, topology.vcpu_count, 0x201)
    assert (end.eax, end.ebx, end.ecx) == (0, 0, 2)
    assert {level.edx for level in (threads, cores, end)} == {topology.vcpu}
    assert {level.flags for level in (threads, cores, end)} == {1}


@pytest.mark.parametrize("supported", [INTEL, AMD])
def test_features(supported: list[CpuidEntry]):
    leaves = by_leaf(cpuid.normalise(supported, Topology(0, 1, False)))
    ecx = leaves[1, 0].ecx
    assert ecx == 1 << 31 | 1 << 24 | 1 << 21 | 1  # hypervisor, TSC deadline, x2APIC; PDCM, VMX and MONITOR gone
    assert leaves[0x4000_0000, 0].eax == 0x4000_0001
    assert (leaves[0x4000_0001, 0].eax, leaves[0x4000_0001, 0].edx) == (0x0100_004B, 0)
    assert (0x4000_0010, 0) not in leaves
    assert leaves[0x8000_0007, 0].edx == 1 << 8


def test_intel():
    leaves = by_leaf(cpuid.normalise(INTEL, Topology(2, 6, True)))
    first, last = leaves[4, 0].eax, leaves[4, 1].eax
    assert (first >> 14 & 0xFFF, first >> 26) == (1, 2)  # two threads share it; three cores
    assert (last >> 14 & 0xFFF, last >> 26) == (5, 2)
    assert leaves[4, 2].eax == 0
    assert (leaves[6, 0].eax, leaves[6, 0].ecx) == (0x75, 1)
    assert leaves[7, 0].ebx == 1 | 1 << 6 | 1 << 13
    assert leaves[7, 0].ecx == ONES & ~(1 << 5)
    assert leaves[7, 0].edx == ONES
    assert leaves[0xA, 0][3:] == (0, 0, 0, 0)
    assert [leaves[0x1F, number][3:] for number in range(3)] == [leaves[0xB, number][3:] for number in range(3)]
    assert (0x1F, 5) not in leaves
    assert brand(leaves) == b"Intel(R) Xeon(R) Processor @ 3.00GHz"


def test_amd():
    leaves = by_leaf(cpuid.normalise(AMD, Topology(3, 4, True)))
    assert leaves[7, 0].edx == ONES & ~(1 << 29)
    assert leaves[0x8000_0001, 0].ecx == 1 | 1 << 22
    assert leaves[0x8000_000A, 0][3:] == (0, 0, 0, 0)
    assert leaves[0x8000_0008, 0].ecx == 0xF_5003
    assert leaves[0x8000_001D, 0].eax >> 14 & 0xFFF == 1
    assert leaves[0x8000_001D, 3].eax >> 14 & 0xFFF == 3
    assert leaves[0x8000_001D, 4].eax == 0
    assert leaves[0x8000_001E, 0][3:] == (3, 1 | 1 << 8, 0, 0)
    assert brand(leaves) == b"AMD EPYC"


#: vCPUs, smt → thread shift, threads a core, ids that leaf 1 has room for, cores.
TOPOLOGIES = {
    (1, False): (0, 1, 1, 1),
    (1, True): (0, 1, 1, 1),
    (2, False): (0, 1, 2, 2),
    (2, True): (1, 2, 2, 1),
    (4, False): (0, 1, 4, 4),
    (4, True): (1, 2, 4, 2),
    (32, False): (0, 1, 32, 32),
    (32, True): (1, 2, 32, 16),
}


@pytest.mark.parametrize("shape", TOPOLOGIES)
def test_every_vcpu_of_an_intel_guest(shape):
    count, smt = shape
    _, threads, _, cores = TOPOLOGIES[shape]
    for vcpu in range(count):
        leaves = by_leaf(cpuid.normalise(INTEL, Topology(vcpu, count, smt), host=INTEL))
        check_common(leaves, vcpu, shape)
        assert [leaves[0x1F, number][3:] for number in range(3)] == [leaves[0xB, number][3:] for number in range(3)]
        for number, shared_by in ((0, threads), (1, count)):
            eax = leaves[4, number].eax
            assert (eax >> 14 & 0xFFF, eax >> 26) == (shared_by - 1, cores - 1)
            assert eax & 0x3FFF == INTEL_CACHES[number] & 0x3FFF
        assert leaves[4, 2][3:] == (0, 0, 0, 0)


@pytest.mark.parametrize("shape", TOPOLOGIES)
def test_every_vcpu_of_an_amd_guest(shape):
    count, smt = shape
    shift, threads, _, _ = TOPOLOGIES[shape]
    for vcpu in range(count):
        leaves = by_leaf(cpuid.normalise(AMD, Topology(vcpu, count, smt), host=AMD))
        check_common(leaves, vcpu, shape)
        assert leaves[0x8000_0008, 0].ecx == 0xF_0000 | 5 << 12 | count - 1
        assert leaves[0x8000_0008, 0].eax == 0x3030
        for number, shared_by in ((0, threads), (3, count)):
            assert leaves[0x8000_001D, number].eax >> 14 & 0xFFF == shared_by - 1
        assert leaves[0x8000_001E, 0][3:] == (vcpu, vcpu >> shift | (threads - 1) << 8, 0, 0)


def check_common(leaves, vcpu, shape):
    count, (shift, threads, room, _) = shape[0], TOPOLOGIES[shape]
    assert leaves[1, 0].ebx == vcpu << 24 | room << 16 | 8 << 8 | 0xFF
    assert leaves[1, 0].edx >> 28 & 1 == (count > 1)
    assert leaves[0xB, 0][3:] == (shift, threads, 1 << 8, vcpu)
    assert leaves[0xB, 1][3:] == (5, count, 2 << 8 | 1, vcpu)
    assert leaves[0xB, 2][3:] == (0, 0, 2, vcpu)


def test_vendor_and_cache_data_are_the_host_s_whatever_a_template_says():
    host = [*AMD, entry(0x8000_0005, ecx=0x2008_0140), entry(0x8000_0006, ecx=0x0200_6140, edx=0x0800_9140)]
    base = [each._replace(ebx=1, ecx=2, edx=3) if each.leaf in (0, 0x8000_0005, 0x8000_0006) else each for each in host]
    base[0] = base[0]._replace(eax=7)
    leaves = by_leaf(cpuid.normalise(base, Topology(0, 1, False), host=host))
    assert leaves[0, 0] == host[0]._replace(eax=7)
    for number in (-2, -1):
        assert leaves[host[number].leaf, 0] == host[number]
    assert brand(leaves) == b"AMD EPYC"


def brand(leaves: dict[tuple[int, int], CpuidEntry]) -> bytes:
    words = [word for leaf in (0x8000_0002, 0x8000_0003, 0x8000_0004) for word in leaves[leaf, 0][3:]]
    return b"".join(word.to_bytes(4, "little") for word in words).rstrip(b"\0")


@pytest.mark.parametrize(
    ("host", "guest"),
    [
        (b"Intel(R) Xeon(R) CPU E5-2686 v4 @ 2.30GHz", b"Intel(R) Xeon(R) Processor @ 2.30GHz"),
        (b"Intel(R) Xeon(R) Platinum 8488C", b"Intel(R) Xeon(R) Processor"),
        (b"@", b"Intel(R) Xeon(R) Processor"),
        (b"@ GHz\0\0", b"Intel(R) Xeon(R) Processor @ GHz"),
    ],
)
def test_intel_brand(host: bytes, guest: bytes):
    assert cpuid.intel_brand(host) == guest
