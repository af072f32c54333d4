"""Executes actions: which of them are allowed before and after the start, and what they do.

``PrebootController`` changes the configuration and starts the microVM, ``RuntimeController`` operates it;
``Controller`` is the one of the two that is in charge. All raise ActionError with the text of the fault message.
"""

from __future__ import annotations

import time

from base.lean_typing import TYPE_CHECKING
from vmm import actions
from vmm.config.rate_limiter import RateLimiterConfig
from vmm.errors import VmmError
from vmm.mmds.store import MmdsLimitError
from vmm.observe.metrics import METRICS, Metrics
from vmm.version import APP_NAME, FIRECRACKER_VERSION

if TYPE_CHECKING:
    from base.lean_typing import Any, Callable
    from vmm.actions import Action
    from vmm.config.resources import VmResources
    from vmm.json.text import JsonValue
    from vmm.machine.vmm import Vmm
    from vmm.observe.logger import Logger

NOT_SUPPORTED_PREBOOT = "The requested operation is not supported before starting the microVM."
NOT_SUPPORTED_POSTBOOT = "The requested operation is not supported after starting the microVM."
#: Hot-plug of devices needs the PCI transport.
NO_PCI = "PCI is not enabled"
STATE_NOT_STARTED = "Not started"
STATE_PAUSED = "Paused"


class ActionError(VmmError):
    """An action was refused or failed; the text is what the client gets, ``status`` the HTTP status."""

    code = "vmm.action"

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class _MmdsContent:
    """GET, PUT and PATCH /mmds, which are possible at any time."""

    def __init__(self, resources: VmResources) -> None:
        store = resources.mmds
        self.handlers: dict[type, Callable[..., JsonValue]] = {
            actions.GetMmds: lambda _: store.value,
            actions.PutMmds: lambda action: self._change(store.put, action.config),
            actions.PatchMmds: lambda action: self._change(store.patch, action.config),
        }

    def _change(self, operation: Callable[[JsonValue], None], value: JsonValue) -> None:
        try:
            with _prefixed("MMDS error"):
                operation(value)
        except ActionError as error:
            if isinstance(error.__cause__, MmdsLimitError):
                raise ActionError(f"MMDS limit exceeded error: {error.__cause__}", 413) from error
            raise


class PrebootController:
    """Before the start: everything can be configured, nothing runs."""

    def __init__(
        self,
        resources: VmResources,
        instance_id: str,
        builder: Callable[[VmResources], Vmm],
        logger: Logger,
        metrics: Metrics,
    ) -> None:
        self.resources = resources
        #: The microVM, once it was started.
        self.vmm: Vmm | None = None
        self._instance_id = instance_id
        self._builder = builder
        #: Something was configured that a snapshot would bring along: none can be loaded any more.
        self._boot_specific = False
        self._handlers: dict[type, Callable[..., JsonValue]] = {
            actions.GetInstanceInfo: self._get_instance_info,
            actions.GetVersion: lambda _: _version_json(FIRECRACKER_VERSION),
            actions.GetMachineConfig: lambda _: resources.machine_config.to_json(),
            actions.GetFullConfig: lambda _: resources.to_json(),
            actions.GetBalloon: self._get_balloon,
            actions.UpdateMachineConfig: self._update_machine_config,
            actions.ConfigureSerial: self._configure_serial,
            actions.LoadSnapshot: self._load_snapshot,
            actions.StartMicrovm: self._start,
            **_MmdsContent(resources).handlers,
        }
        #: Actions that hand their configuration to an operation: the prefix of its errors, whether it is boot-specific.
        self._operations: dict[type, tuple[str, bool, Callable[[Any], None]]] = {
            actions.ConfigureLogger: ("Logger error", False, logger.configure),
            actions.ConfigureMetrics: ("Metrics error", False, metrics.configure),
            actions.ConfigureBootSource: ("Boot source error", True, resources.set_boot_source),
            actions.InsertDrive: ("Drive config error", True, resources.insert_drive),
            actions.InsertPmem: ("Pmem config error", True, resources.insert_pmem),
            actions.InsertNetworkInterface: ("Network config error", True, resources.network_interfaces.insert),
            actions.SetVsock: ("Vsock config error", True, resources.set_vsock),
            actions.SetEntropy: ("Entropy config error", True, resources.set_entropy),
            actions.SetBalloon: ("Balloon config error", True, resources.set_balloon),
            actions.SetMemoryHotplug: ("Memory hotplug config error", True, resources.set_memory_hotplug),
            actions.SetMmdsConfig: ("MMMDS config error", True, resources.set_mmds_config),
            actions.SetCpuTemplate: ("Configure CPU error", False, resources.set_cpu_template),
        }

    def execute(self, action: Action) -> JsonValue:
        """Execute an action; returns what the client gets, None for nothing. Raises ActionError."""
        handler = self._handlers.get(type(action))
        if handler is not None:
            return handler(action)
        if type(action) not in self._operations:
            raise ActionError(NOT_SUPPORTED_PREBOOT)
        prefix, boot_specific, operation = self._operations[type(action)]
        with _prefixed(prefix):
            operation(action.config)  # type: ignore[attr-defined]
        self._boot_specific |= boot_specific
        return None

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
        self._boot_specific = True

    def _get_balloon(self, _action: actions.GetBalloon) -> JsonValue:
        with _prefixed("Balloon config error"):
            return self.resources.require_balloon().to_json()

    def _load_snapshot(self, _action: actions.LoadSnapshot) -> None:
        if self._boot_specific:
            raise ActionError(
                "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources."
            )
        raise ActionError("Load snapshot error: Snapshots are not yet supported.")

    def _configure_serial(self, action: actions.ConfigureSerial) -> None:
        self.resources.set_serial(action.config)

    def _start(self, _action: actions.StartMicrovm) -> None:
        with _prefixed("Start microvm error"):
            self.resources.check_startable()
            self.vmm = self._builder(self.resources)
        self.resources.started()


