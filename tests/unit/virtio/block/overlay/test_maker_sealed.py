"""A drive with an overlay behind the filters of a device cell: made under the first, served under the second."""

from __future__ import annotations

import subprocess
import sys

import pytest

from devtool.project import ROOT

SERVE = """
import ctypes, os, struct, sys
from jailer.seccomp import install
from tests.harness.drives import Drive, pattern
from tests.harness.overlays import BOOT
from tests.harness.virtqueues import guest_memory
from virtio import abi
from virtio.block.configuration import BlockConfiguration, BlockSettings
from virtio.block.overlay.maker import make_overlay_block
from virtio.rate_limiter import Bucket

folder, io_engine, write_through = sys.argv[1], sys.argv[2], sys.argv[3] == "write-through"
settings = BlockSettings(writeback=True, discard=True)
configuration = BlockConfiguration("drive", io_engine, settings, Bucket(0, 0), Bucket(0, 0))
filters = install.load(("device-setup", "device"), "kill").filters
fds = os.open(folder + "/base", os.O_RDONLY), os.open(folder + "/overlay", os.O_RDWR | os.O_CREAT)
with guest_memory() as memory:
    assert ctypes.CDLL(None).prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    install.install(filters["device-setup"])
    device = make_overlay_block(configuration, fds, BOOT)
    features = device.features() & ~(abi.VIRTIO_BLK_F_FLUSH if write_through else 0)
    made = Drive(device, memory, features, 64)
    made.activate()
    install.install(filters["device"])
    for sector in range(0, 40, 5):
        assert made.read(sector, 4) == pattern()[sector << 9 : sector + 4 << 9]
        assert made.write(sector, bytes([sector]) * 1024) == 0
        assert made.read(sector, 3) == bytes([sector]) * 1024 + pattern()[sector + 2 << 9 : sector + 3 << 9]
    assert made.ask(abi.VIRTIO_BLK_T_FLUSH, 0) == 0
    for type, flags in ((11, 0), (13, 0), (13, 1)):  # DISCARD, WRITE_ZEROES without and with unmap
        assert made.zero(type, struct.pack("<QII", 41 + 4 * flags, 8, flags)) == 0
    assert made.read(41, 12) == bytes(12 * 512)
    made.restart()
    assert made.ask(abi.VIRTIO_BLK_T_FLUSH, 0) == 0
    made.stop()
    device.close()
    os.write(1, b"served")
    os._exit(0)
"""


@pytest.mark.parametrize("how", ["with flushes", "write-through"])
@pytest.mark.parametrize("io_engine", ["Sync", "Async"])
def test_it_needs_no_more_than_its_filters_allow(tmp_path, io_engine, how):
    content = b"".join(bytes((number & 0xFF, number >> 8)) * 256 for number in range(64))
    (tmp_path / "base").write_bytes(content)
    command = [sys.executable, "-c", SERVE, str(tmp_path), io_engine, how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "served"), done.stderr
    assert (tmp_path / "base").read_bytes() == content
