"""The limits that every cell gets without a flag, right after its fork. setrlimit(2), ipc.bounds.

They close what a filter alone would leave open, and bound what a cell that was taken over can take from the host.
Nothing is raised: where the caller's own limits are lower, those stay. The visible process keeps its limit on
descriptors, which clients read (docs/jailer.md).
"""

from __future__ import annotations

import resource

from ipc import bounds
from ipc.launch_plan import FORKED_AHEAD, ROLE_DEVICE, ROLE_SUPERVISOR, ROLE_VCPU, SPAWNED_ROLES, Assignment, LaunchPlan
from jailer import walls

#: Of the main thread: what glibc and the kernel give by default. Stacks do not count for RLIMIT_DATA.
STACK = 8 << 20

#: As /proc/PID/limits names them, without "Max".
NAMES = {
    resource.RLIMIT_DATA: "data size",
    resource.RLIMIT_AS: "address space",
    resource.RLIMIT_STACK: "stack size",
    resource.RLIMIT_NOFILE: "open files",
    resource.RLIMIT_MEMLOCK: "locked memory",
    resource.RLIMIT_MSGQUEUE: "msgqueue size",
    resource.RLIMIT_NICE: "nice priority",
    resource.RLIMIT_RTPRIO: "realtime priority",
}
ADDRESS_SPACE = resource.RLIMIT_AS
_ZERO = (resource.RLIMIT_MSGQUEUE, resource.RLIMIT_NICE, resource.RLIMIT_RTPRIO)

#: Resource (RLIMIT_*) → soft and hard limit.
Limits = dict[int, tuple[int, int]]


def read_inherited() -> dict[int, int]:
    """Return the hard limits of this process for everything that is limited here."""
    return {which: resource.getrlimit(which)[1] for which in NAMES}


def wanted(plan: LaunchPlan, role: str, assignment: Assignment | None, inherited: dict[int, int]) -> Limits:
    """Return the limits of a cell: what it needs, at most what it has inherited."""
    limits: dict[int, int] = {}
    data = 0
    if walls.MEMORY_LIMIT not in plan.switched_off:
        cell = _of(plan, role, assignment)
        limits.update({resource.RLIMIT_DATA: cell.data, resource.RLIMIT_AS: cell.address_space})
        limits[resource.RLIMIT_STACK] = STACK
        data = cell.data_at_times
    if walls.KERNEL_LIMITS not in plan.switched_off:
        limits.update(dict.fromkeys(_ZERO, 0))
        limits[resource.RLIMIT_MEMLOCK] = _of(plan, role, assignment).locked
        if role in SPAWNED_ROLES:
            limits[resource.RLIMIT_NOFILE] = _of(plan, role, assignment).no_file
    pairs = {which: (_lower(value, inherited[which]),) * 2 for which, value in limits.items()}
    if data:
        pairs[resource.RLIMIT_DATA] = (pairs[resource.RLIMIT_DATA][0], _lower(data, inherited[resource.RLIMIT_DATA]))
    return pairs


def _of(plan: LaunchPlan, role: str, assignment: Assignment | None) -> bounds.Bounds:
    if role == ROLE_SUPERVISOR:
        return bounds.of_supervisor(plan)
    if role == ROLE_DEVICE:
        return bounds.of_device_cell(plan)
    return bounds.of_worker(plan, assignment or FORKED_AHEAD) if role == ROLE_VCPU else bounds.of_controller(plan)


def _lower(value: int, inherited: int) -> int:
    return value if inherited == resource.RLIM_INFINITY else min(value, inherited)


def apply(limits: Limits) -> None:
    """Set soft and hard limits of this process. Raises OSError."""
    for which, pair in limits.items():
        resource.setrlimit(which, pair)
