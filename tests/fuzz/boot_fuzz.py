"""Fuzzes the parsers of vmm.boot in a process of its own, under a limit of address space and of time per example.

    python -m tests.fuzz.boot_fuzz TARGET SEED COUNT [VMLINUZ]

Prints one JSON object with the number of examples and what became of them. Ends with a traceback when a parser raises
anything but its own errors, or takes longer than a second of CPU time.
"""

from __future__ import annotations

import json
import os
import random
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import hypothesis
from hypothesis import strategies as st

from ipc.guest_memory import GuestMemory
from tests.harness import fuzzing
from tests.harness import kernel_images as images
from vmm import layout
from vmm.boot import elf, kernel_cache, loader
from vmm.boot.cmdline import Cmdline
from vmm.boot.errors import BootError
from vmm.boot.image_memory import ImageMemory

MIB = 1 << 20
RAM = 32 * MIB
REAL_RAM = 128 * MIB

EXTREMES = (0, 1, 2, 3, 4, 0x7F, 0x80, 0xFF, 0x1FF, 0x200, 0xFFF, 0x1000, 0x7FFF, 0xFFFF, 0x100000, 0xFFFFF)
EXTREMES64 = (*EXTREMES, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
PACKINGS = ("gzip", "xz", "zstd", "lz4")

outcomes: Counter[str] = Counter()


@contextmanager
def example() -> Iterator[None]:
    """Count one example; only the parsers' own errors may come out of it."""
    with fuzzing.example(outcomes):
        try:
            yield
            outcomes["accepted"] += 1
        except BootError as error:
            if not str(error) or "." not in error.code:
                raise AssertionError(f"an error without text or code: {error!r}") from error
            outcomes["refused"] += 1
            outcomes[error.code] += 1


class Machine:
    """Guest memory and a kernel file that are used again and again."""

    def __init__(self, ram: int = RAM) -> None:
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, ram)
        self.memory = GuestMemory(self.fd, ram, layout.ram_regions(ram))
        self.kernel = os.memfd_create("kernel")

    def set_kernel(self, data: bytes) -> None:
        """Make ``data`` the content of the kernel file."""
        os.ftruncate(self.kernel, 0)
        os.pwrite(self.kernel, data, 0)

    def load(self, **options: object) -> None:
        """Load the kernel file as one example; guest memory is empty afterwards."""
        with example():
            try:
                image = loader.load_kernel(self.memory, self.kernel, Cmdline("quiet"), **options)  # type: ignore[arg-type]
                assert image.kernel_end <= self.memory.size
            except BootError:
                # A failed load has emptied guest memory itself.
                assert os.fstat(self.fd).st_blocks == 0
                raise
            finally:
                ImageMemory(self.memory).clear()


# ---------------------------------------------------------------- mutation


def mutated(source: random.Random, data: bytes, fields: tuple[tuple[int, str], ...], prefix: int) -> bytes:
    """Return ``data`` with some of its header fields, bytes or its length changed; most changes hit the prefix."""
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 1, 2, 3, 8))):
        kind = source.randrange(10)
        if kind < 5 and fields:
            offset, code = source.choice(fields)
            size = struct.calcsize(code)
            value = source.choice(EXTREMES64) if source.random() < 0.7 else source.getrandbits(64)
            if source.random() < 0.3:
                value = struct.unpack_from(code, data, offset)[0] + source.randint(-4096, 4096)
            struct.pack_into(code, changed, offset, value & ((1 << 8 * size) - 1))
        elif kind < 8:
            changed[source.randrange(min(prefix, len(changed)))] = source.randrange(256)
        elif kind < 9:
            changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
        else:
            del changed[source.randrange(len(changed)) :]
            break
        if not changed:
            break
    return bytes(changed)


def elf_fields(count: int) -> tuple[tuple[int, str], ...]:
    """Return offset and format of every field of an ELF header and ``count`` program headers."""
    fields = [(18, "<H"), (24, "<Q"), (32, "<Q"), (54, "<H"), (56, "<H")]
    for index in range(count):
        start = 64 + 56 * index
        fields += [(start, "<I"), *((start + offset, "<Q") for offset in (8, 24, 32, 40, 48))]
    return tuple(fields)


SETUP_FIELDS = (
    (0x1F1, "<B"), (0x1FE, "<H"), (0x201, "<B"), (0x202, "<I"), (0x206, "<H"), (0x211, "<B"), (0x22C, "<I"),
    (0x230, "<I"), (0x234, "<B"), (0x236, "<H"), (0x248, "<I"), (0x24C, "<I"), (0x258, "<Q"), (0x260, "<I"),
)  # fmt: skip


def fuzz_elf(source: random.Random, count: int, _: str | None) -> None:
    """vmlinux files with changed headers, notes and lengths."""
    machine = Machine()
    kernel = images.small_kernel()
    notes = 64 + 56 * 3
    for _index in range(count):
        data = mutated(source, kernel, elf_fields(3), notes + 24)
        machine.set_kernel(data)
        machine.load(entry=source.choice(("auto", "pvh", "linux64")))


