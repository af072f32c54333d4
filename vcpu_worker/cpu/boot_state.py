"""The state of a vCPU before its first instruction, as bytes of the kernel's structures.

The controller computed the registers (``vmm.boot``); here they become kvm_regs, kvm_sregs, kvm_fpu and LAPIC state.
"""

from __future__ import annotations

from ipc.messages.records import BootRegisters
from vcpu_worker.kvm import abi

FCW_DEFAULT = 0x37F
MXCSR_DEFAULT = 0x1F80

_GDT_CODE = 1
_GDT_DATA = 2
_GDT_TSS = 3
_DESCRIPTOR_SIZE = 8


def segment(selector: int, descriptor: int) -> bytes:
    """Return ``struct kvm_segment`` for a raw 8-byte segment descriptor (Intel SDM volume 3A, 3.4.5)."""
    base = descriptor >> 16 & 0xFF_FFFF | descriptor >> 32 & 0xFF00_0000
    limit = descriptor & 0xFFFF | descriptor >> 32 & 0xF_0000
    granularity = descriptor >> 55 & 1
    if granularity:
        limit = limit << 12 | 0xFFF
    present = descriptor >> 47 & 1
    return abi.SEGMENT.pack(
        base,
        limit,
        selector,
        descriptor >> 40 & 0xF,  # type
        present,
        descriptor >> 45 & 3,  # dpl
        descriptor >> 54 & 1,  # db
        descriptor >> 44 & 1,  # s
        descriptor >> 53 & 1,  # l
        granularity,
        descriptor >> 52 & 1,  # avl
        1 - present,  # unusable
        0,
    )


def boot_regs(boot: BootRegisters) -> bytes:
    """Return ``struct kvm_regs`` of the boot vCPU at the kernel's entry."""
    registers = {
        "rip": boot.rip,
        "rsp": boot.rsp,
        "rbp": boot.rbp,
        "rsi": boot.rsi,
        "rbx": boot.rbx,
        "rflags": boot.rflags,
    }
    return abi.REGS.pack(*(registers.get(name, 0) for name in abi.REGS_NAMES))


def boot_sregs(current: bytes, boot: BootRegisters) -> bytes:
    """Return ``struct kvm_sregs`` of the boot vCPU, made from its ``current`` one (LDT, APIC base and CR8 stay)."""
    sregs = bytearray(current)
    code = segment(_GDT_CODE * _DESCRIPTOR_SIZE, boot.gdt[_GDT_CODE])
    data = segment(_GDT_DATA * _DESCRIPTOR_SIZE, boot.gdt[_GDT_DATA])
    size = abi.SEGMENT_SIZE
    sregs[abi.SREGS_CS : abi.SREGS_CS + size] = code
    for offset in (abi.SREGS_DS, abi.SREGS_ES, abi.SREGS_FS, abi.SREGS_GS, abi.SREGS_SS):
        sregs[offset : offset + size] = data
    sregs[abi.SREGS_TR : abi.SREGS_TR + size] = segment(_GDT_TSS * _DESCRIPTOR_SIZE, boot.gdt[_GDT_TSS])
    abi.DTABLE.pack_into(sregs, abi.SREGS_GDT, boot.gdt_base, len(boot.gdt) * _DESCRIPTOR_SIZE - 1)
    abi.DTABLE.pack_into(sregs, abi.SREGS_IDT, boot.idt_base, boot.idt_limit)
    for offset, value in (
        (abi.SREGS_CR0, boot.cr0),
        (abi.SREGS_CR3, boot.cr3),
        (abi.SREGS_CR4, boot.cr4),
        (abi.SREGS_EFER, boot.efer),
    ):
        sregs[offset : offset + 8] = value.to_bytes(8, "little")
    return bytes(sregs)


def boot_fpu() -> bytes:
    """Return ``struct kvm_fpu`` as after FNINIT, with the default MXCSR."""
    fpu = bytearray(abi.FPU_SIZE)
    fpu[abi.FPU_FCW : abi.FPU_FCW + 2] = FCW_DEFAULT.to_bytes(2, "little")
    fpu[abi.FPU_MXCSR : abi.FPU_MXCSR + 4] = MXCSR_DEFAULT.to_bytes(4, "little")
    return bytes(fpu)


def boot_lapic(current: bytes) -> bytes:
    """Return the LAPIC page with LINT0 as ExtINT and LINT1 as NMI, as firmware leaves them."""
    lapic = bytearray(current)
    for offset, mode in ((abi.APIC_LVT_LINT0, abi.APIC_MODE_EXTINT), (abi.APIC_LVT_LINT1, abi.APIC_MODE_NMI)):
        entry = int.from_bytes(lapic[offset : offset + 4], "little") & ~(7 << 8) | mode << 8
        lapic[offset : offset + 4] = entry.to_bytes(4, "little")
    return bytes(lapic)
