"""A connection to a back end that may say anything, or nothing: it ends with one error, and keeps no descriptor."""

from __future__ import annotations

import os
import random
import socket
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from base.event_manager import EventManager
from tests.harness.event_loop import run_until
from virtio.errors import VhostUserError
from virtio.vhost_user import connection as module
from virtio.vhost_user import protocol
from virtio.vhost_user.connection import Connection


class Subscriber:
    def init(self, ops):
        self.ops = ops

    def process(self, events, ops):
        raise AssertionError


class Pair:
    """A connection, and the back end's end of its socket."""

    def __init__(self) -> None:
        self.before = os.listdir("/proc/self/fd")
        self.events = EventManager()
        self.subscriber = Subscriber()
        self.number = self.events.add_subscriber(self.subscriber)
        mine, self.peer = socket.socketpair()
        self.errors: list[VhostUserError] = []
        self.connection = Connection(mine.detach(), self.subscriber.ops, self.errors.append)
        self.replies: list[object] = []
        self.done = 0

    def ask(self, *messages):
        """Say these, and take the replies."""

        def conversation():
            for message in messages:
                reply = yield message
                for fd in reply.fds:
                    os.close(fd)
                self.replies.append(reply.payload)

        self.connection.converse(conversation(), self._ended)

    def _ended(self):
        self.done += 1

    def run(self):
        run_until(self.events, lambda: bool(self.errors) or self.done)

    def close(self):
        self.connection.close()
        self.connection.close()
        self.peer.close()
        self.events.remove_subscriber(self.number)
        self.events.close()
        assert os.listdir("/proc/self/fd") == self.before


@pytest.fixture
def pair():
    made = Pair()
    yield made
    made.close()


def reply(request, payload, flags=5):
    return struct.pack("<III", request, flags, len(payload)) + payload


def test_messages_and_replies_in_order(pair):
    pair.ask(protocol.ask(protocol.GET_FEATURES), protocol.u64(protocol.SET_FEATURES, 3, acknowledged=True))
    pair.ask(protocol.ask(protocol.GET_PROTOCOL_FEATURES))
    assert pair.peer.recv(100) == struct.pack("<III", 1, 1, 0)
    for byte in reply(1, struct.pack("<Q", 9)):
        pair.peer.send(bytes([byte]))
        run_until(pair.events, lambda: True)
    run_until(pair.events, lambda: len(pair.replies) == 1)
    assert pair.peer.recv(100) == struct.pack("<IIIQ", 2, 9, 8, 3)
    pair.peer.send(reply(2, bytes(8)))
    pair.run()
    assert pair.done == 1
    pair.peer.send(reply(15, struct.pack("<Q", 7)))
    run_until(pair.events, lambda: pair.done == 2)
    assert pair.replies == [struct.pack("<Q", 9), bytes(8), struct.pack("<Q", 7)]
    assert not pair.errors


def test_a_refusal_is_an_error(pair):
    pair.ask(protocol.u64(protocol.SET_FEATURES, 3, acknowledged=True))
    pair.peer.send(reply(2, struct.pack("<Q", 1)))
    pair.run()
    assert [str(error) for error in pair.errors] == ["the back end refuses request 2"]


@pytest.mark.parametrize("asks", [False, True])
def test_a_back_end_that_goes_away(pair, asks):
    if asks:
        pair.ask(protocol.ask(protocol.GET_FEATURES))
    pair.peer.close()
    pair.run()
    assert len(pair.errors) == 1
    assert not pair.connection.is_open


def test_a_back_end_that_speaks_unasked(pair):
    pair.peer.send(b"hello")
    pair.run()
    assert "what it was not asked for" in str(pair.errors[0])


def test_a_back_end_that_does_not_answer(pair, monkeypatch):
    monkeypatch.setattr(module, "REPLY_TIMEOUT_NS", 1_000_000)
    pair.ask(protocol.ask(protocol.GET_FEATURES))
    pair.run()
    assert [str(error) for error in pair.errors] == ["the back end does not answer"]


def test_a_back_end_that_does_not_read(pair):
    pair.ask(*[protocol.u64(protocol.SET_FEATURES, 0)] * 100_000)
    pair.run()
    assert pair.errors


@pytest.mark.parametrize(("request_", "count"), [(protocol.GET_FEATURES, 1), (protocol.GET_INFLIGHT_FD, 2), (31, 60)])
def test_descriptors_that_nobody_asked_for_are_closed(pair, request_, count):
    pair.ask(protocol.ask(request_))
    socket.send_fds(pair.peer, [reply(request_, bytes(24))], [0] * count)
    pair.run()
    assert "too many descriptors" in str(pair.errors[0])


def test_a_descriptor_that_was_asked_for(pair):
    pair.ask(protocol.get_inflight(1, 256))
    socket.send_fds(pair.peer, [reply(31, bytes(24))], [0])
    pair.run()
    assert pair.replies == [bytes(24)]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(st.binary(max_size=40), st.integers(0, 3)), max_size=6), st.integers(0, 1 << 30))
def test_whatever_a_back_end_says_ends_in_one_error_or_a_reply(said, seed):
    chance = random.Random(seed)
    pair = Pair()
    try:
        pair.ask(protocol.ask(protocol.GET_FEATURES), protocol.get_inflight(1, 256), protocol.get_config(60))
        for each in said:
            data = each if isinstance(each, bytes) else reply(chance.choice((1, 31, 24)), chance.randbytes(8 * each))
            try:
                if data:
                    socket.send_fds(pair.peer, [data], [0] * chance.choice((0, 0, 1, 3)))
            except OSError:
                break
        pair.peer.close()
        pair.run()
        assert len(pair.errors) <= 1
        assert pair.errors or pair.done
    finally:
        pair.close()
