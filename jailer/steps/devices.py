"""Directories and device nodes in the jail root, made by the controller's process when it is inside, still as root.

Inside, a link that an earlier microVM of the same id may have planted leads nowhere but into the jail.
"""

from __future__ import annotations

import os
import stat

from base.errno_text import errno_text
from jailer import walls
from jailer.errors import StepError
from jailer.operations import Operation

#: (path, major, minor, is a failure only a warning)
DEVICES = (
    ("/dev/net/tun", 10, 200, False),
    ("/dev/kvm", 10, 232, False),
    ("/dev/urandom", 1, 9, True),
)
DIRECTORIES = ("/", "/dev", "/dev/net", "/run")
_PROC_MISC = "/proc/misc"


def userfaultfd_minor(path: str = _PROC_MISC) -> int | None:
    """Return the minor number of /dev/userfaultfd on this host, None if it has none."""
    try:
        with open(path, encoding="ascii") as file:
            for line in file:
                number, _, name = line.strip().partition(" ")
                if name == "userfaultfd" and number.isdecimal():
                    return int(number)
    except (OSError, UnicodeDecodeError):
        pass
    return None


class MakeDirectory(Operation):
    """mkdir, chmod 0700, chown."""

    __slots__ = ("_gid", "_made", "_path", "_uid")

    def __init__(self, path: str, uid: int, gid: int) -> None:
        self._path = path
        self._uid = uid
        self._gid = gid
        self._made = False

    def describe(self) -> str:
        return f"make directory {self._path} in the jail"

    def do(self) -> None:
        try:
            os.mkdir(self._path, 0o700)
            self._made = True
        except FileExistsError:
            pass
        except OSError as error:
            raise StepError(f"Failed to create directory {self._path}: {errno_text(error)}") from None
        try:
            os.chmod(self._path, 0o700)
            os.chown(self._path, self._uid, self._gid)
        except OSError as error:
            self.undo()
            raise StepError(f"Failed to change owner for {self._path}: {errno_text(error)}") from None

    def undo(self) -> None:
        if self._made:
            os.rmdir(self._path)


class MakeDevice(Operation):
    """mknod 0600, chown."""

    __slots__ = ("_gid", "_made", "_major", "_minor", "_optional", "_path", "_uid")
    step = walls.DEVICES

    def __init__(self, path: str, number: tuple[int, int], uid: int, gid: int, *, optional: bool = False) -> None:
        self._path = path
        self._major, self._minor = number
        self._optional = optional
        self._uid = uid
        self._gid = gid
        self._made = False

    def describe(self) -> str:
        return f"make device {self._path} ({self._major}:{self._minor}) in the jail"

    def do(self) -> None:
        try:
            os.mknod(self._path, stat.S_IFCHR | 0o600, os.makedev(self._major, self._minor))
            self._made = True
        except OSError as error:
            if self._optional:
                return
            raise StepError(f"Failed to create {self._path} via mknod inside the jail: {errno_text(error)}") from None
        try:
            os.chown(self._path, self._uid, self._gid)
        except OSError as error:
            os.unlink(self._path)
            raise StepError(f"Failed to change owner for {self._path}: {errno_text(error)}") from None

    def undo(self) -> None:
        if self._made:
            os.unlink(self._path)
