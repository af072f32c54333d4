"""kill -9 of a device cell, or of the controller, while a guest writes: no acknowledged write is lost."""

from __future__ import annotations

import random
import signal
import time

import pytest

from tests.harness.debian_disk import CONTROLLER, DEVICE_CELL, busybox, drive, empty_disk, folder_of_disks
from tests.harness.numbered_blocks import kept, lost
from tests.harness.run_options import SOAK

THREADS, SLOTS = 4, 32
SIZE = 1 << 20


def write(guest, start: int) -> int:
    """Let the guest write numbered blocks, until something was acknowledged; return the command's number."""
    number = int(guest.agent.start(f"exec numbered /dev/vda {THREADS} {SLOTS} {start}"))
    deadline = time.monotonic() + 60.0
    while min(kept(guest.agent.output_so_far(number)), default=start) <= start:
        assert time.monotonic() < deadline, guest.microvm.tail()
        guest.microvm.pump(0.1)
    return number


@pytest.mark.timeout(0 if SOAK else 900)
@pytest.mark.soak("block")
def test_the_controller_is_killed_while_the_guest_writes(guest_image, no_leftovers, scale, seed):
    generator = random.Random(seed)
    name, start = "killed-controller", 0
    with no_leftovers(names=(name,)), folder_of_disks(name) as disks:
        disk = empty_disk(disks / "data", SIZE)
        for _ in range(scale(2, 200)):
            with busybox(name, guest_image, {"vcpu_count": 1}, [drive(disk)], ["numbered"]) as guest:
                number = write(guest, start)
                guest.microvm.pump(generator.random() * 2.0)
                guest.kill(CONTROLLER)
                guest.microvm.wait(60.0)
                acknowledged = kept(guest.agent.last_words(number))
            assert lost(disk, acknowledged, SLOTS, start) == []
            start = max(acknowledged) + 10_000  # what was written and not told of is below


@pytest.mark.timeout(0 if SOAK else 900)
@pytest.mark.soak("block")
def test_device_cells_are_killed_while_the_guest_writes(guest_image, no_leftovers, scale, seed):
    generator = random.Random(seed)
    name = "killed-device-cell"
    with no_leftovers(names=(name,)), folder_of_disks(name) as disks:
        disk = empty_disk(disks / "data", SIZE)
        with busybox(name, guest_image, {"vcpu_count": 1}, [drive(disk)], ["numbered"]) as guest:
            number = write(guest, 0)
            for _ in range(scale(5, 200)):
                before = kept(guest.agent.output_so_far(number))
                guest.kill(DEVICE_CELL)
                goes_on(guest, number, before)
                guest.microvm.pump(generator.random())
            guest.agent.kill(number, signal.SIGTERM)
            result = guest.agent.wait(number)
            assert result.status == 0, result
            guest.agent.quit()
            guest.microvm.type("exit\n")
            assert guest.microvm.wait(60.0) == 0
        assert lost(disk, kept(result.stdout), SLOTS, 0, last=True) == []


def goes_on(guest, number: int, before: list[int]) -> None:
    """Wait until every thread of the guest has had a write acknowledged since ``before``."""
    deadline = time.monotonic() + 120.0
    while not all(now > then for now, then in zip(kept(guest.agent.output_so_far(number)), before, strict=True)):
        assert time.monotonic() < deadline, guest.microvm.tail()
        guest.microvm.pump(0.05)
