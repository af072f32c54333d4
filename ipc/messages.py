"""The messages of the two control channels. docs/formats/messages.md; numbers are never given twice.

``WORKER``: controller ↔ worker, over ZeroMQ. ``SUPERVISOR``: controller ↔ supervisor, over an inherited socket pair.
"""

from __future__ import annotations

from ipc.device_page import SLOT_COUNT
from ipc.plan import MAX_MEMORY_BYTES, MAX_WORKERS
from ipc.schema import U8, U16, U32, U64, Bytes, Field, Flag, Int, ListOf, RecordOf, Schema, Text
from ipc.typed import NamedTuple

WORKER = Schema()
SUPERVISOR = Schema()

# ---------------------------------------------------------------- shared records

MAX_GSI = 4096
MAX_CPUID_ENTRIES = 256
#: MSRs, and capabilities, that a CPU template may name.
MAX_TEMPLATE_ITEMS = 1024


class Failed(NamedTuple):
    """The answer to a command that could not be carried out; nothing was changed unless the text says so."""

    code: str
    text: str


class MemoryRegion(NamedTuple):
    """Guest RAM: ``size`` bytes at ``guest_address``, found at ``offset`` of the guest memory memfd."""

    guest_address: int
    size: int
    offset: int


class BootRegisters(NamedTuple):
    """Registers of the boot vCPU at the kernel's entry, as the boot protocol asks for.

    ``gdt`` holds four raw descriptors (null, code, data, TSS); selectors are their offsets. The worker derives
    the segment registers from them.
    """

    rip: int
    rsp: int
    rbp: int
    rsi: int
    rbx: int
    rflags: int
    cr0: int
    cr3: int
    cr4: int
    efer: int
    gdt_base: int
    gdt: tuple[int, ...]
    idt_base: int
    idt_limit: int


class Window(NamedTuple):
    """``length`` consecutive ports or MMIO bytes from ``address``.

    Ports: one slot of the device page per port, from ``slot``. MMIO: one slot for the whole window.
    """

    address: int
    length: int
    slot: int


class Route(NamedTuple):
    """GSI → MSI. ``masked`` takes the irqfd of that GSI away (events are kept in the eventfd)."""

    gsi: int
    address: int
    data: int
    masked: bool


class MsrValue(NamedTuple):
    """One model specific register."""

    register: int
    value: int


class CpuidEntry(NamedTuple):
    """One entry of KVM_SET_CPUID2."""

    leaf: int
    subleaf: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


class MsrChange(NamedTuple):
    """A CPU template's change of one model specific register: the bits of ``mask`` become those of ``value``."""

    register: int
    mask: int
    value: int


class CapabilityDemand(NamedTuple):
    """A CPU template's word on one KVM_CAP_*: the host must have it (``required``), or may lack it."""

    number: int
    required: bool


_REGION = RecordOf(MemoryRegion, guest_address=Int(U64), size=Int(MAX_MEMORY_BYTES, 1), offset=Int(MAX_MEMORY_BYTES))
_WINDOW = RecordOf(Window, address=Int(U64), length=Int(1 << 40, 1), slot=Int(SLOT_COUNT - 1))
_ROUTE = RecordOf(Route, gsi=Int(MAX_GSI - 1), address=Int(U64), data=Int(U32), masked=Flag())
_MSR = RecordOf(MsrValue, register=Int(U32), value=Int(U64))
_CPUID: Field = RecordOf(
    CpuidEntry,
    leaf=Int(U32),
    subleaf=Int(U32),
    flags=Int(U32),
    eax=Int(U32),
    ebx=Int(U32),
    ecx=Int(U32),
    edx=Int(U32),
)
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
_CODE = Text(64)
_TEXT = Text(1024)
_VCPU = Int(MAX_WORKERS - 1)
_WORKER = Int(MAX_WORKERS - 1)

# ---------------------------------------------------------------- controller ↔ worker


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
    whose eventfds were sent. ``goes_on``: for another worker, whose state will come (LoadState, TakeOver). The last
    three come from the CPU template: ``cpuid`` is what HostCpuRead said with the template's changes, not yet normalised
    (empty: without a template, what the host supports).
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
    goes_on: bool
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


# SMP: a ghost is a vCPU of the guest in a VM that does not run it. It takes what this VM's vCPUs send to it.

