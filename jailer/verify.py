"""Read the walls of a cell back from /proc and compare them with what was asked for. proc(5).

``asked`` and ``found`` are flat dictionaries of JSON values with the same keys; a key that was not asked for is
only reported. The death signal cannot be read back; a test shows that it works.

In the running stage a cell is not dumpable, and the kernel shows its namespaces and its root to nobody of its user; a
cell cannot have changed those since the setup stage. What can still be read is read.
"""

from __future__ import annotations

import os

from base.errno_text import errno_text
from base.lean_typing import Any, Callable, NamedTuple
from ipc.launch_plan import ROLE_SUPERVISOR, ROLE_VMM, SECCOMP_OFF, SPAWNED_ROLES, Assignment, LaunchPlan
from jailer import bounds, walls
from jailer.filters import RUNNING
from jailer.settings import Limits
from jailer.steps.identity import SUPERVISOR_CAPABILITIES, UNJAILED_CAPABILITIES

NAMESPACES = ("mnt", "ipc", "uts", "net", "pid", "user", "cgroup")
_NO_CAPABILITIES = "0000000000000000"
_CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_MAX_FILE_SIZE = 64 << 10
_UNLIMITED = "unlimited"
_LOG_PIPE = "log pipe"
#: Field 9 of /proc/PID/stat (proc(5)), counted from the one after the name, and its bit in the kernel's linux/sched.h.
_STAT_FLAGS = 6
_PF_EXITING = 0x4
Walls = dict[str, Any]


class HostFacts(NamedTuple):
    """What the walls are compared with, read before anything was changed."""

    namespaces: dict[str, int]
    seccomp_filters: int
    privileged: bool
    #: The permitted set, as a mask.
    capabilities: int = 0

    @property
    def may_make_namespaces(self) -> bool:
        """CAP_SYS_ADMIN."""
        return bool(self.capabilities & (1 << 21))

    @property
    def unjailed_capabilities(self) -> int:
        """What a controller without a jail keeps."""
        return self.capabilities & UNJAILED_CAPABILITIES


class Asked(NamedTuple):
    """What every cell of this launch should look like, beyond the plan."""

    host: HostFacts
    limits: Limits | None
    cgroup: str
    own_network: bool
    new_pid_namespace: bool
    #: The cells have a pid namespace below the supervisor's, whose process 1 is the controller.
    cells_own_pids: bool
    jail_root: tuple[int, int] | None
    #: The hard limits that this launch has inherited, or set for all: by resource (jailer.bounds).
    inherited: dict[int, int]
    #: Supplementary groups that cannot be dropped (jailer.steps.rootless), as our user namespace names them.
    groups: tuple[int, ...] = ()
    #: Files in the controller's root, under mounts that take something from them (jailer.steps.covers).
    read_only_files: tuple[str, ...] = ()
    closed_devices: tuple[str, ...] = ()
    #: Wall → why this host, or who started us, cannot have it.
    unavailable: tuple[tuple[str, str], ...] = ()


