"""From a request to its response: parse, execute, log, render. Never raises."""

from __future__ import annotations

import time

from ipc.typed import TYPE_CHECKING
from vmm import actions
from vmm.api.http import render_response
from vmm.api.routes import RequestError, parse
from vmm.api.text import debug_string, json_text
from vmm.controller import ActionError
from vmm.logger import API_THREAD, DEBUG, INFO

if TYPE_CHECKING:
    from vmm.api.http import Request
    from vmm.controller import Controller
    from vmm.logger import Logger

_TIMED: dict[type, str] = {actions.Pause: "pause vm", actions.Resume: "resume vm"}


class ApiHandler:
    """Answers requests on behalf of a controller."""

    def __init__(self, controller: Controller, logger: Logger) -> None:
        self._controller = controller
        self._logger = logger

    def __call__(self, request: Request) -> bytes:
        """Execute a request and return the response."""
        start = time.monotonic_ns()
        logger = self._logger
        if logger.level >= INFO:
            logger.info(f"The API server received a {_describe(request, logger.level)}.", API_THREAD)
        try:
            parsed = parse(request)
        except RequestError as error:
            return self._refused(str(error))
        if parsed.deprecation is not None:
            logger.warn(parsed.deprecation, API_THREAD)
        try:
            result = self._controller.execute(parsed.action)
        except ActionError as error:
            return self._refused(str(error), deprecation=parsed.deprecation is not None)
        except Exception as error:  # a fault of ours: say so, and keep the microVM
            return self._refused(f"Internal VMM error: {_where(error)}", deprecation=parsed.deprecation is not None)
        status, words = (204, "204 No Content") if result is None else (200, "200 OK")
        logger.info(f"The request was executed successfully. Status code: {words}.", API_THREAD)
        name = _TIMED.get(type(parsed.action))
        elapsed_us = (time.monotonic_ns() - start) // 1000
        if name is not None:
            logger.info(f"'{name}' API request took {elapsed_us} us.", API_THREAD)
        if logger.level >= DEBUG:
            logger.debug(f"Total previous API call duration: {elapsed_us} us.", API_THREAD)
        body = None if result is None else json_text(result).encode()
        return render_response(status, body, deprecation=parsed.deprecation is not None)

    def _refused(self, text: str, *, deprecation: bool = False) -> bytes:
        self._logger.error(f"Received Error. Status code: 400 Bad Request. Message: {text}", API_THREAD)
        return render_response(400, json_text({"fault_message": text}).encode(), deprecation=deprecation)


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