#: What a GhostEvent is about.
GHOST_INTERRUPT = 1  # an interrupt with this vector reached the ghost
GHOST_NMI = 2
GHOST_STARTUP = 3  # INIT and a SIPI with this vector reached the ghost
GHOST_INIT = 5  # while the ghosts are parked: INIT reached the ghost, and no SIPI yet
VCPU_STARTING = 4  # the worker's own vCPU got its first INIT: it waits until every other worker has a stub in its place


class GhostEvent(NamedTuple):
    """Worker → controller: something to be forwarded. The same one does not come again until GhostEventDone."""

    event: int
    vcpu: int
    vector: int


class GhostEventDone(NamedTuple):
    """Controller → worker: the event has arrived where it belongs."""

    event: int
    vcpu: int
    vector: int


class Noted(NamedTuple):
    """The answer to GhostEventDone."""


class PlaceStub(NamedTuple):
    """Turn the ghost of a vCPU that is about to start into the stub. Idempotent."""

    vcpu: int


class StubPlaced(NamedTuple):
    """The ghost runs the stub; from now on nothing that is sent to it is lost."""


class StartVcpu(NamedTuple):
    """Give the worker's own vCPU an INIT and a SIPI with this vector."""

    vcpu: int
    vector: int


class InitVcpu(NamedTuple):
    """Give the worker's own vCPU an INIT: the answer is InterruptRaised."""

    vcpu: int


class RaiseInterrupt(NamedTuple):
    """Give the worker's own vCPU an interrupt with this vector, or an NMI (vector 2)."""

    vcpu: int
    vector: int


class InterruptRaised(NamedTuple):
    """``taken`` is False when the vCPU's LAPIC did not accept it, as with an IPI to a processor that is off."""

    taken: bool


class OpenIpiTarget(NamedTuple):
    """Let the eventfd that was sent (IpiPath) raise this vector in the worker's own vCPU, by way of this GSI."""

    vcpu: int
    vector: int
    gsi: int


class OpenIpiSource(NamedTuple):
    """Let the stub of this ghost signal the eventfd that was sent (IpiPath) without leaving the kernel."""

    vcpu: int
    vector: int


class IpiPathOpen(NamedTuple):
    """This end of the path is in force."""


class ParkGhosts(NamedTuple):
    """Park the ghosts once nothing is on its way through them; only while paused. Idempotent."""


class GhostsParked(NamedTuple):
    """Every ghost is parked with an empty LAPIC, every event was forwarded; ``drained`` ghosts had held something."""

    drained: int


class ReadRest(NamedTuple):
    """Say what is on its way in this worker; only while its vCPUs and ghosts are parked."""


class GhostAtRest(NamedTuple):
    """What a parked ghost holds, read from KVM: MP_STATE_*, how many vectors its LAPIC has requested and in service
    (those below 16, which no processor takes, do not count), NMIs pending or injected.
    """

    vcpu: int
    stub: bool
    mp_state: int
    requested: int
    in_service: int
    nmis: int


class RestRead(NamedTuple):
    """``open_events``: what was told to the controller, or waits to be, and was not dealt with."""

    open_events: int
    ghosts: tuple[GhostAtRest, ...]


class ReadClock(NamedTuple):
    """Give every vCPU and ghost the TSC offset of this worker's first vCPU, and read offset and kvmclock."""


class ClockRead(NamedTuple):
    """``tsc_offset`` counts if ``has_tsc_offset``; ``clock`` and ``realtime`` in ns, ``flags`` as in kvm_clock_data."""

    has_tsc_offset: bool
    tsc_offset: int
    clock: int
    realtime: int
    flags: int


class SetClock(NamedTuple):
    """Follow the clock of another worker: what its ClockRead said."""

    has_tsc_offset: bool
    tsc_offset: int
    clock: int
    realtime: int
    flags: int


class ClockSet(NamedTuple):
    """How far this worker's kvmclock is from the other one's afterwards, and whether that could be measured."""

    measured: bool
    ahead: bool
    nanoseconds: int


class ReportGhosts(NamedTuple):
    """Report the counters of every ghost."""


class GhostReport(NamedTuple):
    """Counters of one ghost. ``exits`` are those that reached user space: the rest was forwarded in the kernel."""

    vcpu: int
    stub: bool
    exits: int
    startups: int
    nmis: int
    recoveries: int


