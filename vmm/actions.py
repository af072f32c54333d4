# ruff: noqa: F401  (the names in quotes: it does not know that BodyAction is generic)
"""What clients can ask for, as typed records; ``vmm.api.routes`` makes them, ``vmm.controller`` executes them.

Plain classes: there is one per operation, and a NamedTuple costs five times as much import time.
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from vmm.config.balloon import BalloonConfig
    from vmm.config.drives import DriveConfig, DriveUpdate
    from vmm.config.entropy import EntropyConfig
    from vmm.config.memory_hotplug import MemoryHotplugConfig
    from vmm.config.mmds import MmdsConfig
    from vmm.config.network import NetworkConfig, NetworkUpdate
    from vmm.config.pmem import PmemConfig, PmemUpdate
    from vmm.config.resources import BootSourceConfig, MachineConfigUpdate, SerialConfig
    from vmm.config.snapshot import CreateSnapshotParams, LoadSnapshotParams
    from vmm.config.vsock import VsockConfig
    from vmm.cpu_config.template import CustomCpuTemplate
    from vmm.json.text import JsonValue
    from vmm.observe.logger import LoggerConfig
    from vmm.observe.metrics import MetricsConfig

T = TypeVar("T")


class Action:
    """Base of all actions. Two are equal if they ask for the same thing."""

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def __hash__(self) -> int:
        return hash((type(self), *(getattr(self, name) for name in self.__slots__)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(repr(getattr(self, name)) for name in self.__slots__)})"


class BodyAction(Action, Generic[T]):
    """Base of the actions that carry what the body says, and nothing else."""

    __slots__ = ("config",)

    def __init__(self, config: T) -> None:
        self.config = config


class GetInstanceInfo(Action):
    """GET /."""

    __slots__ = ()


class GetVersion(Action):
    """GET /version."""

    __slots__ = ()


class GetMachineConfig(Action):
    """GET /machine-config."""

    __slots__ = ()


class GetFullConfig(Action):
    """GET /vm/config."""

    __slots__ = ()


class GetVcpus(Action):
    """GET /vcpus."""

    __slots__ = ()


class ReplaceWorkers(Action):
    """PATCH /vcpus and /vcpus/{index} with Replace; ``vcpu`` is None for all."""

    __slots__ = ("vcpu",)

    def __init__(self, vcpu: int | None) -> None:
        self.vcpu = vcpu


class UpdateMachineConfig(Action):
    """PUT and PATCH /machine-config: what is None stays as it is."""

    __slots__ = ("update",)

    def __init__(self, update: MachineConfigUpdate) -> None:
        self.update = update


class StartMicrovm(Action):
    """PUT /actions InstanceStart."""

    __slots__ = ()


class FlushMetrics(Action):
    """PUT /actions FlushMetrics."""

    __slots__ = ()


class SendCtrlAltDel(Action):
    """PUT /actions SendCtrlAltDel."""

    __slots__ = ()


class Pause(Action):
    """PATCH /vm with state Paused."""

    __slots__ = ()


class Resume(Action):
    """PATCH /vm with state Resumed."""

    __slots__ = ()


class ConfigureBootSource(BodyAction["BootSourceConfig"]):
    """PUT /boot-source."""


class ConfigureLogger(BodyAction["LoggerConfig"]):
    """PUT /logger."""


class ConfigureMetrics(BodyAction["MetricsConfig"]):
    """PUT /metrics."""


class ConfigureSerial(BodyAction["SerialConfig"]):
    """PUT /serial."""


class InsertDrive(BodyAction["DriveConfig"]):
    """PUT /drives/{drive_id}."""


class UpdateDrive(BodyAction["DriveUpdate"]):
    """PATCH /drives/{drive_id}."""


class InsertPmem(BodyAction["PmemConfig"]):
    """PUT /pmem/{id}."""


class UpdatePmem(BodyAction["PmemUpdate"]):
    """PATCH /pmem/{id}."""


class InsertNetworkInterface(BodyAction["NetworkConfig"]):
    """PUT /network-interfaces/{iface_id}."""


class UpdateNetworkInterface(BodyAction["NetworkUpdate"]):
    """PATCH /network-interfaces/{iface_id}."""


class SetVsock(BodyAction["VsockConfig"]):
    """PUT /vsock."""


class SetEntropy(BodyAction["EntropyConfig"]):
    """PUT /entropy."""


class SetBalloon(BodyAction["BalloonConfig"]):
    """PUT /balloon."""


class UpdateBalloon(BodyAction["int"]):
    """PATCH /balloon: the target size in MiB."""


class UpdateBalloonStatistics(BodyAction["int"]):
    """PATCH /balloon/statistics: the polling interval in seconds."""


class StartBalloonHinting(BodyAction["bool"]):
    """PATCH /balloon/hinting/start: whether the host acknowledges when the guest is done."""


class SetMemoryHotplug(BodyAction["MemoryHotplugConfig"]):
    """PUT /hotplug/memory."""


class UpdateMemoryHotplug(BodyAction["int"]):
    """PATCH /hotplug/memory: the requested size in MiB."""


class SetCpuTemplate(BodyAction["CustomCpuTemplate"]):
    """PUT /cpu-config."""


class SetMmdsConfig(BodyAction["MmdsConfig"]):
    """PUT /mmds/config."""


class PutMmds(BodyAction["JsonValue"]):
    """PUT /mmds."""


class PatchMmds(BodyAction["JsonValue"]):
    """PATCH /mmds."""


class CreateSnapshot(BodyAction["CreateSnapshotParams"]):
    """PUT /snapshot/create."""


class LoadSnapshot(BodyAction["LoadSnapshotParams"]):
    """PUT /snapshot/load."""


class GetBalloon(Action):
    """GET /balloon."""

    __slots__ = ()


class GetBalloonStatistics(Action):
    """GET /balloon/statistics."""

    __slots__ = ()


class GetBalloonHinting(Action):
    """GET /balloon/hinting/status."""

    __slots__ = ()


class StopBalloonHinting(Action):
    """PATCH /balloon/hinting/stop."""

    __slots__ = ()


class GetMemoryHotplug(Action):
    """GET /hotplug/memory."""

    __slots__ = ()


class GetMmds(Action):
    """GET /mmds."""

    __slots__ = ()


class GetPrometheusMetrics(Action):
    """GET /metrics/prometheus."""

    __slots__ = ()


class StreamEvents(Action):
    """GET /events."""

    __slots__ = ()


class RemoveDevice(Action):
    """DELETE /drives/{drive_id}, /pmem/{id} and /network-interfaces/{iface_id}; ``kind`` is the first part."""

    __slots__ = ("kind", "device_id")

    def __init__(self, kind: str, device_id: str) -> None:
        self.kind = kind
        self.device_id = device_id
