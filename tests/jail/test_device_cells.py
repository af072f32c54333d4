"""A device cell behind all its walls: it serves a guest, and one that is killed is replaced by another one."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.guests.build import build
from tests.harness.jail import JailedMicrovm, microvm, status, wait_for


def device(vm: JailedMicrovm) -> Any:
    (found,) = vm.api("GET", "/devices").body
    return found


def served(vm: JailedMicrovm) -> int:
    return int(device(vm)["counters"]["entropy_bytes"])


def add_guest(vm: JailedMicrovm) -> None:
    """Put the guest into the jail root as /kernel."""
    vm.root.mkdir(parents=True, exist_ok=True)
    shutil.copy(build("virtio_mmio", {"CPUS": 1, "ROUNDS": 1 << 30}), vm.root / "kernel")
    (vm.root / "kernel").chmod(0o644)


def booted(vm: JailedMicrovm, **machine: Any) -> JailedMicrovm:
    """Start a guest whose driver asks for random bytes for ever."""
    add_guest(vm)
    vm.start().wait_up()
    assert vm.api("PUT", "/entropy", {}).status == 204
    return vm.boot("virtio_mmio", **machine)


def kill_and_wait(vm: JailedMicrovm, number: int) -> None:
    """Kill the device cell for the ``number``-th time; the guest goes on with another one."""
    pid = vm.cells()["device 0"]
    assert status(pid)["Seccomp"] == "2"
    walls = wait_for(lambda: vm.wall_records().get("device 0"), "the walls")
    assert walls["verified"], walls
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: device(vm)["replaced"] == number, vm.describe)
    before = served(vm)
    wait_for(lambda: served(vm) > before + 1000, "more random bytes")
    assert device(vm)["needs_reset"] == 0


@pytest.mark.parametrize("cells", ["one", "each"])
def test_a_cell_that_is_killed_is_replaced_behind_the_same_walls(base: Path, cells: str):
    with microvm(base) as vm:
        booted(vm, device_cells=cells)
        wait_for(lambda: served(vm) > 1000, "random bytes")
        for number in range(1, 4):
            kill_and_wait(vm, number)
        assert vm.stop() is not None


def test_a_machine_without_devices_has_no_device_cell(base: Path):
    with microvm(base) as vm:
        vm.boot()
        assert vm.api("GET", "/devices").body == []
        assert "device 0" not in vm.cells()


def test_a_cell_that_cannot_start_refuses_the_start(base: Path):
    with microvm(base, "--arm-fault", "device.attach=kill") as vm:
        add_guest(vm)
        vm.start().wait_up()
        assert vm.api("PUT", "/entropy", {}).status == 204
        assert vm.api("PUT", "/boot-source", {"kernel_image_path": "/kernel"}).status == 204
        reply = vm.api("PUT", "/actions", {"action_type": "InstanceStart"})
        assert reply.status == 400
        assert "Device cell 0" in reply.body["fault_message"]
        assert "SIGKILL" in reply.body["fault_message"]
        assert "device 0" not in vm.cells()
        assert vm.api("GET", "/").status == 200