def fuzz_bzimage(source: random.Random, count: int, _: str | None) -> None:
    """bzImages with changed headers and damaged payloads in every packing."""
    machine = Machine()
    kernel = images.small_kernel(40_000)
    corpus = [images.bzimage(images.compress(kind, kernel)) for kind in PACKINGS]
    initrd = os.memfd_create("initrd")
    os.pwrite(initrd, b"initrd" * 1000, 0)
    for _index in range(count):
        machine.set_kernel(mutated(source, source.choice(corpus), SETUP_FIELDS, 0x800 + 0x300 + 64))
        machine.load(
            unpack=source.random() < 0.8,
            entry=source.choice(("auto", "pvh", "linux64")),
            initrd_fd=initrd if source.random() < 0.5 else None,
        )


def fuzz_payload(source: random.Random, count: int, _: str | None) -> None:
    """Payloads alone: damage anywhere, wrong sizes, pieces put together from several packings."""
    machine = Machine()
    kernel = images.small_kernel(40_000)
    corpus = [images.compress(kind, data) for kind in PACKINGS for data in (kernel, bytes(3 * MIB), kernel * 20)]
    for _index in range(count):
        payload = source.choice(corpus)
        payload = mutated(source, payload, (), len(payload))
        if source.random() < 0.1:
            payload = payload[: source.randrange(len(payload) + 1)] + source.choice(corpus)
        if len(payload) > 4 and source.random() < 0.3:
            payload = payload[:-4] + struct.pack("<I", source.choice((0, 1, len(kernel), 3 * MIB, RAM, 0xFFFF_FFFF)))
        machine.set_kernel(images.bzimage(payload))
        machine.load()


def fuzz_cache(source: random.Random, count: int, _: str | None) -> None:
    """Entries of the kernel cache: a damaged one is never used, and always replaced."""
    import hashlib
    import shutil
    import tempfile

    machine = Machine()
    kernel = images.small_kernel(20_000)
    bzimage = images.bzimage(images.compress("gzip", kernel))
    machine.set_kernel(bzimage)
    directory = tempfile.mkdtemp()
    fd = os.open(directory, os.O_RDONLY)
    name = hashlib.sha256(bzimage).hexdigest()
    path = f"{directory}/{name}"
    try:
        kernel_cache.store(fd, hashlib.sha256(bzimage).digest(), kernel)
        with open(path, "rb") as file:
            sound = file.read()
        fields = ((8, "<I"), (12, "<I"), (48, "<Q"))
        for _index in range(count):
            with open(path, "wb") as file:
                file.write(mutated(source, sound, fields, 56))
            machine.load(cache_fd=fd)
            with open(path, "rb") as file:
                assert file.read()[16:] == sound[16:]
    finally:
        os.close(fd)
        shutil.rmtree(directory)


def fuzz_real(source: random.Random, count: int, vmlinuz: str | None) -> None:
    """A distribution's kernel with a changed setup header or payload, and its vmlinux with changed ELF headers."""
    assert vmlinuz is not None
    with open(vmlinuz, "rb") as file:
        kernel = file.read()
    machine = Machine(REAL_RAM)
    machine.set_kernel(kernel)
    setup = (kernel[0x1F1] + 1) * 512
    payload = setup + struct.unpack_from("<I", kernel, 0x248)[0]
    size = struct.unpack_from("<I", kernel, 0x24C)[0]
    for _index in range(count):
        # Only what changes is written: the file has 14 MiB.
        changes: list[tuple[int, bytes]] = []
        if source.random() < 0.6:
            changes.append((0x1F1, mutated(source, kernel[:0x300], SETUP_FIELDS, 0x300)[0x1F1:]))
        if source.random() < 0.5:
            offset = payload + source.randrange(source.choice((8, 64, 4096, size)))
            changes.append((offset, source.randbytes(source.choice((1, 1, 4, 64)))))
        if source.random() < 0.1:
            changes.append((payload + size - 4, source.randbytes(4)))
        for offset, data in changes:
            os.pwrite(machine.kernel, data, offset)
        if source.random() < 0.1:
            os.ftruncate(machine.kernel, source.randrange(len(kernel)))
        machine.load(unpack=source.random() < 0.9)
        os.ftruncate(machine.kernel, len(kernel))
        for offset, data in changes:
            os.pwrite(machine.kernel, kernel[offset : offset + len(data)], offset)
        if os.fstat(machine.kernel).st_size != len(kernel) or source.random() < 0.1:
            machine.set_kernel(kernel)


# ---------------------------------------------------------------- hypothesis

U64 = st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from(EXTREMES64), st.integers(0x100000, RAM))
SMALL_BYTES = st.binary(max_size=300)


