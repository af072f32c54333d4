"""The KVM layouts against the installed kernel headers: the compiler is the oracle."""

from __future__ import annotations

import subprocess
from pathlib import Path

from vcpu_worker.kvm import abi

#: constant of ours → C expression
STRUCTURE_SIZES = {
    "REGS": "sizeof(struct kvm_regs)",
    "SEGMENT": "sizeof(struct kvm_segment)",
    "DTABLE": "sizeof(struct kvm_dtable)",
    "USERSPACE_MEMORY_REGION": "sizeof(struct kvm_userspace_memory_region)",
    "ENABLE_CAP": "sizeof(struct kvm_enable_cap)",
    "CPUID2_HEADER": "sizeof(struct kvm_cpuid2)",
    "CPUID_ENTRY2": "sizeof(struct kvm_cpuid_entry2)",
    "MSRS_HEADER": "sizeof(struct kvm_msrs)",
    "MSR_ENTRY": "sizeof(struct kvm_msr_entry)",
    "MSR_LIST_HEADER": "sizeof(struct kvm_msr_list)",
    "IRQ_ROUTING_HEADER": "sizeof(struct kvm_irq_routing)",
    "IRQ_ROUTING_ENTRY_MSI": "sizeof(struct kvm_irq_routing_entry)",
    "MSI": "sizeof(struct kvm_msi)",
    "IRQFD": "sizeof(struct kvm_irqfd)",
    "IOEVENTFD": "sizeof(struct kvm_ioeventfd)",
    "DEVICE_ATTR": "sizeof(struct kvm_device_attr)",
    "MP_STATE": "sizeof(struct kvm_mp_state)",
    "GUEST_DEBUG": "sizeof(struct kvm_guest_debug)",
    "CLOCK_DATA": "sizeof(struct kvm_clock_data)",
}

