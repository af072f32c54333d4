"""Unpacked kernels, kept by content: docs/formats/kernel-cache.md.

An entry is named after the SHA-256 of the bzImage that it was unpacked from and holds the vmlinux with its own
SHA-256. Everything works on a directory descriptor, so that a jailed cell can use a cache that it has no path to.
"""

from __future__ import annotations

import os
import stat
import struct
import time

from base.errno_text import errno_text
from base.lean_typing import NamedTuple
from vmm.boot.errors import KernelCacheError
from vmm.boot.payload import MAX_UNPACKED_SIZE

MAGIC = b"CELLBKRN"
VERSION = 1
#: The vmlinux starts on a page of its own.
HEADER_SIZE = 4096
DIGEST_SIZE = 32
#: A kernel is some 50 MiB unpacked.
MAX_ENTRIES = 16

_HEADER = struct.Struct("<8sII32sQ")
assert _HEADER.size == 56
_TEMPORARY_PREFIX = ".tmp-"
_TEMPORARY_LIFETIME_SECONDS = 3600
_HEX_DIGITS = frozenset("0123456789abcdef")
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class CacheEntry(NamedTuple):
    """An open entry: ``length`` bytes of vmlinux from ``HEADER_SIZE`` on, whose SHA-256 must be ``digest``.

    The caller closes ``fd``, and trusts the content only when it has computed the digest over what it loaded.
    """

    fd: int
    length: int
    digest: bytes


def entry_name(digest: bytes) -> str:
    """Name the entry of a bzImage by its SHA-256."""
    assert len(digest) == DIGEST_SIZE
    return digest.hex()


def check_directory(dir_fd: int) -> None:
    """Raise KernelCacheError unless only root or we ourselves can change what is in the directory."""
    status = os.fstat(dir_fd)
    if not stat.S_ISDIR(status.st_mode):
        raise KernelCacheError("cache.directory", "the kernel cache is not a directory")
    if not _trusted(status):
        raise KernelCacheError(
            "cache.directory",
            "the kernel cache is not used: its directory must belong to root or to the user of the microVM "
            "and must not be writable for group or others",
        )


def load(dir_fd: int, digest: bytes) -> CacheEntry | None:
    """Open the entry for the bzImage with SHA-256 ``digest``; None when there is none that can be used.

    Raises KernelCacheError when the directory must not be trusted. An entry with a foreign owner, a wrong mode or a
    damaged header is treated as missing.
    """
    check_directory(dir_fd)
    try:
        fd = os.open(
            entry_name(digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=dir_fd
        )
    except OSError:
        return None
    try:
        entry = _read_header(fd)
    except OSError:
        entry = None
    if entry is None:
        os.close(fd)
    return entry


def _read_header(fd: int) -> CacheEntry | None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or not _trusted(status):
        return None
    header = os.pread(fd, HEADER_SIZE, 0)
    if len(header) != HEADER_SIZE or any(header[_HEADER.size :]):
        return None
    magic, version, header_size, digest, length = _HEADER.unpack_from(header)
    if (magic, version, header_size) != (MAGIC, VERSION, HEADER_SIZE):
        return None
    if not 0 < length <= MAX_UNPACKED_SIZE or status.st_size != HEADER_SIZE + length:
        return None
    return CacheEntry(fd, length, digest)


def _trusted(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & _WRITABLE_BY_OTHERS


class CacheWriter:
    """Writes one entry piece by piece; it appears under its name, whole and synced, or not at all.

    A cache that cannot be written (read-only, full, file-size limit) is no error: ``failed`` says why, and the rest
    of the writer's life does nothing.
    """

    __slots__ = ("_dir_fd", "_fd", "_length", "_temporary", "failed")

    def __init__(self, dir_fd: int) -> None:
        """Begin an entry. Raises KernelCacheError when the directory must not be trusted."""
        check_directory(dir_fd)
        self._dir_fd = dir_fd
        self._fd = -1
        self._length = 0
        self._temporary = f"{_TEMPORARY_PREFIX}{os.urandom(8).hex()}-{time.monotonic_ns():x}"
        self.failed: str | None = None
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._temporary, flags, 0o644, dir_fd=dir_fd)
            os.lseek(self._fd, HEADER_SIZE, os.SEEK_SET)
        except OSError as error:
            self._fail(error)

    def write(self, piece: bytes) -> None:
        """Append ``piece`` to the vmlinux."""
        view = memoryview(piece)
        try:
            while view and self._fd >= 0:
                count = os.write(self._fd, view)
                self._length += count
                view = view[count:]
        except OSError as error:
            self._fail(error)

    def commit(self, digest: bytes, vmlinux_digest: bytes) -> bool:
        """Publish the entry for the bzImage ``digest`` and make room. Return whether it is there now."""
        if self._fd < 0:
            return False
        try:
            header = _HEADER.pack(MAGIC, VERSION, HEADER_SIZE, vmlinux_digest, self._length)
            os.pwrite(self._fd, header, 0)
            os.fsync(self._fd)
            name = entry_name(digest)
            os.rename(self._temporary, name, src_dir_fd=self._dir_fd, dst_dir_fd=self._dir_fd)
        except OSError as error:
            self._fail(error)
            return False
        os.close(self._fd)
        self._fd = -1
        try:
            os.fsync(self._dir_fd)
            evict(self._dir_fd, name)
        except OSError:
            # The entry is in place; a directory that cannot be synced or listed is no reason to fail.
            pass
        return True

    def abort(self) -> None:
        """Remove what was written so far. Harmless after ``commit``."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            try:
                os.unlink(self._temporary, dir_fd=self._dir_fd)
            except OSError:
                pass

    def _fail(self, error: OSError) -> None:
        self.failed = errno_text(error)
        self.abort()


def store(dir_fd: int, digest: bytes, data: bytes) -> bool:
    """Store the vmlinux ``data`` of the bzImage with SHA-256 ``digest``. Return whether it was stored.

    Raises KernelCacheError when the directory must not be trusted.
    """
    import hashlib

    writer = CacheWriter(dir_fd)
    try:
        writer.write(data)
        return writer.commit(digest, hashlib.sha256(data).digest())
    finally:
        writer.abort()


def evict(dir_fd: int, keep: str, max_entries: int = MAX_ENTRIES) -> None:
    """Remove the oldest entries beyond ``max_entries``, never ``keep``, and temporary files that were left behind."""
    now = time.time()
    entries = []
    for name in os.listdir(dir_fd):
        is_entry = len(name) == 2 * DIGEST_SIZE and _HEX_DIGITS.issuperset(name)
        if not is_entry and not name.startswith(_TEMPORARY_PREFIX):
            continue
        try:
            written = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mtime
        except OSError:
            continue
        if is_entry:
            entries.append((written, name))
        elif now - written > _TEMPORARY_LIFETIME_SECONDS:
            _unlink(dir_fd, name)
    entries.sort()
    removable = [name for _, name in entries if name != keep]
    for name in removable[: max(0, len(entries) - max_entries)]:
        _unlink(dir_fd, name)


def _unlink(dir_fd: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=dir_fd)
    except OSError:
        pass
