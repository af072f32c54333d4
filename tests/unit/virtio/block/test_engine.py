"""Every engine alike: the same results, in any number of parts; errors as numbers; nothing lost at a stop."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import subprocess
import sys

import pytest

from devtool.project import ROOT
from tests.harness.drives import ENGINES, SIZE, backing_file, pattern
from tests.harness.virtqueues import DATA, MIB, guest_memory
from virtio.block.backing_file import BackingFile
from virtio.block.engine import DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES, WRITE_ZEROES_UNMAP, IoRequest
from virtio.block.engines import ASYNC, SYNC, make_engine
from virtio.block.file_engine import FileEngine
from virtio.block.thread_engine import ThreadEngine
from virtio.block.uring_engine import UringEngine

EVERY = pytest.mark.parametrize("kind", ENGINES)
#: Offset of a buffer in the mapping.
AT = DATA


@pytest.fixture
def memory():
    with guest_memory() as made:
        yield made


def finish(engine, count=1):
    """Kick, and return the results of ``count`` requests by token."""
    engine.kick()
    results: dict = {}
    while True:
        for token, result in engine.completions():
            assert token not in results
            results[token] = result
        if len(results) == count:
            assert engine.in_flight == 0
            assert not engine.completions()
            return results
        assert engine.event >= 0
        assert select.select([engine.event], [], [], 10)[0]
        os.eventfd_read(engine.event)


@pytest.fixture
def engine(kind, memory):
    made = ENGINES[kind](backing_file())
    made.start(memory)
    yield made
    made.close()


@EVERY
def test_reads_and_writes_go_straight_to_guest_memory(kind, engine, memory):
    parts = [(AT, 100), (MIB + 5, 412), (AT + 4096, 1024)]
    assert engine.submit(IoRequest(READ, 512, 1536, parts, "r"))
    assert finish(engine) == {"r": 1536}
    assert b"".join(bytes(memory.view[offset : offset + length]) for offset, length in parts) == pattern()[512:2048]
    memory.view[AT : AT + 1024] = b"w" * 1024
    assert engine.submit(IoRequest(WRITE, 1024, 1024, [(AT, 1000), (AT + 1000, 24)], "w"))
    assert engine.submit(IoRequest(FLUSH, 0, 0, [], "f"))
    assert finish(engine, 2) == {"w": 1024, "f": 0}
    assert os.pread(engine.file.fd, SIZE, 0) == pattern()[:1024] + b"w" * 1024 + pattern()[2048:]


@EVERY
def test_the_end_of_the_file_cuts_short(kind, engine, memory):
    engine.submit(IoRequest(READ, SIZE - 512, 1024, [(AT, 700), (AT + 700, 324)], 1))
    engine.submit(IoRequest(READ, SIZE + 512, 512, [(AT, 512)], 2))
    engine.submit(IoRequest(READ, 0, 0, [], 3))
    assert finish(engine, 3) == {1: 512, 2: 0, 3: 0}


@EVERY
def test_holes_and_zeros(kind, memory, tmp_path):
    for folder in (tmp_path, None):
        if folder:
            (tmp_path / "disk").write_bytes(pattern())
            file = BackingFile(os.open(tmp_path / "disk", os.O_RDWR), read_only=False)
        else:
            file = backing_file()  # cannot zero a range
        engine = ENGINES[kind](file)
        engine.start(memory)
        engine.submit(IoRequest(DISCARD, 0, 4096, [], 1))
        engine.submit(IoRequest(WRITE_ZEROES, 8192, 5 * 512, [], 2))
        engine.submit(IoRequest(DISCARD, 0, 0, [], 3))
        engine.submit(IoRequest(WRITE_ZEROES_UNMAP, 20480, 4096, [], 4))
        assert finish(engine, 4) == {1: 4096, 2: 2560, 3: 0, 4: 4096}
        content = bytearray(pattern())
        for start, length in ((0, 4096), (8192, 2560), (20480, 4096)):
            content[start : start + length] = bytes(length)
        assert os.pread(file.fd, SIZE, 0) == content
        engine.close()


@EVERY
def test_where_no_hole_can_be_made_zeros_are_written_and_a_discard_does_nothing(kind, memory, monkeypatch):
    """A block device, for example, that knows no DISCARD, or only in larger units; and a signal in between."""
    results = [errno.EINTR, errno.EOPNOTSUPP, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSPC]

    def refuse(*_):
        ctypes.set_errno(results.pop(0))
        return -1

    monkeypatch.setattr("virtio.block.engine._fallocate", refuse)
    engine = ENGINES[kind](backing_file())
    engine.start(memory)
    for token, what in enumerate((WRITE_ZEROES, WRITE_ZEROES_UNMAP, DISCARD, WRITE_ZEROES)):
        engine.submit(IoRequest(what, 4096 * token, 512, [], token))
        assert finish(engine) == {token: 512 if token < 3 else -errno.ENOSPC}
    assert not results
    expected = bytes(512) + pattern()[512:4096] + bytes(512) + pattern()[4608:]
    assert os.pread(engine.file.fd, SIZE, 0) == expected
    engine.close()


@EVERY
def test_another_file(kind, engine, memory):
    before = engine.file
    count = len(os.listdir("/proc/self/fd"))
    engine.replace_file(backing_file(b"n" * 1024))
    assert before.fd == -1
    assert len(os.listdir("/proc/self/fd")) == count
    engine.submit(IoRequest(READ, 512, 1024, [(AT, 1024)], "r"))
    engine.submit(IoRequest(FLUSH, 0, 0, [], "f"))
    assert finish(engine, 2) == {"r": 512, "f": 0}
    assert bytes(memory.view[AT : AT + 512]) == b"n" * 512


_WITHOUT_THREADS = """
import os, resource, select, sys
from tests.harness.virtqueues import guest_memory
from virtio.block import uring
from virtio.block.backing_file import BackingFile
from virtio.block.engine import FLUSH, WRITE, IoRequest
from virtio.block.uring_engine import UringEngine
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 1 << 20)
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)  # user 0 is exempt from the limit
if sys.argv[2] == "before":
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    uring.WORKER_TIMEOUT_MS = 100
    try:
        UringEngine(BackingFile(fd, read_only=False))
    except BlockingIOError:
        sys.exit("refused")
