"""Executes actions: which of them are allowed before and after the start, and what they do.

``PrebootController`` changes the configuration and starts the microVM, ``RuntimeController`` operates it;
``Controller`` is the one of the two that is in charge. All raise ActionError with the text of the fault message.
"""

from __future__ import annotations

import time

from ipc.typed import TYPE_CHECKING
from vmm import actions
from vmm.errors import VmmError
from vmm.version import APP_NAME, FIRECRACKER_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from vmm.actions import Action
    from vmm.api.text import JsonValue
    from vmm.logger import Logger
    from vmm.resources import VmResources

    class InstanceInfo(Protocol):
        """What GET / reports."""

        @property
        def id(self) -> str:
            """Id of the microVM."""

        @property
        def state(self) -> str:
            """``Not started``, ``Running`` or ``Paused``."""

        @property
        def vmm_version(self) -> str:
            """Version that clients expect."""

        @property
        def app_name(self) -> str:
            """Name that clients expect."""

    class Microvm(Protocol):
        """What the controller needs of ``vmm.vmm.Vmm``; each operation raises VmmError when it fails."""

        def version(self) -> str:
            """Return the version."""

        def instance_info(self) -> InstanceInfo:
            """Return id, state, version and name."""

        def pause_vm(self) -> None:
            """Park all vCPUs. Idempotent."""

        def resume_vm(self) -> None:
            """Let all vCPUs run. Idempotent."""

        def send_ctrl_alt_del(self) -> None:
            """Type Ctrl-Alt-Del."""

        def vcpu_report(self) -> list[JsonValue]:
            """Return what GET /vcpus shows."""


NOT_SUPPORTED_PREBOOT = "The requested operation is not supported before starting the microVM."
NOT_SUPPORTED_POSTBOOT = "The requested operation is not supported after starting the microVM."
STATE_NOT_STARTED = "Not started"


class ActionError(VmmError):
    """An action was refused or failed; the text is what the client gets."""

    code = "vmm.action"


class PrebootController:
    """Before the start: everything can be configured, nothing runs."""

    def __init__(
        self,
        resources: VmResources,
        instance_id: str,
        builder: Callable[[VmResources], Microvm],
        logger: Logger,
    ) -> None:
        self.resources = resources
        #: The microVM, once it was started.
        self.vmm: Microvm | None = None
        self._instance_id = instance_id
        self._builder = builder
        self._logger = logger
        self._handlers: dict[type, Callable[..., JsonValue]] = {
            actions.GetInstanceInfo: self._get_instance_info,
            actions.GetVersion: lambda _: _version_json(FIRECRACKER_VERSION),
            actions.GetMachineConfig: lambda _: resources.machine_config.to_json(),
            actions.GetFullConfig: lambda _: resources.to_json(),
            actions.UpdateMachineConfig: self._update_machine_config,
            actions.ConfigureBootSource: self._configure_boot_source,
            actions.ConfigureLogger: self._configure_logger,
            actions.ConfigureSerial: self._configure_serial,
            actions.StartMicrovm: self._start,
        }

    def execute(self, action: Action) -> JsonValue:
        """Execute an action; returns what the client gets, None for nothing. Raises ActionError."""
        handler = self._handlers.get(type(action))
        if handler is None:
            raise ActionError(NOT_SUPPORTED_PREBOOT)
        return handler(action)

    def _get_instance_info(self, _action: actions.GetInstanceInfo) -> JsonValue:
        return {
            "id": self._instance_id,
            "state": STATE_NOT_STARTED,
            "vmm_version": FIRECRACKER_VERSION,
            "app_name": APP_NAME,
        }

    def _update_machine_config(self, action: actions.UpdateMachineConfig) -> None:
        with _prefixed("Machine config error"):
            self.resources.update_machine_config(action.update)

    def _configure_boot_source(self, action: actions.ConfigureBootSource) -> None:
        with _prefixed("Boot source error"):
            self.resources.set_boot_source(action.config)

    def _configure_logger(self, action: actions.ConfigureLogger) -> None:
        with _prefixed("Logger error"):
            self._logger.configure(action.config)

    def _configure_serial(self, action: actions.ConfigureSerial) -> None:
        self.resources.set_serial(action.config)

    def _start(self, _action: actions.StartMicrovm) -> None:
        with _prefixed("Start microvm error"):
            self.resources.check_startable()
            self.vmm = self._builder(self.resources)
        self.resources.close()