def usually(value: st.SearchStrategy[int], otherwise: st.SearchStrategy[int] = U64) -> st.SearchStrategy[int]:
    """Draw a fitting value seven times out of eight."""
    return st.integers(0, 7).flatmap(lambda draw: otherwise if draw == 7 else value)


NOTES = st.lists(
    st.one_of(
        st.builds(images.note, st.sampled_from((b"Xen\0", b"GNU\0", b"Xe", b"")), st.integers(0, 20), SMALL_BYTES),
        st.builds(images.pvh_note, usually(st.just(0x100004))),
    ),
    max_size=4,
).map(b"".join)


@st.composite
def elf_files(draw: st.DrawFn) -> bytes:
    """Draw an ELF file in which most things fit."""
    loads = []
    for index in range(draw(st.integers(0, 4))):
        data = draw(SMALL_BYTES)
        loads.append(
            images.Load(
                draw(usually(st.just(0x100000 + index * 0x10000))),
                data,
                draw(usually(st.integers(len(data), 0x10000))),
            )
        )
    return images.elf(
        loads,
        draw(usually(st.just(0x100000))),
        draw(st.one_of(NOTES, NOTES, SMALL_BYTES)),
        draw(usually(st.sampled_from((0, 4)))),
        draw(SMALL_BYTES),
    )


ELF_FILES = elf_files()
PAYLOADS = st.one_of(
    SMALL_BYTES,
    st.builds(images.compress, st.sampled_from(PACKINGS), ELF_FILES),
    st.builds(images.compress, st.sampled_from(PACKINGS), SMALL_BYTES),
    st.tuples(
        st.sampled_from((b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", images.LZ4_LEGACY_MAGIC)), SMALL_BYTES
    ).map(b"".join),
)
U32 = st.integers(0, 0xFFFF_FFFF)
BZIMAGES = st.builds(
    images.bzimage,
    PAYLOADS,
    version=usually(st.just(0x20F), st.integers(0, 0xFFFF)),
    extended_flags=usually(st.just(0x7F), st.integers(0, 0xFFFF)),
    load_flags=usually(st.just(1), st.integers(0, 255)),
    setup_sectors=st.integers(0, 64),
    preferred_address=usually(st.just(0x100_0000)),
    alignment=usually(st.just(0x20_0000), st.one_of(st.sampled_from((0, 1, 0x1000, 0x4000_0000)), U32)),
    relocatable=st.integers(0, 1),
    init_size=usually(st.just(0x10_0000), U32),
    initrd_address_max=U32,
    header_end=usually(st.just(0x26C), st.integers(0x202, 0x301)),
    payload_offset=usually(st.just(0x300), st.integers(0x200, 0x1000)),
    payload_size=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 1000), U32),
)


def search(count: int, seed: int, strategy: st.SearchStrategy[bytes], use: Callable[[bytes], None]) -> None:
    """Let hypothesis look for an example that breaks ``use``."""
    settings = hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )
    # Settings first, then the seed, then the test: the order that hypothesis wants its decorators in.
    hypothesis.seed(seed)(settings(hypothesis.given(strategy)(use)))()


def search_elf(source: random.Random, count: int, _: str | None) -> None:
    """Whole ELF files, loaded from a file and as a stream; both must judge alike."""
    machine = Machine()

    def use(data: bytes) -> None:
        machine.set_kernel(data)
        machine.load()
        stream = elf.ElfStreamLoader(ImageMemory(machine.memory), len(data))
        with example():
            try:
                for start in range(0, len(data), 1000):
                    stream.feed(data[start : start + 1000])
                stream.finish()
            finally:
                ImageMemory(machine.memory).clear()

    search(count, source.getrandbits(32), ELF_FILES, use)


def search_bzimage(source: random.Random, count: int, _: str | None) -> None:
    """bzImages with any header and payload."""
    machine = Machine()

    def use(data: bytes) -> None:
        machine.set_kernel(data)
        machine.load(unpack=bool(len(data) & 1))

    search(count, source.getrandbits(32), BZIMAGES, use)


def search_anything(source: random.Random, count: int, _: str | None) -> None:
    """Files without any structure behind the magics."""
    machine = Machine()

    def use(data: bytes) -> None:
        machine.set_kernel(data)
        machine.load()

    search(count, source.getrandbits(32), st.one_of(SMALL_BYTES, SMALL_BYTES.map(b"\x7fELF\2\1\1".__add__)), use)


TARGETS = {
    "elf": fuzz_elf,
    "bzimage": fuzz_bzimage,
    "payload": fuzz_payload,
    "cache": fuzz_cache,
    "real": fuzz_real,
    "search-elf": search_elf,
    "search-bzimage": search_bzimage,
    "search-anything": search_anything,
}


def main(arguments: list[str]) -> None:
    """Run one target."""
    target, seed, count, *rest = arguments
    loader.warm()
    fuzzing.limit()
    TARGETS[target](random.Random(f"{target} {seed}"), int(count), rest[0] if rest else None)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1:])
