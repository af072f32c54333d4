"""Must-show 8: a guest that attacks the ghosts of its processors harms only itself."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lab.client import ClientError, Microvm, descendants, launch_unjailed, without_log
from tests.guests.build import build
from tests.harness.bare_metal import (
    ASTRAY,
    FLOOD,
    FLOOD_WITH_SMIS,
    FLOOD_WITHOUT_NMIS,
    FOREVER,
    assert_led_astray,
    ghosts,
    hostile,
    recoveries_logged,
)
from tests.harness.microvms import smp_config


def cpu_seconds(vm: Microvm) -> float:
    """Processor time that all processes of the microVM have used."""
    ticks = 0
    for pid in descendants(vm.process.pid):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / 100


def used_while_idle(vm: Microvm, seconds: float) -> float:
    before = cpu_seconds(vm)
    time.sleep(seconds)
    return cpu_seconds(vm) - before


@pytest.mark.slow
@pytest.mark.soak("smp")
@pytest.mark.parametrize(("vcpus", "placement"), [(2, "Split"), (4, "0,1/2,3"), (2, "Grouped")])
def test_a_flood_harms_nobody_and_leaves_no_load(tmp_path, no_leftovers, scale, vcpus, placement):
    """Every vector to every processor, writes over the stub, OUT to its ports: all of that is ignored or counted.

    The writes may meet the handler of an NMI in a ghost, the likelier the busier the host. A guest that damages one
    three times within a second is ended: declared, and then another one floods.
    """
    rounds = scale(3, 1_000)  # three damage a ghost twice at most
    for attempt in range(scale(1, 10)):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        with no_leftovers(), hostile(directory, vcpus, placement, FLOOD, rounds) as vm:
            if came_to_its_end(vm, 120.0 if rounds < 10 else 7200.0):
                assert "SFP HOSTILE DONE" in without_log(vm.console)
                assert all(ghost["stub"] for ghost in ghosts(vm))
                assert_an_idle_machine_that_obeys(vm)
                print(f"\n{vcpus} vCPUs, {placement}: {attempt} floods ended before")
                return
    pytest.fail("no flood came to its end")


def came_to_its_end(vm: Microvm, timeout: float) -> bool:
    """Wait for the guest's last words; False if the microVM was ended because of what the guest did to ghosts."""
    try:
        vm.expect("HOSTILE DONE", timeout)
    except ClientError:
        if b"times within a second: the guest damages it" not in vm.console:
            raise
        assert vm.wait(10.0) == 1
        return False
    return True


def assert_an_idle_machine_that_obeys(vm: Microvm) -> None:
    # A halted guest costs its heartbeats. The first second may still hold what was on its way.
    assert used_while_idle(vm, 1.0) < 1.0
    assert used_while_idle(vm, 3.0) < 0.6
    for _ in range(3):
        vm.must("PATCH", "/vm", {"state": "Paused"})
        vm.must("PATCH", "/vm", {"state": "Resumed"})
    assert vm.must("GET", "/")["state"] == "Running"


@pytest.mark.slow
@pytest.mark.soak("smp")
def test_others_do_not_notice_a_flood(tmp_path, no_leftovers, scale):
    """Beside a guest that floods for ever another one is as exact as ever, and the API of both answers."""
    other_directory = tmp_path / "other"
    other_directory.mkdir()
    neighbour = build("ipi", {"CPUS": 2, "ROUNDS": scale(50, 10_000), "NMIS": 1, "RESTARTS": 3})
    with no_leftovers(), hostile(tmp_path, 3, "Split", FLOOD_WITHOUT_NMIS, FOREVER) as vm:
        vm.expect("", 60.0)
        path = smp_config(other_directory, neighbour, 2, "Split")
        with launch_unjailed(other_directory, ["--config-file", str(path), "--no-api"]) as other:
            while other.process.poll() is None:
                other.pump(0.2)
                assert vm.must("GET", "/")["state"] == "Running"
                assert len(vm.must("GET", "/vcpus")) == 3
            assert other.wait(10.0) == 0
        assert "IPI DONE" in without_log(other.console)
        vm.must("PATCH", "/vm", {"state": "Paused"})
        assert used_while_idle(vm, 1.0) < 0.6
        vm.must("PATCH", "/vm", {"state": "Resumed"})


def test_a_ghost_that_was_led_astray_is_put_back(tmp_path, no_leftovers):
    """It runs a loop of the guest's: it is found by the processor time it uses, put back, counted and logged."""
    with no_leftovers(), hostile(tmp_path, 2, "Split", ASTRAY, 1) as vm:
        vm.expect("HOSTILE DONE", 120.0)
        assert_led_astray(vm)
        assert used_while_idle(vm, 3.0) < 0.6


@pytest.mark.parametrize(("vcpus", "placement"), [(3, "Split"), (3, "0,2/1")])
def test_a_guest_that_goes_on_leading_ghosts_astray_ends_itself(tmp_path, no_leftovers, vcpus, placement):
    with no_leftovers(), hostile(tmp_path, vcpus, placement, ASTRAY, FOREVER) as vm:
        assert vm.wait(120.0) == 1
        assert b"times within a second: the guest damages it" in vm.console
        assert recoveries_logged(vm) >= 3


def test_system_management_interrupts_end_declared(tmp_path, no_leftovers):
    """Processors and ghosts save their state over each other's: whatever becomes of the guest, it is said."""
    with no_leftovers(), hostile(tmp_path, 2, "Split", FLOOD_WITH_SMIS, 2) as vm:
        deadline = time.monotonic() + 120.0
        while vm.process.poll() is None and not vm.has_come("HOSTILE"):
            assert time.monotonic() < deadline, vm.tail()
            vm.pump(0.1)
        if vm.process.poll() is None:
            assert vm.must("GET", "/")["state"] == "Running"
            assert len(vm.must("GET", "/vcpus")) == 2
        else:
            assert vm.wait(1.0) in (0, 1, 148), vm.tail()
