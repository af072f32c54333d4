"""Host CPUs of vCPUs, as the kernel sees them: of each thread, after a replacement, where one is not to be had."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lab.client import launch_unjailed
from tests.guests.build import build
from tests.harness.workers import Controller, nothing_written
from vmm.placement import cpulist

CPUS = sorted(os.sched_getaffinity(0))
FIRST, LAST = CPUS[0], CPUS[-1]
#: No machine that runs the tests has so many.
ABSENT = 8191


def allowed(pid: int) -> dict[str, str]:
    """Return the CPUs of each thread, by its name."""
    found: dict[str, str] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        found[lines["Name"].strip()] = lines["Cpus_allowed_list"].strip()
    return found


def test_every_thread_runs_where_it_may(tmp_path, no_leftovers):
    """Two vCPUs share a worker, one has its own; a worker that takes another one's place is bound in the same way."""
    first, last, both = (cpulist(sorted(cpus)) for cpus in ({FIRST}, {LAST}, {FIRST, LAST}))
    wanted = {0: (first, last, both), 1: (last, last, last), 2: (last, first, both)}
    affinity = f"{first}/{last}/{last}"
    with no_leftovers(), launch_unjailed(tmp_path) as vm:
        vm.wait_for_api()
        vm.must("PUT", "/boot-source", {"kernel_image_path": str(build("spin"))})
        machine = {"vcpu_count": 3, "mem_size_mib": 64, "vcpu_placement": "0,2/1", "vcpu_affinity": affinity}
        vm.must("PUT", "/machine-config", machine)
        assert vm.must("GET", "/machine-config")["vcpu_affinity"] == affinity
        vm.must("PUT", "/actions", {"action_type": "InstanceStart"})
        for _ in range(2):
            vcpus = vm.must("GET", "/vcpus")
            assert [each["affinity"] for each in vcpus] == [[FIRST], [LAST], [LAST]]
            for index, (own, _, rest) in wanted.items():
                threads = allowed(vcpus[index]["pid"])
                assert threads.pop(f"fc_vcpu {index}") == own
                # KVM's own thread (huge page recovery) goes where the thread goes that ran a vCPU first.
                others = {cpus for name, cpus in threads.items() if not name.startswith(("fc_vcpu", "kvm-"))}
                assert others == {rest if index != 1 else last}, threads
            vm.must("PATCH", "/vcpus", {"action": "Replace"})
        assert set(allowed(vm.process.pid).values()) == {cpulist(CPUS)}  # who started it is not bound


def test_cpus_that_are_not_to_be_had_are_refused(tmp_path, no_leftovers):
    with no_leftovers(), launch_unjailed(tmp_path) as vm:
        vm.wait_for_api()
        before = vm.must("GET", "/machine-config")
        reply = vm.api("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64, "vcpu_affinity": f"{ABSENT}"})
        assert reply.status == 400
        expected = f"names host CPU {ABSENT}; this microVM may use {cpulist(CPUS)}."
        assert expected in reply.body["fault_message"]
        assert vm.must("GET", "/machine-config") == before


@pytest.mark.parametrize("cpus", [(ABSENT,), (FIRST, ABSENT)])
def test_a_worker_that_cannot_be_bound_says_so(tmp_path, no_leftovers, cpus):
    """The kernel refuses the first set and silently makes the second one smaller."""
    with no_leftovers(), Controller(tmp_path, nothing_written, affinity=(cpus,)) as worker:
        worker.greet()
        worker.send_descriptors()
        for command in (*worker.changes(), worker.configuration()):
            refusal = worker.refused(command)
            assert refusal.code == "worker.affinity"
            assert f"vCPU 0: host CPU {ABSENT} may not be used" in refusal.text
