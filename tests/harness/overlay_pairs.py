"""A base with an overlay that has changed it here and there, and what both say together."""

from __future__ import annotations

import random

from tests.harness.overlays import BOOT, ID, SimulatedDisk
from virtio.block.overlay.file import create_overlay, open_overlay, read_overlay

CHANCE = random.Random(3)
CONTENT = CHANCE.randbytes(9 * 4096 + 512)
#: Cluster → what the overlay says of it; the last ones are behind the end of the base.
CHANGES = {
    1: CHANCE.randbytes(4096),
    2: bytes(4096),
    5: CHANCE.randbytes(4096),
    9: CHANCE.randbytes(4096),
    11: b"e" * 4096,
}
SIZE = 12 * 4096


def expected() -> bytes:
    content = bytearray(CONTENT.ljust(SIZE, b"\0"))
    for cluster, data in CHANGES.items():
        content[cluster * 4096 : cluster * 4096 + 4096] = data
    return bytes(content)


def make() -> tuple[SimulatedDisk, SimulatedDisk]:
    """Return a base, and an overlay with changes of which some are not flushed."""
    base, disk = SimulatedDisk(CONTENT), SimulatedDisk()
    create_overlay(disk, base, ID, SIZE, 12)
    overlay = open_overlay(disk, base, BOOT)
    for cluster, data in CHANGES.items():
        disk.write(overlay.geometry.data_offset + cluster * 4096, data)
        overlay.add(cluster, 1)
        if cluster == 2:
            overlay.flush()
    return base, disk


def said(base: SimulatedDisk, disk: SimulatedDisk, boot: bytes) -> bytes:
    """Return what both say together."""
    overlay = read_overlay(disk, boot)
    content = bytearray(base.read(0, SIZE).ljust(SIZE, b"\0"))
    for first, count in overlay.map.runs(mapped=True):
        at, length = first * 4096, count * 4096
        content[at : at + length] = disk.read(overlay.geometry.data_offset + at, length)
    return bytes(content)
