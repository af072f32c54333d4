"""Unpacking payloads: every packer, any pieces of input, lies about sizes, damage, bombs."""

from __future__ import annotations

import random
import struct
import sys
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import kernel_images as images
from vmm.boot import payload
from vmm.boot.errors import PayloadError, UnsupportedPayloadError

KINDS = ("gzip", "xz", "zstd", "lz4")


def content(size: int) -> bytes:
    source = random.Random(size)
    return b"".join(source.choice((bytes(97), source.randbytes(53), b"kernel text ")) for _ in range(size // 50))[:size]


def reader(data: bytes, piece: int = 1 << 30) -> payload.Read:
    position = 0

    def read(size: int) -> bytes:
        nonlocal position
        part = data[position : position + min(size, piece)]
        position += len(part)
        return part

    return read


def unpack(packed: bytes, size: int, piece: int = 1 << 30, kind: str | None = None) -> bytes:
    pieces: list[bytes] = []
    kind = kind or payload.detect(packed[: payload.MAGIC_SIZE])
    assert kind is not None
    payload.unpack(kind, reader(packed, piece), len(packed), size, pieces.append)
    assert max(map(len, pieces), default=0) <= 8 << 20
    return b"".join(pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_packed_comes_out(kind: str) -> None:
    for data in (b"x", content(100_000), content(3_000_000), bytes(9 << 20)):
        packed = images.compress(kind, data)
        assert payload.detect(packed[: payload.MAGIC_SIZE]) == kind
        assert payload.announced_size(packed[-4:], 1 << 30) == len(data)
        assert unpack(packed, len(data)) == data


@pytest.mark.parametrize("kind", KINDS)
@given(piece=st.integers(1, 5000))
def test_pieces_of_input_do_not_matter(kind: str, piece: int) -> None:
    data = content(20_000)
    assert unpack(images.compress(kind, data), len(data), piece) == data


def test_lz4_with_several_blocks_and_frames() -> None:
    data = content(9 << 20)
    packed = images.compress("lz4", data)
    assert unpack(packed, len(data)) == data
    twice = packed[:-4] + packed[:-4] + struct.pack("<I", 2 * len(data))
    assert unpack(twice, 2 * len(data)) == data + data


def test_unknown_packers_are_named_unknown() -> None:
    for start in (b"BZh91A", b"\x5d\0\0\x80\0\xff", b"\x89LZO\0\r", b"\x7fELF\2\1", b"", b"\x1f"):
        assert payload.detect(start) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [-1, 1, 1000])
def test_the_announced_size_must_be_right(kind: str, error: int) -> None:
    data = content(50_000)
    with pytest.raises(PayloadError) as caught:
        unpack(images.compress(kind, data), len(data) + error)
    assert caught.value.code == "payload.size"


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_payload_is_refused(kind: str) -> None:
    data = content(50_000)
    packed = images.compress(kind, data)
    for length in (0, 3, 4, 5, 10, 20, len(packed) // 2, len(packed) - 6):
        with pytest.raises(PayloadError):
            unpack(packed[:length] + packed[-4:] if length > 5 else packed[:length], len(data), kind=kind)
    with pytest.raises(PayloadError):
        payload.unpack(kind, reader(packed[:100]), len(packed), len(data), lambda piece: None)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_after_the_stream_are_refused(kind: str) -> None:
    data = content(50_000)
    packed = images.compress(kind, data)
    with pytest.raises(PayloadError):
        unpack(packed[:-4] + bytes(12) + packed[-4:], len(data))


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_or_changes_nothing_that_can_be_checked(kind: str) -> None:
    data = content(60_000)
    packed = images.compress(kind, data)
    source = random.Random(7)
    for _ in range(300):
        damaged = bytearray(packed)
        damaged[source.randrange(len(packed) - 4)] ^= 1 << source.randrange(8)
        try:
            result = unpack(bytes(damaged), len(data), kind=kind)
        except PayloadError:
            continue
        # zstd and lz4 payloads of kernels have no checksum; the size is all that can be compared there.
        assert len(result) == len(data)
        assert kind in ("zstd", "lz4") or result == data


def test_bombs_stop_at_the_announced_size() -> None:
    size = 300 << 20
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bombs = {
        "gzip": b"".join(packer.compress(bytes(1 << 20)) for _ in range(300)) + packer.flush(),
        "zstd": zstandard.ZstdCompressor(level=3).compress(bytes(size)) + struct.pack("<I", 1000),
        "xz": images.compress("xz", bytes(32 << 20)),
    }
    for kind, bomb in bombs.items():
        seen = 0

        def sink(piece: bytes) -> None:
            nonlocal seen
            seen += len(piece)

        with pytest.raises(PayloadError) as caught:
            payload.unpack(kind, reader(bomb), len(bomb), 2 << 20, sink)
        assert caught.value.code == "payload.size"
        assert seen <= 2 << 20


@pytest.mark.parametrize("size", [0, 101, 0xFFFF_FFFF])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(PayloadError) as caught:
        payload.announced_size(struct.pack("<I", size), 100)
    assert caught.value.code == "payload.size"
    with pytest.raises(PayloadError):
        payload.announced_size(struct.pack("<I", payload.MAX_UNPACKED_SIZE + 1), 1 << 40)
    with pytest.raises(PayloadError):
        payload.announced_size(b"\1\0\0", 100)


def test_lz4_blocks_of_impossible_size_are_refused() -> None:
    for size in (0, (8 << 20) + (8 << 20) // 255 + 17, 0xFFFF_FFFF):
        data = images.LZ4_LEGACY_MAGIC + struct.pack("<I", size) + bytes(100) + struct.pack("<I", 100)
        with pytest.raises(PayloadError) as caught:
            unpack(data, 100)
        assert caught.value.code == "payload.damaged"


def test_windows_beyond_the_limit_are_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = packer.compress(bytes(1000)) + packer.flush() + struct.pack("<I", 1000)
    with pytest.raises(PayloadError) as caught:
        unpack(data, 1000)
    assert caught.value.code == "payload.damaged"
    import lzma

    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 512 << 20}]
    packed = lzma.compress(bytes(1000), check=lzma.CHECK_CRC32, filters=filters) + struct.pack("<I", 1000)
    with pytest.raises(PayloadError) as caught:
        unpack(packed, 1000)
    assert "emory" in str(caught.value)


def test_errors_of_the_sink_pass_through() -> None:
    class SinkError(Exception):
        pass

    def sink(piece: bytes) -> None:
        raise SinkError

    for kind in KINDS:
        data = images.compress(kind, b"data")
        with pytest.raises(SinkError):
            payload.unpack(kind, reader(data), len(data), 4, sink)


def test_a_packer_that_was_not_imported_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard.backend_c", None)
    with pytest.raises(UnsupportedPayloadError):
        unpack(images.compress("gzip", b"x")[:0] + b"\x28\xb5\x2f\xfd" + bytes(20), 1)


def test_warming_up_uses_every_packer() -> None:
    payload.warm()
    assert {"zlib", "_lzma", "zstandard.backend_c", "lz4.block._block"} <= set(sys.modules)
