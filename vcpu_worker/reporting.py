"""What an exit is called, what it means for the microVM, and how it is described in VcpuExited."""

from __future__ import annotations

import os

from base.exit_codes import GENERIC_ERROR, OK
from base.lean_typing import NamedTuple
from vcpu_worker.kvm import abi
from vcpu_worker.kvm.vcpu import KvmVcpu

REASON_SHUTDOWN = "shutdown"
REASON_HLT = "hlt"
REASON_SYSTEM_EVENT = "system-event"
REASON_FAIL_ENTRY = "fail-entry"
REASON_INTERNAL_ERROR = "internal-error"
REASON_UNKNOWN = "unknown"
REASON_RUN_FAILED = "run-failed"

_SYSTEM_EVENT_NAMES = {
    abi.SYSTEM_EVENT_SHUTDOWN: "shutdown",
    abi.SYSTEM_EVENT_RESET: "reset",
    abi.SYSTEM_EVENT_CRASH: "crash",
}
_SUBERROR_NAMES = {
    1: "emulation failed",
    2: "simultaneous exceptions",
    3: "event delivery failed",
    4: "unexpected exit",
}
_MAX_DATA = 15


class FinalExit(NamedTuple):
    """Why a vCPU left its run loop for good: ``ipc.messages.worker.VcpuExited`` but for the vCPU's index."""

    reason: str
    code: int
    detail: tuple[int, ...]
    text: str


#: Not an end: the vCPU got its first INIT and must not start yet (RunLoop.start_held).
STARTING = FinalExit("starting", OK, (), "")


def describe(vcpu: KvmVcpu) -> FinalExit:
    """Describe the exit that is in the kvm_run page now; called by the vCPU's own thread only."""
    reason = vcpu.run32[abi.RUN_EXIT_REASON // 4]
    rip = int.from_bytes(vcpu.get_regs()[abi.REGS_RIP : abi.REGS_RIP + 8], "little")
    where = f"at rip {rip:#x}"
    if reason == abi.EXIT_SHUTDOWN:
        return FinalExit(REASON_SHUTDOWN, GENERIC_ERROR, (rip,), f"the guest shut down (triple fault) {where}")
    if reason == abi.EXIT_HLT:
        return FinalExit(REASON_HLT, GENERIC_ERROR, (rip,), f"the guest halted for good {where}")
    if reason == abi.EXIT_SYSTEM_EVENT:
        event = vcpu.run32[abi.RUN_SYSTEM_EVENT_TYPE // 4]
        code = OK if event in (abi.SYSTEM_EVENT_SHUTDOWN, abi.SYSTEM_EVENT_RESET) else GENERIC_ERROR
        name = _SYSTEM_EVENT_NAMES.get(event, f"number {event}")
        return FinalExit(REASON_SYSTEM_EVENT, code, (event,), f"system event: {name} {where}")
    if reason == abi.EXIT_FAIL_ENTRY:
        hardware = vcpu.run64[abi.RUN_FAIL_ENTRY_REASON // 8]
        cpu = vcpu.run32[abi.RUN_FAIL_ENTRY_CPU // 4]
        text = f"the processor refused to enter the guest: hardware reason {hardware:#x} on host CPU {cpu}, {where}"
        return FinalExit(REASON_FAIL_ENTRY, GENERIC_ERROR, (hardware, cpu), text)
    if reason == abi.EXIT_INTERNAL_ERROR:
        suberror = vcpu.run32[abi.RUN_INTERNAL_SUBERROR // 4]
        count = min(vcpu.run32[abi.RUN_INTERNAL_NDATA // 4], _MAX_DATA)
        first = abi.RUN_INTERNAL_DATA // 8
        name = _SUBERROR_NAMES.get(suberror, f"suberror {suberror}")
        return FinalExit(
            REASON_INTERNAL_ERROR,
            GENERIC_ERROR,
            (suberror, *vcpu.run64[first : first + count]),
            f"KVM internal error: {name} {where}",
        )
    return FinalExit(REASON_UNKNOWN, GENERIC_ERROR, (reason,), f"KVM exit reason {reason} is not handled, {where}")


def describe_failure(errno: int) -> FinalExit:
    """Describe a KVM_RUN that failed."""
    text = f"KVM_RUN: {os.strerror(errno)} (os error {errno})"
    return FinalExit(REASON_RUN_FAILED, GENERIC_ERROR, (errno,), text)
