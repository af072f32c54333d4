"""Overlay files: made whole or not at all, and only over the base that they were made for."""

from __future__ import annotations

import random

import pytest

from tests.harness.overlays import BOOT, ID, LATER_BOOT, PowerLossError, SimulatedDisk, open_simulated
from virtio.block.overlay.file import (
    begin_session,
    check_base,
    create_overlay,
    default_cluster_bits,
    identify,
    is_blank,
    open_overlay,
    read_overlay,
)
from virtio.block.overlay.layout import HEADER_AREA, MAGIC, PHASE_COMMIT, PHASE_NONE, check_geometry
from virtio.errors import OverlayError

CONTENT = random.Random(1).randbytes(300 << 10)


@pytest.fixture
def base():
    return SimulatedDisk(CONTENT)


def test_an_overlay_is_as_large_as_its_base_in_whole_sectors():
    base, disk = SimulatedDisk(CONTENT + b"cut"), SimulatedDisk()
    overlay = open_simulated(base, disk, BOOT)
    assert overlay.geometry.size == len(CONTENT)
    assert overlay.state.base.size == len(CONTENT) + 3
    assert overlay.base_size == len(CONTENT)
    assert disk.size == overlay.geometry.file_size
    assert overlay.map.count == 0


@pytest.mark.parametrize(
    ("size", "bits"),
    [(512, 12), (32 << 30, 12), ((32 << 30) + 512, 13), (64 << 30, 13), (1 << 40, 17), (1 << 44, 21), (1 << 49, 21)],
)
def test_clusters_are_as_small_as_a_small_map_allows(size, bits):
    assert default_cluster_bits(size) == bits
    check_geometry(bits, size)


@pytest.mark.parametrize("left", range(9))
def test_an_overlay_is_there_as_a_whole_or_can_be_made_again(base, left):
    for seed in range(12):
        disk = SimulatedDisk()
        disk.writes_left = left
        made = True
        try:
            create_overlay(disk, base, ID)
        except PowerLossError:
            made = False
        disk.lose_power(random.Random(seed).randrange)
        assert made == (left >= 4)
        if made:
            assert not is_blank(disk)
        overlay = open_simulated(base, disk, BOOT)
        assert overlay.map.count == 0
        assert overlay.state.base == identify(base)


def test_a_file_with_something_in_it_is_not_overwritten(base):
    disk = SimulatedDisk(b"what somebody needs")
    with pytest.raises(OverlayError, match="the file is there, and is not empty"):
        create_overlay(disk, base, ID)
    with pytest.raises(OverlayError, match="not an overlay"):
        open_simulated(base, disk, BOOT)
    assert disk.read(0, 100) == b"what somebody needs"


@pytest.mark.parametrize("size", [len(CONTENT) - 512, len(CONTENT) + 512, 0])
def test_a_base_of_another_size_is_refused(base, size):
    disk = SimulatedDisk()
    open_simulated(base, disk, BOOT)
    base.truncate(size)
    with pytest.raises(OverlayError, match=f"its base has changed, or is another one: {size} bytes instead of 307200"):
        open_overlay(disk, base, BOOT)


@pytest.mark.parametrize("at", [0, 1024 + 52, 65535, len(CONTENT) - 1])
def test_a_base_that_was_written_to_is_refused(base, at):
    """A file system notes in its first blocks that it was mounted."""
    disk = SimulatedDisk()
    open_simulated(base, disk, BOOT)
    base.write(at, bytes([CONTENT[at] ^ 1]))
    with pytest.raises(OverlayError, match=f"what is at byte {at // 4096 * 4096} differs"):
        open_overlay(disk, base, BOOT)


def test_a_copy_of_the_base_is_the_base(base):
    disk = SimulatedDisk()
    open_simulated(base, disk, BOOT)
    copy = SimulatedDisk(CONTENT)
    copy.mtime_ns = 99
    open_overlay(disk, copy, BOOT)
    check_base(identify(base), copy)


def test_an_overlay_that_is_being_committed_serves_nobody(base):
    disk = SimulatedDisk()
    overlay = open_simulated(base, disk, BOOT)
    overlay.change(PHASE_COMMIT)
    with pytest.raises(OverlayError, match="cellblock overlay commit"):
        open_overlay(disk, base, BOOT)
    assert read_overlay(disk, BOOT).state.phase == PHASE_COMMIT


