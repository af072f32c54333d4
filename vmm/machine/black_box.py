"""The black box: a vCPU's last registers, read from its kvm_run page after its worker is gone.

The worker sets kvm_valid_regs (KVM_CAP_SYNC_REGS), so that KVM stores registers in the page at every exit. Source:
Linux Documentation/virt/kvm/api.rst, "struct kvm_run" and KVM_CAP_SYNC_REGS; arch/x86/include/uapi/asm/kvm.h.
"""

from __future__ import annotations

import struct

_HEADER = struct.Struct("<BB6xI")  # request_interrupt_window, immediate_exit, padding, exit_reason
#: Offset of the synchronised registers: struct kvm_run ends with an area of 2048 bytes for them.
KVM_VALID_REGS_OFFSET = 288
SYNC_REGS_OFFSET = 304
_REGS = struct.Struct("<18Q")
_SREGS_OFFSET = SYNC_REGS_OFFSET + _REGS.size
_CR_OFFSET = _SREGS_OFFSET + 224  # eight segments of 24 bytes, two descriptor tables of 16
_CRS = struct.Struct("<4Q")
KVM_SYNC_X86_REGS = 1
KVM_SYNC_X86_SREGS = 2
assert _HEADER.size == 12
assert _REGS.size == 144

EXIT_REASONS = {
    0: "unknown",
    2: "io",
    4: "debug",
    5: "hlt",
    6: "mmio",
    7: "irq-window-open",
    8: "shutdown",
    9: "fail-entry",
    10: "intr",
    17: "internal-error",
    24: "system-event",
    26: "ioapic-eoi",
}


def describe_run_page(page: memoryview) -> str:
    """Return one line: exit reason and the registers of the last exit. The page is written by a stranger."""
    _, _, reason = _HEADER.unpack_from(page, 0)
    (valid,) = struct.unpack_from("<Q", page, KVM_VALID_REGS_OFFSET)
    name = EXIT_REASONS.get(reason, str(reason))
    if not valid & KVM_SYNC_X86_REGS:
        return f"last exit {name}; no registers were recorded."
    (rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, *more) = _REGS.unpack_from(page, SYNC_REGS_OFFSET)
    text = (
        f"last exit {name}; rip={more[8]:#x} rflags={more[9]:#x} rax={rax:#x} rbx={rbx:#x} rcx={rcx:#x} rdx={rdx:#x} "
        f"rsi={rsi:#x} rdi={rdi:#x} rsp={rsp:#x} rbp={rbp:#x}"
    )
    if valid & KVM_SYNC_X86_SREGS:
        cr0, cr2, cr3, cr4 = _CRS.unpack_from(page, _CR_OFFSET)
        text += f" cr0={cr0:#x} cr2={cr2:#x} cr3={cr3:#x} cr4={cr4:#x}"
    return text + "."
