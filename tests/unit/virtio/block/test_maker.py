"""A drive is made of its configuration and a descriptor, which is the drive's from then on."""

from __future__ import annotations

import os

import pytest

from base.errors import ThreadError
from tests.harness.drives import SECTORS
from virtio import abi
from virtio.block import engines
from virtio.block.configuration import (
    BlockConfiguration,
    BlockSettings,
    block_config,
    block_features,
    block_queue_sizes,
)
from virtio.block.engine import Engine
from virtio.block.file_engine import FileEngine
from virtio.block.maker import make_block
from virtio.errors import BackingFileError
from virtio.rate_limiter import Bucket

PLAIN = BlockConfiguration("root", "Sync", BlockSettings(), Bucket(0, 0), Bucket(0, 0))


def file(size: int = SECTORS << 9) -> int:
    fd = os.memfd_create("drive", os.MFD_CLOEXEC)
    os.truncate(fd, size)
    return fd


def closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


@pytest.mark.parametrize("settings", [BlockSettings(), BlockSettings(True, True, True, 4), BlockSettings(queues=2)])
@pytest.mark.parametrize("io_engine", ["Sync", "Async"])
def test_the_driver_is_offered_what_the_configuration_says(settings, io_engine):
    fd = file()
    device = make_block(PLAIN._replace(settings=settings, io_engine=io_engine), fd)
    assert device.id == "root"
    assert isinstance(device.engine, Engine)
    assert isinstance(device.engine, FileEngine) == (io_engine == "Sync")
    assert device.features() == block_features(settings)
    assert device.config() == block_config(settings, SECTORS)
    assert device.queue_sizes == block_queue_sizes(settings)
    assert not device.limiter.limits
    device.close()
    assert closed(fd)


def test_it_is_limited():
    device = make_block(PLAIN._replace(ops=Bucket(2, 100)), file())
    assert device.limiter.take(2, 1 << 30)
    assert device.limiter.save().ops.size == 2
    device.close()


def test_it_goes_on_from_a_state():
    before = make_block(PLAIN._replace(bandwidth=Bucket(1000, 100)), file())
    state = before.save()
    after = make_block(PLAIN, file(SECTORS + 8 << 9), state)
    assert after.save().limiter.bandwidth.size == 1000
    assert abi.VIRTIO_BLK_CONFIG.unpack(after.config())[0] == SECTORS
    before.close()
    after.close()


def test_what_is_no_file_is_refused_and_closed():
    reader, writer = os.pipe()
    with pytest.raises(BackingFileError, match="a FIFO"):
        make_block(PLAIN, reader)
    assert closed(reader)
    os.close(writer)


def test_a_file_without_an_engine_is_closed(monkeypatch):
    def refuse(*_):
        raise ThreadError("no thread can be made")

    monkeypatch.setattr(engines, "UringEngine", refuse)
    monkeypatch.setattr("virtio.block.maker.make_engine", refuse)
    fd = file()
    with pytest.raises(ThreadError):
        make_block(PLAIN._replace(io_engine="Async"), fd)
    assert closed(fd)
