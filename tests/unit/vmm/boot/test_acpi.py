"""ACPI tables, with iasl (acpica-tools) as the judge of what they say."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.guest_memory import GuestMemory
from tests.harness.memory_fixtures import MemoryFactory
from vmm import layout
from vmm.boot import acpi, aml
from vmm.boot.acpi import VirtioMmioDevice
from vmm.boot.errors import AcpiError
from vmm.layout import LayoutError

DEVICES = tuple(VirtioMmioDevice(0xC000_1000 + index * 4096, 4096, 5 + index) for index in range(19))


def read_table(memory: GuestMemory, address: int) -> bytes:
    length = struct.unpack("<I", memory.read(address + 4, 4))[0]
    data = memory.read(address, length)
    assert sum(data) & 0xFF == 0
    assert data[10:16] == b"CELLBK"
    return data


def tables_of(memory: GuestMemory, rsdp_address: int) -> dict[str, bytes]:
    rsdp = memory.read(rsdp_address, 36)
    assert rsdp[:8] == b"RSD PTR "
    assert sum(rsdp[:20]) & 0xFF == 0
    assert sum(rsdp) & 0xFF == 0
    assert rsdp[15] == 2
    assert struct.unpack_from("<I", rsdp, 16)[0] == 0
    assert struct.unpack_from("<I", rsdp, 20)[0] == 36
    xsdt = read_table(memory, struct.unpack_from("<Q", rsdp, 24)[0])
    assert xsdt[:4] == b"XSDT"
    found = {"XSDT": xsdt}
    for address in struct.unpack(f"<{(len(xsdt) - 36) // 8}Q", xsdt[36:]):
        table = read_table(memory, address)
        found[table[:4].decode()] = table
    fadt = found["FACP"]
    dsdt_address = struct.unpack_from("<Q", fadt, 140)[0]
    assert struct.unpack_from("<I", fadt, 40)[0] == dsdt_address
    found["DSDT"] = read_table(memory, dsdt_address)
    return found


def disassembled(table: bytes, tmp_path: Path) -> str:
    binary = tmp_path / "table.dat"
    binary.write_bytes(table)
    done = subprocess.run(["iasl", "-d", str(binary)], capture_output=True, text=True, check=True)
    output = done.stdout + done.stderr
    assert "rror" not in output, output
    assert "Warning" not in output, output
    return " ".join(binary.with_suffix(".dsl").read_text().split())


@pytest.fixture
def tables(guest_memory: MemoryFactory) -> dict[str, bytes]:
    memory = guest_memory(1 << 20)
    rsdp = acpi.write_tables(memory, layout.SystemMemory(), 4, DEVICES[:3])
    assert rsdp == 0xE0000
    return tables_of(memory, rsdp)


def test_all_tables_are_found_from_the_rsdp(tables: dict[str, bytes]) -> None:
    assert set(tables) == {"XSDT", "FACP", "APIC", "DSDT"}


def test_the_dsdt_names_every_device(tables: dict[str, bytes], tmp_path: Path) -> None:
    text = disassembled(tables["DSDT"], tmp_path)
    assert 'DefinitionBlock ("", "DSDT", 2, "CELLBK", "CELLBLCK", 0x00000001)' in text
    com1 = text[text.index("Device (COM1)") : text.index("Device (PS2)")]
    assert 'Name (_HID, EisaId ("PNP0501")' in com1
    assert "IO (Decode16, 0x03F8, // Range Minimum 0x03F8, // Range Maximum 0x01, // Alignment 0x08, // Length" in com1
    assert "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000004, }" in com1
    keyboard = text[text.index("Device (PS2)") : text.index("Device (V000)")]
    assert 'Name (_HID, EisaId ("PNP0303")' in keyboard
    assert "0x0060, // Range Minimum" in keyboard
    assert "0x0064, // Range Minimum" in keyboard
    assert "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000001, }" in keyboard
    second = text[text.index("Device (V001)") : text.index("Device (V002)")]
    assert 'Name (_HID, "LNRO0005")' in second
    assert "Name (_UID, One)" in second
    assert "Name (_CCA, One)" in second
    assert "Memory32Fixed (ReadWrite, 0xC0002000, // Address Base 0x00001000, // Address Length )" in second
    assert "{ 0x00000006, }" in second


def test_the_dsdt_compiles_again_to_the_same_bytes(tables: dict[str, bytes], tmp_path: Path) -> None:
    disassembled(tables["DSDT"], tmp_path)
    source = tmp_path / "table.dsl"
    subprocess.run(["iasl", "-oa", "-p", str(tmp_path / "again"), str(source)], capture_output=True, check=True)
    again = (tmp_path / "again.aml").read_bytes()
    # The compiler writes its own name and version into the header.
    assert again[36:] == tables["DSDT"][36:]


def test_the_fadt_is_hardware_reduced(tables: dict[str, bytes], tmp_path: Path) -> None:
    fadt = tables["FACP"]
    assert (len(fadt), fadt[8], fadt[131]) == (276, 6, 5)
    text = disassembled(fadt, tmp_path)
    for line in (
        "Hardware Reduced (V5) : 1",
        "Legacy Devices Supported (V2) : 0",
        "8042 Present on ports 60/64 (V2) : 1",
        "VGA Not Present (V4) : 1",
        "CMOS RTC Not Present (V5) : 1",
        "Control Method Power Button (V1) : 1",
        "WBINVD instruction is operational (V1) : 1",
        "Reset Register Supported (V2) : 0",
    ):
        assert line in text
    assert fadt[268:276] == b"CELLBLCK"


def test_the_madt_lists_the_interrupt_controllers(tables: dict[str, bytes], tmp_path: Path) -> None:
    text = disassembled(tables["APIC"], tmp_path)
    assert "Local Apic Address : FEE00000" in text
    assert "PC-AT Compatibility : 1" in text
    assert text.count("[Processor Local APIC]") == 4
    assert text.count("Processor Enabled : 1") == 4
    assert text.count("[I/O APIC]") == 1
    assert "I/O Apic ID : 00" in text
    assert "Address : FEC00000" in text
    ids = [tables["APIC"][offset + 3] for offset in range(56, len(tables["APIC"]), 8)]
    assert ids == [0, 1, 2, 3]


def test_the_largest_machine_fits(guest_memory: MemoryFactory, tmp_path: Path) -> None:
    memory = guest_memory(1 << 20)
    system_memory = layout.SystemMemory()
    found = tables_of(memory, acpi.write_tables(memory, system_memory, 32, DEVICES))
    assert "Device (V018)" in disassembled(found["DSDT"], tmp_path)
    system_memory.allocate_high(2 * 4096)


def test_what_cannot_be_described_is_refused(guest_memory: MemoryFactory) -> None:
    memory = guest_memory(1 << 20)
    for count in (0, 33, -1):
        with pytest.raises(AcpiError) as caught:
            acpi.write_tables(memory, layout.SystemMemory(), count, ())
        assert caught.value.code == "acpi.vcpu_count"
    for device in (
        VirtioMmioDevice(0xC000_0000, 4096, 5),
        VirtioMmioDevice(0xEEC0_0000, 4096, 5),
        VirtioMmioDevice(0xC000_1000, 0, 5),
        VirtioMmioDevice(0xC000_1000, 4096, 4),
        VirtioMmioDevice(0xC000_1000, 4096, 24),
    ):
        with pytest.raises(AcpiError) as caught:
            acpi.write_tables(memory, layout.SystemMemory(), 1, [device])
        assert caught.value.code == "acpi.device"
    full = layout.SystemMemory()
    full.allocate_low(layout.SYSTEM_MEMORY_END - layout.SYSTEM_MEMORY_ADDRESS - 100)
    with pytest.raises(LayoutError):
        acpi.write_tables(memory, full, 1, ())


# ---------------------------------------------------------------- AML


@given(st.integers(0, 300_000))
def test_package_lengths_can_be_read_back(size: int) -> None:
    data = aml.package(bytes(size))
    extra = data[0] >> 6
    length = data[0] & 0x3F if not extra else (data[0] & 0xF) | int.from_bytes(data[1 : 1 + extra], "little") << 4
    assert length == len(data)
    assert len(data) == size + 1 + extra


def test_encodings() -> None:
    assert aml.package(bytes(62))[0] == 63
    assert aml.package(bytes(63))[:2] == bytes((0x41, 0x04))
    assert aml.integer(0) == b"\0"
    assert aml.integer(1) == b"\1"
    assert aml.integer(0xFF) == b"\x0a\xff"
    assert aml.integer(0x100) == b"\x0b\0\1"
    assert aml.integer(0x10000) == b"\x0c\0\0\1\0"
    assert aml.integer(1 << 32) == b"\x0e\0\0\0\0\1\0\0\0"
    assert aml.eisa_id("PNP0501") == bytes.fromhex("0c41d00501")
    assert aml.path("_SB_", root=True) == b"\\_SB_"
    assert aml.path("_SB_", "V000") == b"\x2e_SB_V000"
    assert aml.name_segment("PS2") == b"PS2_"
    assert aml.string("x") == b"\x0dx\0"


def test_what_cannot_be_encoded_is_an_error() -> None:
    for wrong in ("", "ABCDE", "1ABC", "abcd", "A-B"):
        with pytest.raises(ValueError):
            aml.name_segment(wrong)
    for value in (-1, 1 << 64):
        with pytest.raises(ValueError):
            aml.integer(value)
    for identifier in ("PNP050", "pnp0501", "PNP050G"):
        with pytest.raises(ValueError):
            aml.eisa_id(identifier)
    with pytest.raises(ValueError):
        aml.package(bytes(1 << 28))
    with pytest.raises(ValueError):
        aml.string("a\0b")
    with pytest.raises(ValueError):
        aml.path("A", "B", "C")
