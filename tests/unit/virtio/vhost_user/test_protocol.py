"""Messages of vhost-user: what a back end says is bounded, whatever it says."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.messages.records import MemoryRegion
from virtio.errors import VhostUserError
from virtio.vhost_user import protocol
from virtio.vhost_user.protocol import Inflight, Message

U32, U64 = (1 << 32) - 1, (1 << 64) - 1


def test_messages_are_those_of_the_specification():
    assert protocol.pack(protocol.ask(protocol.GET_FEATURES)) == struct.pack("<III", 1, 1, 0)
    assert protocol.pack(protocol.u64(protocol.SET_FEATURES, 5)) == struct.pack("<IIIQ", 2, 1, 8, 5)
    assert protocol.pack(protocol.vring(protocol.SET_VRING_ENABLE, 0, 1, acknowledged=True)) == struct.pack(
        "<IIIII", 18, 9, 8, 0, 1
    )
    assert protocol.vring_addresses(1, 2, 3, 4).payload == struct.pack("<IIQQQQ", 1, 0, 2, 3, 4, 0)
    assert protocol.vring_fd(protocol.SET_VRING_KICK, 1, 7) == Message(12, struct.pack("<Q", 1), (7,))
    table = protocol.memory_table((MemoryRegion(0, 4096, 0), MemoryRegion(1 << 32, 8192, 4096)), 9)
    assert table.fds == (9, 9)
    assert table.payload == struct.pack("<II8Q", 2, 0, 0, 4096, 0, 0, 1 << 32, 8192, 1 << 32, 4096)
    assert protocol.get_config(60).payload == struct.pack("<III", 0, 60, 0) + bytes(60)
    inflight = Inflight(4096, 0, 1, 256)
    assert protocol.set_inflight(inflight, 5) == Message(32, struct.pack("<QQHH4x", 4096, 0, 1, 256), (5,))


def test_a_back_end_takes_so_many_regions():
    with pytest.raises(VhostUserError, match="in 9 regions"):
        protocol.memory_table([MemoryRegion(n << 30, 4096, n << 12) for n in range(9)], 3)
    with pytest.raises(VhostUserError, match="in 0 regions"):
        protocol.memory_table([], 3)


@given(st.integers(0, U32), st.integers(0, U32), st.integers(0, U32), st.integers(0, 40))
def test_a_header_is_that_of_the_reply(request, flags, size, asked):
    data = struct.pack("<III", request, flags, size)
    try:
        found = protocol.parse_header(data, asked)
    except VhostUserError:
        assert request != asked or flags & 7 != 5 or size > protocol.MAX_PAYLOAD
        return
    assert (found, request, flags & 7) == (size, asked, 5)


@given(st.binary(max_size=100), st.integers(1, 60))
def test_any_payload_is_a_value_or_an_error(payload, size):
    for parse in (
        protocol.parse_u64,
        lambda data: protocol.parse_base(data, 0),
        lambda data: protocol.parse_config(data, size),
        lambda data: protocol.parse_inflight(data, 1, 256),
        lambda data: protocol.parse_header(data, 1),
    ):
        try:
            parse(payload)
        except VhostUserError:
            continue


@given(st.integers(0, U32), st.integers(0, U32))
def test_where_a_queue_stopped(index, base):
    payload = struct.pack("<II", index, base)
    try:
        assert protocol.parse_base(payload, 1) == base
    except VhostUserError:
        assert index != 1 or base > 0xFFFF
    else:
        assert index == 1


@given(st.integers(0, U64), st.integers(0, U64))
def test_an_in_flight_region_is_bounded(size, offset):
    payload = struct.pack("<QQHH4x", size, offset, 0, 0)
    try:
        found = protocol.parse_inflight(payload, 1, 256)
    except VhostUserError:
        assert not size or max(size, offset) > protocol.MAX_INFLIGHT_SIZE
        return
    assert found == (size, offset, 1, 256)
    assert size + offset <= 2 * protocol.MAX_INFLIGHT_SIZE


@given(st.integers(0, U32), st.integers(0, U32), st.binary(max_size=80))
def test_a_configuration_space_is_what_was_asked_for(offset, length, data):
    payload = struct.pack("<III", offset, length, 0) + data
    try:
        assert protocol.parse_config(payload, 60) == data
    except VhostUserError:
        assert offset or length != 60 or len(data) != 60
