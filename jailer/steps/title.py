"""The argument vector that /proc, hence ps and pidof, shows of a process: written over the one it was started with.

The interpreter, its flags and our launcher stand in the original one. Nobody else reads that memory any more: Python
has copied it. The kernel takes the area for one text, up to its first zero byte, if its last byte is not zero (proc(5),
setproctitle(3) of other systems; fs/proc/base.c), and for arguments that each end with a zero byte otherwise.
"""

from __future__ import annotations

import ctypes

from base.lean_typing import Sequence

#: Fields 48 and 49 of /proc/PID/stat (proc(5)), counted from the one after the name.
_ARG_START, _ARG_END = 45, 46
_FILLER = b"."


class Title:
    """Where the arguments of this process are; forks have the same area, and write a copy of their own."""

    __slots__ = ("_start", "_size", "program")

    def __init__(self) -> None:
        #: What the program is called.
        self.program = ""
        self._start = 0
        self._size = 0

    def find(self, program: str) -> None:
        """Look where the arguments are, while there is a /proc; without one they stay as they are."""
        self.program = program
        try:
            with open("/proc/self/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
        except (OSError, ValueError, IndexError):
            return
        if 0 < start < end:
            self._start, self._size = start, end - start

    def show_arguments(self, arguments: Sequence[str]) -> None:
        """Show the program with its arguments, as many as there is room for."""
        data = b""
        for word in (self.program, *arguments):
            one = word.encode("utf-8", "surrogateescape") + b"\0"
            if len(data) + len(one) > self._size:
                break
            data += one
        if data:
            self._write(data.ljust(self._size, b"\0"))

    def show_role(self, name: str) -> None:
        """Show ``PROGRAM: NAME``, cut off if there is no room."""
        if self._size < 2:
            return
        data = f"{self.program}: {name}".encode("utf-8", "surrogateescape")[: self._size - 1] + b"\0"
        if len(data) < self._size:
            data = data.ljust(self._size - 1, b"\0") + _FILLER
        self._write(data)

    def _write(self, data: bytes) -> None:
        ctypes.memmove(self._start, data, len(data))


#: That of this process.
TITLE = Title()
