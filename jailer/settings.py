"""What a checked ``jailer`` command line means: paths, numbers and cgroup items, checked in Firecracker's order."""

from __future__ import annotations

import os
import stat

from base.errno_text import errno_text
from base.lean_typing import NamedTuple
from ipc.launch_plan import CELL_UIDS
from jailer import walls
from jailer.cli import Options
from jailer.errors import ArgumentError

#: The first bytes of an exec file that are searched for the marker.
MARKER = b"cellblock-launcher"
MARKER_WINDOW = 1024
DEFAULT_NO_FILE = 2048
MAX_ID_LENGTH = 64
#: Those that work in a threaded cgroup: admin-guide/cgroup-v2.rst, "Threads".
THREADED_CONTROLLERS = ("cpu", "cpuset", "perf_event", "pids")
_U32 = (1 << 32) - 1
#: ZeroMQ takes a user as a signed number of 32 bits.
_MAX_CELL_UID = (1 << 31) - 1
_U64 = (1 << 64) - 1


class CgroupItem(NamedTuple):
    """One ``--cgroup`` or ``--vcpu-cgroup FILE=VALUE``; ``controller`` is what stands before the first dot of FILE."""

    controller: str
    file: str
    value: str


class Limits(NamedTuple):
    """``--resource-limit``; ``file_size`` is None when it was not given."""

    no_file: int
    file_size: int | None


class Settings(NamedTuple):
    """One jailed launch."""

    microvm_id: str
    exec_file: str
    exec_name: str
    jail_directory: str
    jail_root: str
    uid: int
    gid: int
    #: Of 0 the launch chooses.
    first_cell_uid: int
    netns: str
    daemonize: bool
    new_pid_ns: bool
    cgroup_version: int
    parent_cgroup: str
    parent_cgroup_given: bool
    cgroups: tuple[CgroupItem, ...]
    vcpu_cgroups: tuple[CgroupItem, ...]
    limits: Limits


def check_id(microvm_id: str) -> None:
    """Raise ArgumentError unless the id has 1 to 64 ASCII letters, digits and hyphens (Firecracker's words)."""
    length = len(microvm_id.encode("utf-8", "surrogateescape"))
    if not 1 <= length <= MAX_ID_LENGTH:
        raise ArgumentError(
            f"Invalid instance ID: Invalid len ({length});  the length must be between 1 and {MAX_ID_LENGTH}"
        )
    for position, character in enumerate(microvm_id):
        if not (character == "-" or (character.isascii() and character.isalnum())):
            raise ArgumentError(f"Invalid instance ID: Invalid char ({character}) at position {position}")


def _number(text: str, limit: int) -> int | None:
    digits = text[1:] if text.startswith("+") else text
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 20 or int(digits) > limit:
        return None
    return int(digits)


def _canonical(path: str) -> str:
    try:
        return os.path.realpath(path, strict=True)
    except OSError as error:
        raise ArgumentError(f"Failed to canonicalize path {path}: {errno_text(error)}") from None


