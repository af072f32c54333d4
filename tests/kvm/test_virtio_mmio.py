"""A driver in a guest on a real KVM: registers, doorbells, interrupts, their acknowledgement; exits in steady state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.jail import status
from tests.harness.virtio_guest import VirtioGuest
from vmm.layout import COMMAND_LINE_ADDRESS, COMMAND_LINE_SIZE, SYSTEM_MEMORY_ADDRESS, SYSTEM_MEMORY_END

FOREVER = 1 << 30
PLACES = [
    pytest.param((1, "Split", 0, 0), id="one"),
    pytest.param((2, "Split", 1, 1), id="split"),
    pytest.param((2, "Split", 1, 0), id="split, interrupts elsewhere"),
    pytest.param((2, "Grouped", 1, 1), id="grouped"),
    pytest.param((3, "0,2/1", 2, 1), id="mixed"),
]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Any) -> Iterator[Callable[..., VirtioGuest]]:
    started: list[VirtioGuest] = []

    def start(place: tuple[int, str, int, int], rounds: int) -> VirtioGuest:
        vcpus, placement, driver, target = place
        directory = tmp_path / "ipc"
        directory.mkdir()
        guest = VirtioGuest(directory, monkeypatch, vcpus, placement, ROUNDS=rounds, DRIVER=driver, TARGET=target)
        started.append(guest)
        return guest

    yield start
    for guest in started:
        guest.close()


@pytest.mark.parametrize("place", PLACES)
def test_requests_take_no_exit_in_steady_state(start, place):
    """Also after every worker was replaced: doorbells, registers and interrupts are in the new worker's VM."""
    guest = start(place, FOREVER)
    vmm = guest.machine.vmm
    for worker in (None, *vmm.vcpus_handles):
        if worker is not None:
            vmm.replacements.replace(worker)
        guest.more_requests(10)
        before, begun = guest.entries(), guest.progress()
        kicks = guest.served.kicks
        guest.more_requests(100)
        # A processor that does not wait for them halted may take them much later.
        after = guest.serve_until(lambda progress, seen=begun.interrupts: progress.interrupts > seen)
        assert guest.entries() == before
        assert {status(each.pid)["Seccomp"] for each in vmm.vcpus_handles} == {"2"}, "the filter allows all of it"
        assert after.requests - begun.requests >= 100
        assert guest.served.kicks > kicks
    assert after.config_changes == 0
    assert after.lives == 0


@pytest.mark.parametrize("place", [PLACES[0], PLACES[2]])
def test_a_change_of_the_configuration_is_told_and_acknowledged(start, place):
    guest = start(place, FOREVER)
    guest.more_requests(5)
    generation = guest.transport.registers.config_generation
    for count in (1, 2, 3):
        before = guest.entries()
        guest.transport.config_changed()
        guest.serve_until(lambda progress, count=count: progress.config_changes >= count)
        guest.more_requests(5)
        # Each acknowledgement of it is an exit; the page shows it no more after the first. It comes after the count,
        # from the vCPU that has the interrupt, while another one may go on with its requests.
        guest.serve_until(lambda _: guest.transport.registers.interrupt_status == 1)
        assert guest.progress().config_changes == count
        assert guest.entries() > before
        assert guest.transport.registers.config_generation == generation + 2 * count


@pytest.mark.parametrize("place", [PLACES[0], PLACES[1]])
def test_the_driver_resets_the_device_and_begins_anew(start, place):
    guest = start(place, 3)
    progress = guest.serve_until(lambda progress: progress.lives >= 10)
    assert progress.requests >= 30
    assert guest.transport.needs_reset_count == 0


def test_a_device_that_cannot_go_on_says_so_until_it_is_reset(start):
    guest = start((1, "Split", 0, 0), FOREVER)
    guest.more_requests(5)
    guest.transport.needs_reset("a fault of the test")
    guest.transport.needs_reset("told once")
    guest.serve_until(lambda progress: progress.config_changes == 1)
    assert guest.transport.needs_reset_count == 1
    assert guest.transport.read(0x70, 4) == 15 | 64


def test_what_the_machine_saves_has_the_transport(start):
    guest = start((1, "Split", 0, 0), FOREVER)
    guest.more_requests(5)
    vmm = guest.machine.vmm
    vmm.pause_vm()
    saved = vmm.save_state()
    state = saved.devices["virtio-mmio", "c0001000"]
    assert (state.kind, state.id, state.gsi) == (4, "rng", 5)
    (queue,) = state.registers.queues
    assert queue.ready
    assert queue.next_available == queue.next_used
    assert queue.next_used - guest.progress().requests in (0, 1)  # one may be on its way to the driver
    assert vmm.save_state().devices["virtio-mmio", "c0001000"] == state
    vmm.resume_vm()
    guest.more_requests(5)


def test_the_guest_is_told_where_the_device_is(start):
    """On the command line and in the DSDT, as with Firecracker."""
    guest = start((1, "Split", 0, 0), FOREVER)
    memory = guest.machine.vmm.vm.memory
    line = memory.read(COMMAND_LINE_ADDRESS, COMMAND_LINE_SIZE).partition(b"\0")[0].decode()
    assert line.endswith(" pci=off virtio_mmio.device=4K@0xc0001000:5")
    tables = memory.read(SYSTEM_MEMORY_ADDRESS, SYSTEM_MEMORY_END - SYSTEM_MEMORY_ADDRESS)
    assert tables.count(b"V000") == tables.count(b"LNRO0005") == 1
