"""Landlock: what a cell may do with files, TCP ports, abstract sockets and signals, whatever its user may do.

Documentation/userspace-api/landlock.rst and linux/landlock.h of the kernel. Each kernel offers a level (ABI), and all
of it is used that is known here; docs/adr/landlock.md says who is in which domain.
"""

from __future__ import annotations

import errno
import os
import struct

from base.errno_text import errno_text
from base.lean_typing import Any
from ipc.launch_plan import ROLE_DEVICE, ROLE_SUPERVISOR, ROLE_VCPU, ROLE_VMM
from jailer import syscalls
from jailer.errors import StepError

#: What all cells of a microVM are in together.
MICROVM = "microvm"

#: Rights on files: (name, bit, first ABI that has it).
_FILE_RIGHTS = (
    ("execute", 1 << 0, 1),
    ("write_file", 1 << 1, 1),
    ("read_file", 1 << 2, 1),
    ("read_dir", 1 << 3, 1),
    ("remove_dir", 1 << 4, 1),
    ("remove_file", 1 << 5, 1),
    ("make_char", 1 << 6, 1),
    ("make_dir", 1 << 7, 1),
    ("make_reg", 1 << 8, 1),
    ("make_sock", 1 << 9, 1),
    ("make_fifo", 1 << 10, 1),
    ("make_block", 1 << 11, 1),
    ("make_sym", 1 << 12, 1),
    ("refer", 1 << 13, 2),
    ("truncate", 1 << 14, 3),
    ("ioctl_dev", 1 << 15, 5),
)
_NET_RIGHTS = (("bind_tcp", 1 << 0, 4), ("connect_tcp", 1 << 1, 4))
_SCOPES = (("abstract_unix_socket", 1 << 0, 6), ("signal", 1 << 1, 6))
_ABSTRACT, _SIGNAL = "abstract_unix_socket", "signal"

#: What the controller does with files below its root, or, without a jail, with those that its clients name: it makes
#: regular files and sockets. Nothing is executed, no device or link is made, no device opened by name is configured.
CONTROLLER_RIGHTS = ("read_file", "read_dir", "write_file", "truncate", "make_reg", "make_sock", "remove_file")
#: What the supervisor does with its /proc, and, to see that nothing is there, with its empty root and the workers'.
_READ_RIGHTS = ("read_file", "read_dir")
LIST_RIGHTS = ("read_dir",)
#: By role: the rights on files below what it is given, and what may not cross its domain. The supervisor signals the
#: controller, which is not below it; the domain of the microVM keeps it from signalling others.
_ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    ROLE_VMM: (CONTROLLER_RIGHTS, (_ABSTRACT, _SIGNAL)),
    ROLE_SUPERVISOR: (_READ_RIGHTS, (_ABSTRACT,)),
    ROLE_VCPU: ((), (_ABSTRACT, _SIGNAL)),
}
#: Roles that are in a layer of another one's, too: nothing of files, nothing that crosses the domain.
_AS = {ROLE_DEVICE: ROLE_VCPU}
#: The first ABI with scopes.
SCOPE_ABI = 6

# struct landlock_ruleset_attr: handled_access_fs, handled_access_net, scoped. Older kernels know less of it, and take
# it as long as what they do not know is zero.
_RULESET = struct.Struct("=QQQ")
assert _RULESET.size == 24
# struct landlock_path_beneath_attr (packed): allowed_access, parent_fd.
_PATH_BENEATH = struct.Struct("=Qi")
assert _PATH_BENEATH.size == 12


def _known(table: tuple[tuple[str, int, int], ...], abi: int) -> dict[str, int]:
    return {name: bit for name, bit, first in table if first <= abi}


def _mask(bits: dict[str, int], names: tuple[str, ...] | None = None) -> int:
    return sum(bit for name, bit in bits.items() if names is None or name in names)


def abi() -> int:
    """Return the level of Landlock that this kernel offers, 0 if it has none or does not use it. Raises OSError."""
    try:
        return syscalls.landlock_abi()
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
            return 0
        raise


