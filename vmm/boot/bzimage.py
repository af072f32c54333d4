"""bzImage kernels: the setup header and where the parts of the file go.

Source: Documentation/arch/x86/boot.rst of the kernel. The image is untrusted: every field is checked against the
file and guest RAM.
"""

from __future__ import annotations

import struct

from base.lean_typing import NamedTuple
from ipc.guest_memory import GuestMemory
from vmm import layout
from vmm.boot.errors import KernelError, bzimage_error, memory_error

#: Enough for the largest setup header: it ends at 0x202 plus one byte's value.
HEADER_READ_SIZE = 1024
SETUP_HEADER_OFFSET = 0x1F1
#: The 64-bit entry, from the start of the protected-mode part.
ENTRY_OFFSET = 0x200

#: The zero page has room for the setup header up to here (edd_mbr_sig_buffer follows).
_SETUP_HEADER_LIMIT = 0x290

#: Reading and hashing a kernel file must not take for ever; kernels with an initramfs inside stay far below.
MAX_FILE_SIZE = 512 << 20

_SECTOR = 512
_MINIMUM_VERSION = 0x020C
_BOOT_FLAG = 0xAA55
_MAGIC = b"HdrS"
_LOADED_HIGH = 1
_XLF_KERNEL_64 = 1
_XLF_CAN_BE_LOADED_ABOVE_4G = 2

#: From 0x1f1 up to and including init_size (protocol 2.10).
_SETUP_HEADER = struct.Struct("<BHIHHHHH4sHIHHBBHIIIIHBBIIIBBHIIQIIQQI")
assert _SETUP_HEADER.size == 0x264 - SETUP_HEADER_OFFSET


class BzImage(NamedTuple):
    """What matters of a checked bzImage. Offsets and sizes are bytes of the file, addresses are the guest's.

    ``setup_header`` is the header verbatim, to be kept in the zero page. The kernel works in [``target``,
    ``target`` + ``init_size``) when it unpacks itself.
    """

    setup_header: bytes
    version: int
    protected_mode_offset: int
    protected_mode_size: int
    payload_offset: int
    payload_size: int
    target: int
    init_size: int
    initrd_address_max: int


def parse(header: bytes, file_size: int) -> BzImage:
    """Parse the first ``HEADER_READ_SIZE`` bytes of a file of ``file_size`` bytes. Raises KernelError."""
    if len(header) < SETUP_HEADER_OFFSET + _SETUP_HEADER.size:
        raise _invalid("the file is too short for a kernel")
    fields = _SETUP_HEADER.unpack_from(header, SETUP_HEADER_OFFSET)
    setup_sectors, boot_flag, magic, version, load_flags = fields[0], fields[6], fields[8], fields[9], fields[14]
    initrd_address_max, alignment, relocatable = fields[24], fields[25], fields[26]
    extended_flags, payload_offset, payload_size = fields[28], fields[32], fields[33]
    preferred_address, init_size = fields[35], fields[36]
    if boot_flag != _BOOT_FLAG or magic != _MAGIC:
        raise _invalid("neither an ELF kernel nor a bzImage")
    if version < _MINIMUM_VERSION or not extended_flags & _XLF_KERNEL_64:
        raise KernelError(
            "kernel.bzimage.entry", "System configuration error: bzImage does not provide a 64-bit entry point"
        )
    if file_size > MAX_FILE_SIZE:
        raise _invalid(f"larger than {MAX_FILE_SIZE} bytes")
    if not load_flags & _LOADED_HIGH:
        raise _invalid("it does not load high")
    setup_end = 0x202 + header[0x201]
    if not SETUP_HEADER_OFFSET + _SETUP_HEADER.size <= setup_end <= _SETUP_HEADER_LIMIT:
        raise _invalid("its setup header has an impossible length")
    offset = ((setup_sectors or 4) + 1) * _SECTOR
    size = file_size - offset
    if size <= ENTRY_OFFSET:
        raise bzimage_error("kernel.bzimage.truncated", "Unable to read bzImage compressed kernel", "the file ends")
    if payload_offset + payload_size > size:
        raise bzimage_error(
            "kernel.bzimage.truncated", "Unable to read bzImage compressed kernel", "the payload ends beyond the file"
        )
    return BzImage(
        header[SETUP_HEADER_OFFSET:setup_end],
        version,
        offset,
        size,
        offset + payload_offset,
        payload_size,
        _target(preferred_address, alignment, bool(relocatable)),
        init_size,
        (1 << 32) - 1 if extended_flags & _XLF_CAN_BE_LOADED_ABOVE_4G else initrd_address_max,
    )


def _target(preferred_address: int, alignment: int, relocatable: bool) -> int:
    """Where the kernel unpacks itself to, as its own start-up code computes it."""
    if preferred_address < layout.HIGH_MEMORY_ADDRESS or preferred_address % layout.PAGE_SIZE:
        raise _invalid(f"preferred address {preferred_address:#x}")
    if not relocatable:
        return preferred_address
    if alignment & (alignment - 1) or alignment < layout.PAGE_SIZE:
        raise _invalid(f"kernel alignment {alignment:#x}")
    return max(preferred_address, -(-layout.BZIMAGE_ADDRESS // alignment) * alignment)


def end_of_work_area(image: BzImage) -> int:
    """Return the guest address up to which the kernel writes before it knows of an initrd or a memory map."""
    return max(layout.BZIMAGE_ADDRESS + image.protected_mode_size, image.target + image.init_size)


def check_placement(image: BzImage, memory: GuestMemory) -> None:
    """Raise KernelError unless the image and the room that it unpacks itself into fit into the first RAM region."""
    ram = memory.regions[0].size
    end = end_of_work_area(image)
    if end > ram:
        raise memory_error(f"the kernel needs memory up to {end:#x}, RAM below the first gap ends at {ram:#x}")


def _invalid(detail: str) -> KernelError:
    return bzimage_error("kernel.bzimage.invalid", "Invalid bzImage", detail)
