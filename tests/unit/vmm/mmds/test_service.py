"""The metadata service as a guest sees it: tokens, methods, formats; bytes in, bytes out."""

from __future__ import annotations

import binascii
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.mmds import token as token_module
from vmm.mmds.service import REQUEST_LIMIT, GuestConnection, MetadataService
from vmm.mmds.store import V1, V2, DataStore
from vmm.mmds.token import MAX_TTL_SECONDS, TokenAuthority, TokenError
from vmm.observe.metrics import Metrics

DATA: Any = {"name": {"first": "John", "second": "Doe"}, "age": 43, "phones": ["+40"], "latest": {"api": {"x": "y"}}}
TTL = "X-metadata-token-ttl-seconds"
NO_TOKEN = (
    "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the session token."
)
NO_TTL = (
    "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or "
    "`X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime."
)


class Guest:
    """Sends requests over one connection."""

    def __init__(self, version: str = V2) -> None:
        self.metrics = Metrics()
        self.service = MetadataService(DataStore(51200), "vm", self.metrics["mmds"])
        self.service.store.put(DATA)
        self.service.version = version
        self.connection = GuestConnection(self.service)

    def send(self, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        return parse(self.connection.receive("\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode()))

    def token(self, **headers: str) -> str:
        status, _, body = self.send("PUT", "/latest/api/token", **(headers or {TTL: "60"}))
        assert status == 200
        return body


def parse(data: bytes) -> tuple[int, dict[str, str], str]:
    head, _, body = data.partition(b"\r\n\r\n")
    line, *lines = head.decode().split("\r\n")
    assert line.startswith("HTTP/1.")
    headers = dict(item.split(": ", 1) for item in lines)
    assert int(headers["Content-Length"]) == len(body)
    return int(line.split(" ")[1]), headers, body.decode()


# -- tokens -----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000

    def __call__(self) -> int:
        return self.now


def test_a_token_is_valid_until_it_expires():
    clock = Clock()
    authority = TokenAuthority("vm", clock)
    token = authority.generate(10)
    assert len(token) == 48
    assert authority.is_valid(token)
    clock.now += 9_999
    assert authority.is_valid(token)
    clock.now += 1
    assert not authority.is_valid(token)


@pytest.mark.parametrize("ttl", [0, MAX_TTL_SECONDS + 1, (1 << 32) - 1])
def test_lifetimes_out_of_range(ttl):
    with pytest.raises(TokenError) as error:
        TokenAuthority("vm").generate(ttl)
    assert str(error.value) == (
        f"Invalid time to live value provided for token: {ttl}. Please provide a value between 1 and 21600."
    )


def test_tokens_of_others_are_not_valid():
    authority = TokenAuthority("vm")
    assert not TokenAuthority("vm").is_valid(authority.generate(60))
    twin = TokenAuthority("other")
    twin._key = authority._key
    assert not twin.is_valid(authority.generate(60))


@given(st.integers(0, 35), st.integers(1, 255))
def test_a_changed_token_is_not_valid(index, change):
    authority = TokenAuthority("vm")
    data = bytearray(binascii.a2b_base64(authority.generate(60)))
    data[index] ^= change
    assert not authority.is_valid(binascii.b2a_base64(bytes(data), newline=False).decode())


@given(st.text(max_size=80))
def test_nonsense_is_not_a_token(text):
    assert not TokenAuthority("vm").is_valid(text)


def test_every_token_is_another():
    authority = TokenAuthority("vm", Clock())
    assert len({authority.generate(60) for _ in range(100)}) == 100


def test_the_key_is_renewed_in_time(monkeypatch):
    monkeypatch.setattr(token_module, "MAX_TOKENS_PER_KEY", 2)
    authority = TokenAuthority("vm")
    first, second = authority.generate(60), authority.generate(60)
    assert authority.is_valid(first)
    third = authority.generate(60)
    assert not authority.is_valid(first)
    assert not authority.is_valid(second)
    assert authority.is_valid(third)


# -- version 2 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["X-metadata-token", "X-aws-ec2-metadata-token", "x-METADATA-token"])
def test_a_session(family):
    guest = Guest()
    status, headers, token = guest.send("PUT", "//latest//api/token", **{f"{family}-ttl-seconds": "21600"})
    assert status == 200
    assert headers["Content-Type"] == "text/plain"
    echoed = "X-aws-ec2-metadata-token" if "aws" in family else "X-metadata-token"
    assert headers[f"{echoed}-ttl-seconds"] == "21600"
    assert guest.send("GET", "/name/first", **{family: token})[::2] == (200, "John")


@pytest.mark.parametrize(
    ("headers", "status", "text"),
    [
        ({}, 400, NO_TTL),
        ({TTL: "0"}, 400,
         "Invalid time to live value provided for token: 0. Please provide a value between 1 and 21600."),
        ({TTL: "21601"}, 400,
         "Invalid time to live value provided for token: 21601. Please provide a value between 1 and 21600."),
        ({TTL: "x"}, 400, f"Invalid header. Reason: Invalid value. Key:{TTL}; Value:x"),
        ({TTL: "-1"}, 400, f"Invalid header. Reason: Invalid value. Key:{TTL}; Value:-1"),
        ({TTL: "60", "X-Forwarded-For": "1.2.3.4"}, 400,
         "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For"),
        ({TTL: "60", "x-forWARDED-for": ""}, 400,
         "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For"),
    ],
)  # fmt: skip
def test_tokens_that_are_refused(headers, status, text):
    assert Guest().send("PUT", "/latest/api/token", **headers)[::2] == (status, text)


def test_requests_without_a_valid_token():
    guest = Guest()
    assert guest.send("GET", "/name")[::2] == (401, NO_TOKEN)
    assert guest.send("GET", "/name", X_metadata_token="nonsense")[::2] == (401, "MMDS token not valid.")
    shown = guest.metrics["mmds"].values
    assert (shown["rx_no_token"], shown["rx_invalid_token"]) == (1, 1)


@pytest.mark.parametrize("method", ["PATCH", "DELETE", "POST", "HEAD"])
def test_other_methods(method):
    status, headers, body = Guest().send(method, "/")
    assert (status, headers["Allow"], body) == (405, "GET, PUT", "Not allowed HTTP method.")


def test_put_elsewhere():
    assert Guest().send("PUT", "/name", **{TTL: "60"})[::2] == (404, "Resource not found: /name.")


@pytest.mark.parametrize(
    ("path", "accept", "status", "kind", "body"),
    [
        ("/", None, 200, "text/plain", "age\nlatest/\nname/\nphones"),
        ("/name", None, 200, "text/plain", "first\nsecond"),
        ("/name/", "*/*", 200, "text/plain", "first\nsecond"),
        ("//name///first", None, 200, "text/plain", "John"),
        ("http://169.254.169.254/name/first", None, 200, "text/plain", "John"),
        ("/name", "application/json", 200, "application/json", '{"first":"John","second":"Doe"}'),
        ("/name/first", "text/html, application/json;q=0.9", 200, "application/json", '"John"'),
        ("/age", "application/json", 200, "application/json", "43"),
        ("/phones/0", None, 200, "text/plain", "+40"),
        ("/age", None, 501, "text/plain", "Cannot retrieve value. The value has an unsupported type."),
        ("/nix", None, 404, "text/plain", "Resource not found: /nix."),
        ("http://", None, 400, "text/plain", "Invalid URI."),
    ],
)
def test_get(path, accept, status, kind, body):
    guest = Guest()
    headers = {"X-metadata-token": guest.token()}
    if accept is not None:
        headers["Accept"] = accept
    found = guest.send("GET", path, **headers)
    assert (found[0], found[1]["Content-Type"], found[2]) == (status, kind, body)


def test_imds_compatibility_overrides_what_is_accepted():
    guest = Guest()
    guest.service.imds_compat = True
    headers = {"X-metadata-token": guest.token(), "Accept": "application/json"}
    assert guest.send("GET", "/name", **headers)[2] == "first\nsecond"


# -- version 1 --------------------------------------------------------------------------------------------------------


def test_version_1_takes_tokens_and_needs_none():
    guest = Guest(V1)
    assert guest.send("GET", "/name/first")[::2] == (200, "John")
    assert guest.send("GET", "/name/first", X_metadata_token="nonsense")[0] == 200
    assert guest.send("GET", "/name/first", X_metadata_token=guest.token())[0] == 200
    shown = guest.metrics["mmds"].values
    assert (shown["rx_no_token"], shown["rx_invalid_token"]) == (1, 1)


# -- bytes ------------------------------------------------------------------------------------------------------------

REQUESTS = (
    b"GET /name/first HTTP/1.1\r\nHost: x\r\n\r\n"
    b"PUT /x HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc"
    b"GET /age HTTP/1.1\r\n\r\n"
)


@given(st.lists(st.integers(0, len(REQUESTS)), max_size=6))
def test_how_bytes_are_cut_up_does_not_matter(cuts):
    guest = Guest(V1)
    edges = [0, *sorted(cuts), len(REQUESTS)]
    output = b"".join(guest.connection.receive(REQUESTS[a:b]) for a, b in pairwise(edges))
    assert output == Guest(V1).connection.receive(REQUESTS)
    assert output.count(b"HTTP/1.") == 3
    assert not guest.connection.closed


@pytest.mark.parametrize(
    "data",
    [
        b"GET /\r\n\r\n",
        b"BREW / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nnonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 2490\r\n\r\n",
        b"x" * REQUEST_LIMIT,
    ],
)
def test_what_is_no_request_ends_the_connection(data):
    guest = Guest(V1)
    assert parse(guest.connection.receive(data))[::2] == (400, "Invalid request.")
    assert guest.connection.closed
    assert guest.connection.receive(b"GET / HTTP/1.1\r\n\r\n") == b""


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_no_bytes_raise_or_are_kept_without_bound(parts):
    connection: Any = Guest().connection
    for part in parts:
        connection.receive(part)
        assert len(connection._buffer) <= REQUEST_LIMIT
