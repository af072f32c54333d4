"""Guest memory: translation and bounds, views, regions that change, discarding, what was written."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.errors import GuestMemoryError, IpcError
from ipc.guest_memory import GuestMemory
from ipc.messages.records import MemoryRegion
from tests.harness.memory_fixtures import allocated, two_regions
from vmm import layout

MIB = 1 << 20


def test_regions_lie_where_they_say_in_the_file() -> None:
    memory, fd = two_regions()
    memory.write(0x1234, b"low")
    memory.write((4 << 30) + 0x10, b"high")
    assert memory.read(0x1234, 3) == b"low"
    assert os.pread(fd, 3, 0x1234) == b"low"
    assert os.pread(fd, 4, MIB + 0x10) == b"high"
    assert memory.translate(MIB - 1, 1) == MIB - 1
    assert memory.translate(4 << 30, MIB) == MIB
    assert bytes(memory.view[MIB + 0x10 : MIB + 0x14]) == b"high"
    assert ctypes.string_at(memory.address + 0x1234, 3) == b"low"
    memory.close()
    memory.close()
    os.close(fd)


@pytest.mark.parametrize(
    ("address", "length"),
    [(MIB, 1), (MIB - 1, 2), (-1, 1), (0, -1), (3 << 30, 1), ((4 << 30) - 1, 2), ((4 << 30) + MIB, 1), (1 << 70, 1)],
)
def test_addresses_outside_ram_are_refused(address: int, length: int) -> None:
    memory, fd = two_regions()
    for access in (
        lambda: memory.translate(address, length),
        lambda: memory.read(address, length),
        lambda: memory.window(address, length),
        lambda: memory.discard(address, length),
    ):
        with pytest.raises(GuestMemoryError) as caught:
            access()
        assert isinstance(caught.value, IpcError)
    if length > 0:
        with pytest.raises(GuestMemoryError):
            memory.write(address, bytes(length))
    assert allocated(fd) == 0
    memory.close()
    os.close(fd)


@given(
    st.one_of(st.integers(-(1 << 40), 1 << 40), st.sampled_from((0, MIB, 4 << 30, (4 << 30) + MIB))),
    st.integers(-10, 2 * MIB),
)
def test_any_address_is_ram_or_an_error(address: int, length: int) -> None:
    memory, fd = two_regions()
    inside = length >= 0 and any(start <= address and address + length <= start + MIB for start in (0, 4 << 30))
    try:
        offset = memory.translate(address, length)
        assert inside
        assert 0 <= offset <= offset + length <= memory.size
        view = memory.window(address, length)
        assert len(view) == length
        view.release()
    except GuestMemoryError:
        assert not inside
    finally:
        memory.close()
        os.close(fd)


def test_regions_come_and_go_within_the_mapping() -> None:
    memory, fd = two_regions()
    low, high = memory.regions
    memory.write(4 << 30, b"high")
    mapped = memory.address
    memory.set_regions((low,))
    with pytest.raises(GuestMemoryError):
        memory.translate(4 << 30, 1)
    for impossible in ((), (high, low), (low, MemoryRegion(4 << 30, 2 * MIB, MIB))):
        with pytest.raises(GuestMemoryError):
            memory.set_regions(impossible)
        assert memory.regions == (low,)
        assert memory.translate(0, MIB) == 0
    memory.set_regions((low, MemoryRegion(8 << 30, MIB, MIB)))
    assert memory.read(8 << 30, 4) == b"high"
    assert memory.address == mapped
    memory.close()
    os.close(fd)


def test_spans_lead_from_addresses_to_offsets() -> None:
    memory, fd = two_regions()
    assert memory.spans == ((0, MIB, 0), (4 << 30, (4 << 30) + MIB, MIB - (4 << 30)))
    for start, end, shift in memory.spans:
        assert memory.translate(start, end - start) == start + shift
    memory.close()
    os.close(fd)


def test_views_write_through_and_survive_closing() -> None:
    memory, fd = two_regions()
    view = memory.window(0x3000, 4)
    view[:] = b"abcd"
    assert memory.read(0x3000, 4) == b"abcd"
    memory.close()
    view[0:1] = b"z"
    assert os.pread(fd, 4, 0x3000) == b"zbcd"
    view.release()
    os.close(fd)


def test_no_descriptor_is_left() -> None:
    before = os.listdir("/proc/self/fd")
    memory, fd = two_regions()
    memory.close()
    os.close(fd)
    with pytest.raises(GuestMemoryError):
        GuestMemory(0, MIB, layout.ram_regions(MIB))
    assert os.listdir("/proc/self/fd") == before


def test_discarding_gives_pages_back_and_zeros() -> None:
    memory, fd = two_regions()
    memory.write(0, b"x" * MIB)
    memory.write(4 << 30, b"y" * 8192)
    memory.discard(0, MIB)
    assert allocated(fd) == 8192
    assert memory.read(0x5000, 4) == bytes(4)
    with pytest.raises(GuestMemoryError):
        memory.discard(1, 4096)
    memory.close()
    os.close(fd)


def test_guest_memory_is_left_out_of_core_dumps() -> None:
    memory, fd = two_regions()
    with open("/proc/self/smaps", encoding="ascii") as maps:
        areas = maps.read().split("VmFlags:")
    flags = next(
        areas[i + 1].split("\n")[0] for i, area in enumerate(areas) if "/memfd:guest" in area.split("\n", 1)[1]
    )
    assert "dd" in flags.split()
    memory.close()
    os.close(fd)


@pytest.mark.parametrize(
    "regions",
    [
        (),
        (MemoryRegion(0, 0, 0),),
        (MemoryRegion(0, 2 * MIB + 4096, 0),),
        (MemoryRegion(0, MIB + 1, 0),),
        (MemoryRegion(0, MIB, 0), MemoryRegion(MIB - 4096, MIB, MIB)),
        (MemoryRegion(0, MIB, 0), MemoryRegion(4 << 30, MIB, MIB - 4096)),
        (MemoryRegion(100, MIB, 0),),
    ],
)
def test_impossible_regions_are_refused(regions: tuple[MemoryRegion, ...]) -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 2 * MIB)
    with pytest.raises(GuestMemoryError):
        GuestMemory(fd, 2 * MIB, regions)
    os.close(fd)


def test_what_cannot_be_mapped_is_an_error_of_ours() -> None:
    regions = layout.ram_regions(MIB)
    small = os.memfd_create("guest")
    with pytest.raises(GuestMemoryError):
        GuestMemory(small, MIB, regions)
    os.ftruncate(small, MIB)
    read_only = os.open(f"/proc/self/fd/{small}", os.O_RDONLY)
    with pytest.raises(GuestMemoryError) as caught:
        GuestMemory(read_only, MIB, regions)
    assert str(caught.value) == (
        "Invalid Memory Configuration: Cannot create mmap region: Permission denied (os error 13)"
    )
    assert caught.value.errno == 13
    os.close(read_only)
    os.close(small)
    assert mmap.PAGESIZE == layout.PAGE_SIZE


# ---------------------------------------------------------------- what was written


def pages_of(bitmap: bytes) -> set[int]:
    return {8 * index + bit for index, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1}


def test_nothing_is_tracked_unless_somebody_wants_it() -> None:
    memory, fd = two_regions()
    memory.write(0, b"x")
    memory.mark_dirty(0, 4096)
    memory.mark_dirty(-1, 1 << 60)  # not even looked at: no fast path pays for it
    assert memory.take_dirty() == b""
    assert not memory.tracks_dirty
    memory.track_dirty(True)
    assert memory.tracks_dirty
    assert pages_of(memory.take_dirty()) == set()
    memory.write(0, b"x")
    memory.track_dirty(False)
    assert memory.take_dirty() == b""
    memory.close()
    os.close(fd)


def test_every_way_of_writing_marks_its_pages() -> None:
    memory, fd = two_regions()
    memory.track_dirty(True)
    memory.write(0x1FFF, b"ab")
    memory.write((4 << 30) + 0x3000, b"x")
    memory.discard(0x8000, 0x2000)
    memory.write(0x5000, b"")
    assert len(memory.take_dirty()) == 2 * MIB // 4096 // 8
    memory.write(0x1FFF, b"ab")
    memory.write((4 << 30) + 0x3000, b"x")
    memory.discard(0x8000, 0x2000)
    assert pages_of(memory.take_dirty()) == {1, 2, 256 + 3, 8, 9}
    assert pages_of(memory.take_dirty()) == set()
    memory.close()
    os.close(fd)


@given(st.lists(st.tuples(st.integers(0, 2 * MIB), st.integers(0, 2 * MIB)), max_size=8))
def test_marks_are_those_of_a_set_of_pages(marks: list[tuple[int, int]]) -> None:
    memory, fd = two_regions()
    memory.track_dirty(True)
    expected: set[int] = set()
    for offset, wanted in marks:
        length = min(wanted, 2 * MIB - offset)
        memory.mark_dirty(offset, length)
        if length:
            expected |= set(range(offset // 4096, (offset + length - 1) // 4096 + 1))
    assert pages_of(memory.take_dirty()) == expected
    memory.close()
    os.close(fd)


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (-4096, 8192), (2 * MIB, 1), (0, 2 * MIB + 1), (0, -1), (5, -6)]
)
def test_what_is_not_in_the_mapping_cannot_be_marked(offset: int, length: int) -> None:
    memory, fd = two_regions()
    memory.track_dirty(True)
    with pytest.raises(GuestMemoryError):
        memory.mark_dirty(offset, length)
    assert pages_of(memory.take_dirty()) == set()
    memory.close()
    os.close(fd)
