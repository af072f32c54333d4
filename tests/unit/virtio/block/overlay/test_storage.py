"""The calls that maps and headers are read and written by, on real files; and the locks."""

from __future__ import annotations

import os

import pytest

from virtio.block.overlay.storage import Storage, lock
from virtio.errors import OverlayError


@pytest.fixture
def disk(tmp_path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield Storage(fd)
    os.close(fd)


def test_a_file_is_read_written_and_sized(disk):
    disk.truncate(8192)
    disk.allocate(0, 4096)
    disk.write(100, b"some bytes")
    disk.sync()
    assert disk.size == 8192
    assert disk.read(100, 10) == b"some bytes"
    assert disk.read(8190, 10) == bytes(2)
    assert disk.read(9000, 10) == b""
    disk.punch(0, 4096)
    assert disk.read(0, 8192) == bytes(8192)
    assert disk.mtime_ns == os.fstat(disk.fd).st_mtime_ns


def test_errors_of_the_kernel_come_through(disk):
    reader = os.open(f"/proc/self/fd/{disk.fd}", os.O_RDONLY)
    for call in (
        lambda: Storage(reader).write(0, b"x"),
        lambda: Storage(reader).truncate(5),
        lambda: Storage(reader).allocate(0, 5),
        lambda: Storage(reader).punch(0, 5),
    ):
        with pytest.raises(OSError, match=r"."):
            call()
    os.close(reader)


def test_one_machine_changes_an_overlay_and_many_read_a_base(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"")
    first, second, third = (os.open(path, os.O_RDONLY) for _ in range(3))
    lock(first, "the base", shared=True)
    lock(second, "the base", shared=True)
    with pytest.raises(OverlayError, match="the base: it is in use by another process"):
        lock(third, "the base", shared=False)
    # What was handed on holds it, too.
    handed = os.dup(first)
    os.close(first)
    os.close(second)
    with pytest.raises(OverlayError):
        lock(third, "the base", shared=False)
    os.close(handed)
    lock(third, "the base", shared=False)
    fourth = os.open(path, os.O_RDONLY)
    with pytest.raises(OverlayError, match="being changed by another process"):
        lock(fourth, "the overlay", shared=True)
    os.close(third)
    os.close(fourth)


def test_what_cannot_be_locked_is_told():
    fd = os.open("/", os.O_PATH)
    with pytest.raises(OverlayError, match="this cannot be locked"):
        lock(fd, "this", shared=True)
    os.close(fd)
