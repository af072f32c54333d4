"""The start information of the PVH boot protocol (struct hvm_start_info, version 1).

Source: Xen's public/arch-x86/hvm/start_info.h.
"""

from __future__ import annotations

import struct

from base.lean_typing import Sequence
from ipc.guest_memory import GuestMemory
from vmm import layout

_MAGIC = 0x336EC578
_VERSION = 1

#: magic, version, flags, nr_modules, modlist_paddr, cmdline_paddr, rsdp_paddr, memmap_paddr, memmap_entries, reserved
_START_INFO = struct.Struct("<IIIIQQQQII")
#: paddr, size, cmdline_paddr, reserved
_MODULE = struct.Struct("<QQQQ")
#: addr, size, type, reserved
_MEMORY_MAP_ENTRY = struct.Struct("<QQII")
assert _START_INFO.size == 56
assert _START_INFO.size <= layout.PVH_MODULE_LIST_ADDRESS - layout.PVH_START_INFO_ADDRESS
assert _MODULE.size == 32
assert _MEMORY_MAP_ENTRY.size == 24


def write(
    memory: GuestMemory,
    memory_map: Sequence[tuple[int, int, int]],
    initrd: tuple[int, int] | None,
    rsdp_address: int,
) -> None:
    """Write start information, module list and memory map. ``initrd`` is (address, size) and becomes module 0.

    The types of the memory map are those of E820, as the protocol wants them.
    """
    if initrd is not None:
        memory.write(layout.PVH_MODULE_LIST_ADDRESS, _MODULE.pack(*initrd, 0, 0))
    entries = b"".join(_MEMORY_MAP_ENTRY.pack(*entry, 0) for entry in memory_map)
    memory.write(layout.PVH_MEMORY_MAP_ADDRESS, entries)
    memory.write(
        layout.PVH_START_INFO_ADDRESS,
        _START_INFO.pack(
            _MAGIC,
            _VERSION,
            0,
            0 if initrd is None else 1,
            0 if initrd is None else layout.PVH_MODULE_LIST_ADDRESS,
            layout.COMMAND_LINE_ADDRESS,
            rsdp_address,
            layout.PVH_MEMORY_MAP_ADDRESS,
            len(memory_map),
            0,
        ),
    )
