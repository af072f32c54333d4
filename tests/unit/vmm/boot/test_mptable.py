"""The MP table, read back as a kernel reads it (Intel MultiProcessor Specification 1.4, chapter 4)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.harness.memory_fixtures import MemoryFactory
from vmm import layout
from vmm.boot import mptable
from vmm.boot.errors import AcpiError

SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}
INT, NMI, EXTINT = 0, 1, 3


class Interrupt(NamedTuple):
    kind: int
    flags: int
    bus: int
    line: int
    apic: int
    pin: int


def entries(table: bytes) -> Iterator[bytes]:
    """Walk the entries as the header counts them; they end where the table does."""
    offset = 44
    for _ in range(int.from_bytes(table[34:36], "little")):
        size = SIZES[table[offset]]
        yield table[offset : offset + size]
        offset += size
    assert offset == len(table)


def interrupts(table: bytes, kind: int) -> list[Interrupt]:
    return [Interrupt(*struct.unpack("<xBHBBBB", each)) for each in entries(table) if each[0] == kind]


@pytest.mark.parametrize("vcpus", [1, 2, 32])
def test_a_kernel_finds_it_at_the_end_of_low_memory(guest_memory: MemoryFactory, vcpus: int) -> None:
    memory = guest_memory(16 << 20)
    mptable.write(memory, layout.SystemMemory(), vcpus)
    low = memory.read(layout.LOW_MEMORY_END, 1024)
    places = [offset for offset in range(0, 1024, 16) if low[offset : offset + 4] == b"_MP_"]
    assert places == [0]
    pointer = low[:16]
    assert sum(pointer) % 256 == 0
    address, length, revision = struct.unpack_from("<IBB", pointer, 4)
    assert (length, revision, pointer[11:16]) == (1, 4, bytes(5))
    size = int.from_bytes(memory.read(address + 4, 2), "little")
    table = memory.read(address, size)
    assert table == mptable.table(vcpus)
    assert table[:4] == b"PCMP"
    assert sum(table) % 256 == 0
    assert int.from_bytes(table[36:40], "little") == layout.LAPIC_ADDRESS


@pytest.mark.parametrize("vcpus", [1, 3, 32])
def test_processors_and_the_ioapic(vcpus: int) -> None:
    found = list(entries(mptable.table(vcpus)))
    processors = [each for each in found if each[0] == 0]
    assert [each[1] for each in processors] == list(range(vcpus))
    assert [each[3] for each in processors] == [3, *[1] * (vcpus - 1)]  # enabled; the first one boots
    (io_apic,) = [each for each in found if each[0] == 2]
    assert io_apic[1] not in range(vcpus)
    assert io_apic[3] == 1
    assert int.from_bytes(io_apic[4:8], "little") == layout.IOAPIC_ADDRESS
    assert [each[2:] for each in found if each[0] == 1] == [b"ISA   "]


def test_interrupt_lines() -> None:
    """Each line of the bus to the pin of its number, as the IOAPIC and its devices have it; INTR to LINT0 of vCPU 0."""
    table = mptable.table(2)
    lines = interrupts(table, 3)
    assert [(each.line, each.pin) for each in lines] == [(pin, pin) for pin in range(layout.IOAPIC_PIN_COUNT)]
    assert {(each.kind, each.flags, each.bus, each.apic) for each in lines} == {(INT, 0, 0, 2)}
    local = interrupts(table, 4)
    assert [(each.kind, each.apic, each.pin) for each in local] == [(EXTINT, 0, 0), (NMI, 0xFF, 1)]


@pytest.mark.parametrize("vcpus", [0, 33])
def test_what_cannot_be_described(vcpus: int) -> None:
    with pytest.raises(AcpiError):
        mptable.table(vcpus)
