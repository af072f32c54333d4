"""The memory hot-plug device (virtio-mem): /hotplug/memory. All sizes in MiB."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.errors import VmmError
from vmm.json.schema import U32, Field, Object

if TYPE_CHECKING:
    from vmm.json.text import JsonValue

MIN_BLOCK_SIZE_MIB = 2
MIN_SLOT_SIZE_MIB = 128


class MemoryHotplugError(VmmError):
    """The memory hot-plug device cannot be configured as asked."""

    code = "vmm.memory_hotplug"


class MemoryHotplugConfig(NamedTuple):
    """Body of PUT /hotplug/memory: blocks are what the guest plugs, slots what the host maps."""

    total_size_mib: int
    block_size_mib: int
    slot_size_mib: int

    def to_json(self) -> JsonValue:
        """Return the ``memory-hotplug`` section of GET /vm/config."""
        return self._asdict()

    def check(self) -> None:
        """Raise MemoryHotplugError if the sizes do not fit each other."""
        total, block, slot = self
        if block < MIN_BLOCK_SIZE_MIB:
            raise MemoryHotplugError(f"Block size must not be lower than {MIN_BLOCK_SIZE_MIB} MiB")
        if block & (block - 1):
            raise MemoryHotplugError("Block size must be a power of 2")
        if slot < MIN_SLOT_SIZE_MIB:
            raise MemoryHotplugError(f"Slot size must not be lower than {MIN_SLOT_SIZE_MIB} MiB")
        if slot % block:
            raise MemoryHotplugError(f"Slot size must be a multiple of block size ({block} MiB)")
        if total < slot:
            raise MemoryHotplugError(f"Total size must not be lower than slot size ({slot} MiB)")
        if total % slot:
            raise MemoryHotplugError(f"Total size must be a multiple of slot size ({slot} MiB)")


MEMORY_HOTPLUG = Object(
    "MemoryHotplugConfig",
    MemoryHotplugConfig,
    Field("total_size_mib", U32),
    Field("block_size_mib", U32, MIN_BLOCK_SIZE_MIB),
    Field("slot_size_mib", U32, MIN_SLOT_SIZE_MIB),
)
#: Becomes the only value that it holds.
MEMORY_HOTPLUG_UPDATE = Object("MemoryHotplugSizeUpdate", int, Field("requested_size_mib", U32))
