"""Steps on the jail's directories, as root, by path, outside the jail (its parents belong to root)."""

from __future__ import annotations

import os
import stat

from base.errno_text import errno_text
from jailer.errors import StepError
from jailer.operations import Operation

_ATTEMPTS = 100


def make_directories(path: str, mode: int = 0o755) -> list[str]:
    """``mkdir -p``; return the directories that were made, outermost first.

    A parent may disappear in between, when the janitor of another microVM removes it as empty: then once more.
    Raises StepError.
    """
    for _ in range(_ATTEMPTS):
        missing = []
        current = path
        while not os.path.lexists(current):
            missing.append(current)
            current = os.path.dirname(current)
        made: list[str] = []
        try:
            for each in reversed(missing):
                try:
                    os.mkdir(each, mode)
                    made.append(each)
                except FileExistsError:
                    pass  # another launch made it meanwhile
            if os.path.isdir(path):
                return made
            raise NotADirectoryError(20, "Not a directory")
        except FileNotFoundError:
            remove_empty(made)
        except OSError as error:
            remove_empty(made)
            raise StepError(f"Failed to create directory {path}: {errno_text(error)}") from None
    raise StepError(f"Failed to create directory {path}: its parent keeps disappearing")


def remove_empty(directories: list[str]) -> None:
    """Remove directories, innermost first, that are still empty."""
    for each in reversed(directories):
        try:
            os.rmdir(each)
        except OSError:
            return  # in use by somebody else now


class MakeJailRoot(Operation):
    """BASE/EXECNAME/ID/root; a client may have made it before, to put its kernel there."""

    __slots__ = ("_root", "made")

    def __init__(self, root: str) -> None:
        self._root = root
        self.made: list[str] = []

    def describe(self) -> str:
        return f"make jail root {self._root}"

    def do(self) -> None:
        self.made = make_directories(self._root)

    def undo(self) -> None:
        remove_empty(self.made)


class CopyExecFile(Operation):
    """The exec file in the jail root, where clients look for it. Nothing executes it: the cells are forks of ours.

    The jail root may belong to the user of an earlier microVM, so what is in the way is not written to before it is
    known to be a file that has no other name.
    """

    __slots__ = ("_gid", "_made", "_source", "_target", "_uid")

    def __init__(self, source: str, jail_root: str, uid: int, gid: int) -> None:
        self._source = source
        self._target = os.path.join(jail_root, os.path.basename(source))
        self._uid = uid
        self._gid = gid
        self._made = False

    def describe(self) -> str:
        return f"copy {self._source} to {self._target}"

    def do(self) -> None:
        content, mode = self._read()
        self._made = not os.path.lexists(self._target)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            descriptor = os.open(self._target, flags, mode)
        except OSError as error:
            raise StepError(f"Failed to open {self._target}: {errno_text(error)}") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise StepError(f"{self._target} is not a file")
            if status.st_nlink > 1:
                raise StepError(f"Detected hard link at: {self._target}")
            os.fchown(descriptor, self._uid, self._gid)
            os.ftruncate(descriptor, 0)
            while content:
                content = content[os.write(descriptor, content) :]
        except OSError as error:
            self.undo()
            raise StepError(f"Failed to copy {self._source} to {self._target}: {errno_text(error)}") from None
        finally:
            os.close(descriptor)

    def _read(self) -> tuple[bytes, int]:
        try:
            with open(self._source, "rb", buffering=0) as file:
                return file.readall(), os.fstat(file.fileno()).st_mode & 0o777
        except OSError as error:
            raise StepError(f"Failed to open {self._source}: {errno_text(error)}") from None

    def undo(self) -> None:
        if self._made:
            os.unlink(self._target)
