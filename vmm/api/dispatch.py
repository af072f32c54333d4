"""From a request to its response, and from the configuration file to its effect, by the rows of ``vmm.api.endpoints``.

The order that clients observe: path, shape of the body, state of the microVM, the operation. Never raises on a request.
"""

from __future__ import annotations

import time

from base.lean_typing import TYPE_CHECKING, Any
from ipc.errors import BlockedEventError
from vmm.api.endpoints import devices, instance, machine, memory, mmds, network, observe, snapshot, storage, vcpus
from vmm.api.endpoints.table import BAD_JSON, Endpoint, OperationError, RequestError, checked_id, unknown_path
from vmm.api.http import TakeOver, render_response
from vmm.api.prometheus import CONTENT_TYPE, exposition
from vmm.config.file import refused_section
from vmm.errors import VmmError
from vmm.json import schema
from vmm.json.decoder import JsonError
from vmm.json.text import debug_string, json_text
from vmm.observe.logger import API_THREAD, DEBUG, INFO

if TYPE_CHECKING:
    from base.lean_typing import Callable
    from vmm.api.http import Request
    from vmm.api.streams import EventStreams
    from vmm.config.file import VmmConfig
    from vmm.json.text import JsonValue
    from vmm.session import Session

NOT_SUPPORTED_PREBOOT = "The requested operation is not supported before starting the microVM."
NOT_SUPPORTED_POSTBOOT = "The requested operation is not supported after starting the microVM."
_EMPTY_BODY = {"PUT": "Empty PUT request.", "PATCH": "Empty PATCH request."}
_UNWANTED_BODY = {"GET": "GET request cannot have a body.", "DELETE": "Empty Delete request."}

#: Method and first part of the path → the rest of each row's path, and the row.
_ROWS: dict[tuple[str, str], list[tuple[list[str], Endpoint]]] = {}
#: Section of the configuration file → the row that applies it.
_SECTIONS: dict[str, Endpoint] = {}
for _row in (
    *instance.ENDPOINTS,
    *machine.ENDPOINTS,
    *storage.ENDPOINTS,
    *network.ENDPOINTS,
    *memory.ENDPOINTS,
    *mmds.ENDPOINTS,
    *snapshot.ENDPOINTS,
    *observe.ENDPOINTS,
    *vcpus.ENDPOINTS,
    *devices.ENDPOINTS,
):
    _first, *_rest = _row.path.split("/")
    _ROWS.setdefault((_row.method, _first), []).append((_rest, _row))
    if _row.section:
        _SECTIONS[_row.section] = _row
#: Method and first part of the path → what is said of the rest if no row has it.
_UNKNOWN_PATHS: dict[tuple[str, str], Callable[[list[str]], RequestError]] = {
    **memory.UNKNOWN_PATHS,
    **mmds.UNKNOWN_PATHS,
    **snapshot.UNKNOWN_PATHS,
}


def endpoints() -> list[Endpoint]:
    """Return all rows."""
    return [row for rows in _ROWS.values() for _, row in rows]


class Call:
    """What a request asks for: a row, the id in the path, the body, and what is deprecated about it (None: nothing)."""

    __slots__ = ("body", "deprecation", "endpoint", "id")

    def __init__(self, endpoint: Endpoint, id_: str, body: Any) -> None:
        self.endpoint = endpoint
        self.id = id_
        self.body = body
        self.deprecation = None if endpoint.deprecation is None else endpoint.deprecation(body)


def parse(request: Request) -> Call:
    """Return what a request asks for. Raises RequestError."""
    method, body = request.method, request.body
    if body is not None and method in _UNWANTED_BODY:
        raise RequestError(_UNWANTED_BODY[method])
    first, rest = _split(request.path)
    rows = _ROWS.get((method, first), [])
    row = _match(rows, rest)
    if body is None and method in _EMPTY_BODY and (row is None or _needs_body(row)):
        raise RequestError(_EMPTY_BODY[method])
    if row is None:
        unknown = _UNKNOWN_PATHS.get((method, first))
        raise unknown_path(method, first) if unknown is None else unknown(rest)
    id_ = rest[0] if rest else ""
    if row.path.endswith("{id}"):
        checked_id(id_)
    value = row.default if body is None or row.body is None else _decode(row.body, body)
    if row.choice:
        row = next(each for _, each in rows if each.path == row.path and each.choice == value)
    if row.check is not None:
        row.check(rest, value)
    return Call(row, id_, value)


