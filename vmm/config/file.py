"""``--config-file``: the whole configuration in one JSON document.

Keys are those of GET /vm/config. ``boot-source`` and ``drives`` are required; keys that are not known are ignored, as
Firecracker does. Sections are applied in an order in which each finds what it refers to.
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, Any
from vmm.api.routes import BOOT_SOURCE, LOGGER, MACHINE_CONFIG, METRICS
from vmm.config.balloon import BALLOON
from vmm.config.drives import DRIVE
from vmm.config.entropy import ENTROPY
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

if TYPE_CHECKING:
    from base.lean_typing import Callable, Iterator
    from vmm.config.resources import VmResources
    from vmm.cpu_config.template import CustomCpuTemplate
    from vmm.observe.logger import Logger
    from vmm.observe.metrics import Metrics

#: A configuration file may not be larger than this.
MAX_SIZE = 1 << 20


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

    def items(self, key: str) -> Iterator[Any]:
        """Iterate over what a section holds: its elements, itself, or nothing."""
        value = self.sections.get(key)
        if isinstance(value, list):
            yield from value
        elif value is not None:
            yield value


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
    Field("logger", Option(LOGGER)),
    Field("machine-config", Option(MACHINE_CONFIG)),
    Field("metrics", Option(METRICS)),
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


def apply(config: VmmConfig, resources: VmResources, logger: Logger, metrics: Metrics) -> None:
    """Configure a microVM as the document says. Raises ConfigFileError at the first section that is refused."""
    operations: tuple[tuple[str, str, Callable[[Any], None]], ...] = (
        ("logger", "Logger error", logger.configure),
        ("metrics", "Metrics error", metrics.configure),
        ("machine-config", "Machine config error", resources.update_machine_config),
        ("cpu-config", "Configure CPU error", resources.set_cpu_template),
        ("boot-source", "Boot source error", resources.set_boot_source),
        ("drives", "Drive config error", resources.insert_drive),
        ("network-interfaces", "Network config error", resources.network_interfaces.insert),
        ("vsock", "Vsock config error", resources.set_vsock),
        ("balloon", "Balloon config error", resources.set_balloon),
        ("mmds-config", "MMDS config error", resources.set_mmds_config),
        ("entropy", "Entropy config error", resources.set_entropy),
        ("pmem", "Pmem config error", resources.insert_pmem),
        ("memory-hotplug", "Memory hotplug config error", resources.set_memory_hotplug),
    )
    for key, prefix, operation in operations:
        for item in config.items(key):
            try:
                operation(item)
            except VmmError as error:
                raise _failed(f"{prefix}: {error}") from error


def load(path: str, resources: VmResources, logger: Logger, metrics: Metrics) -> None:
    """Read, parse and apply a configuration file. Raises ConfigFileError."""
    apply(parse(read(path)), resources, logger, metrics)


def _failed(text: str) -> ConfigFileError:
    return ConfigFileError(f"Configuration for VMM from one single json failed: {text}")
