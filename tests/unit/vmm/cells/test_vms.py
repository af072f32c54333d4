"""The one record of what is in force in every worker's VM: what is told to whom, in which order, when it is done."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ipc.messages.descriptors import DoorbellEvent, GuestMemory, Interrupt, MemoryObject
from ipc.messages.records import MemoryRegion, Route, Window
from ipc.messages.vm import AddDoorbell, AddInterrupts, MapMemory, RemoveDoorbell, SetWindows, UnmapMemory
from ipc.shared_memory import create_shared
from vmm.cells.descriptors import VmChange
from vmm.cells.vms import OpenPath, WorkerVms
from vmm.devices.vms import Doorbell, MemorySlot
from vmm.errors import DeviceError


class Worker:
    """Takes changes and routes, and answers when the test says so."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.told: list[Any] = []
        self.waiting: list[Callable[[], None]] = []

    def change(self, change: VmChange, done: Callable[[], None]) -> None:
        self.told.append(change.message)
        self.waiting.append(done)

    def set_routes(self, routes: Any, done: Callable[[], None]) -> None:
        self.told.append(tuple(routes))
        done()

    def answer(self) -> None:
        waiting, self.waiting = self.waiting, []
        for done in waiting:
            done()


@pytest.fixture
def workers():
    return []


@pytest.fixture
def vms(workers):
    vms = WorkerVms(workers, lambda apic_id: apic_id if apic_id < 2 else -1)
    yield vms
    vms.close()


def messages(vms: WorkerVms) -> list[Any]:
    return [change.message for change in vms.everything()]


REGIONS = (MemoryRegion(0, 4096, 0), MemoryRegion(1 << 32, 8192, 4096))
BELL = Doorbell(0x1000, 4, 7, 9)


def test_a_start_is_told_all_of_it_in_order(vms):
    memory: Any = SimpleNamespace(descriptor=5, size=12288, regions=REGIONS)
    shown = vms.map_guest_memory(memory, track_dirty_pages=True)
    ports = [Window(number, 1, number) for number in range(70)]
    assert vms.set_windows(ports, [Window(0x1000, 8, 99)]).done
    assert vms.add_interrupts([(gsi, 100 + gsi) for gsi in range(24, 44)]).done
    assert vms.add_doorbell(BELL).done
    told = vms.everything()
    assert told[:2] == shown
    assert [change.message for change in told] == [
        MapMemory(0, 0, 4096, 0, False, False, True),
        MapMemory(1, 1 << 32, 8192, 4096, False, False, True),
        SetWindows(tuple(ports[:64]), (Window(0x1000, 8, 99),), False),
        SetWindows(tuple(ports[64:]), (), True),
        AddInterrupts(tuple(range(24, 40))),
        AddInterrupts((40, 41, 42, 43)),
        AddDoorbell(0, 0x1000, 4, False, 7),
    ]
    assert told[0].descriptors == ((GuestMemory(12288), 5),)
    assert told[1].descriptors == ()
    assert told[5].descriptors == tuple((Interrupt(gsi), 100 + gsi) for gsi in range(40, 44))
    assert told[6].descriptors == ((DoorbellEvent(0), 9),)


def test_without_any_device_the_windows_are_told_all_the_same(vms):
    assert messages(vms) == [SetWindows((), (), True)]


def test_a_change_is_done_when_every_worker_has_it(vms, workers):
    workers += [Worker(0), Worker(1)]
    deferral = vms.add_doorbell(BELL)
    assert [worker.told for worker in workers] == [[AddDoorbell(0, 0x1000, 4, False, 7)]] * 2
    workers[1].answer()
    assert not deferral.done
    workers[0].answer()
    assert deferral.done
    removed = vms.remove_doorbell(BELL)
    assert workers[0].told[-1] == RemoveDoorbell(0)
    assert not removed.done
    assert messages(vms) == [SetWindows((), (), True)]


def test_memory_comes_and_goes_and_slots_are_given_again(vms):
    descriptor = create_shared("test", 8192)
    try:
        slots = [MemorySlot(number << 20, 4096, descriptor, 4096, True) for number in range(256)]
        for slot in slots:
            vms.map_memory(slot)
        with pytest.raises(DeviceError, match="all 256 memory slots are in use"):
            vms.map_memory(MemorySlot(1 << 40, 4096, descriptor, 0, False))
        vms.unmap_memory(slots[3])
        vms.map_memory(MemorySlot(1 << 40, 4096, descriptor, 0, False))
        told = vms.everything()
        (last,) = [change for change in told if isinstance(change.message, MapMemory) and change.message.slot == 3]
        assert last.message == MapMemory(3, 1 << 40, 4096, 0, True, False, False)
        assert last.descriptors == ((MemoryObject(3, 8192), descriptor),)
    finally:
        os.close(descriptor)


def test_a_successor_is_told_what_was_changed_since(vms, workers):
    workers.append(Worker(0))
    vms.add_doorbell(BELL)
    first = vms.for_successor()
    assert AddDoorbell(0, 0x1000, 4, False, 7) in [change.message for change in first]
    vms.remove_doorbell(BELL)
    vms.set_windows([], [])
    assert [change.message for change in vms.since()] == [RemoveDoorbell(0), SetWindows((), (), True)]
    vms.add_doorbell(BELL)
    assert vms.since() == (), "it was told all of it: it is one of the workers now"


def test_what_is_bound_moves_with_its_worker(vms, workers):
    workers += [Worker(0), Worker(1)]
    to_second = Route(4, 0xFEE0_1000, 0x30, False)
    assert vms.set_routes([to_second]).done
    assert vms.set_routes([Route(1, 0xFEE0_0000, 0x31, False)]).done
    path = vms.add_path(1, 0x40, 1)
    assert (path.gsi, vms.add_path(1, 0x41, 1).gsi, vms.add_path(0, 0x40, 0).gsi) == (1024, 1025, 1024)
    bound = vms.bound_to(1, (1,))
    assert bound.routes == (to_second,)
    assert bound.paths[0] == OpenPath(1, 0x40, 1024, path.eventfd)
    assert len(bound.paths) == 2
    path.sources |= {0, 1}
    vms.forget_sources(0)
    assert path.sources == {1}
    assert not [each for each in messages(vms) if isinstance(each, UnmapMemory)]
