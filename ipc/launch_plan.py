"""The launch plan: made once by the jailer, handed down by fork, the only thing that is passed down.

docs/formats/launch-plan.md describes the fields and the compatibility rule.
"""

from __future__ import annotations

import errno

from base.lean_typing import NamedTuple, Protocol

#: As many vCPUs as the API accepts (``vcpu_count``).
MAX_VCPUS = 32
#: Each worker runs one vCPU at least.
MAX_WORKERS = MAX_VCPUS
#: As many CPUs as Linux can be built for on x86 (CONFIG_NR_CPUS_RANGE_END).
MAX_HOST_CPUS = 8192
#: As many of them can be named for one vCPU.
MAX_AFFINITY = 1024
#: As many devices as a machine may have: the slots of a PCI bus but the host bridge's; virtio-mmio has room for 17.
MAX_DEVICES = 31
#: Each device cell has one device at least.
MAX_DEVICE_CELLS = MAX_DEVICES
#: Users of workers and device cells, from the first: two for each number, since a cell and its successor exist at the
#: same time; rounded up.
CELL_UIDS = 128
assert 2 * (MAX_WORKERS + MAX_DEVICE_CELLS) <= CELL_UIDS
#: Interrupts between vCPUs of different workers that the kernel forwards alone, each by an eventfd that both have.
MAX_IPI_PATHS = 512
#: Guest RAM ends below 1022 GiB in the guest physical map.
MAX_MEMORY_BYTES = 1022 << 30

ROLE_SUPERVISOR = "supervisor"
ROLE_VMM = "vmm"
ROLE_VCPU = "vcpu"
ROLE_DEVICE = "device"
#: Cells of which there may be several, forked by the supervisor when the controller asks for them: role → how many.
SPAWNED_ROLES = {ROLE_VCPU: MAX_WORKERS, ROLE_DEVICE: MAX_DEVICE_CELLS}
#: For drills only: a worker that was configured, behind its second filter.
ROLE_RUNNING_VCPU = "vcpu-running"
#: The same of a device cell.
ROLE_RUNNING_DEVICE = "device-running"

SECCOMP_KILL = "kill"
SECCOMP_REPORT = "report"
#: Alone, or with ``=N`` behind it: see :func:`seccomp_errno`.
SECCOMP_ERRNO = "errno"
SECCOMP_OFF = "off"
#: The largest number that the kernel lets a filter answer with (linux/err.h).
MAX_ERRNO = 4095

PLACEMENT_SPLIT = "split"
PLACEMENT_GROUPED = "grouped"


class TunDescriptors(NamedTuple):
    """Open, non-blocking descriptors of /dev/net/tun in the network namespace that TAPs are taken from.

    ``error`` is the errno that kept one from being opened, else 0.
    """

    descriptors: tuple[int, ...] = ()
    error: int = 0


def seccomp_errno(mode: str) -> int | None:
    """Return the errno with which forbidden calls fail in the mode ``errno`` (EPERM) or ``errno=N``, None in others."""
    name, separator, number = mode.partition("=")
    if name != SECCOMP_ERRNO:
        return None
    if not separator:
        return errno.EPERM
    return int(number) if number.isdecimal() and len(number) < 5 and 0 < int(number) <= MAX_ERRNO else None


class LaunchPlan(NamedTuple):
    """Everything that was decided before the first cell was forked.

    ``arguments`` is the command line of the controller (what follows ``--`` for the jailer). Times are
    microseconds as in Firecracker's ``--start-time-us`` flags. The two ``*_ipc_directory`` paths name the same
    directory as the controller and as the workers see it. ``kernel_cache_fd`` (a directory) and ``console_fd`` (the
    master side of a pseudo-terminal, for ``--console pty``) are -1 when there is none. ``huge_pages``: this host gives
    huge pages to memory that did not ask for them. ``boot_id`` are the 16 bytes that name this run of the
    host's kernel, empty if nobody knows them. ``first_cell_uid``: 0 if workers and device cells have the controller's
    user and group, else see :meth:`peers`. ``tun`` is filled in by the controller's process for itself, while
    it is still in the caller's network namespace.
    """

    microvm_id: str
    epoch: int
    jailed: bool
    uid: int
    gid: int
    arguments: tuple[str, ...]
    start_time_us: int
    start_time_cpu_us: int
    parent_cpu_time_us: int
    max_workers: int
    max_memory_bytes: int
    placement: str
    placement_reason: str
    seccomp: str
    switched_off: tuple[str, ...]
    faults: tuple[str, ...]
    drills: tuple[str, ...]
    controller_ipc_directory: str
    worker_ipc_directory: str
    kernel_cache_fd: int
    console_fd: int
    huge_pages: bool = False
    first_cell_uid: int = 0
    tun: TunDescriptors = TunDescriptors()
    boot_id: bytes = b""

    def peers(self, role: str, number: int) -> tuple[int, ...]:
        """Return the users (and groups) that the cell with this number may have; none: it has the controller's.

        Two: when one is replaced, its successor has the other.
        """
        if not self.first_cell_uid:
            return ()
        first = self.first_cell_uid + 2 * (number + (MAX_WORKERS if role == ROLE_DEVICE else 0))
        return first, first + 1


class Assignment(NamedTuple):
    """What a worker or a device cell is forked for, since VM, vCPUs and threads are made before it is sealed.

    ``worker`` is its number among those of its ``role``, ``vcpus`` are the indices that it runs. ``ghosts`` are the
    indices of the guest's other vCPUs: its VM has them, too, to receive what this worker's vCPUs send to them.
    ``affinity[n]`` are the host CPUs that the thread of ``vcpus[n]`` may use; without entries all that the cell may
    use. A device cell (``ROLE_DEVICE``) has none of the three.
    """

    worker: int
    vcpus: tuple[int, ...]
    ghosts: tuple[int, ...]
    affinity: tuple[tuple[int, ...], ...] = ()
    role: str = ROLE_VCPU


#: What the worker that is forked ahead is made for: nearly every microVM has one vCPU.
FORKED_AHEAD = Assignment(0, (0,), ())
#: The first frame on the descriptor channel of a worker or device cell, from the supervisor: the controller has asked
#: for it, and therefore bound its endpoint.
ENDPOINT_BOUND = b"bound"


class Seal(Protocol):
    """What a cell calls to have its walls closed; jailer.cell does it."""

    def await_verified(self) -> None:
        """Wait until the walls of the setup stage are verified: before anything is read that another cell sent.

        No thread can be made afterwards, but in a device cell, which makes its engines until it tightens.
        """

    def tighten(self) -> None:
        """Close the walls of the running stage, once, when what they forbid is not needed any more."""

    def await_tightened(self) -> None:
        """Wait until those walls are verified, too: before the guest runs, or a client is served."""


def cell_name(role: str, index: int) -> str:
    """Name a cell the way logs, walls and events do: ``vmm``, ``vcpu 0``, ``device 0``."""
    return f"{role} {index}" if role in SPAWNED_ROLES else role


def endpoint(directory: str, role: str, number: int) -> str:
    """Return the path of the ZeroMQ endpoint of a worker or device cell inside an ipc directory."""
    return f"{directory}/{role}-{number}"
