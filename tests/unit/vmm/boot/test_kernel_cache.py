"""The cache of unpacked kernels: only sound entries of trusted owners, atomic, bounded."""

from __future__ import annotations

import hashlib
import os
import resource
import stat
import time
from pathlib import Path

import pytest

from vmm.boot import kernel_cache
from vmm.boot.errors import KernelCacheError

DIGEST = hashlib.sha256(b"bzImage").digest()
NAME = DIGEST.hex()
DATA = b"vmlinux" * 1000


def loaded(fd: int) -> bytes | None:
    entry = kernel_cache.load(fd, DIGEST)
    if entry is None:
        return None
    data = os.pread(entry.fd, entry.length, kernel_cache.HEADER_SIZE)
    assert hashlib.sha256(data).digest() == entry.digest
    os.close(entry.fd)
    return data


def test_what_is_stored_is_found_again(cache: tuple[Path, int]) -> None:
    path, fd = cache
    assert loaded(fd) is None
    assert kernel_cache.store(fd, DIGEST, DATA)
    assert loaded(fd) == DATA
    assert [entry.name for entry in path.iterdir()] == [NAME]
    content = (path / NAME).read_bytes()
    assert content[:16] == b"CELLBKRN" + (1).to_bytes(4, "little") + (4096).to_bytes(4, "little")
    assert content[16:48] == hashlib.sha256(DATA).digest()
    assert content[48:56] == len(DATA).to_bytes(8, "little")
    assert content[56:4096] == bytes(4040)
    assert content[4096:] == DATA


def test_no_umask_makes_an_entry_that_others_can_write(cache: tuple[Path, int]) -> None:
    path, fd = cache
    before = os.umask(0)
    try:
        assert kernel_cache.store(fd, DIGEST, DATA)
    finally:
        os.umask(before)
    assert stat.S_IMODE((path / NAME).stat().st_mode) == 0o644
    assert loaded(fd) == DATA


def test_nothing_appears_before_it_is_whole(cache: tuple[Path, int]) -> None:
    path, fd = cache
    writer = kernel_cache.CacheWriter(fd)
    writer.write(DATA[:100])
    assert kernel_cache.load(fd, DIGEST) is None
    writer.write(DATA[100:])
    writer.abort()
    writer.abort()
    assert list(path.iterdir()) == []
    assert not writer.commit(DIGEST, bytes(32))


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_a_directory_that_others_can_write_is_refused(cache: tuple[Path, int], mode: int) -> None:
    path, fd = cache
    assert kernel_cache.store(fd, DIGEST, DATA)
    path.chmod(mode)
    for use in (lambda: kernel_cache.load(fd, DIGEST), lambda: kernel_cache.store(fd, DIGEST, DATA)):
        with pytest.raises(KernelCacheError) as caught:
            use()
        assert caught.value.code == "cache.directory"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_foreign_owners_are_refused(cache: tuple[Path, int]) -> None:
    path, fd = cache
    assert kernel_cache.store(fd, DIGEST, DATA)
    os.chown(path / NAME, 12345, 12345)
    assert kernel_cache.load(fd, DIGEST) is None
    os.chown(path, 12345, 12345)
    with pytest.raises(KernelCacheError):
        kernel_cache.load(fd, DIGEST)


def test_a_descriptor_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(KernelCacheError):
        kernel_cache.load(fd, DIGEST)
    os.close(fd)


def test_unsound_entries_are_as_good_as_missing(cache: tuple[Path, int], tmp_path: Path) -> None:
    path, fd = cache
    assert kernel_cache.store(fd, DIGEST, DATA)
    entry = path / NAME
    sound = entry.read_bytes()

    def patched(offset: int, data: bytes) -> bytes:
        return sound[:offset] + data + sound[offset + len(data) :]

    for damaged in (
        b"",
        sound[:30],
        sound[:4096],
        sound[:-1],
        sound + b"x",
        patched(0, b"cellbkrn"),
        patched(8, b"\2"),
        patched(12, b"\0\x20"),
        patched(48, bytes(8)),
        patched(56, b"\1"),
        patched(4095, b"\1"),
        patched(48, b"\xff" * 8),
    ):
        entry.write_bytes(damaged)
        assert kernel_cache.load(fd, DIGEST) is None
    entry.write_bytes(sound)
    assert loaded(fd) == DATA
    for mode in (0o664, 0o646):
        entry.chmod(mode)
        assert kernel_cache.load(fd, DIGEST) is None
    entry.unlink()
    (tmp_path / "elsewhere").write_bytes(sound)
    entry.symlink_to(tmp_path / "elsewhere")
    assert kernel_cache.load(fd, DIGEST) is None
    entry.unlink()
    entry.mkdir()
    assert kernel_cache.load(fd, DIGEST) is None
    entry.rmdir()
    os.mkfifo(entry)
    assert kernel_cache.load(fd, DIGEST) is None


def test_damaged_entries_are_replaced(cache: tuple[Path, int]) -> None:
    path, fd = cache
    (path / NAME).write_bytes(b"damaged")
    assert kernel_cache.store(fd, DIGEST, DATA)
    assert loaded(fd) == DATA


def test_the_oldest_entries_make_room(cache: tuple[Path, int]) -> None:
    path, fd = cache
    (path / "README").write_bytes(b"not ours")
    names = []
    for index in range(kernel_cache.MAX_ENTRIES + 3):
        digest = hashlib.sha256(bytes([index])).digest()
        assert kernel_cache.store(fd, digest, DATA)
        os.utime(path / digest.hex(), (index, index))
        names.append(digest.hex())
    assert {entry.name for entry in path.iterdir()} == {"README", *names[3:]}
    kernel_cache.evict(fd, names[3], 4)
    assert {entry.name for entry in path.iterdir()} == {"README", names[3], *names[-3:]}


def test_files_that_were_left_behind_are_removed(cache: tuple[Path, int]) -> None:
    path, fd = cache
    old, new = path / ".tmp-1-1", path / ".tmp-1-2"
    old.write_bytes(b"")
    new.write_bytes(b"")
    an_hour_ago = time.time() - 3700
    os.utime(old, (an_hour_ago, an_hour_ago))
    assert kernel_cache.store(fd, DIGEST, DATA)
    assert not old.exists()
    assert new.exists()


def test_a_file_size_limit_only_costs_the_entry(cache: tuple[Path, int]) -> None:
    path, fd = cache
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        writer = kernel_cache.CacheWriter(fd)
        writer.write(DATA)
        writer.write(DATA)
        assert not writer.commit(DIGEST, bytes(32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert writer.failed == "File too large (os error 27)"
    assert list(path.iterdir()) == []


def test_a_directory_that_is_gone_only_costs_the_entry(cache: tuple[Path, int]) -> None:
    path, fd = cache
    path.rmdir()
    assert not kernel_cache.store(fd, DIGEST, DATA)
    assert kernel_cache.load(fd, DIGEST) is None