def _needs_body(row: Endpoint) -> bool:
    return row.body is not None and row.default is schema.REQUIRED


def _match(rows: list[tuple[list[str], Endpoint]], rest: list[str]) -> Endpoint | None:
    """Return the first row for the rest of a path. Surplus parts do not count where they cannot mean another row."""
    for parts, row in rows:
        if not parts:
            if not rest or all(not others for others, _ in rows):
                return row
        elif parts[0].startswith("{") or rest[: len(parts)] == parts:
            return row
    return None


def _decode(shape: schema.Type[Any], body: bytes) -> Any:
    try:
        return schema.decode(shape, body)
    except JsonError as error:
        raise RequestError(f"{BAD_JSON}{error}.") from error


def _split(path: str) -> tuple[str, list[str]]:
    tokens = path_tokens(path)
    return (tokens[0], tokens[1:]) if tokens else ("", [])


def _counted(request: Request) -> str:
    """Return the metrics key of a request that no row may have: all rows of one resource have the same."""
    rows = _ROWS.get((request.method, _split(request.path)[0]))
    return rows[0][1].counted if rows else ""


def path_tokens(path: str) -> list[str]:
    """Split a path: leading slashes and one at the end do not count."""
    stripped = path.lstrip("/")
    if not stripped:
        return []
    tokens = stripped.split("/")
    return tokens[:-1] if not tokens[-1] else tokens


