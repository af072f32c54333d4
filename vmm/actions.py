"""What clients can ask for, as typed records; ``vmm.api.routes`` makes them, ``vmm.controller`` executes them."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from vmm.logger import LoggerConfig
from vmm.resources import BootSourceConfig, MachineConfigUpdate, SerialConfig


class GetInstanceInfo(NamedTuple):
    """GET /."""


class GetVersion(NamedTuple):
    """GET /version."""


class GetMachineConfig(NamedTuple):
    """GET /machine-config."""


class GetFullConfig(NamedTuple):
    """GET /vm/config."""


class UpdateMachineConfig(NamedTuple):
    """PUT and PATCH /machine-config: what is None stays as it is."""

    update: MachineConfigUpdate


class ConfigureBootSource(NamedTuple):
    """PUT /boot-source."""

    config: BootSourceConfig


class ConfigureLogger(NamedTuple):
    """PUT /logger."""

    config: LoggerConfig


class ConfigureSerial(NamedTuple):
    """PUT /serial."""

    config: SerialConfig


class StartMicrovm(NamedTuple):
    """PUT /actions InstanceStart."""


class FlushMetrics(NamedTuple):
    """PUT /actions FlushMetrics."""


class SendCtrlAltDel(NamedTuple):
    """PUT /actions SendCtrlAltDel."""


class Pause(NamedTuple):
    """PATCH /vm with state Paused."""


class Resume(NamedTuple):
    """PATCH /vm with state Resumed."""


Action: TypeAlias = (
    GetInstanceInfo
    | GetVersion
    | GetMachineConfig
    | GetFullConfig
    | UpdateMachineConfig
    | ConfigureBootSource
    | ConfigureLogger
    | ConfigureSerial
    | StartMicrovm
    | FlushMetrics
    | SendCtrlAltDel
    | Pause
    | Resume
)
