"""Block devices: PUT, PATCH and DELETE /drives/{drive_id}."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from base.errno_text import errno_text
from base.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.config.overlay import OVERLAY, OverlayConfig, OverlayConfigError, OverlayFiles, open_overlay_files
from vmm.config.rate_limiter import RATE_LIMITER, RateLimiterConfig, limiter_json
from vmm.errors import VmmError
from vmm.files import FileOpenError, open_input
from vmm.json.schema import BOOLEAN, STRING, U8, Field, Object, Option, Variant

if TYPE_CHECKING:
    from base.lean_typing import Iterator
    from vmm.json.text import JsonValue

CACHE_UNSAFE = "Unsafe"
CACHE_WRITEBACK = "Writeback"
ENGINE_SYNC = "Sync"
ENGINE_ASYNC = "Async"
#: virtio.block.configuration has the same numbers; nothing of it is loaded for a machine without drives.
MAX_QUEUES = 16
MAX_ID = 255
SECTOR_SIZE = 512
ROOT_EXISTS = "A root block device already exists!"


_CREATE = "Unable to create the virtio block device: "
#: What stands before what is wrong with a drive's file.
BACKING_FILE = "Virtio backend error: Error manipulating the backing file: "
#: struct flock: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK = struct.Struct("hhqqi4x")
assert _FLOCK.size == 32


class DriveError(VmmError):
    """A block device cannot be configured as asked."""

    code = "vmm.drive"


class DriveFile(NamedTuple):
    """What is behind a drive: an open descriptor, whoever has this closes it, and its size in bytes."""

    descriptor: int
    size: int

    @property
    def sectors(self) -> int:
        """How many whole sectors the guest sees."""
        return self.size // SECTOR_SIZE

    def remarks(self) -> Iterator[str]:
        """Say what is odd about it, and what comes of that; for the log."""
        if self.size % SECTOR_SIZE:
            yield (
                f"Disk size {self.size} is not a multiple of sector size {SECTOR_SIZE}; the remainder will not be "
                "visible to the guest."
            )
        room = os.fstatvfs(self.descriptor)
        if 0 < room.f_blocks * room.f_frsize < self.size and stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            yield (
                f"Disk size {self.size} is more than its whole file system has ({room.f_blocks * room.f_frsize}): the "
                "guest gets I/O errors when that is full."
            )


def open_drive_file(path: str, *, read_only: bool) -> DriveFile:
    """Open a regular file or block device that nobody has locked.

    Raises DriveError; its text is what follows after "Error manipulating the backing file: ".
    """
    try:
        descriptor = open_input(path, writable=not read_only)
    except FileOpenError as error:
        raise DriveError(f"{error} {path}") from error
    try:
        _check_locks(descriptor, read_only=read_only)
        return DriveFile(descriptor, os.lseek(descriptor, 0, os.SEEK_END))
    except OSError as error:
        os.close(descriptor)
        raise DriveError(f"{errno_text(error)} {path}") from error


def _check_locks(descriptor: int, *, read_only: bool) -> None:
    """Raise EAGAIN if another process has a lock, of fcntl(2) or flock(2), that excludes what we are to do.

    None is taken: clients let several microVMs read, or write, one file.
    """
    mine = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(mine, os.SEEK_SET, 0, 0, 0))
    if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
        raise BlockingIOError(errno.EAGAIN, "")
    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.flock(descriptor, fcntl.LOCK_UN)


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
    #: Additions: offer DISCARD and WRITE_ZEROES; so many queues.
    discard: bool | None = None
    num_queues: int | None = None
    #: An addition: what is written goes there, and ``path_on_host`` is a base that is only read.
    overlay: OverlayConfig | None = None

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
            **({} if self.discard is None else {"discard": self.discard}),
            **({} if self.num_queues is None else {"num_queues": self.num_queues}),
            **({} if self.overlay is None else {"overlay": self.overlay.to_json()}),
        }

    def check(self, boot_id: bytes = b"") -> None:
        """Check that the device can be made: one backend, and files that can be opened. Raises DriveError.

        ``boot_id``: of the launch plan.
        """
        if self.overlay is not None and (self.is_read_only or self.path_on_host is None):
            raise DriveError(f"{_CREATE}Invalid block config.")
        if self.path_on_host is not None and self.socket is None:
            if self.overlay is not None:
                self.open_overlay(boot_id).close()
            else:
                os.close(self.open_file().descriptor)
        elif self.socket is None or any(each is not None for each in self._of_files()):
            raise DriveError(f"{_CREATE}Invalid block config.")
        if self.num_queues is not None and not 1 <= self.num_queues <= MAX_QUEUES:
            raise DriveError(f"{_CREATE}num_queues is {self.num_queues}, and can be 1 to {MAX_QUEUES}.")
        if len(self.drive_id) > MAX_ID:
            raise DriveError(f"{_CREATE}the id is longer than {MAX_ID} characters.")

    def _of_files(self) -> tuple[object, ...]:
        """Return what only a drive with a file may have."""
        return (
            self.is_read_only, self.path_on_host, self.rate_limiter, self.io_engine, self.discard, self.num_queues,
            self.overlay,
        )  # fmt: skip

    def open_file(self) -> DriveFile:
        """Open the file of a drive that has one. Raises DriveError."""
        assert self.path_on_host is not None
        try:
            return open_drive_file(self.path_on_host, read_only=bool(self.is_read_only))
        except DriveError as error:
            raise DriveError(f"{_CREATE}{BACKING_FILE}{error}") from error

    def open_overlay(self, boot_id: bytes) -> OverlayFiles:
        """Open base and overlay of a drive that has one, and lock them. Raises DriveError."""
        assert self.path_on_host is not None and self.overlay is not None
        try:
            return open_overlay_files(self.path_on_host, self.overlay, boot_id)
        except OverlayConfigError as error:
            raise DriveError(f"{_CREATE}{BACKING_FILE}{error}") from error

    def updated(self, update: DriveUpdate) -> DriveConfig:
        """Return what the drive is after a change that is in force."""
        limiter = self.rate_limiter
        if update.rate_limiter is not None:
            limiter = (limiter or RateLimiterConfig()).updated(update.rate_limiter)
        return self._replace(path_on_host=update.path_on_host or self.path_on_host, rate_limiter=limiter)


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
    Field("cache_type", Variant(CACHE_UNSAFE, CACHE_WRITEBACK), CACHE_UNSAFE),
    Field("is_read_only", Option(BOOLEAN)),
    Field("path_on_host", Option(STRING)),
    Field("rate_limiter", Option(RATE_LIMITER)),
    Field("io_engine", Option(Variant(ENGINE_ASYNC, ENGINE_SYNC))),
    Field("socket", Option(STRING)),
    Field("discard", Option(BOOLEAN), extension=True),
    Field("num_queues", Option(U8), extension=True),
    Field("overlay", Option(OVERLAY), extension=True),
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

    def insert(self, config: DriveConfig, *, pmem_root: bool, boot_id: bytes = b"") -> None:
        """Add a device, or replace the one of the same id. Raises DriveError, and then nothing has changed."""
        place = next((n for n, known in enumerate(self.configs) if known.drive_id == config.drive_id), None)
        if config.is_root_device and (pmem_root or (self.has_root and place != 0)):
            raise DriveError(ROOT_EXISTS)
        config.check(boot_id)
        if place is None:
            self.configs.insert(0 if config.is_root_device else len(self.configs), config)
            return
        self.configs[place] = config
        if config.is_root_device:
            self.configs[0], self.configs[place] = self.configs[place], self.configs[0]

    def update(self, update: DriveUpdate) -> None:
        """Note a change of a drive that is in force."""
        self.configs = [each.updated(update) if each.drive_id == update.drive_id else each for each in self.configs]
