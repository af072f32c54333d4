"""The zero page (struct boot_params) for the 64-bit boot protocol.

Sources: Documentation/arch/x86/zero-page.rst, arch/x86/include/uapi/asm/bootparam.h.
"""

from __future__ import annotations

import struct

from base.lean_typing import Sequence
from ipc.guest_memory import GuestMemory
from vmm import layout
from vmm.boot.bzimage import SETUP_HEADER_OFFSET

SIZE = 4096

_ACPI_RSDP = 0x070
_E820_COUNT = 0x1E8
_E820_TABLE = 0x2D0
_MAX_E820_ENTRIES = 128
_BOOT_FLAG = 0x1FE
_HEADER_MAGIC = 0x202
_TYPE_OF_LOADER = 0x210
_RAMDISK = 0x218
_COMMAND_LINE_POINTER = 0x228
_KERNEL_ALIGNMENT = 0x230
_COMMAND_LINE_SIZE = 0x238

_UNDEFINED_LOADER = 0xFF
_ELF_KERNEL_ALIGNMENT = 0x100_0000

_U64 = struct.Struct("<Q")
_U32 = struct.Struct("<I")
_U16 = struct.Struct("<H")
_RANGE32 = struct.Struct("<II")
_E820_ENTRY = struct.Struct("<QQI")
assert _E820_ENTRY.size == 20


def build(
    memory_map: Sequence[tuple[int, int, int]],
    command_line_size: int,
    initrd: tuple[int, int] | None,
    rsdp_address: int,
    setup_header: bytes | None,
) -> bytes:
    """Return the page. ``initrd`` is (address, size), below 4 GiB; ``command_line_size`` is without the NUL.

    ``setup_header`` is that of the bzImage, kept and completed; without one a minimal header is made.
    """
    page = bytearray(SIZE)
    if setup_header is None:
        _U16.pack_into(page, _BOOT_FLAG, 0xAA55)
        page[_HEADER_MAGIC : _HEADER_MAGIC + 4] = b"HdrS"
        _U32.pack_into(page, _KERNEL_ALIGNMENT, _ELF_KERNEL_ALIGNMENT)
        _U32.pack_into(page, _COMMAND_LINE_SIZE, command_line_size)
    else:
        page[SETUP_HEADER_OFFSET : SETUP_HEADER_OFFSET + len(setup_header)] = setup_header
    page[_TYPE_OF_LOADER] = _UNDEFINED_LOADER
    _U32.pack_into(page, _COMMAND_LINE_POINTER, layout.COMMAND_LINE_ADDRESS)
    _RANGE32.pack_into(page, _RAMDISK, *(initrd or (0, 0)))
    _U64.pack_into(page, _ACPI_RSDP, rsdp_address)
    assert len(memory_map) <= _MAX_E820_ENTRIES
    page[_E820_COUNT] = len(memory_map)
    for index, entry in enumerate(memory_map):
        _E820_ENTRY.pack_into(page, _E820_TABLE + index * _E820_ENTRY.size, *entry)
    return bytes(page)


def write(memory: GuestMemory, page: bytes) -> None:
    """Put the page where RSI points to."""
    assert len(page) == SIZE
    memory.write(layout.ZERO_PAGE_ADDRESS, page)
