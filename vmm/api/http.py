"""HTTP without I/O: bytes in, requests out; responses as bytes.

The rules are those of Firecracker's server where clients can see them: which requests are accepted, the order of
response headers, the status line without a reason phrase, the texts for what is malformed. Its read buffer of 1024
bytes shows as the limit of a line. What it leaves to chance is settled here: however the bytes are cut up on their
way, the outcome is the same, also after an error.

A client that follows RFC 9112 is never out of step: it gets one response for each request, and the one that belongs
to it. After an error the connection stays open and the rest of the bad request is skipped: its headers, up to an empty
line or to a line that is a request line, and then its body. Where the end of the body cannot be known, or the client
would misunderstand the response, the parser is ``closed``.
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias
from vmm.api.chunked import ChunkedBody, ChunkError, ChunksTooLargeError
from vmm.errors import VmmError
from vmm.json.text import WHITE_SPACE

METHODS: Final = ("GET", "PUT", "PATCH", "DELETE")
VERSIONS: Final = ("HTTP/1.0", "HTTP/1.1")
HTTP_1_1: Final = "HTTP/1.1"

#: A request line or header line with its CR LF must fit into this many bytes.
LINE_LIMIT: Final = 1024
#: Header lines of one request, together.
HEADERS_LIMIT: Final = 64 << 10
#: A body that is too large is skipped up to this size; beyond it the connection is closed after the response.
SKIP_LIMIT: Final = 1 << 20
_MAX_CONTENT_LENGTH: Final = (1 << 32) - 1
#: Headers without which it is not known where the next request begins.
_DELIMITING: Final = frozenset((b"content-length", b"transfer-encoding", b"expect"))

SERVER_FULL: Final = (
    b"HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n"
    b'{ "error": "Too many open connections" }'
)


class Request(NamedTuple):
    """A complete request. ``body`` is None when there is none, or an empty one."""

    method: str
    uri: str
    version: str
    body: bytes | None

    @property
    def path(self) -> str:
        """The absolute path of the URI; empty when there is none."""
        if self.uri.startswith("http://"):
            _, slash, path = self.uri[len("http://") :].partition("/")
            return slash + path
        return self.uri if self.uri.startswith("/") else ""


class Continue:
    """The client waits for leave to send the body."""

    __slots__ = ("version",)

    def __init__(self, version: str) -> None:
        self.version = version

    def __repr__(self) -> str:
        return f"Continue({self.version!r})"


class ProtocolError:
    """A request that is malformed, and what is wrong with it."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"ProtocolError({self.text!r})"


class TakeOver:
    """Instead of a response: ``adopt`` gets the connection's socket and whatever is to be sent on it."""

    __slots__ = ("adopt",)

    def __init__(self, adopt: Callable[[socket], None]) -> None:
        self.adopt = adopt


if TYPE_CHECKING:
    from socket import socket

    from base.lean_typing import Callable

    Event: TypeAlias = Request | Continue | ProtocolError


class _BadRequestError(VmmError):
    code = "vmm.http"


class _Headers:
    """The headers that matter for finding the end of the request. ``content_length`` is None where there is none."""

    __slots__ = ("content_length", "chunked", "length_known", "expect", "size")

    def __init__(self) -> None:
        self.content_length: int | None = None
        self.chunked = False
        self.length_known = True
        self.expect = False
        self.size = 0

    @property
    def has_body(self) -> bool:
        """Whether a body follows the headers."""
        return self.chunked or bool(self.content_length)


# States of the parser. The last four skip what is left of a bad request.
_REQUEST_LINE, _HEADERS, _BODY, _SKIP_LINE, _SKIP_HEADERS, _SKIP_BODY, _CLOSED = range(7)


