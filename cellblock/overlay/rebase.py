"""Rebasing: another base for an overlay, and what both together say stays what it was."""

from __future__ import annotations

from cellblock.overlay.progress import Progress
from virtio.block.overlay.file import Disk, OverlayFile, check_base, check_unfinished, identify
from virtio.block.overlay.layout import PHASE_NONE
from virtio.errors import OverlayError

#: Bytes compared at a time: whole clusters of any size.
_CHUNK = 4 << 20
#: Bytes copied into the overlay between two flushes.
_FLUSH_EVERY = 256 << 20


def rebase(overlay: OverlayFile, old: Disk, new: Disk) -> int:
    """Copy into the overlay what the new base says otherwise; return how many bytes. Raises OverlayError, OSError.

    Cut short anywhere, the overlay still belongs to the old base, and says the same.
    """
    check_unfinished(overlay)
    check_base(overlay.state.base, old)
    geometry = overlay.geometry
    bits = geometry.cluster_bits
    runs = overlay.map.runs(mapped=False)
    progress = Progress("comparing", sum(count for _, count in runs) << bits)
    copied = since_flush = 0
    for first, count in runs:
        for at in range(first, first + count, _CHUNK >> bits):
            clusters = min(_CHUNK >> bits, first + count - at)
            written = _rewrite(overlay, old, new, at, clusters)
            copied += written
            since_flush += written
            if since_flush >= _FLUSH_EVERY:
                overlay.flush()
                since_flush = 0
            progress.add(clusters << bits)
    overlay.flush()
    overlay.change(PHASE_NONE, identify(new))
    progress.end()
    return copied


def accept(overlay: OverlayFile, new: Disk) -> None:
    """Believe that a base says what the one before said. Raises OverlayError, OSError."""
    check_unfinished(overlay)
    if new.size != overlay.state.base.size:
        raise OverlayError(
            f"the base has {new.size} bytes where the one before had {overlay.state.base.size}: not the same content"
        )
    overlay.change(PHASE_NONE, identify(new))


def _rewrite(overlay: OverlayFile, old: Disk, new: Disk, first: int, count: int) -> int:
    """Put those of some clusters into the overlay that differ; return how many bytes."""
    bits = overlay.geometry.cluster_bits
    was, says = (_read(overlay, disk, first << bits, count << bits) for disk in (old, new))
    if was == says:
        return 0
    size = 1 << bits
    written = 0
    for number in range(count):
        cluster = was[number << bits : (number + 1) << bits]
        if cluster != says[number << bits : (number + 1) << bits]:
            overlay.disk.write(overlay.geometry.data_offset + (first + number << bits), cluster)
            overlay.add(first + number, 1)
            written += size
    return written


def _read(overlay: OverlayFile, disk: Disk, at: int, length: int) -> bytes:
    """Return what a base says through the overlay: zeros behind its end."""
    visible = max(0, min(disk.size, overlay.geometry.size) - at)
    return disk.read(at, min(length, visible)).ljust(length, b"\0")
