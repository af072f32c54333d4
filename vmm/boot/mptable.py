"""The MP table: CPUs, the IOAPIC and the interrupt lines of an ISA bus, for kernels that use no ACPI.

Source: Intel MultiProcessor Specification 1.4, chapter 4. Kernels look for it, among other places, in the last KiB of
low memory: it stands at the bottom of system memory, where that begins. The lines of the ISA bus lead to the input of
the IOAPIC that has their number, as the ACPI tables say without saying it. There are more of them than an ISA bus has,
for the virtio-mmio devices, which a kernel without ACPI learns of from its command line. INTR of the 8259s leads to
LINT0 of vCPU 0.
"""

from __future__ import annotations

import struct

from ipc.guest_memory import GuestMemory
from ipc.launch_plan import MAX_VCPUS
from vmm import layout
from vmm.boot.acpi import checksum
from vmm.boot.errors import AcpiError

#: signature, address of the table, length in 16 bytes, revision, checksum, feature bytes 1 to 5
_POINTER = struct.Struct("<4sIBBB5B")
#: signature, length, revision, checksum, OEM, product, OEM table, its size, entries, LAPIC, extension: length, checksum
_HEADER = struct.Struct("<4sHBB8s12sIHHIHBx")
#: type, LAPIC id, LAPIC version, flags, signature, features
_CPU = struct.Struct("<BBBBII8x")
#: type, id, name
_BUS = struct.Struct("<BB6s")
#: type, id, version, flags, address
_IO_APIC = struct.Struct("<BBBBI")
#: type, kind of interrupt, flags, source bus, source line, destination APIC, its input
_INTERRUPT = struct.Struct("<BBHBBBB")
assert (_POINTER.size, _HEADER.size, _CPU.size) == (16, 44, 20)
assert (_BUS.size, _IO_APIC.size, _INTERRUPT.size) == (8, 8, 8)

_REVISION = 4  # 1.4
_OEM_ID = b"CELLBLCK"
_PRODUCT_ID = b"microVM     "

_TYPE_CPU, _TYPE_BUS, _TYPE_IO_APIC, _TYPE_IO_INTERRUPT, _TYPE_LOCAL_INTERRUPT = range(5)
_INT, _NMI, _SMI, _EXTINT = range(4)
_CPU_ENABLED = 1
_CPU_BOOT = 2
_CPU_STEPPING = 0x600
#: On-chip FPU and APIC.
_CPU_FEATURES = 0x201
_APIC_VERSION = 0x14
_IO_APIC_VERSION = 0x11
_IO_APIC_ENABLED = 1
_ISA = 0
_ALL_APICS = 0xFF


def table(vcpu_count: int) -> bytes:
    """Return the configuration table. Raises AcpiError for a count that cannot be described."""
    if not 0 < vcpu_count <= MAX_VCPUS:
        raise AcpiError("mptable.vcpu_count", f"{vcpu_count} vCPUs cannot be described, at most {MAX_VCPUS}")
    # The id of the IOAPIC is none of a CPU's, as MP kernels check. The chip has another one until it is told this.
    io_apic = vcpu_count
    entries = [
        _CPU.pack(
            _TYPE_CPU,
            index,
            _APIC_VERSION,
            _CPU_ENABLED | (0 if index else _CPU_BOOT),
            _CPU_STEPPING,
            _CPU_FEATURES,
        )
        for index in range(vcpu_count)
    ]
    entries += [
        _BUS.pack(_TYPE_BUS, _ISA, b"ISA   "),
        _IO_APIC.pack(_TYPE_IO_APIC, io_apic, _IO_APIC_VERSION, _IO_APIC_ENABLED, layout.IOAPIC_ADDRESS),
    ]
    entries += [
        _INTERRUPT.pack(_TYPE_IO_INTERRUPT, _INT, 0, _ISA, line, io_apic, line)
        for line in range(layout.IOAPIC_PIN_COUNT)
    ]
    entries += [
        _INTERRUPT.pack(_TYPE_LOCAL_INTERRUPT, _EXTINT, 0, _ISA, 0, 0, 0),
        _INTERRUPT.pack(_TYPE_LOCAL_INTERRUPT, _NMI, 0, _ISA, 0, _ALL_APICS, 1),
    ]
    body = b"".join(entries)
    header = _HEADER.pack(
        b"PCMP",
        _HEADER.size + len(body),
        _REVISION,
        0,
        _OEM_ID,
        _PRODUCT_ID,
        0,
        0,
        len(entries),
        layout.LAPIC_ADDRESS,
        0,
        0,
    )
    data = bytearray(header + body)
    data[7] = checksum(data)
    return bytes(data)


def pointer(table_address: int) -> bytes:
    """Return the floating pointer to a table. Feature bytes 0: there is a table, and no IMCR (virtual wire)."""
    data = bytearray(_POINTER.pack(b"_MP_", table_address, 1, _REVISION, 0, 0, 0, 0, 0, 0))
    data[10] = checksum(data)
    return bytes(data)


def write(memory: GuestMemory, system_memory: layout.SystemMemory, vcpu_count: int) -> int:
    """Write pointer and table; return the pointer's address. Raises AcpiError, LayoutError when memory is full."""
    data = table(vcpu_count)
    address = system_memory.allocate_low(_POINTER.size)
    table_address = system_memory.allocate_low(len(data))
    memory.write(address, pointer(table_address))
    memory.write(table_address, data)
    return address
