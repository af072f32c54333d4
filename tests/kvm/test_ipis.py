"""Every kind of interprocessor interrupt between vCPUs of one worker and of several; none lost, none twice.

The guest has no page tables: so its vCPUs may be in several workers also where there is no second-stage paging.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab.client import Microvm, descendants, launch_unjailed, without_log
from tests.guests.build import build
from tests.harness.bare_metal import FOREVER, every_kind, run_to_its_end


@pytest.mark.soak("smp")
@pytest.mark.parametrize(
    ("vcpus", "placement", "mode"),
    [
        (2, "Grouped", "x2APIC"),
        pytest.param(2, "Grouped", "xAPIC", marks=pytest.mark.slow),
        pytest.param(4, "Grouped", "x2APIC", marks=pytest.mark.slow),
        (2, "Split", "x2APIC"),
        pytest.param(2, "Split", "xAPIC", marks=pytest.mark.slow),
        pytest.param(3, "Split", "x2APIC", marks=pytest.mark.slow),
        (4, "0,1/2,3", "x2APIC"),
        pytest.param(4, "0,1/2,3", "xAPIC", marks=pytest.mark.slow),
        pytest.param(3, "0,2/1", "x2APIC", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_ipi_arrives_once(tmp_path, scale, no_leftovers, vcpus, placement, *, mode):
    # A renewed INIT is trapped by single-stepping where the host has second-stage paging, by breakpoints else. Nothing
    # returns from an NMI where KVM emulates ring 0: there is one of them here (more of them in tests/lab).
    kernel, end = every_kind(vcpus, placement, mode, ROUNDS=scale(200, 10_000), NMIS=1, RESTARTS=scale(3, 100))
    with no_leftovers(tmp_path):
        run_to_its_end(tmp_path, kernel, (vcpus, placement), end, scale(300.0, 7200.0))


@pytest.mark.slow
@pytest.mark.soak("smp")
def test_most_vcpus_in_a_worker_each(tmp_path, scale, no_leftovers):
    """There are more pairs of receiver and vector than paths in the kernel."""
    kernel, end = every_kind(32, "Split", "x2APIC", ROUNDS=scale(3, 200), NMIS=1, RESTARTS=scale(1, 10))
    with no_leftovers(tmp_path):
        run_to_its_end(tmp_path, kernel, (32, "Split"), end, scale(300.0, 7200.0))


@contextmanager
def endless(directory: Path, vcpus: int, placement: str) -> Iterator[Microvm]:
    """A guest that sends fixed interrupts to each other processor for ever, once it has put its S."""
    kernel = build("ipi", {"CPUS": vcpus, "ROUNDS": FOREVER, "NMIS": 1, "RESTARTS": 1})
    with launch_unjailed(directory) as vm:
        vm.wait_for_api()
        vm.must("PUT", "/boot-source", {"kernel_image_path": str(kernel)})
        machine = {"vcpu_count": vcpus, "mem_size_mib": 64, "vcpu_placement": placement}
        vm.must("PUT", "/machine-config", machine)
        vm.must("PUT", "/actions", {"action_type": "InstanceStart"})
        yield vm


def wait_for_exits(vm: Microvm) -> list[dict[str, Any]]:
    """Wait until every ghost runs its stub; return GET /vcpus."""
    deadline = time.monotonic() + 60.0
    while True:
        vcpus: list[dict[str, Any]] = vm.must("GET", "/vcpus")
        if all(ghost["stub"] for vcpu in vcpus for ghost in vcpu["ghosts"]):
            return vcpus
        assert time.monotonic() < deadline, vcpus
        assert vm.process.poll() is None, vm.tail()


def test_vcpus_tell_where_they_run(tmp_path, no_leftovers):
    with no_leftovers(), endless(tmp_path, 4, "0,3/1/2") as vm:
        vcpus = wait_for_exits(vm)
        assert [each["index"] for each in vcpus] == [0, 1, 2, 3]
        assert [each["worker"] for each in vcpus] == [0, 1, 2, 0]
        assert {each["placement"] for each in vcpus} == {"Mixed"}
        assert {each["state"] for each in vcpus} == {"running"}
        # Both clocks are read one after the other, by threads that may have to wait for a CPU meanwhile.
        assert vcpus[0]["clock_ahead_ns"] == 0
        assert all(abs(each["clock_ahead_ns"]) < 1_000_000_000 for each in vcpus)
        pids = [each["pid"] for each in vcpus]
        assert len(set(pids)) == 3
        assert set(pids) <= set(descendants(vm.process.pid))
        assert [[ghost["vcpu"] for ghost in each["ghosts"]] for each in vcpus] == [[1, 2], [0, 2, 3], [0, 1, 3], [1, 2]]
        assert not any(ghost["recoveries"] for each in vcpus for ghost in each["ghosts"])
        vm.must("PATCH", "/vm", {"state": "Paused"})
        assert {each["state"] for each in vm.must("GET", "/vcpus")} == {"paused"}


@pytest.mark.soak("smp")
def test_pauses_lose_no_interrupt(tmp_path, scale, seed, no_leftovers):
    """The guest ends itself when one does not come, or comes twice: it must still run in the end."""
    generator = random.Random(seed)
    with no_leftovers(), endless(tmp_path, 3, "Split") as vm:
        wait_for_exits(vm)
        for _ in range(scale(60, 1_000)):
            vm.must("PATCH", "/vm", {"state": "Paused"})
            vm.must("PATCH", "/vm", {"state": "Resumed"})
            time.sleep(generator.random() * 0.01)
        assert vm.must("GET", "/")["state"] == "Running"
        assert "IPI" not in without_log(vm.console), vm.tail()


@pytest.mark.parametrize(("vcpus", "placement"), [(2, "Grouped"), (2, "Split"), (3, "Split"), (3, "0,1/2")])
def test_a_pause_between_init_and_sipi(tmp_path, no_leftovers, vcpus, placement):
    """The INIT reaches the real processor before the microVM is quiescent; the SIPI that comes afterwards starts it."""
    kernel = build("init", {"CPUS": vcpus})
    with no_leftovers(), launch_unjailed(tmp_path) as vm:
        vm.wait_for_api()
        vm.must("PUT", "/boot-source", {"kernel_image_path": str(kernel)})
        machine = {"vcpu_count": vcpus, "mem_size_mib": 64, "vcpu_placement": placement}
        vm.must("PUT", "/machine-config", machine)
        vm.must("PUT", "/actions", {"action_type": "InstanceStart"})
        for number in range(1, 3):
            wait_for_letters(vm, "I", number)
            for _ in range(3):
                vm.must("PATCH", "/vm", {"state": "Paused"})
                vm.must("PATCH", "/vm", {"state": "Resumed"})
            vm.type("x")
            wait_for_letters(vm, "S", number)
        assert vm.wait(60.0) == 0
        assert "INIT DONE" in without_log(vm.console), vm.tail()


def wait_for_letters(vm: Microvm, letter: str, count: int) -> None:
    """Wait until the guest has written this line so often. The log, which has the same output, may be in its middle."""
    deadline = time.monotonic() + 60.0
    while without_log(vm.console).count(f"{letter}\n") < count:
        assert vm.pump(0.1) or time.monotonic() < deadline, vm.tail()
        assert vm.process.poll() in (None, 0), vm.tail()
        assert time.monotonic() < deadline, vm.tail()


@pytest.mark.parametrize("worker", [0, 1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_end_of_any_worker_ends_the_microvm_with_its_cause(tmp_path, no_leftovers, worker, number):
    with no_leftovers(), endless(tmp_path, 3, "Split") as vm:
        pid = next(each["pid"] for each in wait_for_exits(vm) if each["worker"] == worker)
        os.kill(pid, number)
        assert vm.wait(30.0) != 0
        output = vm.console.decode(errors="replace")
    assert f"Worker vcpu {worker} (pid {pid}) was ended by signal {number.name}" in output, output[-2500:]
    assert f"vCPU {worker}: last exit " in output


@pytest.mark.slow
def test_most_workers_are_paused_and_one_is_replaced(tmp_path, no_leftovers):
    with no_leftovers(), endless(tmp_path, 32, "Split") as vm:
        pids = {each["pid"] for each in wait_for_exits(vm)}
        assert len(pids) == 32
        vm.must("PATCH", "/vm", {"state": "Paused"})
        vm.must("PATCH", "/vm", {"state": "Resumed"})
        vm.must("PATCH", "/vcpus/31", {"action": "Replace"})
        assert vm.must("GET", "/vcpus")[31]["pid"] not in pids
