"""A vCPU's configuration as a CPU template: what ``--dump-cpu-config`` writes (docs/formats/cpu-template.md)."""

from __future__ import annotations

import os

from base.errno_text import errno_text
from ipc.messages.worker import DumpedCpuConfig
from vmm.cpu_config.template import (
    BitPattern,
    CpuidModifier,
    CpuidRegisterModifier,
    CustomCpuTemplate,
    MsrModifier,
)
from vmm.errors import VmmError
from vmm.files import FileOpenError, open_replaced
from vmm.json.text import json_text

_REGISTERS = ("eax", "ebx", "ecx", "edx")
_ALL32 = 0xFFFF_FFFF
_ALL64 = (1 << 64) - 1

#: Made whole from the guest's topology, whatever a template says: a template cannot set them.
_TOPOLOGY_LEAVES = (0xB, 0x1F)
#: What a guest's clocks and timers are at, where it has put its paravirtual structures: state, not configuration.
_STATE_MSRS = frozenset(
    (
        0x10,  # IA32_TIME_STAMP_COUNTER
        0x11,  # KVM wall clock and system time, old numbers
        0x12,
        0x3B,  # IA32_TSC_ADJUST
        0xE7,  # IA32_MPERF, IA32_APERF
        0xE8,
        0x6E0,  # IA32_TSC_DEADLINE
        *range(0x4B56_4D00, 0x4B56_4E00),  # KVM
        *range(0x4000_0000, 0x4000_0200),  # Hyper-V
    )
)


class DumpError(VmmError):
    """The file for the CPU configuration cannot be written."""

    code = "vmm.dump_cpu_config"


def to_template(config: DumpedCpuConfig) -> CustomCpuTemplate:
    """Return the template that sets every bit of this configuration, sorted by leaf and register number."""
    cpuid = [
        CpuidModifier(
            entry.leaf,
            entry.subleaf,
            entry.flags,
            [CpuidRegisterModifier(name, BitPattern(_ALL32, getattr(entry, name))) for name in _REGISTERS],
        )
        for entry in sorted(config.cpuid)
        if entry.leaf not in _TOPOLOGY_LEAVES
    ]
    msrs = [
        MsrModifier(register, BitPattern(_ALL64, value))
        for register, value in sorted(config.msrs)
        if register not in _STATE_MSRS
    ]
    return CustomCpuTemplate([], cpuid, msrs)


def write(config: DumpedCpuConfig, path: str) -> None:
    """Write the template to a file, which is replaced. Raises DumpError."""
    text = json_text(to_template(config).to_json()).encode() + b"\n"
    failed = f"The CPU configuration cannot be written to {path}: "
    try:
        descriptor = open_replaced(path)
    except FileOpenError as error:
        raise DumpError(f"{failed}{error}") from error
    try:
        while text:
            text = text[os.write(descriptor, text) :]
    except OSError as error:
        raise DumpError(f"{failed}{errno_text(error)}") from error
    finally:
        os.close(descriptor)
