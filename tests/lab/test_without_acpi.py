"""Debian without ACPI: from the MP table, or with nothing but the 8259s and the 8254; and without SMP."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import pytest

from lab.client import without_log
from lab.debian import ensure_kernel
from lab.image import METAPACKAGE
from lab.vmlinux import ensure_vmlinux
from tests.harness.debian import BOOT_TIMEOUT, CGROUP_OPTIONS, config, jail

SOAK_ONLY = pytest.mark.soak("smp", only=True)
ONE = {"vcpu_count": 1}
SPLIT = {"vcpu_count": 2, "vcpu_placement": "Split"}
GROUPED = {"vcpu_count": 2, "vcpu_placement": "Grouped"}
MIXED = {"vcpu_count": 3, "vcpu_placement": "0,2/1"}
#: Kernel arguments, machine, and what /proc/interrupts says of COM1's chip and of the timer that ticks. Debian's other
#: kernel, unlike the cloud one, reads MP tables.
MP_TABLE: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "acpi-off-split": ("acpi=off", SPLIT, "IO-APIC", "LOC"),
    "acpi-off-grouped": ("acpi=off", GROUPED, "IO-APIC", "LOC"),
    "noapic-split": ("noapic acpi=off", SPLIT, "XT-PIC", "LOC"),
    "noapic-grouped": ("noapic acpi=off", GROUPED, "XT-PIC", "LOC"),
    "acpi-off-one": ("acpi=off", ONE, "IO-APIC", "LOC"),
    "noapic-one": ("noapic acpi=off", ONE, "XT-PIC", "LOC"),
    "noapic-mixed": ("noapic acpi=off", MIXED, "XT-PIC", "LOC"),
    "nosmp-acpi-off": ("nosmp acpi=off", SPLIT, "XT-PIC", "LOC"),
}
#: What an everyday run tries: the shapes that differ most.
EVERY_DAY = ("acpi-off-split", "noapic-grouped", "noapic-split")
#: The cloud kernel goes back to the oldest way: one processor, no APIC at all, ticks of the PIT.
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "acpi-off-one": ("acpi=off", ONE),
    "acpi-off-split": ("acpi=off", SPLIT),
    "noapic-grouped": ("noapic acpi=off", GROUPED),
}


class OtherKernel:
    """The guest image with Debian's kernel for all machines, which the lab boots, too."""

    def __init__(self, guest_image: Any) -> None:
        self.vmlinux: Path = ensure_vmlinux(ensure_kernel(METAPACKAGE))
        self.initramfs: Path = guest_image.initramfs


def run(image: Any, machine: dict[str, Any], arguments: str, commands: str, until: str) -> str:
    """Boot, run shell commands, and return the console's output up to ``until``; the guest ends with code 0."""
    with jail("without-acpi") as made:
        path = config(made, image, machine, commands, "reboot", arguments=arguments)
        with made.launch((*CGROUP_OPTIONS, "--cleanup"), ("--config-file", path, "--no-api")) as vm:
            output = vm.expect(until, BOOT_TIMEOUT)
            assert vm.wait(60.0) == 0, vm.tail()
    return without_log(output).replace("\r\n", "\n")


def interrupts(output: str, name: str) -> list[int]:
    """Return the counts of a line of /proc/interrupts, one per CPU."""
    found = re.search(rf"^ *{name}: +([\d ]+?) *(?: [A-Za-z].*)?$", output, re.MULTILINE)
    assert found, output
    return [int(count) for count in found.group(1).split()]


def cases(names: Iterable[str], every_day: Container[str]) -> list[Any]:
    """All of them are for the soak, some for every day."""
    return [pytest.param(name, marks=() if name in every_day else SOAK_ONLY) for name in names]


@pytest.mark.parametrize("case", cases(MP_TABLE, EVERY_DAY))
def test_debian_boots_from_the_mp_table(guest_image, no_leftovers, case):
    arguments, machine, chip, timer = MP_TABLE[case]
    with no_leftovers(names=("without-acpi",)):
        output = run(OtherKernel(guest_image), machine, arguments, "nproc; cat /proc/interrupts", "CELLBLOCK-DONE")
    cpus = 1 if "nosmp" in arguments else machine["vcpu_count"]
    assert re.search(rf"^{cpus}$", output, re.MULTILINE), output
    assert re.search(rf"^ *4: .* {chip}\b.*ttyS0$", output, re.MULTILINE), output
    assert sum(interrupts(output, "4")) > 0
    ticks = interrupts(output, timer)
    assert len(ticks) == cpus and all(ticks), output


@pytest.mark.parametrize("case", cases(PLAIN, ("acpi-off-one",)))
def test_debian_boots_with_the_8259_and_the_8254_alone(guest_image, no_leftovers, case):
    arguments, machine = PLAIN[case]
    with no_leftovers(names=("without-acpi",)):
        output = run(guest_image, machine, arguments, "nproc; cat /proc/interrupts", "CELLBLOCK-DONE")
    assert re.search(r"^1$", output, re.MULTILINE), output
    assert re.search(r"^ *0: .* XT-PIC .*timer$", output, re.MULTILINE), output
    assert interrupts(output, "0")[0] > 100
    assert interrupts(output, "4")[0] > 0
    assert interrupts(output, "LOC") == [0]


@pytest.mark.parametrize("machine", [pytest.param(ONE, id="1", marks=SOAK_ONLY), pytest.param(SPLIT, id="2")])
def test_debian_without_smp_reaches_its_init(guest_image, no_leftovers, machine):
    """With ACPI tables of a hardware-reduced machine Linux takes no 8259, and with nosmp no IOAPIC: no line of a device
    interrupts, the console cannot be opened, and init runs without one. It can write to the kernel's log.
    """
    with no_leftovers(names=("without-acpi",)):
        output = run(guest_image, machine, "nosmp", 'echo "<0>init sees $(nproc) CPU" >/dev/kmsg', "init sees 1 CPU")
    assert "init sees 1 CPU" in output
