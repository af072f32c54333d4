"""``--config-file``: the whole configuration in one JSON document.

Keys are those of GET /vm/config. ``boot-source`` and ``drives`` are required; keys that are not known are ignored, as
Firecracker does. What this version cannot do yet is refused by name.
"""

from __future__ import annotations

from ipc.typed import TYPE_CHECKING, Any
from vmm.api.json_decoder import JsonError
from vmm.api.routes import BOOT_SOURCE, LOGGER, MACHINE_CONFIG
from vmm.api.schema import ANYTHING, Field, List, Object, Option, decode
from vmm.errors import VmmError
from vmm.files import FileOpenError, read_text
from vmm.logger import LoggerConfigError
from vmm.resources import BootSourceError, MachineConfigError

if TYPE_CHECKING:
    from vmm.logger import Logger, LoggerConfig
    from vmm.resources import BootSourceConfig, MachineConfigUpdate, VmResources

#: A configuration file may not be larger than this.
MAX_SIZE = 1 << 20


class ConfigFileError(VmmError):
    """The configuration file cannot be read or does not describe a microVM."""

    code = "vmm.config_file"


class VmmConfig:
    """The document. ``to_come`` are the sections of features that do not exist yet, and are not empty."""

    __slots__ = ("boot_source", "logger", "machine_config", "to_come")

    def __init__(self, *values: Any) -> None:
        """Take the values of ``_FIELDS``, in their order."""
        sections = {field.key: value for field, value in zip(_FIELDS, values, strict=True)}
        self.boot_source: BootSourceConfig = sections.pop("boot-source")
        self.logger: LoggerConfig | None = sections.pop("logger")
        self.machine_config: MachineConfigUpdate | None = sections.pop("machine-config")
        self.to_come = [key for key, value in sections.items() if value is not None and value != []]


#: Fields in the order in which Firecracker declares them, which is the order in which missing ones are reported.
_FIELDS = (
    Field("balloon", Option(ANYTHING)),
    Field("drives", List(ANYTHING)),
    Field("boot-source", BOOT_SOURCE),
    Field("cpu-config", Option(ANYTHING)),
    Field("logger", Option(LOGGER)),
    Field("machine-config", Option(MACHINE_CONFIG)),
    Field("metrics", Option(ANYTHING)),
    Field("mmds-config", Option(ANYTHING)),
    Field("network-interfaces", List(ANYTHING), []),
    Field("vsock", Option(ANYTHING)),
    Field("entropy", Option(ANYTHING)),
    Field("pmem", List(ANYTHING), []),
    Field("memory-hotplug", Option(ANYTHING)),
)
_VMM_CONFIG = Object("VmmConfig", VmmConfig, *_FIELDS, ignore_unknown=True)


def read(path: str) -> bytes:
    """Return the text of the configuration file. Raises ConfigFileError."""
    try:
        return read_text(path, MAX_SIZE)
    except FileOpenError as error:
        raise ConfigFileError(f"Unable to open or read from the configuration file: {error}") from error


def parse(text: bytes) -> VmmConfig:
    """Return the document. Raises ConfigFileError."""
    try:
        return decode(_VMM_CONFIG, text)
    except JsonError as error:
        raise _failed(f"Invalid JSON: {error}") from error


def apply(config: VmmConfig, resources: VmResources, logger: Logger) -> None:
    """Configure a microVM as the document says. Raises ConfigFileError at the first section that is refused."""
    if config.to_come:
        raise _failed(f"The section {config.to_come[0]} is not yet supported.")
    try:
        if config.logger is not None:
            logger.configure(config.logger)
        if config.machine_config is not None:
            resources.update_machine_config(config.machine_config)
        resources.set_boot_source(config.boot_source)
    except LoggerConfigError as error:
        raise _failed(f"Logger error: {error}") from error
    except MachineConfigError as error:
        raise _failed(f"Machine config error: {error}") from error
    except BootSourceError as error:
        raise _failed(f"Boot source error: {error}") from error


def load(path: str, resources: VmResources, logger: Logger) -> None:
    """Read, parse and apply a configuration file. Raises ConfigFileError."""
    apply(parse(read(path)), resources, logger)


def _failed(text: str) -> ConfigFileError:
    return ConfigFileError(f"Configuration for VMM from one single json failed: {text}")
