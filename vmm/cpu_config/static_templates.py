"""Static CPU templates: the names that ``cpu_template`` takes, where each may be used, and which bits it changes.

docs/cpu-templates.md says why each bit is there. Sources: Intel SDM volume 2A, CPUID, and volume 4,
IA32_ARCH_CAPABILITIES; AMD APM volume 3, appendix E; both vendors' lists of processors
affected by speculative execution.
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, Iterable
from vmm.cpu_config.template import BitPattern, CpuidModifier, CpuidRegisterModifier, CustomCpuTemplate, MsrModifier
from vmm.errors import VmmError

if TYPE_CHECKING:
    from ipc.messages.records import CpuidEntry

_INTEL = b"GenuineIntel"
_AMD = b"AuthenticAMD"
# CPUID leaf 1, EAX: family, model and stepping.
SKYLAKE = 0x0005_0654
CASCADE_LAKE = 0x0005_0657
ICE_LAKE = 0x0006_06A6
MILAN = 0x00A0_0F11

#: Template → vendor, models.
PERMITTED = {
    "C3": (_INTEL, (SKYLAKE, CASCADE_LAKE, ICE_LAKE)),
    "T2": (_INTEL, (SKYLAKE, CASCADE_LAKE, ICE_LAKE)),
    "T2S": (_INTEL, (SKYLAKE, CASCADE_LAKE)),
    "T2CL": (_INTEL, (CASCADE_LAKE, ICE_LAKE)),
    "T2A": (_AMD, (MILAN,)),
}

#: What a register becomes: the bits that change, and their values. Everything else stays.
_Change = tuple[int, int]
_Changes = dict[tuple[int, int], dict[str, _Change]]

_ALL32 = 0xFFFF_FFFF
_ALL64 = (1 << 64) - 1
_INDEX_COUNTS = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
_INDEXED_LEAVES = (7, 0xD)

IA32_ARCH_CAPABILITIES = 0x10A


def _bits(*numbers: int) -> int:
    value = 0
    for number in numbers:
        value |= 1 << number
    return value


def _hide(*numbers: int) -> _Change:
    return _bits(*numbers), 0


def _hide_all_but(*numbers: int) -> _Change:
    return _ALL32 & ~_bits(*numbers), 0


_HIDE_ALL: _Change = (_ALL32, 0)
_SPECULATION_CONTROLS = (10, 26, 27, 28, 29, 31)  # leaf 7, EDX

# Family, model and stepping: all bits but the reserved ones.
_MODEL_BITS = 0x0FFF_3FFF
_HASWELL = 0x0003_06F2
_IVY_BRIDGE = 0x0003_06E4

# Leaf 1, ECX: DTES64 MONITOR DS-CPL VMX SMX EIST TM2 CNXT-ID SDBG xTPR PDCM DCA
_PLATFORM_ECX = (2, 3, 4, 5, 6, 7, 8, 10, 11, 14, 15, 18)
# Leaf 1, EDX: PSN DS ACPI TM PBE
_PLATFORM_EDX = (18, 21, 22, 29, 31)
# Leaf 7, EBX: SGX HLE RTM RDT-M MPX RDT-A AVX512F AVX512DQ RDSEED ADX AVX512_IFMA PCOMMIT CLFLUSHOPT CLWB PT AVX512PF
# AVX512ER AVX512CD SHA AVX512BW AVX512VL
_AFTER_HASWELL_EBX = (2, 4, 11, 12, 14, 15, 16, 17, 18, 19, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31)
# and TSC_ADJUST BMI1 AVX2 BMI2 INVPCID
_AFTER_IVY_BRIDGE_EBX = (1, 3, 5, 8, 10, *_AFTER_HASWELL_EBX)

#: x87, SSE and AVX: 512 + 64 + 256 bytes.
_XSAVE_AREA = 832
_XSAVE: _Changes = {
    (0xD, 0): {"eax": _hide_all_but(0, 1, 2), "ecx": (_ALL32, _XSAVE_AREA), "edx": _HIDE_ALL},
    (0xD, 1): {"eax": _hide_all_but(0), "ebx": _HIDE_ALL, "ecx": _HIDE_ALL, "edx": _HIDE_ALL},
}
_AFTER_HASWELL: _Changes = {
    (7, 0): {
        "eax": _HIDE_ALL,
        "ebx": _hide(*_AFTER_HASWELL_EBX),
        "ecx": _HIDE_ALL,
        "edx": _hide_all_but(*_SPECULATION_CONTROLS),
    },
    **_XSAVE,
}
_T2: _Changes = {
    (1, 0): {"eax": (_MODEL_BITS, _HASWELL), "ecx": _hide(*_PLATFORM_ECX), "edx": _hide(*_PLATFORM_EDX)},
    **_AFTER_HASWELL,
    (0x8000_0001, 0): {"ecx": _hide(8, 29)},  # PREFETCHW MONITORX
    (0x8000_0008, 0): {"eax": (0xFF00, 48 << 8), "ebx": _hide(9)},  # linear address bits; WBNOINVD
}
_WITH_ARCH_CAPABILITIES: _Changes = {
    **_T2,
    (7, 0): {**_T2[7, 0], "edx": (_ALL32 & ~_bits(10, 26, 27, 28, 31), _bits(29))},
}
_C3: _Changes = {
    (1, 0): {
        "eax": (_MODEL_BITS, _IVY_BRIDGE),
        "ecx": _hide(*_PLATFORM_ECX, 12, 22),  # FMA MOVBE
        "edx": _hide(*_PLATFORM_EDX),
    },
    **_AFTER_HASWELL,
    (7, 0): {**_AFTER_HASWELL[7, 0], "ebx": _hide(*_AFTER_IVY_BRIDGE_EBX)},
    (0x8000_0001, 0): {"ecx": _hide(5, 8, 29)},  # LZCNT PREFETCHW MONITORX
}
_T2A: _Changes = {
    (1, 0): {"ecx": _hide(*_PLATFORM_ECX), "edx": _hide(*_PLATFORM_EDX)},
    **_AFTER_HASWELL,
    (0x8000_0001, 0): {
        # SVM ExtApicSpace AltMovCr8 SSE4A MisAlignSse 3DNowPrefetch IBS XOP SKINIT WDT LWP FMA4 TCE TBM PerfCtrExtCore
        # PerfCtrExtNB DataBkptExt PerfTsc PerfCtrExtLLC MONITORX
        "ecx": _hide(2, 3, 4, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 21, 23, 24, 26, 27, 28, 29),
        "edx": _hide(22, 25, 30, 31),  # MmxExt FFXSR 3DNowExt 3DNow
    },
    # CLZERO InstRetCntMsr RstrFpErrPtrs RDPRU MCOMMIT WBNOINVD PPIN CPPC
    (0x8000_0008, 0): {"ebx": _hide(0, 1, 2, 4, 8, 9, 23, 27)},
}

# IA32_ARCH_CAPABILITIES: "not affected" only if every permitted model is not, "affected" if any is.
#: RSBA: the return stack may be replaced by other predictions when it is empty (Skylake).
_ARCH_CAPABILITIES_T2S = _bits(2)
#: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, MDS_NO; RRSBA.
_ARCH_CAPABILITIES_T2CL = _bits(0, 1, 3, 5, 19)

_TEMPLATES: dict[str, tuple[_Changes, int | None]] = {
    "C3": (_C3, None),
    "T2": (_T2, None),
    "T2S": (_WITH_ARCH_CAPABILITIES, _ARCH_CAPABILITIES_T2S),
    "T2CL": (_WITH_ARCH_CAPABILITIES, _ARCH_CAPABILITIES_T2CL),
    "T2A": (_T2A, None),
}


class StaticTemplateError(VmmError):
    """The static CPU template does not fit this host's processor."""

    code = "vmm.static_cpu_template"

    def __init__(self, text: str) -> None:
        super().__init__(f"Failed to get CPU template: {text}")