class GhostsReported(NamedTuple):
    """The counters of every ghost of the worker."""

    ghosts: tuple[GhostReport, ...]


class ReadHostCpu(NamedTuple):
    """Report what the host's KVM can give to a guest; before Configure, which wants it for a CPU template."""


class HostCpuRead(NamedTuple):
    """KVM_GET_SUPPORTED_CPUID."""

    cpuid: tuple[CpuidEntry, ...]


class GhostRecovered(NamedTuple):
    """Worker → controller: a ghost left its stub and was put back, or (``fatal``) does so too often."""

    vcpu: int
    fatal: bool
    text: str


# Succession: a worker goes on for another one (docs/smp.md, "Live replacement").

#: Paths that one TakeOver may bring.
MAX_PATHS_AT_ONCE = 32


class GhostState(NamedTuple):
    """What a ghost is besides its registers, which are the stub's: ``stub`` if it runs it, the vector of the last SIPI
    that reached it if ``started``, ``waiting`` for a SIPI after an INIT."""

    vcpu: int
    stub: bool
    started: bool
    vector: int
    waiting: bool


class HandOver(NamedTuple):
    """Take every irqfd away, and do not run again before TakeBack. Only while paused. Idempotent."""


class HandedOver(NamedTuple):
    """What is signalled from now on waits in the eventfds; the ghosts are as told.

    ``held`` are the worker's own vCPUs that the other workers are not ready for yet (VCPU_STARTING).
    """

    ghosts: tuple[GhostState, ...]
    held: tuple[int, ...]


class TakeBack(NamedTuple):
    """Undo HandOver; the other worker has ended. Idempotent."""


class TakenBack(NamedTuple):
    """The irqfds are in force again."""


class LoadState(NamedTuple):
    """Give a vCPU the state that another worker's SavedState told. Only to a worker that goes on for another."""

    vcpu: int
    version: int
    state: bytes


class StateLoaded(NamedTuple):
    """The vCPU is as it was."""


class TakeOver(NamedTuple):
    """Bind these interrupts, whose eventfds were sent (Interrupt, IpiPath).

    After the ``last`` one, with which ``ghosts`` and ``held`` come as HandedOver told them, the worker is paused.
    """

    routes: tuple[Route, ...]
    paths: tuple[OpenIpiTarget, ...]
    ghosts: tuple[GhostState, ...]
    held: tuple[int, ...]
    last: bool


class TakenOver(NamedTuple):
    """They are in force."""


