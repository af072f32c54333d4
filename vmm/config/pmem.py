"""Persistent memory devices: PUT, PATCH and DELETE /pmem/{id}."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.config.rate_limiter import RATE_LIMITER, RateLimiterConfig, limiter_json
from vmm.errors import VmmError
from vmm.json.schema import BOOLEAN, STRING, Field, Object, Option

if TYPE_CHECKING:
    from vmm.json.text import JsonValue


class PmemError(VmmError):
    """A pmem device cannot be configured as asked."""

    code = "vmm.pmem"


class PmemConfig(NamedTuple):
    """Body of PUT /pmem/{id}. The file is opened at the start."""

    id: str
    path_on_host: str
    root_device: bool
    read_only: bool
    rate_limiter: RateLimiterConfig | None

    def to_json(self) -> JsonValue:
        """Return the entry of ``pmem`` in GET /vm/config."""
        return {
            "id": self.id,
            "path_on_host": self.path_on_host,
            "root_device": self.root_device,
            "read_only": self.read_only,
            "rate_limiter": limiter_json(self.rate_limiter),
        }


class PmemUpdate(NamedTuple):
    """Body of PATCH /pmem/{id}."""

    id: str
    rate_limiter: RateLimiterConfig | None


PMEM = Object(
    "PmemConfig",
    PmemConfig,
    Field("id", STRING),
    Field("path_on_host", STRING),
    Field("root_device", BOOLEAN, False),
    Field("read_only", BOOLEAN, False),
    Field("rate_limiter", Option(RATE_LIMITER)),
)
PMEM_UPDATE = Object(
    "PmemDeviceUpdateConfig",
    PmemUpdate,
    Field("id", STRING),
    Field("rate_limiter", Option(RATE_LIMITER)),
)


class PmemDevices:
    """The configured pmem devices, in the order in which they came."""

    def __init__(self) -> None:
        self.configs: list[PmemConfig] = []

    @property
    def has_root(self) -> bool:
        """Whether one of them is the root device."""
        return any(config.root_device for config in self.configs)

    def insert(self, config: PmemConfig, *, block_root: bool) -> None:
        """Add a device, or replace the one of the same id. Raises PmemError, and then nothing has changed."""
        if config.root_device and block_root:
            raise PmemError("Attempt to add pmem as a root device while the root device defined as a block device")
        if config.root_device and any(known.root_device and known.id != config.id for known in self.configs):
            raise PmemError("A root pmem device already exist")
        place = next((n for n, known in enumerate(self.configs) if known.id == config.id), None)
        if place is None:
            self.configs.append(config)
        else:
            self.configs[place] = config