def check_permitted(name: str, host: Iterable[CpuidEntry]) -> None:
    """Raise StaticTemplateError unless the template may be used on the processor with this CPUID."""
    leaves = {entry.leaf: entry for entry in host if entry.leaf in (0, 1)}
    vendor = b""
    if 0 in leaves:
        vendor = b"".join([value.to_bytes(4, "little") for value in (leaves[0].ebx, leaves[0].edx, leaves[0].ecx)])
    wanted, models = PERMITTED[name]
    if vendor != wanted:
        raise StaticTemplateError("CPU vendor mismatched between actual CPU and CPU template.")
    if 1 not in leaves or leaves[1].eax & _MODEL_BITS not in models:
        raise StaticTemplateError("The current CPU model is not permitted to apply the CPU template.")


def static_template(name: str) -> CustomCpuTemplate:
    """Return a static template (a key of ``PERMITTED``) as a custom one."""
    changes, arch_capabilities = _TEMPLATES[name]
    cpuid = [
        CpuidModifier(
            leaf,
            subleaf,
            _INDEX_COUNTS if leaf in _INDEXED_LEAVES else 0,
            [CpuidRegisterModifier(register, BitPattern(*change)) for register, change in registers.items()],
        )
        for (leaf, subleaf), registers in changes.items()
    ]
    msrs = []
    if arch_capabilities is not None:
        msrs.append(MsrModifier(IA32_ARCH_CAPABILITIES, BitPattern(_ALL64, arch_capabilities)))
    return CustomCpuTemplate([], cpuid, msrs)
