"""The guest physical map: no two things in one place, RAM of every size, system memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.launch_plan import MAX_MEMORY_BYTES
from ipc.messages.records import MemoryRegion
from vmm import layout
from vmm.layout import LayoutError

GIB = 1 << 30


@pytest.mark.parametrize(
    ("size", "regions"),
    [
        (4096, ((0, 4096, 0),)),
        (3 * GIB, ((0, 3 * GIB, 0),)),
        (3 * GIB + 4096, ((0, 3 * GIB, 0), (4 * GIB, 4096, 3 * GIB))),
        (255 * GIB, ((0, 3 * GIB, 0), (4 * GIB, 252 * GIB, 3 * GIB))),
        (256 * GIB, ((0, 3 * GIB, 0), (4 * GIB, 252 * GIB, 3 * GIB), (512 * GIB, GIB, 255 * GIB))),
    ],
)
def test_ram_is_split_around_the_gaps(size: int, regions: tuple[tuple[int, int, int], ...]) -> None:
    assert layout.ram_regions(size) == tuple(MemoryRegion(*region) for region in regions)


@given(st.integers(1, MAX_MEMORY_BYTES // 4096))
def test_ram_of_any_size_is_all_there(pages: int) -> None:
    regions = layout.ram_regions(pages * 4096)
    assert sum(region.size for region in regions) == pages * 4096
    end = offset = 0
    for region in regions:
        assert region.guest_address >= end
        assert region.offset == offset
        end, offset = region.guest_address + region.size, offset + region.size
        for gap, gap_end in ((3 * GIB, 4 * GIB), (256 * GIB, 512 * GIB)):
            assert end <= gap or region.guest_address >= gap_end


@pytest.mark.parametrize("size", [0, -4096, 4097, MAX_MEMORY_BYTES + 4096])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(LayoutError) as caught:
        layout.ram_regions(size)
    assert caught.value.code == "layout.memory_size"


def test_the_memory_map_for_the_guest() -> None:
    assert layout.memory_map(layout.ram_regions(128 << 20)) == (
        (0, 0x9FC00, 1),
        (0x9FC00, 0x60400, 2),
        (0x100000, (128 << 20) - 0x100000, 1),
    )
    assert layout.memory_map(layout.ram_regions(4 * GIB))[2:] == (
        (0x100000, 3 * GIB - 0x100000, 1),
        (4 * GIB, GIB, 1),
    )
    assert len(layout.memory_map(layout.ram_regions(1 << 20))) == 2
    with pytest.raises(LayoutError):
        layout.memory_map(layout.ram_regions(4096))


def test_low_memory_structures_do_not_overlap() -> None:
    areas = [
        (layout.GDT_ADDRESS, 32),
        (layout.IDT_ADDRESS, 8),
        (layout.PVH_START_INFO_ADDRESS, 56),
        (layout.PVH_MODULE_LIST_ADDRESS, 32),
        (layout.ZERO_PAGE_ADDRESS, 4096),
        (layout.BOOT_STACK_ADDRESS - 0xFF0, 0xFF0),
        (layout.PML4_ADDRESS, 4096),
        (layout.PDPT_ADDRESS, 4096),
        (layout.PAGE_DIRECTORY_ADDRESS, 4096),
        (layout.COMMAND_LINE_ADDRESS, layout.COMMAND_LINE_SIZE),
        (layout.SYSTEM_MEMORY_ADDRESS, layout.SYSTEM_MEMORY_END - layout.SYSTEM_MEMORY_ADDRESS),
        (layout.RSDP_ADDRESS, 36),
        (layout.HIGH_MEMORY_ADDRESS, 0),
    ]
    end = 0
    for address, size in areas:
        assert address >= end
        end = address + size


def test_device_windows_do_not_overlap() -> None:
    assert layout.BOOT_TIMER_ADDRESS == layout.MMIO_GAP_ADDRESS
    assert layout.BOOT_TIMER_ADDRESS + layout.BOOT_TIMER_SIZE == layout.VIRTIO_MMIO_ADDRESS
    assert layout.VIRTIO_MMIO_END == layout.PCI_MMCONFIG_ADDRESS
    assert layout.PCI_MMCONFIG_ADDRESS + layout.PCI_MMCONFIG_SIZE == 0xFEC00000 == layout.IOAPIC_ADDRESS
    assert layout.LAPIC_ADDRESS < layout.KVM_TSS_ADDRESS < layout.MMIO_GAP_END
    assert layout.LAST_DEVICE_GSI - layout.FIRST_DEVICE_GSI + 1 == 19


def test_system_memory_fills_from_both_ends() -> None:
    memory = layout.SystemMemory()
    assert memory.allocate_low(1) == 0x9FC00
    assert memory.allocate_low(10, 64) == 0x9FC40
    assert memory.allocate_high(4096) == 0xDF000
    assert memory.allocate_high(16, 8) == 0xDEFF0
    with pytest.raises(LayoutError) as caught:
        memory.allocate_low(0x40000)
    assert caught.value.code == "layout.system_memory"
    with pytest.raises(LayoutError):
        memory.allocate_high(0x40000)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20000), st.sampled_from((1, 8, 16, 64, 4096))), max_size=40))
def test_system_memory_never_hands_out_a_byte_twice(requests: list[tuple[bool, int, int]]) -> None:
    memory = layout.SystemMemory()
    taken: list[tuple[int, int]] = []
    for low, size, alignment in requests:
        try:
            address = memory.allocate_low(size, alignment) if low else memory.allocate_high(size, alignment)
        except LayoutError:
            continue
        assert address % alignment == 0
        taken.append((address, address + size))
    taken.sort()
    edges = [(0, layout.SYSTEM_MEMORY_ADDRESS), *taken, (layout.SYSTEM_MEMORY_END, 1 << 20)]
    for (_, end), (start, _) in pairwise(edges):
        assert end <= start
