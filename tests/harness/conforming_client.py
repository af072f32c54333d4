"""What a client may send that follows RFC 9112: any methods, headers, lengths and chunks, and bait in the bodies."""

from __future__ import annotations

import random
from typing import NamedTuple

BAIT = (
    b"GET /bait HTTP/1.1\r\n\r\n", b"PUT /bait HTTP/1.1\r\nContent-Length: 3\r\n\r\n", b"0\r\n\r\n", b"5\r\n",
    b"\r\n\r\n", b"\r\n", b"\r", b"\n", b"POST / HTTP/1.1\r\n", b"Content-Length: 7\r\n", b"x", b"{}", b"\0\xff",
    b"bait " * 100,
)  # fmt: skip
METHODS = ("GET", "PUT", "PATCH", "DELETE", "PUT", "PATCH", "POST", "OPTIONS", "HEAD", "REPORT")
#: Header lines without influence on where a request ends, some of which are refused.
HEADERS = (
    b"Host: localhost", b"Accept: application/json", b"X-Bait: GET / HTTP/1.1", b"X-Latin: \xe9",
    b"X-Long: " + b"y" * 1500, b"Accept-Encoding: identity;q=0", b"TE: trailers", b"Trailer: Expires", b"X-Empty:",
    b"Connection: keep-alive", b"X-Longer: " + b"z" * 5000,
)  # fmt: skip
EXTENSIONS = (b"", b"", b"", b";a", b";a=b", b';a="GET / HTTP/1.1"', b";" + b"e" * 900)
TRAILERS = (b"Expires: 0\r\n", b"X-Bait: GET / HTTP/1.1\r\n", b"X: " + b"t" * 900 + b"\r\n")


class Sent(NamedTuple):
    """A request as it was sent: ``data`` are its bytes, ``body`` is what they mean."""

    data: bytes
    method: str
    uri: str
    body: bytes


def bait(source: random.Random) -> bytes:
    """Return the content of a body, which may look like requests and chunks."""
    body = b"".join(source.choices(BAIT, k=source.choice((0, 1, 1, 2, 5))))
    return body * source.choice((1, 1, 1, 1, 30, 2000))


def chunked(source: random.Random, body: bytes) -> bytes:
    """Return a body in chunks of any sizes, with extensions and trailers."""
    parts = []
    position = 0
    while position < len(body):
        size = min(len(body) - position, source.choice((1, 2, 10, 100, 1000, 100_000)) if len(body) < 2000 else 50_000)
        digits = source.choice((b"%x", b"%X", b"000%x")) % size
        parts += [digits, source.choice(EXTENSIONS), b"\r\n", body[position : position + size], b"\r\n"]
        position += size
    trailers = source.choices(TRAILERS, k=source.choice((0, 0, 1, 3)))
    return b"".join([*parts, source.choice((b"0", b"00")), source.choice(EXTENSIONS), b"\r\n", *trailers, b"\r\n"])


def request(source: random.Random, number: int) -> Sent:
    """Return one request; its URI tells its number."""
    method = source.choice(METHODS)
    uri = f"/r{number}" if source.random() < 0.95 else f"/r{number}/" + "u" * 1200
    headers = source.choices(HEADERS[:2] if source.random() < 0.7 else HEADERS, k=source.randrange(4))
    body = bait(source) if source.random() < 0.7 else b""
    if source.random() < 0.6:
        coded = chunked(source, body)
        headers.append(source.choice((b"Transfer-Encoding: chunked", b"transfer-encoding:CHUNKED")))
    else:
        coded = body
        if body or source.random() < 0.5:
            headers.append(b"Content-Length: %d" % len(body))
    if body and source.random() < 0.2:
        headers.append(b"Expect: 100-continue")
    source.shuffle(headers)
    head = b"\r\n".join([f"{method} {uri} HTTP/1.1".encode(), *headers, b"", b""])
    return Sent(head + coded, method, uri, body)


def requests(source: random.Random) -> list[Sent]:
    """Return a few requests of one connection, sent without waiting for answers."""
    return [request(source, number) for number in range(source.choice((1, 2, 3, 8)))]
