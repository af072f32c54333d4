"""A guest that reboots: the microVM ends, as with Firecracker, or its machine starts anew in place."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lab.client import Microvm, descendants, launch_unjailed, without_log
from tests.guests.build import build


def start(vm: Microvm, kernel: Path, machine: dict[str, Any]) -> None:
    vm.wait_for_api()
    vm.must("PUT", "/boot-source", {"kernel_image_path": str(kernel)})
    vm.must("PUT", "/machine-config", {"mem_size_mib": 64, **machine})
    vm.must("PUT", "/actions", {"action_type": "InstanceStart"})


def pids(vm: Microvm) -> set[int]:
    return {vcpu["pid"] for vcpu in vm.must("GET", "/vcpus")}


@pytest.mark.slow
@pytest.mark.parametrize(("vcpus", "placement"), [(2, "Grouped"), (2, "Split"), (3, "0,2/1")])
def test_a_guest_restarts_in_place(tmp_path, no_leftovers, vcpus, placement):
    """The same process, API and console; new memory, devices, workers. Both ways to reset, one after the other."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(build("reboot", {"CPUS": vcpus}).read_bytes())
    machine = {"vcpu_count": vcpus, "vcpu_placement": placement, "reboot_action": "Restart"}
    with no_leftovers(), launch_unjailed(tmp_path) as vm:
        start(vm, kernel, machine)
        kernel.unlink()  # what was configured is what starts again
        before: set[int] = set()
        for key in ("k", "t", "k"):
            vm.expect("HERE\n", 60.0)
            now = pids(vm)
            assert not now & before
            assert now <= set(descendants(vm.process.pid))
            before = now
            vm.type(key)
        vm.expect("HERE\n", 60.0)
        assert "OLD" not in without_log(vm.console)
        assert vm.must("GET", "/")["state"] == "Running"
        assert vm.must("GET", "/machine-config")["reboot_action"] == "Restart"
        # It can be operated like the first one.
        vm.must("PATCH", "/vm", {"state": "Paused"})
        assert vm.must("GET", "/")["state"] == "Paused"
        vm.must("PATCH", "/vm", {"state": "Resumed"})
        vm.type("k")
        vm.expect("HERE\n", 60.0)


@pytest.mark.parametrize(
    ("machine", "key", "status"), [({}, "k", 0), ({"reboot_action": "Exit"}, "k", 0), ({}, "t", 1)]
)
def test_a_guest_that_reboots_ends_its_microvm(tmp_path, no_leftovers, machine, key, status):
    with no_leftovers(tmp_path / "firecracker.socket"), launch_unjailed(tmp_path) as vm:
        start(vm, build("reboot", {"CPUS": 2}), {"vcpu_count": 2, **machine})
        vm.expect("HERE\n", 60.0)
        vm.type(key)
        assert vm.wait(60.0) == status
        assert without_log(vm.console).count("HERE\n") == 1  # once more in the log's report, if the end is a failure


@pytest.mark.slow
def test_a_guest_that_resets_at_once_restarts_once_a_second(tmp_path, no_leftovers):
    """Clients are served meanwhile, and it can be ended."""
    with no_leftovers(), launch_unjailed(tmp_path) as vm:
        start(vm, build("reset"), {"vcpu_count": 1, "reboot_action": "Restart"})
        begin = time.monotonic()
        while (count := vm.console.count(b"which starts anew")) < 4:
            assert vm.must("GET", "/")["state"] == "Running"
            assert time.monotonic() < begin + 60.0, vm.tail()
            vm.pump(0.05)
        assert count <= time.monotonic() - begin + 2
        vm.process.terminate()
        assert vm.wait(30.0) == -signal.SIGTERM


def test_a_kernel_that_is_no_kernel_any_more_ends_the_microvm(tmp_path, no_leftovers):
    """The file is kept open, but its owner may write to it: the start that fails is an error like any other."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(build("reboot", {"CPUS": 2}).read_bytes())
    config = {"vcpu_count": 2, "vcpu_placement": "Grouped", "mem_size_mib": 64, "reboot_action": "Restart"}
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({"boot-source": {"kernel_image_path": str(kernel)}, "drives": [], "machine-config": config})
    )
    with no_leftovers(), launch_unjailed(tmp_path, ["--config-file", str(path), "--no-api"]) as vm:
        vm.expect("HERE\n", 60.0)
        kernel.write_bytes(b"no kernel")
        vm.type("k")
        assert vm.wait(60.0) == 1
        assert b"The machine could not be started anew: " in vm.console
