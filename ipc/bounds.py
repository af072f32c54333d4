"""How much memory and how many descriptors a cell may have: derived from the launch plan, no flag is needed.

The jailer sets these limits when a cell is forked (jailer.bounds); a cell that knows the size of its guest then lowers
its own. What they are made of was measured: docs/adr/bounds-of-cells.md.

RLIMIT_DATA counts what a process has of its own: private writable mappings and the heap, used or not. Guest memory, the
rings and other mapped memfds are shared mappings: they count for RLIMIT_AS only.
"""

from __future__ import annotations

import resource
from itertools import pairwise

from base.lean_typing import NamedTuple
from ipc.launch_plan import MAX_DEVICES, MAX_IPI_PATHS, MAX_VCPUS, Assignment, LaunchPlan

MIB = 1 << 20
#: Of the C library's threads in a cell; jailer.hot.heap makes it so.
THREAD_STACK = MIB
#: What a thread needs beside its stack.
_PER_THREAD = MIB // 4
#: The control thread, two of ZeroMQ, one to spare.
_OTHER_THREADS = 4
#: Interpreter and product take 12 MiB, 64 messages of 256 KiB that wait for a slow peer 16; the rest is for the work.
_CONTROLLER_DATA = 64 * MIB
_WORKER_DATA = 40 * MIB
#: Unpacking a kernel: what liblzma may take (vmm.boot.payload); zstd takes less.
_UNPACKING = 160 * MIB
#: Bytes of objects for a byte of JSON, at the worst: a list or an object takes 80 and is written with three characters.
_JSON_FACTOR = 32
#: Default of both flags.
_DEFAULT_PAYLOAD = 51200
_PAYLOAD_FLAGS = ("--http-api-max-payload-size", "--mmds-size-limit")
#: Libraries and other files 15 MiB, rings, run pages, 2 MiB to which a guest's mapping is aligned, reserves of malloc.
_SHARED = 64 * MIB
#: A worker's descriptors: channels, VM, those that come with changes of its VM; and for each vCPU and ghost. Where it
#: has ghosts there are paths of interrupts.
_WORKER_FILES = 256
_VCPU_FILES = 8
#: A device cell: channels, timers and loop; and for each device the kicks of its queues, an interrupt, what is behind
#: it, what its engine has (a ring, an event).
_DEVICE_CELL_FILES = 64
_DEVICE_FILES = 16
#: Requests under way in a device cell, and what is read and written in pieces.
_DEVICE_CELL_DATA = 48 * MIB
#: The rings of all its engines take 0.6 MiB. Where several microVMs have one user, kernels count those of all together:
#: the limit that Linux gives everybody (MLOCK_LIMIT) is for as many.
_RINGS = 8 * MIB
#: Threads of a device's engine, at the most.
_DEVICE_THREADS = 4


class Bounds(NamedTuple):
    """Bytes, and a number of descriptors; 0: no more than is said otherwise."""

    data: int
    address_space: int
    no_file: int = 0
    #: What the cell may allow itself for a while (:class:`Unpacking`).
    data_at_times: int = 0
    #: Locked memory: kernels count the rings of io_uring as such.
    locked: int = 0


def of_controller(plan: LaunchPlan) -> Bounds:
    """What the controller may have from its fork until its guest runs."""
    data = _controller_data(plan)
    return Bounds(data, data + _UNPACKING + plan.max_memory_bytes + _SHARED, data_at_times=data + _UNPACKING)


def of_worker(plan: LaunchPlan, assignment: Assignment) -> Bounds:
    """What a worker may have from its fork until it has guest memory."""
    vcpus = len(assignment.vcpus) + len(assignment.ghosts)
    files = _WORKER_FILES + vcpus * _VCPU_FILES + (MAX_IPI_PATHS if assignment.ghosts else 0)
    data = _WORKER_DATA + (vcpus + _OTHER_THREADS) * (THREAD_STACK + _PER_THREAD)
    return Bounds(data, data + plan.max_memory_bytes + _SHARED, files)


def of_device_cell(plan: LaunchPlan) -> Bounds:
    """What a device cell may have from its fork until it has guest memory: all devices of a machine may be in it."""
    threads = _OTHER_THREADS + MAX_DEVICES * _DEVICE_THREADS
    data = _DEVICE_CELL_DATA + threads * (THREAD_STACK + _PER_THREAD)
    files = _DEVICE_CELL_FILES + MAX_DEVICES * _DEVICE_FILES
    return Bounds(data, data + plan.max_memory_bytes + _SHARED, files, locked=_RINGS)


def of_supervisor(plan: LaunchPlan) -> Bounds:
    """What the supervisor may have: what the largest of the cells that inherit its limits may."""
    worker = of_worker(plan, Assignment(0, (0,), tuple(range(1, MAX_VCPUS))))
    device_cell = of_device_cell(plan)
    return Bounds(*map(max, worker, device_cell))._replace(no_file=0)


def _controller_data(plan: LaunchPlan) -> int:
    largest = dict.fromkeys(_PAYLOAD_FLAGS, _DEFAULT_PAYLOAD)
    for flag, value in pairwise(plan.arguments):
        if flag in largest and value.isascii() and value.isdecimal():
            largest[flag] = max(int(value), _DEFAULT_PAYLOAD)
    return _CONTROLLER_DATA + sum(largest.values()) * _JSON_FACTOR


class Unpacking:
    """In the controller, inside: what unpacking a kernel takes beside everything else."""

    __slots__ = ("_usual",)

    def __enter__(self) -> None:
        self._usual = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (self._usual[1], self._usual[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, self._usual)


def guest_runs(memory_bytes: int, *, unpacks_again: bool = False) -> None:
    """Lower the limits of this cell to what it needs beside guest memory of this size, for good.

    What a process has of its own and what it maps is bounded together then: no mapping that RLIMIT_DATA does not count
    (shared ones, stacks) can grow beyond it. ``unpacks_again``: a guest that resets its machine gets its kernel anew.
    Memory that is mapped later has to be in ``memory_bytes``. Nothing happens where the jailer has set no limits.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    _, space = resource.getrlimit(resource.RLIMIT_AS)
    if resource.RLIM_INFINITY in (hard, space):
        return
    if not unpacks_again and hard > soft:
        hard = soft
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    wanted = min(space, hard + memory_bytes + _SHARED)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, wanted))


def describe() -> str:
    """Say how much this process may have of its own, in words that follow "its limit of memory"."""
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return "none" if soft == resource.RLIM_INFINITY else f"{soft // MIB} MiB"
