"""Model specific registers: what a vCPU boots with, and which ones make up its state.

Sources: Intel SDM volume 4; Documentation/virt/kvm/x86/msr.rst.
"""

from __future__ import annotations

from base.lean_typing import Iterable, Sequence
from ipc.messages.records import MsrChange, MsrValue
from vcpu_worker.errors import TemplateError

IA32_TSC = 0x10
IA32_SYSENTER_CS = 0x174
IA32_SYSENTER_ESP = 0x175
IA32_SYSENTER_EIP = 0x176
IA32_MISC_ENABLE = 0x1A0
IA32_MTRR_DEF_TYPE = 0x2FF
IA32_TSC_DEADLINE = 0x6E0
STAR = 0xC000_0081
LSTAR = 0xC000_0082
CSTAR = 0xC000_0083
SYSCALL_MASK = 0xC000_0084
KERNEL_GS_BASE = 0xC000_0102

_MISC_ENABLE_FAST_STRING = 1
_MTRR_ENABLE = 1 << 11
_MTRR_WRITE_BACK = 6

#: Written to every vCPU before it runs for the first time.
BOOT_MSRS: tuple[MsrValue, ...] = (
    MsrValue(IA32_SYSENTER_CS, 0),
    MsrValue(IA32_SYSENTER_ESP, 0),
    MsrValue(IA32_SYSENTER_EIP, 0),
    MsrValue(STAR, 0),
    MsrValue(CSTAR, 0),
    MsrValue(KERNEL_GS_BASE, 0),
    MsrValue(SYSCALL_MASK, 0),
    MsrValue(LSTAR, 0),
    MsrValue(IA32_TSC, 0),
    MsrValue(IA32_MISC_ENABLE, _MISC_ENABLE_FAST_STRING),
    MsrValue(IA32_MTRR_DEF_TYPE, _MTRR_ENABLE | _MTRR_WRITE_BACK),
)


def boot_msrs(base: Iterable[MsrValue], changes: Sequence[MsrChange]) -> list[MsrValue]:
    """Return what a vCPU boots with: the template's changes of what KVM gave it, then what every kernel expects.

    ``base`` are those of the changed registers that could be read. Raises TemplateError for one that could not.
    """
    values = {each.register: each.value for each in base}
    for change in changes:
        if change.register not in values:
            raise TemplateError(
                "System configuration error: Failed to create guest config: Template changes an MSR entry not "
                f"supported by KVM: Register Address: {change.register:x}"
            )
        values[change.register] = values[change.register] & ~change.mask | change.value & change.mask
    values.update([(each.register, each.value) for each in BOOT_MSRS])
    return [MsrValue(register, value) for register, value in values.items()]


#: Part of a vCPU's state though KVM does not list them: without them a restored guest has no memory types.
_ALSO_SAVED: tuple[int, ...] = (
    IA32_MTRR_DEF_TYPE,
    *range(0x200, 0x210),  # MTRR variable ranges
    0x250,  # MTRRfix64K_00000
    0x258,  # MTRRfix16K_80000
    0x259,  # MTRRfix16K_A0000
    *range(0x268, 0x270),  # MTRRfix4K_*
)


def state_indices(listed: Iterable[int]) -> list[int]:
    """Return the MSRs to save, in order: KVM's own list, what it leaves out, and TSC_DEADLINE last of all.

    TSC_DEADLINE comes last because it must be restored last: it arms the timer.
    """
    indices = dict.fromkeys((*listed, *_ALSO_SAVED))
    indices.pop(IA32_TSC_DEADLINE, None)
    return [*indices, IA32_TSC_DEADLINE]
