"""A microVM that only remembers what was asked of it, and an API on top of it without a socket."""

from __future__ import annotations

import json
from typing import Any

from base.event_manager import EventManager
from base.version import APP_NAME, FIRECRACKER_VERSION
from vmm.api.dispatch import Dispatcher
from vmm.api.http import Request, RequestParser
from vmm.config.resources import VmResources
from vmm.errors import VmmError
from vmm.machine.device_operations import DeviceOperations
from vmm.machine.report import InstanceInfo
from vmm.observe.logger import Logger
from vmm.observe.metrics import Metrics, read_logger
from vmm.session import Session


class FakeVmm(DeviceOperations):
    """Has the operations that a session uses; ``fail`` makes the next one raise."""

    def __init__(self) -> None:
        self.state = "Running"
        self.calls: list[str] = []
        self.fail: Exception | None = None

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error

    def version(self) -> str:
        return FIRECRACKER_VERSION

    @property
    def instance_info(self) -> InstanceInfo:
        return InstanceInfo("test", self.state, FIRECRACKER_VERSION, APP_NAME)

    def pause_vm(self) -> None:
        self._call("pause")
        self.state = "Paused"

    def resume_vm(self) -> None:
        self._call("resume")
        self.state = "Running"

    def vcpu_report(self) -> list[Any]:
        self._call("vcpus")
        return [{"index": 0, "state": "running"}]

    def replace_vcpu(self, vcpu: int) -> None:
        self._call(f"replace {vcpu}")

    def replace_vcpus(self) -> None:
        self._call("replace all")

    def send_ctrl_alt_del(self) -> None:
        self._call("ctrl-alt-del")

    def read_metrics(self) -> None:
        """It counts nothing."""


class Api:
    """Sends requests straight to the dispatcher; ``start_error`` makes starts fail."""

    def __init__(self, log_path: str, resources: VmResources | None = None) -> None:
        self.log_path = log_path
        self.logger = Logger("test")
        self.configure_log()
        self.vmm = FakeVmm()
        self.start_error: Exception | None = None
        self.built: list[VmResources] = []
        self.metrics = Metrics()
        self.metrics.instance_id = "test"
        self.metrics.sources.append(lambda: read_logger(self.metrics, self.logger))
        self.events = EventManager()
        self.session = Session(
            resources or VmResources(), "test", self._build, self.events, logger=self.logger, metrics=self.metrics
        )
        self.dispatcher = Dispatcher(self.session)

    def configure_log(self) -> None:
        from vmm.observe.logger import DEBUG, LoggerConfig

        self.logger.configure(LoggerConfig(self.log_path, DEBUG, show_level=True))

    def log(self) -> str:
        with open(self.log_path) as file:
            return file.read()

    def _build(self, resources: VmResources) -> Any:
        self.built.append(resources)
        if self.start_error is not None:
            raise self.start_error
        return self.vmm

    def raw(self, method: str, path: str, body: bytes | None = None) -> bytes:
        answer = self.dispatcher(Request(method, path, "HTTP/1.1", body))
        assert isinstance(answer, bytes)
        return answer

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Return status and decoded body."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        return parse_response(self.raw(method, path, data))[:2]

    def fault(self, method: str, path: str, body: Any = None) -> str:
        """Return the fault message of a request that must be refused."""
        status, reply = self.send(method, path, body)
        assert status == 400, reply
        assert list(reply) == ["fault_message"]
        message = reply["fault_message"]
        assert isinstance(message, str)
        return message

    def config(self) -> dict[str, Any]:
        """Return what GET /vm/config shows."""
        status, shown = self.send("GET", "/vm/config")
        assert status == 200
        assert isinstance(shown, dict)
        return shown

    def deprecated(self, method: str, path: str, body: Any) -> bool:
        """Tell whether the response has the header Deprecation."""
        headers = parse_response(self.raw(method, path, json.dumps(body).encode()))[2]
        return headers.get("Deprecation") == "true"

    def close(self) -> None:
        self.metrics.close()
        self.logger.close()
        self.session.resources.close()
        self.events.close()


def parse_response(data: bytes) -> tuple[int, Any, dict[str, str]]:
    """Return status, decoded body (None without one) and headers of one complete response."""
    head, separator, body = data.partition(b"\r\n\r\n")
    assert separator
    status_line, *lines = head.decode().split("\r\n")
    version, status, reason = status_line.split(" ")
    assert version in ("HTTP/1.0", "HTTP/1.1")
    assert reason == ""
    headers = dict(line.split(": ", 1) for line in lines)
    assert int(headers.get("Content-Length", "0")) == len(body)
    is_json = headers.get("Content-Type") == "application/json"
    return int(status), json.loads(body) if is_json else body.decode() or None, headers


class BuilderError(VmmError):
    """What a builder raises."""

    code = "test"


__all__ = ["Api", "BuilderError", "FakeVmm", "RequestParser", "parse_response"]