class RequestParser:
    """One connection's requests. Feed bytes with ``receive``, then ask ``next_event`` until it returns None.

    When ``closed`` is true the connection is to be closed as soon as the responses were sent: nothing that follows
    could be understood.
    """

    __slots__ = ("payload_limit", "_buffer", "_state", "_line", "_headers", "_chunks", "_remaining")

    def __init__(self, payload_limit: int) -> None:
        self.payload_limit = payload_limit
        self._buffer = bytearray()
        self._state = _REQUEST_LINE
        #: Method, URI and version.
        self._line = ("", "", "")
        self._headers = _Headers()
        #: The body, if it comes in chunks.
        self._chunks: ChunkedBody | None = None
        #: Bytes of a body that are still to be skipped.
        self._remaining = 0

    def receive(self, data: bytes) -> None:
        """Add received bytes."""
        if self._state != _CLOSED:
            self._buffer += data

    @property
    def buffered(self) -> int:
        """Number of bytes received and not yet used."""
        return len(self._buffer)

    @property
    def incomplete(self) -> bool:
        """Whether a request has begun and its end is still to come."""
        return self._state in (_HEADERS, _BODY) or (self._state == _REQUEST_LINE and bool(self._buffer))

    @property
    def closed(self) -> bool:
        """Whether no further request can come."""
        return self._state == _CLOSED

    def next_event(self) -> Event | None:
        """Return the next event, or None when more bytes are needed."""
        try:
            while self._state != _CLOSED:
                if self._state == _BODY:
                    return self._take_body() if self._chunks is None else self._take_chunks(self._chunks)
                if self._state == _SKIP_BODY:
                    if not self._skip_body_bytes():
                        return None
                    continue
                line = self._take_line()
                if line is None:
                    return None
                event = self._process_line(line)
                if event is not None:
                    return event
        except _BadRequestError as error:
            if not self._headers.length_known:
                self._close()
            elif self._state != _SKIP_LINE:
                self._state = _SKIP_HEADERS
            return ProtocolError(str(error))
        return None

    def _close(self) -> None:
        self._state = _CLOSED
        self._buffer.clear()

    def _take_line(self) -> bytes | None:
        """Return the next line without its CR LF; None if it is not complete. Raises _BadRequestError if it is long."""
        if self._state == _SKIP_LINE and not self._skip_line_bytes():
            return None
        end = self._buffer.find(b"\r\n", 0, LINE_LIMIT)
        if end >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 2]
            return line
        if len(self._buffer) < LINE_LIMIT:
            return None
        state = self._state
        self._state = _SKIP_LINE
        head = bytes(self._buffer[:LINE_LIMIT])
        if state == _REQUEST_LINE:
            self._begin(head)
            raise _BadRequestError("Invalid request.")
        if _header_name(head) in _DELIMITING:
            self._headers.length_known = False
        if state == _HEADERS:
            raise _header_error(f"Invalid content length. Header: {head.decode(errors='replace')}")
        if not self._headers.length_known:
            self._close()
            return None
        return self._take_line()

    def _begin(self, line: bytes) -> None:
        """Begin a request with its first line, or the first bytes of it."""
        self._headers = _Headers()
        self._chunks = None
        # It is refused, and its client would take the body of the response for the next response.
        self._headers.length_known = not line.startswith(b"HEAD ")

    def _process_line(self, line: bytes) -> Event | None:
        if self._state == _REQUEST_LINE:
            if line:  # RFC 9112, 2.2: an empty line before a request is nothing
                self._begin(line)
                self._line = parse_request_line(line)
                self._state = _HEADERS
        elif self._state == _SKIP_HEADERS:
            self._look_at_skipped(line)
        elif line:
            self._headers.size += len(line) + 2
            if self._headers.size > HEADERS_LIMIT:
                raise _BadRequestError("Invalid request.")
            parse_header_line(self._headers, line)
        else:
            return self._end_headers()
        return None

    def _end_headers(self) -> Event | None:
        headers = self._headers
        if headers.chunked:
            headers.length_known = headers.content_length is None and self._line[2] == HTTP_1_1
            if not headers.length_known:  # RFC 9112, 6.1
                raise _header_error("Transfer-Encoding with Content-Length, or in a request of HTTP/1.0.")
            self._chunks = ChunkedBody(self.payload_limit)
        if not headers.has_body:
            self._state = _REQUEST_LINE
            return Request(*self._line, None)
        if not headers.chunked and (headers.content_length or 0) > self.payload_limit:
            self._skip_body()
            return self._too_large(headers.content_length or 0)
        self._state = _BODY
        return Continue(self._line[2]) if headers.expect else None

    def _too_large(self, size: int) -> ProtocolError:
        limit = self.payload_limit
        return ProtocolError(f"Request payload with size {size} is larger than the limit of {limit} allowed by server.")

    def _take_chunks(self, chunks: ChunkedBody) -> Request | ProtocolError | None:
        try:
            if not chunks.take(self._buffer):
                return None
        except ChunksTooLargeError:
            chunks.discard(SKIP_LIMIT)
            self._state = _SKIP_BODY
            return self._too_large(chunks.size)
        except ChunkError:
            self._close()
            return ProtocolError("Invalid request.")
        self._state = _REQUEST_LINE
        return Request(*self._line, bytes(chunks.data) or None)

    def _take_body(self) -> Request | None:
        length = self._headers.content_length or 0
        if len(self._buffer) < length:
            return None
        body = bytes(self._buffer[:length])
        del self._buffer[:length]
        self._state = _REQUEST_LINE
        return Request(*self._line, body)

    def _look_at_skipped(self, line: bytes) -> None:
        """Find out what one line means for the end of a request that was refused."""
        if not line:
            self._skip_body()
            return
        try:
            self._line = parse_request_line(line)
        except _BadRequestError:
            pass
        else:
            self._begin(line)
            self._state = _HEADERS
            return
        try:
            parse_header_line(self._headers, line)
        except _BadRequestError:  # one response for a bad request is enough
            if not self._headers.length_known:
                self._close()

    def _skip_body(self) -> None:
        """Arrange for the body of a request that was refused to be skipped."""
        headers = self._headers
        length = headers.content_length
        if not headers.has_body:
            self._state = _REQUEST_LINE
        elif headers.expect or (length is not None and (headers.chunked or length > SKIP_LIMIT)):
            self._close()  # who asked for leave and did not get it may send the body all the same, or not
        else:
            self._state = _SKIP_BODY
            self._remaining = length or 0
            if headers.chunked:
                self._chunks = ChunkedBody(0)
                self._chunks.discard(SKIP_LIMIT)

    def _skip_body_bytes(self) -> bool:
        """Drop bytes of a refused body; True when its end was reached."""
        if self._chunks is not None:
            try:
                ended = self._chunks.take(self._buffer)
            except (ChunkError, ChunksTooLargeError):  # answered already
                self._close()
                return False
            if ended:
                self._state = _REQUEST_LINE
            return ended
        skipped = min(self._remaining, len(self._buffer))
        del self._buffer[:skipped]
        self._remaining -= skipped
        if self._remaining:
            return False
        self._state = _REQUEST_LINE
        return True

    def _skip_line_bytes(self) -> bool:
        """Drop bytes up to the end of a line that is too long; True when it was reached."""
        end = self._buffer.find(b"\r\n")
        if end < 0:
            # A carriage return at the end may be the first half of the line's end.
            keep = 1 if self._buffer.endswith(b"\r") else 0
            del self._buffer[: len(self._buffer) - keep]
            return False
        del self._buffer[: end + 2]
        self._state = _SKIP_HEADERS
        return True


