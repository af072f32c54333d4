"""Cgroups, version 1 and 2: make, fill, join. The cells are forked after the join, so they are in from the start.

Kernel documentation: admin-guide/cgroup-v1/cgroups.rst, cpusets.rst; admin-guide/cgroup-v2.rst. Joining by fork
instead of by a write per cell matters: every write to cgroup.procs or tasks takes the machine-wide thread group lock.
"""

from __future__ import annotations

import os

from base.errno_text import errno_text
from base.lean_typing import NamedTuple
from jailer import walls
from jailer.errors import StepError
from jailer.operations import NO_JOURNAL, Journal, Operation
from jailer.settings import CgroupItem, Settings
from jailer.steps.directories import make_directories, remove_empty
from jailer.steps.worker_cgroups import OpenWorkerCgroups, WorkerCgroups, directories_of

PROC_MOUNTS = "/proc/mounts"
_MAX_VALUE_SIZE = 64 << 10


class Hierarchies(NamedTuple):
    """Where the host mounts its cgroups: version 1 by controller, version 2 ("" when it does not)."""

    v1: dict[str, str]
    v2: str


def _unescape(field: str) -> str:
    """Undo the octal escapes of /proc/mounts."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field


def find_hierarchies(path: str = PROC_MOUNTS) -> Hierarchies:
    """Read the cgroup mounts of this host. Raises StepError."""
    v1: dict[str, str] = {}
    v2 = ""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise StepError(f"Failed to open file {path}: {errno_text(error)}") from None
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 4:
            continue
        directory = _unescape(fields[1])
        if fields[2] == "cgroup":
            for option in fields[3].split(","):
                v1.setdefault(option, directory)
        elif fields[2] == "cgroup2" and not v2:
            v2 = directory
    return Hierarchies(v1, v2)


def write_file(path: str, value: str) -> None:
    """Write a value and a newline to a cgroup file in one write(2). Raises StepError."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, f"{value}\n".encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StepError(f"Failed to write to {path}: {errno_text(error)}") from None


def read_file(path: str) -> str:
    """Read a cgroup file without its last newline. Raises StepError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(descriptor, _MAX_VALUE_SIZE).decode("ascii", "replace").rstrip("\n")
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StepError(f"Failed to read file {path} into a string: {errno_text(error)}") from None


class MakeCgroup(Operation):
    """Make a cgroup directory with its parents."""

    __slots__ = ("_journal", "_path", "made")
    step = walls.CGROUP

    def __init__(self, path: str, journal: Journal = NO_JOURNAL) -> None:
        self._path = path
        self._journal = journal
        self.made: list[str] = []

    def describe(self) -> str:
        return f"make cgroup {self._path}"

    def do(self) -> None:
        self.made = make_directories(self._path, journal=self._journal, is_cgroup=True)

    def undo(self) -> None:
        remove_empty(self.made)


class InheritValue(Operation):
    """Version 1: an empty cpuset file takes the first value that an ancestor has (nothing can join an empty cpuset)."""

    __slots__ = ("_directory", "_file", "_mount")
    step = walls.CGROUP

    def __init__(self, mount: str, directory: str, file: str) -> None:
        self._mount = mount
        self._directory = directory
        self._file = file

    def describe(self) -> str:
        return f"inherit {self._file} in cgroup {self._directory}"

    def do(self) -> None:
        empty: list[str] = []
        current = self._directory
        while not (value := read_file(os.path.join(current, self._file))):
            if current == self._mount:
                raise StepError(
                    f"Failed to inherit cgroups configurations from file {self._file} in path {self._directory}"
                )
            empty.append(current)
            current = os.path.dirname(current)
        for each in reversed(empty):
            write_file(os.path.join(each, self._file), value)


class EnableController(Operation):
    """Version 2: enable a controller for the children of every cgroup from the root to the parent."""

    __slots__ = ("_controller", "_directories", "_mount")
    step = walls.CGROUP

    def __init__(self, mount: str, parents: tuple[str, ...], controller: str) -> None:
        self._mount = mount
        self._directories = (mount, *parents)
        self._controller = controller

    def describe(self) -> str:
        return f"enable cgroup controller {self._controller}"

    def do(self) -> None:
        if self._controller not in read_file(os.path.join(self._mount, "cgroup.controllers")).split():
            raise StepError(f"Controller {self._controller} is unavailable")
        for directory in self._directories:
            path = os.path.join(directory, "cgroup.subtree_control")
            if self._controller not in read_file(path).split():
                write_file(path, f"+{self._controller}")


class WriteValue(Operation):
    """``--cgroup FILE=VALUE``, ``--vcpu-cgroup``; the type of a worker's cgroup."""

    __slots__ = ("_path", "_value")
    step = walls.CGROUP

    def __init__(self, path: str, value: str) -> None:
        self._path = path
        self._value = value

    def describe(self) -> str:
        return f"write {self._value} to {self._path}"

    def do(self) -> None:
        write_file(self._path, self._value)


