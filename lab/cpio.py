"""Initramfs archives: the "newc" cpio format (Linux, Documentation/driver-api/early-userspace/buffer-format.rst)."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import BinaryIO

_ALIGNMENT = 4
_TRAILER = "TRAILER!!!"


class CpioWriter:
    """Writes an archive whose bytes depend on nothing but the contents: no times, no owners, counted inodes."""

    def __init__(self, output: BinaryIO) -> None:
        self._output = output
        self._inode = 0
        self._folders: set[str] = set()

    def folder(self, name: str) -> None:
        """Add a folder and those above it, once each."""
        above = name.rpartition("/")[0]
        if above and above not in self._folders:
            self.folder(above)
        if name not in self._folders:
            self._folders.add(name)
            self._entry(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, content: bytes | Path, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._above(name)
        self._entry(name, stat.S_IFREG | mode, content if isinstance(content, bytes) else content.read_bytes())

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._above(name)
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, name: str, mode: int, major: int, minor: int) -> None:
        """Add a device node; `mode` holds its type and permissions."""
        self._above(name)
        self._entry(name, mode, b"", major, minor)

    def close(self) -> None:
        """Write the trailer. The output stays open."""
        self._entry(_TRAILER, 0, b"")

    def _above(self, name: str) -> None:
        folder = name.rpartition("/")[0]
        if folder:
            self.folder(folder)

    def _entry(self, name: str, mode: int, data: bytes, major: int = 0, minor: int = 0) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._output.write(header + encoded + bytes(-(len(header) + len(encoded)) % _ALIGNMENT))
        self._output.write(data + bytes(-len(data) % _ALIGNMENT))
