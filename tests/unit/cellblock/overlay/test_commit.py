"""A commit may be cut short anywhere, and be begun again: what drive and base say is never lost."""

from __future__ import annotations

import random

import pytest

from cellblock.overlay.commit import commit
from tests.harness.overlay_pairs import CONTENT, SIZE, expected, make, said
from tests.harness.overlays import BOOT, ID, LATER_BOOT, PowerLossError, SimulatedDisk
from virtio.block.overlay.file import create_overlay, open_overlay, read_overlay
from virtio.block.overlay.layout import PHASE_COMMIT, PHASE_NONE
from virtio.errors import OverlayError


def test_the_base_says_it_all_and_the_overlay_nothing():
    base, disk = make()
    assert commit(read_overlay(disk, BOOT), disk, base) == 5 * 4096
    assert base.read(0, base.size) == expected()
    assert not base.cached
    assert not disk.cached
    overlay = open_overlay(disk, base, BOOT)
    assert overlay.map.count == 0
    data = overlay.geometry.data_offset
    assert disk.read(data, SIZE) == bytes(SIZE)
    assert commit(overlay, disk, base) == 0


def test_zeros_become_holes():
    base, disk = make()
    punched: list[tuple[int, int]] = []
    base.punch = lambda offset, length: punched.append((offset, length))  # type: ignore[method-assign]
    commit(read_overlay(disk, BOOT), disk, base)
    assert punched == [(2 * 4096, 4096)]


class Both:
    """Writes to two disks are counted as one row."""

    def __init__(self, left: int, *disks: SimulatedDisk) -> None:
        self.left = left
        for disk in disks:
            disk._burn = self.burn  # type: ignore[method-assign]

    def burn(self) -> None:
        if not self.left:
            raise PowerLossError
        self.left -= 1


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_it_goes_on_wherever_it_was_cut_short(power, seed):
    chance = random.Random(seed)
    left, ended = 0, False
    while not ended:
        base, disk = make()
        boot = BOOT
        wanted = expected() if not power else None
        counter = Both(left, base, disk)
        try:
            commit(read_overlay(disk, boot), disk, base)
            ended = True
        except PowerLossError:
            left += 1
        counter.left = -1
        if power:
            boot = LATER_BOOT
            choose = [lambda _: 0, lambda count: count - 1][seed] if seed < 2 else chance.randrange
            disk.lose_power(choose)
            base.lose_power(choose)
        before = said(base, disk, boot)
        if read_overlay(disk, boot).state.phase != PHASE_NONE:
            assert before == expected()
            with pytest.raises(OverlayError, match="commit"):
                open_overlay(disk, base, boot)
        elif wanted:
            assert before == wanted
        commit(read_overlay(disk, boot), disk, base)
        assert base.read(0, base.size).ljust(SIZE, b"\0") == before
        assert open_overlay(disk, base, boot).map.count == 0
    assert left > 12


def test_it_goes_on_with_the_same_base_only():
    base, disk = make()
    other = SimulatedDisk(CONTENT)
    read_overlay(disk, BOOT).change(PHASE_COMMIT)
    base.write(5 * 4096, b"half of it")
    other.write(3 * 4096, b"another one")
    with pytest.raises(OverlayError, match="a commit into another base was begun: what is at byte 12288"):
        commit(read_overlay(disk, BOOT), disk, other)
    with pytest.raises(OverlayError, match="a commit into another base was begun: this one has 512 bytes"):
        commit(read_overlay(disk, BOOT), disk, SimulatedDisk(bytes(512)))
    commit(read_overlay(disk, BOOT), disk, base)
    assert base.read(0, SIZE) == expected()


def test_a_base_that_has_changed_is_not_committed_into():
    base, disk = make()
    base.write(100, b"mounted")
    with pytest.raises(OverlayError, match="its base has changed"):
        commit(read_overlay(disk, BOOT), disk, base)
    assert read_overlay(disk, BOOT).state.phase == PHASE_NONE


def test_a_shorter_overlay_changes_what_it_shows():
    base, disk = SimulatedDisk(CONTENT), SimulatedDisk()
    create_overlay(disk, base, ID, 3 * 512, 12)
    overlay = open_overlay(disk, base, BOOT)
    disk.write(overlay.geometry.data_offset, b"s" * 4096)
    overlay.add(0, 1)
    commit(overlay, disk, base)
    assert base.read(0, base.size) == b"s" * 1536 + CONTENT[1536:]
