"""Block devices: PUT, PATCH and DELETE /drives/{drive_id}."""

from __future__ import annotations

import os

from base.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.config.rate_limiter import RATE_LIMITER, RateLimiterConfig, limiter_json
from vmm.errors import VmmError
from vmm.files import FileOpenError, open_input
from vmm.json.schema import BOOLEAN, STRING, Field, Object, Option, Variant

if TYPE_CHECKING:
    from vmm.json.text import JsonValue

CACHE_UNSAFE = "Unsafe"
ENGINE_SYNC = "Sync"
ROOT_EXISTS = "A root block device already exists!"


class DriveError(VmmError):
    """A block device cannot be configured as asked."""

    code = "vmm.drive"


class DriveConfig(NamedTuple):
    """Body of PUT /drives/{drive_id}: a device on a file (``path_on_host``) or of a vhost-user backend (``socket``)."""

    drive_id: str
    partuuid: str | None
    is_root_device: bool
    cache_type: str
    is_read_only: bool | None
    path_on_host: str | None
    rate_limiter: RateLimiterConfig | None
    io_engine: str | None
    socket: str | None

    def to_json(self) -> JsonValue:
        """Return the entry of ``drives`` in GET /vm/config."""
        file = self.socket is None
        return {
            "drive_id": self.drive_id,
            "partuuid": self.partuuid,
            "is_root_device": self.is_root_device,
            "cache_type": self.cache_type,
            "is_read_only": bool(self.is_read_only) if file else None,
            "path_on_host": self.path_on_host,
            "rate_limiter": limiter_json(self.rate_limiter),
            "io_engine": (self.io_engine or ENGINE_SYNC) if file else None,
            "socket": self.socket,
        }

    def check(self) -> None:
        """Check that the device can be made: one backend, and a file that can be opened. Raises DriveError."""
        if self.path_on_host is not None and self.socket is None:
            self._check_file(self.path_on_host)
        elif self.socket is None or (self.is_read_only, self.path_on_host, self.rate_limiter, self.io_engine) != (
            None, None, None, None,
        ):  # fmt: skip
            raise DriveError("Unable to create the virtio block device: Invalid block config.")

    def _check_file(self, path: str) -> None:
        try:
            os.close(open_input(path, writable=not self.is_read_only))
        except FileOpenError as error:
            raise DriveError(
                "Unable to create the virtio block device: Virtio backend error: Error manipulating the backing file: "
                f"{error} {path}"
            ) from error


class DriveUpdate(NamedTuple):
    """Body of PATCH /drives/{drive_id}; with neither path nor limiter, a vhost-user backend is asked again."""

    drive_id: str
    path_on_host: str | None
    rate_limiter: RateLimiterConfig | None


DRIVE = Object(
    "BlockDeviceConfig",
    DriveConfig,
    Field("drive_id", STRING),
    Field("partuuid", Option(STRING)),
    Field("is_root_device", BOOLEAN),
    Field("cache_type", Variant(CACHE_UNSAFE, "Writeback"), CACHE_UNSAFE),
    Field("is_read_only", Option(BOOLEAN)),
    Field("path_on_host", Option(STRING)),
    Field("rate_limiter", Option(RATE_LIMITER)),
    Field("io_engine", Option(Variant("Async", ENGINE_SYNC))),
    Field("socket", Option(STRING)),
)
DRIVE_UPDATE = Object(
    "BlockDeviceUpdateConfig",
    DriveUpdate,
    Field("drive_id", STRING),
    Field("path_on_host", Option(STRING)),
    Field("rate_limiter", Option(RATE_LIMITER)),
)


class Drives:
    """The configured block devices; a root device is the first."""

    def __init__(self) -> None:
        self.configs: list[DriveConfig] = []

    @property
    def has_root(self) -> bool:
        """Whether one of them is the root device."""
        return bool(self.configs) and self.configs[0].is_root_device

    def insert(self, config: DriveConfig, *, pmem_root: bool) -> None:
        """Add a device, or replace the one of the same id. Raises DriveError, and then nothing has changed."""
        place = next((n for n, known in enumerate(self.configs) if known.drive_id == config.drive_id), None)
        if config.is_root_device and (pmem_root or (self.has_root and place != 0)):
            raise DriveError(ROOT_EXISTS)
        config.check()
        if place is None:
            self.configs.insert(0 if config.is_root_device else len(self.configs), config)
            return
        self.configs[place] = config
        if config.is_root_device:
            self.configs[0], self.configs[place] = self.configs[place], self.configs[0]
