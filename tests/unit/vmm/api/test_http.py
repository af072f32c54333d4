"""The HTTP parser: which requests it takes, what it says about others, and that chunking changes nothing."""

from __future__ import annotations

from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.api.http import (
    HEADERS_LIMIT,
    LINE_LIMIT,
    SERVER_FULL,
    SKIP_LIMIT,
    Continue,
    ProtocolError,
    Request,
    RequestParser,
    render_protocol_error,
    render_response,
)

LIMIT = 250


def events_of(chunks, limit=LIMIT):
    """Feed chunks and return the events in a comparable form, and whether the parser is closed."""
    parser = RequestParser(limit)
    found: list[Any] = []
    for chunk in chunks:
        parser.receive(chunk)
        while (event := parser.next_event()) is not None:
            if isinstance(event, Request):
                found.append(event)
            else:
                found.append((type(event), event.text if isinstance(event, ProtocolError) else event.version))
        assert parser.buffered <= max(LINE_LIMIT, limit) + len(chunk)
    return found, parser.closed


def outcome(data, limit=LIMIT):
    return events_of([data], limit)


def errors(data, limit=LIMIT):
    return [event[1] for event in outcome(data, limit)[0] if not isinstance(event, Request)]


GET = b"GET / HTTP/1.1\r\n\r\n"
GET_REQUEST = Request("GET", "/", "HTTP/1.1", None)


def test_requests():
    assert outcome(GET) == ([GET_REQUEST], False)
    put = b"PUT http://localhost/actions HTTP/1.0\r\ncontent-LENGTH :  +4 \r\nX: y\r\n\r\nbodyGET /x HTTP/1.1\r\n\r\n"
    first, second = outcome(put)[0]
    assert first == Request("PUT", "http://localhost/actions", "HTTP/1.0", b"body")
    assert first.path == "/actions"
    assert second.path == "/x"
    assert outcome(b"DELETE /a HTTP/1.1\r\nContent-Length: 0\r\n\r\n")[0][0].body is None


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("/a/b", "/a/b"),
        ("http://host/a", "/a"),
        ("http://host:1/a/", "/a/"),
        ("http://host", ""),
        ("http://", ""),
        ("a", ""),
        ("*", ""),
        ("https://host/a", ""),
    ],
)
def test_path_of_a_uri(uri, path):
    assert Request("GET", uri, "HTTP/1.1", None).path == path


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"", "Invalid request."),
        (b"GET", "Invalid request."),
        (b"GET /", "Invalid request."),
        (b"POST / HTTP/1.1", "Invalid HTTP Method: Unsupported HTTP method."),
        (b"get / HTTP/1.1", "Invalid HTTP Method: Unsupported HTTP method."),
        (b"GET  HTTP/1.1", "Invalid URI: Empty URI not allowed."),
        (b"GET /\xff HTTP/1.1", "Invalid URI: Cannot parse URI as UTF-8."),
        (b"GET / HTTP/2.0", "Invalid HTTP Version: Unsupported HTTP version."),
        (b"GET / HTTP/1.1 ", "Invalid HTTP Version: Unsupported HTTP version."),
        (b"GET / ", "Invalid HTTP Version: Unsupported HTTP version."),
    ],
)
def test_refused_request_lines(line, text):
    assert errors(line + b"\r\nHost: x\r\n\r\n") == [text]


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (b"no colon", "Header is incorrectly formatted. Key: no colon"),
        (b"a\xff: b", "Header contains invalid characters. Key: invalid utf-8 sequence of 1 bytes from index 1"),
        (b"a: b\xc3", "Header contains invalid characters. Key: incomplete utf-8 byte sequence from index 4"),
        (b"Content-Length: alpha", "Invalid value. Key:Content-Length; Value: alpha"),
        (b"Content-Length: -1", "Invalid value. Key:Content-Length; Value: -1"),
        (b"Content-Length: 4294967296", "Invalid value. Key:Content-Length; Value: 4294967296"),
        (b"Content-Length: 1 2", "Invalid value. Key:Content-Length; Value: 1 2"),
        ("Content-Length: ²".encode(), "Invalid value. Key:Content-Length; Value: ²"),
        (b"Content-Length:", "Invalid value. Key:Content-Length; Value:"),
        (b"Content-Length: 5\r\nContent-Length: 6", "Invalid value. Key:Content-Length; Value: 6"),
        (
            b"Content-Length: 5\xff",
            "Header contains invalid characters. Key: invalid utf-8 sequence of 1 bytes from index 17",
        ),
        (b"Transfer-Encoding: gzip", "Unsupported value. Key:Transfer-Encoding; Value: gzip"),
        (b"Transfer-Encoding: gzip, chunked", "Unsupported value. Key:Transfer-Encoding; Value: gzip, chunked"),
        (
            b"Transfer-Encoding: chunked\r\ntransfer-encoding:chunked",
            "Unsupported value. Key:transfer-encoding; Value:chunked",
        ),
        (
            b"Transfer-Encoding: chunked\r\nContent-Length: 0",
            "Transfer-Encoding with Content-Length, or in a request of HTTP/1.0.",
        ),
        (
            b"Content-Length: 5\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding with Content-Length, or in a request of HTTP/1.0.",
        ),
        (b"Accept-Encoding: gzip, identity;q=0", "Invalid value. Key:Accept-Encoding; Value: identity;q=0"),
        (b"Accept-Encoding: *;q=0", "Invalid value. Key:Accept-Encoding; Value:*;q=0"),
    ],
)
def test_refused_headers(header, text):
    assert errors(b"GET / HTTP/1.1\r\n" + header + b"\r\n\r\n") == [f"Invalid header. Reason: {text}"]


