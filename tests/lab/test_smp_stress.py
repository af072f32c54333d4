"""Must-show 2: processors that must agree under load, while the microVM is disturbed at random."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable

import pytest

from lab.client import Microvm
from tests.lab.test_boot import BOOT_TIMEOUT, CGROUP_OPTIONS, jail
from tests.lab.test_smp import COMPLAINTS, SOAK_ONLY, config, run

#: Does something to a running microVM that its guest must not notice; called again and again.
Disturb = Callable[[Microvm, random.Random], None]


def pause_and_resume(vm: Microvm, generator: random.Random) -> None:
    vm.must("PATCH", "/vm", {"state": "Paused"})
    time.sleep(generator.random() * 0.03)
    vm.must("PATCH", "/vm", {"state": "Resumed"})
    time.sleep(generator.random())


def stress(vm: Microvm, seconds: int, disturb: Disturb, generator: random.Random) -> dict[str, int]:
    """Run the stress program for so long and disturb the microVM meanwhile; return what the program counted."""
    vm.type(f"stress {seconds}\n")
    deadline = time.monotonic() + 3 * seconds + 240
    disturbances = 0
    while not vm.has_come("STRESS done"):
        assert time.monotonic() < deadline, f"the guest hangs after {disturbances} disturbances:\n{vm.tail()}"
        disturb(vm, generator)
        disturbances += 1
    output = vm.expect("CELLBLOCK-RUN end", 60.0)
    print(f"{disturbances} disturbances\n{output}")
    assert "STRESS error" not in output
    found = re.search(r"^STRESS done (.*?)\r?$", output, re.MULTILINE)
    assert found, output
    return {"disturbances": disturbances} | {
        name: int(value) for name, value in (word.split("=") for word in found.group(1).split())
    }


def check_counts(counts: dict[str, int]) -> None:
    """Nothing was wrong, and everything was tried."""
    assert counts["errors"] == 0, counts
    assert counts["warps"] == 0, counts
    for name in ("disturbances", "remap", "protect", "faults", "anon", "fork", "pipe", "futex", "clock"):
        assert counts[name] > 0, counts


@pytest.mark.soak("smp")
@pytest.mark.parametrize("vcpus", [2, pytest.param(4, marks=SOAK_ONLY)])
def test_stress_while_pausing_and_resuming(guest_image, no_leftovers, scale, seed, vcpus):
    name = f"stress-{vcpus}"
    with jail(name) as made, no_leftovers(names=(name,)):
        machine = {"vcpu_count": vcpus, "vcpu_placement": "Split"}
        path = config(made, guest_image, machine, "", "stay", programs=("stress",))
        with made.launch((*CGROUP_OPTIONS, "--cleanup"), ("--config-file", path)) as vm:
            vm.expect("CELLBLOCK-READY", BOOT_TIMEOUT)
            check_counts(stress(vm, scale(20, 600), pause_and_resume, random.Random(seed)))
            assert "\nno complaint" in run(vm, COMPLAINTS)
            assert not any(ghost["recoveries"] for vcpu in vm.must("GET", "/vcpus") for ghost in vcpu["ghosts"])
            vm.type("exit\n")
            vm.expect("CELLBLOCK-DONE", 60.0)
            assert vm.wait(60.0) == 0