def _header_name(line: bytes) -> bytes:
    return line.partition(b":")[0].strip().lower()


def _header_error(reason: str) -> _BadRequestError:
    return _BadRequestError(f"Invalid header. Reason: {reason}")


def parse_request_line(line: bytes) -> tuple[str, str, str]:
    """Return method, URI and version of a request line without its CR LF."""
    method, first_space, rest = line.partition(b" ")
    uri, second_space, version = rest.partition(b" ")
    if not first_space or not second_space:
        raise _BadRequestError("Invalid request.")
    method_text = method.decode("latin-1")
    if method_text not in METHODS:
        raise _BadRequestError("Invalid HTTP Method: Unsupported HTTP method.")
    if not uri:
        raise _BadRequestError("Invalid URI: Empty URI not allowed.")
    try:
        uri_text = uri.decode()
    except UnicodeDecodeError:
        raise _BadRequestError("Invalid URI: Cannot parse URI as UTF-8.") from None
    version_text = version.decode("latin-1")
    if version_text not in VERSIONS:
        raise _BadRequestError("Invalid HTTP Version: Unsupported HTTP version.")
    return method_text, uri_text, version_text


def parse_header_line(headers: _Headers, line: bytes) -> None:
    """Note what a header line says. Headers that are unknown or of no interest are accepted with any value."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        headers.length_known = _header_name(line) not in _DELIMITING
        raise _header_error(f"Header contains invalid characters. Key: {_utf8_error(error)}") from None
    name, colon, value = text.partition(":")
    if not colon:
        raise _header_error(f"Header is incorrectly formatted. Key: {name}")
    key = name.strip(WHITE_SPACE).lower()
    if key == "content-length":
        length = _unsigned(value.strip(WHITE_SPACE))
        if length is None or headers.content_length not in (None, length):
            headers.length_known = False
            raise _header_error(f"Invalid value. Key:{name}; Value:{value}")
        headers.content_length = length
    elif key == "transfer-encoding":
        coding = value.strip(WHITE_SPACE).lower()
        if coding != "identity":
            if coding != "chunked" or headers.chunked:
                headers.length_known = False
                raise _header_error(f"Unsupported value. Key:{name}; Value:{value}")
            headers.chunked = True
    elif key == "expect":
        if value.strip(WHITE_SPACE) == "100-continue":
            headers.expect = True
    elif key == "accept-encoding":
        _check_accept_encoding(value.strip(WHITE_SPACE))


def _check_accept_encoding(value: str) -> None:
    """Refuse clients that do not take a plain body."""
    if not value:
        raise _BadRequestError("Invalid request.")
    for encoding in value.split(","):
        token = encoding.strip(WHITE_SPACE)
        if token == "identity;q=0" or (token == "*;q=0" and "identity" not in value):
            raise _header_error(f"Invalid value. Key:Accept-Encoding; Value:{encoding}")


def _unsigned(text: str) -> int | None:
    """Return a decimal number of 32 bits, which may have a plus sign as Rust allows it; None if it is none."""
    digits = text.removeprefix("+")
    if not digits.isascii() or not digits.isdecimal():
        return None
    significant = digits.lstrip("0")
    if len(significant) > len(str(_MAX_CONTENT_LENGTH)):
        return None
    number = int(significant or "0")
    return number if number <= _MAX_CONTENT_LENGTH else None


def _utf8_error(error: UnicodeDecodeError) -> str:
    """Describe a decoding error in the words of Rust's Utf8Error."""
    if error.reason == "unexpected end of data":
        return f"incomplete utf-8 byte sequence from index {error.start}"
    return f"invalid utf-8 sequence of {error.end - error.start} bytes from index {error.start}"


def render_response(
    status: int,
    body: bytes | None = None,
    *,
    deprecation: bool = False,
    allow: tuple[str, ...] = (),
    version: str = HTTP_1_1,
    content_type: str = "application/json",
    closing: bool = False,
) -> bytes:
    """Return a response. 100 and 204 have no body headers; every other status has Content-Length, if only 0."""
    connection = "close" if closing else "keep-alive"
    head = [f"{version} {status} \r\nServer: Firecracker API\r\nConnection: {connection}\r\n"]
    if deprecation:
        head.append("Deprecation: true\r\n")
    if allow:
        head.append(f"Allow: {', '.join(allow)}\r\n")
    if body is not None or status not in (100, 204):
        head.append(f"Content-Type: {content_type}\r\nContent-Length: {len(body or b'')}\r\n")
    head.append("\r\n")
    return "".join(head).encode() + (body or b"")


def render_protocol_error(text: str, *, closing: bool = False) -> bytes:
    """Return the response to a malformed request. The text is not escaped: clients know it as it is.

    ``closing``: the connection is closed after it.
    """
    body = f'{{ "error": "{text}\nAll previous unanswered requests will be dropped." }}'
    return render_response(400, body.encode(), closing=closing)
