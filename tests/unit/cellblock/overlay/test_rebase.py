"""A drive says after a rebase what it said before, and when that is cut short, too."""

from __future__ import annotations

import random

import pytest

from cellblock.overlay.rebase import accept, rebase
from tests.harness.overlay_pairs import CONTENT, SIZE, expected, make, said
from tests.harness.overlays import BOOT, LATER_BOOT, PowerLossError, SimulatedDisk
from virtio.block.overlay.file import open_overlay, read_overlay
from virtio.block.overlay.layout import PHASE_COMMIT
from virtio.errors import OverlayError

LENGTH = len(CONTENT)


def other_base(length=LENGTH) -> SimulatedDisk:
    """Return a base that differs in clusters that are in the overlay, and in two that are not."""
    content = bytearray(CONTENT)
    for at in (4096, 3 * 4096 + 7, 8 * 4096):
        content[at : at + 100] = bytes(100)
    return SimulatedDisk(bytes(content)[:length].ljust(length, b"n"))


@pytest.mark.parametrize("length", [len(CONTENT), 2 * 4096 + 100, SIZE, SIZE + 4096, 512])
def test_what_differs_is_in_the_overlay(length):
    base, disk = make()
    overlay = read_overlay(disk, BOOT)
    before, new = overlay.map.count, other_base(length)
    copied = rebase(overlay, base, new)
    assert copied == (overlay.map.count - before) * 4096
    assert said(new, disk, BOOT) == expected()
    assert open_overlay(disk, new, BOOT).map.count == overlay.map.count
    assert not disk.cached
    with pytest.raises(OverlayError, match="its base has changed"):
        open_overlay(disk, base, BOOT)


def test_the_same_content_is_not_copied():
    base, disk = make()
    copy = SimulatedDisk(CONTENT)
    copy.mtime_ns = 7
    overlay = read_overlay(disk, BOOT)
    assert rebase(overlay, base, copy) == 0
    assert overlay.state.base.mtime_ns == 7


@pytest.mark.parametrize("seed", range(6))
def test_cut_short_it_is_over_the_old_base_and_says_the_same(seed):
    chance = random.Random(seed)
    left, ended = 0, False
    while not ended:
        base, disk = make()
        read_overlay(disk, BOOT).flush()
        new = other_base()
        disk.writes_left = left
        try:
            rebase(read_overlay(disk, BOOT), base, new)
            ended = True
        except PowerLossError:
            left += 1
        disk.lose_power([lambda _: 0, lambda count: count - 1][seed] if seed < 2 else chance.randrange)
        found = read_overlay(disk, LATER_BOOT).state
        over = base if found.generation == 0 else new
        assert said(over, disk, LATER_BOOT) == expected()
        open_overlay(disk, over, LATER_BOOT)
    assert left > 5


def test_who_says_that_it_is_the_same_is_believed():
    _, disk = make()
    overlay = read_overlay(disk, BOOT)
    with pytest.raises(OverlayError, match="not the same content"):
        accept(overlay, SimulatedDisk(CONTENT + bytes(512)))
    accept(overlay, other_base())
    open_overlay(disk, other_base(), BOOT)


def test_it_begins_over_the_base_that_it_has():
    base, disk = make()
    with pytest.raises(OverlayError, match="its base has changed"):
        rebase(read_overlay(disk, BOOT), other_base(), base)
    overlay = read_overlay(disk, BOOT)
    overlay.change(PHASE_COMMIT)
    for call in (lambda: rebase(overlay, base, base), lambda: accept(overlay, base)):
        with pytest.raises(OverlayError, match="a commit of it was begun"):
            call()
