"""The command line of ``jailer``: Firecracker's flags and rules, and our own in a group of their own.

Cheap to import: ``--version`` and ``--help`` are answered before anything else is loaded.
"""

from __future__ import annotations

import sys

from base.lean_typing import NamedTuple, Sequence
from base.version import FIRECRACKER_VERSION
from ipc.launch_plan import SECCOMP_KILL, SECCOMP_OFF, SECCOMP_REPORT, seccomp_errno
from jailer import walls
from jailer.errors import ArgumentError

DEFAULT_CHROOT_BASE = "/srv/jailer"
DEFAULT_EXEC_NAME = "firecracker"


class _Flag(NamedTuple):
    """``takes``: "" for a switch, else the name of the value in the help."""

    name: str
    takes: str
    text: str
    repeatable: bool = False
    required: bool = False
    default: str = ""


_COMPATIBLE = (
    _Flag("id", "ID", "name of the jail: 1 to 64 letters, digits and hyphens", required=True),
    _Flag("exec-file", "FILE", "the firecracker launcher; its base name is part of the jail's path", required=True),
    _Flag("uid", "UID", "user that every cell becomes", required=True),
    _Flag("gid", "GID", "group that every cell becomes", required=True),
    _Flag("chroot-base-dir", "DIR", "directory that holds the jails", default=DEFAULT_CHROOT_BASE),
    _Flag("netns", "FILE", "network namespace that the controller joins"),
    _Flag("daemonize", "", "detach from the terminal: new session, /dev/null as standard input and output"),
    _Flag("new-pid-ns", "", "run the cells in a process namespace of their own"),
    _Flag("cgroup", "FILE=VALUE", "write VALUE to a file of the microVM's cgroup", repeatable=True),
    _Flag("resource-limit", "RESOURCE=N", "limit of every process: fsize (bytes) or no-file", repeatable=True),
    _Flag("cgroup-version", "1|2", "cgroup hierarchy to use", default="1"),
    _Flag("parent-cgroup", "PATH", "parent of the microVM's cgroup, relative; default: base name of the exec file"),
    _Flag("version", "", "print the version and exit"),
)
_OURS = (
    _Flag("check", "", "test this host without launching anything; exit status 1 if something is missing"),
    _Flag("cleanup", "", "keep a janitor that removes the jail and its cgroups when the microVM ends"),
    _Flag("purge", "ID", "remove what an ended microVM left behind, and exit"),
    _Flag("wall-log", "FILE", "append the report on the walls of each cell, and the supervisor's lines, here"),
    _Flag("seccomp-mode", "kill|errno[=N]|report|off", "what a forbidden system call does", default=SECCOMP_KILL),
    _Flag("cell-uids", "FIRST", "workers and device cells are users and groups FIRST to FIRST+127; default: chosen"),
    _Flag("without", "STEP", "switch a wall off, for tests (always logged)", repeatable=True),
    _Flag("vcpu-cgroup", "FILE=VALUE", "give each vCPU worker a cgroup of its own, with this value", repeatable=True),
    _Flag("kernel-cache", "DIR", "directory with unpacked kernels, handed into the jail read-only"),
    _Flag("arm-fault", "POINT=ACTION", "make a fault happen on purpose, for tests", repeatable=True),
    _Flag("drill", "NAME", "let a cell attack its walls, for tests", repeatable=True),
)
_FLAGS = {flag.name: flag for flag in (*_COMPATIBLE, *_OURS)}
_FIRECRACKER_OWNED = ("--enable-pci",)


class Options(NamedTuple):
    """A checked command line. ``values`` are still text: their meaning is checked in the order of the launch."""

    values: dict[str, str]
    lists: dict[str, tuple[str, ...]]
    switches: frozenset[str]
    arguments: tuple[str, ...]

    def value(self, name: str) -> str:
        """Return the value of a flag, its default, or an empty string."""
        return self.values.get(name) or _FLAGS[name].default

    def values_of(self, name: str) -> tuple[str, ...]:
        """Return every value of a repeatable flag."""
        return self.lists.get(name, ())