def read(path: str, proc: int) -> str:
    """Return a small file below a /proc descriptor. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    try:
        return _read_all(descriptor)
    finally:
        os.close(descriptor)


def _read_all(descriptor: int) -> str:
    parts = []
    while part := os.read(descriptor, _MAX_FILE_SIZE):
        parts.append(part)
    return b"".join(parts).decode("utf-8", "replace")


class OpenFiles:
    """Files of a process that were opened while it was dumpable, to be read once, later.

    They are everybody's to read; but where /proc is mounted with hidepid, nothing of a process that is not dumpable can
    be opened.
    """

    __slots__ = ("_limits", "_status")

    def __init__(self, pid: int, proc: int) -> None:
        """Raises OSError."""
        self._status = os.open(f"{pid}/status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            self._limits = os.open(f"{pid}/limits", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        except OSError:
            os.close(self._status)
            raise

    def status(self) -> str:
        """Return the text of /proc/PID/status. Raises OSError."""
        return _read_all(self._status)

    def limits(self) -> str:
        """Return the text of /proc/PID/limits. Raises OSError."""
        return _read_all(self._limits)

    def close(self) -> None:
        """Close both."""
        os.close(self._status)
        os.close(self._limits)


def _status(text: str) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def namespaces(process: str, proc: int) -> dict[str, int]:
    """Return the namespace numbers of a process. Raises OSError."""
    found = {}
    for name in NAMESPACES:
        link = os.readlink(f"{process}/ns/{name}", dir_fd=proc)
        found[name] = int(link.partition("[")[2].rstrip("]"))
    return found


def host_facts(proc: int) -> HostFacts:
    """Describe the calling process before the launch. Raises OSError."""
    status = _status(read("self/status", proc))
    return HostFacts(
        namespaces=namespaces("self", proc),
        seccomp_filters=int(status.get("Seccomp_filters", "0")),
        privileged=bool(int(status["CapEff"], 16) & (1 << 8)),  # CAP_SETPCAP: the bounding set can be dropped
        capabilities=int(status["CapPrm"], 16),
    )


def open_proc() -> int:
    """Return a descriptor of the host's /proc. Raises OSError."""
    return os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def asked(
    plan: LaunchPlan,
    role: str,
    facts: Asked,
    stage: str = RUNNING,
    *,
    assignment: Assignment | None = None,
    uid: int = 0,
) -> Walls:
    """Return what the walls of a cell of this role have to be at this stage (jailer.filters).

    ``assignment`` is that of a worker or device cell, ``uid`` its user and group if they are not the controller's.
    """

    def has(wall: str) -> bool:
        return wall not in plan.switched_off

    walls_asked: Walls = {}
    if uid:
        walls_asked.update(uid=[uid] * 4, gid=[uid] * 4, groups=[])
    elif plan.jailed and has(walls.IDENTITY):
        walls_asked.update(uid=[plan.uid] * 4, gid=[plan.gid] * 4, groups=sorted(facts.groups))
    if has(walls.CAPABILITIES):
        sets = _CAPABILITY_SETS if facts.host.privileged else tuple(s for s in _CAPABILITY_SETS if s != "CapBnd")
        walls_asked["capabilities"] = dict.fromkeys(sets, _NO_CAPABILITIES)
        if not plan.jailed and role == ROLE_VMM:
            kept = f"{facts.host.unjailed_capabilities:016x}"
            walls_asked["capabilities"].update(CapPrm=kept, CapEff=kept)
        elif plan.first_cell_uid and role == ROLE_SUPERVISOR:
            kept = f"{SUPERVISOR_CAPABILITIES:016x}"
            walls_asked["capabilities"].update(CapPrm=kept, CapEff=kept)
    if has(walls.NO_NEW_PRIVILEGES):
        walls_asked["no_new_privs"] = 1
    if plan.seccomp != SECCOMP_OFF:
        own = 1 if role in (ROLE_SUPERVISOR, ROLE_VMM) else 2  # the others inherit the supervisor's
        filters = facts.host.seccomp_filters + own + _is_hidden(role, stage)
        walls_asked["seccomp"] = [{"mode": 2, "filters": filters}]
    if plan.jailed and not _is_hidden(role, stage):
        walls_asked["namespaces"] = _asked_namespaces(plan, role, facts)
        if has(walls.ROOT):
            walls_asked["root"] = _asked_root(role, facts)
        walls_asked["cgroup"] = facts.cgroup
        if role != ROLE_SUPERVISOR and has(walls.LOG_PIPE):
            walls_asked["standard_error"] = _LOG_PIPE
    elif facts.own_network and not _is_hidden(role, stage) and role != ROLE_VMM:
        # Nobody without capabilities sees the namespaces of a controller that has some.
        walls_asked["namespaces"] = {"net": "own"}
    if plan.first_cell_uid and "namespaces" in walls_asked:
        walls_asked["namespaces"]["user"] = "host" if role == ROLE_VMM else "own"
    if facts.cells_own_pids and not _is_hidden(role, stage):
        walls_asked["pid_depth"] = 0 if role == ROLE_SUPERVISOR else 1
    walls_asked["limits"] = {**_asked_limits(plan, role, facts, stage), **_asked_bounds(plan, role, facts, assignment)}
    if role in SPAWNED_ROLES and stage == RUNNING:
        # It has lowered that to what its guest needs, which it alone knows exactly.
        walls_asked["limits"].pop(bounds.NAMES[bounds.ADDRESS_SPACE], None)
    return walls_asked


def _is_hidden(role: str, stage: str) -> bool:
    return role != ROLE_SUPERVISOR and stage == RUNNING


def _asked_namespaces(plan: LaunchPlan, role: str, facts: Asked) -> dict[str, str]:
    own = {
        "mnt": walls.ROOT not in plan.switched_off,
        "ipc": walls.IPC_NAMESPACE not in plan.switched_off,
        "uts": walls.UTS_NAMESPACE not in plan.switched_off,
        "net": walls.NETWORK_NAMESPACE not in plan.switched_off if role != ROLE_VMM else facts.own_network,
        "pid": facts.new_pid_namespace or (facts.cells_own_pids and role != ROLE_SUPERVISOR),
    }
    return {name: "own" if is_own else "host" for name, is_own in own.items()}


