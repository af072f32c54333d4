"""The complete state of a paused microVM: what its sections are, and what must hold between them.

``Vmm.save_state`` makes it. It holds everything but the content of guest memory: that lies in the memfd.
"""

from __future__ import annotations

from base.lean_typing import Any, Mapping, NamedTuple, Sequence
from ipc.launch_plan import MAX_MEMORY_BYTES, MAX_VCPUS
from ipc.messages.records import MemoryRegion
from ipc.messages.worker import SavedState
from ipc.schema import U32, U64, Bytes, Int, ListOf, RecordOf, Saveable, Section, Text
from vmm.devices.interrupts import InterruptLine
from vmm.devices.legacy.i8042 import I8042
from vmm.devices.legacy.ioapic import IoApic
from vmm.devices.legacy.pic import Pic
from vmm.devices.legacy.pit import Pit
from vmm.devices.legacy.serial import Serial
from vmm.operations import quiescence
from vmm.operations.quiescence import QuiescentWorker
from vmm.snapshot.section import Key, Saved, collect, parse
from vmm.snapshot.state_file import MicrovmStateError

#: 2 MiB of RAM are one region, but there are no more than the layout has holes (vmm.layout.ram_regions), and some.
MAX_REGIONS = 16
MAX_VCPU_STATE = 128 << 10


class MachineState(NamedTuple):
    """``groups[n]`` are the vCPUs of worker n."""

    microvm_id: str
    regions: tuple[MemoryRegion, ...]
    groups: tuple[tuple[int, ...], ...]


_VCPU = Int(MAX_VCPUS - 1)
MACHINE = Section(
    "machine",
    1,
    RecordOf(
        MachineState,
        microvm_id=Text(64),
        regions=ListOf(
            RecordOf(
                MemoryRegion,
                guest_address=Int(U64),
                size=Int(MAX_MEMORY_BYTES, 1),
                offset=Int(MAX_MEMORY_BYTES),
            ),
            MAX_REGIONS,
            1,
        ),
        groups=ListOf(ListOf(_VCPU, MAX_VCPUS, 1), MAX_VCPUS, 1),
    ),
)
#: One a vCPU: the record of docs/formats/vcpu-state.md, with LAPIC and clock.
VCPU = Section("vcpu", 1, RecordOf(SavedState, vcpu=_VCPU, version=Int(U32, 1), state=Bytes(MAX_VCPU_STATE)))
_STANDARD = (IoApic.SECTION, Serial.SECTION, I8042.SECTION, Pic.SECTION, Pit.SECTION)


def device_sections() -> tuple[Section, ...]:
    """Return the sections of devices; of those that are virtio's there may be any number."""
    from virtio.block.configuration import BLOCK_SECTION
    from virtio.entropy import Entropy  # what a machine without devices does not load is carried (jailer.carried)
    from vmm.devices.transport.mmio import MmioTransport

    return (*_STANDARD, InterruptLine.SECTION, MmioTransport.SECTION, Entropy.SECTION, BLOCK_SECTION)


def sections() -> tuple[Section, ...]:
    """Return the sections of a whole state."""
    return (MACHINE, quiescence.SECTION, VCPU, *device_sections())


class MicrovmState(NamedTuple):
    """The parts; ``devices`` are the records of their sections, by name and instance, ``vcpus`` in order of indices."""

    machine: MachineState
    devices: Mapping[Key, Any]
    quiescence: tuple[QuiescentWorker, ...]
    vcpus: tuple[SavedState, ...]


def of_devices(units: Sequence[Saveable]) -> dict[Key, Any]:
    """Let every device save itself."""
    return {(unit.SECTION.name, unit.instance): unit.save() for unit in units}


def encode(state: MicrovmState) -> bytes:
    """Return the state as bytes. Raises MicrovmStateError if a value is out of its bounds."""
    known = {section.name: section for section in device_sections()}
    return collect(
        [
            Saved(MACHINE, "", state.machine),
            *[Saved(quiescence.SECTION, str(each.worker), each) for each in state.quiescence],
            *[Saved(known[name], instance, record) for (name, instance), record in state.devices.items()],
            *[Saved(VCPU, str(each.vcpu), each) for each in state.vcpus],
        ]
    )


def decode(data: bytes) -> MicrovmState:
    """Return the state that was encoded. Raises MicrovmStateError for anything else."""
    records = parse(data, sections())
    machine = records.pop((MACHINE.name, ""), None)
    if machine is None:
        raise MicrovmStateError("The section machine is missing.")
    workers = _numbered(records, quiescence.SECTION.name)
    vcpus = _numbered(records, VCPU.name)
    indices = list(range(len(vcpus)))
    if sorted(each for group in machine.groups for each in group) != indices or not _agree(vcpus, "vcpu"):
        raise MicrovmStateError("The vCPUs are not those of the workers.")
    if len(workers) != len(machine.groups) or not _agree(workers, "worker"):
        raise MicrovmStateError("Not every worker was at rest.")
    for section in _STANDARD:
        if (section.name, "") not in records:
            raise MicrovmStateError(f"The section {section.name} is missing.")
    return MicrovmState(machine, records, tuple(workers), tuple(vcpus))


def _numbered(records: dict[Key, Any], name: str) -> list[Any]:
    """Take the records of a section whose instances are 0, 1, 2 and so on; what is left over is not taken."""
    found: list[Any] = []
    while (record := records.pop((name, str(len(found))), None)) is not None:
        found.append(record)
    if any(key[0] == name for key in records):
        raise MicrovmStateError(f"The sections {name} are not numbered as they should be.")
    return found


def _agree(records: Sequence[Any], field: str) -> bool:
    """Tell whether each record names the instance that it stands in."""
    return all(getattr(record, field) == number for number, record in enumerate(records))
