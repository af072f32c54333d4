"""Zero page, PVH start information, descriptors, page tables, registers."""

from __future__ import annotations

import struct

from ipc.messages.records import WORKER
from ipc.messages.worker import Configure
from ipc.schema import pack, unpack
from tests.harness.memory_fixtures import MemoryFactory
from vmm import layout
from vmm.boot import long_mode, pvh, zero_page

MAP = ((0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (0x100000, 0x700_0000, 1), (4 << 30, 1 << 30, 1))


def u32(data: bytes, offset: int) -> int:
    return int(struct.unpack_from("<I", data, offset)[0])


def u64(data: bytes, offset: int) -> int:
    return int(struct.unpack_from("<Q", data, offset)[0])


def test_the_zero_page_of_an_elf_kernel() -> None:
    page = zero_page.build(MAP, 77, (0x700_0000, 12345), 0xE0000, None)
    assert len(page) == 4096
    assert u64(page, 0x70) == 0xE0000
    assert page[0x1FE:0x200] == b"\x55\xaa"
    assert page[0x202:0x206] == b"HdrS"
    assert page[0x210] == 0xFF
    assert (u32(page, 0x218), u32(page, 0x21C)) == (0x700_0000, 12345)
    assert (u32(page, 0x228), u32(page, 0x238)) == (0x20000, 77)
    assert u32(page, 0x230) == 0x100_0000
    assert page[0x1E8] == 4
    entries = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * index) for index in range(4)]
    assert tuple(entries) == MAP
    assert page[0x2D0 + 80 :] == bytes(4096 - 0x2D0 - 80)
    assert page[0x1EF] == 0


def test_the_zero_page_keeps_the_header_of_a_bzimage() -> None:
    header = bytes(range(1, 1 + 0x26C - 0x1F1))
    page = zero_page.build(MAP[:3], 77, None, 0xE0000, header)
    kept = bytearray(header)
    kept[0x210 - 0x1F1] = 0xFF
    struct.pack_into("<II", kept, 0x218 - 0x1F1, 0, 0)
    struct.pack_into("<I", kept, 0x228 - 0x1F1, 0x20000)
    assert page[0x1F1:0x26C] == kept
    assert page[0x1E8] == 3


def test_pvh_start_information(guest_memory: MemoryFactory) -> None:
    memory = guest_memory(1 << 20)
    pvh.write(memory, MAP, (0x700_0000, 12345), 0xE0000)
    info = memory.read(0x6000, 56)
    assert struct.unpack("<IIIIQQQQII", info) == (
        0x336EC578, 1, 0, 1, 0x6040, 0x20000, 0xE0000, 0x7000, 4, 0
    )  # fmt: skip
    assert struct.unpack("<QQQQ", memory.read(0x6040, 32)) == (0x700_0000, 12345, 0, 0)
    assert [struct.unpack("<QQII", memory.read(0x7000 + 24 * index, 24)) for index in range(4)] == [
        (*entry, 0) for entry in MAP
    ]
    pvh.write(memory, MAP, None, 0xE0000)
    assert struct.unpack("<IIIIQ", memory.read(0x6000, 24)) == (0x336EC578, 1, 0, 0, 0)


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
            regions=layout.ram_regions(1 << 20),
            memory_size=1 << 20,
            boot=registers,
            ports=(),
            mmio=(),
            interrupts=(),
            track_dirty_pages=False,
            resumes_other=False,
        )
        assert WORKER.from_wire(*unpack(pack(WORKER.to_wire(message)))) == message
