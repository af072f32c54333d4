"""Sealed shared memory: nobody resizes it under another's feet, and a published page has one writer."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os

import pytest

from ipc.errors import LayoutError
from ipc.shared_memory import PAGE_SIZE, create_published, create_shared, map_shared
from tests.harness.processes import Child, open_descriptors

SIZE = 2 * PAGE_SIZE
F_SEAL_FUTURE_WRITE = 0x10


@pytest.fixture
def shared():
    descriptor = create_shared("test", SIZE)
    yield descriptor
    os.close(descriptor)


def unsealed(size: int, seals: int = 0) -> int:
    descriptor = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    if seals:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def errno_of(function, *arguments) -> int:
    """Call and return the errno that it fails with, 0 if it does not fail."""
    try:
        function(*arguments)
    except OSError as error:
        return error.errno or -1
    return 0


def attack(descriptor: int) -> dict[str, int]:
    """What a hostile holder of the descriptor tries; errno of each."""
    return {
        "shrink": errno_of(os.ftruncate, descriptor, 0),
        "grow": errno_of(os.ftruncate, descriptor, SIZE + PAGE_SIZE),
        "fallocate": errno_of(os.posix_fallocate, descriptor, SIZE, PAGE_SIZE),
        "seal": errno_of(fcntl.fcntl, descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        "write": errno_of(os.pwrite, descriptor, b"\xff", 0),
        "map": errno_of(mmap.mmap, descriptor, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        "protect": protect(descriptor),
    }


def protect(descriptor: int) -> int:
    """Map for reading, then ask for writing."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    address = libc.mmap(None, SIZE, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    assert address != ctypes.c_void_p(-1).value
    return ctypes.get_errno() if libc.mprotect(address, SIZE, mmap.PROT_READ | mmap.PROT_WRITE) else 0


def test_a_peer_cannot_resize(shared):
    mapping = map_shared(shared, SIZE)
    with Child(lambda: attack(shared)) as peer:
        outcome = peer.join()
    assert outcome == {
        "shrink": errno.EPERM,
        "grow": errno.EPERM,
        "fallocate": errno.EPERM,
        "seal": errno.EPERM,
        "write": 0,
        "map": 0,
        "protect": 0,
    }
    assert len(mapping) == SIZE
    assert mapping[SIZE - 1] == 0  # still there: no SIGBUS
    assert mapping[0] == 0xFF


def test_a_peer_cannot_write_a_published_page():
    descriptor, mapping = create_published("test", SIZE)
    mapping[0] = 1
    view = map_shared(descriptor, SIZE, writable=False)
    with Child(lambda: attack(descriptor)) as peer:
        outcome = peer.join()
    assert set(outcome.values()) & {0} == set()
    assert outcome["write"] == outcome["map"] == errno.EPERM
    assert outcome["protect"] == errno.EACCES
    mapping[0] = 2
    assert view[0] == 2
    with pytest.raises(LayoutError, match="cannot map"):
        map_shared(descriptor, SIZE)
    os.close(descriptor)


def test_memory_is_shared_with_a_child(shared):
    mapping = map_shared(shared, SIZE)

    def write() -> None:
        map_shared(shared, SIZE)[PAGE_SIZE] = 7

    with Child(write) as child:
        child.join()
    assert mapping[PAGE_SIZE] == 7


def test_read_only_mapping_is_read_only(shared):
    mapping = map_shared(shared, SIZE, writable=False)
    assert memoryview(mapping).readonly
    with pytest.raises(TypeError):
        mapping[0] = 1


@pytest.mark.parametrize("size", [-PAGE_SIZE, -1, 0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1, 1 << 62, 1 << 64])
def test_odd_sizes_are_refused(size):
    before = open_descriptors()
    with pytest.raises(LayoutError):
        create_shared("test", size)
    with pytest.raises(LayoutError):
        create_published("test", size)
    assert open_descriptors() == before


@pytest.mark.parametrize("name", ["x" * 250, "nul\0"])
def test_bad_names_are_refused(name):
    with pytest.raises((LayoutError, ValueError)):
        create_shared(name, SIZE)


@pytest.mark.parametrize("size", [0, 1, PAGE_SIZE, SIZE - 1, SIZE + 1, SIZE + PAGE_SIZE])
def test_another_size_is_refused(shared, size):
    with pytest.raises(LayoutError, match="expected"):
        map_shared(shared, size)


@pytest.mark.parametrize(
    "seals",
    [
        0,
        fcntl.F_SEAL_SHRINK,
        fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW,
        fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
        fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL,
    ],
)
def test_missing_seals_are_refused(seals):
    descriptor = unsealed(SIZE, seals)
    with pytest.raises(LayoutError, match="not sealed"):
        map_shared(descriptor, SIZE)
    os.close(descriptor)


def test_the_size_is_read_after_the_seals(monkeypatch):
    """A holder that shrinks and seals between our two looks must not get a mapping beyond the object's end."""
    descriptor = unsealed(SIZE)
    real = os.fstat

    def shrink_then_seal(number: int) -> os.stat_result:
        found = real(number)
        os.ftruncate(descriptor, 0)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", shrink_then_seal)
        with pytest.raises(LayoutError):
            map_shared(descriptor, SIZE)
    os.close(descriptor)


def test_other_objects_are_refused(tmp_path):
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, SIZE)
    reader, writer = os.pipe()
    event = os.eventfd(0)
    for descriptor in (file, reader, writer, event, 9999):
        with pytest.raises(LayoutError):
            map_shared(descriptor, SIZE)
    for descriptor in (file, reader, writer, event):
        os.close(descriptor)


def test_the_size_limit_is_reported():
    """RLIMIT_FSIZE makes ftruncate fail (and, unless ignored as Python does, sends SIGXFSZ)."""

    def limited() -> str:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_SIZE, PAGE_SIZE))
        before = open_descriptors()
        try:
            create_shared("test", SIZE)
        except LayoutError as error:
            assert open_descriptors() == before
            return str(error)
        return "no error"

    with Child(limited) as child:
        assert "File too large" in child.join()


def test_descriptors_are_close_on_exec(shared):
    published, mapping = create_published("test", SIZE)
    assert not os.get_inheritable(shared)
    assert not os.get_inheritable(published)
    mapping.close()
    os.close(published)
