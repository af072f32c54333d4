"""ELF kernels: what is loaded where, the PVH note, and every lie that a header can tell."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.guest_memory import GuestMemory
from tests.harness import kernel_images as images
from tests.harness.memory_fixtures import FileFactory, MemoryFactory
from vmm.boot import elf
from vmm.boot.errors import KernelError
from vmm.boot.image_file import load_elf
from vmm.boot.image_memory import ImageMemory

MIB = 1 << 20
PREFIX = (
    "System configuration error: Cannot load kernel due to invalid memory configuration or invalid kernel image: "
    "Kernel Loader: failed to load ELF kernel image: Kernel Loader: "
)


def parse(data: bytes) -> elf.ElfImage:
    header = elf.parse_header(data[:64], len(data))
    return elf.parse_program_headers(header, data[header.table_offset :], len(data))


def patched(data: bytes, offset: int, layout: str, *values: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(layout, changed, offset, *values)
    return bytes(changed)


def stream(memory: GuestMemory, data: bytes, sizes: list[int]) -> tuple[elf.ElfImage, int | None]:
    loader = elf.ElfStreamLoader(ImageMemory(memory), len(data))
    position = 0
    for size in sizes:
        loader.feed(data[position : position + size])
        position += size
    loader.feed(data[position:])
    return loader.finish()


def test_segments_are_loaded_and_bss_is_zero(guest_memory: MemoryFactory, open_file: FileFactory) -> None:
    kernel = images.small_kernel()
    memory = guest_memory(32 * MIB)
    image, entry = load_elf(ImageMemory(memory), open_file(kernel), len(kernel))
    assert image.entry == 0x100_0000
    assert entry == 0x100_0100
    assert (image.start, image.end) == (0x100_0000, 0x120_0000 + 5 + 5000 + 11 + 0x30000)
    assert memory.read(0x100_0000, 512) == bytes(range(256)) * 2
    assert memory.read(0x120_0000, 5) == b"\xabdata"
    assert memory.read(0x120_0000 + 5005, 11) == b"end of data"
    assert memory.read(0x120_0000 + 5016, 0x30000) == bytes(0x30000)


@given(st.lists(st.integers(0, 70_000), max_size=8))
def test_a_stream_in_any_pieces_loads_the_same(guest_memory: MemoryFactory, sizes: list[int]) -> None:
    kernel = images.small_kernel()
    memory = guest_memory(32 * MIB)
    image, entry = stream(memory, kernel, sizes)
    assert image == parse(kernel)
    assert entry == 0x100_0100
    for segment in image.segments:
        file_end = segment.file_offset + segment.file_size
        loaded = memory.read(segment.address, segment.memory_size)
        assert loaded == kernel[segment.file_offset : file_end].ljust(segment.memory_size, b"\0")


def test_a_stream_that_ends_early_is_refused(guest_memory: MemoryFactory) -> None:
    kernel = images.small_kernel()
    for cut in (10, 70_000, len(kernel) - 1):
        loader = elf.ElfStreamLoader(ImageMemory(guest_memory(32 * MIB)), len(kernel))
        loader.feed(kernel[:cut])
        with pytest.raises(KernelError) as caught:
            loader.finish()
        assert caught.value.code == "kernel.elf.truncated"


def test_an_image_without_pvh_note_has_no_pvh_entry(guest_memory: MemoryFactory) -> None:
    assert stream(guest_memory(32 * MIB), images.small_kernel(pvh=False), [])[1] is None
    other = images.elf([images.Load(0x10_0000, b"x" * 100)], 0x10_0000, images.note(b"GNU\0", 18, bytes(8)))
    assert stream(guest_memory(2 * MIB), other, [])[1] is None


def test_the_pvh_note_among_others() -> None:
    notes = (
        images.note(b"Xen\0", 6, b"linux\0")
        + images.note(b"GNU\0", 3, bytes(20))
        + images.note(b"Linux\0", 0x101, b"6.1\0")
        + images.pvh_note(0x100_0850, 4)
    )
    assert elf.find_pvh_entry(notes) == 0x100_0850
    assert elf.find_pvh_entry(images.note(b"Xen\0", 18, b"\1\0\0\0" + bytes(12))) == 1
    assert elf.find_pvh_entry(b"") is None
    assert elf.find_pvh_entry(notes[:-39]) is None


@pytest.mark.parametrize("alignment", [0, 1, 3, 4, 8, 4096])
def test_notes_are_padded_to_4_bytes_whatever_their_header_says(
    alignment: int, guest_memory: MemoryFactory, open_file: FileFactory
) -> None:
    notes = images.note(b"GNU\0", 5, bytes(12)) + images.pvh_note(0x10_0004, 4)
    kernel = images.elf([images.Load(0x10_0000, b"x" * 100)], 0x10_0000, notes, alignment)
    assert load_elf(ImageMemory(guest_memory(2 * MIB)), open_file(kernel), len(kernel))[1] == 0x10_0004


@pytest.mark.parametrize(
    "notes",
    [
        struct.pack("<III", 4, 8, 18) + b"Xen\0",
        struct.pack("<III", 0xFFFFFFFF, 0xFFFFFFFF, 18) + bytes(40),
        images.note(b"Xen\0", 18, b"abc"),
    ],
)
def test_damaged_notes_are_refused(notes: bytes) -> None:
    with pytest.raises(KernelError) as caught:
        elf.find_pvh_entry(notes)
    assert caught.value.code == "kernel.elf.notes"


def test_a_pvh_entry_outside_the_kernel_is_refused(guest_memory: MemoryFactory) -> None:
    kernel = images.elf([images.Load(0x10_0000, b"x" * 100)], 0x10_0000, images.pvh_note(0x200000))
    with pytest.raises(KernelError) as caught:
        stream(guest_memory(4 * MIB), kernel, [])
    assert caught.value.code == "kernel.elf.entry"


def test_segments_below_1_mib_and_larger_than_their_memory_are_loaded(
    guest_memory: MemoryFactory, open_file: FileFactory
) -> None:
    loads = [images.Load(0x10_0000, b"high"), images.Load(0x8_A000, b"trampoline"), images.Load(0, b"vectors", 3)]
    kernel = images.elf(loads, 0x10_0000, images.pvh_note(0x10_0000))
    memory = guest_memory(2 * MIB)
    image, entry = load_elf(ImageMemory(memory), open_file(kernel), len(kernel))
    assert (entry, image.start, image.end) == (0x10_0000, 0, 0x10_0004)
    assert [memory.read(load.address, len(load.data)) for load in loads] == [load.data for load in loads]


LOADS = st.lists(
    st.builds(
        images.Load,
        st.integers(0x0F_F000, 0x10_3000),
        st.one_of(st.binary(max_size=40), st.integers(0, 9000).map(lambda size: b"\x5a" * size),
                  st.integers(0, 9000).map(bytes)),
        st.one_of(st.none(), st.integers(1, 12_000)),
    ),
    min_size=1, max_size=8,
)  # fmt: skip


@given(LOADS, st.randoms(use_true_random=False), st.lists(st.integers(0, 9000), max_size=8))
def test_overlapping_segments_are_loaded_one_over_the_other(
    guest_memory: MemoryFactory,
    open_file: FileFactory,
    loads: list[images.Load],
    order: random.Random,
    sizes: list[int],
) -> None:
    """As by copying them in the order of the program headers, also where the file has them in another order."""
    expected = bytearray(1 << 15)
    for load in loads:
        start = load.address - 0xF_F000
        expected[start : start + len(load.data)] = load.data
    kernel = images.elf_in_order(loads, order.sample(range(len(loads)), len(loads)))
    if not any(load.data or load.memory_size for load in loads):
        return
    memory = guest_memory(2 * MIB)
    image, _ = load_elf(ImageMemory(memory), open_file(kernel), len(kernel))
    assert memory.read(0xF_F000, 1 << 15) == expected
    streamed = guest_memory(2 * MIB)
    stream(streamed, kernel, sizes)
    assert streamed.read(0xF_F000, 1 << 15) == expected
    assert len(image.pieces) <= 2 * len(image.segments)
    addresses = sorted((piece.address, piece.address + piece.file_size) for piece in image.pieces)
    assert all(first[1] <= second[0] for first, second in pairwise(addresses))


Change = Callable[[bytes], bytes]
LIES: dict[str, tuple[Change, str, str]] = {
    "empty": (lambda k: b"", "kernel.elf.truncated", "Unable to read elf header"),
    "cut header": (lambda k: k[:63], "kernel.elf.truncated", "Unable to read elf header"),
    "magic": (lambda k: b"\x7fELG" + k[4:], "kernel.elf.magic", "Invalid Elf magic number"),
    "32 bits": (lambda k: patched(k, 4, "B", 1), "kernel.elf.machine", "Invalid Elf magic number"),
    "big endian": (
        lambda k: patched(k, 5, "B", 2),
        "kernel.elf.byte_order",
        "Trying to load big-endian binary on little-endian machine",
    ),
    "machine": (lambda k: patched(k, 18, "<H", 183), "kernel.elf.machine", "Invalid Elf magic number"),
    "entry size": (lambda k: patched(k, 54, "<H", 32), "kernel.elf.table", "Invalid program header size"),
    "table in header": (lambda k: patched(k, 32, "<Q", 63), "kernel.elf.table", "Invalid program header offset"),
    "table outside": (
        lambda k: patched(k, 32, "<Q", len(k) - 10),
        "kernel.elf.truncated",
        "Unable to read program header",
    ),
    "table at the end of time": (
        lambda k: patched(k, 32, "<Q", (1 << 64) - 1),
        "kernel.elf.truncated",
        "Unable to read program header",
    ),
    "no program headers": (lambda k: patched(k, 56, "<H", 0), "kernel.elf.table", "Unable to read program header"),
    "too many": (lambda k: patched(k, 56, "<H", 65), "kernel.elf.table", "Unable to read program header"),
    "low entry": (lambda k: patched(k, 24, "<Q", 0x9000), "kernel.elf.entry", "Invalid entry address"),
    "offset outside": (
        lambda k: patched(k, 64 + 56 + 8, "<Q", len(k)),
        "kernel.elf.truncated",
        "Unable to read kernel image",
    ),
    "offset overflow": (
        lambda k: patched(k, 64 + 56 + 8, "<Q", (1 << 64) - 1),
        "kernel.elf.truncated",
        "Unable to read kernel image",
    ),
    "file size": (lambda k: patched(k, 64 + 56 + 32, "<Q", 1 << 50), "kernel.elf.truncated", "Unable to read kernel"),
    "memory size": (
        lambda k: patched(k, 64 + 56 + 40, "<Q", (1 << 64) - 1),
        "kernel.elf.segment",
        "Invalid Program Header Address",
    ),
    "notes outside": (lambda k: patched(k, 64 + 8, "<Q", len(k)), "kernel.elf.truncated", "Unable to read note header"),
    "notes too large": (lambda k: patched(k, 64 + 32, "<Q", 65537), "kernel.elf.notes", "Unable to read note header"),
    "nothing to load": (
        lambda k: patched(patched(k, 64 + 56, "<I", 6), 64 + 112, "<I", 6),
        "kernel.elf.empty",
        "Unable to read kernel image",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lying_header_is_refused_before_anything_is_written(name: str, guest_memory: MemoryFactory) -> None:
    change, code, sentence = LIES[name]
    data = change(images.small_kernel())
    with pytest.raises(KernelError) as caught:
        parse(data)
    assert caught.value.code == code
    assert str(caught.value).startswith(PREFIX + sentence)


def test_a_kernel_must_fit_into_the_first_region(guest_memory: MemoryFactory) -> None:
    kernel = images.elf([images.Load(0x10_0000, b"x" * 100, 0x20_0000)], 0x10_0000)
    stream(guest_memory(3 * MIB), kernel, [])
    with pytest.raises(KernelError) as caught:
        stream(guest_memory(3 * MIB - 4096), kernel, [])
    assert caught.value.code == "kernel.memory"
    assert "memory to load kernel image is not enough" in str(caught.value)


def test_a_stream_with_headers_far_from_the_start_is_refused(guest_memory: MemoryFactory) -> None:
    kernel = images.elf([images.Load(0x10_0000, b"x" * 100_000)], 0x10_0000)
    table = kernel[64:120]
    moved = patched(kernel, 32, "<Q", len(kernel)) + table
    assert parse(moved).entry == 0x10_0000
    with pytest.raises(KernelError) as caught:
        stream(guest_memory(4 * MIB), moved, [])
    assert caught.value.code == "kernel.elf.table"


def test_a_file_that_shrinks_meanwhile_is_an_error(guest_memory: MemoryFactory, open_file: FileFactory) -> None:
    kernel = images.small_kernel()
    with pytest.raises(KernelError) as caught:
        load_elf(ImageMemory(guest_memory(32 * MIB)), open_file(kernel[:-9000]), len(kernel))
    assert caught.value.code == "kernel.elf.truncated"