class RuntimeController:
    """After the start: the microVM can be operated, its configuration only be read."""

    def __init__(self, resources: VmResources, vmm: Vmm, logger: Logger, metrics: Metrics) -> None:
        self.resources = resources
        self.vmm = vmm
        self._logger = logger
        self._metrics = metrics
        self._handlers: dict[type, Callable[..., JsonValue]] = {
            actions.GetInstanceInfo: self._get_instance_info,
            actions.GetVersion: lambda _: _version_json(vmm.version()),
            actions.GetMachineConfig: lambda _: resources.machine_config.to_json(),
            actions.GetFullConfig: lambda _: resources.to_json(),
            actions.FlushMetrics: self._flush_metrics,
            actions.GetVcpus: self._get_vcpus,
            actions.ReplaceWorkers: self._replace_workers,
            actions.SendCtrlAltDel: self._send_ctrl_alt_del,
            actions.Pause: self._pause,
            actions.Resume: self._resume,
            actions.CreateSnapshot: self._create_snapshot,
            **_MmdsContent(resources).handlers,
            **_device_handlers(vmm),
        }

    def execute(self, action: Action) -> JsonValue:
        """Execute an action; returns what the client gets, None for nothing. Raises ActionError."""
        handler = self._handlers.get(type(action))
        if handler is None:
            raise ActionError(NOT_SUPPORTED_POSTBOOT)
        return handler(action)

    def _get_instance_info(self, _action: actions.GetInstanceInfo) -> JsonValue:
        info = self.vmm.instance_info
        return {"id": info.id, "state": info.state, "vmm_version": info.vmm_version, "app_name": info.app_name}

    def _get_vcpus(self, _action: actions.GetVcpus) -> JsonValue:
        with _prefixed("Internal VMM error"):
            return self.vmm.vcpu_report()

    def _replace_workers(self, action: actions.ReplaceWorkers) -> None:
        with _prefixed("Replace worker error"):
            if action.vcpu is None:
                self.vmm.replace_vcpus()
            else:
                self.vmm.replace_vcpu(action.vcpu)

    def _send_ctrl_alt_del(self, _action: actions.SendCtrlAltDel) -> None:
        with _prefixed("Internal VMM error"):
            self.vmm.send_ctrl_alt_del()

    def _flush_metrics(self, _action: actions.FlushMetrics) -> None:
        with _prefixed("Internal VMM error: Metrics error"):
            self._metrics.flush()

    def _pause(self, _action: actions.Pause) -> None:
        self._timed("pause vm", "vmm_pause_vm", self.vmm.pause_vm)

    def _resume(self, _action: actions.Resume) -> None:
        self._timed("resume vm", "vmm_resume_vm", self.vmm.resume_vm)

    def _timed(self, name: str, metric: str, operation: Callable[[], None]) -> None:
        start = time.monotonic_ns()
        with _prefixed("Internal VMM error"):
            operation()
        elapsed_us = (time.monotonic_ns() - start) // 1000
        self._metrics["latencies_us"].store(metric, elapsed_us)
        self._logger.info(f"'{name}' VMM action took {elapsed_us} us.")

    def _create_snapshot(self, _action: actions.CreateSnapshot) -> None:
        if self.vmm.instance_info.state != STATE_PAUSED:
            raise ActionError("Create snapshot error: Operation not allowed: save/restore unavailable while running")
        raise ActionError("Create snapshot error: Snapshots are not yet supported.")


