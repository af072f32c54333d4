"""Block devices of a configuration: their files are opened here, in the jail root, and served by a device cell."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING
from ipc.schema import pack
from virtio.abi import VIRTIO_BLK_F_RO, VIRTIO_ID_BLOCK
from virtio.block.configuration import (
    BLOCK_CONFIGURATION,
    BLOCK_COUNTERS,
    BLOCK_SECTION,
    BlockConfiguration,
    BlockSettings,
    block_config,
    block_features,
    block_queue_sizes,
)
from virtio.rate_limiter import Bucket
from vmm.cells.device import CellDevice, DeviceModel
from vmm.config.drives import (
    BACKING_FILE,
    CACHE_WRITEBACK,
    ENGINE_ASYNC,
    ENGINE_SYNC,
    SECTOR_SIZE,
    DriveError,
    open_drive_file,
)
from vmm.errors import DeviceError
from vmm.observe.logger import LOG

if TYPE_CHECKING:
    from vmm.config.drives import DriveConfig, DriveFile
    from vmm.config.rate_limiter import TokenBucketConfig

_NO_LIMIT = Bucket(0, 0)


def bucket(config: TokenBucketConfig | None) -> Bucket | None:
    """Return a limiter's bucket as devices have it."""
    return None if config is None else Bucket(config.size, config.refill_time, config.one_time_burst or 0)


def block_configuration(config: DriveConfig) -> BlockConfiguration:
    """Return what the cell is told of a drive."""
    limiter = config.rate_limiter
    bandwidth, ops = (None, None) if limiter is None else (bucket(limiter.bandwidth), bucket(limiter.ops))
    settings = BlockSettings(
        read_only=bool(config.is_read_only),
        writeback=config.cache_type == CACHE_WRITEBACK,
        discard=bool(config.discard),
        queues=config.num_queues or 1,
    )
    engine = config.io_engine or ENGINE_SYNC
    return BlockConfiguration(config.drive_id, engine, settings, bandwidth or _NO_LIMIT, ops or _NO_LIMIT)


def block_device(config: DriveConfig, boot_id: bytes) -> CellDevice:
    """Return the device of a drive with a file, or with a base and an overlay. Raises DriveError."""
    configuration = block_configuration(config)
    settings = configuration.settings
    files: tuple[int, ...]
    if config.overlay is not None:
        opened = config.open_overlay(boot_id)
        files, sectors = (opened.base, opened.overlay), opened.size // SECTOR_SIZE
    else:
        file = config.open_file()
        _log_remarks(config.drive_id, file)
        files, sectors = (file.descriptor,), file.sectors
    return CellDevice(
        DeviceModel(
            kind=VIRTIO_ID_BLOCK,
            id=config.drive_id,
            queue_sizes=block_queue_sizes(settings),
            features=block_features(settings),
            config=block_config(settings, sectors),
            settings=pack(BLOCK_CONFIGURATION.check(configuration, "settings")),
            section=BLOCK_SECTION,
            counters=BLOCK_COUNTERS,
            out_of_order=configuration.io_engine == ENGINE_ASYNC or config.overlay is not None,
            files=files,
        )
    )


def open_for(device: CellDevice, path: str) -> DriveFile:
    """Open another file for a drive, as its present one is opened. Raises DeviceError."""
    try:
        file = open_drive_file(path, read_only=bool(device.features() & VIRTIO_BLK_F_RO))
    except DriveError as error:
        raise DeviceError(f"Block: {BACKING_FILE}{error}") from error
    _log_remarks(device.id, file)
    return file


def _log_remarks(drive_id: str, file: DriveFile) -> None:
    for remark in file.remarks():
        LOG.warn(f"Drive {drive_id}: {remark}")