CONSTANTS = {
    "SREGS_SIZE": "sizeof(struct kvm_sregs)",
    "SREGS2_SIZE": "sizeof(struct kvm_sregs2)",
    "FPU_SIZE": "sizeof(struct kvm_fpu)",
    "LAPIC_SIZE": "sizeof(struct kvm_lapic_state)",
    "VCPU_EVENTS_SIZE": "sizeof(struct kvm_vcpu_events)",
    "DEBUGREGS_SIZE": "sizeof(struct kvm_debugregs)",
    "XSAVE_SIZE": "sizeof(struct kvm_xsave)",
    "XCRS_SIZE": "sizeof(struct kvm_xcrs)",
    "GUEST_DEBUG_SIZE": "sizeof(struct kvm_guest_debug)",
    "GUESTDBG_ENABLE": "KVM_GUESTDBG_ENABLE",
    "GUESTDBG_SINGLESTEP": "KVM_GUESTDBG_SINGLESTEP",
    "GUESTDBG_USE_HW_BP": "KVM_GUESTDBG_USE_HW_BP",
    "CLOCK_REALTIME": "KVM_CLOCK_REALTIME",
    "CLOCK_SIZE": "sizeof(struct kvm_clock_data)",
    "RUN_SIZE": "sizeof(struct kvm_run)",
    "RUN_IMMEDIATE_EXIT": "offsetof(struct kvm_run, immediate_exit)",
    "RUN_EXIT_REASON": "offsetof(struct kvm_run, exit_reason)",
    "RUN_REQUEST_INTERRUPT_WINDOW": "offsetof(struct kvm_run, request_interrupt_window)",
    "RUN_READY_FOR_INTERRUPT_INJECTION": "offsetof(struct kvm_run, ready_for_interrupt_injection)",
    "RUN_IF_FLAG": "offsetof(struct kvm_run, if_flag)",
    "RUN_EXIT": "offsetof(struct kvm_run, hw)",
    "RUN_IO_DIRECTION": "offsetof(struct kvm_run, io.direction)",
    "RUN_IO_SIZE": "offsetof(struct kvm_run, io.size)",
    "RUN_IO_PORT": "offsetof(struct kvm_run, io.port)",
    "RUN_IO_COUNT": "offsetof(struct kvm_run, io.count)",
    "RUN_IO_DATA_OFFSET": "offsetof(struct kvm_run, io.data_offset)",
    "RUN_MMIO_PHYS_ADDR": "offsetof(struct kvm_run, mmio.phys_addr)",
    "RUN_MMIO_DATA": "offsetof(struct kvm_run, mmio.data)",
    "RUN_MMIO_LEN": "offsetof(struct kvm_run, mmio.len)",
    "RUN_MMIO_IS_WRITE": "offsetof(struct kvm_run, mmio.is_write)",
    "RUN_FAIL_ENTRY_REASON": "offsetof(struct kvm_run, fail_entry.hardware_entry_failure_reason)",
    "RUN_FAIL_ENTRY_CPU": "offsetof(struct kvm_run, fail_entry.cpu)",
    "RUN_INTERNAL_SUBERROR": "offsetof(struct kvm_run, internal.suberror)",
    "RUN_INTERNAL_NDATA": "offsetof(struct kvm_run, internal.ndata)",
    "RUN_INTERNAL_DATA": "offsetof(struct kvm_run, internal.data)",
    "RUN_SYSTEM_EVENT_TYPE": "offsetof(struct kvm_run, system_event.type)",
    "RUN_SYSTEM_EVENT_DATA": "offsetof(struct kvm_run, system_event.data)",
    "RUN_VALID_REGS": "offsetof(struct kvm_run, kvm_valid_regs)",
    "RUN_DIRTY_REGS": "offsetof(struct kvm_run, kvm_dirty_regs)",
    "RUN_SYNC_REGS": "offsetof(struct kvm_run, s.regs.regs)",
    "RUN_SYNC_SREGS": "offsetof(struct kvm_run, s.regs.sregs)",
    "RUN_SYNC_EVENTS": "offsetof(struct kvm_run, s.regs.events)",
    "REGS_RIP": "offsetof(struct kvm_regs, rip)",
    "SREGS_CS": "offsetof(struct kvm_sregs, cs)",
    "SREGS_DS": "offsetof(struct kvm_sregs, ds)",
    "SREGS_ES": "offsetof(struct kvm_sregs, es)",
    "SREGS_FS": "offsetof(struct kvm_sregs, fs)",
    "SREGS_GS": "offsetof(struct kvm_sregs, gs)",
    "SREGS_SS": "offsetof(struct kvm_sregs, ss)",
    "SREGS_TR": "offsetof(struct kvm_sregs, tr)",
    "SREGS_LDT": "offsetof(struct kvm_sregs, ldt)",
    "SREGS_GDT": "offsetof(struct kvm_sregs, gdt)",
    "SREGS_IDT": "offsetof(struct kvm_sregs, idt)",
    "SREGS_CR0": "offsetof(struct kvm_sregs, cr0)",
    "SREGS_CR2": "offsetof(struct kvm_sregs, cr2)",
    "SREGS_CR3": "offsetof(struct kvm_sregs, cr3)",
    "SREGS_CR4": "offsetof(struct kvm_sregs, cr4)",
    "SREGS_CR8": "offsetof(struct kvm_sregs, cr8)",
    "SREGS_EFER": "offsetof(struct kvm_sregs, efer)",
    "SREGS_APIC_BASE": "offsetof(struct kvm_sregs, apic_base)",
    "EVENTS_INTERRUPT_INJECTED": "offsetof(struct kvm_vcpu_events, interrupt.injected)",
    "EVENTS_INTERRUPT_NR": "offsetof(struct kvm_vcpu_events, interrupt.nr)",
    "EVENTS_INTERRUPT_SOFT": "offsetof(struct kvm_vcpu_events, interrupt.soft)",
    "FPU_FCW": "offsetof(struct kvm_fpu, fcw)",
    "FPU_MXCSR": "offsetof(struct kvm_fpu, mxcsr)",
    "EXIT_UNKNOWN": "KVM_EXIT_UNKNOWN",
    "EXIT_EXCEPTION": "KVM_EXIT_EXCEPTION",
    "EXIT_IO": "KVM_EXIT_IO",
    "EXIT_HYPERCALL": "KVM_EXIT_HYPERCALL",
    "EXIT_DEBUG": "KVM_EXIT_DEBUG",
    "EXIT_HLT": "KVM_EXIT_HLT",
    "EXIT_MMIO": "KVM_EXIT_MMIO",
    "EXIT_IRQ_WINDOW_OPEN": "KVM_EXIT_IRQ_WINDOW_OPEN",
    "EXIT_SHUTDOWN": "KVM_EXIT_SHUTDOWN",
    "EXIT_FAIL_ENTRY": "KVM_EXIT_FAIL_ENTRY",
    "EXIT_INTR": "KVM_EXIT_INTR",
    "EXIT_INTERNAL_ERROR": "KVM_EXIT_INTERNAL_ERROR",
    "EXIT_SYSTEM_EVENT": "KVM_EXIT_SYSTEM_EVENT",
    "EXIT_IOAPIC_EOI": "KVM_EXIT_IOAPIC_EOI",
    "EXIT_IO_IN": "KVM_EXIT_IO_IN",
    "EXIT_IO_OUT": "KVM_EXIT_IO_OUT",
    "SYNC_X86_REGS": "KVM_SYNC_X86_REGS",
    "SYNC_X86_SREGS": "KVM_SYNC_X86_SREGS",
    "SYNC_X86_EVENTS": "KVM_SYNC_X86_EVENTS",
    "SYSTEM_EVENT_SHUTDOWN": "KVM_SYSTEM_EVENT_SHUTDOWN",
    "SYSTEM_EVENT_RESET": "KVM_SYSTEM_EVENT_RESET",
    "SYSTEM_EVENT_CRASH": "KVM_SYSTEM_EVENT_CRASH",
    "INTERNAL_ERROR_EMULATION": "KVM_INTERNAL_ERROR_EMULATION",
    "MEM_LOG_DIRTY_PAGES": "KVM_MEM_LOG_DIRTY_PAGES",
    "MEM_READONLY": "KVM_MEM_READONLY",
    "X2APIC_API_USE_32BIT_IDS": "KVM_X2APIC_API_USE_32BIT_IDS",
    "X2APIC_API_DISABLE_BROADCAST_QUIRK": "KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK",
    "CPUID_FLAG_SIGNIFICANT_INDEX": "KVM_CPUID_FLAG_SIGNIFCANT_INDEX",
    "IRQ_ROUTING_MSI": "KVM_IRQ_ROUTING_MSI",
    "IRQFD_FLAG_DEASSIGN": "KVM_IRQFD_FLAG_DEASSIGN",
    "IOEVENTFD_FLAG_DATAMATCH": "KVM_IOEVENTFD_FLAG_DATAMATCH",
    "IOEVENTFD_FLAG_PIO": "KVM_IOEVENTFD_FLAG_PIO",
    "IOEVENTFD_FLAG_DEASSIGN": "KVM_IOEVENTFD_FLAG_DEASSIGN",
    "VCPU_TSC_CTRL": "KVM_VCPU_TSC_CTRL",
    "VCPU_TSC_OFFSET": "KVM_VCPU_TSC_OFFSET",
    "MP_STATE_RUNNABLE": "KVM_MP_STATE_RUNNABLE",
    "MP_STATE_UNINITIALIZED": "KVM_MP_STATE_UNINITIALIZED",
    "MP_STATE_INIT_RECEIVED": "KVM_MP_STATE_INIT_RECEIVED",
    "MP_STATE_HALTED": "KVM_MP_STATE_HALTED",
}