class JoinCgroup(Operation):
    """Move this process into a cgroup. Undone by moving it back to where it was, if that is visible here."""

    __slots__ = ("_before", "_controller", "_directory", "_file", "_message", "_mount")
    step = walls.CGROUP

    def __init__(self, mount: str, directory: str, controller: str, message: str = "") -> None:
        self._mount = mount
        self._directory = directory
        self._controller = controller
        self._file = "tasks" if controller else "cgroup.procs"
        self._message = message
        self._before = ""

    def describe(self) -> str:
        return f"join cgroup {self._directory}"

    def do(self) -> None:
        self._before = current_cgroup(self._controller)
        path = os.path.join(self._directory, self._file)
        try:
            write_file(path, str(os.getpid()))
        except StepError as error:
            if not self._message:
                raise
            text = str(error).rpartition(": ")[2]
            raise StepError(f"{self._message} ({self._directory}): {text}") from None

    def undo(self) -> None:
        directory = self._mount + self._before
        if not self._before or not os.path.isdir(directory):
            directory = self._mount
        write_file(os.path.join(directory, "cgroup.procs"), str(os.getpid()))


def current_cgroup(controller: str, text: str | None = None) -> str:
    """Return the path of this process's cgroup ("" = version 2) from /proc/self/cgroup, "" if there is none."""
    if text is None:
        text = read_file("/proc/self/cgroup")
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if (controller in names.split(",")) if controller else not names:
            return path
    return ""


class CgroupPlan(NamedTuple):
    """Operations, and the directories of this microVM alone, parents first (``--cleanup`` and ``--purge`` remove them).

    ``workers`` is filled when the operations are carried out.
    """

    operations: tuple[Operation, ...]
    directories: tuple[str, ...]
    workers: WorkerCgroups


_NOTHING = CgroupPlan((), (), WorkerCgroups())


def _relative(settings: Settings) -> str:
    return f"{settings.parent_cgroup}/{settings.microvm_id}"


def plan_parent_only(settings: Settings) -> CgroupPlan:
    """Version 2 with --parent-cgroup and no values: join the parent if it exists. Raises StepError."""
    if settings.cgroup_version != 2 or not settings.parent_cgroup_given or settings.cgroups or settings.vcpu_cgroups:
        return _NOTHING
    mount = find_hierarchies().v2
    if not mount:
        raise StepError("Hierarchy not found: No hierarchy found for this cgroup version.")
    directory = os.path.join(mount, settings.parent_cgroup)
    if not os.path.isdir(directory):
        return _NOTHING
    join = JoinCgroup(mount, directory, "", "Failed to move process to cgroup")
    return CgroupPlan((join,), (), WorkerCgroups())


def plan_items(settings: Settings, journal: Journal = NO_JOURNAL) -> CgroupPlan:
    """Everything for --cgroup and --vcpu-cgroup. Raises StepError if a hierarchy or a controller is missing."""
    if not settings.cgroups and not settings.vcpu_cgroups:
        return _NOTHING
    hierarchies = find_hierarchies()
    if not (hierarchies.v1 if settings.cgroup_version == 1 else hierarchies.v2):
        raise StepError("Hierarchy not found: No hierarchy found for this cgroup version.")
    make = _plan_v1 if settings.cgroup_version == 1 else _plan_v2
    return make(settings, hierarchies, journal)


