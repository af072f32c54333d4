"""From a request to its response: parse, execute, log, render. Never raises."""

from __future__ import annotations

import time

from base.lean_typing import TYPE_CHECKING
from vmm import actions
from vmm.api.http import TakeOver, render_response
from vmm.api.prometheus import CONTENT_TYPE, exposition
from vmm.api.request import RequestError
from vmm.api.routes import parse, path_tokens
from vmm.controller import ActionError
from vmm.json.text import debug_string, json_text
from vmm.observe.logger import API_THREAD, DEBUG, INFO
from vmm.observe.metrics import METRICS, Metrics

if TYPE_CHECKING:
    from vmm.api.http import Request
    from vmm.api.streams import EventStreams
    from vmm.controller import Controller
    from vmm.observe.logger import Logger

#: What the log calls a request that is timed, and its metric.
_TIMED: dict[type, tuple[str, str]] = {
    actions.Pause: ("pause vm", "pause_vm"),
    actions.Resume: ("resume vm", "resume_vm"),
}
#: First token of the path → key in the groups put_api_requests and patch_api_requests, without _count and _fails.
_COUNTED = {
    "actions": "actions",
    "boot-source": "boot_source",
    "cpu-config": "cpu_cfg",
    "drives": "drive",
    "hotplug": "hotplug_memory",
    "logger": "logger",
    "machine-config": "machine_cfg",
    "metrics": "metrics",
    "mmds": "mmds",
    "network-interfaces": "network",
    "pmem": "pmem",
    "serial": "serial",
    "vsock": "vsock",
}
_GET_COUNTED = {
    "": "instance_info_count",
    "hotplug": "hotplug_memory_count",
    "machine-config": "machine_cfg_count",
    "mmds": "mmds_count",
    "version": "vmm_version_count",
}


class ApiHandler:
    """Answers requests on behalf of a controller. ``streams`` takes over connections that ask for events."""

    def __init__(
        self,
        controller: Controller,
        logger: Logger,
        metrics: Metrics = METRICS,
        streams: EventStreams | None = None,
    ) -> None:
        self._controller = controller
        self._logger = logger
        self._metrics = metrics
        self._streams = streams

    def __call__(self, request: Request) -> bytes | TakeOver:
        """Execute a request and return the response, or who takes the connection over."""
        start = time.monotonic_ns()
        logger = self._logger
        if logger.level >= INFO:
            logger.info(f"The API server received a {_describe(request, logger.level)}.", API_THREAD)
        try:
            parsed = parse(request)
        except RequestError as error:
            self._count(request, failed=True)
            return self._refused(str(error))
        except Exception as error:  # a fault of ours, which must not end the microVM
            self._count(request, failed=True)
            return self._refused(f"Internal VMM error: {_where(error)}")
        self._count(request, failed=False)
        if parsed.deprecation is not None:
            self._metrics["deprecated_api"].add("deprecated_http_api_calls")
            logger.warn(parsed.deprecation, API_THREAD)
        if isinstance(parsed.action, actions.StreamEvents):
            return self._stream()
        if isinstance(parsed.action, actions.GetPrometheusMetrics):
            return self._prometheus()
        try:
            result = self._controller.execute(parsed.action)
        except ActionError as error:
            return self._refused(str(error), error.status, deprecation=parsed.deprecation is not None)
        except Exception as error:  # a fault of ours: say so, and keep the microVM
            return self._refused(f"Internal VMM error: {_where(error)}", deprecation=parsed.deprecation is not None)
        status, words = (204, "204 No Content") if result is None else (200, "200 OK")
        logger.info(f"The request was executed successfully. Status code: {words}.", API_THREAD)
        timed = _TIMED.get(type(parsed.action))
        elapsed_us = (time.monotonic_ns() - start) // 1000
        if timed is not None:
            name, metric = timed
            self._metrics["latencies_us"].store(metric, elapsed_us)
            logger.info(f"'{name}' API request took {elapsed_us} us.", API_THREAD)
        if logger.level >= DEBUG:
            logger.debug(f"Total previous API call duration: {elapsed_us} us.", API_THREAD)
        body = None if result is None else json_text(result).encode()
        return render_response(status, body, deprecation=parsed.deprecation is not None)

    def _count(self, request: Request, *, failed: bool) -> None:
        tokens = path_tokens(request.path)
        first = tokens[0] if tokens else ""
        if request.method == "GET":
            if first in _GET_COUNTED and not failed:
                self._metrics["get_api_requests"].add(_GET_COUNTED[first])
            return
        group = self._metrics["put_api_requests" if request.method == "PUT" else "patch_api_requests"]
        key = f"{_COUNTED.get(first)}_count"
        if request.method in ("PUT", "PATCH") and key in group.values:
            group.add(key)
            if failed:
                group.add(f"{_COUNTED[first]}_fails")

    def _stream(self) -> bytes | TakeOver:
        if self._streams is None:
            return self._refused("There are no events here.")
        if self._streams.full:
            return self._refused(f"There are {len(self._streams)} event streams already: close one of them first.")
        self._logger.info("An event stream begins.", thread=API_THREAD)
        return TakeOver(self._streams.adopt)

    def _prometheus(self) -> bytes:
        info = self._controller.execute(actions.GetInstanceInfo())
        state = str(info["state"]) if isinstance(info, dict) else ""
        self._logger.info("The request was executed successfully. Status code: 200 OK.", thread=API_THREAD)
        return render_response(200, exposition(self._metrics, state).encode(), content_type=CONTENT_TYPE)

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
