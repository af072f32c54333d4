"""What is changed in the VM of a real worker: memory slots, windows, interrupts, doorbells."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.messages.descriptors import DoorbellEvent, GuestMemory, MemoryObject
from ipc.messages.records import Window
from ipc.messages.vm import (
    AddDoorbell,
    AddInterrupts,
    MapMemory,
    RemoveDoorbell,
    SetWindows,
    UnmapMemory,
    VmChanged,
)
from ipc.messages.worker import Configured
from ipc.shared_memory import create_published, create_shared
from tests.harness.workers import MMIO_POSTED, ChecksCounts, Controller

SIZE = 1 << 20


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Controller]:
    with Controller(tmp_path, ChecksCounts()) as worker:
        worker.greet()
        yield worker


def region(slot: int, address: int, size: int, offset: int, **changes: bool) -> MapMemory:
    flags = {"own": False, "read_only": False, "track_dirty_pages": False, **changes}
    return MapMemory(slot, address, size, offset, **flags)


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (region(0, 0, 8 << 20, 0), "worker.configuration"),
        (region(0, 0x800, SIZE, 0), "worker.configuration"),
        (region(0, 0, SIZE, 4 << 20), "worker.configuration"),
    ],
)
def test_memory_that_does_not_fit_is_refused(worker: Controller, wrong: MapMemory, code: str) -> None:
    worker.descriptor_channel.send(GuestMemory(worker.memory_size), fds=(worker.memory_fd,))
    assert worker.refused(wrong).code == code
    worker.request(region(0, 0, SIZE, 0), VmChanged)  # what was refused has changed nothing
    assert worker.refused(region(0, 16 << 20, SIZE, 0)).text == "memory slot 0 is in use"
    assert worker.refused(region(1, 0, SIZE, SIZE)).code == "worker.kvm"  # they overlap
    worker.request(region(1, SIZE, SIZE, SIZE, track_dirty_pages=True), VmChanged)


def test_memory_of_its_own_comes_and_goes(worker: Controller) -> None:
    worker.prepare()
    shared = create_shared("own", SIZE)
    published, mapping = create_published("registers", 4096)
    try:
        for _ in range(3):
            worker.descriptor_channel.send(MemoryObject(7, SIZE), fds=(shared,))
            worker.request(region(7, 1 << 32, SIZE, 0, own=True), VmChanged)
            worker.descriptor_channel.send(MemoryObject(8, 4096), fds=(published,))
            assert worker.refused(region(8, 2 << 32, 4096, 0, own=True)).code == "worker.configuration"  # sealed
            worker.descriptor_channel.send(MemoryObject(8, 4096), fds=(published,))
            worker.request(region(8, 2 << 32, 4096, 0, own=True, read_only=True), VmChanged)
            for slot in (7, 8):
                worker.request(UnmapMemory(slot), VmChanged)
        assert worker.refused(UnmapMemory(7)).text == "memory slot 7 is not in use"
        assert "was not handed over" in worker.refused(region(9, 1 << 32, SIZE, 0, own=True)).text
        maps = Path(f"/proc/{worker.pid}/maps").read_text()
        assert "/memfd:own" not in maps and "/memfd:registers" not in maps, "a mapping lasts as long as its slot"
    finally:
        mapping.close()
        os.close(shared)
        os.close(published)


@pytest.mark.parametrize(
    "wrong",
    [
        SetWindows((Window(0xFFFF, 2, 0),), (), True),
        SetWindows((Window(0x10, 2, 503),), (), True),
        SetWindows((Window(0x10, 2, 0), Window(0x11, 2, 4)), (), True),
        SetWindows((), (Window(0x1000, 0x1000, 0), Window(0x1800, 8, 1)), True),
    ],
)
def test_windows_that_no_page_has_are_refused(worker: Controller, wrong: SetWindows) -> None:
    assert worker.refused(wrong).code == "worker.configuration"
    worker.prepare()
    worker.request(worker.configuration(), Configured)


def test_an_interrupt_without_its_eventfd_is_refused(worker: Controller) -> None:
    assert worker.refused(AddInterrupts((7,))).code == "worker.configuration"


def test_a_doorbell_is_added_and_removed(tmp_path: Path) -> None:
    eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    bell = AddDoorbell(3, MMIO_POSTED, 4, True, 0)
    with Controller(tmp_path, ChecksCounts()) as worker:
        worker.configure()
        worker.descriptor_channel.send(DoorbellEvent(3), fds=(eventfd,))
        worker.request(bell, VmChanged)
        assert "was not handed over" in worker.refused(bell).text
        worker.descriptor_channel.send(DoorbellEvent(3), fds=(eventfd,))
        assert worker.refused(bell).text == "doorbell 3 is in use"
        worker.request(RemoveDoorbell(3), VmChanged)
        assert worker.refused(RemoveDoorbell(3)).text == "doorbell 3 is not in use"
        worker.descriptor_channel.send(DoorbellEvent(3), fds=(eventfd,))
        worker.request(bell, VmChanged)  # KVM has forgotten it, too: a second one at the address would be refused
    os.close(eventfd)
