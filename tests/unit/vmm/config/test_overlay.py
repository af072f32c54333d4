"""The files of a drive with an overlay, as a client names them."""

from __future__ import annotations

import os

import pytest

from base.boot_id import read_boot_id
from tests.harness.overlays import ID
from virtio.block.overlay.file import create_overlay, read_overlay
from virtio.block.overlay.layout import PHASE_COMMIT
from virtio.block.overlay.storage import Storage
from vmm.config.overlay import OVERLAY, OverlayConfig, OverlayConfigError, open_overlay_files
from vmm.json.decoder import JsonError
from vmm.json.schema import decode

SIZE = 64 << 10


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a base, and see that nothing stays open."""
    (tmp_path / "base").write_bytes(b"b" * (SIZE + 5))
    os.chmod(tmp_path / "base", 0o444)
    before = os.listdir("/proc/self/fd")
    yield tmp_path
    assert os.listdir("/proc/self/fd") == before


def open_files(folder, base="base", overlay="overlay"):
    return open_overlay_files(str(folder / base), OverlayConfig(str(folder / overlay)), read_boot_id())


def refusal(folder, **names):
    with pytest.raises(OverlayConfigError) as raised:
        open_files(folder, **names)
    return str(raised.value).replace(f"{folder}/", "")


def make(folder, size=None):
    """Make an overlay, as `cellblock overlay create` does; return what it is opened as."""
    fds = os.open(folder / "overlay", os.O_RDWR | os.O_CREAT), os.open(folder / "base", os.O_RDONLY)
    create_overlay(Storage(fds[0]), Storage(fds[1]), ID, size)
    os.close(fds[1])
    return fds[0]


def test_the_body():
    assert decode(OVERLAY, b'{"path": "/o"}') == OverlayConfig("/o")
    assert OverlayConfig("/o").to_json() == {"path": "/o"}
    for body in (b"{}", b'{"path": 5}', b'{"path": "/o", "base": "/b"}'):
        with pytest.raises(JsonError):
            decode(OVERLAY, body)


def test_a_file_that_is_not_there_is_made(folder):
    files = open_files(folder)
    assert files.size == SIZE
    assert os.get_inheritable(files.base) is os.get_inheritable(files.overlay) is False
    with pytest.raises(OSError, match="Bad file"):
        os.write(files.base, b"x")
    os.write(files.overlay, b"x")
    files.close()


def test_an_overlay_says_how_large_the_drive_is(folder):
    os.close(make(folder, 1 << 20))
    files = open_files(folder)
    assert files.size == 1 << 20
    files.close()


def test_many_machines_have_one_base_and_each_its_overlay(folder):
    first = open_files(folder)
    second = open_files(folder, overlay="other")
    assert refusal(folder) == "the overlay overlay: it is in use by another process"
    # What was handed to a cell keeps it locked.
    handed = os.dup(first.overlay)
    first.close()
    assert refusal(folder) == "the overlay overlay: it is in use by another process"
    os.close(handed)
    open_files(folder).close()
    second.close()


def test_what_cannot_be_an_overlay(folder):
    (folder / "text").write_text("no overlay")
    os.mkdir(folder / "folder")
    os.mkfifo(folder / "fifo")
    assert refusal(folder, base="none") == "No such file or directory (os error 2) none"
    assert refusal(folder, overlay="none/overlay") == "No such file or directory (os error 2) none/overlay"
    assert refusal(folder, overlay="text") == "the overlay text: not an overlay"
    assert refusal(folder, overlay="folder") == "Is a directory (os error 21) folder"
    assert refusal(folder, overlay="fifo") == "not a regular file fifo"
    fd = make(folder)
    read_overlay(Storage(fd), b"").change(PHASE_COMMIT)
    os.close(fd)
    assert "`cellblock overlay commit` goes on with it" in refusal(folder)


def test_another_base(folder):
    os.close(make(folder))
    (folder / "longer").write_bytes(b"b" * (SIZE + 512))
    assert refusal(folder, base="longer") == (
        "the overlay overlay: its base has changed, or is another one: 66048 bytes instead of 65541"
    )
    (folder / "other").write_bytes(b"o" * (SIZE + 5))
    assert "what is at byte 0 differs" in refusal(folder, base="other")