def check_exec_file(path: str) -> str:
    """Return the canonical path of an exec file. Raises ArgumentError unless it is a launcher of ours."""
    canonical = _canonical(path)
    try:
        descriptor = os.open(canonical, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if os.path.isdir(canonical) or not os.path.isfile(canonical):
            raise ArgumentError(f"{canonical} is not a file") from None
        raise ArgumentError(f"Failed to open file {canonical}: {errno_text(error)}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ArgumentError(f"{canonical} is not a file")
        head = os.pread(descriptor, MARKER_WINDOW, 0)
    except OSError as error:
        raise ArgumentError(f"Failed to read {canonical}: {errno_text(error)}") from None
    finally:
        os.close(descriptor)
    if MARKER not in head:
        raise ArgumentError(
            f"{canonical} is not a Cellblock launcher: this jailer forks the microVM from itself and never executes "
            f"a foreign program; give the firecracker program that is installed beside it"
        )
    return canonical


def parse_cgroup(text: str) -> CgroupItem:
    """Parse ``CONTROLLER.PROPERTY=VALUE``. Raises ArgumentError."""
    file, separator, value = text.partition("=")
    if not separator or not value or "=" in value:
        raise ArgumentError(f"Invalid format for cgroups: {text}")
    controller, _, name = file.partition(".")
    if "/" in file or file in (".", "..") or not controller or not name or "\0" in file:
        raise ArgumentError(f"Cgroup invalid file: {file}")
    return CgroupItem(controller, file, value)


def parse_vcpu_cgroup(text: str, version: int) -> CgroupItem:
    """Parse ``--vcpu-cgroup``, whose cgroups are threaded in version 2. Raises ArgumentError."""
    item = parse_cgroup(text)
    if version == 2 and item.controller not in THREADED_CONTROLLERS:
        known = ", ".join(THREADED_CONTROLLERS)
        raise ArgumentError(
            f"--vcpu-cgroup {text}: in cgroup version 2 the cgroup of a worker has only the controllers {known}; "
            f"give the whole microVM a value with --cgroup"
        )
    return item


def parse_limits(items: tuple[str, ...]) -> Limits:
    """Parse every ``--resource-limit``; a later one of the same resource wins. Raises ArgumentError."""
    limits = Limits(DEFAULT_NO_FILE, None)
    for item in items:
        resource, separator, text = item.partition("=")
        if not separator or "=" in text:
            raise ArgumentError(f"Invalid format for resources limits: {item}")
        if resource not in ("fsize", "no-file"):
            raise ArgumentError(f"Invalid resource argument: {resource}")
        value = _number(text, _U64)
        if value is None:
            raise ArgumentError(f"Invalid limit value for resource: {resource}: {text} is not a number")
        limits = limits._replace(no_file=value) if resource == "no-file" else limits._replace(file_size=value)
    return limits


def _check_user(uid: int, off: tuple[str, ...]) -> None:
    """Raise ArgumentError if the cells would be user 0 and nobody has asked for that by name.

    An ordinary user is refused all but the own one later (jailer.steps.rootless).
    """
    if uid == 0 == os.geteuid() and not {walls.UNPRIVILEGED_USER, walls.IDENTITY} & set(off):
        raise ArgumentError(
            f"--uid 0: every process of root is of the microVM's user then; give it a user of its own, or say "
            f"--without {walls.UNPRIVILEGED_USER}"
        )


def _first_cell_uid(text: str) -> int:
    """Parse ``--cell-uids``; 0 without it. Raises ArgumentError."""
    first = _number(text, _MAX_CELL_UID - CELL_UIDS + 1) if text else 0
    if first is None or first % CELL_UIDS or (text and not first):
        raise ArgumentError(f"Invalid cell-uids: {text}: the first of {CELL_UIDS} users, a multiple of {CELL_UIDS}")
    return first


def _check_directory(path: str) -> None:
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            return
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ArgumentError(f"Failed to open {path}: {errno_text(error)}") from None
    raise ArgumentError(f"{path} is not a directory")


def resolve(options: Options) -> Settings:
    """Check the values of a command line in the order in which Firecracker's jailer does. Raises ArgumentError."""
    microvm_id = options.value("id")
    check_id(microvm_id)
    exec_file = check_exec_file(options.value("exec-file"))
    exec_name = os.path.basename(exec_file)
    base = _canonical(options.value("chroot-base-dir"))
    _check_directory(base)
    identity = []
    for name in ("uid", "gid"):
        number = _number(options.value(name), _U32 - 1)  # -1 means "leave as it is" to setresuid
        if number is None:
            raise ArgumentError(f"Invalid {name}: {options.value(name)}")
        identity.append(number)
    _check_user(identity[0], options.values_of("without"))
    parent = options.value("parent-cgroup") or exec_name
    if parent.startswith("/") or "\0" in parent or any(part in (".", "..") for part in parent.split("/")):
        raise ArgumentError("Parent cgroup path is invalid. Path should not be absolute or contain '..' or '.'")
    version = options.value("cgroup-version")
    if version not in ("1", "2"):
        raise ArgumentError(f"{version} is an invalid cgroup version specifier")
    jail_directory = os.path.join(base, exec_name, microvm_id)
    return Settings(
        microvm_id=microvm_id,
        exec_file=exec_file,
        exec_name=exec_name,
        jail_directory=jail_directory,
        jail_root=os.path.join(jail_directory, "root"),
        uid=identity[0],
        gid=identity[1],
        first_cell_uid=_first_cell_uid(options.value("cell-uids")),
        netns=options.value("netns"),
        daemonize="daemonize" in options.switches,
        new_pid_ns="new-pid-ns" in options.switches,
        cgroup_version=int(version),
        parent_cgroup="/".join(part for part in parent.split("/") if part),
        parent_cgroup_given="parent-cgroup" in options.values,
        cgroups=tuple(parse_cgroup(item) for item in options.values_of("cgroup")),
        vcpu_cgroups=tuple(parse_vcpu_cgroup(item, int(version)) for item in options.values_of("vcpu-cgroup")),
        limits=parse_limits(options.values_of("resource-limit")),
    )