class Dispatcher:
    """Answers requests on a session. ``streams`` takes over connections that ask for events."""

    def __init__(self, session: Session, streams: EventStreams | None = None) -> None:
        self._session = session
        self._logger = session.logger
        self._metrics = session.metrics
        self._streams = streams

    def __call__(self, request: Request) -> bytes | TakeOver:
        """Execute a request and return the response, or who takes the connection over."""
        start = time.monotonic_ns()
        answer = self._answer(request, start)
        if self._logger.level >= DEBUG:
            elapsed_us = (time.monotonic_ns() - start) // 1000
            self._logger.debug(f"Total previous API call duration: {elapsed_us} us.", API_THREAD)
        return answer

    def _answer(self, request: Request, start: int) -> bytes | TakeOver:
        logger = self._logger
        if logger.level >= INFO:
            logger.info(f"The API server received a {_describe(request, logger.level)}.", API_THREAD)
        try:
            call = parse(request)
        except RequestError as error:
            self._count(request.method, _counted(request), failed=True)
            return self._refused(str(error))
        except MemoryError:
            raise  # the limit of this process is met: whatever has led to it, nothing can be relied on any more
        except Exception as error:  # a fault of ours, which must not end the microVM
            self._count(request.method, _counted(request), failed=True)
            return self._refused(f"Internal VMM error: {_where(error)}")
        self._count(request.method, call.endpoint.counted, failed=False)
        deprecated = call.deprecation is not None
        if call.deprecation is not None:
            self._metrics["deprecated_api"].add("deprecated_http_api_calls")
            logger.warn(call.deprecation, API_THREAD)
        if call.endpoint is observe.EVENT_STREAM:
            return self._stream()
        if call.endpoint is observe.EXPOSITION:
            return self._exposition()
        try:
            result = self.execute(call)
        except OperationError as error:
            return self._refused(str(error), error.status, deprecation=deprecated)
        except (MemoryError, BlockedEventError):
            raise  # it ends the machine, whatever was asked for
        except Exception as error:  # a fault of ours: say so, and keep the microVM
            return self._refused(f"Internal VMM error: {_where(error)}", deprecation=deprecated)
        return self._succeeded(call, result, start)

    def execute(self, call: Call) -> JsonValue:
        """Do what a request asks for; returns what the client gets, None for nothing. Raises OperationError."""
        session, row = self._session, call.endpoint
        before = session.vmm is None
        handler = row.before if before else row.running
        if handler is None:
            raise OperationError(NOT_SUPPORTED_PREBOOT if before else NOT_SUPPORTED_POSTBOOT)
        try:
            result = handler(session, call.id, call.body)
        except OperationError:
            raise
        except VmmError as error:
            if not row.prefix:
                raise
            raise OperationError(f"{row.prefix}: {error}{row.suffix}") from error
        session.boot_specific |= before and row.boot_specific
        return result

    def apply(self, document: VmmConfig) -> None:
        """Configure the microVM as a document says. Raises ConfigFileError at the first section that is refused."""
        for section, body in document.in_order():
            row = _SECTIONS[section]
            assert row.before is not None
            try:
                row.before(self._session, "", body)
            except VmmError as error:
                raise refused_section(section, row.prefix, error) from error

    def _succeeded(self, call: Call, result: JsonValue, start: int) -> bytes:
        logger, timed = self._logger, call.endpoint.timed
        status, words = (204, "204 No Content") if result is None else (200, "200 OK")
        logger.info(f"The request was executed successfully. Status code: {words}.", API_THREAD)
        if timed:
            elapsed_us = (time.monotonic_ns() - start) // 1000
            self._metrics["latencies_us"].store(timed, elapsed_us)
            logger.info(f"'{timed.replace('_', ' ')}' API request took {elapsed_us} us.", API_THREAD)
        body = None if result is None else json_text(result).encode()
        return render_response(status, body, deprecation=call.deprecation is not None)

    def _count(self, method: str, counted: str, *, failed: bool) -> None:
        if not counted:
            return
        if method == "GET":
            if not failed:
                self._metrics["get_api_requests"].add(f"{counted}_count")
            return
        group = self._metrics["put_api_requests" if method == "PUT" else "patch_api_requests"]
        group.add(f"{counted}_count")
        if failed:
            group.add(f"{counted}_fails")

    def _stream(self) -> bytes | TakeOver:
        if self._streams is None:
            return self._refused("There are no events here.")
        if self._streams.full:
            return self._refused(f"There are {len(self._streams)} event streams already: close one of them first.")
        self._logger.info("An event stream begins.", thread=API_THREAD)
        return TakeOver(self._streams.adopt)

    def _exposition(self) -> bytes:
        text = exposition(self._metrics, self._session.instance_info().state)
        self._logger.info("The request was executed successfully. Status code: 200 OK.", thread=API_THREAD)
        return render_response(200, text.encode(), content_type=CONTENT_TYPE)

    def _refused(self, text: str, status: int = 400, *, deprecation: bool = False) -> bytes:
        words = "413 Payload too large" if status == 413 else "400 Bad Request"
        self._logger.error(f"Received Error. Status code: {words}. Message: {text}", API_THREAD)
        return render_response(status, json_text({"fault_message": text}).encode(), deprecation=deprecation)


def _describe(request: Request, level: int) -> str:
    """Name a request in the log, with its body where that is no secret and not long."""
    path = request.path
    text = f"{request.method.capitalize()} request on {debug_string(path)}"
    if request.body is None or path == "/mmds":
        return text
    if path == "/cpu-config" and level < DEBUG:
        return f"{text}. To view the CPU template received by the API, configure log-level to DEBUG"
    try:
        body = request.body.decode()
    except UnicodeDecodeError:
        body = "inconvertible to UTF-8"
    return f"{text} with body {debug_string(body)}"


def _where(error: Exception) -> str:
    """Describe an unexpected exception and where it was raised, on one line."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    place = ""
    if traceback is not None:
        code = traceback.tb_frame.f_code
        place = f" at {code.co_filename.rpartition('/')[2]}:{traceback.tb_lineno}"
    return f"unexpected {type(error).__name__}{place}: {error}"
