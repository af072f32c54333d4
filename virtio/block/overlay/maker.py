"""Makes a block device with an overlay of its configuration and two open files, in the process that serves it."""

from __future__ import annotations

import os

from virtio.block.backing_file import BackingFile
from virtio.block.configuration import BlockConfiguration, BlockState
from virtio.block.device import Block
from virtio.block.overlay.backing import open_overlay_backing
from virtio.block.overlay.engines import make_overlay_engine
from virtio.errors import BackingFileError
from virtio.rate_limiter import RateLimiter


def make_overlay_block(
    configuration: BlockConfiguration, fds: tuple[int, int], boot_id: bytes, state: BlockState | None = None
) -> Block:
    """Return a block device over a base and its overlay (``fds``), which is made if that file is blank.

    Before the seal; the descriptors are the device's from here on, also if this fails. ``boot_id``: of the launch plan.
    Raises BackingFileError, OverlayError, ThreadError.
    """
    base_fd, overlay_fd = fds
    try:
        base = BackingFile(base_fd, read_only=True)
    except BackingFileError:
        os.close(overlay_fd)
        raise
    overlay = None
    try:
        overlay = open_overlay_backing(base, overlay_fd, boot_id)
        engine = make_overlay_engine(configuration.io_engine, base, overlay)
    except BaseException:
        base.close()
        if overlay is not None:
            overlay.close()
        raise
    limiter = RateLimiter(configuration.bandwidth, configuration.ops)
    return Block(configuration.id, engine, configuration.settings, limiter, state)
