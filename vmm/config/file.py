"""``--config-file``: the whole configuration in one JSON document.

Keys are those of GET /vm/config. ``boot-source`` and ``drives`` are required; keys that are not known are ignored, as
Firecracker does. Each section is applied by the endpoint that has it (vmm.api.dispatch).
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, Any
from vmm.config.balloon import BALLOON
from vmm.config.boot_source import BOOT_SOURCE
from vmm.config.drives import DRIVE
from vmm.config.entropy import ENTROPY
from vmm.config.machine import MACHINE_CONFIG
from vmm.config.memory_hotplug import MEMORY_HOTPLUG
from vmm.config.mmds import MMDS_CONFIG
from vmm.config.network import NETWORK
from vmm.config.pmem import PMEM
from vmm.config.vsock import VSOCK
from vmm.cpu_config.template import CPU_TEMPLATE
from vmm.errors import VmmError
from vmm.files import FileOpenError, read_text
from vmm.json.decoder import JsonError, Reader, UnplacedError
from vmm.json.schema import STRING, Field, List, Object, Option, decode
from vmm.observe.logger import LOGGER_CONFIG
from vmm.observe.metrics import METRICS_CONFIG

if TYPE_CHECKING:
    from base.lean_typing import Iterator
    from vmm.cpu_config.template import CustomCpuTemplate

#: A configuration file may not be larger than this.
MAX_SIZE = 1 << 20
#: The sections in the order in which they are applied: each finds what it refers to.
ORDER = (
    "logger", "metrics", "machine-config", "cpu-config", "boot-source", "drives", "network-interfaces", "vsock",
    "balloon", "mmds-config", "entropy", "pmem", "memory-hotplug",
)  # fmt: skip
#: What is said before an error where it is not what the request's answer says.
_PREFIXES = {"mmds-config": "MMDS config error"}


class ConfigFileError(VmmError):
    """The configuration file cannot be read or does not describe a microVM."""

    code = "vmm.config_file"


class VmmConfig:
    """The document: a value for each section that is there."""

    __slots__ = ("sections",)

    def __init__(self, *values: Any) -> None:
        """Take the values of ``_FIELDS``, in their order."""
        self.sections: dict[str, Any] = {
            field.key: value for field, value in zip(_FIELDS, values, strict=True) if value is not None
        }

    def in_order(self) -> Iterator[tuple[str, Any]]:
        """Iterate over what is configured, as it is to be applied: section and element, or the section's value."""
        for section in ORDER:
            value = self.sections.get(section)
            for item in value if isinstance(value, list) else () if value is None else (value,):
                yield section, item


class _CpuConfig:
    """A CPU template, or the path of a file that holds one."""

    __slots__ = ()

    def decode(self, reader: Reader) -> CustomCpuTemplate:
        """Consume a template or a path."""
        if reader.peek_value() != ord('"'):
            return CPU_TEMPLATE.decode(reader)
        path = STRING.decode(reader)
        try:
            return decode(CPU_TEMPLATE, read_text(path, MAX_SIZE))
        except (FileOpenError, JsonError) as error:
            raise UnplacedError(f"The CPU template {path} cannot be used: {error}") from error


#: Fields in the order in which Firecracker declares them, which is the order in which missing ones are reported.
_FIELDS = (
    Field("balloon", Option(BALLOON)),
    Field("drives", List(DRIVE)),
    Field("boot-source", BOOT_SOURCE),
    Field("cpu-config", Option(_CpuConfig())),
    Field("logger", Option(LOGGER_CONFIG)),
    Field("machine-config", Option(MACHINE_CONFIG)),
    Field("metrics", Option(METRICS_CONFIG)),
    Field("mmds-config", Option(MMDS_CONFIG)),
    Field("network-interfaces", List(NETWORK), []),
    Field("vsock", Option(VSOCK)),
    Field("entropy", Option(ENTROPY)),
    Field("pmem", List(PMEM), []),
    Field("memory-hotplug", Option(MEMORY_HOTPLUG)),
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


def refused_section(section: str, prefix: str, error: VmmError) -> ConfigFileError:
    """Return the error for a section that was refused; ``prefix`` is what the request's answer would begin with."""
    return _failed(f"{_PREFIXES.get(section, prefix)}: {error}")


def _failed(text: str) -> ConfigFileError:
    return ConfigFileError(f"Configuration for VMM from one single json failed: {text}")
