"""The vmlinux inside a bzImage, into guest memory: from the cache of unpacked kernels, or unpacked now and stored.

The cache never makes a load fail: whatever is wrong with it ends in ``PayloadDetails.cache``.
"""

from __future__ import annotations

import os

from base.lean_typing import NamedTuple
from vmm.boot import bzimage, elf, heap, kernel_cache, payload
from vmm.boot.errors import BootError, KernelCacheError, PayloadError, UnsupportedPayloadError, bzimage_error
from vmm.boot.image_file import FileReader, Hasher, KernelFile, digest_of_file, new_hasher, pieces, read_at
from vmm.boot.image_memory import ImageMemory
from vmm.boot.timings import Timings

#: The values of PayloadDetails.cache; a reason in parentheses may follow.
CACHE_OFF = "off"
CACHE_HIT = "hit"
CACHE_STORED = "stored"
CACHE_NOT_STORED = "not stored"

_TRAILER_SIZE = 4
#: Unpacked faster than an entry of the cache is read and verified (docs/formats/kernel-cache.md has the figures).
_NOT_CACHED = frozenset({payload.LZ4})


class PayloadDetails(NamedTuple):
    """How the payload of a bzImage was unpacked. Sizes in bytes; ``cache`` is one of the CACHE_* values."""

    compression: str
    packed_size: int
    unpacked_size: int
    cache: str


class _Payload(NamedTuple):
    """The payload: ``size`` bytes at ``offset`` of the kernel file, size field included."""

    kind: str
    offset: int
    size: int
    unpacked_size: int


class Unpacked(NamedTuple):
    """A vmlinux in guest memory; ``pvh_entry`` is None when it has none."""

    image: elf.ElfImage
    pvh_entry: int | None
    details: PayloadDetails


def load_unpacked(
    memory: ImageMemory, file: KernelFile, header: bzimage.BzImage, cache_fd: int, timings: Timings
) -> Unpacked:
    """Load the vmlinux of a bzImage; ``cache_fd`` is the cache's directory, or -1.

    Raises UnsupportedPayloadError, before anything was written, when it cannot be unpacked here, else KernelError.
    """
    try:
        packed = _look(file, header, memory.guest.regions[0].size)
        cache = _Cache(cache_fd)
        if packed.kind in _NOT_CACHED:
            cache.switch_off(f"{packed.kind} is not worth it")
        cache.identify(file)
        if cache.usable:
            timings.done("digest")
        found = cache.load(memory)
        if found is not None:
            timings.done("load")
        else:
            found = _unpack(memory, file, packed, cache)
            timings.done("unpack")
    except UnsupportedPayloadError:
        raise
    except PayloadError as error:
        raise bzimage_error(error.code, "Unable to read bzImage compressed kernel", str(error)) from error
    return Unpacked(*found, PayloadDetails(packed.kind, packed.size, packed.unpacked_size, cache.state))


def _look(file: KernelFile, header: bzimage.BzImage, limit: int) -> _Payload:
    """Identify the payload. Raises PayloadError, also when it says that it unpacks to more than ``limit`` bytes.

    The limit is the guest's RAM: a kernel that is larger cannot be loaded, so there is no use in unpacking it.
    """
    offset, size = header.payload_offset, header.payload_size
    kind = payload.detect(read_at(file.fd, offset, min(payload.MAGIC_SIZE, size)))
    if kind is None:
        raise UnsupportedPayloadError("payload.unknown", "the kernel is packed in a way that is not known here")
    trailer = read_at(file.fd, offset + size - _TRAILER_SIZE, _TRAILER_SIZE)
    return _Payload(kind, offset, size, payload.announced_size(trailer, limit))


