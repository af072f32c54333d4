"""The block device's file: without room, another one, one that cannot keep what was written."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from devtool.project import ROOT
from tests.harness.drives import BUFFER, HEADER, SECTORS, STATUS, WAYS, backing_file, drive, pattern
from tests.harness.event_loop import run_until
from tests.harness.virtqueues import HIGH
from virtio import abi
from virtio.driver import Buffer
from virtio.errors import BackingFileError

OK, IOERR = abi.VIRTIO_BLK_S_OK, abi.VIRTIO_BLK_S_IOERR
EVERY = pytest.mark.parametrize("engine", WAYS)

_FULL_FILE_SYSTEM = """
import os, subprocess, sys
from tests.harness.drives import WAYS, drive
from virtio.block.backing_file import open_backing_file
folder, way = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], check=True)
with open(f"{folder}/disk", "wb") as made:
    made.truncate(1 << 20)  # all hole
with open(f"{folder}/other", "wb") as made:
    made.write(bytes(128 << 10))
with drive(WAYS[way](open_backing_file(f"{folder}/disk", read_only=False)), native=way == "extension") as made:
    def write(number):
        return made.write(number * 32, bytes([number + 1]) * 16384)
    first = [write(number) for number in range(16)]
    room = first.index(1)
    assert 4 <= room <= 8, first
    assert set(first[room + 1 :]) == {1}, first
    assert made.device.collect().values["execute_fails"] == 16 - room
    os.unlink(f"{folder}/other")
    assert write(room) == write(15) == 0
    for number in (*range(room + 1), 15):
        assert made.read(number * 32, 32) == bytes([number + 1]) * 16384
    assert not made.notify.resets
print("done")
"""


@EVERY
def test_a_file_system_without_room_gives_errors_until_there_is_some(engine, tmp_path):
    """A namespace of mounts of its own: what was acknowledged stays, what found no room is an error."""
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", _FULL_FILE_SYSTEM, str(tmp_path), engine]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "done\n", done.stderr


@EVERY
def test_another_file_another_size(engine):
    with drive(engine) as made:
        before = made.device.engine.file
        made.driver.add([Buffer(HEADER, 16), Buffer(BUFFER, 512, True), Buffer(STATUS, 1, True)])
        made.memory.write(HEADER, abi.VIRTIO_BLK_REQ.pack(abi.VIRTIO_BLK_T_IN, 0, 1))
        made.kick()
        deferral = made.device.update_file(backing_file(b"n" * 2048))
        assert (deferral is None) == (engine in ("Sync", "extension") or not made.device.engine.in_flight)
        if deferral is not None:
            run_until(made.events, lambda: deferral.done)
        assert made.memory.read(BUFFER, 512) == pattern()[512:1024]
        made.driver.take_used()
        assert before.fd == -1
        assert made.notify.config_count == 1
        assert abi.VIRTIO_BLK_CONFIG.unpack(made.device.config())[0] == 4
        assert made.read(3) == b"n" * 512
        assert made.ask(abi.VIRTIO_BLK_T_IN, 4, [Buffer(BUFFER, 512, True)]) == IOERR
        os.ftruncate(made.device.engine.file.fd, 8 << 9)
        made.device.engine.file.refresh()
        made.device.update_file(made.device.engine.file)
        assert made.read(7) == bytes(512)
        assert made.notify.config_count == 2
        made.stop()
        assert made.device.update_file(backing_file()) is None
        made.activate()
        assert made.read(SECTORS - 1) == pattern()[-512:]


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_a_stop_and_another_file_wait_for_what_is_in_flight(engine):
    """What the new file lets go on must not be in flight when the device says that it has stopped."""
    with drive(engine) as made:
        made.memory.write(HEADER, abi.VIRTIO_BLK_REQ.pack(abi.VIRTIO_BLK_T_IN, 0, 1))

        def offer() -> None:
            for number in range(4):
                made.driver.add([Buffer(HEADER, 16), Buffer(HIGH + 512 * number, 512, True), Buffer(STATUS, 1, True)])
            made.kick()

        made.device.engine.completions = list  # type: ignore[method-assign]  # nothing is done yet
        offer()
        changed = made.device.update_file(backing_file(b"n" * 2048))
        stopped = made.device.stop()
        offer()
        assert changed is not None
        assert stopped is not None
        del made.device.engine.completions
        made.device._completed(0)
        run_until(made.events, lambda: stopped.done)
        assert changed.done
        assert made.device.engine.in_flight == 0
        assert made.device.activation is None
        made.activate()
        assert sum(used.written == 513 for used in made.settle()) >= 4
        assert made.memory.read(HIGH, 512) == b"n" * 512


@EVERY
def test_a_file_that_comes_as_a_descriptor(engine):
    with drive(engine) as made:
        made.device.update_files([os.dup(backing_file(b"n" * 2048).fd)])
        assert made.read(3) == b"n" * 512
        before = os.listdir("/proc/self/fd")
        with pytest.raises(BackingFileError, match="neither a regular file nor a block device"):
            made.device.update_files([os.eventfd(0)])
        assert os.listdir("/proc/self/fd") == before
        assert made.read(3) == b"n" * 512


@EVERY
def test_an_update_that_the_engine_does_not_take_changes_nothing(engine, monkeypatch):
    with drive(engine) as made:

        def refuse(_file):
            raise OSError(12, "no memory")

        monkeypatch.setattr(made.device.engine, "replace_file", refuse)
        file = backing_file(b"n" * 2048)
        assert made.device.update_file(file) is None
        assert file.fd == -1
        assert made.read(1) == pattern()[512:1024]
        values = made.device.collect().values
        assert (values["update_fails"], values["update_count"], made.notify.config_count) == (1, 0, 0)


@EVERY
def test_after_a_flush_that_failed_none_is_acknowledged(engine):
    """The kernel reports what it could not write once; what the driver has believed is lost then."""
    file = backing_file()
    kept, event = os.dup(file.fd), os.eventfd(0)
    os.dup2(event, file.fd)  # cannot be synchronised: EINVAL
    with drive(WAYS[engine](file), writeback=True) as made:
        assert made.ask(abi.VIRTIO_BLK_T_FLUSH, 0) == IOERR
        os.dup2(kept, file.fd)
        if engine == "io_uring":
            made.device.engine._ring.replace_file(file.fd)  # type: ignore[attr-defined]
        assert made.read(0) == pattern()[:512]
        assert made.ask(abi.VIRTIO_BLK_T_FLUSH, 0) == IOERR
        assert made.device.collect().values["execute_fails"] == 2
        made.device.update_file(backing_file())
        assert made.ask(abi.VIRTIO_BLK_T_FLUSH, 0) == OK
    os.close(kept)
    os.close(event)


@EVERY
def test_an_open_file_is_taken_and_what_is_none_is_refused(engine):
    with drive(engine) as made:
        before = made.device.engine.file
        reader, writer = os.pipe()
        with pytest.raises(BackingFileError, match="a FIFO"):
            made.device.update_files([reader])
        with pytest.raises(OSError):
            os.fstat(reader)
        os.close(writer)
        assert made.read(1) == pattern()[512:1024]
        os.ftruncate(before.fd, 4 << 9)
        assert made.device.update_files([]) is None
        assert made.ask(abi.VIRTIO_BLK_T_IN, 4, [Buffer(BUFFER, 512, True)]) == IOERR
        fd = os.memfd_create("other")
        os.truncate(fd, 8 << 9)
        assert made.device.update_files([fd]) is None
        assert made.read(7) == bytes(512)
        assert (before.fd, made.device.engine.file.fd) == (-1, fd)
        assert made.notify.config_count == 2
