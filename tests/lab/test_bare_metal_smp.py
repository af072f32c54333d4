"""The bare-metal guests of tests/kvm where KVM has second-stage paging: IPIs and NMIs, attacks, moved interrupts.

There a renewed INIT is trapped by single-stepping, and ring 0 runs natively.
"""

from __future__ import annotations

import pytest

from lab.client import without_log
from tests.harness.bare_metal import (
    ASTRAY,
    FLOOD,
    assert_led_astray,
    every_kind,
    ghosts,
    hostile,
    run_retargeting,
    run_to_its_end,
)
from tests.harness.debian import BOOT_TIMEOUT, SOAK_ONLY


@pytest.mark.soak("smp")
@pytest.mark.parametrize(
    ("vcpus", "placement", "mode"),
    [
        (2, "Split", "x2APIC"),
        (2, "Split", "xAPIC"),
        pytest.param(2, "Grouped", "x2APIC", marks=SOAK_ONLY),
        pytest.param(4, "Split", "x2APIC", marks=SOAK_ONLY),
        pytest.param(4, "0,1/2,3", "x2APIC", marks=SOAK_ONLY),
        pytest.param(4, "0,1/2,3", "xAPIC", marks=SOAK_ONLY),
    ],
)
def test_every_kind_of_ipi_arrives_once(tmp_path, scale, no_leftovers, vcpus, placement, *, mode):
    rounds = scale(100, 10_000)
    kernel, end = every_kind(vcpus, placement, mode, ROUNDS=rounds, NMIS=rounds, RESTARTS=scale(3, 1_000))
    with no_leftovers(tmp_path):
        run_to_its_end(tmp_path, kernel, (vcpus, placement), end, scale(BOOT_TIMEOUT, 7200.0))


@SOAK_ONLY
@pytest.mark.parametrize(("vcpus", "placement"), [(3, "Split"), (4, "0,2/1,3")])
def test_interrupts_arrive_once_while_they_are_moved(tmp_path, no_leftovers, vcpus, placement):
    with no_leftovers(tmp_path):
        run_retargeting(tmp_path, vcpus, placement, 5_000, 7200.0)


@SOAK_ONLY
@pytest.mark.parametrize(("vcpus", "placement"), [(2, "Split"), (4, "0,1/2,3")])
def test_a_flood_harms_nobody(tmp_path, no_leftovers, vcpus, placement):
    with no_leftovers(), hostile(tmp_path, vcpus, placement, FLOOD, 100) as vm:
        vm.expect("HOSTILE DONE", 3600.0)
        assert "SFP HOSTILE DONE" in without_log(vm.console)
        assert all(ghost["stub"] for ghost in ghosts(vm))
        vm.must("PATCH", "/vm", {"state": "Paused"})
        vm.must("PATCH", "/vm", {"state": "Resumed"})


@SOAK_ONLY
def test_a_ghost_that_was_led_astray_is_put_back(tmp_path, no_leftovers):
    with no_leftovers(), hostile(tmp_path, 2, "Split", ASTRAY, 1) as vm:
        vm.expect("HOSTILE DONE", 600.0)
        assert_led_astray(vm)
