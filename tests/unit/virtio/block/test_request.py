"""Requests of a block driver: any framing is parsed alike, and everything is checked before an engine sees it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio import abi
from virtio.block.configuration import MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS
from virtio.block.engine import DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES, WRITE_ZEROES_UNMAP, IoRequest
from virtio.block.request import (
    Limits,
    answer_identity,
    parse,
    plan,
    take,
    without_front,
)
from virtio.errors import RequestError
from virtio.queue import Chain

LIMITS = Limits(64, False, True, True)
OK, IOERR, UNSUPP = abi.VIRTIO_BLK_S_OK, abi.VIRTIO_BLK_S_IOERR, abi.VIRTIO_BLK_S_UNSUPP


def memory_with(type: int, sector: int, data: bytes = b"") -> bytearray:
    """Guest memory: a header at 0, data behind it."""
    return bytearray(struct.pack("<IIQ", type, 0xDEAD, sector) + data).ljust(0x10000, b"\0")


def request_of(memory: bytearray, readable, writable):
    return parse(Chain(3, list(readable), list(writable)), memoryview(memory), 0)


def split(parts, places):
    """Cut parts at places of their sum; none becomes empty."""
    for place in places:
        done = 0
        for index, (offset, length) in enumerate(parts):
            if done < place < done + length:
                cut = place - done
                parts[index : index + 1] = [(offset, cut), (offset + cut, length - cut)]
                break
            done += length
    return parts


@given(
    cuts=st.lists(st.integers(1, 600), max_size=6),
    more=st.lists(st.integers(1, 1100), max_size=6),
    writes=st.booleans(),
)
def test_any_framing_is_the_same_request(cuts, more, writes):
    type = abi.VIRTIO_BLK_T_OUT if writes else abi.VIRTIO_BLK_T_IN
    memory = memory_with(type, 5)
    readable = split([(0, 16 + (512 if writes else 0))], cuts)
    writable = split([(0x1000, 1 + (0 if writes else 1024))], more)
    request = request_of(memory, readable, writable)
    assert (request.type, request.sector, request.chain.head) == (type, 5, 3)
    assert request.status == 0x1000 + (0 if writes else 1024)
    assert request.written == (1 if writes else 1025)
    assert sum(length for _, length in request.data) == request.size == request.transferred == (512 if writes else 1024)
    covered = [place for offset, length in request.data for place in range(offset, offset + length)]
    assert covered == list(range(16, 528) if writes else range(0x1000, 0x1400))
    assert plan(request, memoryview(memory), LIMITS) == IoRequest(
        WRITE if writes else READ, 5 << 9, request.size, request.data, request
    )


def test_what_cannot_be_answered_is_an_error():
    memory = memory_with(0, 0)
    for readable, writable in (([], [(0, 1)]), ([(0, 15)], [(16, 1)]), ([(0, 7), (7, 8)], [(16, 1)]), ([(0, 16)], [])):
        with pytest.raises(RequestError):
            request_of(memory, readable, writable)


@pytest.mark.parametrize(
    ("type", "sector", "size", "limits", "outcome"),
    [
        (abi.VIRTIO_BLK_T_IN, 0, 64 << 9, LIMITS, READ),
        (abi.VIRTIO_BLK_T_IN, 1, 64 << 9, LIMITS, -IOERR),
        (abi.VIRTIO_BLK_T_IN, 63, 512, LIMITS, READ),
        (abi.VIRTIO_BLK_T_IN, 64, 512, LIMITS, -IOERR),
        (abi.VIRTIO_BLK_T_IN, 64, 0, LIMITS, READ),
        (abi.VIRTIO_BLK_T_IN, (1 << 64) - 1, 512, LIMITS, -IOERR),
        (abi.VIRTIO_BLK_T_IN, 0, 511, LIMITS, -IOERR),
        (abi.VIRTIO_BLK_T_OUT, 0, 512, LIMITS, WRITE),
        (abi.VIRTIO_BLK_T_OUT, 0, 512, Limits(64, True), -IOERR),
        (abi.VIRTIO_BLK_T_OUT, 0, 100, LIMITS, -IOERR),
        (abi.VIRTIO_BLK_T_FLUSH, 99, 0, LIMITS, FLUSH),
        (abi.VIRTIO_BLK_T_FLUSH, 99, 77, Limits(0, True), FLUSH),
        (abi.VIRTIO_BLK_T_DISCARD, 0, 16, Limits(64, False), -UNSUPP),
        (abi.VIRTIO_BLK_T_WRITE_ZEROES, 0, 16, Limits(64, False), -UNSUPP),
        (2, 0, 512, LIMITS, -UNSUPP),
        (0xFFFF_FFFF, 0, 0, LIMITS, -UNSUPP),
    ],
)
def test_what_an_engine_is_asked_for(type, sector, size, limits, outcome):
    memory = memory_with(type, sector)
    if type == abi.VIRTIO_BLK_T_IN:
        readable, writable = [(0, 16)], [(0x1000, size + 1)]
    else:
        readable, writable = [(0, 16 + size)], [(0x1000, 1)]
    planned = plan(request_of(memory, readable, writable), memoryview(memory), limits)
    assert (planned.kind if isinstance(planned, IoRequest) else -planned) == outcome


@pytest.mark.parametrize(
    ("type", "segments", "outcome"),
    [
        (abi.VIRTIO_BLK_T_DISCARD, [(1, 2, 0)], (DISCARD, 512, 1024)),
        (abi.VIRTIO_BLK_T_DISCARD, [(1, 2, 1)], UNSUPP),
        (abi.VIRTIO_BLK_T_DISCARD, [(0, 65, 0)], IOERR),
        (abi.VIRTIO_BLK_T_DISCARD, [((1 << 64) - 1, 1, 0)], IOERR),
        (abi.VIRTIO_BLK_T_DISCARD, [], IOERR),
        (abi.VIRTIO_BLK_T_DISCARD, [(0, 1, 0), (1, 1, 0)], IOERR),
        (abi.VIRTIO_BLK_T_WRITE_ZEROES, [(0, 64, 0)], (WRITE_ZEROES, 0, 64 << 9)),
        (abi.VIRTIO_BLK_T_WRITE_ZEROES, [(0, 64, 1)], (WRITE_ZEROES_UNMAP, 0, 64 << 9)),
        (abi.VIRTIO_BLK_T_WRITE_ZEROES, [(0, 0, 0)], (WRITE_ZEROES, 0, 0)),
        (abi.VIRTIO_BLK_T_WRITE_ZEROES, [(0, 64, 3)], UNSUPP),
        (abi.VIRTIO_BLK_T_WRITE_ZEROES, [(0, 64, 1 << 31)], UNSUPP),
    ],
)
def test_segments(type, segments, outcome):
    data = b"".join(struct.pack("<QII", *segment) for segment in segments)
    memory = memory_with(type, 0, data)
    request = request_of(memory, split([(0, 16 + len(data))], (20, 27)), [(0x1000, 1)])
    planned = plan(request, memoryview(memory), LIMITS)
    if isinstance(planned, IoRequest):
        assert (planned.kind, planned.offset, planned.length) == outcome
        assert plan(request, memoryview(memory), LIMITS._replace(read_only=True)) == IOERR
    else:
        assert planned == outcome


def test_segments_are_bounded():
    large = Limits(1 << 40, False, True, True)
    for type, most in (
        (abi.VIRTIO_BLK_T_DISCARD, MAX_DISCARD_SECTORS),
        (abi.VIRTIO_BLK_T_WRITE_ZEROES, MAX_WRITE_ZEROES_SECTORS),
    ):
        for count, refused in ((most, False), (most + 1, True)):
            memory = memory_with(type, 0, struct.pack("<QII", 0, count, 0))
            planned = plan(request_of(memory, [(0, 32)], [(0x1000, 1)]), memoryview(memory), large)
            assert (planned == IOERR) is refused


def test_the_identity_takes_twenty_bytes():
    identity = bytes(range(20))
    for lengths, answered in (((20,), True), ((7, 30), True), ((19,), False), ((), False)):
        memory = memory_with(abi.VIRTIO_BLK_T_GET_ID, 0)
        writable = [(0x1000 * (k + 1), length) for k, length in enumerate(lengths)]
        request = request_of(memory, [(0, 16)], [*writable, (0x8000, 1)])
        assert answer_identity(request, memoryview(memory), identity) is answered
        if answered:
            assert take(request.data, memoryview(memory), 20) == identity


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(0, 100))
def test_front_and_rest_are_the_whole(lengths, count):
    memory = bytes(range(250))
    parts: list[tuple[int, int]] = []
    for length in lengths:
        parts.append((sum(each for _, each in parts), length))
    whole = memory[: sum(lengths)]
    assert take(parts, memoryview(memory), count) == whole[:count]
    rest = without_front(parts, count)
    assert b"".join(memory[offset : offset + length] for offset, length in rest) == whole[count:]
    assert all(length for _, length in rest)