def test_header_without_a_value_for_accept_encoding():
    assert errors(b"GET / HTTP/1.1\r\nAccept-Encoding: \r\n\r\n") == ["Invalid request."]


@pytest.mark.parametrize(
    "header",
    [
        b"Content-Type: nonsense",
        b"Accept: image/png",
        b"Transfer-Encoding: identity",
        b"Expect: 103-checkpoint",
        b"Accept-Encoding: *;q=0, identity",
        b"Host: a: b",
        b": x",
        b"Content-Length: 00000000000000000000000",
        "Unbekannt: \u00fc".encode(),
    ],
)
def test_headers_without_effect(header):
    assert outcome(b"GET / HTTP/1.1\r\n" + header + b"\r\n\r\n") == ([GET_REQUEST], False)


def test_expect_continue():
    head = b"PUT /a HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
    found, _ = outcome(head)
    assert found == [(Continue, "HTTP/1.0")]
    assert outcome(head + b"abc")[0] == [(Continue, "HTTP/1.0"), Request("PUT", "/a", "HTTP/1.0", b"abc")]
    without_body = outcome(b"PUT /a HTTP/1.0\r\nExpect: 100-continue\r\n\r\n")[0]
    assert without_body == [Request("PUT", "/a", "HTTP/1.0", None)]


def test_lines_fit_into_the_limit_or_are_refused():
    room = LINE_LIMIT - len(b"GET / HTTP/1.1\r\n")
    uri = b"/" * (room + 1)
    assert outcome(b"GET " + uri + b" HTTP/1.1\r\n\r\n")[0][0].uri == uri.decode()
    assert errors(b"GET /" + uri + b" HTTP/1.1\r\n\r\n" + GET) == ["Invalid request."]
    assert outcome(b"GET /" + uri + b" HTTP/1.1\r\n\r\n" + GET)[0][-1] == GET_REQUEST

    name = b"a: " + b"x" * (LINE_LIMIT - 5)
    assert outcome(b"GET / HTTP/1.1\r\n" + name + b"\r\n\r\n") == ([GET_REQUEST], False)
    [text] = errors(b"GET / HTTP/1.1\r\n" + name + b"x\r\n\r\n")
    assert text == f"Invalid header. Reason: Invalid content length. Header: {name.decode()}x\r"
    # Noticed as soon as the limit is reached, whether the line ends or not.
    assert len(errors(b"x" * LINE_LIMIT)) == 1
    assert errors(b"x" * (LINE_LIMIT - 1)) == []