class RuntimeController:
    """After the start: the microVM can be operated, its configuration only be read."""

    def __init__(self, resources: VmResources, vmm: Microvm, logger: Logger) -> None:
        self.resources = resources
        self.vmm = vmm
        self._logger = logger
        self._handlers: dict[type, Callable[..., JsonValue]] = {
            actions.GetInstanceInfo: self._get_instance_info,
            actions.GetVersion: lambda _: _version_json(vmm.version()),
            actions.GetMachineConfig: lambda _: resources.machine_config.to_json(),
            actions.GetFullConfig: lambda _: resources.to_json(),
            actions.FlushMetrics: lambda _: None,  # as with Firecracker when no metrics file is configured
            actions.GetVcpus: self._get_vcpus,
            actions.SendCtrlAltDel: self._send_ctrl_alt_del,
            actions.Pause: self._pause,
            actions.Resume: self._resume,
        }

    def execute(self, action: Action) -> JsonValue:
        """Execute an action; returns what the client gets, None for nothing. Raises ActionError."""
        handler = self._handlers.get(type(action))
        if handler is None:
            raise ActionError(NOT_SUPPORTED_POSTBOOT)
        return handler(action)

    def _get_instance_info(self, _action: actions.GetInstanceInfo) -> JsonValue:
        info = self.vmm.instance_info()
        return {"id": info.id, "state": info.state, "vmm_version": info.vmm_version, "app_name": info.app_name}

    def _get_vcpus(self, _action: actions.GetVcpus) -> JsonValue:
        with _prefixed("Internal VMM error"):
            return self.vmm.vcpu_report()

    def _send_ctrl_alt_del(self, _action: actions.SendCtrlAltDel) -> None:
        with _prefixed("Internal VMM error"):
            self.vmm.send_ctrl_alt_del()

    def _pause(self, _action: actions.Pause) -> None:
        self._timed("pause vm", self.vmm.pause_vm)

    def _resume(self, _action: actions.Resume) -> None:
        self._timed("resume vm", self.vmm.resume_vm)

    def _timed(self, name: str, operation: Callable[[], None]) -> None:
        start = time.monotonic_ns()
        with _prefixed("Internal VMM error"):
            operation()
        self._logger.info(f"'{name}' VMM action took {(time.monotonic_ns() - start) // 1000} us.")


class Controller:
    """The controller in charge: the preboot one until the microVM was started, then the runtime one."""

    def __init__(
        self,
        resources: VmResources,
        instance_id: str,
        builder: Callable[[VmResources], Microvm],
        logger: Logger,
        started: Callable[[Microvm], None] = lambda _vmm: None,
    ) -> None:
        """``started`` is called with the microVM after a successful start, before the client is answered."""
        self._logger = logger
        self._started = started
        self._current: PrebootController | RuntimeController
        self._current = PrebootController(resources, instance_id, builder, logger)

    @property
    def vmm(self) -> Microvm | None:
        """The microVM, or None before the start."""
        return self._current.vmm

    @property
    def resources(self) -> VmResources:
        """The configuration."""
        return self._current.resources

    def execute(self, action: Action) -> JsonValue:
        """Execute an action; returns what the client gets, None for nothing. Raises ActionError."""
        result = self._current.execute(action)
        if isinstance(self._current, PrebootController) and self._current.vmm is not None:
            vmm = self._current.vmm
            self._current = RuntimeController(self._current.resources, vmm, self._logger)
            self._started(vmm)
        return result


def _version_json(version: str) -> JsonValue:
    return {"firecracker_version": version}


class _prefixed:
    """Turns errors of the controller's tree into ActionError with the prefix that clients know."""

    __slots__ = ("_prefix",)

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, VmmError):
            raise ActionError(f"{self._prefix}: {error}") from error
