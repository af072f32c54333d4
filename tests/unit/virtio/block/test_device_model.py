"""The block device against a model, in every way in which it is served: any requests, framed in any way."""

from __future__ import annotations

import os
import struct
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness.drives import BUFFER, HEADER, NO_STATUS, SECTORS, STATUS, WAYS, drive, pattern
from virtio import abi
from virtio.driver import Buffer

OK, IOERR, UNSUPP = abi.VIRTIO_BLK_S_OK, abi.VIRTIO_BLK_S_IOERR, abi.VIRTIO_BLK_S_UNSUPP
IN, OUT = abi.VIRTIO_BLK_T_IN, abi.VIRTIO_BLK_T_OUT
ZEROING = (abi.VIRTIO_BLK_T_DISCARD, abi.VIRTIO_BLK_T_WRITE_ZEROES)
#: More bytes than the drive has are asked for as well.
MOST = (SECTORS + 2) << 9

SECTOR = st.one_of(st.integers(0, SECTORS + 1), st.sampled_from([1 << 55, (1 << 64) - 1]))
SIZE = st.one_of(st.integers(0, SECTORS + 1).map(lambda count: count << 9), st.integers(0, MOST))
REQUEST = st.tuples(
    st.sampled_from([IN, IN, OUT, OUT, abi.VIRTIO_BLK_T_FLUSH, *ZEROING, 77]),
    SECTOR,
    SIZE,
    st.integers(0, SECTORS + 1),  # sectors of a segment
    st.integers(0, 3),  # its flags
    st.lists(st.integers(1, MOST), max_size=4),  # where the data is cut
    st.integers(0, 16),  # where the header is
    st.booleans(),  # an indirect table
)


class Model:
    """What a drive is: bytes, and what may be asked of it."""

    def __init__(self) -> None:
        self.content = bytearray(pattern())

    def ask(self, type: int, sector: int, data: bytes, size: int) -> tuple[int, bytes]:
        """Return the status, and what is read."""
        if type in (IN, OUT):
            if size % 512 or sector + size // 512 > SECTORS:
                return IOERR, b""
            place = slice(sector << 9, (sector << 9) + size)
            if type == IN:
                return OK, bytes(self.content[place])
            self.content[place] = data
            return OK, b""
        if type in ZEROING:
            return self._zero(type, *struct.unpack("<QII", data)), b""
        return (OK if type == abi.VIRTIO_BLK_T_FLUSH else UNSUPP), b""

    def _zero(self, type: int, sector: int, count: int, flags: int) -> int:
        if flags & ~1 or (type == abi.VIRTIO_BLK_T_DISCARD and flags):
            return UNSUPP
        if sector + count > SECTORS:
            return IOERR
        self.content[sector << 9 : sector + count << 9] = bytes(count << 9)
        return OK


def cut(address: int, size: int, cuts: list[int], *, writable: bool) -> list[Buffer]:
    """Return the buffers of some bytes, cut at these places."""
    places = sorted({0, size, *(each for each in cuts if each < size)})
    return [Buffer(address + one, other - one, writable) for one, other in pairwise(places)]


def do(made: Any, model: Model, request: tuple[Any, ...]) -> None:
    """Ask the device and the model."""
    type, sector, size, count, flags, cuts, header_cut, indirect = request
    data = b""
    if type in ZEROING:
        data, size = struct.pack("<QII", sector, count, flags), 16
    elif type == OUT:
        data = os.urandom(size)
    elif type != IN:
        size = 0
    made.memory.write(HEADER, abi.VIRTIO_BLK_REQ.pack(type, 0, sector))
    made.memory.write(STATUS, bytes([NO_STATUS, NO_STATUS]))
    made.memory.write(BUFFER, data or b"\xaa" * (size + 1))
    buffers = [*cut(HEADER, 16, [header_cut] if header_cut else [], writable=False)]
    buffers += [*cut(BUFFER, size, cuts, writable=type == IN), Buffer(STATUS, 1, True)]
    used = made.request(buffers, indirect=indirect)
    status, read = model.ask(type, sector, data, size)
    assert made.memory.read(STATUS, 2) == bytes([status, NO_STATUS])
    assert used.written == (size if type == IN else 0) + 1
    if type == IN:
        expected = read if status == OK else b"\xaa" * size
        assert made.memory.read(BUFFER, size + 1) == expected + b"\xaa"


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(requests=st.lists(REQUEST, min_size=1, max_size=12))
def test_it_is_what_the_model_is(way, requests):
    model = Model()
    with drive(way, discard=True, writeback=True) as made:
        for request in requests:
            do(made, model, request)
            assert made.content == model.content
        assert not made.notify.resets
