"""Must-show 2: processors that must agree under load, while the microVM is disturbed at random."""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Callable

import pytest

from lab.client import Microvm, without_log
from tests.harness.debian import BOOT_TIMEOUT, CGROUP_OPTIONS, COMPLAINTS, SOAK_ONLY, config, jail, run
from tests.harness.run_options import SOAK

#: Does something to a running microVM that its guest must not notice; called again and again.
Disturb = Callable[[Microvm, random.Random], None]


def pause_and_resume(vm: Microvm, generator: random.Random) -> None:
    vm.must("PATCH", "/vm", {"state": "Paused"})
    time.sleep(generator.random() * 0.03)
    vm.must("PATCH", "/vm", {"state": "Resumed"})
    time.sleep(generator.random())


def replace_a_worker(vm: Microvm, generator: random.Random) -> None:
    vcpus = len(vm.must("GET", "/vcpus"))
    vm.must("PATCH", f"/vcpus/{generator.randrange(vcpus)}", {"action": "Replace"})
    time.sleep(generator.random())


def stress(vm: Microvm, seconds: int, disturb: Disturb, generator: random.Random) -> dict[str, int]:
    """Run the stress program for so long and disturb the microVM meanwhile; return what the program counted."""
    vm.type(f"stress {seconds}\n")
    deadline = time.monotonic() + 4 * seconds + 240
    disturbances = 0
    while not vm.has_come("STRESS done"):
        assert time.monotonic() < deadline, f"the guest hangs after {disturbances} disturbances:\n{vm.tail()}"
        disturb(vm, generator)
        disturbances += 1
    output = without_log(vm.expect("CELLBLOCK-RUN end", 60.0))
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


def move_serial_interrupt(vm: Microvm, lines: int, replace_every: int, generator: random.Random) -> None:
    """Must-show 9: type text while the UART's interrupt goes from processor to processor a hundred times a second.

    Every byte arrives once, and both processors take interrupts. Every so many lines a worker is replaced while the
    next one is typed. The kernel's own messages, which would come between the letters, are read in the end.
    """
    run(vm, "echo 0 > /proc/sys/kernel/printk")  # not even those of the highest level, which dmesg -n 1 lets through
    run(vm, "irq=$(awk -F: '/ttyS0/ { print $1 + 0 }' /proc/interrupts); echo $irq > /irq; grep ttyS0 /proc/interrupts")
    run(vm, "(while :; do for m in 1 2; do echo $m > /proc/irq/$(cat /irq)/smp_affinity; usleep 10000; done; done) &")
    text = "".join(f"{generator.randbytes(30).hex()}\n" for _ in range(lines))
    vm.type("cat > /typed\n")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        vm.type(line)
        if replace_every and number % replace_every == 0:
            vm.must("PATCH", f"/vcpus/{generator.randrange(2)}", {"action": "Replace"})
        vm.expect(line.strip(), 60.0)  # its echo
        time.sleep(0.1)  # else the driver's handler goes on with the next line: interrupts are what is to be moved
    vm.type("\x04")
    vm.expect("CELLBLOCK-RUN end", 60.0)
    output = run(vm, "md5sum /typed; grep ttyS0 /proc/interrupts")
    assert hashlib.md5(text.encode()).hexdigest() in output, output
    counts = re.search(r"^\s*\d+:\s+(\d+)\s+(\d+) .*ttyS0", output, re.MULTILINE)
    assert counts, output
    assert min(map(int, counts.groups())) > 0, output
    assert "\nno complaint" in run(vm, COMPLAINTS)


@pytest.mark.timeout(0 if SOAK else 900)  # a busy host makes a guest twenty times slower
@pytest.mark.soak("smp")
@pytest.mark.parametrize(
    "what",
    [
        (2, pause_and_resume),
        pytest.param((4, pause_and_resume), marks=SOAK_ONLY),
        (2, replace_a_worker),
        pytest.param((4, replace_a_worker), marks=SOAK_ONLY),
    ],
    ids=lambda what: f"{what[0]}-{what[1].__name__}",
)
def test_stress_while_the_microvm_is_disturbed(guest_image, no_leftovers, scale, seed, what):
    vcpus, disturb = what
    name = f"stress-{vcpus}"
    with jail(name) as made, no_leftovers(names=(name,)):
        machine = {"vcpu_count": vcpus, "vcpu_placement": "Split"}
        path = config(made, guest_image, machine, "", "stay", programs=("stress",), patient=True)
        with made.launch((*CGROUP_OPTIONS, "--cleanup"), ("--config-file", path)) as vm:
            vm.expect("CELLBLOCK-READY", scale(BOOT_TIMEOUT, 10 * BOOT_TIMEOUT))
            check_counts(stress(vm, scale(20, 600), disturb, random.Random(seed)))
            assert "\nno complaint" in run(vm, COMPLAINTS)
            assert not any(ghost["recoveries"] for vcpu in vm.must("GET", "/vcpus") for ghost in vcpu["ghosts"])
            vm.type("exit\n")
            vm.expect("CELLBLOCK-DONE", 60.0)
            assert vm.wait(60.0) == 0


@pytest.mark.timeout(0 if SOAK else 900)
@pytest.mark.soak("smp")
@pytest.mark.parametrize("replace_every", [0, 3])
def test_serial_interrupt_moves_while_text_is_typed(guest_image, no_leftovers, scale, seed, replace_every):
    """Must-show 9. Both workers get interrupts, and every byte arrives once; also while workers are replaced."""
    name = f"move-serial-{replace_every}"
    with jail(name) as made, no_leftovers(names=(name,)):
        machine = {"vcpu_count": 2, "vcpu_placement": "Split"}
        path = config(made, guest_image, machine, "", "stay", patient=True)
        with made.launch((*CGROUP_OPTIONS, "--cleanup"), ("--config-file", path)) as vm:
            vm.expect("CELLBLOCK-READY", scale(BOOT_TIMEOUT, 10 * BOOT_TIMEOUT))
            move_serial_interrupt(vm, scale(20, 600), replace_every, random.Random(seed))
            vm.type("exit\n")
            vm.expect("CELLBLOCK-DONE", 60.0)
            assert vm.wait(60.0) == 0