def _unpack(memory: ImageMemory, file: KernelFile, packed: _Payload, cache: _Cache) -> tuple[elf.ElfImage, int | None]:
    """Unpack straight into guest memory, and into the cache beside it."""
    target = elf.ElfStreamLoader(memory, packed.unpacked_size)
    recorder = cache.recorder()
    try:
        reader = FileReader(file.fd, recorder.file_hasher if recorder else None)
        # What the header said must still hold when the file is hashed along with unpacking.
        unchanged = reader.read(len(file.start)) == file.start
        reader.skip_to(packed.offset)

        def sink(piece: bytes) -> None:
            target.feed(piece)
            if recorder is not None:
                recorder.add(piece)

        payload.unpack(packed.kind, reader.read, packed.size, packed.unpacked_size, sink)
        found = target.finish()
        if recorder is not None:
            reader.skip_to(file.size)
            recorder.commit(unchanged)
    finally:
        if recorder is not None:
            recorder.close()
        heap.release()
    return found


class _Cache:
    """The cache during one load."""

    __slots__ = ("_digest", "_fd", "state")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._digest = b""
        self.state = CACHE_OFF

    @property
    def usable(self) -> bool:
        return self._fd >= 0

    def identify(self, file: KernelFile) -> None:
        """Compute the name of the kernel's entry; switch the cache off when it must not be used."""
        if self._fd < 0:
            return
        hasher = new_hasher()
        try:
            kernel_cache.check_directory(self._fd)
        except (KernelCacheError, OSError) as error:
            self.switch_off(str(error))
            return
        if hasher is None:
            self.switch_off("hashlib was not loaded before the jail")
            return
        self._digest = digest_of_file(file.fd, file.size, hasher)

    def switch_off(self, reason: str) -> None:
        """Do without a cache, if there is one, for ``reason``."""
        if self._fd < 0:
            return
        self.state = f"{CACHE_OFF} ({reason})"
        self._fd = -1

    def load(self, memory: ImageMemory) -> tuple[elf.ElfImage, int | None] | None:
        """Load the vmlinux from the cache; None, and clean guest memory, when there is no good entry."""
        if self._fd < 0:
            return None
        entry = kernel_cache.load(self._fd, self._digest)
        if entry is None:
            return None
        hasher = new_hasher()
        assert hasher is not None
        target = elf.ElfStreamLoader(memory, entry.length)
        start = kernel_cache.HEADER_SIZE
        try:
            for piece in pieces(entry.fd, start, start + entry.length):
                hasher.update(piece)
                target.feed(piece)
            found = target.finish()
            if hasher.digest() != entry.digest:
                raise KernelCacheError("cache.damaged", "the entry does not have the digest that it names")
        except (BootError, OSError):
            # It is unpacked again, and replaced.
            memory.clear()
            return None
        finally:
            os.close(entry.fd)
        self.state = CACHE_HIT
        return found

    def recorder(self) -> _Recorder | None:
        """Begin a new entry; None when there is no cache."""
        if self._fd < 0:
            return None
        file_hasher, hasher = new_hasher(), new_hasher()
        assert file_hasher is not None
        assert hasher is not None
        return _Recorder(self, self._fd, self._digest, file_hasher, hasher)


class _Recorder:
    """Writes the cache entry of a kernel while it is unpacked.

    The kernel file is hashed again on the way: if it was changed since its digest was computed, nothing is stored.
    """

    __slots__ = ("_cache", "_digest", "_hasher", "_writer", "file_hasher")

    def __init__(self, cache: _Cache, fd: int, digest: bytes, file_hasher: Hasher, hasher: Hasher) -> None:
        self._cache = cache
        self._digest = digest
        self._hasher = hasher
        self._writer = kernel_cache.CacheWriter(fd)
        self.file_hasher = file_hasher
        cache.state = CACHE_NOT_STORED

    def add(self, piece: bytes) -> None:
        """Add the next piece of the vmlinux."""
        if self._writer.failed is None:
            self._writer.write(piece)
            self._hasher.update(piece)

    def commit(self, unchanged: bool) -> None:
        """Store the entry if the kernel file is still the one whose digest names it."""
        if not unchanged or self.file_hasher.digest() != self._digest:
            self._cache.state = f"{CACHE_NOT_STORED} (the kernel file was changed meanwhile)"
        elif self._writer.commit(self._digest, self._hasher.digest()):
            self._cache.state = CACHE_STORED
        else:
            self._cache.state = f"{CACHE_NOT_STORED} ({self._writer.failed})"

    def close(self) -> None:
        """Drop the entry unless it was stored."""
        self._writer.abort()