#: fields of our Struct objects whose place a size alone does not prove: (struct, position in the format) → C offset
FIELD_PLACES = {
    ("USERSPACE_MEMORY_REGION", 4): "offsetof(struct kvm_userspace_memory_region, userspace_addr)",
    ("USERSPACE_MEMORY_REGION", 2): "offsetof(struct kvm_userspace_memory_region, guest_phys_addr)",
    ("IRQFD", 2): "offsetof(struct kvm_irqfd, flags)",
    ("IOEVENTFD", 1): "offsetof(struct kvm_ioeventfd, addr)",
    ("IOEVENTFD", 2): "offsetof(struct kvm_ioeventfd, len)",
    ("IOEVENTFD", 3): "offsetof(struct kvm_ioeventfd, fd)",
    ("IOEVENTFD", 4): "offsetof(struct kvm_ioeventfd, flags)",
    ("IRQ_ROUTING_ENTRY_MSI", 4): "offsetof(struct kvm_irq_routing_entry, u.msi.address_lo)",
    ("IRQ_ROUTING_ENTRY_MSI", 6): "offsetof(struct kvm_irq_routing_entry, u.msi.data)",
    ("MSI", 2): "offsetof(struct kvm_msi, data)",
    ("DEVICE_ATTR", 3): "offsetof(struct kvm_device_attr, addr)",
    ("ENABLE_CAP", 2): "offsetof(struct kvm_enable_cap, args)",
    ("MSR_ENTRY", 2): "offsetof(struct kvm_msr_entry, data)",
    ("SEGMENT", 2): "offsetof(struct kvm_segment, selector)",
    ("SEGMENT", 6): "offsetof(struct kvm_segment, db)",
    ("SEGMENT", 11): "offsetof(struct kvm_segment, unusable)",
    ("CPUID_ENTRY2", 3): "offsetof(struct kvm_cpuid_entry2, eax)",
}


