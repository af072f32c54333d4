"""What a cell's own limits hold against, in a process that has them: mappings of every kind."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import struct
from collections.abc import Callable

import pytest

from ipc import bounds
from ipc.bounds import MIB

_GROWS_DOWN = 0x100
_GUEST = 64 * MIB
#: More than a cell may have, and less than its guest and all it may have together.
_TOO_MUCH = 256 * MIB


def _map(flags: int, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> int:
    """Map too much; return the error number, 0 if it worked."""
    try:
        mmap.mmap(-1, _TOO_MUCH, flags=flags, prot=protection).close()
    except OSError as error:
        return error.errno or -1
    return 0


def _in_a_child(work: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    """Run ``work`` in a child, whose limits nobody else feels; return its numbers."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            numbers = work()
            os.write(writer, struct.pack(f"{len(numbers)}i", *numbers))
        finally:
            os._exit(0)
    os.close(writer)
    data = os.read(reader, 4096)
    os.close(reader)
    os.waitpid(pid, 0)
    return struct.unpack(f"{len(data) // 4}i", data)


def _hold(unpacks_again: bool = False) -> None:
    """The limits of a controller of a guest that runs; the test's process has far more loaded than a cell."""
    own = 512 * MIB
    resource.setrlimit(resource.RLIMIT_DATA, (own, own + 160 * MIB))
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))
    bounds.guest_runs(_GUEST, unpacks_again=unpacks_again)


def _leave_room(room: int) -> None:
    """Lower the limits to what this process has, and ``room`` beside."""
    with open("/proc/self/status", encoding="ascii") as file:
        sizes = dict(line.split(":") for line in file.read().splitlines())
    data, space = (int(sizes[name].split()[0]) << 10 for name in ("VmData", "VmSize"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + room, data + room))
    resource.setrlimit(resource.RLIMIT_AS, (space + room, space + room))


_PRIVATE, _SHARED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS


@pytest.mark.parametrize("flags", [_PRIVATE, _SHARED, _PRIVATE | _GROWS_DOWN], ids=["private", "shared", "stack"])
def test_no_kind_of_mapping_gets_past_both_limits(flags: int) -> None:
    def work() -> tuple[int, ...]:
        before = _map(flags)
        _leave_room(64 * MIB)
        return before, _map(flags)

    assert _in_a_child(work) == (0, errno.ENOMEM)


def test_the_limit_on_data_alone_does_not_hold_against_shared_mappings_and_stacks() -> None:
    """Why there are two."""

    def work() -> tuple[int, ...]:
        with open("/proc/self/status", encoding="ascii") as file:
            data = next(int(line.split()[1]) for line in file if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, ((data << 10) + 64 * MIB,) * 2)
        return _map(_PRIVATE), _map(_SHARED), _map(_PRIVATE | _GROWS_DOWN)

    assert _in_a_child(work) == (errno.ENOMEM, 0, 0)


def test_a_guest_that_runs_lowers_both_limits_for_good() -> None:
    def work() -> tuple[int, ...]:
        _hold()
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        _, space = resource.getrlimit(resource.RLIMIT_AS)
        return soft // MIB, hard // MIB, (space - hard - _GUEST) // MIB

    assert _in_a_child(work) == (512, 512, 64)


def test_a_machine_that_starts_anew_keeps_the_room_for_its_kernel() -> None:
    def work() -> tuple[int, ...]:
        _hold(unpacks_again=True)
        before = resource.getrlimit(resource.RLIMIT_DATA)
        with bounds.Unpacking():
            inside = resource.getrlimit(resource.RLIMIT_DATA)
        after = resource.getrlimit(resource.RLIMIT_DATA)
        return *(each // MIB for each in (*before, *inside)), int(after == before)

    assert _in_a_child(work) == (512, 672, 672, 672, 1)


def test_without_limits_of_the_jailer_nothing_is_lowered() -> None:
    def work() -> tuple[int, ...]:
        bounds.guest_runs(_GUEST)
        limits = [resource.getrlimit(each)[1] for each in (resource.RLIMIT_DATA, resource.RLIMIT_AS)]
        return (limits.count(resource.RLIM_INFINITY),)

    assert _in_a_child(work) == (2,)
