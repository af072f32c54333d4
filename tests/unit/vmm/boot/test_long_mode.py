"""Descriptors, page tables and registers of a vCPU that starts."""

from __future__ import annotations

import struct

from ipc.messages.records import WORKER
from ipc.messages.worker import Configure
from ipc.schema import pack, unpack
from tests.harness.memory_fixtures import MemoryFactory
from vmm.boot import long_mode


def u64(data: bytes, offset: int) -> int:
    return int(struct.unpack_from("<Q", data, offset)[0])


def test_descriptors() -> None:
    assert long_mode.GDT_64 == (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x008F8B000000FFFF)
    assert long_mode.GDT_PVH == (0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00008B0000000067)
    assert long_mode.descriptor(0xC093, 0x1234_5678, 0xABCDE) == 0x12CA_9334_5678_BCDE


def walk(memory_read: dict[int, bytes], root: int, address: int) -> int:
    """Translate as the processor does, for 2 MiB pages."""
    entry = root
    for shift in (39, 30, 21):
        table = memory_read[entry & ~0xFFF]
        entry = u64(table, (address >> shift & 511) * 8)
        assert entry & 3 == 3
    assert entry & 0x80
    return (entry & ~0x1FFFFF) | (address & 0x1FFFFF)


def test_entering_in_long_mode(guest_memory: MemoryFactory) -> None:
    memory = guest_memory(1 << 20)
    registers = long_mode.enter_64bit(memory, 0x100_0000)
    assert (registers.rip, registers.rsi, registers.rsp, registers.rbp) == (0x100_0000, 0x7000, 0x8FF0, 0x8FF0)
    assert registers.rflags == 2
    assert registers.cr0 == 0x8000_0011
    assert (registers.cr3, registers.cr4, registers.efer) == (0x9000, 0x20, 0x500)
    assert (registers.gdt_base, registers.idt_base, registers.idt_limit) == (0x500, 0x520, 7)
    assert memory.read(0x500, 40) == struct.pack("<5Q", *long_mode.GDT_64, 0)
    tables = {address: memory.read(address, 4096) for address in (0x9000, 0xA000, 0xB000)}
    for address in (0, 0x1000, 0x100_0000, 0x3FFF_FFFF):
        assert walk(tables, registers.cr3, address) == address


def test_entering_by_pvh(guest_memory: MemoryFactory) -> None:
    memory = guest_memory(1 << 20)
    registers = long_mode.enter_pvh(memory, 0x100_0850)
    assert (registers.rip, registers.rbx, registers.rsi) == (0x100_0850, 0x6000, 0)
    assert (registers.cr0, registers.cr3, registers.cr4, registers.efer) == (0x11, 0, 0, 0)
    assert memory.read(0x500, 40) == struct.pack("<5Q", *long_mode.GDT_PVH, 0)


def test_registers_fit_into_the_message_for_the_worker(guest_memory: MemoryFactory) -> None:
    memory = guest_memory(1 << 20)
    for registers in (long_mode.enter_64bit(memory, 0x100_0000), long_mode.enter_pvh(memory, 0x100_0850)):
        message = Configure(
            vcpu_count=1,
            smt=False,
            vcpus=(0,),
            boot=registers,
            resumes_other=False,
        )
        assert WORKER.from_wire(*unpack(pack(WORKER.to_wire(message)))) == message
