"""Makes a block device of its configuration and an open file, in the process that serves it."""

from __future__ import annotations

from virtio.block.backing_file import BackingFile
from virtio.block.configuration import BlockConfiguration, BlockState
from virtio.block.device import Block
from virtio.block.engines import make_engine
from virtio.rate_limiter import RateLimiter


def make_block(configuration: BlockConfiguration, fd: int, state: BlockState | None = None) -> Block:
    """Return a block device. Before the seal; the descriptor is the device's from here on, also if this fails.

    Raises BackingFileError, ThreadError.
    """
    settings = configuration.settings
    file = BackingFile(fd, read_only=settings.read_only)
    try:
        engine = make_engine(configuration.io_engine, file)
    except BaseException:
        file.close()
        raise
    limiter = RateLimiter(configuration.bandwidth, configuration.ops)
    return Block(configuration.id, engine, settings, limiter, state)
