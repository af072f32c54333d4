"""Controller ↔ worker: ghosts, their interrupts, and clocks (docs/smp.md)."""

from __future__ import annotations

from base.lean_typing import NamedTuple
from ipc.launch_plan import MAX_WORKERS
from ipc.messages.records import MAX_GSI, TEXT_FIELD, VCPU_FIELD, VECTOR_FIELD, WORKER
from ipc.schema import U8, U32, U64, Field, Flag, Int, ListOf, RecordOf

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


class ReadQuiescence(NamedTuple):
    """Say what is on its way in this worker; only while its vCPUs and ghosts are parked."""


class QuiescentGhost(NamedTuple):
    """What a parked ghost holds, read from KVM: MP_STATE_*, how many vectors its LAPIC has requested and in service
    (those below 16, which no processor takes, do not count), NMIs pending or injected.
    """

    vcpu: int
    stub: bool
    mp_state: int
    requested: int
    in_service: int
    nmis: int


class QuiescenceRead(NamedTuple):
    """``open_events``: what was told to the controller, or waits to be, and was not dealt with."""

    open_events: int
    ghosts: tuple[QuiescentGhost, ...]


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


class GhostRecovered(NamedTuple):
    """Worker → controller: a ghost left its stub and was put back, or (``fatal``) does so too often."""

    vcpu: int
    fatal: bool
    text: str


_EVENT = Int(GHOST_INIT, GHOST_INTERRUPT)
_CLOCK_FIELDS: dict[str, Field] = {
    "has_tsc_offset": Flag(),
    "tsc_offset": Int(U64),
    "clock": Int(U64),
    "realtime": Int(U64),
    "flags": Int(U32),
}
WORKER.register(21, GhostEvent, event=_EVENT, vcpu=VCPU_FIELD, vector=VECTOR_FIELD)
WORKER.register(22, GhostEventDone, event=_EVENT, vcpu=VCPU_FIELD, vector=VECTOR_FIELD)
WORKER.register(23, Noted)
WORKER.register(24, PlaceStub, vcpu=VCPU_FIELD)
WORKER.register(25, StubPlaced)
WORKER.register(26, StartVcpu, vcpu=VCPU_FIELD, vector=VECTOR_FIELD)
WORKER.register(27, RaiseInterrupt, vcpu=VCPU_FIELD, vector=VECTOR_FIELD)
WORKER.register(28, InterruptRaised, taken=Flag())
WORKER.register(29, OpenIpiTarget, vcpu=VCPU_FIELD, vector=VECTOR_FIELD, gsi=Int(MAX_GSI - 1))
WORKER.register(30, OpenIpiSource, vcpu=VCPU_FIELD, vector=VECTOR_FIELD)
WORKER.register(31, IpiPathOpen)
WORKER.register(32, ParkGhosts)
WORKER.register(33, GhostsParked, drained=Int(U32))
WORKER.register(34, ReadClock)
WORKER.register(35, ClockRead, **_CLOCK_FIELDS)
WORKER.register(36, SetClock, **_CLOCK_FIELDS)
WORKER.register(37, ClockSet, measured=Flag(), ahead=Flag(), nanoseconds=Int(U64))
WORKER.register(40, GhostRecovered, vcpu=VCPU_FIELD, fatal=Flag(), text=TEXT_FIELD)
_QUIESCENT_GHOST = RecordOf(
    QuiescentGhost,
    vcpu=VCPU_FIELD,
    stub=Flag(),
    mp_state=Int(U32),
    requested=Int(256),
    in_service=Int(256),
    nmis=Int(U8),
)
WORKER.register(61, InitVcpu, vcpu=VCPU_FIELD)
WORKER.register(62, ReadQuiescence)
WORKER.register(63, QuiescenceRead, open_events=Int(U32), ghosts=ListOf(_QUIESCENT_GHOST, MAX_WORKERS))
