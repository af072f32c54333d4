"""The guest physical map, interrupt lines and port numbers: the only place where these numbers stand.

docs/formats/guest-memory.md describes them. All addresses and sizes are bytes of guest physical address space.
"""

from __future__ import annotations

from ipc.launch_plan import MAX_MEMORY_BYTES
from ipc.messages.records import MAX_GSI, MemoryRegion
from vmm.errors import VmmError

PAGE_SIZE = 4096
MIB = 1 << 20
GIB = 1 << 30

# ---------------------------------------------------------------- low memory: what the boot vCPU starts from

GDT_ADDRESS = 0x500
IDT_ADDRESS = 0x520
PVH_START_INFO_ADDRESS = 0x6000
PVH_MODULE_LIST_ADDRESS = 0x6040
ZERO_PAGE_ADDRESS = 0x7000
#: The PVH memory map lies where the zero page would be: a boot uses one of the two.
PVH_MEMORY_MAP_ADDRESS = 0x7000
BOOT_STACK_ADDRESS = 0x8FF0
PML4_ADDRESS = 0x9000
PDPT_ADDRESS = 0xA000
PAGE_DIRECTORY_ADDRESS = 0xB000
#: The page directory maps the first GiB one to one.
IDENTITY_MAP_SIZE = GIB
COMMAND_LINE_ADDRESS = 0x20000
#: Including the terminating NUL and everything that we append.
COMMAND_LINE_SIZE = 2048

#: Usable low memory ends here; what follows is reserved for the firmware's tables.
LOW_MEMORY_END = 0x9FC00
SYSTEM_MEMORY_ADDRESS = 0x9FC00
SYSTEM_MEMORY_END = 0xE0000
RSDP_ADDRESS = 0xE0000
HIGH_MEMORY_ADDRESS = 0x100000
#: Where the protected-mode part of a bzImage goes.
BZIMAGE_ADDRESS = HIGH_MEMORY_ADDRESS

_ALWAYS_WRITTEN = (
    (GDT_ADDRESS, IDT_ADDRESS + 8),
    (COMMAND_LINE_ADDRESS, COMMAND_LINE_ADDRESS + COMMAND_LINE_SIZE),
    (SYSTEM_MEMORY_ADDRESS, SYSTEM_MEMORY_END),
    (RSDP_ADDRESS, RSDP_ADDRESS + 36),
)
#: (start, end) of what is written below 1 MiB after the kernel was loaded, by the protocol that enters it.
PVH_WRITTEN = (
    *_ALWAYS_WRITTEN,
    (PVH_START_INFO_ADDRESS, PVH_MODULE_LIST_ADDRESS + 32),
    (PVH_MEMORY_MAP_ADDRESS, PVH_MEMORY_MAP_ADDRESS + 5 * 24),
)
LINUX64_WRITTEN = (
    *_ALWAYS_WRITTEN,
    (ZERO_PAGE_ADDRESS, ZERO_PAGE_ADDRESS + PAGE_SIZE),
    (PML4_ADDRESS, PAGE_DIRECTORY_ADDRESS + PAGE_SIZE),
)

# ---------------------------------------------------------------- RAM and the gaps in it

MMIO_GAP_ADDRESS = 3 * GIB
MMIO_GAP_END = 4 * GIB
MMIO64_GAP_ADDRESS = 256 * GIB
MMIO64_GAP_END = 512 * GIB

_RAM_WINDOWS = (
    (0, MMIO_GAP_ADDRESS),
    (MMIO_GAP_END, MMIO64_GAP_ADDRESS),
    (MMIO64_GAP_END, MMIO64_GAP_END + MAX_MEMORY_BYTES),
)

# ---------------------------------------------------------------- devices

BOOT_TIMER_ADDRESS = 0xC000_0000
BOOT_TIMER_SIZE = PAGE_SIZE
VIRTIO_MMIO_ADDRESS = 0xC000_1000
VIRTIO_MMIO_END = 0xEEC0_0000
VIRTIO_MMIO_SIZE = PAGE_SIZE
PCI_MMCONFIG_ADDRESS = 0xEEC0_0000
PCI_MMCONFIG_SIZE = 256 * MIB
IOAPIC_ADDRESS = 0xFEC0_0000
LAPIC_ADDRESS = 0xFEE0_0000
#: Private pages of KVM on Intel hosts (real-mode TSS, 3 pages).
KVM_TSS_ADDRESS = 0xFFFB_D000

COM1_PORT = 0x3F8
COM1_PORT_COUNT = 8
PIC_MASTER_PORT = 0x20
PIC_SLAVE_PORT = 0xA0
PIC_PORT_COUNT = 2
#: Edge or level control registers of the 8259s.
ELCR_PORT = 0x4D0
PIT_PORT = 0x40
PIT_PORT_COUNT = 4
#: Gate of counter 2 of the PIT, its output, and the speaker; between the two ports of the keyboard controller.
SPEAKER_PORT = 0x61
I8042_DATA_PORT = 0x60
I8042_COMMAND_PORT = 0x64