def _asked_root(role: str, facts: Asked) -> Walls:
    if role == ROLE_VMM:
        assert facts.jail_root is not None
        return {
            "inode": list(facts.jail_root),
            "read_only_files": list(facts.read_only_files),
            "closed_devices": list(facts.closed_devices),
        }
    return {"read_only": True, "entries": ["ipc"]}


def _asked_limits(plan: LaunchPlan, role: str, facts: Asked, stage: str) -> dict[str, list[str]]:
    limits: dict[str, list[str]] = {}
    if walls.CORE_LIMIT not in plan.switched_off:
        limits["core file size"] = ["0", "0"]
    if facts.limits is not None and walls.LIMITS not in plan.switched_off:
        limits["open files"] = [str(facts.limits.no_file)] * 2
        size = facts.limits.file_size
        if size is not None:
            limits["file size"] = [_UNLIMITED if size >= (1 << 63) else str(size)] * 2
    if _is_hidden(role, stage) and walls.PROCESS_LIMIT not in plan.switched_off:
        limits["processes"] = ["0", "0"]
    return limits


def _asked_bounds(plan: LaunchPlan, role: str, facts: Asked, assignment: Assignment | None) -> dict[str, list[str]]:
    """What jailer.bounds sets, which is never more than --resource-limit allows."""
    wanted = bounds.wanted(plan, role, assignment, facts.inherited)
    return {bounds.NAMES[which]: [str(value) for value in pair] for which, pair in wanted.items()}


def found(pid: int, proc: int, host: HostFacts, wanted: Walls) -> Walls:
    """Read the walls of a process; what cannot be read is reported as such and differs. Raises nothing."""
    readers: dict[str, Callable[[], Any]] = {
        "cgroup": lambda: read(f"{pid}/cgroup", proc),
        "limits": lambda: _found_limits(read(f"{pid}/limits", proc), wanted.get("limits", {})),
        "root": lambda: _found_root(f"{pid}/root", proc, wanted.get("root", {})),
        "namespaces": lambda: _found_namespaces(namespaces(str(pid), proc), host, wanted.get("namespaces", {})),
        "pid_depth": lambda: _pid_depth(str(pid), proc) - _pid_depth("self", proc),
        "seccomp": lambda: _found_seccomp(pid, proc),
    }
    if "standard_error" in wanted:
        readers["standard_error"] = lambda: _found_standard_error(pid, proc)
    return _found(lambda: read(f"{pid}/status", proc), readers, wanted)


def found_hidden(pid: int, proc: int, files: OpenFiles, wanted: Walls) -> Walls:
    """As :func:`found`, of a process that is not dumpable; ``files`` were opened before."""
    text = ""

    def status() -> str:
        nonlocal text
        text = files.status()
        return text

    def seccomp() -> list[Walls]:
        try:
            return _found_seccomp(pid, proc)
        except (FileNotFoundError, PermissionError):  # hidepid: the kernel put the filter on all threads, or on none
            return [_seccomp_state(_status(text))]

    readers: dict[str, Callable[[], Any]] = {
        "limits": lambda: _found_limits(files.limits(), wanted.get("limits", {})),
        "seccomp": seccomp,
    }
    return _found(status, readers, wanted)


def _found(status: Callable[[], str], readers: dict[str, Callable[[], Any]], wanted: Walls) -> Walls:
    walls_found: Walls = {}
    try:
        walls_found.update(_found_status(_status(status()), wanted))
    except (OSError, ValueError, KeyError) as error:
        walls_found["status"] = f"unreadable: {error}"
    for name, reader in readers.items():
        try:
            walls_found[name] = reader()
        except OSError as error:
            walls_found[name] = f"unreadable: {errno_text(error)}"
        except (ValueError, KeyError, IndexError) as error:
            walls_found[name] = f"unreadable: {type(error).__name__}"
    return walls_found


def _found_status(status: dict[str, str], wanted: Walls) -> Walls:
    sets = wanted.get("capabilities") or dict.fromkeys(_CAPABILITY_SETS)
    return {
        "uid": [int(each) for each in status["Uid"].split()],
        "gid": [int(each) for each in status["Gid"].split()],
        "groups": [int(each) for each in status["Groups"].split()],
        "capabilities": {name: status[name] for name in sets},
        "no_new_privs": int(status["NoNewPrivs"]),
        "threads": int(status["Threads"]),
    }


