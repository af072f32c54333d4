"""All that is configured before a microVM is built: validated on every change, complete when the builder gets it.

A change that is refused changes nothing. Error texts are Firecracker's where clients compare them.
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING
from vmm.config.balloon import BalloonConfig, BalloonError
from vmm.config.boot_source import BootSource, BootSourceConfig
from vmm.config.drives import DriveConfig, Drives
from vmm.config.entropy import EntropyConfig
from vmm.config.machine import HUGE_PAGES_NONE, MachineConfig, MachineConfigError, MachineConfigUpdate
from vmm.config.memory_hotplug import MemoryHotplugConfig
from vmm.config.mmds import MmdsConfig
from vmm.config.network import NetworkInterfaces
from vmm.config.pmem import PmemConfig, PmemDevices
from vmm.config.serial import SerialConfig, SerialError
from vmm.config.start_options import StartOptions
from vmm.config.tun_pool import TunPool
from vmm.config.vsock import VsockConfig
from vmm.errors import VmmError
from vmm.files import FileOpenError, open_output
from vmm.mmds.store import DataStore

if TYPE_CHECKING:
    from base.lean_typing import Iterator
    from vmm.cpu_config.template import CustomCpuTemplate
    from vmm.json.text import JsonValue


class StartError(VmmError):
    """The configuration cannot be started, whatever the host has."""

    code = "vmm.start"


class VmResources:
    """Everything that is configured before the start. One per process; survives starts that fail."""

    def __init__(self, options: StartOptions | None = None, tun: TunPool | None = None) -> None:
        self.options = options or StartOptions()
        #: What network interfaces are attached to TAPs with, when they are configured.
        self.tun = tun or TunPool()
        self.machine_config = MachineConfig()
        self.boot_source: BootSource | None = None
        self.serial = SerialConfig()
        self.drives = Drives()
        self.pmem = PmemDevices()
        self.network_interfaces = NetworkInterfaces()
        self.vsock: VsockConfig | None = None
        self.balloon: BalloonConfig | None = None
        self.entropy: EntropyConfig | None = None
        self.memory_hotplug: MemoryHotplugConfig | None = None
        self.mmds_config: MmdsConfig | None = None
        #: Content of the metadata service.
        self.mmds = DataStore(self.options.mmds_size_limit)
        #: Of a custom and a static CPU template (in ``machine_config``) the one that was set last counts.
        self.cpu_template: CustomCpuTemplate | None = None

    def update_machine_config(self, update: MachineConfigUpdate) -> None:
        """Change the machine configuration. Raises MachineConfigError."""
        updated = self.machine_config.updated(update, self.options.host_cpus)
        if self.balloon is not None and updated.mem_size_mib < self.balloon.amount_mib:
            raise MachineConfigError(
                "The memory size (MiB) is smaller than the previously set balloon device target size."
            )
        if update.cpu_template is not None:
            self.cpu_template = None
        self.machine_config = updated

    def set_cpu_template(self, template: CustomCpuTemplate) -> None:
        """Set a custom CPU template, which replaces a static one."""
        self.cpu_template = template
        self.machine_config = self.machine_config._replace(cpu_template=None)

    def insert_drive(self, config: DriveConfig) -> None:
        """Add or replace a block device. Raises DriveError."""
        self.drives.insert(config, pmem_root=self.pmem.has_root, boot_id=self.options.boot_id)

    def insert_pmem(self, config: PmemConfig) -> None:
        """Add or replace a pmem device. Raises PmemError."""
        self.pmem.insert(config, block_root=self.drives.has_root)

    def set_vsock(self, config: VsockConfig) -> None:
        """Set or replace the vsock device. Raises VsockError."""
        config.check()
        self.vsock = config

    def set_entropy(self, config: EntropyConfig) -> None:
        """Set or replace the entropy device."""
        self.entropy = config

    def set_balloon(self, config: BalloonConfig) -> None:
        """Set or replace the balloon. Raises BalloonError."""
        config.check(self.machine_config.mem_size_mib)
        self.balloon = config

    def require_balloon(self) -> BalloonConfig:
        """Return the balloon's configuration. Raises BalloonError if there is none."""
        if self.balloon is None:
            raise BalloonError("No balloon device found.")
        return self.balloon

    def set_memory_hotplug(self, config: MemoryHotplugConfig) -> None:
        """Set or replace the memory hot-plug device. Raises MemoryHotplugError."""
        config.check()
        self.memory_hotplug = config

    def set_mmds_config(self, config: MmdsConfig) -> None:
        """Configure the metadata service. Raises MmdsConfigError."""
        config.check(self._interface_ids())
        self.mmds_config = config

    def _interface_ids(self) -> list[str]:
        return [interface.iface_id for interface in self.network_interfaces.configs]

    def set_boot_source(self, config: BootSourceConfig) -> None:
        """Replace the boot source. Raises BootSourceError, and then the one before stays."""
        boot_source = BootSource(config)
        if self.boot_source is not None:
            self.boot_source.close_files()
        self.boot_source = boot_source

    def set_serial(self, config: SerialConfig) -> None:
        """Replace the configuration of the serial console; its file is opened at the start."""
        self.serial = config

    def open_serial_output(self) -> int:
        """Open ``serial_out_path`` and return a non-blocking descriptor, or -1 if none is set. Raises SerialError."""
        if self.serial.serial_out_path is None:
            return -1
        try:
            return open_output(self.serial.serial_out_path)
        except FileOpenError as error:
            raise SerialError(f"Failed to open the serial output file: {error}") from error

    def require_boot_source(self) -> BootSource:
        """Return the boot source with its files open. Raises StartError if none is configured."""
        if self.boot_source is None:
            raise StartError("Cannot start microvm without kernel configuration.")
        return self.boot_source

    @property
    def has_virtio_devices(self) -> bool:
        """Whether a device cell is needed."""
        return bool(self.drives.configs) or self.entropy is not None

    def check_startable(self) -> None:
        """Raise StartError if the configuration lacks something, or has something that cannot be started yet."""
        self.require_boot_source()
        machine = self.machine_config
        if machine.huge_pages != HUGE_PAGES_NONE:
            raise StartError(f"Huge pages are not yet supported: huge_pages is {machine.huge_pages}.")
        for feature in self._unsupported():
            raise StartError(f"{feature} is not yet supported.")

    def _unsupported(self) -> Iterator[str]:
        """Name what is configured and cannot be started yet."""
        for drive in self.drives.configs:
            if drive.path_on_host is None:
                yield f"The block device {drive.drive_id}"
        for pmem in self.pmem.configs:
            yield f"The pmem device {pmem.id}"
        for interface in self.network_interfaces.configs:
            yield f"The network interface {interface.iface_id}"
        for config, name in (
            (self.vsock, "The vsock device"),
            (self.balloon, "The balloon device"),
            (self.memory_hotplug, "The memory hot-plug device"),
        ):
            if config is not None:
                yield name

    def to_json(self) -> dict[str, JsonValue]:
        """Return what GET /vm/config shows: every section, whatever is configured."""
        boot_source = BootSourceConfig("") if self.boot_source is None else self.boot_source.config
        interfaces = self.network_interfaces.configs
        return {
            "balloon": None if self.balloon is None else self.balloon.to_json(),
            "drives": [drive.to_json() for drive in self.drives.configs],
            "boot-source": boot_source.to_json(),
            "cpu-config": None,
            "logger": None,
            "machine-config": self.machine_config.to_json(),
            "metrics": None,
            "mmds-config": None if self.mmds_config is None else self.mmds_config.to_json(self._interface_ids()),
            "network-interfaces": [interface.to_json() for interface in interfaces],
            "vsock": None if self.vsock is None else self.vsock.to_json(),
            "entropy": None if self.entropy is None else self.entropy.to_json(),
            "pmem": [pmem.to_json() for pmem in self.pmem.configs],
            "memory-hotplug": None if self.memory_hotplug is None else self.memory_hotplug.to_json(),
        }

    def started(self) -> None:
        """The microVM has started: close what it needs no more. One that restarts needs its kernel again.

        Without PCI no interface can be added any more.
        """
        self.tun.close()
        if not self.machine_config.restarts:
            self.close()

    def close(self) -> None:
        """Close the files that are held open for the start."""
        self.tun.close()
        if self.boot_source is not None:
            self.boot_source.close_files()