WORKER.register(1, Failed, code=_CODE, text=_TEXT)
WORKER.register(
    2,
    Hello,
    worker=_WORKER,
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
    vcpus=ListOf(_VCPU, MAX_WORKERS),
    regions=ListOf(_REGION, 8),
    memory_size=Int(MAX_MEMORY_BYTES, 1),
    boot=_REGISTERS,
    ports=ListOf(_WINDOW, 64),
    mmio=ListOf(_WINDOW, 64),
    interrupts=ListOf(Int(MAX_GSI - 1), 64),
    track_dirty_pages=Flag(),
    goes_on=Flag(),
    cpuid=ListOf(_CPUID, MAX_CPUID_ENTRIES),
    msr_changes=ListOf(_MSR_CHANGE, MAX_TEMPLATE_ITEMS),
    capabilities=ListOf(_CAPABILITY, MAX_TEMPLATE_ITEMS),
)
WORKER.register(5, Configured, tsc_khz=Int(U32))
WORKER.register(6, SetRoutes, routes=ListOf(_ROUTE, 64))
WORKER.register(7, RoutesSet)
WORKER.register(8, Resume)
WORKER.register(9, Resumed)
WORKER.register(10, Pause)
WORKER.register(11, Paused, kvmclock_ctrl_failures=Int(U32))
WORKER.register(12, SaveState, vcpu=_VCPU)
WORKER.register(13, SavedState, vcpu=_VCPU, version=Int(U16), state=Bytes(128 << 10))
WORKER.register(14, DumpCpuConfig, vcpu=_VCPU)
WORKER.register(15, DumpedCpuConfig, vcpu=_VCPU, cpuid=ListOf(_CPUID, MAX_CPUID_ENTRIES), msrs=ListOf(_MSR, 1024))
WORKER.register(16, Ping)
WORKER.register(17, Pong, state=Text(32))
WORKER.register(18, Finish)
WORKER.register(19, Finished)
WORKER.register(20, VcpuExited, vcpu=_VCPU, reason=Text(32), code=Int(U8), detail=ListOf(Int(U64), 16), text=Text(1024))
_EVENT = Int(GHOST_INIT, GHOST_INTERRUPT)
_VECTOR = Int(U8)
_CLOCK_FIELDS: dict[str, Field] = {
    "has_tsc_offset": Flag(),
    "tsc_offset": Int(U64),
    "clock": Int(U64),
    "realtime": Int(U64),
    "flags": Int(U32),
}
_GHOST = RecordOf(
    GhostReport, vcpu=_VCPU, stub=Flag(), exits=Int(U64), startups=Int(U64), nmis=Int(U64), recoveries=Int(U64)
)
WORKER.register(21, GhostEvent, event=_EVENT, vcpu=_VCPU, vector=_VECTOR)
WORKER.register(22, GhostEventDone, event=_EVENT, vcpu=_VCPU, vector=_VECTOR)
WORKER.register(23, Noted)
WORKER.register(24, PlaceStub, vcpu=_VCPU)
WORKER.register(25, StubPlaced)
WORKER.register(26, StartVcpu, vcpu=_VCPU, vector=_VECTOR)
WORKER.register(27, RaiseInterrupt, vcpu=_VCPU, vector=_VECTOR)
WORKER.register(28, InterruptRaised, taken=Flag())
WORKER.register(29, OpenIpiTarget, vcpu=_VCPU, vector=_VECTOR, gsi=Int(MAX_GSI - 1))
WORKER.register(30, OpenIpiSource, vcpu=_VCPU, vector=_VECTOR)
WORKER.register(31, IpiPathOpen)
WORKER.register(32, ParkGhosts)
WORKER.register(33, GhostsParked, drained=Int(U32))
WORKER.register(34, ReadClock)
WORKER.register(35, ClockRead, **_CLOCK_FIELDS)
WORKER.register(36, SetClock, **_CLOCK_FIELDS)
WORKER.register(37, ClockSet, measured=Flag(), ahead=Flag(), nanoseconds=Int(U64))
WORKER.register(38, ReportGhosts)
WORKER.register(39, GhostsReported, ghosts=ListOf(_GHOST, MAX_WORKERS))
WORKER.register(40, GhostRecovered, vcpu=_VCPU, fatal=Flag(), text=Text(512))
WORKER.register(41, ReadHostCpu)
WORKER.register(42, HostCpuRead, cpuid=ListOf(_CPUID, MAX_CPUID_ENTRIES))
_GHOST_STATE = RecordOf(GhostState, vcpu=_VCPU, stub=Flag(), started=Flag(), vector=_VECTOR, waiting=Flag())
_PATH = RecordOf(OpenIpiTarget, vcpu=_VCPU, vector=_VECTOR, gsi=Int(MAX_GSI - 1))
WORKER.register(43, HandOver)
WORKER.register(44, HandedOver, ghosts=ListOf(_GHOST_STATE, MAX_WORKERS), held=ListOf(_VCPU, MAX_WORKERS))
WORKER.register(45, TakeBack)
WORKER.register(46, TakenBack)
WORKER.register(47, LoadState, vcpu=_VCPU, version=Int(U16), state=Bytes(128 << 10))
WORKER.register(48, StateLoaded)
WORKER.register(
    49,
    TakeOver,
    routes=ListOf(_ROUTE, 64),
    paths=ListOf(_PATH, MAX_PATHS_AT_ONCE),
    ghosts=ListOf(_GHOST_STATE, MAX_WORKERS),
    held=ListOf(_VCPU, MAX_WORKERS),
    last=Flag(),
)
WORKER.register(50, TakenOver)
_AT_REST = RecordOf(
    GhostAtRest,
    vcpu=_VCPU,
    stub=Flag(),
    mp_state=Int(U32),
    requested=Int(256),
    in_service=Int(256),
    nmis=Int(U8),
)
WORKER.register(61, InitVcpu, vcpu=_VCPU)
WORKER.register(62, ReadRest)
WORKER.register(63, RestRead, open_events=Int(U32), ghosts=ListOf(_AT_REST, MAX_WORKERS))

