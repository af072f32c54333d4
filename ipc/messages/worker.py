"""Controller ↔ worker: set-up, running, state, end."""

from __future__ import annotations

from base.lean_typing import NamedTuple
from ipc.device_pages import SLOT_COUNT
from ipc.launch_plan import MAX_MEMORY_BYTES, MAX_WORKERS
from ipc.messages.records import (
    CPUID_FIELD,
    MAX_CPUID_ENTRIES,
    MAX_GSI,
    MAX_TEMPLATE_ITEMS,
    ROUTE_FIELD,
    TEXT_FIELD,
    VCPU_FIELD,
    WORKER,
    WORKER_FIELD,
    BootRegisters,
    CapabilityDemand,
    CpuidEntry,
    MemoryRegion,
    MsrChange,
    MsrValue,
    Route,
    Window,
)
from ipc.schema import U8, U16, U32, U64, Bytes, Flag, Int, ListOf, RecordOf, Text

_REGION = RecordOf(MemoryRegion, guest_address=Int(U64), size=Int(MAX_MEMORY_BYTES, 1), offset=Int(MAX_MEMORY_BYTES))
_WINDOW = RecordOf(Window, address=Int(U64), length=Int(1 << 40, 1), slot=Int(SLOT_COUNT - 1))
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
    """Make the VM. The descriptors were all sent on the descriptor channel before (the messages of ``DESCRIPTORS``).

    ``vcpus`` are the indices that this worker runs; ``boot`` is used for vCPU 0 only. ``interrupts`` are the GSIs
    whose eventfds were sent. ``resumes_other``: for another worker, whose state will come (LoadState, TakeOver).
    The last three come from the CPU template: ``cpuid`` is what HostCpuRead said with the template's changes, not yet
    normalised (empty: without a template, what the host supports).
    """

    vcpu_count: int
    smt: bool
    vcpus: tuple[int, ...]
    regions: tuple[MemoryRegion, ...]
    memory_size: int
    boot: BootRegisters
    ports: tuple[Window, ...]
    mmio: tuple[Window, ...]
    interrupts: tuple[int, ...]
    track_dirty_pages: bool
    resumes_other: bool
    cpuid: tuple[CpuidEntry, ...] = ()
    msr_changes: tuple[MsrChange, ...] = ()
    capabilities: tuple[CapabilityDemand, ...] = ()


class Configured(NamedTuple):
    """The VM is made and its vCPUs are parked; each vCPU descriptor was sent upwards, in the order of ``vcpus``."""

    tsc_khz: int


class SetRoutes(NamedTuple):
    """Set these routes; other GSIs keep theirs."""

    routes: tuple[Route, ...]


class RoutesSet(NamedTuple):
    """The routes are in force."""


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
    regions=ListOf(_REGION, 8),
    memory_size=Int(MAX_MEMORY_BYTES, 1),
    boot=_REGISTERS,
    ports=ListOf(_WINDOW, 64),
    mmio=ListOf(_WINDOW, 64),
    interrupts=ListOf(Int(MAX_GSI - 1), 64),
    track_dirty_pages=Flag(),
    resumes_other=Flag(),
    cpuid=ListOf(CPUID_FIELD, MAX_CPUID_ENTRIES),
    msr_changes=ListOf(_MSR_CHANGE, MAX_TEMPLATE_ITEMS),
    capabilities=ListOf(_CAPABILITY, MAX_TEMPLATE_ITEMS),
)
WORKER.register(5, Configured, tsc_khz=Int(U32))
WORKER.register(6, SetRoutes, routes=ListOf(ROUTE_FIELD, 64))
WORKER.register(7, RoutesSet)
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
