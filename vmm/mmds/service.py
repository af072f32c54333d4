"""The metadata service as guests see it: HTTP without I/O, bytes in and bytes out.

The network device will hand over what a TCP connection brings; nothing here knows of sockets. A connection takes one
request at a time, with head and body within ``REQUEST_LIMIT``, and stays open after errors that leave it in step.
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.mmds.store import V1, DataStore, NotFoundError, UnsupportedTypeError
from vmm.mmds.token import TokenAuthority, TokenError

if TYPE_CHECKING:
    from base.counters import Counters

#: Bytes of a request; more cannot be received at once.
REQUEST_LIMIT = 2500
TOKEN_PATH = "/latest/api/token"
JSON = "application/json"
TEXT = "text/plain"
_METHODS = ("GET", "PUT", "PATCH", "DELETE", "POST", "HEAD", "OPTIONS", "TRACE", "CONNECT")
_TOKEN_HEADERS = ("x-metadata-token", "x-aws-ec2-metadata-token")
_TTL_HEADERS = ("x-metadata-token-ttl-seconds", "x-aws-ec2-metadata-token-ttl-seconds")
_FORWARDED_HEADER = "X-Forwarded-For"
_MAX_U32 = (1 << 32) - 1

INVALID_REQUEST = "Invalid request."
NO_TOKEN = (
    "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the session token."
)
NO_TTL = (
    "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or "
    "`X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime."
)


class GuestRequest(NamedTuple):
    """A complete request. ``headers`` has names in lower case; of several equal ones the last counts."""

    method: str
    path: str
    version: str
    headers: dict[str, str]


class Response(NamedTuple):
    """What a guest is answered."""

    status: int
    body: str
    content_type: str = TEXT
    allow: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()

    def render(self, version: str = "HTTP/1.1") -> bytes:
        """Return the bytes on the wire; like the API's, without a reason phrase."""
        body = self.body.encode(errors="replace")
        lines = [f"{version} {self.status} ", "Server: MMDS", "Connection: keep-alive"]
        if self.allow:
            lines.append(f"Allow: {', '.join(self.allow)}")
        lines += [f"{name}: {value}" for name, value in self.headers]
        lines += [f"Content-Type: {self.content_type}", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + body


class _BadRequestError(Exception):
    """The bytes are no request; what follows on the connection cannot be understood."""


class MetadataService:
    """Answers requests from the data store; ``metrics`` is the group ``mmds``."""

    def __init__(self, store: DataStore, microvm_id: str, metrics: Counters) -> None:
        self.store = store
        self.version = V1
        self.imds_compat = False
        self._authority = TokenAuthority(microvm_id)
        self._metrics = metrics

    def respond(self, request: GuestRequest) -> Response:
        """Answer one request. Never raises."""
        if not request.path:
            return Response(400, "Invalid URI.")
        if request.method == "GET":
            return self._refused_token(request) or self._get(request)
        if request.method == "PUT":
            return self._put(request)
        return Response(405, "Not allowed HTTP method.", allow=("GET", "PUT"))

    def _refused_token(self, request: GuestRequest) -> Response | None:
        """Check the token; version 1 answers whatever it is, and only counts."""
        token = _header(request, _TOKEN_HEADERS)
        if token is None:
            self._metrics.add("rx_no_token")
            refusal = Response(401, NO_TOKEN)
        elif not self._authority.is_valid(token):
            self._metrics.add("rx_invalid_token")
            refusal = Response(401, "MMDS token not valid.")
        else:
            return None
        return None if self.version == V1 else refusal

    def _get(self, request: GuestRequest) -> Response:
        imds = self.imds_compat or not _accepts_json(request.headers.get("accept", ""))
        try:
            text = self.store.get(_collapse(request.path), imds=imds)
        except NotFoundError:
            return Response(404, f"Resource not found: {request.path}.")
        except UnsupportedTypeError as error:
            return Response(501, str(error))
        return Response(200, text, TEXT if imds else JSON)

    def _put(self, request: GuestRequest) -> Response:
        if _FORWARDED_HEADER.lower() in request.headers:
            return Response(400, f"Invalid header. Reason: Unsupported header name. Key: {_FORWARDED_HEADER}")
        if _collapse(request.path) != TOKEN_PATH:
            return Response(404, f"Resource not found: {request.path}.")
        text = _header(request, _TTL_HEADERS)
        if text is None:
            return Response(400, NO_TTL)
        ttl = _u32(text)
        if ttl is None:
            return Response(400, f"Invalid header. Reason: Invalid value. Key:{_ttl_name(request)}; Value:{text}")
        try:
            token = self._authority.generate(ttl)
        except TokenError as error:
            return Response(400, str(error))
        return Response(200, token, headers=((_ttl_name(request), str(ttl)),))


class GuestConnection:
    """One TCP connection: bytes of the guest in, bytes for the guest out."""

    def __init__(self, service: MetadataService) -> None:
        self._service = service
        self._buffer = b""
        #: Nothing more can be understood: the connection is to be closed when the output was sent.
        self.closed = False

    def receive(self, data: bytes) -> bytes:
        """Take bytes in; return what is to be sent."""
        if self.closed:
            return b""
        self._buffer += data
        output = []
        try:
            while (request := self._next()) is not None:
                output.append(self._service.respond(request).render(request.version))
        except _BadRequestError as error:
            self.closed = True
            self._buffer = b""
            output.append(Response(400, str(error)).render())
        return b"".join(output)

    def _next(self) -> GuestRequest | None:
        """Take the next request out of the buffer; None while it is incomplete."""
        end = self._buffer.find(b"\r\n\r\n", 0, REQUEST_LIMIT)
        if end < 0:
            if len(self._buffer) >= REQUEST_LIMIT:
                raise _BadRequestError(INVALID_REQUEST)
            return None
        request, length = _parse_head(self._buffer[:end])
        if end + 4 + length > REQUEST_LIMIT:
            raise _BadRequestError(INVALID_REQUEST)
        if len(self._buffer) < end + 4 + length:
            return None
        self._buffer = self._buffer[end + 4 + length :]
        return request


def _parse_head(head: bytes) -> tuple[GuestRequest, int]:
    """Return a request and the length of its body, which means nothing to us."""
    try:
        request_line, *lines = head.decode().split("\r\n")
    except UnicodeDecodeError:
        raise _BadRequestError(INVALID_REQUEST) from None
    method, _, rest = request_line.partition(" ")
    uri, space, version = rest.rpartition(" ")
    if not space or method not in _METHODS or version not in ("HTTP/1.0", "HTTP/1.1"):
        raise _BadRequestError(INVALID_REQUEST)
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise _BadRequestError(INVALID_REQUEST)
        headers[name.strip().lower()] = value.strip()
    length = _u32(headers.get("content-length", "0"))
    if length is None:
        raise _BadRequestError(INVALID_REQUEST)
    return GuestRequest(method, _absolute_path(uri), version, headers), length


def _absolute_path(uri: str) -> str:
    """Return the path of a URI, without a query; empty if there is none."""
    if uri.startswith("http://"):
        _, slash, path = uri.removeprefix("http://").partition("/")
        return slash + path
    return uri if uri.startswith("/") else ""


def _collapse(path: str) -> str:
    while "//" in path:
        path = path.replace("//", "/")
    return path


def _accepts_json(accept: str) -> bool:
    return any(part.partition(";")[0].strip() == JSON for part in accept.split(","))


def _header(request: GuestRequest, names: tuple[str, ...]) -> str | None:
    return next((request.headers[name] for name in names if name in request.headers), None)


def _ttl_name(request: GuestRequest) -> str:
    """Return the lifetime header in the spelling of its family: the response has the same one."""
    own = _TTL_HEADERS[0] in request.headers
    return "X-metadata-token-ttl-seconds" if own else "X-aws-ec2-metadata-token-ttl-seconds"


def _u32(text: str) -> int | None:
    """Return a decimal number of 32 bits, which may have a plus sign as Rust allows it; None if it is none."""
    digits = text.removeprefix("+")
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 10 or int(digits) > _MAX_U32:
        return None
    return int(digits)
