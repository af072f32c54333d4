"""Bare-metal guests with several vCPUs, with and without second-stage paging: IPIs, attacks, moved interrupts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.client import Microvm, launch_unjailed, without_log
from tests.guests.build import build
from tests.harness.microvms import smp_config

FLOOD, ASTRAY, FLOOD_WITH_SMIS, FLOOD_WITHOUT_NMIS = range(4)
#: So many rounds never end within a test.
FOREVER = 1 << 30


@contextmanager
def hostile(directory: Path, vcpus: int, placement: str, attack: int, rounds: int) -> Iterator[Microvm]:
    kernel = build("hostile", {"CPUS": vcpus, "ATTACK": attack, "ROUNDS": rounds})
    with launch_unjailed(directory, ["--config-file", str(smp_config(directory, kernel, vcpus, placement))]) as vm:
        vm.wait_for_api()
        yield vm


def ghosts(vm: Microvm) -> list[dict[str, Any]]:
    return [ghost for vcpu in vm.must("GET", "/vcpus") for ghost in vcpu["ghosts"]]


def recoveries_logged(vm: Microvm) -> int:
    return len(re.findall(rb"left its stub \(it ran other code than the stub: [^)]*\) and was put back", vm.console))


def assert_led_astray(vm: Microvm) -> None:
    """The NMI that the guest sends while it looks whether it was successful may do it once more."""
    recoveries = sum(ghost["recoveries"] for ghost in ghosts(vm))
    assert recoveries in (1, 2)
    assert recoveries_logged(vm) == recoveries


def every_kind(vcpus: int, placement: str, mode: str, **counts: int) -> tuple[Path, str]:
    """Return the guest that sends every kind, its LAPICs in ``mode``, and what it says at its end."""
    # A ghost is in x2APIC mode, and to it xAPIC's destination of all processors is number 255 (docs/smp.md).
    broadcast = mode == "x2APIC" or placement == "Grouped"
    symbols = {"CPUS": vcpus, "XAPIC": int(mode == "xAPIC"), "BROADCAST": int(broadcast), **counts}
    return build("ipi", symbols), f"SFLCM{'B' * broadcast}YOAXNPR IPI DONE"


def run_to_its_end(directory: Path, kernel: Path, shape: tuple[int, str], end: str, timeout: float) -> None:
    """Run a guest with (vCPUs, placement) that resets its machine when it has said ``end``."""
    config = smp_config(directory, kernel, *shape)
    with launch_unjailed(directory, ["--config-file", str(config), "--no-api"]) as vm:
        status = vm.wait(timeout)
        config.unlink()
    assert end in without_log(vm.console), vm.tail()
    assert status == 0


def run_retargeting(directory: Path, vcpus: int, placement: str, rounds: int, timeout: float) -> int:
    """Run a guest that moves a device's interrupt between its processors while it fires.

    Return how often it wrote the IOAPIC's entry. The guest counts what arrives, and says so for each.
    """
    kernel = build("retarget", {"CPUS": vcpus, "ROUNDS": rounds, "MOVES": rounds // 4})
    config = smp_config(directory, kernel, vcpus, placement)
    with launch_unjailed(directory, ["--config-file", str(config), "--no-api"]) as vm:
        status = vm.wait(timeout)
        config.unlink()
    found = re.search(r"(\.+)([0-9a-f]{8}) RETARGET DONE", without_log(vm.console))
    assert found, vm.tail()
    assert len(found.group(1)) >= rounds - 1
    moves = int(found.group(2), 16)
    print(f"{vcpus} vCPUs, {placement}: {len(found.group(1))} interrupts, the entry was written {moves} times")
    assert status == 0
    return moves
