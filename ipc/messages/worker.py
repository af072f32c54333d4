"""Controller ↔ worker: set-up, running, state, end."""

from __future__ import annotations

from base.lean_typing import NamedTuple
from ipc.launch_plan import MAX_WORKERS
from ipc.messages.records import (
    CPUID_FIELD,
    MAX_CPUID_ENTRIES,
    MAX_TEMPLATE_ITEMS,
    TEXT_FIELD,
    VCPU_FIELD,
    WORKER,
    WORKER_FIELD,
    BootRegisters,
    CapabilityDemand,
    CpuidEntry,
    MsrChange,
    MsrValue,
)
from ipc.schema import U8, U16, U32, U64, Bytes, Flag, Int, ListOf, RecordOf, Text

_MSR = RecordOf(MsrValue, register=Int(U32), value=Int(U64))
_MSR_CHANGE = RecordOf(MsrChange, register=Int(U32), mask=Int(U64), value=Int(U64))
_CAPABILITY = RecordOf(CapabilityDemand, number=Int(U32), required=Flag())
_REGISTERS = RecordOf(
    BootRegisters,
    rip=Int(U64),
    rsp=Int(U64),
    rbp=Int(U64),
    rsi=Int(U64),
    rbx=Int(U64),
    rflags=Int(U64),
    cr0=Int(U64),
    cr3=Int(U64),
    cr4=Int(U64),
    efer=Int(U64),
    gdt_base=Int(U64),
    gdt=ListOf(Int(U64), 4),
    idt_base=Int(U64),
    idt_limit=Int(U16),
)


class Hello(NamedTuple):
    """Worker → controller, its first message."""

    worker: int
    pid: int
    kvm_api_version: int
    vcpu_mmap_size: int
    max_vcpus: int
    max_memslots: int


class Welcome(NamedTuple):
    """Controller → worker: the answer to Hello; the endpoint's path is gone now."""


class Configure(NamedTuple):
    """Make the vCPUs. What the VM has beside them was said before (``ipc.messages.vm``), and the device page and the
    exit rings were sent on the descriptor channel.

    ``vcpus`` are the indices that this worker runs; ``boot`` is used for vCPU 0 only. ``resumes_other``: for another
    worker, whose state will come (LoadState, TakeOver). The last three come from the CPU template: ``cpuid`` is what
    HostCpuRead said with the template's changes, not yet normalised (empty: no template, what the host supports).
    """

    vcpu_count: int
    smt: bool
    vcpus: tuple[int, ...]
    boot: BootRegisters
    resumes_other: bool
    cpuid: tuple[CpuidEntry, ...] = ()
    msr_changes: tuple[MsrChange, ...] = ()
    capabilities: tuple[CapabilityDemand, ...] = ()


class Configured(NamedTuple):
    """The vCPUs are made and parked; each vCPU descriptor was sent upwards, in the order of ``vcpus``."""

    tsc_khz: int


class Resume(NamedTuple):
    """Let every vCPU of the worker run. Idempotent."""


class Resumed(NamedTuple):
    """The vCPUs run."""


class Pause(NamedTuple):
    """Park every vCPU of the worker. Idempotent."""


class Paused(NamedTuple):
    """Every vCPU is parked and has no open exit; KVM_KVMCLOCK_CTRL failures are counted."""

    kvmclock_ctrl_failures: int


class SaveState(NamedTuple):
    """Return the complete state of one vCPU; only while paused."""

    vcpu: int


class SavedState(NamedTuple):
    """A versioned record, serialised by vcpu_worker.state (docs/formats/vcpu-state.md)."""

    vcpu: int
    version: int
    state: bytes


class DumpCpuConfig(NamedTuple):
    """Return CPUID and MSRs of one vCPU; only while paused."""

    vcpu: int


class DumpedCpuConfig(NamedTuple):
    """What the guest sees of its CPU."""

    vcpu: int
    cpuid: tuple[CpuidEntry, ...]
    msrs: tuple[MsrValue, ...]


class Ping(NamedTuple):
    """Is the control thread alive?"""


class Pong(NamedTuple):
    """It is; ``state`` is the worker's own view (configured, running, paused, …)."""

    state: str


class Finish(NamedTuple):
    """End in order."""


class Finished(NamedTuple):
    """The last message of a worker that was asked to finish."""


class VcpuExited(NamedTuple):
    """Worker → controller: a vCPU left its run loop for good.

    ``reason``: "shutdown" (triple fault), "hlt", "system-event", "fail-entry", "internal-error", "unknown",
    "run-failed".
    ``detail`` are numbers of the exit (hardware reason, suberror, …); ``code`` is the microVM's exit code for it.
    """

    vcpu: int
    reason: str
    code: int
    detail: tuple[int, ...]
    text: str


class ReadHostCpu(NamedTuple):
    """Report what the host's KVM can give to a guest; before Configure, which wants it for a CPU template."""


class HostCpuRead(NamedTuple):
    """KVM_GET_SUPPORTED_CPUID."""

    cpuid: tuple[CpuidEntry, ...]


WORKER.register(
    2,
    Hello,
    worker=WORKER_FIELD,
    pid=Int(U32, 1),
    kvm_api_version=Int(U16),
    vcpu_mmap_size=Int(1 << 20, 4096),
    max_vcpus=Int(U32),
    max_memslots=Int(U32),
)
WORKER.register(3, Welcome)
WORKER.register(
    4,
    Configure,
    vcpu_count=Int(MAX_WORKERS, 1),
    smt=Flag(),
    vcpus=ListOf(VCPU_FIELD, MAX_WORKERS),
    boot=_REGISTERS,
    resumes_other=Flag(),
    cpuid=ListOf(CPUID_FIELD, MAX_CPUID_ENTRIES),
    msr_changes=ListOf(_MSR_CHANGE, MAX_TEMPLATE_ITEMS),
    capabilities=ListOf(_CAPABILITY, MAX_TEMPLATE_ITEMS),
)
WORKER.register(5, Configured, tsc_khz=Int(U32))
WORKER.register(8, Resume)
WORKER.register(9, Resumed)
WORKER.register(10, Pause)
WORKER.register(11, Paused, kvmclock_ctrl_failures=Int(U32))
WORKER.register(12, SaveState, vcpu=VCPU_FIELD)
WORKER.register(13, SavedState, vcpu=VCPU_FIELD, version=Int(U16), state=Bytes(128 << 10))
WORKER.register(14, DumpCpuConfig, vcpu=VCPU_FIELD)
WORKER.register(
    15, DumpedCpuConfig, vcpu=VCPU_FIELD, cpuid=ListOf(CPUID_FIELD, MAX_CPUID_ENTRIES), msrs=ListOf(_MSR, 1024)
)
WORKER.register(16, Ping)
WORKER.register(17, Pong, state=Text(32))
WORKER.register(18, Finish)
WORKER.register(19, Finished)
WORKER.register(
    20, VcpuExited, vcpu=VCPU_FIELD, reason=Text(32), code=Int(U8), detail=ListOf(Int(U64), 16), text=TEXT_FIELD
)
WORKER.register(41, ReadHostCpu)
WORKER.register(42, HostCpuRead, cpuid=ListOf(CPUID_FIELD, MAX_CPUID_ENTRIES))
