"""Which run of the host's kernel this is: what a disk's cache has not lost is known by it."""

from __future__ import annotations

import os

BOOT_ID_SIZE = 16
_PATH = "/proc/sys/kernel/random/boot_id"


def read_boot_id() -> bytes:
    """Return the kernel's boot id (random(4)), 16 bytes; empty if it is not to be had. Not from within a jail."""
    try:
        fd = os.open(_PATH, os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(fd, 64)
        finally:
            os.close(fd)
        found = bytes.fromhex(text.decode("ascii").strip().replace("-", ""))
    except (OSError, ValueError):
        return b""
    return found if len(found) == BOOT_ID_SIZE else b""
