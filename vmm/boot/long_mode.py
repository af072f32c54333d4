"""GDT, IDT and page tables of the boot vCPU, and its registers, for both boot protocols.

Sources: Intel SDM volume 3, chapters 3 and 4; Documentation/arch/x86/boot.rst (64-bit boot protocol);
pvh.pandoc of Xen's documentation.
"""

from __future__ import annotations

import struct

from ipc.guest_memory import GuestMemory
from ipc.messages.records import BootRegisters
from vmm import layout

_CR0_PE = 1 << 0
_CR0_ET = 1 << 4
_CR0_PG = 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME = 1 << 8
_EFER_LMA = 1 << 10
#: Bit 1 of RFLAGS is always set; interrupts are off.
_RFLAGS = 2

_PRESENT_WRITABLE = 0x3
#: Present, writable, 2 MiB page.
_LARGE_PAGE = 0x83
_LARGE_PAGE_SHIFT = 21
_DIRECTORY_ENTRIES = 512
_IDT_SIZE = 8

_TABLE_ENTRY = struct.Struct("<Q")
_DIRECTORY = struct.Struct(f"<{_DIRECTORY_ENTRIES}Q")
_GDT = struct.Struct("<4Q")
assert _DIRECTORY_ENTRIES << _LARGE_PAGE_SHIFT == layout.IDENTITY_MAP_SIZE
assert _GDT.size == layout.IDT_ADDRESS - layout.GDT_ADDRESS


def descriptor(flags: int, base: int, limit: int) -> int:
    """Encode a segment descriptor. ``flags``: access byte in bits 0–7, G, D/B, L and AVL in bits 12–15."""
    return (
        (limit & 0xFFFF)
        | (base & 0xFFFFFF) << 16
        | (flags & 0xF0FF) << 40
        | (limit >> 16 & 0xF) << 48
        | (base >> 24 & 0xFF) << 56
    )


#: Null, code, data, TSS; a selector is the offset in here.
GDT_64 = (0, descriptor(0xA09B, 0, 0xFFFFF), descriptor(0xC093, 0, 0xFFFFF), descriptor(0x808B, 0, 0xFFFFF))
GDT_PVH = (0, descriptor(0xC09B, 0, 0xFFFFF), descriptor(0xC093, 0, 0xFFFFF), descriptor(0x008B, 0, 0x67))


def write_page_tables(memory: GuestMemory) -> None:
    """Map the first GiB one to one with 2 MiB pages."""
    memory.write(layout.PML4_ADDRESS, _TABLE_ENTRY.pack(layout.PDPT_ADDRESS | _PRESENT_WRITABLE))
    memory.write(layout.PDPT_ADDRESS, _TABLE_ENTRY.pack(layout.PAGE_DIRECTORY_ADDRESS | _PRESENT_WRITABLE))
    entries = (index << _LARGE_PAGE_SHIFT | _LARGE_PAGE for index in range(_DIRECTORY_ENTRIES))
    memory.write(layout.PAGE_DIRECTORY_ADDRESS, _DIRECTORY.pack(*entries))


def _write_descriptor_tables(memory: GuestMemory, gdt: tuple[int, ...]) -> None:
    memory.write(layout.GDT_ADDRESS, _GDT.pack(*gdt))
    memory.write(layout.IDT_ADDRESS, bytes(_IDT_SIZE))


def enter_64bit(memory: GuestMemory, entry: int) -> BootRegisters:
    """Prepare the 64-bit boot protocol: long mode, the zero page in RSI."""
    write_page_tables(memory)
    _write_descriptor_tables(memory, GDT_64)
    return BootRegisters(
        rip=entry,
        rsp=layout.BOOT_STACK_ADDRESS,
        rbp=layout.BOOT_STACK_ADDRESS,
        rsi=layout.ZERO_PAGE_ADDRESS,
        rbx=0,
        rflags=_RFLAGS,
        cr0=_CR0_PE | _CR0_ET | _CR0_PG,
        cr3=layout.PML4_ADDRESS,
        cr4=_CR4_PAE,
        efer=_EFER_LME | _EFER_LMA,
        gdt_base=layout.GDT_ADDRESS,
        gdt=GDT_64,
        idt_base=layout.IDT_ADDRESS,
        idt_limit=_IDT_SIZE - 1,
    )


def enter_pvh(memory: GuestMemory, entry: int) -> BootRegisters:
    """Prepare the PVH boot protocol: 32-bit protected mode without paging, hvm_start_info in RBX."""
    _write_descriptor_tables(memory, GDT_PVH)
    return BootRegisters(
        rip=entry,
        rsp=0,
        rbp=0,
        rsi=0,
        rbx=layout.PVH_START_INFO_ADDRESS,
        rflags=_RFLAGS,
        cr0=_CR0_PE | _CR0_ET,
        cr3=0,
        cr4=0,
        efer=0,
        gdt_base=layout.GDT_ADDRESS,
        gdt=GDT_PVH,
        idt_base=layout.IDT_ADDRESS,
        idt_limit=_IDT_SIZE - 1,
    )
