"""A virtio-rng in a device cell, on a real KVM: placements, replaced workers, pause, limits, metrics, its end."""

from __future__ import annotations

import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc import exit_ring
from tests.guests.build import build
from tests.harness.vmm_in_process import Machine
from virtio.rate_limiter import Bucket
from vmm.cells import device_pool
from vmm.observe.event_log import EVENTS
from vmm.observe.metrics import METRICS

PROGRESS = 0x80000
FOREVER = 1 << 30
LENGTH = 64
PLACES = [
    pytest.param((1, "Split", 0, 0), id="one"),
    pytest.param((2, "Split", 1, 1), id="split"),
    pytest.param((2, "Grouped", 1, 1), id="grouped"),
    pytest.param((3, "0,2/1", 2, 1), id="mixed"),
]


class Guest:
    """The machine, and what its guest says."""

    def __init__(
        self, directory: Path, place: tuple[int, str, int, int], entropy: Any, rounds: int, **more: Any
    ) -> None:
        vcpus, placement, driver, target = place
        self.events: list[bytes] = []
        EVENTS.listen(self.events.append)
        self.machine = Machine(directory, device_faults=more.pop("faults", ()))
        config = {"vcpu_count": vcpus, "mem_size_mib": 64, "vcpu_placement": placement, **more}
        kernel = build("virtio_mmio", {"CPUS": vcpus, "ROUNDS": rounds, "DRIVER": driver, "TARGET": target})
        for path, body in (
            ("/machine-config", config),
            ("/entropy", entropy),
            ("/boot-source", {"kernel_image_path": str(kernel)}),
            ("/actions", {"action_type": "InstanceStart"}),
        ):
            assert self.machine.send("PUT", path, body) is None

    @property
    def pid(self) -> int:
        return int(self.device()["pid"])

    def device(self) -> Any:
        (device,) = self.machine.vmm.device_report()
        return device

    def requests(self) -> int:
        return int(struct.unpack("<I", self.machine.vmm.vm.memory.read(PROGRESS, 4))[0])

    def serve(self, done: Callable[[], bool]) -> None:
        """Run the loop; the guest's end is a failure."""
        deadline = time.monotonic() + 60
        events = self.machine.cells.events
        while not done():
            events.run(20)
            assert self.machine.vmm.shutdown_exit_code() is None, "the guest has found a fault"
            assert time.monotonic() < deadline, "did not happen"

    def more_requests(self, count: int) -> None:
        wanted = self.requests() + count
        self.serve(lambda: self.requests() >= wanted)

    def entries(self) -> int:
        self.machine.vmm.pause_vm()
        self.machine.vmm.resume_vm()
        return sum(each[exit_ring.COUNTER_EXITS] for each in self.machine.vmm.exit_counters().values())

    def happened(self, event: str) -> int:
        return sum(f'"event":"{event}"'.encode() in line for line in self.events)

    def close(self) -> None:
        EVENTS.leave(self.events.append)
        self.machine.close()


@pytest.fixture
def start(tmp_path: Path, log: Any) -> Iterator[Callable[..., Guest]]:
    guests: list[Guest] = []

    def start(place: Any = PLACES[0].values[0], *, entropy: Any = None, rounds: int = FOREVER, **more: Any) -> Guest:
        guests.append(Guest(tmp_path, place, entropy or {}, rounds, **more))
        return guests[-1]

    yield start
    for guest in guests:
        guest.close()


@pytest.mark.parametrize("place", PLACES)
def test_requests_take_no_exit_also_after_workers_were_replaced(start, place):
    guest = start(place)
    vmm = guest.machine.vmm
    for worker in (None, *vmm.vcpus_handles):
        if worker is not None:
            vmm.replacements.replace(worker)
        guest.more_requests(10)
        before = guest.entries()
        guest.more_requests(200)
        assert guest.entries() == before


def test_what_the_guest_gets_is_random(start):
    guest = start()
    guest.more_requests(20)
    assert len(set(guest.machine.vmm.vm.memory.read(0x303000, LENGTH))) > LENGTH // 3


def test_the_driver_resets_the_device_and_begins_anew(start):
    guest = start(rounds=3)
    guest.more_requests(60)
    assert guest.happened("device-cell-ended") == 0


@pytest.mark.parametrize("place", [PLACES[0], PLACES[1]])
def test_a_paused_guest_has_a_device_that_stands_still(start, place):
    guest = start(place)
    vmm = guest.machine.vmm
    for _ in range(5):
        guest.more_requests(30)
        vmm.pause_vm()
        vmm.pause_vm()
        (device,) = vmm.device_manager.virtio
        assert device.device.activation is None
        state = vmm.save_state()
        (queue,) = state.devices["virtio-mmio", "c0001000"].registers.queues
        assert queue.next_available == queue.next_used
        assert queue.next_used - guest.requests() & 0xFFFF in (0, 1)  # one may be on its way to the driver
        assert ("virtio-entropy", "rng") in state.devices
        assert vmm.save_state().devices["virtio-mmio", "c0001000"].registers.queues == (queue,)
        vmm.resume_vm()
        vmm.resume_vm()


