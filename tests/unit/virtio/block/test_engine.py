"""Every engine alike: the same results, in any number of parts; errors as numbers; nothing lost at a stop."""

from __future__ import annotations

import errno
import os
import select

import pytest

from tests.harness.drives import ENGINES, SIZE, backing_file, pattern
from tests.harness.virtqueues import DATA, MIB, guest_memory
from virtio.block.backing_file import BackingFile
from virtio.block.engine import DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES, IoRequest
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
        assert finish(engine, 3) == {1: 4096, 2: 2560, 3: 0}
        assert os.pread(file.fd, SIZE, 0) == bytes(4096) + pattern()[4096:8192] + bytes(2560) + pattern()[10752:]
        engine.close()


@EVERY
def test_errors_are_numbers(kind, memory):
    engine = ENGINES[kind](BackingFile(os.open("/proc/self/exe", os.O_RDONLY), read_only=True))
    engine.start(memory)
    engine.submit(IoRequest(WRITE, 0, 512, [(AT, 512)], "w"))
    assert finish(engine)["w"] == -errno.EBADF
    engine.submit(IoRequest(WRITE, 0, 512, [(AT, 500), (AT, 12)], "two"))
    engine.submit(IoRequest(DISCARD, 0, 512, [], "d"))
    assert finish(engine, 2) == {"two": -errno.EBADF, "d": -errno.EBADF}
    engine.close()


@EVERY
def test_a_full_file_system_is_an_error(kind, memory, tmp_path):
    """The limit on a file's size is the same to the caller: no write beyond."""
    engine = ENGINES[kind](BackingFile(os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT), read_only=False))
    engine.start(memory)
    engine.submit(IoRequest(WRITE, (1 << 63) - 1024, 512, [(AT, 512)], "w"))
    assert finish(engine)["w"] in (-errno.EFBIG, -errno.EINVAL)
    engine.close()


@EVERY
def test_write_through(kind, engine, memory, monkeypatch):
    engine.write_through = True
    memory.view[AT : AT + 512] = b"t" * 512
    engine.submit(IoRequest(WRITE, 0, 512, [(AT, 512)], "w"))
    assert finish(engine) == {"w": 512}
    assert os.pread(engine.file.fd, 512, 0) == b"t" * 512


@EVERY
def test_many_at_once_and_what_has_no_room_is_refused(kind, engine, memory):
    taken = 0
    while engine.in_flight <= 1000 and taken < 1000 and engine.submit(IoRequest(READ, 0, 512, [(AT, 512)], taken)):
        taken += 1
    assert taken == 1000 if kind == "Sync" else taken == 128
    assert finish(engine, taken) == dict.fromkeys(range(taken), 512)
    for _ in range(20):
        for token in range(100):
            assert engine.submit(IoRequest(READ, 512 * (token % 64), 512, [(AT + 512 * token, 512)], token))
        assert finish(engine, 100) == dict.fromkeys(range(100), 512)
    for token in range(100):
        assert bytes(memory.view[AT + 512 * token :][:512]) == pattern()[512 * (token % 64) :][:512]


@EVERY
def test_more_parts_than_a_ring_has_entries(kind, engine, memory):
    parts = [(AT + 4 * number, 2) for number in range(256)]
    engine.submit(IoRequest(READ, 512 * 3, 512, parts, 1))
    assert finish(engine) == {1: 512}
    assert b"".join(bytes(memory.view[offset : offset + 2]) for offset, _ in parts) == pattern()[1536:2048]


def test_the_kernel_holds_the_ring_to_its_restrictions(memory):
    """Nothing but READ, WRITE and FSYNC, and only on the registered file."""
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
