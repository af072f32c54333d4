"""Guest memory as the supervisor makes it: sealed, bounded, in huge pages where the host gives them."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from jailer import memory


@pytest.mark.parametrize("reserve", [False, True])
def test_memory_is_sealed_and_of_the_right_size(reserve: bool) -> None:
    maker = memory.MemoryMaker(reserve)
    for size in (4096, 1 << 30):
        descriptor = maker.make(size)
        assert os.fstat(descriptor).st_size == size
        assert os.fstat(descriptor).st_blocks == 0
        wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) == wanted
        assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        os.close(descriptor)


@pytest.mark.parametrize(("reserve", "bound"), [(False, memory.MAX_MADE), (True, memory.RESERVED)])
def test_memory_is_bounded(reserve: bool, bound: int) -> None:
    maker = memory.MemoryMaker(reserve)
    for _ in range(bound):
        os.close(maker.make(4096))
    with pytest.raises(OSError, match="times") as error:
        maker.make(4096)
    assert error.value.errno == errno.EDQUOT


@pytest.mark.parametrize(
    ("text", "given"),
    [("[always] madvise never\n", True), ("always [madvise] never\n", False), ("always madvise [never]\n", False)],
)
def test_huge_pages_only_where_the_host_gives_them_to_everybody(tmp_path: Path, text: str, given: bool) -> None:
    setting = tmp_path / "enabled"
    setting.write_text(text)
    assert memory.host_gives_huge_pages(str(setting)) is given


def test_a_kernel_without_huge_pages_gives_none(tmp_path: Path) -> None:
    assert not memory.host_gives_huge_pages(str(tmp_path / "missing"))
