"""The two files of a drive with an overlay, as the drive is served from them."""

from __future__ import annotations

import os
import stat

from virtio.abi import VIRTIO_BLK_ID_SIZE
from virtio.block.backing_file import BackingFile
from virtio.block.overlay.file import (
    OsErrors,
    OverlayFile,
    create_overlay,
    is_blank,
    open_overlay,
)
from virtio.block.overlay.storage import Storage
from virtio.errors import OverlayError

ID_SIZE = 16


class OverlayBacking(BackingFile):
    """An open overlay, as a drive sees it: its size and its identity are those of the drive."""

    def __init__(self, fd: int, overlay: OverlayFile) -> None:
        """The descriptor is ours from here on, also if it is refused (BackingFileError)."""
        self.overlay = overlay
        super().__init__(fd, read_only=False)

    def refresh(self) -> None:
        """Nothing changes: the size is in the header."""
        self.size = self.overlay.geometry.size

    def identity(self) -> bytes:
        """Return the answer to GET_ID: as much of the overlay's id as 20 bytes of text hold."""
        return self.overlay.geometry.id.hex()[:VIRTIO_BLK_ID_SIZE].encode()


def open_overlay_backing(
    base: BackingFile, fd: int, boot_id: bytes, *, cluster_bits: int | None = None
) -> OverlayBacking:
    """Return the overlay in an open file, which is made first if the file is blank. ``fd`` is ours, also if refused.

    ``boot_id``: virtio.block.overlay.file.OverlayFile. Raises VirtioError: OverlayError, BackingFileError.
    """
    try:
        with OsErrors("it cannot be read"):
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OverlayError("not a regular file")
            disk, base_disk = Storage(fd), Storage(base.fd)
            if is_blank(disk):
                create_overlay(disk, base_disk, os.getrandom(ID_SIZE, os.GRND_NONBLOCK), cluster_bits=cluster_bits)
            overlay = open_overlay(disk, base_disk, boot_id)
    except OverlayError:
        os.close(fd)
        raise
    return OverlayBacking(fd, overlay)
