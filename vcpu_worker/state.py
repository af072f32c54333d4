"""The complete state of a vCPU as one versioned record (docs/formats/vcpu-state.md).

Registers travel as the kernel's own structures: they are what KVM_SET_* takes back, and their layout is kernel ABI.
"""

from __future__ import annotations

import time

from base.lean_typing import Any, NamedTuple
from ipc.errors import MessageError
from ipc.messages.records import CpuidEntry, MsrValue
from ipc.schema import U32, U64, Bytes, Field, Flag, Int, ListOf, RecordOf, pack, unpack
from vcpu_worker.cpu.msr import IA32_TSC, IA32_TSC_DEADLINE
from vcpu_worker.errors import StateError
from vcpu_worker.kvm import abi
from vcpu_worker.kvm.vcpu import KvmVcpu
from vcpu_worker.kvm.vm import KvmVm

VERSION = 1
#: AMX makes the largest XSAVE area so far, about 11 KiB.
MAX_XSAVE_SIZE = 32 << 10
MAX_CPUID_ENTRIES = abi.MAX_CPUID_ENTRIES
MAX_MSRS = 1024


class VcpuState(NamedTuple):
    """Everything KVM knows about one vCPU, in the order in which it is read.

    ``sregs2`` is empty where the host lacks KVM_CAP_SREGS2; ``sregs`` is always there. ``msrs`` ends with
    TSC_DEADLINE, which arms the timer and is restored last. ``tsc_offset`` counts only if ``has_tsc_offset``.
    ``clock`` is struct kvm_clock_data of the VM, with the time of day even where the host's KVM does not tell it.
    """

    version: int
    vcpu: int
    mp_state: int
    regs: bytes
    sregs: bytes
    sregs2: bytes
    events: bytes
    debugregs: bytes
    xsave: bytes
    xcrs: bytes
    lapic: bytes
    msrs: tuple[MsrValue, ...]
    cpuid: tuple[CpuidEntry, ...]
    tsc_khz: int
    has_tsc_offset: bool
    tsc_offset: int
    clock: bytes


_U32: Field = Int(U32)
_RECORD = RecordOf(
    VcpuState,
    version=Int(VERSION, VERSION),
    vcpu=Int(U32),
    mp_state=Int(U32),
    regs=Bytes(abi.REGS_SIZE),
    sregs=Bytes(abi.SREGS_SIZE),
    sregs2=Bytes(abi.SREGS2_SIZE),
    events=Bytes(abi.VCPU_EVENTS_SIZE),
    debugregs=Bytes(abi.DEBUGREGS_SIZE),
    xsave=Bytes(MAX_XSAVE_SIZE),
    xcrs=Bytes(abi.XCRS_SIZE),
    lapic=Bytes(abi.LAPIC_SIZE),
    msrs=ListOf(RecordOf(MsrValue, register=_U32, value=Int(U64)), MAX_MSRS),
    cpuid=ListOf(
        RecordOf(CpuidEntry, leaf=_U32, subleaf=_U32, flags=_U32, eax=_U32, ebx=_U32, ecx=_U32, edx=_U32),
        MAX_CPUID_ENTRIES,
    ),
    tsc_khz=_U32,
    has_tsc_offset=Flag(),
    tsc_offset=Int(U64),
    clock=Bytes(abi.CLOCK_SIZE),
)
_EXACT_SIZES = (
    ("regs", abi.REGS_SIZE),
    ("sregs", abi.SREGS_SIZE),
    ("events", abi.VCPU_EVENTS_SIZE),
    ("debugregs", abi.DEBUGREGS_SIZE),
    ("xcrs", abi.XCRS_SIZE),
    ("lapic", abi.LAPIC_SIZE),
    ("clock", abi.CLOCK_SIZE),
)


def save(vm: KvmVm, vcpu: KvmVcpu, msr_indices: list[int]) -> VcpuState:
    """Read the state of a parked vCPU without an open exit; its own thread only.

    KVM_GET_MP_STATE comes first: it lets KVM accept a pending INIT or SIPI, which changes registers.
    """
    mp_state = vcpu.get_mp_state()
    tsc_offset = vcpu.get_tsc_offset()
    return VcpuState(
        version=VERSION,
        vcpu=vcpu.index,
        mp_state=mp_state,
        regs=vcpu.get_regs(),
        sregs=vcpu.get_sregs(),
        sregs2=vcpu.get_sregs2() if vcpu.has_sregs2 else b"",
        events=vcpu.get_events(),
        debugregs=vcpu.get_debugregs(),
        xsave=vcpu.get_xsave(),
        xcrs=vcpu.get_xcrs(),
        lapic=vcpu.get_lapic(),
        msrs=tuple(vcpu.get_msrs(msr_indices)),
        cpuid=tuple(vcpu.get_cpuid()),
        tsc_khz=vcpu.tsc_khz(),
        has_tsc_offset=tsc_offset is not None,
        tsc_offset=tsc_offset or 0,
        clock=_clock_with_realtime(vm),
    )