# ---------------------------------------------------------------- interrupt lines (GSI)

#: The same number as its input of the 8259, as with Firecracker; PCs usually have GSI 2 for it.
PIT_GSI = 0
I8042_GSI = 1
COM1_GSI = 4
#: GSIs of virtio-mmio devices, VMGenID and VMClock.
FIRST_DEVICE_GSI = 5
IOAPIC_PIN_COUNT = 24
LAST_DEVICE_GSI = IOAPIC_PIN_COUNT - 1
#: Two of these lines are for VMGenID and VMClock.
MAX_VIRTIO_MMIO_DEVICES = LAST_DEVICE_GSI - FIRST_DEVICE_GSI + 1 - 2
assert MAX_VIRTIO_MMIO_DEVICES == 17
FIRST_MSI_GSI = IOAPIC_PIN_COUNT
LAST_MSI_GSI = 1023
#: Vectors that a worker's ghosts forward: routes of its own VM, made when they are first used.
FIRST_GHOST_GSI = LAST_MSI_GSI + 1
LAST_GHOST_GSI = MAX_GSI - 1

# ---------------------------------------------------------------- memory map entries for the guest

E820_RAM = 1
E820_RESERVED = 2


class LayoutError(VmmError):
    """Something does not fit into the guest physical map; ``code`` is stable."""

    code = "layout"

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def ram_regions(size: int) -> tuple[MemoryRegion, ...]:
    """Split ``size`` bytes of RAM over the address space, in order; offsets in the memfd are consecutive.

    Raises LayoutError when ``size`` is not a positive multiple of the page size or exceeds MAX_MEMORY_BYTES.
    """
    if size <= 0 or size % PAGE_SIZE or size > MAX_MEMORY_BYTES:
        raise LayoutError(
            "layout.memory_size",
            f"guest memory of {size} bytes is not possible: give a multiple of {PAGE_SIZE} up to {MAX_MEMORY_BYTES}",
        )
    regions = []
    offset = 0
    for start, end in _RAM_WINDOWS:
        length = min(size - offset, end - start)
        regions.append(MemoryRegion(start, length, offset))
        offset += length
        if offset == size:
            break
    assert offset == size
    return tuple(regions)


def memory_map(regions: tuple[MemoryRegion, ...]) -> tuple[tuple[int, int, int], ...]:
    """Return the memory map that the guest is told: (address, size, E820 type), ascending.

    Usable RAM is low memory up to the firmware's tables, then each region from 1 MiB on. A machine with less than
    1 MiB of RAM cannot be described: LayoutError.
    """
    first = regions[0]
    if first.guest_address != 0 or first.size < HIGH_MEMORY_ADDRESS:
        raise LayoutError("layout.low_memory", "the guest needs at least 1 MiB of RAM from address 0")
    entries = [
        (0, LOW_MEMORY_END, E820_RAM),
        (LOW_MEMORY_END, HIGH_MEMORY_ADDRESS - LOW_MEMORY_END, E820_RESERVED),
    ]
    if first.size > HIGH_MEMORY_ADDRESS:
        entries.append((HIGH_MEMORY_ADDRESS, first.size - HIGH_MEMORY_ADDRESS, E820_RAM))
    entries.extend((region.guest_address, region.size, E820_RAM) for region in regions[1:])
    return tuple(entries)


class SystemMemory:
    """Hands out the reserved range below 1 MiB: tables from the bottom, device pages from the top."""

    __slots__ = ("_bottom", "_top")

    def __init__(self) -> None:
        self._bottom = SYSTEM_MEMORY_ADDRESS
        self._top = SYSTEM_MEMORY_END

    def allocate_low(self, size: int, alignment: int = 16) -> int:
        """Take ``size`` bytes at the lowest free address. Raises LayoutError when the range is full."""
        assert size > 0 and alignment > 0
        address = -(-self._bottom // alignment) * alignment
        self._check(address + size <= self._top, size)
        self._bottom = address + size
        return address

    def allocate_high(self, size: int, alignment: int = PAGE_SIZE) -> int:
        """Take ``size`` bytes at the highest free address. Raises LayoutError when the range is full."""
        assert size > 0 and alignment > 0
        address = (self._top - size) // alignment * alignment
        self._check(address >= self._bottom, size)
        self._top = address
        return address

    def _check(self, fits: bool, size: int) -> None:
        if not fits:
            raise LayoutError(
                "layout.system_memory",
                f"{size} bytes do not fit into system memory ({self._top - self._bottom} bytes left)",
            )
