"""Limits that every cell gets without a flag: what they are, and that nothing is ever raised."""

from __future__ import annotations

import resource

import pytest

from ipc.bounds import MIB
from ipc.launch_plan import MAX_MEMORY_BYTES, MAX_VCPUS, MAX_WORKERS, Assignment, LaunchPlan
from jailer import bounds, walls

UNLIMITED = dict.fromkeys(bounds.NAMES, resource.RLIM_INFINITY)
ONE = Assignment(0, (0,), ())


def _plan(*arguments: str, switched_off: tuple[str, ...] = ()) -> LaunchPlan:
    # fmt: off
    return LaunchPlan(
        "id", 1, True, 5, 6, arguments, 0, 0, 0, MAX_WORKERS, MAX_MEMORY_BYTES, "split", "", "kill", switched_off, (),
        (), "/a", "/b", -1, -1,
    )
    # fmt: on


def test_a_worker_has_what_its_vcpus_need_and_the_supervisor_no_less_than_any_worker() -> None:
    plan = _plan()
    one = bounds.wanted(plan, "vcpu", ONE, UNLIMITED)
    assert one[resource.RLIMIT_DATA][1] < 64 * MIB
    largest = bounds.wanted(plan, "vcpu", Assignment(3, (3,), tuple(range(MAX_VCPUS - 1))), UNLIMITED)
    supervisor = bounds.wanted(plan, "supervisor", None, UNLIMITED)
    assert one[resource.RLIMIT_DATA] < largest[resource.RLIMIT_DATA] <= supervisor[resource.RLIMIT_DATA]
    assert one[resource.RLIMIT_NOFILE] < largest[resource.RLIMIT_NOFILE]
    assert resource.RLIMIT_NOFILE not in supervisor  # clients compare what the visible process shows


def test_a_device_cell_may_have_rings_and_threads_of_all_devices_and_the_supervisor_no_less() -> None:
    cell, worker, supervisor = (
        bounds.wanted(_plan(), role, assignment, UNLIMITED)
        for role, assignment in (("device", Assignment(0, (), (), (), "device")), ("vcpu", ONE), ("supervisor", None))
    )
    assert cell[resource.RLIMIT_DATA] > worker[resource.RLIMIT_DATA]
    assert all(cell[which] <= limit for which, limit in supervisor.items())
    assert 64 < cell[resource.RLIMIT_NOFILE][1] <= 1024
    rings = 31 * (4096 * 5)  # each of 128 entries: at most 5 pages
    assert rings < cell[resource.RLIMIT_MEMLOCK][1] <= 8 * MIB
    assert (
        worker[resource.RLIMIT_MEMLOCK]
        == bounds.wanted(_plan(), "vmm", None, UNLIMITED)[resource.RLIMIT_MEMLOCK]
        == (0, 0)
    )


@pytest.mark.parametrize("role", ["supervisor", "vmm", "vcpu", "device"])
def test_nothing_is_raised(role: str) -> None:
    inherited = dict.fromkeys(bounds.NAMES, 7)
    limits = bounds.wanted(_plan(), role, ONE if role == "vcpu" else None, inherited)
    assert all(soft <= hard <= 7 for soft, hard in limits.values())


def test_the_controller_gets_room_for_the_payloads_that_its_flags_allow_and_at_times_for_unpacking() -> None:
    soft, hard = bounds.wanted(_plan(), "vmm", None, UNLIMITED)[resource.RLIMIT_DATA]
    assert soft < 80 * MIB
    assert soft < hard < 256 * MIB
    large = bounds.wanted(_plan("--http-api-max-payload-size", str(4 * MIB)), "vmm", None, UNLIMITED)
    assert large[resource.RLIMIT_DATA][0] - soft > 100 * MIB
    odd = bounds.wanted(_plan("--http-api-max-payload-size", "x", "--mmds-size-limit", "1"), "vmm", None, UNLIMITED)
    assert odd[resource.RLIMIT_DATA] == (soft, hard)


def test_each_wall_switches_its_limits_off() -> None:
    memory = {resource.RLIMIT_DATA, resource.RLIMIT_AS, resource.RLIMIT_STACK}
    plan = _plan(switched_off=(walls.MEMORY_LIMIT,))
    assert memory.isdisjoint(bounds.wanted(plan, "vcpu", ONE, UNLIMITED))
    assert set(bounds.wanted(_plan(switched_off=(walls.KERNEL_LIMITS,)), "vcpu", ONE, UNLIMITED)) == memory
