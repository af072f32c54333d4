"""External interrupts of the 8259s on a real KVM: into vCPU 0 in every placement, and while its worker is replaced."""

from __future__ import annotations

import pytest

from lab.client import Microvm, launch_unjailed, without_log
from tests.guests.build import build
from tests.harness.jail import wait_for
from tests.harness.microvms import smp_config

#: So many rounds never end within a test.
FOREVER = 1 << 30


@pytest.mark.parametrize(
    ("vcpus", "placement"),
    [(1, "Split"), (2, "Grouped"), (2, "Split"), pytest.param(3, "0,2/1", marks=pytest.mark.slow)],
)
def test_ticks_and_the_uart_interrupt_vcpu_0(tmp_path, scale, no_leftovers, vcpus, placement):
    """Halted, with interrupts off and on, masked, before the end of interrupt, by priority (tests/guests/pic.S)."""
    kernel = build("pic", {"CPUS": vcpus, "ROUNDS": scale(50, 5000)})
    config = smp_config(tmp_path, kernel, vcpus, placement)
    with no_leftovers(tmp_path), launch_unjailed(tmp_path, ["--config-file", str(config), "--no-api"]) as vm:
        status = vm.wait(scale(120.0, 1200.0))
        config.unlink()
    assert "himes PIC DONE" in without_log(vm.console), vm.tail()
    assert status == 0


def exits(vm: Microvm) -> int:
    """Exits of vCPU 0: a tick makes some."""
    return int(vm.must("GET", "/vcpus")[0]["exits"])


def await_ticks(vm: Microvm) -> None:
    counted = exits(vm)
    wait_for(lambda: exits(vm) > counted + 10, "a tick", 60.0)


@pytest.mark.soak("smp")
@pytest.mark.parametrize(("vcpus", "placement"), [(1, "Split"), pytest.param(2, "Split", marks=pytest.mark.slow)])
def test_a_worker_that_is_replaced_loses_no_tick(tmp_path, scale, no_leftovers, vcpus, placement):
    """The next tick comes only after the end of the one before: a lost one would be the last."""
    kernel = build("pic", {"CPUS": vcpus, "ROUNDS": FOREVER})
    config = smp_config(tmp_path, kernel, vcpus, placement)
    with no_leftovers(), launch_unjailed(tmp_path, ["--config-file", str(config)]) as vm:
        vm.wait_for_api()
        for _ in range(scale(10, 200)):
            await_ticks(vm)
            vm.must("PATCH", "/vcpus/0", {"action": "Replace"})
        await_ticks(vm)
        vm.process.terminate()
        vm.wait()
