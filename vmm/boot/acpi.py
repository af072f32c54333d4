"""ACPI tables of a hardware-reduced machine: RSDP, XSDT, FADT, MADT and a DSDT with the devices.

Source: ACPI specification 6.5, chapter 5. There is no RTC and no power management hardware. The interrupt controllers
are the LAPICs and one IOAPIC; the 8259s and the 8254 are for guests that do not read these tables (vmm.boot.mptable).
"""

from __future__ import annotations

import struct

from base.lean_typing import NamedTuple, Sequence
from ipc.guest_memory import GuestMemory
from ipc.launch_plan import MAX_VCPUS
from vmm import layout
from vmm.boot import aml
from vmm.boot.errors import AcpiError

OEM_ID = b"CELLBK"
OEM_TABLE_ID = b"CELLBLCK"
CREATOR_ID = b"CBLK"
HYPERVISOR_ID = b"CELLBLCK"
_OEM_REVISION = 1
_CREATOR_REVISION = 1

#: signature, length, revision, checksum, OEM id, OEM table id, OEM revision, creator id, creator revision
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
#: signature, checksum, OEM id, revision, RSDT address, length, XSDT address, extended checksum
_RSDP = struct.Struct("<8sB6sBIIQB3x")
_RSDP_V1_SIZE = 20
_MADT = struct.Struct("<II")
_LOCAL_APIC = struct.Struct("<BBBBI")
_IO_APIC = struct.Struct("<BBBxII")
assert _HEADER.size == 36
assert _RSDP.size == 36
assert (_LOCAL_APIC.size, _IO_APIC.size) == (8, 12)

_XSDT_REVISION = 1
_MADT_REVISION = 6
_DSDT_REVISION = 2
_FADT_REVISION = 6
_FADT_MINOR_REVISION = 5
_FADT_SIZE = 276
_FADT_DSDT = 40
_FADT_BOOT_ARCHITECTURE = 109
_FADT_FLAGS = 112
_FADT_MINOR = 131
_FADT_X_DSDT = 140
_FADT_HYPERVISOR = 268

#: There is a keyboard controller; there is neither VGA nor a CMOS clock.
_BOOT_8042 = 1 << 1
_BOOT_NO_VGA = 1 << 2
_BOOT_NO_CMOS_RTC = 1 << 5

_WBINVD = 1 << 0
#: Neither button is a fixed hardware feature.
_POWER_BUTTON = 1 << 4
_SLEEP_BUTTON = 1 << 5
_HARDWARE_REDUCED = 1 << 20

#: There are 8259s beside the APICs. Linux leaves them alone all the same where the hardware is reduced.
_PCAT_COMPATIBLE = 1
_APIC_ENABLED = 1
_IO_APIC_ID = 0

_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class VirtioMmioDevice(NamedTuple):
    """One virtio-mmio device: ``size`` bytes of registers at guest address ``address``, interrupt line ``gsi``."""

    address: int
    size: int
    gsi: int


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """Put the standard header with a correct checksum in front of ``body``."""
    header = _HEADER.pack(
        signature,
        _HEADER.size + len(body),
        revision,
        0,
        OEM_ID,
        OEM_TABLE_ID,
        _OEM_REVISION,
        CREATOR_ID,
        _CREATOR_REVISION,
    )
    data = bytearray(header + body)
    data[9] = checksum(data)
    return bytes(data)


def checksum(data: bytes | bytearray) -> int:
    """Return the byte that makes the sum of ``data`` zero, modulo 256."""
    return -sum(data) & 0xFF


def dsdt(devices: Sequence[VirtioMmioDevice]) -> bytes:
    """Build the DSDT: COM1, the keyboard controller and the virtio-mmio devices. Raises AcpiError."""
    for device in devices:
        _check_device(device)
    com1 = aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_DDN", aml.string("COM1")),
        aml.name(
            "_CRS",
            aml.resource_template(
                aml.interrupt(layout.COM1_GSI), aml.io_port(layout.COM1_PORT, layout.COM1_PORT_COUNT)
            ),
        ),
    )
    keyboard = aml.device(
        "PS2_",
        aml.name("_HID", aml.eisa_id("PNP0303")),
        aml.name(
            "_CRS",
            aml.resource_template(
                aml.io_port(layout.I8042_DATA_PORT, 1),
                aml.io_port(layout.I8042_COMMAND_PORT, 1),
                aml.interrupt(layout.I8042_GSI),
            ),
        ),
    )
    virtio = [
        aml.device(
            f"V{index:03d}",
            aml.name("_HID", aml.string("LNRO0005")),
            aml.name("_UID", aml.integer(index)),
            aml.name("_CCA", aml.integer(1)),
            aml.name(
                "_CRS", aml.resource_template(aml.memory32(device.address, device.size), aml.interrupt(device.gsi))
            ),
        )
        for index, device in enumerate(devices)
    ]
    return table(b"DSDT", _DSDT_REVISION, aml.scope(aml.path("_SB_", root=True), com1, keyboard, *virtio))


