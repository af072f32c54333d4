"""Steps on the jail's directories, as root, by path, outside the jail (its parents belong to root)."""

from __future__ import annotations

import os

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