def parse(arguments: Sequence[str]) -> Options:
    """Parse what follows the program's name. Raises ArgumentError with Firecracker's wording."""
    own, extra = _split(arguments)
    values: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    switches: set[str] = set()
    position = 0
    while position < len(own):
        word = own[position]
        flag = _FLAGS.get(word[2:]) if word.startswith("--") else None
        if flag is None:
            name = word.removeprefix("--")
            raise ArgumentError(f"Found argument '{name}' which wasn't expected, or isn't valid in this context.")
        position += 1
        if flag.name in values or flag.name in switches:
            raise ArgumentError(f"The argument '{flag.name}' was provided more than once.")
        if not flag.takes:
            switches.add(flag.name)
            continue
        if position == len(own) or own[position].startswith("--"):
            raise ArgumentError(f"The argument '{flag.name}' requires a value, but none was supplied.")
        if flag.repeatable:
            lists.setdefault(flag.name, []).append(own[position])
        else:
            values[flag.name] = own[position]
        position += 1
    options = Options(values, {name: tuple(each) for name, each in lists.items()}, frozenset(switches), extra)
    if "check" not in switches and "purge" not in values:
        for flag in _COMPATIBLE:
            if flag.required and flag.name not in values:
                raise ArgumentError(f"Argument '{flag.name}' required, but not found.")
    _check_ours(options)
    return options


def _split(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    words = list(arguments)
    if "--" not in words:
        return words, ()
    position = words.index("--")
    return words[:position], tuple(words[position + 1 :])


def _check_ours(options: Options) -> None:
    mode = options.value("seccomp-mode")
    if mode not in (SECCOMP_KILL, SECCOMP_REPORT, SECCOMP_OFF) and seccomp_errno(mode) is None:
        raise ArgumentError(f"--seccomp-mode is kill, errno, errno=N, report or off, not {mode!r}")
    for step in options.values_of("without"):
        if step not in walls.SWITCHES:
            raise ArgumentError(f"--without {step}: unknown step; known: {', '.join(walls.SWITCHES)}")
    for word in options.arguments:
        name = word.partition("=")[0]
        if name in _FIRECRACKER_OWNED:
            raise ArgumentError(f"{name} is not supported yet")
        if name == "--wall-log":  # firecracker's own flag of that name is for launches without a jail
            raise ArgumentError(f"{name} stands before the --, with the other flags of the jailer")


def answer(arguments: Sequence[str]) -> str | None:
    """Return the text for ``--help`` or ``--version``, or None if the command line asks for neither."""
    own, _ = _split(arguments)
    if "--help" in own or "-h" in own:
        return _help()
    if "--version" in own:
        return f"Jailer v{FIRECRACKER_VERSION}\n"
    return None


def _help() -> str:
    lines = [
        f"Jailer v{FIRECRACKER_VERSION} (Cellblock): launch a microVM as jailed processes",
        "",
        "usage: jailer --id ID --exec-file FILE --uid UID --gid GID [OPTION]… [-- FIRECRACKER-OPTION…]",
        "",
        "As Firecracker's jailer:",
        *map(_help_line, _COMPATIBLE),
        "  --help, -h                    print this and exit",
        "",
        "Cellblock's own:",
        *map(_help_line, _OURS),
        "",
        "Steps that --without switches off:",
        *(f"  {name:<28}{text}" for name, text in walls.SWITCHES.items()),
        "",
    ]
    return "\n".join(lines)


def _help_line(flag: _Flag) -> str:
    notes = [flag.text]
    if flag.required:
        notes.append("required")
    if flag.repeatable:
        notes.append("repeatable")
    if flag.default:
        notes.append(f"default {flag.default}")
    head = f"--{flag.name} {flag.takes}".rstrip()
    return f"  {head:<28}  {'; '.join(notes)}"


def print_error(text: str) -> None:
    """Say what went wrong on standard error, in one line."""
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # no standard error, or nobody reads it: the exit status still tells