def test_headers_together_are_bounded():
    many = b"a: b\r\n" * (HEADERS_LIMIT // 6 + 1)
    found, closed = outcome(b"GET / HTTP/1.1\r\n" + many + b"\r\n" + GET)
    assert found == [(ProtocolError, "Invalid request."), GET_REQUEST]
    assert not closed


def test_body_limit():
    head = b"PUT /a HTTP/1.1\r\nContent-Length: %d\r\n\r\n"
    assert outcome(head % 250 + b"x" * 250)[0] == [Request("PUT", "/a", "HTTP/1.1", b"x" * 250)]
    text = "Request payload with size 260 is larger than the limit of 250 allowed by server."
    assert errors(head % 260) == [text]  # at once, not when the body has come
    assert outcome(head % 260 + b"x" * 260 + GET) == ([(ProtocolError, text), GET_REQUEST], False)


@pytest.mark.parametrize(
    "head",
    [
        b"PUT /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 260\r\n\r\n",
        b"POST /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 26\r\n\r\n",
        b"POST /a HTTP/1.1\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_a_body_that_was_refused_before_leave_was_given_may_come_or_not(head):
    """RFC 9110, 10.1.1: the client need not wait, nor send it. What follows may be either: nothing is read."""
    found, closed = outcome(head + GET)
    assert [kind for kind, _ in found] == [ProtocolError]
    assert closed


def test_what_cannot_be_delimited_closes_the_connection():
    assert outcome(b"PUT /a HTTP/1.1\r\nContent-Length: x\r\n\r\n" + GET)[1]
    assert outcome(b"BAD\r\nContent-Length: x\r\n\r\n" + GET)[1]
    assert outcome(b"PUT /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + GET)[1]
    for header in (b"Content-Length", b"transfer-encoding ", b"EXPECT"):
        for line in (b"PUT /a HTTP/1.1", b"BAD"):
            found, closed = outcome(line + b"\r\n" + header + b":" + b" " * LINE_LIMIT + b"5\r\n\r\n" + GET)
            assert (len(found), closed) == (1, True)
    assert outcome(b"PUT /a HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (SKIP_LIMIT + 1))[1]
    assert not outcome(b"PUT /a HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % SKIP_LIMIT)[1]


def test_the_response_to_head_would_be_misread():
    """Its client takes no body, and would take ours for the next response."""
    for uri in (b"/", b"/" + b"x" * LINE_LIMIT):
        found, closed = outcome(b"HEAD " + uri + b" HTTP/1.1\r\n\r\n" + GET)
        assert (len(found), closed) == (1, True)


def test_empty_lines_between_requests_are_nothing():
    assert outcome(b"\r\n\r\n" + GET + b"\r\n" + GET + b"\r\n") == ([GET_REQUEST] * 2, False)


def test_chunked_bodies():
    head = b"PUT /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"3 ;x\r\nabc\r\n00A;x=y\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n"
    wanted = Request("PUT", "/a", "HTTP/1.1", b"abc0123456789")
    assert outcome(head + chunks + GET) == ([wanted, GET_REQUEST], False)
    assert outcome(head + b"0\r\n\r\n" + GET) == ([wanted._replace(body=None), GET_REQUEST], False)
    leave = b"PUT /a HTTP/1.1\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert outcome(leave) == ([(Continue, "HTTP/1.1")], False)
    assert outcome(leave + chunks + GET)[0] == [(Continue, "HTTP/1.1"), wanted, GET_REQUEST]


def test_limit_of_a_chunked_body():
    head = b"PUT /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    fits = b"fa\r\n" + b"x" * 250 + b"\r\n"
    assert outcome(head + fits + b"0\r\n\r\n")[0] == [Request("PUT", "/a", "HTTP/1.1", b"x" * 250)]
    text = "Request payload with size 255 is larger than the limit of 250 allowed by server."
    assert errors(head + fits + b"5\r\n") == [text]  # at once, not when the body has come
    rest = b"5\r\nabcde\r\n1\r\nx\r\n0\r\nX: y\r\n\r\n"
    assert outcome(head + fits + rest + GET) == ([(ProtocolError, text), GET_REQUEST], False)
    assert outcome(head + b"%x\r\n" % (SKIP_LIMIT + 1) + GET)[1]
    assert not outcome(head + b"%x\r\n" % SKIP_LIMIT + GET)[1]


@pytest.mark.parametrize(
    "chunks",
    [
        b"\r\n", b"g\r\n", b"-1\r\n", b"0x1\r\n", b"+1\r\n", b" 1\r\n", b"1_0\r\n", b"100000000\r\n", "１\r\n".encode(),
        b"1\nx\r\n", b"1;a\nb\r\n", b"1;a\rb\r\n", b"1\r\nxx\r\n", b"1\r\nx\n", b"1\r\nx0\r\n", b"0\r\nno colon\r\n",
        b"1;" + b"e" * LINE_LIMIT, b"0\r\nX: " + b"t" * LINE_LIMIT, b"0\r\n" + (b"X: " + b"t" * 900 + b"\r\n") * 80,
        (b"1;" + b"e" * 900 + b"\r\nx\r\n") * 80,
    ],
)  # fmt: skip
def test_malformed_chunks_are_answered_once_and_end_the_connection(chunks):
    head = b"PUT /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert outcome(head + chunks + GET) == ([(ProtocolError, "Invalid request.")], True)
    # The same where the request was refused before: the one answer stays the only one.
    assert outcome(b"POST" + head[3:] + chunks + GET) == (
        [(ProtocolError, "Invalid HTTP Method: Unsupported HTTP method.")],
        True,
    )


def test_after_an_error_the_next_request_is_understood():
    bad = "Invalid HTTP Method: Unsupported HTTP method."
    body = b"POST / HTTP/1.1\r\nHost: x\r\nno colon\r\nContent-Length: 19\r\n\r\nGET /a HTTP/1.1\r\n\r\n"
    assert outcome(body + GET)[0] == [(ProtocolError, bad), GET_REQUEST]
    # A client that sends a broken line only, and then asks properly.
    assert outcome(b"POST / HTTP/1.1\r\n" + GET)[0] == [(ProtocolError, bad), GET_REQUEST]
    assert outcome(b"GET /a HTTP/1.1\r\nno colon\r\n" + GET)[0][-1] == GET_REQUEST
    # What is asked twice wrongly is answered twice.
    assert errors(b"POST / HTTP/1.1\r\n\r\nPOST / HTTP/1.1\r\n\r\n") == [bad, bad]


def test_incomplete_says_whether_a_request_has_begun():
    parser = RequestParser(LIMIT)
    assert not parser.incomplete
    for part, expected in ((b"PU", True), (b"T / HTTP/1.1\r\n", True), (b"Content-Length: 2\r\n\r\na", True)):
        parser.receive(part)
        assert parser.next_event() is None
        assert parser.incomplete is expected
    parser.receive(b"b")
    assert parser.next_event() is not None
    assert not parser.incomplete


STREAMS = [
    b"x" * (LINE_LIMIT + 5) + b"\r\n\r\n" + GET,
    b"x" * LINE_LIMIT + b"\r\r\n\r\n" + GET,
    b"GET / HTTP/1.1\r\na: " + b"x" * LINE_LIMIT + b"\r\nContent-Length: 3\r\n\r\nabc" + GET,
    b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n\r\n" + GET,
    b"PUT / HTTP/1.1\r\nContent-Length: 251\r\n\r\n" + b"\r" * 251 + GET,
    b"PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n\r\n\r\n" + GET,
    b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n4;a\r\n\r\n\r\n\r\n1\r\n0\r\n0\r\nX: y\r\n\r\n" + GET,
    b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n12\r\nGET / HTTP/1.1\r\n\r\n\r\n0\r\n\r\n" + GET,
    b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfb\r\n" + b"\r" * 251 + b"\r\n0\r\n\r\n" + GET,
]


@pytest.mark.parametrize("data", STREAMS, ids=range(len(STREAMS)))
def test_every_cut_gives_the_same(data):
    whole = events_of([data])
    assert whole[0][-1] == GET_REQUEST
    for cut in range(len(data)):
        assert events_of([data[:cut], data[cut:]]) == whole


def test_nothing_of_a_bad_request_sticks_to_the_next():
    found, _ = outcome(b"BAD\r\nContent-Length: 5\r\nExpect: 100-continue\r\nGET / HTTP/1.1\r\n\r\n" + GET)
    assert found == [(ProtocolError, "Invalid request."), GET_REQUEST, GET_REQUEST]


# -- properties -------------------------------------------------------------------------------------------------------

pieces = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\n",
        b"PUT /actions HTTP/1.1\r\n",
        b"POST / HTTP/1.1\r\n",
        b"\r\n",
        b"\r",
        b"\n",
        b"Host: x\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length: 251\r\n",
        b"Content-Length: x\r\n",
        b"Expect: 100-continue\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"5\r\nhello\r\n",
        b"0\r\n\r\n",
        b"no colon\r\n",
        b"hello",
        b"x" * 300,
        b"x" * LINE_LIMIT,
        b"\xff",
    ]
)
streams = st.lists(pieces | st.binary(max_size=8), max_size=24).map(b"".join)


@given(streams, st.data())
def test_chunking_changes_nothing(data, draw):
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=12)))
    chunks = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    assert events_of(chunks) == events_of([data])


@given(streams)
@settings(max_examples=50)
def test_byte_by_byte_changes_nothing(data):
    assert events_of([data[i : i + 1] for i in range(len(data))]) == events_of([data])


tokens = st.text(alphabet="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_", min_size=1, max_size=20)
_MEANINGFUL = ("content-length", "expect", "accept-encoding", "transfer-encoding", "host", "connection")
names = tokens.filter(lambda name: name.lower() not in _MEANINGFUL)
requests = st.tuples(
    st.sampled_from(["GET", "PUT", "PATCH", "DELETE"]),
    tokens.map("/".__add__),
    st.lists(st.tuples(names, tokens), max_size=5),
    st.binary(max_size=60),
)


@given(st.lists(requests, min_size=1, max_size=4))
def test_requests_that_are_proper_mean_what_they_mean_to_h11(wanted):
    """Where the rules agree (proper requests with Host), h11 finds the same requests."""
    data = b""
    for method, uri, headers, body in wanted:
        lines = [f"{method} {uri} HTTP/1.1", "Host: localhost", *(f"{name}: {value}" for name, value in headers)]
        data += "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body
    theirs = []
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    for _ in wanted:
        head = connection.next_event()
        assert isinstance(head, h11.Request)
        body = b""
        while isinstance(event := connection.next_event(), h11.Data):
            body += bytes(event.data)
        assert isinstance(event, h11.EndOfMessage)
        theirs.append((head.method.decode(), head.target.decode(), body or None))
        connection.send(h11.Response(status_code=204, headers=[]))
        connection.send(h11.EndOfMessage())
        connection.start_next_cycle()
    ours = [(request.method, request.uri, request.body) for request in outcome(data)[0]]
    assert ours == theirs


# -- responses --------------------------------------------------------------------------------------------------------


def test_responses_are_firecrackers_byte_for_byte():
    start = b"Server: Firecracker API\r\nConnection: keep-alive\r\n"
    assert render_response(204) == b"HTTP/1.1 204 \r\n" + start + b"\r\n"
    assert render_response(100, version="HTTP/1.0") == b"HTTP/1.0 100 \r\n" + start + b"\r\n"
    json_headers = b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    assert render_response(200, b"{}") == b"HTTP/1.1 200 \r\n" + start + json_headers
    assert render_response(400, b"{}", deprecation=True, allow=("GET", "PUT")) == (
        b"HTTP/1.1 400 \r\n" + start + b"Deprecation: true\r\nAllow: GET, PUT\r\n" + json_headers
    )
    assert render_response(200).endswith(b"Content-Length: 0\r\n\r\n")


def test_protocol_error_response():
    response = render_protocol_error("Invalid request.")
    body = b'{ "error": "Invalid request.\nAll previous unanswered requests will be dropped." }'
    assert response.endswith(b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert response.startswith(b"HTTP/1.1 400 \r\n")


def test_server_full_response_has_the_length_that_it_says():
    head, _, body = SERVER_FULL.partition(b"\r\n\r\n")
    assert b"Content-Length: %d" % len(body) in head
