"""The complete state of a paused microVM as one versioned record (docs/formats/microvm-state.md).

``Vmm.save_state`` makes it. It holds everything but the content of guest memory: that lies in the memfd.
"""

from __future__ import annotations

import struct

from base.lean_typing import NamedTuple
from ipc.errors import MessageError
from ipc.launch_plan import MAX_MEMORY_BYTES, MAX_WORKERS
from ipc.messages.ghosts import QuiescentGhost
from ipc.messages.records import MemoryRegion
from ipc.messages.worker import SavedState
from ipc.schema import MAX_FRAME_SIZE, U8, U16, U32, U64, Bytes, Field, Flag, Int, ListOf, RecordOf, Text, pack, unpack
from vmm.errors import VmmError
from vmm.layout import IOAPIC_PIN_COUNT

VERSION = 2
#: 2 MiB of RAM are one region, but there are no more than the layout has holes (vmm.layout.ram_regions), and some.
MAX_REGIONS = 16
MAX_VCPU_STATE = 128 << 10
_LENGTH = struct.Struct("<I")
assert _LENGTH.size == 4


class MicrovmStateError(VmmError):
    """The bytes are no state that this version knows."""

    code = "vmm.state_record"


class InterruptState(NamedTuple):
    """An interrupt line; ``pending``: an edge that came while the GSI was masked waits for its unmasking."""

    gsi: int
    pending: bool


class IoApicState(NamedTuple):
    """The registers; ``entries`` is the redirection table, 64 bits a pin."""

    select: int
    id: int
    entries: tuple[int, ...]


class SerialState(NamedTuple):
    """The registers of the UART, and what the guest has not read yet. ``looped``: some of that it has sent itself."""

    receive: bytes
    ier: int
    fcr: int
    lcr: int
    mcr: int
    scr: int
    divisor: int
    thr_empty_pending: bool
    looped: bool


class I8042State(NamedTuple):
    """The keyboard controller. ``answer`` counts if ``has_answer``; ``argument_of``: a command that waits for one."""

    buffer: bytes
    has_answer: bool
    answer: int
    control: int
    output_port: int
    argument_of: int
    keyboard_argument: bool


class DevicesState(NamedTuple):
    """Every device that has a state."""

    ioapic: IoApicState
    serial: SerialState
    i8042: I8042State
    interrupts: tuple[InterruptState, ...]


class QuiescentWorker(NamedTuple):
    """What one worker held beside its vCPUs: the proof that nothing else has to be saved (vmm.operations.quiescence).

    ``open_events`` between it and the controller, ``open_exits``: its rings that were not executed to the end.
    """

    worker: int
    open_events: int
    open_exits: int
    ghosts: tuple[QuiescentGhost, ...]


class MicrovmState(NamedTuple):
    """``groups[n]`` are the vCPUs of worker n. vCPU states, in the order of the indices, hold LAPIC and clock, too."""

    version: int
    microvm_id: str
    regions: tuple[MemoryRegion, ...]
    groups: tuple[tuple[int, ...], ...]
    devices: DevicesState
    quiescence: tuple[QuiescentWorker, ...]
    vcpus: tuple[SavedState, ...]


class _Head(NamedTuple):
    version: int
    microvm_id: str
    regions: tuple[MemoryRegion, ...]
    groups: tuple[tuple[int, ...], ...]
    devices: DevicesState
    quiescence: tuple[QuiescentWorker, ...]
    vcpu_count: int


