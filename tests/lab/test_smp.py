"""Debian with several vCPUs: each in a process of its own (split), all in one (grouped), and in between."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lab.client import without_log
from lab.guest_image import archive
from tests.harness.debian import BOOT_TIMEOUT, CGROUP_OPTIONS, COMPLAINTS, SOAK_ONLY, config, jail, run
from tests.harness.run_options import SOAK

REPORT = (
    "nproc; grep -c ^processor /proc/cpuinfo; grep -E 'apicid|siblings|cpu cores' /proc/cpuinfo | sort | uniq -c; "
    "cat /sys/devices/system/cpu/online; cat /sys/devices/system/clocksource/clocksource0/current_clocksource"
)
PINNED = (
    "for c in $(seq 0 $(($(nproc) - 1))); do taskset $(printf %x $((1 << c))) "
    "sh -c 'i=0; while [ $i -lt 2000 ]; do i=$((i + 1)); done; "
    'echo pinned $(cut -d" " -f39 /proc/self/stat)\'; done'
)


def cycles(count: int) -> str:
    """Take every CPU but the first off line and on line again."""
    return (
        f"for n in $(seq {count}); do for c in $(seq 1 $(($(grep -c ^processor /proc/cpuinfo) - 1))); do "
        "echo 0 > /sys/devices/system/cpu/cpu$c/online || echo failed; echo 1 > /sys/devices/system/cpu/cpu$c/online "
        "|| echo failed; done; done; cat /sys/devices/system/cpu/online"
    )


def check_report(output: str, vcpus: int) -> None:
    numbers = re.findall(r"^(\d+)\r?$", output, re.MULTILINE)
    assert numbers[:2] == [str(vcpus)] * 2, output
    assert re.search(rf"^{'0' if vcpus == 1 else f'0-{vcpus - 1}'}\r?$", output, re.MULTILINE), output
    for vcpu in range(vcpus):
        assert re.search(rf"^\s+1 apicid\s+: {vcpu}\r?$", output, re.MULTILINE), output
        assert re.search(rf"^pinned {vcpu}\r?$", output, re.MULTILINE), output


def run_to_its_end(made: Any, path: str, timeout: float) -> str:
    """Run a guest that reboots when it has done what it was given; return, and print, what was said."""
    options = (*CGROUP_OPTIONS, "--cleanup")
    with made.launch(options, ("--config-file", path, "--no-api", "--level", "Debug")) as vm:
        output: str = vm.expect("CELLBLOCK-DONE", timeout)
        assert vm.wait(60.0) == 0, vm.tail()
    print(output)
    return output


@pytest.mark.timeout(0 if SOAK else 900)
@pytest.mark.soak("smp")
@pytest.mark.parametrize(
    ("vcpus", "placement"),
    [
        (2, "Grouped"),
        (2, "Split"),
        pytest.param(3, None, marks=SOAK_ONLY),
        pytest.param(3, "Grouped", marks=SOAK_ONLY),
        pytest.param(3, "0,2/1", marks=SOAK_ONLY),
        pytest.param(4, "Split", marks=SOAK_ONLY),
        pytest.param(4, "Grouped", marks=SOAK_ONLY),
        pytest.param(4, "0,1/2,3", marks=SOAK_ONLY),
        pytest.param(8, "Split", marks=SOAK_ONLY),
        pytest.param(8, "Grouped", marks=SOAK_ONLY),
        pytest.param(8, "0,1,2/3,4/5,6,7", marks=SOAK_ONLY),
    ],
)
def test_debian_boots_with_several_vcpus(guest_image, no_leftovers, scale, vcpus, placement):
    name = f"smp-{vcpus}-{(placement or 'automatic').replace(',', '').replace('/', '-').lower()}"
    with jail(name) as made, no_leftovers(names=(name,)):
        script = f"{REPORT}; {PINNED}; {COMPLAINTS}; {cycles(3)}; {COMPLAINTS}"
        machine = {"vcpu_count": vcpus, **({} if placement is None else {"vcpu_placement": placement})}
        path = config(made, guest_image, machine, script, "reboot")
        output = run_to_its_end(made, path, scale(BOOT_TIMEOUT, 10 * BOOT_TIMEOUT))
    kind = {"Grouped": "Grouped", "Split": "Split", None: "Split"}.get(placement, "Mixed")
    assert f"vCPU placement: {kind}" in output
    output = without_log(output)
    check_report(output, vcpus)
    assert output.count("\nno complaint") == 2, output
    assert not re.search(r"^failed", output, re.MULTILINE), output


@pytest.mark.timeout(0)
@SOAK_ONLY
def test_debian_that_uses_xapic(guest_image, no_leftovers):
    """Its interrupts have logical destinations, IPIs and those of devices, which ghosts in x2APIC mode understand."""
    with jail("smp-xapic") as made, no_leftovers(names=("smp-xapic",)):
        flag = "echo x2apic $(grep -wc x2apic /proc/cpuinfo)"
        script = f"{REPORT}; {PINNED}; {COMPLAINTS}; {cycles(3)}; {COMPLAINTS}; {flag}"
        machine = {"vcpu_count": 3, "vcpu_placement": "Split"}
        path = config(made, guest_image, machine, script, "reboot", arguments="nox2apic")
        output = without_log(run_to_its_end(made, path, 10 * BOOT_TIMEOUT))
    assert "\nx2apic 0" in output
    check_report(output, 3)
    assert output.count("\nno complaint") == 2, output
    assert not re.search(r"^failed", output, re.MULTILINE), output


@pytest.mark.timeout(0)
@SOAK_ONLY
@pytest.mark.parametrize("placement", ["Split", "0,2/1,3"])
def test_debian_sees_two_threads_a_core(guest_image, no_leftovers, placement):
    """Also where the threads of a core are in different workers."""
    name = f"smt-{placement.replace(',', '').replace('/', '-').lower()}"
    with jail(name) as made, no_leftovers(names=(name,)):
        lists = "grep . /sys/devices/system/cpu/cpu*/topology/thread_siblings_list"
        machine = {"vcpu_count": 4, "vcpu_placement": placement, "smt": True}
        path = config(made, guest_image, machine, f"{REPORT}; {PINNED}; {lists}; {COMPLAINTS}", "reboot")
        output = without_log(run_to_its_end(made, path, 10 * BOOT_TIMEOUT))
    check_report(output, 4)
    assert re.search(r"^\s+4 siblings\s+: 4\r?$", output, re.MULTILINE), output
    assert re.search(r"^\s+4 cpu cores\s+: 2\r?$", output, re.MULTILINE), output
    siblings = re.findall(r"cpu(\d)/topology/thread_siblings_list:(\S+)", output)
    assert siblings == [("0", "0-1"), ("1", "0-1"), ("2", "2-3"), ("3", "2-3")], output
    assert output.count("\nno complaint") == 1, output


@pytest.mark.timeout(0)
@SOAK_ONLY
@pytest.mark.parametrize("placement", ["Split", "0,1/2"])
def test_another_kernel_is_started_from_the_first(guest_image, no_leftovers, placement):
    """kexec: the new kernel finds all processors halted, and starts them by INIT and SIPI as if they were off."""
    name = f"kexec-{placement.replace(',', '').replace('/', '-').lower()}"
    with jail(name) as made, no_leftovers(names=(name,)):
        second = f"cat /proc/uptime; {REPORT}; {PINNED}; {COMPLAINTS}; {cycles(1)}; {COMPLAINTS}"
        files = {
            "next/bzImage": guest_image.vmlinuz.read_bytes(),
            "next/initramfs": guest_image.initramfs.read_bytes() + archive({"cellblock/script": second.encode()}),
        }
        first = f"{PINNED}; echo first kernel has $(nproc); kexec /next/bzImage /next/initramfs"
        machine = {"vcpu_count": 3, "vcpu_placement": placement, "mem_size_mib": 512}
        path = config(made, guest_image, machine, first, "reboot", programs=("kexec",), files=files)
        options = (*CGROUP_OPTIONS, "--cleanup")
        with made.launch(options, ("--config-file", path, "--no-api", "--level", "Debug")) as vm:
            before = without_log(vm.expect("first kernel has 3", 10 * BOOT_TIMEOUT))
            output = without_log(vm.expect("CELLBLOCK-DONE", 10 * BOOT_TIMEOUT))
            assert vm.wait(60.0) == 0, vm.tail()
    print(output)
    assert before.count("CELLBLOCK-INIT") == 1 == output.count("CELLBLOCK-INIT")
    check_report(output, 3)
    assert output.count("\nno complaint") == 2, output
    assert not re.search(r"^failed", output, re.MULTILINE), output


@pytest.mark.timeout(0)
@SOAK_ONLY
def test_split_guest_is_paused_and_resumed_under_load(guest_image, no_leftovers):
    """The cut is consistent: no ghost holds anything, and the guest goes on without a complaint."""
    rounds = 200
    with jail("smp-pause") as made, no_leftovers(names=("smp-pause",)):
        path = config(made, guest_image, {"vcpu_count": 3, "vcpu_placement": "Split"}, "", "stay")
        with made.launch((*CGROUP_OPTIONS, "--cleanup"), ("--config-file", path)) as vm:
            vm.expect("CELLBLOCK-READY", BOOT_TIMEOUT)
            run(vm, "for c in 1 2 3; do (while :; do cat /proc/uptime | cat >/dev/null; done) & done")
            for _ in range(rounds):
                vm.must("PATCH", "/vm", {"state": "Paused"})
                vm.must("PATCH", "/vm", {"state": "Resumed"})
            output = run(vm, f"cat /sys/devices/system/cpu/online; {COMPLAINTS}")
            assert "\nno complaint" in output
            assert re.search(r"^0-2\r?$", output, re.MULTILINE)
            vm.type("exit\n")
            vm.expect("CELLBLOCK-DONE", 60.0)
            assert vm.wait(60.0) == 0
