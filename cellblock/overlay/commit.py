"""Committing: what is in the overlay goes into the base, and the overlay is empty afterwards.

It can be begun again wherever it was cut short (docs/formats/overlay.md): until every byte is in the base, on stable
storage, both together say what they said before.
"""

from __future__ import annotations

from cellblock.overlay.progress import Progress
from virtio.block.overlay.file import Disk, OverlayFile, check_base, identify
from virtio.block.overlay.layout import PHASE_CLEAR, PHASE_COMMIT, PHASE_NONE, SAMPLE_SIZE, checksum, sample_offsets
from virtio.errors import OverlayError


def commit(overlay: OverlayFile, upper: Disk, base: Disk) -> int:
    """Do what is left of it; return how many bytes went into the base. ``upper`` is the overlay's file.

    Raises OverlayError, OSError.
    """
    copied = 0
    if overlay.state.phase == PHASE_NONE:
        check_base(overlay.state.base, base)
        # What only the volatile map knows of would be lost with it, and be in the base by half.
        overlay.flush()
        overlay.change(PHASE_COMMIT)
    elif overlay.state.phase == PHASE_COMMIT:
        _check_half_written(overlay, base)
    if overlay.state.phase == PHASE_COMMIT:
        copied = _copy(overlay, upper, base)
        overlay.change(PHASE_CLEAR, identify(base))
    check_base(overlay.state.base, base)
    overlay.forget()
    upper.punch(overlay.geometry.data_offset, overlay.geometry.clusters << overlay.geometry.cluster_bits)
    overlay.change(PHASE_NONE)
    return copied


def _check_half_written(overlay: OverlayFile, base: Disk) -> None:
    """A commit into this base was begun: only what it does not write has to be what it was."""
    known, geometry = overlay.state.base, overlay.geometry
    size = base.size
    if size not in (known.size, max(known.size, geometry.size)):
        raise OverlayError(f"a commit into another base was begun: this one has {size} bytes instead of {known.size}")
    for offset, expected in zip(sample_offsets(known.size), known.samples, strict=True):
        length = min(SAMPLE_SIZE, known.size - offset)
        is_written = offset < geometry.size and overlay.map.bits(offset >> geometry.cluster_bits, 1)
        if not is_written and checksum(base.read(offset, length)) != expected:
            raise OverlayError(f"a commit into another base was begun: what is at byte {offset} of this one differs")


def _copy(overlay: OverlayFile, upper: Disk, base: Disk) -> int:
    geometry = overlay.geometry
    bits = geometry.cluster_bits
    if base.size < geometry.size:
        base.truncate(geometry.size)
    runs = overlay.map.runs(mapped=True)
    progress = Progress("committing", sum(count for _, count in runs) << bits)
    for first, count in runs:
        end = min(first + count << bits, geometry.size)
        for at in range(first << bits, end, 1 << bits):
            length = min(1 << bits, end - at)
            data = upper.read(geometry.data_offset + at, length)
            if len(data) < length:
                raise OverlayError("it is cut off")
            if any(data):
                base.write(at, data)
            else:
                base.punch(at, length)
            progress.add(length)
    base.sync()
    progress.end()
    return progress.done
