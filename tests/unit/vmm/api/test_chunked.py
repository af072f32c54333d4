"""Bodies in chunks: what h11 sends and reads is what we read; any cut gives the same; nothing grows beyond bounds."""

from __future__ import annotations

import random

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import conforming_client
from vmm.api.chunked import ChunkedBody, ChunkError, ChunksTooLargeError
from vmm.api.http import ProtocolError, Request, RequestParser

LIMIT = 51200


def read(data: bytes, step: int) -> tuple[bytes | str, bytes]:
    """Return the body, or what is wrong with it, and what follows it; the input comes ``step`` bytes at a time."""
    body = ChunkedBody(LIMIT)
    buffer = bytearray()
    for start in range(0, len(data), step):
        buffer += data[start : start + step]
        try:
            if body.take(buffer):
                return bytes(body.data), bytes(buffer) + data[start + step :]
        except (ChunkError, ChunksTooLargeError) as error:
            return str(error), b""
        assert len(buffer) <= 1024 + step
        assert len(body.data) <= LIMIT
    return "incomplete", b""


@given(st.lists(st.binary(max_size=80), max_size=8), st.binary(max_size=30), st.integers(1, 50))
def test_what_an_h11_client_sends(parts, next_bytes, step):
    connection = h11.Connection(h11.CLIENT)
    headers = [("Host", "localhost"), ("Transfer-Encoding", "chunked")]
    connection.send(h11.Request(method="PUT", target="/a", headers=headers))
    sent = b"".join(connection.send(h11.Data(data=part)) or b"" for part in parts)
    sent += connection.send(h11.EndOfMessage()) or b""
    assert read(sent + next_bytes, step) == (b"".join(parts), next_bytes)


@given(st.integers(0, 1 << 32))
def test_h11_reads_what_our_conforming_client_sends_as_we_do(seed):
    """Also a check of the generator that the fuzzer uses."""
    source = random.Random(seed)
    body = conforming_client.bait(source)[:LIMIT]
    coded = conforming_client.chunked(source, body)
    server = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    server.receive_data(b"PUT /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + coded)
    server.next_event()
    theirs = b""
    while isinstance(event := server.next_event(), h11.Data):
        theirs += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert theirs == body
    ours, rest = read(coded, len(coded))
    if ours != "too much besides the chunks":
        assert (ours, rest) == (body, b"")


chunk_pieces = st.sampled_from(
    [b"0", b"5", b"a", b"fffff", b"\r\n", b"\r", b"\n", b";", b"hello", b" ", b"x: y", b"0\r\n\r\n", b"5\r\nhello\r\n"]
)


@given(st.lists(chunk_pieces | st.binary(max_size=4), max_size=12).map(b"".join), st.integers(1, 10))
def test_any_cut_gives_the_same(data, step):
    assert read(data, step) == read(data, max(1, len(data)))


@pytest.mark.parametrize("step", [1, 7, 4096])
def test_a_client_that_follows_the_rules_is_never_out_of_step(step):
    for seed in range(150):
        sent = conforming_client.requests(random.Random(seed))
        data = b"".join(request.data for request in sent)
        if len(data) > 50_000 and step == 1:
            continue
        parser = RequestParser(2048)
        answers = []
        for start in range(0, len(data), step):
            parser.receive(data[start : start + step])
            while (event := parser.next_event()) is not None:
                if isinstance(event, Request | ProtocolError):
                    answers.append(event)
        assert len(answers) == len(sent) or (parser.closed and len(answers) < len(sent))
        for request, answer in zip(sent, answers, strict=False):
            if isinstance(answer, Request):
                assert answer == Request(request.method, request.uri, "HTTP/1.1", request.body or None)


def test_nothing_is_kept_of_what_is_discarded():
    body = ChunkedBody(10)
    buffer = bytearray(b"6\r\nabcdef\r\n6\r\n")
    with pytest.raises(ChunksTooLargeError):
        body.take(buffer)
    assert body.size == 12
    body.discard(100)
    assert not body.take(buffer)
    buffer += b"ghijkl\r\n0\r\n\r\nrest"
    assert body.take(buffer)
    assert (bytes(body.data), bytes(buffer)) == (b"", b"rest")