def _found_seccomp(pid: int, proc: int) -> list[Walls]:
    """Return the distinct states of all threads: one element, if all is well."""
    states = []
    descriptor = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=proc)
    try:
        threads = os.listdir(descriptor)
        for thread in threads:
            try:
                state = _seccomp_state(_status(read(f"{thread}/status", descriptor)))
            except (FileNotFoundError, ProcessLookupError):
                continue  # a thread that has ended; one that is made meanwhile has the filters of its maker
            if state not in states:
                states.append(state)
    finally:
        os.close(descriptor)
    return states


def _found_standard_error(pid: int, proc: int) -> str:
    """Say whether a cell's standard error is a pipe, and not the one that may be ours."""
    link = os.readlink(f"{pid}/fd/2", dir_fd=proc)
    flags = int(_status(read(f"{pid}/fdinfo/2", proc))["flags"], 8)
    own = os.readlink(f"{os.getpid()}/fd/2", dir_fd=proc)
    is_pipe = link.startswith("pipe:") and link != own and flags & os.O_ACCMODE == os.O_WRONLY
    return _LOG_PIPE if is_pipe else link


def _seccomp_state(status: dict[str, str]) -> Walls:
    return {"mode": int(status["Seccomp"]), "filters": int(status["Seccomp_filters"])}


def _found_namespaces(numbers: dict[str, int], host: HostFacts, wanted: dict[str, str]) -> dict[str, str]:
    names = wanted or dict.fromkeys(NAMESPACES)
    return {name: "host" if numbers[name] == host.namespaces[name] else "own" for name in names}


def _pid_depth(process: str, proc: int) -> int:
    """Return how many pid namespaces a process has a pid in, from that of the /proc mount down to its own."""
    return len(_status(read(f"{process}/status", proc)).get("NSpid", "").split())


def _found_root(path: str, proc: int, wanted: Walls) -> Walls:
    look = os.O_RDONLY if "entries" in wanted else os.O_PATH
    descriptor = os.open(path, look | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=proc)
    try:
        status = os.fstat(descriptor)
        everything: Walls = {
            "inode": [status.st_dev, status.st_ino],
            "read_only": bool(os.fstatvfs(descriptor).f_flag & os.ST_RDONLY),
        }
        if "entries" in wanted:
            everything["entries"] = sorted(os.listdir(descriptor))[:16]
        for key, flag in (("read_only_files", os.ST_RDONLY), ("closed_devices", os.ST_NODEV)):
            names = wanted.get(key, ())
            everything[key] = [name for name in names if _mount_flags(descriptor, name) & flag]
    finally:
        os.close(descriptor)
    return {name: everything[name] for name in wanted or everything}


def _mount_flags(root: int, path: str) -> int:
    """Return the flags of the mount that a file in a root is on. Raises OSError."""
    descriptor = os.open(path.lstrip("/"), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
    try:
        return os.fstatvfs(descriptor).f_flag
    finally:
        os.close(descriptor)


def _found_limits(text: str, wanted: dict[str, list[str]]) -> dict[str, list[str]]:
    limits: dict[str, list[str]] = {}
    for line in text.splitlines()[1:]:
        name = line[:26].strip().removeprefix("Max ")
        if name in wanted:
            limits[name] = line[26:].split()[:2]
    return limits


def differences(wanted: Walls, actual: Walls) -> list[str]:
    """Return one text per wall that is not what was asked for."""
    return [
        f"{name}: asked {value!r}, found {actual.get(name)!r}"
        for name, value in wanted.items()
        if actual.get(name) != value
    ]


def is_ending(pid: int, proc: int) -> bool:
    """Tell whether a process is on its way out, though it may not be reaped yet."""
    try:
        fields = read(f"{pid}/stat", proc).rpartition(")")[2].split()
        return bool(int(fields[_STAT_FLAGS]) & _PF_EXITING)
    except (OSError, ValueError, IndexError):
        return False


def is_dumpable(pid: int, uid: int, proc: int) -> bool | None:
    """Tell whether a process of this user is dumpable: then its files in /proc belong to it, else to root.

    None if that cannot be told (user 0, or the process is gone). The directory /proc/PID itself always belongs to it.
    """
    if uid == 0:
        return None
    try:
        return os.stat(f"{pid}/status", dir_fd=proc).st_uid == uid
    except OSError:
        return None
