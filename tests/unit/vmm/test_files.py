"""Opening the files that clients name, and errors as text."""

from __future__ import annotations

import errno
import os

import pytest

from base.errno_text import errno_text, strerror
from vmm.files import FileOpenError, open_input, open_output, open_replaced, read_text


def test_errno_texts_are_musls():
    assert errno_text(errno.ENOMEM) == "Out of memory (os error 12)"
    assert errno_text(errno.EBUSY) == "Resource busy (os error 16)"
    assert errno_text(errno.EMFILE) == "No file descriptors available (os error 24)"
    assert errno_text(OSError(errno.ENOENT, "whatever")) == "No such file or directory (os error 2)"
    assert errno_text(OSError("no number")) == "no number"
    assert errno_text(4095) == "No error information (os error 4095)"
    known = [number for number in errno.errorcode if strerror(number) != "No error information"]
    assert len(known) > 90


def test_input(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    fd = open_input(str(path))
    assert os.read(fd, 10) == b"abc"
    assert not os.get_inheritable(fd)
    os.close(fd)
    with pytest.raises(FileOpenError, match=r"Too many|No file descriptors|Not a directory \(os error 20\)"):
        open_input(str(path / "below"))
    # Paths of the command line may hold bytes that are no text.
    odd = os.fsencode(str(tmp_path)) + b"/\xff"
    with open(odd, "wb"):
        pass
    os.close(open_input(os.fsdecode(odd)))


def test_output_creates_appends_and_never_blocks(tmp_path):
    path = tmp_path / "out"
    for part in (b"a", b"b"):
        fd = open_output(str(path))
        assert not os.get_blocking(fd)
        assert not os.get_inheritable(fd)
        os.write(fd, part)
        os.close(fd)
    assert path.read_bytes() == b"ab"
    with pytest.raises(FileOpenError, match=r"Is a directory \(os error 21\)"):
        open_output(str(tmp_path))


def test_output_to_a_fifo_with_and_without_a_reader(tmp_path):
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    lonely = open_output(fifo)
    os.write(lonely, b"kept")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert os.read(reader, 10) == b"kept"
    read_by = open_output(fifo)
    os.close(lonely)
    os.write(read_by, b"x")
    assert os.read(reader, 10) == b"x"
    os.close(read_by)
    os.close(reader)


def test_read_text_is_bounded(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abcd")
    assert read_text(str(path), 4) == b"abcd"
    with pytest.raises(FileOpenError, match="larger than 3 bytes"):
        read_text(str(path), 3)


def test_a_file_that_is_replaced_is_empty_and_a_fifo_without_a_reader_is_refused(tmp_path):
    path = tmp_path / "file"
    for _ in range(2):
        fd = open_replaced(str(path))
        assert path.read_bytes() == b""
        os.write(fd, b"content")
        assert not os.get_inheritable(fd)
        os.close(fd)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FileOpenError, match=r"^No such device or address \(os error 6\)$"):
        open_replaced(str(tmp_path / "fifo"))