def _clock_with_realtime(vm: KvmVm) -> bytes:
    """Read kvmclock and when it was that: whoever restores it adds what has passed since."""
    clock, flags, pad, realtime, host_tsc = abi.CLOCK_DATA.unpack(vm.get_clock())
    if not flags & abi.CLOCK_REALTIME:
        realtime = time.time_ns()
        flags |= abi.CLOCK_REALTIME
    return abi.CLOCK_DATA.pack(clock, flags, pad, realtime, host_tsc)


def load(vcpu: KvmVcpu, state: VcpuState) -> None:
    """Give a vCPU that never ran a state; its own thread only. Raises WorkerError.

    The VM's clock is not part of it (:func:`load_clock`). The order matters (docs/formats/vcpu-state.md says why).
    """
    if state.vcpu != vcpu.index:
        raise StateError(f"this is the state of vCPU {state.vcpu}, not of vCPU {vcpu.index}")
    if state.tsc_khz != vcpu.tsc_khz():
        raise StateError(f"the TSC runs at {vcpu.tsc_khz()} kHz here, not at {state.tsc_khz} kHz")
    if not state.has_tsc_offset:
        raise StateError("this host's KVM cannot keep the time stamp counter of a vCPU (Linux 5.16 can)")
    vcpu.set_xcrs(state.xcrs)
    vcpu.set_xsave(state.xsave)
    if state.sregs2 and vcpu.has_sregs2:
        vcpu.set_sregs2(state.sregs2)
    else:
        vcpu.set_sregs(state.sregs)
    vcpu.set_tsc_offset(state.tsc_offset)
    vcpu.set_msrs([msr for msr in state.msrs if msr.register not in (IA32_TSC, IA32_TSC_DEADLINE)])
    vcpu.set_regs(state.regs)
    vcpu.set_debugregs(state.debugregs)
    vcpu.set_lapic(timer_that_goes_on(state.lapic))
    vcpu.set_msrs([msr for msr in state.msrs if msr.register == IA32_TSC_DEADLINE])
    vcpu.set_events(state.events)
    vcpu.set_mp_state(state.mp_state)


def load_clock(vm: KvmVm, state: VcpuState) -> None:
    """Let kvmclock go on as if it had never stopped; after the TSCs of all vCPUs were set."""
    clock, _, _, realtime, _ = abi.CLOCK_DATA.unpack(state.clock)
    vm.set_clock(clock, realtime, abi.CLOCK_REALTIME)


def timer_that_goes_on(lapic: bytes) -> bytes:
    """Return a LAPIC page whose timer does not start again if it was one-shot and has delivered its interrupt.

    KVM_SET_LAPIC starts the timer with the current count; an expired one (count 0) fires at once, on kernels before
    6.3 after a whole period. Whether its interrupt was delivered can be seen as long as that is requested or in
    service; otherwise it may still be under way, and a second one harms less than none.
    """
    lvt = int.from_bytes(lapic[abi.APIC_LVTT : abi.APIC_LVTT + 4], "little")
    vector = lvt & 0xFF
    one_shot = not lvt >> 17 & 3
    expired = not any(lapic[abi.APIC_TMCCT : abi.APIC_TMCCT + 4])
    offset = (vector >> 5) * 16 + (vector >> 3 & 3)
    delivered = (lapic[abi.APIC_IRR + offset] | lapic[abi.APIC_ISR + offset]) >> (vector & 7) & 1
    if not (one_shot and expired and delivered):
        return lapic
    return lapic[: abi.APIC_TMICT] + bytes(4) + lapic[abi.APIC_TMICT + 4 :]


def encode(state: VcpuState) -> bytes:
    """Serialise a state."""
    return pack(tuple(state))


def decode(data: bytes) -> VcpuState:
    """Parse and check a serialised state. Raises StateError only."""
    try:
        values: Any = unpack(data)
        state: VcpuState = _RECORD.check(values, "VcpuState")
    except MessageError as error:
        raise StateError(f"not a vCPU state of version {VERSION}: {error}") from None
    for name, size in _EXACT_SIZES:
        if len(getattr(state, name)) != size:
            raise StateError(f"vCPU state: {name} has {len(getattr(state, name))} bytes, expected {size}")
    if len(state.sregs2) not in (0, abi.SREGS2_SIZE) or len(state.xsave) < abi.XSAVE_SIZE:
        raise StateError("vCPU state: sregs2 or xsave has a wrong size")
    return state
