"""A cgroup for each worker below the microVM's own: ``--vcpu-cgroup`` (docs/adr/cgroup-per-worker.md).

They are made for as many workers as a microVM can have, by root, before anybody knows how many it will have, and
their ``cgroup.procs`` stay open in the supervisor. A worker moves itself through that descriptor, right after its fork.
Version 2: they are threaded, so that the microVM's own cgroup may have processes as well, and lists those of all.
"""

from __future__ import annotations

import os

from base.errno_text import errno_text
from base.lean_typing import Iterable
from ipc.launch_plan import MAX_WORKERS
from jailer import walls
from jailer.errors import CellError, StepError
from jailer.operations import Operation


def directory_of(microvm: str, worker: int) -> str:
    """Return the directory of a worker's cgroup below that of its microVM."""
    return f"{microvm}/vcpu-{worker}"


def directories_of(microvm: str) -> list[str]:
    """Return the directories of all workers."""
    return [directory_of(microvm, worker) for worker in range(MAX_WORKERS)]


class WorkerCgroups:
    """Which cgroups each worker joins; none, if none were asked for."""

    __slots__ = ("controllers", "descriptors")

    def __init__(self, controllers: Iterable[str] = ()) -> None:
        #: Their hierarchies: a controller of version 1 each, "" for version 2.
        self.controllers = frozenset(controllers)
        #: By worker: its cgroups' ``cgroup.procs``, open for writing.
        self.descriptors: dict[int, list[int]] = {}

    def join(self, worker: int) -> None:
        """In the worker, while it has one thread: move it. Raises CellError."""
        try:
            for descriptor in self.descriptors.get(worker, ()):
                os.write(descriptor, b"0\n")
        except OSError as error:
            raise CellError(f"cannot join the cgroup of worker {worker}: {errno_text(error)}") from None

    def membership(self, worker: int, microvm: str) -> str:
        """Return what /proc/PID/cgroup says of a worker, given what it says of the microVM's other cells."""
        if worker not in self.descriptors:
            return microvm
        lines = []
        for line in microvm.splitlines():
            controllers = line.split(":")[1].split(",")
            lines.append(line if self.controllers.isdisjoint(controllers) else directory_of(line, worker))
        return "".join(f"{line}\n" for line in lines)


class OpenWorkerCgroups(Operation):
    """Open ``cgroup.procs`` of all workers in one hierarchy."""

    __slots__ = ("_cgroups", "_microvm", "_opened")
    step = walls.CGROUP

    def __init__(self, microvm: str, cgroups: WorkerCgroups) -> None:
        self._microvm = microvm
        self._cgroups = cgroups
        self._opened: list[int] = []

    def describe(self) -> str:
        return f"open the workers' cgroups below {self._microvm}"

    def do(self) -> None:
        for worker, directory in enumerate(directories_of(self._microvm)):
            path = f"{directory}/cgroup.procs"
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            except OSError as error:
                self.undo()
                raise StepError(f"Failed to open file {path}: {errno_text(error)}") from None
            self._opened.append(descriptor)
            self._cgroups.descriptors.setdefault(worker, []).append(descriptor)

    def undo(self) -> None:
        self._cgroups.descriptors.clear()
        while self._opened:
            os.close(self._opened.pop())
