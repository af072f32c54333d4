"""The launch plan (docs/formats/launch-plan.md) of a launch with a jail, and of one without."""

from __future__ import annotations

import os
import time

from base.boot_id import read_boot_id
from base.lean_typing import Iterable, NamedTuple
from ipc.launch_plan import (
    MAX_MEMORY_BYTES,
    MAX_WORKERS,
    ROLE_VCPU,
    SECCOMP_OFF,
    SPAWNED_ROLES,
    Assignment,
    LaunchPlan,
)
from jailer import placement, walls
from jailer.memory import host_gives_huge_pages


class Started(NamedTuple):
    """When the program started: CLOCK_MONOTONIC and CPU time, in microseconds."""

    monotonic_us: int
    cpu_us: int


class Launch(NamedTuple):
    """What both kinds of launch know before the plan is made. ``kernel_cache`` and ``console``: descriptors, or -1."""

    microvm_id: str
    arguments: tuple[str, ...]
    started: Started
    seccomp: str
    kernel_cache: int
    console: int
    first_cell_uid: int = 0


def started_now() -> Started:
    """Take the time, as early as possible."""
    return Started(time.monotonic_ns() // 1000, _cpu_us())


def jailed(
    launch: Launch,
    ipc_directories: tuple[str, str],
    identity: tuple[int, int],
    switched_off: Iterable[str],
    *,
    faults: tuple[str, ...],
    drills: tuple[str, ...],
) -> LaunchPlan:
    """Make the plan of a launch with a jail. ``identity`` is the cells' uid and gid.

    ``ipc_directories`` is one directory, as the controller and as the workers see it. The controller learns who it is
    and when it started by options of its command line, as under Firecracker's jailer.
    """
    switched_off = tuple(sorted(switched_off))
    cpu_us = _cpu_us()
    told = {
        "--id": launch.microvm_id,
        "--start-time-us": launch.started.monotonic_us,
        "--start-time-cpu-us": cpu_us,
        "--parent-cpu-time-us": cpu_us,
    }
    arguments = (*(str(word) for option in told.items() for word in option), *launch.arguments)
    return _make(launch, ipc_directories, identity, cpu_us)._replace(
        jailed=True, arguments=arguments, switched_off=switched_off, faults=faults, drills=drills
    )


def unjailed(launch: Launch, ipc_directory: str, switched_off: Iterable[str]) -> LaunchPlan:
    """Make the plan of a launch without a jail: the cells keep the caller's identity."""
    made = _make(launch, (ipc_directory, ipc_directory), (os.getuid(), os.getgid()), _cpu_us())
    return made._replace(switched_off=tuple(sorted({*made.switched_off, *switched_off})))


def _make(
    launch: Launch, ipc_directories: tuple[str, str], identity: tuple[int, int], parent_cpu_time_us: int
) -> LaunchPlan:
    kind, reason = placement.detect()
    controller_directory, worker_directory = ipc_directories
    return LaunchPlan(
        microvm_id=launch.microvm_id,
        epoch=_new_epoch(),
        jailed=False,
        uid=identity[0],
        gid=identity[1],
        arguments=launch.arguments,
        start_time_us=launch.started.monotonic_us,
        start_time_cpu_us=launch.started.cpu_us,
        parent_cpu_time_us=parent_cpu_time_us,
        max_workers=MAX_WORKERS,
        max_memory_bytes=MAX_MEMORY_BYTES,
        placement=kind,
        placement_reason=reason,
        seccomp=launch.seccomp,
        switched_off=(walls.SECCOMP,) if launch.seccomp == SECCOMP_OFF else (),
        faults=(),
        drills=(),
        controller_ipc_directory=controller_directory,
        worker_ipc_directory=worker_directory,
        kernel_cache_fd=launch.kernel_cache,
        console_fd=launch.console,
        huge_pages=host_gives_huge_pages(),
        boot_id=read_boot_id(),
        first_cell_uid=launch.first_cell_uid,
    )


def _cpu_us() -> int:
    return time.process_time_ns() // 1000


def _new_epoch() -> int:
    """Return a number that no other launch has had."""
    return int.from_bytes(os.urandom(8), "little") | 1


def refuse_assignment(plan: LaunchPlan, request: Assignment) -> str:
    """Say what is wrong with what a worker or a device cell is asked to be, or nothing."""
    if request.role not in SPAWNED_ROLES:
        return "there is no such role"
    most = plan.max_workers if request.role == ROLE_VCPU else SPAWNED_ROLES[request.role]
    if request.worker >= most:
        return f"the plan allows {most} {'workers' if request.role == ROLE_VCPU else f'{request.role} cells'}"
    if request.role != ROLE_VCPU:
        return "only a worker runs vCPUs" if request.vcpus or request.ghosts or request.affinity else ""
    mine, others = set(request.vcpus), set(request.ghosts)
    if not mine or len(mine) + len(others) != len(request.vcpus) + len(request.ghosts) or mine & others:
        return "a worker runs at least one vCPU, and none twice"
    if max(mine | others) >= MAX_WORKERS:
        return f"a microVM has at most {MAX_WORKERS} vCPUs"
    if request.affinity and (len(request.affinity) != len(request.vcpus) or not all(request.affinity)):
        return "a worker's affinity names host CPUs for each of its vCPUs"
    return ""


def cell_kind(role: str) -> str:
    """Return what a cell of this role is called in a sentence."""
    return "a worker" if role == ROLE_VCPU else f"a {role} cell"
