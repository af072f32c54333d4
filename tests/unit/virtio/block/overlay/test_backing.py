"""The files of a drive with an overlay, opened as a cell gets them."""

from __future__ import annotations

import os

import pytest

from tests.harness.drives import SIZE, backing_file
from tests.harness.overlays import BOOT
from virtio.block.backing_file import BackingFile
from virtio.block.overlay.backing import open_overlay_backing
from virtio.errors import BackingFileError, OverlayError


def fresh(path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def test_an_overlay_is_made_and_found_again(tmp_path):
    base = backing_file(read_only=True)
    made = open_overlay_backing(base, fresh(tmp_path / "o"), BOOT)
    assert made.size == SIZE
    assert made.identity() == made.overlay.geometry.id.hex()[:20].encode()
    made.close()
    again = open_overlay_backing(base, fresh(tmp_path / "o"), BOOT)
    assert again.identity() == made.identity()
    os.truncate(tmp_path / "o", 1 << 30)
    again.refresh()
    assert again.size == SIZE
    assert os.stat(tmp_path / "o").st_blocks << 9 < 1 << 16
    again.close()


def test_what_is_no_overlay_is_refused_and_closed(tmp_path):
    before = os.listdir("/proc/self/fd")
    base = backing_file(read_only=True)
    (tmp_path / "text").write_text("no overlay")
    with pytest.raises(OverlayError, match="not an overlay"):
        open_overlay_backing(base, fresh(tmp_path / "text"), BOOT)
    with pytest.raises(OverlayError, match="not a regular file"):
        open_overlay_backing(base, os.open("/dev/null", os.O_RDWR), BOOT)
    open_overlay_backing(base, fresh(tmp_path / "o"), BOOT).close()
    with pytest.raises((OverlayError, BackingFileError)):
        open_overlay_backing(base, os.open(tmp_path / "o", os.O_RDONLY), b"")
    base.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_base_that_has_changed_is_refused(tmp_path):
    (tmp_path / "base").write_bytes(b"a" * 8192)
    base = BackingFile(os.open(tmp_path / "base", os.O_RDONLY), read_only=True)
    open_overlay_backing(base, fresh(tmp_path / "o"), BOOT).close()
    (tmp_path / "base").write_bytes(b"a" * 8191 + b"b")
    with pytest.raises(OverlayError, match="its base has changed"):
        open_overlay_backing(base, fresh(tmp_path / "o"), BOOT)
    base.close()