class Ruleset:
    """One layer of a cell's domain: made ahead, put in force by the cell itself."""

    __slots__ = ("_descriptor", "_files", "_rights", "abi", "scoped")

    def __init__(self, level: int, rights: tuple[str, ...] | None, scoped: tuple[str, ...]) -> None:
        """``rights`` are those that :meth:`allow` gives; None leaves files and TCP to other layers. Raises OSError."""
        self.abi = level
        self._files = {} if rights is None else _known(_FILE_RIGHTS, level)
        self._rights = tuple(name for name in rights or () if name in self._files)
        network = {} if rights is None else _known(_NET_RIGHTS, level)
        scopes = _known(_SCOPES, level)
        self.scoped = tuple(name for name in scoped if name in scopes)
        attributes = _RULESET.pack(_mask(self._files), _mask(network), _mask(scopes, self.scoped))
        self._descriptor = syscalls.landlock_create_ruleset(attributes)

    @property
    def descriptor(self) -> int:
        """The kernel's ruleset."""
        return self._descriptor

    def allow(self, directory: int, rights: tuple[str, ...] | None = None) -> None:
        """Give the rights, or some of them, on what is below an open directory. Raises OSError."""
        allowed = _mask(self._files, self._rights if rights is None else rights)
        syscalls.landlock_add_rule(self._descriptor, _PATH_BENEATH.pack(allowed, directory))

    def enforce(self) -> None:
        """Put it in force, for good, for the calling thread and what it makes from here on. Raises OSError."""
        syscalls.landlock_restrict_self(self._descriptor)

    def close(self) -> None:
        """Close the ruleset; in force it stays all the same."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def level(self) -> dict[str, Any]:
        """Describe it for the wall report: what the kernel refuses below this level is not in it."""
        return describe(self.abi, self._rights, self.scoped)


def describe(level: int, rights: tuple[str, ...] = (), scoped: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the wall report's entry: the ABI, the rights on files that are left, whether TCP is closed, the scopes."""
    if not level:
        return {"abi": 0}
    return {"abi": level, "files": list(rights), "tcp": "none" if level >= 4 else "open", "scoped": list(scoped)}


class Rulesets:
    """The layers of a launch, by role; none where the kernel has no Landlock or the wall is switched off."""

    def __init__(self, *, wanted: bool) -> None:
        """Raises StepError."""
        self.by_role: dict[str, Ruleset] = {}
        self._domain: Ruleset | None = None
        try:
            self.abi = abi() if wanted else 0
            if self.abi:
                self.by_role = {role: Ruleset(self.abi, *asked) for role, asked in _ROLES.items()}
            if self.abi >= SCOPE_ABI:
                self._domain = Ruleset(self.abi, None, (_ABSTRACT, _SIGNAL))
        except OSError as error:
            raise StepError(f"Failed to make a Landlock ruleset: {errno_text(error)}") from None

    def enter_domain(self) -> None:
        """Enter the domain of the microVM, which every cell inherits: no signal leaves it. Raises StepError.

        It handles no files, since whoever is in a domain that does cannot mount.
        """
        if self._domain is None:
            return
        try:
            self._domain.enforce()
        except OSError as error:
            raise StepError(f"Failed to enter the Landlock domain of the microVM: {errno_text(error)}") from None
        finally:
            self._domain.close()

    def descriptor(self, role: str) -> int:
        """Return the descriptor of a role's ruleset, -1 if there is none."""
        made = self._of(role)
        return made.descriptor if made is not None else -1

    def _of(self, role: str) -> Ruleset | None:
        return self.by_role.get(_AS.get(role, role))

    def allow(self, role: str, directory: int, rights: tuple[str, ...] | None = None) -> None:
        """Give a role its rights, or some of them, below an open directory. Raises StepError."""
        if role not in self.by_role:
            return
        try:
            self.by_role[role].allow(directory, rights)
        except OSError as error:
            raise StepError(f"Failed to add a Landlock rule: {errno_text(error)}") from None

    def allow_root(self, role: str, rights: tuple[str, ...] | None = None) -> None:
        """Give a role its rights, or some of them, below what is the root now. Raises StepError."""
        if role not in self.by_role:
            return
        try:
            root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StepError(f"Failed to add a Landlock rule for /: {errno_text(error)}") from None
        try:
            self.allow(role, root, rights)
        finally:
            os.close(root)

    def enforce(self, role: str) -> bool:
        """Put the layer of a role in force in the calling process; False if there is none. Raises StepError."""
        made = self._of(role)
        if made is None:
            return False
        try:
            made.enforce()
        except OSError as error:
            raise StepError(f"Failed to put Landlock in force: {errno_text(error)}") from None
        made.close()
        return True

    def drop(self, role: str) -> None:
        """Close a ruleset that only another process puts in force."""
        if role in self.by_role:
            self.by_role[role].close()

    def asked(self, role: str) -> dict[str, Any]:
        """Return what the wall report asks of a role."""
        made = self._of(role)
        return made.level() if made is not None else describe(0)
