"""What clients can ask for, as typed records; ``vmm.api.routes`` makes them, ``vmm.controller`` executes them.

Plain classes: there is one per operation, and a NamedTuple costs five times as much import time.
"""

from __future__ import annotations

from ipc.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.logger import LoggerConfig
    from vmm.resources import BootSourceConfig, MachineConfigUpdate, SerialConfig


class Action:
    """Base of all actions. Two are equal if they ask for the same thing."""

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def __hash__(self) -> int:
        return hash((type(self), *(getattr(self, name) for name in self.__slots__)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(repr(getattr(self, name)) for name in self.__slots__)})"


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


class UpdateMachineConfig(Action):
    """PUT and PATCH /machine-config: what is None stays as it is."""

    __slots__ = ("update",)

    def __init__(self, update: MachineConfigUpdate) -> None:
        self.update = update


class ConfigureBootSource(Action):
    """PUT /boot-source."""

    __slots__ = ("config",)

    def __init__(self, config: BootSourceConfig) -> None:
        self.config = config


class ConfigureLogger(Action):
    """PUT /logger."""

    __slots__ = ("config",)

    def __init__(self, config: LoggerConfig) -> None:
        self.config = config


class ConfigureSerial(Action):
    """PUT /serial."""

    __slots__ = ("config",)

    def __init__(self, config: SerialConfig) -> None:
        self.config = config


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