def test_metrics_count_what_the_cell_has_done(start):
    before = METRICS["entropy"].values["entropy_bytes"]  # of machines that were here before
    guest = start()
    guest.more_requests(100)
    vmm = guest.machine.vmm
    vmm.pause_vm()
    vmm.read_metrics()
    counted = METRICS["entropy"].values["entropy_bytes"] - before
    assert guest.requests() * LENGTH <= counted <= (guest.requests() + 1) * LENGTH
    vmm.resume_vm()


def test_what_cells_have_counted_is_added_up(start):
    guest = start()
    guest.more_requests(50)
    guest.machine.vmm.read_metrics()
    before = METRICS["entropy"].values["entropy_bytes"]
    kill(guest)
    guest.more_requests(50)
    guest.machine.vmm.read_metrics()
    assert METRICS["entropy"].values["entropy_bytes"] >= before + 40 * LENGTH


def test_a_limiter_holds_and_can_be_changed(start):
    guest = start(entropy={"rate_limiter": {"ops": {"size": 5, "refill_time": 100_000_000}}})
    guest.serve(lambda: guest.requests() == 5)
    guest.machine.vmm.read_metrics()
    assert METRICS["entropy"].values["entropy_rate_limiter_throttled"] > 0
    (transport,) = guest.machine.vmm.device_manager.virtio
    update = transport.device.update_limiter(None, Bucket(1000, 1))
    guest.serve(lambda: update.done.done)
    assert update.refusal == ""
    guest.more_requests(50)
    kill(guest)
    guest.more_requests(50)  # the cell that goes on has the limiter as it was changed


def kill(guest: Guest) -> None:
    """End the device cell, and wait until another one serves."""
    replaced = guest.happened("device-cell-replaced")
    os.kill(guest.pid, signal.SIGKILL)
    guest.serve(lambda: guest.happened("device-cell-replaced") > replaced)


@pytest.mark.parametrize("place", [PLACES[0], PLACES[3]])
def test_a_fresh_cell_goes_on_for_one_that_was_killed(start, place, monkeypatch):
    monkeypatch.setattr(device_pool, "MAX_ENDS", 1000)
    guest = start(place)
    for _ in range(15):
        guest.more_requests(5)
        kill(guest)
    guest.more_requests(20)
    (transport,) = guest.machine.vmm.device_manager.virtio
    assert transport.needs_reset_count == 0
    assert guest.device()["replaced"] == 15


@pytest.mark.parametrize("point", ["device.kick", "device.used", "device.activate"])
def test_a_cell_that_ends_at_a_fault_point_is_replaced_and_nothing_is_lost(start, monkeypatch, point):
    """Each cell serves some notifications, and then ends at the worst of times; the guest goes on."""
    monkeypatch.setattr(device_pool, "MAX_ENDS", 1000)
    after = 1 if point == "device.activate" else 7
    guest = start(faults=(f"{point}=kill,after={after}",), rounds=50)
    guest.serve(lambda: guest.happened("device-cell-replaced") >= 8)
    guest.more_requests(10)


def test_a_crash_loop_ends_declared(start):
    guest = start(faults=("device.kick=crash",), rounds=FOREVER)
    guest.serve(lambda: guest.happened("device-cell-given-up") == 1)
    assert guest.happened("device-cell-ended") == device_pool.MAX_ENDS + 1
    (transport,) = guest.machine.vmm.device_manager.virtio
    assert transport.needs_reset_count == 1
    assert transport.read(0x70, 4) == 15 | 64
    assert guest.device()["state"] == "given up"
    assert guest.machine.vmm.shutdown_exit_code() is None
    guest.machine.vmm.pause_vm()
    guest.machine.vmm.resume_vm()


def test_a_pause_while_the_cell_is_being_replaced(start):
    guest = start()
    guest.more_requests(10)
    for _ in range(4):
        os.kill(guest.pid, signal.SIGKILL)
        guest.machine.vmm.pause_vm()
        requests = guest.requests()
        guest.machine.vmm.save_state()
        guest.machine.vmm.resume_vm()
        guest.serve(lambda requests=requests: guest.requests() > requests)
        guest.more_requests(10)


@pytest.mark.parametrize("cells", ["one", "each"])
def test_the_configuration_says_how_devices_are_spread(start, cells):
    guest = start(device_cells=cells)
    guest.more_requests(10)
    assert guest.machine.send("GET", "/machine-config")["device_cells"] == cells
    (device,) = guest.machine.send("GET", "/devices")
    assert (device["id"], device["kind"], device["cell"], device["state"]) == ("rng", "entropy", 0, "serving")
    assert device["pid"] == guest.pid
    assert device["queues"][0]["ready"]
    assert device["counters"]["entropy_bytes"] > 0


def test_a_machine_without_devices_has_no_cell(tmp_path, log):
    machine = Machine(tmp_path)
    try:
        machine.start()
        assert machine.vmm.device_cells is None
        assert machine.send("GET", "/devices") == []
    finally:
        machine.close()