_BYTE: Field = Int(U8)
_VCPU: Field = Int(MAX_WORKERS - 1)
_DEVICES = RecordOf(
    DevicesState,
    ioapic=RecordOf(IoApicState, select=_BYTE, id=Int(15), entries=ListOf(Int(U64), IOAPIC_PIN_COUNT)),
    serial=RecordOf(
        SerialState,
        receive=Bytes(64),
        ier=_BYTE,
        fcr=_BYTE,
        lcr=_BYTE,
        mcr=_BYTE,
        scr=_BYTE,
        divisor=Int(U16),
        thr_empty_pending=Flag(),
        looped=Flag(),
    ),
    i8042=RecordOf(
        I8042State,
        buffer=Bytes(16),
        has_answer=Flag(),
        answer=_BYTE,
        control=_BYTE,
        output_port=_BYTE,
        argument_of=_BYTE,
        keyboard_argument=Flag(),
    ),
    interrupts=ListOf(RecordOf(InterruptState, gsi=Int(4095), pending=Flag()), 64),
)
_HEAD = RecordOf(
    _Head,
    version=Int(VERSION, VERSION),
    microvm_id=Text(64),
    regions=ListOf(
        RecordOf(
            MemoryRegion,
            guest_address=Int(U64),
            size=Int(MAX_MEMORY_BYTES, 1),
            offset=Int(MAX_MEMORY_BYTES),
        ),
        MAX_REGIONS,
    ),
    groups=ListOf(ListOf(_VCPU, MAX_WORKERS), MAX_WORKERS),
    devices=_DEVICES,
    quiescence=ListOf(
        # What may be held is nothing: an honest state is refused else.
        RecordOf(
            QuiescentWorker,
            worker=_VCPU,
            open_events=Int(0),
            open_exits=Int(0),
            ghosts=ListOf(
                RecordOf(
                    QuiescentGhost,
                    vcpu=_VCPU,
                    stub=Flag(),
                    mp_state=Int(U32),
                    requested=Int(0),
                    in_service=Int(0),
                    nmis=Int(0),
                ),
                MAX_WORKERS,
            ),
        ),
        MAX_WORKERS,
    ),
    vcpu_count=Int(MAX_WORKERS, 1),
)
_SAVED = RecordOf(SavedState, vcpu=_VCPU, version=Int(U32, 1), state=Bytes(MAX_VCPU_STATE))


def encode(state: MicrovmState) -> bytes:
    """Return the record as bytes. Raises MicrovmStateError if a value is out of its bounds."""
    head = _Head(*state[:6], len(state.vcpus))
    try:
        frames = [pack(_HEAD.check(head, "state")), *[pack(_SAVED.check(vcpu, "vcpu")) for vcpu in state.vcpus]]
    except MessageError as error:
        raise MicrovmStateError(str(error)) from None
    return b"".join([_LENGTH.pack(len(frame)) + frame for frame in frames])


def decode(data: bytes) -> MicrovmState:
    """Return the record that was encoded. Raises MicrovmStateError for anything else."""
    try:
        frame, rest = _take(data)
        head = _HEAD.check(unpack(frame), "state")
        vcpus = []
        for _ in range(head.vcpu_count):
            frame, rest = _take(rest)
            vcpus.append(_SAVED.check(unpack(frame), "vcpu"))
    except MessageError as error:
        raise MicrovmStateError(f"This is no state of version {VERSION}: {error}") from None
    if rest:
        raise MicrovmStateError(f"{len(rest)} bytes follow the last vCPU.")
    if len(head.devices.ioapic.entries) != IOAPIC_PIN_COUNT:
        raise MicrovmStateError(f"The IOAPIC has {IOAPIC_PIN_COUNT} pins.")
    indices = [vcpu.vcpu for vcpu in vcpus]
    if indices != list(range(len(vcpus))) or sorted(each for group in head.groups for each in group) != indices:
        raise MicrovmStateError("The vCPUs are not those of the workers.")
    if [each.worker for each in head.quiescence] != list(range(len(head.groups))):
        raise MicrovmStateError("Not every worker was at rest.")
    return MicrovmState(
        head.version, head.microvm_id, head.regions, head.groups, head.devices, head.quiescence, tuple(vcpus)
    )


def _take(data: bytes) -> tuple[bytes, bytes]:
    """Return the first frame and what follows it."""
    if len(data) < _LENGTH.size:
        raise MessageError("it ends too early")
    (length,) = _LENGTH.unpack_from(data)
    end = _LENGTH.size + length
    if length > MAX_FRAME_SIZE or len(data) < end:
        raise MessageError("it ends too early")
    return data[_LENGTH.size : end], data[end:]
