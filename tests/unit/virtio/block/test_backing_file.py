"""Backing files: what can be one, and what a client is told of what cannot."""

from __future__ import annotations

import errno
import fcntl
import os
import socket

import pytest

from tests.harness.drives import backing_file
from virtio.block import backing_file as module
from virtio.block.backing_file import BackingFile, open_backing_file
from virtio.errors import BackingFileError


@pytest.fixture(autouse=True)
def no_descriptor_is_left():
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("read_only", [False, True])
def test_a_regular_file(tmp_path, read_only):
    path = tmp_path / "disk"
    path.write_bytes(bytes(1000))
    file = open_backing_file(str(path), read_only=read_only)
    assert (file.size, file.sectors, file.cut, file.is_block_device) == (1000, 1, 488, False)
    flags = fcntl.fcntl(file.fd, fcntl.F_GETFL)
    assert flags & os.O_ACCMODE == (os.O_RDONLY if read_only else os.O_RDWR)
    assert not flags & os.O_NONBLOCK
    assert not os.get_inheritable(file.fd)
    status = path.stat()
    assert file.identity() == f"{status.st_dev}{status.st_rdev}{status.st_ino}".encode()[:20].ljust(20, b"\0")
    path.write_bytes(bytes(2048))
    file.refresh()
    assert file.sectors == 4
    file.close()
    file.close()


def test_what_cannot_be_opened_says_why(tmp_path, monkeypatch):
    with pytest.raises(BackingFileError) as caught:
        open_backing_file(str(tmp_path / "none"), read_only=True)
    assert caught.value.errno == errno.ENOENT
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(BackingFileError, match="Symbolic link loop"):
        open_backing_file(str(tmp_path / "loop"), read_only=False)
    with pytest.raises(BackingFileError) as caught:
        open_backing_file(str(tmp_path), read_only=False)
    assert caught.value.errno == errno.EISDIR


def test_what_a_writer_has_locked_as_a_program_is_refused(tmp_path):
    """A program that runs is locked against writers; it can be read."""
    path = tmp_path / "program"
    path.write_bytes(open("/bin/sleep", "rb").read())  # noqa: SIM115
    path.chmod(0o755)
    pid = os.posix_spawn(str(path), ["sleep", "1000"], {})
    try:
        with pytest.raises(BackingFileError) as caught:
            open_backing_file(str(path), read_only=False)
        assert caught.value.errno == errno.ETXTBSY
        open_backing_file(str(path), read_only=True).close()
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_what_is_no_disk_says_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, read_only, what in (
        (tmp_path, True, "a directory"),
        (tmp_path / "fifo", True, "a FIFO"),
        (tmp_path / "fifo", False, "a FIFO"),
        ("/dev/null", False, "a character device"),
    ):
        with pytest.raises(BackingFileError, match=what) as caught:
            open_backing_file(str(path), read_only=read_only)
        assert caught.value.errno == 0  # fmt: skip
    one, other = socket.socketpair()
    other.close()
    with pytest.raises(BackingFileError, match="a socket"):
        BackingFile(one.detach(), read_only=True)
    with pytest.raises(BackingFileError, match="an anonymous object"):
        BackingFile(os.eventfd(0), read_only=True)


def test_a_descriptor_for_reading_is_no_drive_to_write_to(tmp_path):
    (tmp_path / "disk").write_bytes(bytes(512))
    with pytest.raises(BackingFileError, match="for reading only"):
        BackingFile(os.open(tmp_path / "disk", os.O_RDONLY), read_only=False)
    with pytest.raises(BackingFileError) as caught:
        BackingFile(1 << 20, read_only=False)
    assert caught.value.errno == errno.EBADF


def test_a_file_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(module, "MAX_SIZE", 511)
    with pytest.raises(BackingFileError, match="512 bytes are too many"):
        backing_file(bytes(512))
