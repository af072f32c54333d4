"""A drive with an overlay is made of two descriptors, which are the drive's from then on."""

from __future__ import annotations

import os

import pytest

from base.errors import ThreadError
from tests.harness.drives import SIZE, pattern
from tests.harness.overlays import BOOT
from virtio.block import engines
from virtio.block.configuration import BlockConfiguration, BlockSettings
from virtio.block.overlay.engine import OverlayEngine
from virtio.block.overlay.maker import make_overlay_block
from virtio.errors import BackingFileError, OverlayError
from virtio.rate_limiter import Bucket

PLAIN = BlockConfiguration("root", "Sync", BlockSettings(), Bucket(0, 0), Bucket(0, 0))


@pytest.fixture
def files(tmp_path):
    """Return what opens base and overlay, and afterwards see that nothing is left open."""
    (tmp_path / "base").write_bytes(pattern())
    before = os.listdir("/proc/self/fd")
    yield lambda base=tmp_path / "base": (
        os.open(base, os.O_RDONLY),
        os.open(tmp_path / "overlay", os.O_RDWR | os.O_CREAT),
    )
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("io_engine", ["Sync", "Async"])
def test_it_is_made_and_found_again(files, io_engine):
    made = [make_overlay_block(PLAIN._replace(io_engine=io_engine), files(), BOOT) for _ in range(2)]
    for device in made:
        assert device.sectors == SIZE >> 9
        assert isinstance(device.engine, OverlayEngine)
        device.close()
    assert made[0].engine.file.identity() == made[1].engine.file.identity()


def test_another_file_is_refused(files, tmp_path):
    device = make_overlay_block(PLAIN, files(), BOOT)
    other = os.open(tmp_path / "base", os.O_RDWR)
    device.update_files([other])
    assert device.collect().values["update_fails"] == 1
    assert device.sectors == SIZE >> 9
    device.close()


def test_what_cannot_be_made_leaves_nothing(files, tmp_path, monkeypatch):
    with pytest.raises(BackingFileError, match="a directory"):
        make_overlay_block(PLAIN, files("/"), BOOT)
    make_overlay_block(PLAIN, files(), BOOT).close()
    (tmp_path / "base").write_bytes(b"another one")
    with pytest.raises(OverlayError, match="its base has changed"):
        make_overlay_block(PLAIN, files(), BOOT)
    (tmp_path / "base").write_bytes(pattern())

    def refuse(file, event):
        raise ThreadError("no")

    monkeypatch.setattr(engines, "UringEngine", lambda file, event: refuse_ring())
    monkeypatch.setattr(engines, "ThreadEngine", refuse)
    with pytest.raises(ThreadError):
        make_overlay_block(PLAIN._replace(io_engine="Async"), files(), BOOT)


def refuse_ring():
    raise PermissionError(1, "io_uring is switched off")