def _plan_v1(settings: Settings, hierarchies: Hierarchies, journal: Journal) -> CgroupPlan:
    operations: list[Operation] = []
    joined: dict[str, tuple[str, str]] = {}  # by directory: the mount, and a controller of it
    for_workers: dict[str, list[CgroupItem]] = {}  # by directory as well
    own = len(settings.cgroups)
    for number, item in enumerate((*settings.cgroups, *settings.vcpu_cgroups)):
        mount = hierarchies.v1.get(item.controller)
        if mount is None:
            raise StepError(f"Controller {item.controller} is unavailable")
        directory = os.path.join(mount, _relative(settings))
        if directory not in joined:
            operations += [MakeCgroup(directory, journal), *_inherit(mount, directory, item.controller)]
            joined[directory] = mount, item.controller
        if number < own:
            operations.append(WriteValue(os.path.join(directory, item.file), item.value))
        else:
            for_workers.setdefault(directory, []).append(item)
    workers = WorkerCgroups(item.controller for item in settings.vcpu_cgroups)
    directories: list[str] = []
    for microvm, (mount, controller) in joined.items():
        directories.append(microvm)
        if items := for_workers.get(microvm):
            operations += _workers_v1(mount, microvm, items, workers, journal)
            directories += directories_of(microvm)
        operations.append(JoinCgroup(mount, microvm, controller))
    return CgroupPlan(tuple(operations), tuple(directories), workers)


def _workers_v1(
    mount: str, microvm: str, items: list[CgroupItem], workers: WorkerCgroups, journal: Journal
) -> list[Operation]:
    operations: list[Operation] = []
    for directory in directories_of(microvm):
        operations += [MakeCgroup(directory, journal), *_inherit(mount, directory, items[0].controller)]
        operations += [WriteValue(os.path.join(directory, item.file), item.value) for item in items]
    return [*operations, OpenWorkerCgroups(microvm, workers)]


def _inherit(mount: str, directory: str, controller: str) -> list[Operation]:
    files = ("cpuset.cpus", "cpuset.mems") if controller == "cpuset" else ()
    return [InheritValue(mount, directory, file) for file in files]


def _plan_v2(settings: Settings, hierarchies: Hierarchies, journal: Journal) -> CgroupPlan:
    mount = hierarchies.v2
    directory = os.path.join(mount, _relative(settings))
    parents = []
    current = mount
    for part in settings.parent_cgroup.split("/"):
        current = os.path.join(current, part)
        parents.append(current)
    operations: list[Operation] = [MakeCgroup(directory, journal)]
    controllers = dict.fromkeys(item.controller for item in settings.cgroups)
    # cgroup.* files belong to the core; no controller has to be enabled for them.
    operations.extend(EnableController(mount, tuple(parents), each) for each in controllers if each != "cgroup")
    operations.extend(WriteValue(os.path.join(directory, item.file), item.value) for item in settings.cgroups)
    workers = WorkerCgroups(("",))
    directories = [directory]
    if settings.vcpu_cgroups:
        operations += _workers_v2(mount, (*parents, directory), settings.vcpu_cgroups, workers, journal)
        directories += directories_of(directory)
    operations.append(JoinCgroup(mount, directory, ""))
    return CgroupPlan(tuple(operations), tuple(directories), workers)


def _workers_v2(
    mount: str, levels: tuple[str, ...], items: tuple[CgroupItem, ...], workers: WorkerCgroups, journal: Journal
) -> list[Operation]:
    """Return what makes the workers' cgroups below the last of ``levels``, the microVM's own.

    They have to be threaded before a controller is enabled for them, or nothing could join the microVM's.
    """
    directories = directories_of(levels[-1])
    operations: list[Operation] = []
    for directory in directories:
        operations += [MakeCgroup(directory, journal), WriteValue(os.path.join(directory, "cgroup.type"), "threaded")]
    controllers = dict.fromkeys(item.controller for item in items)
    operations += [EnableController(mount, levels, controller) for controller in controllers]
    for directory in directories:
        operations += [WriteValue(os.path.join(directory, item.file), item.value) for item in items]
    return [*operations, OpenWorkerCgroups(levels[-1], workers)]