# ---------------------------------------------------------------- controller ↔ supervisor


class Spawn(NamedTuple):
    """Fork a worker for these vCPUs and ghosts (``ipc.plan.Assignment``); its ZeroMQ endpoint is bound already."""

    worker: int
    vcpus: tuple[int, ...]
    ghosts: tuple[int, ...]


class Spawned(NamedTuple):
    """With two descriptors: the cell's pidfd, and our end of its descriptor channel."""

    worker: int
    pid: int


class SignalCell(NamedTuple):
    """Send SIGKILL, SIGSTOP or SIGCONT to a worker; ``pid`` tells it from the one that replaces it."""

    worker: int
    pid: int
    signal: int


class Signalled(NamedTuple):
    """The signal was sent."""


class CreateMemory(NamedTuple):
    """Make the guest memory, at most what the plan allows."""

    size: int


class MemoryCreated(NamedTuple):
    """With one descriptor: a sealed memfd of ``size`` bytes."""

    size: int


class CellEnded(NamedTuple):
    """Supervisor → controller: a cell ended. ``signal`` is 0 when it exited with ``status``.

    ``wall`` names the wall that ended it ("seccomp"), or is empty.
    """

    worker: int
    pid: int
    status: int
    signal: int
    wall: str


class Shutdown(NamedTuple):
    """Supervisor → controller: end the microVM now, in order; ``code`` is the exit code, ``text`` the log line."""

    code: int
    text: str


class SignalNoticed(NamedTuple):
    """Supervisor → controller: the visible process got a signal that ends nothing; ``text`` is the log line."""

    signal: int
    text: str


SUPERVISOR.register(1, Failed, code=_CODE, text=_TEXT)
SUPERVISOR.register(2, Spawn, worker=_WORKER, vcpus=ListOf(_VCPU, MAX_WORKERS), ghosts=ListOf(_VCPU, MAX_WORKERS))
SUPERVISOR.register(3, Spawned, worker=_WORKER, pid=Int(U32, 1))
SUPERVISOR.register(4, SignalCell, worker=_WORKER, pid=Int(U32, 1), signal=Int(64, 1))
SUPERVISOR.register(5, Signalled)
SUPERVISOR.register(6, CreateMemory, size=Int(MAX_MEMORY_BYTES, 1))
SUPERVISOR.register(7, MemoryCreated, size=Int(MAX_MEMORY_BYTES, 1))
SUPERVISOR.register(8, CellEnded, worker=_WORKER, pid=Int(U32, 1), status=Int(U8), signal=Int(64), wall=Text(64))
SUPERVISOR.register(9, Shutdown, code=Int(U8), text=_TEXT)
SUPERVISOR.register(10, SignalNoticed, signal=Int(64, 1), text=_TEXT)

# ---------------------------------------------------------------- descriptor channel, controller → worker

DESCRIPTORS = Schema()


class GuestMemory(NamedTuple):
    """With one descriptor: the guest memory memfd of ``size`` bytes."""

    size: int


class DevicePages(NamedTuple):
    """With one descriptor: the device page."""


class ExitRing(NamedTuple):
    """With three descriptors: ring memfd, doorbell eventfd, completion eventfd of this vCPU."""

    vcpu: int


class Interrupt(NamedTuple):
    """With one descriptor: the eventfd of this GSI."""

    gsi: int


class VcpuDescriptor(NamedTuple):
    """Worker → controller, once per vCPU before Configured: with the vCPU's descriptor, to map kvm_run read-only."""

    vcpu: int


DESCRIPTORS.register(1, GuestMemory, size=Int(MAX_MEMORY_BYTES, 1))
DESCRIPTORS.register(2, DevicePages)
DESCRIPTORS.register(3, ExitRing, vcpu=_VCPU)
DESCRIPTORS.register(4, Interrupt, gsi=Int(MAX_GSI - 1))


class IpiPath(NamedTuple):
    """With one descriptor: the eventfd of what is sent to this vCPU with this vector (OpenIpiTarget, OpenIpiSource)."""

    vcpu: int
    vector: int


DESCRIPTORS.register(5, VcpuDescriptor, vcpu=_VCPU)
DESCRIPTORS.register(6, IpiPath, vcpu=_VCPU, vector=_VECTOR)
