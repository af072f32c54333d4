"""The launch plan: what both kinds of launch fill in alike, and what only a jail has."""

from __future__ import annotations

import os

from ipc.launch_plan import MAX_MEMORY_BYTES, MAX_WORKERS, SECCOMP_KILL, SECCOMP_OFF, LaunchPlan
from jailer import plan, walls

STARTED = plan.Started(17, 4)
LAUNCH = plan.Launch("mine", ("--no-api",), STARTED, SECCOMP_KILL, 5, 6)
#: What differs from launch to launch, and between the two kinds.
OWN = {
    "epoch", "jailed", "uid", "gid", "arguments", "parent_cpu_time_us", "controller_ipc_directory",
    "worker_ipc_directory",
}  # fmt: skip


def jailed(launch: plan.Launch = LAUNCH, off: tuple[str, ...] = ()) -> LaunchPlan:
    return plan.jailed(launch, ("/run/x", "/x"), (1001, 1002), off, faults=("x=die",), drills=("files",))


def test_a_jailed_controller_is_told_who_it_is_before_its_own_arguments() -> None:
    made = jailed()
    assert made.jailed
    assert (made.uid, made.gid) == (1001, 1002)
    cpu = str(made.parent_cpu_time_us)
    assert made.arguments == (
        "--id", "mine", "--start-time-us", "17", "--start-time-cpu-us", cpu, "--parent-cpu-time-us", cpu, "--no-api",
    )  # fmt: skip
    assert (made.start_time_us, made.start_time_cpu_us) == STARTED
    assert (made.controller_ipc_directory, made.worker_ipc_directory) == ("/run/x", "/x")
    assert (made.faults, made.drills, made.switched_off) == (("x=die",), ("files",), ())
    assert (made.kernel_cache_fd, made.console_fd) == (5, 6)


def test_walls_that_are_off_are_named_in_order() -> None:
    assert jailed(off=(walls.ROOT, walls.CGROUP)).switched_off == tuple(sorted((walls.ROOT, walls.CGROUP)))


def test_an_unjailed_launch_keeps_the_caller_and_what_it_said() -> None:
    made = plan.unjailed(LAUNCH, "/run/here", ())
    assert not made.jailed
    assert (made.uid, made.gid) == (os.getuid(), os.getgid())
    assert made.arguments == ("--no-api",)
    assert made.controller_ipc_directory == made.worker_ipc_directory == "/run/here"
    assert (made.faults, made.drills, made.switched_off) == ((), (), ())


def test_an_unjailed_launch_without_seccomp_says_so_as_a_wall_that_is_off() -> None:
    assert plan.unjailed(LAUNCH._replace(seccomp=SECCOMP_OFF), "/run/here", ()).switched_off == (walls.SECCOMP,)


def test_walls_of_an_unjailed_launch_that_are_off_are_named_once() -> None:
    launch = LAUNCH._replace(seccomp=SECCOMP_OFF)
    off = frozenset((walls.SECCOMP, walls.PID_NAMESPACE))
    assert plan.unjailed(launch, "/run/here", off).switched_off == (walls.PID_NAMESPACE, walls.SECCOMP)


def test_everything_else_is_the_same_for_both() -> None:
    one = jailed()._replace(faults=(), drills=())._asdict()
    other = plan.unjailed(LAUNCH, "/run/here", ())._asdict()
    assert {key: one[key] for key in one if key not in OWN} == {key: other[key] for key in other if key not in OWN}
    assert (other["max_workers"], other["max_memory_bytes"]) == (MAX_WORKERS, MAX_MEMORY_BYTES)


def test_no_two_launches_have_one_epoch() -> None:
    epochs = {jailed().epoch for _ in range(100)}
    assert len(epochs) == 100
    assert all(each & 1 for each in epochs)