def _device_handlers(vmm: Vmm) -> dict[type, Callable[..., JsonValue]]:
    """Return what executes the operations on devices of a running microVM."""

    def under(prefix: str, operation: Callable[..., JsonValue], suffix: str = "") -> Callable[..., JsonValue]:
        def handle(action: Any) -> JsonValue:
            with _prefixed(prefix, suffix):
                return operation(action)

        return handle

    def value(method: Callable[[Any], None]) -> Callable[..., JsonValue]:
        return lambda action: method(action.config)

    def result(method: Callable[[], JsonValue]) -> Callable[..., JsonValue]:
        return lambda _action: method()

    verify = " Please verify the request arguments."
    return {
        actions.InsertDrive: _refuse_hotplug,
        actions.InsertPmem: _refuse_hotplug,
        actions.InsertNetworkInterface: _refuse_hotplug,
        actions.RemoveDevice: _refuse_hotplug,
        actions.UpdateDrive: under(
            "Drive config error: Unable to patch the block device", lambda action: _update_drive(vmm, action), verify
        ),
        actions.UpdatePmem: under(
            "Pmem config error: Unable to patch the pmem device", lambda action: _update_pmem(vmm, action), verify
        ),
        actions.UpdateNetworkInterface: under(
            "Network config error: Unable to update the net device", lambda action: _update_network(vmm, action)
        ),
        actions.GetBalloon: under("Internal VMM error", result(vmm.balloon_config)),
        actions.GetBalloonStatistics: under("Internal VMM error", result(vmm.latest_balloon_stats)),
        actions.UpdateBalloon: under("Balloon update error", value(vmm.update_balloon_config)),
        actions.UpdateBalloonStatistics: under("Balloon update error", value(vmm.update_balloon_stats_config)),
        actions.StartBalloonHinting: under("Balloon update error", value(vmm.start_balloon_hinting)),
        actions.GetBalloonHinting: under("Balloon update error", result(vmm.get_balloon_hinting_status)),
        actions.StopBalloonHinting: under("Balloon update error", result(vmm.stop_balloon_hinting)),
        actions.GetMemoryHotplug: under("Internal VMM error", result(vmm.memory_hotplug_status)),
        actions.UpdateMemoryHotplug: under("Memory hotplug update error", value(vmm.update_memory_hotplug_size)),
    }


def _refuse_hotplug(_action: Action) -> JsonValue:
    raise ActionError(NO_PCI)


def _update_drive(vmm: Vmm, action: actions.UpdateDrive) -> None:
    drive_id, path, limiter = action.config
    if path is None and limiter is None:
        vmm.update_vhost_user_block_config(drive_id)
    if path is not None:
        vmm.update_block_device_path(drive_id, path)
    if limiter is not None:
        vmm.update_block_rate_limiter(drive_id, limiter.bandwidth, limiter.ops)


def _update_pmem(vmm: Vmm, action: actions.UpdatePmem) -> None:
    limiter = action.config.rate_limiter or RateLimiterConfig()
    vmm.update_pmem_rate_limiter(action.config.id, limiter.bandwidth, limiter.ops)


def _update_network(vmm: Vmm, action: actions.UpdateNetworkInterface) -> None:
    rx = action.config.rx_rate_limiter or RateLimiterConfig()
    tx = action.config.tx_rate_limiter or RateLimiterConfig()
    vmm.update_net_rate_limiters(action.config.iface_id, rx.bandwidth, rx.ops, tx.bandwidth, tx.ops)


class Controller:
    """The controller in charge: the preboot one until the microVM was started, then the runtime one."""

    def __init__(
        self,
        resources: VmResources,
        instance_id: str,
        builder: Callable[[VmResources], Vmm],
        logger: Logger,
        started: Callable[[Vmm], None] = lambda _vmm: None,
        *,
        metrics: Metrics = METRICS,
    ) -> None:
        """``started`` is called with the microVM after a successful start, before the client is answered."""
        self._logger = logger
        self._metrics = metrics
        self._started = started
        self._current: PrebootController | RuntimeController
        self._current = PrebootController(resources, instance_id, builder, logger, metrics)

    @property
    def vmm(self) -> Vmm | None:
        """The microVM, or None before the start."""
        return self._current.vmm

    @property
    def resources(self) -> VmResources:
        """The configuration."""
        return self._current.resources

    def restarted(self, vmm: Vmm) -> None:
        """Another machine has taken the place of the one that ran."""
        self._current = RuntimeController(self.resources, vmm, self._logger, self._metrics)

    def execute(self, action: Action) -> JsonValue:
        """Execute an action; returns what the client gets, None for nothing. Raises ActionError."""
        result = self._current.execute(action)
        if isinstance(self._current, PrebootController) and self._current.vmm is not None:
            vmm = self._current.vmm
            self._current = RuntimeController(self._current.resources, vmm, self._logger, self._metrics)
            self._started(vmm)
        return result


def _version_json(version: str) -> JsonValue:
    return {"firecracker_version": version}


class _prefixed:
    """Turns errors of the controller's tree into ActionError with the prefix that clients know."""

    __slots__ = ("_prefix", "_suffix")

    def __init__(self, prefix: str, suffix: str = "") -> None:
        self._prefix = prefix
        self._suffix = suffix

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, VmmError):
            raise ActionError(f"{self._prefix}: {error}{self._suffix}") from error
