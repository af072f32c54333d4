"""Kernel images made for tests: small ELF files and bzImages in every detail that a loader looks at."""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import lz4.block
import zstandard

PT_LOAD = 1
PT_NOTE = 4

LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
LZ4_BLOCK_SIZE = 8 << 20


class Load(NamedTuple):
    """A segment to load: ``data`` at guest address ``address``, zeros up to ``memory_size``."""

    address: int
    data: bytes
    memory_size: int | None = None


def note(name: bytes, kind: int, descriptor: bytes) -> bytes:
    """Encode one ELF note."""

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    return struct.pack("<III", len(name), len(descriptor), kind) + padded(name) + padded(descriptor)


def pvh_note(entry: int, size: int = 8) -> bytes:
    """Encode the note that names the PVH entry."""
    return note(b"Xen\0", 18, entry.to_bytes(size, "little"))


def elf(
    loads: Sequence[Load],
    entry: int = 0x100000,
    notes: bytes = b"",
    note_alignment: int = 4,
    tail: bytes = b"",
) -> bytes:
    """Build an ELF64 file: header, program headers, notes, segments in order, ``tail``."""
    count = len(loads) + bool(notes)
    offset = 64 + 56 * count
    headers = b""
    body = b""
    if notes:
        headers += struct.pack("<IIQQQQQQ", PT_NOTE, 4, offset, 0, 0, len(notes), len(notes), note_alignment)
        body += notes
    for load in loads:
        size = len(load.data) if load.memory_size is None else load.memory_size
        headers += struct.pack(
            "<IIQQQQQQ", PT_LOAD, 5, offset + len(body), load.address, load.address, len(load.data), size, 4096
        )
        body += load.data
    header = struct.pack(
        "<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 2, 62, 1, entry, 64, 0, 0, 64, 56, count, 0, 0, 0
    )
    return header + headers + body + tail


def elf_in_order(loads: Sequence[Load], order: Sequence[int]) -> bytes:
    """Like ``elf``, but the file has the contents of the segments in another order than the program headers."""
    offset = 64 + 56 * len(loads)
    offsets = {}
    body = b""
    for number in order:
        offsets[number] = offset + len(body)
        body += loads[number].data
    image = bytearray(elf(loads))
    for number in range(len(loads)):
        struct.pack_into("<Q", image, 64 + 56 * number + 8, offsets[number])
    return bytes(image[:offset]) + body


def small_kernel(size: int = 100_000, pvh: bool = True) -> bytes:
    """Build a vmlinux with text, data with bss, and a PVH note."""
    text = bytes(range(256)) * (size // 256)
    data = b"\xabdata" + bytes(5000) + b"end of data"
    loads = (Load(0x100_0000, text), Load(0x120_0000, data, len(data) + 0x30000))
    return elf(loads, 0x100_0000, pvh_note(0x100_0100) if pvh else b"", tail=b"section headers would be here")


def compress(kind: str, data: bytes) -> bytes:
    """Pack ``data`` the way the kernel's build does, size field included."""
    size = struct.pack("<I", len(data))
    if kind == "gzip":
        packer = zlib.compressobj(6, zlib.DEFLATED, 31)
        return packer.compress(data) + packer.flush()
    if kind == "xz":
        # The kernel's build uses 32 MiB; the packer needs ten times the dictionary, too much for small examples.
        dictionary = (32 << 20) if len(data) > 1 << 20 else 1 << 20
        filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": dictionary}]
        return lzma.compress(data, check=lzma.CHECK_CRC32, filters=filters) + size
    if kind == "zstd":
        return zstandard.ZstdCompressor(level=3, write_content_size=False).compress(data) + size
    if kind == "lz4":
        blocks = [LZ4_LEGACY_MAGIC]
        for start in range(0, len(data), LZ4_BLOCK_SIZE):
            block = lz4.block.compress(data[start : start + LZ4_BLOCK_SIZE], store_size=False)
            blocks.append(struct.pack("<I", len(block)) + block)
        return b"".join(blocks) + size
    raise ValueError(kind)


def bzimage(
    payload: bytes,
    *,
    version: int = 0x20F,
    extended_flags: int = 0x7F,
    load_flags: int = 1,
    setup_sectors: int = 3,
    preferred_address: int = 0x100_0000,
    alignment: int = 0x20_0000,
    relocatable: int = 1,
    init_size: int = 0x80_0000,
    initrd_address_max: int = 0x7FFF_FFFF,
    header_end: int = 0x26C,
    payload_offset: int = 0x300,
    payload_size: int | None = None,
) -> bytes:
    """Build a bzImage around ``payload``."""
    setup = bytearray(((setup_sectors or 4) + 1) * 512)
    setup[0x1F1] = setup_sectors
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    setup[0x200:0x202] = bytes((0xEB, header_end - 0x202))
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    setup[0x211] = load_flags
    struct.pack_into("<I", setup, 0x214, 0x100000)
    struct.pack_into("<II", setup, 0x22C, initrd_address_max, alignment)
    setup[0x234] = relocatable
    setup[0x235] = 0x15
    struct.pack_into("<H", setup, 0x236, extended_flags)
    struct.pack_into("<I", setup, 0x238, 2047)
    size = len(payload) if payload_size is None else payload_size
    struct.pack_into("<II", setup, 0x248, payload_offset, size)
    struct.pack_into("<QI", setup, 0x258, preferred_address, init_size)
    head = bytes(0x200) + b"\x90" * (0x100) if payload_offset >= 0x300 else b""
    return bytes(setup) + head.ljust(payload_offset, b"\x90") + payload + b"after the payload" * 8


def repacked(vmlinuz: bytes, payload: bytes) -> bytes:
    """Put another payload into a real bzImage; its own decompressor would not understand it."""
    setup_size = (vmlinuz[0x1F1] + 1) * 512
    offset, _ = struct.unpack_from("<II", vmlinuz, 0x248)
    image = bytearray(vmlinuz[: setup_size + offset] + payload)
    struct.pack_into("<I", image, 0x24C, len(payload))
    return bytes(image)