def _check_device(device: VirtioMmioDevice) -> None:
    end = device.address + device.size
    in_window = layout.VIRTIO_MMIO_ADDRESS <= device.address < end <= layout.VIRTIO_MMIO_END
    if not in_window or not layout.FIRST_DEVICE_GSI <= device.gsi <= layout.LAST_DEVICE_GSI:
        raise AcpiError("acpi.device", f"no virtio-mmio device can be described at {tuple(device)}")


def fadt(dsdt_address: int) -> bytes:
    """Build the FADT, hardware-reduced, for a DSDT below 4 GiB."""
    body = bytearray(_FADT_SIZE - _HEADER.size)

    def put(layout_: struct.Struct, offset: int, value: int) -> None:
        layout_.pack_into(body, offset - _HEADER.size, value)

    put(_U32, _FADT_DSDT, dsdt_address)
    put(_U64, _FADT_X_DSDT, dsdt_address)
    put(_U16, _FADT_BOOT_ARCHITECTURE, _BOOT_8042 | _BOOT_NO_VGA | _BOOT_NO_CMOS_RTC)
    put(_U32, _FADT_FLAGS, _WBINVD | _POWER_BUTTON | _SLEEP_BUTTON | _HARDWARE_REDUCED)
    body[_FADT_MINOR - _HEADER.size] = _FADT_MINOR_REVISION
    start = _FADT_HYPERVISOR - _HEADER.size
    body[start : start + len(HYPERVISOR_ID)] = HYPERVISOR_ID
    return table(b"FACP", _FADT_REVISION, bytes(body))


def madt(vcpu_count: int) -> bytes:
    """Build the MADT: an enabled LAPIC per vCPU, id = index, and the IOAPIC. Raises AcpiError."""
    if not 0 < vcpu_count <= MAX_VCPUS:
        raise AcpiError("acpi.vcpu_count", f"{vcpu_count} vCPUs cannot be described, at most {MAX_VCPUS}")
    body = _MADT.pack(layout.LAPIC_ADDRESS, _PCAT_COMPATIBLE)
    body += _IO_APIC.pack(1, _IO_APIC.size, _IO_APIC_ID, layout.IOAPIC_ADDRESS, 0)
    for index in range(vcpu_count):
        body += _LOCAL_APIC.pack(0, _LOCAL_APIC.size, index, index, _APIC_ENABLED)
    return table(b"APIC", _MADT_REVISION, body)


def xsdt(addresses: Sequence[int]) -> bytes:
    """Build the XSDT that lists the other tables."""
    return table(b"XSDT", _XSDT_REVISION, b"".join(_U64.pack(address) for address in addresses))


def rsdp(xsdt_address: int) -> bytes:
    """Build the RSDP, revision 2, with both checksums."""
    data = bytearray(_RSDP.pack(b"RSD PTR ", 0, OEM_ID, 2, 0, _RSDP.size, xsdt_address, 0))
    data[8] = checksum(data[:_RSDP_V1_SIZE])
    data[32] = checksum(data)
    return bytes(data)


def write_tables(
    memory: GuestMemory, system_memory: layout.SystemMemory, vcpu_count: int, devices: Sequence[VirtioMmioDevice]
) -> int:
    """Write all tables and return the address of the RSDP.

    Raises AcpiError for what cannot be described, LayoutError when system memory is full.
    """

    def put(data: bytes) -> int:
        address = system_memory.allocate_low(len(data))
        memory.write(address, data)
        return address

    dsdt_address = put(dsdt(devices))
    fadt_address = put(fadt(dsdt_address))
    madt_address = put(madt(vcpu_count))
    xsdt_address = put(xsdt((fadt_address, madt_address)))
    memory.write(layout.RSDP_ADDRESS, rsdp(xsdt_address))
    return layout.RSDP_ADDRESS