def field_offset(structure: str, position: int) -> int:
    """Find where a Struct puts one field by packing a mark into it."""
    packer = getattr(abi, structure)
    count = len(packer.unpack(bytes(packer.size)))
    packed: bytes = packer.pack(*(1 if number == position else 0 for number in range(count)))
    return packed.index(1)


def test_numbers_and_layouts_match_the_kernel_headers(tmp_path: Path):
    ours: dict[str, int] = {}
    expressions: dict[str, str] = {}
    for name, value in vars(abi).items():
        if name.startswith("KVM_"):
            ours[name], expressions[name] = value, name
    for name, expression in CONSTANTS.items():
        ours[name], expressions[name] = getattr(abi, name), expression
    for name, expression in STRUCTURE_SIZES.items():
        ours[name], expressions[name] = getattr(abi, name).size, expression
    for (name, position), expression in FIELD_PLACES.items():
        key = f"{name}.{position}"
        ours[key], expressions[key] = field_offset(name, position), expression
    lines = [f'printf("%s %llu\\n", "{key}", (unsigned long long)({text}));' for key, text in expressions.items()]
    source = tmp_path / "oracle.c"
    source.write_text(
        "#include <stdio.h>\n#include <stddef.h>\n#include <linux/kvm.h>\nint main(void){\n" + "\n".join(lines) + "}\n"
    )
    subprocess.run(["gcc", "-o", tmp_path / "oracle", source], check=True)
    output = subprocess.run([tmp_path / "oracle"], check=True, capture_output=True, text=True).stdout
    theirs = {key: int(value) for key, value in (line.split() for line in output.splitlines())}
    assert ours == theirs


def test_every_layout_constant_is_checked():
    checked = {*CONSTANTS, *STRUCTURE_SIZES}
    prefixes = ("RUN_", "SREGS_", "FPU_", "EXIT_", "MP_STATE_", "SYNC_", "IRQFD_", "IOEVENTFD_")
    unchecked = {name for name in vars(abi) if name.startswith(prefixes) and name not in checked}
    assert (
        unchecked
        == {
            "RUN_INTERNAL_DATA",
            "RUN_SYSTEM_EVENT_NDATA",
            "IOEVENTFD_SIZE",
            "MP_STATE_SIZE",
        }
        - checked
    )


def test_request_names():
    assert abi.request_name(abi.KVM_RUN) == "KVM_RUN"
    assert abi.request_name(0x1234) == "ioctl 0x1234"