with guest_memory() as memory:
    engine = UringEngine(BackingFile(fd, read_only=False))
    engine.start(memory)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    results = {}
    for number in range(8):
        memory.view[4096 * number : 4096 * (number + 1)] = bytes([number + 1]) * 4096
        engine.submit(IoRequest(WRITE, 4096 * number, 4096, [(4096 * number, 4096)], number))
    engine.submit(IoRequest(FLUSH, 0, 0, [], 8))
    engine.kick()
    while len(results) < 9:
        results.update(engine.completions())
        if len(results) < 9:
            assert select.select([engine.event], [], [], 60)[0]
    assert results == {**dict.fromkeys(range(8), 4096), 8: 0}, results
    assert os.pread(fd, 32768, 0) == bytes(memory.view[:32768])
    print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_io_uring_where_no_thread_can_be_made(when, tmp_path):
    """A sealed cell: what waits is done by the one thread that the kernel made in time, or else there is no ring."""
    command = [sys.executable, "-c", _WITHOUT_THREADS, str(tmp_path / "disk"), when]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == (("", "refused\n") if when == "before" else ("2\n", ""))


def test_the_kernel_holds_the_ring_to_its_restrictions(memory):
    """Nothing but READ, WRITE and FSYNC, only on the registered file; and nothing is registered but another file."""
    engine = UringEngine(backing_file())
    engine.start(memory)
    ring = engine._ring
    assert ring is not None
    results: dict[int, int] = {}
    for op in range(60):
        ring.fill(op, 0, memory.address, 512, flags=0, user_data=op)
        ring.submit()
        deadline = 1000
        while not (found := ring.reap()) and deadline:
            select.select([], [], [], 0.001)
            deadline -= 1
        results.update(found)
    assert {op for op, result in results.items() if result != -errno.EACCES} == {3, 22, 23}
    allowed = set()
    for what in range(30):
        try:
            ring._register(what, bytes(64), 1)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EINVAL):
                allowed.add(what)
        else:
            allowed.add(what)
    assert allowed == {6}  # EFAULT
    engine.close()


def test_which_engine_is_made(monkeypatch):
    assert type(make_engine(SYNC, backing_file())) is FileEngine
    engine = make_engine(ASYNC, backing_file())
    assert type(engine) is UringEngine
    engine.close()

    def refuse(*_):
        raise PermissionError(errno.EPERM, "io_uring is switched off")

    monkeypatch.setattr("virtio.block.uring_engine.Ring", refuse)
    before = os.listdir("/proc/self/fd")
    file = backing_file()
    engine = make_engine(ASYNC, file)
    assert type(engine) is ThreadEngine
    engine.close()
    assert os.listdir("/proc/self/fd") == before