def test_a_state_is_there_as_a_whole_or_the_one_before_is(base):
    for left in range(2):
        for seed in range(8):
            disk = SimulatedDisk()
            overlay = open_simulated(base, disk, BOOT)
            overlay.change(PHASE_NONE)
            disk.writes_left = left
            with pytest.raises(PowerLossError):
                overlay.change(PHASE_COMMIT)
            disk.lose_power(random.Random(seed).randrange)
            assert read_overlay(disk, b"").state.generation in ((1,) if not left else (1, 2))


def test_the_volatile_map_counts_under_the_kernel_that_it_was_written_under(base):
    disk = SimulatedDisk()
    overlay = open_simulated(base, disk, BOOT)
    overlay.add(2, 1)
    assert open_overlay(disk, base, BOOT).map.bits(0, 4) == 0b100
    assert read_overlay(disk, LATER_BOOT).map.count == 0
    assert read_overlay(disk, b"").map.count == 0
    # Whoever opens it under another kernel, or does not know its name, ends what was before.
    later = open_overlay(disk, base, LATER_BOOT)
    later.add(0, 1)
    assert open_overlay(disk, base, LATER_BOOT).map.bits(0, 4) == 0b001
    assert read_overlay(disk, BOOT).map.count == 0
    open_overlay(disk, base, b"")
    assert open_overlay(disk, base, LATER_BOOT).map.count == 0


def test_what_was_flushed_counts_for_ever(base):
    disk = SimulatedDisk()
    overlay = open_simulated(base, disk, BOOT)
    overlay.add(1, 2)
    assert overlay.map.pending_count == 2
    overlay.flush()
    assert overlay.map.pending_count == 0
    syncs = disk.syncs
    overlay.flush()
    assert disk.syncs == syncs + 1
    disk.lose_power(lambda _: 0)
    assert open_overlay(disk, base, LATER_BOOT).map.bits(0, 4) == 0b110


def test_what_is_forgotten_is_forgotten(base):
    disk = SimulatedDisk()
    overlay = open_simulated(base, disk, BOOT)
    overlay.add(1, 2)
    overlay.flush()
    overlay.forget()
    assert overlay.map.count == 0
    assert open_overlay(disk, base, BOOT).map.count == 0


def test_a_file_that_is_cut_off_is_refused(base):
    disk = SimulatedDisk()
    overlay = open_simulated(base, disk, BOOT)
    disk.truncate(overlay.geometry.file_size - 1)
    with pytest.raises(OverlayError, match="it is cut off"):
        open_overlay(disk, base, BOOT)
    disk.truncate(HEADER_AREA)
    with pytest.raises(OverlayError, match="it is cut off"):
        read_overlay(disk, BOOT)
    disk.truncate(100)
    with pytest.raises(OverlayError, match="not an overlay"):
        read_overlay(disk, BOOT)


def test_any_damage_is_an_error_or_a_map_within_its_bounds(base):
    chance = random.Random(5)
    whole = SimulatedDisk()
    overlay = open_simulated(base, whole, BOOT)
    length = overlay.geometry.data_offset
    content = whole.read(0, HEADER_AREA + 2 * overlay.geometry.map_size)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(chance.randrange(1, 5)):
            damaged[chance.randrange(0, chance.choice((64, 4096, len(damaged))))] = chance.randrange(256)
        disk = SimulatedDisk(bytes(damaged))
        disk.truncate(overlay.geometry.file_size)
        try:
            found = read_overlay(disk, BOOT)
        except OverlayError:
            continue
        assert found.geometry == overlay.geometry
        assert found.map.count <= found.geometry.clusters
    assert length >= len(content)
    assert content.startswith(MAGIC)


def test_errors_of_the_disk_are_told(base):
    class Broken(SimulatedDisk):
        def read(self, offset, length):
            raise OSError(5, "no")

        write = read

    with pytest.raises(OverlayError, match="it cannot be read: I/O error"):
        read_overlay(Broken(), BOOT)
    with pytest.raises(OverlayError, match="it cannot be made: I/O error"):
        create_overlay(Broken(), base, ID)
    disk = SimulatedDisk()
    overlay = open_simulated(base, disk, BOOT)
    broken = Broken()
    broken.size = len(CONTENT)
    with pytest.raises(OverlayError, match="its base cannot be read: I/O error"):
        open_overlay(disk, broken, BOOT)
    overlay.disk = Broken()
    with pytest.raises(OverlayError, match="it cannot be written: I/O error"):
        begin_session(overlay, LATER_BOOT)
